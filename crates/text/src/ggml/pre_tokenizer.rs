//! The pre-tokenizers of `tokenizer.ggml.pre`: how a text is cut into words before merging.
//!
//! A family is a list of steps; each step cuts every piece that the one before left, and what its
//! pattern does not match stays a piece of its own. The words follow what llama.cpp computes for
//! the name, not the pattern in the model's own `tokenizer.json`, where the two differ (classes
//! such as `\p{Lu}` count as `\p{L}` there, and digit groups take the text before them along).
//!
//! The patterns in the field end in `\s+(?!\S)|\s+`: a run of white space before a word leaves its
//! last character to the word. The `regex` crate has no look-ahead and in return takes linear time
//! on any input, so a pattern here ends in `\s+` and [`Rest`] says what the run gives back.

use regex::Regex;

/// What a match that is a run of white space (the pattern's last branch) gives back when a word
/// follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rest {
    /// The pattern has no such branch.
    Nothing,
    /// The last character: `\s+(?!\S)|\s+`.
    One,
    /// The same, but a branch before it takes runs up to their last line break.
    OneAfterLines,
    /// All but 512, 256, … 4, 2 or 1 characters: the white space of Jais 2.
    Powers,
}

#[derive(Debug, Clone)]
enum Step {
    Pattern(Regex, Rest),
    /// Groups of three digits counted from the right; text before digits stays with the first group.
    DigitGroups,
    /// Cuts before every third ASCII digit counted from the right.
    Thousands,
}

/// The cutting rules of one family.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    steps: Vec<Step>,
    /// A word that is a token is never merged from parts.
    pub whole_words: bool,
    /// The same for words of line breaks only.
    pub whole_lines: bool,
    /// Merging starts from characters instead of bytes.
    pub raw: bool,
    /// Spaces become `▁` first.
    pub escape_spaces: bool,
    /// A text begins with BOS unless the file says otherwise.
    pub add_bos: bool,
    /// A text begins with BOS whatever the file says.
    pub force_bos: bool,
}

// Parts of the patterns. Contractions are ASCII in either case; `(?i:)` would also take `ſ`.
const CONTRACTION: &str = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])";
const LINES: &str = r"\s*[\r\n]+";
const SYMBOLS: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*";
const WORD: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+";
const GPT2: &str = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";
const MARKED: &str = r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+";
const CJK: &str = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+";
const HAN: &str = concat!(
    r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}",
    r"\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}",
);
/// Letters with case, as listed by DeepSeek LLM.
const CASED: &str = concat!(
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}",
    r"\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}",
    r"\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}",
    r"\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}",
    r"\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}",
    r"\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}",
    r"\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}",
    r"\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}",
    r"\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}",
    r"\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}",
    r"\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}",
    r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}",
    r"\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}",
    r"\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}",
    r"\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}",
    r"\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}",
);

/// `\s+` with its `(?!\S)` twin, the last branch of most patterns.
const SPACES: &str = r"\s+";

/// The pattern most families share: contractions, words, `numbers`, symbols, white space.
fn words(numbers: &str) -> Step {
    lines_pattern(&[CONTRACTION, WORD, numbers, SYMBOLS, LINES])
}

/// Words that end where case rises, as GPT-4o cuts them. `contraction`: `don't` is one word.
fn cased_words(upper: &str, lower: &str, contraction: bool, numbers: &str) -> Step {
    let tail = if contraction { format!("(?:{CONTRACTION})?") } else { String::new() };
    let lead = r"[^\r\n\p{L}\p{N}]?";
    let rising = format!("{lead}{upper}*{lower}+{tail}");
    let falling = format!("{lead}{upper}+{lower}*{tail}");
    let symbols = r" ?[^\s\p{L}\p{N}]+[\r\n/]*";
    lines_pattern(&[&rising, &falling, numbers, symbols, LINES])
}

fn lines_pattern(branches: &[&str]) -> Step {
    ending(branches, Rest::OneAfterLines)
}

