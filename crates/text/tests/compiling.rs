//! Grammars that are given up are few, give way to everything else, end, and cost little memory.

mod common;

use marlin_text::{Grammar, GrammarFactory, GrammarLimits, TextError};
use serde_json::json;
use std::time::{Duration, Instant};

/// Takes as long to compile as the fuel allows, some tenths of a second.
fn bomb() -> Grammar {
    let rules: String = (0..60).map(|i| format!("A{i}: A{} A{}\n", i + 1, i + 1)).collect();
    Grammar::Lark(format!("start: A0\n{rules}A60: \"x\""))
}

/// Priorities of the threads that compile, where the system tells them.
fn priorities() -> Vec<i32> {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let priority = |task: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let (name, fields) = stat.split_once('(')?.1.rsplit_once(')')?;
        // Nice is the 19th field; the third comes first here.
        (name == "grammar").then(|| fields.split_whitespace().nth(16)?.parse().ok())?
    };
    tasks.filter_map(priority).collect()
}

/// Memory of this process, KiB.
fn memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
}

#[test]
fn what_is_given_up_is_bounded() {
    let tokenizer = common::bytes_tokenizer(&[], &["<|end|>"]);
    let limits = GrammarLimits {
        compile_time: Duration::from_millis(20),
        max_compiling: 3,
        ..GrammarLimits::default()
    };
    // Several models share the places.
    let factories =
        [0, 1].map(|_| GrammarFactory::within(&tokenizer, limits.clone()).expect("a vocabulary"));
    factories.iter().for_each(|factory| factory.prepare().expect("a usable vocabulary"));
    let before = memory();
    for index in 0..3 {
        let error = factories[index % 2].compile(&bomb()).unwrap_err().to_string();
        assert!(error.contains("not compiled within 20ms"), "{error}");
    }
    assert_eq!(limits.compiling.count(), 3, "they go on");
    if cfg!(target_os = "linux") {
        // Beside those of other tests.
        let low = priorities().into_iter().filter(|priority| *priority == 10).count();
        assert_eq!(low, 3, "{:?}", priorities());
    }
    for factory in &factories {
        let error = factory.compile(&Grammar::JsonObject).unwrap_err();
        assert!(matches!(error, TextError::TooManyGrammars), "{error}");
    }
    let (started, mut most) = (Instant::now(), before);
    while limits.compiling.count() > 0 {
        assert!(started.elapsed() < Duration::from_secs(300), "they end");
        most = most.max(memory());
        std::thread::sleep(Duration::from_millis(5));
    }
    let mib = (most - before) >> 10;
    println!("three ended after {:?} and took {mib} MiB", started.elapsed());
    assert!(mib < 512, "{mib} MiB");
    // Their places are free again. A usual grammar takes a few milliseconds, more on a busy machine.
    let compiled = (0..50).any(|_| factories[0].compile(&Grammar::JsonObject).is_ok());
    assert!(compiled);
}

/// Usual grammars wait for each other: many at once are no reason to refuse any.
#[test]
fn usual_grammars_wait_for_a_place() {
    let tokenizer = common::bytes_tokenizer(&[], &["<|end|>"]);
    let limits = GrammarLimits { max_compiling: 1, ..GrammarLimits::default() };
    let factory = GrammarFactory::within(&tokenizer, limits.clone()).expect("a vocabulary");
    factory.prepare().expect("a usable vocabulary");
    std::thread::scope(|scope| {
        let compile = || factory.compile(&Grammar::JsonObject).map(drop);
        let all: Vec<_> = (0..48).map(|_| scope.spawn(compile)).collect();
        for one in all {
            one.join().expect("no panic").expect("a place, in time");
        }
    });
    assert_eq!(limits.compiling.count(), 0);
}

#[test]
fn schemas_are_as_deep_and_large_as_is_set() {
    let tokenizer = common::bytes_tokenizer(&[], &["<|end|>"]);
    let compile = |max_depth, max_nodes, depth| {
        let limits = GrammarLimits { max_depth, max_nodes, ..GrammarLimits::default() };
        let factory = GrammarFactory::within(&tokenizer, limits).expect("a vocabulary");
        let nest = |inner, _| json!({"type": "array", "items": inner});
        let schema = (0..depth).fold(json!({"type": "string"}), nest);
        factory.compile(&Grammar::JsonSchema { schema, strict: true }).map(drop)
    };
    // JSON text that is nested more than 127 deep is not read at all.
    for (max_depth, max_nodes, depth, refused) in [
        (64, 20_000, 60, ""),
        (64, 20_000, 70, "more than 64 deep"),
        (10, 20_000, 20, "more than 10 deep"),
        (120, 20_000, 118, ""),
        (64, 50, 20, ""),
        (64, 50, 40, "at most 50"),
    ] {
        match compile(max_depth, max_nodes, depth) {
            Ok(()) => assert!(refused.is_empty(), "{depth} of {max_depth}"),
            Err(error) => assert!(
                !refused.is_empty() && error.to_string().contains(refused),
                "{depth} of {max_depth}: {error}"
            ),
        }
    }
}
