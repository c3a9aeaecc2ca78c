//! The models of a server: which there are, which are loaded, and what one of them needs to answer.

use crate::error::CONTEXT_EXCEEDED;
use crate::kv_events::KvEvents;
use crate::metrics::StepTokens;
use crate::runtime::{Listeners, Runtime};
use crate::{ApiError, ModelLimits};
use marlin_engine::evaluate::DeclaredPooling;
use marlin_engine::{EngineOptions, GenerationConfig, LanguageModel};
use marlin_text::{
    ChatTemplate, GrammarFactory, GrammarLimits, OutputFormat, Specials, TextError, Tokenizer,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Mutex;

/// A model as its loader hands it over.
pub struct Loaded {
    /// The weights on their device.
    pub model: Arc<dyn LanguageModel>,
    /// Sizes of its engine.
    pub options: EngineOptions,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Chat format, if it has one.
    pub template: Option<ChatTemplate>,
    /// How its answers are read, where that cannot be told from the template.
    pub format: Option<OutputFormat>,
    /// What its authors recommend.
    pub defaults: GenerationConfig,
    /// Ids that end an answer.
    pub end_ids: Vec<u32>,
    /// Bytes of its weights and cache.
    pub bytes: u64,
    /// Device, for people.
    pub device: String,
    /// How its states become a vector, if it says so.
    pub pooling: DeclaredPooling,
}

/// Brings models into memory; blocks while it does.
pub trait Loader: Send + Sync {
    /// Loads model `index`.
    ///
    /// # Errors
    /// Says why it cannot be loaded.
    fn load(&self, index: usize) -> Result<Loaded, String>;

    /// How many bytes the weights and the cache of model `index` will take.
    fn bytes(&self, index: usize) -> u64;
}

/// A model that answers.
pub struct Served {
    /// Name in requests.
    pub id: String,
    /// Its engine.
    pub runtime: Runtime,
    /// Text to ids and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Chat format, if it has one.
    pub template: Option<Arc<ChatTemplate>>,
    /// How its answers are read.
    pub format: OutputFormat,
    /// What its authors recommend.
    pub defaults: GenerationConfig,
    /// Ids that end an answer.
    pub end_ids: Vec<u32>,
    /// Bytes of its weights and cache.
    pub bytes: u64,
    /// Tokens per block of its cache.
    pub block_size: usize,
    /// Device, for people.
    pub device: String,
    /// How its states become a vector, if it says so.
    pub pooling: DeclaredPooling,
    /// Time for its template.
    pub template_time: Duration,
    grammar_limits: GrammarLimits,
    grammars: OnceLock<GrammarFactory>,
}

/// Bytes of text, beside a few, that no context of so many tokens can hold, as a multiple of the tokens: a token has at most
/// some hundred bytes, and texts of nothing but the longest tokens are no texts.
const BYTES_PER_TOKEN: usize = 64;

impl Served {
    /// Token ids of a text that is `field` of a request. A text that cannot fit the context is not even encoded, unless it is to
    /// be truncated.
    ///
    /// # Errors
    /// When it is too long, or has no tokens.
    pub fn encode(
        &self,
        text: &str,
        specials: Specials,
        field: &str,
        truncates: bool,
    ) -> Result<Vec<u32>, ApiError> {
        let context = self.runtime.limits().max_context;
        if !truncates && text.len() > BYTES_PER_TOKEN * (context + 64) {
            return Err(self.too_long(text.len(), field));
        }
        let ids = self.tokenizer.encode(text, specials);
        ids.map_err(|error| ApiError::invalid(field, error.to_string()))
    }

    /// The error of a text of so many bytes, which no context holds.
    pub fn too_long(&self, bytes: usize, field: &str) -> ApiError {
        let context = self.runtime.limits().max_context;
        let tokens = bytes / BYTES_PER_TOKEN;
        let message = format!(
            "the context holds {context} tokens, the text has {bytes} bytes, which are at least {tokens}"
        );
        ApiError { code: Some(CONTEXT_EXCEEDED), ..ApiError::invalid(field, message) }
    }

    /// What compiles grammars for its vocabulary.
    ///
    /// # Errors
    /// When the vocabulary cannot be used so.
    pub fn grammars(&self) -> Result<GrammarFactory, TextError> {
        if let Some(factory) = self.grammars.get() {
            return Ok(factory.clone());
        }
        let factory = GrammarFactory::within(&self.tokenizer, self.grammar_limits.clone())?;
        Ok(self.grammars.get_or_init(|| factory).clone())
    }
}

struct Entry {
    id: String,
    loaded: RwLock<Option<Arc<Served>>>,
    /// Turn of its last request.
    used: AtomicU64,
}

/// The models of a server by name.
pub struct Models {
    entries: Vec<Entry>,
    loader: Box<dyn Loader>,
    budget: Option<u64>,
    limits: ModelLimits,
    kv_events: Option<KvEvents>,
    step_tokens: OnceLock<StepTokens>,
    turn: AtomicU64,
    /// One is loaded at a time.
    loading: Arc<Mutex<()>>,
    /// Unix seconds at which the server was started.
    pub created: u64,
}

impl Models {
    /// Models by name, none of them loaded; the first is `default`. Those that are loaded together stay within `budget`
    /// bytes, if one is given.
    ///
    /// # Panics
    /// When there are none: a bug of the caller.
    pub fn new(
        ids: Vec<String>,
        loader: Box<dyn Loader>,
        budget: Option<u64>,
        limits: ModelLimits,
    ) -> Self {
        assert!(!ids.is_empty(), "a server has a model");
        let entry = |id| Entry { id, loaded: RwLock::new(None), used: AtomicU64::new(0) };
        let entries = ids.into_iter().map(entry).collect();
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (turn, loading, step_tokens) = (AtomicU64::new(1), Arc::default(), OnceLock::new());
        let kv_events = None;
        Self { entries, loader, budget, limits, kv_events, step_tokens, turn, loading, created }
    }

    /// The same, whose engines tell what their caches hold.
    pub fn telling(self, kv_events: KvEvents) -> Self {
        Self { kv_events: Some(kv_events), ..self }
    }

    /// What tells of the caches, if anything does.
    pub fn kv_events(&self) -> Option<&KvEvents> {
        self.kv_events.as_ref()
    }

    /// Has the engines of models that are loaded from now on count the tokens of their steps; the first word counts.
    pub fn measure_steps(&self, step_tokens: StepTokens) {
        let _ = self.step_tokens.set(step_tokens);
    }

    /// Names, the default first.
    pub fn ids(&self) -> Vec<&str> {
        self.entries.iter().map(|entry| entry.id.as_str()).collect()
    }

    /// The full name for what a request says; `default`, and nothing, are the first model.
    ///
    /// # Errors
    /// When there is no such model.
    pub fn resolve(&self, name: Option<&str>) -> Result<usize, ApiError> {
        match name {
            None | Some("default" | "") => Ok(0),
            Some(name) => self
                .entries
                .iter()
                .position(|entry| entry.id == name)
                .ok_or_else(|| ApiError::no_model(name, &self.ids())),
        }
    }

    /// Model `index` if it is loaded.
    pub fn loaded(&self, index: usize) -> Option<Arc<Served>> {
        self.entries[index].loaded.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Every model that is loaded.
    pub fn all_loaded(&self) -> Vec<Arc<Served>> {
        (0..self.entries.len()).filter_map(|index| self.loaded(index)).collect()
    }

    /// The model that a request names, loaded if need be.
    ///
    /// # Errors
    /// When there is none, or it cannot be loaded now.
    pub async fn get(self: &Arc<Self>, name: Option<&str>) -> Result<Arc<Served>, ApiError> {
        let index = self.resolve(name)?;
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        self.entries[index].used.store(turn, Ordering::Relaxed);
        if let Some(served) = self.loaded(index).filter(|served| !served.runtime.is_dead()) {
            return Ok(served);
        }
        let Ok(guard) = self.loading.clone().try_lock_owned() else {
            return Err(ApiError::unavailable("a model is being loaded; try again"));
        };
        // Goes on when the client leaves, so that what was begun is not begun again.
        let models = self.clone();
        let load = async move {
            let _guard = guard;
            models.load(index).await
        };
        let loaded = tokio::spawn(load).await;
        loaded.map_err(|_| ApiError::internal("loading the model failed"))?
    }

    /// Loads model `index`, unloading those that were used longest ago where the budget asks for it.
    async fn load(self: &Arc<Self>, index: usize) -> Result<Arc<Served>, ApiError> {
        if let Some(served) = self.loaded(index).filter(|served| !served.runtime.is_dead()) {
            return Ok(served);
        }
        self.make_room(index)?;
        let models = self.clone();
        let start = std::time::Instant::now();
        let served = tokio::task::spawn_blocking(move || models.start(index)).await;
        let served = served.map_err(|_| ApiError::internal("loading the model failed"))??;
        tracing::info!(model = served.id, seconds = start.elapsed().as_secs_f64(), "loaded");
        *self.entries[index].loaded.write().unwrap_or_else(PoisonError::into_inner) =
            Some(served.clone());
        Ok(served)
    }

    /// Loads the default model; a server does so when it starts.
    ///
    /// # Errors
    /// When it cannot be loaded.
    pub async fn load_default(self: &Arc<Self>) -> Result<Arc<Served>, ApiError> {
        let _guard = self.loading.lock().await;
        self.load(0).await
    }

    fn make_room(&self, index: usize) -> Result<(), ApiError> {
        let Some(budget) = self.budget else { return Ok(()) };
        let needed = self.loader.bytes(index);
        if needed > budget {
            let id = &self.entries[index].id;
            let message =
                format!("model {id} takes {needed} bytes, the budget for models is {budget}");
            return Err(ApiError::internal(message));
        }
        loop {
            // A dead one of the same name makes way for the new one.
            let loaded = (0..self.entries.len()).filter(|&i| i != index);
            let used: u64 = loaded.filter_map(|i| self.loaded(i)).map(|served| served.bytes).sum();
            if used + needed <= budget {
                return Ok(());
            }
            let others = (0..self.entries.len()).filter(|&i| i != index);
            // Whoever still tokenizes for it or reads a text with it holds it, as this function does while it looks.
            let free = |s: Arc<Served>| s.runtime.unfinished() == 0 && Arc::strong_count(&s) <= 2;
            let idle = others.filter(|&i| self.loaded(i).is_some_and(free));
            let oldest = idle.min_by_key(|&i| self.entries[i].used.load(Ordering::Relaxed));
            let Some(oldest) = oldest else {
                return Err(ApiError::too_many(
                    "the models that are loaded are busy and fill the budget",
                    Duration::from_secs(5),
                ));
            };
            tracing::info!(model = self.entries[oldest].id, "unloaded");
            *self.entries[oldest].loaded.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    fn start(&self, index: usize) -> Result<Arc<Served>, ApiError> {
        let failed = |reason: String| {
            let id = &self.entries[index].id;
            ApiError::internal(format!("model {id} cannot be loaded: {reason}"))
        };
        let mut loaded = self.loader.load(index).map_err(failed)?;
        let id = &self.entries[index].id;
        let teller = self.kv_events.as_ref().map(|e| e.teller(id, loaded.options.block_size));
        loaded.options.cache_events = teller.is_some().then(|| id.as_str().into());
        let listeners =
            Listeners { teller, step_tokens: self.step_tokens.get().map(|steps| steps.of(id)) };
        let runtime = Runtime::start(loaded.model, &loaded.options, self.limits.queue, listeners);
        let runtime = runtime.map_err(|error| failed(error.to_string()))?;
        let detected = loaded.template.as_ref().map(OutputFormat::detect);
        Ok(Arc::new(Served {
            id: id.clone(),
            runtime,
            tokenizer: Arc::new(loaded.tokenizer),
            template: loaded.template.map(Arc::new),
            format: loaded.format.or(detected).unwrap_or_default(),
            defaults: loaded.defaults,
            end_ids: loaded.end_ids,
            bytes: loaded.bytes,
            block_size: loaded.options.block_size,
            device: loaded.device,
            pooling: loaded.pooling,
            template_time: self.limits.template_time,
            grammar_limits: self.limits.grammars.clone(),
            grammars: OnceLock::new(),
        }))
    }
}
