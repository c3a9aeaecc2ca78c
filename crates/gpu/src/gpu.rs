//! A device and its memory.

use crate::tune::{Facts, Shape, Tuned, Variant};
use bytes::Bytes;
use cubecl::MemoryScope;
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::Handle;
use marlin_tensor::{BackendError, DeviceMemory};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes of a word, the unit of all arrays.
pub(crate) const WORD: usize = 4;

/// Memory of a device that does not say how much it has: more than any.
const UNKNOWN: u64 = 1 << 46;

/// Multiprocessors where a device does not say.
const MULTIPROCESSORS: u32 = 108;
/// What NVIDIA's GPUs with products of warpgroups have kernels compiled to: Hopper's.
const HOPPER: &str = "ptx_sm90";
/// Words of [`Gpu::counters`], more than a device has multiprocessors.
const COUNTERS: usize = 1024;
/// Words of [`Gpu::left`]: sums of the largest matrix for one row, and of hundreds of experts'.
pub(crate) const LEFT: usize = 1 << 20;

/// Units of a cube of an elementwise kernel.
const UNITS: u32 = 256;
/// Most cubes along one dimension that every runtime launches.
const MAX_CUBES: u32 = 32_768;

/// An array of 32-bit words on the device.
#[derive(Clone)]
pub(crate) struct Buffer {
    pub(crate) handle: Handle,
    /// Words.
    pub(crate) len: usize,
}

impl Buffer {
    /// As a kernel's slice of words.
    pub(crate) fn arg(&self) -> BufferArg {
        // SAFETY: the handle holds `len` words.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.len) }
    }

    /// What follows its first words, as many as that.
    pub(crate) fn after(&self, first: usize) -> Self {
        let handle = self.handle.clone().offset_start((first * WORD) as u64);
        Self { handle, len: self.len - first }
    }

    /// As a kernel's slice of two words each.
    pub(crate) fn arg2(&self) -> BufferArg {
        // SAFETY: the handle holds `len` words.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.len / 2) }
    }

    /// As a kernel's slice of four words each.
    pub(crate) fn arg4(&self) -> BufferArg {
        // SAFETY: the handle holds `len` words.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.len / 4) }
    }
}

/// Memory of the device that is spoken for until this is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    bytes: u64,
    taken: Arc<AtomicU64>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// An opened device.
pub(crate) struct Gpu {
    pub(crate) client: Client,
    /// Bytes of weights and caches.
    taken: Arc<AtomicU64>,
    /// Copies from the host.
    copies: AtomicU64,
    /// Lanes of a plane.
    pub(crate) plane: u32,
    /// Whether NVIDIA's tensor-core instructions are there.
    pub(crate) tensor_cores: bool,
    /// Whether they multiply for four planes at once.
    pub(crate) warpgroups: bool,
    /// Whether a plane multiplies matrices of halves, 8 by 8 by 8, and adds up in f32: Apple's do.
    pub(crate) simdgroup_matrices: bool,
    /// Zeros with which blocks of a launch count; it leaves zeros.
    pub(crate) counters: Buffer,
    /// Words of ones, in which blocks of a launch leave sums for each other; it leaves ones.
    pub(crate) left: Buffer,
    /// Stands for an array that a kernel is not to read.
    pub(crate) none: Buffer,
    /// Which variants of kernels are taken.
    pub(crate) tuned: Tuned,
}

impl Gpu {
    pub(crate) fn new(mut client: Client, is_cuda: bool) -> Self {
        let none = Buffer { handle: client.create_from_slice(&[0; 64]), len: 16 };
        // SAFETY: all work goes to the stream of the thread that opens the device, in order, from whatever thread it
        // comes.
        unsafe { client.set_stream(none.handle.stream) };
        let plane = client.properties().hardware.plane_size_max.max(1);
        let tensor_cores = is_cuda && plane == 32 && !client.features().matmul.mma.is_empty();
        let (half, single) = (ElemType::Float(FloatKind::F16), ElemType::Float(FloatKind::F32));
        let eight = MmaConfig { a_type: half, b_type: half, cd_type: single, m: 8, n: 8, k: 8 };
        let simdgroup_matrices = plane == 32 && client.features().matmul.cmma.contains(&eight);
        let compiled_as = &client.properties().identity.fingerprint;
        let warpgroups = tensor_cores && compiled_as == HOPPER;
        let counters =
            Buffer { handle: client.create_from_slice(&[0; COUNTERS * WORD]), len: COUNTERS };
        let left = match tensor_cores {
            true => {
                let ones = vec![u8::MAX; LEFT * WORD];
                Buffer { handle: client.create_from_slice(&ones), len: LEFT }
            }
            false => none.clone(),
        };
        Self {
            client,
            tensor_cores,
            warpgroups,
            simdgroup_matrices,
            counters,
            left,
            taken: Arc::default(),
            copies: AtomicU64::new(0),
            plane,
            none,
            tuned: Tuned::default(),
        }
    }

    /// What decides which variants it can run.
    pub(crate) fn facts(&self) -> Facts {
        let most_units = self.client.properties().hardware.max_units_per_cube;
        Facts {
            plane: self.plane,
            most_units,
            tensor_cores: self.tensor_cores,
            warpgroups: self.warpgroups,
            simdgroup_matrices: self.simdgroup_matrices,
        }
    }

