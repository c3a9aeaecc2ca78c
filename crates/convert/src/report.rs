//! What a finished job says about itself.

use crate::output::Module;
use crate::plan::{Plan, Role};
use crate::quantizer::{Phases, TensorReport};
use marlin_checkpoint::Checkpoint;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Instant;

/// One job, for people, `--json` and the HTML page.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct JobReport {
    /// Bits per weight of the codes over the linears but the head.
    pub bits: f64,
    /// Stored bits per weight of the same, scales and padding included.
    pub stored_bits: f64,
    /// Stored bits per weight of the head.
    pub head_stored_bits: f64,
    /// Stored bits per weight of all quantized linears, the head among them.
    pub all_stored_bits: f64,
    /// Bytes of the embedding table.
    pub embedding_bytes: u64,
    /// Bytes of all weight files.
    pub file_bytes: u64,
    /// Seconds this run took.
    pub seconds: f64,
    /// Seconds in the encoder, those of all threads and of earlier runs of the job added up.
    #[serde(default)]
    pub encoder_seconds: f64,
    /// Seconds of this run by the clock, by what it did.
    #[serde(default)]
    pub clock: Clock,
    /// Seconds that the phases of matrices took, those at once and those of earlier runs added up.
    #[serde(default)]
    pub phases: Phases,
    /// What encoded the tiles of this run.
    #[serde(default)]
    pub encoder: String,
    /// One entry per matrix, in the order of the model.
    pub tensors: Vec<TensorReport>,
    /// Calibration tokens that every expert of every layer saw.
    pub experts: Vec<ExpertTokens>,
}

/// What a run did, one after the other.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Clock {
    /// Gathering moments: rows through the source's blocks.
    pub moments: f64,
    /// Quantizing matrices.
    pub matrices: f64,
    /// The embedding, and rows through the quantized blocks.
    pub advance: f64,
    /// Writing the directory and reading it back.
    pub writing: f64,
}

/// Time since it was last asked.
pub(crate) struct Watch(Instant);

impl Watch {
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    /// Seconds since the start or the last lap.
    pub(crate) fn lap(&mut self) -> f64 {
        let now = Instant::now();
        now.duration_since(std::mem::replace(&mut self.0, now)).as_secs_f64()
    }
}

/// Calibration tokens of one layer's experts.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ExpertTokens {
    /// Group of the experts.
    pub layer: String,
    /// Tokens by expert.
    pub tokens: Vec<u64>,
}

impl JobReport {
    /// Of the finished matrices of `plan`, reported in `tensors` in the same order, and the `modules` that
    /// were written as `file_bytes`.
    pub(crate) fn new(
        plan: &Plan,
        tensors: Vec<TensorReport>,
        modules: &[Module],
        file_bytes: u64,
    ) -> Self {
        let size = |m: &Module| m.1.iter().map(|(_, t)| t.bytes().len() as u64).sum::<u64>();
        let bytes: BTreeMap<&str, u64> = modules.iter().map(|m| (&*m.0, size(m))).collect();
        let (mut body, mut head) = (Tally::default(), Tally::default());
        let mut experts: Vec<ExpertTokens> = Vec::new();
        for (target, report) in plan.targets.iter().zip(&tensors) {
            let group = &plan.groups[target.group];
            let side = if group.role == Role::Head { &mut head } else { &mut body };
            let weights = target.weights();
            side.weights += weights;
            side.code_bits += weights as f64 * report.bits;
            side.bytes += bytes.get(&*report.key).copied().unwrap_or(0);
            // One of an expert's three matrices stands for it.
            if group.name.ends_with(".experts") && target.spec.key.ends_with("gate_proj") {
                if experts.last().is_none_or(|e| e.layer != group.name) {
                    experts.push(ExpertTokens { layer: group.name.clone(), tokens: Vec::new() });
                }
                experts.last_mut().expect("just pushed").tokens.push(report.calibration_rows);
            }
        }
        let all =
            Tally { weights: body.weights + head.weights, bytes: body.bytes + head.bytes, ..body };
        Self {
            bits: body.code_bits / (body.weights as f64).max(1.0),
            stored_bits: body.stored_bits(),
            head_stored_bits: head.stored_bits(),
            all_stored_bits: all.stored_bits(),
            embedding_bytes: modules.first().map_or(0, size),
            file_bytes,
            seconds: 0.0,
            clock: Clock::default(),
            phases: tensors.iter().fold(Phases::default(), |mut sum, t| {
                sum += t.phases;
                sum
            }),
            encoder: String::new(),
            encoder_seconds: tensors.iter().map(|t| t.encoder_seconds).sum(),
            tensors,
            experts,
        }
    }
}

/// What a part of the model takes.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    weights: u64,
    /// Of the codes alone.
    code_bits: f64,
    /// As stored.
    bytes: u64,
}

impl Tally {
    fn stored_bits(self) -> f64 {
        self.bytes as f64 * 8.0 / (self.weights as f64).max(1.0)
    }
}

/// FNV-1a.
pub fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Of a value's text.
pub fn hash(value: &Value) -> String {
    format!("{:016x}", fnv(value.to_string().as_bytes()))
}

/// What tells one source from another: names, shapes, and the ends of every tensor.
pub fn fingerprint(checkpoint: &Checkpoint) -> String {
    let mut text = Vec::new();
    for t in checkpoint.tensors() {
        let ends = t.data.len().min(256);
        text.extend(format!("{} {:?} {:?}", t.name, t.shape, t.encoding).into_bytes());
        text.extend(&t.data[..ends]);
        text.extend(&t.data[t.data.len() - ends..]);
    }
    format!("{:016x}", fnv(&text))
}
