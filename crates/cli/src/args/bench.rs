//! Arguments of `bench`.

use super::device::DeviceParser;
use super::quantize::CodebookArg;
use super::{ActivationsArg, CacheType, Device, DeviceArgs, ModelArgs};
use clap::{Args, Subcommand, ValueEnum, value_parser};
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
  marlin bench -m model.gguf -p 0 -n 64 --depth 0,4096 --cache-type q8
  marlin bench -m model.gguf --device cpu,vulkan --threads 1,2 --pg 512,128 -o md
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
    /// Every operator of a device by itself, with its share of what the machine can do.
    Ops(Ops),
    /// What `quantize` spends its time on, the search for EXL3's states: its speed and distortion at every rate.
    Encode(Encode),
    /// Memory of a model: weights, cache, scratch, peak.
    Memory(Memory),
    /// A running OpenAI-compatible server under load: first token, gaps, throughput, lost or mixed-up events.
    Serve(Serve),
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
    /// A prompt and its answer in one test, such as 512,128 (repeatable).
    #[arg(long = "pg", value_name = "PROMPT,GENERATE", value_parser = pair)]
    pub both: Vec<(usize, usize)>,
    /// Measured runs of each test, after one that is not counted.
    #[arg(short, long, default_value_t = 5, value_parser = value_parser!(u16).range(1..=1000))]
    pub repetitions: u16,
    /// Sequences at once (comma-separated).
    #[arg(long, value_delimiter = ',', default_value = "1", value_parser = value_parser!(u32).range(1..))]
    pub batch: Vec<u32>,
    /// Tokens that are in the cache before a test begins (comma-separated).
    #[arg(short, long, value_delimiter = ',', default_value = "0")]
    pub depth: Vec<usize>,
    /// How keys and values are cached.
    #[arg(long, value_enum, default_value_t = CacheType::F16)]
    pub cache_type: CacheType,
    /// Time every operator in one more run: prints a table, and writes a trace for ui.perfetto.dev.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = TRACE)]
    pub profile: Option<PathBuf>,
    /// How results are written.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    pub output: Output,
    /// A JSON list: the same as -o json.
    #[arg(long, conflicts_with = "output")]
    pub json: bool,
    /// Devices to compare (comma-separated): cpu,cuda:0,vulkan.
    #[arg(long, value_delimiter = ',', value_parser = DeviceParser, default_value = "auto")]
    pub device: Vec<Device>,
    /// CPU threads (comma-separated); all cores if left out.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = value_parser!(u16).range(1..=1024))]
    pub threads: Vec<u16>,
    /// Precision of matrix inputs: auto allows 8-bit integers, float never does.
    #[arg(long, value_enum)]
    pub activations: Option<ActivationsArg>,
}

impl Speed {
    /// How results are written.
    pub fn output(&self) -> Output {
        if self.json { Output::Json } else { self.output }
    }

    /// One device with one number of threads at a time, in the order in which they were named. Threads are the
    /// processor's only.
    pub fn devices(&self) -> Vec<DeviceArgs> {
        let one = |device: &Device, threads: Option<u16>| DeviceArgs {
            device: *device,
            threads,
            activations: self.activations,
        };
        let of = |device: &Device| -> Vec<DeviceArgs> {
            match device {
                Device::Gpu { .. } => vec![one(device, None)],
                _ if self.threads.is_empty() => vec![one(device, None)],
                _ => self.threads.iter().map(|threads| one(device, Some(*threads))).collect(),
            }
        };
        self.device.iter().flat_map(of).collect()
    }
}

/// Ways to write results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table for a terminal.
    Text,
    /// A table in Markdown.
    Md,
    /// Comma-separated values.
    Csv,
    /// A JSON list.
    Json,
}

