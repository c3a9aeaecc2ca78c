//! What a finished job says about itself.

use crate::error::ConvertError;
use crate::output::Module;
use crate::plan::{Plan, Role, Target};
use crate::quantizer::TensorReport;
use marlin_checkpoint::Checkpoint;
use serde_json::Value;

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
    /// One entry per matrix, in the order of the model.
    pub tensors: Vec<TensorReport>,
    /// Calibration tokens that every expert of every layer saw.
    pub experts: Vec<ExpertTokens>,
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
    /// Of the finished matrices of `plan`, fetched with `get`.
    pub(crate) fn new(
        plan: &Plan,
        get: impl Fn(&Target) -> Result<TensorReport, ConvertError>,
    ) -> Result<Self, ConvertError> {
        let tensors = plan.targets.iter().map(&get).collect::<Result<Vec<_>, _>>()?;
        let mut experts: Vec<ExpertTokens> = Vec::new();
        for (target, report) in plan.targets.iter().zip(&tensors) {
            let group = &plan.groups[target.group];
            if !group.name.ends_with(".experts") || !target.spec.label.ends_with(".gate_up") {
                continue;
            }
            if experts.last().is_none_or(|e| e.layer != group.name) {
                experts.push(ExpertTokens { layer: group.name.clone(), tokens: Vec::new() });
            }
            // Gate and up share their tokens: every second matrix is a new expert.
            if report.key.ends_with("gate_proj") || report.key.ends_with("w1") {
                experts.last_mut().expect("just pushed").tokens.push(report.calibration_rows);
            }
        }
        let budgeted = |t: &&(&Target, &TensorReport)| plan.groups[t.0.group].role != Role::Head;
        let pairs: Vec<(&Target, &TensorReport)> = plan.targets.iter().zip(&tensors).collect();
        let size = |r: &TensorReport| (r.shape[0] * r.shape[1]) as f64;
        let weights: f64 = pairs.iter().filter(budgeted).map(|(_, r)| size(r)).sum();
        let bits: f64 = pairs.iter().filter(budgeted).map(|(_, r)| size(r) * r.bits).sum();
        Ok(Self {
            bits: if weights > 0.0 { bits / weights } else { 0.0 },
            stored_bits: 0.0,
            head_stored_bits: 0.0,
            all_stored_bits: 0.0,
            embedding_bytes: 0,
            file_bytes: 0,
            seconds: 0.0,
            tensors,
            experts,
        })
    }

    /// Counts what the modules of the output take.
    pub(crate) fn count(&mut self, plan: &Plan, modules: &[Module]) {
        let bytes = |key: &str| -> u64 {
            let module = modules.iter().find(|m| m.0 == key);
            module.map_or(0, |m| m.1.iter().map(|(_, t)| t.bytes().len() as u64).sum())
        };
        let (mut body, mut head) = ((0u64, 0u64), (0u64, 0u64));
        for (target, report) in plan.targets.iter().zip(&self.tensors) {
            let side = match plan.groups[target.group].role {
                Role::Head => &mut head,
                _ => &mut body,
            };
            side.0 += bytes(&report.key);
            side.1 += (report.shape[0] * report.shape[1]) as u64;
        }
        let bits = |(bytes, weights): (u64, u64)| bytes as f64 * 8.0 / (weights as f64).max(1.0);
        self.stored_bits = bits(body);
        self.head_stored_bits = bits(head);
        self.all_stored_bits = bits((body.0 + head.0, body.1 + head.1));
        self.embedding_bytes =
            modules.first().map_or(0, |m| m.1.iter().map(|(_, t)| t.bytes().len() as u64).sum());
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
