//! Answers many prompts in one batch, for the scripts that make data.
//!
//! ```text
//! cargo run --release -p marlin-engine --example generate -- MODEL [THREADS [BATCH]] < requests.jsonl > answers.jsonl
//! ```
//!
//! A request is `{"id", "prompt", "seed", "max_tokens"}` and optionally `"system", "temperature",
//! "min_p", "repetition_penalty"`; an answer is `{"id", "text", "tokens", "finish_reason"}`, written as soon as it ends,
//! so that an interrupted run can be continued. Company in the batch does not change an answer: it
//! is what `marlin run` gives for the same values.

use marlin_checkpoint::Checkpoint;
use marlin_cpu::{CpuBackend, CpuOptions};
use marlin_engine::{
    Engine, EngineOptions, Event, FinishReason, Request, SamplingOptions, SamplingParams,
    SequenceId,
};
use marlin_models::Model;
use marlin_text::{ChatTemplate, Specials, TemplateInputs, Tokenizer};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::error::Error;
use std::io::{BufRead, Write};
use std::sync::Arc;

/// Most tokens of a prompt with its answer.
const MAX_CONTEXT: usize = 1024;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let path = args.first().ok_or("usage: generate MODEL [THREADS [BATCH]] < requests.jsonl")?;
    let number = |i: usize, default| args.get(i).map_or(Ok(default), |n| n.parse::<usize>());
    let (threads, max_batch) = (number(1, 1)?, number(2, 16)?);

    let checkpoint = Checkpoint::open(path.as_ref())?;
    let tokenizer = Tokenizer::open(&checkpoint)?;
    let template =
        ChatTemplate::open(&checkpoint, &tokenizer)?.ok_or("the model has no chat template")?;
    let spec = marlin_models::spec(&checkpoint)?;
    let backend = Arc::new(CpuBackend::new(CpuOptions { threads, ..CpuOptions::default() })?);
    let model = Model::load(&checkpoint, spec, backend, &mut |_| {})?;
    let mut end_ids = tokenizer.end_ids().to_vec();
    end_ids.extend(&model.spec().eos_token_ids);
    let options = EngineOptions { max_context: Some(MAX_CONTEXT), ..EngineOptions::default() };
    let num_blocks = Some(max_batch * MAX_CONTEXT / options.block_size);
    let options = EngineOptions { max_batch, num_blocks, ..options };
    let mut engine = Engine::new(Arc::new(model), &options)?;

    let mut running: HashMap<SequenceId, (Value, Vec<u32>)> = HashMap::new();
    for (index, line) in std::io::stdin().lock().lines().enumerate() {
        let request: Value = serde_json::from_str(&line?)?;
        let prompt = prompt(&request, &template, &tokenizer)
            .map_err(|e| format!("line {}: {e}", index + 1))?;
        let sampling = SamplingParams::new(SamplingOptions {
            temperature: request["temperature"].as_f64().unwrap_or(1.0) as f32,
            min_p: request["min_p"].as_f64().unwrap_or(0.0) as f32,
            repetition_penalty: request["repetition_penalty"].as_f64().unwrap_or(1.0) as f32,
            seed: request["seed"].as_u64().ok_or("seed is missing")?,
            ..SamplingOptions::default()
        })?;
        let mut valid = Request::new(prompt, sampling, end_ids.clone());
        valid.max_tokens = request["max_tokens"].as_u64().map(|n| n as usize);
        let id = engine.submit(engine.limits().validate(valid)?);
        running.insert(id, (request["id"].clone(), Vec::new()));
    }
    let mut out = std::io::stdout().lock();
    while !engine.is_idle() {
        for event in engine.step() {
            match event {
                Event::Token { id, token, .. } => {
                    running.get_mut(&id).ok_or("an unknown sequence")?.1.push(token);
                }
                Event::Finished { id, reason, .. } => {
                    let (name, tokens) = running.remove(&id).ok_or("an unknown sequence")?;
                    let finish_reason = match reason {
                        FinishReason::Stop(_) | FinishReason::Complete => "stop",
                        FinishReason::Length => "length",
                        FinishReason::Cancelled => "cancelled",
                        FinishReason::Error(error) => return Err(error.to_string().into()),
                    };
                    let text = tokenizer.decode(&tokens)?;
                    let answer = json!({ "id": name, "text": text, "tokens": tokens.len(), "finish_reason": finish_reason });
                    writeln!(out, "{answer}")?;
                    out.flush()?;
                }
            }
        }
    }
    Ok(())
}

/// Token ids of the request's conversation.
fn prompt(
    request: &Value,
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, Box<dyn Error>> {
    let user = request["prompt"].as_str().ok_or("prompt is missing")?;
    let mut messages = Vec::new();
    if let Some(system) = request["system"].as_str() {
        messages.push(json!({ "role": "system", "content": system }));
    }
    messages.push(json!({ "role": "user", "content": user }));
    let text = template.render(&TemplateInputs::new(&messages))?;
    Ok(tokenizer.encode(&text, Specials::TEMPLATE)?)
}
