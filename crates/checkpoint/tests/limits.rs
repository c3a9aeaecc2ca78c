//! Large lying files: refused within two seconds, in memory of at most twice the file.
//!
//! One test, so that nothing else in the process allocates while memory is measured.

use marlin_checkpoint::Checkpoint;
use std::fmt;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Allowance for what any process needs: allocator arenas, stacks, the error text.
const SLACK: u64 = 8 << 20;

/// Peak resident bytes since the last call of [`forget_peak`], mapped file pages included.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn forget_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn safetensors(path: &Path, count: usize, last: &str) {
    let mut header = String::from("{");
    for i in 0..count {
        let _ = fmt::Write::write_fmt(
            &mut header,
            format_args!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"#),
        );
    }
    header.push_str(last);
    header.push('}');
    let mut out = BufWriter::new(File::create(path).unwrap());
    out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    out.write_all(header.as_bytes()).unwrap();
    out.flush().unwrap();
}

/// `tensors` tensor infos behind one metadata key with a byte array of `values` elements.
fn gguf(path: &Path, values: usize, tensors: usize, claimed: u64) {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(claimed.to_le_bytes());
    out.extend(1u64.to_le_bytes());
    out.extend(1u64.to_le_bytes());
    out.push(b'k');
    out.extend([9u32, 0].map(u32::to_le_bytes).concat());
    out.extend((values as u64).to_le_bytes());
    out.resize(out.len() + values, 7);
    for i in 0..tensors {
        out.extend(8u64.to_le_bytes());
        out.extend((i as u64).to_le_bytes().map(|b| b'a' + b % 26));
        out.extend([0; 16]);
    }
    fs::write(path, out).unwrap();
}

#[test]
fn lies_of_any_size_are_cheap() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let config = || fs::write(file("config.json"), "{}").unwrap();
    type Write<'w> = Box<dyn Fn() + 'w>;
    // What, file, how it is written, part of the error.
    let rows: [(&str, &str, Write, &str); 8] = [
        (
            "a header of 5 M entries",
            "model.safetensors",
            {
                Box::new(|| {
                    config();
                    let out = File::create(file("model.safetensors")).unwrap();
                    out.set_len(8 + (300 << 20)).unwrap();
                    (&out).write_all(&(300u64 << 20).to_le_bytes()).unwrap();
                })
            },
            "header length: 314572800 bytes",
        ),
        (
            "1.6 M entries in 100 MB",
            "model.safetensors",
            { Box::new(|| safetensors(&file("model.safetensors"), 1_600_000, r#""w":{}"#)) },
            "more than 262144 tensors",
        ),
        (
            "a bad entry behind 260,000 good ones",
            "model.safetensors",
            { Box::new(|| safetensors(&file("model.safetensors"), 260_000, r#""w":{}"#)) },
            "tensor w, dtype: is missing",
        ),
        ("5 M tensors", "m.gguf", Box::new(|| gguf(&file("m.gguf"), 0, 5_000_000, 5_000_000)), {
            "tensor count: 5000000"
        }),
        ("5 M metadata values", "m.gguf", Box::new(|| gguf(&file("m.gguf"), 5_000_000, 0, 0)), {
            "more than 2097152 metadata values"
        }),
        (
            "2 M metadata values before a bad tensor",
            "m.gguf",
            { Box::new(|| gguf(&file("m.gguf"), 2_000_000, 1, 2)) },
            "name of tensor 1: needs 8 bytes",
        ),
        (
            "5 M values in config.json",
            "config.json",
            {
                Box::new(|| {
                    let text = format!("{{\"a\":[{}0]}}", "0,".repeat(5_000_000));
                    fs::write(file("config.json"), text).unwrap();
                })
            },
            "config.json: a: more than 262144 values",
        ),
        (
            "5 M entries in the index",
            "model.safetensors.index.json",
            {
                Box::new(|| {
                    config();
                    let mut entries = String::new();
                    for i in 0..5_000_000 {
                        let _ = fmt::Write::write_fmt(&mut entries, format_args!(r#""{i}":"a","#));
                    }
                    let text = format!(r#"{{"weight_map":{{{entries}"w":"a"}}}}"#);
                    fs::write(file("model.safetensors.index.json"), text).unwrap();
                })
            },
            "weight_map, 1048576: more than 1048576 tensors",
        ),
    ];
    for (what, name, write, part) in rows {
        write();
        let path = if name.ends_with(".gguf") { file(name) } else { directory.path().into() };
        let length = fs::metadata(file(name)).unwrap().len();
        let measured = forget_peak();
        let before = if measured { peak() } else { 0 };
        let started = Instant::now();
        let error = Checkpoint::open(&path).expect_err(what).to_string();
        let elapsed = started.elapsed();
        assert!(error.contains(name) && error.contains(part), "{what}: {error}");
        assert!(elapsed < Duration::from_secs(2), "{what}: {elapsed:?}");
        if measured {
            let used = peak() - before;
            println!("{what}: {length} bytes, {used} bytes of memory, {elapsed:?}");
            assert!(used <= 2 * length + SLACK, "{what}: {used} bytes for a file of {length}");
        } else {
            println!("{what}: memory not measured, this system has no /proc/self/clear_refs");
        }
        fs::remove_file(file(name)).unwrap();
    }
}
