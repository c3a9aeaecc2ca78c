//! `marlin inspect`: what a model is, from its configuration; what its file holds, if there is one.

use crate::args::{ActivationsArg, Inspect};
use crate::{console, device, locate};
use anyhow::{Result, anyhow};
use marlin_checkpoint::{Checkpoint, Container};
use marlin_models::{FeedForwardSpec, LinearSpec, MixerSpec, ModelSpec, Source};
use marlin_tensor::{Backend, CacheType, LinearOptions};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

#[derive(Debug, Serialize)]
struct Matrix {
    name: String,
    shape: [usize; 2],
    format: &'static str,
    bits_per_weight: f64,
    bytes: u64,
    kernel: String,
}

#[derive(Debug, Serialize)]
struct Report {
    architecture: String,
    container: &'static str,
    layers: usize,
    layer_kinds: Vec<String>,
    hidden_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    parameters: u64,
    active_parameters: u64,
    multi_token_prediction: bool,
    bits_per_weight: Option<f64>,
    bits_per_weight_without_embedding: Option<f64>,
    model_bytes: u64,
    cache_bytes_per_token: usize,
    defaults_taken: BTreeMap<String, String>,
    fields_not_read: BTreeMap<String, String>,
    tensors: Vec<Matrix>,
}

/// Prints the report.
pub fn run(args: &Inspect) -> Result<ExitCode> {
    let name = args.path.as_deref().or(args.model.as_deref());
    let checkpoint = locate::open(name)?;
    let spec = marlin_models::spec(&checkpoint)?;
    let backend = device::backend(&args.device, ActivationsArg::Auto)?;
    let report = report(&checkpoint, &spec, backend.as_ref())?;
    if args.json {
        console::json(&report)?;
    } else {
        print(&report, name, args.tensors)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// How a model is stored, in a few figures.
#[derive(Debug, Serialize)]
pub struct Storage {
    /// Formats of the matrices in the layers, most weights first, those under 1 % left out.
    pub format: String,
    /// Of the matrices in the layers.
    pub bits_per_weight_linears: f64,
    /// Of the output matrix, which may be the embedding.
    pub bits_per_weight_head: f64,
    /// Of all matrices.
    pub bits_per_weight: f64,
    /// Of the files that hold tensors.
    pub file_bytes: u64,
}

/// Measures how `checkpoint` is stored; its weights must be there.
pub fn storage(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    backend: &dyn Backend,
) -> Result<Storage> {
    let report = report(checkpoint, spec, backend)?;
    let missing = || anyhow!("{}: no weights here, configuration only", checkpoint.path.display());
    let mut linears = Bits::default();
    let mut formats: BTreeMap<&str, f64> = BTreeMap::new();
    let [embedding, head] = [&spec.embedding.key, &spec.head.linear.key];
    for m in report.tensors.iter().filter(|m| ![embedding, head].contains(&&m.name)) {
        linears.add(m);
        *formats.entry(m.format).or_default() += m.weights();
    }
    let output = report.tensors.iter().find(|m| m.name == *head).or(report.tensors.first());
    let mut formats: Vec<_> =
        formats.into_iter().filter(|(_, n)| *n >= 0.01 * linears.weights).collect();
    formats.sort_by(|a, b| b.1.total_cmp(&a.1));
    let names: Vec<_> = formats.into_iter().map(|(name, _)| name).collect();
    Ok(Storage {
        format: names.join("+"),
        bits_per_weight_linears: linears.per_weight().ok_or_else(missing)?,
        bits_per_weight_head: output.ok_or_else(missing)?.bits_per_weight,
        bits_per_weight: report.bits_per_weight.ok_or_else(missing)?,
        file_bytes: file_bytes(checkpoint),
    })
}

/// Bytes of the files that hold tensors; of the tensors where they are in memory.
pub fn file_bytes(checkpoint: &Checkpoint) -> u64 {
    let mut files: BTreeMap<&Path, u64> = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        *files.entry(&tensor.file).or_default() += tensor.data.len() as u64;
    }
    let on_disk = |(path, tensors)| std::fs::metadata(path).map_or(tensors, |file| file.len());
    files.into_iter().map(on_disk).sum()
}

/// Bits of a group of matrices.
#[derive(Default)]
struct Bits {
    weights: f64,
    bytes: f64,
}

impl Bits {
    fn add(&mut self, matrix: &Matrix) {
        self.weights += matrix.weights();
        self.bytes += matrix.bytes as f64;
    }

    fn per_weight(&self) -> Option<f64> {
        (self.weights > 0.0).then(|| self.bytes * 8.0 / self.weights)
    }
}

impl Matrix {
    fn weights(&self) -> f64 {
        self.shape[0] as f64 * self.shape[1] as f64
    }
}

fn report(checkpoint: &Checkpoint, spec: &ModelSpec, backend: &dyn Backend) -> Result<Report> {
    let has_weights = checkpoint.tensors().next().is_some();
    let source = Source::new(checkpoint);
    let mut tensors = Vec::new();
    let mut mtp = spec.mtp.is_some();
    if has_weights {
        let embedding = LinearSpec {
            key: spec.embedding.key.clone(),
            out_features: spec.vocab_size,
            in_features: spec.hidden_size,
            bias: false,
            label: String::new(),
            fused: None,
        };
        tensors.push(matrix(&source, &embedding, backend, "lookup")?);
        for block in &spec.blocks {
            for linear in block.linears() {
                tensors.push(matrix(&source, linear, backend, "")?);
            }
        }
        mtp = source.has_mtp(spec);
        if let Some(m) = spec.mtp.as_ref().filter(|_| mtp) {
            tensors.push(matrix(&source, &m.projection, backend, "")?);
            for linear in m.block.linears() {
                tensors.push(matrix(&source, linear, backend, "")?);
            }
        }
        if source.has(&spec.head.linear.key) {
            tensors.push(matrix(&source, &spec.head.linear, backend, "")?);
        }
    }
    let bits = |list: &[Matrix]| {
        let mut bits = Bits::default();
        list.iter().for_each(|m| bits.add(m));
        bits.per_weight()
    };
    let cache = spec.cache_spec(false, 1, 1, CacheType::F16);
    Ok(Report {
        architecture: spec.model_type.clone(),
        container: match checkpoint.container {
            Container::HuggingFace { .. } => "safetensors",
            Container::Gguf { .. } => "gguf",
        },
        layers: spec.blocks.len(),
        layer_kinds: layer_kinds(spec),
        hidden_size: spec.hidden_size,
        vocab_size: spec.vocab_size,
        max_position_embeddings: spec.max_position_embeddings,
        parameters: spec.parameters(),
        active_parameters: spec.active_parameters(),
        multi_token_prediction: mtp,
        bits_per_weight: bits(&tensors),
        bits_per_weight_without_embedding: bits(tensors.get(1..).unwrap_or_default()),
        model_bytes: checkpoint.tensor_bytes(),
        cache_bytes_per_token: cache.bytes_per_token(),
        defaults_taken: spec.defaults.clone(),
        fields_not_read: spec.unread.clone(),
        tensors,
    })
}

fn matrix(
    source: &Source,
    linear: &LinearSpec,
    backend: &dyn Backend,
    path: &str,
) -> Result<Matrix> {
    let weight = source.linear(linear)?;
    let options = LinearOptions { float_activations: linear.key.ends_with(".mlp.gate") };
    let kernel = match path {
        "" => backend.kernel(weight.format, options),
        path => path.to_owned(),
    };
    Ok(Matrix {
        name: linear.key.clone(),
        shape: [linear.out_features, linear.in_features],
        format: weight.format,
        bits_per_weight: weight.bits_per_weight(),
        bytes: weight.bytes(),
        kernel,
    })
}

/// `"0-2: latent attention, gated"` per run of like layers.
fn layer_kinds(spec: &ModelSpec) -> Vec<String> {
    let kind = |i: usize| {
        let block = &spec.blocks[i];
        let mixer = match &block.mixer {
            MixerSpec::Gqa(g) => {
                let p = &g.params;
                let window = p.window.map_or(String::new(), |w| format!(", window {w}"));
                format!(
                    "attention {}/{} heads of {}{window}",
                    p.num_heads, p.num_kv_heads, p.key_head_dim
                )
            }
            MixerSpec::Mla(m) => format!(
                "latent attention {} heads, rank {} + {} rotary",
                m.num_heads, m.kv_lora_rank, m.qk_rope_head_dim
            ),
        };
        let ffn = match &block.feed_forward {
            FeedForwardSpec::Gated(g) => format!("gated {}", g.gate.out_features),
            FeedForwardSpec::Moe(m) => {
                let shared = if m.shared.is_some() { " + shared" } else { "" };
                let width = m.experts.first().map_or(0, |e| e.gate.out_features);
                format!("{} of {} experts of {width}{shared}", m.router.top_k, m.router.num_experts)
            }
        };
        format!("{mixer}; {ffn}")
    };
    let mut runs: Vec<(usize, usize, String)> = Vec::new();
    for i in 0..spec.blocks.len() {
        let kind = kind(i);
        match runs.last_mut() {
            Some((_, end, last)) if *last == kind => *end = i,
            _ => runs.push((i, i, kind)),
        }
    }
    // Alternating layers (local and global attention) read better as a list of kinds.
    if runs.len() > 8 {
        let mut kinds: Vec<(String, usize)> = Vec::new();
        for (start, end, kind) in runs {
            match kinds.iter_mut().find(|(k, _)| *k == kind) {
                Some((_, n)) => *n += end - start + 1,
                None => kinds.push((kind, end - start + 1)),
            }
        }
        return kinds.into_iter().map(|(k, n)| format!("{n} layers: {k}")).collect();
    }
    runs.into_iter()
        .map(|(start, end, kind)| match start == end {
            true => format!("layer {start}: {kind}"),
            false => format!("layers {start}-{end}: {kind}"),
        })
        .collect()
}

fn print(r: &Report, name: Option<&str>, all: bool) -> Result<()> {
    let line = |label: &str, text: String| console::line(&format!("{label:<14} {text}"));
    line("model", locate::name(name).to_owned())?;
    line("architecture", format!("{} ({})", r.architecture, r.container))?;
    let mtp = if r.multi_token_prediction { ", and a multi-token-prediction layer" } else { "" };
    line("layers", format!("{}{mtp}", r.layers))?;
    for kind in &r.layer_kinds {
        line("", kind.clone())?;
    }
    line(
        "sizes",
        format!(
            "hidden {}, vocabulary {}, context {}",
            r.hidden_size, r.vocab_size, r.max_position_embeddings
        ),
    )?;
    line(
        "parameters",
        format!(
            "{} ({} active per token, without the embedding)",
            console::count(r.parameters),
            console::count(r.active_parameters)
        ),
    )?;
    line("cache", format!("{} per token (f16)", console::bytes(r.cache_bytes_per_token as u64)))?;
    if let (Some(with), Some(without)) = (r.bits_per_weight, r.bits_per_weight_without_embedding) {
        line(
            "weights",
            format!(
                "{}, {with:.3} bits per weight ({without:.3} without the embedding)",
                console::bytes(r.model_bytes)
            ),
        )?;
        let mut groups: BTreeMap<(&str, &str), (usize, u64)> = BTreeMap::new();
        for m in &r.tensors {
            let entry = groups.entry((m.format, &m.kernel)).or_default();
            *entry = (entry.0 + 1, entry.1 + m.bytes);
        }
        for ((format, kernel), (n, bytes)) in groups {
            line(
                "",
                format!("{format:<8} {n:>5} matrices {:>9}  {kernel}", console::bytes(bytes)),
            )?;
        }
    } else {
        line("weights", "none here, configuration only".into())?;
    }
    for (field, value) in &r.defaults_taken {
        line("default", format!("{field} = {value}"))?;
    }
    for (field, value) in &r.fields_not_read {
        line("not read", format!("{field} = {}", console::short(value)))?;
    }
    if all {
        for m in &r.tensors {
            let shape = format!("{}x{}", m.shape[0], m.shape[1]);
            console::line(&format!(
                "{:<60} {shape:>14} {:<8} {:>7.3} {}",
                m.name, m.format, m.bits_per_weight, m.kernel
            ))?;
        }
    }
    Ok(())
}
