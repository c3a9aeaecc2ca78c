//! `pull`, `list`, `rm` and `-m ORG/NAME` against a hub on this machine.
#![cfg(feature = "hub")]

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does when a file's contents are asked for, once each, in order.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    /// Serves it.
    Fine,
    /// Sends this many bytes and closes.
    Cut(usize),
    /// Sends this many bytes and falls silent.
    Stall(usize),
    /// Sends other bytes.
    Wrong,
    /// Answers 200 to a range.
    NoRanges,
    /// Answers 503.
    Busy,
    /// Sends the client to another host.
    Elsewhere,
}

#[derive(Default)]
struct State {
    /// Path, contents, stored as LFS.
    files: Vec<(String, Vec<u8>, bool)>,
    faults: Vec<Fault>,
    /// Status and `x-error-code` for the API.
    refuse: Option<(u16, &'static str)>,
    /// Path, range, authorization and host of every request for contents.
    requests: Vec<[String; 4]>,
}

/// A hub with one model, `org/name`, and a cache for it.
struct Hub {
    port: u16,
    state: Arc<Mutex<State>>,
    home: tempfile::TempDir,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn etag(contents: &[u8], lfs: bool) -> String {
    if lfs {
        return hex(digest(&SHA256, contents).as_ref());
    }
    let mut blob = format!("blob {}\0", contents.len()).into_bytes();
    blob.extend_from_slice(contents);
    hex(digest(&SHA1_FOR_LEGACY_USE_ONLY, &blob).as_ref())
}

impl Hub {
    fn new(files: &[(&str, &[u8], bool)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let files = files.iter().map(|(p, c, l)| ((*p).to_owned(), c.to_vec(), *l)).collect();
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || serve(stream, port, &state));
            }
        });
        Self { port, state, home: tempfile::tempdir().unwrap() }
    }

    fn faults(&self, faults: &[Fault]) {
        self.state.lock().unwrap().faults = faults.to_vec();
    }

    fn requests(&self) -> Vec<[String; 4]> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    fn marlin(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
        command.args(args).env("HF_HOME", self.home.path());
        command.env("HF_ENDPOINT", format!("http://127.0.0.1:{}", self.port));
        for name in ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy"] {
            command.env_remove(name);
        }
        for name in ["ALL_PROXY", "all_proxy", "HTTPS_PROXY", "https_proxy", "HF_TOKEN_PATH"] {
            command.env_remove(name);
        }
        command
    }

    fn repository(&self) -> PathBuf {
        self.home.path().join("hub/models--org--name")
    }

    fn snapshot(&self) -> PathBuf {
        self.repository().join("snapshots").join(COMMIT)
    }
}

/// Answers one request and closes.
fn serve(mut stream: TcpStream, port: u16, state: &Mutex<State>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let path = first.split(' ').nth(1)?.to_owned();
    let (mut range, mut authorization, mut host) = (String::new(), String::new(), String::new());
    for line in lines {
        let line = line.ok()?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => range = value.to_owned(),
            "authorization" => authorization = value.to_owned(),
            "host" => host = value.to_owned(),
            _ => {}
        }
    }
    let mut state = state.lock().unwrap();
    if path.starts_with("/api/") {
        let (status, extra, body) = api(&path, port, &state);
        drop(state);
        return answer(&mut stream, status, &extra, body.to_string().as_bytes());
    }
    let fault = (!state.faults.is_empty()).then(|| state.faults.remove(0));
    state.requests.push([path.clone(), range.clone(), authorization, host]);
    let name = path.split_once(COMMIT)?.1.trim_start_matches('/');
    let contents = state.files.iter().find(|f| f.0 == name).map(|f| f.1.clone());
    drop(state);
    let Some(mut contents) = contents else { return answer(&mut stream, "404 Not Found", "", b"") };
    match fault {
        Some(Fault::Busy) => return answer(&mut stream, "503 Service Unavailable", "", b""),
        Some(Fault::Elsewhere) => {
            let location = format!("location: http://localhost:{port}{path}\r\n");
            return answer(&mut stream, "302 Found", &location, b"");
        }
        Some(Fault::Wrong) => contents[0] ^= 1,
        _ => {}
    }
    let total = contents.len();
    let from = range.strip_prefix("bytes=").and_then(|r| r.trim_end_matches('-').parse().ok());
    let from = from.filter(|_| fault != Some(Fault::NoRanges));
    let status = if from.is_some() { "206 Partial Content" } else { "200 OK" };
    let from: usize = from.unwrap_or(0);
    let extra = match status {
        "200 OK" => String::new(),
        _ => format!("content-range: bytes {from}-{}/{total}\r\n", total - 1),
    };
    let body = &contents[from..];
    match fault {
        Some(Fault::Cut(n) | Fault::Stall(n)) => {
            head(&mut stream, status, &extra, body.len())?;
            stream.write_all(&body[..n]).ok()?;
            stream.flush().ok()?;
            if matches!(fault, Some(Fault::Stall(_))) {
                std::thread::sleep(Duration::from_secs(20));
            }
            Some(())
        }
        _ => answer(&mut stream, status, &extra, body),
    }
}

