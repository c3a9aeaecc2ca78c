//! `marlin bench serve` and `marlin serve` over TLS. The certificate in `fixtures` is for localhost and of these tests only:
//! `openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500 -subj /CN=localhost -addext
//! subjectAltName=DNS:localhost,IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE`.
#![cfg(feature = "embedded-model")]

use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

const CERTIFICATE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/localhost-cert.pem");
const KEY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/localhost-key.pem");

/// Ends when dropped, also by a test that fails.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn marlin() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command.stdin(Stdio::null()).env("NO_COLOR", "1");
    command
}

/// A server over TLS, and its port.
fn start() -> (Server, u16) {
    let mut command = marlin();
    command.args(["serve", "--port", "0", "--device", "cpu", "--context", "256"]);
    command.args(["--tls-cert", CERTIFICATE, "--tls-key", KEY]).stderr(Stdio::piped());
    let mut server = Server(command.spawn().unwrap());
    let mut lines = BufReader::new(server.0.stderr.take().unwrap()).lines();
    let ready = lines.by_ref().map(Result::unwrap).find(|line| line.contains("ready: "));
    let ready = ready.expect("the server starts");
    let address = ready.split("https://127.0.0.1:").nth(1).expect("it says its address");
    let port = address.split(' ').next().unwrap().parse().unwrap();
    // The rest is read, or the server would wait for a reader.
    std::thread::spawn(move || lines.for_each(drop));
    (server, port)
}

#[test]
fn a_server_with_tls_is_measured() {
    let (_server, port) = start();
    let bench = |url: &str, arguments: &[&str]| {
        let more = [
            "--requests",
            "6",
            "--concurrency",
            "3",
            "--max-tokens",
            "8",
            "--prompt-words",
            "5",
            "--json",
        ];
        marlin().args(["bench", "serve", url]).args(more).args(arguments).output().unwrap()
    };
    for host in ["localhost", "127.0.0.1"] {
        for trust in [&["--ca-file", CERTIFICATE][..], &["--insecure"]] {
            let more = ["--verify", "2", "--one-event-per-token"];
            let done = bench(&format!("https://{host}:{port}"), &[trust, &more].concat());
            let told = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.code(), Some(0), "{host} {trust:?}: {told}");
            let report: Value = serde_json::from_slice(&done.stdout).unwrap();
            assert_eq!(
                (&report["good"], &report["completion_tokens"]),
                (&6.into(), &48.into()),
                "{report}"
            );
            assert_eq!(report["verified"]["same"], 2, "{report}");
        }
    }
    let url = format!("https://127.0.0.1:{port}");
    for (url, arguments, code, words) in [
        // Nobody public has signed it.
        (url.as_str(), &[][..], 5, "UnknownIssuer"),
        (&format!("https://127.0.0.2:{port}"), &["--ca-file", CERTIFICATE], 5, "https://127.0.0.2"),
        (&url, &["--ca-file", KEY], 2, "no certificate in it"),
        (&url, &["--ca-file", "nowhere.pem"], 1, "nowhere.pem"),
        (&format!("http://127.0.0.1:{port}"), &[], 1, "the first requests failed"),
    ] {
        let done = bench(url, arguments);
        let told = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{url} {arguments:?}: {told}");
        assert!(told.contains(words), "{url} {arguments:?}: {told}");
    }
}
