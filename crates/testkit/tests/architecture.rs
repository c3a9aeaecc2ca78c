//! The invariants of `docs/ARCHITECTURE.md` that can be read off the source tree.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Workspace crates that a crate may name, outside its tests.
const ARROWS: &[(&str, &[&str])] = &[
    ("tensor", &[]),
    ("checkpoint", &["tensor"]),
    ("quant", &["checkpoint", "tensor"]),
    ("cpu", &["quant", "tensor"]),
    ("gpu", &["quant", "checkpoint", "tensor"]),
    ("models", &["quant", "checkpoint", "tensor"]),
    ("text", &["checkpoint", "tensor"]),
    ("engine", &["models", "quant", "checkpoint", "tensor"]),
    ("convert", &["engine", "models", "quant", "checkpoint", "tensor"]),
    ("server", &["engine", "text", "models", "quant", "checkpoint", "tensor"]),
    (
        "cli",
        &[
            "server",
            "convert",
            "engine",
            "models",
            "text",
            "gpu",
            "cpu",
            "quant",
            "checkpoint",
            "tensor",
        ],
    ),
    ("testkit", &["tensor"]),
];

/// The crate that prints, reads the environment and names backends.
const ROOT: &str = "cli";

/// Where features may be named, beside the binary: the runtimes of the GPU crate.
const FEATURES: &[&str] = &["crates/gpu/src/lib.rs", "crates/gpu/src/runtime/"];

/// Where `unsafe` may stand: kernels, threads, their memory, launches on a GPU, and the map of a file.
const UNSAFE: &[&str] = &[
    "crates/cpu/src/simd/",
    "crates/cpu/src/pool.rs",
    "crates/cpu/src/pool/",
    "crates/cpu/src/memory.rs",
    "crates/cpu/src/memory/",
    "crates/gpu/src/",
    "crates/checkpoint/src/source.rs",
];

/// Longest source file, lines.
const MAX_LINES: usize = 600;

/// Files that are tables of numbers, which no cut would make easier to read.
const TABLES: &[&str] = &["crates/quant/src/ggml/grids.rs"];

/// Crates that may be asynchronous.
const ASYNCHRONOUS: &[&str] = &["server", ROOT];

/// Crates that would make a library asynchronous.
const ASYNC: &[&str] = &["tokio", "futures", "async-trait", "axum", "hyper", "reqwest"];

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.canonicalize().expect("the workspace holds this crate")
}

/// Files under `directory`, hidden folders and build products left out; paths relative to the
/// workspace.
fn files(directory: &str) -> Vec<String> {
    fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
        let entries = fs::read_dir(directory).expect("a readable directory");
        for path in entries.map(|entry| entry.expect("a readable entry").path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let skipped =
                name.starts_with('.') || ["target", "__pycache__", "out"].contains(&&*name);
            if path.is_dir() && !skipped {
                walk(&path, found);
            } else if path.is_file() {
                found.push(path);
            }
        }
    }
    let root = root();
    let mut found = Vec::new();
    walk(&root.join(directory), &mut found);
    found.sort();
    let relative = |path: &PathBuf| {
        let relative = path.strip_prefix(&root).expect("found below the root");
        relative.to_string_lossy().replace('\\', "/")
    };
    found.iter().map(relative).collect()
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn rust_files() -> Vec<String> {
    let mut found = files("crates");
    found.retain(|path| path.ends_with(".rs"));
    found
}

/// Name of the crate that a path belongs to.
fn crate_of(path: &str) -> &str {
    path.split('/').nth(1).expect("crates/NAME/…")
}

/// Library code: sources without tests, benches and examples, up to the module of unit tests.
fn library_sources() -> Vec<(String, String)> {
    let rust = rust_files().into_iter().filter(|path| {
        path.contains("/src/") && !path.ends_with("/tests.rs") && !path.contains("/tests/")
    });
    let code = |path: String| {
        let text = read(&path);
        let end = text.find("#[cfg(test)]\nmod tests {").unwrap_or(text.len());
        (path, without_comments(&text[..end]))
    };
    rust.map(code).collect()
}

fn without_comments(text: &str) -> String {
    let code = text.lines().map(|line| match line.trim_start().starts_with("//") {
        true => "",
        false => line,
    });
    code.collect::<Vec<_>>().join("\n")
}

/// Lines of `code` that hold one of `words`, as `path:line: word`.
fn occurrences(path: &str, code: &str, words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in code.lines().enumerate() {
        for word in words.iter().filter(|word| line.contains(**word)) {
            found.push(format!("{path}:{}: {word}", number + 1));
        }
    }
    found
}

/// Names under each `[section]` of a manifest.
fn manifest(path: &str) -> BTreeMap<String, Vec<String>> {
    let mut sections: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut section = String::new();
    for line in read(path).lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_matches(['[', ']']).to_owned();
        } else if let Some((key, _)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
            let name = key.trim().trim_end_matches(".workspace").to_owned();
            sections.entry(section.clone()).or_default().push(name);
        }
    }
    sections
}

