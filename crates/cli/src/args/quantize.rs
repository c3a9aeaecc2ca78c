//! Arguments of `quantize`.

use super::{DeviceArgs, size};
use clap::{Args, ValueEnum};
use marlin_quant::exl3::Codebook;
use marlin_quant::exl3::codebook::{MCG_MULTIPLIER, MUL1_MULTIPLIER};
use std::path::PathBuf;

/// Arguments of `quantize`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin quantize ./SmolLM2-135M-Instruct -o ./SmolLM2-exl3 --bits 3.0
  marlin quantize model.gguf -o ./model-exl3 --bits 2.5 --calibration notes.txt --json
  marlin quantize ./Qwen3-30B-A3B -o ./out --bits 4 --plan-only

An interrupted job continues where it stopped when the same command is run again.")]
pub struct Quantize {
    /// Directory (safetensors), .gguf file or pulled ORG/NAME.
    pub model: String,
    /// Directory to make.
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Format to make.
    #[arg(long, value_enum, default_value_t = Format::Exl3)]
    pub format: Format,
    /// Bits per weight on average, 1.0 to 8.0.
    #[arg(long, value_name = "B", default_value_t = 4.0)]
    pub bits: f64,
    /// Bits of the output projection; 16 keeps it, in fp16.
    #[arg(long, value_name = "B", default_value_t = 6.0)]
    pub head_bits: f64,
    /// Bits of the token embedding, 1 to 8; 16 keeps it as it is.
    #[arg(long, value_name = "B", default_value_t = 16)]
    pub embedding_bits: usize,
    /// Store one matrix as embedding and output projection, as the source does; exllamav3 cannot read that.
    #[arg(long)]
    pub tied: bool,
    /// Value generator; mul1 has half rates and the fastest kernels.
    #[arg(long, value_enum, default_value_t = CodebookArg::Mul1)]
    pub codebook: CodebookArg,
    /// Text to calibrate on (repeatable); a built-in mix if left out.
    #[arg(long, value_name = "FILE")]
    pub calibration: Vec<PathBuf>,
    /// Tokens to calibrate on.
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    pub calibration_tokens: usize,
    /// Tokens per calibration row.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub calibration_columns: usize,
    /// Bits by matrix: lines of PATTERN BITS, the last match wins.
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Measure what each group of matrices costs at the logits, and spend the bits accordingly.
    #[arg(long)]
    pub measure: bool,
    /// Say what would be done, and stop.
    #[arg(long)]
    pub plan_only: bool,
    /// Matrices at a time [default: threads].
    #[arg(long, value_name = "N")]
    pub jobs: Option<usize>,
    /// Memory to stay under, such as 8G [default: what is available].
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_memory: Option<u64>,
    /// Replace an unfinished job or a finished model in the output directory.
    #[arg(long)]
    pub fresh: bool,
    /// Seed of the random signs.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Change a choice of the quantizer, as KEY=VALUE (repeatable); see the quantization guide.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
    /// Measure perplexity and divergence on this text afterwards (its first 8192 tokens).
    #[arg(long, value_name = "FILE")]
    pub evaluate: Option<PathBuf>,
    /// Write a page with pictures; quality is measured on text held out from calibration.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Formats that can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Trellis-coded weights.
    Exl3,
}

/// Codebooks of EXL3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CodebookArg {
    /// The newest, affine in a byte sum.
    Mul1,
    /// For readers from October 2025 on.
    Mcg,
    /// For the oldest readers.
    #[value(name = "3inst")]
    ThreeInst,
}

impl CodebookArg {
    /// The codebook of this name.
    pub fn codebook(self) -> Codebook {
        match self {
            Self::Mul1 => Codebook::Mul1(MUL1_MULTIPLIER),
            Self::Mcg => Codebook::Mcg(MCG_MULTIPLIER),
            Self::ThreeInst => Codebook::ThreeInst,
        }
    }
}