fn ending(branches: &[&str], rest: Rest) -> Step {
    pattern(&format!("{}|{SPACES}", branches.join("|")), rest)
}

fn plain(text: &str) -> Step {
    pattern(text, Rest::Nothing)
}

fn pattern(text: &str, rest: Rest) -> Step {
    let regex = Regex::new(text).expect("patterns are constants, compiled by a test");
    Step::Pattern(regex, rest)
}

fn gpt2() -> Step {
    pattern(GPT2, Rest::One)
}

fn marked() -> Step {
    lines_pattern(&[MARKED, r" ?[\p{P}\p{S}]+[\r\n]*", LINES])
}

/// Letters in the two roles of [`cased_words`]; only ASCII letters have a case here.
const RISING: (&str, &str) = (r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]");
const RISING_MARKED: (&str, &str) = (r"[[\p{L}\p{M}]&&[^a-z]]", r"[[\p{L}\p{M}]&&[^A-Z]]");
const CASELESS: (&str, &str) = (r"[\p{L}\p{M}]", r"[\p{L}\p{M}]");

/// The steps of the family called `name`, or `None`.
fn steps(name: &str) -> Option<Vec<Step>> {
    let (numbers, triples) = (r"\p{N}", r"\p{N}{1,3}");
    let steps = match name {
        "default" => vec![plain(r"[\p{P}$+<=>^~|]+"), gpt2(), plain(r"\p{N}+"), plain("[0-9]{3}")],
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "midm-2.0"
        | "lfm2" | "jina-v5-nano" | "dbrx" | "smaug-bpe" | "chatglm-bpe" | "glm4" | "glm5" => {
            vec![words(triples)]
        }
        "jais-2" => {
            vec![ending(&[CONTRACTION, WORD, triples, SYMBOLS, LINES], Rest::Powers)]
        }
        "minicpm5" => vec![plain(triples), words(r"\p{N}+")],
        "stablelm2" | "qwen2" | "deepseek-r1-qwen" | "kormo" | "f2llmv2" | "megrez" | "hunyuan"
        | "solar-open" | "grok-2" => vec![words(numbers)],
        "laguna" => vec![plain(r"[^\n]+|\n+"), words(numbers)],
        "ufakzeka" => vec![lines_pattern(&[WORD, numbers, SYMBOLS, LINES])],
        "seed-coder" => {
            let symbols = r" ?[^\s\p{L}\p{N}]+";
            vec![lines_pattern(&[CONTRACTION, WORD, numbers, symbols, LINES])]
        }
        "bailingmoe" | "bailingmoe2" | "llada-moe" => {
            vec![lines_pattern(&[CONTRACTION, WORD, numbers, SYMBOLS, r"\s*[\r\n]"])]
        }
        "exaone-moe" => {
            let word = r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+";
            let symbols = r" ?[^\s\p{L}\p{N}]+[\r\n/]?";
            vec![lines_pattern(&[CONTRACTION, word, numbers, symbols, r"\s*[\r\n]"])]
        }
        "qwen35" => {
            let word = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+";
            let symbols = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*";
            vec![lines_pattern(&[CONTRACTION, word, numbers, symbols, LINES])]
        }
        "kimi-k2" => {
            let han = format!("[{HAN}]+");
            let word = format!(r"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{HAN}]]+(?:{CONTRACTION})?");
            vec![lines_pattern(&[&han, &word, triples, SYMBOLS, LINES])]
        }
        "deepseek-llm" => vec![
            plain(r"[\r\n]"),
            plain(&format!(r"\s?[{CASED}]+")),
            plain(concat!(
                r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}",
                r"\x{3000}-\x{3002}]+"
            )),
            plain(r"\s+\z"),
            plain(HAN_AND_HANGUL),
            plain(r"\p{N}+"),
        ],
        "deepseek-coder" => vec![
            plain(r"[\r\n]"),
            plain(r"\s?\p{L}+"),
            plain(r"\s?\p{P}+"),
            plain(HAN_AND_HANGUL),
            plain(numbers),
        ],
        "deepseek-v3" | "hunyuan-dense" | "hy_v4" | "joyai-llm" => {
            vec![plain(triples), plain(CJK), marked()]
        }
        "spark2_5" => {
            let symbols = r" ?[\p{P}\p{S}]+";
            vec![
                plain(triples),
                plain(CJK),
                ending(&[MARKED, symbols, r"[\r\n]"], Rest::One),
                plain(numbers),
            ]
        }
        "afmoe" => vec![Step::DigitGroups, plain(ASIAN), marked()],
        "youtu" => {
            let cjk = concat!(
                r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|",
                r"[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}",
                r"\x{FF0C}\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+|[\x{3105}-\x{312F}]+|",
                r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"
            );
            vec![plain(cjk), cased_words(CASELESS.0, CASELESS.1, true, numbers)]
        }
        "falcon" => vec![plain(r"[\p{P}$+<=>^~|`]+"), gpt2(), plain("[0-9]{3}")],
        "starcoder" | "refact" | "command-r" | "smollm" | "codeshell" | "exaone" | "minerva-7b"
        | "mellum2" => vec![plain(numbers), gpt2()],
        "gpt-2" | "phi-2" | "jina-es" | "jina-de" | "gigachat" | "jina-v2-es" | "jina-v2-de"
        | "a.x-4.0" | "mellum" | "modern-bert" | "jina-v1-en" | "jina-v2-code" | "roberta-bpe"
        | "mpt" | "olmo" | "jais" | "trillion" | "granite-docling" | "exaone4" => vec![gpt2()],
        "poro-chat" | "bloom" | "gpt3-finnish" => vec![plain(UNPUNCTUATED)],
        "viking" => vec![plain(UNPUNCTUATED), plain(numbers)],
        "tekken" => vec![cased_words(RISING.0, RISING.1, false, numbers)],
        "gpt-4o" | "llama4" | "kanana2" | "talkie" | "minimax-m2" => {
            vec![cased_words(RISING.0, RISING.1, true, triples)]
        }
        "granite-embed-multi-97m" => {
            vec![cased_words(RISING_MARKED.0, RISING_MARKED.1, true, triples)]
        }
        "tiny_aya" | "cohere2moe" => {
            vec![Step::DigitGroups, cased_words(CASELESS.0, CASELESS.1, true, triples)]
        }
        "superbpe" => vec![plain(r"\p{N}+"), Step::Thousands],
        "chameleon" => vec![
            plain("<sentinel:[0-9]+>"),
            plain("IMGIMG[A-I]{1,4}Z"),
            plain(r"[\t\n]|    |  "),
            plain(numbers),
            plain(r"[\p{P}!-/:-@\[-`{-~]"),
            gpt2(),
        ],
        "gemma4" | "granite-embed-multi-311m" | "sarvam-moe" => vec![plain(r"[^\n]+|\n+")],
        "whitespace" => vec![plain(r"\S+")],
        _ => return None,
    };
    Some(steps)
}

