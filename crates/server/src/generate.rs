//! What every protocol's request comes to: a prompt, how tokens are chosen, and when to end.

use crate::answer::{AnswerOptions, Answers};
use crate::constraint::Shape;
use crate::error::CONTEXT_EXCEEDED;
use crate::fields::{Fields, token_ids, whole};
use crate::models::Served;
use crate::runtime::Refusal;
use crate::{ApiError, RequestLimits};
use marlin_engine::{Request, SamplingOptions, SamplingParams};
use marlin_text::{OutputParser, ParserOptions, RenderLimits, Specials, TemplateInputs, ToolSet};
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// Bytes of a rendered prompt for each token of the context.
const PROMPT_BYTES: usize = 64;
/// Longest time a request may ask for, seconds.
const MAX_TIMEOUT: f64 = 86_400.0;

/// Fields that protocols share.
#[derive(Debug, Clone, Default)]
pub struct Choosing {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Vec<(u32, f32)>,
    seed: Option<u64>,
    /// Likeliest tokens to report beside each chosen one.
    pub logprobs: Option<usize>,
    /// Answers wanted.
    pub n: usize,
    /// Most tokens of an answer.
    pub max_tokens: Option<usize>,
    min_tokens: usize,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    stop_tokens: Vec<u32>,
    ignore_eos: bool,
    priority: i32,
    cache_salt: Option<Arc<str>>,
    timeout: Option<Duration>,
    /// A prompt that is too long loses its beginning.
    pub truncate_prompt: bool,
}

impl Choosing {
    /// Reads the fields that are called the same in OpenAI's chat and completion requests, and our
    /// extensions of both.
    ///
    /// # Errors
    /// Names the first field that is wrong.
    pub fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let mut choosing = Self::read_extensions(fields)?;
        choosing.temperature = fields.number("temperature", 0.0..=100.0)?;
        choosing.top_p = fields.number("top_p", 0.0..=1.0)?;
        choosing.presence_penalty = fields.number("presence_penalty", -2.0..=2.0)?;
        choosing.frequency_penalty = fields.number("frequency_penalty", -2.0..=2.0)?;
        let answers = fields.limits().answers as u64;
        choosing.n = fields.count("n", 1..=answers)?.unwrap_or(1) as usize;
        choosing.stop = stop(fields, "stop")?;
        choosing.logit_bias = logit_bias(fields)?;
        choosing.seed = seed(fields)?;
        Ok(choosing)
    }

    /// Reads our extensions alone.
    ///
    /// # Errors
    /// Names the first field that is wrong.
    pub fn read_extensions(fields: &mut Fields) -> Result<Self, ApiError> {
        let top_k = fields.count("top_k", 0..=u64::from(u32::MAX))?;
        let tokens = fields.list("stop_token_ids", 64)?.unwrap_or_default();
        let stop_tokens = token_ids(&tokens)
            .ok_or_else(|| fields.wrong("stop_token_ids", "token ids", &Value::Array(tokens)))?;
        let priority = match fields.take("priority") {
            None => 0,
            Some(value) => whole(&value)
                .and_then(|v| i32::try_from(v).ok())
                .ok_or_else(|| fields.wrong("priority", "a whole number of 32 bits", &value))?,
        };
        let salt = fields.string("cache_salt")?;
        if salt.as_ref().is_some_and(|salt| salt.is_empty() || salt.len() > 256) {
            return Err(ApiError::invalid("cache_salt", "cache_salt: expected 1 to 256 bytes"));
        }
        let timeout = fields.number("timeout", 0.001..=MAX_TIMEOUT)?;
        Ok(Self {
            top_k: top_k.map(|k| k as usize),
            min_p: fields.number("min_p", 0.0..=1.0)?,
            repetition_penalty: fields.number("repetition_penalty", 0.01..=100.0)?,
            min_tokens: fields.count("min_tokens", 0..=1 << 32)?.unwrap_or(0) as usize,
            stop_tokens,
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
            priority,
            cache_salt: salt.map(Into::into),
            timeout: timeout.map(Duration::from_secs_f32),
            truncate_prompt: fields.flag("truncate_prompt")?.unwrap_or(false),
            n: 1,
            ..Self::default()
        })
    }

    /// Sets what other protocols call by other names.
    pub fn with(mut self, temperature: Option<f32>, top_p: Option<f32>, stop: Vec<String>) -> Self {
        (self.temperature, self.top_p, self.stop) = (temperature, top_p, stop);
        self
    }

    fn sampling(&self, served: &Served) -> Result<SamplingParams, ApiError> {
        let base = served.defaults.apply(SamplingOptions::default());
        let options = SamplingOptions {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_p: self.top_p.unwrap_or(base.top_p),
            top_k: self.top_k.map_or(base.top_k, |k| (k > 0).then_some(k)),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            logit_bias: self.logit_bias.clone(),
            seed: self.seed.unwrap_or_else(rand::random),
            logprobs: self.logprobs,
            ..SamplingOptions::default()
        };
        // Nothing of it is about the prompt.
        SamplingParams::new(options).map_err(|error| ApiError::of_engine(&error, "temperature"))
    }
}