/// `512,128`.
fn pair(text: &str) -> Result<(usize, usize), String> {
    let (prompt, generate) =
        text.split_once(',').ok_or("expected PROMPT,GENERATE, as in 512,128")?;
    let number = |text: &str| match text.trim().parse() {
        Ok(0) => Err("expected at least one token of each".to_owned()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{text:?}: {e}")),
    };
    Ok((number(prompt)?, number(generate)?))
}

/// Arguments of `bench ops`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin bench ops
  marlin bench ops --ops 'linear q4*' --threads 2
  marlin bench ops --ops '*attention*' --json
  marlin bench ops --device vulkan --ops 'linear*'

The machine's peaks are measured first: reading memory with all threads, from a buffer larger than
the caches and from one of 64 MiB, and multiply-adds in registers. They are measured again in turns
with each operator, over as many bytes as it works on. The share is of the peak that bounds it,
whichever of reading its bytes and doing its arithmetic would take longer. Rows called `cold` find
their weights in memory, the others may find them in a cache.

On a GPU operators are launched many in a row, recorded as one where the runtime can, and the share
is of a copy of as many bytes, launched in the same manner; cold weights are held to a large copy.
What only reads may be faster than a copy, and pass 100 %.
What the host does, such as sampling, is measured on the processor.")]
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

/// Arguments of `bench encode`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin bench encode
  marlin bench encode --bits 3,4 --repetitions 9 --json
  marlin bench encode --device cuda --codebook mcg

A processor is measured on one thread, since `quantize` spreads matrices over threads; a GPU with as
many tiles as it wants at a time, copies there and back included. Distortion is the mean squared
error of Gaussian weights of variance 1 at the best of a few scales.")]
pub struct Encode {
    /// Rates (comma-separated); all if left out.
    #[arg(long, value_name = "B", value_delimiter = ',')]
    pub bits: Vec<f64>,
    /// Value generator.
    #[arg(long, value_enum, default_value_t = CodebookArg::Mul1)]
    pub codebook: CodebookArg,
    /// Tiles of 256 weights at a time.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub tiles: Option<u32>,
    /// Measured runs of each rate.
    #[arg(short, long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub repetitions: u16,
    /// A JSON list.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `bench memory`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin bench memory
  marlin bench memory -m model.gguf -p 512 --cache-type f32 --json
  marlin bench memory --device vulkan

On a processor memory is the process's, as the system says; on a GPU the device's, as its allocator
counts it, which takes memory in pages and keeps them: what it holds at the end is the most that was
ever needed.")]
pub struct Memory {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens of the prompt whose scratch memory is measured.
    #[arg(short = 'p', long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: u32,
    /// How keys and values are cached.
    #[arg(long, value_enum, default_value_t = CacheType::F16)]
    pub cache_type: CacheType,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// What requests ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Endpoint {
    /// /v1/chat/completions.
    Chat,
    /// /v1/completions.
    Completions,
}

/// Arguments of `bench serve`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin bench serve http://127.0.0.1:8080
  marlin bench serve http://127.0.0.1:8080 --concurrency 32 --requests 256 --max-tokens 128 --json
  marlin bench serve http://127.0.0.1:8080 --rate 4 --requests 200 --shared-prefix-words 2000
  marlin bench serve http://127.0.0.1:8080 --same-prompt --verify 8

First token (TTFT) is counted from sending the request to the first event with text; between
tokens (ITL) from one event with text to the next of the same stream; per token (TPOT) is the time
from first to last text, divided by the tokens after the first. A request has failed unless its
stream has text, one finish_reason with no text after it, [DONE] as its last event and one id
throughout. Exit code 1: some failed. ignore_eos is sent, an extension that makes answers equally
long; servers that refuse it need --no-ignore-eos.")]
pub struct Serve {
    /// Root of the server, such as http://127.0.0.1:8080; https:// is spoken, too.
    #[arg(value_name = "URL")]
    pub url: String,
    /// Believe the certificates in this PEM file and what they have signed, instead of public ones.
    #[arg(long, value_name = "FILE", conflicts_with = "insecure")]
    pub ca_file: Option<PathBuf>,
    /// Believe any certificate.
    #[arg(long)]
    pub insecure: bool,
    /// Streams at once: each client sends its next request when its last one is answered [default: 8].
    #[arg(long, value_name = "N", conflicts_with = "rate", value_parser = value_parser!(u16).range(1..=4096))]
    pub concurrency: Option<u16>,
    /// Requests per second at random times (Poisson), however many are unanswered.
    #[arg(long, value_name = "R", value_parser = positive)]
    pub rate: Option<f64>,
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub requests: u32,
    /// Tokens of each answer.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub max_tokens: u32,
    /// Words of each prompt.
    #[arg(long, value_name = "N", default_value_t = 48, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub prompt_words: u32,
    /// Words before each prompt that are the same in all.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = value_parser!(u32).range(0..=1_000_000))]
    pub shared_prefix_words: u32,
    /// The same prompt in every request.
    #[arg(long)]
    pub same_prompt: bool,
    /// What requests ask for.
    #[arg(long, value_enum, default_value_t = Endpoint::Chat)]
    pub endpoint: Endpoint,
    /// Model that requests name.
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub model: String,
    /// Sent as a bearer token.
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Randomness of answers.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,
    /// Leave the extension ignore_eos out of requests.
    #[arg(long)]
    pub no_ignore_eos: bool,
    /// Requests sent first, one by one, and not counted.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub warmup: u16,
    /// Fail a request after this many seconds without a byte.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = value_parser!(u32).range(1..))]
    pub timeout: u32,
    /// The server sends one event for every token: a stream with another number has failed.
    #[arg(long)]
    pub one_event_per_token: bool,
    /// Afterwards ask this many prompts again, one by one and not streamed: the answers must be the same text.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub verify: u32,
    /// Seed of prompts, arrivals and sampling; new every time if left out, so that no cache knows the prompts.
    #[arg(long)]
    pub seed: Option<u64>,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
}

fn positive(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|e| format!("{e}"))?;
    // Times between requests must fit a clock.
    if (1e-6..=1e6).contains(&value) {
        Ok(value)
    } else {
        Err("expected 0.000001 to 1000000 per second".to_owned())
    }
}
