//! Every operator on every device that this build finds.

mod common;

use marlin_testkit::conformance::CHECKS;

#[test]
fn operators_conform() {
    for device in common::devices() {
        let backend = marlin_gpu::open(&device).unwrap();
        for (name, check) in CHECKS {
            let start = std::time::Instant::now();
            check(&*backend);
            eprintln!("{name} on {}: {:.1} s", backend.name(), start.elapsed().as_secs_f64());
        }
    }
}
