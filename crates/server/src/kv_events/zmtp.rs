//! The publishing side of ZMTP 3.0, the protocol of ZeroMQ sockets (RFC 23; the commands of 3.1, RFC 37, are understood,
//! too). No encryption, no authentication: its mechanism NULL.
//!
//! A connection begins with 64 bytes in each direction: a signature, a version, the name of a mechanism. Then frames: a byte
//! of flags, a length, a body. The first is a command that says what kind of socket speaks; after it a
//! subscriber sends subscriptions and the publisher messages of one or more frames.

use std::io::{self, ErrorKind};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

/// Bytes of a greeting.
const GREETING: usize = 64;
/// Largest frame that a subscriber may send: a subscription, or what it says of itself.
const FRAME: usize = 4096;
/// Subscriptions of one subscriber.
const SUBSCRIPTIONS: usize = 256;

/// What a subscriber said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// What it wants to hear; that is noted.
    Subscription,
    /// It asks for a [`Subscriber::pong`] with these bytes.
    Ping(Vec<u8>),
}

/// A connected socket that wants to hear messages of some topics.
pub(super) struct Subscriber {
    frames: Frames,
    write: OwnedWriteHalf,
    /// Beginnings of topics, as often as it said each.
    wanted: Vec<Vec<u8>>,
}

impl Subscriber {
    /// Exchanges greetings.
    ///
    /// # Errors
    /// When the other side is no subscriber.
    pub async fn greet(stream: TcpStream) -> io::Result<Self> {
        let (read, mut write) = stream.into_split();
        let mut frames = Frames { read, received: Vec::new() };
        write.write_all(&greeting()).await?;
        check_greeting(&frames.take(GREETING).await?)?;
        write.write_all(&command("READY", &property("Socket-Type", "PUB"))).await?;
        let (flags, ready) = frames.next().await?;
        let kind = if flags & COMMAND != 0 { socket_type(&ready) } else { None };
        if !matches!(kind, Some(b"SUB" | b"XSUB")) {
            let reason = b"this socket publishes; connect a SUB socket";
            let body = [&[reason.len() as u8][..], reason].concat();
            write.write_all(&command("ERROR", &body)).await?;
            return Err(wrong("it is no subscriber"));
        }
        Ok(Self { frames, write, wanted: Vec::new() })
    }

    /// Whether it wants a message of this topic.
    pub fn wants(&self, topic: &[u8]) -> bool {
        self.wanted.iter().any(|wanted| topic.starts_with(wanted))
    }

    /// The next thing it says. Nothing is lost when this is not awaited to its end.
    ///
    /// # Errors
    /// When it says nothing that a subscriber may say, or has gone.
    pub async fn hear(&mut self) -> io::Result<Heard> {
        let (flags, body) = self.frames.next().await?;
        if flags & COMMAND == 0 {
            match body.split_first() {
                Some((1, topic)) => self.subscribe(topic)?,
                Some((0, topic)) => self.cancel(topic),
                _ => return Err(wrong("a message that is no subscription")),
            }
            return Ok(Heard::Subscription);
        }
        match split_name(&body) {
            Some((b"SUBSCRIBE", topic)) => self.subscribe(topic)?,
            Some((b"CANCEL", topic)) => self.cancel(topic),
            // Two bytes say how long it will wait.
            Some((b"PING", rest)) => {
                return Ok(Heard::Ping(rest.get(2..).unwrap_or_default().into()));
            }
            Some((b"PONG", _)) => {}
            _ => return Err(wrong("an unknown command")),
        }
        Ok(Heard::Subscription)
    }

    fn subscribe(&mut self, topic: &[u8]) -> io::Result<()> {
        if self.wanted.len() == SUBSCRIPTIONS {
            return Err(wrong("too many subscriptions"));
        }
        self.wanted.push(topic.to_vec());
        Ok(())
    }

    fn cancel(&mut self, topic: &[u8]) {
        if let Some(index) = self.wanted.iter().position(|wanted| wanted == topic) {
            self.wanted.swap_remove(index);
        }
    }

    /// Answers a ping.
    ///
    /// # Errors
    /// When it has gone.
    pub async fn pong(&mut self, context: &[u8]) -> io::Result<()> {
        self.write.write_all(&command("PONG", context)).await
    }

    /// Sends a [`message`].
    ///
    /// # Errors
    /// When it has gone.
    pub async fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.write.write_all(message).await
    }
}

/// The bytes of a message of these frames.
pub(super) fn message(frames: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(frames.iter().map(|frame| frame.len() + 9).sum());
    for (i, frame) in frames.iter().enumerate() {
        push_frame(&mut bytes, if i + 1 < frames.len() { MORE } else { 0 }, frame);
    }
    bytes
}

