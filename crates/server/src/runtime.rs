//! The thread that owns an engine: requests in, tokens out, one step after the other.
//!
//! Everything asynchronous is above; between steps the thread takes what has come meanwhile: new requests,
//! those whose client has gone, deadlines that have passed. A panic in a step ends the answers under way
//! with an error and gives the thread a new engine on the same weights; a second one soon after ends it.

use crate::kv_events::Teller;
use marlin_engine::{
    Engine, EngineError, EngineOptions, Event, FinishReason, LanguageModel, Limits, SequenceId,
    Stats, TokenLogprobs, Usage, ValidRequest,
};
use prometheus_client::metrics::histogram::Histogram;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// A second panic within this time of the first is the last one.
const PANICS_APART: Duration = Duration::from_secs(10);

/// What comes of one answer.
#[derive(Debug)]
pub enum Output {
    /// A token of answer `choice`.
    Token {
        /// Which of the answers.
        choice: usize,
        /// The token.
        token: u32,
        /// Present when asked for.
        logprob: Option<TokenLogprobs>,
    },
    /// The last of answer `choice`.
    End {
        /// Which of the answers.
        choice: usize,
        /// Why.
        end: End,
        /// Tokens it took.
        usage: Usage,
    },
}

/// Why an answer ended.
#[derive(Debug, Clone)]
pub enum End {
    /// The model chose to, or its constraint is fulfilled.
    Stop,
    /// `max_tokens`, or the context is full.
    Length,
    /// It was asked to.
    Cancelled,
    /// Its deadline has passed.
    Deadline,
    /// What it has to look like cannot be kept to: leaves nothing to choose, or takes too long.
    Unfit(String),
    /// A step failed.
    Failed(String),
}

/// Why a request is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Too many wait already.
    Full,
    /// The thread has ended.
    Dead,
}

/// How much may wait.
#[derive(Debug, Clone, Copy)]
pub struct QueueLimits {
    /// Answers, beside those under way.
    pub answers: usize,
    /// Prompt tokens, beside a pool of those under way, as a multiple of the pool.
    pub pools: f64,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self { answers: 256, pools: 2.0 }
    }
}

/// Who hears of an engine's steps.
#[derive(Default)]
pub struct Listeners {
    /// Of what happens in the cache, if the options have it recorded.
    pub teller: Option<Teller>,
    /// Of the tokens in each step.
    pub step_tokens: Option<Histogram>,
}

enum Command {
    Submit(Box<Submission>),
    Cancel { ticket: u64, choice: Option<usize> },
}

struct Submission {
    ticket: u64,
    request: ValidRequest,
    n: usize,
    deadline: Option<Instant>,
    output: UnboundedSender<Output>,
    begun: Arc<OnceLock<Instant>>,
}

struct Shared {
    stats: Mutex<Stats>,
    answers: AtomicUsize,
    prompt_tokens: AtomicUsize,
    tickets: AtomicU64,
    restarts: AtomicU64,
    dead: AtomicBool,
    most_answers: usize,
    most_prompt_tokens: usize,
}

/// The way to the thread. The thread ends when every one of these, and every [`Tokens`], is gone.
#[derive(Clone)]
pub struct Runtime {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    limits: Limits,
    model: Arc<dyn LanguageModel>,
}

impl Runtime {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the cache does not fit, or there can be no more threads.
    pub fn start(
        model: Arc<dyn LanguageModel>,
        options: &EngineOptions,
        queue: QueueLimits,
        listeners: Listeners,
    ) -> Result<Self, EngineError> {
        let engine = Engine::new(model.clone(), options)?;
        let limits = engine.limits();
        let pool = engine.stats().num_blocks * options.block_size;
        let shared = Arc::new(Shared {
            stats: Mutex::new(engine.stats()),
            answers: AtomicUsize::new(0),
            prompt_tokens: AtomicUsize::new(0),
            tickets: AtomicU64::new(0),
            restarts: AtomicU64::new(0),
            dead: AtomicBool::new(false),
            most_answers: options.max_batch + queue.answers,
            most_prompt_tokens: (pool as f64 * (1.0 + queue.pools)) as usize,
        });
        let (commands, receiver) = mpsc::channel();
        let worker = Worker {
            engine,
            model: model.clone(),
            options: options.clone(),
            clients: HashMap::new(),
            tickets: HashMap::new(),
            shared: shared.clone(),
            listeners,
        };
        let spawned =
            std::thread::Builder::new().name("engine".into()).spawn(move || worker.run(&receiver));
        spawned.map_err(|error| EngineError::Forward(Box::new(error)))?;
        Ok(Self { commands, shared, limits, model })
    }

