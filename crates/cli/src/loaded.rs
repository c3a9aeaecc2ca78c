//! A model ready to talk: weights on a backend, tokenizer, chat template, the publisher's defaults.

use crate::args::{ActivationsArg, ContextArgs, DeviceArgs, SamplingArgs};
use crate::fit::{Need, Room, Use};
use crate::{console, device, locate};
use anyhow::{Context, Result};
use marlin_checkpoint::{Checkpoint, Container};
use marlin_engine::evaluate::DeclaredPooling;
use marlin_engine::{
    Dry, Engine, EngineOptions, GenerationConfig, SamplingOptions, SamplingParams, Xtc,
};
use marlin_models::{Model, ModelSpec};
use marlin_tensor::Backend;
use marlin_text::{ChatTemplate, Tokenizer};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Context of a session when the user names none: enough for a conversation, small enough for a
/// laptop.
pub const DEFAULT_CONTEXT: usize = 8192;

/// Loads the weights of `checkpoint`, which `spec` describes, with a bar. What it needs is refused before the first is placed when there is no
/// room for it.
pub fn load(
    checkpoint: &Checkpoint,
    spec: ModelSpec,
    backend: Arc<dyn Backend>,
    need: &Need,
) -> Result<Model> {
    let start = Instant::now();
    for (field, value) in &spec.unread {
        console::note(&format!("note: {field} = {} has no effect here", console::short(value)));
    }
    let room = fits(checkpoint, backend.as_ref(), need)?;
    if let Some(note) = room.and_then(|room| need.slow(&room)) {
        console::note(&note);
    }
    let bar = console::bar(checkpoint.tensor_bytes(), "loading", true);
    let model = Model::load(checkpoint, spec, backend, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    let model = model?;
    if let Some(first) = model.unused_tensors().first() {
        let count = model.unused_tensors().len();
        console::note(&format!("note: tensors without effect here: {count}, the first is {first}"));
    }
    let backend = model.backend().name();
    console::detail(&format!("loaded in {:.2} s on {backend}", start.elapsed().as_secs_f64()));
    Ok(model)
}

/// Refuses what has no room, and says what room there is.
fn fits(checkpoint: &Checkpoint, backend: &dyn Backend, need: &Need) -> Result<Option<Room>> {
    let room = Room::of(backend);
    if let Some(room) = &room {
        need.check(&checkpoint.path.display().to_string(), room)?;
    }
    Ok(room)
}

/// A model and what belongs to it.
pub struct Parts {
    /// Weights on a backend.
    pub model: Model,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Chat format, if the model has one.
    pub template: Option<ChatTemplate>,
    /// What `generation_config.json` says.
    pub defaults: GenerationConfig,
    /// Ids that end an answer.
    pub end_ids: Vec<u32>,
    /// Backend's own name.
    pub device: String,
    /// How states become a vector, if the model says so.
    pub pooling: DeclaredPooling,
}

impl Parts {
    /// Loads `checkpoint`, which `spec` describes, onto `backend`.
    pub fn open(
        checkpoint: &Checkpoint,
        spec: ModelSpec,
        backend: Arc<dyn Backend>,
        need: &Need,
    ) -> Result<Self> {
        // A vocabulary takes memory too, for which nobody would have to be told.
        fits(checkpoint, backend.as_ref(), need)?;
        let tokenizer = Tokenizer::open(checkpoint)?;
        let template = ChatTemplate::open(checkpoint, &tokenizer)?;
        let defaults = match &checkpoint.container {
            Container::HuggingFace { generation_config: Some(json), .. } => {
                GenerationConfig::from_json(json)
                    .with_context(|| checkpoint.path.display().to_string())?
            }
            _ => GenerationConfig::default(),
        };
        for field in &defaults.ignored {
            console::detail(&format!("generation_config.json: {field} has no effect"));
        }
        let model = load(checkpoint, spec, backend, need)?;
        let mut end_ids = tokenizer.end_ids().to_vec();
        end_ids.extend(&model.spec().eos_token_ids);
        end_ids.sort_unstable();
        end_ids.dedup();
        let device = model.backend().name();
        let pooling = DeclaredPooling::of(checkpoint);
        Ok(Self { model, tokenizer, template, defaults, end_ids, device, pooling })
    }
}

/// Everything a conversation needs.
pub struct Session {
    /// Runs sequences.
    pub engine: Engine,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Chat format, if the model has one.
    pub template: Option<ChatTemplate>,
    /// What `generation_config.json` says.
    pub defaults: GenerationConfig,
    /// Ids that end an answer.
    pub end_ids: Vec<u32>,
    /// Backend's own name.
    pub device: String,
    /// How JSON calls its activations.
    pub activations: &'static str,
}

impl Session {
    /// Opens and loads `model`.
    pub fn open(model: Option<&str>, context: &ContextArgs, args: &DeviceArgs) -> Result<Self> {
        let checkpoint = locate::open(model)?;
        let spec = marlin_models::spec(&checkpoint)?;
        let limit = spec.max_position_embeddings;
        let max_context = context.context.unwrap_or(limit.min(DEFAULT_CONTEXT));
        let options = EngineOptions {
            max_context: Some(max_context),
            cache_type: context.cache_type.into(),
            ..EngineOptions::default()
        };
        let backend = device::backend(args, ActivationsArg::Auto)?;
        let usage = Use::engine(&options, &spec)?;
        let need = Need::of(&checkpoint, &spec, backend.as_ref(), &usage)?;
        let parts = Parts::open(&checkpoint, spec, backend, &need)?;
        let Parts { model, tokenizer, template, defaults, end_ids, device, .. } = parts;
        let activations = device::activations_name(model.backend().as_ref());
        let engine = Engine::new(Arc::new(model), &options)?;
        Ok(Self { engine, tokenizer, template, defaults, end_ids, device, activations })
    }

    /// Most tokens of an answer: what the arguments say, or the publisher.
    pub fn max_tokens(&self, args: &SamplingArgs) -> Option<usize> {
        args.max_tokens.or(self.defaults.max_new_tokens)
    }

    /// Sampling from the arguments over the publisher's defaults.
    pub fn sampling(&self, args: &SamplingArgs) -> Result<SamplingParams> {
        let base = self.defaults.apply(SamplingOptions::default());
        let options = SamplingOptions {
            temperature: args.temperature.unwrap_or(base.temperature),
            top_p: args.top_p.unwrap_or(base.top_p),
            top_k: args.top_k.map_or(base.top_k, |k| (k > 0).then_some(k)),
            min_p: args.min_p.unwrap_or(base.min_p),
            repetition_penalty: args.repetition_penalty.unwrap_or(base.repetition_penalty),
            presence_penalty: args.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: args.frequency_penalty.unwrap_or(base.frequency_penalty),
            logit_bias: args.logit_bias.clone(),
            dry: match args.dry_multiplier {
                Some(multiplier) if multiplier != 0.0 => Some(Dry { multiplier, ..Dry::default() }),
                _ => None,
            },
            xtc: args
                .xtc_probability
                .map(|probability| Xtc { probability, threshold: args.xtc_threshold }),
            seed: args.seed.unwrap_or_else(random_seed),
            logprobs: None,
        };
        Ok(SamplingParams::new(options)?)
    }
}

/// Differs from run to run; not for cryptography.
fn random_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (now.as_nanos() as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(std::process::id())
}
