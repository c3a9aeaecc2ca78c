//! What a client of the emulated device talks to: memory of the host, and launches that are over when they return.

use super::program::Programs;
use super::{Target, properties};
use crate::runtime::EMULATION;
use crate::runtime::cpp::ALIGNMENT;
use cubecl_common::bytes::Bytes;
use cubecl_common::device::{DeviceId, DeviceService, ServerUtilitiesHandle, ServiceId};
use cubecl_common::profile::ProfileDuration;
use cubecl_core::server::{
    BufferBinding, CopyDescriptor, CubeCount, IoError, KernelArguments, KernelResource,
    ProfileError, ProfilingToken, Server, ServerCommunication, ServerError, ServerStorage,
    ServerUtilities,
};
use cubecl_environment::backtrace::BackTrace;
use cubecl_environment::future::DynFut;
use cubecl_environment::stream::StreamId;
use cubecl_server::allocator::ContiguousMemoryLayoutPolicy;
use cubecl_server::execution::LaunchMode;
use cubecl_server::kernel::CubeKernel;
use cubecl_server::logging::ServerLogger;
use cubecl_server::memory_management::{
    ManagedMemoryHandle, ManagedMemoryId, MemoryAllocationMode, StreamMemoryReport,
};
use cubecl_server::storage::{BytesStorage, ComputeStorage, ManagedResource};
use cubecl_server::timestamp_profiler::TimestampProfiler;
use std::collections::HashMap;
use std::sync::Arc;

/// Handles are looked through for such as nobody holds any more after this many were made.
const SWEEP: usize = 256;

/// Memory of one handle, on a line of its own.
struct Block {
    /// Two of its references are ours: this one, and that of the handle itself.
    handle: ManagedMemoryHandle,
    words: Vec<u128>,
}

/// The emulated device.
pub(super) struct Emulated {
    utilities: Arc<ServerUtilities>,
    memory: HashMap<ManagedMemoryId, Block>,
    made: usize,
    programs: Programs,
    timestamps: TimestampProfiler,
    /// The first launch that failed; what is read after it is not what it should be.
    failure: Option<ServerError>,
}

impl std::fmt::Debug for Emulated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Emulated")
    }
}

impl DeviceService for Emulated {
    fn init(device: DeviceId) -> Self {
        let target = match device.type_id {
            0 => Target::Apple,
            _ => Target::Nvidia,
        };
        let (utilities, _) = ServerUtilities::init(
            ServiceId::of::<Self>(device),
            target.name(),
            properties::device(target),
            properties::target(target),
            Arc::new(ServerLogger::default()),
            ContiguousMemoryLayoutPolicy::new(ALIGNMENT as usize),
        );
        Self {
            utilities: Arc::new(utilities),
            memory: HashMap::new(),
            made: 0,
            programs: Programs::new(
                target,
                EMULATION.get().expect("the device is there once it is asked for").clone(),
            ),
            timestamps: TimestampProfiler::default(),
            failure: None,
        }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl ServerCommunication for Emulated {}

impl ServerStorage for Emulated {
    type Storage = BytesStorage;

    fn get_resource(
        &mut self,
        _: BufferBinding,
        _: StreamId,
    ) -> Result<ManagedResource<<BytesStorage as ComputeStorage>::Resource>, ServerError> {
        Err(unsupported().into())
    }
}

fn unsupported() -> IoError {
    IoError::UnsupportedIoOperation { backtrace: BackTrace::capture() }
}

impl Emulated {
    /// What `binding` covers.
    fn bytes(&mut self, binding: &BufferBinding) -> Result<&mut [u8], ServerError> {
        let block = self.memory.get_mut(&binding.memory.id()).ok_or_else(unsupported)?;
        let words = block.words.as_mut_slice();
        // SAFETY: words are bytes, and nothing else borrows them.
        let all = unsafe {
            std::slice::from_raw_parts_mut(words.as_mut_ptr().cast::<u8>(), size_of_val(words))
        };
        let start = binding.offset_start.unwrap_or(0) as usize;
        let end = binding.size as usize - binding.offset_end.unwrap_or(0) as usize;
        all.get_mut(start..end).ok_or_else(|| unsupported().into())
    }

    fn is_sound(&self) -> Result<(), ServerError> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    fn run(
        &mut self,
        kernel: &dyn CubeKernel,
        count: CubeCount,
        arguments: &KernelArguments,
        execute: bool,
    ) -> Result<(), ServerError> {
        let Some(program) = self.programs.load(kernel)?.filter(|_| execute) else {
            return Ok(());
        };
        let cubes = match count {
            CubeCount::Static(x, y, z) => [x, y, z],
            CubeCount::Dynamic(binding) => {
                let bytes = self.bytes(&binding)?;
                let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| bytes[4 * i + b]));
                [word(0), word(1), word(2)]
            }
        };
        let mut buffers = Vec::with_capacity(arguments.resources.len() + 1);
        for resource in &arguments.resources {
            let KernelResource::Buffer(binding) = resource else {
                return Err(unsupported().into());
            };
            buffers.push(self.bytes(binding)?.as_mut_ptr());
        }
        // The numbers of a launch follow its buffers.
        let mut info = arguments.info.data.clone();
        if !info.is_empty() {
            buffers.push(info.as_mut_ptr().cast());
        }
        program.run(&buffers, cubes)
    }
}

