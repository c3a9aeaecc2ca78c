//! Two registers of columns against four rows of activations: the loop that prompts spend their time in. As assembly,
//! because there are sixteen registers and the compiler, which wants twelve of them for sums, keeps moving those.
//!
//! `ymm0` to `ymm7` hold dot products, two a row; `ymm8` and `ymm9` a column of weights; `ymm10` and `ymm11` products. Sums
//! stay in memory. A column is named by where its activations lie in a record, in bytes.

use super::super::integer::Group;
use super::super::quantized::Record;
use std::arch::asm;
use std::arch::x86_64::__m256;

/// Words of one, then bytes of 128.
#[repr(C, align(32))]
struct Constants([i16; 16], [u8; 32]);

static CONSTANTS: Constants = Constants([1; 16], [128; 32]);

/// Loads column `$at`.
macro_rules! column {
    ($at:literal) => {
        concat!(
            "vmovdqu ymm8, ymmword ptr [{quants} + 16 * ",
            $at,
            "]\n",
            "vmovdqu ymm9, ymmword ptr [{quants} + 16 * ",
            $at,
            " + 32]\n",
        )
    };
}

/// Loads the four activations of a row that column `$at` is multiplied with.
macro_rules! activations {
    ($x:literal $at:literal) => {
        concat!("vpbroadcastd ymm10, dword ptr [{", $x, "} + ", $at, "]\n")
    };
}

/// Column `$at` times a row, in 16 bits: what words begin with, or what is added to them.
macro_rules! row {
    (begin $x:literal $word0:literal $word1:literal $at:literal) => {
        concat!(
            activations!($x $at),
            "vpmaddubsw ",
            $word0,
            ", ymm8, ymm10\n",
            "vpmaddubsw ",
            $word1,
            ", ymm9, ymm10\n",
        )
    };
    (add $x:literal $word0:literal $word1:literal $at:literal) => {
        concat!(
            activations!($x $at),
            "vpmaddubsw ymm11, ymm8, ymm10\n",
            "vpmaddubsw ymm10, ymm9, ymm10\n",
            "vpaddw ",
            $word0,
            ", ",
            $word0,
            ", ymm11\n",
            "vpaddw ",
            $word1,
            ", ",
            $word1,
            ", ymm10\n",
        )
    };
}

/// Adds pairs of the words in a register.
macro_rules! widen {
    ($words:literal) => {
        concat!("vpmaddwd ", $words, ", ", $words, ", ymmword ptr [{constants}]\n")
    };
}

/// Dot products with columns of up to four bits, whose products can all be added in 16 bits.
macro_rules! four_bits {
    ($first:literal $($at:literal)*) => {
        concat!(
            column!($first), four_bits!(begin $first),
            $(column!($at), four_bits!(add $at),)*
            widen!("ymm0"), widen!("ymm1"), widen!("ymm2"), widen!("ymm3"),
            widen!("ymm4"), widen!("ymm5"), widen!("ymm6"), widen!("ymm7"),
        )
    };
    ($how:ident $at:literal) => {
        concat!(
            row!($how "x0" "ymm0" "ymm1" $at),
            row!($how "x1" "ymm2" "ymm3" $at),
            row!($how "x2" "ymm4" "ymm5" $at),
            row!($how "x3" "ymm6" "ymm7" $at),
        )
    };
}

/// No dot products yet.
macro_rules! clear {
    () => {
        concat!(
            "vpxor xmm0, xmm0, xmm0\nvpxor xmm1, xmm1, xmm1\nvpxor xmm2, xmm2, xmm2\nvpxor xmm3, xmm3, xmm3\n",
            "vpxor xmm4, xmm4, xmm4\nvpxor xmm5, xmm5, xmm5\nvpxor xmm6, xmm6, xmm6\nvpxor xmm7, xmm7, xmm7\n",
        )
    };
}

