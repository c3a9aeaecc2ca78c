//! Tokens of answers to what protocols send: reasoning, content and calls as they become certain.

use crate::ApiError;
use crate::runtime::{End, Output, Tokens};
use marlin_engine::Usage;
use marlin_text::{OutputEvent, OutputParser, StreamDecoder, StreamOptions, Tokenizer};
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// Thoughts before the answer.
    Reasoning(String),
    /// The answer.
    Content(String),
    /// A call of a function begins.
    Call {
        /// Which of the calls of this answer.
        index: usize,
        /// Function.
        name: String,
    },
    /// More of the JSON text of a call's arguments.
    Arguments {
        /// Which of the calls.
        index: usize,
        /// Text.
        text: String,
    },
}

/// A token and how likely it was.
#[derive(Debug, Clone)]
pub struct TokenChance {
    /// Token.
    pub token: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The likeliest tokens there.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Debug, Clone)]
pub enum Finish {
    /// The model, a stop string or the end of its grammar.
    Stop {
        /// The stop string, if one did.
        by: Option<String>,
    },
    /// `max_tokens` or the context.
    Length,
    /// It calls functions.
    ToolCalls,
    /// It failed.
    Failed(ApiError),
}

/// What one step brought for one answer.
#[derive(Debug)]
pub struct Piece {
    /// Which of the answers.
    pub choice: usize,
    /// New parts, often one, sometimes none.
    pub deltas: Vec<Delta>,
    /// Tokens since the last piece, when asked for.
    pub chances: Vec<TokenChance>,
    /// Tokens since the last piece.
    pub tokens: Vec<u32>,
    /// Set in the last piece of an answer.
    pub finish: Option<(Finish, Usage)>,
}

/// How answers become text.
#[derive(Clone, Default)]
pub struct AnswerOptions {
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Special tokens that are part of the text, because the parser looks for them.
    pub shown: Vec<String>,
    /// The answer goes on in the middle of a text.
    pub continues_text: bool,
    /// Takes reasoning and calls out of the text; without one everything is content.
    pub parser: Option<Arc<dyn Fn() -> OutputParser + Send + Sync>>,
    /// The answer ends with its first call.
    pub one_call: bool,
}

struct Choice {
    stream: StreamDecoder,
    parser: Option<OutputParser>,
    tokens: usize,
    stopped_by: Option<usize>,
    /// A call has begun.
    calls: bool,
    /// A call is whole.
    called: bool,
    /// A call that was given out while it was written has broken off.
    broken: bool,
    one_call: bool,
    ended: bool,
    /// Bytes of the tokens so far, and of the text given out.
    bytes: (usize, usize),
    /// Where each token ends whose text has not been given out, for what a stop string takes away.
    held: VecDeque<(usize, TokenChance)>,
}

/// Is told every piece.
type Observe = Box<dyn FnMut(&Piece) + Send>;

/// The answers to one request, as they come.
pub struct Answers {
    tokens: Tokens,
    choices: Vec<Choice>,
    stop: Vec<String>,
    ready: VecDeque<Piece>,
    open: usize,
    observe: Option<Observe>,
    tokenizer: Arc<Tokenizer>,
}

impl Answers {
    /// Of `n` answers.
    pub fn new(
        tokens: Tokens,
        n: usize,
        tokenizer: &Arc<Tokenizer>,
        options: &AnswerOptions,
    ) -> Self {
        let choice = || Choice {
            stream: tokenizer.stream(StreamOptions {
                show: options.shown.clone(),
                continues_text: options.continues_text,
                stop: options.stop.clone(),
                ..StreamOptions::default()
            }),
            parser: options.parser.as_ref().map(|make| make()),
            tokens: 0,
            stopped_by: None,
            calls: false,
            called: false,
            broken: false,
            one_call: options.one_call,
            ended: false,
            bytes: (0, 0),
            held: VecDeque::new(),
        };
        let choices = (0..n).map(|_| choice()).collect();
        let (stop, ready) = (options.stop.clone(), VecDeque::new());
        let tokenizer = tokenizer.clone();
        Self { tokens, choices, stop, ready, open: n, observe: None, tokenizer }
    }

    /// Calls `observe` with every piece as it is made.
    pub fn observed(self, observe: impl FnMut(&Piece) + Send + 'static) -> Self {
        Self { observe: Some(Box::new(observe)), ..self }
    }

    /// When the engine began to read the prompt, once it has.
    pub fn begun(&self) -> Arc<OnceLock<Instant>> {
        self.tokens.begun()
    }

    /// Whether every answer has ended and been given out.
    pub fn is_done(&self) -> bool {
        self.open == 0 && self.ready.is_empty()
    }

    fn give(&mut self, piece: Piece) {
        if let Some(observe) = &mut self.observe {
            observe(&piece);
        }
        self.ready.push_back(piece);
    }

