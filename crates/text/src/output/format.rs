//! Which markers a model writes, read off its chat template.

use super::call::Syntax;
use super::syntax::{DeepSeek, Glm, Hermes, Llama, Mistral, QwenCoder, deepseek};
use crate::template::ChatTemplate;

/// How a model writes calls of functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallFormat {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Qwen 2.5 and 3, Hermes.
    Hermes,
    /// `<tool_call>name<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>`: GLM 4.5 to 4.7.
    Glm,
    /// `<function=name><parameter=k>v</parameter></function>`: Qwen3-Coder.
    QwenCoder,
    /// `<｜tool▁calls▁begin｜>…`: DeepSeek V3, V3.1 and R1.
    DeepSeek,
    /// `{"name": …, "parameters": …}` as the whole answer or after `<|python_tag|>`: Llama 3.
    Llama3,
    /// `[TOOL_CALLS]` and a list, or `[TOOL_CALLS]name[ARGS]{…}`: Mistral.
    Mistral,
}

impl CallFormat {
    /// Every format under the name that settings call it by.
    pub const ALL: [(&'static str, Self); 6] = [
        ("hermes", Self::Hermes),
        ("glm", Self::Glm),
        ("qwen-coder", Self::QwenCoder),
        ("deepseek", Self::DeepSeek),
        ("llama3", Self::Llama3),
        ("mistral", Self::Mistral),
    ];

    /// The format called `name` in [`CallFormat::ALL`].
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(other, _)| *other == name).map(|(_, format)| *format)
    }

    /// The format in a template's source. A marker of a format that is not read here decides too,
    /// where the format would be taken for another otherwise.
    fn detect(source: &str) -> Option<Self> {
        let has = |marker: &str| source.contains(marker);
        if has(deepseek::CALLS_BEGIN) {
            Some(Self::DeepSeek)
        } else if has("[TOOL_CALLS]") {
            Some(Self::Mistral)
        } else if has("<arg_key>") {
            Some(Self::Glm)
        } else if has("<function=") && has("<parameter=") {
            Some(Self::QwenCoder)
        } else if has("<tool_call>") {
            Some(Self::Hermes)
        } else if has("<|python_tag|>") || has("<|start_header_id|>") && has("\"parameters\"") {
            Some(Self::Llama3)
        } else {
            None
        }
    }

    /// Markers that begin calls, none of which is part of another.
    pub(crate) fn openings(self) -> &'static [&'static str] {
        match self {
            Self::Hermes | Self::Glm => &["<tool_call>"],
            Self::QwenCoder => &["<tool_call>", "<function="],
            Self::DeepSeek => &[deepseek::CALLS_BEGIN, deepseek::CALL_BEGIN],
            Self::Llama3 => &["<|python_tag|>"],
            Self::Mistral => &["[TOOL_CALLS]"],
        }
    }

    /// What reads on after the opening of index `opening`.
    pub(super) fn syntax(self, opening: usize) -> Box<dyn Syntax> {
        match (self, opening) {
            (Self::Hermes, _) => Box::new(Hermes::default()),
            (Self::Glm, _) => Box::new(Glm::default()),
            (Self::QwenCoder, 0) => Box::new(QwenCoder::default()),
            (Self::QwenCoder, _) => Box::new(QwenCoder::in_function()),
            (Self::DeepSeek, 0) => Box::new(DeepSeek::default()),
            (Self::DeepSeek, _) => Box::new(DeepSeek::in_call()),
            (Self::Llama3, _) => Box::new(Llama::tagged()),
            (Self::Mistral, _) => Box::new(Mistral::default()),
        }
    }

    /// What reads an answer that begins with a brace, where that may be a call.
    pub(super) fn bare_syntax(self) -> Option<Box<dyn Syntax>> {
        (self == Self::Llama3).then(|| Box::new(Llama::default()) as Box<dyn Syntax>)
    }

    /// Every marker of the format that a vocabulary may hold as one token.
    fn markers(self) -> &'static [&'static str] {
        match self {
            Self::Hermes | Self::QwenCoder => &["<tool_call>", "</tool_call>"],
            Self::Glm => &[
                "<tool_call>",
                "</tool_call>",
                "<arg_key>",
                "</arg_key>",
                "<arg_value>",
                "</arg_value>",
            ],
            Self::DeepSeek => &[
                deepseek::CALLS_BEGIN,
                deepseek::CALLS_END,
                deepseek::CALL_BEGIN,
                deepseek::CALL_END,
                deepseek::SEPARATOR,
            ],
            Self::Llama3 => &["<|python_tag|>"],
            Self::Mistral => &["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"],
        }
    }
}

/// The markers around a model's reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReasoningMarkers {
    /// `<think>` for one.
    pub open: &'static str,
    /// `</think>` for one.
    pub close: &'static str,
}

impl ReasoningMarkers {
    /// Every pair under the name that settings call it by.
    pub const ALL: [(&'static str, Self); 4] = [
        ("think", Self { open: "<think>", close: "</think>" }),
        ("think-brackets", Self { open: "[THINK]", close: "[/THINK]" }),
        ("seed-think", Self { open: "<seed:think>", close: "</seed:think>" }),
        ("thinking", Self { open: "<thinking>", close: "</thinking>" }),
    ];

    /// The markers called `name` in [`ReasoningMarkers::ALL`].
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(other, _)| *other == name).map(|(_, markers)| *markers)
    }

    fn detect(source: &str) -> Option<Self> {
        // Some templates only cut the reasoning of earlier turns, at the closing marker.
        let used = |markers: &Self| source.contains(markers.open) || source.contains(markers.close);
        Self::ALL.iter().map(|(_, markers)| *markers).find(used)
    }
}

/// How a model's answers are to be read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutputFormat {
    /// How it writes calls; `None`: never, as far as is known.
    pub calls: Option<CallFormat>,
    /// How it marks reasoning; `None`: it does not.
    pub reasoning: Option<ReasoningMarkers>,
}

impl OutputFormat {
    /// The formats whose markers stand in any of the model's templates.
    pub fn detect(template: &ChatTemplate) -> Self {
        Self::detect_in(&template.sources().join("\n"))
    }

    /// The formats whose markers stand in the `source` of a template.
    pub fn detect_in(source: &str) -> Self {
        Self { calls: CallFormat::detect(source), reasoning: ReasoningMarkers::detect(source) }
    }

    /// Whether an answer to `prompt`, rendered from a template, begins inside reasoning: the
    /// template has put the opening marker at the end. What users write does not count, because
    /// templates write something after it.
    pub fn starts_in_reasoning(&self, prompt: &str) -> bool {
        self.reasoning.is_some_and(|markers| prompt.trim_end().ends_with(markers.open))
    }

    /// The texts of tokens that the parser must see even where the vocabulary calls them special:
    /// give them to [`crate::StreamOptions::show`].
    pub fn markers(&self) -> Vec<String> {
        let calls = self.calls.map_or(&[] as &[&str], CallFormat::markers).iter().copied();
        let reasoning = self.reasoning.into_iter().flat_map(|m| [m.open, m.close]);
        calls.chain(reasoning).map(str::to_owned).collect()
    }
}
