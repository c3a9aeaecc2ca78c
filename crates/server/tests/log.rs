//! The line of a request in the log.

mod common;

use common::Setup;
use serde_json::json;
use std::fmt::{Debug, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Every event as a line of `name=value`.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0, "{}={value:?} ", field.name());
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("marlin_server")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        self.0.lock().unwrap().push(line.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn who_asked_stands_in_the_line_of_the_request() {
    let lines = Lines::default();
    tracing::subscriber::set_global_default(lines.clone()).unwrap();
    let server = Setup::default().start();
    let line_of = |path: &str, status: u16, mut body: serde_json::Value| {
        body["messages"] = json!([{"role": "user", "content": "Hi"}]);
        body["max_tokens"] = json!(2);
        assert_eq!(server.post(path, &body).status, status);
        let start = Instant::now();
        loop {
            let taken = std::mem::take(&mut *lines.0.lock().unwrap());
            if let Some(line) = taken.into_iter().find(|line| line.contains("path=")) {
                assert!(line.contains(&format!("status={status}")), "{line}");
                return line;
            }
            assert!(start.elapsed() < Duration::from_secs(5), "no line of {path}");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let chat = "/v1/chat/completions";
    let line = line_of(chat, 200, json!({"user": "ann\nforged", "metadata": {"job": "7"}}));
    assert!(
        line.contains(r#"user="ann\nforged""#) && line.contains(r#"{\"job\":\"7\"}"#),
        "{line}"
    );
    let line = line_of(chat, 400, json!({"safety_identifier": "bea", "n": 0}));
    assert!(line.contains("bea") && !line.contains("metadata"), "{line}");
    let line = line_of("/v1/messages", 200, json!({"metadata": {"user_id": "cyd"}}));
    assert!(line.contains("cyd"), "{line}");
    let line = line_of(chat, 200, json!({"user": "x".repeat(5000)}));
    assert!(line.len() < 2000 && !line.contains(&"x".repeat(1025)), "{line}");
    assert!(!line_of(chat, 200, json!({})).contains("user="));
}
