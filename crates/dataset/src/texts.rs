//! The texts of a conversation, and whether they reach its rendering.
//!
//! Templates silently leave out what they do not know: calls, reasoning, roles, a system message in
//! a late place. Looking for each text in the rendering is not enough, since "4" or "a" stands in
//! it anyway. So the conversation is rendered once more with marks in each text, behind its first
//! word and before its last.
//!
//! If that rendering without its marks equals the first one, the marks did not matter to the
//! template: a text is there if its marks are. Otherwise (a template that compares or measures
//! texts) the texts themselves are looked for.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::messages::is_data;
use crate::python_text::is_space;

/// Unicode noncharacters, which no text needs. A mark is [`OPEN`], the number of its text in base
/// 16 with digits from [`ZERO`] on, and [`CLOSE`]. (U+FDD0 to U+FDD2 have other uses here.)
const OPEN: char = '\u{FDD8}';
const CLOSE: char = '\u{FDD9}';
const ZERO: u32 = 0xFDDA;

/// Put into the tags of reasoning so that a template does not recognize them.
const HIDE: char = '\u{FDEF}';

/// Texts that begin with this are long numbers (see `integers.rs`).
const NUMBER: char = '\u{FDD2}';

/// The most texts that are marked in the arguments of one call, and in the data of one answer.
const MARKED_ARGUMENTS: usize = 256;

/// Tags around reasoning within an answer.
pub const REASONING: [(&str, &str); 8] = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    // Gemma 4.
    ("<|channel>thought", "<channel|>"),
];

/// Keys of a message for reasoning apart from its answer, in the order in which transformers looks
/// for one.
pub(crate) const REASONING_KEYS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TextKind {
    /// Content that is a string.
    Content,
    /// Content that is a list of parts, or data.
    Part,
    /// The reasoning of an assistant before its answer.
    Reasoning,
    /// A call of a tool, by its index.
    Call(usize),
    /// The name of a tool that can be called.
    Tool,
}

#[derive(Debug)]
pub(crate) struct Text {
    /// Index of the message that it belongs to. `None`: it is of the tools.
    pub(crate) message: Option<usize>,
    pub(crate) kind: TextKind,
    pieces: Vec<String>,
    /// How many marks were put into it.
    marks: usize,
}

/// A conversation with its texts marked.
#[derive(Debug, Default)]
pub(crate) struct Marked {
    pub(crate) texts: Vec<Text>,
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Option<Value>,
}

/// A rendering without its marks, and where they stood: (byte in `text`, index of the marked text).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) text: String,
    pub(crate) marks: Vec<(usize, usize)>,
}

impl Marked {
    pub(crate) fn new(messages: &[Value], tools: Option<&Value>) -> Self {
        let mut marked = Self::default();
        for (index, message) in messages.iter().enumerate() {
            let copy = marked.message(message, index, false);
            marked.messages.push(copy);
        }
        marked.tools = tools.map(|tools| marked.tools(tools));
        marked
    }

    /// A message whose reasoning the template does not recognize. Its texts are numbered from 0.
    pub(crate) fn hidden(message: &Value, index: usize) -> Self {
        let mut marked = Self::default();
        let copy = marked.message(message, index, true);
        marked.messages.push(copy);
        marked
    }

    fn add(&mut self, message: Option<usize>, kind: TextKind) -> usize {
        self.texts.push(Text { message, kind, pieces: Vec::new(), marks: 0 });
        self.texts.len() - 1
    }

    /// A text with its marks in it.
    fn mark(&mut self, id: usize, text: &str) -> String {
        let mut out = String::with_capacity(text.len() + 24);
        let Some((first, last)) = word_borders(text) else { return text.to_owned() };
        let entry = &mut self.texts[id];
        entry.pieces.push(text.trim_matches(is_space).to_owned());
        out.push_str(&text[..first]);
        push_mark(&mut out, id);
        entry.marks += 1;
        if let Some(last) = last {
            out.push_str(&text[first..last]);
            push_mark(&mut out, id);
            entry.marks += 1;
            out.push_str(&text[last..]);
        } else {
            out.push_str(&text[first..]);
        }
        out
    }

