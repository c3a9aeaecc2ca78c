//! JSON, character by character: is this still the beginning of a value, and where does it end?
//!
//! Answers come in pieces of any size and arguments are given out before their end is known, so
//! what is given out must be valid already. The grammar is RFC 8259's, with two differences. A
//! control character inside a string, which models write for a line break, is given out as the
//! escape it should have been. Half of a surrogate pair is refused, because most readers do.

use std::fmt::Write;

/// Containers within containers; serde_json reads 128, and a call adds some of its own.
const MAX_DEPTH: usize = 120;

/// What a character was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scan {
    /// Part of the value, which goes on.
    More,
    /// The end of the value.
    Done,
    /// Not part of the value, which is a number and ends before it.
    DoneBefore,
    /// Not JSON.
    Bad,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Value,
    /// After `[`.
    FirstItem,
    /// After `{`.
    FirstKey,
    Key,
    Colon,
    /// After a value inside a container.
    After,
    Text,
    Escape,
    /// Digits left, and the code unit so far.
    Unicode(u8, u16),
    /// After the first half of a pair: the number of characters of `\u` seen.
    Pair(u8),
    Word(&'static str),
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// A scanner of one value.
#[derive(Debug, Clone)]
pub(super) struct Json {
    at: At,
    /// Closing brackets to come, the innermost last.
    open: Vec<char>,
    /// The string being read is a key.
    is_key: bool,
    /// The code unit being read is the second half of a pair.
    second: bool,
}

impl Default for Json {
    fn default() -> Self {
        Self { at: At::Value, open: Vec::new(), is_key: false, second: false }
    }
}

impl Json {
    /// Reads one character and appends to `out` what stands for it.
    pub(super) fn step(&mut self, c: char, out: &mut String) -> Scan {
        if let Some(ended) = self.number(c) {
            match ended {
                Scan::More => out.push(c),
                Scan::Done if self.open.is_empty() => return Scan::DoneBefore,
                Scan::Done => {
                    self.at = At::After;
                    return self.step(c, out);
                }
                _ => {}
            }
            return ended;
        }
        let scan = self.structure(c);
        if matches!(scan, Scan::More | Scan::Done) {
            // Only strings let control characters through that white space does not cover.
            if c < ' ' && self.at == At::Text {
                match c {
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    other => {
                        let _ = write!(out, "\\u{:04x}", u32::from(other));
                    }
                }
            } else {
                out.push(c);
            }
        }
        scan
    }

    /// Progress of a number; `None` when none is being read.
    fn number(&mut self, c: char) -> Option<Scan> {
        let digit = c.is_ascii_digit();
        let e = matches!(c, 'e' | 'E');
        let (next, may_end) = match self.at {
            At::Minus => (digit.then_some(if c == '0' { At::Zero } else { At::Integer }), false),
            At::Zero if c == '.' => (Some(At::Point), true),
            At::Zero => (e.then_some(At::Exponent), !digit),
            At::Integer if c == '.' => (Some(At::Point), true),
            At::Integer if digit => (Some(At::Integer), true),
            At::Integer => (e.then_some(At::Exponent), true),
            At::Point => (digit.then_some(At::Fraction), false),
            At::Fraction if digit => (Some(At::Fraction), true),
            At::Fraction => (e.then_some(At::Exponent), true),
            At::Exponent if matches!(c, '+' | '-') => (Some(At::ExponentSign), false),
            At::Exponent | At::ExponentSign => (digit.then_some(At::ExponentDigits), false),
            At::ExponentDigits => (digit.then_some(At::ExponentDigits), true),
            _ => return None,
        };
        Some(match next {
            Some(next) => {
                self.at = next;
                Scan::More
            }
            None if may_end => Scan::Done,
            None => Scan::Bad,
        })
    }

    fn structure(&mut self, c: char) -> Scan {
        let space = matches!(c, ' ' | '\t' | '\n' | '\r');
        match self.at {
            At::Value | At::FirstItem | At::FirstKey | At::Key | At::Colon | At::After if space => {
                Scan::More
            }
            At::FirstItem if c == ']' => self.close(c),
            At::Value | At::FirstItem => self.value(c),
            At::FirstKey if c == '}' => self.close(c),
            At::FirstKey | At::Key if c == '"' => {
                self.is_key = true;
                self.go(At::Text)
            }
            At::Colon if c == ':' => self.go(At::Value),
            At::After if c == ',' => {
                let object = self.open.last() == Some(&'}');
                self.go(if object { At::Key } else { At::Value })
            }
            At::After => self.close(c),
            At::Text => match c {
                '"' if self.is_key => {
                    self.is_key = false;
                    self.go(At::Colon)
                }
                '"' => self.end(),
                '\\' => self.go(At::Escape),
                _ => Scan::More,
            },
            At::Escape => match c {
                'u' => self.go(At::Unicode(4, 0)),
                '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => self.go(At::Text),
                _ => Scan::Bad,
            },
            At::Unicode(left, unit) => self.unicode(c, left, unit),
            At::Pair(0) if c == '\\' => self.go(At::Pair(1)),
            At::Pair(1) if c == 'u' => {
                self.second = true;
                self.go(At::Unicode(4, 0))
            }
            At::Word(rest) => match rest.strip_prefix(c) {
                Some("") => self.end(),
                Some(rest) => self.go(At::Word(rest)),
                None => Scan::Bad,
            },
            _ => Scan::Bad,
        }
    }

    fn value(&mut self, c: char) -> Scan {
        match c {
            '{' | '[' if self.open.len() >= MAX_DEPTH => Scan::Bad,
            '{' => {
                self.open.push('}');
                self.go(At::FirstKey)
            }
            '[' => {
                self.open.push(']');
                self.go(At::FirstItem)
            }
            '"' => self.go(At::Text),
            '-' => self.go(At::Minus),
            '0' => self.go(At::Zero),
            '1'..='9' => self.go(At::Integer),
            't' => self.go(At::Word("rue")),
            'f' => self.go(At::Word("alse")),
            'n' => self.go(At::Word("ull")),
            _ => Scan::Bad,
        }
    }

    fn unicode(&mut self, c: char, left: u8, unit: u16) -> Scan {
        let Some(digit) = c.to_digit(16) else { return Scan::Bad };
        let unit = unit << 4 | digit as u16;
        if left > 1 {
            return self.go(At::Unicode(left - 1, unit));
        }
        let second = std::mem::take(&mut self.second);
        match (second, unit) {
            (true, 0xdc00..=0xdfff) => self.go(At::Text),
            (true, _) | (false, 0xdc00..=0xdfff) => Scan::Bad,
            (false, 0xd800..=0xdbff) => self.go(At::Pair(0)),
            (false, _) => self.go(At::Text),
        }
    }

    fn go(&mut self, at: At) -> Scan {
        self.at = at;
        Scan::More
    }

    fn close(&mut self, c: char) -> Scan {
        if self.open.pop() == Some(c) { self.end() } else { Scan::Bad }
    }

    fn end(&mut self) -> Scan {
        self.at = At::After;
        if self.open.is_empty() { Scan::Done } else { Scan::More }
    }
}

/// Appends `text` as the inside of a JSON string.
pub(super) fn escape(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            control if control < ' ' => {
                let _ = write!(out, "\\u{:04x}", u32::from(control));
            }
            other => out.push(other),
        }
    }
}
