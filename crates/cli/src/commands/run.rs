//! `marlin run`: one prompt, one answer.

use crate::args::Run;
use crate::generate::Ending;
use crate::loaded::Session;
use crate::{console, exit, locate};
use anyhow::{Context, Result};
use serde_json::json;
use std::io::Read;
use std::process::ExitCode;

/// Answers the prompt.
pub fn run(args: &Run) -> Result<ExitCode> {
    let text = prompt_text(args)?;
    let mut session = Session::open(args.model.model.as_deref(), &args.context, &args.device)?;
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    messages.push(json!({"role": "user", "content": text}));
    let chat = if args.raw { None } else { session.chat_prompt(&messages)? };
    let prompt = match chat {
        Some(prompt) => prompt,
        None if args.system.is_some() => {
            return Err(exit::usage(
                "this model has no chat template, so --system has no place; put it into the prompt",
            ));
        }
        None => {
            if !args.raw {
                console::note("no chat template: the prompt is continued as it is");
            }
            session.raw_prompt(&text)?
        }
    };
    let sampling = session.sampling(&args.sampling)?;
    let seed = sampling.options().seed;
    let answer = session.answer(
        &prompt,
        sampling,
        session.max_tokens(&args.sampling),
        &args.sampling.stop,
        &mut |piece| if args.json { Ok(()) } else { Ok(console::print(piece)?) },
    )?;
    if args.json {
        let mut document = answer.json();
        document["model"] = json!(locate::name(args.model.model.as_deref()));
        document["device"] = json!(session.device);
        document["activations"] = json!(session.activations);
        document["seed"] = json!(seed);
        console::json(&document)?;
    } else {
        console::line("")?;
    }
    if args.stats {
        console::note(&answer.stats(&session.device));
    }
    Ok(match answer.ending {
        Ending::Interrupted => ExitCode::from(exit::INTERRUPTED),
        Ending::Stop | Ending::Length => ExitCode::SUCCESS,
    })
}

fn prompt_text(args: &Run) -> Result<String> {
    match args.prompt.as_deref() {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read stdin as UTF-8")?;
            Ok(text)
        }
        Some(text) => Ok(text.to_owned()),
        None => Err(exit::usage("no prompt; write it in quotes, or `-` to read stdin")),
    }
}
