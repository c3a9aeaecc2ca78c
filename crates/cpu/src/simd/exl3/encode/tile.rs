//! The search for the ring of a group of tiles.
//!
//! The definition searches twice round the ring to learn where the second search has to begin.
//! Here one search goes `LEAD` positions towards the wrap and then once round, from all nodes with
//! the costs that the lead gave them. Walks that are cheap at the end nearly always descend
//! from one node at the wrap; the walk that returns to that node is a ring. Where it is not,
//! a second search from that node alone follows, as in the definition.
//!
//! The costs of all nodes after all positions are kept: which state led to a node is then found
//! again by looking at the `2^C` candidates, for the nodes of one walk only.

use super::isa::Isa;
use super::step::{GROUP, Square, Step, place};
use marlin_quant::exl3::encode::target;
use marlin_quant::exl3::ring::TILE;
use marlin_quant::exl3::{Codebook, Rate};
use std::sync::OnceLock;

/// Positions searched before the wrap. Measured on Gaussian tiles of 1 to 4 bits, 24 make the
/// distortion 0.5 to 1 % worse and 48 0.2 to 0.6 %; more than 96 make it no better. That the rate
/// hardly matters is no accident: cheap walks share an ancestor only long after they could.
const LEAD: usize = 80;
/// Walks followed back in search of one that returns to its start.
const WALKS: usize = 4;
/// Larger values are encoded like this one: far beyond every codebook, so that they get the
/// extreme states all the same, and the others in the tile are not forgotten over them.
const MAX_VALUE: f32 = 16.0;
/// Fixed-point units of the expected error with [`Square::Low`].
const LOW_UNITS: f32 = 16.0;
/// Largest step of the smallest cost that leaves room to tell the other nodes apart.
const MAX_FLOOR: u16 = 1 << 14;
/// Each level has half the scale of the one before.
pub(super) const LEVELS: usize = 12;

/// Values of a codebook in fixed point.
struct Values {
    /// Units of 1.
    scale: f32,
    by_state: Vec<i16>,
    /// For even and, where they differ, for odd positions: in the order of [`place`].
    ordered: Vec<Vec<i16>>,
}

/// What encoding at one rate needs to know.
pub(crate) struct Plan {
    rate: Rate,
    codebook: Codebook,
    lanes: usize,
    square: Square,
    scale: f32,
    /// Largest magnitude in the codebook.
    range: f32,
    levels: [OnceLock<Values>; LEVELS],
}

impl Plan {
    /// For registers of `lanes` costs.
    pub(super) fn new(rate: Rate, codebook: Codebook, lanes: usize) -> Self {
        let range = codebook.table().iter().fold(0f32, |range, v| range.max(v.abs()));
        let (square, scale) = if rate.bits() < 4.0 {
            (Square::High, f32::from(i16::MAX - 1) / range)
        } else {
            // The error of Gaussian values is about 2^-bits.
            (Square::Low, LOW_UNITS * (rate.bits() as f32).exp2())
        };
        Self { rate, codebook, lanes, square, scale, range, levels: Default::default() }
    }

    /// The rate and codebook it is for.
    pub(super) fn key(&self) -> (Rate, Codebook) {
        (self.rate, self.codebook)
    }

    /// The finest level that has room for `tile`; `None` when there is none.
    pub(super) fn level_of(&self, tile: &[f32; TILE]) -> Option<usize> {
        let largest = tile.iter().fold(0f32, |m, &v| m.max(clamped(v).abs()));
        let beyond = (largest - self.range).max(0.0);
        (0..LEVELS).find(|&level| {
            let scale = self.scale_of(level);
            let floor = self.square.units(beyond * scale);
            largest * scale <= f32::from(i16::MAX) && floor < f32::from(MAX_FLOOR)
        })
    }

    fn scale_of(&self, level: usize) -> f32 {
        self.scale / (1 << level) as f32
    }

    fn values(&self, level: usize) -> &Values {
        self.levels[level].get_or_init(|| {
            let scale = self.scale_of(level);
            let by_state: Vec<i16> =
                self.codebook.table().iter().map(|v| (v * scale).round() as i16).collect();
            let parities = if self.rate.is_half() { 2 } else { 1 };
            let ordered = (0..parities).map(|i| {
                let (e, c) = self.bits(i);
                let mut ordered = vec![0; Codebook::STATES];
                for (state, &value) in by_state.iter().enumerate() {
                    ordered[place(state, self.lanes, e, c)] = value;
                }
                ordered
            });
            let ordered = ordered.collect();
            Values { scale, by_state, ordered }
        })
    }

    /// New bits at position `i` and at the next.
    fn bits(&self, i: usize) -> (usize, usize) {
        (self.rate.new_bits(i % TILE), self.rate.new_bits((i + 1) % TILE))
    }

    /// Nodes before position `i`.
    fn nodes(&self, i: usize) -> usize {
        Codebook::STATES >> self.bits(i).0
    }
}

/// What stands for `value`.
fn clamped(value: f32) -> f32 {
    target(value).clamp(-MAX_VALUE, MAX_VALUE)
}

/// Memory of a search.
#[derive(Default)]
pub(super) struct Scratch {
    /// Per tile `[position or end: 257][node]`.
    costs: [Vec<u16>; GROUP],
}

