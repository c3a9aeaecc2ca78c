//! GBNF, llama.cpp's notation for grammars, to Lark.
//!
//! GBNF is a grammar of characters; here lexemes come before the grammar, and the longest lexeme wins.
//! So that both mean the same, every rule that does not refer to itself, directly or through others, becomes
//! one regular expression: within one there are no lexemes. Only what is truly recursive stays a rule.
//! What is left is a recursive rule whose neighbouring lexemes overlap, `x ::= "a" x "ab" | "a"`, which
//! GBNF would search through; such grammars are rare, and what is accepted is a subset of what is meant.
//!
//! Read are rules `name ::= …`, literals, character classes, `.`, groups, alternatives, `* + ?`, `{m}`,
//! `{m,}`, `{m,n}` and comments, over several lines where llama.cpp allows it.

use super::calls::literal;
use crate::TextError;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Most times something may be repeated by a number.
const MAX_REPEAT: u32 = 2_000;
/// Groups within groups. llguidance reads thirty, among them those of repeated repetitions.
const MAX_DEPTH: usize = 20;

/// Lark that accepts what `source` accepts.
pub(super) fn to_lark(source: &str) -> Result<String, TextError> {
    let parsed = Parser::new(source).rules();
    let lark = parsed.and_then(|rules| convert(&rules));
    lark.map_err(|reason| TextError::Grammar { kind: "gbnf", reason })
}

/// What a rule is made of.
#[derive(Debug)]
enum Node {
    Either(Vec<Node>),
    Sequence(Vec<Node>),
    Literal(String),
    /// A regular expression of one character.
    Class(String),
    Rule(String),
    Repeat(Box<Node>, u32, Option<u32>),
}

type Rules = BTreeMap<String, Node>;

fn convert(rules: &Rules) -> Result<String, String> {
    if !rules.contains_key("root") {
        return Err("there is no rule called root".into());
    }
    let mut recursive: BTreeMap<&str, bool> = BTreeMap::new();
    for name in rules.keys() {
        let mut path = Vec::new();
        mark(name, rules, &mut recursive, &mut path)?;
    }
    let names: BTreeMap<&str, String> = rules
        .keys()
        .enumerate()
        .map(|(index, name)| {
            let prefix = if recursive[name.as_str()] { "r" } else { "T" };
            (name.as_str(), format!("{prefix}{index}"))
        })
        .collect();
    let mut lark = format!("start: {}\n", names["root"]);
    for (name, node) in rules {
        let _ = write!(lark, "{}: ", names[name.as_str()]);
        write_node(node, &names, &mut lark);
        lark.push('\n');
    }
    Ok(lark)
}

/// Finds out whether rule `name` or one that it needs refers to itself. `path` leads there, so
/// whatever leads back to it is part of a circle.
fn mark<'a>(
    name: &'a str,
    rules: &'a Rules,
    recursive: &mut BTreeMap<&'a str, bool>,
    path: &mut Vec<&'a str>,
) -> Result<bool, String> {
    if let Some(known) = recursive.get(name) {
        return Ok(*known);
    }
    if path.contains(&name) {
        return Ok(true);
    }
    let (key, node) = rules.get_key_value(name).ok_or_else(|| {
        let user = path.last().unwrap_or(&"root");
        format!("rule {user}: there is no rule called {name}")
    })?;
    if path.len() >= 512 {
        return Err(format!("rule {name}: more than 512 rules deep"));
    }
    path.push(key);
    let mut used = Vec::new();
    names_in(node, &mut used);
    let mut found = false;
    for other in used {
        found |= mark(other, rules, recursive, path)?;
    }
    path.pop();
    recursive.insert(key, found);
    Ok(found)
}

fn names_in<'a>(node: &'a Node, names: &mut Vec<&'a str>) {
    match node {
        Node::Either(nodes) | Node::Sequence(nodes) => {
            nodes.iter().for_each(|node| names_in(node, names));
        }
        Node::Repeat(node, ..) => names_in(node, names),
        Node::Rule(name) => names.push(name),
        Node::Literal(_) | Node::Class(_) => {}
    }
}

