//! What a client of a CUDA device talks to.

use super::driver::{Allocation, Device, Launches, Read, Said, Stream};
use super::memory::Memory;
use super::program::Programs;
use crate::runtime::cpp::{self, ALIGNMENT, Nvidia, failed};
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
use cubecl_server::id::GraphId;
use cubecl_server::kernel::CubeKernel;
use cubecl_server::logging::ServerLogger;
use cubecl_server::memory_management::{
    ManagedMemoryHandle, MemoryAllocationMode, MemoryPoolKind, MemoryPoolReport, MemoryPoolsReport,
    MemoryUsage, StreamMemoryReport,
};
use cubecl_server::storage::{BytesStorage, ComputeStorage, ManagedResource};
use cubecl_server::timestamp_profiler::TimestampProfiler;
use cudarc::driver::sys::CUdevice_attribute;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;
use std::task::Poll;

/// Streams of a device; more clients than these share them, and have nothing recorded.
const LANES: usize = 64;

/// A CUDA device.
#[derive(Debug)]
pub(super) struct CudaServer {
    utilities: Arc<ServerUtilities>,
    graphs: HashMap<GraphId, Graph>,
    lanes: Vec<Lane>,
    /// Which lane a client has.
    clients: HashMap<StreamId, usize>,
    device: Device,
    programs: Programs,
    timestamps: TimestampProfiler,
}

/// Where bytes of an array are, and whether it is the lane's own that asks.
struct Place {
    address: u64,
    bytes: u64,
    is_own: bool,
}

/// Recorded launches, and the memory that they work in.
#[derive(Debug)]
struct Graph {
    launches: Launches,
    memory: Vec<Arc<Allocation>>,
}

/// A stream, and what is in it.
#[derive(Debug)]
struct Lane {
    stream: Stream,
    memory: Memory,
    is_recording: bool,
    /// What first failed since it was last told; what is read after it is not what it should be.
    failure: Option<ServerError>,
}

impl Lane {
    /// Notes what failed.
    fn note(&mut self, done: Result<(), ServerError>) {
        if let Err(error) = done {
            self.failure.get_or_insert(error);
        }
    }

    /// What failed since the last time it was told.
    fn sound(&mut self) -> Result<(), ServerError> {
        self.failure.take().map_or(Ok(()), Err)
    }

    fn may_wait(&self) -> Result<(), ServerError> {
        match self.is_recording {
            true => Err(failed("launches alone can be recorded")),
            false => Ok(()),
        }
    }

    fn wait(&mut self) -> Result<(), ServerError> {
        self.may_wait()?;
        let waited = self.stream.wait().map_err(failed);
        self.sound()?;
        waited
    }
}