    fn message(&mut self, message: &Value, index: usize, hide: bool) -> Value {
        let Some(object) = message.as_object() else { return message.clone() };
        let is_assistant = object.get("role").and_then(Value::as_str) == Some("assistant");
        let mut copy = object.clone();
        match object.get("content") {
            Some(Value::String(text)) => {
                let marked = self.content(text, index, TextKind::Content, is_assistant, hide);
                copy.insert("content".to_owned(), Value::String(marked));
            }
            Some(data) if is_data(data) => {
                let id = self.add(Some(index), TextKind::Part);
                let mut left = MARKED_ARGUMENTS;
                let marked = self.arguments(id, data, &mut left);
                copy.insert("content".to_owned(), marked);
            }
            Some(Value::Array(parts)) => {
                let parts = parts.iter().map(|part| self.part(part, index, is_assistant, hide)).collect();
                copy.insert("content".to_owned(), Value::Array(parts));
            }
            _ => {}
        }
        if let Some(reasoning) = reasoning(object) {
            let id = self.add(Some(index), TextKind::Reasoning);
            let marked = self.mark(id, reasoning);
            // The same reasoning may be there a second time, under another key.
            for key in REASONING_KEYS.iter().filter(|key| object.get(**key).and_then(Value::as_str) == Some(reasoning))
            {
                copy.insert((*key).to_owned(), Value::String(marked.clone()));
            }
        }
        if let Some(Value::Array(calls)) = object.get("tool_calls") {
            let calls = calls.iter().enumerate().map(|(number, call)| self.call(call, index, number)).collect();
            copy.insert("tool_calls".to_owned(), Value::Array(calls));
        }
        Value::Object(copy)
    }

    fn content(&mut self, text: &str, index: usize, kind: TextKind, is_assistant: bool, hide: bool) -> String {
        let mut out = String::with_capacity(text.len() + 64);
        let mut place = 0;
        for (kind, range) in sections(text, kind, is_assistant) {
            push_tag(&mut out, &text[place..range.start], hide);
            let id = self.add(Some(index), kind);
            out.push_str(&self.mark(id, &text[range.clone()]));
            place = range.end;
        }
        push_tag(&mut out, &text[place..], hide);
        out
    }

    fn part(&mut self, part: &Value, index: usize, is_assistant: bool, hide: bool) -> Value {
        let mut part = part.clone();
        if let Some(Value::String(text)) = part.get_mut("text") {
            *text = self.content(text, index, TextKind::Part, is_assistant, hide);
        }
        part
    }

    fn call(&mut self, call: &Value, index: usize, number: usize) -> Value {
        let mut call = call.clone();
        let id = self.add(Some(index), TextKind::Call(number));
        if let Some(function) = function_of(&mut call) {
            if let Some(Value::String(name)) = function.get_mut("name") {
                *name = self.mark(id, name);
            }
            if let Some(arguments) = function.get_mut("arguments") {
                let mut left = MARKED_ARGUMENTS;
                *arguments = self.arguments(id, arguments, &mut left);
            }
        }
        call
    }

    /// Arguments with marks in their texts and keys, in at most `left` of them.
    fn arguments(&mut self, id: usize, value: &Value, left: &mut usize) -> Value {
        if *left == 0 {
            return value.clone();
        }
        match value {
            Value::String(text) if text.contains(NUMBER) => value.clone(),
            Value::String(text) => {
                *left -= 1;
                Value::String(self.mark(id, text))
            }
            Value::Array(items) => Value::Array(items.iter().map(|item| self.arguments(id, item, left)).collect()),
            Value::Object(entries) => {
                let mut copy = Map::new();
                for (key, value) in entries {
                    let value = self.arguments(id, value, left);
                    let key = if *left > 0 { self.mark(id, key) } else { key.clone() };
                    *left = left.saturating_sub(1);
                    copy.insert(key, value);
                }
                Value::Object(copy)
            }
            _ => value.clone(),
        }
    }

    fn tools(&mut self, tools: &Value) -> Value {
        let mut tools = tools.clone();
        for tool in tools.as_array_mut().into_iter().flatten() {
            let id = self.add(None, TextKind::Tool);
            if let Some(Value::String(name)) = function_of(tool).and_then(|function| function.get_mut("name")) {
                *name = self.mark(id, name);
            }
        }
        tools
    }

    /// The first wanted text that is not in `plain`, a rendering or a part of one. `marks` are the
    /// marks in it, if they can be relied on.
    pub(crate) fn left_out(
        &self,
        plain: &str,
        marks: Option<&[(usize, usize)]>,
        wanted: &dyn Fn(&Text) -> bool,
    ) -> Option<&Text> {
        let Some(marks) = marks else {
            return self
                .texts
                .iter()
                .find(|text| wanted(text) && !text.pieces.iter().all(|piece| occurs(plain, piece)));
        };
        let mut seen = vec![0; self.texts.len()];
        for (_, id) in marks {
            if let Some(seen) = seen.get_mut(*id) {
                *seen += 1;
            }
        }
        self.texts.iter().zip(seen).find(|(text, seen)| wanted(text) && *seen < text.marks).map(|(text, _)| text)
    }

