//! The driver's calls: a device, streams, kernels, launches and graphs of them.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice_attribute, CUfunction, CUgraphExec, CUlaunchAttribute,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, CUmodule, CUstream,
};
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex};

/// Compute capability, times ten, from which on a launch may start before the one before it has ended.
const OVERLAPPING: u32 = 90;
/// Bytes of shared memory that a launch may have unasked.
const SHARED_BYTES: usize = 48 << 10;
/// Pieces of memory of the host, for what is read, that are kept for the next time.
const KEPT: usize = 32;

/// What the driver said, and to what.
pub(super) type Said<T> = Result<T, String>;

fn said(what: &str) -> impl Fn(DriverError) -> String {
    move |error| format!("{what}: {error}")
}

/// The newest CUDA that the driver knows.
pub(super) fn version() -> Option<String> {
    let mut version = 0;
    // SAFETY: it is written to a variable that outlives the call.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().ok()?;
    Some(format!("{}.{}", version / 1000, version % 1000 / 10))
}

/// A device and its context.
#[derive(Debug)]
pub(super) struct Device {
    context: Context,
    handle: sys::CUdevice,
    /// Ten times the compute capability.
    pub(super) generation: u32,
    kept: Kept,
}

/// The device's primary context, which is never released.
#[derive(Debug, Clone, Copy)]
struct Context(CUcontext);

// SAFETY: the driver's handles belong to no thread; whoever uses them makes the context current first.
unsafe impl Send for Context {}

/// Work that is done in order.
#[derive(Debug)]
pub(super) struct Stream(CUstream);

// SAFETY: as for `Context`.
unsafe impl Send for Stream {}

/// Memory of the host that the device writes to.
#[derive(Debug)]
struct Pinned {
    at: *mut c_void,
    bytes: usize,
}

// SAFETY: it belongs to who holds it.
unsafe impl Send for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: nothing else gives it back.
        let _ = unsafe { result::free_host(self.at) };
    }
}

type Kept = Arc<Mutex<Vec<Pinned>>>;

/// What is on its way from the device.
#[derive(Debug)]
pub(super) struct Read {
    context: Context,
    /// When it is there.
    event: sys::CUevent,
    to: Option<Pinned>,
    len: usize,
    kept: Kept,
}

// SAFETY: as for `Context`.
unsafe impl Send for Read {}

impl Read {
    /// Waits for it.
    pub(super) fn finish(mut self) -> Said<Vec<u8>> {
        // SAFETY: the event is there until this is dropped.
        unsafe {
            result::ctx::set_current(self.context.0).map_err(said("cuCtxSetCurrent"))?;
            result::event::synchronize(self.event).map_err(said("cuEventSynchronize"))?;
        }
        let Some(to) = self.to.take() else { return Ok(Vec::new()) };
        // SAFETY: the event was recorded behind the copy, so the memory is written.
        let bytes = unsafe { std::slice::from_raw_parts(to.at.cast::<u8>(), self.len) }.to_vec();
        let mut kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        if kept.len() < KEPT {
            kept.push(to);
        }
        Ok(bytes)
    }
}

impl Drop for Read {
    fn drop(&mut self) {
        // What is still written to is not given back before.
        // SAFETY: nothing else destroys the event.
        unsafe {
            let _ = result::ctx::set_current(self.context.0);
            let _ = result::event::synchronize(self.event);
            let _ = result::event::destroy(self.event);
        }
    }
}

/// A kernel that is on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    function: CUfunction,
    block: [u32; 3],
    shared_bytes: u32,
}

// SAFETY: a handle of the driver, of a module that stays.
unsafe impl Send for Kernel {}

