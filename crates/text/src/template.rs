//! Chat templates: a list of messages to the prompt that the model was trained on.
//!
//! Templates are Jinja programs from whoever published the model, so they run with a fuel limit and
//! see nothing but their inputs. The dialect is that of `transformers`: block trimming, loop
//! controls, Python's string methods, `raise_exception`, `strftime_now` and a `tojson` that writes
//! what Python's `json.dumps(…, ensure_ascii=False)` writes ([`python`]). `{% generation %}` marks
//! training targets and changes no text; it is read as `{% if true %}`.

mod messages;
mod python;

use crate::TextError;
use crate::special::parse_json;
use crate::tokenizer::Tokenizer;
use marlin_checkpoint::{Checkpoint, Container};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value as Jinja};
use regex::{Captures, Regex};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// Instructions and 64-byte units of data one rendering may use: far more than a prompt of a
/// million characters needs. It also bounds what a template may allocate, 256 MB here, and how long one
/// runs that writes nothing, which [`RenderLimits::max_time`] cannot see.
const FUEL: u64 = 4_000_000;
/// The template that is used unless another is asked for.
pub(crate) const DEFAULT: &str = "default";

/// The templates of a model.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    origin: String,
    /// `bos_token` and `eos_token`, where the model has them.
    tokens: Vec<(&'static str, String)>,
    names: Vec<String>,
    sources: Vec<String>,
    probed: messages::Probed,
}

/// What a template is rendered from.
#[derive(Debug, Clone)]
pub struct TemplateInputs<'a> {
    /// Objects with `role`, `content` (a string or a list of parts) and whatever else the template
    /// reads.
    pub messages: &'a [Value],
    /// JSON schemas of functions.
    pub tools: Option<&'a [Value]>,
    /// The prompt ends where the model is to answer.
    pub add_generation_prompt: bool,
    /// Further variables, `enable_thinking` for one.
    pub extra: Option<&'a Map<String, Value>>,
    /// Name of the template, for models that have several.
    pub template: Option<&'a str>,
    /// What `strftime_now` tells, in UTC.
    pub now: SystemTime,
    /// When rendering gives up.
    pub limits: RenderLimits,
}

/// What one rendering may take, beside the instructions that a template may execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RenderLimits {
    /// Longest prompt. A server gives four bytes for each token of its context.
    pub max_bytes: usize,
    /// Longest time, looked at whenever text is written.
    pub max_time: Duration,
}

impl Default for RenderLimits {
    /// 64 MiB and 250 ms.
    fn default() -> Self {
        Self { max_bytes: 64 << 20, max_time: Duration::from_millis(250) }
    }
}

impl<'a> TemplateInputs<'a> {
    /// `messages`, to be answered.
    pub fn new(messages: &'a [Value]) -> Self {
        Self {
            messages,
            tools: None,
            add_generation_prompt: true,
            extra: None,
            template: None,
            now: SystemTime::now(),
            limits: RenderLimits::default(),
        }
    }
}

impl ChatTemplate {
    /// The templates of `checkpoint`: `chat_template.jinja`, `chat_template.json`,
    /// `tokenizer_config.json`, or GGUF metadata, the first that has one. `None` when there are
    /// none, as with base models.
    ///
    /// # Errors
    /// When a template does not parse.
    pub fn open(checkpoint: &Checkpoint, tokenizer: &Tokenizer) -> Result<Option<Self>, TextError> {
        let Some((origin, sources)) = sources(checkpoint)? else { return Ok(None) };
        let text = |id: Option<u32>| {
            let bytes = tokenizer.token_bytes(id?).ok()?;
            Some(String::from_utf8_lossy(bytes).into_owned())
        };
        Self::new(&origin, sources, text(tokenizer.bos()), text(tokenizer.eos())).map(Some)
    }

