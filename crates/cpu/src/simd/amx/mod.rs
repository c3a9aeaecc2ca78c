//! AMX: products of tiles of 16 rows by 64 bytes, for many rows of activations; where there are no tile registers but
//! `vdpbf16ps`, the same tiles multiplied by that ([`dots`]).
//!
//! Weights of any format are decoded to bf16 once per call and cache block ([`Panels`]), activations
//! are rounded to bf16 and packed ([`Packed`]), and `tdpbf16ps` adds in f32 over the whole depth
//! ([`multiply`]): no scale is applied to sums, so one loop serves every format. Rounding both
//! factors to eight bits of mantissa changes a product by at most 2⁻⁷ of itself.
//!
//! Where nothing may be rounded, either factor is the exact sum of three bf16 numbers of eight bits of
//! its mantissa each ([`Part`]), and the six of their nine products that f32 can hold are added up.
//!
//! Rust has no stable intrinsics for AMX; the few instructions are assembler here. The system
//! saves a thread's tiles and their configuration when it switches threads, once a process has
//! asked for the right to have them. The compiler itself never uses a tile register.

mod attention;
mod dots;
mod pack;
mod panels;
mod product;

pub(crate) use attention::{Attend, fits};
pub(crate) use pack::Packed;
pub(crate) use product::{GRANULE, Panels, multiply};

use crate::Level;
use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Rows of a tile, and rows or columns of a tile of sums.
pub(crate) const ROWS: usize = 16;
/// bf16 numbers of a row of a tile: inputs that one product adds up.
pub(crate) const DEPTH: usize = 32;

/// A tile in memory: 16 rows of 32 bf16. Of activations a row is a token; of weights a row is a pair
/// of inputs and an element a column's pair, the earlier input in the low half.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Tile(pub [u32; 256]);

impl Tile {
    /// Zeros.
    pub(crate) const ZERO: Self = Self([0; 256]);
}

/// `arch_prctl` request for the use of an extended processor state.
const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
/// State component of the tile registers.
const XTILEDATA: libc::c_long = 18;
/// Bits of the tile configuration and the tile registers among the states the system saves.
const XCR0_TILES: u64 = 3 << 17;

/// Whether the processor has AMX for bf16 and int8, the AVX-512 instructions that go with it, and the
/// system lets this process use the tiles; asks it to, the first time.
pub(crate) fn is_supported() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    *SUPPORTED.get_or_init(|| {
        let features = [
            is_x86_feature_detected!("avx512bf16"),
            is_x86_feature_detected!("avx512vnni"),
            is_x86_feature_detected!("avx512vbmi"),
        ];
        features.iter().all(|&f| f) && missing().is_empty()
    })
}

/// What of the tiles themselves is not here, in words of `/proc/cpuinfo` where it has any.
pub(crate) fn missing() -> Vec<&'static str> {
    const FEATURES: [(u32, &str); 3] =
        [(1 << 24, "amx_tile"), (1 << 22, "amx_bf16"), (1 << 25, "amx_int8")];
    let found = if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx };
    let lacks = FEATURES.iter().filter(|(bit, _)| found & bit == 0);
    let mut missing: Vec<&str> = lacks.map(|(_, name)| *name).collect();
    if missing.is_empty() && !saves_tiles() {
        missing.push("a system that saves tile registers");
    } else if missing.is_empty() && !may_use_tiles() {
        missing.push("the system's permission to use tile registers");
    }
    missing
}

fn saves_tiles() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: the system uses xsave, so the register can be read.
    unsafe { saved_states() & XCR0_TILES == XCR0_TILES }
}

/// # Safety
/// The processor and the system must support `xsave`.
#[target_feature(enable = "xsave")]
unsafe fn saved_states() -> u64 {
    // SAFETY: the caller's.
    unsafe { _xgetbv(0) }
}

