//! Calibration text, and the part of it that is held out for measuring.

use crate::args::quantize::Quantize;
use anyhow::{Context, Result};
use marlin_convert::Calibration;
use marlin_models::ModelSpec;
use marlin_text::{Specials, Tokenizer};

/// The built-in mix; `data/calibration/README.md` says what it is.
const BUILT_IN: &str = include_str!("../../../../../data/calibration/calibration.txt");
/// Between documents.
const SEPARATOR: &str = "\n\u{241E}\n";
/// Share of calibration rows that are random tokens.
const RANDOM_SHARE: f64 = 0.06;
/// Tokens of a window that is measured, at most.
const WINDOW: usize = 512;
/// Windows that are held out.
const HELD_OUT: usize = 16;

/// Tokens by use.
pub struct Text {
    /// What the Hessians are made from.
    pub calibration: Calibration,
    /// What nothing is fitted to, whole windows.
    pub held_out: Vec<u32>,
    /// Tokens of a window: no more than the model reads.
    pub window: usize,
}

/// Reads and divides the text.
///
/// # Errors
/// When a file cannot be read, or there is too little text.
pub fn read(args: &Quantize, tokenizer: &Tokenizer, spec: &ModelSpec) -> Result<Text> {
    let window = WINDOW.min(spec.max_position_embeddings);
    let mut tokens: Vec<u32> = Vec::new();
    let mut add = |text: &str| -> Result<()> {
        for document in text.split(SEPARATOR) {
            tokens.extend(tokenizer.encode(document, Specials::NONE)?);
        }
        Ok(())
    };
    for path in &args.calibration {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        add(&text)?;
    }
    if args.calibration.is_empty() {
        add(BUILT_IN)?;
    }
    // At most a tenth: a short text is worth more as calibration.
    let windows = HELD_OUT.min(tokens.len() / 10 / window);
    let held_out = match &args.evaluate {
        Some(path) => {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            let mut tokens = tokenizer.encode(&text, Specials::NONE)?;
            tokens.truncate(tokens.len().min(HELD_OUT * window) / window * window);
            tokens
        }
        None => tokens.split_off(tokens.len() - windows * window),
    };
    let calibration = Calibration::new(
        &tokens,
        args.calibration_tokens,
        args.calibration_columns,
        spec.vocab_size,
        RANDOM_SHARE,
        args.seed,
    )?;
    Ok(Text { calibration, held_out, window })
}
