//! What the syntaxes of calls are made of: where calls go ([`Calls`]), and readers of literals,
//! of text up to a marker and of JSON, each of which takes one character at a time.

use super::json::{Json, Scan, escape};
use super::{OutputEvent, push};
use crate::tools::{MAX_NAME, ToolSet, Types, never_in_name};
use serde_json::Value;
use std::fmt;

/// What a character was to a syntax.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Part of calls, and more is to come.
    More,
    /// The end of the calls.
    Finished,
    /// No part of a call. Text that became none is content.
    Break,
}

/// Reads what follows the marker that begins calls.
pub(super) trait Syntax: fmt::Debug + Send {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step;

    /// Length in bytes of the end of what was read that has not been understood yet. After a
    /// break it is read again as content, since it may begin something else.
    fn held(&self) -> usize;
}

/// Takes calls and gives out events: at once when arguments are streamed, and otherwise when the
/// call is whole.
#[derive(Debug)]
pub(super) struct Calls {
    tools: ToolSet,
    streams: bool,
    next_index: usize,
    current: Option<Current>,
    /// Something was given out that cannot be taken back.
    pub committed: bool,
    pub events: Vec<OutputEvent>,
}

#[derive(Debug)]
struct Current {
    name: String,
    arguments: String,
}

impl Calls {
    pub(super) fn new(tools: ToolSet, streams: bool) -> Self {
        Self { tools, streams, next_index: 0, current: None, committed: false, events: Vec::new() }
    }

    pub(super) fn enabled(&self) -> bool {
        self.tools != ToolSet::None
    }

    /// Begins a call; false when there is no such function.
    pub(super) fn start(&mut self, name: &str) -> bool {
        if !self.tools.accepts(name) {
            return false;
        }
        self.current = Some(Current { name: name.into(), arguments: String::new() });
        if self.streams {
            let start = OutputEvent::ToolCallStart { index: self.next_index, name: name.into() };
            self.events.push(start);
            self.committed = true;
        }
        true
    }

    /// Appends to the arguments of the call that was begun.
    pub(super) fn arguments(&mut self, delta: &str) {
        if delta.is_empty() {
            return;
        }
        if self.streams {
            let delta =
                OutputEvent::ToolCallArguments { index: self.next_index, delta: delta.into() };
            push(&mut self.events, delta);
            self.committed = true;
        } else if let Some(current) = &mut self.current {
            current.arguments.push_str(delta);
        }
    }

    /// Completes the call.
    pub(super) fn end(&mut self) {
        let Some(Current { name, arguments }) = self.current.take() else { return };
        let index = self.next_index;
        self.next_index += 1;
        self.committed = true;
        if !self.streams {
            self.events.push(OutputEvent::ToolCallStart { index, name });
            push(&mut self.events, OutputEvent::ToolCallArguments { index, delta: arguments });
        }
        self.events.push(OutputEvent::ToolCallEnd { index, complete: true });
    }

    /// The call that was begun will not be completed.
    pub(super) fn abandon(&mut self) {
        if self.current.take().is_some() && self.streams {
            self.events.push(OutputEvent::ToolCallEnd { index: self.next_index, complete: false });
            self.next_index += 1;
        }
    }

    /// Types that an argument of the current function may have.
    fn types(&self, key: &str) -> Types {
        let name = self.current.as_ref().map_or("", |current| &current.name);
        self.tools.types(name, key)
    }
}

/// Finds the first of several markers, none of which is part of another.
#[derive(Debug, Default)]
pub(super) struct Finder {
    /// The beginning of a marker.
    pub held: String,
}

impl Finder {
    /// Reads a character: the index of the marker that it completes. Text that is no part of one
    /// is appended to `text`.
    pub(super) fn step(&mut self, markers: &[&str], c: char, text: &mut String) -> Option<usize> {
        self.held.push(c);
        loop {
            if let Some(found) = markers.iter().position(|marker| *marker == self.held) {
                self.held.clear();
                return Some(found);
            }
            if self.held.is_empty() || markers.iter().any(|m| m.starts_with(&self.held)) {
                return None;
            }
            text.push(self.held.remove(0));
        }
    }
}

/// Outcome of a reader of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    More,
    /// Done; which of the possibilities it was.
    Hit(usize),
    Miss,
}

/// White space, then one of several literals.
#[derive(Debug, Default)]
pub(super) struct Literal {
    seen: String,
}

impl Literal {
    pub(super) fn step(&mut self, options: &[&str], c: char) -> Read {
        if self.seen.is_empty() && c.is_whitespace() {
            return Read::More;
        }
        self.seen.push(c);
        if let Some(found) = options.iter().position(|option| *option == self.seen) {
            self.seen.clear();
            return Read::Hit(found);
        }
        match options.iter().any(|option| option.starts_with(&self.seen)) {
            true => Read::More,
            false => Read::Miss,
        }
    }

    pub(super) fn held(&self) -> usize {
        self.seen.len()
    }
}

/// A name, up to one of several markers, white space around it cut.
#[derive(Debug, Default)]
pub(super) struct Name {
    finder: Finder,
    text: String,
}

