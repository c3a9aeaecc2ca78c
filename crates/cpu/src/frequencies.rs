//! Cosines and sines of rotary positions, computed once per position.

use marlin_tensor::Rope;
use std::sync::{Arc, RwLock};

/// `[positions, pairs]` cosines and sines, magnitude included.
#[derive(Default)]
pub(crate) struct Angles {
    pairs: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Angles are rounded to f32 before cosine and sine are taken, as transformers does.
    fn new(inv_freq: &[f32], magnitude: f32, positions: usize) -> Self {
        let angles =
            (0..positions).flat_map(|p| inv_freq.iter().map(move |f| (p as f32 * f).sin_cos()));
        let (sin, cos) = angles.map(|(s, c)| (s * magnitude, c * magnitude)).unzip();
        Self { pairs: inv_freq.len(), cos, sin }
    }

    /// Cosines and sines of `position`.
    pub(crate) fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.pairs..(position + 1) * self.pairs;
        (&self.cos[range.clone()], &self.sin[range])
    }

    fn positions(&self) -> usize {
        self.cos.len() / self.pairs.max(1)
    }
}

/// Positions a table starts with.
const FIRST: usize = 256;

/// A table that grows to the positions asked for.
#[derive(Default)]
struct Growing(RwLock<Arc<Angles>>);

impl Growing {
    fn covering(&self, inv_freq: &[f32], magnitude: f32, positions: usize) -> Arc<Angles> {
        let current = Arc::clone(&self.0.read().unwrap_or_else(|e| e.into_inner()));
        if current.positions() >= positions {
            return current;
        }
        let positions = positions.next_power_of_two().max(FIRST);
        let grown = Arc::new(Angles::new(inv_freq, magnitude, positions));
        *self.0.write().unwrap_or_else(|e| e.into_inner()) = Arc::clone(&grown);
        grown
    }
}

/// The tables of one [`Rope`].
pub(crate) struct Frequencies {
    pub(crate) rope: Rope,
    short: Growing,
    long: Growing,
}

impl Frequencies {
    /// Nothing is computed yet.
    pub(crate) fn new(rope: &Rope) -> Self {
        Self { rope: rope.clone(), short: Growing::default(), long: Growing::default() }
    }

    /// The table of a sequence that may grow to `max_context`, covering `positions`.
    pub(crate) fn angles(&self, max_context: u32, positions: usize) -> Arc<Angles> {
        match &self.rope.long {
            Some(long) if max_context > long.threshold => {
                self.long.covering(&long.inv_freq, long.magnitude, positions)
            }
            _ => self.short.covering(&self.rope.inv_freq, self.rope.magnitude, positions),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use marlin_tensor::{LongRope, RopeStyle};

    #[test]
    fn tables_grow_and_the_long_one_is_chosen_by_what_a_sequence_may_become() {
        let long = LongRope { threshold: 4096, inv_freq: vec![0.5, 0.001], magnitude: 1.5 };
        let frequencies = Frequencies::new(&Rope {
            style: RopeStyle::HalfSplit,
            inv_freq: vec![1.0, 0.01],
            magnitude: 1.0,
            long: Some(long),
        });
        for position in [0, 3, 255, 256, 5000] {
            let p = position as f32;
            let short = frequencies.angles(4096, position + 1);
            assert_eq!(short.at(position).0, [p.cos(), (p * 0.01).cos()]);
            assert_eq!(short.at(position).1, [p.sin(), (p * 0.01).sin()]);
            let long = frequencies.angles(4097, position + 1);
            assert_eq!(long.at(position).0, [(p * 0.5).cos() * 1.5, (p * 0.001).cos() * 1.5]);
        }
    }
}
