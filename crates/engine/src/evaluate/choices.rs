//! Multiple choice by log-likelihood, as EleutherAI's lm-evaluation-harness scores it: the answer
//! is the choice whose tokens are likeliest after the context (`accuracy`), or likeliest per
//! character (`accuracy_normalized`); the first among equals.
//!
//! A row's context is read once. Its choices then run side by side in one batch, each with a block
//! table that shares the context's blocks and copies only the block it writes into.

use super::{BLOCK_SIZE, CHUNK, check_context, check_row, check_tokens, rows_per_pass};
use crate::sampler::log_sum_exp;
use crate::{BlockManager, BlockTable, EngineError, LanguageModel};
use marlin_tensor::{Batch, Cache, CacheType};

/// One possible answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Its tokens, as they follow the context.
    pub tokens: Vec<u32>,
    /// Characters of its text, for the normalised score.
    pub characters: usize,
}

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChoiceRow {
    /// Tokens before the answer.
    pub context: Vec<u32>,
    /// Possible answers.
    pub choices: Vec<Choice>,
    /// Index of the right one.
    pub gold: usize,
}

/// The result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ChoicesReport {
    /// Questions asked.
    pub rows: usize,
    /// Share answered right by log-likelihood.
    pub accuracy: f64,
    /// Share answered right by log-likelihood per character.
    pub accuracy_normalized: f64,
}

/// Asks `rows` in order; `progress` gets the report so far after each.
///
/// # Errors
/// When a row has no context, no or empty choices or a wrong `gold`, a token is unknown, a row does
/// not fit the context, or the model fails or gives NaN.
pub fn choices(
    model: &dyn LanguageModel,
    rows: &[ChoiceRow],
    progress: &mut dyn FnMut(&ChoicesReport),
) -> Result<ChoicesReport, EngineError> {
    if rows.is_empty() {
        return Err(EngineError::TooFewTokens { what: "multiple choice", needed: 1, found: 0 });
    }
    for (index, row) in rows.iter().enumerate() {
        check(row, index, model)?;
    }
    let num_blocks = rows.iter().map(blocks_needed).max().expect("there is a row");
    let cache = model.create_cache(num_blocks, BLOCK_SIZE, CacheType::F32)?;
    let mut blocks = BlockManager::new(num_blocks, BLOCK_SIZE);
    let (mut right, mut right_normalized) = (0, 0);
    let mut report = ChoicesReport { rows: 0, accuracy: 0.0, accuracy_normalized: 0.0 };
    for row in rows {
        let scores = score(model, &cache, &mut blocks, row)?;
        let per_character = scores.iter().zip(&row.choices).map(|(s, c)| s / c.characters as f64);
        right += usize::from(first_best(scores.iter().copied()) == row.gold);
        right_normalized += usize::from(first_best(per_character) == row.gold);
        report.rows += 1;
        report.accuracy = right as f64 / report.rows as f64;
        report.accuracy_normalized = right_normalized as f64 / report.rows as f64;
        progress(&report);
    }
    Ok(report)
}

fn first_best(scores: impl Iterator<Item = f64>) -> usize {
    let best = scores.enumerate().reduce(|best, s| if s.1 > best.1 { s } else { best });
    best.expect("rows have choices").0
}

fn check(row: &ChoiceRow, index: usize, model: &dyn LanguageModel) -> Result<(), EngineError> {
    let bad = |field, expected, found: String| {
        let found = format!("{found} in row {index}");
        Err(EngineError::Parameter { field, expected, found })
    };
    if row.context.is_empty() {
        return bad("query", "at least one token", "none".to_owned());
    }
    if row.gold >= row.choices.len() {
        return bad("gold", "the index of a choice", row.gold.to_string());
    }
    if row.choices.iter().any(|c| c.tokens.is_empty() || c.characters == 0) {
        return bad("choices", "a text in every choice", "an empty one".to_owned());
    }
    check_tokens("query", &row.context, model)?;
    for choice in &row.choices {
        check_tokens("choices", &choice.tokens, model)?;
        check_context(row.context.len() + choice.tokens.len(), model)?;
    }
    Ok(())
}

/// Blocks of the shared context and, for each choice, of what it writes itself.
fn blocks_needed(row: &ChoiceRow) -> usize {
    let shared = row.context.len() - 1;
    let own = |c: &Choice| (shared % BLOCK_SIZE + c.tokens.len()).div_ceil(BLOCK_SIZE);
    shared.div_ceil(BLOCK_SIZE) + row.choices.iter().map(own).sum::<usize>()
}

/// Log-likelihood of each choice.
fn score(
    model: &dyn LanguageModel,
    cache: &Cache,
    blocks: &mut BlockManager,
    row: &ChoiceRow,
) -> Result<Vec<f64>, EngineError> {
    let shared = row.context.len() - 1;
    let mut context = BlockTable::new();
    blocks.reserve(&mut context, 0, shared, &mut Vec::new()).expect(FITS);
    for (i, chunk) in row.context[..shared].chunks(CHUNK).enumerate() {
        let mut batch = Batch::new(BLOCK_SIZE);
        batch.push(chunk, i * CHUNK, context.blocks(), max_context(row), 0);
        model.forward(&batch, cache)?;
    }
    let mut scores = Vec::with_capacity(row.choices.len());
    let mut rest = &row.choices[..];
    while !rest.is_empty() {
        // As many choices at once as have rows of logits to hold, at least one.
        let mut total = 0;
        let fits = rest.iter().take_while(|c| {
            total += c.tokens.len();
            total <= rows_per_pass(model.vocab_size()).1
        });
        let (group, later) = rest.split_at(fits.count().max(1));
        let mut tables = Vec::new();
        let mut copies = Vec::new();
        let mut batch = Batch::new(BLOCK_SIZE);
        for choice in group {
            // The last token of the context predicts the first of the choice, whose own last
            // token predicts nothing.
            let mut tokens = vec![row.context[shared]];
            tokens.extend(&choice.tokens[..choice.tokens.len() - 1]);
            let mut table = blocks.share(&context, shared);
            blocks.reserve(&mut table, shared, shared + tokens.len(), &mut copies).expect(FITS);
            batch.push(&tokens, shared, table.blocks(), max_context(row), tokens.len());
            tables.push(table);
        }
        if !copies.is_empty() {
            model.copy_blocks(cache, &copies)?;
        }
        let logits = model.download(&model.forward(&batch, cache)?)?;
        let mut logits = logits.chunks_exact(model.vocab_size());
        for choice in group {
            let mut sum = 0.0;
            for (position, &token) in (row.context.len()..).zip(&choice.tokens) {
                let row = logits.next().expect("forward gives a row per output");
                check_row(row, position)?;
                sum += f64::from(row[token as usize]) - log_sum_exp(row);
            }
            scores.push(sum);
        }
        tables.into_iter().for_each(|table| blocks.release(table));
        rest = later;
    }
    blocks.release(context);
    Ok(scores)
}

const FITS: &str = "the pool holds every row";

/// Tokens of the longest answer with its context.
fn max_context(row: &ChoiceRow) -> u32 {
    let longest = row.choices.iter().map(|c| c.tokens.len()).max().unwrap_or(0);
    (row.context.len() + longest) as u32
}