/// Status, headers and body of an API request; the file list comes in pages of two.
fn api(path: &str, port: u16, state: &State) -> (&'static str, String, Value) {
    if let Some((status, code)) = state.refuse {
        let status = match status {
            401 => "401 Unauthorized",
            403 => "403 Forbidden",
            _ => "404 Not Found",
        };
        return (status, format!("x-error-code: {code}\r\n"), json!({"error": code}));
    }
    if path == "/api/models/org/name/revision/main" {
        return ("200 OK", String::new(), json!({"sha": COMMIT}));
    }
    let tree = format!("/api/models/org/name/tree/{COMMIT}?recursive=true");
    let Some(rest) = path.strip_prefix(&tree) else {
        return ("404 Not Found", "x-error-code: RevisionNotFound\r\n".to_owned(), json!({}));
    };
    let from: usize = rest.strip_prefix("&cursor=").map_or(0, |c| c.parse().unwrap());
    let mut entries: Vec<_> = state
        .files
        .iter()
        .skip(from)
        .take(2)
        .map(|(path, contents, lfs)| {
            let mut entry = json!({
                "type": "file", "path": path, "size": contents.len(), "oid": etag(contents, false),
            });
            if *lfs {
                entry["lfs"] = json!({"oid": etag(contents, true), "size": contents.len()});
            }
            entry
        })
        .collect();
    entries.push(json!({"type": "directory", "path": "folder", "oid": "00", "size": 0}));
    let next =
        format!("link: <http://127.0.0.1:{port}{tree}&cursor={}>; rel=\"next\"\r\n", from + 2);
    let next = if from + 2 < state.files.len() { next } else { String::new() };
    ("200 OK", next, Value::Array(entries))
}

fn head(stream: &mut TcpStream, status: &str, extra: &str, length: usize) -> Option<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n{extra}\r\n"
    );
    stream.write_all(head.as_bytes()).ok()
}

fn answer(stream: &mut TcpStream, status: &str, extra: &str, body: &[u8]) -> Option<()> {
    head(stream, status, extra, body.len())?;
    stream.write_all(body).ok()
}

#[track_caller]
fn expect(mut command: Command, code: i32, needle: &str) -> Output {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(stderr.contains(needle), "expected {needle:?} in: {stderr}");
    output
}

fn document(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// A directory of one weight file.
fn simple(weights: &[u8]) -> Hub {
    Hub::new(&[
        ("README.md", b"read me", false),
        ("config.json", b"{}", false),
        ("pytorch_model.bin", b"pickle", true),
        ("model.safetensors", weights, true),
        ("onnx/model.onnx", b"onnx", true),
    ])
}

#[test]
fn pulled_model_opens_by_its_id() {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/glm-stories");
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
    let read = |name: &&str| fs::read(assets.join(name)).unwrap();
    let contents: Vec<_> = names.iter().map(read).collect();
    let mut files = vec![("README.md", &b"read me"[..], false)];
    files.extend(names.iter().zip(&contents).map(|(n, c)| (*n, &c[..], n.contains("tensors"))));
    let hub = Hub::new(&files);

    let missing =
        "is neither a file nor a downloaded model; to download it run\n  marlin pull org/name\n";
    expect(hub.marlin(&["inspect", "-m", "org/name"]), 3, missing);
    let report = document(&expect(hub.marlin(&["pull", "org/name", "--json"]), 0, ""));
    let size: usize = contents.iter().map(Vec::len).sum();
    assert_eq!(report["downloaded_bytes"], size);
    assert_eq!(report["files"].as_array().unwrap().len(), 4, "{report}");

    // The layout that other programs read.
    assert_eq!(fs::read_to_string(hub.repository().join("refs/main")).unwrap(), COMMIT);
    let link = fs::read_link(hub.snapshot().join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(etag(&contents[3], true)));
    let blob = hub.repository().join("blobs").join(etag(&contents[0], false));
    assert_eq!(fs::read(blob).unwrap(), contents[0]);
    assert!(!hub.snapshot().join("README.md").exists());

    let inspected = expect(hub.marlin(&["inspect", "-m", "org/name", "--json"]), 0, "");
    assert!(document(&inspected)["parameters"].as_u64().unwrap() > 30_000_000);

    hub.requests();
    let again = expect(hub.marlin(&["pull", "org/name", "--json"]), 0, "");
    assert_eq!(document(&again)["downloaded_bytes"], 0);
    assert_eq!(hub.requests().len(), 0);
    let mut offline = hub.marlin(&["pull", "org/name"]);
    offline.env("HF_HUB_OFFLINE", "1").env("HF_ENDPOINT", "http://127.0.0.1:9");
    let output = expect(offline, 0, "");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), hub.snapshot().to_string_lossy());

    let listed = document(&expect(hub.marlin(&["list", "--json"]), 0, ""));
    assert_eq!(listed[0]["id"], "org/name");
    assert_eq!(listed[0]["snapshots"][0]["revisions"], json!(["main"]));
    assert_eq!(listed[0]["snapshots"][0]["bytes"], size);
    let listed = expect(hub.marlin(&["list"]), 0, "");
    assert!(String::from_utf8_lossy(&listed.stdout).starts_with("org/name  main"));
    expect(hub.marlin(&["rm", "org/name"]), 0, "removed org/name");
    assert!(!hub.repository().exists());
    expect(hub.marlin(&["rm", "org/name"]), 3, "not in the cache");
    expect(hub.marlin(&["list"]), 0, "no models");
}

