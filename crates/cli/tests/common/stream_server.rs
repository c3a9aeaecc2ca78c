//! A server that speaks as much of OpenAI's interface as a load test asks for, and makes its tokens up. Like a real one that
//! batches, it gives every stream one token in each step. The model's name says what it does wrong.
#![allow(dead_code, reason = "each program that includes this uses a part")]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

/// The key that model `key` wants.
pub const KEY: &str = "secret-key";

/// A stream that the stepping thread writes to.
struct Stream {
    socket: TcpStream,
    answer: Answer,
    /// Told once the last byte is written.
    done: Sender<()>,
    next: usize,
}

/// What a request is answered.
#[derive(Clone)]
struct Answer {
    id: String,
    chat: bool,
    prompt_tokens: usize,
    /// Texts of the tokens.
    tokens: Vec<String>,
}

/// Serves until the program ends; a step takes at least `step`.
pub fn serve(listener: &TcpListener, step: Duration) {
    let (streams, new) = channel();
    std::thread::spawn(move || run_steps(&new, step));
    for (number, socket) in listener.incoming().flatten().enumerate() {
        let streams = streams.clone();
        // A client that goes away ends its thread.
        std::thread::spawn(move || connection(&socket, number, &streams));
    }
}

/// A server in this process; its URL.
pub fn start(step: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || serve(&listener, step));
    url
}

fn run_steps(new: &Receiver<Stream>, step: Duration) {
    let mut streams: Vec<Stream> = Vec::new();
    let mut due = Instant::now();
    loop {
        match if streams.is_empty() {
            new.recv().map_err(|_| TryRecvError::Disconnected)
        } else {
            new.try_recv()
        } {
            Ok(stream) => {
                streams.push(stream);
                continue;
            }
            Err(TryRecvError::Disconnected) if streams.is_empty() => return,
            Err(_) => {}
        }
        let now = Instant::now();
        due = now.max(due + step);
        std::thread::sleep(due - now);
        streams.retain_mut(|stream| {
            let Stream { socket, answer, done, next } = stream;
            let token = answer.tokens.get(*next);
            *next += 1;
            let more = match token {
                Some(text) => socket.write_all(&chunk(&event(&answer.delta(text)))).is_ok(),
                None => {
                    let _ = socket.write_all(&chunk(&answer.last_events()));
                    let _ = socket.write_all(b"0\r\n\r\n");
                    false
                }
            };
            if !more {
                let _ = done.send(());
            }
            more
        });
    }
}

fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into_bytes()
}

impl Answer {
    fn choice(&self, text: &str, reason: Option<&str>) -> Value {
        let mut choice = json!({"index": 0, "finish_reason": reason});
        match (self.chat, reason) {
            (true, Some(_)) => choice["delta"] = json!({}),
            (true, None) => choice["delta"] = json!({"content": text}),
            (false, _) => choice["text"] = json!(text),
        }
        json!({"id": self.id, "object": "chunk", "created": 1, "model": "m", "choices": [choice]})
    }

    fn delta(&self, text: &str) -> Value {
        self.choice(text, None)
    }

