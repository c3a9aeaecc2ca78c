//! What the verb prints and writes about a plan and a finished job.

use super::measure::Measuring;
use crate::args::quantize::Quantize;
use crate::commands::inspect;
use crate::console;
use crate::report::{ExpertRow, QualityRow, QuantizationReport, TensorRow, html};
use anyhow::{Context, Result};
use marlin_convert::origin::LeftOut;
use marlin_convert::{JobOptions, JobReport, Origin, Plan, TensorReport, memory};
use marlin_cpu::system;
use serde_json::{Value, json};
use std::path::Path;

/// Prints what would be done, and what it needs beside what there is.
pub fn plan(
    args: &Quantize,
    plan: &Plan,
    origin: &Origin,
    options: &JobOptions,
    measuring: Option<&Measuring>,
    left_out: &LeftOut,
) -> Result<()> {
    let weights: u64 = plan.groups.iter().map(|g| g.weights).sum();
    let disk = memory::disk_bytes(plan, origin, options);
    let free_disk = memory::free_disk(&options.output)?;
    let left = measuring.filter(|m| !m.is_done());
    let needs = memory::needs(plan, origin, options)?.into_iter().map(|n| n.1);
    let memory = needs.chain(left.map(Measuring::memory)).max().unwrap_or(0);
    let available = system::available_bytes();
    if args.json {
        let groups: Vec<Value> = plan
            .groups
            .iter()
            .zip(&options.bits)
            .map(|(g, bits)| json!({"name": g.name, "role": g.role, "layer": g.layer, "weights": g.weights, "bits": bits}))
            .collect();
        return console::json(&json!({
            "model": args.model,
            "matrices": plan.targets.len(),
            "weights": weights,
            "calibration_tokens": options.calibration.tokens(),
            "disk_bytes": disk,
            "free_disk_bytes": free_disk,
            "memory_bytes": memory,
            "available_memory_bytes": available,
            "to_measure": left.map(|m| json!({"groups": m.groups(), "rates": m.rates})),
            "groups": groups,
            "left_out": left_out,
        }));
    }
    for (group, bits) in plan.groups.iter().zip(&options.bits) {
        console::line(&format!(
            "{:>4} bits  {:>8}  {}",
            bits,
            console::count(group.weights),
            group.name
        ))?;
    }
    if let Some(measuring) = left {
        console::line(&format!(
            "bits by the fixed rule; first --measure would take {} groups at {} bits each, and spend them anew",
            measuring.groups(),
            measuring.rates.iter().map(f64::to_string).collect::<Vec<_>>().join(" and ")
        ))?;
    }
    console::line(&format!(
        "{} matrices, {} weights, {} calibration tokens",
        plan.targets.len(),
        console::count(weights),
        options.calibration.tokens(),
    ))?;
    console::line(&format!(
        "disk: at most {} while it runs, {} free",
        console::bytes(disk),
        console::bytes(free_disk)
    ))?;
    let there = available.map_or("unknown".to_owned(), console::bytes);
    console::line(&format!("memory: at least {}, {there} available now", console::bytes(memory)))?;
    Ok(())
}

/// Quality of the source and of what was made, on text that nothing was fitted to.
pub struct Quality {
    /// Perplexity of the source.
    pub before: f64,
    /// Perplexity of the output.
    pub after: f64,
    /// Mean KL divergence of the output from the source, nats.
    pub kl_divergence: f64,
    /// Share of positions with the source's likeliest token.
    pub top1_agreement: f64,
    /// Tokens scored.
    pub tokens: usize,
}

/// What a finished job has to tell.
pub struct Made<'a> {
    /// What it says about itself.
    pub report: &'a JobReport,
    /// Of source and output, when it was measured.
    pub quality: Option<&'a Quality>,
    /// Of the source, what is not in the output.
    pub left_out: &'a LeftOut,
}

/// What of the source is not in the output, in a line.
pub fn left_out(left_out: &LeftOut) -> String {
    let LeftOut { tensors, bytes } = left_out;
    let (count, first) = (tensors.len(), tensors[..tensors.len().min(3)].join(", "));
    let more = if count > 3 { ", …" } else { "" };
    format!(
        "{count} tensors of the source, {}, are left out: {first}{more}",
        console::bytes(*bytes)
    )
}