    /// What requests must respect.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// The model, for what needs no scheduling.
    pub fn model(&self) -> &Arc<dyn LanguageModel> {
        &self.model
    }

    /// What the engine was doing after its last step.
    pub fn stats(&self) -> Stats {
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers that have not ended.
    pub fn unfinished(&self) -> usize {
        self.shared.answers.load(Ordering::Relaxed)
    }

    /// Engines lost to a panic.
    pub fn restarts(&self) -> u64 {
        self.shared.restarts.load(Ordering::Relaxed)
    }

    /// Whether the thread has ended by a panic.
    pub fn is_dead(&self) -> bool {
        self.shared.dead.load(Ordering::Relaxed)
    }

    /// Queues `n` answers to a request.
    ///
    /// # Errors
    /// When too much waits already, or nobody works.
    pub fn submit(
        &self,
        request: ValidRequest,
        n: usize,
        deadline: Option<Instant>,
    ) -> Result<Tokens, Refusal> {
        let shared = &self.shared;
        if self.is_dead() {
            return Err(Refusal::Dead);
        }
        let prompt_tokens = request.prompt().len();
        let answers = shared.answers.fetch_add(n, Ordering::Relaxed) + n;
        let tokens = shared.prompt_tokens.fetch_add(prompt_tokens, Ordering::Relaxed);
        // One request alone always goes.
        let full = answers > shared.most_answers
            || tokens > 0 && tokens + prompt_tokens > shared.most_prompt_tokens;
        let (output, receiver) = unbounded_channel();
        let ticket = shared.tickets.fetch_add(1, Ordering::Relaxed);
        let begun = Arc::<OnceLock<Instant>>::default();
        let submission = Submission { ticket, request, n, deadline, output, begun: begun.clone() };
        if full || self.commands.send(Command::Submit(Box::new(submission))).is_err() {
            shared.answers.fetch_sub(n, Ordering::Relaxed);
            shared.prompt_tokens.fetch_sub(prompt_tokens, Ordering::Relaxed);
            return Err(if full { Refusal::Full } else { Refusal::Dead });
        }
        Ok(Tokens { receiver, commands: self.commands.clone(), ticket, open: n, begun })
    }
}

/// Tokens of the answers to one request. Dropping it cancels what has not ended.
pub struct Tokens {
    receiver: UnboundedReceiver<Output>,
    commands: mpsc::Sender<Command>,
    ticket: u64,
    open: usize,
    begun: Arc<OnceLock<Instant>>,
}

impl Tokens {
    /// When the engine began to read the prompt, once it has.
    pub fn begun(&self) -> Arc<OnceLock<Instant>> {
        self.begun.clone()
    }

    /// The next token or end of any of the answers; `None` after the last, or when the engine is lost.
    pub async fn next(&mut self) -> Option<Output> {
        let output = self.receiver.recv().await;
        if let Some(Output::End { .. }) = output {
            self.open -= 1;
        }
        output
    }

    /// What has come already, without waiting.
    pub fn ready(&mut self) -> Option<Output> {
        let output = self.receiver.try_recv().ok();
        if let Some(Output::End { .. }) = output {
            self.open -= 1;
        }
        output
    }

    /// Ends one of the answers; its end still comes.
    pub fn cancel(&self, choice: usize) {
        let _ = self.commands.send(Command::Cancel { ticket: self.ticket, choice: Some(choice) });
    }
}

impl Drop for Tokens {
    fn drop(&mut self) {
        if self.open > 0 {
            let _ = self.commands.send(Command::Cancel { ticket: self.ticket, choice: None });
        }
    }
}

/// Where the tokens of a sequence go.
struct Client {
    ticket: u64,
    choice: usize,
    output: UnboundedSender<Output>,
    deadline: Option<Instant>,
    expired: bool,
    /// Prompt tokens to take off the count when it ends.
    prompt_tokens: usize,
    begun: Arc<OnceLock<Instant>>,
}

struct Worker {
    engine: Engine,
    model: Arc<dyn LanguageModel>,
    options: EngineOptions,
    clients: HashMap<SequenceId, Client>,
    tickets: HashMap<u64, Vec<SequenceId>>,
    shared: Arc<Shared>,
    listeners: Listeners,
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(teller) = &self.listeners.teller {
            teller.cleared();
        }
    }
}

