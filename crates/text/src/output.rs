//! A model's answer, as it comes, to reasoning, content and calls of functions.
//!
//! [`OutputParser`] reads one character at a time and keeps no memory of how the text was cut, so any
//! chunking gives the same events but for where their text is cut. Text that may be the beginning
//! of a marker is held back until it is known what it is.
//!
//! **Reasoning** is what stands between its markers at the very beginning of an answer, or what
//! comes before the closing marker where the prompt has opened it already. Later markers are content:
//! models write about them. **Calls** are read where tools were given ([`ToolSet`]), in the model's
//! own syntax ([`CallFormat`]). White space between reasoning, content and calls belongs to the
//! template and is dropped; anywhere else it stays.
//!
//! **What is no call is content.** Text after an opening marker that breaks the syntax, names a
//! function that does not exist, or ends before the call does comes out as content, its markers
//! included, from the end of the last whole call on; nothing is lost. That holds word for word when
//! calls are given out whole, which is the default: arguments are then always a JSON object. With
//! [`ParserOptions::stream_arguments`] a call is given out while it is written, which cannot be taken
//! back; one that breaks off ends with `complete: false`, the arguments given out are a
//! beginning of JSON, and the text after them is content. Arguments are never repaired by closing
//! what is open: half a command is not a command. (Two things are put right, as neither changes the
//! meaning: control characters in strings are escaped, and Python's `True`, `False` and `None` are
//! read as JSON's where a schema asks for them.)

mod call;
mod format;
mod json;
mod syntax;

pub(crate) use syntax::deepseek;

pub use format::{CallFormat, OutputFormat, ReasoningMarkers};

use crate::tools::ToolSet;
use call::{Calls, Finder, Step, Syntax};

/// A piece of an answer. Text comes in as many events as it likes; it is never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputEvent {
    /// Reasoning.
    Reasoning(String),
    /// Text of the answer.
    Content(String),
    /// A call begins.
    ToolCallStart {
        /// Number of the call in the answer, from 0.
        index: usize,
        /// The function.
        name: String,
    },
    /// More of a call's arguments; all of them together are a JSON object.
    ToolCallArguments {
        /// Number of the call.
        index: usize,
        /// What is new.
        delta: String,
    },
    /// A call ends.
    ToolCallEnd {
        /// Number of the call.
        index: usize,
        /// False when the call broke off, which only happens while arguments are streamed.
        complete: bool,
    },
}

/// Appends `event`, to the last one where that is of the same kind.
fn push(events: &mut Vec<OutputEvent>, event: OutputEvent) {
    use OutputEvent::{Content, Reasoning, ToolCallArguments};
    match (events.last_mut(), event) {
        (Some(Reasoning(text)), Reasoning(more)) | (Some(Content(text)), Content(more)) => {
            text.push_str(&more);
        }
        (
            Some(ToolCallArguments { index, delta }),
            ToolCallArguments { index: same, delta: more },
        ) if *index == same => delta.push_str(&more),
        (_, event) => events.push(event),
    }
}

/// What [`OutputParser`] has to know about a request.
#[derive(Debug, Clone, Default)]
pub struct ParserOptions {
    /// The calls that an answer may hold.
    pub tools: ToolSet,
    /// The prompt ends inside reasoning: [`OutputFormat::starts_in_reasoning`].
    pub starts_in_reasoning: bool,
    /// Give calls out while they are written instead of when they are whole.
    pub stream_arguments: bool,
}

/// Incremental parser of one answer.
#[derive(Debug)]
pub struct OutputParser {
    format: OutputFormat,
    state: State,
    finder: Finder,
    /// White space that may turn out to stand before a marker.
    gap: String,
    /// White space that comes now follows a marker.
    after_marker: bool,
    /// Content has begun, so a brace begins no call any more.
    content_begun: bool,
    /// What was read since the last thing that was given out and cannot be taken back.
    raw: String,
    /// Nothing has come of the opening marker yet.
    unanswered: bool,
    calls: Calls,
}

#[derive(Debug)]
enum State {
    /// Nothing but white space so far.
    Start,
    Reasoning,
    Content,
    Call(Box<dyn Syntax>),
}

impl OutputParser {
    /// A parser of an answer in `format`.
    pub fn new(format: OutputFormat, options: ParserOptions) -> Self {
        let state = match format.reasoning {
            Some(_) if options.starts_in_reasoning => State::Reasoning,
            Some(_) => State::Start,
            None => State::Content,
        };
        Self {
            format,
            after_marker: matches!(state, State::Reasoning),
            state,
            finder: Finder::default(),
            gap: String::new(),
            content_begun: false,
            raw: String::new(),
            unanswered: false,
            calls: Calls::new(options.tools, options.stream_arguments),
        }
    }

    /// Reads `text`, which continues what came before, and gives out what is certain now.
    pub fn push(&mut self, text: &str) -> Vec<OutputEvent> {
        for c in text.chars() {
            self.step(c);
        }
        std::mem::take(&mut self.calls.events)
    }

