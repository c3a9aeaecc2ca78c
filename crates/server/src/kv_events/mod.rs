//! Tells routers which text the caches of this server hold, in the form they read from vLLM.
//!
//! A ZeroMQ publisher ([`zmtp`]): a message has three frames, a topic, the number of the message among those of its topic
//! (8 bytes, most significant first), and a MessagePack array of the Unix time, a list of events and the rank 0. An event
//! is a map; what is in it stands in docs/serving.md. Read in vLLM's `distributed/kv_events.py` and in the readers of
//! llm-d and Dynamo, November 2026.
//!
//! The engine's thread puts events into a ring and goes on; every subscriber reads it at its own pace. One that is
//! slower than the ring is long misses messages and can tell so by their numbers.

mod msgpack;
mod zmtp;

use axum::body::Bytes;
use marlin_engine::CacheEvent;
use msgpack::Writer;
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpStream;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::timeout;
use zmtp::{Heard, Subscriber};

/// Messages that are kept for a slow subscriber.
const KEPT: usize = 4096;
/// Subscribers at once.
const SUBSCRIBERS: usize = 64;
/// Time for a subscriber to say what it is.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Time for a subscriber to take a message before it is cut off.
const PATIENCE: Duration = Duration::from_secs(30);
/// What is put for the name of the model in a topic.
pub const MODEL: &str = "{model}";
/// What vLLM calls the memory that answers are computed from, wherever it is.
const MEDIUM: &str = "GPU";

/// What changed.
#[derive(Debug)]
enum Told {
    Changes(Vec<CacheEvent>),
    Cleared,
}

/// A message; its bytes are made once, by the first subscriber that wants them.
#[derive(Debug)]
struct Message {
    topic: Arc<str>,
    number: u64,
    seconds: f64,
    block_size: usize,
    told: Told,
    bytes: OnceLock<Bytes>,
}

impl Message {
    fn bytes(&self) -> Bytes {
        let make = || {
            let mut body = Writer::default();
            body.array(3);
            body.float(self.seconds);
            match &self.told {
                Told::Cleared => {
                    body.array(1);
                    body.map(1);
                    body.text("type");
                    body.text("AllBlocksCleared");
                }
                Told::Changes(events) => {
                    body.array(events.len());
                    events.iter().for_each(|event| write(&mut body, event, self.block_size));
                }
            }
            body.number(0);
            let number = self.number.to_be_bytes();
            zmtp::message(&[self.topic.as_bytes(), &number, &body.bytes]).into()
        };
        self.bytes.get_or_init(make).clone()
    }
}

fn write(body: &mut Writer, event: &CacheEvent, block_size: usize) {
    match event {
        CacheEvent::Stored { hashes, parent, tokens, cache_name } => {
            body.map(if cache_name.is_some() { 9 } else { 8 });
            body.text("type");
            body.text("BlockStored");
            body.text("block_hashes");
            body.numbers(hashes.iter().copied());
            body.text("parent_block_hash");
            match parent {
                Some(parent) => body.number(*parent),
                None => body.nothing(),
            }
            body.text("token_ids");
            body.numbers(tokens.iter().map(|&token| u64::from(token)));
            body.text("block_size");
            body.number(block_size as u64);
            body.text("lora_id");
            body.nothing();
            body.text("medium");
            body.text(MEDIUM);
            body.text("lora_name");
            body.nothing();
            if let Some(cache_name) = cache_name {
                // Of each block what else is in its hash; the first has it from there on.
                body.text("extra_keys");
                body.array(hashes.len());
                body.array(1);
                body.text(cache_name);
                (1..hashes.len()).for_each(|_| body.nothing());
            }
        }
        CacheEvent::Removed { hashes } => {
            body.map(3);
            body.text("type");
            body.text("BlockRemoved");
            body.text("block_hashes");
            body.numbers(hashes.iter().copied());
            body.text("medium");
            body.text(MEDIUM);
        }
    }
}

/// Counts of a publisher.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Messages of all models.
    pub messages: u64,
    /// Messages that a subscriber was too slow for, counted for each of them.
    pub missed: u64,
    /// Subscribers that are connected.
    pub subscribers: usize,
}

#[derive(Debug, Default)]
struct Topic {
    /// Number of its next message.
    next: u64,
    /// Tellers it has had.
    tellers: u64,
}

struct Shared {
    ring: broadcast::Sender<Arc<Message>>,
    topic: String,
    topics: Mutex<HashMap<Arc<str>, Topic>>,
    messages: AtomicU64,
    missed: AtomicU64,
    subscribers: AtomicUsize,
    address: SocketAddr,
}

/// A publisher of what the caches of a server hold.
#[derive(Clone)]
pub struct KvEvents {
    shared: Arc<Shared>,
}

