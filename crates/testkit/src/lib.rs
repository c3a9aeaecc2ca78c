//! Development only: tiny seeded checkpoints with reference logits, damaged files, and the table of operators that every
//! backend must pass.

pub mod conformance;
pub mod draws;
pub mod mutate;

use std::path::{Path, PathBuf};

/// Every tiny language model.
pub const FAMILIES: [&str; 15] = [
    "deepseek_v2",
    "deepseek_v2_grouped",
    "deepseek_v3",
    "gemma3",
    "glm4_moe_lite",
    "llama",
    "llama_bias",
    "llama_sharded",
    "mistral",
    "mixtral",
    "phi3",
    "phi3_short",
    "qwen2",
    "qwen3",
    "qwen3_moe",
];

/// Directory of the tiny language model `family`: `config.json`, `config_legacy.json`,
/// safetensors, and `ref.safetensors` with reference results.
pub fn tiny_model(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/llm").join(family)
}

/// Calls `check` with every input that is kept for the fuzz target `target` in `fuzz/corpus-kept`: those that
/// reach every part of a reader, and those that once broke it.
///
/// # Panics
/// When none is kept.
pub fn replay(target: &str, mut check: impl FnMut(&Path, &[u8])) {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus-kept").join(target);
    let entries = std::fs::read_dir(&kept).expect("a folder of kept inputs");
    let inputs: Vec<PathBuf> = entries.map(|e| e.expect("a readable entry").path()).collect();
    assert!(!inputs.is_empty(), "{}", kept.display());
    for input in inputs {
        check(&input, &std::fs::read(&input).expect("a readable input"));
    }
}

/// Deterministic 64-bit noise (SplitMix64).
pub struct Noise(pub u64);

impl Noise {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// Uniform in ±1.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Roughly Gaussian, variance 1.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.bits() as f32 / u64::MAX as f32).sum::<f32>() - 6.0
    }
}
