//! Spans of requests, as a collector gets them; and collectors that are not there, refuse, or never answer.
//! `.ci/server/traces.py` holds what is sent to the schema of OTLP.

mod common;

use common::{Response, Running, Setup, read};
use marlin_server::{Config, Exporter, Tracer};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;

const CALLER: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// What a collector does with a request.
#[derive(Clone, Copy)]
enum Reply {
    Says(&'static str),
    /// Closes the connection.
    Closes,
    /// Keeps it open and says nothing.
    Hangs,
}

const OK: Reply = Reply::Says("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");

struct Collector {
    address: SocketAddr,
    /// Heads and bodies that came.
    got: Arc<Mutex<Vec<(String, Value)>>>,
}

impl Collector {
    /// Which replies so, and then well.
    fn start(replies: &[Reply]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let got = Arc::<Mutex<Vec<_>>>::default();
        let (all, mut replies) = (got.clone(), VecDeque::from(replies.to_vec()));
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let (mut head, mut line) = (String::new(), String::new());
                while reader.read_line(&mut line).unwrap_or(0) > 2 {
                    head.push_str(&std::mem::take(&mut line).to_lowercase());
                }
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
                let Some(length) = length else { continue };
                let mut body = vec![0; length.parse().unwrap()];
                reader.read_exact(&mut body).unwrap();
                all.lock().unwrap().push((head, serde_json::from_slice(&body).unwrap()));
                match replies.pop_front().unwrap_or(OK) {
                    Reply::Says(text) => stream.write_all(text.as_bytes()).unwrap(),
                    Reply::Closes => {}
                    Reply::Hangs => kept.push(stream),
                }
            }
        });
        Self { address, got }
    }

    /// Spans of everything that came, once there are so many.
    fn spans(&self, count: usize) -> Vec<Value> {
        let start = Instant::now();
        loop {
            let got = self.got.lock().unwrap();
            let spans: Vec<Value> = got.iter().flat_map(|(_, body)| spans_of(body)).collect();
            if spans.len() >= count {
                return spans;
            }
            drop(got);
            assert!(start.elapsed() < Duration::from_secs(10), "{} of {count}", spans.len());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn spans_of(body: &Value) -> Vec<Value> {
    let spans = &body["resourceSpans"][0]["scopeSpans"][0]["spans"];
    spans.as_array().unwrap().clone()
}

/// A server whose traces go to `address`; the second stops the exporter when dropped.
fn traced(address: SocketAddr) -> (Running, watch::Sender<bool>) {
    let (tracer, records) = Tracer::new();
    let headers = [("authorization".to_owned(), "Bearer t".to_owned())];
    let resource = [("deployment.environment.name".to_owned(), "test".to_owned())];
    let endpoint = format!("http://{address}");
    let exporter = Exporter::new(&endpoint, &headers, &resource, records).unwrap();
    let (stop, stopped) = watch::channel(false);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(exporter.run(stopped));
    });
    let config = Config { tracer: Some(tracer), ..Config::default() };
    (Setup { config, ..Setup::default() }.start(), stop)
}

fn chat(tokens: usize, stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": tokens, "ignore_eos": true,
        "stream": stream})
}

fn post(server: &Running, path: &str, headers: &str, body: &Value) -> Response {
    let headers = format!("content-type: application/json\r\n{headers}");
    read(server.send("POST", path, &headers, body.to_string().as_bytes()))
}

fn attribute<'a>(span: &'a Value, key: &str) -> &'a Value {
    let attributes = span["attributes"].as_array().unwrap();
    let found: Vec<_> = attributes.iter().filter(|attribute| attribute["key"] == key).collect();
    assert!(found.len() < 2, "{key} twice");
    found.first().map_or(&Value::Null, |attribute| &attribute["value"])
}

fn nanoseconds(span: &Value, field: &str) -> u64 {
    span[field].as_str().unwrap().parse().unwrap()
}

