//! Vulkan: kernels as SPIR-V on GPUs. Devices that are programs on the processor get them as WGSL, which wgpu translates: cubecl
//! 0.12.0-pre.1 writes invalid SPIR-V for shared memory on a device without `VK_KHR_workgroup_memory_explicit_layout`, which
//! software lacks and every GPU of the last years has.

use super::found::describe;
use super::{GpuDevice, Runtime};
use cubecl::Device;
use cubecl::device::{WgpuDevice, WgpuDeviceKind};
use cubecl::prelude::Client;
use cubecl::wgpu::{AutoCompiler, WgpuCompiler, WgpuRuntime};
use cubecl_runtime::runtime::Runtime as _;
use marlin_tensor::BackendError;

/// Real GPUs first, then what computes on the processor.
fn all() -> impl Iterator<Item = Device> {
    let kinds: [fn(usize) -> WgpuDeviceKind; 4] = [
        WgpuDeviceKind::DiscreteGpu,
        WgpuDeviceKind::IntegratedGpu,
        WgpuDeviceKind::VirtualGpu,
        |_| WgpuDeviceKind::Cpu,
    ];
    kinds.into_iter().flat_map(|kind| {
        let most = if matches!(kind(1), WgpuDeviceKind::Cpu) { 1 } else { usize::MAX };
        (0..most).map_while(move |index| Device::vulkan(kind(index)).ok())
    })
}

pub(super) fn devices() -> Vec<GpuDevice> {
    describe(Runtime::Vulkan, all())
}

pub(super) fn client(device: &GpuDevice) -> Result<Client, BackendError> {
    let found = all().filter(|d| d.description().is_some()).nth(device.index);
    let found = found.ok_or_else(|| {
        BackendError::Device(format!(
            "{} is gone; it needs {}",
            device.name,
            device.runtime.needs()
        ))
    })?;
    Ok(match &found {
        Device::Wgpu(inner) if device.is_software => client_of(AutoCompiler::Wgsl, inner),
        other => other.client(),
    })
}

/// A client whose kernels go through the compiler that `wrap` takes: its type has no public name.
fn client_of<C: WgpuCompiler>(_wrap: fn(C) -> AutoCompiler, device: &WgpuDevice) -> Client {
    WgpuRuntime::<C>::client(device)
}