/// A string, or a list of them.
///
/// # Errors
/// When it is something else, or too many, or too long.
pub fn stop(fields: &mut Fields, name: &str) -> Result<Vec<String>, ApiError> {
    let RequestLimits { stops: most, stop_bytes: bytes, .. } = fields.limits();
    let Some(value) = fields.take(name) else { return Ok(Vec::new()) };
    let expected = format!("a string or up to {most} strings of 1 to {bytes} bytes");
    let list = match &value {
        Value::String(text) => vec![text.clone()],
        Value::Array(list) if list.len() <= most => {
            list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()
        }
        _ => return Err(fields.wrong(name, &expected, &value)),
    };
    let whole = value.as_array().is_none_or(|array| array.len() == list.len());
    match whole && list.iter().all(|text| (1..=bytes).contains(&text.len())) {
        true => Ok(list),
        false => Err(fields.wrong(name, &expected, &value)),
    }
}

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(value) = fields.take("logit_bias") else { return Ok(Vec::new()) };
    let most = fields.limits().biases;
    let expected = format!("up to {most} token ids with numbers from -100 to 100");
    let wrong = || fields.wrong("logit_bias", &expected, &value);
    let map = value.as_object().filter(|map| map.len() <= most).ok_or_else(wrong)?;
    let entry = |(id, bias): (&String, &Value)| {
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        Ok((id.parse().map_err(|_| wrong())?, bias.ok_or_else(wrong)? as f32))
    };
    map.iter().map(entry).collect()
}

fn seed(fields: &mut Fields) -> Result<Option<u64>, ApiError> {
    let Some(value) = fields.take("seed") else { return Ok(None) };
    let range = i128::from(i64::MIN)..=i128::from(u64::MAX);
    let seed = whole(&value).filter(|seed| range.contains(seed)).map(|seed| seed as u64);
    seed.map(Some).ok_or_else(|| fields.wrong("seed", "a whole number of 64 bits", &value))
}

/// What is to be continued.
pub enum Prompt {
    /// Messages for the model's template.
    Chat {
        /// As the template reads them.
        messages: Vec<Value>,
        /// Functions, as the template reads them.
        tools: Vec<Value>,
        /// Further variables of the template.
        extra: Map<String, Value>,
    },
    /// Text as it is.
    Text(String),
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

/// A request that can be put to a model.
pub struct Generate {
    /// What is to be continued.
    pub prompt: Prompt,
    /// How tokens are chosen, and when to end.
    pub choosing: Choosing,
    /// Which calls an answer may hold.
    pub tools: ToolSet,
    /// What the answer has to look like.
    pub shape: Option<Shape>,
    /// The field that this protocol has for the prompt.
    pub prompt_field: &'static str,
    /// The field that this protocol has for a schema.
    pub schema_field: &'static str,
    /// Calls are given out while they are written.
    pub stream: bool,
    /// An answer ends with its first call.
    pub one_call: bool,
}

/// A request under way.
pub struct Running {
    /// Its answers.
    pub answers: Answers,
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// When it was put to the engine.
    pub queued: Instant,
}

impl Generate {
    /// Puts the request to `served`. Rendering and encoding may take a while, so not on a thread that others wait for.
    ///
    /// # Errors
    /// When the model cannot take it, or has too much to do.
    pub fn submit(self, served: &Served) -> Result<Running, ApiError> {
        let start = Instant::now();
        let chat = matches!(self.prompt, Prompt::Chat { .. });
        let (mut prompt, text) = self.prompt(served)?;
        let Self { choosing, tools, shape, prompt_field, schema_field, stream, one_call, .. } =
            self;
        let limits = served.runtime.limits();
        if choosing.truncate_prompt {
            let answer = choosing.max_tokens.unwrap_or(1).max(1);
            let room = limits.max_context.saturating_sub(answer).max(1);
            prompt.drain(..prompt.len().saturating_sub(room));
        }
        let format = served.format;
        if tools != ToolSet::None && format.calls.is_none() {
            let message = format!("model {} has no known form of calls", served.id);
            return Err(ApiError::unsupported("tools", message));
        }
        let starts_in_reasoning = chat && format.starts_in_reasoning(&text);
        let parses = chat && (format.reasoning.is_some() || tools != ToolSet::None);
        let constraint = shape
            .map(|shape| shape.constraint(served, &tools, starts_in_reasoning, schema_field))
            .transpose()?;
        let mut request =
            Request::new(prompt.clone(), choosing.sampling(served)?, served.end_ids.clone());
        request.max_tokens = choosing.max_tokens;
        request.min_tokens = choosing.min_tokens;
        request.stop_tokens = choosing.stop_tokens.clone();
        request.ignore_eos = choosing.ignore_eos;
        request.priority = choosing.priority;
        request.cache_name = choosing.cache_salt.clone();
        request.constraint = constraint;
        if request.max_tokens.is_none() {
            let room = limits.max_context.saturating_sub(prompt.len());
            request.max_tokens = served.defaults.max_new_tokens.map(|most| most.min(room));
        }
        let request =
            limits.validate(request).map_err(|error| ApiError::of_engine(&error, prompt_field))?;
        let deadline = choosing.timeout.map(|timeout| start + timeout);
        let queued = Instant::now();
        let tokens = served.runtime.submit(request, choosing.n, deadline).map_err(refused)?;
        let parser = ParserOptions { tools, starts_in_reasoning, stream_arguments: stream };
        let options = AnswerOptions {
            one_call,
            stop: choosing.stop,
            shown: if parses { format.markers() } else { Vec::new() },
            continues_text: !chat,
            parser: parses.then(|| {
                Arc::new(move || OutputParser::new(format, parser.clone()))
                    as Arc<dyn Fn() -> OutputParser + Send + Sync>
            }),
        };
        let answers = Answers::new(tokens, choosing.n, &served.tokenizer, &options);
        Ok(Running { answers, prompt, queued })
    }

