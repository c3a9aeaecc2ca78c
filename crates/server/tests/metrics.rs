//! What `/metrics` says after requests whose figures are known.

mod common;

use common::{Running, Setup, read};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The series of vLLM that routers and boards read, as they are exposed.
const NAMES: [(&str, &str); 28] = [
    ("num_requests_running", "gauge"),
    ("num_requests_waiting", "gauge"),
    ("kv_cache_usage_perc", "gauge"),
    ("gpu_cache_usage_perc", "gauge"),
    ("cache_config_info", "gauge"),
    ("num_preemptions", "counter"),
    ("prefix_cache_queries", "counter"),
    ("prefix_cache_hits", "counter"),
    ("prompt_tokens", "counter"),
    ("generation_tokens", "counter"),
    ("request_success", "counter"),
    ("time_to_first_token_seconds", "histogram"),
    ("inter_token_latency_seconds", "histogram"),
    ("time_per_output_token_seconds", "histogram"),
    ("request_time_per_output_token_seconds", "histogram"),
    ("e2e_request_latency_seconds", "histogram"),
    ("request_queue_time_seconds", "histogram"),
    ("request_prefill_time_seconds", "histogram"),
    ("request_decode_time_seconds", "histogram"),
    ("request_inference_time_seconds", "histogram"),
    ("iteration_tokens_total", "histogram"),
    ("request_prompt_tokens", "histogram"),
    ("request_prefill_kv_computed_tokens", "histogram"),
    ("request_generation_tokens", "histogram"),
    ("request_max_num_generation_tokens", "histogram"),
    ("request_params_n", "histogram"),
    ("request_params_max_tokens", "histogram"),
    ("num_requests_swapped", ""),
];

/// Value by series, without the name of the model.
fn samples(server: &Running) -> BTreeMap<String, f64> {
    let text = server.get("/metrics").body;
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let series = series.replace("model_name=\"first\"", "");
        let series = series.replace("{}", "").replace("{,", "{").replace(",}", "}");
        (series, value.parse().unwrap())
    };
    lines.map(sample).collect()
}

fn ask(tokens: usize, more: &Value) -> Value {
    let mut body = json!({"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": true});
    more.as_object().unwrap().iter().for_each(|(key, value)| body[key] = value.clone());
    body
}

