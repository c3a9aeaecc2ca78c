//! What may go wrong, and that others do not notice.

mod common;

use common::{Running, Setup};
use marlin_engine::EngineOptions;
use marlin_server::{Config, ModelLimits, QueueLimits};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Blocks are to be free this long after a client has gone.
const FREED: Duration = Duration::from_millis(250);

fn chat(text: &str, tokens: usize, stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0,
        "ignore_eos": true, "stream": stream})
}

fn slow(server: &Running, pass: Duration) {
    server.behaviour.pass_us.store(pass.as_micros() as u64, Ordering::Relaxed);
}

/// Sends a request and reads the beginning of what comes, if `reads`.
fn begin(server: &Running, body: &Value, reads: bool) -> TcpStream {
    let mut stream = server.open("/v1/chat/completions", body);
    if reads {
        let mut some = [0; 600];
        let _ = stream.read(&mut some);
    }
    stream
}

fn answer(server: &Running, body: &Value) -> String {
    let response = server.post("/v1/chat/completions", body);
    assert_eq!(response.status, 200, "{}", response.body);
    match body["stream"] == true {
        true => response.streamed()[&0].0.clone(),
        false => response.json()["choices"][0]["message"]["content"].as_str().unwrap().to_owned(),
    }
}

/// Two hundred, each of which frees its blocks in time: while its answer streams, while its prompt is read, while it waits for
/// a whole answer.
#[test]
fn clients_that_leave_free_their_blocks_at_once() {
    let options = EngineOptions {
        max_context: Some(2048),
        num_blocks: Some(4 * 128),
        prefill_chunk: 32,
        mixed_chunk: 32,
        max_batch: 16,
        ..EngineOptions::default()
    };
    let server = Setup { options, ..Setup::default() }.start();
    slow(&server, Duration::from_millis(4));
    let served = server.server.models.loaded(0).unwrap();
    let (mut prefills, mut streams) = (0, 0);
    for round in 0..200u64 {
        let text = format!("{round} {}", "word ".repeat(1200));
        let (body, reads) = match round % 3 {
            0 => (chat(&format!("Hi {round}"), 400, true), true),
            1 => (chat(&text, 100, true), false),
            _ => (chat(&format!("Ho {round}"), 400, false), false),
        };
        let before = served.runtime.stats();
        let stream = begin(&server, &body, reads);
        let begun = Instant::now();
        while served.runtime.stats().running == 0 {
            assert!(begun.elapsed() < Duration::from_secs(5), "round {round} never began");
            std::thread::sleep(Duration::from_micros(200));
        }
        std::thread::sleep(Duration::from_millis(round % 7));
        let now = served.runtime.stats();
        // 1,200 tokens take 38 steps of 4 ms.
        prefills += u64::from(round % 3 == 1 && now.prompt_rows - before.prompt_rows < 1000);
        streams += u64::from(reads);
        let _ = stream.shutdown(Shutdown::Both);
        drop(stream);
        server.idle(FREED);
    }
    assert_eq!(prefills, 67, "every long prompt was being read");
    // All at once, while prompts are read.
    let open: Vec<_> = (0..12)
        .map(|i| {
            begin(&server, &chat(&format!("{i} {}", "word ".repeat(300)), 100, i % 2 == 0), false)
        })
        .collect();
    std::thread::sleep(Duration::from_millis(20));
    assert!(served.runtime.stats().running > 1);
    drop(open);
    server.idle(FREED);
    assert_eq!(answer(&server, &chat("Hi", 8, false)), answer(&server, &chat("Hi", 8, true)));
    assert!(server.metric("marlin:disconnects_total") >= (streams + 67) as f64);
}

