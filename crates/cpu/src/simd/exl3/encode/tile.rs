//! The search for the ring of a group of tiles.
//!
//! The definition searches twice round the ring to learn where the second search has to begin.
//! Here one search goes `LEAD` positions towards the wrap and then once round, from all nodes with
//! the costs that the lead gave them. Walks that are cheap at the end nearly always descend
//! from one node at the wrap; the walk that returns to that node is a ring. Where it is not,
//! the first `JOIN` positions are searched again, from that node alone: what came so long before
//! does not change how the walks behind compare.
//!
//! The costs of all nodes after all positions are kept: which state led to a node is then found
//! again by looking at the `2^C` candidates, for the nodes of one walk only.

use super::isa::Isa;
use super::square::Square;
use super::step::{GROUP, Step, place};
use crate::simd::region::Piece;
use marlin_quant::exl3::encode::target;
use marlin_quant::exl3::ring::TILE;
use marlin_quant::exl3::{Codebook, Rate};
use std::sync::OnceLock;

/// Positions searched before the wrap. Measured on Gaussian tiles of 1 to 4 bits, 24 make the
/// distortion 0.5 to 1 % worse and 48 0.2 to 0.6 %; more than 96 make it no better. That the rate
/// hardly matters is no accident: cheap walks share an ancestor only long after they could.
const LEAD: usize = 80;
/// Positions searched again where no walk returns. Measured in the same way, 80 make the distortion
/// 0.1 to 0.3 % worse at 1 to 2.5 bits; 160 are as good as all 256.
const JOIN: usize = 160;
/// Walks followed back in search of one that returns to its start.
const WALKS: usize = 4;
/// Larger values are encoded like this one: far beyond every codebook, so that they get the
/// extreme states all the same, and the others in the tile are not forgotten over them.
const MAX_VALUE: f32 = 16.0;
/// Units of the expected error with [`Square::Fine`].
const FINE_UNITS: f32 = 16.0;
/// Units of 1 with [`Square::Half`]: neither do errors underflow nor differences overflow.
const HALF_UNITS: f32 = 8.0;
/// One of fp16 where there is fp16 arithmetic, else a spare one; then those of integers, each with
/// half the scale of the one before.
pub(super) const LEVELS: usize = 13;

/// Numbers of one level.
struct Numbers {
    square: Square,
    /// Units of 1.
    scale: f32,
    /// Largest step of the smallest cost, in its units, that leaves room to tell the other nodes
    /// apart.
    max_floor: f32,
}

/// Values of a codebook at one level.
struct Values {
    numbers: Numbers,
    by_state: Vec<i16>,
    /// For even and, where they differ, for odd positions: in the order of [`place`].
    ordered: Vec<Vec<i16>>,
}

/// What encoding at one rate needs to know.
pub(crate) struct Plan {
    rate: Rate,
    codebook: Codebook,
    lanes: usize,
    /// Whether there is fp16 arithmetic.
    half: bool,
    /// Largest magnitude in the codebook.
    range: f32,
    levels: [OnceLock<Values>; LEVELS],
}