#[test]
fn names_of_vllm_are_there_with_their_types_and_ours_beside_them() {
    let server = Setup::default().start();
    let text = server.get("/metrics").body;
    for (name, kind) in NAMES {
        let line = |by: &str| format!("# TYPE {by}:{name} {kind}\n");
        // What we never do is not pretended.
        assert_eq!(text.contains(&line("vllm")), !kind.is_empty(), "{name}");
        let ours = !kind.is_empty() && name != "gpu_cache_usage_perc";
        assert_eq!(text.contains(&line("marlin")), ours, "{name}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn figures_of_requests_are_those_of_their_answers() {
    let server = Setup::default().start();
    server.behaviour.pass_us.store(3000, Ordering::Relaxed);
    let first = server.post("/v1/completions", &ask(6, &json!({})));
    assert_eq!(first.status, 200, "{}", first.body);
    let prompt = first.json()["usage"]["prompt_tokens"].as_f64().unwrap();
    let more = json!({"n": 3, "temperature": 1, "stream": true});
    assert_eq!(server.post("/v1/completions", &ask(9, &more)).status, 200);
    server.idle(Duration::from_secs(1));
    let found = samples(&server);
    let rows = [
        ("request_success_total{finished_reason=\"length\"}", 4.0),
        ("request_generation_tokens_count", 4.0),
        ("request_generation_tokens_sum", 6.0 + 3.0 * 9.0),
        ("generation_tokens_total", 6.0 + 3.0 * 9.0),
        ("request_max_num_generation_tokens_count", 2.0),
        ("request_max_num_generation_tokens_sum", 15.0),
        ("request_params_n_sum", 4.0),
        ("request_params_max_tokens_count", 2.0),
        ("request_params_max_tokens_sum", 15.0),
        ("request_prompt_tokens_sum", 2.0 * prompt),
        ("request_queue_time_seconds_count", 4.0),
        ("request_prefill_time_seconds_count", 4.0),
        ("request_decode_time_seconds_count", 4.0),
        ("request_inference_time_seconds_count", 4.0),
        ("e2e_request_latency_seconds_count", 4.0),
        ("time_to_first_token_seconds_count", 4.0),
        ("inter_token_latency_seconds_count", 5.0 + 3.0 * 8.0),
        ("request_time_per_output_token_seconds_count", 4.0),
    ];
    for (name, expected) in rows {
        for by in ["vllm", "marlin"] {
            assert_eq!(found.get(&format!("{by}:{name}")), Some(&expected), "{by}:{name}");
        }
    }
    let value = |name: &str| found[&format!("vllm:{name}")];
    let hits = value("prefix_cache_hits_total");
    assert_eq!(value("request_prefill_kv_computed_tokens_sum"), 2.0 * prompt - hits);
    // The last token of an answer is not computed; prompts that are cached are not either.
    let computed = value("iteration_tokens_total_sum");
    assert!((2.0 * prompt - hits..=2.0 * prompt + 33.0).contains(&computed), "{computed}");
    assert!(value("iteration_tokens_total_count") >= 6.0 + 9.0 - 2.0);
    // A pass takes three milliseconds: one or more reads the prompt, five and eight write the answers.
    assert!(value("request_prefill_time_seconds_sum") >= 4.0 * 0.003);
    let decode = value("request_decode_time_seconds_sum");
    assert!((0.003 * (5.0 + 3.0 * 8.0) * 0.9..2.0).contains(&decode), "{decode}");
    let parts = value("request_prefill_time_seconds_sum") + decode;
    let inference = value("request_inference_time_seconds_sum");
    assert!((inference - parts).abs() < 1e-6, "{inference} is {parts}");
    let queued = value("request_queue_time_seconds_sum");
    assert!(queued + inference <= value("e2e_request_latency_seconds_sum"), "{queued}");
}

#[test]
fn answers_that_were_given_up_and_waits_are_told() {
    let server = Setup::default().start();
    server.behaviour.pass_us.store(2000, Ordering::Relaxed);
    // One is streamed, one is whole, of three answers.
    let streamed = server.open("/v1/completions", &ask(400, &json!({"stream": true})));
    let whole = server.open("/v1/completions", &ask(400, &json!({"n": 3, "temperature": 1})));
    std::thread::sleep(Duration::from_millis(60));
    for stream in [streamed, whole] {
        stream.shutdown(Shutdown::Both).unwrap();
    }
    server.idle(Duration::from_secs(1));
    let aborted = "vllm:request_success_total{finished_reason=\"abort\"}";
    let begun = std::time::Instant::now();
    while samples(&server).get(aborted) != Some(&4.0) {
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", samples(&server).get(aborted));
        std::thread::sleep(Duration::from_millis(5));
    }
    // What is refused is neither asked nor given up.
    let refused =
        read(server.open("/v1/completions", &ask(5, &json!({"logit_bias": {"99999999": 1}}))));
    assert_eq!(refused.status, 400, "{}", refused.body);
    assert_eq!(samples(&server)[aborted], 4.0);
    assert_eq!(samples(&server)["vllm:request_params_n_count"], 2.0);
}

/// Sixteen answers are computed at once here; the seventeenth waits for a place.
#[test]
fn time_in_the_queue_is_told() {
    let server = Setup::default().start();
    server.behaviour.pass_us.store(1000, Ordering::Relaxed);
    let full = server.open("/v1/completions", &ask(100, &json!({"n": 16, "temperature": 1})));
    std::thread::sleep(Duration::from_millis(30));
    let waits = server.post("/v1/completions", &ask(2, &json!({})));
    assert_eq!((read(full).status, waits.status), (200, 200));
    let found = samples(&server);
    let queued = found["vllm:request_queue_time_seconds_sum"];
    assert!((0.03..2.0).contains(&queued), "{queued}");
    let quick = found["vllm:request_queue_time_seconds_bucket{le=\"0.025\"}"];
    assert_eq!((quick, found["vllm:request_queue_time_seconds_count"]), (16.0, 17.0));
}
