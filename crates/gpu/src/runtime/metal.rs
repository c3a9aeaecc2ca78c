//! Metal: kernels in its own language.

use super::found::describe;
use super::{GpuDevice, Runtime};
use cubecl::Device;
use cubecl::device::MetalDevice;
use cubecl::prelude::Client;
use marlin_tensor::BackendError;

fn all() -> impl Iterator<Item = Device> {
    Device::metal(MetalDevice::default()).into_iter()
}

pub(super) fn devices() -> Vec<GpuDevice> {
    describe(Runtime::Metal, all())
}

pub(super) fn client(_: &GpuDevice) -> Result<Client, BackendError> {
    Ok(Device::Metal(MetalDevice::default()).client())
}