    /// Ends the answer: what was held back is given out.
    pub fn finish(&mut self) -> Vec<OutputEvent> {
        let held = std::mem::take(&mut self.finder.held);
        match std::mem::replace(&mut self.state, State::Content) {
            State::Reasoning => {
                self.reasoning(&held);
                let gap = std::mem::take(&mut self.gap);
                self.emit(OutputEvent::Reasoning(gap));
            }
            State::Start | State::Content => {
                let text = std::mem::take(&mut self.gap) + &held;
                self.content(&text);
            }
            State::Call(_) => {
                self.calls.abandon();
                let raw = std::mem::take(&mut self.raw);
                // After a whole call white space is no text.
                if !raw.trim().is_empty() {
                    self.emit(OutputEvent::Content(raw));
                }
            }
        }
        let gap = std::mem::take(&mut self.gap);
        self.emit(OutputEvent::Content(gap));
        std::mem::take(&mut self.calls.events)
    }

    /// Whether the answer is inside reasoning at this point; a grammar begins to hold after it.
    pub fn in_reasoning(&self) -> bool {
        matches!(self.state, State::Reasoning)
    }

    fn step(&mut self, c: char) {
        match &mut self.state {
            State::Start => self.start(c),
            State::Reasoning => {
                let Some(markers) = self.format.reasoning else { return };
                let mut text = String::new();
                let closed = self.finder.step(&[markers.close], c, &mut text).is_some();
                self.reasoning(&text);
                if closed {
                    self.gap.clear();
                    self.after_marker = true;
                    self.state = State::Content;
                }
            }
            State::Content => self.read_content(c),
            State::Call(syntax) => {
                self.raw.push(c);
                let step = syntax.step(c, &mut self.calls);
                let held = syntax.held();
                self.after_step(step, held);
            }
        }
    }

    fn start(&mut self, c: char) {
        let Some(markers) = self.format.reasoning else { return };
        if self.finder.held.is_empty() && c.is_whitespace() {
            self.gap.push(c);
            return;
        }
        let mut text = String::new();
        if self.finder.step(&[markers.open], c, &mut text).is_some() {
            self.gap.clear();
            self.after_marker = true;
            self.state = State::Reasoning;
        } else if !text.is_empty() {
            text.push_str(&std::mem::take(&mut self.finder.held));
            self.state = State::Content;
            let gap = std::mem::take(&mut self.gap);
            for c in gap.chars().chain(text.chars()) {
                self.step(c);
            }
        }
    }

    fn read_content(&mut self, c: char) {
        let Some(format) = self.format.calls.filter(|_| self.calls.enabled()) else {
            self.content(c.encode_utf8(&mut [0; 4]));
            return;
        };
        if c == '{'
            && !self.content_begun
            && self.finder.held.is_empty()
            && let Some(syntax) = format.bare_syntax()
        {
            self.open(syntax, "");
            self.step(c);
            return;
        }
        let mut text = String::new();
        let found = self.finder.step(format.openings(), c, &mut text);
        self.content(&text);
        if let Some(opening) = found {
            self.open(format.syntax(opening), format.openings()[opening]);
        }
    }

    fn open(&mut self, syntax: Box<dyn Syntax>, marker: &str) {
        // Kept for the case that it is no call after all.
        self.raw = std::mem::take(&mut self.gap);
        self.raw.push_str(marker);
        self.unanswered = true;
        self.state = State::Call(syntax);
    }

    fn after_step(&mut self, step: Step, held: usize) {
        if std::mem::take(&mut self.calls.committed) {
            self.raw.drain(..self.raw.len() - held);
            self.content_begun = true;
            self.unanswered = false;
        }
        match step {
            Step::More => {}
            Step::Finished if !self.unanswered => {
                self.raw.clear();
                self.after_marker = true;
                self.state = State::Content;
            }
            // Markers around nothing are no call either.
            Step::Finished | Step::Break => {
                self.calls.abandon();
                let raw = std::mem::take(&mut self.raw);
                let (text, again) = raw.split_at(raw.len() - held);
                self.state = State::Content;
                self.after_marker = false;
                self.content_begun = true;
                self.emit(OutputEvent::Content(text.to_owned()));
                for c in again.chars() {
                    self.step(c);
                }
            }
        }
    }

    fn reasoning(&mut self, text: &str) {
        let text = self.without_borders(text);
        self.emit(OutputEvent::Reasoning(text));
    }

    fn content(&mut self, text: &str) {
        // Where no marker can follow, white space has nothing to wait for.
        let waits = self.after_marker || self.format.calls.is_some() && self.calls.enabled();
        let text = if waits { self.without_borders(text) } else { text.to_owned() };
        self.content_begun |= !text.is_empty();
        self.emit(OutputEvent::Content(text));
    }

    /// `text` without the white space that follows a marker, and with the white space at its end
    /// kept for later.
    fn without_borders(&mut self, text: &str) -> String {
        let mut out = String::new();
        for c in text.chars() {
            if c.is_whitespace() {
                if !self.after_marker {
                    self.gap.push(c);
                }
            } else {
                self.after_marker = false;
                out.push_str(&self.gap);
                out.push(c);
                self.gap.clear();
            }
        }
        out
    }

    fn emit(&mut self, event: OutputEvent) {
        let empty = match &event {
            OutputEvent::Reasoning(text) | OutputEvent::Content(text) => text.is_empty(),
            _ => false,
        };
        if !empty {
            push(&mut self.calls.events, event);
        }
    }
}