impl Plan {
    /// For the registers of `S`.
    pub(super) fn new<S: Isa>(rate: Rate, codebook: Codebook) -> Self {
        let range = codebook.table().iter().fold(0f32, |range, v| range.max(v.abs()));
        Self { rate, codebook, lanes: S::LANES, half: S::HALF, range, levels: Default::default() }
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
            self.numbers(level).is_some_and(|Numbers { square, scale, max_floor }| {
                let floor = square.units(beyond * scale);
                largest.max(self.range) * scale <= square.max_number() && floor < max_floor
            })
        })
    }

    fn numbers(&self, level: usize) -> Option<Numbers> {
        // The error of Gaussian values.
        let error = (-self.rate.bits() as f32).exp2();
        let Some(halvings) = level.checked_sub(1) else {
            let (square, scale) = (Square::Half, HALF_UNITS);
            // Sums are rounded to less than one such error.
            let max_floor = square.units(error * scale) * 2048.0;
            return self.half.then_some(Numbers { square, scale, max_floor });
        };
        let (e, c) = self.bits(0);
        let square = Square::of_integers(e, c);
        let scale = match square {
            Square::Fine => FINE_UNITS / error,
            _ => square.max_number() / self.range,
        };
        Some(Numbers { square, scale: scale / (1 << halvings) as f32, max_floor: 16384.0 })
    }

    fn values(&self, level: usize) -> &Values {
        self.levels[level].get_or_init(|| {
            let numbers = self.numbers(level).expect("a level that level_of chose");
            let number = |v: &f32| numbers.square.number(v * numbers.scale);
            let by_state: Vec<i16> = self.codebook.table().iter().map(number).collect();
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
            Values { numbers, by_state, ordered }
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
    /// Costs `[tile][position or end: 257][node]`, on huge pages.
    costs: Option<Piece>,
}

impl Scratch {
    /// `len` costs of each tile, of whatever value.
    fn costs(&mut self, len: usize) -> [&mut [u16]; GROUP] {
        let bytes = GROUP * len * size_of::<u16>();
        if self.costs.as_ref().is_none_or(|piece| piece.len() < bytes) {
            self.costs = None;
        }
        let piece = self.costs.get_or_insert_with(|| Piece::zeroed(bytes));
        // SAFETY: any bits are numbers. A piece is aligned to more than their two bytes.
        let (_, costs, _) = unsafe { piece.align_to_mut() };
        let mut tiles = costs.chunks_exact_mut(len);
        std::array::from_fn(|_| tiles.next().expect("a piece has room for all"))
    }
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
    let Numbers { square, scale, max_floor } = values.numbers;
    let targets = tiles.map(|t| t.map(|v| square.number(clamped(v) * scale)));
    let stride = plan.nodes(0).max(plan.nodes(1));
    let mut costs = scratch.costs((TILE + 1) * stride);
    for costs in &mut costs {
        costs[..plan.nodes(TILE - LEAD)].fill(0);
    }
    let mut search = Search { s, plan, values, targets, stride, costs };
    search.lead();
    let mut tops = search.steps(TILE);
    let (mut walks, open) = search.rings();
    if open.iter().any(Option::is_some) {
        search.restart(open);
        let again = search.steps(JOIN);
        for g in (0..GROUP).filter(|&g| open[g].is_some()) {
            walks[g].start = None;
            tops[g] = tops[g].max(again[g]);
        }
        search.walk(open, &mut walks);
    }
    std::array::from_fn(|g| {
        let returned = open[g].is_none_or(|node| walks[g].start == Some(node));
        (returned && tops[g] < square.bits(max_floor)).then_some(walks[g].states)
    })
}

struct Search<'a, S> {
    s: S,
    plan: &'a Plan,
    values: &'a Values,
    targets: [[i16; TILE]; GROUP],
    /// Room for the nodes before one position.
    stride: usize,
    costs: [&'a mut [u16]; GROUP],
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
    fn restart(&mut self, starts: [Option<usize>; GROUP]) {
        for (costs, start) in self.costs.iter_mut().zip(starts) {
            costs[..self.plan.nodes(0)].fill(self.values.numbers.square.highest());
            costs[start.unwrap_or(0)] = 0;
        }
    }

    /// The first `n` positions; returns the largest step of the smallest cost.
    fn steps(&mut self, n: usize) -> [u16; GROUP] {
        let (mut floors, mut tops) = ([0; GROUP], [0; GROUP]);
        for i in 0..n {
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
            square: self.values.numbers.square,
            values: &self.values.ordered[i % self.values.ordered.len()],
            targets: std::array::from_fn(|g| self.targets[g][i]),
            floors,
            old,
            new,
        })
    }

    /// Walks that return to their start, and for those that do not the nodes at which to start.
    fn rings(&self) -> ([Walk; GROUP], [Option<usize>; GROUP]) {
        let mut walks = [Walk { states: [0; TILE], start: None }; GROUP];
        let mut open = self.costs.each_ref().map(|costs| {
            let ends = &costs[TILE * self.stride..][..self.plan.nodes(TILE)];
            (0..ends.len()).min_by_key(|&node| ends[node])
        });
        for _ in 0..WALKS {
            let ends = open;
            self.walk(ends, &mut walks);
            open = std::array::from_fn(|g| {
                walks[g].start.filter(|&start| ends[g].is_some_and(|end| end != start))
            });
        }
        (walks, open)
    }

    /// Makes of `walks` the cheapest ones round that end at `nodes`, where there is one; of equally
    /// cheap ones those of the smallest last state. They may hold others, which are soon joined.
    ///
    /// Most of the time goes into waiting for memory, so all walk at once.
    fn walk(&self, mut nodes: [Option<usize>; GROUP], walks: &mut [Walk; GROUP]) {
        let square = self.values.numbers.square;
        for i in (0..TILE).rev() {
            let (e, c) = self.plan.bits(i);
            for ((g, walk), open) in walks.iter_mut().enumerate().zip(&mut nodes) {
                let Some(node) = *open else { continue };
                let (old, target) = (&self.costs[g][i * self.stride..], self.targets[g][i]);
                let order = |&state: &usize| {
                    square.order(old[state >> e], self.values.by_state[state], target)
                };
                let candidates = (0..1 << c).map(|choice| choice << (16 - c) | node);
                let state = candidates.min_by_key(order).unwrap_or(0);
                let joined = walk.start.is_some() && walk.states[i] == state as u16;
                walk.states[i] = state as u16;
                *open = (!joined).then_some(state >> e);
            }
        }
        for (walk, node) in walks.iter_mut().zip(nodes) {
            walk.start = node.or(walk.start);
        }
    }
}

/// States from the wrap to the wrap.
#[derive(Clone, Copy)]
struct Walk {
    states: [u16; TILE],
    /// Node before the first; `None` before any was walked.
    start: Option<usize>,
}
