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
//! Scales keep their stored precision. The order of the f32 operations is that of
//! [`WeightFormat::decode_rows`](marlin_quant::WeightFormat::decode_rows).

mod bf16;
mod f16;
mod f32;
mod int4;
mod int8;
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

pub(crate) use self::bf16::Bf16;
pub(crate) use self::f16::F16;
pub(crate) use self::f32::F32;
pub(crate) use int4::{Int4G32, Int4G64, Int4G128};
pub(crate) use int8::{Int8G32, Int8G128};
pub(crate) use q2_k::Q2K;
pub(crate) use q3_k::Q3K;
pub(crate) use q4_0::Q4_0;
pub(crate) use q4_1::Q4_1;
pub(crate) use q4_k::Q4K;
pub(crate) use q5_0::Q5_0;
pub(crate) use q5_1::Q5_1;
pub(crate) use q5_k::Q5K;
pub(crate) use q6_k::Q6K;
pub(crate) use q8_0::Q8_0;

use cubecl::prelude::*;

/// Weights of a unit.
pub(crate) const UNIT: usize = 8;

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

/// A format of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Format {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Int4G128,
    Int4G64,
    Int4G32,
    Int8G128,
    Int8G32,
}

impl Format {
    /// The format of the rows of a weight in format `id`, if kernels read them. An order of the inputs is not the rows' business.
    pub(crate) fn from_id(id: &str) -> Option<Self> {
        Some(match id.strip_suffix("_ordered").unwrap_or(id) {
            "f32" => Self::F32,
            "f16" => Self::F16,
            "bf16" => Self::Bf16,
            "q4_0" => Self::Q4_0,
            "q4_1" => Self::Q4_1,
            "q5_0" => Self::Q5_0,
            "q5_1" => Self::Q5_1,
            "q8_0" => Self::Q8_0,
            "q2_k" => Self::Q2K,
            "q3_k" => Self::Q3K,
            "q4_k" => Self::Q4K,
            "q5_k" => Self::Q5K,
            "q6_k" => Self::Q6K,
            "int4_g128" => Self::Int4G128,
            "int4_g64" => Self::Int4G64,
            "int4_g32" => Self::Int4G32,
            "int8_g128" => Self::Int8G128,
            "int8_g32" => Self::Int8G32,
            _ => return None,
        })
    }

    /// Lays out the stored rows of `columns` weights.
    pub(crate) fn split(self, bytes: &[u8], columns: usize) -> Parts {
        let mut parts = Parts::default();
        match self {
            Self::F32 => f32::split(bytes, columns, &mut parts),
            Self::F16 | Self::Bf16 => f16::split(bytes, columns, &mut parts),
            Self::Q4_0 => each(bytes, &mut parts, q4_0::split),
            Self::Q4_1 => each(bytes, &mut parts, q4_1::split),
            Self::Q5_0 => each(bytes, &mut parts, q5_0::split),
            Self::Q5_1 => each(bytes, &mut parts, q5_1::split),
            Self::Q8_0 => each(bytes, &mut parts, q8_0::split),
            Self::Q2K => each(bytes, &mut parts, q2_k::split),
            Self::Q3K => each(bytes, &mut parts, q3_k::split),
            Self::Q4K => each(bytes, &mut parts, q4_k::split),
            Self::Q5K => each(bytes, &mut parts, q5_k::split),
            Self::Q6K => each(bytes, &mut parts, q6_k::split),
            Self::Int4G128 => each(bytes, &mut parts, |b: &[u8; 68], p, _| int4::split(b, p)),
            Self::Int4G64 => each(bytes, &mut parts, |b: &[u8; 36], p, _| int4::split(b, p)),
            Self::Int4G32 => each(bytes, &mut parts, |b: &[u8; 20], p, _| int4::split(b, p)),
            Self::Int8G128 => each(bytes, &mut parts, |b: &[u8; 132], p, _| int8::split(b, p)),
            Self::Int8G32 => each(bytes, &mut parts, |b: &[u8; 36], p, _| int8::split(b, p)),
        }
        parts
    }
}

/// Calls `$body` with `$decode` naming the [`Decode`] of `$format`.
macro_rules! with_format {
    ($format:expr, $decode:ident => $body:expr) => {
        match $format {
            $crate::decode::Format::F32 => with_format!(@ F32, $decode, $body),
            $crate::decode::Format::F16 => with_format!(@ F16, $decode, $body),
            $crate::decode::Format::Bf16 => with_format!(@ Bf16, $decode, $body),
            $crate::decode::Format::Q4_0 => with_format!(@ Q4_0, $decode, $body),
            $crate::decode::Format::Q4_1 => with_format!(@ Q4_1, $decode, $body),
            $crate::decode::Format::Q5_0 => with_format!(@ Q5_0, $decode, $body),
            $crate::decode::Format::Q5_1 => with_format!(@ Q5_1, $decode, $body),
            $crate::decode::Format::Q8_0 => with_format!(@ Q8_0, $decode, $body),
            $crate::decode::Format::Q2K => with_format!(@ Q2K, $decode, $body),
            $crate::decode::Format::Q3K => with_format!(@ Q3K, $decode, $body),
            $crate::decode::Format::Q4K => with_format!(@ Q4K, $decode, $body),
            $crate::decode::Format::Q5K => with_format!(@ Q5K, $decode, $body),
            $crate::decode::Format::Q6K => with_format!(@ Q6K, $decode, $body),
            $crate::decode::Format::Int4G128 => with_format!(@ Int4G128, $decode, $body),
            $crate::decode::Format::Int4G64 => with_format!(@ Int4G64, $decode, $body),
            $crate::decode::Format::Int4G32 => with_format!(@ Int4G32, $decode, $body),
            $crate::decode::Format::Int8G128 => with_format!(@ Int8G128, $decode, $body),
            $crate::decode::Format::Int8G32 => with_format!(@ Int8G32, $decode, $body),
        }
    };
    (@ $name:ident, $decode:ident, $body:expr) => {{
        type $decode = $crate::decode::$name;
        $body
    }};
}
pub(crate) use with_format;

/// Lays out block after block.
fn each<const BYTES: usize>(
    bytes: &[u8],
    parts: &mut Parts,
    split: impl Fn(&[u8; BYTES], &mut Parts, usize),
) {
    for (i, block) in bytes.as_chunks().0.iter().enumerate() {
        split(block, parts, i);
    }
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

/// An f16 from the low bits of a word.
#[cube]
fn low_f16(bits: u32) -> f32 {
    let pair = Vector::<half::f16, Const<2>>::reinterpret(bits);
    f32::cast_from(pair.extract(0usize))
}