/// Bytes of the device's memory, given back when they are dropped.
#[derive(Debug)]
pub(super) struct Allocation {
    pub(super) address: u64,
    pub(super) bytes: u64,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: the address is of an allocation that nothing else gives back. The call waits for what uses it. It fails where the device has failed.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// Launches that are repeated as a whole.
#[derive(Debug)]
pub(super) struct Launches(CUgraphExec);

// SAFETY: as for `Context`.
unsafe impl Send for Launches {}

impl Drop for Launches {
    fn drop(&mut self) {
        // SAFETY: nothing else destroys them; what runs of them ends first.
        let _ = unsafe { sys::cuGraphExecDestroy(self.0) };
    }
}

impl Device {
    pub(super) fn new(index: u16) -> Said<Self> {
        result::init().map_err(said("cuInit"))?;
        let handle = result::device::get(index.into()).map_err(said("cuDeviceGet"))?;
        // SAFETY: the device is one that the driver handed out, and its context is never released.
        unsafe {
            let context =
                result::primary_ctx::retain(handle).map_err(said("cuDevicePrimaryCtxRetain"))?;
            result::ctx::set_current(context).map_err(said("cuCtxSetCurrent"))?;
            let context = Context(context);
            let mut device = Self { context, handle, generation: 0, kept: Kept::default() };
            let [major, minor] = [
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            ]
            .map(|attribute| device.attribute(attribute));
            device.generation = 10 * major? + minor?;
            Ok(device)
        }
    }

    pub(super) fn name(&self) -> Said<String> {
        result::device::get_name(self.handle).map_err(said("cuDeviceGetName"))
    }

    pub(super) fn memory_bytes(&self) -> Said<u64> {
        // SAFETY: the device is one that the driver handed out.
        let bytes = unsafe { result::device::total_mem(self.handle) };
        Ok(bytes.map_err(said("cuDeviceTotalMem"))? as u64)
    }

    pub(super) fn attribute(&self, attribute: CUdevice_attribute) -> Said<u32> {
        // SAFETY: the device is one that the driver handed out.
        let value = unsafe { result::device::get_attribute(self.handle, attribute) };
        Ok(value.map_err(said("cuDeviceGetAttribute"))? as u32)
    }

    /// To be called first by whatever thread the work is on.
    pub(super) fn enter(&self) -> Said<()> {
        // SAFETY: the context is never released.
        unsafe { result::ctx::set_current(self.context.0) }.map_err(said("cuCtxSetCurrent"))
    }

    pub(super) fn allocate(&self, bytes: u64) -> Said<Allocation> {
        // SAFETY: what is returned alone gives it back.
        let address = unsafe { result::malloc_sync(bytes as usize) }.map_err(said("cuMemAlloc"))?;
        Ok(Allocation { address, bytes })
    }

    /// `image`: machine code, or PTX that ends with a zero.
    pub(super) fn load(
        &self,
        image: &[u8],
        name: &str,
        block: [u32; 3],
        shared_bytes: usize,
    ) -> Said<Kernel> {
        let symbol = CString::new(name).map_err(|e| format!("{name}: {e}"))?;
        // SAFETY: the compiler made the image; the module is never unloaded.
        unsafe {
            let module: CUmodule = result::module::load_data(image.as_ptr().cast())
                .map_err(said("cuModuleLoadData"))?;
            let function = result::module::get_function(module, symbol)
                .map_err(said("cuModuleGetFunction"))?;
            if shared_bytes > SHARED_BYTES {
                let most =
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                result::function::set_function_attribute(function, most, shared_bytes as i32)
                    .map_err(said("cuFuncSetAttribute"))?;
            }
            Ok(Kernel { function, block, shared_bytes: shared_bytes as u32 })
        }
    }

    /// A stream, which is never destroyed.
    pub(super) fn stream(&self) -> Said<Stream> {
        let kind = result::stream::StreamKind::NonBlocking;
        Ok(Stream(result::stream::create(kind).map_err(said("cuStreamCreate"))?))
    }