    /// Templates by name; `default` is the one that is used unless another is asked for. `origin`
    /// is what errors call them.
    ///
    /// # Errors
    /// When a template does not parse.
    pub fn new(
        origin: &str,
        sources: BTreeMap<String, String>,
        bos_token: Option<String>,
        eos_token: Option<String>,
    ) -> Result<Self, TextError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| template_error(origin, &error))?);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Jinja, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        let names: Vec<String> = sources.keys().cloned().collect();
        let mut kept = Vec::new();
        for (name, source) in sources {
            environment
                .add_template_owned(name, without_generation_tags(&source))
                .map_err(|error| template_error(origin, &error))?;
            kept.push(source);
        }
        let tokens = [("bos_token", bos_token), ("eos_token", eos_token)];
        let tokens = tokens.into_iter().filter_map(|(name, text)| Some((name, text?))).collect();
        let probed = messages::Probed::new(names.len());
        Ok(Self { environment, origin: origin.into(), tokens, names, sources: kept, probed })
    }

    /// Names of the templates.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The sources of the templates, in the order of [`ChatTemplate::names`].
    pub fn sources(&self) -> &[String] {
        &self.sources
    }

    /// The prompt for `inputs`. Without a name in them the template is `tool_use` where there are
    /// tools and such a template, and `default` otherwise.
    ///
    /// # Errors
    /// When the template refuses the messages, fails on them, or takes too long.
    pub fn render(&self, inputs: &TemplateInputs) -> Result<String, TextError> {
        let name = self.select(inputs.template, inputs.tools.is_some());
        if !self.has(name) {
            return Err(TextError::TemplateName {
                origin: self.origin.clone(),
                name: name.into(),
                available: self.names.join(", "),
            });
        }
        let mut variables: Vec<(String, Jinja)> = vec![
            ("messages".into(), inputs.messages.iter().map(message).collect()),
            ("tools".into(), inputs.tools.map_or(Jinja::from(()), list)),
            ("documents".into(), Jinja::from(())),
            ("add_generation_prompt".into(), inputs.add_generation_prompt.into()),
        ];
        let now = inputs.now;
        let strftime = move |format: String| python::strftime(&format, now);
        variables.push(("strftime_now".into(), Jinja::from_function(strftime)));
        for (name, text) in &self.tokens {
            variables.push(((*name).into(), text.as_str().into()));
        }
        for (name, value) in inputs.extra.into_iter().flatten() {
            variables.push((name.clone(), jinja(value)));
        }
        let mut prompt = Prompt::new(inputs.limits);
        let rendered = self.environment.get_template(name).and_then(|template| {
            template.render_captured_to(Jinja::from_pairs(variables), &mut prompt)
        });
        rendered.map_err(|error| template_error(&self.origin, &error))?;
        // Templates write strings.
        String::from_utf8(prompt.bytes).map_err(|error| TextError::Template {
            origin: self.origin.clone(),
            line: 0,
            reason: error.to_string(),
        })
    }

    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|other| other == name)
    }

    /// Name of the template that is used.
    fn select<'a>(&self, asked: Option<&'a str>, tools: bool) -> &'a str {
        match asked {
            Some(name) => name,
            None if tools && self.has("tool_use") => "tool_use",
            None => DEFAULT,
        }
    }
}

/// A prompt within limits, which the clock is held to as it grows.
struct Prompt {
    bytes: Vec<u8>,
    limits: RenderLimits,
    started: Instant,
}

impl Prompt {
    fn new(limits: RenderLimits) -> Self {
        Self { bytes: Vec::new(), limits, started: Instant::now() }
    }
}

