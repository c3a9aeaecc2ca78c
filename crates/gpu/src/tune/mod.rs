//! Which variant of a kernel serves which shape on a device, found by measuring.
//!
//! Every kernel has a fixed rule, which is right everywhere and fast on the devices it was written on. A [`Choice`] overrides it for one
//! [`Shape`] and one class of rows, a power of two and what lies between it and the one before. Some variants add a row's products up in
//! another order. Those are chosen once for every number of rows (`rows: None`), or only for more rows than are promised to be the same bits in any
//! company ([`EXL3_ROWS`], [`PLAIN_ROWS`], [`MMA_ROWS`]); so tuning breaks no promise.
//!
//! * `variant`: all variants there are, and which of them a shape may have.
//! * `table`: choices in memory, and those of one matrix, which a launch reads without a look-up.
//! * `cache`: choices on disk, for one device, driver, set of kernels and version.
//! * `contest`: who wins: variants are verified first, timed in turns, and must beat the rule by a margin.
//! * `measure/` runs the kernels.

mod cache;
pub mod contest;
mod table;
mod variant;

pub use cache::{CacheError, Key, file, read, write};
pub use contest::{Contestant, Outcome};
pub use table::{Choice, Choices, Tuned};
pub use variant::{
    EXL3_ROWS, Facts, INTEGER_ROWS, MMA_ROWS, MOST_ROWS, PLAIN_ROWS, Shape, Variant, candidates,
    class, is_integer,
};

use marlin_tensor::{AttentionParams, BackendError, CacheType, Weight};

/// What is tuned.
#[derive(Debug, Clone)]
pub enum Subject {
    /// Rows times this matrix.
    Linear(Weight),
    /// Attention of tokens one by one over a cache of `cache_type`.
    Attention {
        /// Heads, and what is seen.
        params: AttentionParams,
        /// Element type of the cache.
        cache_type: CacheType,
        /// Whether values are a prefix of the keys.
        latent: bool,
    },
}

/// Measures variants on a device.
pub trait Tuner {
    /// The device's own name.
    fn name(&self) -> String;

    /// The shape of `subject`, as choices are kept for it.
    ///
    /// # Errors
    /// When its weight cannot be read.
    fn shape(&self, subject: &Subject) -> Result<Shape, BackendError>;

    /// Of the classes that hold `rows`, and of every number of rows, those in which `shape` has a choice, in the order in which they are to be tuned.
    fn classes(&self, shape: &Shape, rows: &[usize]) -> Vec<Option<usize>>;

    /// Verifies and times the variants of `subject` in a class. What `tuned` says of every number of rows is heeded.
    ///
    /// # Errors
    /// When the matrix does not fit, or the device fails. A variant that fails is part of the outcome.
    fn tune(
        &mut self,
        subject: &Subject,
        rows: Option<usize>,
        tuned: &Tuned,
    ) -> Result<Outcome, BackendError>;
}
