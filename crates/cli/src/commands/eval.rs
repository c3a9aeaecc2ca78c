//! `marlin eval`: quality, measured.

mod compare;

use crate::args::{ActivationsArg, DeviceArgs, Eval, TextArgs};
use crate::fit::{Need, Use};
use crate::{console, device, exit, loaded, locate};
use anyhow::{Context, Result, anyhow};
use marlin_checkpoint::Checkpoint;
use marlin_engine::LanguageModel;
use marlin_engine::evaluate::{
    Choice, ChoiceRow, PerplexityOptions, choices, for_each_logits, perplexity,
};
use marlin_models::Model;
use marlin_tensor::CacheType;
use marlin_text::{Specials, Tokenizer};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

/// Runs one evaluation.
pub fn run(args: &Eval) -> Result<ExitCode> {
    match args {
        Eval::Perplexity { model, text, reference, json, device } => {
            run_perplexity(model.model.as_deref(), text, reference.as_deref(), *json, device)
        }
        Eval::Compare { models, reference, max_memory, text, json, device } => {
            compare::run(models, reference.as_deref(), *max_memory, text, *json, device)
        }
        Eval::Logits { model, tokens, output, json, device } => {
            run_logits(model.model.as_deref(), tokens, output, *json, device)
        }
        Eval::Choices { model, task, limit, json, device } => {
            run_choices(model.model.as_deref(), task, *limit, *json, device)
        }
    }
    .map(|()| ExitCode::SUCCESS)
}

fn open(model: Option<&str>) -> Result<(Checkpoint, Tokenizer)> {
    let checkpoint = locate::open(model)?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    Ok((checkpoint, tokenizer))
}

/// Loads `checkpoint` to read texts of up to `tokens` tokens.
fn load(
    checkpoint: &Checkpoint,
    device: &DeviceArgs,
    tokens: usize,
    cache_type: CacheType,
) -> Result<Model> {
    let spec = marlin_models::spec(checkpoint)?;
    let usage = Use::reading(tokens, cache_type, &spec);
    let backend = device::backend(device, ActivationsArg::Float)?;
    let need = Need::of(checkpoint, &spec, backend.as_ref(), &usage)?;
    loaded::load(checkpoint, spec, backend, &need)
}

/// The text, its name in results, and which of its tokens are scored.
fn open_text(args: &TextArgs) -> Result<(String, String, PerplexityOptions)> {
    let file = args.text.display().to_string();
    let content = std::fs::read_to_string(&args.text).with_context(|| file.clone())?;
    let TextArgs { window, score_from, windows, cache_type, .. } = *args;
    let cache_type = cache_type.into();
    Ok((content, file, PerplexityOptions { window, score_from, windows, cache_type }))
}

fn different_tokens(model: &str, reference: &str) -> anyhow::Error {
    exit::usage(format!(
        "{model} splits the text into other tokens than {reference}; \
         a reference needs the same tokenizer"
    ))
}

/// `4.1638 ± 0.0312`
fn perplexity_text(perplexity: f64, error: Option<f64>) -> String {
    let error = error.map(|error| format!(" ± {error:.4}"));
    format!("{perplexity:.4}{}", error.unwrap_or_default())
}

fn run_perplexity(
    name: Option<&str>,
    text: &TextArgs,
    reference: Option<&str>,
    json: bool,
    device: &DeviceArgs,
) -> Result<()> {
    let (content, file, options) = open_text(text)?;
    let (checkpoint, tokenizer) = open(name)?;
    let tokens = tokenizer.encode(&content, Specials::NONE)?;
    let total = options.windows_of(tokens.len()).with_context(|| file.clone())?;
    let load = |checkpoint| load(checkpoint, device, options.window, options.cache_type);
    let model = load(&checkpoint)?;
    let other = match reference {
        Some(path) => {
            let (other, tokenizer) = open(Some(path))?;
            if tokenizer.encode(&content, Specials::NONE)? != tokens {
                return Err(different_tokens(locate::name(name), path));
            }
            Some(load(&other)?)
        }
        None => None,
    };
    let bar = console::bar(total as u64, "perplexity", false);
    let reference_model = other.as_ref().map(|m| m as &dyn LanguageModel);
    let report = perplexity(&model, &tokens, &options, reference_model, &mut |p| {
        bar.set_position(p.windows as u64);
        bar.set_message(format!("perplexity {:.4}", p.perplexity));
    });
    bar.finish_and_clear();
    let report = report.with_context(|| format!("{} on {file}", locate::name(name)))?;
    if json {
        let mut document = json!({
            "perplexity": report.perplexity,
            "perplexity_error": report.perplexity_error,
            "nll": report.nll,
            "tokens_scored": report.tokens_scored,
            "windows": report.windows,
            "window": options.window,
            "score_from": options.score_from,
            "cache_type": options.cache_type.name(),
            "model": locate::name(name),
            "text": file,
            "device": model.backend().name(),
            "activations": device::activations_name(model.backend().as_ref()),
        });
        if let Some(path) = reference {
            document["reference"] = json!(path);
            document["kl_divergence"] = json!(report.kl_divergence);
            document["kl_median"] = json!(report.kl_median);
            document["kl_p99"] = json!(report.kl_p99);
            document["top1_agreement"] = json!(report.top1_agreement);
        }
        return console::json(&document);
    }
    console::line(&format!(
        "perplexity {} (nll {:.5}) over {} tokens in {} windows",
        perplexity_text(report.perplexity, report.perplexity_error),
        report.nll,
        report.tokens_scored,
        report.windows
    ))?;
    if let (Some(kl), Some(top1)) = (report.kl_divergence, report.top1_agreement) {
        console::line(&format!(
            "KL divergence {kl:.5} nats, top-1 agreement {:.2} %",
            top1 * 100.0
        ))?;
    }
    Ok(())
}

