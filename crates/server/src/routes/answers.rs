//! Requests that are answered by a model.

use super::body::{blocking, stream};
use super::{Guard, Server};
use crate::answer::whole;
use crate::generate::{Generate, Running};
use crate::models::Served;
use crate::protocol::chat::{self, ChatRequest};
use crate::protocol::completion::{self, CompletionRequest};
use crate::protocol::{Streaming, detokenize};
use crate::{ApiError, Piece, trace};
use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;
use std::time::Instant;

impl Server {
    /// Puts a request to a model; its answers are measured from `start` on.
    ///
    /// # Errors
    /// When the model does not take it.
    pub(super) async fn submit(
        &self,
        served: &Arc<Served>,
        generate: Generate,
        start: Instant,
    ) -> Result<Running, ApiError> {
        let (n, max_tokens) = (generate.choosing.n, generate.choosing.max_tokens);
        let span = trace::current();
        if let Some(span) = &span {
            span.asks(&served.id, n, max_tokens);
        }
        let model = served.clone();
        let running = blocking(move || generate.submit(&model)).await?;
        if let Some(span) = &span {
            span.waits(n, running.answers.begun());
        }
        let mut meter = self.metrics.meter(served, start, (n, max_tokens), &running);
        let answers = running.answers.observed(move |piece: &Piece| {
            meter.piece(piece);
            if let Some(span) = &span {
                span.piece(piece);
            }
        });
        Ok(Running { answers, ..running })
    }
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat(
    State(server): State<Arc<Server>>,
    guard: Option<Extension<Guard>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let start = Instant::now();
    let ChatRequest { model, generate, wants } =
        ChatRequest::parse(server.fields(&headers, body).await?)?;
    let served = server.models.get(model.as_deref()).await?;
    let (n, logprobs) = (generate.choosing.n, generate.choosing.logprobs.is_some());
    let Running { answers, .. } = server.submit(&served, generate, start).await?;
    if wants.stream {
        let encoder = Box::new(chat::Stream::new(&served, n, wants.usage, logprobs));
        let guard = guard.map(|Extension(guard)| guard);
        return Ok(stream(server, guard, Streaming { answers, encoder }));
    }
    let answers = whole(answers).await?;
    Ok(Json(chat::response(&served, &answers, logprobs)).into_response())
}

/// `POST /v1/completions`.
pub(super) async fn completions(
    State(server): State<Arc<Server>>,
    guard: Option<Extension<Guard>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let start = Instant::now();
    let request = CompletionRequest::parse(server.fields(&headers, body).await?)?;
    let CompletionRequest { model, generate, n, echo, logprobs, wants } = request;
    let served = server.models.get(model.as_deref()).await?;
    if wants.stream && generate.len() > 1 {
        let message = "several prompts are not streamed; send one, or stream: false";
        return Err(ApiError::unsupported("prompt", message));
    }
    let mut running = Vec::with_capacity(generate.len());
    for generate in generate {
        let Running { answers, prompt, .. } = server.submit(&served, generate, start).await?;
        let text = if echo { detokenize(&served.tokenizer, &prompt)? } else { String::new() };
        running.push((text, answers));
    }
    if wants.stream
        && let Some((text, answers)) = running.pop()
    {
        let encoder = Box::new(completion::Stream::new(served, n, text, wants.usage, logprobs));
        let guard = guard.map(|Extension(guard)| guard);
        return Ok(stream(server, guard, Streaming { answers, encoder }));
    }
    let mut answers = Vec::with_capacity(running.len());
    for (text, running) in running {
        answers.push((text, whole(running).await?));
    }
    Ok(Json(completion::response(&served, &answers, logprobs)).into_response())
}