/// Dot products with columns of which as many as parentheses hold can be added in 16 bits: two rows, then the others.
macro_rules! some_together {
    ($(($first:literal $($at:literal)*))*) => {
        concat!(
            clear!(),
            $(some_together!("x0" "x1" "ymm0" "ymm1" "ymm2" "ymm3" $first $($at)*),)*
            $(some_together!("x2" "x3" "ymm4" "ymm5" "ymm6" "ymm7" $first $($at)*),)*
        )
    };
    (
        $x0:literal $x1:literal $dot0:literal $dot1:literal $dot2:literal $dot3:literal
        $first:literal $($at:literal)*
    ) => {
        concat!(
            column!($first),
            row!(begin $x0 "ymm12" "ymm13" $first),
            row!(begin $x1 "ymm14" "ymm15" $first),
            $(column!($at), row!(add $x0 "ymm12" "ymm13" $at), row!(add $x1 "ymm14" "ymm15" $at),)*
            widen!("ymm12"), widen!("ymm13"), widen!("ymm14"), widen!("ymm15"),
            "vpaddd ", $dot0, ", ", $dot0, ", ymm12\nvpaddd ", $dot1, ", ", $dot1, ", ymm13\n",
            "vpaddd ", $dot2, ", ", $dot2, ", ymm14\nvpaddd ", $dot3, ", ", $dot3, ", ymm15\n",
        )
    };
}

/// A row of [`none_together`].
macro_rules! wide_row {
    ($bits:ident $x:literal $dot0:literal $dot1:literal $at:literal) => {
        concat!(
            activations!($x $at),
            wide_row!($bits),
            widen!("ymm11"),
            widen!("ymm10"),
            "vpaddd ",
            $dot0,
            ", ",
            $dot0,
            ", ymm11\nvpaddd ",
            $dot1,
            ", ",
            $dot1,
            ", ymm10\n",
        )
    };
    (seven) => {
        "vpmaddubsw ymm11, ymm8, ymm10\nvpmaddubsw ymm10, ymm9, ymm10\n"
    };
    (eight) => {
        concat!(
            "vpsignb ymm11, ymm10, ymm8\nvpsignb ymm10, ymm10, ymm9\n",
            "vpmaddubsw ymm11, ymm12, ymm11\nvpmaddubsw ymm10, ymm13, ymm10\n",
        )
    };
}

/// Dot products with columns of seven bits, or of eight with a zero of 128: absolute weights times activations with their signs.
macro_rules! none_together {
    ($bits:ident $($at:literal)*) => {
        concat!(
            clear!(),
            $(
                column!($at),
                signs!($bits),
                wide_row!($bits "x0" "ymm0" "ymm1" $at),
                wide_row!($bits "x1" "ymm2" "ymm3" $at),
                wide_row!($bits "x2" "ymm4" "ymm5" $at),
                wide_row!($bits "x3" "ymm6" "ymm7" $at),
            )*
        )
    };
}

/// Absolute weights, and weights with signs, of a column of eight bits; those of seven are as they should be.
macro_rules! signs {
    (seven) => {
        ""
    };
    (eight) => {
        concat!(
            "vpxor ymm8, ymm8, ymmword ptr [{constants} + 32]\nvpxor ymm9, ymm9, ymmword ptr [{constants} + 32]\n",
            "vpabsb ymm12, ymm8\nvpabsb ymm13, ymm9\n",
        )
    };
}

