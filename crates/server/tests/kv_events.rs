//! What a router hears of the caches, through a subscriber of its own that speaks ZMTP 3.0 and reads MessagePack.
//! `.ci/server/kv_events.py` does the same with libzmq.

mod common;

use common::{Running, Setup};
use marlin_engine::{CacheEvent, EngineOptions};
use marlin_server::KvEvents;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A subscriber. Panics where the publisher breaks the protocol.
struct Subscriber {
    stream: TcpStream,
}

impl Subscriber {
    fn connect(address: SocketAddr, topic: &str) -> Self {
        let mut subscriber = Self::greet(address, "SUB");
        let (flags, ready) = subscriber.frame().unwrap();
        assert_eq!(flags, 4);
        assert_eq!(ready, b"\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB");
        subscriber.send(0, &[&[1][..], topic.as_bytes()].concat());
        subscriber
    }

    /// Sends a greeting and what it is.
    fn greet(address: SocketAddr, kind: &str) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut greeting = [0; 64];
        (greeting[0], greeting[9], greeting[10]) = (0xFF, 0x7F, 3);
        greeting[12..16].copy_from_slice(b"NULL");
        // In two pieces, as libzmq does.
        stream.write_all(&greeting[..10]).unwrap();
        let mut theirs = [0; 64];
        stream.read_exact(&mut theirs).unwrap();
        assert_eq!((theirs[0], theirs[9], theirs[10], theirs[32]), (0xFF, 0x7F, 3, 0));
        assert_eq!(&theirs[12..32], &greeting[12..32]);
        stream.write_all(&greeting[10..]).unwrap();
        let mut subscriber = Self { stream };
        let length = (kind.len() as u32).to_be_bytes();
        subscriber.send(4, &[&b"\x05READY\x0bSocket-Type"[..], &length, kind.as_bytes()].concat());
        subscriber
    }

    fn send(&mut self, flags: u8, body: &[u8]) {
        self.stream.write_all(&[&[flags, body.len() as u8][..], body].concat()).unwrap();
    }

    fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head).ok()?;
        let mut length = u64::from(head[1]);
        if head[0] & 2 != 0 {
            let mut rest = [0; 8];
            rest[0] = head[1];
            self.stream.read_exact(&mut rest[1..]).unwrap();
            length = u64::from_be_bytes(rest);
        }
        let mut body = vec![0; length as usize];
        self.stream.read_exact(&mut body).unwrap();
        Some((head[0] & !2, body))
    }

    /// Topic, number and body of the next message.
    fn message(&mut self) -> Option<(String, u64, Value)> {
        let (flags, topic) = self.frame()?;
        assert_eq!(flags, 1, "more follows");
        let (flags, number) = self.frame().unwrap();
        assert_eq!(flags, 1, "more follows");
        let (flags, body) = self.frame().unwrap();
        assert_eq!(flags, 0, "the last frame");
        let mut rest = &body[..];
        let body = unpack(&mut rest);
        assert!(rest.is_empty(), "one value");
        let number = u64::from_be_bytes(number.try_into().unwrap());
        Some((String::from_utf8(topic).unwrap(), number, body))
    }

    /// The events of messages until `enough` of them.
    fn events(&mut self, enough: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let mut events = Vec::new();
        while !enough(&events) {
            let (_, _, body) = self.message().unwrap_or_else(|| panic!("no more after {events:?}"));
            assert_eq!((body.as_array().unwrap().len(), &body[2]), (3, &json!(0)));
            assert!(body[0].as_f64().unwrap() > 1.7e9, "seconds since 1970");
            events.extend(body[1].as_array().unwrap().iter().cloned());
        }
        events
    }
}

/// A MessagePack value, as much of it as is sent.
fn unpack(bytes: &mut &[u8]) -> Value {
    fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
        let (taken, rest) = bytes.split_first_chunk().unwrap();
        *bytes = rest;
        *taken
    }
    fn text(bytes: &mut &[u8], length: usize) -> Value {
        let (taken, rest) = bytes.split_at(length);
        *bytes = rest;
        String::from_utf8(taken.to_vec()).unwrap().into()
    }
    let array = |bytes: &mut &[u8], length: usize| (0..length).map(|_| unpack(bytes)).collect();
    let [tag] = take(bytes);
    match tag {
        0..=0x7F => tag.into(),
        0x80..=0x8F => {
            let mut map = Map::new();
            for _ in 0..tag & 15 {
                let key = unpack(bytes).as_str().unwrap().to_owned();
                assert!(map.insert(key, unpack(bytes)).is_none());
            }
            map.into()
        }
        0x90..=0x9F => array(bytes, usize::from(tag & 15)),
        0xA0..=0xBF => text(bytes, usize::from(tag & 31)),
        0xC0 => Value::Null,
        0xCB => f64::from_be_bytes(take(bytes)).into(),
        0xCC => u8::from_be_bytes(take(bytes)).into(),
        0xCD => u16::from_be_bytes(take(bytes)).into(),
        0xCE => u32::from_be_bytes(take(bytes)).into(),
        0xCF => u64::from_be_bytes(take(bytes)).into(),
        0xD9 => {
            let [length] = take(bytes);
            text(bytes, usize::from(length))
        }
        0xDC => {
            let length = u16::from_be_bytes(take(bytes));
            array(bytes, usize::from(length))
        }
        other => panic!("{other:#x}"),
    }
}

