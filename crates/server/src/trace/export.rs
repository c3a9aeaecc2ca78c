//! Spans to a collector: OTLP over HTTP, as JSON (opentelemetry-proto, docs/specification.md).
//!
//! What the collector does not take for now is sent again, later and later; what it does not take then, or will never take, is
//! dropped and counted, as is what does not fit the queue meanwhile. The log says once that it fails and once that it works again.

use super::span::attributes_json;
use super::{Counted, Record};
use axum::body::Bytes;
use axum::http::header::{CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT};
use axum::http::uri::Scheme;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value, json};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

/// Requests whose spans go together, and how long the first of them waits for others.
const TOGETHER: usize = 128;
const WAIT: Duration = Duration::from_secs(1);
/// Time for the collector to take them.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is asked to, and the time between, which doubles.
const TRIES: u32 = 5;
const BACK_OFF: Duration = Duration::from_secs(1);
/// Longest time that a collector may ask to wait.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Bytes of its answer that are read.
const ANSWER: usize = 64 << 10;
/// Where collectors take traces, below their address.
const PATH: &str = "/v1/traces";
/// Name of this program in traces.
const NAME: &str = "marlin";

/// The other end of a [`Tracer`](super::Tracer).
pub struct Receiver {
    pub(super) records: mpsc::Receiver<Record>,
    pub(super) counts: Arc<Counted>,
}

/// Sends spans to a collector.
pub struct Exporter {
    uri: Uri,
    host: String,
    port: u16,
    tls: Option<TlsConnector>,
    headers: HeaderMap,
    resource: Value,
    received: Receiver,
    fails: bool,
}

/// What became of a request to the collector.
enum Outcome {
    Taken,
    /// It says so, and that asking again is no use.
    Refused(String),
    /// It may be asked again, perhaps after so long.
    Later(String, Option<Duration>),
}

