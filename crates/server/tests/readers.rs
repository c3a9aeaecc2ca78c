//! Texts that are read and not answered: vectors and perplexities.

mod common;

use common::Setup;
use marlin_engine::EngineOptions;
use marlin_engine::evaluate::{DeclaredPooling, PerplexityOptions, Pooling, perplexity};
use serde_json::{Value, json};
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Every text that is read has a cache of its own for so long; 40 at once must not take 40 times the memory.
#[test]
fn texts_are_read_one_at_a_time() {
    const READERS: usize = 40;
    let server = Setup::default().start();
    server.behaviour.pass_us.store(3000, Ordering::Relaxed);
    assert_eq!(server.behaviour.caches.load(Ordering::SeqCst), 1, "the engine's own");
    let text = "a mouse and a cat ".repeat(60);
    let requests: Vec<(&str, Value)> = (0..READERS)
        .map(|i| match i % 2 {
            0 => ("/v1/embeddings", json!({"input": [text, text]})),
            _ => ("/v1/perplexity", json!({"text": text, "window": 128})),
        })
        .collect();
    let chat = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4});
    let begun = Instant::now();
    let slowest = std::thread::scope(|scope| {
        let read = |(path, body): &(&str, Value)| {
            let response = server.post(path, body);
            assert_eq!(response.status, 200, "{path}: {}", response.body);
        };
        let readers: Vec<_> =
            requests.iter().map(|request| scope.spawn(move || read(request))).collect();
        std::thread::sleep(Duration::from_millis(30));
        // They stand in line among themselves; an answer does not wait for them.
        let start = Instant::now();
        assert_eq!(server.post("/v1/chat/completions", &chat).status, 200);
        let slowest = start.elapsed();
        assert!(readers.iter().any(|reader| !reader.is_finished()), "they are still at it");
        readers.into_iter().for_each(|reader| reader.join().unwrap());
        slowest
    });
    assert_eq!(server.behaviour.most_caches.load(Ordering::SeqCst), 2, "the engine's and one more");
    assert_eq!(server.behaviour.caches.load(Ordering::SeqCst), 1, "the engine's is left");
    assert!(slowest < begun.elapsed() / 2, "the answer took {slowest:?}");
}

/// More than can wait are told so, and come through when they ask again.
#[test]
fn too_many_readers_are_sent_away() {
    let server = Setup::default().start();
    server.behaviour.pass_us.store(5000, Ordering::Relaxed);
    let body = json!({"input": "a mouse and a cat ".repeat(60)});
    let statuses: Vec<u16> = std::thread::scope(|scope| {
        let read = || {
            let response = server.post("/v1/embeddings", &body);
            if response.status == 429 {
                assert_eq!(response.headers["retry-after"], "1");
            }
            response.status
        };
        let readers: Vec<_> = (0..90).map(|_| scope.spawn(read)).collect();
        readers.into_iter().map(|reader| reader.join().unwrap()).collect()
    });
    let count = |status| statuses.iter().filter(|s| **s == status).count();
    assert_eq!(count(200) + count(429), 90, "{statuses:?}");
    assert!(count(200) >= 64 && count(429) > 0, "{statuses:?}");
    assert_eq!(server.post("/v1/embeddings", &body).status, 200);
    assert_eq!(server.behaviour.most_caches.load(Ordering::SeqCst), 2);
}

/// A long text must not be read to its end for nobody.
#[test]
fn a_text_is_put_down_when_its_client_has_left() {
    let options = EngineOptions {
        max_context: Some(8192),
        num_blocks: Some(512),
        ..EngineOptions::default()
    };
    let server = Setup { options, ..Setup::default() }.start();
    server.behaviour.pass_us.store(40_000, Ordering::Relaxed);
    let ids: Vec<u32> = (0..7680).map(|i| 300 + i % 1000).collect();
    for (path, body) in
        [("/v1/embeddings", json!({"input": ids})), ("/v1/perplexity", json!({"token_ids": ids}))]
    {
        let reading = server.open(path, &body);
        let begun = Instant::now();
        while server.behaviour.caches.load(Ordering::SeqCst) < 2 {
            assert!(begun.elapsed() < Duration::from_secs(5), "{path}: it never began");
            std::thread::sleep(Duration::from_millis(1));
        }
        // Fifteen chunks of 40 ms take 600; one is under way.
        let left = Instant::now();
        reading.shutdown(Shutdown::Both).unwrap();
        drop(reading);
        while server.behaviour.caches.load(Ordering::SeqCst) > 1 {
            assert!(left.elapsed() < Duration::from_millis(300), "{path}: still at it");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let long = json!({"input": vec![300; 8193]});
    let error = server.post("/v1/embeddings", &long).json()["error"].clone();
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("context_length_exceeded"), &json!("input"))
    );
}