fn may_use_tiles() -> bool {
    if !cfg!(target_os = "linux") {
        return false;
    }
    // SAFETY: a request without pointers; an older kernel refuses it.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

/// Proof that tiles of bf16 can be multiplied, and how f32 becomes bf16.
#[derive(Clone, Copy)]
pub struct Amx {
    parts: &'static [Part],
    has_registers: bool,
}

/// The bf16 number that stands for an f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The nearest.
    Nearest,
    /// One of three whose sum is the f32: its eight highest bits, the next eight, the rest.
    Exact(usize),
}

/// Bits of an f32 that a bf16 has too.
const KEPT: i32 = 0xffff_0000_u32 as i32;

impl Part {
    /// What to narrow instead of `v`: for [`Exact`](Self::Exact) a number that loses nothing by it.
    #[inline(always)]
    pub(super) fn of(self, mut v: __m512) -> __m512 {
        let Self::Exact(place) = self else { return v };
        // SAFETY: a part is only asked for with an `Amx`, which comes with AVX-512; registers only.
        unsafe {
            let kept = _mm512_set1_epi32(KEPT);
            let high = |v| _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), kept));
            for _ in 0..place {
                v = _mm512_sub_ps(v, high(v));
            }
            high(v)
        }
    }
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Amx {
    /// The proof for `level`, if that has products of bf16 and the machine too; factors are rounded.
    pub(crate) fn new(level: Level) -> Option<Self> {
        let has_registers = level >= Level::Amx && is_supported();
        let has_products = level >= Level::Avx512Bf16 && Level::Avx512Bf16.is_supported();
        (has_registers || has_products).then_some(Self { parts: &[Part::Nearest], has_registers })
    }

    /// The proof where there are tile registers, which make even six products worth while.
    pub(crate) fn with_registers(level: Level) -> Option<Self> {
        Self::new(level).filter(|amx| amx.has_registers)
    }

    /// The same with factors of which nothing is lost, at six products for one.
    pub(crate) fn exact(self) -> Self {
        Self { parts: &[Part::Exact(0), Part::Exact(1), Part::Exact(2)], ..self }
    }

    /// What multiplies on this thread.
    pub(crate) fn engine(self) -> Engine {
        match self.has_registers {
            true => Engine::Registers(self.configure()),
            false => Engine::Dots,
        }
    }

    /// Configures all eight tiles of this thread as 16 rows of 64 bytes.
    fn configure(self) -> Tiles {
        let mut all = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        all.row_bytes[..8].fill(64);
        all.rows[..8].fill(ROWS as u8);
        // SAFETY: `self` proves the instruction, and the configuration is valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const all, options(nostack, readonly)) };
        Tiles { _thread: std::marker::PhantomData }
    }
}

/// What multiplies tiles.
pub(crate) enum Engine {
    /// AMX.
    Registers(Tiles),
    /// AVX-512 BF16.
    Dots,
}

