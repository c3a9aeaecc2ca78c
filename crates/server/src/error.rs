//! What a client is told when something is wrong, in the shape of the protocol it speaks.

use axum::Json;
use axum::http::header::RETRY_AFTER;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use std::time::Duration;

/// The code of what is too long for a context.
pub const CONTEXT_EXCEEDED: &str = "context_length_exceeded";

/// A refusal or failure.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What is wrong and what to do about it.
    pub message: String,
    /// OpenAI's class of error.
    pub kind: &'static str,
    /// The field at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
    /// When to try again.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, message, kind, param: None, code: None, retry_after: None }
    }

    /// 400: the request is wrong; `param` is the field.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message);
        Self { param: Some(param.to_owned()), ..error }
    }

    /// 400 for a field that is known and not honoured.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::invalid(param, message) }
    }

    /// 401.
    pub fn unauthorized() -> Self {
        let message = "missing or wrong API key; send `Authorization: Bearer KEY`";
        let error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        Self { code: Some("invalid_api_key"), ..error }
    }

    /// 404.
    pub fn not_found(what: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found_error", what)
    }

    /// 404 for a model.
    pub fn no_model(name: &str, known: &[&str]) -> Self {
        let name: String = name.chars().take(200).collect();
        let message = format!("no model {name:?}; there are: {}", known.join(", "));
        Self {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..Self::not_found(message)
        }
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// 408.
    pub fn too_slow() -> Self {
        let message = "the body did not arrive in time";
        Self::new(StatusCode::REQUEST_TIMEOUT, "timeout_error", message)
    }

    /// 429: later.
    pub fn too_many(message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("rate_limit_exceeded"), retry_after: Some(retry_after), ..error }
    }

    /// 503: loading or draining.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let error =
            Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message);
        Self { retry_after: Some(Duration::from_secs(1)), ..error }
    }

    /// 504: the deadline of a request has passed.
    pub fn deadline() -> Self {
        let message = "the deadline of the request has passed";
        let error = Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message);
        Self { code: Some("deadline_exceeded"), ..error }
    }

    /// 500: our fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// What the engine refuses, as the fault of a field; `text` is the one that has the text or its tokens.
    pub fn of_engine(error: &marlin_engine::EngineError, text: &str) -> Self {
        use marlin_engine::EngineError as E;
        let message = error.to_string();
        match error {
            E::PromptTooLong { .. } | E::ContextExceeded { .. } | E::TextTooLong { .. } => {
                Self { code: Some(CONTEXT_EXCEEDED), ..Self::invalid(text, message) }
            }
            E::EmptyPrompt | E::TooFewTokens { .. } => Self::invalid(text, message),
            E::Parameter { field, .. } | E::UnknownToken { field, .. } => {
                Self::invalid(field, message)
            }
            E::Pooling { .. } => Self::unsupported("pooling", message),
            _ => Self::internal(message),
        }
    }

    /// The inner object of OpenAI's shape.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            message: self.message.clone(),
            kind: self.kind.to_owned(),
            param: self.param.clone(),
            code: self.code.map(str::to_owned),
        }
    }

    /// The response with a body of another protocol.
    pub fn with_body(self, body: impl Serialize) -> Response {
        let mut response = (self.status, Json(body)).into_response();
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
            let milliseconds =
                HeaderValue::from(after.as_millis().min(u128::from(u64::MAX)) as u64);
            response.headers_mut().insert("retry-after-ms", milliseconds);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(axum::http::header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}

/// OpenAI's error.
#[derive(Debug, Clone, Serialize)]
pub struct ErrorBody {
    /// What is wrong and what to do about it.
    pub message: String,
    /// Class of error.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<String>,
}

/// OpenAI's error response.
#[derive(Debug, Clone, Serialize)]
pub struct ErrorResponse {
    /// The error.
    pub error: ErrorBody,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorResponse { error: self.body() };
        self.with_body(body)
    }
}
