//! One response after the other, out of the bytes of a connection.

use super::{HttpError, Line};

/// Bytes of one header line, and of all.
const LONGEST_LINE: usize = 16 << 10;
const LONGEST_HEAD: usize = 64 << 10;
/// Bytes of a chunk's length with its extensions.
const LONGEST_SIZE: usize = 256;

/// Status and what decides about the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Status code.
    pub status: u16,
    /// `Content-Type` in lower case, without parameters; empty where there is none.
    pub content_type: String,
    /// Whether another request can follow on this connection.
    pub keep_alive: bool,
}

/// What came next.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// Everything before the body.
    Head(Head),
    /// Bytes of the body, its framing taken off.
    Body(&'a [u8]),
    /// The response is whole.
    End,
}

/// Where in a response the next byte belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    StatusLine,
    Headers,
    ChunkSize,
    /// Bytes left of a chunk.
    Chunk(u64),
    ChunkEnd,
    Trailers,
    /// Bytes left of a body of known length.
    Length(u64),
    /// A body that ends with the connection.
    UntilClose,
    /// Nothing more may come.
    End,
}

/// How the body is framed, from the header fields so far.
#[derive(Debug, Default)]
struct Framing {
    chunked: bool,
    length: Option<u64>,
    close: bool,
    content_type: String,
    status: u16,
}

/// Reads one response; [`Response::default`] awaits the next one.
#[derive(Debug)]
pub struct Response {
    at: At,
    line: Line,
    head_bytes: usize,
    framing: Framing,
}

impl Default for Response {
    fn default() -> Self {
        Self {
            at: At::StatusLine,
            line: Line::default(),
            head_bytes: 0,
            framing: Framing::default(),
        }
    }
}

