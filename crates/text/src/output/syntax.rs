//! The ways in which models write calls. Each struct reads what follows an opening marker of its
//! format ([`super::CallFormat::openings`]).

use super::call::{
    Calls, JsonArguments, Literal, Name, ObjectCall, Read, Step, Syntax, TextArgument,
};

/// What a read means where nothing but a miss ends the calls.
fn goes_on(read: Read) -> Step {
    if read == Read::Miss { Step::Break } else { Step::More }
}

/// `<tool_call>{"name": …, "arguments": …}</tool_call>`: Qwen 2.5 and 3, Hermes.
#[derive(Debug, Default)]
pub(super) struct Hermes {
    object: Option<ObjectCall>,
    between: Literal,
}

impl Syntax for Hermes {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        if let Some(object) = &mut self.object {
            let read = object.step(c, calls);
            if read == Read::Hit(0) {
                self.object = None;
            }
            return goes_on(read);
        }
        match self.between.step(&["</tool_call>", "{"], c) {
            Read::Hit(0) => Step::Finished,
            Read::Hit(_) => goes_on(self.object.insert(ObjectCall::default()).step(c, calls)),
            other => goes_on(other),
        }
    }

    fn held(&self) -> usize {
        self.between.held()
    }
}

/// `<tool_call>name<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>`: GLM 4.5 to 4.7, with
/// and without line breaks between the tags.
#[derive(Debug, Default)]
pub(super) struct Glm {
    at: GlmAt,
    name: Name,
    literal: Literal,
    value: TextArgument,
    key: String,
    arguments: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum GlmAt {
    #[default]
    Name,
    Key,
    BeforeValue,
    Value,
    Next,
}

impl Glm {
    fn next(&mut self, option: usize, calls: &mut Calls) -> Step {
        if option == 0 {
            self.at = GlmAt::Key;
            return Step::More;
        }
        calls.arguments(if self.arguments == 0 { "{}" } else { "}" });
        calls.end();
        Step::Finished
    }
}

impl Syntax for Glm {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        const NEXT: [&str; 2] = ["<arg_key>", "</tool_call>"];
        match self.at {
            GlmAt::Name => match self.name.step_function(&NEXT, c) {
                Read::Hit(option) if calls.start(&self.name.take()) => self.next(option, calls),
                Read::Hit(_) => Step::Break,
                other => goes_on(other),
            },
            GlmAt::Key => match self.name.step(&["</arg_key>"], c) {
                Read::Hit(_) => {
                    self.key = self.name.take();
                    self.at = GlmAt::BeforeValue;
                    Step::More
                }
                other => goes_on(other),
            },
            GlmAt::BeforeValue => match self.literal.step(&["<arg_value>"], c) {
                Read::Hit(_) => {
                    self.value = TextArgument::start(&self.key, self.arguments == 0, false, calls);
                    self.arguments += 1;
                    self.at = GlmAt::Value;
                    Step::More
                }
                other => goes_on(other),
            },
            GlmAt::Value => {
                if self.value.step("</arg_value>", c, calls) {
                    self.at = GlmAt::Next;
                }
                Step::More
            }
            GlmAt::Next => match self.literal.step(&NEXT, c) {
                Read::Hit(option) => self.next(option, calls),
                other => goes_on(other),
            },
        }
    }

    fn held(&self) -> usize {
        match self.at {
            GlmAt::Name | GlmAt::Key => self.name.held(),
            GlmAt::BeforeValue | GlmAt::Next => self.literal.held(),
            GlmAt::Value => self.value.held(),
        }
    }
}