impl DeviceService for CudaServer {
    fn init(id: DeviceId) -> Self {
        // Opening a device is guarded: a panic says why it does not start.
        Self::open(id).unwrap_or_else(|said| panic!("{said}"))
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl CudaServer {
    fn open(id: DeviceId) -> Said<Self> {
        use CUdevice_attribute as Attribute;
        let device = Device::new(id.index_id)?;
        let shared = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let generation = device.generation;
        let about = Nvidia {
            name: device.name()?,
            fingerprint: format!("ptx_sm{generation}"),
            generation,
            memory_bytes: device.memory_bytes()?,
            shared_bytes: device.attribute(shared)? as usize,
            most_units: device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            multiprocessors: Some(
                device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            ),
        };
        let (utilities, _) = ServerUtilities::init(
            ServiceId::of::<Self>(id),
            "cuda",
            about.properties(),
            cpp::matrices(),
            Arc::new(ServerLogger::default()),
            ContiguousMemoryLayoutPolicy::new(ALIGNMENT as usize),
        );
        let mut options = cpp::options();
        options.supports_features.grid_constants = true;
        Ok(Self {
            utilities: Arc::new(utilities),
            graphs: HashMap::new(),
            lanes: Vec::new(),
            clients: HashMap::new(),
            device,
            programs: Programs::new(generation, options),
            timestamps: TimestampProfiler::default(),
        })
    }

    /// The lane of `client`. To be called first, by whatever thread the work is on.
    fn lane(&mut self, client: StreamId) -> Result<usize, ServerError> {
        self.device.enter().map_err(failed)?;
        if let Some(&lane) = self.clients.get(&client) {
            return Ok(lane);
        }
        let lane = self.clients.len() % LANES;
        if lane == self.lanes.len() {
            let stream = self.device.stream().map_err(failed)?;
            let memory = Memory::default();
            self.lanes.push(Lane { stream, memory, is_recording: false, failure: None });
        }
        self.clients.insert(client, lane);
        Ok(lane)
    }

    /// Where a binding's bytes are, for work in `lane`. What is another lane's is there once that one has nothing left to do.
    fn find(&mut self, lane: usize, binding: &BufferBinding) -> Result<Place, ServerError> {
        let owner = match self.lanes[lane].memory.has(binding) {
            true => lane,
            false => self.lanes.iter().position(|l| l.memory.has(binding)).unwrap_or(lane),
        };
        if owner != lane {
            self.lanes[lane].may_wait()?;
            self.lanes[owner].may_wait()?;
            self.lanes[owner].stream.wait().map_err(failed)?;
        }
        let (address, bytes) = self.lanes[owner].memory.find(binding).map_err(failed)?;
        Ok(Place { address, bytes, is_own: owner == lane })
    }

    fn run(
        &mut self,
        lane: usize,
        kernel: &dyn CubeKernel,
        count: CubeCount,
        arguments: &KernelArguments,
        execute: bool,
    ) -> Result<(), ServerError> {
        let kernel = self.programs.load(&self.device, kernel)?;
        let CubeCount::Static(x, y, z) = count else { return Err(unsupported()) };
        if !execute || x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let info = &arguments.info;
        if info.dynamic_metadata_offset < info.data.len() {
            return Err(unsupported());
        }
        let (mut addresses, mut is_own) = (Vec::with_capacity(arguments.resources.len()), true);
        for resource in &arguments.resources {
            let KernelResource::Buffer(binding) = resource else { return Err(unsupported()) };
            let place = self.find(lane, binding)?;
            is_own &= place.is_own;
            addresses.push(place.address);
        }
        let address = |address: &mut u64| std::ptr::from_mut(address).cast::<c_void>();
        let mut values: Vec<*mut c_void> = addresses.iter_mut().map(address).collect();
        // The numbers of a launch follow its arrays.
        values.push(info.data.as_ptr().cast_mut().cast());
        let stream = &self.lanes[lane].stream;
        // SAFETY: the arrays are those of the launch that the kernel was made for, and stay its own until it has run: work on a lane's arrays is in its
        // stream, or waited for.
        unsafe { stream.launch(&self.device, &kernel, [x, y, z], &mut values) }.map_err(failed)?;
        if is_own { Ok(()) } else { stream.wait().map_err(failed) }
    }

    fn copy_out(&mut self, lane: usize, from: &CopyDescriptor) -> Result<Read, ServerError> {
        let len = from.shape.iter().product::<usize>() * from.elem_size;
        let place = self.find(lane, &from.handle)?;
        if len as u64 > place.bytes {
            return Err(unsupported());
        }
        // SAFETY: the array has as many bytes, and what its lane does with them next is behind this, or another lane's, which has waited.
        unsafe { self.lanes[lane].stream.read(&self.device, place.address, len) }.map_err(failed)
    }

    fn copy_in(
        &mut self,
        lane: usize,
        to: &CopyDescriptor,
        data: &[u8],
    ) -> Result<(), ServerError> {
        self.lanes[lane].may_wait()?;
        let place = self.find(lane, &to.handle)?;
        if data.len() as u64 > place.bytes {
            return Err(unsupported());
        }
        let stream = &self.lanes[lane].stream;
        // SAFETY: the array has as many bytes.
        unsafe { stream.write(place.address, data) }.map_err(failed)?;
        if place.is_own { Ok(()) } else { stream.wait().map_err(failed) }
    }

    /// An array of `bytes`; for one that there is no room for, what nobody holds is given back first.
    fn allocate(
        &mut self,
        lane: usize,
        handle: &ManagedMemoryHandle,
        bytes: u64,
    ) -> Result<(), ServerError> {
        let allocate = |server: &mut Self| {
            server.lanes[lane].memory.allocate(&server.device, handle.clone(), bytes)
        };
        let made = allocate(self).or_else(|_| {
            self.lanes.iter_mut().for_each(|lane| lane.memory.give_back());
            allocate(self)
        });
        made.map_err(|said| failed(format!("{bytes} bytes: {said}")))
    }
}

fn unsupported() -> ServerError {
    IoError::UnsupportedIoOperation { backtrace: BackTrace::capture() }.into()
}

impl ServerCommunication for CudaServer {}

impl ServerStorage for CudaServer {
    type Storage = BytesStorage;

    fn get_resource(
        &mut self,
        _: BufferBinding,
        _: StreamId,
    ) -> Result<ManagedResource<<BytesStorage as ComputeStorage>::Resource>, ServerError> {
        Err(unsupported())
    }
}

impl Server for CudaServer {
    fn initialize_memory(
        &mut self,
        memory: ManagedMemoryHandle,
        size: u64,
        client: StreamId,
    ) -> Result<(), ServerError> {
        let lane = self.lane(client)?;
        let made = self.allocate(lane, &memory, size);
        self.lanes[lane].note(made.clone());
        made
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
        client: StreamId,
    ) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let asked = self.lane(client).and_then(|lane| {
            self.lanes[lane].may_wait()?;
            self.lanes[lane].sound()?;
            descriptors.iter().map(|from| self.copy_out(lane, from)).collect::<Result<Vec<_>, _>>()
        });
        let finish = |read: Read| read.finish().map(Bytes::from_bytes_vec).map_err(failed);
        // Waits when it is asked; nobody asks twice.
        let mut asked = Some(asked);
        Box::pin(std::future::poll_fn(move |_| {
            let reads = asked.take().unwrap_or_else(|| Err(unsupported()));
            Poll::Ready(reads.and_then(|reads| reads.into_iter().map(finish).collect()))
        }))
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, client: StreamId) {
        let Ok(lane) = self.lane(client) else { return };
        for (to, data) in descriptors {
            let written = self.copy_in(lane, &to, &data);
            self.lanes[lane].note(written);
        }
    }

    fn sync(&mut self, _: Vec<BufferBinding>, client: StreamId) -> DynFut<Result<(), ServerError>> {
        let waited = self.lane(client).and_then(|lane| self.lanes[lane].wait());
        Box::pin(std::future::ready(waited))
    }

    fn check(&mut self, _: Vec<BufferBinding>, client: StreamId) -> Result<(), ServerError> {
        let lane = self.lane(client)?;
        self.lanes[lane].failure.clone().map_or(Ok(()), Err)
    }

    unsafe fn launch(
        &mut self,
        kernel: Box<dyn CubeKernel>,
        count: CubeCount,
        bindings: KernelArguments,
        client: StreamId,
        mode: LaunchMode,
    ) {
        let Ok(lane) = self.lane(client) else { return };
        let done = self.run(lane, &*kernel, count, &bindings, !mode.discards_launch());
        self.lanes[lane].note(done);
    }

    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn begin_capture(&mut self, client: StreamId) -> Result<(), ServerError> {
        let index = self.lane(client)?;
        if self.clients.values().filter(|&&lane| lane == index).count() > 1 {
            return Err(failed("the stream is another client's too"));
        }
        let lane = &mut self.lanes[index];
        lane.may_wait()?;
        lane.sound()?;
        lane.stream.begin_recording().map_err(failed)?;
        lane.memory.begin_recording();
        lane.is_recording = true;
        Ok(())
    }

    fn end_capture(&mut self, client: StreamId) -> Result<GraphId, ServerError> {
        let index = self.lane(client)?;
        let lane = &mut self.lanes[index];
        if !lane.is_recording {
            return Err(failed("no launches are being recorded"));
        }
        lane.is_recording = false;
        let (made, memory) = (lane.stream.end_recording(), lane.memory.end_recording());
        match lane.sound().and_then(|()| made.map_err(failed)) {
            Ok(launches) => {
                let id = GraphId::new();
                self.graphs.insert(id, Graph { launches, memory });
                Ok(id)
            }
            Err(error) => {
                lane.memory.take_back(memory);
                Err(error)
            }
        }
    }

    fn replay(&mut self, graph: GraphId, client: StreamId) -> Result<(), ServerError> {
        let lane = self.lane(client)?;
        self.lanes[lane].may_wait()?;
        let graph = self.graphs.get(&graph).ok_or_else(unsupported)?;
        // SAFETY: the graph holds the memory that its launches work in, which is handed out to nobody else.
        unsafe { self.lanes[lane].stream.replay(&graph.launches) }.map_err(failed)
    }

    fn graph_destroy(&mut self, graph: GraphId, client: StreamId) {
        let (Some(graph), Ok(lane)) = (self.graphs.remove(&graph), self.lane(client)) else {
            return;
        };
        drop(graph.launches);
        self.lanes[lane].memory.take_back(graph.memory);
    }

    fn memory_report(&mut self, stream: StreamId) -> Option<StreamMemoryReport> {
        let usage = self.lanes.iter_mut().map(|lane| lane.memory.usage());
        let (number_allocs, bytes_in_use, bytes_reserved) =
            usage.fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2));
        let report = |usage: MemoryUsage| MemoryPoolReport {
            kind: MemoryPoolKind::Direct,
            pages: usage.number_allocs,
            pages_peak: usage.number_allocs,
            usage,
            pages_unmapped: 0,
            largest_alloc: 0,
        };
        let usage = MemoryUsage { number_allocs, bytes_in_use, bytes_padding: 0, bytes_reserved };
        let none = || report(MemoryUsage::default());
        let pools = MemoryPoolsReport {
            dynamic: vec![report(usage)],
            persistent: none(),
            dedicated: none(),
        };
        Some(StreamMemoryReport { stream, pools, auxiliary: Vec::new() })
    }

    fn memory_cleanup(&mut self, client: StreamId) -> Result<(), ServerError> {
        self.lane(client)?;
        self.lanes.iter_mut().try_for_each(Lane::wait)?;
        self.lanes.iter_mut().for_each(|lane| lane.memory.give_back());
        Ok(())
    }

    fn start_profile(&mut self, client: StreamId) -> Result<ProfilingToken, ServerError> {
        let lane = self.lane(client)?;
        self.lanes[lane].wait()?;
        Ok(self.timestamps.start())
    }

    fn end_profile(
        &mut self,
        client: StreamId,
        token: ProfilingToken,
    ) -> Result<ProfileDuration, ProfileError> {
        let waited = self.lane(client).and_then(|lane| self.lanes[lane].wait());
        waited.map_err(|error| ProfileError::from(&error))?;
        self.timestamps.stop(token)
    }

    fn abandon_profile(&mut self, _: StreamId, token: ProfilingToken) {
        self.timestamps.abandon(token);
    }

    fn allocation_mode(&mut self, _: MemoryAllocationMode, _: StreamId) {}
}
