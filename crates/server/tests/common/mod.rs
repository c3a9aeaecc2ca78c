//! A server on a real socket, over a model whose next token is a hash of all tokens before it.

#![allow(dead_code)] // Every test binary uses its own part.

use marlin_checkpoint::{Checkpoint, Container};
use marlin_engine::evaluate::DeclaredPooling;
use marlin_engine::{EngineError, EngineOptions, GenerationConfig, LanguageModel};
use marlin_server::{
    Config, Key, Keys, KvEvents, Listening, Loaded, Loader, ModelLimits, Models, Quota, Server,
};
use marlin_tensor::{Batch, Cache, CacheLayerSpec, CacheSpec, CacheType, Tensor};
use marlin_text::{ChatTemplate, Specials, Tokenizer};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Tokens that the model chooses from: plain words of the vocabulary.
const WORDS: std::ops::Range<u32> = 300..2000;

/// What the model does besides.
#[derive(Default)]
pub struct Behaviour {
    /// Time of a forward pass, microseconds.
    pub pass_us: AtomicU64,
    /// Panics in the next forward pass.
    pub panics: AtomicBool,
    /// Fails the next forward pass.
    pub fails: AtomicBool,
    /// Rows computed.
    pub rows: AtomicUsize,
    /// What the model writes instead, if anything.
    pub script: Mutex<Script>,
    /// Caches that there are, and the most there ever were.
    pub caches: AtomicUsize,
    pub most_caches: AtomicUsize,
}

/// Tokens of an answer.
#[derive(Default)]
pub struct Script {
    tokens: Vec<u32>,
    /// Tokens between the last beginning of a turn and the answer.
    header: usize,
}

impl Script {
    /// What follows `tokens`, if they end in an answer.
    fn next(&self, tokens: &[u32]) -> Option<u32> {
        let begun = tokens.iter().rposition(|token| *token == TURN)?;
        let written = (tokens.len() - begun - 1).checked_sub(self.header)?;
        Some(self.tokens.get(written).copied().unwrap_or(END))
    }
}

/// Token ids of `<|im_start|>` and `<|im_end|>`.
const TURN: u32 = 1;
const END: u32 = 2;

struct Model {
    vocab_size: usize,
    max_context: usize,
    behaviour: Arc<Behaviour>,
}

/// What a cache is here.
struct Slots {
    tokens: Mutex<Vec<u32>>,
    behaviour: Arc<Behaviour>,
}

impl Drop for Slots {
    fn drop(&mut self) {
        self.behaviour.caches.fetch_sub(1, Ordering::SeqCst);
    }
}

const LOCAL: &str = "127.0.0.1:0";

