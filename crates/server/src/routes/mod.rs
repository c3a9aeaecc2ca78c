//! Paths, and what every request goes through before it gets to them.

mod answers;
mod body;
mod conversations;
mod information;
mod listener;
mod notes;
mod openapi;
mod page;
mod text;

pub use listener::Listening;
pub(crate) use text::read_fields;

use crate::auth::Keys;
use crate::metrics::Metrics;
use crate::trace::{self, Span, TraceContext, Tracer};
use crate::{ApiError, Models, RequestLimits};
use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_MAX_AGE, HOST, ORIGIN, VARY,
};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Limits and manners of a server.
#[derive(Debug, Clone)]
pub struct Config {
    /// Largest body, bytes.
    pub max_body_bytes: usize,
    /// Time for a request's head to arrive.
    pub header_timeout: Duration,
    /// Time for a body to arrive.
    pub body_timeout: Duration,
    /// Silence after which a stream sends a comment.
    pub keep_alive: Duration,
    /// Time for answers to end once the server is told to stop.
    pub drain: Duration,
    /// Connections at once.
    pub max_connections: usize,
    /// Bytes of a request's head, 8 KiB at least.
    pub max_head_bytes: usize,
    /// Header fields of a request.
    pub max_header_fields: usize,
    /// Time for a connection without a request.
    pub idle_timeout: Duration,
    /// Texts that are read without being answered, or wait for it.
    pub max_readers: usize,
    /// How much a request may hold.
    pub limits: RequestLimits,
    /// Origins of web pages that may ask; `*` is every one.
    pub cors: Vec<String>,
    /// Names under which the server may be asked for; everything if empty. Keeps web pages from
    /// reaching a server on this machine through a name of their own.
    pub hosts: Vec<String>,
    /// Whether `/` is the web page.
    pub page: bool,
    /// What traces of requests are given to, if they are wanted.
    pub tracer: Option<Tracer>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_body_bytes: 32 << 20,
            header_timeout: Duration::from_secs(10),
            body_timeout: Duration::from_secs(30),
            keep_alive: Duration::from_secs(15),
            drain: Duration::from_secs(30),
            max_connections: 4096,
            max_head_bytes: 64 << 10,
            max_header_fields: 100,
            // Longer than that of usual proxies, which are to close first.
            idle_timeout: Duration::from_secs(75),
            max_readers: 64,
            limits: RequestLimits::default(),
            cors: Vec::new(),
            hosts: Vec::new(),
            page: true,
            tracer: None,
        }
    }
}

/// A server: models, limits, keys, measurements.
pub struct Server {
    /// The models.
    pub models: Arc<Models>,
    /// Limits and manners.
    pub config: Config,
    /// Who may ask.
    pub keys: Arc<Keys>,
    /// What is measured.
    pub metrics: Metrics,
    draining: AtomicBool,
    active: AtomicUsize,
    readers: body::Readers,
}

impl Server {
    /// A server that does not listen yet.
    pub fn new(models: Arc<Models>, config: Config, keys: Arc<Keys>) -> Arc<Self> {
        let (draining, active) = Default::default();
        let readers = body::Readers::new(config.max_readers);
        let metrics = Metrics::new();
        models.measure_steps(metrics.step_tokens());
        Arc::new(Self { models, config, keys, metrics, draining, active, readers })
    }

    /// Takes no new requests from now on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Whether it is about to stop.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Requests under way.
    pub fn active(&self) -> usize {
        self.active.load(Ordering::SeqCst)
    }

    /// Its paths. Whoever watches the process has no key, and the page is what a key is typed into;
    /// everything else is guarded, also what is no path.
    pub fn router(self: &Arc<Self>) -> Router {
        let add = |router: Router<Arc<Self>>, (path, method): Route| router.route(path, method);
        let guarded = guarded()
            .into_iter()
            .fold(Router::new(), add)
            .fallback(|| async { ApiError::not_found("no such path; they are in /openapi.json") })
            .method_not_allowed_fallback(other_method)
            .layer(from_fn_with_state(self.clone(), authorize));
        let open = open().into_iter().fold(Router::new(), add);
        let open = if self.config.page { open.merge(page::router()) } else { open };
        guarded
            .merge(open.method_not_allowed_fallback(other_method))
            .layer(from_fn_with_state(self.clone(), watch))
            .with_state(self.clone())
    }
}

