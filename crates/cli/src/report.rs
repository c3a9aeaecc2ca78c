//! What a quantization did, as one HTML page: no script, nothing loaded from elsewhere, charts as inline
//! SVG, readable in light and dark. Every figure of a chart is also in a table or
//! the title of its mark.

mod chart;

use chart::{Bar, Point, Scale, Series};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;

/// The figures of one quantization.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct QuantizationReport {
    /// Heading of the page.
    pub title: String,
    /// Names and values, in order.
    pub summary: Vec<(String, String)>,
    /// Before and after, and whatever else was measured on the same text.
    pub quality: Vec<QualityRow>,
    /// One row for each quantized matrix, in the order of the model.
    pub tensors: Vec<TensorRow>,
    /// Calibration tokens that each expert saw.
    pub experts: Vec<ExpertRow>,
}

/// Quality of one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QualityRow {
    /// Which model.
    pub name: String,
    /// Of its linears.
    pub bits_per_weight: f64,
    /// Of its files.
    pub file_bytes: u64,
    /// On held-out text.
    pub perplexity: f64,
    /// From the source model, nats per token; `None` for the source itself.
    pub kl_divergence: Option<f64>,
}

/// What became of one matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorRow {
    /// Checkpoint key.
    pub name: String,
    /// Bits per weight.
    pub bits: f64,
    /// `[out_features, in_features]`.
    pub shape: [usize; 2],
    /// What the quantizer minimised, relative.
    pub proxy_error: f64,
    /// Norm of the outputs' error over that of the outputs.
    pub relative_output_error: f64,
    /// Between outputs before and after.
    pub cosine: f64,
    /// Time it took.
    pub seconds: f64,
    /// Calibration tokens it saw.
    pub tokens: u64,
    /// Why and how it was not done as planned.
    pub fallback: Option<String>,
}

/// Tokens seen by the experts of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExpertRow {
    /// Layer, from 0.
    pub layer: usize,
    /// Tokens of each expert.
    pub counts: Vec<u64>,
}

impl TensorRow {
    /// N of `layers.N.`.
    fn layer(&self) -> Option<usize> {
        let (_, rest) = self.name.split_once("layers.")?;
        rest.split('.').next()?.parse().ok()
    }

    /// `o_proj`, or `experts down_proj` for one matrix of many.
    fn kind(&self) -> String {
        let name = self.name.strip_suffix(".weight").unwrap_or(&self.name);
        let last = name.rsplit('.').next().unwrap_or(name);
        let group = if name.contains(".experts.") {
            "experts "
        } else if name.contains("shared_expert") {
            "shared "
        } else {
            ""
        };
        format!("{group}{last}")
    }

    fn weights(&self) -> f64 {
        self.shape[0] as f64 * self.shape[1] as f64
    }

    /// For a chart with a logarithmic axis.
    fn error(&self) -> Option<f64> {
        Some(self.relative_output_error).filter(|e| e.is_finite() && *e > 0.0)
    }

    /// Of the outputs, in decibels.
    fn signal_to_noise(&self) -> Option<f64> {
        Some(-20.0 * self.error()?.log10())
    }

    fn title(&self) -> String {
        format!("{}: {:.2} bits, error {}", self.name, self.bits, small(self.relative_output_error))
    }
}

/// The page.
pub fn html(report: &QuantizationReport) -> String {
    let mut page = String::new();
    let title = escape(&report.title);
    let _ = write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    );
    if !report.summary.is_empty() {
        page.push_str("<dl>\n");
        for (name, value) in &report.summary {
            let (name, value) = (escape(name), escape(value));
            let _ = writeln!(page, "<div><dt>{name}</dt><dd>{value}</dd></div>");
        }
        page.push_str("</dl>\n");
    }
    quality(&mut page, &report.quality);
    charts(&mut page, &report.tensors);
    experts(&mut page, &report.experts);
    tensors(&mut page, &report.tensors);
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn quality(page: &mut String, rows: &[QualityRow]) {
    if rows.is_empty() {
        return;
    }
    page.push_str("<h2>Quality</h2>\n<div class=\"charts\">\n");
    let bars = |value: fn(&QualityRow) -> Option<f64>, digits: usize| -> Vec<Bar> {
        let bar = |row: &QualityRow| {
            let value = value(row)?;
            Some(Bar { label: row.name.clone(), value, text: format!("{value:.digits$}") })
        };
        rows.iter().filter_map(bar).collect()
    };
    page.push_str(&chart::rows("Perplexity (lower is better)", &bars(|r| Some(r.perplexity), 4)));
    let divergence = bars(|r| r.kl_divergence, 5);
    page.push_str(&chart::rows("KL divergence, nats per token (lower is better)", &divergence));
    page.push_str("</div>\n");
    let cells = rows.iter().map(|row| {
        vec![
            row.name.clone(),
            format!("{:.3}", row.bits_per_weight),
            row.file_bytes.to_string(),
            format!("{:.4}", row.perplexity),
            row.kl_divergence.map_or("-".to_owned(), |kl| format!("{kl:.5}")),
        ]
    });
    let header = ["model", "bits per weight", "file bytes", "perplexity", "KL divergence"];
    table(page, &header, &[0], cells);
}

