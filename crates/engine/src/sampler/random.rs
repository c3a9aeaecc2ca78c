//! Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
//! SC'11): a random number that is a function of a key and a counter, with nothing to carry along.

/// Two independent uniforms in `[0, 1)` for `position` under `seed`.
pub fn uniform(seed: u64, position: u64) -> [f64; 2] {
    let [a, b, c, d] = philox([position as u32, (position >> 32) as u32, 0, 0], seed);
    let unit = |high: u32, low: u32| {
        let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
        bits as f64 / (1u64 << 53) as f64
    };
    [unit(a, b), unit(c, d)]
}

fn philox(mut counter: [u32; 4], seed: u64) -> [u32; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let low = u64::from(counter[0]) * 0xD251_1F53;
        let high = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the authors' Random123 library (`kat_vectors`).
    #[test]
    fn known_answers() {
        let ones = u32::MAX;
        for (counter, seed, expected) in [
            ([0; 4], 0, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], u64::MAX, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                0x299f_31d0_a409_3822,
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter, seed), expected);
        }
    }

    #[test]
    fn uniforms_cover_the_unit_interval_evenly() {
        let mut counts = [[0u32; 16]; 2];
        for position in 0..16_000 {
            for (i, u) in uniform(7, position).into_iter().enumerate() {
                counts[i][(u * 16.0) as usize] += 1;
            }
        }
        for bins in counts {
            let chi2: f64 = bins.iter().map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0).sum();
            assert!(chi2 < 37.7, "chi-square {chi2} of 15 degrees, 0.1 % bound 37.7");
        }
    }
}