type Route = (&'static str, MethodRouter<Arc<Server>>);

/// Paths that want a key where there are keys.
fn guarded() -> [Route; 17] {
    [
        ("/v1/chat/completions", post(answers::chat)),
        ("/v1/completions", post(answers::completions)),
        ("/v1/messages", post(conversations::messages)),
        ("/v1/messages/count_tokens", post(conversations::count_tokens)),
        ("/v1/responses", post(conversations::responses)),
        ("/v1/embeddings", post(text::embeddings)),
        ("/v1/models", get(information::models)),
        ("/v1/models/{*id}", get(information::model)),
        ("/v1/perplexity", post(text::perplexity)),
        ("/v1/perplexity/stats", get(text::perplexity_stats)),
        ("/tokenize", post(text::tokenize)),
        ("/detokenize", post(text::detokenize)),
        ("/apply-template", post(text::apply_template)),
        ("/metrics", get(information::metrics)),
        ("/version", get(information::version)),
        ("/openapi.json", get(openapi::document)),
        ("/docs", get(openapi::page)),
    ]
}

/// Paths that want none, beside the page.
fn open() -> [Route; 2] {
    [("/health", get(information::health)), ("/ready", get(information::ready))]
}

async fn other_method() -> ApiError {
    let error = ApiError::not_found("this path is asked with another method");
    ApiError { status: StatusCode::METHOD_NOT_ALLOWED, kind: "invalid_request_error", ..error }
}

/// Counts requests under way, whatever becomes of them.
struct Active(Arc<Server>);

impl Active {
    fn new(server: Arc<Server>) -> Self {
        server.active.fetch_add(1, Ordering::SeqCst);
        Self(server)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The outermost: host and origin, a name for the request, a line in the log.
async fn watch(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let given = request.headers().get("x-request-id").and_then(|id| id.to_str().ok());
    let plain =
        |id: &&str| !id.is_empty() && id.len() <= 128 && id.bytes().all(|b| b.is_ascii_graphic());
    let id = given.filter(plain).map_or_else(|| crate::protocol::new_id("req-"), str::to_owned);
    let caller = TraceContext::read(request.headers());
    let tracer = server.config.tracer.as_ref().filter(|_| method == Method::POST);
    let span = tracer.and_then(|tracer| Span::begin(tracer, &path, caller.as_ref(), &id));
    let origin = request.headers().get(ORIGIN).cloned();
    let notes = notes::Notes::default();
    let checked = check_head(&server, &request).and_then(|()| check_host(&server, &request));
    let mut response = match checked {
        Err(error) => error.into_response(),
        Ok(()) if method == Method::OPTIONS && origin.is_some() => {
            StatusCode::NO_CONTENT.into_response()
        }
        Ok(()) => notes::within(&notes, trace::within(span.clone(), next.run(request))).await,
    };
    let headers = response.headers_mut();
    if let Some(origin) = origin.filter(|origin| server.allows(origin)) {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(VARY, HeaderValue::from_static("origin"));
        let methods = HeaderValue::from_static("GET, POST, OPTIONS");
        headers.insert(ACCESS_CONTROL_ALLOW_METHODS, methods);
        let allowed = "authorization, content-type, x-api-key, x-request-id, anthropic-version, anthropic-beta";
        headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(allowed));
        headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert("x-request-id", value);
    }
    let status = response.status().as_u16();
    server.metrics.responded(known_path(&path), status);
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    let (trace, span_id) = match &span {
        Some(span) => {
            span.responded(status);
            let (trace, span) = span.ids();
            (Some(trace), Some(span))
        }
        None => (caller.map(|caller| caller.trace_id()), None),
    };
    let notes::Note { user, metadata } = notes::taken(&notes);
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(id, %method, path, status, milliseconds, trace, span_id, user, metadata)
        };
    }
    match status {
        500.. => line!(error),
        400.. => line!(info),
        _ => line!(debug),
    }
    response
}

