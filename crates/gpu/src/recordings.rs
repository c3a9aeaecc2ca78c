//! Passes that were recorded once and are launched as a whole from then on.
//!
//! A pass over sequences that decode, one row each, launches the same kernels over the same arrays whatever
//! the tokens, as long as model, cache, number of rows and room for cache blocks are the same: what differs lies in the
//! [`Step`], which is written anew before each launch.

use crate::step::{Step, StepShape};
use cubecl::client::Graph;
use marlin_tensor::{Batch, Cache, Opaque, Tensor};
use std::any::Any;
use std::sync::{Arc, Weak};

/// Recordings that are kept; the oldest goes first.
const MOST: usize = 32;

/// Which pass was recorded.
pub(crate) struct Key {
    owner: u64,
    shape: StepShape,
    /// Keeps the address of the cache from being given to another one.
    cache: Weak<dyn Any + Send + Sync>,
}

/// What came of recording a pass.
pub(crate) enum Recording {
    /// Launches, the batch they read, and what they write.
    Made { graph: Graph, step: Arc<Step>, out: Tensor },
    /// It cannot be recorded: a host copy lies within, or the runtime has no graphs.
    Refused,
}

/// All recordings of a backend.
#[derive(Default)]
pub(crate) struct Recordings(Vec<(Key, Recording)>);

impl Key {
    /// The key of a pass, if it is one that repeats.
    pub(crate) fn of(owner: u64, batch: &Batch, cache: &Cache) -> Option<Self> {
        let decodes = batch.rows() > 0
            && batch.sequences.iter().all(|s| s.rows == 1)
            && batch.output_rows.iter().copied().eq(0..batch.rows() as u32);
        let handle: &Opaque = &cache.handle;
        decodes.then(|| Self { owner, shape: StepShape::of(batch), cache: Arc::downgrade(handle) })
    }

    fn is(&self, other: &Self) -> bool {
        self.owner == other.owner
            && self.shape == other.shape
            && std::ptr::addr_eq(self.cache.as_ptr(), other.cache.as_ptr())
    }
}

impl Recordings {
    pub(crate) fn find(&self, key: &Key) -> Option<&Recording> {
        self.0.iter().find(|(k, _)| k.is(key)).map(|(_, recording)| recording)
    }

    pub(crate) fn keep(&mut self, key: Key, recording: Recording) {
        self.0.retain(|(k, _)| k.cache.strong_count() > 0);
        if self.0.len() >= MOST {
            self.0.remove(0);
        }
        self.0.push((key, recording));
    }
}
