//! Encoding of EXL3 tiles with costs of 16 bits (see `marlin_quant::exl3::encode` for the search).
//!
//! * `step`: one position of the ring, where all the time goes.
//! * `tile`: the order of the steps, and the walk back; values in fixed point.
//! * `isa`: what a step may use of a processor; `avx2`, `avx512`, `neon`: the implementations.
//!
//! Costs are fixed-point numbers less the smallest of their position. A tile whose errors do not
//! fit, because its values lie far outside the codebook, is encoded again with coarser numbers.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
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

/// An instruction set, proven to be there.
#[derive(Clone, Copy)]
enum Proof {
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

/// The encoder of one level, for one thread at a time or for many.
pub(crate) struct Tiles {
    proof: Proof,
    /// What the last call needed.
    plan: Mutex<Option<Arc<Plan>>>,
    /// Memory of searches that are over.
    scratch: Mutex<Vec<Scratch>>,
}

impl Tiles {
    /// `None` for the scalar level and where the processor lacks `level`.
    pub(crate) fn new(level: Level) -> Option<Self> {
        if !level.is_supported() {
            return None;
        }
        // SAFETY: the level is supported, and levels include the ones before.
        let proof = unsafe {
            match level.float() {
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => Proof::Avx2(Avx2::new()),
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 => Proof::Avx512(Avx512::new()),
                #[cfg(target_arch = "aarch64")]
                Level::Neon => Proof::Neon(Neon::new()),
                _ => return None,
            }
        };
        Some(Self { proof, plan: Mutex::default(), scratch: Mutex::default() })
    }

    /// What [`encode`](Self::encode) needs for a rate and codebook.
    pub(crate) fn plan(&self, rate: Rate, codebook: Codebook) -> Arc<Plan> {
        let mut last = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(plan) if plan.key() == (rate, codebook) => plan.clone(),
            _ => {
                let lanes = match self.proof {
                    #[cfg(target_arch = "x86_64")]
                    Proof::Avx2(_) => Avx2::LANES,
                    #[cfg(target_arch = "x86_64")]
                    Proof::Avx512(_) => Avx512::LANES,
                    #[cfg(target_arch = "aarch64")]
                    Proof::Neon(_) => Neon::LANES,
                };
                last.insert(Arc::new(Plan::new(rate, codebook, lanes))).clone()
            }
        }
    }

    /// The rings of `tiles`, on this thread.
    pub(crate) fn encode(&self, plan: &Plan, tiles: &[[f32; TILE]], states: &mut [[u16; TILE]]) {
        let free = || self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let mut scratch = free().pop().unwrap_or_default();
        match self.proof {
            #[cfg(target_arch = "x86_64")]
            Proof::Avx2(s) => encode(s, plan, tiles, states, &mut scratch),
            #[cfg(target_arch = "x86_64")]
            Proof::Avx512(s) => encode(s, plan, tiles, states, &mut scratch),
            #[cfg(target_arch = "aarch64")]
            Proof::Neon(s) => encode(s, plan, tiles, states, &mut scratch),
        }
        free().push(scratch);
    }
}

fn encode<S: Isa>(
    s: S,
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
            let rings = tile::encode(s, plan, level, member.map(|i| &tiles[i]), scratch);
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