impl Server {
    fn allows(&self, origin: &HeaderValue) -> bool {
        let origin = origin.to_str().unwrap_or_default();
        self.config.cors.iter().any(|allowed| allowed == "*" || allowed == origin)
    }
}

/// Bytes of a path with its query.
const PATH_BYTES: usize = 16 << 10;

/// What reads heads gives up where they are much too large, and counts in pieces; this is exact.
fn check_head(server: &Server, request: &Request) -> Result<(), ApiError> {
    let uri = request.uri();
    let path = uri.path().len() + uri.query().map_or(0, |query| query.len() + 1);
    let fields = request.headers().iter();
    // With what stands between name and value, and at the end.
    let bytes: usize =
        path + fields.map(|(name, value)| name.as_str().len() + value.len() + 4).sum::<usize>();
    let most = server.config.max_head_bytes;
    let (status, message) = match () {
        () if path > PATH_BYTES => {
            let message = format!("the path has {path} bytes, at most {PATH_BYTES} are read");
            (StatusCode::URI_TOO_LONG, message)
        }
        () if bytes > most => {
            let message = format!("the head has {bytes} bytes, at most {most} are read");
            (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, message)
        }
        () => return Ok(()),
    };
    Err(ApiError { status, param: None, ..ApiError::invalid("", message) })
}

fn check_host(server: &Server, request: &Request) -> Result<(), ApiError> {
    if server.config.hosts.is_empty() {
        return Ok(());
    }
    let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    match server.config.hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(name)) {
        true => Ok(()),
        false => {
            let message = "this server is not asked for under that name; see --allowed-host";
            let error = ApiError::invalid("host", message);
            Err(ApiError { status: StatusCode::FORBIDDEN, ..error })
        }
    }
}

/// Paths as metrics call them; ids and wrong paths would be endless.
fn known_path(path: &str) -> &'static str {
    const KNOWN: [&str; 19] = [
        "/",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/perplexity",
        "/v1/perplexity/stats",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/metrics",
        "/health",
        "/ready",
        "/version",
        "/openapi.json",
        "/docs",
    ];
    KNOWN.into_iter().find(|known| *known == path).unwrap_or("other")
}

/// Keys and quotas.
async fn authorize(
    State(server): State<Arc<Server>>,
    mut request: Request,
    next: Next,
) -> Response {
    let name = match server.keys.check(request.headers()) {
        Ok(name) => name,
        Err(error) => return refuse(request.uri().path(), error),
    };
    if request.method().is_safe() {
        return next.run(request).await;
    }
    if server.is_draining() {
        return refuse(request.uri().path(), ApiError::unavailable("the server is about to stop"));
    }
    match server.keys.admit(name) {
        Ok(admitted) => {
            let guard = Guard { _held: Arc::new((admitted, Active::new(server))) };
            request.extensions_mut().insert(guard);
            next.run(request).await
        }
        Err(error) => refuse(request.uri().path(), error),
    }
}

/// An error in the shape of the protocol of a path.
fn refuse(path: &str, error: ApiError) -> Response {
    match path.starts_with("/v1/messages") {
        true => conversations::AnthropicError(error).into_response(),
        false => error.into_response(),
    }
}

/// Held until a request's answer is out: its share of the quota, and its place among those under way.
#[derive(Clone)]
pub(crate) struct Guard {
    _held: Arc<(crate::auth::Admitted, Active)>,
}

#[cfg(test)]
mod tests {
    use super::{guarded, known_path, open, openapi};
    use std::collections::BTreeSet;

    /// What goes by this list leaves no path out: keys, generated requests, metrics.
    #[test]
    fn every_path_is_described_and_counted() {
        let routes = guarded().into_iter().chain(open());
        let routes: BTreeSet<String> =
            routes.map(|(path, _)| path.replace("{*id}", "{id}")).collect();
        let mut described: BTreeSet<String> = openapi::paths().into_iter().collect();
        described.extend(["/docs", "/openapi.json"].map(str::to_owned));
        assert_eq!(described, routes);
        for path in routes.iter().filter(|path| !path.contains('{')) {
            assert_eq!(known_path(path), path);
        }
    }
}