impl Name {
    /// Reads the name of an argument, which may be any text.
    pub(super) fn step(&mut self, ends: &[&str], c: char) -> Read {
        match self.finder.step(ends, c, &mut self.text) {
            Some(found) => Read::Hit(found),
            // White space around a name is bounded like the name itself.
            None if self.text.len() > 2 * MAX_NAME => Read::Miss,
            None => Read::More,
        }
    }

    /// Reads the name of a function, which misses at the first character that none has.
    pub(super) fn step_function(&mut self, ends: &[&str], c: char) -> Read {
        match self.step(ends, c) {
            Read::More if self.excess() > 0 => Read::Miss,
            other => other,
        }
    }

    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.text).trim().to_owned()
    }

    pub(super) fn held(&self) -> usize {
        self.finder.held.len() + self.excess()
    }

    /// Length of the text from the first character that is in no function's name.
    fn excess(&self) -> usize {
        let name = self.text.trim_start();
        name.trim_end().find(never_in_name).map_or(0, |at| name.len() - at)
    }
}

/// Arguments as a JSON object, which are given out as they are read.
#[derive(Debug, Default)]
pub(super) struct JsonArguments {
    json: Json,
    begun: bool,
    piece: String,
}

impl JsonArguments {
    /// Ends the call at the end of the object.
    pub(super) fn step(&mut self, c: char, calls: &mut Calls) -> Read {
        if !self.begun {
            match c {
                '{' => self.begun = true,
                _ if c.is_whitespace() => return Read::More,
                _ => return Read::Miss,
            }
        }
        let scan = self.json.step(c, &mut self.piece);
        calls.arguments(&self.piece);
        self.piece.clear();
        match scan {
            Scan::More => Read::More,
            Scan::Done => {
                calls.end();
                Read::Hit(0)
            }
            Scan::DoneBefore | Scan::Bad => Read::Miss,
        }
    }
}

/// One argument whose value is text between markers, as the formats write them that look like
/// XML: strings as they are, everything else as JSON.
#[derive(Debug, Default)]
pub(super) struct TextArgument {
    finder: Finder,
    types: Option<Types>,
    /// The value so far, or what is new of a string.
    text: String,
    /// One line break after the opening marker and one before the closing one are no part of
    /// the value.
    cut_lines: bool,
    at_start: bool,
    /// A line break that may be the last.
    line: bool,
}

impl TextArgument {
    /// A value of `key`, the `first` or a further one of the call.
    pub(super) fn start(key: &str, first: bool, cut_lines: bool, calls: &mut Calls) -> Self {
        let types = calls.types(key);
        let mut opening = String::from(if first { "{\"" } else { ", \"" });
        escape(key, &mut opening);
        opening.push_str("\": ");
        if types == Types::STRING {
            opening.push('"');
        }
        calls.arguments(&opening);
        Self { types: Some(types), cut_lines, at_start: true, ..Self::default() }
    }

    /// True at the end of the value, which is `end`.
    pub(super) fn step(&mut self, end: &str, c: char, calls: &mut Calls) -> bool {
        let found = self.finder.step(&[end], c, &mut self.text).is_some();
        let types = self.types.unwrap_or(Types::ANY);
        if types == Types::STRING {
            let mut escaped = String::new();
            for c in std::mem::take(&mut self.text).chars() {
                if self.cut_lines && c == '\n' {
                    if !std::mem::take(&mut self.at_start)
                        && std::mem::replace(&mut self.line, true)
                    {
                        escaped.push_str("\\n");
                    }
                    continue;
                }
                self.at_start = false;
                if std::mem::take(&mut self.line) {
                    escaped.push_str("\\n");
                }
                escape(c.encode_utf8(&mut [0; 4]), &mut escaped);
            }
            if found {
                escaped.push('"');
            }
            calls.arguments(&escaped);
        } else if found {
            let mut text = self.text.as_str();
            if self.cut_lines {
                text = text.strip_prefix('\n').unwrap_or(text);
                text = text.strip_suffix('\n').unwrap_or(text);
            }
            calls.arguments(&typed(text, types));
        }
        found
    }

    pub(super) fn held(&self) -> usize {
        self.finder.held.len() + usize::from(self.line)
    }
}

/// JSON of a value written as `text`, given the types it may have.
///
/// A value that is allowed as the JSON it is stays as it is; one that is not is a string where
/// strings are allowed. Where neither is, JSON of another type stays, and only what is no JSON at
/// all becomes a string: the caller's validation then names the argument.
fn typed(text: &str, types: Types) -> String {
    let trimmed = text.trim();
    // Models of Python's world write its words for these.
    let word = match trimmed {
        "True" if types.holds(Types::BOOLEAN) => Some("true"),
        "False" if types.holds(Types::BOOLEAN) => Some("false"),
        "None" if types.holds(Types::NULL) => Some("null"),
        _ => None,
    };
    let string_too = types.holds(Types::STRING);
    if let Some(word) = word.filter(|_| !string_too) {
        return word.into();
    }
    if let Ok(value) = serde_json::from_str::<Value>(trimmed) {
        let kind = Types::of_value(&value);
        // A string is written without quotes, so quotes belong to it.
        if !string_too || (kind != Types::STRING && types.holds(kind)) {
            return trimmed.into();
        }
    }
    let mut string = String::from("\"");
    escape(text, &mut string);
    string.push('"');
    string
}

