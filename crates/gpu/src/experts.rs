//! Matrices of experts, put together in stacks, and what the chosen ones make of rows.

use crate::gpu::{Buffer, Gpu, WORD};
use crate::ops::elementwise::{self, copy};
use crate::ops::exl3;
use crate::ops::integer;
use crate::ops::moe::{self, Chosen};
use crate::ops::text::Inputs;
use crate::ops::tiles::{ABSENT, Entries, MOST, Rows};
use crate::weights::{GpuLinear, Loaded, Matrix, Place, multiply_many};
use marlin_tensor::{Activation, BackendError, Experts, GatedLinears, Linear};
use std::sync::Arc;

type Result<T> = std::result::Result<T, BackendError>;

/// Entries of a routing up to which each is multiplied by itself; more are sorted by expert first.
const SINGLE: usize = 64;
/// Rows of a tile of sorted entries, at least and at most.
const TILE: (u32, u32) = (2, MOST);

fn twice_used() -> BackendError {
    BackendError::Device("an expert's matrix is part of two sets of experts".to_owned())
}

/// Matrices of several experts in one piece.
pub(crate) struct Stack {
    pub(crate) loaded: Loaded,
    /// Matrices in it.
    members: usize,
    /// Place of every expert's matrix, [`ABSENT`] where it is in another stack.
    pub(crate) slots: Buffer,
}

/// All matrices of a set of experts: usually one stack each.
pub(crate) struct Stacks {
    /// The gates of the experts that are chosen.
    made_of: Vec<usize>,
    /// Experts, one more than are chosen from where the shared one is the last.
    experts: usize,
    /// Outputs of gates, and of the matrices after them.
    inner: usize,
    hidden: usize,
    gate: Vec<Arc<Stack>>,
    up: Vec<Arc<Stack>>,
    down: Vec<Arc<Stack>>,
}

impl Stacks {
    /// Those of `experts`, made when they are first used; with the shared one, where it fits in.
    ///
    /// # Errors
    /// When a matrix was made by another backend, or is part of two sets of experts.
    pub(crate) fn of<'a>(
        gpu: &Gpu,
        experts: &'a Experts,
        shared: Option<&'a GatedLinears>,
        open: impl Fn(&'a Linear) -> Result<&'a GpuLinear>,
    ) -> Result<Arc<Self>> {
        let first = experts.gate.first().ok_or_else(|| {
            BackendError::Device("a mixture of experts without experts".to_owned())
        })?;
        let first = open(first)?;
        if first.stacks.get().is_none() {
            let shared = shared.map(|s| [&s.gate, &s.up, &s.down]);
            let experts = [&experts.gate[..], &experts.up[..], &experts.down[..]];
            let _ = first.stacks.set(Arc::new(Self::new(gpu, experts, shared, open)?));
        }
        let stacks = first.stacks.get().cloned();
        stacks.filter(|s| s.made_of == addresses(&experts.gate)).ok_or_else(twice_used)
    }

