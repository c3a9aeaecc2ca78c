//! CUDA: kernels as C++ text, compiled by NVRTC, and a server of our own for them, because CubeCL's has no launches that start while
//! the one before ends (programmatic dependent launch), which a pass of hundreds of short kernels gains most from.
//!
//! `driver`: the driver's calls. `program`: from a kernel to what is launched, `kept`: on disk. `memory`: arrays. `server`: what a client talks to.

mod driver;
mod kept;
mod memory;
mod program;
mod server;

use super::{GpuDevice, Runtime};
use cubecl::prelude::Client;
use cubecl_common::device::DeviceId;
use cudarc::driver::result;
use cudarc::driver::sys;
use marlin_tensor::BackendError;

pub(super) fn devices() -> Vec<GpuDevice> {
    // SAFETY: it only looks for the library.
    if !unsafe { sys::is_culib_present() } || result::init().is_err() {
        return Vec::new();
    }
    let count = result::device::get_count().unwrap_or(0);
    let describe = |index: i32| {
        let device = result::device::get(index).ok()?;
        // SAFETY: the driver handed the device out.
        let memory = unsafe { result::device::total_mem(device) }.ok()?;
        Some(GpuDevice {
            runtime: Runtime::Cuda,
            index: index as usize,
            name: result::device::get_name(device).ok()?,
            memory_bytes: Some(memory as u64),
            is_software: false,
            driver: driver::version(),
        })
    };
    (0..count).filter_map(describe).collect()
}

pub(super) fn client(device: &GpuDevice) -> Result<Client, BackendError> {
    program::is_there().map_err(BackendError::Device)?;
    let index_id = device.index as u16;
    Ok(Client::load::<server::CudaServer>(DeviceId { type_id: 0, index_id }))
}

/// Bytes of the device's memory that no program holds.
pub(super) fn free_bytes(device: &GpuDevice) -> Option<u64> {
    let handle = result::device::get(i32::try_from(device.index).ok()?).ok()?;
    let before = result::ctx::get_current().ok()?.unwrap_or(std::ptr::null_mut());
    // SAFETY: the device is one that the driver handed out; its primary context, which the server works in, is held while it is this thread's
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