#[test]
fn a_request_is_a_span_with_its_stages_below_it() {
    let collector = Collector::start(&[]);
    let (server, _stop) = traced(collector.address);
    let headers =
        format!("traceparent: {CALLER}\r\ntracestate: vendor=1\r\nx-request-id: my-request\r\n");
    let response = post(&server, "/v1/chat/completions", &headers, &chat(5, true));
    assert_eq!(response.status, 200);
    let spans = collector.spans(4);
    let [own, queue, prefill, decode] = &spans[..] else { panic!("{spans:#?}") };
    assert_eq!((&own["name"], &own["kind"]), (&json!("chat first"), &json!(2)));
    assert_eq!(own["parentSpanId"], "b7ad6b7169203331");
    assert_eq!((&own["flags"], own.get("status")), (&json!(0x301), None));
    for (key, value) in [
        ("gen_ai.operation.name", json!({"stringValue": "chat"})),
        ("gen_ai.provider.name", json!({"stringValue": "marlin"})),
        ("gen_ai.request.model", json!({"stringValue": "first"})),
        ("gen_ai.response.model", json!({"stringValue": "first"})),
        ("gen_ai.request.max_tokens", json!({"intValue": "5"})),
        ("gen_ai.request.stream", json!({"boolValue": true})),
        ("gen_ai.request.id", json!({"stringValue": "my-request"})),
        ("gen_ai.usage.output_tokens", json!({"intValue": "5"})),
        (
            "gen_ai.response.finish_reasons",
            json!({"arrayValue": {"values": [{"stringValue": "length"}]}}),
        ),
        ("http.response.status_code", json!({"intValue": "200"})),
        ("url.path", json!({"stringValue": "/v1/chat/completions"})),
        ("error.type", Value::Null),
    ] {
        assert_eq!(attribute(own, key), &value, "{key}");
    }
    let input: u64 =
        attribute(own, "gen_ai.usage.input_tokens")["intValue"].as_str().unwrap().parse().unwrap();
    assert!(input > 1);
    let first = &attribute(own, "gen_ai.latency.time_to_first_token")["doubleValue"];
    assert!(first.as_f64().unwrap() > 0.0);
    assert_eq!(first, &attribute(own, "gen_ai.response.time_to_first_chunk")["doubleValue"]);
    for (span, name) in [(queue, "queue"), (prefill, "prefill"), (decode, "decode")] {
        assert_eq!((&span["name"], &span["kind"]), (&json!(name), &json!(1)));
        assert_eq!((&span["parentSpanId"], &span["flags"]), (&own["spanId"], &json!(0x101)));
        assert!(span["spanId"] != own["spanId"]);
    }
    for span in &spans {
        assert_eq!(span["traceId"], "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(span["traceState"], "vendor=1");
        assert_eq!(span["spanId"].as_str().unwrap().len(), 16);
    }
    let order = [
        nanoseconds(own, "startTimeUnixNano"),
        nanoseconds(queue, "startTimeUnixNano"),
        nanoseconds(queue, "endTimeUnixNano"),
        nanoseconds(prefill, "startTimeUnixNano"),
        nanoseconds(prefill, "endTimeUnixNano"),
        nanoseconds(decode, "startTimeUnixNano"),
        nanoseconds(decode, "endTimeUnixNano"),
        nanoseconds(own, "endTimeUnixNano"),
    ];
    assert!(order.is_sorted() && order[0] > 1_700_000_000_000_000_000, "{order:?}");
    let (head, body) = collector.got.lock().unwrap()[0].clone();
    assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
    for line in ["content-type: application/json", "authorization: bearer t", "host: 127.0.0.1:"] {
        assert!(head.contains(line), "{line}: {head}");
    }
    let resource = &body["resourceSpans"][0]["resource"];
    assert_eq!(attribute(resource, "service.name"), &json!({"stringValue": "marlin"}));
    assert_eq!(attribute(resource, "deployment.environment.name"), &json!({"stringValue": "test"}));
    let counted = || server.metric("marlin:traces_exported_total");
    let start = Instant::now();
    while counted() < 1.0 {
        assert!(start.elapsed() < Duration::from_secs(2));
    }
}

#[test]
fn failures_of_requests_are_told_and_what_callers_drop_is_not() {
    let collector = Collector::start(&[]);
    let (server, _stop) = traced(collector.address);
    // Not to be kept; not about a model.
    let unsampled = format!("traceparent: {}0\r\n", &CALLER[..CALLER.len() - 1]);
    assert_eq!(post(&server, "/v1/chat/completions", &unsampled, &chat(2, false)).status, 200);
    assert_eq!(post(&server, "/tokenize", "", &json!({"prompt": "a"})).status, 200);
    server.get("/v1/chat/completions");
    // A trace of its own, several prompts and answers in one span.
    let several =
        json!({"prompt": [[400, 401], [402]], "n": 2, "max_tokens": 3, "ignore_eos": true});
    assert_eq!(post(&server, "/v1/completions", "traceparent: nonsense\r\n", &several).status, 200);
    assert_eq!(post(&server, "/v1/embeddings", "", &json!({"input": "a mouse"})).status, 200);
    assert_eq!(post(&server, "/v1/messages", "", &json!({"max_tokens": 0})).status, 400);
    server.behaviour.fails.store(true, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(post(&server, "/v1/responses", "", &json!({"input": "Hi"})).status, 500);
    server.behaviour.pass_us.store(5000, std::sync::atomic::Ordering::Relaxed);
    let mut leaves = server.open("/v1/chat/completions", &chat(300, true));
    let mut some = [0; 400];
    leaves.read_exact(&mut some).unwrap();
    drop(leaves);
    server.idle(Duration::from_secs(2));
    let is_own = |span: &Value| span["kind"] == 2;
    let start = Instant::now();
    let own = loop {
        let own: Vec<Value> = collector.spans(1).into_iter().filter(is_own).collect();
        if own.len() >= 5 {
            break own;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{own:#?}");
    };
    let rows = [
        ("text_completion first", Value::Null),
        ("embeddings first", Value::Null),
        ("chat", json!({"stringValue": "400"})),
        ("chat first", json!({"stringValue": "500"})),
        ("chat first", json!({"stringValue": "cancelled"})),
    ];
    for ((name, kind), span) in rows.iter().zip(&own) {
        assert_eq!(
            (&span["name"], attribute(span, "error.type")),
            (&json!(name), kind),
            "{span:#}"
        );
        assert_eq!(span.get("status").is_some(), !kind.is_null());
        assert!(span.get("parentSpanId").is_none());
    }
    assert_eq!(own.len(), 5);
    assert_eq!(attribute(&own[0], "gen_ai.usage.input_tokens"), &json!({"intValue": "3"}));
    assert_eq!(attribute(&own[0], "gen_ai.usage.output_tokens"), &json!({"intValue": "12"}));
    let reasons = &attribute(&own[0], "gen_ai.response.finish_reasons")["arrayValue"]["values"];
    assert_eq!(reasons.as_array().unwrap().len(), 4);
    assert_eq!(attribute(&own[0], "gen_ai.request.choice.count"), &json!({"intValue": "2"}));
    assert!(own[3]["status"]["message"].as_str().unwrap().contains("on fire"), "{}", own[3]);
}

#[test]
fn a_collector_that_fails_for_a_while_is_asked_again() {
    let later = "HTTP/1.1 503 Busy\r\nretry-after: 0\r\ncontent-length: 0\r\n\r\n";
    let replies = [Reply::Closes, Reply::Says(later), Reply::Says("nonsense\r\n\r\n")];
    let collector = Collector::start(&replies);
    let (server, stop) = traced(collector.address);
    post(&server, "/v1/chat/completions", "", &chat(2, false));
    collector.spans(4 * 4);
    let got = collector.got.lock().unwrap().clone();
    assert!(got.iter().all(|(_, body)| *body == got[0].1), "the same again");
    // What it will never take is dropped.
    let collector = Collector::start(&[
        Reply::Says("HTTP/1.1 400 Bad\r\nconnection: close\r\n\r\n{\"message\": \"no\"}"),
        Reply::Says(
            "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{\"partialSuccess\": {\"rejectedSpans\": \"4\", \"errorMessage\":\"\"}}",
        ),
    ]);
    let (other, _stop) = traced(collector.address);
    for dropped in 1..=2 {
        post(&other, "/v1/chat/completions", "", &chat(2, false));
        let start = Instant::now();
        while other.metric("marlin:traces_dropped_total") < f64::from(dropped) {
            assert!(start.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    assert_eq!(other.metric("marlin:traces_exported_total"), 0.0);
    assert_eq!(server.metric("marlin:traces_exported_total"), 1.0);
    // The last spans are sent when the server ends.
    post(&server, "/v1/chat/completions", "", &chat(2, false));
    stop.send(true).unwrap();
    let start = Instant::now();
    while server.metric("marlin:traces_exported_total") < 2.0 {
        assert!(start.elapsed() < Duration::from_millis(900), "it does not wait for others");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn no_request_waits_for_a_collector() {
    let collector = Collector::start(&[Reply::Hangs; 8]);
    let (server, _stop) = traced(collector.address);
    post(&server, "/v1/chat/completions", "", &chat(2, false));
    collector.spans(1);
    // The queue is full soon; requests are refused as fast as before.
    let start = Instant::now();
    for _ in 0..2500 {
        assert_eq!(post(&server, "/v1/chat/completions", "", &json!({})).status, 400);
    }
    assert!(server.metric("marlin:traces_dropped_total") >= 2500.0 - 2048.0);
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    assert_eq!(post(&server, "/v1/chat/completions", "", &chat(2, false)).status, 200);
    // Nobody listens there.
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (server, _stop) = traced(gone);
    for _ in 0..3 {
        assert_eq!(post(&server, "/v1/chat/completions", "", &chat(2, false)).status, 200);
    }
}

#[test]
fn addresses_of_collectors_are_checked() {
    let make = |endpoint: &str, headers: &[(String, String)]| {
        Exporter::new(endpoint, headers, &[], Tracer::new().1).map(drop)
    };
    for good in [
        "http://localhost:4318",
        "https://otel.example/",
        "http://[::1]:4318/v1/traces",
        "http://a/b",
    ] {
        assert_eq!(make(good, &[]), Ok(()), "{good}");
    }
    for bad in [
        "",
        "localhost:4318",
        "grpc://localhost:4317",
        "http://",
        "http://u:p@localhost",
        "/v1/traces",
    ] {
        let said = make(bad, &[]).unwrap_err();
        assert!(said.contains("no address of a collector"), "{bad}: {said}");
    }
    let header = [("a b".to_owned(), "secret".to_owned())];
    let said = make("http://localhost", &header).unwrap_err();
    assert!(said.contains("\"a b\"") && !said.contains("secret"), "{said}");
}
