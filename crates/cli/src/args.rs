//! Command-line arguments. Names are a contract: scripts call them.

pub mod bench;
pub mod device;
mod limits;
pub mod quantize;
pub mod serve;
pub mod tune;

use clap::{Args, Parser, Subcommand, ValueEnum};
pub use device::{ActivationsArg, Device, DeviceArgs};
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  marlin run \"Write a short story about a brave mouse\"
  marlin chat -m ./SmolLM2-135M-Instruct.gguf
  marlin inspect ./Qwen3-30B-A3B";

/// Runs quantized language models on this machine.
#[derive(Debug, Parser)]
#[command(name = "marlin", version, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Say more on stderr.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Only errors and results.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

impl Cli {
    /// -1 quiet, 0 normal, 1 and more verbose.
    pub fn verbosity(&self) -> i8 {
        if self.quiet { -1 } else { self.verbose.min(100) as i8 }
    }
}

/// Verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Answer one prompt.
    Run(Run),
    /// Talk to a model; /help lists commands.
    Chat(Chat),
    /// Say what a model is: architecture, size, formats, memory.
    Inspect(Inspect),
    /// Turn text into token ids.
    Tokenize(Tokenize),
    /// Measure quality: perplexity, logits, multiple choice.
    #[command(
        subcommand,
        after_help = "Examples:
  marlin eval perplexity -m model.gguf --text wiki.test.raw
  marlin eval choices -m model.gguf --task arc_easy.jsonl"
    )]
    Eval(Eval),
    /// Measure speed.
    Bench(bench::Bench),
    /// Find the fastest kernels for a model on this GPU.
    Tune(tune::Tune),
    /// Make a quantized model.
    Quantize(quantize::Quantize),
    /// Serve models over HTTP: OpenAI's and Anthropic's protocols, and a web page.
    Serve(serve::Serve),
    /// Look at settings.
    #[command(
        subcommand,
        after_help = "Example:
  marlin config show --origin"
    )]
    Config(serve::Config),
    /// Download a model into the cache shared with other programs.
    #[cfg(feature = "hub")]
    Pull(Pull),
    /// List downloaded models.
    List(List),
    /// Delete a downloaded model.
    Rm(Rm),
    /// Point a coding agent at a running server: variables, files, or a command run with them.
    Launch(Launch),
    /// Say what this machine and this binary can do.
    Doctor(Doctor),
    /// Print a completion script for a shell.
    #[command(after_help = "Examples:
  marlin completions bash > ~/.local/share/bash-completion/completions/marlin
  marlin completions fish > ~/.config/fish/completions/marlin.fish")]
    Completions {
        /// Shell.
        shell: clap_complete::Shell,
    },
}

/// Which model.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Directory (safetensors, EXL3), .gguf file or pulled ORG/NAME; the embedded model if left out.
    #[arg(short, long, value_name = "MODEL")]
    pub model: Option<String>,
}

/// Memory of past tokens.
#[derive(Debug, Args)]
pub struct ContextArgs {
    /// Most tokens of prompt and answer together [default: the model's, at most 8192].
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    /// How keys and values are cached.
    #[arg(long, value_enum, default_value_t = CacheType::F16)]
    pub cache_type: CacheType,
}

/// How keys and values are cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheType {
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Single precision.
    F32,
    /// 9.25 bits: a little more than half of f16.
    #[value(alias = "q8_0")]
    Q8,
    /// 5.25 bits: a third of f16, at some cost in quality.
    #[value(alias = "q4_0")]
    Q4,
    /// Keys in 9.25 bits, values in 5.25.
    K8v4,
}

impl From<CacheType> for marlin_tensor::CacheType {
    fn from(value: CacheType) -> Self {
        match value {
            CacheType::F16 => Self::F16,
            CacheType::Bf16 => Self::Bf16,
            CacheType::F32 => Self::F32,
            CacheType::Q8 => Self::Q8,
            CacheType::Q4 => Self::Q4,
            CacheType::K8v4 => Self::K8V4,
        }
    }
}

