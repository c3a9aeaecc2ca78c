//! Arguments of `serve` that bound what one request may take.

use super::serve::count;
use super::size;
use clap::{Args, value_parser};
use marlin_server::RequestLimits;

/// Limits beside those of the engine and the connections.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits of requests")]
pub struct Limits {
    /// Prompt tokens that may wait, as a multiple of the cache; more are refused with 429.
    #[arg(long, value_name = "CACHES", env = "MARLIN_QUEUE_CACHES", default_value_t = 2.0, value_parser = caches)]
    pub queue_caches: f64,
    /// Answers to one prompt (n).
    #[arg(long, value_name = "N", env = "MARLIN_MAX_ANSWERS", default_value_t = RequestLimits::default().answers, value_parser = count)]
    pub max_answers: usize,
    /// Prompts of a completion.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_PROMPTS", default_value_t = RequestLimits::default().prompts, value_parser = count)]
    pub max_prompts: usize,
    /// Stop strings.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_STOPS", default_value_t = RequestLimits::default().stops, value_parser = count)]
    pub max_stops: usize,
    /// Bytes of a stop string.
    #[arg(long, value_name = "BYTES", env = "MARLIN_MAX_STOP_BYTES", default_value_t = RequestLimits::default().stop_bytes, value_parser = count)]
    pub max_stop_bytes: usize,
    /// Tokens in logit_bias.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_BIASES", default_value_t = RequestLimits::default().biases, value_parser = count)]
    pub max_biases: usize,
    /// Likeliest tokens beside each one (top_logprobs).
    #[arg(long, value_name = "N", env = "MARLIN_MAX_TOP_LOGPROBS", default_value_t = RequestLimits::default().top_logprobs, value_parser = count)]
    pub max_top_logprobs: usize,
    /// Messages.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_MESSAGES", default_value_t = RequestLimits::default().messages, value_parser = count)]
    pub max_messages: usize,
    /// Tools.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_TOOLS", default_value_t = RequestLimits::default().tools, value_parser = count)]
    pub max_tools: usize,
    /// Inputs of /v1/embeddings.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_INPUTS", default_value_t = RequestLimits::default().inputs, value_parser = count)]
    pub max_inputs: usize,
    /// Texts that are read for vectors and perplexities, or wait for it; more are refused with 429.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_READERS", default_value_t = 64, value_parser = count)]
    pub max_readers: usize,
    /// Depth of a schema.
    #[arg(long, value_name = "N", env = "MARLIN_SCHEMA_DEPTH", default_value_t = 64, value_parser = value_parser!(u8).range(1..=120))]
    pub schema_depth: u8,
    /// Values in a schema.
    #[arg(long, value_name = "N", env = "MARLIN_SCHEMA_VALUES", default_value_t = RequestLimits::default().schema_values, value_parser = count)]
    pub schema_values: usize,
    /// Milliseconds to compile a schema or grammar.
    #[arg(long, value_name = "MS", env = "MARLIN_GRAMMAR_TIME", default_value_t = 2000, value_parser = value_parser!(u64).range(1..=600_000))]
    pub grammar_time: u64,
    /// Schemas and grammars compiled at once; more wait, and are refused with 429 after half of that time.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_GRAMMARS", default_value_t = 4, value_parser = value_parser!(u16).range(1..=1024))]
    pub max_grammars: u16,
    /// Milliseconds for the model's chat template.
    #[arg(long, value_name = "MS", env = "MARLIN_TEMPLATE_TIME", default_value_t = 250, value_parser = value_parser!(u64).range(1..=600_000))]
    pub template_time: u64,
    /// Largest head of a request, 8K at least.
    #[arg(long, value_name = "SIZE", env = "MARLIN_MAX_HEAD", value_parser = head, default_value = "64K")]
    pub max_head: u64,
    /// Header fields of a request.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_HEADERS", default_value_t = 100, value_parser = value_parser!(u16).range(1..=4096))]
    pub max_headers: u16,
    /// Seconds that a connection may be without a request.
    #[arg(long, value_name = "SECONDS", env = "MARLIN_IDLE_TIMEOUT", default_value_t = 75, value_parser = value_parser!(u64).range(1..=86_400))]
    pub idle_timeout: u64,
}

fn caches(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(caches) if (0.0..=1e6).contains(&caches) => Ok(caches),
        _ => Err("expected a number from 0 to 1000000".to_owned()),
    }
}

fn head(text: &str) -> Result<u64, String> {
    match size(text)? {
        bytes @ 8_192..=16_777_216 => Ok(bytes),
        _ => Err("expected a size from 8K to 16M".to_owned()),
    }
}
