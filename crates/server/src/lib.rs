//! An OpenAI-compatible server: HTTP in, server-sent events out.
//!
//! ```text
//! body ─► Fields ─► protocol::*Request ─► Generate::submit ─► Runtime (the engine's thread)
//! events ◄─ protocol::Encoder ◄─ Answers (text, reasoning, calls) ◄─ Tokens ◄──────┘
//! ```
//!
//! * [`Models`]: which models there are; they are loaded when they are first asked for.
//! * [`Runtime`]: the thread that owns a model's engine.
//! * [`Generate`]: what every protocol's request comes to.
//! * `protocol`: OpenAI's chat and completions and responses, Anthropic's messages.
//! * [`Tracer`], [`Exporter`]: spans of requests to an OpenTelemetry collector.
//! * [`KvEvents`]: tells routers what the caches hold.
//! * `routes`: paths, limits, keys, metrics, the web page.
//!
//! Models, backends, files and the environment belong to the binary, which hands over a [`Loader`] and a [`Config`].

mod answer;
mod auth;
mod constraint;
mod error;
mod fields;
mod generate;
mod kv_events;
mod limits;
mod metrics;
mod models;
mod protocol;
mod routes;
mod runtime;
mod trace;

pub use answer::{AnswerOptions, Answers, Delta, Finish, Piece, Tally, TokenChance, Whole, whole};
pub use auth::{Key, Keys, Quota};
pub use constraint::Shape;
pub use error::{ApiError, ErrorBody, ErrorResponse};
pub use fields::Fields;
pub use generate::{Choosing, Generate, Prompt, Running};
pub use kv_events::{KvEvents, MODEL as MODEL_IN_TOPIC, Publishing, Teller};
pub use limits::{ModelLimits, RequestLimits};
pub use metrics::StepTokens;
pub use models::{Loaded, Loader, Models, Served};
pub use protocol::{event, named_event, read_body};
pub use routes::{Config, Listening, Server};
pub use runtime::{End, Listeners, Output, QueueLimits, Refusal, Runtime, Tokens};
pub use trace::{Exporter, TraceCounts, Tracer};

pub use tokio_rustls::rustls;

/// What responses call the program that made them.
pub const FINGERPRINT: &str = concat!("marlin-", env!("CARGO_PKG_VERSION"));