impl io::Write for Prompt {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let RenderLimits { max_bytes, max_time } = self.limits;
        if self.bytes.len() + text.len() > max_bytes {
            return Err(io::Error::other(format!("the prompt is longer than {max_bytes} bytes")));
        }
        if self.started.elapsed() > max_time {
            return Err(io::Error::other(format!("the template takes longer than {max_time:?}")));
        }
        self.bytes.extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where the templates come from, and the templates by name.
type Sources = (String, BTreeMap<String, String>);

fn sources(checkpoint: &Checkpoint) -> Result<Option<Sources>, TextError> {
    let path = |name: &str| checkpoint.path.join(name);
    if let Some(bytes) = checkpoint.sidecar("chat_template.jinja") {
        let file = path("chat_template.jinja");
        let source = std::str::from_utf8(bytes).map_err(|error| TextError::Corrupt {
            path: file.clone(),
            field: "(text)".into(),
            reason: error.to_string(),
        })?;
        let sources = BTreeMap::from([(DEFAULT.to_owned(), source.to_owned())]);
        return Ok(Some((file.display().to_string(), sources)));
    }
    for name in ["chat_template.json", "tokenizer_config.json"] {
        let Some(bytes) = checkpoint.sidecar(name) else { continue };
        let file = path(name);
        let value = parse_json(&file, bytes)?;
        let Some(field) = value.get("chat_template").filter(|field| !field.is_null()) else {
            continue;
        };
        let sources = named_sources(field).ok_or_else(|| TextError::Corrupt {
            path: file.clone(),
            field: "chat_template".into(),
            reason: "expected a string or a list of {name, template}".into(),
        })?;
        return Ok(Some((format!("{}: chat_template", file.display()), sources)));
    }
    let Container::Gguf { metadata } = &checkpoint.container else { return Ok(None) };
    let sources = gguf_sources(&checkpoint.path, metadata)?;
    let origin = format!("{}: {KEY}", checkpoint.path.display());
    Ok((!sources.is_empty()).then_some((origin, sources)))
}

const KEY: &str = "tokenizer.chat_template";

/// The templates in the metadata of `path`, by name.
pub(crate) fn gguf_sources(
    path: &Path,
    metadata: &Map<String, Value>,
) -> Result<BTreeMap<String, String>, TextError> {
    let mut sources = BTreeMap::new();
    for (key, value) in metadata.iter().filter(|(key, _)| key.starts_with(KEY)) {
        let name = match key[KEY.len()..].strip_prefix('.') {
            Some(name) => name,
            None if key == KEY => DEFAULT,
            // `tokenizer.chat_templates` lists the names.
            None => continue,
        };
        let source = value.as_str().ok_or_else(|| TextError::Corrupt {
            path: path.into(),
            field: key.clone(),
            reason: "expected a string".into(),
        })?;
        sources.insert(name.to_owned(), source.to_owned());
    }
    Ok(sources)
}

/// A template, or a list of named ones.
fn named_sources(field: &Value) -> Option<BTreeMap<String, String>> {
    if let Some(source) = field.as_str() {
        return Some(BTreeMap::from([(DEFAULT.to_owned(), source.to_owned())]));
    }
    let named = field.as_array()?.iter().map(|entry| {
        let text = |key: &str| entry.get(key)?.as_str().map(str::to_owned);
        Some((text("name")?, text("template")?))
    });
    named.collect()
}

fn without_generation_tags(source: &str) -> String {
    if !source.contains("generation") {
        return source.to_owned();
    }
    let tag = Regex::new(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
        .expect("the pattern is a constant, compiled by a test");
    let plain = tag.replace_all(source, |found: &Captures| {
        let word = if found.get(2).is_some() { "endif" } else { "if true" };
        format!("{}{word}{}", &found[1], &found[3])
    });
    plain.into_owned()
}

/// A message, with its reasoning under both names that templates read it by.
fn message(message: &Value) -> Jinja {
    let Value::Object(fields) = message else { return jinja(message) };
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| fields.get(*name).filter(|value| !value.is_null()));
    let Some(reasoning) = reasoning else { return jinja(message) };
    let mut both = Map::new();
    both.insert("thinking".into(), reasoning.clone());
    both.extend(fields.iter().map(|(name, value)| (name.clone(), value.clone())));
    both.insert("reasoning_content".into(), reasoning.clone());
    jinja(&Value::Object(both))
}

fn list(values: &[Value]) -> Jinja {
    values.iter().map(jinja).collect()
}

fn jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(value) => (*value).into(),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => integer.into(),
            (None, Some(integer)) => integer.into(),
            (None, None) => number.as_f64().map_or(Jinja::from(()), Jinja::from),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(values) => list(values),
        Value::Object(fields) => {
            Jinja::from_pairs(fields.iter().map(|(name, value)| (name.as_str(), jinja(value))))
        }
    }
}

fn template_error(origin: &str, error: &Error) -> TextError {
    let mut reason = match error.kind() {
        ErrorKind::OutOfFuel => "the template takes too long on these messages".to_owned(),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        reason.push_str(": ");
        reason.push_str(&inner.to_string());
        cause = inner.source();
    }
    TextError::Template { origin: origin.into(), line: error.line().unwrap_or(0), reason }
}