    /// Token ids, and for messages the text they are from.
    ///
    /// # Errors
    /// When the model has no template for messages, or cannot take them.
    pub(crate) fn prompt(&self, served: &Served) -> Result<(Vec<u32>, String), ApiError> {
        let truncates = self.choosing.truncate_prompt;
        let asked = self.choosing.max_tokens.unwrap_or(1);
        let with_answer = |error: ApiError| match error.code {
            Some(CONTEXT_EXCEEDED) => {
                let message = format!("{}; the answer is to have {asked}", error.message);
                ApiError { message, ..error }
            }
            _ => error,
        };
        let encode = |text: &str, specials| {
            served.encode(text, specials, self.prompt_field, truncates).map_err(with_answer)
        };
        match &self.prompt {
            Prompt::Chat { messages, tools, extra } => {
                let text = render(served, messages, tools, extra).map_err(|error| {
                    let param = error.param.is_some().then(|| self.prompt_field.to_owned());
                    with_answer(ApiError { param, ..error })
                })?;
                Ok((encode(&text, Specials::TEMPLATE)?, text))
            }
            Prompt::Text(text) => Ok((encode(text, Specials::PROMPT)?, String::new())),
            Prompt::Tokens(tokens) => Ok((tokens.clone(), String::new())),
        }
    }
}

/// The text of messages in the model's own form.
///
/// # Errors
/// When the model has no template, or it refuses the messages.
pub fn render(
    served: &Served,
    messages: &[Value],
    tools: &[Value],
    extra: &Map<String, Value>,
) -> Result<String, ApiError> {
    let template = served.template.as_ref().ok_or_else(|| {
        let message = format!("model {} has no chat template; use /v1/completions", served.id);
        ApiError::invalid("messages", message)
    })?;
    // No text of a prompt that fits has so many bytes; a template that multiplies what it is given would.
    let max_bytes = PROMPT_BYTES * served.runtime.limits().max_context.max(4096);
    let text = |message: &Value| message["content"].as_str().map_or(0, str::len);
    let bytes: usize = messages.iter().map(text).sum();
    if bytes > max_bytes {
        return Err(served.too_long(bytes, "messages"));
    }
    let tools = (!tools.is_empty()).then_some(tools);
    let messages = template.prepare(messages, tools, None);
    let inputs = TemplateInputs {
        tools,
        extra: Some(extra),
        now: SystemTime::now(),
        limits: RenderLimits { max_bytes, max_time: served.template_time },
        ..TemplateInputs::new(&messages)
    };
    template.render(&inputs).map_err(|error| ApiError::invalid("messages", error.to_string()))
}

fn refused(refusal: Refusal) -> ApiError {
    match refusal {
        Refusal::Full => ApiError::too_many("the queue is full", Duration::from_secs(1)),
        Refusal::Dead => ApiError::unavailable("the engine has failed; the model is loaded again"),
    }
}