#[test]
fn dropped_connection_continues_where_it_broke() {
    let weights = weights();
    let hub = simple(&weights);
    // The first request is for config.json.
    hub.faults(&[Fault::Busy, Fault::Cut(1), Fault::Fine, Fault::Cut(50_000)]);
    let report = document(&expect(hub.marlin(&["pull", "org/name", "--json"]), 0, ""));
    assert_eq!(report["downloaded_bytes"], weights.len() + 2);
    assert_eq!(fs::read(hub.snapshot().join("model.safetensors")).unwrap(), weights);
    let ranges: Vec<_> = hub.requests().into_iter().map(|r| r[1].clone()).collect();
    assert_eq!(ranges, ["", "", "bytes=1-", "", "bytes=50000-"]);
}

#[test]
fn killed_download_continues() {
    let weights = weights();
    let hub = simple(&weights);
    hub.faults(&[Fault::Fine, Fault::Stall(120_000)]);
    let mut child = hub.marlin(&["pull", "org/name"]).stderr(Stdio::null()).spawn().unwrap();
    let partial = hub.repository().join("blobs").join(etag(&weights, true) + ".incomplete");
    let arrived = || fs::metadata(&partial).map_or(0, |m| m.len());
    for _ in 0..1000 {
        if arrived() == 120_000 {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(arrived(), 120_000);
    assert!(!hub.repository().join("refs/main").exists(), "an unfinished model has no name");
    let listed = document(&expect(hub.marlin(&["list", "--json"]), 0, ""));
    assert_eq!(listed[0]["partial_bytes"], 120_000);

    hub.requests();
    let report = document(&expect(hub.marlin(&["pull", "org/name", "--json"]), 0, ""));
    assert_eq!(report["downloaded_bytes"], weights.len() - 120_000);
    assert_eq!(hub.requests()[0][1], "bytes=120000-");
    assert_eq!(fs::read(hub.snapshot().join("model.safetensors")).unwrap(), weights);
    assert!(!partial.exists());
}

#[test]
fn server_without_ranges_starts_over() {
    let weights = weights();
    let hub = simple(&weights);
    hub.faults(&[Fault::Fine, Fault::Cut(100_000), Fault::NoRanges]);
    expect(hub.marlin(&["pull", "org/name"]), 0, "");
    assert_eq!(fs::read(hub.snapshot().join("model.safetensors")).unwrap(), weights);
}

#[test]
fn wrong_bytes_are_refused() {
    let weights = weights();
    let hub = simple(&weights);
    hub.faults(&[Fault::Fine, Fault::Wrong]);
    expect(
        hub.marlin(&["pull", "org/name"]),
        6,
        "model.safetensors: the 300000 bytes that arrived",
    );
    let blobs: Vec<_> = fs::read_dir(hub.repository().join("blobs")).unwrap().collect();
    assert_eq!(blobs.len(), 1, "only config.json");
    assert!(!hub.repository().join("refs/main").exists());
    expect(hub.marlin(&["inspect", "org/name"]), 3, "marlin pull org/name");
    // So are those of a small file, by its git blob id.
    let hub = simple(&weights);
    hub.faults(&[Fault::Wrong]);
    expect(hub.marlin(&["pull", "org/name"]), 6, "config.json");
}

#[test]
fn damaged_partial_file_starts_over() {
    let weights = weights();
    let hub = simple(&weights);
    let blobs = hub.repository().join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    for length in [1000, weights.len(), weights.len() + 5] {
        fs::write(blobs.join(etag(&weights, true) + ".incomplete"), vec![7; length]).unwrap();
        expect(hub.marlin(&["pull", "org/name"]), 0, "damaged; starting over");
        assert_eq!(fs::read(hub.snapshot().join("model.safetensors")).unwrap(), weights);
        fs::remove_file(blobs.join(etag(&weights, true))).unwrap();
    }
}

#[test]
fn refusals_have_their_codes() {
    let hub = simple(b"weights");
    for (status, reason, code, needle) in [
        (404, "RepoNotFound", 3, "org/name at revision main: not found"),
        (404, "RevisionNotFound", 3, "no such revision"),
        (401, "RepoNotFound", 3, "set HF_TOKEN"),
        (403, "GatedRepo", 1, "accept the model's terms"),
    ] {
        hub.state.lock().unwrap().refuse = Some((status, reason));
        expect(hub.marlin(&["pull", "org/name"]), code, needle);
    }
    expect(hub.marlin(&["pull", "name"]), 2, "is not ORG/NAME");
    expect(hub.marlin(&["pull", "org/name", "--revision", "../x"]), 2, "--revision");
    let mut offline = hub.marlin(&["pull", "org/name"]);
    offline.env("HF_HUB_OFFLINE", "1");
    expect(offline, 5, "HF_HUB_OFFLINE is set");
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut unreachable = hub.marlin(&["pull", "org/name"]);
    unreachable.env("HF_ENDPOINT", format!("http://{closed}"));
    expect(unreachable, 5, "cannot reach");
}

#[test]
fn token_stays_with_the_endpoint() {
    let hub = simple(b"weights");
    fs::write(hub.home.path().join("token"), "secret\n").unwrap();
    hub.faults(&[Fault::Elsewhere]);
    expect(hub.marlin(&["pull", "org/name"]), 0, "");
    let requests = hub.requests();
    assert_eq!(requests[0][2], "Bearer secret");
    assert!(requests[1][3].starts_with("localhost"), "{requests:?}");
    assert_eq!(requests[1][2], "", "the redirect's host got the token");
    assert_eq!(requests[2][2], "Bearer secret");
}

#[test]
fn several_gguf_files_are_a_choice() {
    let hub = Hub::new(&[
        ("README.md", b"read me", false),
        ("a-Q4_K_M.gguf", b"GGUF four", true),
        ("a-Q8_0.gguf", b"GGUF eight", true),
    ]);
    expect(hub.marlin(&["pull", "org/name"]), 2, "--include 'a-Q4_K_M.gguf'");
    expect(hub.marlin(&["pull", "org/name", "--include", "*Q5*"]), 3, "nothing matches \"*Q5*\"");
    expect(hub.marlin(&["pull", "org/name", "--include", "*Q4*"]), 0, "");
    assert!(!hub.snapshot().join("a-Q8_0.gguf").exists());
    let opened = expect(hub.marlin(&["inspect", "org/name"]), 1, "cannot open the model");
    assert!(String::from_utf8_lossy(&opened.stderr).contains("a-Q4_K_M.gguf"));
    expect(hub.marlin(&["inspect", "org/name/a-Q8_0.gguf"]), 3, "--include 'a-Q8_0.gguf'");
    expect(hub.marlin(&["pull", "org/name", "--include", "*Q8*"]), 0, "");
    expect(hub.marlin(&["inspect", "org/name"]), 2, "\n  -m org/name/a-Q8_0.gguf");
    expect(hub.marlin(&["inspect", "org/name/a-Q8_0.gguf"]), 1, "a-Q8_0.gguf");
}

#[test]
fn paths_outside_the_repository_are_refused() {
    for path in ["../../../evil.safetensors", "/evil.safetensors", "a\\b.safetensors"] {
        let hub = Hub::new(&[("config.json", b"{}", false), (path, b"evil", true)]);
        expect(hub.marlin(&["pull", "org/name"]), 1, "is not a path inside the repository");
        assert!(!hub.repository().exists());
    }
}