fn run_logits(
    name: Option<&str>,
    tokens: &[u32],
    output: &Path,
    json: bool,
    device: &DeviceArgs,
) -> Result<()> {
    let checkpoint = locate::open(name)?;
    let model = load(&checkpoint, device, tokens.len(), CacheType::F32)?;
    let vocab = model.spec().vocab_size;
    let mut values = Vec::with_capacity(tokens.len() * vocab);
    for_each_logits(&model, tokens, &mut |rows| {
        values.extend_from_slice(rows);
        Ok(())
    })?;
    write_npy(output, &values, &[tokens.len(), vocab])
        .with_context(|| output.display().to_string())?;
    if json {
        return console::json(&json!({
            "output": output,
            "shape": [tokens.len(), vocab],
            "dtype": "f32",
            "model": locate::name(name),
            "device": model.backend().name(),
            "activations": device::activations_name(model.backend().as_ref()),
        }));
    }
    console::note(&format!("{}: f32 [{}, {vocab}]", output.display(), tokens.len()));
    Ok(())
}

/// NumPy's format, version 1.0: magic, header length, a Python dictionary padded to 64 bytes, data.
fn write_npy(path: &Path, values: &[f32], shape: &[usize]) -> Result<()> {
    let shape: Vec<String> = shape.iter().map(|n| format!("{n},")).collect();
    let mut header =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({}), }}", shape.join(" "));
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut file = BufWriter::new(File::create(path)?);
    file.write_all(b"\x93NUMPY\x01\x00")?;
    file.write_all(&u16::try_from(header.len())?.to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for value in values {
        file.write_all(&value.to_le_bytes())?;
    }
    file.into_inner().map_err(|e| e.into_error())?.sync_all()?;
    Ok(())
}

fn run_choices(
    name: Option<&str>,
    task: &Path,
    limit: Option<usize>,
    json: bool,
    device: &DeviceArgs,
) -> Result<()> {
    let file = task.display().to_string();
    let content = std::fs::read_to_string(task).with_context(|| file.clone())?;
    let (checkpoint, tokenizer) = open(name)?;
    let rows = content
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .take(limit.unwrap_or(usize::MAX))
        .map(|(i, line)| {
            choice_row(line, &tokenizer).with_context(|| format!("{file}, line {}", i + 1))
        })
        .collect::<Result<Vec<_>>>()?;
    let longest = |row: &ChoiceRow| {
        row.context.len() + row.choices.iter().map(|c| c.tokens.len()).sum::<usize>()
    };
    let tokens = rows.iter().map(longest).max().unwrap_or(0);
    let model = load(&checkpoint, device, tokens, CacheType::F32)?;
    let bar = console::bar(rows.len() as u64, "choices", false);
    let report = choices(&model, &rows, &mut |report| bar.set_position(report.rows as u64));
    bar.finish_and_clear();
    let report = report.with_context(|| format!("{} on {file}", locate::name(name)))?;
    if json {
        return console::json(&json!({
            "rows": report.rows,
            "accuracy": report.accuracy,
            "accuracy_normalized": report.accuracy_normalized,
            "model": locate::name(name),
            "task": file,
            "device": model.backend().name(),
            "activations": device::activations_name(model.backend().as_ref()),
        }));
    }
    console::line(&format!(
        "accuracy {:.2} %, normalized {:.2} % over {} rows",
        report.accuracy * 100.0,
        report.accuracy_normalized * 100.0,
        report.rows
    ))?;
    Ok(())
}

/// A row `{"query": …, "choices": […], "gold": n}` as lm-evaluation-harness words it: the answer
/// follows `\nAnswer:` after a space, and its tokens are those that the whole text adds.
fn choice_row(line: &str, tokenizer: &Tokenizer) -> Result<ChoiceRow> {
    let row: Value = serde_json::from_str(line)?;
    let query = row["query"].as_str().ok_or_else(|| anyhow!("query: expected a string"))?;
    let list = row["choices"].as_array().ok_or_else(|| anyhow!("choices: expected a list"))?;
    let gold = row["gold"].as_u64().ok_or_else(|| anyhow!("gold: expected a number"))?;
    let context = format!("{query}\nAnswer:");
    let context_ids = tokenizer.encode(&context, Specials::NONE)?;
    let choices = list.iter().map(|choice| {
        let text = choice.as_str().ok_or_else(|| anyhow!("choices: expected strings"))?;
        let whole = tokenizer.encode(&format!("{context} {text}"), Specials::NONE)?;
        let tokens = whole[context_ids.len().min(whole.len())..].to_vec();
        Ok(Choice { tokens, characters: text.chars().count() })
    });
    let choices = choices.collect::<Result<Vec<_>>>()?;
    Ok(ChoiceRow { context: context_ids, choices, gold: usize::try_from(gold)? })
}
