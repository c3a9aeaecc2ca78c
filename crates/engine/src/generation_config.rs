//! Defaults a model's authors ship in `generation_config.json`.

use crate::{EngineError, SamplingOptions};
use serde_json::Value;

/// What `generation_config.json` says; `None` where it is silent (absent or null).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// `do_sample`: false asks for greedy decoding.
    pub do_sample: Option<bool>,
    /// `temperature`.
    pub temperature: Option<f32>,
    /// `top_k`; 0 keeps all.
    pub top_k: Option<usize>,
    /// `top_p`.
    pub top_p: Option<f32>,
    /// `min_p`.
    pub min_p: Option<f32>,
    /// `repetition_penalty`.
    pub repetition_penalty: Option<f32>,
    /// `eos_token_id`, one or a list; empty when the file is silent.
    pub eos_token_ids: Vec<u32>,
    /// `max_new_tokens`.
    pub max_new_tokens: Option<usize>,
    /// Keys that might matter and are not honoured, in file order, for the user to see.
    pub ignored: Vec<String>,
}

/// Keys that cannot change which tokens we generate.
const WITHOUT_EFFECT: [&str; 9] = [
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
    "use_cache",
    "cache_implementation",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
];

impl GenerationConfig {
    /// Reads a parsed file.
    ///
    /// # Errors
    /// Names the first field of a wrong type. Ranges are checked by
    /// [`SamplingParams::new`](crate::SamplingParams::new).
    pub fn from_json(json: &Value) -> Result<Self, EngineError> {
        let object =
            json.as_object().ok_or_else(|| wrong("(the whole file)", "an object", json))?;
        let mut config = Self::default();
        for (key, value) in object {
            if value.is_null() {
                continue;
            }
            match key.as_str() {
                "do_sample" => {
                    let flag = value.as_bool().ok_or_else(|| wrong(key, "true or false", value))?;
                    config.do_sample = Some(flag);
                }
                "temperature" => config.temperature = Some(number(key, value)?),
                "top_p" => config.top_p = Some(number(key, value)?),
                "min_p" => config.min_p = Some(number(key, value)?),
                "repetition_penalty" => config.repetition_penalty = Some(number(key, value)?),
                "top_k" => config.top_k = Some(count(key, value)?),
                "max_new_tokens" => config.max_new_tokens = Some(count(key, value)?),
                "eos_token_id" => config.eos_token_ids = token_ids(key, value)?,
                other if other.starts_with('_') || WITHOUT_EFFECT.contains(&other) => {}
                other => config.ignored.push(other.to_owned()),
            }
        }
        Ok(config)
    }

    /// `base` with what the file says in place of its own. Where `do_sample` is absent the other
    /// fields count; only an explicit false means greedy.
    pub fn apply(&self, base: SamplingOptions) -> SamplingOptions {
        let greedy = self.do_sample == Some(false);
        SamplingOptions {
            temperature: if greedy { 0.0 } else { self.temperature.unwrap_or(base.temperature) },
            top_k: self.top_k.map_or(base.top_k, |k| (k > 0).then_some(k)),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            ..base
        }
    }
}

fn wrong(field: &str, expected: &'static str, found: &Value) -> EngineError {
    let mut found = found.to_string();
    if found.len() > 60 {
        let end = found.floor_char_boundary(60);
        found.truncate(end);
        found.push('…');
    }
    EngineError::GenerationConfig { field: field.to_owned(), expected, found }
}

fn number(key: &str, value: &Value) -> Result<f32, EngineError> {
    Ok(value.as_f64().ok_or_else(|| wrong(key, "a number", value))? as f32)
}

fn count(key: &str, value: &Value) -> Result<usize, EngineError> {
    let expected = "an integer of at least 0";
    let n = value.as_u64().ok_or_else(|| wrong(key, expected, value))?;
    usize::try_from(n).map_err(|_| wrong(key, expected, value))
}

fn token_ids(key: &str, value: &Value) -> Result<Vec<u32>, EngineError> {
    let one = |v: &Value| {
        let id = v.as_u64().and_then(|n| u32::try_from(n).ok());
        id.ok_or_else(|| wrong(key, "a token id or a list of token ids", value))
    };
    match value.as_array() {
        Some(list) => list.iter().map(one).collect(),
        None => Ok(vec![one(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_are_read_and_the_rest_is_listed() {
        let config = GenerationConfig::from_json(&json!({
            "_from_model_config": true,
            "bos_token_id": 1,
            "do_sample": true,
            "eos_token_id": [151645, 151643],
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
            "min_p": null,
            "no_repeat_ngram_size": 3,
            "repetition_penalty": 1,
            "max_new_tokens": 2048,
            "transformers_version": "4.51.0",
        }))
        .unwrap();
        let expected = GenerationConfig {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            min_p: None,
            repetition_penalty: Some(1.0),
            eos_token_ids: vec![151645, 151643],
            max_new_tokens: Some(2048),
            ignored: vec!["no_repeat_ngram_size".to_owned()],
        };
        assert_eq!(config, expected);
        let options = config.apply(SamplingOptions { min_p: 0.1, seed: 5, ..Default::default() });
        assert_eq!((options.temperature, options.top_k), (0.6, Some(20)));
        assert_eq!((options.min_p, options.seed), (0.1, 5));
    }

    #[test]
    fn only_an_explicit_false_is_greedy() {
        for (json, temperature) in [
            (json!({"do_sample": false, "temperature": 0.6}), 0.0),
            (json!({"temperature": 0.6}), 0.6),
            (json!({"eos_token_id": 2}), 1.0),
            (json!({"do_sample": true}), 1.0),
        ] {
            let config = GenerationConfig::from_json(&json).unwrap();
            assert_eq!(config.apply(SamplingOptions::default()).temperature, temperature);
        }
        let off = GenerationConfig::from_json(&json!({"top_k": 0})).unwrap();
        let base = SamplingOptions { top_k: Some(40), ..Default::default() };
        assert_eq!(off.apply(base).top_k, None);
    }

    #[test]
    fn wrong_types_name_the_field() {
        for (json, field) in [
            (json!([]), "(the whole file)"),
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"top_k": 0.5}), "top_k"),
            (json!({"top_k": -1}), "top_k"),
            (json!({"do_sample": 1}), "do_sample"),
            (json!({"eos_token_id": [1, "</s>"]}), "eos_token_id"),
            (json!({"eos_token_id": -1}), "eos_token_id"),
            (json!({"eos_token_id": 4_294_967_296_u64}), "eos_token_id"),
            (json!({"max_new_tokens": "x".repeat(100_000)}), "max_new_tokens"),
        ] {
            let message = GenerationConfig::from_json(&json).unwrap_err().to_string();
            assert!(message.contains(field) && message.len() < 200, "{message}");
        }
    }
}
