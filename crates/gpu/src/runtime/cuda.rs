//! CUDA: kernels as C++ text, compiled by NVRTC.

use super::found::describe;
use super::{GpuDevice, Runtime};
use cubecl::Device;
use cubecl::device::CudaDevice;
use cubecl::prelude::Client;
use cudarc::driver::result;
use marlin_tensor::BackendError;

fn all() -> impl Iterator<Item = Device> {
    (0..).map_while(|index| Device::cuda(index).ok())
}

pub(super) fn devices() -> Vec<GpuDevice> {
    describe(Runtime::Cuda, all())
}

pub(super) fn client(device: &GpuDevice) -> Result<Client, BackendError> {
    Ok(Device::Cuda(CudaDevice::new(device.index)).client())
}

/// Bytes of the device's memory that no program holds.
pub(super) fn free_bytes(device: &GpuDevice) -> Option<u64> {
    let handle = result::device::get(i32::try_from(device.index).ok()?).ok()?;
    let before = result::ctx::get_current().ok()?.unwrap_or(std::ptr::null_mut());
    // SAFETY: the device is one that the driver handed out; its primary context, which cubecl works in, is held while it is this thread's
    // current one, and the thread has the one of before again afterwards.
    unsafe {
        let context = result::primary_ctx::retain(handle).ok()?;
        let free = result::ctx::set_current(context).and_then(|()| result::mem_get_info());
        let restored = result::ctx::set_current(before);
        let released = result::primary_ctx::release(handle);
        restored.and(released).ok()?;
        Some(free.ok()?.0 as u64)
    }
}
