//! Replays the inputs kept for the fuzz targets of this crate.

#[path = "corpus/checks.rs"]
mod checks;

#[test]
fn kept_inputs() {
    for (target, check) in [("exl3", checks::exl3 as fn(&[u8])), ("integer", checks::integer)] {
        marlin_testkit::replay(target, |path, bytes| {
            println!("{}", path.display());
            check(bytes);
        });
    }
}