const HAN_AND_HANGUL: &str = r"[\x{800}-\x{9FA5}\x{AC00}-\x{D7FF}]+";
const UNPUNCTUATED: &str = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{FF0C}\x{3001}\x{964}\x{6D4}\x{60C})]+";
/// Scripts written without spaces, as AFMoE lists them.
const ASIAN: &str = concat!(
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{8C48}-\x{FAFF}\x{3040}-\x{30FF}\x{FF65}-\x{FF9F}",
    r"\x{2F00}-\x{2FDF}\x{E40}-\x{E7F}\x{E80}-\x{EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}",
    r"\x{AA60}-\x{AA7F}\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+",
);

impl PreTokenizer {
    /// The family called `name`, or `None` when there is no such family.
    pub(super) fn named(name: &str) -> Option<Self> {
        let gemma4 = matches!(name, "gemma4" | "granite-embed-multi-311m");
        let llama3 = matches!(
            name,
            "llama3"
                | "llama-v3"
                | "llama-bpe"
                | "falcon3"
                | "falcon-h1"
                | "pixtral"
                | "midm-2.0"
                | "lfm2"
                | "jina-v5-nano"
        );
        Some(Self {
            steps: steps(name)?,
            whole_words: llama3
                || matches!(
                    name,
                    "minicpm5" | "youtu" | "glm4" | "glm5" | "tekken" | "granite-embed-multi-97m"
                ),
            whole_lines: gemma4,
            raw: gemma4 || matches!(name, "sarvam-moe" | "whitespace"),
            escape_spaces: gemma4 || name == "sarvam-moe",
            add_bos: llama3 || matches!(name, "tekken" | "chameleon"),
            force_bos: gemma4,
        })
    }

