//! The largest logits of a row.

use super::row::{Row, activate, best, bound, cube_max, cube_sum, key, logit, mass, value};
use super::{ASKED, LARGEST, NONE, ROW, Shape, WANTS};
use cubecl::prelude::*;

/// The largest logits of a row as they are, and the drawn one's, where a draw wants them.
#[cube(launch_unchecked)]
pub(super) fn likeliest_kernel(
    logits: &[f32],
    asked: &[u32],
    stats: &[f32],
    out: &mut [u32],
    stride: u32,
    vocab: u32,
    parts: u32,
    #[comptime] shape: Shape,
) {
    let draw = CUBE_POS_X;
    let at = draw * ASKED;
    let token = out[(draw * stride) as usize];
    if asked[(at + WANTS) as usize] == 0 || token == NONE {
        terminate!();
    }
    let each = comptime!(shape.each);
    // Words of the parts as the row is.
    let first = draw * parts * 4 + 2;
    let wanted = asked[(at + LARGEST) as usize];
    let mut active = Shared::<[u32]>::new_slice(comptime!(shape.slots() as usize));
    let mut floats = Shared::<[f32]>::new_slice(comptime!(shape.planes() as usize));
    let mut words = Shared::<[u32]>::new_slice(comptime!(shape.planes() as usize));
    let row = Row {
        row: asked[(at + ROW) as usize],
        place: NONE.runtime(),
        top: value(best(stats, first, parts, &mut words, shape)),
        inverse: f32::new(1.0),
        first,
        parts,
        vocab,
    };
    let mut own = f32::new(0.0);
    for j in 0..each {
        let part = UNIT_POS * each + j;
        if part < parts {
            own += mass(part, stats, &row);
        }
    }
    let total = cube_sum(own, &mut floats, shape);
    let to = draw * stride;
    if UNIT_POS == 0 {
        out[(to + 1) as usize] = u32::reinterpret(logit(token, logits, logits, &row));
        out[(to + 2) as usize] = u32::reinterpret(row.top);
        out[(to + 3) as usize] = u32::reinterpret(total);
    }
    let low = bound(wanted, stats, &row, &mut floats, shape);
    let count = activate(low, stats, &row, &mut active, &mut floats, shape);
    let mut edge = NONE.runtime();
    let mut edge_token = 0u32.runtime();
    for i in 0..wanted {
        // The next of the order: its key, then its token.
        let mut next = 0u32.runtime();
        for again in 0..2u32 {
            let mut own = 0u32.runtime();
            let mut a = UNIT_POS_Y;
            while a < count {
                let start = active[a as usize] * comptime!(shape.part) + UNIT_POS_X;
                #[unroll(comptime!(shape.unrolls()))]
                for j in 0..comptime!(shape.own()) {
                    let t = start + j * comptime!(shape.plane);
                    let k = key(logit(t, logits, logits, &row));
                    if t < vocab && (k < edge || (k == edge && t > edge_token)) {
                        if again == 0 {
                            own = max(own, k);
                        } else if k == next {
                            own = max(own, !t);
                        }
                    }
                }
                a += comptime!(shape.planes());
            }
            let found = cube_max(own, &mut words, shape);
            if again == 0 {
                next = found;
            } else {
                edge_token = !found;
            }
        }
        edge = next;
        if UNIT_POS == 0 {
            out[(to + 4 + 2 * i) as usize] = edge_token;
            out[(to + 5 + 2 * i) as usize] = u32::reinterpret(value(edge));
        }
    }
}
