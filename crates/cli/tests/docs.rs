//! The page of the command line is what the binary says of itself.

use std::path::Path;
use std::process::Command;

/// Long help of `marlin VERBS`.
fn help(verbs: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    let output = command.args(verbs).arg("--help").env("COLUMNS", "100").output().unwrap();
    assert!(output.status.success(), "marlin {} --help", verbs.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

/// Verbs that a help text lists.
fn verbs(help: &str) -> Vec<&str> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = lines.take_while(|line| !line.is_empty());
    // Deeper lines continue a description.
    let names = listed.filter_map(|line| line.strip_prefix("  ")?.split(' ').next());
    names.filter(|name| !["", "help"].contains(name)).collect()
}

fn section(page: &mut String, path: &[&str]) {
    let text = help(path);
    let name = [&["marlin"], path].concat().join(" ");
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    page.push_str(&format!("\n## {name}\n\n```text\n{}\n```\n", lines.join("\n").trim_end()));
    for verb in verbs(&text) {
        section(page, &[path, &[verb]].concat());
    }
}

fn page() -> String {
    let mut page = String::from(
        "# Command line\n\n\
         Written by `crates/cli/tests/docs.rs`; do not edit.\n\n\
         Verbs, options and the fields of `--json` are a contract: scripts may rely on them. Results go\n\
         to stdout, messages and bars to stderr. Exit codes: 0 done, 1 failed, 2 wrong arguments,\n\
         3 not found, 4 does not fit, 5 no network, 6 corrupt file, 130 interrupted.\n\n\
         Before any of a model is loaded, what it needs is held to what is free, and what does not fit ends\n\
         with code 4 and these numbers. Needed are the weights in the form that the device holds them, the\n\
         cache, and at most so much for a forward pass; `marlin bench memory` prints them beside what was\n\
         measured. Free on a GPU is what no program holds, as CUDA says, or what its driver says it has, less\n\
         what this process took; Vulkan says neither. On a processor it is memory and swap space, what the\n\
         control groups of the process leave, and `ulimit -v` and `-d`; on a Mac, where others' memory is\n\
         compressed and swapped, all of it. Weights that a processor reads in place, from the mapped file,\n\
         need none: a model larger than memory runs, slowly, and a note says so.\n\n\
         `MARLIN_CPU` forces an instruction set, one of those that `marlin doctor` lists; `NO_COLOR`\n\
         turns colours off.\n",
    );
    section(&mut page, &[]);
    page
}

#[test]
fn the_page_of_verbs_is_current() {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/cli.md");
    let fresh = page();
    if std::fs::read_to_string(&committed).unwrap_or_default() != fresh {
        let written = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli.md");
        std::fs::write(&written, fresh).unwrap();
        panic!("out of date: cp {} {}", written.display(), committed.display());
    }
}
