//! Text to rows of tokens that a model is calibrated on.

use crate::error::ConvertError;
use crate::exl3::basis::Random;

/// Rows of token ids; each is read from an empty cache.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Rows, none empty.
    pub rows: Vec<Vec<u32>>,
}

impl Calibration {
    /// Cuts `all`, the ids of a text, into rows of `columns` until there are `tokens`. A share of the rows,
    /// drawn from `seed`, is random ids, which reach the parts of the vocabulary that the text does not.
    ///
    /// # Errors
    /// When there is not even one row of text, or a token is outside the vocabulary.
    pub fn new(
        all: &[u32],
        tokens: usize,
        columns: usize,
        vocab_size: usize,
        random_share: f64,
        seed: u64,
    ) -> Result<Self, ConvertError> {
        for (field, value) in [("--calibration-columns", columns), ("--calibration-tokens", tokens)]
        {
            if value == 0 {
                let reason = "0 is too few; at least 1".to_owned();
                return Err(ConvertError::Option { field: field.to_owned(), reason });
            }
        }
        let mut rows = Vec::new();
        let wanted = (tokens / columns).max(1);
        let text_rows = ((wanted as f64 * (1.0 - random_share)).round() as usize).max(1);
        if let Some(id) = all.iter().find(|t| **t as usize >= vocab_size) {
            return Err(ConvertError::Option {
                field: "--calibration".to_owned(),
                reason: format!("token {id} is outside the vocabulary of {vocab_size}"),
            });
        }
        if all.len() < columns.min(256) {
            let found = all.len();
            return Err(ConvertError::Option {
                field: "--calibration".to_owned(),
                reason: format!("{found} tokens of text; at least {} are needed", columns.min(256)),
            });
        }
        let columns = columns.min(all.len());
        // Rows spread over the whole text when it is longer than what is asked for.
        let available = all.len() / columns;
        let used = text_rows.min(available);
        for row in 0..used {
            let start = row * available / used * columns;
            rows.push(all[start..start + columns].to_vec());
        }
        let share = random_share / (1.0 - random_share);
        let random_rows = ((used as f64 * share).round() as usize).min(wanted - used.min(wanted));
        let mut random = Random(seed ^ 0x5EED);
        for _ in 0..random_rows {
            let mut id = || (random.draw() % vocab_size as u64) as u32;
            rows.push((0..columns).map(|_| id()).collect());
        }
        Ok(Self { rows })
    }

    /// Tokens in all rows.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(Vec::len).sum()
    }

    /// Longest row.
    pub fn columns(&self) -> usize {
        self.rows.iter().map(Vec::len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_no_tokens_are_refused() {
        let text: Vec<u32> = (0..1000).map(|i| i % 50).collect();
        for (tokens, columns, field) in
            [(512, 0, "--calibration-columns"), (0, 64, "--calibration-tokens")]
        {
            let error = Calibration::new(&text, tokens, columns, 50, 0.06, 0).unwrap_err();
            assert!(error.to_string().starts_with(field), "{error}");
        }
        let made = Calibration::new(&text, 512, 64, 50, 0.06, 0).unwrap();
        assert_eq!((made.rows.len(), made.tokens()), (8, 512));
    }
}