/// The figure of the endpoint is that of `marlin eval perplexity`.
#[test]
fn a_perplexity_is_that_of_the_library() {
    let server = Setup::default().start();
    let served = server.server.models.loaded(0).unwrap();
    let ids: Vec<u32> = (0..400u32).map(|i| 300 + i * i % 700).collect();
    for (window, score_from) in [(400, 1), (128, 64), (50, 49), (399, 200)] {
        let options = PerplexityOptions { window, score_from, ..PerplexityOptions::default() };
        let model = served.runtime.model().as_ref();
        let report = perplexity(model, &ids, &options, None, &mut |_| {}).unwrap();
        let body = json!({"token_ids": ids, "window": window, "score_from": score_from});
        let scored = server.post("/v1/perplexity", &body).json();
        assert_eq!(scored["tokens"], report.tokens_scored, "{scored}");
        assert_eq!(scored["windows"], report.windows);
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b.abs();
        assert!(close(scored["nll"].as_f64().unwrap(), report.nll), "{scored} {report:?}");
        assert!(close(scored["perplexity"].as_f64().unwrap(), report.perplexity));
    }
}

/// A model that reads a text is not idle: it must not be unloaded under it, nor its bytes be counted as free.
#[test]
fn a_model_that_reads_is_not_unloaded() {
    let server = Setup { budget: Some(1500), ..Setup::default() }.start();
    server.behaviour.pass_us.store(300_000, Ordering::Relaxed);
    let ask = json!({"model": "second", "input": "a"});
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| server.post("/v1/embeddings", &json!({"input": "a mouse"})));
        let begun = Instant::now();
        while server.behaviour.caches.load(Ordering::SeqCst) < 2 {
            assert!(begun.elapsed() < Duration::from_secs(5));
            std::thread::sleep(Duration::from_millis(1));
        }
        let refused = server.post("/v1/embeddings", &ask);
        assert_eq!(refused.status, 429, "{}", refused.body);
        assert!(refused.headers.contains_key("retry-after"));
        assert_eq!(reading.join().unwrap().status, 200);
    });
    server.behaviour.pass_us.store(0, Ordering::Relaxed);
    let response = server.post("/v1/embeddings", &ask);
    assert_eq!(response.status, 200, "{}", response.body);
    assert!(server.server.models.loaded(0).is_none(), "now it was");
}

/// A model that was made for vectors is pooled as it says, and in no other way; one that was made to write, as is asked.
#[test]
fn vectors_that_would_mean_nothing_are_refused() {
    let start = |pooling| Setup { pooling, ..Setup::default() }.start();
    let vector = |server: &common::Running, pooling: &str| {
        let body = json!({"input": "one two three", "pooling": pooling});
        let body = if pooling.is_empty() { json!({"input": "one two three"}) } else { body };
        let response = server.post("/v1/embeddings", &body);
        match response.status {
            200 => Ok(response.json()["data"][0]["embedding"].clone()),
            400 => Err(response.json()["error"].clone()),
            other => panic!("{other}: {}", response.body),
        }
    };
    let plain = start(DeclaredPooling::Unsaid);
    let [mean, last] = ["mean", "last"].map(|pooling| vector(&plain, pooling).unwrap());
    assert_ne!(mean, last);
    assert_eq!(vector(&plain, ""), Ok(mean));
    let made = start(DeclaredPooling::Known(Pooling::Last));
    assert_eq!(vector(&made, ""), Ok(last.clone()));
    assert_eq!(vector(&made, "last"), Ok(last));
    let refused = vector(&made, "mean").unwrap_err();
    assert_eq!(
        (&refused["param"], &refused["code"]),
        (&json!("pooling"), &json!("unsupported_parameter"))
    );
    assert!(refused["message"].as_str().unwrap().contains("trained with last"), "{refused}");
    let other = start(DeclaredPooling::Other("cls".into()));
    for pooling in ["", "mean", "last"] {
        let refused = vector(&other, pooling).unwrap_err();
        assert!(refused["message"].as_str().unwrap().contains("cls"), "{refused}");
    }
}