    /// The next piece of any of the answers; `None` after the last.
    pub async fn next(&mut self) -> Option<Piece> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(piece);
            }
            if self.open == 0 {
                return None;
            }
            match self.tokens.next().await {
                Some(output) => self.take(output),
                None => self.lose(),
            }
        }
    }

    /// What has come already, without waiting.
    pub fn ready(&mut self) -> Option<Piece> {
        while self.ready.is_empty() {
            let output = self.tokens.ready()?;
            self.take(output);
        }
        self.ready.pop_front()
    }

    /// The engine is gone.
    fn lose(&mut self) {
        for choice in 0..self.choices.len() {
            if !self.choices[choice].ended {
                let error = ApiError::internal("the engine failed; send the request again");
                self.end(choice, Finish::Failed(error), Usage::default());
            }
        }
    }

    fn take(&mut self, output: Output) {
        match output {
            Output::Token { choice, token, logprob } => {
                let chances =
                    logprob.map(|l| TokenChance { token, logprob: l.logprob, top: l.top });
                self.token(choice, token, chances);
            }
            Output::End { choice, end, usage } => {
                let finish = match end {
                    _ if self.choices[choice].stopped_by.is_some() => Finish::Stop { by: None },
                    End::Stop => Finish::Stop { by: None },
                    End::Length => Finish::Length,
                    End::Cancelled => {
                        Finish::Failed(ApiError::internal("the answer was cancelled"))
                    }
                    End::Deadline => Finish::Failed(ApiError::deadline()),
                    // The grammar or schema is the client's.
                    End::Unfit(reason) => {
                        let error = ApiError::invalid("", reason);
                        Finish::Failed(ApiError { param: None, ..error })
                    }
                    End::Failed(reason) => Finish::Failed(ApiError::internal(reason)),
                };
                self.end(choice, finish, usage);
            }
        }
    }

    fn token(&mut self, index: usize, token: u32, chance: Option<TokenChance>) {
        let choice = &mut self.choices[index];
        if choice.ended || choice.stopped_by.is_some() {
            return;
        }
        choice.tokens += 1;
        let emitted = match choice.stream.push(token) {
            Ok(emitted) => emitted,
            Err(error) => {
                self.tokens.cancel(index);
                let error = ApiError::internal(error.to_string());
                return self.end(index, Finish::Failed(error), Usage::default());
            }
        };
        if emitted.stopped_by.is_some() {
            choice.stopped_by = emitted.stopped_by;
            self.tokens.cancel(index);
        }
        let (ends, mut given) = choice.bytes;
        given += emitted.text.len();
        let ends = ends + self.tokenizer.token_bytes(token).map_or(0, <[u8]>::len);
        choice.bytes = (ends, given);
        choice.held.extend(chance.map(|chance| (ends, chance)));
        let mut chances = Vec::new();
        while let Some((_, chance)) = choice.held.pop_front_if(|(end, _)| *end <= given) {
            chances.push(chance);
        }
        let had_called = choice.called;
        let deltas = choice.deltas(emitted.text);
        if choice.broken || choice.one_call && had_called {
            // Whatever follows the first call is not wanted, and half a call has failed already.
            self.tokens.cancel(index);
        }
        self.give(Piece { choice: index, deltas, chances, tokens: vec![token], finish: None });
    }

    fn end(&mut self, index: usize, finish: Finish, usage: Usage) {
        let choice = &mut self.choices[index];
        if std::mem::replace(&mut choice.ended, true) {
            return;
        }
        self.open -= 1;
        let broke_off = choice.broken;
        let rest = choice.stream.finish().text;
        let mut deltas = choice.deltas(rest);
        if let Some(parser) = &mut choice.parser {
            let events = parser.finish();
            choice.collect(events, &mut deltas);
        }
        // What a stop string has taken away is gone.
        let held = std::mem::take(&mut choice.held).into_iter().map(|(_, chance)| chance);
        let chances =
            if choice.stopped_by.is_some() { Vec::new() } else { held.collect::<Vec<_>>() };
        let mut usage = usage;
        let finish = match finish {
            Finish::Length => Finish::Length,
            // Arguments that a client has put together are a JSON object, or it is told that they are not.
            Finish::Failed(_) if broke_off => broken_call(),
            Finish::Stop { .. } if choice.broken => broken_call(),
            Finish::Failed(_) if choice.called && choice.one_call => Finish::ToolCalls,
            Finish::Stop { .. } if choice.calls => Finish::ToolCalls,
            Finish::Stop { .. } => {
                Finish::Stop { by: choice.stopped_by.map(|i| self.stop[i].clone()) }
            }
            other => other,
        };
        if choice.stopped_by.is_some() {
            usage.completion_tokens = choice.tokens;
        }
        let finish = Some((finish, usage));
        self.give(Piece { choice: index, deltas, chances, tokens: Vec::new(), finish });
    }
}