/// The configured tiles of this thread, given back when dropped. Registers are named by constants.
pub(crate) struct Tiles {
    _thread: std::marker::PhantomData<*const ()>,
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the value proves that tiles are configured.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

impl Tiles {
    /// `T = 0`.
    #[inline(always)]
    pub(crate) fn zero<const T: u8>(&self) {
        // SAFETY: the value proves that tiles are configured.
        unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem)) };
    }

    /// `T` from 16 rows of 64 bytes, `stride` bytes apart.
    ///
    /// # Safety
    /// The rows must be readable.
    #[inline(always)]
    pub(crate) unsafe fn load<const T: u8>(&self, rows: *const u8, stride: usize) {
        // SAFETY: the value proves that tiles are configured; the caller vouches for the rows.
        unsafe {
            asm!("tileloadd tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) rows, s = in(reg) stride,
                options(nostack, readonly));
        }
    }

    /// The same of rows that are not needed soon again: they need not stay in the first-level cache.
    ///
    /// # Safety
    /// The rows must be readable.
    #[inline(always)]
    pub(crate) unsafe fn load_once<const T: u8>(&self, rows: *const u8, stride: usize) {
        // SAFETY: the value proves that tiles are configured; the caller vouches for the rows.
        unsafe {
            asm!("tileloaddt1 tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) rows, s = in(reg) stride,
                options(nostack, readonly));
        }
    }

    /// `T` to 16 rows of 64 bytes, `stride` bytes apart.
    ///
    /// # Safety
    /// The rows must be writable.
    #[inline(always)]
    pub(crate) unsafe fn store<const T: u8>(&self, rows: *mut u8, stride: usize) {
        // SAFETY: the value proves that tiles are configured; the caller vouches for the rows.
        unsafe {
            asm!("tilestored [{p} + {s}*1], tmm{t}", t = const T, p = in(reg) rows, s = in(reg) stride,
                options(nostack));
        }
    }

    /// `C += A · B`, `C` f32, `A` rows of 32 bf16, `B` pairs of bf16.
    #[inline(always)]
    pub(crate) fn add_bf16<const C: u8, const A: u8, const B: u8>(&self) {
        // SAFETY: the value proves that tiles are configured; the instruction touches only them.
        unsafe {
            asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nostack, nomem));
        }
    }

    /// `C += A · B`, `C` 32-bit integers, `A` rows of 64 signed bytes, `B` fours of signed bytes.
    #[inline(always)]
    fn add_int8<const C: u8, const A: u8, const B: u8>(&self) {
        // SAFETY: the value proves that tiles are configured; the instruction touches only them.
        unsafe {
            asm!("tdpbssd tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B,
                options(nostack, nomem));
        }
    }
}

/// Operations of one product of bf16 tiles.
const OPERATIONS: u64 = 2 * (ROWS * ROWS * DEPTH) as u64;

/// `rounds` of independent bf16 products in tile registers; returns the operations done.
pub(crate) fn exercise_bf16(amx: Amx, rounds: u64) -> u64 {
    let t = amx.configure();
    for _ in 0..rounds {
        t.add_bf16::<0, 4, 6>();
        t.add_bf16::<1, 4, 7>();
        t.add_bf16::<2, 5, 6>();
        t.add_bf16::<3, 5, 7>();
    }
    rounds * 4 * OPERATIONS
}

/// The same with bytes, of which a tile holds twice as many.
pub(crate) fn exercise_int8(amx: Amx, rounds: u64) -> u64 {
    let t = amx.configure();
    for _ in 0..rounds {
        t.add_int8::<0, 4, 6>();
        t.add_int8::<1, 4, 7>();
        t.add_int8::<2, 5, 6>();
        t.add_int8::<3, 5, 7>();
    }
    rounds * 8 * OPERATIONS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_parts_add_up_to_every_bit() {
        if !is_supported() {
            eprintln!("skipped: no AMX");
            return;
        }
        let values: [f32; 16] = std::array::from_fn(|i| match i {
            0 => 0.0,
            1 => f32::MAX,
            2 => -f32::MAX,
            3 => f32::from_bits(0x3f7f_ffff),
            _ => f32::from_bits(0x9e37_79b9_u32.wrapping_mul(i as u32) & 0xbfff_ffff | 0x2000_0000),
        });
        let part = |place| -> [f32; 16] {
            // SAFETY: sixteen floats are a register, which AMX comes with.
            unsafe {
                let v = std::mem::transmute::<[f32; 16], __m512>(values);
                std::mem::transmute::<__m512, [f32; 16]>(Part::Exact(place).of(v))
            }
        };
        let parts = [0, 1, 2].map(part);
        for (i, value) in values.into_iter().enumerate() {
            assert_eq!(parts[2][i] + parts[1][i] + parts[0][i], value);
            assert!(parts.iter().all(|part| part[i].to_bits() << 16 == 0), "{value} is of bf16");
        }
    }
}