impl Response {
    /// Takes the next piece off `input`; `None` once all of it is taken and more is needed.
    ///
    /// # Errors
    /// Bytes that are no HTTP/1.1 response to a request without `HEAD`, or beyond a limit.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, HttpError> {
        loop {
            match self.at {
                At::End => return Ok(None),
                At::Length(0) => {
                    self.at = At::End;
                    return Ok(Some(Piece::End));
                }
                _ if input.is_empty() => return Ok(None),
                At::StatusLine => {
                    // Empty lines before a response are to be skipped.
                    if self.head_line(input)? && !self.line.0.is_empty() {
                        self.status_line()?;
                        self.at = At::Headers;
                    }
                }
                At::Headers => {
                    if !self.head_line(input)? {
                        continue;
                    }
                    if !self.line.0.is_empty() {
                        self.header()?;
                        self.line.0.clear();
                    } else if let Some(head) = self.end_of_head() {
                        return Ok(Some(Piece::Head(head)));
                    }
                }
                At::ChunkSize => {
                    if self.line.take(input, LONGEST_SIZE, "the length of a chunk")? {
                        let size = chunk_size(&self.line)?;
                        self.line.0.clear();
                        self.at = if size == 0 { At::Trailers } else { At::Chunk(size) };
                    }
                }
                At::Chunk(left) => {
                    let (piece, left) = split(input, left);
                    self.at = if left == 0 { At::ChunkEnd } else { At::Chunk(left) };
                    return Ok(Some(Piece::Body(piece)));
                }
                At::ChunkEnd => {
                    let whole = self.line.take(input, 1, "the end of a chunk");
                    if whole.map_err(|_| HttpError::ChunkEnd)? {
                        if !self.line.0.is_empty() {
                            return Err(HttpError::ChunkEnd);
                        }
                        self.at = At::ChunkSize;
                    }
                }
                At::Trailers => {
                    if self.head_line(input)? {
                        let end = self.line.0.is_empty();
                        self.line.0.clear();
                        if end {
                            self.at = At::Length(0);
                        }
                    }
                }
                At::Length(left) => {
                    let (piece, left) = split(input, left);
                    self.at = At::Length(left);
                    return Ok(Some(Piece::Body(piece)));
                }
                At::UntilClose => return Ok(Some(Piece::Body(std::mem::take(input)))),
            }
        }
    }

    /// Whether nothing of the response has come yet.
    pub fn is_untouched(&self) -> bool {
        self.at == At::StatusLine && self.head_bytes == 0
    }

    /// The connection was closed. Fine after the end, and where the body was to last until then.
    ///
    /// # Errors
    /// [`HttpError::CutShort`] anywhere else.
    pub fn close(&mut self) -> Result<(), HttpError> {
        let place = match self.at {
            At::End | At::Length(0) | At::UntilClose => {
                self.at = At::End;
                return Ok(());
            }
            At::StatusLine if self.head_bytes == 0 => "before an answer",
            At::StatusLine | At::Headers => "within the header",
            _ => "within the body",
        };
        Err(HttpError::CutShort(place))
    }

    /// A line of the head or the trailers, under the limit of all of them.
    fn head_line(&mut self, input: &mut &[u8]) -> Result<bool, HttpError> {
        let before = input.len();
        let whole = self.line.take(input, LONGEST_LINE, "a header field")?;
        self.head_bytes += before - input.len();
        if self.head_bytes > LONGEST_HEAD {
            return Err(HttpError::TooLong("the header", LONGEST_HEAD));
        }
        Ok(whole)
    }

    fn status_line(&mut self) -> Result<(), HttpError> {
        let bad = || HttpError::StatusLine(self.line.shown());
        let text = str::from_utf8(&self.line.0).map_err(|_| bad())?;
        let mut words = text.splitn(3, ' ');
        let version = words.next().unwrap_or_default();
        if !["HTTP/1.1", "HTTP/1.0"].contains(&version) {
            return Err(bad());
        }
        let code = words.next().filter(|code| code.len() == 3).ok_or_else(bad)?;
        self.framing = Framing {
            status: code.parse().ok().filter(|code| *code >= 100).ok_or_else(bad)?,
            close: version == "HTTP/1.0",
            ..Framing::default()
        };
        self.line.0.clear();
        Ok(())
    }

    fn header(&mut self) -> Result<(), HttpError> {
        let bad = || HttpError::Header(self.line.shown());
        let colon = self.line.0.iter().position(|&b| b == b':').filter(|&at| at > 0);
        let (name, value) = self.line.0.split_at(colon.ok_or_else(bad)?);
        // Other fields may hold any bytes.
        let value = String::from_utf8_lossy(&value[1..]).trim().to_ascii_lowercase();
        let framing = &mut self.framing;
        match name.to_ascii_lowercase().as_slice() {
            b"transfer-encoding" if value == "chunked" => framing.chunked = true,
            b"content-encoding" if value == "identity" => {}
            // None was offered.
            b"transfer-encoding" | b"content-encoding" => return Err(bad()),
            b"content-length" => {
                let digits = value.bytes().all(|b| b.is_ascii_digit());
                let length = value.parse().ok().filter(|_| digits).ok_or_else(bad)?;
                if framing.length.replace(length).is_some_and(|other| other != length) {
                    return Err(bad());
                }
            }
            b"connection" => {
                let has = |word: &str| value.split(',').any(|part| part.trim() == word);
                framing.close = has("close") || framing.close && !has("keep-alive");
            }
            b"content-type" => {
                framing.content_type =
                    value.split(';').next().unwrap_or_default().trim().to_owned();
            }
            _ => {}
        }
        Ok(())
    }

    /// Decides how the body is framed; `None` after an interim response, which another one follows.
    fn end_of_head(&mut self) -> Option<Head> {
        let framing = &self.framing;
        if framing.status < 200 {
            self.at = At::StatusLine;
            return None;
        }
        self.at = if framing.status == 204 || framing.status == 304 {
            At::Length(0)
        } else if framing.chunked {
            At::ChunkSize
        } else {
            framing.length.map_or(At::UntilClose, At::Length)
        };
        // Trailers have a limit of their own.
        self.head_bytes = 0;
        Some(Head {
            status: framing.status,
            content_type: framing.content_type.clone(),
            keep_alive: !framing.close && self.at != At::UntilClose,
        })
    }
}

/// As much of `input` as `left` allows, taken off it, and what is left then.
fn split<'a>(input: &mut &'a [u8], left: u64) -> (&'a [u8], u64) {
    let count = usize::try_from(left).map_or(input.len(), |left| left.min(input.len()));
    let (piece, rest) = input.split_at(count);
    *input = rest;
    (piece, left - count as u64)
}

fn chunk_size(line: &Line) -> Result<u64, HttpError> {
    let digits = line.0.split(|&b| b == b';').next().unwrap_or_default().trim_ascii();
    let number = str::from_utf8(digits)
        .ok()
        .filter(|text| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit()));
    let number = number.and_then(|text| u64::from_str_radix(text, 16).ok());
    number.ok_or_else(|| HttpError::ChunkSize(line.shown()))
}