/// A call written as one JSON object: `{"name": …, "arguments": {…}}`, keys in any order.
///
/// `parameters` is read as `arguments`, a string that holds an object as that object, and no
/// arguments or `null` as none. Other keys (`id`, `type`) mean nothing here.
#[derive(Debug, Default)]
pub(super) struct ObjectCall {
    at: ObjectAt,
    json: Json,
    text: String,
    key: String,
    name: Option<String>,
    arguments: Option<String>,
    /// The arguments are on their way out.
    started: bool,
    /// Nothing but the object says that it is a call, so it must look exactly like one.
    strict: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ObjectAt {
    #[default]
    Open,
    KeyOrEnd,
    Key,
    Colon,
    BeforeValue,
    Value,
    Stream,
    After,
}

impl ObjectCall {
    pub(super) fn strict() -> Self {
        Self { strict: true, ..Self::default() }
    }

    /// Ends the call at the end of the object.
    pub(super) fn step(&mut self, c: char, calls: &mut Calls) -> Read {
        use ObjectAt::{After, BeforeValue, Colon, Key, KeyOrEnd, Open, Stream, Value};
        let space = matches!(c, ' ' | '\t' | '\n' | '\r');
        match self.at {
            Open | KeyOrEnd | Colon | BeforeValue | After if space => Read::More,
            Open if c == '{' => self.go(KeyOrEnd),
            KeyOrEnd if c == '"' => {
                self.begin(Key);
                self.scan(c, calls)
            }
            Key | Value => self.scan(c, calls),
            Colon if c == ':' => self.go(BeforeValue),
            BeforeValue => {
                let is_arguments = self.is_arguments();
                if (is_arguments && (self.started || self.arguments.is_some()))
                    || (self.key == "name" && self.name.is_some())
                {
                    return Read::Miss;
                }
                if is_arguments
                    && c == '{'
                    && let Some(name) = &self.name
                {
                    if !calls.start(name) {
                        return Read::Miss;
                    }
                    self.started = true;
                    self.begin(Stream);
                } else {
                    self.begin(Value);
                }
                self.scan(c, calls)
            }
            Stream => self.scan(c, calls),
            After if c == ',' => self.go(KeyOrEnd),
            After if c == '}' => self.finish(calls),
            KeyOrEnd if c == '}' => self.finish(calls),
            _ => Read::Miss,
        }
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    fn go(&mut self, at: ObjectAt) -> Read {
        self.at = at;
        Read::More
    }

    fn begin(&mut self, at: ObjectAt) {
        self.at = at;
        self.json = Json::default();
        self.text.clear();
    }

    fn scan(&mut self, c: char, calls: &mut Calls) -> Read {
        let scan = self.json.step(c, &mut self.text);
        if self.at == ObjectAt::Stream {
            calls.arguments(&self.text);
            self.text.clear();
        }
        match scan {
            Scan::More => Read::More,
            Scan::Bad => Read::Miss,
            Scan::Done => match self.value() {
                true => Read::More,
                false => Read::Miss,
            },
            Scan::DoneBefore => match self.value() {
                true => self.step(c, calls),
                false => Read::Miss,
            },
        }
    }

    /// Takes a key or value that is whole; false when it does not belong into a call.
    fn value(&mut self) -> bool {
        let text = std::mem::take(&mut self.text);
        if self.at == ObjectAt::Key {
            self.at = ObjectAt::Colon;
            self.key = serde_json::from_str(&text).unwrap_or_default();
            let known = ["name", "arguments", "parameters", "id", "type"];
            return !self.strict || known.contains(&self.key.as_str());
        }
        let streamed = self.at == ObjectAt::Stream;
        self.at = ObjectAt::After;
        if self.key == "name" {
            self.name = serde_json::from_str(&text).ok();
            return self.name.is_some();
        }
        if streamed || !self.is_arguments() {
            return true;
        }
        let object = |text: String| match serde_json::from_str(&text) {
            Ok(Value::Object(_)) => Some(text),
            _ => None,
        };
        self.arguments = match text.as_bytes().first() {
            Some(b'{') => Some(text),
            Some(b'n') => Some("{}".into()),
            Some(b'"') => match serde_json::from_str::<String>(&text) {
                Ok(inner) if inner.trim().is_empty() => Some("{}".into()),
                Ok(inner) => object(inner),
                Err(_) => None,
            },
            _ => None,
        };
        self.arguments.is_some()
    }

    fn finish(&mut self, calls: &mut Calls) -> Read {
        if !self.started {
            let Some(name) = &self.name else { return Read::Miss };
            if self.strict && self.arguments.is_none() || !calls.start(name) {
                return Read::Miss;
            }
            calls.arguments(self.arguments.as_deref().unwrap_or("{}"));
        }
        calls.end();
        Read::Hit(0)
    }
}
