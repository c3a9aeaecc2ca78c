//! CUDA: kernels as C++ text, compiled by NVRTC.

use super::found::describe;
use super::{GpuDevice, Runtime};
use cubecl::Device;
use cubecl::device::CudaDevice;
use cubecl::prelude::Client;
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