    /// The byte range of each message's content in a rendering, with its white space if that is
    /// there. `None`: it is not known, as for a message that has more than a text. `messages` are
    /// those without marks.
    pub(crate) fn content_places(&self, messages: &[Value], found: &Found) -> Vec<Option<Range<usize>>> {
        let mut places: Vec<Option<Range<usize>>> = vec![None; self.messages.len()];
        let mut of_message = vec![0usize; self.messages.len()];
        for text in &self.texts {
            if let Some(message) = text.message {
                of_message[message] += 1;
            }
        }
        let mut borders: Vec<Option<(usize, usize, usize)>> = vec![None; self.texts.len()];
        for (place, id) in &found.marks {
            match borders.get_mut(*id) {
                Some(Some((_, last, count))) => (*last, *count) = (*place, *count + 1),
                Some(empty) => *empty = Some((*place, *place, 1)),
                None => {}
            }
        }
        for (text, borders) in self.texts.iter().zip(borders) {
            let (Some(message), Some((first, last, count))) = (text.message, borders) else { continue };
            let [piece] = &text.pieces[..] else { continue };
            // The content must be written once, and be all that the message has.
            if of_message[message] != 1 || text.kind != TextKind::Content || count != text.marks {
                continue;
            }
            let first_word = piece.split(char::is_whitespace).next().unwrap_or_default();
            let last_word = piece.rsplit(char::is_whitespace).next().unwrap_or_default();
            let end = if text.marks == 1 { last } else { last + last_word.len() };
            let Some(start) = first.checked_sub(first_word.len()) else { continue };
            let content = messages.get(message).and_then(|it| it["content"].as_str()).unwrap_or_default();
            let (Some(before), Some(behind)) = (found.text.get(..start), found.text.get(end..)) else { continue };
            if found.text.get(start..end).is_some_and(|there| there == piece) {
                let leading = &content[..content.len() - content.trim_start_matches(is_space).len()];
                let trailing = &content[content.trim_end_matches(is_space).len()..];
                let start = before.strip_suffix(leading).unwrap_or(before).len();
                let end = end + if behind.starts_with(trailing) { trailing.len() } else { 0 };
                places[message] = Some(start..end);
            }
        }
        places
    }
}

/// Reasoning that a message has under a key of its own.
pub(crate) fn reasoning(message: &Map<String, Value>) -> Option<&str> {
    let first = REASONING_KEYS.iter().filter_map(|key| message.get(*key)).find(|value| !value.is_null())?;
    first.as_str().filter(|text| !text.trim().is_empty())
}

/// The object with the name of a call or tool. In OpenAI's form it is under `function`, in others
/// it is the value itself.
fn function_of(value: &mut Value) -> Option<&mut Map<String, Value>> {
    let object = value.as_object_mut()?;
    if object.get("function").is_some_and(Value::is_object) {
        return object.get_mut("function").and_then(Value::as_object_mut);
    }
    Some(object)
}

/// The byte ranges of the parts of a content. Reasoning and answer of an assistant are parts of
/// their own, and any other content is one part. The tags belong to none.
fn sections(text: &str, kind: TextKind, is_assistant: bool) -> Vec<(TextKind, Range<usize>)> {
    let Some((end, open, close)) = first_closed(text).filter(|_| is_assistant) else {
        return vec![(kind, 0..text.len())];
    };
    let answer = (kind, end + close.len()..text.len());
    match text[..end].find(open) {
        Some(start) => vec![(kind, 0..start), (TextKind::Reasoning, start + open.len()..end), answer],
        None => vec![(TextKind::Reasoning, 0..end), answer],
    }
}

/// The byte where the first closing tag of reasoning stands, and its tags.
pub(crate) fn first_closed(text: &str) -> Option<(usize, &'static str, &'static str)> {
    REASONING.iter().filter_map(|(open, close)| Some((text.find(close)?, *open, *close))).min()
}

/// Whether an assistant's content has reasoning in it.
pub(crate) fn has_reasoning(content: &str) -> bool {
    REASONING.iter().any(|(_, close)| content.contains(close))
}