/// How tokens are chosen. What is left out comes from the model's generation_config.json.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Most tokens to generate [default: the model's generation_config.json, or until it stops or the context
    /// is full].
    #[arg(short = 'n', long, value_name = "N")]
    pub max_tokens: Option<usize>,
    /// Randomness; 0 always takes the likeliest token.
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Keep the fewest tokens that hold this share of the probability.
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Keep tokens with this fraction of the best one's probability.
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Same seed, same answer; random if left out.
    #[arg(long)]
    pub seed: Option<u64>,
    /// End the answer before this text (repeatable).
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Divide logits of tokens already seen.
    #[arg(long, value_name = "R")]
    pub repetition_penalty: Option<f32>,
    /// Subtract from logits of tokens in the answer.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// Subtract from logits of tokens in the answer, per occurrence.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Add to a token's logit, as ID=VALUE (repeatable).
    #[arg(long, value_name = "ID=VALUE", value_parser = logit_bias, allow_hyphen_values = true)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Penalise repeating passages (DRY); 0 is off, 0.8 is usual.
    #[arg(long, value_name = "M")]
    pub dry_multiplier: Option<f32>,
    /// Sometimes exclude the top choices (XTC): how often, 0 to 1.
    #[arg(long, value_name = "P")]
    pub xtc_probability: Option<f32>,
    /// What XTC counts as a top choice.
    #[arg(long, value_name = "P", default_value_t = 0.1)]
    pub xtc_threshold: f32,
}

fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let (id, value) = text.split_once('=').ok_or("expected ID=VALUE")?;
    let id = id.trim().parse().map_err(|e| format!("token id {id:?}: {e}"))?;
    let value = value.trim().parse().map_err(|e| format!("value {value:?}: {e}"))?;
    Ok((id, value))
}

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin run \"Write a short story about a brave mouse\"
  marlin run -m model.gguf --temperature 0 -n 64 --stats \"What is a marlin?\"
  cat notes.txt | marlin run -m model.gguf --system \"Summarise the text\" -")]
pub struct Run {
    /// What to answer; `-` reads stdin.
    pub prompt: Option<String>,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Continue the prompt as it is, without the chat template.
    #[arg(long, conflicts_with = "system")]
    pub raw: bool,
    /// Print speed after the answer, on stderr.
    #[arg(long)]
    pub stats: bool,
    /// One JSON document instead of streamed text.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub context: ContextArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `chat`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin chat
  marlin chat -m model.gguf --system \"Answer in one sentence\"")]
