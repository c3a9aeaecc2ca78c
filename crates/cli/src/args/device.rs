//! Where and how to compute.

use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use clap::{Args, ValueEnum};
use marlin_gpu::Runtime;
use std::ffi::OsStr;
use std::fmt;
use std::str::FromStr;

/// Where and how to compute.
#[derive(Debug, Clone, Args)]
pub struct DeviceArgs {
    /// Device to run on; a number chooses among several of a kind, cuda:1, as `marlin doctor` lists them.
    #[arg(long, value_parser = DeviceParser, default_value_t = Device::Auto)]
    pub device: Device,
    /// CPU threads; all cores if left out.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Precision of matrix inputs: auto allows 8-bit integers, float never does.
    #[arg(long, value_enum)]
    pub activations: Option<ActivationsArg>,
}

/// Devices, also those that this build lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The best GPU this build can use, or the processor.
    Auto,
    /// The processor.
    Cpu,
    /// A GPU.
    Gpu {
        /// How it is reached.
        runtime: Runtime,
        /// Which of the runtime's devices; the first if left out.
        index: Option<usize>,
    },
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Gpu { runtime, index: None } => f.write_str(runtime.name()),
            Self::Gpu { runtime, index: Some(index) } => write!(f, "{}:{index}", runtime.name()),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (name, Some(number)),
            None => (text, None),
        };
        let runtime = Runtime::ALL.into_iter().find(|runtime| runtime.name() == name);
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        match (name, runtime, number) {
            ("auto", _, None) => Ok(Self::Auto),
            ("cpu", _, None) => Ok(Self::Cpu),
            ("auto" | "cpu", _, Some(_)) => Err(format!("{name} has no numbers")),
            (_, Some(runtime), None) => Ok(Self::Gpu { runtime, index: None }),
            (_, Some(runtime), Some(number)) if digits(number) => {
                let index = number.parse().map_err(|e| format!("{number}: {e}"))?;
                Ok(Self::Gpu { runtime, index: Some(index) })
            }
            (_, Some(_), Some(number)) if number.contains(',') => {
                Err(format!("a model runs on one GPU, not on several at once; choose one of them, such as {name}:0"))
            }
            (_, Some(_), Some(_)) => {
                Err(format!("a number follows the colon, as in {name}:0; `marlin doctor` lists them"))
            }
            // The rest of a list.
            (_, None, None) if digits(text) => {
                Err("a number alone is no device, and a model runs on one GPU, not on several at once; write cuda:0".to_owned())
            }
            _ => {
                let known = POSSIBLE.map(|(name, _)| name);
                Err(format!("no such kind of device; choose one of {}", known.join(", ")))
            }
        }
    }
}

/// Kinds of devices, as help and shells offer them.
const POSSIBLE: [(&str, &str); 5] = [
    ("auto", "The best GPU this build can use, or the processor"),
    ("cpu", "The processor"),
    ("cuda", "NVIDIA GPUs; needs a build with `--features cuda`"),
    ("metal", "Apple GPUs; in every build for a Mac"),
    ("vulkan", "GPUs with Vulkan; needs a build with `--features vulkan`"),
];

/// Reads a [`Device`], and names the kinds of them to help and shells.
#[derive(Debug, Clone)]
pub struct DeviceParser;

impl TypedValueParser for DeviceParser {
    type Value = Device;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<Device, clap::Error> {
        let parser =
            StringValueParser::new().try_map(|text| Device::from_str(&text).map_err(Wrong));
        parser.parse_ref(command, argument, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let value = |(name, help)| PossibleValue::new(name).help(help);
        Some(Box::new(POSSIBLE.into_iter().map(value)))
    }
}

/// Why a text names no device.
#[derive(Debug)]
struct Wrong(String);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

/// Precision of matrix inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ActivationsArg {
    /// Integers where a kernel gains from them.
    Auto,
    /// Floats everywhere.
    Float,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_numbers() {
        let read = |text: &str| text.parse::<Device>();
        for text in ["auto", "cpu", "cuda", "metal", "vulkan", "cuda:0", "vulkan:12"] {
            assert_eq!(read(text).unwrap().to_string(), text);
        }
        for (text, says) in [
            ("gpu", "choose one of auto, cpu, cuda, metal, vulkan"),
            ("", "choose one of"),
            ("cpu:0", "cpu has no numbers"),
            ("cuda:", "as in cuda:0"),
            ("cuda:x", "as in cuda:0"),
            ("cuda:-1", "as in cuda:0"),
            ("cuda:0,1", "not on several at once"),
            ("1", "not on several at once"),
            ("cuda:99999999999999999999999", "too large"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