/// `<function=name><parameter=k>v</parameter></function>`, in `<tool_call>` tags or, since models
/// forget them, without: Qwen3-Coder.
#[derive(Debug, Default)]
pub(super) struct QwenCoder {
    at: CoderAt,
    name: Name,
    literal: Literal,
    value: TextArgument,
    arguments: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum CoderAt {
    #[default]
    Open,
    Name,
    Next,
    Key,
    Value,
    After,
}

impl QwenCoder {
    /// After `<function=`.
    pub(super) fn in_function() -> Self {
        Self { at: CoderAt::Name, ..Self::default() }
    }
}

impl Syntax for QwenCoder {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        match self.at {
            CoderAt::Open => match self.literal.step(&["<function="], c) {
                Read::Hit(_) => self.at = CoderAt::Name,
                other => return goes_on(other),
            },
            CoderAt::Name => match self.name.step_function(&[">"], c) {
                Read::Hit(_) if calls.start(&self.name.take()) => {
                    self.arguments = 0;
                    self.at = CoderAt::Next;
                }
                Read::Hit(_) => return Step::Break,
                other => return goes_on(other),
            },
            CoderAt::Next => match self.literal.step(&["<parameter=", "</function>"], c) {
                Read::Hit(0) => self.at = CoderAt::Key,
                Read::Hit(_) => {
                    calls.arguments(if self.arguments == 0 { "{}" } else { "}" });
                    calls.end();
                    self.at = CoderAt::After;
                }
                other => return goes_on(other),
            },
            CoderAt::Key => match self.name.step(&[">"], c) {
                Read::Hit(_) => {
                    let key = self.name.take();
                    self.value = TextArgument::start(&key, self.arguments == 0, true, calls);
                    self.arguments += 1;
                    self.at = CoderAt::Value;
                }
                other => return goes_on(other),
            },
            CoderAt::Value => {
                if self.value.step("</parameter>", c, calls) {
                    self.at = CoderAt::Next;
                }
            }
            CoderAt::After => match self.literal.step(&["</tool_call>", "<function="], c) {
                Read::Hit(0) => return Step::Finished,
                Read::Hit(_) => self.at = CoderAt::Name,
                other => return goes_on(other),
            },
        }
        Step::More
    }

    fn held(&self) -> usize {
        match self.at {
            CoderAt::Name | CoderAt::Key => self.name.held(),
            CoderAt::Open | CoderAt::Next | CoderAt::After => self.literal.held(),
            CoderAt::Value => self.value.held(),
        }
    }
}

/// The markers of DeepSeek's calls, which are tokens of their own. The bars are U+FF5C, the low
/// line is U+2581.
pub(crate) mod deepseek {
    pub const CALLS_BEGIN: &str = "<｜tool▁calls▁begin｜>";
    pub const CALLS_END: &str = "<｜tool▁calls▁end｜>";
    pub const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
    pub const CALL_END: &str = "<｜tool▁call▁end｜>";
    pub const SEPARATOR: &str = "<｜tool▁sep｜>";
}

/// DeepSeek. V3 and R1 write `function<｜tool▁sep｜>name`, a line break and the arguments as a block
/// of Markdown code; V3.1 writes `name<｜tool▁sep｜>` and the arguments alone.
#[derive(Debug, Default)]
pub(super) struct DeepSeek {
    at: DeepSeekAt,
    name: Name,
    head: String,
    literal: Literal,
    arguments: JsonArguments,
    fenced: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum DeepSeekAt {
    #[default]
    Between,
    Head,
    /// What follows the separator tells the two styles apart.
    Separated,
    Name,
    Fence,
    Arguments,
    FenceEnd,
    End,
}

impl DeepSeek {
    /// After the beginning of one call.
    pub(super) fn in_call() -> Self {
        Self { at: DeepSeekAt::Head, ..Self::default() }
    }
}

impl Syntax for DeepSeek {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        use DeepSeekAt::{Arguments, Between, End, Fence, FenceEnd, Head, Name, Separated};
        use deepseek::{CALL_BEGIN, CALL_END, CALLS_END, SEPARATOR};
        match self.at {
            Between => match self.literal.step(&[CALL_BEGIN, CALLS_END], c) {
                Read::Hit(0) => self.at = Head,
                Read::Hit(_) => return Step::Finished,
                other => return goes_on(other),
            },
            Head => match self.name.step_function(&[SEPARATOR], c) {
                Read::Hit(_) => {
                    self.head = self.name.take();
                    self.at = Separated;
                }
                other => return goes_on(other),
            },
            Separated if c.is_whitespace() => {}
            Separated if c == '{' => {
                if !calls.start(&self.head) {
                    return Step::Break;
                }
                self.fenced = false;
                self.arguments = JsonArguments::default();
                self.at = Arguments;
                return goes_on(self.arguments.step(c, calls));
            }
            Separated if self.head == "function" => {
                self.at = Name;
                return goes_on(self.name.step_function(&["\n"], c));
            }
            Separated => return Step::Break,
            Name => match self.name.step_function(&["\n"], c) {
                Read::Hit(_) if calls.start(&self.name.take()) => self.at = Fence,
                Read::Hit(_) => return Step::Break,
                other => return goes_on(other),
            },
            Fence => match self.literal.step(&["```json"], c) {
                Read::Hit(_) => {
                    self.fenced = true;
                    self.arguments = JsonArguments::default();
                    self.at = Arguments;
                }
                other => return goes_on(other),
            },
            Arguments => match self.arguments.step(c, calls) {
                Read::Hit(_) => self.at = if self.fenced { FenceEnd } else { End },
                other => return goes_on(other),
            },
            FenceEnd => match self.literal.step(&["```"], c) {
                Read::Hit(_) => self.at = End,
                other => return goes_on(other),
            },
            End => match self.literal.step(&[CALL_END], c) {
                Read::Hit(_) => self.at = Between,
                other => return goes_on(other),
            },
        }
        Step::More
    }

