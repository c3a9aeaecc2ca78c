//! Every operator on every device that this build finds.

mod common;

use marlin_tensor::{CacheLayerSpec, CacheSpec, CacheType};
use marlin_testkit::conformance::CHECKS;

#[test]
fn operators_conform() {
    conform(|name| !is_draw(name));
}

/// Beside the others: the kernel that chooses a token waits so often that software Vulkan takes longer to compile it than for all of them.
#[test]
fn draws_conform() {
    conform(is_draw);
}

fn is_draw(name: &str) -> bool {
    name.contains("draws")
}

fn conform(wanted: impl Fn(&str) -> bool) {
    for device in common::devices() {
        let backend = marlin_gpu::open(&device).unwrap();
        for (name, check) in CHECKS.iter().filter(|(name, _)| wanted(name)) {
            let start = std::time::Instant::now();
            check(&*backend);
            eprintln!("{name} on {}: {:.1} s", backend.name(), start.elapsed().as_secs_f64());
        }
    }
}

#[test]
fn heads_that_are_no_whole_groups_have_no_quantized_cache() {
    for device in common::devices() {
        let backend = marlin_gpu::open(&device).unwrap();
        for (key_head_dim, value_head_dim) in [(80, 64), (64, 80), (48, 0)] {
            let layers = vec![CacheLayerSpec { num_kv_heads: 2, key_head_dim, value_head_dim }];
            let spec = |cache_type| CacheSpec {
                layers: layers.clone(),
                block_size: 4,
                num_blocks: 2,
                cache_type,
            };
            assert!(backend.create_cache(&spec(CacheType::F16)).is_ok());
            for cache_type in [CacheType::Q8, CacheType::Q4, CacheType::K8V4] {
                let error = backend.create_cache(&spec(cache_type)).err().unwrap().to_string();
                let columns = if value_head_dim == 0 { "48 columns" } else { "80 columns" };
                assert!(error.contains(cache_type.name()) && error.contains(columns), "{error}");
            }
        }
    }
}
