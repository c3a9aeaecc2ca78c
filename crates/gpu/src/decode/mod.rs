//! Row formats on the device: one file is one format, how its bytes are laid out anew when loaded
//! and how a kernel reads eight weights.
//!
//! A row is cut into *units* of eight weights, numbered on through the rows. Codes are spread over
//! planes of 32-bit words, so that neighbouring lanes read neighbouring words whatever the size of a
//! stored block:
//!
//! | plane | word `w` holds |
//! | --- | --- |
//! | nibbles | weights `8 w …`, four bits each |
//! | pairs | weights `16 w …`, two bits each |
//! | single bits | weights `32 w …` |
//! | bytes | weights `4 w …` |
//!
//! Points of lattices and uneven levels are looked up in a table that the matrix brings along.
//! Scales keep their stored precision. The order of the f32 operations is that of
//! [`WeightFormat::decode_rows`](marlin_quant::WeightFormat::decode_rows).

mod bf16;
mod f16;
mod f32;
mod fp8;
mod int4;
mod int8;
mod iq1_m;
mod iq1_s;
mod iq2_s;
mod iq2_xs;
mod iq2_xxs;
mod iq3_s;
mod iq3_xxs;
mod iq4_nl;
mod iq4_xs;
mod mxfp4;
mod nvfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod tq2_0;

use cubecl::prelude::*;
use marlin_quant::grids;
use marlin_tensor::Weight;

/// Weights of a unit.
pub(crate) const UNIT: usize = 8;
/// Weights of a row under one f32 scale, in formats whose scales belong to rows or to squares.
const SCALED: usize = 128;

/// Reads weights inside a kernel.
#[cube]
pub(crate) trait Decode: 'static + Send + Sync {
    /// The eight weights of `unit`.
    fn eight(codes: &[u32], high: &[u32], scales: &[u32], supers: &[u32], unit: u32) -> Array<f32>;
}

/// A matrix as four arrays of words, in the order of [`Decode::eight`]; a format leaves empty what it does not need.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub(crate) codes: Vec<u32>,
    pub(crate) high: Vec<u32>,
    pub(crate) scales: Vec<u32>,
    pub(crate) supers: Vec<u32>,
}

impl Parts {
    /// Bytes of its arrays.
    pub(crate) fn bytes(&self) -> u64 {
        let arrays = [&self.codes, &self.high, &self.scales, &self.supers];
        arrays.into_iter().map(|words| size_of_val(&words[..]) as u64).sum()
    }
}

/// The list of formats: type and file, identifiers of stored formats, and how their weights are laid out.
macro_rules! formats {
    ($dollar:tt $($module:ident::$name:ident: $ids:pat => $split:expr,)+) => {
        $(pub(crate) use self::$module::$name;)+

        /// A format of rows.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub(crate) enum Format {
            $($name,)+
        }

        impl Format {
            /// The format of the rows of a weight in format `id`, if kernels read them. An order of the inputs is not the rows' business.
            pub(crate) fn from_id(id: &str) -> Option<Self> {
                match id.strip_suffix("_ordered").unwrap_or(id) {
                    $($ids => Some(Self::$name),)+
                    _ => None,
                }
            }

            /// Lays out the stored rows of a weight whose parts are as its format says.
            pub(crate) fn split(self, weight: &Weight) -> Parts {
                let mut parts = Parts::default();
                match self {
                    $(Self::$name => ($split)(weight, &mut parts),)+
                }
                parts
            }
        }

        /// Calls `$body` with `$decode` naming the [`Decode`] of `$format`.
        macro_rules! with_format {
            ($dollar format:expr, $dollar decode:ident => $dollar body:expr) => {
                match $dollar format {
                    $($crate::decode::Format::$name => {
                        type $dollar decode = $crate::decode::$name;
                        $dollar body
                    })+
                }
            };
        }
        pub(crate) use with_format;
    };
}

