//! Whole jobs on tiny models: every architecture, interruption, threads, damaged settings.

mod common;

use common::{calibration, convert, convert_with, files, load, options};
use marlin_checkpoint::Checkpoint;
use marlin_convert::{ConvertError, Event};
use marlin_cpu::{CpuEncoder, Level};
use marlin_engine::evaluate::{PerplexityOptions, perplexity};
use marlin_testkit::{FAMILIES, tiny_model};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// At eight bits the output of every architecture says nearly what its source says, through the file.
#[test]
fn every_architecture_survives_eight_bits() {
    for family in FAMILIES {
        let directory = tempfile::tempdir().unwrap();
        let source = Checkpoint::open(&tiny_model(family)).unwrap();
        let output = directory.path().join("out");
        let options = options(&source, family, &output, 8.0);
        let encoder = Arc::new(CpuEncoder::new(Level::detect(), 1));
        let report = convert_with(encoder, &source, &options, &|_| {}, &AtomicBool::new(false))
            .unwrap_or_else(|e| panic!("{family}: {e}"));
        assert_eq!(report.bits, 8.0, "{family}");
        let (original, made) = (load(&tiny_model(family)), load(&output));
        assert_eq!(original.has_mtp(), made.has_mtp(), "{family}");
        let tokens: Vec<u32> = calibration(family).rows.concat();
        let windows = PerplexityOptions { window: 48, score_from: 8, windows: Some(2) };
        let found = perplexity(&made, &tokens, &windows, Some(&original), &mut |_| {}).unwrap();
        let divergence = found.kl_divergence.unwrap();
        assert!(divergence < 0.01, "{family}: KL {divergence}");
        assert!(!output.join(".quantize").exists(), "{family}");
    }
}

/// Stopped after every few matrices and resumed, with one thread and with three: the same bytes.
#[test]
fn interruptions_and_threads_do_not_change_a_byte() {
    for family in ["glm4_moe_lite", "qwen2"] {
        let directory = tempfile::tempdir().unwrap();
        let source = Checkpoint::open(&tiny_model(family)).unwrap();
        let whole = directory.path().join("whole");
        let run = |output, threads| {
            let mut o = options(&source, family, output, 2.5);
            (o.threads, o.jobs) = (threads, threads);
            o
        };
        convert(&source, &run(&whole, 3), &|_| {}, &AtomicBool::new(false)).unwrap();

        let pieces = directory.path().join("pieces");
        let mut stops = 0;
        loop {
            let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
            let after = 1 + stops % 5;
            let events = |event: Event| {
                if matches!(event, Event::Matrix { .. })
                    && done.fetch_add(1, Ordering::SeqCst) + 1 == after
                {
                    stop.store(true, Ordering::SeqCst);
                }
            };
            match convert(&source, &run(&pieces, 1), &events, &stop) {
                Ok(_) => break,
                Err(ConvertError::Stopped) => stops += 1,
                Err(e) => panic!("{family}: {e}"),
            }
            assert!(!pieces.join("config.json").exists(), "{family}: unfinished");
        }
        assert!(stops > 3, "{family}: stopped {stops} times");
        let (a, b) = (files(&whole), files(&pieces));
        let names =
            |f: &[(std::path::PathBuf, Vec<u8>)]| f.iter().map(|f| f.0.clone()).collect::<Vec<_>>();
        assert_eq!(names(&a), names(&b), "{family}");
        for (a, b) in a.iter().zip(&b) {
            assert!(a.1 == b.1, "{family}: {} differs", a.0.display());
        }
    }
}

/// A folder of another job, a finished model and a damaged settings file are refused and kept.
#[test]
fn another_job_is_refused() {
    let family = "llama";
    let directory = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&tiny_model(family)).unwrap();
    let output = directory.path().join("out");
    let never = AtomicBool::new(false);
    let stopped = AtomicBool::new(true);
    let first = options(&source, family, &output, 3.0);
    assert!(matches!(convert(&source, &first, &|_| {}, &stopped), Err(ConvertError::Stopped)));
    let other = options(&source, family, &output, 4.0);
    let error = convert(&source, &other, &|_| {}, &never).unwrap_err().to_string();
    assert!(error.contains("job.json") && error.contains("--fresh"), "{error}");

    std::fs::write(output.join(".quantize/job.json"), "{").unwrap();
    let error = convert(&source, &first, &|_| {}, &never).unwrap_err().to_string();
    assert!(error.contains("job.json") && error.contains("--fresh"), "{error}");

    let fresh = || {
        let mut o = options(&source, family, &output, 3.0);
        o.fresh = true;
        o
    };
    convert(&source, &fresh(), &|_| {}, &never).unwrap();
    let error = convert(&source, &first, &|_| {}, &never).unwrap_err().to_string();
    assert!(error.contains("finished model"), "{error}");
    convert(&source, &fresh(), &|_| {}, &never).unwrap();
}