/// Crates in `crates/`.
fn crates() -> Vec<String> {
    let entries = fs::read_dir(root().join("crates")).expect("crates/");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("a readable entry"))
        .filter(|entry| entry.path().join("Cargo.toml").is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// What a crate needs outside its tests: `[dependencies]`, also those of one target.
fn dependencies(name: &str) -> Vec<String> {
    let sections = manifest(&format!("crates/{name}/Cargo.toml"));
    let normal = sections.into_iter().filter(|(section, _)| {
        section.ends_with("dependencies") && !section.ends_with("dev-dependencies")
    });
    normal.flat_map(|(_, names)| names).collect()
}

fn check(violations: &[String], rule: &str) {
    assert!(violations.is_empty(), "{rule}:\n{}", violations.join("\n"));
}

#[test]
fn crates_depend_on_what_lies_below_them() {
    let mut violations = Vec::new();
    for name in crates() {
        let Some((_, allowed)) = ARROWS.iter().find(|(crate_name, _)| *crate_name == name) else {
            violations.push(format!("{name}: not in ARROWS; say there what it may use"));
            continue;
        };
        for dependency in dependencies(&name) {
            if let Some(other) = dependency.strip_prefix("marlin-")
                && !allowed.contains(&other)
            {
                violations.push(format!("{name} uses {other}"));
            }
        }
    }
    check(&violations, "arrows between crates");
}

#[test]
fn arrows_have_no_cycle() {
    // A crate may use only what precedes it, so the order of the table is a topological one.
    for (i, (name, allowed)) in ARROWS.iter().enumerate() {
        for other in *allowed {
            let position = ARROWS.iter().position(|(known, _)| known == other);
            assert!(position.is_some_and(|p| p < i), "{name}: {other} does not precede it");
        }
    }
}

#[test]
fn only_the_binary_names_a_backend() {
    let mut violations = Vec::new();
    for (path, code) in library_sources() {
        if ![ROOT, "cpu", "gpu"].contains(&crate_of(&path)) {
            violations.extend(occurrences(&path, &code, &["marlin_cpu", "marlin_gpu"]));
        }
    }
    check(&violations, "backends are injected as `dyn Backend`");
}

#[test]
fn only_the_gpu_crate_uses_cubecl() {
    let named = |name: &String| dependencies(name).iter().any(|d| d.starts_with("cubecl"));
    let users: Vec<String> = crates().into_iter().filter(named).collect();
    assert_eq!(users, ["gpu"], "cubecl's interface moves: one crate follows it");
}

#[test]
fn features_are_chosen_in_the_binary() {
    let mut violations = Vec::new();
    let elsewhere = |path: &&String| {
        crate_of(path) != ROOT && !FEATURES.iter().any(|allowed| path.starts_with(allowed))
    };
    for path in rust_files().iter().filter(elsewhere) {
        // Assembled, or this file would be found.
        let words = [concat!("cfg(", "feature"), concat!("feature ", "= \"")];
        violations.extend(occurrences(path, &without_comments(&read(path)), &words));
    }
    for name in crates().iter().filter(|name| ![ROOT, "gpu"].contains(&name.as_str())) {
        if manifest(&format!("crates/{name}/Cargo.toml")).contains_key("features") {
            violations.push(format!("crates/{name}/Cargo.toml: [features]"));
        }
    }
    check(&violations, "no features below the binary, but for runtimes of GPUs");
}

#[test]
fn libraries_neither_print_nor_read_the_environment() {
    let words = [
        "println!",
        "print!(",
        "dbg!(",
        "std::env::",
        "use std::env",
        "env::var",
        "stdout()",
        "stderr()",
        "stdin()",
        "process::exit",
    ];
    let mut violations = Vec::new();
    for (path, code) in library_sources() {
        if crate_of(&path) != ROOT {
            violations.extend(occurrences(&path, &code, &words));
        }
    }
    check(&violations, "terminal, environment and exit belong to the binary");
}

#[test]
fn libraries_are_synchronous() {
    let mut violations = Vec::new();
    for (path, code) in library_sources() {
        if !ASYNCHRONOUS.contains(&crate_of(&path)) {
            violations.extend(occurrences(&path, &code, &["async fn", "async move", ".await"]));
        }
    }
    for name in crates().iter().filter(|name| !ASYNCHRONOUS.contains(&name.as_str())) {
        let found = dependencies(name).into_iter().filter(|d| ASYNC.contains(&d.as_str()));
        violations.extend(found.map(|dependency| format!("{name} uses {dependency}")));
    }
    check(&violations, "no async code");
}

#[test]
fn unsafe_code_stays_in_its_files_and_is_justified() {
    let mut violations = Vec::new();
    for path in rust_files() {
        let code = without_comments(&read(&path));
        // A string that speaks of unsafe code is not unsafe code.
        let words = ["fn", "{", "impl", "extern", "trait"].map(|next| ["unsafe", next].join(" "));
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        if !UNSAFE.iter().any(|allowed| path.starts_with(allowed)) {
            violations.extend(occurrences(&path, &code, &words));
        }
    }
    check(&violations, "unsafe code elsewhere");
    // Clippy demands the comment; nothing may switch that off.
    let lints = read("Cargo.toml");
    for lint in ["undocumented_unsafe_blocks = \"deny\"", "unsafe_op_in_unsafe_fn = \"deny\""] {
        assert!(lints.contains(lint), "Cargo.toml: {lint} is missing");
    }
    let mut violations = Vec::new();
    for path in rust_files() {
        let allow = [concat!("allow(", "clippy::undocumented"), concat!("allow(", "unsafe")];
        violations.extend(occurrences(&path, &read(&path), &allow));
    }
    check(&violations, "lints on unsafe code are the workspace's");
}

#[test]
fn files_are_short() {
    let mut violations = Vec::new();
    for path in rust_files() {
        let lines = read(&path).lines().count();
        if lines > MAX_LINES && !TABLES.contains(&path.as_str()) {
            violations.push(format!("{path}: {lines} lines"));
        }
    }
    for table in TABLES {
        assert!(root().join(table).is_file(), "{table}: gone; take it off TABLES");
    }
    check(&violations, "files over 600 lines");
}

#[test]
fn architectures_are_short() {
    let mut violations = Vec::new();
    let shared = ["build.rs", "mod.rs"];
    for path in rust_files().iter().filter(|path| path.contains("/models/src/architecture/")) {
        let lines = read(path).lines().count();
        if lines > 250 && !shared.iter().any(|name| path.ends_with(name)) {
            violations.push(format!("{path}: {lines} lines"));
        }
    }
    check(&violations, "an architecture is at most 250 lines");
}

#[test]
fn crates_inherit_the_workspace() {
    let mut violations = Vec::new();
    for name in crates() {
        let path = format!("crates/{name}/Cargo.toml");
        let text = read(&path);
        let inherited = ["version", "edition", "rust-version", "license", "publish"];
        let package = inherited.map(|field| format!("{field}.workspace = true"));
        for line in package.iter().filter(|line| !text.contains(*line)) {
            violations.push(format!("{path}: {line}"));
        }
        if !text.contains("[lints]\nworkspace = true") {
            violations.push(format!("{path}: [lints] workspace = true"));
        }
        if !text.contains(&format!("name = \"marlin-{name}\"")) {
            violations.push(format!("{path}: the package is not called marlin-{name}"));
        }
        for (section, names) in manifest(&path) {
            if section.ends_with("dependencies") {
                let pinned = names.iter().filter(|dependency| {
                    !text.contains(&format!("{dependency}.workspace = true"))
                        && !text.contains(&format!("{dependency} = {{ workspace = true"))
                });
                violations.extend(pinned.map(|d| format!("{path}: {d} has a version of its own")));
            }
        }
    }
    check(&violations, "said once, in the root manifest");
}

#[test]
fn no_stub_is_left() {
    let words = ["todo!(", "unimplemented!("];
    let markers = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("#[", "ignore")];
    let mut violations = Vec::new();
    for (path, code) in library_sources() {
        violations.extend(occurrences(&path, &code, &words));
    }
    for path in rust_files() {
        violations.extend(occurrences(&path, &read(&path), &markers));
    }
    check(&violations, "stubs");
}