    /// What is chosen for `shape` with every number of rows.
    pub(crate) fn tuned(&self, shape: &Shape) -> Option<Variant> {
        // Nothing is looked up where nothing is tuned.
        if self.tuned.is_empty() { None } else { self.tuned.variant(shape, None, &self.facts()) }
    }

    /// Multiprocessors of the device.
    pub(crate) fn multiprocessors(&self) -> usize {
        let said = self.client.properties().hardware.num_streaming_multiprocessors;
        said.unwrap_or(MULTIPROCESSORS) as usize
    }

    /// Claims room for `what`.
    ///
    /// # Errors
    /// When the device has less.
    pub(crate) fn reserve(&self, what: &str, bytes: u64) -> Result<Reservation, BackendError> {
        let taken = self.taken.load(Ordering::Relaxed);
        let all = self.client.properties().memory.max_memory().unwrap_or(UNKNOWN);
        let available_bytes = all.saturating_sub(taken);
        if bytes > available_bytes {
            let (what, needed_bytes) = (what.to_owned(), bytes);
            return Err(BackendError::OutOfMemory { what, needed_bytes, available_bytes });
        }
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        Ok(Reservation { bytes, taken: self.taken.clone() })
    }

    /// What the allocator has taken, of all streams.
    pub(crate) fn memory(&self) -> DeviceMemory {
        let usage = self.client.memory_report(MemoryScope::Device).usage();
        DeviceMemory {
            total_bytes: self.client.properties().memory.max_memory(),
            free_bytes: None,
            used_bytes: usage.bytes_in_use,
            reserved_bytes: usage.bytes_reserved,
        }
    }

    /// Uninitialised words.
    pub(crate) fn empty(&self, len: usize) -> Buffer {
        let words = len.max(1).next_multiple_of(4);
        Buffer { handle: self.client.empty(words * WORD), len: words }
    }

    /// Zeros.
    pub(crate) fn zeros(&self, len: usize) -> Buffer {
        let buffer = self.empty(len);
        crate::ops::elementwise::fill(self, &buffer);
        buffer
    }

    /// Words of the host.
    pub(crate) fn words(&self, words: &[u32]) -> Buffer {
        if words.is_empty() {
            return self.none.clone();
        }
        self.bytes(u32::as_bytes(words))
    }

    /// Words of the host as they are stored, low byte first: so does every host and device there is.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> Buffer {
        assert!(bytes.len().is_multiple_of(WORD), "whole words");
        self.copies.fetch_add(1, Ordering::Relaxed);
        Buffer { handle: self.client.create_from_slice(bytes), len: bytes.len() / WORD }
    }

    /// Values of the host.
    pub(crate) fn floats(&self, values: &[f32]) -> Buffer {
        if values.is_empty() {
            return self.none.clone();
        }
        self.bytes(f32::as_bytes(values))
    }

    /// Copies from the host so far.
    pub(crate) fn copied(&self) -> u64 {
        self.copies.load(Ordering::Relaxed)
    }

    /// Overwrites the first words of `buffer`.
    pub(crate) fn write(&self, buffer: &Buffer, words: &[u32]) {
        assert!(words.len() <= buffer.len, "words fit their buffer");
        self.copies.fetch_add(1, Ordering::Relaxed);
        let bytes = cubecl::bytes::Bytes::from_bytes_vec(u32::as_bytes(words).to_vec());
        let tail = (buffer.len - words.len()) * WORD;
        self.client.write(&buffer.handle.clone().offset_end(tail as u64), bytes);
    }

    /// Waits for `buffer` and copies its first `len` words.
    ///
    /// # Errors
    /// When a kernel before failed.
    pub(crate) fn read(&self, buffer: &Buffer, len: usize) -> Result<Bytes, BackendError> {
        let bytes = self.client.read_one(buffer.handle.clone()).map_err(device_error)?;
        Ok(Bytes::copy_from_slice(&bytes[..len * WORD]))
    }

    /// The same as values.
    ///
    /// # Errors
    /// When a kernel before failed.
    pub(crate) fn read_floats(
        &self,
        buffer: &Buffer,
        len: usize,
    ) -> Result<Vec<f32>, BackendError> {
        let bytes = self.client.read_one(buffer.handle.clone()).map_err(device_error)?;
        let words = bytes[..len * WORD].as_chunks().0;
        Ok(words.iter().map(|&word| f32::from_le_bytes(word)).collect())
    }

    /// Cubes for a kernel with one unit per element.
    pub(crate) fn each(&self, elements: usize) -> (CubeCount, CubeDim) {
        let cubes = (elements as u32).div_ceil(UNITS).max(1);
        let rows = cubes.div_ceil(MAX_CUBES);
        let count = CubeCount::Static(cubes.min(MAX_CUBES), rows, 1);
        (count, CubeDim::new_2d(self.plane, UNITS / self.plane))
    }

    /// A cube of `planes` planes.
    pub(crate) fn planes(&self, planes: u32) -> CubeDim {
        CubeDim::new_2d(self.plane, planes)
    }
}

/// What a runtime says, as an error of the backend.
pub(crate) fn device_error(error: impl std::fmt::Display) -> BackendError {
    BackendError::Device(error.to_string())
}

/// What a lock guards, also after a panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