    /// Puts the matrices of experts together; they live in the stacks from then on. So does the `shared` one if it is like them.
    ///
    /// # Errors
    /// When a matrix was made by another backend, or lies in a stack already.
    fn new<'a>(
        gpu: &Gpu,
        experts: [&'a [Linear]; 3],
        shared: Option<[&'a Linear; 3]>,
        open: impl Fn(&'a Linear) -> Result<&'a GpuLinear>,
    ) -> Result<Self> {
        let made_of = addresses(experts[0]);
        let (inner, hidden) = (experts[0][0].out_features, experts[2][0].out_features);
        let mut all = Vec::with_capacity(3);
        for linears in experts {
            all.push(linears.iter().map(&open).collect::<Result<Vec<_>>>()?);
        }
        if let Some(shared) = shared {
            let shared = shared.into_iter().map(open).collect::<Result<Vec<_>>>()?;
            if all.iter().zip(&shared).all(|(linears, one)| fits_in(gpu, linears, one)) {
                all.iter_mut().zip(shared).for_each(|(linears, one)| linears.push(one));
            }
        }
        let experts = all[0].len();
        let mut stacks = all.iter().map(|linears| stack(gpu, linears));
        let mut next = || stacks.next().unwrap_or_else(|| Ok(Vec::new()));
        Ok(Self { made_of, experts, inner, hidden, gate: next()?, up: next()?, down: next()? })
    }

    /// Rows of a tile of `count` sorted entries, as the kernel for all of its matrices has them.
    fn tile(&self, gpu: &Gpu, count: usize) -> u32 {
        let average = count.div_ceil(self.experts);
        let of = |(least, most)| (average.next_power_of_two() as u32).clamp(least, most);
        let all = self.gate.iter().chain(&self.up).chain(&self.down);
        let mut all = all.map(|stack| match &stack.loaded.matrix {
            Matrix::Trellis(matrix) if gpu.tensor_cores => exl3::entries_tile(matrix, average),
            Matrix::Rows(rows) if integer::takes(gpu, rows.format) => of(integer::TILE),
            _ => of(TILE),
        });
        let first = all.next().unwrap_or(of(TILE));
        if all.all(|tile| tile == first) { first } else { of(TILE) }
    }

    /// Whether the shared expert is the last of them, and `rows` rows with `top_k` experts each are so few that it is best taken as one more.
    pub(crate) fn share(&self, rows: usize, top_k: usize) -> bool {
        self.experts > self.made_of.len() && rows * (top_k + 1) <= SINGLE
    }

    /// Weighted sum of what the `chosen` experts make of `rows` rows, `top_k` of them each.
    pub(crate) fn sum(
        &self,
        gpu: &Gpu,
        x: &Buffer,
        rows: usize,
        chosen: &Chosen,
        top_k: usize,
        activation: Activation,
    ) -> Buffer {
        let count = rows * top_k;
        let grouped = (count > SINGLE)
            .then(|| moe::group(gpu, &chosen.ids, count, self.experts, self.tile(gpu, count)));
        let entries = Entries {
            count,
            ids: chosen.ids.clone(),
            slots: gpu.none.clone(),
            divisor: top_k,
            grouped,
        };
        let (gate, up) = self.gate_and_up(gpu, x, rows, &entries);
        let own = Entries { divisor: 1, ..entries };
        let inputs = Inputs { x: &gate, gate: Some((activation, &up)) };
        let down = self.down_of(gpu, inputs, &own).unwrap_or_else(|| {
            elementwise::gated(gpu, &gate, &up, activation, count * self.inner);
            multiply(gpu, &gate, count, &self.down, &own, self.hidden)
        });
        moe::combine(gpu, &down, &chosen.weights, rows, top_k, self.hidden)
    }

    /// Entries of their own times their experts' last matrices, where one kernel makes what it multiplies.
    fn down_of(&self, gpu: &Gpu, x: Inputs<'_>, entries: &Entries) -> Option<Buffer> {
        let [down] = &self.down[..] else { return None };
        let entries = Entries { slots: down.slots.clone(), ..entries.clone() };
        multiply_many(gpu, x, &[&down.loaded], &Rows::Entries(entries))?.pop()
    }

    /// Entries of `x` times their experts' first two matrices.
    fn gate_and_up(
        &self,
        gpu: &Gpu,
        x: &Buffer,
        x_rows: usize,
        entries: &Entries,
    ) -> (Buffer, Buffer) {
        if let ([gate], [up]) = (&self.gate[..], &self.up[..]) {
            // All experts are in one stack each, in their order.
            let entries = Entries { slots: gate.slots.clone(), ..entries.clone() };
            let both = [&gate.loaded, &up.loaded];
            let both = multiply_many(gpu, x.into(), &both, &Rows::Entries(entries));
            if let Some([gate, up]) = both.and_then(|both| <[Buffer; 2]>::try_from(both).ok()) {
                return (gate, up);
            }
        }
        let product = |stacks: &[Arc<Stack>]| multiply(gpu, x, x_rows, stacks, entries, self.inner);
        (product(&self.gate), product(&self.up))
    }
}

impl Stack {
    /// One of its matrices by itself, where arrays may begin there.
    pub(crate) fn member(&self, gpu: &Gpu, slot: usize) -> Option<Loaded> {
        let arrays = self.loaded.arrays().into_iter().map(|array| match is_none(gpu, array) {
            true => Some(array.clone()),
            false => {
                let len = array.len / self.members;
                may_begin(gpu, slot * len).then(|| array.after(slot * len))
            }
        });
        Some(self.loaded.with_arrays(arrays.collect::<Option<_>>()?))
    }
}

/// Whether an array may begin `words` after another does.
fn may_begin(gpu: &Gpu, words: usize) -> bool {
    ((words * WORD) as u64).is_multiple_of(gpu.client.properties().memory.alignment)
}

/// Entries of `x` times their experts' matrices; every stack writes its own entries.
fn multiply(
    gpu: &Gpu,
    x: &Buffer,
    x_rows: usize,
    stacks: &[Arc<Stack>],
    entries: &Entries,
    columns: usize,
) -> Buffer {
    let product = |stack: &Arc<Stack>| {
        let entries = Entries { slots: stack.slots.clone(), ..entries.clone() };
        stack.loaded.multiply(gpu, x, x_rows, &Rows::Entries(entries))
    };
    if let [stack] = stacks {
        return product(stack);
    }
    let out = gpu.empty(entries.count * columns);
    for stack in stacks {
        let part = product(stack);
        moe::keep(gpu, &part, &entries.ids, &stack.slots, &out, entries.count, columns);
    }
    out
}

/// What tells a set of matrices from another.
fn addresses(linears: &[Linear]) -> Vec<usize> {
    linears.iter().map(|l| Arc::as_ptr(&l.handle).cast::<()>() as usize).collect()
}

/// Runtimes bound the size of one array: words.
fn most_words(gpu: &Gpu) -> usize {
    gpu.client.properties().memory.max_page_size as usize / WORD
}

/// Whether `one` and all of `linears` make one stack, of which `one` can also be taken by itself.
fn fits_in(gpu: &Gpu, linears: &[&GpuLinear], one: &GpuLinear) -> bool {
    let of = |l: &GpuLinear| match &*l.place.read().unwrap_or_else(|e| e.into_inner()) {
        Place::Own(loaded) => Some((**loaded).clone()),
        Place::Stacked(..) => None,
    };
    let Some(one) = of(one) else { return false };
    let largest = one.arrays().iter().map(|a| a.len).max().unwrap_or(1);
    let room = (linears.len() + 1) * largest <= most_words(gpu);
    let apart = one.arrays().iter().all(|a| is_none(gpu, a) || may_begin(gpu, a.len));
    room && apart
        && linears
            .iter()
            .all(|l| of(l).is_some_and(|l| l.in_features == one.in_features && one.stacks_with(&l)))
}

fn stack(gpu: &Gpu, linears: &[&GpuLinear]) -> Result<Vec<Arc<Stack>>> {
    let own = |linear: &GpuLinear| match &*linear.place.read().unwrap_or_else(|e| e.into_inner()) {
        Place::Own(loaded) => Ok((**loaded).clone()),
        Place::Stacked(..) => Err(twice_used()),
    };
    let mut rest: Vec<(usize, Loaded)> = Vec::with_capacity(linears.len());
    for (expert, linear) in linears.iter().enumerate() {
        rest.push((expert, own(linear)?));
    }
    let most = most_words(gpu);
    let mut stacks = Vec::new();
    while let Some((_, first)) = rest.first().cloned() {
        let largest = first.arrays().iter().map(|a| a.len).max().unwrap_or(1);
        let room = (most / largest.max(1)).max(1);
        let mut members = Vec::new();
        rest.retain(|(expert, loaded)| {
            let taken = members.len() < room && first.stacks_with(loaded);
            if taken {
                members.push((*expert, loaded.clone()));
            }
            !taken
        });
        let mut slots = vec![ABSENT; linears.len()];
        members.iter().enumerate().for_each(|(slot, (e, _))| slots[*e] = slot as u32);
        let arrays = first.arrays();
        let joined = arrays.iter().enumerate().map(|(i, array)| {
            if is_none(gpu, array) {
                return gpu.none.clone();
            }
            let out = gpu.empty(array.len * members.len());
            for (slot, (_, member)) in members.iter().enumerate() {
                copy(gpu, member.arrays()[i], 0, &out, slot * array.len, array.len);
            }
            out
        });
        let joined = joined.collect();
        let loaded = first.with_arrays(joined);
        let stack = Arc::new(Stack { loaded, members: members.len(), slots: gpu.words(&slots) });
        for (slot, (expert, _)) in members.iter().enumerate() {
            let mut place = linears[*expert].place.write().unwrap_or_else(|e| e.into_inner());
            *place = Place::Stacked(stack.clone(), slot as u32);
        }
        stacks.push(stack);
    }
    Ok(stacks)
}

/// Whether `array` stands for one that a format does not need.
fn is_none(gpu: &Gpu, array: &Buffer) -> bool {
    array.handle.overlap(&gpu.none.handle) == cubecl::server::Overlap::Same
}
