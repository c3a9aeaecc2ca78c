//! Logits are adjusted, and every part tells of itself.

use super::row::weight;
use super::{ADJUSTMENT, ASKED, FROM, INVERSE, LEAST, NONE, PLACE, ROW, Shape, TO, WANTS};
use cubecl::prelude::*;

/// `logit` of `token` as the entries from word `from` to word `to` of `asked` have it.
#[cube]
fn adjust(logit: f32, token: u32, asked: &[u32], from: u32, to: u32) -> f32 {
    let mut low = 0u32.runtime();
    let mut high = (to - from) / ADJUSTMENT;
    while low < high {
        let middle = (low + high) / 2;
        let found = asked[(from + middle * ADJUSTMENT) as usize];
        low = select(found < token, middle + 1, low);
        high = select(found < token, high, middle);
    }
    let at = from + low * ADJUSTMENT;
    let mut adjusted = logit;
    if at < to {
        if asked[at as usize] == token {
            let penalty = f32::reinterpret(asked[(at + 1) as usize]);
            let add = asked[(at + 2) as usize];
            let penalised = select(logit > 0.0, logit / penalty, logit * penalty);
            let sum =
                max(min(penalised, f32::new(-LEAST)), f32::new(LEAST)) + f32::reinterpret(add);
            // A banned token gets negative infinity, which is not computed with.
            adjusted = select(add == 0xff800000u32, f32::new(LEAST), sum);
        }
    }
    adjusted
}

/// Of every part: the largest logit and the sum of weights beside it, adjusted and at the draw's temperature, then as they are at 1. A sum is not a number where a
/// logit is not finite.
#[cube(launch_unchecked)]
pub(super) fn scan_kernel(
    logits: &[f32],
    asked: &[u32],
    adjusted: &mut [f32],
    stats: &mut [f32],
    vocab: u32,
    parts: u32,
    #[comptime] shape: Shape,
) {
    let draw = CUBE_POS_Y;
    let part = CUBE_POS_X * comptime!(shape.scanning()) + UNIT_POS_Y;
    let at = draw * ASKED;
    let row = asked[(at + ROW) as usize];
    let from = asked[(at + FROM) as usize];
    let to = asked[(at + TO) as usize];
    let place = asked[(at + PLACE) as usize];
    let wants = asked[(at + WANTS) as usize] == 1;
    let inverse = f32::reinterpret(asked[(at + INVERSE) as usize]);
    let own = comptime!(shape.own());
    let mut values = Array::<f32>::new(comptime!(own as usize));
    let mut raw = Array::<f32>::new(comptime!(own as usize));
    let mut top = f32::new(LEAST);
    let mut raw_top = f32::new(LEAST);
    let mut bad = 0u32.runtime();
    #[unroll(comptime!(shape.unrolls()))]
    for j in 0..own {
        let token = part * comptime!(shape.part) + j * comptime!(shape.plane) + UNIT_POS_X;
        let mut v = f32::new(LEAST);
        let mut r = f32::new(LEAST);
        if token < vocab {
            r = logits[(row * vocab + token) as usize];
            if u32::reinterpret(r) & 0x7f800000u32 == 0x7f800000u32 {
                bad += 1;
            }
            v = r;
            if place != NONE {
                v = adjust(r, token, asked, from, to);
                adjusted[(place * vocab + token) as usize] = v;
            }
        }
        values[j as usize] = v;
        raw[j as usize] = r;
        top = max(top, v);
        raw_top = max(raw_top, r);
    }
    let top = plane_max(top);
    let bad = plane_sum(bad);
    let mut sum = f32::new(0.0);
    #[unroll(comptime!(shape.unrolls()))]
    for j in 0..own {
        sum += weight(values[j as usize], top, inverse);
    }
    let sum = plane_sum(sum);
    let to = ((draw * parts + part) * 4) as usize;
    let not_a_number = f32::reinterpret(0x7fc00000u32);
    if UNIT_POS_X == 0 && part < parts {
        stats[to] = top;
        stats[to + 1] = select(bad > 0, not_a_number, sum);
    }
    if wants {
        let top = plane_max(raw_top);
        let mut sum = f32::new(0.0);
        #[unroll(comptime!(shape.unrolls()))]
        for j in 0..own {
            sum += weight(raw[j as usize], top, f32::new(1.0));
        }
        let sum = plane_sum(sum);
        if UNIT_POS_X == 0 && part < parts {
            stats[to + 2] = top;
            stats[to + 3] = sum;
        }
    }
}
