//! Which matrices of a model are quantized, in which order, and in which groups their rates move together.

use crate::exl3::PADDING;
use marlin_models::{
    BlockSpec, FeedForwardSpec, GatedSpec, LinearSpec, MixerSpec, MlaQuery, ModelSpec, MtpSpec,
};
use std::collections::BTreeSet;

/// What a group of matrices does in the model; decides who gets surplus bits first.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Multi-token prediction: nothing that the model says depends on it.
    Prediction,
    /// Routed experts.
    Experts,
    /// Dense feed-forward and shared experts.
    FeedForward,
    /// Attention.
    Attention,
    /// Output projection.
    Head,
}

/// One matrix to quantize.
#[derive(Debug, Clone)]
pub struct Target {
    /// As the specification of the output describes it.
    pub spec: LinearSpec,
    /// Index into [`Plan::groups`].
    pub group: usize,
    /// What its group does.
    pub role: Role,
}

impl Target {
    /// Whether it is the output projection.
    pub fn is_head(&self) -> bool {
        self.role == Role::Head
    }

    /// Weights of the matrix, padding not counted.
    pub fn weights(&self) -> u64 {
        self.spec.out_features as u64 * self.spec.in_features as u64
    }
}

/// Matrices that have one rate.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// For people and recipes: `"model.layers.3.self_attn.qkv"`.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Block it lies in; the number of blocks for what comes after them.
    pub layer: usize,
    /// Padded weights of all its matrices.
    pub weights: u64,
    /// Padded channels of all its matrices, in and out: 16 bits each.
    pub channels: u64,
}

/// Everything that is quantized.
#[derive(Debug, Clone)]
pub struct Plan {
    /// In the order of the model, the head before the prediction layer.
    pub targets: Vec<Target>,
    /// Units of bit allocation.
    pub groups: Vec<Group>,
    /// Blocks of the trunk.
    pub layers: usize,
}

impl Plan {
    /// Of the model `spec`; `mtp` says whether its prediction layer is stored.
    pub fn new(spec: &ModelSpec, mtp: bool) -> Self {
        let layers = spec.blocks.len();
        let mut plan = Self { targets: Vec::new(), groups: Vec::new(), layers };
        for block in &spec.blocks {
            plan.block(block, block.index, None);
        }
        let head = &spec.head.linear;
        plan.push(&head.key, Role::Head, layers, &[head]);
        if let Some(MtpSpec { projection, block, .. }) = spec.mtp.as_ref().filter(|_| mtp) {
            plan.push(&projection.key, Role::Prediction, layers, &[projection]);
            plan.block(block, layers, Some(Role::Prediction));
        }
        plan
    }

    fn block(&mut self, block: &BlockSpec, layer: usize, role: Option<Role>) {
        let of = |own: Role| role.unwrap_or(own);
        match &block.mixer {
            MixerSpec::Gqa(g) => {
                self.push(&g.q.label, of(Role::Attention), layer, &[&g.q, &g.k, &g.v]);
                self.push(&g.o.label, of(Role::Attention), layer, &[&g.o]);
            }
            // `kv_b` is multiplied into queries and outputs: it stays as it is.
            MixerSpec::Mla(m) => {
                match &m.query {
                    MlaQuery::Full(q) => {
                        self.push(&q.label, of(Role::Attention), layer, &[q, &m.kv_a]);
                    }
                    MlaQuery::LowRank { a, b, .. } => {
                        self.push(&a.label, of(Role::Attention), layer, &[a, &m.kv_a]);
                        self.push(&b.label, of(Role::Attention), layer, &[b]);
                    }
                }
                self.push(&m.o.label, of(Role::Attention), layer, &[&m.o]);
            }
        }
        let gated = |plan: &mut Self, g: &GatedSpec| {
            plan.push(&g.gate.label, of(Role::FeedForward), layer, &[&g.gate, &g.up]);
            plan.push(&g.down.label, of(Role::FeedForward), layer, &[&g.down]);
        };
        match &block.feed_forward {
            FeedForwardSpec::Gated(g) => gated(self, g),
            FeedForwardSpec::Moe(m) => {
                let experts: Vec<&LinearSpec> =
                    m.experts.iter().flat_map(|e| e.linears()).collect();
                let prefix = m.gate.key.strip_suffix(".gate").unwrap_or(&m.gate.key);
                self.push(&format!("{prefix}.experts"), of(Role::Experts), layer, &experts);
                if let Some(shared) = &m.shared {
                    gated(self, shared);
                }
            }
        }
    }

    fn push(&mut self, name: &str, role: Role, layer: usize, linears: &[&LinearSpec]) {
        let group = self.groups.len();
        let size = |l: &LinearSpec| {
            [l.out_features, l.in_features].map(|d| d.next_multiple_of(PADDING) as u64)
        };
        self.groups.push(Group {
            name: name.to_owned(),
            role,
            layer,
            weights: linears.iter().map(|l| size(l).iter().product::<u64>()).sum(),
            channels: linears.iter().map(|l| size(l).iter().sum::<u64>()).sum(),
        });
        self.targets.extend(linears.iter().map(|l| Target { spec: (*l).clone(), group, role }));
    }

    /// Weights of all matrices, padding not counted.
    pub fn weights(&self) -> u64 {
        self.targets.iter().map(Target::weights).sum()
    }

    /// Targets of `layer`; the head and the prediction layer follow the last block of the trunk.
    pub fn targets_of(&self, layer: usize) -> Vec<&Target> {
        self.targets.iter().filter(|t| self.groups[t.group].layer == layer).collect()
    }

    /// Targets with a role.
    pub fn targets_with(&self, role: Role) -> Vec<&Target> {
        self.targets.iter().filter(|t| self.groups[t.group].role == role).collect()
    }
}

/// Labels of `targets`, each once, in the order of the model.
pub fn in_order<'a>(targets: &[&'a Target]) -> Vec<&'a str> {
    let mut labels: Vec<&str> = Vec::new();
    let mut seen = BTreeSet::new();
    for target in targets {
        if seen.insert(target.spec.label.as_str()) {
            labels.push(&target.spec.label);
        }
    }
    labels
}

/// Those of `targets` with one of `labels`.
pub fn with_labels<'a>(targets: &[&'a Target], labels: &BTreeSet<String>) -> Vec<&'a Target> {
    targets.iter().copied().filter(|t| labels.contains(&t.spec.label)).collect()
}
