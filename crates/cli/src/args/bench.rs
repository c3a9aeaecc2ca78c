//! Arguments of `bench`.

use super::{CacheType, DeviceArgs, ModelArgs};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// Where `--profile` writes unless told.
pub const TRACE: &str = "marlin-profile.json";

/// Arguments of `bench`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  marlin bench
  marlin bench -m model.gguf -p 512 -n 128 -r 5 --threads 2 --json
  marlin bench -m model.gguf -p 512 -n 32 --profile trace.json"
)]
pub struct Bench {
    #[command(subcommand)]
    pub what: Option<What>,
    #[command(flatten)]
    pub speed: Speed,
}

/// What else can be measured.
#[derive(Debug, Subcommand)]
pub enum What {
    /// Every operator of the device by itself, with its share of what the machine can do.
    Ops(Ops),
    /// Memory of a model: weights, cache, scratch, peak.
    Memory(Memory),
}

/// Arguments of `bench` itself: prompt and generation speed.
#[derive(Debug, Args)]
pub struct Speed {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompt tokens (repeatable, comma-separated); 0 skips.
    #[arg(short = 'p', long, value_delimiter = ',', default_value = "512")]
    pub prompt: Vec<usize>,
    /// Tokens to generate (repeatable, comma-separated); 0 skips.
    #[arg(short = 'n', long, value_delimiter = ',', default_value = "128")]
    pub generate: Vec<usize>,
    /// Measured runs of each test, after one that is not counted.
    #[arg(short, long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repetitions: u16,
    /// Sequences at once (comma-separated).
    #[arg(long, value_delimiter = ',', default_value = "1")]
    pub batch: Vec<usize>,
    /// Time every operator in one more run: prints a table, and writes a trace for ui.perfetto.dev.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = TRACE)]
    pub profile: Option<PathBuf>,
    /// A JSON list.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `bench ops`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin bench ops
  marlin bench ops --ops 'linear q4*' --threads 2
  marlin bench ops --ops '*attention*' --json

The machine's peaks are measured first: reading memory with all threads, from a buffer larger than
the caches and from one of 64 MiB, and multiply-adds in registers. The share is of the peak that
bounds an operator, whichever of reading its bytes and doing its arithmetic would take longer. Rows
called `cold` find their weights in memory, the others may find them in a cache.")]
pub struct Ops {
    /// Only operators whose name fits, `*` standing for any text: linear q4_0, embed bf16, attention gqa …
    #[arg(long, value_name = "PATTERN")]
    pub ops: Option<String>,
    /// Small shapes and hardly any repetition: to see the table, not to learn of the machine.
    #[arg(long)]
    pub quick: bool,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `bench memory`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin bench memory
  marlin bench memory -m model.gguf -p 512 --cache-type f32 --json")]
pub struct Memory {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens of the prompt whose scratch memory is measured.
    #[arg(short = 'p', long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: u32,
    /// Element type of the key/value cache.
    #[arg(long, value_enum, default_value_t = CacheType::F16)]
    pub cache_type: CacheType,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}
