//! Results of `marlin bench` as they are written: row by row, but for JSON.

use super::Row;
use crate::args::bench::Output;
use crate::console;
use anyhow::Result;

/// What comes before the rows, and how wide columns are.
pub struct Table {
    output: Output,
    test: usize,
    device: usize,
}

/// Columns of the table in Markdown, and how they stand.
const MARKDOWN: [(&str, &str); 8] = [
    ("model", ":--"),
    ("size", "--:"),
    ("device", ":--"),
    ("threads", "--:"),
    ("batch", "--:"),
    ("test", ":--"),
    ("tokens/s", "--:"),
    ("GB/s", "--:"),
];
/// Columns of comma-separated values, which are fields of the JSON.
const CSV: &str = "model,model_bytes,device,threads,activations,cache_type,test,batch,depth,tokens_per_second,stddev,gigabytes_per_second";

impl Table {
    /// For tests and devices of these names; the device stands in a terminal's table where there are several.
    pub fn new(output: Output, tests: &[String], devices: &[String]) -> Self {
        let widest = |names: &[String]| names.iter().map(|name| name.chars().count()).max();
        let device = if devices.len() > 1 { widest(devices).unwrap_or(0) } else { 0 };
        Self { output, test: widest(tests).unwrap_or(0).max(16), device }
    }

    /// Prints the header.
    pub fn head(&self) -> Result<()> {
        match self.output {
            Output::Json => {}
            Output::Text => {
                let device = self.device_column("device");
                console::line(&format!(
                    "{device}{:<width$} {:>5} {:>14} {:>10} {:>8}",
                    "test",
                    "batch",
                    "tokens/s",
                    "± stddev",
                    "GB/s",
                    width = self.test
                ))?;
            }
            Output::Md => {
                let row = |cell: fn(&(&'static str, &'static str)) -> &'static str| {
                    let cells: Vec<&str> = MARKDOWN.iter().map(cell).collect();
                    console::line(&format!("| {} |", cells.join(" | ")))
                };
                row(|(name, _)| name)?;
                row(|(_, side)| side)?;
            }
            Output::Csv => console::line(CSV)?,
        }
        Ok(())
    }

    /// Prints a row.
    pub fn row(&self, row: &Row) -> Result<()> {
        match self.output {
            Output::Json => {}
            Output::Text => console::line(&format!(
                "{}{:<width$} {:>5} {:>14.1} {:>10.1} {:>8.2}",
                self.device_column(&row.device),
                row.test,
                row.batch,
                row.tokens_per_second,
                row.stddev,
                row.gigabytes_per_second,
                width = self.test
            ))?,
            Output::Md => console::line(&format!(
                "| {} | {} | {} | {} | {} | {} | {:.2} ± {:.2} | {:.2} |",
                row.model.replace('|', "\\|"),
                console::bytes(row.model_bytes),
                row.device,
                row.threads,
                row.batch,
                row.test,
                row.tokens_per_second,
                row.stddev,
                row.gigabytes_per_second
            ))?,
            Output::Csv => console::line(&format!(
                "{},{},{},{},{},{},{},{},{},{},{},{}",
                quoted(&row.model),
                row.model_bytes,
                quoted(&row.device),
                row.threads,
                row.activations,
                row.cache_type,
                quoted(&row.test),
                row.batch,
                row.depth,
                row.tokens_per_second,
                row.stddev,
                row.gigabytes_per_second
            ))?,
        }
        Ok(())
    }

    fn device_column(&self, name: &str) -> String {
        if self.device == 0 {
            String::new()
        } else {
            format!("{name:<width$}  ", width = self.device)
        }
    }
}

/// A value in quotes, as RFC 4180 has them.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}
