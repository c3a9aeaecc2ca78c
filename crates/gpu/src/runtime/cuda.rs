//! CUDA: kernels as C++ text, compiled by NVRTC.

use super::found::{describe, start};
use super::{GpuDevice, Runtime};
use cubecl::Device;
use cubecl::device::CudaDevice;
use marlin_tensor::{Backend, BackendError};
use std::sync::Arc;

fn all() -> impl Iterator<Item = Device> {
    (0..).map_while(|index| Device::cuda(index).ok())
}

pub(super) fn devices() -> Vec<GpuDevice> {
    describe(Runtime::Cuda, all())
}

pub(super) fn open(device: &GpuDevice) -> Result<Arc<dyn Backend>, BackendError> {
    start(device, || Device::Cuda(CudaDevice::new(device.index)).client())
}