impl Server for Emulated {
    fn initialize_memory(
        &mut self,
        memory: ManagedMemoryHandle,
        size: u64,
        _: StreamId,
    ) -> Result<(), ServerError> {
        self.made += 1;
        if self.made.is_multiple_of(SWEEP) {
            self.memory.retain(|_, block| !block.handle.is_free());
        }
        // What is not written is not to be read: no kernel may count on zeros.
        let words = vec![u128::from_ne_bytes([0xA5; 16]); (size as usize).div_ceil(16).max(1)];
        let id = memory.clone().binding().id();
        self.memory.insert(id, Block { handle: memory, words });
        Ok(())
    }

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities> {
        self.utilities.clone()
    }

    fn read(
        &mut self,
        descriptors: Vec<CopyDescriptor>,
        _: StreamId,
    ) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let read = self.is_sound().and_then(|()| {
            let copy = |d: CopyDescriptor| {
                let len = d.shape.iter().product::<usize>() * d.elem_size;
                let bytes = self.bytes(&d.handle)?.get(..len).ok_or_else(unsupported)?;
                Ok(Bytes::from_bytes_vec(bytes.to_vec()))
            };
            descriptors.into_iter().map(copy).collect()
        });
        Box::pin(std::future::ready(read))
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {
        for (to, data) in descriptors {
            let written = self.bytes(&to.handle).and_then(|bytes| {
                bytes.get_mut(..data.len()).ok_or_else(unsupported)?.copy_from_slice(&data);
                Ok(())
            });
            if let Err(error) = written {
                self.failure.get_or_insert(error);
            }
        }
    }

    fn sync(&mut self, _: Vec<BufferBinding>, _: StreamId) -> DynFut<Result<(), ServerError>> {
        let sound = self.is_sound();
        Box::pin(std::future::ready(sound))
    }

    fn check(&mut self, _: Vec<BufferBinding>, _: StreamId) -> Result<(), ServerError> {
        self.is_sound()
    }

    unsafe fn launch(
        &mut self,
        kernel: Box<dyn CubeKernel>,
        count: CubeCount,
        bindings: KernelArguments,
        _: StreamId,
        mode: LaunchMode,
    ) {
        if let Err(error) = self.run(&*kernel, count, &bindings, !mode.discards_launch()) {
            self.failure.get_or_insert(error);
        }
    }

    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_report(&mut self, _: StreamId) -> Option<StreamMemoryReport> {
        None
    }

    fn memory_cleanup(&mut self, _: StreamId) -> Result<(), ServerError> {
        self.memory.retain(|_, block| !block.handle.is_free());
        Ok(())
    }

    fn start_profile(&mut self, _: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.timestamps.start())
    }

    fn end_profile(
        &mut self,
        _: StreamId,
        token: ProfilingToken,
    ) -> Result<ProfileDuration, ProfileError> {
        self.timestamps.stop(token)
    }

    fn abandon_profile(&mut self, _: StreamId, token: ProfilingToken) {
        self.timestamps.abandon(token);
    }

    fn allocation_mode(&mut self, _: MemoryAllocationMode, _: StreamId) {}
}
