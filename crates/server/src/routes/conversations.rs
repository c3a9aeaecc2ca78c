//! Requests that are answered by a model, in Anthropic's protocol and in OpenAI's responses.

use super::body::{blocking, stream};
use super::{Guard, Server};
use crate::answer::{Whole, whole};
use crate::generate::Running;
use crate::protocol::Streaming;
use crate::protocol::messages::{self, MessagesRequest};
use crate::protocol::responses::{self, ResponsesRequest};
use crate::{Answers, ApiError};
use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use std::sync::Arc;
use std::time::Instant;

/// The one answer to a request.
async fn one(answers: Answers) -> Result<Whole, ApiError> {
    let answer = whole(answers).await?.pop();
    answer.ok_or_else(|| ApiError::internal("there was no answer"))
}

/// An error in Anthropic's shape.
pub(super) struct AnthropicError(pub ApiError);

impl From<ApiError> for AnthropicError {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for AnthropicError {
    fn into_response(self) -> Response {
        let body = messages::error_body(&self.0);
        self.0.with_body(body)
    }
}

/// `POST /v1/messages`.
pub(super) async fn messages(
    State(server): State<Arc<Server>>,
    guard: Option<Extension<Guard>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, AnthropicError> {
    let start = Instant::now();
    let request = MessagesRequest::parse(server.fields(&headers, body).await?)?;
    let served = server.models.get(request.model.as_deref()).await?;
    let Running { answers, prompt, .. } = server.submit(&served, request.generate, start).await?;
    if request.stream {
        let encoder = messages::Stream::new(&served, prompt.len(), request.one_call);
        let streaming = Streaming { answers, encoder: Box::new(encoder) };
        return Ok(stream(server, guard.map(|Extension(guard)| guard), streaming));
    }
    let answer = one(answers).await?;
    Ok(Json(messages::response(&served, &answer, request.one_call)).into_response())
}

/// `POST /v1/messages/count_tokens`.
pub(super) async fn count_tokens(
    State(server): State<Arc<Server>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Value>, AnthropicError> {
    let request = MessagesRequest::parse_for_count(server.fields(&headers, body).await?)?;
    let served = server.models.get(request.model.as_deref()).await?;
    let (tokens, _) = blocking(move || request.generate.prompt(&served)).await?;
    Ok(Json(messages::count_response(tokens.len())))
}

/// `POST /v1/responses`.
pub(super) async fn responses(
    State(server): State<Arc<Server>>,
    guard: Option<Extension<Guard>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let start = Instant::now();
    let request = ResponsesRequest::parse(server.fields(&headers, body).await?)?;
    let served = server.models.get(request.model.as_deref()).await?;
    let Running { answers, .. } = server.submit(&served, request.generate, start).await?;
    if request.stream {
        let encoder = Box::new(responses::Stream::new(&served, request.echo));
        let guard = guard.map(|Extension(guard)| guard);
        return Ok(stream(server, guard, Streaming { answers, encoder }));
    }
    let answer = one(answers).await?;
    Ok(Json(responses::response(&served, request.echo, &answer)).into_response())
}