impl Choice {
    /// Appends what a parser found, without calls after the first where one is wanted.
    fn collect(&mut self, events: Vec<OutputEvent>, deltas: &mut Vec<Delta>) {
        let one_call = self.one_call;
        let wanted = |index: usize| index == 0 || !one_call;
        for event in events {
            match event {
                // The rest of half a call is neither, and the end of the only one wanted may have been cut off.
                _ if self.broken || one_call && self.called => {}
                OutputEvent::Reasoning(text) => deltas.push(Delta::Reasoning(text)),
                OutputEvent::Content(text) => deltas.push(Delta::Content(text)),
                OutputEvent::ToolCallStart { index, name } if wanted(index) => {
                    self.calls = true;
                    deltas.push(Delta::Call { index, name });
                }
                OutputEvent::ToolCallArguments { index, delta } if wanted(index) => {
                    deltas.push(Delta::Arguments { index, text: delta });
                }
                OutputEvent::ToolCallEnd { index, complete } if wanted(index) => {
                    self.called |= complete;
                    self.broken |= !complete;
                }
                _ => {}
            }
        }
    }

    fn deltas(&mut self, text: String) -> Vec<Delta> {
        let mut deltas = Vec::new();
        match &mut self.parser {
            _ if text.is_empty() => {}
            Some(parser) => {
                let events = parser.push(&text);
                self.collect(events, &mut deltas);
            }
            None => deltas.push(Delta::Content(text)),
        }
        deltas
    }
}

fn broken_call() -> Finish {
    let message = "the model broke off a call in its arguments; send the request again";
    Finish::Failed(ApiError::internal(message))
}

/// A part of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Reasoning,
    Content,
    Calls,
}

/// Tells the tokens of reasoning and of content from each other, and from the markers between them.
///
/// A token that brings no text belongs to what comes next, unless another part begins there: then it is a marker.
#[derive(Debug, Default)]
pub struct Tally {
    part: Option<Part>,
    held: usize,
    held_chances: Vec<TokenChance>,
    /// Tokens of reasoning.
    pub reasoning: usize,
    /// Tokens of content, when asked for.
    pub content: Vec<TokenChance>,
}

impl Tally {
    /// Adds the tokens of a piece of this answer.
    pub fn take(&mut self, piece: &Piece) {
        let part = match piece.deltas.last() {
            None => None,
            Some(Delta::Reasoning(_)) => Some(Part::Reasoning),
            Some(Delta::Content(_)) => Some(Part::Content),
            Some(Delta::Call { .. } | Delta::Arguments { .. }) => Some(Part::Calls),
        };
        if part.is_some() && self.part.is_some() && part != self.part {
            self.held = 0;
            self.held_chances.clear();
        }
        self.held += piece.tokens.len();
        self.held_chances.extend_from_slice(&piece.chances);
        let Some(part) = part else { return };
        let held = std::mem::take(&mut self.held);
        match part {
            Part::Reasoning => self.reasoning += held,
            Part::Content => self.content.append(&mut self.held_chances),
            Part::Calls => {}
        }
        self.held_chances.clear();
        self.part = Some(part);
    }
}

/// One whole answer.
#[derive(Debug, Default)]
pub struct Whole {
    /// Thoughts.
    pub reasoning: String,
    /// Content.
    pub content: String,
    /// Function and JSON text of its arguments, of every call.
    pub calls: Vec<(String, String)>,
    /// Tokens, when asked for.
    pub chances: Vec<TokenChance>,
    /// Which tokens are of what.
    pub tally: Tally,
    /// Why it ended and what it took; set once it has.
    pub finish: Option<(Finish, Usage)>,
}

impl Whole {
    /// Appends a piece of this answer.
    pub fn take(&mut self, piece: Piece) {
        self.tally.take(&piece);
        for delta in piece.deltas {
            match delta {
                Delta::Reasoning(text) => self.reasoning.push_str(&text),
                Delta::Content(text) => self.content.push_str(&text),
                Delta::Call { name, .. } => self.calls.push((name, String::new())),
                Delta::Arguments { index, text } => {
                    if let Some((_, arguments)) = self.calls.get_mut(index) {
                        arguments.push_str(&text);
                    }
                }
            }
        }
        self.chances.extend(piece.chances);
        if piece.finish.is_some() {
            self.finish = piece.finish;
        }
    }
}

/// All answers whole.
///
/// # Errors
/// When one of them failed.
pub async fn whole(mut answers: Answers) -> Result<Vec<Whole>, ApiError> {
    let mut all: Vec<Whole> = answers.choices.iter().map(|_| Whole::default()).collect();
    while let Some(piece) = answers.next().await {
        if let Some((Finish::Failed(error), _)) = piece.finish {
            return Err(error);
        }
        all[piece.choice].take(piece);
    }
    Ok(all)
}
