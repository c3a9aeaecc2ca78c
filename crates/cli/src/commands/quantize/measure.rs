//! `--measure`: what each group costs at the logits, kept on disk as it is found.

use super::text::Text;
use super::{MEASURED, Work};
use crate::console;
use anyhow::{Context, Result};
use marlin_checkpoint::write_file;
use marlin_convert::allocate::Sensitivity;
use marlin_convert::measure::{Probe, is_complete, measured_groups};
use marlin_convert::report::{fingerprint, hash};
use marlin_convert::{Calibration, ConvertError, Exl3Options, Exl3Quantizer, memory};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Tokens per row of the probe that groups are measured on, and rows.
const PROBE: (usize, usize) = (256, 24);
/// Most bytes of the probe's log-probabilities.
const PROBE_BYTES: usize = 1 << 30;
/// Tokens that the probe's Hessians are made from, at most.
const PROBE_CALIBRATION: usize = 32_768;

/// What is to be measured.
pub struct Measuring<'a> {
    work: &'a Work<'a>,
    /// Rates of every group, ascending.
    pub rates: Vec<f64>,
    rows: Vec<Vec<u32>>,
    calibration: Calibration,
    /// All that the result depends on.
    settings: Value,
    directory: PathBuf,
}

impl<'a> Measuring<'a> {
    /// With rows of the calibration text, at the rates around what is asked for.
    pub fn new(work: &'a Work<'a>, text: &Text, rates: &[f64]) -> Self {
        let floor = rates.iter().rev().find(|r| **r <= work.args.bits).copied().unwrap_or(1.0);
        let around: Vec<f64> =
            rates.iter().copied().filter(|r| *r == floor - 1.0 || *r == floor + 1.0).collect();
        let rates = if around.is_empty() { vec![floor] } else { around };
        // No row of the text may be longer than those of the calibration are.
        let columns = PROBE.0.min(text.calibration.columns()).max(1);
        let fit = PROBE_BYTES / (work.origin.output.vocab_size * 4 * columns.div_ceil(2));
        let all: Vec<&[u32]> =
            text.calibration.rows.iter().flat_map(|r| r.chunks_exact(columns)).collect();
        let rows = PROBE.1.min(fit.max(1)).min(all.len());
        let rows = (0..rows).map(|i| all[i * all.len() / rows].to_vec()).collect();
        let mut calibration = text.calibration.clone();
        let keep = (PROBE_CALIBRATION / calibration.columns().max(1)).max(1);
        calibration.rows.truncate(keep);
        let settings = json!({
            "source": fingerprint(work.checkpoint),
            "config": hash(&work.origin.config),
            "rates": rates,
            "codebook": work.quantizer.codebook.name(),
            "text": hash(&json!([rows, calibration.rows])),
            "seed": work.args.seed,
            "quantizer": work.quantizer.options,
            "version": env!("CARGO_PKG_VERSION"),
        });
        let directory = work.args.output.join(MEASURED);
        Self { work, rates, rows, calibration, settings, directory }
    }

    /// Bytes of memory that measuring takes.
    pub fn memory(&self) -> u64 {
        let positions: usize = self.rows.iter().map(|r| r.len().div_ceil(2)).sum();
        // Log-probabilities of the source and of what is measured.
        let probe = 3 * 4 * (positions * self.work.origin.output.vocab_size) as u64;
        memory::measure_bytes(self.work.plan, self.work.origin, probe)
    }

    /// Groups that are measured.
    pub fn groups(&self) -> usize {
        measured_groups(self.work.plan).len()
    }

    fn file(&self) -> PathBuf {
        self.directory.join("sensitivities.json")
    }

    /// What an earlier run with the same settings has found, nothing of any other.
    pub fn known(&self) -> Vec<Sensitivity> {
        let read = || -> Option<Vec<Sensitivity>> {
            let kept: Value = serde_json::from_slice(&std::fs::read(self.file()).ok()?).ok()?;
            let same = kept["settings"] == self.settings && !self.work.args.fresh;
            let kept = kept["sensitivities"].clone();
            serde_json::from_value(kept).ok().filter(|_| same)
        };
        let mut known = read().unwrap_or_default();
        // The measured numbers have the precision of f32, their text is read to the last digit but one.
        for (_, value) in known.iter_mut().flat_map(|s| &mut s.divergence) {
            *value = f64::from(*value as f32);
        }
        known
    }

    /// Whether nothing is left to measure.
    pub fn is_done(&self) -> bool {
        is_complete(self.work.plan, &self.rates, &self.known())
    }

    fn keep(&self, found: &[Sensitivity]) -> Result<(), ConvertError> {
        let document = json!({ "settings": self.settings, "sensitivities": found });
        Ok(write_file(&self.file(), format!("{document:#}\n").as_bytes())?)
    }

    /// Measures what is not known yet.
    ///
    /// # Errors
    /// When the source cannot be read, the device fails, the disk is full, or the user stops.
    pub fn run(&self) -> Result<Vec<Sensitivity>> {
        let known = self.known();
        if known.is_empty() {
            // States that were left by a probe with other settings must not be gone on from.
            let _ = std::fs::remove_dir_all(&self.directory);
            let context = || self.directory.display().to_string();
            std::fs::create_dir_all(&self.directory).with_context(context)?;
            self.keep(&[])?;
        } else {
            let measurements: usize = known.iter().map(|s| s.divergence.len()).sum();
            console::note(&format!("resuming: {measurements} measurements are done"));
        }
        let bar = console::bar(1, "measuring", false);
        let tick = |done: usize, total: usize| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            match self.work.stop.load(Ordering::SeqCst) {
                true => Err(ConvertError::Stopped),
                false => Ok(()),
            }
        };
        let quick = Exl3Options { passes: 0, ..self.work.quantizer.options.clone() };
        let quantizer = Exl3Quantizer {
            encoder: self.work.quantizer.encoder.clone(),
            backend: self.work.backend.clone(),
            codebook: self.work.quantizer.codebook,
            options: quick,
        };
        let probe = Probe {
            origin: self.work.origin,
            plan: self.work.plan,
            backend: self.work.backend.clone(),
            quantizer: &quantizer,
            calibration: &self.calibration,
            rows: &self.rows,
            rates: &self.rates,
            directory: &self.directory,
            seed: self.work.args.seed,
            threads: self.work.threads,
            known,
            keep: &|found| self.keep(found),
            tick: &tick,
        };
        let found = probe.run();
        bar.finish_and_clear();
        Ok(found?)
    }
}