    fn held(&self) -> usize {
        match self.at {
            DeepSeekAt::Head | DeepSeekAt::Name => self.name.held(),
            DeepSeekAt::Separated | DeepSeekAt::Arguments => 0,
            _ => self.literal.held(),
        }
    }
}

/// `{"name": …, "parameters": …}` as the whole answer or after `<|python_tag|>`: Llama 3. Several
/// calls are separated by semicolons or white space.
#[derive(Debug, Default)]
pub(super) struct Llama {
    object: Option<ObjectCall>,
    tagged: bool,
}

impl Llama {
    /// After `<|python_tag|>`.
    pub(super) fn tagged() -> Self {
        Self { object: None, tagged: true }
    }
}

impl Syntax for Llama {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        if let Some(object) = &mut self.object {
            let read = object.step(c, calls);
            if read == Read::Hit(0) {
                self.object = None;
            }
            return goes_on(read);
        }
        match c {
            '{' => {
                let object = if self.tagged { ObjectCall::default() } else { ObjectCall::strict() };
                goes_on(self.object.insert(object).step(c, calls))
            }
            ';' => Step::More,
            _ if c.is_whitespace() => Step::More,
            _ => Step::Break,
        }
    }

    fn held(&self) -> usize {
        0
    }
}

/// `[TOOL_CALLS]` and a list of objects (to 2024), or `name[ARGS]{…}` with an optional `[CALL_ID]`
/// (since): Mistral.
#[derive(Debug, Default)]
pub(super) struct Mistral {
    at: MistralAt,
    name: Name,
    called: String,
    object: ObjectCall,
    arguments: JsonArguments,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum MistralAt {
    #[default]
    Open,
    /// Inside a list, where a call may begin.
    Item,
    /// Inside a list, after a call.
    Next,
    Object,
    /// An object outside a list.
    Single,
    Name,
    Id,
    Arguments,
}

impl Mistral {
    fn begin(&mut self, at: MistralAt, c: char, calls: &mut Calls) -> Step {
        self.at = at;
        self.object = ObjectCall::default();
        goes_on(self.object.step(c, calls))
    }
}

impl Syntax for Mistral {
    fn step(&mut self, c: char, calls: &mut Calls) -> Step {
        use MistralAt::{Arguments, Id, Item, Name, Next, Object, Open, Single};
        match self.at {
            Open | Item | Next if c.is_whitespace() => {}
            Open if c == '[' => self.at = Item,
            Open if c == '{' => return self.begin(Single, c, calls),
            Open => {
                self.at = Name;
                return goes_on(self.name.step_function(&[], c));
            }
            Item if c == '{' => return self.begin(Object, c, calls),
            Next if c == ',' => self.at = Item,
            Next if c == ']' => return Step::Finished,
            Item | Next => return Step::Break,
            Object => match self.object.step(c, calls) {
                Read::Hit(_) => self.at = Next,
                other => return goes_on(other),
            },
            Single => match self.object.step(c, calls) {
                Read::Hit(_) => return Step::Finished,
                other => return goes_on(other),
            },
            Name => match self.name.step_function(&["[ARGS]", "[CALL_ID]", "{"], c) {
                Read::Hit(end) => {
                    self.called = self.name.take();
                    if !calls.start(&self.called) {
                        return Step::Break;
                    }
                    self.at = if end == 1 { Id } else { Arguments };
                    if end == 2 {
                        return goes_on(self.arguments.step(c, calls));
                    }
                }
                other => return goes_on(other),
            },
            Id => match self.name.step(&["[ARGS]"], c) {
                Read::Hit(_) => self.at = Arguments,
                other => return goes_on(other),
            },
            Arguments => match self.arguments.step(c, calls) {
                Read::Hit(_) => return Step::Finished,
                other => return goes_on(other),
            },
        }
        Step::More
    }

    fn held(&self) -> usize {
        match self.at {
            MistralAt::Name | MistralAt::Id => self.name.held(),
            _ => 0,
        }
    }
}