#[test]
fn the_tree_names_no_machine() {
    // Assembled, or this file would be found.
    let folders = ["work", "root", "home", "tmp", "Users"].map(|name| ["", name, ""].join("/"));
    let hosts = [["index", "crates", "io"].join("."), ["pypi", "org"].join(".")];
    let words: Vec<&str> = folders.iter().chain(&hosts).map(String::as_str).collect();
    let mut violations = Vec::new();
    let front = ["README.md", "CONTRIBUTING.md", "Cargo.toml"].map(str::to_owned);
    let folders = ["crates", "docs", "bench", "fuzz", ".ci", ".cargo"].into_iter();
    let folders = folders.filter(|folder| root().join(folder).is_dir()).flat_map(files);
    let kept = |path: &String| !path.starts_with("fuzz/corpus");
    for path in front.into_iter().chain(folders).filter(kept) {
        // Binary fixtures and embedded weights are not text.
        if let Ok(text) = fs::read_to_string(root().join(&path)) {
            let code = without_urls(&text);
            violations.extend(occurrences(&path, &code, &words));
        }
    }
    for lock in ["Cargo.lock", "fuzz/Cargo.lock"] {
        let source = "source = \"registry+https://github.com/rust-lang/crates.io-index\"";
        let text = read(lock);
        let others = text.lines().filter(|line| line.starts_with("source = ") && *line != source);
        violations.extend(others.map(|line| format!("{lock}: {line}")));
    }
    check(&violations, "paths and hosts of one machine");
}

/// Text whose web addresses are cut, since their paths are not folders here.
fn without_urls(text: &str) -> String {
    let words = text.split_inclusive(char::is_whitespace).map(|word| match word.find("://") {
        Some(_) => "\n".repeat(word.matches('\n').count()),
        None => word.to_owned(),
    });
    words.collect()
}
