//! The quantized token-embedding table (exllamav3 1.6.0 and later, optional).
//!
//! * `KEY.trellis` I16 `[vocab, G·(1 + 16·K)]`, `G = ⌈hidden / 256⌉`, `K` = 1 … 8;
//! * `KEY.signs` F16 `[G, 256]`, shared by all rows.
//!
//! Every group of 256 columns is one word of fp16 scale `s` and one ring of 256 positions in
//! natural order. The ring is a little-endian bit stream, least significant bit first, in which
//! bits `i·K … (i+1)·K` are the low `K` bits of state `i`; the state is
//! `Σ_j symbol(i − j mod 256)·2^(j·K)` cut to 16 bits. The codebook is `mul1`:
//!
//! ```text
//! row group = signs[g] ∘ (H_256 / 16) · (mul1(state) · s)
//! ```
//!
//! The layout is not that of linear layers and no public vectors exist: it is checked against an
//! encoder of our own only.

use super::codebook::{Codebook, MUL1_MULTIPLIER};
use super::format::{invalid, plain};
use super::hadamard::sylvester;
use crate::parts::check_rows;
use crate::{Description, QuantError, WeightFormat};
use half::f16;
use marlin_checkpoint::Checkpoint;
use marlin_tensor::{DType, HostTensor, Weight};
use std::ops::Range;

/// Trellis-coded embedding tables.
pub struct Exl3Embedding;

/// The format as listed in [`formats`](crate::formats).
pub static EXL3_EMBEDDING: Exl3Embedding = Exl3Embedding;

const ID: &str = "exl3_embedding";
/// Columns of one ring.
const GROUP: usize = 256;

impl WeightFormat for Exl3Embedding {
    fn id(&self) -> &'static str {
        ID
    }

    fn describe(&self) -> Description {
        Description {
            bits_per_weight: "1.06 to 8.06".to_owned(),
            detected_by: "`KEY.trellis` and `KEY.signs`".to_owned(),
        }
    }

    fn detect(&self, checkpoint: &Checkpoint, key: &str) -> bool {
        let has = |part: &str| checkpoint.get(&format!("{key}.{part}")).is_some();
        has("trellis") && has("signs") && !has("suh") && !has("svh")
    }

    fn load(
        &self,
        checkpoint: &Checkpoint,
        key: &str,
        out_features: usize,
        in_features: usize,
    ) -> Result<Weight, QuantError> {
        let name = format!("{key}.trellis");
        let groups = in_features.div_ceil(GROUP);
        let words = match checkpoint.get(&name).map(|t| &t.shape[..]) {
            Some(&[vocab, words]) if vocab == out_features => words,
            // Missing or of another height: the look-up says so.
            _ => groups * 17,
        };
        let trellis = plain(checkpoint.require(&name, &[out_features, words])?, DType::I16)?;
        if rate(words, groups).is_none() {
            let reason = format!("{words} words a row are not {groups} groups of 1 + 16·K");
            return Err(invalid(&name, reason));
        }
        let name = format!("{key}.signs");
        let signs = plain(checkpoint.require(&name, &[groups, GROUP])?, DType::F16)?;
        if let Some(i) = signs.to_f32()?.iter().position(|v| !v.is_finite()) {
            return Err(invalid(&name, format!("element {i} is not finite; the file is damaged")));
        }
        let parts = vec![("trellis", trellis), ("signs", signs)];
        Ok(Weight { format: ID, out_features, in_features, parts })
    }

    fn decode_rows(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), QuantError> {
        let part = |name: &str| {
            weight.part(name).ok_or_else(|| invalid(name, format!("missing from a {ID} weight")))
        };
        check_rows(weight, &rows, out)?;
        let (trellis, signs) = (part("trellis")?, part("signs")?.to_f32()?);
        let groups = weight.in_features.div_ceil(GROUP);
        let words = trellis.shape().last().copied().unwrap_or(0);
        let bits = rate(words, groups)
            .filter(|_| signs.len() == groups * GROUP)
            .ok_or_else(|| invalid("trellis", format!("{words} words for {groups} groups")))?;
        let table = Codebook::Mul1(MUL1_MULTIPLIER).table();
        let stored = trellis.slice_rows(rows).to_u16_bits()?;
        for (row, out) in stored.chunks_exact(words).zip(out.chunks_exact_mut(weight.in_features)) {
            let groups = row.chunks_exact(1 + GROUP / 16 * bits);
            for ((group, signs), out) in
                groups.zip(signs.chunks_exact(GROUP)).zip(out.chunks_mut(GROUP))
            {
                let scale = f16::from_bits(group[0]).to_f32();
                if !scale.is_finite() {
                    let reason = "a row scale is not finite; the file is damaged".to_owned();
                    return Err(invalid("trellis", reason));
                }
                let mut values = states(&group[1..], bits).map(|s| table[usize::from(s)] * scale);
                sylvester(&mut values);
                for ((out, value), sign) in out.iter_mut().zip(values).zip(signs) {
                    *out = value / 16.0 * sign;
                }
            }
        }
        Ok(())
    }

    fn slice_rows(&self, weight: &Weight, rows: Range<usize>) -> Result<Weight, QuantError> {
        let cut = |(name, tensor): &(&'static str, HostTensor)| match *name {
            "trellis" => (*name, tensor.slice_rows(rows.clone())),
            _ => (*name, tensor.clone()),
        };
        Ok(Weight {
            format: ID,
            out_features: rows.len(),
            in_features: weight.in_features,
            parts: weight.parts.iter().map(cut).collect(),
        })
    }
}

/// Bits per weight of rows of `words` words, if there is such a rate.
fn rate(words: usize, groups: usize) -> Option<usize> {
    (1..=8).find(|bits| words > 0 && words == groups * (1 + GROUP / 16 * bits))
}

/// States of one ring of `16·bits` words.
fn states(words: &[u16], bits: usize) -> [u16; GROUP] {
    let symbol = |i: usize| -> u16 {
        let (word, shift) = (i * bits / 16, i * bits % 16);
        let next = words.get(word + 1).copied().unwrap_or(0);
        let pair = u32::from(next) << 16 | u32::from(words[word]);
        (pair >> shift) as u16 & ((1 << bits) - 1)
    };
    let mut out = [0; GROUP];
    let mut state = 0;
    // A state depends on at most 16 symbols, so it is settled once those before 0 are shifted in.
    for i in (GROUP - 16..GROUP).chain(0..GROUP) {
        state = state << bits | symbol(i);
        out[i] = state;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `docs/formats/exl3.md` gives to check a reader with.
    #[test]
    fn the_example_of_the_page_has_the_states_it_says() {
        let words: Vec<u16> = (0..64).map(|i| [0x3210, 0x7654, 0xba98, 0xfedc][i % 4]).collect();
        let found = states(&words, 4);
        assert_eq!((found[3], found[4], found[18]), (0x0123, 0x1234, 0xf012));
    }
}