fn write_node(node: &Node, names: &BTreeMap<&str, String>, out: &mut String) {
    match node {
        Node::Either(nodes) => {
            out.push('(');
            for (index, node) in nodes.iter().enumerate() {
                out.push_str(if index > 0 { " | " } else { "" });
                write_node(node, names, out);
            }
            out.push(')');
        }
        Node::Sequence(nodes) if nodes.is_empty() => out.push_str("\"\""),
        Node::Sequence(nodes) => {
            for (index, node) in nodes.iter().enumerate() {
                out.push_str(if index > 0 { " " } else { "" });
                write_node(node, names, out);
            }
        }
        Node::Literal(text) => out.push_str(&literal(text)),
        Node::Class(regex) => {
            let _ = write!(out, "/{regex}/");
        }
        Node::Rule(name) => out.push_str(&names[name.as_str()]),
        Node::Repeat(_, _, Some(0)) => out.push_str("\"\""),
        Node::Repeat(node, least, most) => {
            let bare = matches!(**node, Node::Repeat(..));
            out.push_str(if bare { "(" } else { "" });
            write_node(node, names, out);
            out.push_str(if bare { ")" } else { "" });
            match (least, most) {
                (0, None) => out.push('*'),
                (1, None) => out.push('+'),
                (0, Some(1)) => out.push('?'),
                (least, None) => {
                    let _ = write!(out, "{{{least},}}");
                }
                (least, Some(most)) => {
                    let _ = write!(out, "{{{least},{most}}}");
                }
            }
        }
    }
}

