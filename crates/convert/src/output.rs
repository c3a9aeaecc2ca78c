//! The finished directory: shards, index, configurations, and the source's other files.

use crate::error::ConvertError;
use crate::origin::Named;
use marlin_checkpoint::{StoredTensor, read_safetensors, write_file, write_safetensors};
use marlin_tensor::DType;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::Path;

type Result<T> = std::result::Result<T, ConvertError>;

/// Largest shard, bytes.
pub const SHARD_BYTES: u64 = 8 << 30;

/// A module's key and all of its tensors.
pub type Module = (String, Vec<Named>);

/// Writes the tensors of `modules` as one file, or as shards of at most `shard_bytes` with an index; no
/// module is cut. Returns the bytes of all files.
///
/// # Errors
/// Those of the file system.
pub fn write_tensors(directory: &Path, modules: &[Module], shard_bytes: u64) -> Result<u64> {
    let size = |m: &Module| m.1.iter().map(|(_, t)| t.bytes().len() as u64).sum::<u64>();
    let mut shards: Vec<Vec<&Module>> = vec![Vec::new()];
    let mut filled = 0;
    for module in modules {
        let bytes = size(module);
        if filled > 0 && filled + bytes > shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        shards.last_mut().expect("never empty").push(module);
    }
    let count = shards.len();
    let mut map = Map::new();
    let mut written = 0;
    for (i, shard) in shards.iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let tensors = shard.iter().flat_map(|m| &m.1).map(|(name, t)| (name.as_str(), t));
        let path = directory.join(&name);
        write_safetensors(&path, tensors, &[("format", "pt")])?;
        let about = std::fs::metadata(&path);
        written += about.map_err(|source| ConvertError::Io { path, source })?.len();
        for (tensor, _) in shard.iter().flat_map(|m| &m.1) {
            map.insert(tensor.clone(), json!(name));
        }
    }
    if count > 1 {
        let total: u64 = modules.iter().map(size).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        let path = directory.join("model.safetensors.index.json");
        write_file(&path, format!("{index:#}\n").as_bytes())?;
    }
    Ok(written)
}

/// Reads back what [`write_tensors`] wrote, as any reader would: through the index where there is one.
///
/// # Errors
/// When a file is missing or damaged.
pub fn read_tensors(directory: &Path) -> Result<Vec<StoredTensor>> {
    let path = directory.join("model.safetensors.index.json");
    if !path.exists() {
        return Ok(read_safetensors(&directory.join("model.safetensors"))?.tensors);
    }
    let damaged = |reason: String| ConvertError::Job { path: path.clone(), reason };
    let bytes = std::fs::read(&path).map_err(|e| damaged(e.to_string()))?;
    let index: Value = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
    let map = index["weight_map"].as_object().ok_or_else(|| damaged("no weight_map".to_owned()))?;
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    let mut tensors = Vec::new();
    for name in names {
        let of_file = read_safetensors(&directory.join(name))?.tensors.into_iter();
        tensors.extend(of_file.filter(|t| map.get(&t.name).is_some_and(|file| file == name)));
    }
    Ok(tensors)
}

/// Removes the configuration and the weights of an earlier model, the configuration first: without it a
/// directory is no finished model.
///
/// # Errors
/// Those of the file system.
pub fn clear(directory: &Path) -> Result<()> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ConvertError::Io { path, source }
    };
    let config = directory.join("config.json");
    if config.exists() {
        std::fs::remove_file(&config).map_err(io(&config))?;
    }
    for entry in std::fs::read_dir(directory).map_err(io(directory))? {
        let path = entry.map_err(io(directory))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let weights = name.starts_with("model") && name.ends_with(".safetensors");
        if weights || name == "model.safetensors.index.json" {
            std::fs::remove_file(&path).map_err(io(&path))?;
        }
    }
    Ok(())
}

/// `quantization_config` with the table of what every module stores, as tools that recognise EXL3 by
/// `quantization_config.json` expect it.
pub fn tensor_storage(quantization: &Value, modules: &[Module]) -> Value {
    let mut storage = Map::new();
    for (key, tensors) in modules {
        let mut entry = Map::new();
        let mut stored = Map::new();
        for (name, t) in tensors {
            stored.insert(
                name.clone(),
                json!({ "shape": t.shape(), "n_bytes": t.bytes().len(), "dtype": torch(t.dtype()) }),
            );
            let word = || t.bytes().as_chunks().0.first().map(|b| u32::from_le_bytes(*b));
            match name.strip_prefix(key.as_str()) {
                Some(".trellis") => {
                    let twice = t.shape().last().copied().unwrap_or(0) / 8;
                    let bits = match twice % 2 {
                        0 => json!(twice / 2),
                        _ => json!(twice as f64 / 2.0),
                    };
                    entry.insert("quant_format".to_owned(), json!("exl3"));
                    entry.insert("bits_per_weight".to_owned(), bits);
                }
                Some(".mcg") => drop(entry.insert("mcg_multiplier".to_owned(), json!(word()))),
                Some(".mul1") => drop(entry.insert("mul1_multiplier".to_owned(), json!(word()))),
                _ => {}
            }
        }
        let mut module = Map::new();
        module.insert("stored_tensors".to_owned(), stored.into());
        module.extend(entry);
        storage.insert(key.clone(), module.into());
    }
    let mut out = quantization.clone();
    out["tensor_storage"] = storage.into();
    out
}

fn torch(dtype: DType) -> String {
    let name = match dtype {
        DType::F16 => "float16",
        DType::BF16 => "bfloat16",
        DType::F32 => "float32",
        DType::I16 => "int16",
        DType::I32 => "int32",
        other => return other.to_string(),
    };
    format!("torch.{name}")
}

/// Copies everything of the source directory that is not weights, their index, or a configuration that the
/// quantizer writes itself.
///
/// # Errors
/// Those of the file system.
pub fn copy_sidecars(source: &Path, output: &Path) -> Result<()> {
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| ConvertError::Io { path, source }
    };
    const OURS: [&str; 3] =
        ["config.json", "quantization_config.json", "model.safetensors.index.json"];
    const WEIGHTS: [&str; 7] = ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack"];
    for entry in std::fs::read_dir(source).map_err(io(source))? {
        let entry = entry.map_err(io(source))?;
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let weights = path.extension().is_some_and(|e| WEIGHTS.iter().any(|w| e == *w));
        if !path.is_file() || weights || name.starts_with('.') || OURS.contains(&&*name) {
            continue;
        }
        let bytes = std::fs::read(&path).map_err(io(&path))?;
        write_file(&output.join(&*name), &bytes)?;
    }
    Ok(())
}

/// Class that Hugging Face libraries load `model_type` with.
pub fn class_name(model_type: &str) -> Option<&'static str> {
    Some(match model_type {
        "llama" => "LlamaForCausalLM",
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        "qwen3_moe" => "Qwen3MoeForCausalLM",
        "mixtral" => "MixtralForCausalLM",
        "gemma3_text" => "Gemma3ForCausalLM",
        "phi3" => "Phi3ForCausalLM",
        "deepseek_v2" => "DeepseekV2ForCausalLM",
        "deepseek_v3" => "DeepseekV3ForCausalLM",
        "glm4_moe_lite" => "Glm4MoeLiteForCausalLM",
        _ => return None,
    })
}