impl Worker {
    fn run(mut self, commands: &mpsc::Receiver<Command>) {
        let mut last_panic: Option<Instant> = None;
        loop {
            if self.engine.is_idle() {
                self.publish();
                match commands.recv() {
                    Ok(command) => self.take(command),
                    Err(_) => return,
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.take(command);
            }
            self.expire();
            let begun = Instant::now();
            let before = rows(&self.engine);
            let engine = &mut self.engine;
            match catch_unwind(AssertUnwindSafe(|| engine.step())) {
                Ok(events) => {
                    for id in self.engine.reading() {
                        if let Some(client) = self.clients.get(id) {
                            client.begun.get_or_init(|| begun);
                        }
                    }
                    events.into_iter().for_each(|event| self.report(event));
                    let computed = rows(&self.engine) - before;
                    if let Some(tokens) =
                        self.listeners.step_tokens.as_ref().filter(|_| computed > 0)
                    {
                        tokens.observe(computed as f64);
                    }
                    if let Some(teller) = &self.listeners.teller {
                        teller.tell(self.engine.take_cache_events());
                    }
                }
                Err(_) => {
                    let soon = last_panic.is_some_and(|at| at.elapsed() < PANICS_APART);
                    last_panic = Some(Instant::now());
                    let engine = match soon {
                        true => None,
                        false => Engine::new(self.model.clone(), &self.options).ok(),
                    };
                    // Before anybody is told: who asks again at once must not be sent here in vain.
                    match engine {
                        Some(_) => {
                            self.shared.restarts.fetch_add(1, Ordering::Relaxed);
                        }
                        None => self.shared.dead.store(true, Ordering::Relaxed),
                    }
                    self.lose("the engine failed and starts again; send the request again");
                    let Some(engine) = engine else {
                        tracing::error!("the engine failed again and is given up");
                        return;
                    };
                    self.engine = engine;
                    if let Some(teller) = &self.listeners.teller {
                        teller.cleared();
                    }
                }
            }
            self.publish();
        }
    }

    fn publish(&self) {
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = self.engine.stats();
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => {
                let Submission { ticket, request, n, deadline, output, begun } = *submission;
                let prompt_tokens = request.prompt().len();
                let ids = self.engine.submit_many(request, n);
                for (choice, id) in ids.iter().enumerate() {
                    let prompt_tokens = if choice == 0 { prompt_tokens } else { 0 };
                    let output = output.clone();
                    let client = Client {
                        ticket,
                        choice,
                        output,
                        deadline,
                        expired: false,
                        prompt_tokens,
                        begun: begun.clone(),
                    };
                    self.clients.insert(*id, client);
                }
                self.tickets.insert(ticket, ids);
            }
            Command::Cancel { ticket, choice } => {
                let ids = self.tickets.get(&ticket).cloned().unwrap_or_default();
                for (i, id) in ids.into_iter().enumerate() {
                    if choice.is_none_or(|choice| choice == i) {
                        self.engine.cancel(id);
                    }
                }
            }
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        for (id, client) in &mut self.clients {
            if !client.expired && client.deadline.is_some_and(|deadline| deadline <= now) {
                client.expired = true;
                self.engine.cancel(*id);
            }
        }
    }

    fn report(&mut self, event: Event) {
        match event {
            Event::Token { id, token, logprob } => {
                let Some(client) = self.clients.get(&id) else { return };
                let output = Output::Token { choice: client.choice, token, logprob };
                if client.output.send(output).is_err() {
                    self.engine.cancel(id);
                }
            }
            Event::Finished { id, reason, usage } => {
                let expired = self.clients.get(&id).is_some_and(|client| client.expired);
                let end = match reason {
                    FinishReason::Stop(_) | FinishReason::Complete => End::Stop,
                    FinishReason::Length => End::Length,
                    FinishReason::Cancelled if expired => End::Deadline,
                    FinishReason::Cancelled => End::Cancelled,
                    FinishReason::Error(error) => match *error {
                        EngineError::Constraint { .. } => End::Unfit(error.to_string()),
                        _ => End::Failed(error.to_string()),
                    },
                };
                self.end(id, end, usage);
            }
        }
    }

    fn end(&mut self, id: SequenceId, end: End, usage: Usage) {
        let Some(client) = self.clients.remove(&id) else { return };
        self.shared.answers.fetch_sub(1, Ordering::Relaxed);
        self.shared.prompt_tokens.fetch_sub(client.prompt_tokens, Ordering::Relaxed);
        if let Some(ids) = self.tickets.get(&client.ticket)
            && !ids.iter().any(|id| self.clients.contains_key(id))
        {
            self.tickets.remove(&client.ticket);
        }
        let _ = client.output.send(Output::End { choice: client.choice, end, usage });
    }

    /// Ends every answer with an error.
    fn lose(&mut self, reason: &str) {
        let ids: Vec<_> = self.clients.keys().copied().collect();
        for id in ids {
            self.end(id, End::Failed(reason.to_owned()), Usage::default());
        }
    }
}

/// Tokens that an engine has computed.
fn rows(engine: &Engine) -> u64 {
    let stats = engine.stats();
    stats.prompt_rows + stats.decode_rows
}