/// Writes what stands between sections, which is nothing or a tag. With `hide`, a mark in the tag
/// keeps a template from recognizing it.
fn push_tag(out: &mut String, tag: &str, hide: bool) {
    match tag.char_indices().nth(1) {
        Some((second, _)) if hide => {
            out.push_str(&tag[..second]);
            out.push(HIDE);
            out.push_str(&tag[second..]);
        }
        _ => out.push_str(tag),
    }
}

/// The byte behind the first word of a text, and the byte before its last if that is another word.
fn word_borders(text: &str) -> Option<(usize, Option<usize>)> {
    let body = text.trim_matches(is_space);
    if body.is_empty() {
        return None;
    }
    let start = text.len() - text.trim_start_matches(is_space).len();
    let Some(first) = body.find(char::is_whitespace) else { return Some((start + body.len(), None)) };
    let last = body.char_indices().rev().find(|(_, character)| character.is_whitespace());
    let last = last.map_or(body.len(), |(place, character)| place + character.len_utf8());
    Some((start + first, Some(start + last)))
}

fn push_mark(out: &mut String, id: usize) {
    out.push(OPEN);
    for digit in format!("{id:x}").chars().filter_map(|digit| digit.to_digit(16)) {
        out.extend(char::from_u32(ZERO + digit));
    }
    out.push(CLOSE);
}

/// Whether a text holds characters that marks are made of, so that it cannot be marked.
pub(crate) fn has_mark(text: &str) -> bool {
    text.contains(|character: char| matches!(character, OPEN..=HIDE))
}

/// Takes the marks out of a rendering. A mark that was torn stays in the text, so that it differs
/// from the rendering without marks.
pub(crate) fn take_marks(marked: &str) -> Found {
    // Some templates write JSON in ASCII, with marks as escapes.
    let unescaped;
    let marked = if marked.contains("\\ufd") {
        let mut text = marked.to_owned();
        for code in u32::from(OPEN)..=u32::from(HIDE) {
            let character = char::from_u32(code).map(String::from).unwrap_or_default();
            text = text.replace(&format!("\\u{code:04x}"), &character);
        }
        unescaped = text;
        unescaped.as_str()
    } else {
        marked
    };
    let mut found = Found { text: String::with_capacity(marked.len()), marks: Vec::new() };
    let mut rest = marked;
    while let Some(start) = rest.find([OPEN, HIDE]) {
        found.text.push_str(&rest[..start]);
        rest = &rest[start..];
        if let Some(after) = rest.strip_prefix(HIDE) {
            rest = after;
            continue;
        }
        let inner = &rest[OPEN.len_utf8()..];
        let digits =
            inner.find(|character: char| !matches!(u32::from(character), ZERO..=0xFDE9)).unwrap_or(inner.len());
        let id = inner[..digits]
            .chars()
            .fold(0usize, |id, digit| id.wrapping_mul(16).wrapping_add((u32::from(digit) - ZERO) as usize));
        match inner[digits..].strip_prefix(CLOSE) {
            Some(after) => {
                found.marks.push((found.text.len(), id));
                rest = after;
            }
            None => {
                found.text.push(OPEN);
                rest = inner;
            }
        }
    }
    found.text.push_str(rest);
    found
}

/// Whether a text stands in a rendering, as it is or within a JSON string.
pub(crate) fn occurs(rendering: &str, text: &str) -> bool {
    if rendering.contains(text) {
        return true;
    }
    let escaped = Value::from(text).to_string();
    rendering.contains(&escaped[1..escaped.len() - 1])
}

/// Whether the contents of messages stand in a rendering one behind the other. This is the quick
/// way to know that nothing was left out. It is for conversations of plain texts, none of which is
/// so short that it may stand there by chance.
pub(crate) fn plainly_there(messages: &[Value], tools: Option<&Value>, rendering: &str) -> bool {
    /// A text of so many bytes does not stand in a rendering by chance.
    const LONG: usize = 12;
    let mut place = 0;
    tools.is_none()
        && messages.iter().all(|message| {
            let Some(object) = message.as_object() else { return false };
            let Some(content) = object.get("content").and_then(Value::as_str) else { return false };
            let content = content.trim_matches(is_space);
            let is_plain = !object.contains_key("tool_calls") && reasoning(object).is_none() && !has_reasoning(content);
            if !is_plain || content.len() < LONG {
                return is_plain && content.is_empty();
            }
            match rendering[place..].find(content) {
                Some(start) => {
                    place += start + content.len();
                    true
                }
                None => false,
            }
        })
}

#[cfg(test)]
mod tests;