fn of_type<'a>(events: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    events.iter().filter(move |event| event["type"] == kind)
}

fn hashes(event: &Value) -> Vec<u64> {
    event["block_hashes"].as_array().unwrap().iter().map(|h| h.as_u64().unwrap()).collect()
}

/// Texts by the block that ends them, put together from what was told.
fn texts(events: &[Value]) -> HashMap<u64, Vec<u64>> {
    let mut texts: HashMap<u64, Vec<u64>> = HashMap::new();
    for event in of_type(events, "BlockStored") {
        let mut text = match event["parent_block_hash"].as_u64() {
            Some(parent) => texts[&parent].clone(),
            None => Vec::new(),
        };
        let size = event["block_size"].as_u64().unwrap() as usize;
        let tokens: Vec<u64> = serde_json::from_value(event["token_ids"].clone()).unwrap();
        assert_eq!(tokens.len(), size * hashes(event).len());
        for (hash, tokens) in hashes(event).into_iter().zip(tokens.chunks(size)) {
            text.extend(tokens);
            texts.insert(hash, text.clone());
        }
    }
    texts
}

fn complete(server: &Running, prompt: &[u32], more: Value) {
    let mut body =
        json!({"prompt": prompt, "max_tokens": 24, "ignore_eos": true, "temperature": 0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let response = server.post("/v1/completions", &body);
    assert_eq!(response.status, 200, "{}", response.body);
}

fn publisher(server: &Running) -> SocketAddr {
    server.kv_events.as_ref().unwrap().address()
}

/// Waits until so many are connected and known.
fn connected(server: &Running, count: f64) {
    let start = Instant::now();
    while server.metric("marlin:kv_event_subscribers") != count {
        assert!(start.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(2));
    }
    // Subscriptions are on their way.
    std::thread::sleep(Duration::from_millis(50));
}

#[test]
fn routers_hear_what_the_cache_holds() {
    let server = Setup { kv_events: Some("kv@here@{model}"), ..Setup::default() }.start();
    let mut subscriber = Subscriber::connect(publisher(&server), "kv@");
    let mut elsewhere = Subscriber::connect(publisher(&server), "kv@there");
    connected(&server, 2.0);
    let prompt: Vec<u32> = (400..440).collect();
    complete(&server, &prompt, json!({}));
    // 40 and 24 tokens, the last of which is not computed: three blocks of 16.
    let told = |events: &[Value]| texts(events).len() >= 3;
    let events = subscriber.events(told);
    let first = &events[0];
    let keys: Vec<&String> = first.as_object().unwrap().keys().collect();
    let expected = [
        "type",
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
    ];
    assert_eq!(keys, expected);
    assert_eq!((&first["parent_block_hash"], &first["block_size"]), (&Value::Null, &json!(16)));
    assert_eq!((&first["medium"], &first["lora_id"]), (&json!("GPU"), &Value::Null));
    let held = texts(&events);
    let longest = held.values().max_by_key(|text| text.len()).unwrap();
    assert_eq!(longest.len(), 48);
    assert!(longest.iter().zip(&prompt).all(|(told, sent)| *told == u64::from(*sent)));
    // The same again is known; with a salt it is not, and the salt is told where the text begins.
    complete(&server, &prompt, json!({}));
    complete(&server, &prompt, json!({"cache_salt": "tenant"}));
    let salted = subscriber.events(told);
    assert_eq!(salted[0]["extra_keys"][0], json!(["tenant"]), "{salted:?}");
    assert_eq!(salted[0]["extra_keys"].as_array().unwrap().len(), hashes(&salted[0]).len());
    assert!(salted[1..].iter().all(|event| event.get("extra_keys").is_none()));
    assert!(texts(&salted).keys().all(|hash| !held.contains_key(hash)));
    // Nothing for those who asked for something else.
    elsewhere.stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(elsewhere.message().is_none());
    assert_eq!(server.metric("marlin:kv_event_messages_missed_total"), 0.0);
}

#[test]
fn routers_hear_what_the_cache_gives_up_and_loses() {
    let options = EngineOptions {
        max_context: Some(128),
        num_blocks: Some(16),
        max_batch: 2,
        ..EngineOptions::default()
    };
    let server = Setup { options, kv_events: Some(""), ..Setup::default() }.start();
    let mut subscriber = Subscriber::connect(publisher(&server), "");
    connected(&server, 1.0);
    for i in 0..12u32 {
        complete(&server, &(300 + i * 70..350 + i * 70).collect::<Vec<_>>(), json!({}));
    }
    let removed =
        |events: &[Value]| of_type(events, "BlockRemoved").map(|e| hashes(e).len()).sum::<usize>();
    let events = subscriber.events(|events| removed(events) >= 12 * 4 - 16);
    let held = texts(&events);
    for event in of_type(&events, "BlockRemoved") {
        assert!(hashes(event).iter().all(|hash| held.contains_key(hash)));
        assert_eq!(event["medium"], "GPU");
    }
    server.behaviour.panics.store(true, Ordering::Relaxed);
    let lost = server.post("/v1/completions", &json!({"prompt": [400], "max_tokens": 2}));
    assert_eq!(lost.status, 500);
    subscriber.events(|events| events.contains(&json!({"type": "AllBlocksCleared"})));
}

#[test]
fn a_subscriber_that_does_not_read_misses_messages_and_can_tell() {
    const MESSAGES: u64 = 30_000;
    let server = Setup { kv_events: Some(""), ..Setup::default() }.start();
    let mut subscriber = Subscriber::connect(publisher(&server), "");
    connected(&server, 1.0);
    let events: &KvEvents = server.kv_events.as_ref().unwrap();
    let teller = events.teller("another", 16);
    // What the first engine said of its topic is over when a second one takes it.
    let start = Instant::now();
    for i in 0..MESSAGES {
        teller.tell(vec![CacheEvent::Removed { hashes: vec![u64::MAX - i; 100] }]);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "telling does not wait");
    teller.tell(Vec::new());
    teller.cleared();
    let (mut next, mut missed) = (0, 0);
    loop {
        let (_, number, body) = subscriber.message().unwrap();
        assert!(number >= next, "in order");
        missed += number - next;
        next = number + 1;
        if body[1][0]["type"] == "AllBlocksCleared" && number > 1 {
            break;
        }
    }
    assert!(missed > 0 && missed < MESSAGES, "{missed}");
    assert_eq!(server.metric("marlin:kv_event_messages_missed_total"), missed as f64);
    // The server has not noticed.
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn those_who_are_no_subscribers_are_sent_away() {
    let server = Setup { kv_events: Some(""), ..Setup::default() }.start();
    let ended = |mut stream: TcpStream| {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut rest = Vec::new();
        // Closed or reset: bytes of ours may have been left unread.
        let _ = stream.read_to_end(&mut rest);
        rest
    };
    let address = publisher(&server);
    let mut http = TcpStream::connect(address).unwrap();
    http.write_all(&[&b"GET / HTTP/1.1\r\nhost: x\r\n"[..], &[b'x'; 64]].concat()).unwrap();
    assert!(ended(http).len() <= 64, "a greeting at most");
    let other = Subscriber::greet(address, "PUB");
    let told = String::from_utf8_lossy(&ended(other.stream)).into_owned();
    assert!(told.contains("ERROR") && told.contains("connect a SUB socket"), "{told}");
    // Frames that are too long, no subscriptions, or none that end.
    let bodies: [&[u8]; 4] = [
        &[2, 0, 0, 0, 1, 0, 0, 0, 0],
        &[0, 1, 7],
        &[4, 6, 5, b'H', b'E', b'L', b'L', b'O'],
        &[0, 0],
    ];
    for bytes in bodies {
        let mut subscriber = Subscriber::connect(address, "");
        subscriber.stream.write_all(bytes).unwrap();
        ended(subscriber.stream);
    }
    let mut greedy = Subscriber::connect(address, "");
    for _ in 0..300 {
        let _ = greedy.stream.write_all(&[0, 2, 1, b'a']);
    }
    ended(greedy.stream);
    connected(&server, 0.0);
    // A ping is answered, in the form of 3.1; subscriptions come and go.
    let mut subscriber = Subscriber::connect(address, "x");
    subscriber.send(4, b"\x04PING\x00\x64context");
    assert_eq!(subscriber.frame().unwrap(), (4, b"\x04PONGcontext".to_vec()));
    subscriber.send(4, b"\x09SUBSCRIBE");
    subscriber.send(4, b"\x06CANCELx");
    connected(&server, 1.0);
    complete(&server, &(400..440).collect::<Vec<_>>(), json!({}));
    assert!(subscriber.message().is_some());
}
