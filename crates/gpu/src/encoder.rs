//! [`TileEncoder`] on a GPU.

use crate::Runtime;
use crate::gpu::{Gpu, WORD, device_error, lock};
use crate::ops::ldlq::{Ldlq, SPAN};
use crate::ops::viterbi;
use cubecl::future::block_on;
use cubecl::prelude::Client;
use marlin_quant::exl3::encode::{LdlqMatrix, target};
use marlin_quant::exl3::ring::TILE;
use marlin_quant::exl3::{Codebook, Rate, TileEncoder};
use marlin_tensor::BackendError;
use std::collections::VecDeque;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;

/// Tiles of a call: with calls of a few threads at a time they keep a large GPU busy.
const TOGETHER: usize = 256;
/// Calls at a time; what comes and goes for one goes on while another computes.
const LANES: usize = 8;

/// Bytes of costs, of a device that does not say how much memory it has.
const FEW_BYTES: u64 = 256 << 20;
/// Most bytes of costs.
const MOST_BYTES: u64 = 8 << 30;

/// Spans of a matrix that are asked for before the first of them is there.
const AHEAD: usize = 2;

/// Encodes tiles on a device.
pub(crate) struct GpuEncoder {
    /// Each with a stream of its own.
    lanes: Vec<Mutex<Gpu>>,
    /// Calls that found every lane taken.
    waits: AtomicUsize,
    /// Bytes of costs of a lane.
    bytes: u64,
    /// Bytes of a matrix of a lane.
    matrix_bytes: u64,
    name: String,
}

impl GpuEncoder {
    pub(crate) fn new(client: &Client, runtime: Runtime, device: &str) -> Self {
        let lane = || Mutex::new(Gpu::new(client.clone(), runtime == Runtime::Cuda));
        let lanes: Vec<_> = thread::scope(|s| {
            // A stream belongs to a thread.
            let opened = [(); LANES].map(|()| s.spawn(lane));
            opened
                .into_iter()
                .map(|lane| lane.join().unwrap_or_else(|e| resume_unwind(e)))
                .collect()
        });
        let memory = &client.properties().memory;
        let all = memory.max_memory();
        let bytes = all.map_or(FEW_BYTES, |all| (all / 8).min(MOST_BYTES)) / LANES as u64;
        // Costs are one array.
        let bytes = bytes.min(memory.max_page_size);
        let matrix_bytes = all.map_or(FEW_BYTES, |all| all / 2 / LANES as u64);
        let name = format!("{} ({device})", runtime.name());
        Self { lanes, waits: AtomicUsize::new(0), bytes, matrix_bytes, name }
    }

    /// A lane that is free, or the next in turn.
    fn lane(&self) -> MutexGuard<'_, Gpu> {
        let free = self.lanes.iter().find_map(|lane| lane.try_lock().ok());
        free.unwrap_or_else(|| {
            lock(&self.lanes[self.waits.fetch_add(1, Ordering::Relaxed) % LANES])
        })
    }
}

impl TileEncoder for GpuEncoder {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn together(&self) -> usize {
        TOGETHER
    }

    fn encode(
        &self,
        tiles: &[f32],
        rate: Rate,
        codebook: Codebook,
        states: &mut [u16],
    ) -> Result<(), BackendError> {
        assert_eq!(tiles.len(), states.len(), "one state per value");
        assert!(tiles.len().is_multiple_of(TILE), "whole tiles");
        if tiles.is_empty() {
            return Ok(());
        }
        let targets: Vec<f32> = tiles.iter().copied().map(target).collect();
        let gpu = self.lane();
        let (targets, count) = (gpu.floats(&targets), tiles.len() / TILE);
        let found = gpu.empty(states.len());
        viterbi::search(&gpu, &targets, &found, count, rate, codebook, self.bytes);
        copy(&gpu.read(&found, states.len())?, states);
        Ok(())
    }

    fn ldlq(
        &self,
        matrix: &LdlqMatrix,
        rate: Rate,
        codebook: Codebook,
        progress: &dyn Fn(usize),
    ) -> Result<Option<Vec<u16>>, BackendError> {
        let k = matrix.k;
        let rows = matrix.weights.len() / k;
        let gpu = self.lane();
        let most = gpu.client.properties().memory.max_page_size;
        let largest = (k.max(rows) * k * WORD) as u64;
        if Ldlq::bytes(rows, k) > self.matrix_bytes || largest > most {
            return Ok(None);
        }
        let mut states = vec![0; rows * k];
        let mut asked = VecDeque::new();
        let ldlq = Ldlq::new(&gpu, matrix, rate, codebook);
        let mut spans = (0..k).step_by(SPAN).rev();
        loop {
            let next = spans.next();
            if let Some(first) = next {
                let found = ldlq.span(&gpu, first, self.bytes);
                // Asked for now, so that it comes while the next span is computed.
                asked.push_back((first, gpu.client.read_async(vec![found.handle])));
            }
            if next.is_some() && asked.len() <= AHEAD {
                continue;
            }
            let Some((first, read)) = asked.pop_front() else { break };
            let read = block_on(read).map_err(device_error)?;
            let own = &mut states[first * rows..(first + SPAN).min(k) * rows];
            copy(&read[0], own);
            progress(own.len() / TILE);
        }
        Ok(Some(states))
    }
}

/// States that are stored one a word.
fn copy(words: &[u8], states: &mut [u16]) {
    for (state, word) in states.iter_mut().zip(words.as_chunks::<WORD>().0) {
        *state = u32::from_le_bytes(*word) as u16;
    }
}
