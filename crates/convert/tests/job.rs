//! Whole jobs on tiny models: every architecture, interruption, threads, damaged settings.

mod common;

use common::{
    Greedy, backend, calibration, convert, convert_with, divergence, files, load, options,
    quantizer,
};
use marlin_checkpoint::Checkpoint;
use marlin_convert::pooling::{CalibrationRule, MomentsRule, Through};
use marlin_convert::{ConvertError, Event, Origin, Plan, memory, run};
use marlin_cpu::{CpuEncoder, Level};
use marlin_models::FeedForwardSpec;
use marlin_testkit::{FAMILIES, tiny_model};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

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
        let divergence = divergence(&original, &made, family);
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

/// What a stopped job has gathered of a block is kept: resumed, it runs no row through that block again.
#[test]
fn a_resumed_job_does_not_gather_moments_again() {
    let family = "llama";
    let directory = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&tiny_model(family)).unwrap();
    let output = directory.path().join("out");
    let mut options = options(&source, family, &output, 2.5);
    options.jobs = 1;
    let stop = AtomicBool::new(false);
    let after_one = |event: Event| {
        if matches!(event, Event::Matrix { .. }) {
            stop.store(true, Ordering::SeqCst);
        }
    };
    assert!(matches!(convert(&source, &options, &after_one, &stop), Err(ConvertError::Stopped)));
    let kept = || {
        let entries = std::fs::read_dir(output.join(".quantize")).unwrap();
        entries.flatten().filter(|e| e.path().extension().is_some_and(|x| x == "moments")).count()
    };
    assert!(kept() > 0);
    let gathered = Mutex::new(Vec::new());
    let note = |event: Event| {
        if let Event::Rows { part, capture: true, row: 0, .. } = event {
            gathered.lock().unwrap().push(part);
        }
    };
    convert(&source, &options, &note, &AtomicBool::new(false)).unwrap();
    let gathered = gathered.into_inner().unwrap();
    assert!(!gathered.iter().any(|part| part == "layer 0"), "{gathered:?}");
    assert!(gathered.iter().any(|part| part == "layer 1"), "{gathered:?}");
}

/// What the guide compares the defaults with: other moments, and inputs that went through the source, give
/// another model with the same matrices.
#[test]
fn choices_of_the_calibration_reach_the_matrices() {
    let family = "glm4_moe_lite";
    let directory = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&tiny_model(family)).unwrap();
    let made = |name: &str, calibration: CalibrationRule| {
        let mut quantizer = quantizer(Arc::new(Greedy));
        quantizer.options.calibration = calibration;
        let output = directory.path().join(name);
        let options = options(&source, family, &output, 3.0);
        let stop = AtomicBool::new(false);
        run(&source, backend(2), &quantizer, &options, &|_| {}, &stop).unwrap();
        std::fs::read(output.join("model.safetensors")).unwrap()
    };
    let rule = CalibrationRule::default();
    let own = made("own", rule);
    let through = CalibrationRule { through: Through::Source, ..rule };
    let random = CalibrationRule { moments: MomentsRule::Random, ..rule };
    let pooled = CalibrationRule { moments: MomentsRule::Pooled, ..rule };
    for (name, rule) in [("source", through), ("random", random), ("pooled", pooled)] {
        let other = made(name, rule);
        assert!(other.len() == own.len() && other != own, "{name}");
    }
}

/// Every token goes to as many experts as the configuration says, and the report counts each once.
#[test]
fn the_report_counts_the_tokens_of_every_expert() {
    for family in ["mixtral", "qwen3_moe", "glm4_moe_lite"] {
        let directory = tempfile::tempdir().unwrap();
        let source = Checkpoint::open(&tiny_model(family)).unwrap();
        let options = options(&source, family, &directory.path().join("out"), 2.0);
        let report = convert(&source, &options, &|_| {}, &AtomicBool::new(false)).unwrap();
        let spec = marlin_models::spec(&source).unwrap();
        let routers: Vec<_> = spec
            .blocks
            .iter()
            .filter_map(|block| match &block.feed_forward {
                FeedForwardSpec::Moe(moe) => Some(&moe.router),
                FeedForwardSpec::Gated(_) => None,
            })
            .collect();
        assert!(!routers.is_empty() && report.experts.len() >= routers.len(), "{family}");
        for (layer, router) in report.experts.iter().zip(routers) {
            assert_eq!(layer.tokens.len(), router.num_experts, "{family}");
            let routed = options.calibration.tokens() * router.top_k;
            assert_eq!(layer.tokens.iter().sum::<u64>(), routed as u64, "{family}");
        }
    }
}