pub struct Chat {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Print speed after every answer, on stderr.
    #[arg(long)]
    pub stats: bool,
    #[command(flatten)]
    pub context: ContextArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin inspect
  marlin inspect ./model.gguf --tensors
  marlin inspect ./config.json --json")]
pub struct Inspect {
    /// Directory, .gguf file or config.json; the embedded model if left out.
    pub path: Option<String>,
    /// The same as an option.
    #[arg(short, long, value_name = "MODEL", conflicts_with = "path")]
    pub model: Option<String>,
    /// List every matrix with its format and kernel.
    #[arg(long)]
    pub tensors: bool,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Arguments of `tokenize`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin tokenize \"Once upon a time\"
  marlin tokenize -m model.gguf --file notes.txt --json
  marlin tokenize --template messages.json")]
pub struct Tokenize {
    /// Text to encode.
    #[arg(required_unless_present_any = ["file", "template"], conflicts_with_all = ["file", "template"])]
    pub text: Option<String>,
    /// File to encode; `-` reads stdin.
    #[arg(long, value_name = "FILE", conflicts_with = "template")]
    pub file: Option<PathBuf>,
    /// JSON file of chat messages to render and encode.
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// Read special tokens written in the text as tokens, and add those the model expects.
    #[arg(long)]
    pub special: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    /// One JSON document with ids, pieces and rendered text.
    #[arg(long)]
    pub json: bool,
}

/// Which tokens of which text are scored.
#[derive(Debug, Args)]
pub struct TextArgs {
    /// Text file.
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Tokens per window.
    #[arg(long, default_value_t = 512)]
    pub window: usize,
    /// First scored position of each window.
    #[arg(long, default_value_t = 256)]
    pub score_from: usize,
    /// Score only this many windows.
    #[arg(long)]
    pub windows: Option<usize>,
    /// How keys and values are cached; a reference's are in f32.
    #[arg(long, value_enum, default_value_t = CacheType::F32)]
    pub cache_type: CacheType,
}

/// Arguments of `eval`.
#[derive(Debug, Subcommand)]
pub enum Eval {
    /// Perplexity of a text, and divergence from a reference model.
    #[command(after_help = "Example:
  marlin eval perplexity -m model.gguf --text wiki.test.raw --windows 80 --json")]
    Perplexity {
        #[command(flatten)]
        model: ModelArgs,
        #[command(flatten)]
        text: TextArgs,
        /// Model to compare with, by KL divergence and top-1 agreement.
        #[arg(long, value_name = "MODEL")]
        reference: Option<String>,
        /// One JSON document.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// Several models against a reference, in one table: size, perplexity, divergence.
    #[command(after_help = "Examples:
  marlin eval compare ./model-bf16 ./model-exl3-4.0bpw ./model-q4_k_m.gguf --text test.txt
  marlin eval compare ./a.gguf ./b.gguf --reference ./model-bf16 --text test.txt --windows 80 --json

The reference, the first model unless named, is read once for all that fit in memory with it.
Bits per weight are of the matrices in the layers, the output matrix, and all matrices; ± is one
standard error; KL divergence is in nats per token.")]
    Compare {
        /// Directories, .gguf files or pulled ORG/NAMEs with the same tokenizer.
        #[arg(required = true, value_name = "MODEL")]
        models: Vec<String>,
        /// Model to compare with; the first one if left out.
        #[arg(long, value_name = "MODEL")]
        reference: Option<String>,
        /// Memory for the models beside the reference, such as 8G; those that do not fit are read one after
        /// the other [default: most of what is free].
        #[arg(long, value_name = "SIZE", value_parser = size)]
        max_memory: Option<u64>,
        #[command(flatten)]
        text: TextArgs,
        /// One JSON document.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// Logits of every position, as a NumPy file.
    #[command(after_help = "Example:
  marlin eval logits --tokens 637,264,2990 -o logits.npy")]
    Logits {
        #[command(flatten)]
        model: ModelArgs,
        /// Token ids.
        #[arg(long, value_delimiter = ',', required = true)]
        tokens: Vec<u32>,
        /// Output file, f32 [tokens, vocab].
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
        /// One JSON document that describes the file.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        device: DeviceArgs,
    },
    /// Multiple choice by log-likelihood.
    #[command(after_help = "Example:
  marlin eval choices -m model.gguf --task arc_easy.jsonl --limit 200")]
    Choices {
        #[command(flatten)]
        model: ModelArgs,
        /// JSON lines with a question, its choices and the index of the right one.
        #[arg(long, value_name = "FILE")]
        task: PathBuf,
        /// Only the first rows.
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
        /// One JSON document.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        device: DeviceArgs,
    },
}

/// Arguments of `pull`.
#[cfg(feature = "hub")]
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin pull HuggingFaceTB/SmolLM2-135M-Instruct
  marlin pull unsloth/gemma-3-270m-it-GGUF --include '*Q4_K_M.gguf'
  marlin pull turboderp/Qwen3-8B-exl3 --revision 4.0bpw

An interrupted download continues where it stopped.
Environment: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.")]
pub struct Pull {
    /// Model on the hub.
    #[arg(value_name = "ORG/NAME")]
    pub model: String,
    /// Branch, tag or commit.
    #[arg(long, value_name = "REVISION", default_value = crate::hub::MAIN)]
    pub revision: String,
    /// Take the files that match instead of choosing the weights (repeatable).
    #[arg(long, value_name = "GLOB")]
    pub include: Vec<String>,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `list`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin list
  marlin list --json")]
pub struct List {
    /// A JSON list.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `rm`.
#[derive(Debug, Args)]
#[command(after_help = "Example:
  marlin rm HuggingFaceTB/SmolLM2-135M-Instruct")]
pub struct Rm {
    /// Model in the cache; all its revisions go.
    #[arg(value_name = "ORG/NAME")]
    pub model: String,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `launch`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin launch
  marlin launch claude
  eval \"$(marlin launch aider --url http://127.0.0.1:8080)\"
  marlin launch codex -- codex exec \"explain this repository\"")]
pub struct Launch {
    /// Which agent; all are listed if left out.
    pub agent: Option<String>,
    /// Server that it is to use.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// Model that it is to ask for.
    #[arg(long, value_name = "NAME", default_value = "default")]
    pub model: String,
    /// The server's key; any text does for one without keys.
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Tokens of prompt and answer together, for agents that want to be told [default: 8192].
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Option<u32>,
    /// Whose words to print.
    #[arg(long, value_enum, default_value_t = Shell::Sh)]
    pub shell: Shell,
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
    /// Run this with the variables, and the agent's own command with the arguments it needs.
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<std::ffi::OsString>,
}

/// Shells whose words are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// sh, bash, zsh.
    Sh,
    /// fish.
    Fish,
    /// PowerShell.
    Powershell,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  marlin doctor
  marlin doctor --json")]
pub struct Doctor {
    /// One JSON document.
    #[arg(long)]
    pub json: bool,
}

/// `8G`, `512M`, `1000000`.
fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (number, unit) = match text.find(|c: char| c.is_ascii_alphabetic()) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let scale: u64 = match unit.to_ascii_uppercase().trim_end_matches('B').trim_end_matches('I') {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        "T" => 1 << 40,
        _ => return Err(format!("{unit:?} is no unit; write 512M or 8G")),
    };
    let number: f64 = number.trim().parse().map_err(|e| format!("{number:?}: {e}"))?;
    if !(number > 0.0 && number * scale as f64 <= 1e18) {
        return Err("expected a positive size".to_owned());
    }
    Ok((number * scale as f64) as u64)
}
