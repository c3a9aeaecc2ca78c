//! What happened to a request, noted while it happens, told when it is over.

use super::{TraceContext, Tracer};
use crate::answer::{Finish, Piece};
use crate::protocol::finish_reason;
use marlin_engine::Usage;
use serde_json::{Map, Value, json};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// `SPAN_KIND_INTERNAL`, `SPAN_KIND_SERVER`.
const INTERNAL: u8 = 1;
const SERVER: u8 = 2;

/// What paths do, in the words of the conventions; other paths have no spans.
const OPERATIONS: [(&str, &str); 6] = [
    ("/v1/chat/completions", "chat"),
    ("/v1/messages", "chat"),
    ("/v1/responses", "chat"),
    ("/v1/completions", "text_completion"),
    ("/v1/embeddings", "embeddings"),
    ("/v1/perplexity", "perplexity"),
];

/// A request under way. It is over when nobody holds this any more.
pub struct Span {
    tracer: Tracer,
    context: TraceContext,
    id: u64,
    operation: &'static str,
    path: &'static str,
    request_id: String,
    start: Instant,
    started: SystemTime,
    noted: Mutex<Noted>,
}

#[derive(Default)]
struct Noted {
    /// Name of the model, and what the request says of the answer.
    model: Option<String>,
    request: Map<String, Value>,
    streams: bool,
    input_tokens: usize,
    cached_tokens: usize,
    output_tokens: usize,
    reasons: Vec<&'static str>,
    /// Answers that have not ended.
    open: usize,
    /// When the engine began to read each prompt.
    begun: Vec<Arc<OnceLock<Instant>>>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    status: Option<u16>,
    /// Status and message.
    failure: Option<(u16, String)>,
}

impl Span {
    /// Of a request to `path`, if that is traced; the caller says whether it is to be kept.
    pub fn begin(
        tracer: &Tracer,
        path: &str,
        caller: Option<&TraceContext>,
        request_id: &str,
    ) -> Option<Arc<Self>> {
        let (path, operation) = OPERATIONS.into_iter().find(|(known, _)| *known == path)?;
        let context = caller.cloned().unwrap_or_else(TraceContext::root);
        context.sampled.then(|| {
            Arc::new(Self {
                tracer: tracer.clone(),
                context,
                id: new_id(),
                operation,
                path,
                request_id: request_id.to_owned(),
                start: Instant::now(),
                started: SystemTime::now(),
                noted: Mutex::default(),
            })
        })
    }

    /// The trace and the span, as logs and collectors write them.
    pub fn ids(&self) -> (String, String) {
        (self.context.trace_id(), hex(self.id))
    }

