//! Replays the inputs kept for the fuzz target of this crate.

#[path = "corpus/checks.rs"]
mod checks;

#[test]
fn kept_inputs() {
    marlin_testkit::replay("exl3", |path, bytes| {
        println!("{}", path.display());
        checks::exl3(bytes);
    });
}