struct Parser<'a> {
    source: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn new(source: &'a str) -> Self {
        Self { source, at: 0 }
    }

    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn eat(&mut self, text: &str) -> bool {
        let found = self.rest().starts_with(text);
        if found {
            self.at += text.len();
        }
        found
    }

    fn wrong<T>(&self, reason: impl std::fmt::Display) -> Result<T, String> {
        let line = self.source[..self.at].matches('\n').count() + 1;
        Err(format!("line {line}: {reason}"))
    }

    /// Skips spaces and comments, and line breaks where they mean nothing.
    fn space(&mut self, lines: bool) {
        while let Some(c) = self.peek() {
            match c {
                '#' => {
                    let end = self.rest().find('\n').unwrap_or(self.rest().len());
                    self.at += end;
                }
                '\n' | '\r' if !lines => break,
                _ if c.is_whitespace() => self.at += c.len_utf8(),
                _ => break,
            }
        }
    }

    fn rules(mut self) -> Result<Rules, String> {
        let mut rules = Rules::new();
        loop {
            self.space(true);
            if self.rest().is_empty() {
                return Ok(rules);
            }
            let name = self.name()?;
            self.space(false);
            if !self.eat("::=") {
                return self.wrong(format!("expected ::= after {name}"));
            }
            self.space(true);
            let node = self.either(0)?;
            self.space(false);
            if !matches!(self.peek(), None | Some('\n' | '\r')) {
                return self.wrong(format!("rule {name}: unexpected {:?}", self.peek()));
            }
            if rules.insert(name.clone(), node).is_some() {
                return self.wrong(format!("rule {name} is there twice"));
            }
        }
    }

    fn name(&mut self) -> Result<String, String> {
        let letter = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let end = self.rest().find(|c| !letter(c)).unwrap_or(self.rest().len());
        if end == 0 {
            return self.wrong(format!("expected the name of a rule, found {:?}", self.peek()));
        }
        let name = self.rest()[..end].to_owned();
        self.at += end;
        Ok(name)
    }

    /// Alternatives; `depth` groups around them, inside which line breaks mean nothing.
    fn either(&mut self, depth: usize) -> Result<Node, String> {
        if depth > MAX_DEPTH {
            return self.wrong(format!("more than {MAX_DEPTH} groups inside one another"));
        }
        let mut nodes = vec![self.sequence(depth)?];
        loop {
            // An alternative may begin a line, as no rule can.
            let end = self.at;
            self.space(true);
            if !self.eat("|") {
                self.at = end;
                break;
            }
            self.space(true);
            nodes.push(self.sequence(depth)?);
        }
        Ok(if nodes.len() == 1 { nodes.remove(0) } else { Node::Either(nodes) })
    }

    fn sequence(&mut self, depth: usize) -> Result<Node, String> {
        let mut nodes = Vec::new();
        loop {
            self.space(depth > 0);
            let node = match self.peek() {
                Some('"') => self.literal()?,
                Some('[') => self.class()?,
                Some('.') => {
                    self.next();
                    Node::Class("(?s:.)".into())
                }
                Some('(') => {
                    self.next();
                    self.space(true);
                    let inner = self.either(depth + 1)?;
                    self.space(true);
                    if !self.eat(")") {
                        return self.wrong("expected )");
                    }
                    match inner {
                        group @ Node::Either(_) => group,
                        // Kept together for what may repeat it.
                        inner => Node::Either(vec![inner]),
                    }
                }
                Some(c) if c.is_ascii_alphanumeric() || c == '_' => Node::Rule(self.name()?),
                Some('<' | '!') => {
                    return self.wrong("tokens are not read here; write their text as a literal");
                }
                _ => return Ok(Node::Sequence(nodes)),
            };
            nodes.push(self.repeated(node)?);
        }
    }

    fn repeated(&mut self, mut node: Node) -> Result<Node, String> {
        loop {
            let (least, most) = match self.peek() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => {
                    self.next();
                    self.space(false);
                    let least = self.number()?;
                    self.space(false);
                    let most = if self.eat(",") {
                        self.space(false);
                        let open = self.peek() == Some('}');
                        if open { None } else { Some(self.number()?) }
                    } else {
                        Some(least)
                    };
                    self.space(false);
                    if self.peek() != Some('}') {
                        return self.wrong("expected }");
                    }
                    if most.is_some_and(|most| most < least) {
                        return self.wrong("a repetition of at least more than at most");
                    }
                    (least, most)
                }
                _ => return Ok(node),
            };
            self.next();
            node = Node::Repeat(Box::new(node), least, most);
        }
    }

    fn number(&mut self) -> Result<u32, String> {
        let end = self.rest().find(|c: char| !c.is_ascii_digit()).unwrap_or(self.rest().len());
        match self.rest()[..end].parse::<u32>() {
            Ok(number) if number <= MAX_REPEAT => {
                self.at += end;
                Ok(number)
            }
            _ => self.wrong(format!("expected a number of at most {MAX_REPEAT}")),
        }
    }

    fn literal(&mut self) -> Result<Node, String> {
        self.next();
        let mut text = String::new();
        loop {
            match self.next() {
                Some('"') => return Ok(Node::Literal(text)),
                Some('\\') => text.push(self.escape()?),
                Some('\n') | None => return self.wrong("a literal without an end"),
                Some(c) => text.push(c),
            }
        }
    }

    /// A class of characters as a regular expression.
    fn class(&mut self) -> Result<Node, String> {
        self.next();
        let mut regex = String::from("[");
        if self.eat("^") {
            regex.push('^');
        }
        let mut empty = true;
        loop {
            if self.eat("]") {
                break;
            }
            let low = self.class_character()?;
            let _ = write!(regex, "\\x{{{:x}}}", u32::from(low));
            empty = false;
            if self.rest().starts_with('-') && !self.rest().starts_with("-]") {
                self.next();
                let high = self.class_character()?;
                if high < low {
                    return self.wrong(format!("the range {low:?} to {high:?} is empty"));
                }
                let _ = write!(regex, "-\\x{{{:x}}}", u32::from(high));
            }
        }
        if empty {
            return self.wrong("a class without characters");
        }
        regex.push(']');
        Ok(Node::Class(regex))
    }

    fn class_character(&mut self) -> Result<char, String> {
        match self.next() {
            Some('\\') => self.escape(),
            Some('\n') | None => self.wrong("a class without an end"),
            Some(c) => Ok(c),
        }
    }

    /// What follows a backslash.
    fn escape(&mut self) -> Result<char, String> {
        let digits = match self.next() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some(c @ ('"' | '\\' | '[' | ']' | '-' | '^' | '/' | '.')) => return Ok(c),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            other => return self.wrong(format!("unknown escape {other:?}")),
        };
        let code = self.rest().get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok());
        match code.and_then(char::from_u32) {
            Some(c) => {
                self.at += digits;
                Ok(c)
            }
            None => self.wrong(format!("expected {digits} hexadecimal digits of a character")),
        }
    }
}
