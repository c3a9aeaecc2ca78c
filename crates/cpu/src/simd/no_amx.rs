//! What `amx` is on processors that have no tiles: nothing that could be used.
#![cfg_attr(not(target_arch = "aarch64"), allow(dead_code))]

#[cfg(target_arch = "aarch64")]
use super::float::{Element, Rows};
#[cfg(target_arch = "aarch64")]
use super::tile::{Format, Tiles};
use crate::{ColumnBand, Level, Pool};
use std::ops::Range;

pub(crate) const ROWS: usize = 16;
pub(crate) const DEPTH: usize = 32;
pub(crate) const GRANULE: usize = 4;

/// A tile in memory.
#[derive(Clone, Copy)]
pub struct Tile(#[allow(dead_code)] pub [u32; 256]);

/// Proof of what does not exist.
#[derive(Clone, Copy)]
pub enum Amx {}

impl Amx {
    pub(crate) fn new(_: Level) -> Option<Self> {
        None
    }

    pub(crate) fn with_registers(_: Level) -> Option<Self> {
        None
    }

    pub(crate) fn exact(self) -> Self {
        match self {}
    }
}

/// The bf16 number that stands for an f32.
#[derive(Clone, Copy)]
pub enum Part {}

pub trait Panels: Sync {
    fn fill(&self, amx: Amx, part: Part, bands: Range<usize>, start: usize, out: &mut [Tile]);
}

#[cfg(target_arch = "aarch64")]
impl<F: Format> Panels for Tiles<F> {
    fn fill(&self, amx: Amx, _: Part, _: Range<usize>, _: usize, _: &mut [Tile]) {
        match amx {}
    }
}

#[cfg(target_arch = "aarch64")]
impl<E: Element> Panels for Rows<'_, E> {
    fn fill(&self, amx: Amx, _: Part, _: Range<usize>, _: usize, _: &mut [Tile]) {
        match amx {}
    }
}

pub(crate) struct Packed {
    pub rows: usize,
}

impl Packed {
    pub(crate) fn new(amx: Amx, _: &[f32], _: usize, _: usize, _: &Pool) -> Self {
        match amx {}
    }

    pub(crate) fn blocks(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }
}

pub(crate) fn multiply(
    amx: Amx,
    _: &dyn Panels,
    _: &Packed,
    _: Range<usize>,
    _: Range<usize>,
    _: &mut ColumnBand<'_>,
) {
    match amx {}
}

pub(crate) fn exercise_bf16(amx: Amx, _: u64) -> u64 {
    match amx {}
}

pub(crate) fn exercise_int8(amx: Amx, _: u64) -> u64 {
    match amx {}
}
