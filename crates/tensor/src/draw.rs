//! What is asked of a device that draws tokens itself, and what it answers.

/// A change of one token's logit before a draw.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adjustment {
    /// The token.
    pub token: u32,
    /// Divides a positive logit and multiplies any other; above 0, 1 changes nothing.
    pub penalty: f32,
    /// Added after that; negative infinity bans the token.
    pub add: f32,
}

/// One draw of a token from a row of logits.
///
/// Tokens have an order: the larger adjusted logit first, of equals the lower token. What may be drawn is a range of it: `top_k`, `top_p` and `min_p`
/// cut its end, each what the one before has left, and `exclude` its beginning. Walked by token, the probabilities of that range are summed until the sum is above the
/// share `uniform` of all of them; the token at which it is, is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// Row of the logits.
    pub row: usize,
    /// What is changed first, by ascending token, each at most once.
    pub adjustments: Vec<Adjustment>,
    /// Divides logits; 0 takes the first token of the order, whatever else is asked.
    pub temperature: f32,
    /// Most tokens that are kept; at least 1.
    pub top_k: Option<usize>,
    /// The fewest are kept whose probabilities reach this share; 1 keeps all.
    pub top_p: f32,
    /// Those are kept that have this fraction of the best token's probability; 0 keeps all.
    pub min_p: f32,
    /// Of tokens with at least this share of what is kept, only the last one stays (XTC).
    pub exclude: Option<f32>,
    /// Where in `[0, 1)` the draw falls.
    pub uniform: f64,
    /// How many of the largest logits are wanted beside the drawn token's; `None` wants neither.
    pub logprobs: Option<usize>,
}

impl Draw {
    /// The token with the largest logit.
    pub fn greedy(row: usize) -> Self {
        Self {
            row,
            adjustments: Vec::new(),
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            exclude: None,
            uniform: 0.0,
            logprobs: None,
        }
    }
}

/// A token that a device has drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token: u32,
    /// Present when [`Draw::logprobs`] asks for it.
    pub logits: Option<DrawnLogits>,
}

/// Logits of the row itself, before adjustments and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct DrawnLogits {
    /// That of the drawn token.
    pub own: f32,
    /// `ln Σ exp(logit)` over the row.
    pub norm: f64,
    /// The largest ones and their tokens, in order: as many as were asked for, or all.
    pub largest: Vec<(u32, f32)>,
}