/// Prints a finished job.
pub fn report(args: &Quantize, plan: &Plan, options: &JobOptions, made: &Made) -> Result<()> {
    let Made { report, quality, .. } = *made;
    if args.json {
        let mut document = serde_json::to_value(report)?;
        document["model"] = json!(args.model);
        document["output"] = json!(options.output);
        document["groups"] = plan
            .groups
            .iter()
            .zip(&options.bits)
            .map(|(g, bits)| json!({"name": g.name, "bits": bits}))
            .collect();
        document["left_out"] = json!(made.left_out);
        if let Some(q) = quality {
            document["quality"] = json!({
                "perplexity_before": q.before,
                "perplexity_after": q.after,
                "kl_divergence": q.kl_divergence,
                "top1_agreement": q.top1_agreement,
                "tokens_scored": q.tokens,
            });
        }
        return console::json(&document);
    }
    let shown = |path: &Path| path.display().to_string();
    console::line(&format!(
        "{}: {:.2} bits per weight ({:.3} stored; head {:.3}; all {:.3}), {} in {:.0} s (encoder: {}, {:.0} s, all threads added up)",
        shown(&options.output),
        report.bits,
        report.stored_bits,
        report.head_stored_bits,
        report.all_stored_bits,
        console::bytes(report.file_bytes),
        report.seconds,
        report.encoder,
        report.encoder_seconds
    ))?;
    let worst = report.tensors.iter().filter(|t| t.proxy_error.is_finite());
    if let Some(worst) = worst.max_by(|a, b| a.proxy_error.total_cmp(&b.proxy_error)) {
        console::line(&format!(
            "largest output error {:.4}: {}",
            worst.relative_output_error, worst.key
        ))?;
    }
    let starved = report.tensors.iter().filter(|t| t.fallback.is_some()).count();
    if starved > 0 {
        console::line(&format!(
            "{starved} matrices without calibration of their own (--json says why)"
        ))?;
    }
    if let Some(q) = quality {
        console::line(&format!(
            "held-out text: perplexity {:.3} before, {:.3} after; KL {:.4}, top-1 agreement {:.1} %",
            q.before,
            q.after,
            q.kl_divergence,
            q.top1_agreement * 100.0
        ))?;
    }
    Ok(())
}

/// Writes the page with pictures.
pub fn page(
    path: &Path,
    args: &Quantize,
    origin: &Origin,
    plan: &Plan,
    options: &JobOptions,
    made: &Made,
) -> Result<()> {
    let Made { report, quality, .. } = *made;
    let rounded = |v: f64| format!("{v:.3}");
    let row = |name: &str, bits, bytes, perplexity, kl| QualityRow {
        name: name.to_owned(),
        bits_per_weight: bits,
        file_bytes: bytes,
        perplexity,
        kl_divergence: kl,
    };
    let source_bytes = inspect::file_bytes(origin.source.checkpoint());
    // As for the result: the matrices that are quantized, by what is stored of them.
    let weights: u64 = report.tensors.iter().map(TensorReport::weights).sum();
    let stored = plan.targets.iter().map(|t| origin.stored_bytes(&t.spec));
    let source_bits = stored.sum::<Result<u64, _>>()? as f64 * 8.0 / weights as f64;
    let quality = quality.map_or(Vec::new(), |q| {
        vec![
            row("source", source_bits, source_bytes, q.before, None),
            row("EXL3", report.all_stored_bits, report.file_bytes, q.after, Some(q.kl_divergence)),
        ]
    });
    let tensors = report.tensors.iter().map(|t| TensorRow {
        name: t.key.clone(),
        bits: t.bits,
        shape: t.shape,
        proxy_error: t.proxy_error,
        relative_output_error: t.relative_output_error,
        cosine: t.cosine,
        seconds: t.seconds,
        tokens: t.calibration_rows,
        fallback: t.fallback.clone(),
    });
    let experts = report.experts.iter().map(|e| ExpertRow {
        layer: plan.groups.iter().find(|g| g.name == e.layer).map_or(0, |g| g.layer),
        counts: e.tokens.clone(),
    });
    let LeftOut { tensors: lost, bytes } = made.left_out;
    let lost = match lost.len() {
        0 => "none".to_owned(),
        count => format!("{count} tensors, {}", console::bytes(*bytes)),
    };
    let page = html(&QuantizationReport {
        title: format!("{} in EXL3, {} bits", args.model, args.bits),
        summary: vec![
            ("bits per weight".to_owned(), rounded(report.bits)),
            ("stored, with scales and padding".to_owned(), rounded(report.stored_bits)),
            ("stored, output projection".to_owned(), rounded(report.head_stored_bits)),
            ("stored, all matrices".to_owned(), rounded(report.all_stored_bits)),
            ("files".to_owned(), console::bytes(report.file_bytes)),
            ("left out of the source".to_owned(), lost),
            ("calibration tokens".to_owned(), options.calibration.tokens().to_string()),
            ("seconds".to_owned(), format!("{:.0}", report.seconds)),
            ("encoder".to_owned(), report.encoder.clone()),
            (
                "encoder, seconds of all threads".to_owned(),
                format!("{:.0}", report.encoder_seconds),
            ),
        ],
        quality,
        tensors: tensors.collect(),
        experts: experts.collect(),
    });
    std::fs::write(path, page).with_context(|| path.display().to_string())
}
