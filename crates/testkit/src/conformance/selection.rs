//! The largest logits of rows, where a device finds them.

use super::values;
use crate::selected;
use marlin_tensor::{Backend, Selection};

/// Whole rows and rests of chunks, one logit and many, equals, and rows that have to be read.
pub fn largest_logits(b: &dyn Backend) {
    for vocab in [40, 1024, 5000] {
        let rows = 4;
        let mut logits: Vec<f32> = values(rows * vocab, 90).iter().map(|v| v * 8.0).collect();
        // Equals in distant places, the best of all.
        for place in [vocab - 1, vocab / 2, 7] {
            logits[vocab + place] = 9.0;
        }
        logits[2 * vocab + vocab / 3] = f32::NAN;
        logits[3 * vocab..].fill(-1.5);
        let x = b.upload(rows, vocab, logits.clone()).unwrap();
        for count in [1, 2, 30, 256] {
            let wanted = [1.0, 0.25, 1.0, 1.0].map(|temperature| Selection { count, temperature });
            let Some(found) = b.select(&x, &wanted).unwrap() else { return };
            let what = format!("{count} of {vocab} logits on {}", b.name());
            for (row, found) in found.iter().enumerate() {
                let logits = &logits[row * vocab..][..vocab];
                let Some(found) = found else {
                    // More equals than there is room for, or a value that is not finite.
                    assert!(row >= 2, "{what}: row {row}");
                    continue;
                };
                assert_ne!(row, 2, "{what}: a row with a NaN");
                let expected = selected(logits, wanted[row]);
                assert_eq!(found.largest, expected.largest, "{what}: row {row}");
                let off = (found.total / expected.total - 1.0).abs();
                assert!(off < 1e-5, "{what}: row {row}, {} for {}", found.total, expected.total);
            }
        }
    }
}
