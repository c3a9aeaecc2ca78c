//! Arguments of `serve` and `config`.

use super::limits::Limits;
use super::{CacheType, DeviceArgs, size};
use clap::{Args, Subcommand, ValueEnum, value_parser};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

/// Arguments of `serve`. Every option is also an environment variable MARLIN_NAME and a line of marlin.toml.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  marlin serve
  marlin serve -m model.gguf --port 8000 --parallel 16
  marlin serve -m chat=./SmolLM2.gguf -m code=./Qwen2.5-Coder --model-memory 8G
  marlin serve --host 0.0.0.0 --api-key-file keys.txt --tls-cert cert.pem --tls-key key.pem

Every option can also stand in the environment (MARLIN_PORT=8000) or in the file marlin.toml
(port = 8000, below [serve]); the command line goes before the environment, the environment before the
file. `marlin config show --origin` tells what counts and where it comes from.")]
pub struct Serve {
    /// Model, as MODEL or NAME=MODEL (repeatable); the first is loaded at once, the others when asked for.
    #[arg(short, long, value_name = "MODEL", env = "MARLIN_MODEL", value_delimiter = ',')]
    pub model: Vec<String>,
    /// Address to listen at.
    #[arg(long, value_name = "ADDRESS", env = "MARLIN_HOST", default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen at; 0 takes a free one.
    #[arg(long, env = "MARLIN_PORT", default_value_t = 8080)]
    pub port: u16,
    /// Key that clients must send (repeatable).
    #[arg(
        long,
        value_name = "KEY",
        env = "MARLIN_API_KEY",
        hide_env_values = true,
        value_delimiter = ','
    )]
    pub api_key: Vec<String>,
    /// File of keys, one in a line as NAME:KEY or KEY; read again when it changes.
    #[arg(long, value_name = "FILE", env = "MARLIN_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Requests in a minute for each key.
    #[arg(long, value_name = "N", env = "MARLIN_RATE_LIMIT", value_parser = value_parser!(u32).range(1..))]
    pub rate_limit: Option<u32>,
    /// Requests under way for each key.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_CONCURRENT", value_parser = value_parser!(u32).range(1..))]
    pub max_concurrent: Option<u32>,
    /// Most tokens of prompt and answer together [default: the model's, at most 8192].
    #[arg(long, value_name = "TOKENS", env = "MARLIN_CONTEXT")]
    pub context: Option<usize>,
    /// Answers computed at once.
    #[arg(long, value_name = "N", env = "MARLIN_PARALLEL", default_value_t = 32, value_parser = count)]
    pub parallel: usize,
    /// Tokens that the cache holds for all answers together [default: four contexts, or what fits].
    #[arg(long, value_name = "TOKENS", env = "MARLIN_CACHE_TOKENS")]
    pub cache_tokens: Option<usize>,
    /// How keys and values are cached.
    #[arg(long, value_enum, env = "MARLIN_CACHE_TYPE", default_value_t = CacheType::F16)]
    pub cache_type: CacheType,
    /// Compute every prompt anew.
    #[arg(long, env = "MARLIN_NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,
    /// Prompt tokens read in one step while no answer is under way.
    #[arg(long, value_name = "TOKENS", env = "MARLIN_PREFILL_CHUNK", default_value_t = 512, value_parser = count)]
    pub prefill_chunk: usize,
    /// Prompt tokens read in one step beside answers, which wait for them.
    #[arg(long, value_name = "TOKENS", env = "MARLIN_MIXED_CHUNK", default_value_t = 224, value_parser = count)]
    pub mixed_chunk: usize,
    /// Answers that may wait; more are refused with 429.
    #[arg(long, value_name = "N", env = "MARLIN_QUEUE", default_value_t = 256)]
    pub queue: usize,
    /// Memory for models that are loaded together, such as 8G.
    #[arg(long, value_name = "SIZE", env = "MARLIN_MODEL_MEMORY", value_parser = size)]
    pub model_memory: Option<u64>,
    /// Largest body of a request.
    #[arg(long, value_name = "SIZE", env = "MARLIN_MAX_BODY", value_parser = size, default_value = "32M")]
    pub max_body: u64,
    /// Connections at once.
    #[arg(long, value_name = "N", env = "MARLIN_MAX_CONNECTIONS", default_value_t = 4096, value_parser = value_parser!(u32).range(1..=1 << 20))]
    pub max_connections: u32,
    /// Seconds for the head of a request to arrive.
    #[arg(long, value_name = "SECONDS", env = "MARLIN_HEADER_TIMEOUT", default_value_t = 10, value_parser = value_parser!(u64).range(1..=86_400))]
    pub header_timeout: u64,
    /// Seconds for the body of a request to arrive.
    #[arg(long, value_name = "SECONDS", env = "MARLIN_BODY_TIMEOUT", default_value_t = 30, value_parser = value_parser!(u64).range(1..=86_400))]
    pub body_timeout: u64,
    /// Seconds of silence after which a stream sends a comment.
    #[arg(long, value_name = "SECONDS", env = "MARLIN_KEEP_ALIVE", default_value_t = 15, value_parser = value_parser!(u64).range(1..=86_400))]
    pub keep_alive: u64,
    /// Seconds for answers to end when the server is told to stop.
    #[arg(long, value_name = "SECONDS", env = "MARLIN_DRAIN", default_value_t = 30, value_parser = value_parser!(u64).range(0..=86_400))]
    pub drain: u64,
    /// Tell ZeroMQ subscribers at this address, such as tcp://127.0.0.1:5557, which text the cache holds, as vLLM does.
    #[arg(long, value_name = "ENDPOINT", env = "MARLIN_KV_EVENTS", value_parser = endpoint)]
    pub kv_events: Option<SocketAddr>,
    /// Topic of these messages; {model} in it is the model's name.
    #[arg(
        long,
        value_name = "TOPIC",
        env = "MARLIN_KV_EVENTS_TOPIC",
        default_value = "",
        requires = "kv_events"
    )]
    pub kv_events_topic: String,
    /// Collector of traces (OTLP over HTTP), such as http://127.0.0.1:4318 [default: OTEL_EXPORTER_OTLP_ENDPOINT, or none].
    #[arg(long, value_name = "URL", env = "MARLIN_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
    /// Certificate chain (PEM) for TLS.
    #[arg(long, value_name = "FILE", env = "MARLIN_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key (PEM) for TLS.
    #[arg(long, value_name = "FILE", env = "MARLIN_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Origin of web pages that may ask (repeatable); `*` is every one.
    #[arg(long, value_name = "ORIGIN", env = "MARLIN_CORS_ORIGIN", value_delimiter = ',')]
    pub cors_origin: Vec<String>,
    /// Further name under which this server may be asked for, beside its address (repeatable).
    #[arg(long, value_name = "NAME", env = "MARLIN_ALLOWED_HOST", value_delimiter = ',')]
    pub allowed_host: Vec<String>,
    /// No web page at /.
    #[arg(long, env = "MARLIN_NO_PAGE")]
    pub no_page: bool,
    /// Form of the log on stderr.
    #[arg(long, value_enum, env = "MARLIN_LOG_FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Settings file [default: marlin.toml here, or in the user's configuration folder].
    #[arg(long, value_name = "FILE", env = "MARLIN_CONFIG")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub limits: Limits,
}

