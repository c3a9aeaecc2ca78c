//! Full-precision models to quantized ones.
//!
//! A [`job`] streams calibration rows through the source one block at a time ([`stream`]): it gathers the second
//! moments of every matrix's inputs ([`capture`], [`hessian`]), quantizes the block ([`exl3`]), and goes on
//! with what comes out of the quantized block. What is finished lies in the job's folder ([`store`]) and is
//! never computed twice; at the end the parts become a model directory ([`output`]).
//!
//! Nothing here prints or reads the environment. Results are the same bytes for any number of threads.

pub mod allocate;
pub mod calibration;
pub mod capture;
pub mod cholesky;
pub mod error;
pub mod exl3;
pub mod hessian;
pub mod job;
pub mod matrix;
pub mod measure;
pub mod memory;
pub mod metric;
pub mod moments;
pub mod options;
pub mod origin;
pub mod output;
pub mod plan;
pub mod pooling;
pub mod quantizer;
pub mod report;
pub mod states;
pub mod store;
pub mod stream;

pub use calibration::Calibration;
pub use error::ConvertError;
pub use exl3::{Exl3Options, Exl3Quantizer};
pub use job::{Event, run};
pub use options::JobOptions;
pub use origin::Origin;
pub use plan::{Plan, Role};
pub use quantizer::{Quantizer, TensorReport};
pub use report::JobReport;