/// Adds scaled dot products to the sums. Of their records `$start` and `$sum` are where the start and the sum lie; `$scales` is
/// where the scales do.
macro_rules! scale {
    ($offset:ident $start:literal $sum:literal $scales:literal) => {
        concat!(
            scale!($offset "x0" "ymm0" "ymm1" 0 $start $sum $scales),
            scale!($offset "x1" "ymm2" "ymm3" 64 $start $sum $scales),
            scale!($offset "x2" "ymm4" "ymm5" 128 $start $sum $scales),
            scale!($offset "x3" "ymm6" "ymm7" 192 $start $sum $scales),
        )
    };
    (
        $offset:ident $x:literal $dot0:literal $dot1:literal $at:literal
        $start:literal $sum:literal $scales:literal
    ) => {
        concat!(
            "vpbroadcastd ymm8, dword ptr [{", $x, "} + ", $start, "]\n",
            "vbroadcastss ymm9, dword ptr [{", $x, "} + 32]\n",
            "vpaddd ", $dot0, ", ", $dot0, ", ymm8\nvpaddd ", $dot1, ", ", $dot1, ", ymm8\n",
            "vmulps ymm8, ymm9, ymmword ptr [{scales} + ", $scales, "]\n",
            "vmulps ymm9, ymm9, ymmword ptr [{scales} + ", $scales, " + 32]\n",
            "vcvtdq2ps ", $dot0, ", ", $dot0, "\nvcvtdq2ps ", $dot1, ", ", $dot1, "\n",
            "vfmadd213ps ", $dot0, ", ymm8, ymmword ptr [{sums} + ", $at, "]\n",
            "vfmadd213ps ", $dot1, ", ymm9, ymmword ptr [{sums} + ", $at, " + 32]\n",
            scale!($offset $x $dot0 $dot1 $sum $scales),
            "vmovaps ymmword ptr [{sums} + ", $at, "], ", $dot0, "\n",
            "vmovaps ymmword ptr [{sums} + ", $at, " + 32], ", $dot1, "\n",
        )
    };
    (without $x:literal $dot0:literal $dot1:literal $sum:literal $scales:literal) => {
        ""
    };
    (with $x:literal $dot0:literal $dot1:literal $sum:literal $scales:literal) => {
        concat!(
            "vbroadcastss ymm8, dword ptr [{", $x, "} + ", $sum, "]\n",
            "vfmadd231ps ", $dot0, ", ymm8, ymmword ptr [{scales} + ", $scales, " + 64]\n",
            "vfmadd231ps ", $dot1, ", ymm8, ymmword ptr [{scales} + ", $scales, " + 96]\n",
        )
    };
}

/// `Isa::add_products` for four rows, if this is written for such weights.
///
/// # Safety
/// The processor must have AVX2 and FMA; the group and the records must be there.
#[inline(always)]
pub(super) unsafe fn add<const SUBS: usize>(
    weights: &Group<SUBS>,
    x: &[Record<SUBS>; 4],
    sums: &mut [[__m256; 2]; 4],
) -> bool {
    debug_assert_eq!(weights.quants[0].wrapping_add(32), weights.quants[1]);
    macro_rules! run {
        ($($text:expr),*) => {
            // SAFETY: the caller's; what is written are the sums.
            unsafe {
                asm!(
                    $($text,)*
                    quants = in(reg) weights.quants[0],
                    scales = in(reg) weights.scales[0],
                    x0 = in(reg) x[0].0,
                    x1 = in(reg) x[1].0,
                    x2 = in(reg) x[2].0,
                    x3 = in(reg) x[3].0,
                    sums = in(reg) sums.as_mut_ptr(),
                    constants = in(reg) &raw const CONSTANTS,
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                    out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                    out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                    out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                    options(nostack, preserves_flags),
                )
            }
        };
    }
    match (SUBS, weights.bits, weights.offsets) {
        (1, ..=4, false) => run!(four_bits!(0 4 8 12 16 20 24 28), scale!(without 36 40 0)),
        (1, ..=4, true) => run!(four_bits!(0 4 8 12 16 20 24 28), scale!(with 36 40 0)),
        (1, 5, true) => run!(some_together!((0 4 8 12) (16 20 24 28)), scale!(with 36 40 0)),
        (1, 6, false) => {
            run!(some_together!((0 4) (8 12) (16 20) (24 28)), scale!(without 36 40 0));
        }
        (1, 7, false) => run!(none_together!(seven 0 4 8 12 16 20 24 28), scale!(without 36 40 0)),
        (1, 8, false) => run!(none_together!(eight 0 4 8 12 16 20 24 28), scale!(without 36 40 0)),
        (1, 8, true) => run!(none_together!(eight 0 4 8 12 16 20 24 28), scale!(with 36 40 0)),
        (2, ..=4, true) => run!(
            four_bits!(0 4 8 12),
            scale!(with 36 44 0),
            four_bits!(16 20 24 28),
            scale!(with 40 48 128)
        ),
        (2, 6, false) => run!(
            some_together!((0 4) (8 12)),
            scale!(without 36 44 0),
            some_together!((16 20) (24 28)),
            scale!(without 40 48 128)
        ),
        (2, 7, false) => run!(
            none_together!(seven 0 4 8 12),
            scale!(without 36 44 0),
            none_together!(seven 16 20 24 28),
            scale!(without 40 48 128)
        ),
        _ => return false,
    }
    true
}