formats! { $
    f32::F32: "f32" => f32::split,
    f16::F16: "f16" => f16::split,
    bf16::Bf16: "bf16" => f16::split,
    fp8::Fp8: "fp8" | "fp8_block128" => fp8::split,
    q4_0::Q4_0: "q4_0" => |w, p| each(w, p, q4_0::split),
    q4_1::Q4_1: "q4_1" => |w, p| each(w, p, q4_1::split),
    q5_0::Q5_0: "q5_0" => |w, p| each(w, p, q5_0::split),
    q5_1::Q5_1: "q5_1" => |w, p| each(w, p, q5_1::split),
    q8_0::Q8_0: "q8_0" => |w, p| each(w, p, q8_0::split),
    q2_k::Q2K: "q2_k" => |w, p| each(w, p, q2_k::split),
    q3_k::Q3K: "q3_k" => |w, p| each(w, p, q3_k::split),
    q4_k::Q4K: "q4_k" => |w, p| each(w, p, q4_k::split),
    q5_k::Q5K: "q5_k" => |w, p| each(w, p, q5_k::split),
    q6_k::Q6K: "q6_k" => |w, p| each(w, p, q6_k::split),
    iq1_s::Iq1S: "iq1_s" => |w, p| with_points(w, p, iq1_s::split, &grids::IQ1),
    iq1_m::Iq1M: "iq1_m" => |w, p| with_points(w, p, iq1_m::split, &grids::IQ1),
    iq2_xxs::Iq2Xxs: "iq2_xxs" => |w, p| with_points(w, p, iq2_xxs::split, &grids::IQ2_XXS),
    iq2_xs::Iq2Xs: "iq2_xs" => |w, p| with_points(w, p, iq2_xs::split, &grids::IQ2_XS),
    iq2_s::Iq2S: "iq2_s" => |w, p| with_points(w, p, iq2_s::split, &grids::IQ2_S),
    iq3_xxs::Iq3Xxs: "iq3_xxs" => |w, p| with_points(w, p, iq3_xxs::split, &grids::IQ3_XXS),
    iq3_s::Iq3S: "iq3_s" => |w, p| with_points(w, p, iq3_s::split, &grids::IQ3_S),
    iq4_nl::Iq4Nl: "iq4_nl" => iq4_nl::split,
    iq4_xs::Iq4Xs: "iq4_xs" => iq4_xs::split,
    tq2_0::Tq2_0: "tq1_0" | "tq2_0" | "tq1_0_scaled" | "tq2_0_scaled" => tq2_0::split,
    mxfp4::Mxfp4: "mxfp4" => |w, p| each(w, p, mxfp4::split),
    nvfp4::Nvfp4: "nvfp4" | "nvfp4_scaled" => nvfp4::split,
    int4::Int4G128: "int4_g128" => |w, p| each(w, p, |b: &[u8; 68], p, _| int4::split(b, p)),
    int4::Int4G64: "int4_g64" => |w, p| each(w, p, |b: &[u8; 36], p, _| int4::split(b, p)),
    int4::Int4G32: "int4_g32" => |w, p| each(w, p, |b: &[u8; 20], p, _| int4::split(b, p)),
    int8::Int8G128: "int8_g128" => |w, p| each(w, p, |b: &[u8; 132], p, _| int8::split(b, p)),
    int8::Int8G32: "int8_g32" => |w, p| each(w, p, |b: &[u8; 36], p, _| int8::split(b, p)),
}

impl Format {
    /// Units of a row of `columns` weights: rows are padded with zeros, to whole scales where one stands for 128 weights.
    pub(crate) fn units(self, columns: usize) -> usize {
        let whole = if matches!(self, Self::Fp8 | Self::Nvfp4) { SCALED } else { UNIT };
        columns.next_multiple_of(whole) / UNIT
    }
}

/// Lays out block after block.
fn each<const BYTES: usize>(
    weight: &Weight,
    parts: &mut Parts,
    split: impl Fn(&[u8; BYTES], &mut Parts, usize),
) {
    for (i, block) in weight.parts[0].1.bytes().as_chunks().0.iter().enumerate() {
        split(block, parts, i);
    }
}

/// The same with the points of a grid as supers, 16 bits each.
fn with_points<const BYTES: usize>(
    weight: &Weight,
    parts: &mut Parts,
    split: impl Fn(&[u8; BYTES], &mut Parts, usize),
    points: &[u16],
) {
    each(weight, parts, split);
    points.iter().enumerate().for_each(|(i, &point)| put_half(&mut parts.supers, i, point));
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Puts `value` at place `i` of an array of 16-bit values, two a word.
fn put_half(words: &mut Vec<u32>, i: usize, value: u16) {
    match i.is_multiple_of(2) {
        true => words.push(u32::from(value)),
        false => {
            if let Some(last) = words.last_mut() {
                *last |= u32::from(value) << 16;
            }
        }
    }
}

/// Puts `value` at place `i` of an array of bytes, four a word.
fn put_byte(words: &mut Vec<u32>, i: usize, value: u8) {
    match i.is_multiple_of(4) {
        true => words.push(u32::from(value)),
        false => {
            if let Some(last) = words.last_mut() {
                *last |= u32::from(value) << (8 * (i % 4));
            }
        }
    }
}

/// Appends codes of `bits` each, low ones first.
fn push_plane(words: &mut Vec<u32>, codes: &[u8], bits: usize) {
    let packed = codes.chunks_exact(32 / bits).map(|codes| {
        codes.iter().enumerate().fold(0, |word, (i, &q)| word | u32::from(q) << (bits * i))
    });
    words.extend(packed);
}

/// The 32 four-bit codes of a block of the first generation: low halves, then high ones.
fn nibbles(bytes: &[u8]) -> [u8; 32] {
    std::array::from_fn(|i| (bytes[i % 16] >> (4 * (i / 16))) & 15)
}

/// The 16-bit value `i` of an array of them.
#[cube]
fn half_bits(words: &[u32], i: u32) -> u32 {
    (words[(i / 2) as usize] >> ((i % 2) * 16)) & 0xffffu32
}

/// Byte `i` of an array of them.
#[cube]
fn byte(words: &[u32], i: u32) -> u32 {
    (words[(i / 4) as usize] >> ((i % 4) * 8)) & 255u32
}

/// `value`, negated where bit `i` of `signs` is set.
#[cube]
fn signed(value: f32, signs: u32, #[comptime] i: u32) -> f32 {
    let minus = (signs << comptime!(31 - i)) & 0x80000000u32;
    f32::reinterpret(u32::reinterpret(value) ^ minus)
}

/// An f16 from the low bits of a word.
#[cube]
fn low_f16(bits: u32) -> f32 {
    let pair = Vector::<half::f16, Const<2>>::reinterpret(bits);
    f32::cast_from(pair.extract(0usize))
}
