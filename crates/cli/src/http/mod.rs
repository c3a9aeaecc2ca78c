//! The reading half of an HTTP/1.1 client with server-sent events, for `bench serve`: state machines that are fed whatever
//! bytes have arrived, so that one thread can watch many streams. No sockets here. Written after RFC 9112 and
//! the event stream chapter of the HTML standard.

#[cfg(test)]
mod corpus;
mod events;
mod response;
#[cfg(test)]
mod tests;

pub use events::Events;
pub use response::{Head, Piece, Response};

use std::fmt;

/// Why bytes are no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HttpError {
    /// Not HTTP/1.0 or 1.1.
    StatusLine(String),
    /// A header field that has no name, or a value that cannot be obeyed.
    Header(String),
    /// The length of a chunk.
    ChunkSize(String),
    /// Something other than the end of a line after a chunk.
    ChunkEnd,
    /// More bytes than a limit allows: what, and the limit.
    TooLong(&'static str, usize),
    /// The connection was closed before the answer was whole.
    CutShort(&'static str),
}

impl fmt::Display for HttpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::StatusLine(line) => write!(f, "status line {line:?} is not of HTTP/1.1"),
            Self::Header(line) => write!(f, "header field {line:?} cannot be read"),
            Self::ChunkSize(line) => write!(f, "chunk length {line:?} is no hexadecimal number"),
            Self::ChunkEnd => f.write_str("a chunk is longer than its length says"),
            Self::TooLong(what, limit) => write!(f, "{what} is longer than {limit} bytes"),
            Self::CutShort(place) => write!(f, "the connection was closed {place}"),
        }
    }
}

impl std::error::Error for HttpError {}

/// A line that arrives in parts, without its end.
#[derive(Debug, Default)]
struct Line(Vec<u8>);

impl Line {
    /// Takes bytes up to and with `\n` off `input`; whether the line is whole, a `\r` before `\n` cut.
    fn take(
        &mut self,
        input: &mut &[u8],
        limit: usize,
        what: &'static str,
    ) -> Result<bool, HttpError> {
        let end = input.iter().position(|&b| b == b'\n');
        let (part, rest) = input.split_at(end.unwrap_or(input.len()));
        if self.0.len() + part.len() > limit {
            return Err(HttpError::TooLong(what, limit));
        }
        self.0.extend_from_slice(part);
        *input = rest;
        if end.is_none() {
            return Ok(false);
        }
        *input = &rest[1..];
        if self.0.last() == Some(&b'\r') {
            self.0.pop();
        }
        Ok(true)
    }

    /// The line, for a message.
    fn shown(&self) -> String {
        const LONGEST: usize = 80;
        String::from_utf8_lossy(&self.0[..self.0.len().min(LONGEST)]).into_owned()
    }
}