impl fmt::Debug for Exporter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exporter").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl Exporter {
    /// To the collector at `endpoint`; `/v1/traces` is added where it is not there. `headers` go with every request; `resource`
    /// says what this process is, beside its name and version.
    ///
    /// # Errors
    /// When that is no address, or a header cannot be sent.
    pub fn new(
        endpoint: &str,
        headers: &[(String, String)],
        resource: &[(String, String)],
        received: Receiver,
    ) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{endpoint:?} is no address of a collector; expected http://HOST:4318 or https://HOST"
            )
        };
        let base = endpoint.trim().trim_end_matches('/');
        let whole = match base.ends_with(PATH) {
            true => base.to_owned(),
            false => format!("{base}{PATH}"),
        };
        let uri: Uri = whole.parse().map_err(|_| wrong())?;
        let authority = uri.authority().ok_or_else(wrong)?;
        let secure = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            _ => return Err(wrong()),
        };
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return Err(wrong());
        }
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        let port = authority.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let wrong = || format!("header {name:?} cannot be sent");
            let mut value = HeaderValue::from_str(value).map_err(|_| wrong())?;
            value.set_sensitive(true);
            map.insert(HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong())?, value);
        }
        let authority = HeaderValue::from_str(authority.as_str()).map_err(|_| wrong())?;
        map.insert(HOST, authority);
        map.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        map.insert(USER_AGENT, HeaderValue::from_static(crate::FINGERPRINT));
        let mut known = Map::new();
        known.insert("service.name".into(), NAME.into());
        known.insert("service.version".into(), env!("CARGO_PKG_VERSION").into());
        let instance = format!("{:032x}", rand::random::<u128>());
        known.insert("service.instance.id".into(), instance.into());
        known.insert("telemetry.sdk.name".into(), NAME.into());
        known.insert("telemetry.sdk.language".into(), "rust".into());
        known.insert("telemetry.sdk.version".into(), env!("CARGO_PKG_VERSION").into());
        known.extend(resource.iter().map(|(key, value)| (key.clone(), value.as_str().into())));
        let resource = attributes_json(&known);
        let tls = secure.then(tls);
        Ok(Self { uri, host, port, tls, headers: map, resource, received, fails: false })
    }

    /// Sends what comes until `stop` says so, or nobody can send any more; then what is left, once.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let mut records = Vec::new();
        loop {
            let going_on = tokio::select! {
                count = self.received.records.recv_many(&mut records, TOGETHER) => count > 0,
                () = told(&mut stop) => false,
            };
            if going_on && records.len() < TOGETHER {
                // Others are about to end as well.
                tokio::select! {
                    () = sleep(WAIT) => {}
                    () = told(&mut stop) => {}
                }
            }
            while records.len() < TOGETHER
                && let Ok(record) = self.received.records.try_recv()
            {
                records.push(record);
            }
            if !records.is_empty() {
                self.export(std::mem::take(&mut records), &mut stop).await;
            } else if !going_on {
                return;
            }
        }
    }

    async fn export(&mut self, records: Vec<Record>, stop: &mut watch::Receiver<bool>) {
        let count = records.len() as u64;
        let spans: Vec<Value> = records.into_iter().flat_map(|record| record.spans).collect();
        let scope = json!({"name": NAME, "version": env!("CARGO_PKG_VERSION")});
        let body = json!({"resourceSpans": [{
            "resource": {"attributes": self.resource},
            "scopeSpans": [{"scope": scope, "spans": spans}],
        }]});
        let body = Bytes::from(body.to_string());
        let mut wait = BACK_OFF;
        for attempt in 1..=TRIES {
            let outcome = match timeout(PATIENCE, self.post(body.clone())).await {
                Ok(outcome) => outcome,
                Err(_) => Outcome::Later(format!("no answer in {PATIENCE:?}"), None),
            };
            let (reason, asked) = match outcome {
                Outcome::Taken => {
                    self.received.counts.exported.fetch_add(count, Ordering::Relaxed);
                    if std::mem::take(&mut self.fails) {
                        tracing::info!(collector = %self.uri, "traces are exported again");
                    }
                    return;
                }
                Outcome::Refused(reason) => {
                    self.failed(&reason);
                    break;
                }
                Outcome::Later(reason, asked) => (reason, asked),
            };
            self.failed(&reason);
            if attempt == TRIES || *stop.borrow() {
                break;
            }
            // Not all servers at once.
            let wait_now = asked.unwrap_or(wait.mul_f64(rand::random_range(0.75..1.25)));
            wait *= 2;
            tokio::select! {
                () = sleep(wait_now) => {}
                () = told(stop) => {}
            }
        }
        self.received.counts.dropped.fetch_add(count, Ordering::Relaxed);
    }

    fn failed(&mut self, reason: &str) {
        if !std::mem::replace(&mut self.fails, true) {
            tracing::warn!(collector = %self.uri, reason, "traces are not exported");
        }
    }

    async fn post(&self, body: Bytes) -> Outcome {
        let later = |error: &dyn fmt::Display| Outcome::Later(error.to_string(), None);
        let stream = match TcpStream::connect((&*self.host, self.port)).await {
            Ok(stream) => stream,
            Err(error) => return later(&error),
        };
        let Some(tls) = &self.tls else { return self.speak(stream, body).await };
        let Ok(name) = ServerName::try_from(self.host.clone()) else {
            return Outcome::Refused(format!("{} is no name of a certificate", self.host));
        };
        match tls.connect(name, stream).await {
            Ok(stream) => self.speak(stream, body).await,
            Err(error) => later(&error),
        }
    }

    async fn speak(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        body: Bytes,
    ) -> Outcome {
        let later = |error: hyper::Error| Outcome::Later(error.to_string(), None);
        let (mut sender, connection) =
            match hyper::client::conn::http1::handshake(TokioIo::new(stream)).await {
                Ok(both) => both,
                Err(error) => return later(error),
            };
        let connection = tokio::spawn(connection);
        let path = self.uri.path_and_query().map_or(PATH, |path| path.as_str());
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = axum::http::Method::POST;
        // `new` has parsed it as part of a whole one.
        *request.uri_mut() = path.parse().unwrap_or_default();
        *request.headers_mut() = self.headers.clone();
        let outcome = match sender.send_request(request).await {
            Ok(response) => {
                let (status, headers) = (response.status(), response.headers().clone());
                let body = Limited::new(response.into_body(), ANSWER).collect().await;
                let body = body.map(|body| body.to_bytes()).unwrap_or_default();
                judge(status, &headers, &body)
            }
            Err(error) => later(error),
        };
        connection.abort();
        outcome
    }
}

/// What a collector's answer means.
fn judge(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Outcome {
    let said: Value = serde_json::from_slice(body).unwrap_or_default();
    let message = |pointer: &str| {
        let text = said.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        text.chars().take(200).collect::<String>()
    };
    match status.as_u16() {
        200..=299 => {
            let rejected = said.pointer("/partialSuccess/rejectedSpans");
            let count = rejected.and_then(|n| n.as_i64().or_else(|| n.as_str()?.parse().ok()));
            match count {
                Some(1..) => Outcome::Refused(format!(
                    "spans were rejected: {}",
                    message("/partialSuccess/errorMessage")
                )),
                _ => Outcome::Taken,
            }
        }
        429 | 502 | 503 | 504 => {
            let asked =
                headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            let asked = asked.map(|seconds| Duration::from_secs(seconds).min(LONGEST_WAIT));
            Outcome::Later(format!("status {status}"), asked)
        }
        _ => Outcome::Refused(format!("status {status} {}", message("/message")).trim().to_owned()),
    }
}

fn tls() -> TlsConnector {
    let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.into() };
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    Arc::new(config).into()
}

/// Returns once `stop` is true; never, if nobody can say so any more.
async fn told(stop: &mut watch::Receiver<bool>) {
    if stop.wait_for(|stop| *stop).await.is_err() {
        std::future::pending::<()>().await;
    }
}
