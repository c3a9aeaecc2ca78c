//! Damaged copies of a good file, for readers of untrusted input.
//!
//! The places are fixed by the length of the file, so a failure repeats. Headers stand first in
//! every container and decide most, so half of the places lie in the first part of the file.

/// Truncated copies made by [`truncations`].
pub const TRUNCATIONS: usize = 50;
/// Changed copies made by [`bit_flips`].
pub const BIT_FLIPS: usize = 200;
/// Bytes that get half of the places.
const FRONT_BYTES: usize = 4096;

/// `bytes` cut off at [`TRUNCATIONS`] lengths, with the length: 0 to 7, the file less 1 to 8 bytes, and
/// places between. Fewer when the file is shorter than that.
pub fn truncations(bytes: &[u8]) -> impl Iterator<Item = (usize, Vec<u8>)> {
    let length = bytes.len();
    let mut cuts: Vec<usize> = (0..8).chain((1..=8).map(|n| length.saturating_sub(n))).collect();
    cuts.extend(places(length, FRONT_BYTES, TRUNCATIONS - cuts.len()));
    cuts.retain(|&cut| cut < length);
    cuts.sort_unstable();
    cuts.dedup();
    cuts.into_iter().map(|cut| (cut, bytes[..cut].to_vec()))
}

/// `bytes` with one bit flipped, at [`BIT_FLIPS`] places, with the place as bit number.
pub fn bit_flips(bytes: &[u8]) -> impl Iterator<Item = (usize, Vec<u8>)> {
    let places = places(bytes.len() * 8, FRONT_BYTES * 8, BIT_FLIPS);
    places.map(|bit| {
        let mut copy = bytes.to_vec();
        copy[bit / 8] ^= 1 << (bit % 8);
        (bit, copy)
    })
}

/// `count` numbers below `limit`, half of them below `front`; none when `limit` is 0.
fn places(limit: usize, front: usize, count: usize) -> impl Iterator<Item = usize> {
    // A linear congruential sequence (Knuth's MMIX constants): no dependency, the same everywhere.
    let mut state = limit as u64;
    (0..count).filter(move |_| limit > 0).map(move |i| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let limit = if i % 2 == 0 { limit } else { limit.min(front) };
        ((state >> 33) as usize) % limit
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_copies_differ_from_the_original() {
        let original: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let cut: Vec<_> = truncations(&original).collect();
        assert!(cut.len() > TRUNCATIONS - 5 && cut.iter().all(|(n, c)| original[..*n] == c[..]));
        let flipped: Vec<_> = bit_flips(&original).collect();
        assert_eq!(flipped.len(), BIT_FLIPS);
        assert!(flipped.iter().all(|(_, c)| *c != original && c.len() == original.len()));
        assert_eq!(truncations(&[]).count() + bit_flips(&[]).count(), 0);
        assert_eq!(truncations(&[1, 2]).count(), 2);
    }
}
