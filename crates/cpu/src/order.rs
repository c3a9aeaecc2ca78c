//! The order in which matrices are used, which a model repeats for every token: while one is
//! multiplied, threads that wait fetch the next.

use crate::Pool;
use crate::kernel::LoadedLinear;
use std::sync::{Arc, Mutex, PoisonError};

/// Rows up to which reading the weights, and the start of a parallel region, are what takes the time.
pub(crate) const FEW_ROWS: usize = 8;

/// Address and length of the weights that were read after a matrix.
pub(crate) type Next = Mutex<Vec<(usize, usize)>>;

/// What was used last.
#[derive(Default)]
pub(crate) struct Order {
    last: Mutex<Option<Arc<Next>>>,
}

impl Order {
    /// Before `linears` are multiplied with `rows` rows: says what followed them the last time, and
    /// notes that they follow what came before.
    pub(crate) fn expect(&self, pool: &Pool, rows: usize, linears: &[&LoadedLinear]) {
        let Some(first) = linears.first().filter(|_| rows <= FEW_ROWS) else { return };
        let stored = linears.iter().map(|linear| {
            let stored = linear.kernel.stored();
            (stored.as_ptr().addr(), stored.len())
        });
        let before = {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            last.replace(Arc::clone(&first.next))
        };
        if let Some(before) = before {
            let mut next = before.lock().unwrap_or_else(PoisonError::into_inner);
            next.clear();
            next.extend(stored);
        }
        pool.expect(&first.next.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