impl KvEvents {
    /// Takes an address; [`Publishing::run`] accepts subscribers there. `{model}` in the topic is the name of a model.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub fn bind(address: SocketAddr, topic: &str) -> io::Result<(Self, Publishing)> {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            ring: broadcast::Sender::new(KEPT),
            topic: topic.to_owned(),
            topics: Mutex::default(),
            messages: AtomicU64::new(0),
            missed: AtomicU64::new(0),
            subscribers: AtomicUsize::new(0),
            address: listener.local_addr()?,
        });
        Ok((Self { shared: shared.clone() }, Publishing { listener, shared }))
    }

    /// Where subscribers connect.
    pub fn address(&self) -> SocketAddr {
        self.shared.address
    }

    /// What was counted so far.
    pub fn counts(&self) -> Counts {
        let Shared { messages, missed, subscribers, .. } = &*self.shared;
        Counts {
            messages: messages.load(Ordering::Relaxed),
            missed: missed.load(Ordering::Relaxed),
            subscribers: subscribers.load(Ordering::Relaxed),
        }
    }

    /// For a new engine of a model, with so many tokens in a block. What an earlier one held is over, and it is not listened
    /// to any more.
    pub fn teller(&self, model: &str, block_size: usize) -> Teller {
        let topic: Arc<str> = self.shared.topic.replace(MODEL, model).into();
        let turn = {
            let mut topics = self.shared.topics.lock().unwrap_or_else(PoisonError::into_inner);
            let topic = topics.entry(topic.clone()).or_default();
            topic.tellers += 1;
            topic.tellers
        };
        let teller = Teller { shared: self.shared.clone(), topic, turn, block_size };
        if turn > 1 {
            teller.cleared();
        }
        teller
    }
}

/// Tells what happens in the cache of one engine. Never waits.
pub struct Teller {
    shared: Arc<Shared>,
    topic: Arc<str>,
    turn: u64,
    block_size: usize,
}

impl Teller {
    /// The cache has changed.
    pub fn tell(&self, events: Vec<CacheEvent>) {
        if !events.is_empty() {
            self.send(Told::Changes(events));
        }
    }

    /// The cache is lost.
    pub fn cleared(&self) {
        self.send(Told::Cleared);
    }

    fn send(&self, told: Told) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Held until it is sent, so that messages of a topic come in the order of their numbers.
        let mut topics = self.shared.topics.lock().unwrap_or_else(PoisonError::into_inner);
        let topic = topics.entry(self.topic.clone()).or_default();
        if topic.tellers != self.turn {
            return;
        }
        let message = Message {
            topic: self.topic.clone(),
            number: topic.next,
            seconds: now.as_secs_f64(),
            block_size: self.block_size,
            told,
            bytes: OnceLock::new(),
        };
        topic.next += 1;
        self.shared.messages.fetch_add(1, Ordering::Relaxed);
        // An error says that nobody listens.
        let _ = self.shared.ring.send(Arc::new(message));
    }
}

/// The side that listens.
pub struct Publishing {
    listener: TcpListener,
    shared: Arc<Shared>,
}

impl Publishing {
    /// Accepts subscribers and serves them, for as long as it is awaited.
    ///
    /// # Errors
    /// When the system cannot listen.
    pub async fn run(self) -> io::Result<()> {
        let Self { listener, shared } = self;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a subscriber of cache events was not accepted");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Some(subscribed) = Subscribed::new(&shared) else {
                tracing::warn!("too many subscribers of cache events, one is closed");
                continue;
            };
            tokio::spawn(async move {
                if let Err(error) = serve(&subscribed.0, stream).await {
                    tracing::debug!(%error, "a subscriber of cache events has gone");
                }
            });
        }
    }
}

/// Counts a subscriber for as long as it is there.
struct Subscribed(Arc<Shared>);

impl Subscribed {
    fn new(shared: &Arc<Shared>) -> Option<Self> {
        let one_more = |count: usize| (count < SUBSCRIBERS).then_some(count + 1);
        let counted =
            shared.subscribers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more);
        counted.is_ok().then(|| Self(shared.clone()))
    }
}

impl Drop for Subscribed {
    fn drop(&mut self) {
        self.0.subscribers.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn serve(shared: &Shared, stream: TcpStream) -> io::Result<()> {
    let _ = stream.set_nodelay(true);
    let mut peer = timeout(HANDSHAKE, Subscriber::greet(stream)).await??;
    let mut messages = shared.ring.subscribe();
    loop {
        tokio::select! {
            heard = peer.hear() => match heard? {
                Heard::Subscription => {}
                Heard::Ping(context) => timeout(PATIENCE, peer.pong(&context)).await??,
            },
            message = messages.recv() => match message {
                Ok(message) if peer.wants(message.topic.as_bytes()) => {
                    timeout(PATIENCE, peer.send(&message.bytes())).await??;
                }
                Ok(_) => {}
                Err(RecvError::Lagged(missed)) => {
                    shared.missed.fetch_add(missed, Ordering::Relaxed);
                }
                Err(RecvError::Closed) => return Ok(()),
            },
        }
    }
}
