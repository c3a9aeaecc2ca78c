//! Replays the inputs kept for the fuzz targets of this crate.

#[path = "corpus/checks.rs"]
mod checks;

#[test]
fn kept_inputs() {
    type Check = fn(&[u8]);
    let targets: [(&str, Check); 4] = [
        ("safetensors", checks::safetensors),
        ("gguf", checks::gguf),
        ("config", checks::config),
        ("index", checks::index),
    ];
    for (target, check) in targets {
        marlin_testkit::replay(target, |path, bytes| {
            println!("{}", path.display());
            check(bytes);
        });
    }
}