/// The answers of 32 clients at once are those that each gets alone; also when the cache holds a quarter of
/// what they want.
#[test]
fn company_and_a_small_cache_change_no_answer() {
    const ANSWER: usize = 200;
    let bodies: Vec<Value> = (0..32)
        .map(|i| chat(&format!("{i} {}", "tell me more ".repeat(i * 2)), ANSWER, true))
        .collect();
    let start = |blocks| {
        let options = EngineOptions {
            max_context: Some(512),
            num_blocks: Some(blocks),
            mixed_chunk: 32,
            max_batch: 32,
            ..EngineOptions::default()
        };
        Setup { options, ..Setup::default() }.start()
    };
    let serial = start(32 * 32);
    let alone: Vec<String> = bodies.iter().map(|body| answer(&serial, body)).collect();
    // Blocks of all prompts and answers, none of them shared.
    let blocks = |body: &Value| {
        let tokens = serial.post("/tokenize", &json!({"messages": body["messages"]})).json();
        (tokens["count"].as_u64().unwrap() as usize + ANSWER).div_ceil(16)
    };
    let demand: usize = bodies.iter().map(blocks).sum();
    for pool in [32 * 32, demand / 4] {
        // Another server, so that nothing is known from before.
        let server = start(pool);
        slow(&server, Duration::from_micros(500));
        let together: Vec<String> = std::thread::scope(|scope| {
            let clients: Vec<_> =
                bodies.iter().map(|body| scope.spawn(|| answer(&server, body))).collect();
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        assert_eq!(together, alone, "{pool} blocks of {demand}");
        server.idle(FREED);
        let preempted = server.metric("vllm:num_preemptions_total") > 0.0;
        assert_eq!(preempted, pool < demand, "{pool} blocks of {demand}");
    }
}

#[test]
fn a_panic_in_the_engine_costs_the_answers_under_way_and_no_more() {
    let server = Setup::default().start();
    slow(&server, Duration::from_millis(2));
    let streaming = begin(&server, &chat("Hi", 300, true), true);
    server.behaviour.panics.store(true, Ordering::Relaxed);
    let rest = read_rest(streaming);
    assert!(rest.contains("\"error\"") && rest.contains("send the request again"), "{rest}");
    assert!(rest.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "the stream ends cleanly: {rest}");
    answer(&server, &chat("Hi", 5, false));
    assert_eq!(server.metric("marlin:engine_restarts_total"), 1.0);
    // Again at once: it is given up, told, and loaded anew for the next request.
    server.behaviour.panics.store(true, Ordering::Relaxed);
    let lost = server.post("/v1/chat/completions", &chat("Hi", 5, false));
    assert_eq!(lost.status, 500);
    answer(&server, &chat("Hi", 5, false));
}

fn read_rest(mut stream: TcpStream) -> String {
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn a_step_that_fails_is_told() {
    let server = Setup::default().start();
    server.behaviour.fails.store(true, Ordering::Relaxed);
    let failed = server.post("/v1/chat/completions", &chat("Hi", 5, false));
    assert_eq!(failed.status, 500);
    assert!(failed.body.contains("the device is on fire"));
    answer(&server, &chat("Hi", 5, false));
    server.idle(FREED);
}

#[test]
fn deadlines_end_requests() {
    let server = Setup::default().start();
    slow(&server, Duration::from_millis(5));
    let mut body = chat("Hi", 400, false);
    body["timeout"] = json!(0.1);
    let start = Instant::now();
    let late = server.post("/v1/chat/completions", &body);
    assert_eq!((late.status, &late.json()["error"]["code"]), (504, &json!("deadline_exceeded")));
    assert!(start.elapsed() < Duration::from_secs(1));
    server.idle(FREED);
}

#[test]
fn a_full_queue_says_so_and_when_to_come_back() {
    let queue = QueueLimits { answers: 2, ..QueueLimits::default() };
    let limits = ModelLimits { queue, ..ModelLimits::default() };
    let options =
        EngineOptions { max_batch: 2, max_context: Some(512), ..EngineOptions::default() };
    let server = Setup { limits, options, ..Setup::default() }.start();
    slow(&server, Duration::from_millis(3));
    let open: Vec<_> = (0..4).map(|_| begin(&server, &chat("Hi", 400, true), false)).collect();
    std::thread::sleep(Duration::from_millis(100));
    let refused = server.post("/v1/chat/completions", &chat("Hi", 5, false));
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.headers.contains_key("retry-after"));
    drop(open);
    server.idle(Duration::from_secs(1));
    answer(&server, &chat("Hi", 5, false));
}

#[test]
fn while_loading_it_says_so() {
    let server =
        Setup { load_time: Duration::from_millis(600), wait: false, ..Setup::default() }.start();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(server.get("/ready").status, 503);
    assert_eq!(server.get("/health").json()["status"], "loading");
    let early = server.post("/v1/chat/completions", &chat("Hi", 5, false));
    assert_eq!(early.status, 503);
    assert!(early.headers.contains_key("retry-after"));
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(server.get("/ready").status, 200);
    answer(&server, &chat("Hi", 5, false));
}

#[test]
fn told_to_stop_it_lets_answers_end() {
    let server = Setup::default().start();
    slow(&server, Duration::from_millis(3));
    let streaming = begin(&server, &chat("Hi", 100, true), true);
    server.stop.send(1).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(server.get("/ready").status, 503);
    assert_eq!(server.get("/health").json()["status"], "draining");
    let late = server.post("/v1/chat/completions", &chat("Hi", 5, false));
    assert_eq!(late.status, 503, "{}", late.body);
    let rest = read_rest(streaming);
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("[DONE]"), "{rest}");
    std::thread::sleep(Duration::from_millis(300));
    assert!(server.finished.load(Ordering::SeqCst));
    assert!(TcpStream::connect(server.address).is_err());
}

#[test]
fn told_twice_it_stops_at_once() {
    let server = Setup::default().start();
    slow(&server, Duration::from_millis(5));
    let streaming = begin(&server, &chat("Hi", 450, true), true);
    server.stop.send(2).unwrap();
    let start = Instant::now();
    let rest = read_rest(streaming);
    assert!(start.elapsed() < Duration::from_secs(1) && !rest.contains("[DONE]"));
}

#[test]
fn connections_that_dawdle_leave_others_alone() {
    let config = Config {
        header_timeout: Duration::from_millis(700),
        body_timeout: Duration::from_millis(700),
        ..Config::default()
    };
    let server = Setup { config, ..Setup::default() }.start();
    let time = |server: &Running| {
        let mut times: Vec<f64> = (0..9)
            .map(|_| {
                let start = Instant::now();
                answer(server, &chat("Hi", 8, false));
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[4]
    };
    // Eight tokens at 4 ms, so that the bound is about the server and not about the clock.
    slow(&server, Duration::from_millis(4));
    let before = time(&server);
    assert!(before > 0.02, "{before} s");
    let dawdlers: Vec<TcpStream> = (0..500)
        .map(|i| {
            let mut stream = server.connect();
            let half: &[u8] = match i % 2 {
                0 => b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n",
                _ => b"POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{",
            };
            stream.write_all(half).unwrap();
            stream
        })
        .collect();
    let beside = time(&server);
    assert!(beside < 2.0 * before, "{before} s before, {beside} s beside 500 slow connections");
    std::thread::sleep(Duration::from_millis(1500));
    let mut closed = 0;
    for mut stream in dawdlers {
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut rest = Vec::new();
        closed += usize::from(stream.read_to_end(&mut rest).is_ok());
    }
    assert_eq!(closed, 500, "each was closed");
}

#[test]
fn a_long_prompt_holds_others_up_by_a_step_only() {
    let options = EngineOptions {
        max_context: Some(4096),
        num_blocks: Some(1024),
        prefill_chunk: 256,
        mixed_chunk: 32,
        max_batch: 8,
        ..EngineOptions::default()
    };
    let server = Setup { options, ..Setup::default() }.start();
    slow(&server, Duration::from_millis(2));
    let talking = begin(&server, &chat("Hi", 400, true), true);
    let long = begin(&server, &chat(&"word ".repeat(1500), 4, false), false);
    let start = Instant::now();
    answer(&server, &chat("Short", 5, false));
    assert!(
        start.elapsed() < Duration::from_millis(200),
        "a short one waits {:?}",
        start.elapsed()
    );
    drop((talking, long));
    server.idle(Duration::from_secs(1));
}
