//! Metal without an Apple GPU: kernels become Metal text as on one, and the text runs on the processor.
//!
//! The text is C++ enough to be compiled with a header in place of Apple's (`metal_stdlib`), in which the threads of a
//! threadgroup are fibers. For tests: every operator's text is compiled, run, and held to the same results as on any
//! device. It is thousands of times slower than a GPU.

mod program;
mod server;

use super::{EMULATION, GpuDevice, Runtime};
use cubecl::prelude::Client;
use cubecl_common::device::DeviceId;

/// What the device is called.
const NAME: &str = "Metal text on the processor";

pub(super) fn devices() -> Option<GpuDevice> {
    EMULATION.get().map(|_| GpuDevice {
        runtime: Runtime::Metal,
        index: 0,
        name: NAME.to_owned(),
        memory_bytes: None,
        is_software: true,
        driver: None,
    })
}

pub(super) fn client() -> Client {
    Client::load::<server::Emulated>(DeviceId { type_id: 0, index_id: 0 })
}
