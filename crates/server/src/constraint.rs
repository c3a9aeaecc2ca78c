//! What an answer has to look like, as requests say it and as the engine asks for it.

use crate::ApiError;
use crate::models::Served;
use marlin_engine::Constraint;
use marlin_text::ToolSet;
use serde_json::Value;

/// What a request wants an answer to look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// Any JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema(Value),
    /// Text that a regular expression matches.
    Regex(String),
    /// A grammar in llguidance's Lark.
    Lark(String),
    /// A grammar in llama.cpp's form.
    Gbnf(String),
    /// Calls, of one function if it is named.
    Calls {
        /// Function.
        name: Option<String>,
        /// More than one.
        parallel: bool,
    },
}

impl Shape {
    /// The constraint on answers of `served`.
    ///
    /// # Errors
    /// When the schema or grammar is wrong or too large.
    pub fn constraint(
        self,
        served: &Served,
        tools: &ToolSet,
        starts_in_reasoning: bool,
    ) -> Result<Box<dyn Constraint>, ApiError> {
        let _ = (served, tools, starts_in_reasoning);
        Err(ApiError::unsupported("response_format", "not yet"))
    }
}