    fn note(&self, note: impl FnOnce(&mut Noted)) {
        note(&mut self.noted.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A model is asked for `n` answers.
    pub fn asks(&self, model: &str, n: usize, max_tokens: Option<usize>) {
        self.note(|noted| {
            noted.model = Some(model.to_owned());
            if let Some(most) = max_tokens {
                noted.request.insert("gen_ai.request.max_tokens".into(), most.into());
            }
            if n > 1 {
                noted.request.insert("gen_ai.request.choice.count".into(), n.into());
            }
        });
    }

    /// So many answers wait for the engine, which sets `begun` when it begins to read their prompt.
    pub fn waits(&self, answers: usize, begun: Arc<OnceLock<Instant>>) {
        self.note(|noted| {
            noted.open += answers;
            noted.begun.push(begun);
        });
    }

    /// A text of so many tokens was read by a model, and is not answered.
    pub fn read(&self, model: &str, tokens: usize) {
        self.note(|noted| {
            noted.model = Some(model.to_owned());
            noted.input_tokens += tokens;
        });
    }

    /// The answer is a stream.
    pub fn streams(&self) {
        self.note(|noted| noted.streams = true);
    }

    /// A piece of an answer has come.
    pub fn piece(&self, piece: &Piece) {
        if piece.tokens.is_empty() && piece.finish.is_none() {
            return;
        }
        let now = Instant::now();
        self.note(|noted| {
            if !piece.tokens.is_empty() {
                noted.first_token.get_or_insert(now);
                noted.last_token = Some(now);
            }
            let Some((finish, usage)) = &piece.finish else { return };
            let Usage { prompt_tokens, completion_tokens, cached_tokens } = *usage;
            if piece.choice == 0 {
                noted.input_tokens += prompt_tokens;
                noted.cached_tokens += cached_tokens;
            }
            noted.output_tokens += completion_tokens;
            noted.open -= 1;
            noted.reasons.push(finish_reason(finish));
            if let Finish::Failed(error) = finish {
                noted.failure = Some((error.status.as_u16(), error.message.clone()));
            }
        });
    }

    /// The head of the response is made.
    pub fn responded(&self, status: u16) {
        self.note(|noted| noted.status = Some(status));
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        let end = Instant::now();
        let noted = std::mem::take(self.noted.get_mut().unwrap_or_else(PoisonError::into_inner));
        self.tracer.take(self.record(noted, end));
    }
}

impl Span {
    fn record(&self, noted: Noted, end: Instant) -> Record {
        let mut attributes = Map::new();
        let seconds = |to: Instant| (to - self.start).as_secs_f64();
        let model = noted.model.unwrap_or_default();
        let mut name = self.operation.to_owned();
        attributes.insert("gen_ai.operation.name".into(), self.operation.into());
        attributes.insert("gen_ai.provider.name".into(), "marlin".into());
        if !model.is_empty() {
            name = format!("{name} {model}");
            attributes.insert("gen_ai.request.model".into(), model.as_str().into());
            attributes.insert("gen_ai.response.model".into(), model.into());
        }
        attributes.extend(noted.request);
        attributes.insert("gen_ai.request.id".into(), self.request_id.as_str().into());
        attributes.insert("url.path".into(), self.path.into());
        if noted.streams {
            attributes.insert("gen_ai.request.stream".into(), true.into());
        }
        if noted.input_tokens > 0 {
            attributes.insert("gen_ai.usage.input_tokens".into(), noted.input_tokens.into());
        }
        if noted.output_tokens > 0 {
            attributes.insert("gen_ai.usage.output_tokens".into(), noted.output_tokens.into());
        }
        if noted.cached_tokens > 0 {
            let name = "gen_ai.usage.cache_read.input_tokens";
            attributes.insert(name.into(), noted.cached_tokens.into());
        }
        if !noted.reasons.is_empty() {
            attributes.insert("gen_ai.response.finish_reasons".into(), json!(noted.reasons));
        }
        let begun = noted.begun.iter().filter_map(|begun| begun.get()).min().copied();
        if let Some(begun) = begun {
            attributes.insert("gen_ai.latency.time_in_queue".into(), json!(seconds(begun)));
        }
        if let Some(first) = noted.first_token {
            let name = "gen_ai.latency.time_to_first_token";
            attributes.insert(name.into(), json!(seconds(first)));
            if noted.streams {
                let name = "gen_ai.response.time_to_first_chunk";
                attributes.insert(name.into(), json!(seconds(first)));
            }
        }
        if let Some(status) = noted.status {
            attributes.insert("http.response.status_code".into(), status.into());
        }
        let left = noted.status.is_none() || noted.open > 0;
        let failure = match (noted.failure, noted.status) {
            (Some((status, message)), _) => Some((status.to_string(), message)),
            (None, Some(status @ 400..)) => Some((status.to_string(), String::new())),
            (None, _) if left => Some(("cancelled".to_owned(), "the client has left".to_owned())),
            (None, _) => None,
        };
        if let Some((kind, _)) = &failure {
            attributes.insert("error.type".into(), kind.as_str().into());
        }
        let stages = [
            ("queue", Some(self.start), begun),
            ("prefill", begun, noted.first_token),
            ("decode", noted.first_token, noted.last_token),
        ];
        let mut children = Vec::new();
        for (stage, from, to) in stages {
            if let (Some(from), Some(to)) = (from, to) {
                children.push(self.json(stage, INTERNAL, (from, to), new_id(), Some(self.id)));
            }
        }
        let mut own = self.json(&name, SERVER, (self.start, end), self.id, self.context.parent);
        own["attributes"] = attributes_json(&attributes);
        if let Some((_, message)) = failure {
            own["status"] = json!({"code": 2, "message": message});
        }
        children.insert(0, own);
        Record { spans: children }
    }

    /// A span as OTLP writes it in JSON.
    fn json(
        &self,
        name: &str,
        kind: u8,
        (from, to): (Instant, Instant),
        id: u64,
        parent: Option<u64>,
    ) -> Value {
        let time = |at: Instant| {
            let passed = at.saturating_duration_since(self.start);
            let unix = self.started.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO) + passed;
            // 64-bit numbers are texts in this JSON.
            unix.as_nanos().to_string()
        };
        let mut span = json!({
            "traceId": self.context.trace_id(),
            "spanId": hex(id),
            "name": name,
            "kind": kind,
            "startTimeUnixNano": time(from),
            "endTimeUnixNano": time(to),
            // Sampled; whether the parent is elsewhere is known, and so it is for the request's own span.
            "flags": if parent.is_some() && parent == self.context.parent { 0x301 } else { 0x101 },
        });
        if let Some(parent) = parent {
            span["parentSpanId"] = hex(parent).into();
        }
        if !self.context.state.is_empty() {
            span["traceState"] = self.context.state.as_str().into();
        }
        span
    }
}

/// Spans of a request that has ended, the request's own first.
pub struct Record {
    /// As OTLP writes them in JSON.
    pub spans: Vec<Value>,
}

fn new_id() -> u64 {
    rand::random::<u64>().max(1)
}

fn hex(id: u64) -> String {
    format!("{id:016x}")
}

/// Attributes as OTLP writes them in JSON.
pub(super) fn attributes_json(attributes: &Map<String, Value>) -> Value {
    let entry = |(key, value): (&String, &Value)| json!({"key": key, "value": any_value(value)});
    attributes.iter().map(entry).collect()
}

fn any_value(value: &Value) -> Value {
    match value {
        Value::Bool(value) => json!({"boolValue": value}),
        Value::Number(number) => match number.as_i64() {
            Some(whole) => json!({"intValue": whole.to_string()}),
            None => json!({"doubleValue": number}),
        },
        Value::Array(values) => {
            let values: Vec<Value> = values.iter().map(any_value).collect();
            json!({"arrayValue": {"values": values}})
        }
        Value::String(text) => json!({"stringValue": text}),
        other => json!({"stringValue": other.to_string()}),
    }
}
