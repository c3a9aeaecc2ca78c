//! Real `config.json` files, described without a weight. Parameter counts are transformers' own
//! (5.23.0, meta device, `crates/testkit/fixtures/count_parameters.py`).

use marlin_checkpoint::Checkpoint;
use marlin_models::{MixerSpec, spec};
use marlin_tensor::{CacheSpec, DType};
use std::path::Path;

struct Row {
    config: &'static str,
    parameters: u64,
    /// Without the embedding, with the head, chosen experts only.
    active_parameters: u64,
    /// f16.
    cache_bytes_per_token: usize,
    latent: bool,
}

const ROWS: [Row; 7] = [
    Row {
        config: "Meta-Llama-3.1-8B",
        parameters: 8_030_261_248,
        active_parameters: 8_030_261_248 - 525_336_576,
        cache_bytes_per_token: 32 * 2 * 8 * 128 * 2,
        latent: false,
    },
    Row {
        config: "Qwen3-0.6B",
        parameters: 596_049_920,
        active_parameters: 596_049_920,
        cache_bytes_per_token: 28 * 2 * 8 * 128 * 2,
        latent: false,
    },
    Row {
        config: "Qwen3-30B-A3B",
        parameters: 30_532_122_624,
        active_parameters: 30_532_122_624 - 311_164_928 - 48 * 120 * 3 * 2048 * 768,
        cache_bytes_per_token: 48 * 2 * 4 * 128 * 2,
        latent: false,
    },
    Row {
        config: "Mixtral-8x7B-v0.1",
        parameters: 46_702_792_704,
        active_parameters: 46_702_792_704 - 131_072_000 - 32 * 6 * 3 * 4096 * 14_336,
        cache_bytes_per_token: 32 * 2 * 8 * 128 * 2,
        latent: false,
    },
    Row {
        config: "GLM-4.7-Flash",
        parameters: 29_943_393_920,
        active_parameters: 29_943_393_920 - 317_194_240 - 46 * 60 * 3 * 2048 * 1536,
        cache_bytes_per_token: 47 * (512 + 64) * 2,
        latent: true,
    },
    Row {
        config: "DeepSeek-V2-Lite",
        parameters: 15_706_484_224,
        active_parameters: 15_706_484_224 - 209_715_200 - 26 * 58 * 3 * 2048 * 1408,
        cache_bytes_per_token: 27 * (512 + 64) * 2,
        latent: true,
    },
    Row {
        config: "DeepSeek-V3",
        parameters: 671_026_419_200,
        active_parameters: 671_026_419_200 - 926_679_040 - 58 * 248 * 3 * 7168 * 2048,
        cache_bytes_per_token: 61 * (512 + 64) * 2,
        latent: true,
    },
];

#[test]
fn real_configurations_have_the_published_sizes() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/configs");
    for row in &ROWS {
        let name = row.config;
        let checkpoint = Checkpoint::open(&folder.join(format!("{name}.json"))).unwrap();
        let spec = spec(&checkpoint).unwrap();
        assert_eq!(spec.parameters(), row.parameters, "{name}: parameters");
        assert_eq!(spec.active_parameters(), row.active_parameters, "{name}: active");
        let cache = CacheSpec {
            layers: spec.cache_layers(),
            block_size: 16,
            num_blocks: 1,
            dtype: DType::F16,
        };
        assert_eq!(cache.bytes_per_token(), row.cache_bytes_per_token, "{name}: cache");
        let latent = matches!(spec.blocks[0].mixer, MixerSpec::Mla(_));
        assert_eq!(latent, row.latent, "{name}: attention");
    }
}