fn charts(page: &mut String, rows: &[TensorRow]) {
    if rows.is_empty() {
        return;
    }
    page.push_str("<h2>Matrices</h2>\n<div class=\"charts\">\n");
    let kinds = kinds(rows);
    let series = |point: &dyn Fn(&TensorRow) -> Option<(f64, f64)>| -> Vec<Series> {
        let points = |kind: &String| {
            let of_kind = rows.iter().filter(|row| series_of(row, &kinds) == *kind);
            let points = of_kind.filter_map(|row| {
                let (x, y) = point(row)?;
                Some(Point { x, y, title: row.title() })
            });
            Series { name: kind.clone(), points: points.collect() }
        };
        kinds.iter().map(points).collect()
    };
    let by_layer = series(&|row| Some((row.layer()? as f64, row.error()?)));
    let axes = ("layer", "relative output error");
    page.push_str(&chart::scatter("Error by layer", axes, Scale::Logarithmic, &by_layer));
    let mut layers: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
    for row in rows {
        if let Some(layer) = row.layer() {
            let sum = layers.entry(layer).or_default();
            *sum = (sum.0 + row.bits * row.weights(), sum.1 + row.weights());
        }
    }
    let bars = layers.iter().map(|(layer, (bits, weights))| {
        let value = bits / weights.max(1.0);
        Bar { label: layer.to_string(), value, text: format!("layer {layer}: {value:.3} bits") }
    });
    let bars: Vec<_> = bars.collect();
    page.push_str(&chart::columns("Bits by layer", ("layer", "bits per weight"), &bars));
    let rate = series(&|row| Some((row.bits, row.signal_to_noise()?)));
    let axes = ("bits per weight", "signal to noise of the outputs, dB");
    page.push_str(&chart::scatter("Rate and distortion", axes, Scale::Linear, &rate));
    page.push_str("</div>\n");
    let unknown = rows.iter().filter(|row| row.error().is_none()).count();
    if unknown > 0 {
        let _ = writeln!(page, "<p>Matrices without an error, not in the charts: {unknown}.</p>");
    }
}

/// Kinds that get a colour of their own, by number of matrices; the last one stands for the rest.
fn kinds(rows: &[TensorRow]) -> Vec<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for row in rows {
        *counts.entry(row.kind()).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let mut kinds: Vec<String> = counts.into_iter().map(|(kind, _)| kind).collect();
    if kinds.len() > chart::COLOURS {
        kinds.truncate(chart::COLOURS - 1);
        kinds.push(OTHER.to_owned());
    }
    kinds
}

const OTHER: &str = "other";

fn series_of(row: &TensorRow, kinds: &[String]) -> String {
    let kind = row.kind();
    if kinds.contains(&kind) { kind } else { OTHER.to_owned() }
}

fn experts(page: &mut String, rows: &[ExpertRow]) {
    if rows.is_empty() {
        return;
    }
    page.push_str(
        "<h2>Tokens seen by each expert</h2>\n\
         <p>The stronger the colour, the more, relative to the busiest expert of the layer; a framed cell saw none.</p>\n\
         <div class=\"scroll\"><table class=\"experts\">\n<thead><tr><th scope=\"col\">layer</th>\
         <th scope=\"col\">least</th><th scope=\"col\">median</th><th scope=\"col\">most</th>\
         <th scope=\"col\">experts, from 0</th></tr></thead>\n<tbody>\n",
    );
    for row in rows {
        let mut sorted = row.counts.clone();
        sorted.sort_unstable();
        let at = |i: usize| sorted.get(i).copied().unwrap_or(0);
        let (least, median, most) =
            (at(0), at(sorted.len() / 2), at(sorted.len().saturating_sub(1)));
        let _ = write!(
            page,
            "<tr><th scope=\"row\">{}</th><td>{least}</td><td>{median}</td><td>{most}</td><td>",
            row.layer
        );
        page.push_str(&chart::strip(&row.counts, most));
        page.push_str("</td></tr>\n");
    }
    page.push_str("</tbody>\n</table></div>\n");
}

fn tensors(page: &mut String, rows: &[TensorRow]) {
    let cells = rows.iter().map(|row| {
        vec![
            row.name.clone(),
            format!("{:.3}", row.bits),
            format!("{} × {}", row.shape[0], row.shape[1]),
            small(row.proxy_error),
            small(row.relative_output_error),
            format!("{:.5}", row.cosine),
            row.tokens.to_string(),
            format!("{:.1}", row.seconds),
            row.fallback.clone().unwrap_or_default(),
        ]
    });
    let header = [
        "matrix",
        "bits",
        "shape",
        "proxy error",
        "relative output error",
        "cosine",
        "tokens",
        "seconds",
        "fallback",
    ];
    if !rows.is_empty() {
        page.push_str("<h2>All matrices</h2>\n");
        table(page, &header, &[0, 8], cells);
    }
}

/// A table whose columns `words` stand left.
fn table(
    page: &mut String,
    header: &[&str],
    words: &[usize],
    rows: impl Iterator<Item = Vec<String>>,
) {
    let class = |column: usize| if words.contains(&column) { " class=\"word\"" } else { "" };
    page.push_str("<div class=\"scroll\"><table>\n<thead><tr>");
    for (i, name) in header.iter().enumerate() {
        let _ = write!(page, "<th scope=\"col\"{}>{}</th>", class(i), escape(name));
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in rows {
        page.push_str("<tr>");
        for (i, cell) in row.iter().enumerate() {
            let (open, close) = if i == 0 { ("th scope=\"row\"", "th") } else { ("td", "td") };
            let _ = write!(page, "<{open}{}>{}</{close}>", class(i), escape(cell));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table></div>\n");
}

/// Three digits of a number that is usually far below one.
fn small(value: f64) -> String {
    if value != 0.0 && value.abs() < 1e-3 { format!("{value:.2e}") } else { format!("{value:.4}") }
}

/// Text as HTML and SVG hold it, inside elements and quoted attributes.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // Not allowed in a page at all.
            c if c.is_control() && c != '\n' && c != '\t' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

const STYLE: &str = include_str!("report/style.css");

#[cfg(test)]
mod tests;