    /// The steps as the `tokenizers` package writes them.
    pub(super) fn splits(&self) -> Vec<Split> {
        self.steps.iter().map(Step::exported).collect()
    }

    /// The words of `text`, in order, together the whole text.
    pub(super) fn split<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut pieces = vec![text];
        let mut next = Vec::new();
        for step in &self.steps {
            for piece in &pieces {
                step.split(piece, &mut next);
            }
            pieces.clear();
            std::mem::swap(&mut pieces, &mut next);
        }
        pieces
    }
}

/// A step as the `tokenizers` package writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Split {
    pub pattern: String,
    /// Where a match goes: a piece of its own, or the end of the piece before it.
    pub behavior: &'static str,
}

impl Step {
    /// The same cuts with look-ahead, which that package's regex engines have.
    fn exported(&self) -> Split {
        let (pattern, behavior) = match self {
            Self::Pattern(regex, rest) => (rest.exported(regex.as_str()), "Isolated"),
            Self::DigitGroups => {
                (r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))".to_owned(), "MergedWithPrevious")
            }
            Self::Thousands => (r"(?=(?:[0-9]{3})+(?![0-9]))".to_owned(), "Isolated"),
        };
        Split { pattern, behavior }
    }

    fn split<'t>(&self, text: &'t str, pieces: &mut Vec<&'t str>) {
        match self {
            Self::Pattern(regex, rest) => {
                let mut position = 0;
                while let Some(found) = regex.find_at(text, position) {
                    if found.start() > position {
                        pieces.push(&text[position..found.start()]);
                    }
                    let end = rest.end(text, found.start(), found.end());
                    pieces.push(&text[found.start()..end]);
                    position = end;
                }
                if position < text.len() {
                    pieces.push(&text[position..]);
                }
            }
            Self::DigitGroups => {
                // A cut after each group, none before the first.
                let runs = digit_runs(text, char::is_numeric);
                cut(text, &runs, |position, run| position > run[0], pieces);
            }
            Self::Thousands => {
                let runs = digit_runs(text, |c| c.is_ascii_digit());
                cut(text, &runs, |position, run| position < run[run.len() - 1], pieces);
            }
        }
    }
}

impl Rest {
    /// `pattern` with its last branch as the field writes it.
    fn exported(self, pattern: &str) -> String {
        let Some(branches) = pattern.strip_suffix(SPACES).filter(|_| self != Self::Nothing) else {
            return pattern.to_owned();
        };
        let spaces = match self {
            Self::Nothing => unreachable!("filtered above"),
            Self::One | Self::OneAfterLines => r"\s+(?!\S)|\s+".to_owned(),
            Self::Powers => {
                let powers = (1..=9).rev().map(|power| format!(r"\s{{{}}}(?!\S)|", 1 << power));
                powers.collect::<String>() + r"\s"
            }
        };
        format!("{branches}{spaces}")
    }

