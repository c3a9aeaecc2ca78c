//! What an answer has to look like, as requests say it and as the engine asks for it.

use crate::ApiError;
use crate::models::Served;
use marlin_engine::Constraint;
use marlin_text::{
    Grammar, GrammarFactory, GrammarMatcher, StreamDecoder, StreamOptions, TextError, Tool,
    ToolChoice, ToolSet,
};
use serde_json::Value;
use std::time::Duration;

/// What a request wants an answer to look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// Any JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema {
        /// The schema.
        schema: Value,
        /// Refuses `oneOf` with choices that overlap.
        strict: bool,
    },
    /// Text that a regular expression matches.
    Regex(String),
    /// A grammar in llguidance's Lark.
    Lark(String),
    /// A grammar in llama.cpp's form.
    Gbnf(String),
    /// Text or calls; those of these functions are held to their schemas.
    Strict {
        /// Functions.
        names: Vec<String>,
        /// More than one call.
        parallel: bool,
    },
    /// Calls, of one function if it is named.
    Calls {
        /// Function.
        name: Option<String>,
        /// More than one.
        parallel: bool,
    },
}

impl Shape {
    /// The field that asks for it; `schema` is the protocol's for schemas.
    const fn field(&self, schema: &'static str) -> &'static str {
        match self {
            Self::JsonObject | Self::JsonSchema { .. } => schema,
            Self::Regex(_) | Self::Lark(_) | Self::Gbnf(_) => "grammar",
            Self::Strict { .. } => "tools",
            Self::Calls { .. } => "tool_choice",
        }
    }

    fn grammar(self, served: &Served, tools: &[Tool]) -> Result<Grammar, ApiError> {
        Ok(match self {
            Self::JsonObject => Grammar::JsonObject,
            Self::JsonSchema { schema, strict } => Grammar::JsonSchema { schema, strict },
            Self::Regex(source) => Grammar::Regex(source),
            Self::Lark(source) => Grammar::Lark(source),
            Self::Gbnf(source) => Grammar::Gbnf(source),
            Self::Strict { names, parallel } => {
                let format = served.format.calls.ok_or_else(|| {
                    let message = format!("model {} has no known form of calls", served.id);
                    ApiError::unsupported("tools", message)
                })?;
                let mut tools = tools.to_vec();
                for tool in tools.iter_mut().filter(|tool| !names.contains(&tool.name)) {
                    tool.parameters = None;
                }
                Grammar::tool_calls(format, &tools, ToolChoice::Auto, parallel)
                    .map_err(|error| ApiError::invalid("tools", error.to_string()))?
            }
            Self::Calls { name, parallel } => {
                let format = served.format.calls.ok_or_else(|| {
                    let message = format!("model {} has no known form of calls", served.id);
                    ApiError::unsupported("tool_choice", message)
                })?;
                let which = name.as_deref().map_or(ToolChoice::Required, ToolChoice::Named);
                Grammar::tool_calls(format, tools, which, parallel)
                    .map_err(|error| ApiError::invalid("tool_choice", error.to_string()))?
            }
        })
    }

    /// The constraint on answers of `served`. It begins where the reasoning ends, if the prompt has begun one.
    ///
    /// # Errors
    /// When the schema or grammar is wrong or too large, or too many others are being compiled.
    pub fn constraint(
        self,
        served: &Served,
        tools: &ToolSet,
        starts_in_reasoning: bool,
        schema_field: &'static str,
    ) -> Result<Box<dyn Constraint>, ApiError> {
        let field = self.field(schema_field);
        let wrong = |error: TextError| match error {
            TextError::TooManyGrammars => {
                ApiError::too_many(error.to_string(), Duration::from_secs(1))
            }
            error => ApiError::invalid(field, error.to_string()),
        };
        let tools = if let ToolSet::Only(tools) = tools { &tools[..] } else { &[] };
        let grammar = self.grammar(served, tools)?;
        let factory: GrammarFactory = served.grammars().map_err(wrong)?;
        let mut matcher = factory.compile(&grammar).map_err(wrong)?;
        // A grammar without any text shows at its first token.
        matcher.mask().map_err(wrong)?;
        let reasoning = served.format.reasoning.filter(|_| starts_in_reasoning);
        let reasoning = reasoning.map(|markers| Reasoning {
            stream: served.tokenizer.stream(StreamOptions {
                show: served.format.markers(),
                stop: vec![markers.close.to_owned()],
                ..StreamOptions::default()
            }),
        });
        Ok(Box::new(Shaped { reasoning, matcher }))
    }
}

/// Thoughts, which may look like anything.
#[derive(Debug, Clone)]
struct Reasoning {
    /// Ends at the marker that ends them.
    stream: StreamDecoder,
}

#[derive(Debug, Clone)]
struct Shaped {
    reasoning: Option<Reasoning>,
    matcher: GrammarMatcher,
}

impl Constraint for Shaped {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        if self.reasoning.is_some() {
            return Ok(());
        }
        self.matcher.mask().map_err(|error| error.to_string())?.apply(logits);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        let Some(reasoning) = &mut self.reasoning else {
            return self.matcher.accept(token).map_err(|error| error.to_string());
        };
        let emitted = reasoning.stream.push(token).map_err(|error| error.to_string())?;
        if emitted.stopped_by.is_some() {
            self.reasoning = None;
        }
        Ok(())
    }

    fn is_complete(&mut self) -> bool {
        self.reasoning.is_none() && self.matcher.is_done()
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}
