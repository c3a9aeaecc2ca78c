//! Arguments of `tune`.

use super::device::{Device, DeviceParser};
use clap::{Args, value_parser};
use marlin_gpu::tune::MOST_ROWS;

/// Arguments of `tune`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin tune
  marlin tune ./model.gguf
  marlin tune ORG/NAME --device cuda --rows 1,8,64 --json
  marlin tune ./model.gguf --force

Every shape of the model is run with every class of rows (a power of two: 5 to 8 are one) and each
variant that its kernel has. A variant is held to what the host computes in f64, and taken only if
it is right and 3 % faster than the rule. Choices go to marlin/tune in XDG_CACHE_HOME or ~/.cache, a
file for each device, and hold for its driver, these kernels and this version; run, chat, serve and
bench use them. What is tuned already is left out: a run that was interrupted goes on.")]
pub struct Tune {
    /// Directory, .gguf file or pulled ORG/NAME; the embedded model if left out.
    #[arg(value_name = "MODEL")]
    pub path: Option<String>,
    /// The same as an option.
    #[arg(short, long, value_name = "MODEL", conflicts_with = "path")]
    pub model: Option<String>,
    /// GPU to tune for; a number chooses among several of a kind, cuda:1, as `marlin doctor` lists them.
    #[arg(long, value_parser = DeviceParser, default_value_t = Device::Auto)]
    pub device: Device,
    /// Numbers of rows, tokens that are computed together (comma-separated).
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        value_parser = value_parser!(u16).range(1..=MOST_ROWS as i64),
        default_value = "1,2,4,8,16,32,64,128,256,512"
    )]
    pub rows: Vec<u16>,
    /// Also what is tuned already.
    #[arg(long)]
    pub force: bool,
    /// One JSON document, with every variant's time.
    #[arg(long)]
    pub json: bool,
}
