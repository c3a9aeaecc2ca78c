//! Bodies in, streams out.

use super::{Guard, Server, notes};
use crate::answer::Answers;
use crate::protocol::{Encoder, Streaming};
use crate::{ApiError, Fields, trace};
use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::Response;
use futures_core::Stream;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, Sleep, sleep, timeout};

/// Bodies up to this size are parsed where they arrive.
const SMALL: usize = 64 << 10;

impl Server {
    /// The fields of a JSON body.
    ///
    /// # Errors
    /// When it is no JSON object, too large or too slow.
    pub(super) async fn fields(&self, headers: &HeaderMap, body: Body) -> Result<Fields, ApiError> {
        let kind =
            headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        // Anything else a web page could send here without being asked.
        if !kind
            .split(';')
            .next()
            .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
        {
            let error = ApiError::invalid("content-type", "send content-type: application/json");
            return Err(ApiError {
                status: StatusCode::UNSUPPORTED_MEDIA_TYPE,
                param: None,
                ..error
            });
        }
        let limit = self.config.max_body_bytes;
        let read = timeout(self.config.body_timeout, axum::body::to_bytes(body, limit)).await;
        let bytes = read.map_err(|_| ApiError::too_slow())?.map_err(|error| {
            use std::error::Error;
            let over = error.source().is_some_and(|e| e.is::<http_body_util::LengthLimitError>());
            match over {
                true => ApiError::too_large(limit),
                false => ApiError { param: None, ..ApiError::invalid("", "the body broke off") },
            }
        })?;
        let fields = match bytes.len() {
            ..=SMALL => Fields::parse(&bytes),
            _ => blocking(move || Fields::parse(&bytes)).await,
        }?;
        notes::note(&fields);
        Ok(fields.within(self.config.limits))
    }
}

/// Runs what would keep others waiting somewhere else.
///
/// # Errors
/// Those of `work`, and when it panics.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::internal("the request could not be worked on")),
    }
}

/// Texts that are read beside answers, one at a time.
pub(super) struct Readers {
    turn: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

/// Says that nobody waits any more when it is dropped.
struct Waiting(Arc<AtomicBool>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Readers {
    /// As many as `most` read, or wait to.
    pub(super) fn new(most: usize) -> Self {
        Self { turn: Arc::new(Semaphore::new(1)), places: Arc::new(Semaphore::new(most)) }
    }

    /// [`blocking`] when it is the request's turn. `work` asks between its parts whether the client has left.
    ///
    /// # Errors
    /// Those of `work`, and when too many wait.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Fn() -> Result<(), ApiError>) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let full = || ApiError::too_many("too many texts wait to be read", Duration::from_secs(1));
        let place = self.places.clone().try_acquire_owned().map_err(|_| full())?;
        let turn = self.turn.clone().acquire_owned().await.map_err(|_| full())?;
        let left = Arc::new(AtomicBool::new(false));
        let waiting = Waiting(left.clone());
        let result = blocking(move || {
            let _held = (place, turn);
            work(&|| match left.load(Ordering::Relaxed) {
                false => Ok(()),
                true => Err(ApiError::internal("the client has left")),
            })
        });
        let result = result.await;
        drop(waiting);
        result
    }
}

/// The response that streams answers.
pub(super) fn stream(server: Arc<Server>, guard: Option<Guard>, streaming: Streaming) -> Response {
    if let Some(span) = trace::current() {
        span.streams();
    }
    let Streaming { answers, mut encoder } = streaming;
    let mut first = Vec::new();
    encoder.begin(&mut first);
    let keep_alive = server.config.keep_alive;
    let events = Events {
        answers: Box::new(answers),
        encoder,
        first,
        ended: false,
        silence: Box::pin(sleep(keep_alive)),
        server,
        _guard: guard,
    };
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies are not to collect it.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Events of a stream, those that come together in one piece.
struct Events {
    answers: Box<Answers>,
    encoder: Box<dyn Encoder>,
    first: Vec<u8>,
    ended: bool,
    silence: Pin<Box<Sleep>>,
    server: Arc<Server>,
    _guard: Option<Guard>,
}

impl Stream for Events {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let mut out = std::mem::take(&mut this.first);
        loop {
            let next = std::pin::pin!(this.answers.next()).poll(context);
            match next {
                Poll::Ready(Some(piece)) => this.encoder.piece(piece, &mut out),
                Poll::Ready(None) => {
                    this.ended = true;
                    this.encoder.end(&mut out);
                    break;
                }
                Poll::Pending => break,
            }
        }
        let keep_alive = this.server.config.keep_alive;
        if out.is_empty() {
            if this.silence.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            out.extend_from_slice(b": still here\n\n");
        }
        this.silence.as_mut().reset(Instant::now() + keep_alive);
        Poll::Ready(Some(Ok(out.into())))
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if !self.ended {
            self.server.metrics.disconnected();
        }
    }
}
