//! The models that a server may be asked for.

use crate::args::ActivationsArg;
use crate::args::serve::Serve;
use crate::fit::{Need, Room, Use};
use crate::loaded::{self, Parts};
use crate::{device, exit, locate};
use anyhow::Result;
use marlin_checkpoint::Checkpoint;
use marlin_engine::EngineOptions;
use marlin_models::ModelSpec;
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
    // A model that is not there, or can never be loaded, is to be told now and not when it is first asked for.
    let backend = device::backend(&args.device, ActivationsArg::Auto)?;
    let mut bytes = Vec::new();
    for (source, name) in sources.iter().zip(&names) {
        let plan = Plan::new(source.as_deref(), args, backend.as_ref())?;
        let [weights, cache] = [plan.checkpoint.tensor_bytes(), plan.need.cache];
        if let Some(budget) = args.model_memory.filter(|budget| plan.bytes() > *budget) {
            let tokens = plan.tokens;
            let message = format!(
                "{name} takes {weights} bytes of weights and {cache} of cache for {tokens} tokens, --model-memory is {budget}"
            );
            return Err(exit::coded(exit::DOES_NOT_FIT, message));
        }
        if let Some(room) = Room::of(backend.as_ref()) {
            plan.need.check(name, &room)?;
        }
        bytes.push(plan.bytes());
    }
    Ok((names, ModelLoader { sources, bytes, args: args.clone(), backend }))
}

/// A model about to be loaded.
struct Plan {
    checkpoint: Checkpoint,
    spec: ModelSpec,
    options: EngineOptions,
    /// Tokens that its cache holds.
    tokens: usize,
    need: Need,
}

impl Plan {
    /// How `source` would be loaded now.
    ///
    /// # Errors
    /// When it is not there or damaged, or the arguments contradict each other.
    fn new(source: Option<&str>, args: &Serve, backend: &dyn Backend) -> Result<Self> {
        let checkpoint = locate::open(source)?;
        let spec = marlin_models::spec(&checkpoint)?;
        let limit = spec.max_position_embeddings;
        let max_context = args.context.unwrap_or(limit.min(loaded::DEFAULT_CONTEXT));
        let mut options = EngineOptions {
            block_size: BLOCK_SIZE,
            max_context: Some(max_context),
            num_blocks: None,
            cache_type: args.cache_type.into(),
            prefill_chunk: args.prefill_chunk,
            mixed_chunk: args.mixed_chunk,
            max_batch: args.parallel,
            prefix_cache: !args.no_prefix_cache,
            ..EngineOptions::default()
        };
        let one = Use::engine(&options, &spec)?;
        let mut need = Need::of(&checkpoint, &spec, backend, &one)?;
        let token = need.cache / one.tokens as u64;
        let free = Room::of(backend).map_or(u64::MAX, |room| room.unswapped());
        let taken = [need.weights, need.in_place, need.scratch];
        let free = taken.into_iter().fold(free, u64::saturating_sub);
        let budget = args.model_memory.unwrap_or(u64::MAX);
        let left = budget.saturating_sub(checkpoint.tensor_bytes());
        let tokens = cache_tokens(args.cache_tokens, max_context, token, left.min(free / 2))?;
        options.num_blocks = Some(tokens / BLOCK_SIZE);
        need.cache = token.saturating_mul(tokens as u64);
        Ok(Self { checkpoint, spec, options, tokens, need })
    }

    /// Of weights, as they are stored, and cache.
    fn bytes(&self) -> u64 {
        self.checkpoint.tensor_bytes() + self.need.cache
    }
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
        let source = self.sources[index].as_deref();
        let plan = Plan::new(source, &self.args, self.backend.as_ref())?;
        let bytes = plan.bytes();
        let Plan { checkpoint, spec, options, need, .. } = plan;
        let parts = Parts::open(&checkpoint, spec, self.backend.clone(), &need)?;
        let Parts { model, tokenizer, template, defaults, end_ids, device, pooling } = parts;
        Ok(Loaded {
            model: Arc::new(model),
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

/// Tokens of `token` bytes that a cache holds, in whole blocks: those asked for, or some contexts if they fit into `room`, but one context at
/// least.
fn cache_tokens(asked: Option<usize>, context: usize, token: u64, room: u64) -> Result<usize> {
    match asked {
        Some(tokens) if tokens >= context => Ok(tokens.next_multiple_of(BLOCK_SIZE)),
        Some(tokens) => Err(exit::usage(format!(
            "--cache-tokens {tokens} holds no answer of {context} tokens of context; raise it or lower --context"
        ))),
        None => {
            let fits = usize::try_from(room / token.max(1)).unwrap_or(usize::MAX);
            let context = context.next_multiple_of(BLOCK_SIZE);
            Ok((CONTEXTS * context).min(fits / BLOCK_SIZE * BLOCK_SIZE).max(context))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_holds_what_is_asked_for_or_what_fits() {
        let tokens = |asked, room| cache_tokens(asked, 100, 10, room).ok();
        assert_eq!(tokens(None, u64::MAX), Some(4 * 112));
        assert_eq!(tokens(None, 2500), Some(240), "no block more than fits");
        assert_eq!(tokens(None, 0), Some(112), "one context, or it is refused with the numbers");
        assert_eq!(tokens(Some(1000), 0), Some(1008));
        assert_eq!(tokens(Some(99), u64::MAX), None);
    }
}
