//! Encoding of EXL3 tiles with costs of 16 bits (see `marlin_quant::exl3::encode` for the search).
//!
//! * `step`: one position of the ring, where all the time goes.
//! * `square`: how errors are counted.
//! * `tile`: the order of the steps, and the walk back; values as numbers.
//! * `isa`: what a step may use of a processor; `avx2`, `avx512`, `neon`: the implementations.
//!
//! Costs are taken less the smallest of their position: fp16 numbers where the processor computes
//! with such, else integers. A tile whose errors do not fit, because its values lie far outside
//! the codebook, is encoded with coarser integers.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod square;
mod step;
#[cfg(test)]
mod tests;
mod tile;

use crate::Level;
#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
use isa::Isa;
use marlin_quant::exl3::encode::{best_ring, target};
use marlin_quant::exl3::ring::TILE;
use marlin_quant::exl3::{Codebook, Rate};
#[cfg(target_arch = "aarch64")]
use neon::Neon;
use std::sync::{Arc, Mutex, PoisonError};
use step::GROUP;
use tile::{LEVELS, Scratch};

pub(crate) use tile::Plan;

/// The search compiled for one instruction set.
trait Compiled: Send + Sync {
    fn plan(&self, rate: Rate, codebook: Codebook) -> Plan;
    fn encode(
        &self,
        plan: &Plan,
        tiles: &[[f32; TILE]],
        states: &mut [[u16; TILE]],
        scratch: &mut Scratch,
    );
    #[cfg(test)]
    fn check_step(&self, bits: (usize, usize), square: square::Square);
}

impl<S: Isa> Compiled for S {
    fn plan(&self, rate: Rate, codebook: Codebook) -> Plan {
        Plan::new::<S>(rate, codebook)
    }

    fn encode(
        &self,
        plan: &Plan,
        tiles: &[[f32; TILE]],
        states: &mut [[u16; TILE]],
        scratch: &mut Scratch,
    ) {
        let mut levels: Vec<Option<usize>> = tiles.iter().map(|tile| plan.level_of(tile)).collect();
        for level in 0..LEVELS {
            let here: Vec<usize> = (0..tiles.len()).filter(|&i| levels[i] == Some(level)).collect();
            for group in here.chunks(GROUP) {
                // An incomplete group is filled with its last tile.
                let member: [usize; GROUP] = std::array::from_fn(|g| group[g.min(group.len() - 1)]);
                let rings = tile::encode(*self, plan, level, member.map(|i| &tiles[i]), scratch);
                for (i, ring) in member.into_iter().zip(rings) {
                    match ring {
                        Some(ring) => states[i] = ring,
                        None => levels[i] = Some(level + 1),
                    }
                }
            }
        }
        for (i, level) in levels.into_iter().enumerate() {
            if level.is_none_or(|level| level >= LEVELS) {
                let (rate, codebook) = plan.key();
                states[i] = best_ring(&tiles[i].map(target), rate, &codebook.table());
            }
        }
    }

    #[cfg(test)]
    fn check_step(&self, bits: (usize, usize), square: square::Square) {
        tests::check_step(*self, bits, square);
    }
}

/// What a level may use, with fp16 arithmetic where `half`.
#[cfg(target_arch = "x86_64")]
fn compiled(level: Level, half: bool) -> Option<Box<dyn Compiled>> {
    let half = half && level >= Level::Avx512Vnni && is_x86_feature_detected!("avx512fp16");
    // SAFETY: supported levels include the ones before, and the rest is checked here.
    unsafe {
        match level.float() {
            _ if !level.is_supported() => None,
            Level::Avx2 => Some(Box::new(Avx2::new())),
            Level::Avx512 if half => Some(Box::new(Avx512::<true>::new())),
            Level::Avx512 => Some(Box::new(Avx512::<false>::new())),
            _ => None,
        }
    }
}

/// What a level may use, with fp16 arithmetic where `half`.
#[cfg(target_arch = "aarch64")]
fn compiled(level: Level, half: bool) -> Option<Box<dyn Compiled>> {
    let half = half && std::arch::is_aarch64_feature_detected!("fp16");
    // SAFETY: the level is supported, and the rest is checked here.
    unsafe {
        match level.float() {
            _ if !level.is_supported() => None,
            Level::Neon if half => Some(Box::new(Neon::<true>::new())),
            Level::Neon => Some(Box::new(Neon::<false>::new())),
            _ => None,
        }
    }
}

/// The encoder of one level, for one thread at a time or for many.
pub(crate) struct Tiles {
    compiled: Box<dyn Compiled>,
    /// What the last call needed.
    plan: Mutex<Option<Arc<Plan>>>,
    /// Memory of searches that are over.
    scratch: Mutex<Vec<Scratch>>,
}

impl Tiles {
    /// `None` for the scalar level and where the processor lacks `level`.
    pub(crate) fn new(level: Level) -> Option<Self> {
        let compiled = compiled(level, true)?;
        Some(Self { compiled, plan: Mutex::default(), scratch: Mutex::default() })
    }

    /// What [`encode`](Self::encode) needs for a rate and codebook.
    pub(crate) fn plan(&self, rate: Rate, codebook: Codebook) -> Arc<Plan> {
        let mut last = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(plan) if plan.key() == (rate, codebook) => plan.clone(),
            _ => last.insert(Arc::new(self.compiled.plan(rate, codebook))).clone(),
        }
    }

    /// The rings of `tiles`, on this thread.
    pub(crate) fn encode(&self, plan: &Plan, tiles: &[[f32; TILE]], states: &mut [[u16; TILE]]) {
        let free = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = free().pop().unwrap_or_default();
        self.compiled.encode(plan, tiles, states, &mut scratch);
        free().push(scratch);
    }
}