    /// Memory of the host for `len` bytes.
    fn pinned(&self, len: usize) -> Said<Pinned> {
        let mut kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        let fits = |pinned: &Pinned| pinned.bytes >= len;
        let smallest = (0..kept.len()).filter(|&i| fits(&kept[i])).min_by_key(|&i| kept[i].bytes);
        if let Some(index) = smallest {
            return Ok(kept.swap_remove(index));
        }
        let bytes = len.next_power_of_two().max(4096);
        // SAFETY: what is returned alone gives it back.
        let at = unsafe { result::malloc_host(bytes, 0) }.map_err(said("cuMemHostAlloc"))?;
        Ok(Pinned { at, bytes })
    }
}

impl Stream {
    /// Puts a launch into the stream. It may start before those before it have ended, whose results the kernel waits for itself.
    ///
    /// # Safety
    /// `arguments` point to values of the kernel's parameters, of which addresses are of arrays as long as it takes them to be.
    pub(super) unsafe fn launch(
        &self,
        device: &Device,
        kernel: &Kernel,
        blocks: [u32; 3],
        arguments: &mut [*mut c_void],
    ) -> Said<()> {
        let mut overlap = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: blocks[0],
            gridDimY: blocks[1],
            gridDimZ: blocks[2],
            blockDimX: kernel.block[0],
            blockDimY: kernel.block[1],
            blockDimZ: kernel.block[2],
            sharedMemBytes: kernel.shared_bytes,
            hStream: self.0,
            attrs: &mut overlap,
            numAttrs: u32::from(device.generation >= OVERLAPPING),
        };
        // SAFETY: the caller's promise; the driver copies what it needs of all of it before it returns.
        let done = unsafe {
            sys::cuLaunchKernelEx(
                &config,
                kernel.function,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        done.result().map_err(said("cuLaunchKernelEx"))
    }

    /// Copies to the device, in the stream's order.
    ///
    /// # Safety
    /// At `address` there is room for `bytes`.
    pub(super) unsafe fn write(&self, address: u64, bytes: &[u8]) -> Said<()> {
        // SAFETY: the caller's promise; of memory that it cannot reach the driver takes a copy before it returns.
        unsafe { result::memcpy_htod_async(address, bytes, self.0) }
            .map_err(said("cuMemcpyHtoDAsync"))
    }

    /// Copies `len` bytes from the device when everything before is done.
    ///
    /// # Safety
    /// As many bytes are at `address`, and stay there until what is in the stream is done.
    pub(super) unsafe fn read(&self, device: &Device, address: u64, len: usize) -> Said<Read> {
        let to = device.pinned(len)?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(said("cuEventCreate"))?;
        let at = to.at;
        let (context, kept) = (device.context, device.kept.clone());
        let read = Read { context, event, to: Some(to), len, kept };
        // SAFETY: the caller's promise; `read` holds the memory and the event until the copy is done.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(at, address, len, self.0)
                .result()
                .map_err(said("cuMemcpyDtoHAsync"))?;
            result::event::record(event, self.0).map_err(said("cuEventRecord"))?;
        }
        Ok(read)
    }

    /// Waits for everything in the stream.
    pub(super) fn wait(&self) -> Said<()> {
        // SAFETY: the stream is never destroyed.
        unsafe { result::stream::synchronize(self.0) }.map_err(said("cuStreamSynchronize"))
    }

    /// From now on launches are recorded, and not run.
    pub(super) fn begin_recording(&self) -> Said<()> {
        // Relaxed: memory may be taken meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is never destroyed.
        unsafe { result::stream::begin_capture(self.0, mode) }.map_err(said("cuStreamBeginCapture"))
    }

    /// What was recorded.
    pub(super) fn end_recording(&self) -> Said<Launches> {
        // SAFETY: a recording has begun; the graph is destroyed once, and what was made of it is not touched by that.
        unsafe {
            let graph = result::stream::end_capture(self.0).map_err(said("cuStreamEndCapture"))?;
            let mut launches = std::ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&mut launches, graph, 0).result();
            let _ = result::graph::destroy(graph);
            made.map_err(said("cuGraphInstantiate"))?;
            let made = Launches(launches);
            result::graph::upload(launches, self.0).map_err(said("cuGraphUpload"))?;
            Ok(made)
        }
    }

    /// Repeats what was recorded.
    ///
    /// # Safety
    /// The memory that the launches work in is still theirs.
    pub(super) unsafe fn replay(&self, launches: &Launches) -> Said<()> {
        // SAFETY: the caller's promise.
        unsafe { result::graph::launch(launches.0, self.0) }.map_err(said("cuGraphLaunch"))
    }
}
