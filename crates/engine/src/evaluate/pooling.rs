//! How states become a vector, as models that are made for vectors say it: `1_Pooling/config.json` of sentence-transformers, or
//! `ARCHITECTURE.pooling_type` of GGUF files (llama.cpp's numbers).

use super::Pooling;
use crate::EngineError;
use marlin_checkpoint::{Checkpoint, Container};
use serde_json::Value;

/// What a model says of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeclaredPooling {
    /// Nothing: it was made to write.
    #[default]
    Unsaid,
    /// What it was trained with. Any other way gives vectors that mean nothing.
    Known(Pooling),
    /// What is not done here, by its name.
    Other(String),
}

impl DeclaredPooling {
    /// What `checkpoint` says.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let config = match &checkpoint.container {
            Container::Gguf { metadata } => {
                let architecture = metadata.get("general.architecture").and_then(Value::as_str);
                let key = format!("{}.pooling_type", architecture.unwrap_or_default());
                return metadata.get(&key).map_or(Self::Unsaid, Self::of_gguf);
            }
            Container::HuggingFace { .. } => checkpoint.sidecar("1_Pooling/config.json"),
        };
        match config.map(|bytes| serde_json::from_slice::<Value>(bytes)) {
            None => Self::Unsaid,
            Some(Ok(config)) => Self::of_config(&config),
            Some(Err(error)) => Self::Other(format!("1_Pooling/config.json: {error}")),
        }
    }

    fn of_gguf(kind: &Value) -> Self {
        match kind.as_u64() {
            Some(0) => Self::Unsaid,
            Some(1) => Self::Known(Pooling::Mean),
            Some(2) => Self::Other("cls".to_owned()),
            Some(3) => Self::Known(Pooling::Last),
            Some(4) => Self::Other("rank".to_owned()),
            _ => Self::Other(format!("pooling_type {kind}")),
        }
    }

    fn of_config(config: &Value) -> Self {
        // Newer files have a name, older ones a flag for each way; several together are put side by side.
        let named = config["pooling_mode"].as_str().map(str::to_owned);
        let flags = config.as_object().into_iter().flatten().filter_map(|(key, value)| {
            let way = key.strip_prefix("pooling_mode_")?;
            (value == &Value::Bool(true)).then(|| way.trim_end_matches("_tokens").to_owned())
        });
        let ways: Vec<String> = named.into_iter().chain(flags).collect();
        match &ways[..] {
            [] => Self::Unsaid,
            [way] => match way.trim_end_matches("_token") {
                // Divided by another number, and scaled to length 1 all the same.
                "mean" | "mean_sqrt_len" => Self::Known(Pooling::Mean),
                "lasttoken" | "last" => Self::Known(Pooling::Last),
                other => Self::Other(other.to_owned()),
            },
            several => Self::Other(several.join(" and ")),
        }
    }

    /// The way to pool when `asked` is what a request says.
    ///
    /// # Errors
    /// When the vectors would mean nothing.
    pub fn choose(&self, asked: Option<Pooling>) -> Result<Pooling, EngineError> {
        match (self, asked) {
            (Self::Unsaid, asked) => Ok(asked.unwrap_or_default()),
            (Self::Known(own), None) => Ok(*own),
            (Self::Known(own), Some(asked)) if *own == asked => Ok(*own),
            (Self::Known(own), Some(_)) => Err(EngineError::Pooling {
                reason: format!(
                    "this model was trained with {own}, another gives vectors that mean nothing"
                ),
            }),
            (Self::Other(other), _) => Err(EngineError::Pooling {
                reason: format!("this model was trained with {other}, which is not supported"),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::DeclaredPooling as D;
    use super::Pooling::{Last, Mean};
    use marlin_checkpoint::{Checkpoint, Container};
    use serde_json::{Value, json};
    use std::collections::BTreeMap;

    fn gguf(kind: Option<Value>) -> D {
        let mut metadata = serde_json::Map::new();
        metadata.insert("general.architecture".into(), "qwen3".into());
        metadata.extend(kind.map(|kind| ("qwen3.pooling_type".to_owned(), kind)));
        let container = Container::Gguf { metadata };
        D::of(&Checkpoint::from_parts("m.gguf".into(), container, [], BTreeMap::new()))
    }

    fn directory(config: Option<&str>) -> D {
        let container = Container::HuggingFace { config: json!({}), generation_config: None };
        let text =
            |text: &str| ("1_Pooling/config.json".to_owned(), text.as_bytes().to_vec().into());
        let sidecars = config.map(text).into_iter().collect();
        D::of(&Checkpoint::from_parts("m".into(), container, [], sidecars))
    }

    #[test]
    fn models_say_how_states_become_a_vector() {
        let other = |text: &str| D::Other(text.to_owned());
        for (kind, expected) in [
            (None, D::Unsaid),
            (Some(json!(0)), D::Unsaid),
            (Some(json!(1)), D::Known(Mean)),
            (Some(json!(2)), other("cls")),
            (Some(json!(3)), D::Known(Last)),
            (Some(json!(4)), other("rank")),
            (Some(json!("x")), other("pooling_type \"x\"")),
        ] {
            assert_eq!(gguf(kind.clone()), expected, "{kind:?}");
        }
        for (config, expected) in [
            (None, D::Unsaid),
            (Some("{}"), D::Unsaid),
            (
                Some(r#"{"pooling_mode_cls_token": false, "pooling_mode_lasttoken": true}"#),
                D::Known(Last),
            ),
            (
                Some(r#"{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": false}"#),
                D::Known(Mean),
            ),
            (Some(r#"{"pooling_mode_mean_sqrt_len_tokens": true}"#), D::Known(Mean)),
            (Some(r#"{"pooling_mode_cls_token": true}"#), other("cls")),
            (
                Some(r#"{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}"#),
                other("mean and max"),
            ),
            (Some(r#"{"pooling_mode": "lasttoken"}"#), D::Known(Last)),
        ] {
            assert_eq!(directory(config), expected, "{config:?}");
        }
        assert!(matches!(directory(Some("{")), D::Other(_)));
    }

    #[test]
    fn vectors_that_would_mean_nothing_are_refused() {
        for (declared, asked, expected) in [
            (D::Unsaid, None, Some(Mean)),
            (D::Unsaid, Some(Last), Some(Last)),
            (D::Known(Last), None, Some(Last)),
            (D::Known(Last), Some(Last), Some(Last)),
            (D::Known(Last), Some(Mean), None),
            (D::Known(Mean), Some(Last), None),
            (D::Other("cls".into()), None, None),
            (D::Other("cls".into()), Some(Mean), None),
        ] {
            let chosen = declared.choose(asked);
            assert_eq!(chosen.as_ref().ok(), expected.as_ref(), "{declared:?} {asked:?}");
        }
    }
}
