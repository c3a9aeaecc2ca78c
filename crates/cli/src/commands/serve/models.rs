//! The models that a server may be asked for.

use crate::args::serve::Serve;
use crate::loaded::{self, Parts};
use crate::{device, exit, locate};
use anyhow::Result;
use marlin_cpu::system;
use marlin_engine::EngineOptions;
use marlin_server::{Loaded, Loader};
use marlin_tensor::Backend;
use std::path::Path;
use std::sync::Arc;

/// Tokens per block of the cache.
const BLOCK_SIZE: usize = 16;
/// Contexts that the cache holds, if it is not said otherwise and they fit.
const CONTEXTS: usize = 4;

/// Names, and what loads them.
pub fn of(args: &Serve) -> Result<(Vec<String>, ModelLoader)> {
    let mut names = Vec::new();
    let mut sources = Vec::new();
    let none = [String::new()];
    let given = if args.model.is_empty() { &none[..] } else { &args.model };
    for model in given {
        let (name, source) = match model.split_once('=') {
            Some((name, source)) if !Path::new(model).exists() => (name.to_owned(), source),
            _ if model.is_empty() => (locate::name(None).to_owned(), ""),
            _ => (name_of(model), &model[..]),
        };
        if names.contains(&name) {
            return Err(exit::usage(format!("two models are called {name}; write NAME=MODEL")));
        }
        names.push(name);
        sources.push((!source.is_empty()).then(|| source.to_owned()));
    }
    // A model that is not there is to be told now and not when it is first asked for.
    let (mut bytes, mut weights_of) = (Vec::new(), Vec::new());
    for (source, name) in sources.iter().zip(&names) {
        let checkpoint = locate::open(source.as_deref())?;
        let spec = marlin_models::spec(&checkpoint)?;
        let cache = spec.cache_spec(true, 1, BLOCK_SIZE, args.cache_type.into());
        let token = cache.bytes_per_token() as u64;
        let weights = checkpoint.tensor_bytes();
        let max_context = parts_context(args.context, spec.max_position_embeddings);
        let tokens = cache_tokens(args, max_context, weights, token)?;
        let cache = token * tokens as u64;
        if let Some(budget) = args.model_memory.filter(|budget| weights + cache > *budget) {
            // It could never be loaded, and whoever asks for it would be the first to learn so.
            let message = format!(
                "{name} takes {weights} bytes of weights and {cache} of cache for {tokens} tokens, --model-memory is {budget}"
            );
            return Err(exit::coded(exit::DOES_NOT_FIT, message));
        }
        bytes.push(weights + cache);
        weights_of.push(weights);
    }
    let backend = device::backend(&args.device, crate::args::ActivationsArg::Auto)?;
    let weights = weights_of;
    Ok((names, ModelLoader { sources, bytes, weights, args: args.clone(), backend }))
}

/// What a file or directory is called in requests.
fn name_of(model: &str) -> String {
    let path = Path::new(model);
    let name = if path.is_file() { path.file_stem() } else { path.file_name() };
    match name.filter(|_| path.exists()) {
        Some(name) => name.to_string_lossy().into_owned(),
        None => model.to_owned(),
    }
}

/// Loads models onto one backend.
pub struct ModelLoader {
    sources: Vec<Option<String>>,
    /// Of weights and cache.
    bytes: Vec<u64>,
    weights: Vec<u64>,
    args: Serve,
    backend: Arc<dyn Backend>,
}

impl Loader for ModelLoader {
    fn load(&self, index: usize) -> Result<Loaded, String> {
        self.open(index).map_err(|error| format!("{error:#}"))
    }

    fn bytes(&self, index: usize) -> u64 {
        self.bytes[index]
    }
}

impl ModelLoader {
    fn open(&self, index: usize) -> Result<Loaded> {
        let args = &self.args;
        let parts = Parts::open(self.sources[index].as_deref(), self.backend.clone())?;
        let Parts { model, tokenizer, template, defaults, end_ids, device, pooling } = parts;
        let max_context = parts_context(args.context, model.spec().max_position_embeddings);
        let cache_type = args.cache_type.into();
        let token = model.cache_spec(1, BLOCK_SIZE, cache_type).bytes_per_token() as u64;
        let tokens = cache_tokens(args, max_context, self.weights[index], token)?;
        let options = EngineOptions {
            block_size: BLOCK_SIZE,
            max_context: Some(max_context),
            num_blocks: Some(tokens.div_ceil(BLOCK_SIZE)),
            cache_type,
            prefill_chunk: args.prefill_chunk,
            mixed_chunk: args.mixed_chunk,
            max_batch: args.parallel,
            prefix_cache: !args.no_prefix_cache,
            ..EngineOptions::default()
        };
        let bytes = self.weights[index] + token * tokens as u64;
        let model = Arc::new(model);
        Ok(Loaded {
            model,
            options,
            tokenizer,
            template,
            format: None,
            defaults,
            end_ids,
            bytes,
            device,
            pooling,
        })
    }
}

/// Tokens that a cache of `token` bytes for each holds: those asked for, or some contexts if they fit half of the free
/// memory and what the budget leaves beside the weights, but one context at least.
fn cache_tokens(args: &Serve, max_context: usize, weights: u64, token: u64) -> Result<usize> {
    match args.cache_tokens {
        Some(tokens) if tokens >= max_context => Ok(tokens),
        Some(tokens) => Err(exit::usage(format!(
            "--cache-tokens {tokens} holds no answer of {max_context} tokens of context; raise it or lower --context"
        ))),
        None => {
            let free = system::available_bytes().map_or(u64::MAX, |free| free / 2);
            let left = args.model_memory.map_or(u64::MAX, |most| most.saturating_sub(weights));
            let fits = free.min(left) / token.max(1);
            let wanted = CONTEXTS * max_context;
            Ok(wanted.min(usize::try_from(fits).unwrap_or(wanted)).max(max_context))
        }
    }
}

fn parts_context(asked: Option<usize>, limit: usize) -> usize {
    asked.unwrap_or(limit.min(loaded::DEFAULT_CONTEXT))
}
