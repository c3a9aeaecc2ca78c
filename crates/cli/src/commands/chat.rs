//! `marlin chat`: a conversation in the terminal.

use crate::args::Chat;
use crate::generate::{Answer, Ending};
use crate::loaded::Session;
use crate::{console, exit, locate};
use anyhow::{Context, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use serde_json::{Value, json};
use std::process::ExitCode;

const HELP: &str = "/system TEXT  set the system message and start over
/save FILE    write the conversation as JSON
/load FILE    go on with a saved conversation
/stats        speed of the last answer
/clear        start over
/bye          leave (also Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ continues on the next.";

struct Conversation {
    messages: Vec<Value>,
    last: Option<Answer>,
}

/// Talks until the user leaves.
pub fn run(args: &Chat) -> Result<ExitCode> {
    let model = args.model.model.as_deref();
    let mut session = Session::open(model, &args.context, &args.device)?;
    if session.template.is_none() {
        return Err(exit::usage("this model has no chat template; use `marlin run --raw`"));
    }
    let mut editor = DefaultEditor::new().context("cannot open the terminal")?;
    let mut chat = Conversation { messages: system(args.system.as_deref()), last: None };
    console::note(&format!("{} on {} · /help lists commands", locate::name(model), session.device));
    loop {
        let line = match read(&mut editor) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error).context("cannot read the terminal"),
        };
        let text = line.trim();
        if text.is_empty() {
            continue;
        }
        // History is a convenience; failing to keep a line must not end the conversation.
        let _ = editor.add_history_entry(text);
        if let Some(command) = text.strip_prefix('/') {
            match chat.command(command, &session) {
                Ok(true) => break,
                Ok(false) => {}
                Err(error) => console::error(&format!("{error:#}")),
            }
            continue;
        }
        if let Err(error) = chat.say(text, &mut session, args) {
            console::error(&format!("{error:#}"));
            chat.messages.pop();
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn system(text: Option<&str>) -> Vec<Value> {
    text.map(|t| json!({"role": "system", "content": t})).into_iter().collect()
}

fn read(editor: &mut DefaultEditor) -> rustyline::Result<String> {
    let mut text = editor.readline("> ")?;
    while let Some(start) = text.strip_suffix('\\') {
        text = format!("{start}\n{}", editor.readline(". ")?);
    }
    Ok(text)
}

impl Conversation {
    fn say(&mut self, text: &str, session: &mut Session, args: &Chat) -> Result<()> {
        self.messages.push(json!({"role": "user", "content": text}));
        let prompt = session.chat_prompt(&self.messages)?.context("no chat template")?;
        let sampling = session.sampling(&args.sampling)?;
        let (max, stop) = (session.max_tokens(&args.sampling), &args.sampling.stop);
        let answer = session
            .answer(&prompt, sampling, max, stop, &mut |piece| Ok(console::print(piece)?))?;
        console::line("")?;
        match answer.ending {
            Ending::Stop => {}
            Ending::Length => console::note("[the answer reached its limit]"),
            Ending::Interrupted => console::note("[stopped]"),
        }
        if args.stats {
            console::note(&answer.stats(&session.device));
        }
        self.messages.push(json!({"role": "assistant", "content": answer.text}));
        self.last = Some(answer);
        Ok(())
    }

    /// Runs a command; true leaves.
    fn command(&mut self, command: &str, session: &Session) -> Result<bool> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match name {
            "help" | "?" => console::line(HELP)?,
            "system" if rest.is_empty() => match self.messages.first() {
                Some(m) if m["role"] == "system" => {
                    console::line(m["content"].as_str().unwrap_or_default())?;
                }
                _ => console::line("no system message; /system TEXT sets one")?,
            },
            "system" => {
                self.messages = system(Some(rest));
                console::note("new conversation");
            }
            "clear" => {
                self.messages.retain(|m| m["role"] == "system");
                console::note("new conversation");
            }
            "save" if !rest.is_empty() => {
                let text = serde_json::to_string_pretty(&self.messages)?;
                std::fs::write(rest, text).with_context(|| rest.to_owned())?;
                console::note(&format!("{} messages in {rest}", self.messages.len()));
            }
            "load" if !rest.is_empty() => {
                let text = std::fs::read_to_string(rest).with_context(|| rest.to_owned())?;
                let messages: Vec<Value> = serde_json::from_str(&text)
                    .with_context(|| format!("{rest}: expected a JSON list of messages"))?;
                let valid = |m: &Value| m["role"].is_string() && m["content"].is_string();
                anyhow::ensure!(
                    messages.iter().all(valid),
                    "{rest}: every message needs role and content"
                );
                self.messages = messages;
                console::note(&format!("{} messages from {rest}", self.messages.len()));
            }
            "save" | "load" => anyhow::bail!("/{name} needs a file"),
            "stats" => match &self.last {
                Some(answer) => console::line(&answer.stats(&session.device))?,
                None => console::line("no answer yet")?,
            },
            "bye" | "exit" | "quit" => return Ok(true),
            other => anyhow::bail!("unknown command /{other}; /help lists commands"),
        }
        Ok(false)
    }
}
