//! Sampling parameters: as written, and as checked.

use crate::EngineError;
use crate::error::check;

/// Sampling parameters as the user writes them. The default samples from the model's own
/// distribution: temperature 1 and nothing else.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingOptions {
    /// Divides logits; 0 takes the likeliest token. At least 0.
    pub temperature: f32,
    /// Keep this many of the likeliest tokens; `None` keeps all. At least 1.
    pub top_k: Option<usize>,
    /// Keep the fewest likeliest tokens with this share of the probability. 0 to 1; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with this fraction of the best token's probability. 0 to 1; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen. 0.01 to 100; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of tokens in the answer. -2 to 2; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the answer. -2 to 2; 0 is off.
    pub frequency_penalty: f32,
    /// Added to logits of tokens, -100 to 100; a token listed twice gets both.
    pub logit_bias: Vec<(u32, f32)>,
    /// Penalise tokens that would continue a repetition.
    pub dry: Option<Dry>,
    /// Sometimes exclude the likeliest tokens.
    pub xtc: Option<Xtc>,
    /// Key of the random numbers. The same seed gives the same tokens at the same positions.
    pub seed: u64,
    /// Report the chosen token's log-probability and those of this many likeliest tokens.
    pub logprobs: Option<usize>,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            dry: None,
            xtc: None,
            seed: 0,
            logprobs: None,
        }
    }
}

impl SamplingOptions {
    /// The likeliest token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    pub(super) fn counts_tokens(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }
}

/// "Don't repeat yourself" (P. E. Weidmann, text-generation-webui pull request 5677): a token that
/// would extend a match of the last `n` tokens with an earlier passage, `n >= allowed_length`,
/// loses `multiplier * base^(n - allowed_length)` from its logit.
#[derive(Debug, Clone, PartialEq)]
pub struct Dry {
    /// Scale of the penalty, at least 0.
    pub multiplier: f32,
    /// Growth per further matching token, at least 1.
    pub base: f32,
    /// Longest match that goes unpunished is one shorter than this. At least 1.
    pub allowed_length: usize,
    /// Look at this many last tokens; `None` looks at all.
    pub range: Option<usize>,
    /// Tokens no match extends across.
    pub sequence_breakers: Vec<u32>,
}

impl Default for Dry {
    /// The values its author recommends, without breakers.
    fn default() -> Self {
        Self {
            multiplier: 0.8,
            base: 1.75,
            allowed_length: 2,
            range: None,
            sequence_breakers: Vec::new(),
        }
    }
}

/// "Exclude top choices" (P. E. Weidmann, text-generation-webui pull request 6335): with
/// `probability`, all tokens of at least `threshold` probability except the least probable of
/// them are dropped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Xtc {
    /// How often it happens, 0 to 1.
    pub probability: f32,
    /// What counts as a top choice, 0 to 1; above 0.5 it never has an effect.
    pub threshold: f32,
}

/// Checked [`SamplingOptions`].
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams(SamplingOptions);

impl SamplingParams {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the first field that is out of range or not a number.
    pub fn new(options: SamplingOptions) -> Result<Self, EngineError> {
        let o = &options;
        let unit = 0.0..=1.0;
        let t = o.temperature;
        check("temperature", t, t >= 0.0 && t.is_finite(), "a finite number of at least 0")?;
        if let Some(k) = o.top_k {
            check("top_k", k, k > 0, "at least 1, or none to keep all tokens")?;
        }
        check("top_p", o.top_p, unit.contains(&o.top_p), "0 to 1")?;
        check("min_p", o.min_p, unit.contains(&o.min_p), "0 to 1")?;
        let r = o.repetition_penalty;
        check("repetition_penalty", r, (0.01..=100.0).contains(&r), "0.01 to 100")?;
        for (field, p) in
            [("presence_penalty", o.presence_penalty), ("frequency_penalty", o.frequency_penalty)]
        {
            check(field, p, (-2.0..=2.0).contains(&p), "-2 to 2")?;
        }
        for &(_, bias) in &o.logit_bias {
            check("logit_bias", bias, (-100.0..=100.0).contains(&bias), "-100 to 100")?;
        }
        if let Some(dry) = &o.dry {
            let (m, b) = (dry.multiplier, dry.base);
            check("dry_multiplier", m, m >= 0.0 && m.is_finite(), "a finite number of at least 0")?;
            check("dry_base", b, b >= 1.0 && b.is_finite(), "a finite number of at least 1")?;
            let a = dry.allowed_length;
            check("dry_allowed_length", a, a > 0, "at least 1")?;
        }
        if let Some(xtc) = &o.xtc {
            let (p, t) = (xtc.probability, xtc.threshold);
            check("xtc_probability", p, unit.contains(&p), "0 to 1")?;
            check("xtc_threshold", t, unit.contains(&t), "0 to 1")?;
        }
        Ok(Self(options))
    }

    /// The same with another seed.
    pub fn with_seed(&self, seed: u64) -> Self {
        Self(SamplingOptions { seed, ..self.0.clone() })
    }

    /// The values.
    pub fn options(&self) -> &SamplingOptions {
        &self.0
    }
}