/// The rings of `tiles` at `level`; `None` where the level has too little room after all. What
/// becomes of a tile does not depend on the others.
pub(super) fn encode<S: Isa>(
    s: S,
    plan: &Plan,
    level: usize,
    tiles: [&[f32; TILE]; GROUP],
    scratch: &mut Scratch,
) -> [Option<[u16; TILE]>; GROUP] {
    let values = plan.values(level);
    let targets = tiles.map(|t| t.map(|v| (clamped(v) * values.scale).round() as i16));
    let stride = plan.nodes(0).max(plan.nodes(1));
    for costs in &mut scratch.costs {
        costs.resize((TILE + 1) * stride, 0);
        costs[..plan.nodes(TILE - LEAD)].fill(0);
    }
    let mut search = Search { s, plan, values, targets, stride, costs: &mut scratch.costs };
    search.lead();
    let tops = search.round();
    let walks: [_; GROUP] = std::array::from_fn(|g| search.ring(g));
    let mut rings = walks.map(Result::ok);
    if rings.iter().any(Option::is_none) {
        let starts = walks.map(|walk| walk.err().unwrap_or(0));
        search.restart(starts);
        search.round();
        for g in 0..GROUP {
            if rings[g].is_none() {
                let (ring, start) = search.walk(g, starts[g]);
                rings[g] = Some(ring).filter(|_| start == starts[g]);
            }
        }
    }
    std::array::from_fn(|g| rings[g].filter(|_| tops[g] < MAX_FLOOR))
}

struct Search<'a, S> {
    s: S,
    plan: &'a Plan,
    values: &'a Values,
    targets: [[i16; TILE]; GROUP],
    /// Room for the nodes before one position.
    stride: usize,
    costs: &'a mut [Vec<u16>; GROUP],
}

impl<S: Isa> Search<'_, S> {
    /// From any node `LEAD` positions before the wrap: leaves the costs there in the first slot.
    fn lead(&mut self) {
        let mut floors = [0; GROUP];
        for k in 0..LEAD {
            floors = self.step(TILE - LEAD + k, k % 2, (k + 1) % 2, floors);
        }
        const { assert!(LEAD.is_multiple_of(2)) };
    }

    /// Costs nothing at the nodes `starts` and as much as can be said elsewhere.
    fn restart(&mut self, starts: [usize; GROUP]) {
        for (costs, start) in self.costs.iter_mut().zip(starts) {
            costs[..self.plan.nodes(0)].fill(u16::MAX);
            costs[start] = 0;
        }
    }

    /// Once round; returns the largest step of the smallest cost.
    fn round(&mut self) -> [u16; GROUP] {
        let (mut floors, mut tops) = ([0; GROUP], [0; GROUP]);
        for i in 0..TILE {
            floors = self.step(i, i, i + 1, floors);
            tops = std::array::from_fn(|g| floors[g].max(tops[g]));
        }
        tops
    }

    /// Position `i`, from the costs in slot `from` to slot `to`.
    fn step(&mut self, i: usize, from: usize, to: usize, floors: [u16; GROUP]) -> [u16; GROUP] {
        let (plan, stride) = (self.plan, self.stride);
        let mut old: [&[u16]; GROUP] = Default::default();
        let mut new: [&mut [u16]; GROUP] = Default::default();
        for (g, costs) in self.costs.iter_mut().enumerate() {
            let (low, high) = costs.split_at_mut(from.max(to) * stride);
            let (a, b) = match from < to {
                true => (&mut low[from * stride..], high),
                false => (high, &mut low[to * stride..]),
            };
            (old[g], new[g]) = (&a[..plan.nodes(i)], &mut b[..plan.nodes(i + 1)]);
        }
        self.s.enter(Step {
            bits: plan.bits(i),
            square: plan.square,
            values: &self.values.ordered[i % self.values.ordered.len()],
            targets: std::array::from_fn(|g| self.targets[g][i]),
            floors,
            old,
            new,
        })
    }

    /// A walk that returns to its start, or the node at which to start one.
    fn ring(&self, g: usize) -> Result<[u16; TILE], usize> {
        let ends = &self.costs[g][TILE * self.stride..][..self.plan.nodes(TILE)];
        let mut end = (0..ends.len()).min_by_key(|&node| ends[node]).unwrap_or(0);
        for _ in 0..WALKS {
            let (states, start) = self.walk(g, end);
            if start == end {
                return Ok(states);
            }
            end = start;
        }
        Err(end)
    }

    /// The cheapest walk round that ends at `node`, and where it starts; of equally cheap ones
    /// the one of the smallest last state.
    fn walk(&self, g: usize, mut node: usize) -> ([u16; TILE], usize) {
        let mut states = [0; TILE];
        for i in (0..TILE).rev() {
            let (e, c) = self.plan.bits(i);
            let old = &self.costs[g][i * self.stride..];
            let cost = |&state: &usize| {
                let square = self.plan.square.cost(self.values.by_state[state], self.targets[g][i]);
                old[state >> e].saturating_add(square)
            };
            let candidates = (0..1 << c).map(|choice| choice << (16 - c) | node);
            let state = candidates.min_by_key(cost).unwrap_or(0);
            states[i] = state as u16;
            node = state >> e;
        }
        (states, node)
    }
}
