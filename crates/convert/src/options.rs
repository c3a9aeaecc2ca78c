//! What a job is told.

use crate::calibration::Calibration;
use crate::error::ConvertError;
use crate::origin::Origin;
use crate::plan::{Plan, Role};
use std::path::PathBuf;

type Result<T> = std::result::Result<T, ConvertError>;

/// Bits of an output projection that is not quantized but stored in fp16, as exllamav3 does.
pub const KEPT: f64 = 16.0;

/// What a job is to do.
pub struct JobOptions {
    /// Directory to make.
    pub output: PathBuf,
    /// Bits of every group of the plan.
    pub bits: Vec<f64>,
    /// Bits of the embedding table; `None` keeps it as it is.
    pub embedding_bits: Option<usize>,
    /// Whether one quantized matrix is stored as embedding and head.
    pub tied: bool,
    /// Rows to calibrate on.
    pub calibration: Calibration,
    /// Seed of all that is random.
    pub seed: u64,
    /// Matrices at a time.
    pub jobs: usize,
    /// Threads in all.
    pub threads: usize,
    /// Bytes of memory to stay under.
    pub max_memory: Option<u64>,
    /// Whether to throw away an earlier job or result in the same place.
    pub fresh: bool,
    /// Files to write beside the weights (a tokenizer made from a GGUF's vocabulary).
    pub files: Vec<(String, Vec<u8>)>,
}

impl JobOptions {
    /// Refuses to store one matrix where the source has two.
    pub(crate) fn check_tied(&self, origin: &Origin, plan: &Plan) -> Result<()> {
        let head = &origin.output.head;
        let mut groups = plan.groups.iter().zip(&self.bits);
        let kept = groups.any(|(g, bits)| g.role == Role::Head && *bits == KEPT);
        let reason = match () {
            () if !head.tied || origin.source.has(&head.linear.key) => {
                "the source's embedding and output projection are two matrices"
            }
            () if head.linear.bias => {
                "the output projection has a bias, the embedding cannot have one"
            }
            () if kept => "the one matrix is quantized at --head-bits, and 16 quantizes nothing",
            () if self.embedding_bits.is_some() => "the embedding has the bits of --head-bits",
            () => return Ok(()),
        };
        Err(ConvertError::Option { field: "--tied".to_owned(), reason: reason.to_owned() })
    }
}
