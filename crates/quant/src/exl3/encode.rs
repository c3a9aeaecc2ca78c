//! Encoding of tiles: the cheapest ring of states for given values.
//!
//! Between two positions of a ring lies a *node*, the bits both states share: the state `s` of
//! position `i` leads from node `s >> D(i)` to node `s mod 2^(16 − D(i + 1))` and costs
//! `(codebook(s) − value)²`. The best ring is the cheapest closed walk through these nodes, which
//! would take one search per start node; as exllamav3 does, a first search with a free start goes
//! once round from the middle of the tile and fixes only the node at the wrap, and a second one
//! begins and ends there.
//!
//! [`ReferenceEncoder`] is that definition; faster ones implement [`TileEncoder`] beside it.

use super::codebook::Codebook;
use super::ring::{Rate, TILE};
use marlin_tensor::BackendError;

/// Largest magnitude of a value that is told apart from larger ones: the range of fp16.
pub const MAX_TARGET: f32 = 65504.0;

/// What is encoded in place of `value`: itself, the nearest number within ±[`MAX_TARGET`], or 0 for
/// NaN.
pub fn target(value: f32) -> f32 {
    if value.is_nan() { 0.0 } else { value.clamp(-MAX_TARGET, MAX_TARGET) }
}

/// Finds the ring of states whose decoded values are nearest to given tiles.
pub trait TileEncoder: Send + Sync {
    /// What the user sees, for example `"avx512, 2 threads"`.
    fn name(&self) -> String;

    /// `tiles: [n, 256]` in ring order -> `states: [n, 256]`, each row a tail-biting ring of
    /// `rate`. Every tile is encoded independently of the others and of the number of threads, so
    /// the result depends on its 256 values only. Values are taken as [`target`] says.
    ///
    /// # Errors
    /// When a device fails.
    ///
    /// # Panics
    /// When the slices differ in length or do not hold whole tiles.
    fn encode(
        &self,
        tiles: &[f32],
        rate: Rate,
        codebook: Codebook,
        states: &mut [u16],
    ) -> Result<(), BackendError>;

    /// Tiles that one call should have, where there are so many.
    fn together(&self) -> usize {
        1
    }

    /// Encodes a whole matrix with LDLQ: states `[k / 16, rows / 16, 256]`, or `None` where errors are the caller's to feed
    /// back. `progress` is told of tiles that are done.
    ///
    /// # Errors
    /// When a device fails.
    fn ldlq(
        &self,
        _matrix: &LdlqMatrix,
        _rate: Rate,
        _codebook: Codebook,
        _progress: &dyn Fn(usize),
    ) -> Result<Option<Vec<u16>>, BackendError> {
        Ok(None)
    }
}

/// What LDLQ encodes: the columns of `W` in groups of sixteen, last to first, each as `W_g + Σ_{j>g} E_j L[j,g]`, where
/// `E = W − Q` are the errors made so far.
#[derive(Debug, Clone, Copy)]
pub struct LdlqMatrix<'a> {
    /// `W: [rows, k]`, row-major; `rows` and `k` are multiples of sixteen.
    pub weights: &'a [f32],
    /// `L: [k, k]`, row-major; blocks above the diagonal are not read.
    pub factor: &'a [f32],
    /// Columns of both.
    pub k: usize,
}

/// The definition: f32 costs, every state visited; of equal costs the smallest state.
pub struct ReferenceEncoder;

impl TileEncoder for ReferenceEncoder {
    fn name(&self) -> String {
        "reference, 1 thread".into()
    }

    fn encode(
        &self,
        tiles: &[f32],
        rate: Rate,
        codebook: Codebook,
        states: &mut [u16],
    ) -> Result<(), BackendError> {
        assert_eq!(tiles.len(), states.len(), "one state per value");
        let table = codebook.table();
        let ((tiles, rest), (states, _)) = (tiles.as_chunks(), states.as_chunks_mut());
        assert!(rest.is_empty(), "whole tiles");
        for (tile, states) in tiles.iter().zip(states) {
            *states = best_ring(&tile.map(target), rate, &table);
        }
        Ok(())
    }
}

/// The ring of `rate` for `tile`: what [`ReferenceEncoder`] finds, of values in range.
pub fn best_ring(tile: &[f32; TILE], rate: Rate, table: &[f32]) -> [u16; TILE] {
    const MIDDLE: usize = TILE / 2;
    let free = Search::run(tile, rate, table, MIDDLE, None);
    let end = (0..free.cost.len()).min_by(|&a, &b| free.cost[a].total_cmp(&free.cost[b]));
    let wrap = usize::from(free.trace(rate, MIDDLE, end.unwrap_or(0))[0]) >> rate.new_bits(0);
    Search::run(tile, rate, table, 0, Some(wrap)).trace(rate, 0, wrap)
}

/// Cheapest walks once round the ring.
struct Search {
    /// Cost of the cheapest walk to every node after the last position.
    cost: Vec<f32>,
    /// Per position: the last state of the cheapest walk to every node after it.
    last: Vec<Vec<u16>>,
}

impl Search {
    /// Walks that begin before position `first`, at node `start` or anywhere.
    fn run(
        tile: &[f32; TILE],
        rate: Rate,
        table: &[f32],
        first: usize,
        start: Option<usize>,
    ) -> Self {
        let nodes = |i: usize| Codebook::STATES >> rate.new_bits(i % TILE);
        let allowed = |node: usize| start.is_none_or(|start| node == start);
        let mut cost: Vec<f32> =
            (0..nodes(first)).map(|n| if allowed(n) { 0.0 } else { f32::INFINITY }).collect();
        let mut last = vec![Vec::new(); TILE];
        for i in (0..TILE).map(|i| (i + first) % TILE) {
            let mut best = vec![f32::INFINITY; nodes(i + 1)];
            let mut state = vec![0u16; nodes(i + 1)];
            // The states that leave one node are consecutive, and so are the nodes they lead to.
            let leaving = 1 << rate.new_bits(i);
            for (node, (&cost, values)) in cost.iter().zip(table.chunks(leaving)).enumerate() {
                let s = node * leaving;
                let to = s % best.len();
                let next = best[to..][..leaving].iter_mut().zip(&mut state[to..][..leaving]);
                for (j, (value, (best, state))) in values.iter().zip(next).enumerate() {
                    let cost = cost + (value - tile[i]).powi(2);
                    if cost < *best {
                        (*best, *state) = (cost, (s + j) as u16);
                    }
                }
            }
            (cost, last[i]) = (best, state);
        }
        Self { cost, last }
    }

    /// States of the walk from position `first` that ends at `node`.
    fn trace(&self, rate: Rate, first: usize, mut node: usize) -> [u16; TILE] {
        let mut states = [0u16; TILE];
        for i in (0..TILE).map(|i| (i + first) % TILE).rev() {
            states[i] = self.last[i][node];
            node = usize::from(states[i]) >> rate.new_bits(i);
        }
        states
    }
}