/// Experts that saw few tokens borrowed from those of their own pass only: with less memory, and so more passes,
/// a job made other bytes.
#[test]
fn memory_does_not_change_a_byte() {
    let family = "qwen3_moe";
    let directory = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&tiny_model(family)).unwrap();
    let made = |name: &str, limited: bool| {
        let mut options = options(&source, family, &directory.path().join(name), 2.0);
        // One long row: what runs takes more than what is quantized, and leaves room for one label at a time.
        let text: Vec<u32> = calibration(family).rows.concat().repeat(40);
        options.calibration.rows = vec![text[..4000].to_vec()];
        options.calibration.rows[0][..3990].fill(text[0]);
        options.jobs = 1;
        let origin = Origin::open(&source).unwrap();
        let plan = Plan::new(&origin.output, origin.mtp);
        if limited {
            let needs = memory::needs(&plan, &origin, &options).unwrap();
            options.max_memory = needs.iter().map(|n| n.1).max();
        }
        let passes = memory::passes(&plan.targets_of(0), &origin, &options).len();
        let never = AtomicBool::new(false);
        let report = convert(&source, &options, &|_| {}, &never).unwrap();
        (passes, report, std::fs::read(options.output.join("model.safetensors")).unwrap())
    };
    let ((one, report, whole), (many, _, pieces)) = (made("whole", false), made("pieces", true));
    assert!(one == 1 && many > 4, "{one} and {many} passes");
    let notes = report.tensors.iter().filter_map(|t| t.fallback.as_deref());
    let borrowed = notes.filter(|note| note.ends_with("pooled with the block's other experts"));
    assert!(borrowed.count() > 0, "no expert is starved");
    assert!(whole == pieces);
}

/// One matrix as embedding and head, where the source has one.
#[test]
fn a_tied_model_stays_tied() {
    for (family, tied) in [("qwen2", true), ("gemma3", true), ("qwen3", false)] {
        let directory = tempfile::tempdir().unwrap();
        let source = Checkpoint::open(&tiny_model(family)).unwrap();
        let output = directory.path().join("out");
        let mut options = options(&source, family, &output, 8.0);
        options.tied = true;
        options.bits.iter_mut().for_each(|b| *b = 8.0);
        let encoder = Arc::new(CpuEncoder::new(Level::detect(), 1));
        let made = convert_with(encoder, &source, &options, &|_| {}, &AtomicBool::new(false));
        if !tied {
            let error = made.unwrap_err().to_string();
            assert!(error.starts_with("--tied"), "{family}: {error}");
            continue;
        }
        let report = made.unwrap();
        assert!(report.head_stored_bits > 8.0, "{family}: {}", report.head_stored_bits);
        let made = Checkpoint::open(&output).unwrap();
        assert!(!made.tensors().any(|t| t.name.starts_with("lm_head")), "{family}");
        assert!(made.get("model.embed_tokens.trellis").is_some(), "{family}");
        let (original, made) = (load(&tiny_model(family)), load(&output));
        let divergence = divergence(&original, &made, family);
        assert!(divergence < 0.01, "{family}: {divergence}");
    }
}

/// GGUF files of latent attention store `kv_b` whole or as keys and values apart: the same model.
#[test]
fn split_and_whole_kv_b_of_gguf_make_the_same_model() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/fixtures/gguf");
    let made = ["deepseek2_v3", "deepseek2_v3_whole"].map(|name| {
        let directory = tempfile::tempdir().unwrap();
        let source = Checkpoint::open(&fixtures.join(format!("{name}.gguf"))).unwrap();
        let output = directory.path().join("out");
        let options = options(&source, "deepseek_v3", &output, 6.0);
        let encoder = Arc::new(CpuEncoder::new(Level::detect(), 1));
        convert_with(encoder, &source, &options, &|_| {}, &AtomicBool::new(false)).unwrap();
        let stored = Checkpoint::open(&output).unwrap();
        let kv_b = stored.get("model.layers.1.self_attn.kv_b_proj.weight").unwrap();
        let kv_b = kv_b.plain().unwrap().to_f32().unwrap();
        let original = load(&fixtures.join(format!("{name}.gguf")));
        let divergence = divergence(&original, &load(&output), "deepseek_v3");
        assert!(divergence < 0.02, "{name}: {divergence}");
        kv_b
    });
    let [split, whole] = &made;
    assert_eq!(split.len(), whole.len());
    // Their blocks of quantized values lie differently, so the last digits differ.
    let scale = whole.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (a, b) in split.iter().zip(whole) {
        assert!((a - b).abs() < 0.02 * scale, "{a} {b}");
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

/// Every matrix says how far it is, up to its end, before it is finished.
#[test]
fn a_matrix_at_work_tells_how_far_it_is() {
    let family = "llama";
    let directory = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(&tiny_model(family)).unwrap();
    let options = options(&source, family, &directory.path().join("out"), 2.5);
    let told = Mutex::new(std::collections::BTreeMap::<String, usize>::new());
    let events = |event: Event| {
        let mut told = told.lock().unwrap();
        match event {
            Event::Within { key, percent } => {
                let last = told.entry(key).or_default();
                *last = percent.max(*last);
            }
            Event::Matrix(report) => assert_eq!(told[&report.key], 100, "{}", report.key),
            _ => {}
        }
    };
    let report = convert(&source, &options, &events, &AtomicBool::new(false)).unwrap();
    assert_eq!(told.into_inner().unwrap().len(), report.tensors.len());
}