/// A whole number from 1 on.
pub(super) fn count(text: &str) -> Result<usize, String> {
    match text.trim().parse::<usize>() {
        Ok(n) if (1..=1 << 20).contains(&n) => Ok(n),
        _ => Err("expected a whole number from 1 to 1048576".to_owned()),
    }
}

/// An address as ZeroMQ writes them.
fn endpoint(text: &str) -> Result<SocketAddr, String> {
    let expected = || "expected tcp://ADDRESS:PORT; tcp://*:PORT is every address".to_owned();
    let rest = text.trim().strip_prefix("tcp://").ok_or_else(expected)?;
    if let Ok(address) = rest.parse() {
        return Ok(address);
    }
    let (host, port) = rest.rsplit_once(':').ok_or_else(expected)?;
    let host = match host {
        "*" => Ipv4Addr::UNSPECIFIED,
        "localhost" => Ipv4Addr::LOCALHOST,
        _ => return Err(expected()),
    };
    let port = port.parse().map_err(|_| expected())?;
    Ok(SocketAddr::new(host.into(), port))
}

/// Forms of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object in a line.
    Json,
}

/// Arguments of `config`.
#[derive(Debug, Subcommand)]
pub enum Config {
    /// Show the settings of `serve`, from the command line, the environment and marlin.toml.
    #[command(after_help = "Examples:
  marlin config show --origin
  MARLIN_PORT=9000 marlin config show --origin --json")]
    Show {
        /// Say where each setting comes from.
        #[arg(long)]
        origin: bool,
        /// One JSON document.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        serve: Serve,
    },
}
