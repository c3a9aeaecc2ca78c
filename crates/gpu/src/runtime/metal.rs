//! Metal: kernels in its own language.

use super::found::{describe, start};
use super::{GpuDevice, Runtime};
use cubecl::Device;
use cubecl::device::MetalDevice;
use marlin_tensor::{Backend, BackendError};
use std::sync::Arc;

fn all() -> impl Iterator<Item = Device> {
    Device::metal(MetalDevice::default()).into_iter()
}

pub(super) fn devices() -> Vec<GpuDevice> {
    describe(Runtime::Metal, all())
}

pub(super) fn open(device: &GpuDevice) -> Result<Arc<dyn Backend>, BackendError> {
    start(device, || Device::Metal(MetalDevice::default()).client())
}
