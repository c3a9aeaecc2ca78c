//! `marlin tokenize`: text to ids.

use crate::args::Tokenize;
use crate::{console, exit, locate};
use anyhow::{Context, Result};
use marlin_text::{ChatTemplate, Specials, TemplateInputs, Tokenizer};
use serde_json::{Value, json};
use std::io::Read;
use std::process::ExitCode;

/// Prints the ids.
pub fn run(args: &Tokenize) -> Result<ExitCode> {
    let checkpoint = locate::open(args.model.model.as_deref())?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    let specials = if args.special { Specials::PROMPT } else { Specials::NONE };
    let (text, specials) = match (&args.template, &args.file, &args.text) {
        (Some(file), _, _) => {
            let template = ChatTemplate::open(&checkpoint, &tokenizer)?
                .ok_or_else(|| exit::usage("this model has no chat template"))?;
            let name = file.display().to_string();
            let messages = std::fs::read_to_string(file).with_context(|| name.clone())?;
            let messages: Vec<Value> = serde_json::from_str(&messages)
                .with_context(|| format!("{name}: expected a JSON list of messages"))?;
            (template.render(&TemplateInputs::new(&messages))?, Specials::TEMPLATE)
        }
        (_, Some(file), _) if file.as_os_str() == "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("cannot read stdin as UTF-8")?;
            (text, specials)
        }
        (_, Some(file), _) => {
            let text = std::fs::read_to_string(file);
            (text.with_context(|| file.display().to_string())?, specials)
        }
        (_, _, text) => (text.clone().unwrap_or_default(), specials),
    };
    let ids = tokenizer.encode(&text, specials)?;
    if args.json {
        let pieces = ids.iter().map(|&id| Ok(String::from_utf8_lossy(tokenizer.token_bytes(id)?)));
        let pieces = pieces.collect::<Result<Vec<_>>>()?;
        console::json(&json!({"ids": ids, "pieces": pieces, "count": ids.len(), "text": text}))?;
    } else {
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        console::line(&ids.join(" "))?;
    }
    Ok(ExitCode::SUCCESS)
}
