//! Gated feed-forward and mixture of experts.

use super::{Loader, Result, Step};
use crate::spec::{FeedForwardSpec, GatedSpec, MoeSpec};
use marlin_tensor::{
    Activation, Experts, GatedLinears, Linear, LinearOptions, Router, Routing, Tensor, Vector,
};

/// One gated feed-forward.
pub struct Gated {
    linears: GatedLinears,
    activation: Activation,
}

/// Mixture of experts.
pub struct Moe {
    router: Router,
    gate: Linear,
    correction_bias: Option<Vector>,
    experts: Experts,
    shared: Option<Gated>,
    activation: Activation,
}

/// Loaded feed-forward part of a block.
pub enum FeedForward {
    /// Dense.
    Gated(Gated),
    /// Sparse.
    Moe(Box<Moe>),
}

impl Gated {
    fn load(loader: &mut Loader, spec: &GatedSpec) -> Result<Self> {
        let linears = GatedLinears {
            gate: loader.linear(&spec.gate)?,
            up: loader.linear(&spec.up)?,
            down: loader.linear(&spec.down)?,
        };
        Ok(Self { linears, activation: spec.activation })
    }

    fn forward(&self, step: &Step, x: &Tensor) -> Result<Tensor> {
        Ok(step.backend.feed_forward(x, &self.linears, self.activation)?)
    }
}

impl Moe {
    fn load(loader: &mut Loader, spec: &MoeSpec) -> Result<Self> {
        let exact = LinearOptions { float_activations: true };
        let gate = loader.linear_with(&spec.gate, exact)?;
        let correction_bias = match &spec.correction_bias {
            Some(key) => {
                let values = loader.source.vector(key, spec.router.num_experts)?;
                Some(loader.backend.load_vector(values)?)
            }
            None => None,
        };
        let n = spec.experts.len();
        let mut experts = Experts {
            gate: Vec::with_capacity(n),
            up: Vec::with_capacity(n),
            down: Vec::with_capacity(n),
        };
        for expert in &spec.experts {
            experts.gate.push(loader.linear(&expert.gate)?);
            experts.up.push(loader.linear(&expert.up)?);
            experts.down.push(loader.linear(&expert.down)?);
        }
        let shared = spec.shared.as_ref().map(|s| Gated::load(loader, s)).transpose()?;
        let activation = spec.experts[0].activation;
        Ok(Self { router: spec.router, gate, correction_bias, experts, shared, activation })
    }

    fn forward(
        &self,
        step: &Step,
        x: &Tensor,
        routings: &mut Option<Vec<Routing>>,
    ) -> Result<Tensor> {
        let b = step.backend;
        let logits = b.linear(x, &self.gate)?;
        let routing = b.route(&logits, self.correction_bias.as_ref(), &self.router)?;
        if let Some(list) = routings {
            list.push(routing.clone());
        }
        let (experts, activation) = (&self.experts, self.activation);
        Ok(match &self.shared {
            Some(shared) => b.mixture(x, &routing, experts, &shared.linears, activation)?,
            None => b.experts(x, &routing, experts, activation)?,
        })
    }
}

impl FeedForward {
    /// Loads the weights of `spec`.
    pub fn load(loader: &mut Loader, spec: &FeedForwardSpec) -> Result<Self> {
        Ok(match spec {
            FeedForwardSpec::Gated(g) => Self::Gated(Gated::load(loader, g)?),
            FeedForwardSpec::Moe(m) => Self::Moe(Box::new(Moe::load(loader, m)?)),
        })
    }

    /// `[rows, hidden] -> [rows, hidden]`; routings are appended to `routings` when asked for.
    pub fn forward(
        &self,
        step: &Step,
        x: &Tensor,
        routings: &mut Option<Vec<Routing>>,
    ) -> Result<Tensor> {
        match self {
            Self::Gated(g) => g.forward(step, x),
            Self::Moe(m) => m.forward(step, x, routings),
        }
    }
}