fn push_frame(bytes: &mut Vec<u8>, flags: u8, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(length) => bytes.extend([flags, length]),
        Err(_) => {
            bytes.push(flags | LONG);
            bytes.extend((body.len() as u64).to_be_bytes());
        }
    }
    bytes.extend(body);
}

fn command(name: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    push_frame(&mut bytes, COMMAND, &[&[name.len() as u8][..], name.as_bytes(), body].concat());
    bytes
}

fn property(name: &str, value: &str) -> Vec<u8> {
    let length = (value.len() as u32).to_be_bytes();
    [&[name.len() as u8][..], name.as_bytes(), &length, value.as_bytes()].concat()
}

fn greeting() -> [u8; GREETING] {
    let mut bytes = [0; GREETING];
    (bytes[0], bytes[9]) = (0xFF, 0x7F);
    bytes[10] = 3;
    bytes[12..16].copy_from_slice(b"NULL");
    bytes
}

fn check_greeting(bytes: &[u8]) -> io::Result<()> {
    if bytes[0] != 0xFF || bytes[9] & 1 == 0 {
        return Err(wrong("it does not speak ZMTP"));
    }
    if bytes[10] < 3 {
        return Err(wrong("it speaks a ZMTP before 3.0"));
    }
    match bytes[12..32].strip_prefix(b"NULL").is_some_and(|rest| rest.iter().all(|b| *b == 0)) {
        true => Ok(()),
        false => Err(wrong("it wants another mechanism than NULL")),
    }
}

/// Name and rest of a command.
fn split_name(body: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&length, rest) = body.split_first()?;
    rest.split_at_checked(usize::from(length))
}

/// What kind of socket a `READY` command is from.
fn socket_type(body: &[u8]) -> Option<&[u8]> {
    let (name, mut properties) = split_name(body)?;
    if name != b"READY" {
        return None;
    }
    loop {
        let (name, rest) = split_name(properties)?;
        let (length, rest) = rest.split_first_chunk()?;
        let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Some(value);
        }
        properties = rest;
    }
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

/// Frames as they come.
struct Frames {
    read: OwnedReadHalf,
    /// Bytes that came and are not of a frame yet.
    received: Vec<u8>,
}

impl Frames {
    /// Flags and body of the next frame.
    async fn next(&mut self) -> io::Result<(u8, Vec<u8>)> {
        self.fill(2).await?;
        let flags = self.received[0];
        let (head, length) = if flags & LONG == 0 {
            (2, u64::from(self.received[1]))
        } else {
            self.fill(9).await?;
            let length = self.received[1..9].try_into().expect("eight bytes");
            (9, u64::from_be_bytes(length))
        };
        let length = usize::try_from(length).ok().filter(|length| *length <= FRAME);
        let length = length.ok_or_else(|| wrong("a frame that is too long"))?;
        let frame = self.take(head + length).await?;
        Ok((flags, frame[head..].to_vec()))
    }

    async fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        self.fill(length).await?;
        let rest = self.received.split_off(length);
        Ok(std::mem::replace(&mut self.received, rest))
    }

    /// Waits for `length` bytes in all; those that came are kept when this is not awaited to its end.
    async fn fill(&mut self, length: usize) -> io::Result<()> {
        while self.received.len() < length {
            if self.read.read_buf(&mut self.received).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_socket_says_of_itself_is_read_with_care() {
        let ready = |properties: &[u8]| command("READY", properties)[2..].to_vec();
        let identity = property("Identity", "");
        let good = ready(&[identity, property("socket-type", "SUB")].concat());
        assert_eq!(socket_type(&good), Some(&b"SUB"[..]));
        for cut in 0..good.len() {
            assert_eq!(socket_type(&good[..cut]), None, "{cut}");
        }
        assert_eq!(socket_type(&ready(&[11, 1, 2])), None);
        assert_eq!(socket_type(&ready(b"\x01a\xFF\xFF\xFF\xFFb")), None);
        assert_eq!(socket_type(b"\x05HELLO"), None);
    }

    #[test]
    fn frames_are_as_long_as_they_say() {
        let long = vec![7; 300];
        let bytes = message(&[b"", b"\x01\x02", &long]);
        assert_eq!(bytes[..6], [MORE, 0, MORE, 2, 1, 2]);
        assert_eq!(bytes[6..15], [LONG, 0, 0, 0, 0, 0, 0, 1, 44]);
        assert_eq!(bytes[15..], long);
        assert_eq!(message(&[&[1; 255]])[..2], [0, 255]);
    }

    #[test]
    fn greetings_of_others_are_told_apart() {
        let good = greeting();
        assert!(check_greeting(&good).is_ok());
        for (at, byte) in [(0, b'G'), (9, 0), (10, 1), (12, b'P'), (16, b'X')] {
            let mut other = good;
            other[at] = byte;
            assert!(check_greeting(&other).is_err(), "byte {at}");
        }
    }
}