    fn usage(&self) -> Value {
        json!({"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens.len()})
    }

    fn last_events(&self) -> String {
        let usage = json!({"id": self.id, "choices": [], "usage": self.usage()});
        format!("{}{}data: [DONE]\n\n", event(&self.choice("", Some("length"))), event(&usage))
    }

    fn stream(&self) -> String {
        let tokens: String = self.tokens.iter().map(|text| event(&self.delta(text))).collect();
        tokens + &self.last_events()
    }

    fn whole(&self) -> Value {
        let text = self.tokens.concat();
        let mut choice = json!({"index": 0, "finish_reason": "length"});
        if self.chat {
            choice["message"] = json!({"role": "assistant", "content": text});
        } else {
            choice["text"] = json!(text);
        }
        json!({"id": self.id, "choices": [choice], "usage": self.usage()})
    }
}

/// A request's key and body; `None` when the client is gone.
fn request(reader: &mut BufReader<TcpStream>) -> Option<(String, bool, Value)> {
    let (mut length, mut key, mut line, mut path) = (0, String::new(), String::new(), None);
    loop {
        line.clear();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let text = line.trim_end();
        if text.is_empty() {
            break;
        }
        if path.is_none() {
            path = Some(text.to_owned());
        } else if let Some((name, value)) = text.split_once(": ") {
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().ok()?,
                "authorization" => key = value.to_owned(),
                _ => {}
            }
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let chat = match path?.split(' ').nth(1)? {
        "/v1/chat/completions" => true,
        "/v1/completions" => false,
        _ => return None,
    };
    Some((key, chat, serde_json::from_slice(&body).ok()?))
}

/// Answers requests of one connection, one after the other.
fn connection(socket: &TcpStream, number: usize, streams: &Sender<Stream>) -> Option<()> {
    socket.set_nodelay(true).ok()?;
    let mut reader = BufReader::new(socket.try_clone().ok()?);
    for turn in 0.. {
        let (key, chat, body) = request(&mut reader)?;
        let prompt = if chat { &body["messages"][0]["content"] } else { &body["prompt"] }
            .as_str()?
            .to_owned();
        let count = body["max_tokens"].as_u64()? as usize;
        let sum =
            prompt.bytes().fold(7_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let answer = Answer {
            id: format!("answer-{number}-{turn}"),
            chat,
            prompt_tokens: prompt.split(' ').count(),
            tokens: (0..count)
                .map(|i| format!(" é{}", sum.wrapping_add(i as u32) % 1000))
                .collect(),
        };
        let model = body["model"].as_str()?;
        if !body["stream"].as_bool()? {
            let mut answer = answer;
            if model == "differs" {
                answer.tokens.reverse();
            }
            respond(socket, "200 OK", "application/json", &answer.whole().to_string())?;
        } else if ["default", "differs"].contains(&model) {
            (&mut &*socket).write_all(STREAM_HEAD).ok()?;
            let (done, written) = channel();
            streams
                .send(Stream { socket: socket.try_clone().ok()?, answer, done, next: 0 })
                .ok()?;
            written.recv().ok()?;
        } else {
            odd(socket, model, &key, &answer)?;
        }
    }
    None
}

const STREAM_HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n";

fn respond(mut socket: &TcpStream, status: &str, kind: &str, body: &str) -> Option<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all((head + body).as_bytes()).ok()
}

/// What the model's name says; `None` closes the connection.
fn odd(mut socket: &TcpStream, model: &str, key: &str, answer: &Answer) -> Option<()> {
    let events = answer.stream();
    let stream = |body: &str| [STREAM_HEAD, &chunk(body), b"0\r\n\r\n"].concat();
    let second = format!("{}2", answer.id);
    // The second event, and the end of it.
    let cut = events.match_indices("\n\n").nth(1)?.0 + 2;
    let body = match model {
        "torn" => {
            // Chunks of every size, and writes that end anywhere.
            let (mut bytes, mut rest) = (STREAM_HEAD.to_vec(), events.as_bytes());
            for size in (1..40).cycle() {
                let (part, after) = rest.split_at(rest.len().min(size));
                bytes.extend_from_slice(format!("{:X};x=y\r\n", part.len()).as_bytes());
                bytes.extend_from_slice(part);
                bytes.extend_from_slice(b"\r\n");
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            bytes.extend_from_slice(b"0\r\nTrailer: x\r\n\r\n");
            for (part, size) in bytes.chunks(97).zip((1..97).cycle()) {
                let (first, second) = part.split_at(part.len().min(size));
                socket.write_all(first).ok()?;
                socket.write_all(second).ok()?;
            }
            return Some(());
        }
        "forgets" => {
            // Closes without having said so.
            socket.write_all(&stream(&events)).ok()?;
            return None;
        }
        "closes" => {
            socket.write_all(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n").ok()?;
            socket.write_all(events.as_bytes()).ok()?;
            return None;
        }
        "key" if key != format!("Bearer {KEY}") => {
            return respond(
                socket,
                "401 Unauthorized",
                "application/json",
                r#"{"error":{"message":"wrong key"}}"#,
            );
        }
        "key" => events,
        "cut" => {
            socket.write_all(&stream(&events)[..STREAM_HEAD.len() + cut]).ok()?;
            return None;
        }
        "silent" => {
            std::thread::sleep(Duration::from_secs(30));
            return None;
        }
        "html" => return respond(socket, "502 Bad Gateway", "text/html", "<html>no</html>"),
        "not http" => {
            socket.write_all(b"220 mail ready\r\n").ok()?;
            return None;
        }
        "no done" => events.replace("data: [DONE]\n\n", ""),
        "no reason" => events.replace(r#""length""#, "null"),
        "loses" => events[..cut].to_owned() + &events[events.match_indices("\n\n").nth(2)?.0 + 2..],
        "mixes" => events[..cut].to_owned() + &events[cut..].replace(&answer.id, &second),
        "late" => format!("{events}{}", event(&answer.delta("late"))),
        "error" => {
            format!("{}data: {{\"error\": {{\"message\": \"out of blocks\"}}}}\n\n", &events[..cut])
        }
        _ => {
            return respond(
                socket,
                "404 Not Found",
                "application/json",
                r#"{"error":{"message":"no such model"}}"#,
            );
        }
    };
    socket.write_all(&stream(&body)).ok()
}
