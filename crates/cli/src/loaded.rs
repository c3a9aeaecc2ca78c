//! A model ready to talk: weights on a backend, tokenizer, chat template, the publisher's defaults.

use crate::args::{ActivationsArg, ContextArgs, Device, DeviceArgs, SamplingArgs};
use crate::{console, exit, locate, tuned};
use anyhow::{Context, Result};
use marlin_checkpoint::{Checkpoint, Container};
use marlin_cpu::{Activations, CpuBackend, CpuEncoder, CpuOptions, Level};
use marlin_engine::evaluate::DeclaredPooling;
use marlin_engine::{
    Dry, Engine, EngineOptions, GenerationConfig, SamplingOptions, SamplingParams, Xtc,
};
use marlin_gpu::tune::Tuned;
use marlin_gpu::{GpuDevice, Runtime};
use marlin_models::Model;
use marlin_quant::exl3::TileEncoder;
use marlin_tensor::Backend;
use marlin_text::{ChatTemplate, Tokenizer};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Context of a session when the user names none: enough for a conversation, small enough for a
/// laptop.
pub const DEFAULT_CONTEXT: usize = 8192;

/// The instruction set to use: the best there is, or what `MARLIN_CPU` says.
pub fn level() -> Result<Level> {
    let Ok(name) = std::env::var("MARLIN_CPU") else { return Ok(Level::detect()) };
    let level: Level = name.parse().map_err(|e| exit::usage(format!("MARLIN_CPU: {e}")))?;
    match level.is_supported() {
        true => Ok(level),
        false => Err(exit::usage(format!("MARLIN_CPU: this machine has no {level}"))),
    }
}

/// Threads the arguments ask for; all cores if none.
pub fn threads(args: &DeviceArgs) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    args.threads.map_or_else(cores, usize::from)
}

/// The GPU the arguments ask for, `None` for the processor. `auto` takes no GPU that is a program on the processor.
///
/// # Errors
/// When a runtime is named that this build lacks, or that finds no device.
pub fn gpu(args: &DeviceArgs) -> Result<Option<GpuDevice>> {
    let runtime = match args.device {
        Device::Cpu => return Ok(None),
        Device::Auto => {
            let mut found = marlin_gpu::devices();
            found.retain(|d| !d.is_software);
            let rank = |d: &GpuDevice| Runtime::ALL.iter().position(|r| *r == d.runtime);
            return Ok(found.into_iter().min_by_key(rank));
        }
        Device::Cuda => Runtime::Cuda,
        Device::Metal => Runtime::Metal,
        Device::Vulkan => Runtime::Vulkan,
    };
    let name = runtime.name();
    if !runtime.is_built() {
        let message =
            format!("--device {name}: this build has no {name}; build it with --features {name}");
        return Err(exit::usage(message));
    }
    let found = marlin_gpu::devices().into_iter().find(|d| d.runtime == runtime);
    let missing = || {
        let message = format!("--device {name}: no device found; it needs {}", runtime.needs());
        exit::coded(exit::NOT_FOUND, message)
    };
    found.ok_or_else(missing).map(Some)
}

/// The backend the arguments ask for. `activations` is what the verb defaults to.
pub fn backend(args: &DeviceArgs, activations: ActivationsArg) -> Result<Arc<dyn Backend>> {
    if let Some(device) = gpu(args)? {
        let tuned = match activations {
            ActivationsArg::Auto => tuned::choices(&device),
            // What these verbs print does not depend on what somebody measured before.
            ActivationsArg::Float => Tuned::default(),
        };
        return Ok(marlin_gpu::open_tuned(&device, tuned)?);
    }
    cpu(args, activations)
}

/// The processor, for what cannot time a GPU, which works on while its operators have returned.
///
/// # Errors
/// When the arguments name a GPU.
pub fn cpu_only(
    args: &DeviceArgs,
    activations: ActivationsArg,
    what: &str,
) -> Result<Arc<dyn Backend>> {
    match args.device {
        Device::Auto | Device::Cpu => cpu(args, activations),
        _ => Err(exit::usage(format!("{what} measures the cpu only; leave --device out"))),
    }
}

/// The processor as a backend.
///
/// # Errors
/// When `MARLIN_CPU` names what this machine lacks.
pub fn cpu(args: &DeviceArgs, activations: ActivationsArg) -> Result<Arc<dyn Backend>> {
    let level = level()?;
    let threads = threads(args);
    let activations = match args.activations.unwrap_or(activations) {
        ActivationsArg::Auto => Activations::Auto,
        ActivationsArg::Float => Activations::Float,
    };
    Ok(Arc::new(CpuBackend::new(CpuOptions { threads, level, activations })?))
}

/// What encodes EXL3 tiles: the GPU the arguments ask for, or one thread, since matrices are spread over threads.
///
/// # Errors
/// As [`backend`].
pub fn encoder(args: &DeviceArgs) -> Result<Arc<dyn TileEncoder>> {
    if let Some(device) = gpu(args)? {
        return Ok(marlin_gpu::encoder(&device)?);
    }
    Ok(Arc::new(CpuEncoder::new(level()?, 1)))
}

/// How the JSON of a verb calls its activations.
pub fn activations_name(backend: &dyn Backend) -> &'static str {
    if backend.rounds_inputs() { "auto" } else { "float" }
}

/// Memory that programs may still take, where the system says.
pub fn available_memory() -> Option<u64> {
    meminfo("MemAvailable:")
}

/// Physical memory, where the system says.
pub fn physical_memory() -> Option<u64> {
    meminfo("MemTotal:")
}

fn meminfo(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Loads the weights of `checkpoint` with a bar.
pub fn load(checkpoint: &Checkpoint, backend: Arc<dyn Backend>) -> Result<Model> {
    let start = Instant::now();
    let spec = marlin_models::spec(checkpoint)?;
    for (field, value) in &spec.unread {
        console::note(&format!("note: {field} = {} has no effect here", console::short(value)));
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
    /// Opens `model` and loads it onto `backend`.
    pub fn open(model: Option<&str>, backend: Arc<dyn Backend>) -> Result<Self> {
        let checkpoint = locate::open(model)?;
        let tokenizer = Tokenizer::open(&checkpoint)?;
        let template = ChatTemplate::open(&checkpoint, &tokenizer)?;
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
        let model = load(&checkpoint, backend)?;
        let mut end_ids = tokenizer.end_ids().to_vec();
        end_ids.extend(&model.spec().eos_token_ids);
        end_ids.sort_unstable();
        end_ids.dedup();
        let device = model.backend().name();
        let pooling = DeclaredPooling::of(&checkpoint);
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
    pub fn open(model: Option<&str>, context: &ContextArgs, device: &DeviceArgs) -> Result<Self> {
        let parts = Parts::open(model, backend(device, ActivationsArg::Auto)?)?;
        let Parts { model, tokenizer, template, defaults, end_ids, device, .. } = parts;
        let activations = activations_name(model.backend().as_ref());
        let limit = model.spec().max_position_embeddings;
        let max_context = context.context.unwrap_or(limit.min(DEFAULT_CONTEXT));
        let options = EngineOptions {
            max_context: Some(max_context),
            cache_type: context.cache_type.into(),
            ..EngineOptions::default()
        };
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