    /// Where the match `start..end` really ends.
    fn end(self, text: &str, start: usize, end: usize) -> usize {
        let run = &text[start..end];
        let Some(last) = run.chars().next_back().filter(|last| last.is_whitespace()) else {
            return end;
        };
        let breaks_line = matches!(last, '\r' | '\n');
        match self {
            Self::Nothing => end,
            Self::OneAfterLines | Self::Powers if breaks_line => end,
            Self::One | Self::OneAfterLines => {
                let all_but_one = end - last.len_utf8();
                if end == text.len() || all_but_one == start { end } else { all_but_one }
            }
            Self::Powers => {
                let count = run.chars().count();
                let available = if end == text.len() { count } else { count - 1 };
                let take = (2..=9)
                    .rev()
                    .map(|power| 1 << power)
                    .find(|&size| size <= available)
                    .unwrap_or(available.clamp(1, 2));
                run.char_indices().nth(take).map_or(end, |(at, _)| start + at)
            }
        }
    }
}

/// Boundaries of the characters of each run of digits, its end included.
fn digit_runs(text: &str, digit: impl Fn(char) -> bool) -> Vec<Vec<usize>> {
    let mut runs: Vec<Vec<usize>> = Vec::new();
    let mut inside = false;
    for (at, character) in text.char_indices() {
        if digit(character) {
            match runs.last_mut().filter(|_| inside) {
                Some(run) => run.push(at + character.len_utf8()),
                None => runs.push(vec![at, at + character.len_utf8()]),
            }
            inside = true;
        } else {
            inside = false;
        }
    }
    runs
}

/// Cuts `text` where a multiple of three digits remains of a run, where `keep` agrees.
fn cut<'t>(
    text: &'t str,
    runs: &[Vec<usize>],
    keep: impl Fn(usize, &[usize]) -> bool,
    pieces: &mut Vec<&'t str>,
) {
    let mut position = 0;
    for run in runs {
        let digits = run.len() - 1;
        for &at in run.iter().skip(digits % 3).step_by(3) {
            if keep(at, run) && at > position {
                pieces.push(&text[position..at]);
                position = at;
            }
        }
    }
    if position < text.len() {
        pieces.push(&text[position..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        PreTokenizer::named(name).expect(name).split(text)
    }

    #[test]
    fn white_space_before_words() {
        assert_eq!(split("gpt-2", "a  b \n\n c  "), ["a", " ", " b", " \n\n", " c", "  "]);
        assert_eq!(split("qwen2", "a  b \n\n c  "), ["a", " ", " b", " \n\n", " c", "  "]);
        assert_eq!(split("gpt-2", "\n\na"), ["\n", "\n", "a"]);
        assert_eq!(split("qwen2", "\n\na"), ["\n\n", "a"]);
        assert_eq!(split("qwen2", "x\u{3000}\u{a0}1"), ["x", "\u{3000}", "\u{a0}", "1"]);
    }

    #[test]
    fn white_space_of_jais_2_comes_in_powers() {
        let text = format!("{}x", " ".repeat(7));
        assert_eq!(split("jais-2", &text), ["    ", "  ", " x"]);
        assert_eq!(split("jais-2", &" ".repeat(7)), ["    ", "  ", " "]);
    }

    #[test]
    fn digit_groups() {
        assert_eq!(split("llama3", "12345"), ["123", "45"]);
        assert_eq!(split("superbpe", "1234567"), ["1", "234", "567"]);
        assert_eq!(split("afmoe", "1234"), ["1", "234"]);
        assert_eq!(split("afmoe", "abc123"), ["abc", "123"]);
        assert_eq!(split("smollm", "12 a"), ["1", "2", " a"]);
    }

    #[test]
    fn cased_words() {
        assert_eq!(split("gpt-4o", "HelloWorld don't"), ["Hello", "World", " don't"]);
        assert_eq!(split("tekken", "HelloWorld don't"), ["Hello", "World", " don", "'t"]);
    }

    #[test]
    fn unknown_name() {
        assert!(PreTokenizer::named("no-such").is_none());
    }
}
