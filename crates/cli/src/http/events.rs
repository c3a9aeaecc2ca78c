//! Server-sent events out of the bytes of a body.

use super::HttpError;

/// Bytes of one event.
const LONGEST: usize = 4 << 20;
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// Collects the data of one event after the other. Comments and the fields `event`, `id` and `retry` carry nothing that
/// a load test needs.
#[derive(Debug, Default)]
pub struct Events {
    /// A line that is not whole.
    line: Vec<u8>,
    /// Data lines of an event that is not whole, each with `\n` after it.
    data: Vec<u8>,
    /// The last byte was `\r`: a `\n` belongs to it.
    carriage_return: bool,
    /// A line has been read, so no byte order mark can come.
    started: bool,
}

impl Events {
    /// Gives `event` the data of every event that `bytes` make whole.
    ///
    /// # Errors
    /// An event beyond the limit, or what `event` returns.
    pub fn push<E: From<HttpError>>(
        &mut self,
        mut bytes: &[u8],
        mut event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            if std::mem::take(&mut self.carriage_return) && bytes[0] == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let end = bytes.iter().position(|&b| b == b'\n' || b == b'\r');
            let (part, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
            if self.line.len() + self.data.len() + part.len() > LONGEST {
                return Err(HttpError::TooLong("an event", LONGEST).into());
            }
            if end.is_none() {
                self.line.extend_from_slice(part);
                return Ok(());
            }
            self.carriage_return = rest[0] == b'\r';
            bytes = &rest[1..];
            if self.line.is_empty() {
                self.whole_line(part, &mut event)?;
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(part);
                let result = self.whole_line(&line, &mut event);
                // Its memory serves the next line.
                line.clear();
                self.line = line;
                result?;
            }
        }
        Ok(())
    }

    /// Whether bytes of an event that never became whole are left.
    pub fn is_cut_short(&self) -> bool {
        !self.line.is_empty() || !self.data.is_empty()
    }

    fn whole_line<E>(
        &mut self,
        mut line: &[u8],
        event: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if !std::mem::replace(&mut self.started, true) {
            line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
        }
        if line.is_empty() {
            if !self.data.is_empty() {
                let result = event(&self.data[..self.data.len() - 1]);
                self.data.clear();
                result?;
            }
        } else if let Some(value) = field(line, b"data") {
            self.data.extend_from_slice(value);
            self.data.push(b'\n');
        }
        Ok(())
    }
}

/// The value of a line, when it is that field's. One space after the colon is not part of it.
fn field<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let rest = line.strip_prefix(name)?;
    match rest.first() {
        None => Some(rest),
        Some(b':') => Some(rest[1..].strip_prefix(b" ").unwrap_or(&rest[1..])),
        Some(_) => None,
    }
}
