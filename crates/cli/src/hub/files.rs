//! Which files of a repository are needed to run the model.
//!
//! The weights are those that the checkpoint reader opens: the shards an index names, else
//! `model.safetensors`, else every safetensors file at the top; an EXL3 directory ignores the
//! index, which its converter leaves stale. A GGUF file is the whole model, so a repository of
//! several is a choice that only the user can make.

use super::RemoteFile;
use crate::glob::glob;
use crate::{console, exit};
use anyhow::{Context, Result};
use serde_json::Value;
use std::collections::BTreeSet;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Whether the file describes the model: configuration, tokenizer, chat template, shard index.
pub fn is_small_file(path: &str) -> bool {
    let named = [
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "quantization_config.json",
        "quantize_config.json",
        "quant_config.json",
        "hf_quant_config.json",
        INDEX,
    ];
    // How the states of a model for embeddings become a vector.
    path == "1_Pooling/config.json"
        || !path.contains('/') && (named.contains(&path) || path.starts_with("tokenizer"))
}

/// The weight files among `files`. `config` and `index` are the contents of `config.json` and
/// [`INDEX`], where the repository has them.
///
/// # Errors
/// When there are none, or several models to choose from.
pub fn choose_weights<'f>(
    name: &str,
    files: &'f [RemoteFile],
    config: Option<&[u8]>,
    index: Option<&[u8]>,
) -> Result<Vec<&'f RemoteFile>> {
    let top: Vec<_> = files
        .iter()
        .filter(|f| f.path.ends_with(".safetensors") && !f.path.contains('/'))
        .collect();
    if config.is_some() && !top.is_empty() {
        if is_exl3(config) {
            return Ok(top);
        }
        if let Some(index) = index {
            return indexed(name, files, index);
        }
        return Ok(match top.iter().find(|f| f.path == SINGLE) {
            Some(single) => vec![*single],
            None => top,
        });
    }
    match ggufs(files).as_slice() {
        [] => {
            let others: Vec<_> = files.iter().map(|f| f.path.as_str()).take(12).collect();
            let message = format!(
                "{name} holds no safetensors with a config.json and no .gguf file (it has: {})",
                others.join(", ")
            );
            Err(exit::coded(exit::NOT_FOUND, message))
        }
        [only] => Ok(only.clone()),
        several => {
            let mut message = format!("{name} holds several models; choose one with --include:");
            for group in several {
                let bytes: u64 = group.iter().map(|f| f.bytes).sum();
                let pattern = pattern(&group[0].path);
                message += &format!("\n  --include '{pattern}'  {}", console::bytes(bytes));
            }
            Err(exit::usage(message))
        }
    }
}

fn is_exl3(config: Option<&[u8]>) -> bool {
    let config: Option<Value> = config.and_then(|bytes| serde_json::from_slice(bytes).ok());
    config.is_some_and(|c| c["quantization_config"]["quant_method"] == "exl3")
}

/// The files that the index names.
fn indexed<'f>(name: &str, files: &'f [RemoteFile], index: &[u8]) -> Result<Vec<&'f RemoteFile>> {
    let index: Value =
        serde_json::from_slice(index).with_context(|| format!("{name}: {INDEX} is not JSON"))?;
    let map = index["weight_map"].as_object();
    let shards: BTreeSet<&str> =
        map.into_iter().flatten().filter_map(|(_, f)| f.as_str()).collect();
    let find = |shard: &&str| {
        files.iter().find(|f| f.path == *shard).ok_or_else(|| {
            let message = format!("{name}: {INDEX} names {shard}, which the repository lacks");
            exit::coded(exit::NOT_FOUND, message)
        })
    };
    shards.iter().map(find).collect()
}

/// GGUF models: single files, and sets of `NAME-00001-of-0000N.gguf`. Image projectors are none.
fn ggufs(files: &[RemoteFile]) -> Vec<Vec<&RemoteFile>> {
    let mut groups: Vec<Vec<&RemoteFile>> = Vec::new();
    for file in files.iter().filter(|f| f.path.ends_with(".gguf")) {
        let base = file.path.rsplit('/').next().unwrap_or_default();
        if base.starts_with("mmproj") {
            continue;
        }
        let part = pattern(&file.path);
        match groups.iter_mut().find(|g| part.contains('*') && pattern(&g[0].path) == part) {
            Some(group) => group.push(file),
            None => groups.push(vec![file]),
        }
    }
    groups
}

/// The path, with `*` for the part number of a split model.
fn pattern(path: &str) -> String {
    let digits = |t: &str| t.len() == 5 && t.bytes().all(|b| b.is_ascii_digit());
    let split = || {
        let (stem, count) = path.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (stem, part) = stem.rsplit_once('-')?;
        (digits(part) && digits(count)).then(|| format!("{stem}-*-of-{count}.gguf"))
    };
    split().unwrap_or_else(|| path.to_owned())
}

/// Whether `path`, or its last part, matches a pattern of `*` (anything, `/` too) and `?`.
pub fn matching(pattern: &str, path: &str) -> bool {
    let base = path.rsplit('/').next().unwrap_or_default();
    glob(pattern, path) || glob(pattern, base)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(paths: &[&str], config: Option<&str>, index: Option<&str>) -> Result<String> {
        let files: Vec<_> = paths.iter().map(|p| RemoteFile::for_test(p)).collect();
        let found = choose_weights(
            "org/name",
            &files,
            config.map(str::as_bytes),
            index.map(str::as_bytes),
        )?;
        Ok(found.iter().map(|f| f.path.as_str()).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn weights_are_those_the_reader_opens() {
        let index = r#"{"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}"#;
        let exl3 = r#"{"quantization_config": {"quant_method": "exl3"}}"#;
        let shards = ["consolidated.safetensors", "model-1.safetensors", "model-2.safetensors"];
        let rows: [(&[&str], _, _, _); 6] = [
            (
                &["model.safetensors", "consolidated.safetensors"],
                Some("{}"),
                None,
                "model.safetensors",
            ),
            (&shards, Some("{}"), Some(index), "model-1.safetensors model-2.safetensors"),
            (&["a.safetensors", "b.safetensors"], Some("{}"), None, "a.safetensors b.safetensors"),
            (&["output.safetensors"], Some(exl3), Some(index), "output.safetensors"),
            (&["a.Q4_K_M.gguf", "mmproj-F16.gguf"], None, None, "a.Q4_K_M.gguf"),
            (
                &["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"],
                None,
                None,
                "q/m-00001-of-00002.gguf q/m-00002-of-00002.gguf",
            ),
        ];
        for (paths, config, index, expected) in rows {
            assert_eq!(chosen(paths, config, index).unwrap(), expected, "{paths:?}");
        }
        let error = chosen(&["a.gguf", "b-00001-of-00001.gguf"], None, None).unwrap_err();
        assert!(error.to_string().contains("--include 'b-*-of-00001.gguf'"), "{error}");
        assert!(chosen(&["pytorch_model.bin"], Some("{}"), None).is_err());
    }

    #[test]
    fn patterns_match_the_path_or_its_last_part() {
        for (pattern, path, expected) in [
            ("*Q4_K_M*", "sub/a-Q4_K_M.gguf", true),
            ("a-*.gguf", "sub/a-Q4_K_M.gguf", true),
            ("sub/*", "sub/a.gguf", true),
            ("a?.gguf", "ab.gguf", true),
            ("a*b*c", "a-b-x", false),
            ("*", "", true),
            ("", "a", false),
            ("*.gguf", "a.gguf.txt", false),
        ] {
            assert_eq!(matching(pattern, path), expected, "{pattern} {path}");
        }
    }
}
