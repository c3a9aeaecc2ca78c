//! The largest logits of rows, where a device finds them.

use super::values;
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
                let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
                sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                sorted.truncate(count);
                assert_eq!(found.largest, sorted, "{what}: row {row}");
                let (max, temperature) = (sorted[0].1, wanted[row].temperature);
                let share = |l: &f32| (f64::from(l - max) / f64::from(temperature)).exp();
                let total: f64 = logits.iter().map(share).sum();
                let off = (found.total / total - 1.0).abs();
                assert!(off < 1e-5, "{what}: row {row}, {} for {total}", found.total);
            }
        }
    }
}