fn mix(a: u64, b: u64) -> u64 {
    let x = (a ^ b.wrapping_mul(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ (x >> 31)
}

impl LanguageModel for Model {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_context(&self) -> usize {
        self.max_context
    }

    fn create_cache(
        &self,
        num_blocks: usize,
        block_size: usize,
        cache_type: CacheType,
    ) -> Result<Cache, EngineError> {
        let layer = CacheLayerSpec { num_kv_heads: 1, key_head_dim: 1, value_head_dim: 1 };
        let behaviour = self.behaviour.clone();
        let caches = behaviour.caches.fetch_add(1, Ordering::SeqCst) + 1;
        behaviour.most_caches.fetch_max(caches, Ordering::SeqCst);
        let slots = Slots { tokens: Mutex::new(vec![0; num_blocks * block_size]), behaviour };
        let spec = CacheSpec { layers: vec![layer], block_size, num_blocks, cache_type };
        Ok(Cache { spec, handle: Arc::new(slots) })
    }

    fn copy_blocks(&self, cache: &Cache, pairs: &[(u32, u32)]) -> Result<(), EngineError> {
        let mut slots = cache.handle.downcast_ref::<Slots>().unwrap().tokens.lock().unwrap();
        let size = cache.spec.block_size;
        for &(from, to) in pairs {
            let from = from as usize * size;
            slots.copy_within(from..from + size, to as usize * size);
        }
        Ok(())
    }

    fn forward(&self, batch: &Batch, cache: &Cache) -> Result<Tensor, EngineError> {
        std::thread::sleep(Duration::from_micros(self.behaviour.pass_us.load(Ordering::Relaxed)));
        assert!(
            !self.behaviour.panics.swap(false, Ordering::Relaxed),
            "a test asked for this panic"
        );
        if self.behaviour.fails.swap(false, Ordering::Relaxed) {
            return Err(EngineError::Forward("the device is on fire".into()));
        }
        self.behaviour.rows.fetch_add(batch.rows(), Ordering::Relaxed);
        let mut slots = cache.handle.downcast_ref::<Slots>().unwrap().tokens.lock().unwrap();
        for (row, &slot) in batch.slot_mapping.iter().enumerate() {
            slots[slot as usize] = batch.tokens[row];
        }
        let mut logits = vec![0.0f32; batch.output_rows.len() * self.vocab_size];
        let mut rows = logits.chunks_exact_mut(self.vocab_size);
        for s in &batch.sequences {
            for row in s.first_row..s.first_row + s.rows {
                if !batch.output_rows.contains(&(row as u32)) {
                    continue;
                }
                let position = batch.positions[row] as usize;
                let token = |p: usize| {
                    slots[s.block_table[p / batch.block_size] as usize * batch.block_size
                        + p % batch.block_size]
                };
                let script = self.behaviour.script.lock().unwrap();
                let chosen = if script.tokens.is_empty() {
                    let state = (0..=position).fold(7, |h, p| mix(h, u64::from(token(p))));
                    WORDS.start + (state % u64::from(WORDS.end - WORDS.start)) as u32
                } else {
                    script.next(&(0..=position).map(token).collect::<Vec<_>>()).unwrap_or(END)
                };
                rows.next().unwrap()[chosen as usize] = 8.0;
            }
        }
        let (rows, columns) = (batch.output_rows.len(), self.vocab_size);
        Ok(Tensor { rows, decode_rows: 0, columns, handle: Arc::new(logits) })
    }

    fn hidden(&self, batch: &Batch, _: &Cache) -> Result<Tensor, EngineError> {
        std::thread::sleep(Duration::from_micros(self.behaviour.pass_us.load(Ordering::Relaxed)));
        let states: Vec<f32> = batch.tokens.iter().flat_map(|t| [*t as f32, 1.0]).collect();
        Ok(Tensor { rows: batch.rows(), decode_rows: 0, columns: 2, handle: Arc::new(states) })
    }

    fn download(&self, logits: &Tensor) -> Result<Vec<f32>, EngineError> {
        Ok(logits.handle.downcast_ref::<Vec<f32>>().unwrap().clone())
    }
}

/// A template whose model calls functions as Qwen and Hermes do, and thinks.
const TOOLS: &str = "{% if tools %}<|im_start|>system
Call a function with <tool_call></tool_call>:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}{% for i in range(bomb or 0) %}{% for j in range(bomb) %}x{% endfor %}{% endfor %}{#
#}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>
{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{\"name\": \"{{ call.function.name }}\", \"arguments\": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}";

/// The tokenizer and template of the story model, in the fixtures of the text crate; or with [`TOOLS`].
fn text(tools: bool) -> (Tokenizer, ChatTemplate) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../text/fixtures/glm-stories");
    let names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"];
    let mut sidecars: BTreeMap<_, _> =
        names.map(|n| (n.to_owned(), std::fs::read(folder.join(n)).unwrap().into())).into();
    if tools {
        sidecars.insert(names[0].to_owned(), TOOLS.as_bytes().to_vec().into());
    }
    let container =
        Container::HuggingFace { config: serde_json::json!({}), generation_config: None };
    let checkpoint = Checkpoint::from_parts(folder, container, [], sidecars);
    let tokenizer = Tokenizer::open(&checkpoint).unwrap();
    let template = ChatTemplate::open(&checkpoint, &tokenizer).unwrap().unwrap();
    (tokenizer, template)
}

struct Fake {
    behaviour: Arc<Behaviour>,
    options: EngineOptions,
    load_time: Duration,
    tools: bool,
    pooling: DeclaredPooling,
}

impl Loader for Fake {
    fn load(&self, index: usize) -> Result<Loaded, String> {
        std::thread::sleep(self.load_time);
        if index == 2 {
            return Err("the file is damaged".into());
        }
        let (tokenizer, template) = text(self.tools);
        let max_context = self.options.max_context.unwrap();
        let vocab_size = tokenizer.vocab_size();
        let model = Arc::new(Model { vocab_size, max_context, behaviour: self.behaviour.clone() });
        Ok(Loaded {
            model,
            options: self.options.clone(),
            end_ids: tokenizer.end_ids().to_vec(),
            tokenizer,
            template: Some(template),
            format: None,
            defaults: GenerationConfig::default(),
            bytes: 1000,
            device: "a test".into(),
            pooling: self.pooling.clone(),
        })
    }

    fn bytes(&self, _: usize) -> u64 {
        1000
    }
}

/// How a test server differs from the usual one.
pub struct Setup {
    pub config: Config,
    pub options: EngineOptions,
    pub limits: ModelLimits,
    pub keys: Option<Vec<Key>>,
    pub quota: Quota,
    pub budget: Option<u64>,
    pub load_time: Duration,
    pub wait: bool,
    /// The model knows how to call functions.
    pub tools: bool,
    /// How it says that states become a vector.
    pub pooling: DeclaredPooling,
    /// Topic of what is told of the caches, if it is.
    pub kv_events: Option<&'static str>,
}

impl Default for Setup {
    fn default() -> Self {
        let options = EngineOptions {
            max_context: Some(512),
            num_blocks: Some(8 * 32),
            cache_type: CacheType::F32,
            mixed_chunk: 64,
            max_batch: 16,
            ..EngineOptions::default()
        };
        Self {
            config: Config { drain: Duration::from_secs(5), ..Config::default() },
            options,
            limits: ModelLimits::default(),
            keys: None,
            quota: Quota::default(),
            budget: None,
            load_time: Duration::ZERO,
            wait: true,
            tools: false,
            pooling: DeclaredPooling::Unsaid,
            kv_events: None,
        }
    }
}

/// A server that listens; stops when dropped.
pub struct Running {
    pub server: Arc<Server>,
    pub address: SocketAddr,
    pub behaviour: Arc<Behaviour>,
    pub kv_events: Option<KvEvents>,
    pub stop: watch::Sender<u32>,
    pub finished: Arc<AtomicBool>,
    _runtime: tokio::runtime::Runtime,
}

impl Setup {
    pub fn start(self) -> Running {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let behaviour = Arc::new(Behaviour::default());
        let loader = Fake {
            behaviour: behaviour.clone(),
            options: self.options,
            load_time: self.load_time,
            tools: self.tools,
            pooling: self.pooling,
        };
        let names = ["first", "second", "broken"].map(str::to_owned).to_vec();
        let models = Models::new(names, Box::new(loader), self.budget, self.limits);
        let bound = self.kv_events.map(|topic| KvEvents::bind(LOCAL.parse().unwrap(), topic));
        let (kv_events, publishing) = bound.transpose().unwrap().unzip();
        publishing.map(|publishing| runtime.spawn(publishing.run()));
        let models = match &kv_events {
            Some(events) => Arc::new(models.telling(events.clone())),
            None => Arc::new(models),
        };
        let server = Server::new(models.clone(), self.config, Keys::new(self.keys, self.quota));
        let (stop, stopped) = watch::channel(0);
        let listening = Listening::bind(server.clone(), LOCAL.parse().unwrap(), None);
        let listening = runtime.block_on(listening).unwrap();
        let address = listening.address().unwrap();
        let finished = Arc::new(AtomicBool::new(false));
        let done = finished.clone();
        runtime.spawn(async move {
            listening.run(stopped).await;
            done.store(true, Ordering::SeqCst);
        });
        if self.wait {
            runtime.block_on(models.load_default()).unwrap();
        } else {
            runtime.spawn(async move { models.load_default().await.map(drop) });
        }
        Running { server, address, behaviour, kv_events, stop, finished, _runtime: runtime }
    }
}

/// A response.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Response {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The data of every event.
    pub fn events(&self) -> Vec<String> {
        self.body.lines().filter_map(|l| l.strip_prefix("data: ")).map(str::to_owned).collect()
    }

    /// Text of every answer of a stream of chat chunks, and how each ended.
    pub fn streamed(&self) -> BTreeMap<u64, (String, String)> {
        let mut answers: BTreeMap<u64, (String, String)> = BTreeMap::new();
        let events = self.events();
        assert_eq!(events.last().map(String::as_str), Some("[DONE]"), "{}", self.body);
        for event in &events[..events.len() - 1] {
            let event: Value = serde_json::from_str(event).unwrap();
            for choice in event["choices"].as_array().unwrap() {
                let answer = answers.entry(choice["index"].as_u64().unwrap()).or_default();
                assert!(answer.1.is_empty(), "a chunk after the end: {event}");
                let text = choice["delta"]["content"].as_str().or(choice["text"].as_str());
                answer.0.push_str(text.unwrap_or_default());
                if let Some(reason) = choice["finish_reason"].as_str() {
                    answer.1 = reason.to_owned();
                }
            }
        }
        answers
    }
}

impl Running {
    /// Has the model write `answer` from now on.
    pub fn says(&self, answer: &str) {
        let (tokenizer, _) = text(true);
        let ids = |text: &str| tokenizer.encode(text, Specials::NONE).unwrap();
        let script = Script { tokens: ids(answer), header: ids("assistant\n").len() };
        *self.behaviour.script.lock().unwrap() = script;
    }

    /// Sends bytes as they are and reads whatever comes until the end.
    pub fn raw(&self, bytes: &[u8]) -> Response {
        let mut stream = self.connect();
        // The server may answer and close before everything is sent.
        let _ = stream.write_all(bytes);
        read(stream)
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    pub fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        let _ = stream.write_all(body);
        stream
    }

    pub fn get(&self, path: &str) -> Response {
        read(self.send("GET", path, "", b""))
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        let text = body.to_string();
        read(self.send("POST", path, "content-type: application/json\r\n", text.as_bytes()))
    }

    /// A chat request whose response is not read yet.
    pub fn open(&self, path: &str, body: &Value) -> TcpStream {
        let text = body.to_string();
        self.send("POST", path, "content-type: application/json\r\n", text.as_bytes())
    }

    /// The value of a metric.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text.lines().find(|line| line.starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no metric {name}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until nothing is under way and every block is free; fails after `within`.
    pub fn idle(&self, within: Duration) {
        let start = Instant::now();
        loop {
            let served = self.server.models.loaded(0).unwrap();
            let stats = served.runtime.stats();
            let busy = served.runtime.unfinished() + stats.running + stats.waiting;
            if busy == 0 && stats.free_blocks == stats.num_blocks {
                return;
            }
            assert!(start.elapsed() < within, "not idle after {within:?}: {stats:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Reads a whole response.
pub fn read(stream: TcpStream) -> Response {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    let mut headers = BTreeMap::new();
    if reader.read_line(&mut line).is_err() {
        return Response { status: 0, headers, body: String::new() };
    }
    let status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        if let Some((name, value)) = line.trim_end().split_once(':') {
            headers.insert(name.to_lowercase(), value.trim().to_owned());
        }
    }
    let mut body = Vec::new();
    if headers.get("transfer-encoding").is_some_and(|v| v == "chunked") {
        loop {
            let mut size = String::new();
            if reader.read_line(&mut size).unwrap_or(0) == 0 {
                break;
            }
            let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
            if size == 0 {
                break;
            }
            let mut chunk = vec![0; size + 2];
            if reader.read_exact(&mut chunk).is_err() {
                break;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    } else {
        let _ = reader.read_to_end(&mut body);
    }
    Response { status, headers, body: String::from_utf8_lossy(&body).into_owned() }
}
