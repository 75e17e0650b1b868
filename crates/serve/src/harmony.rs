//! The answers of gpt-oss: messages, each with a channel (OpenAI's Harmony).
//!
//! `<|channel|>analysis<|message|>reasoning<|end|><|start|>assistant<|channel|>final<|message|>text<|return|>`, and calls
//! as `<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>`; its template has the receiver
//! in front of the channel.

use finetune_dataset::beginning;
use serde_json::Value;

use crate::parts::Parts;
use crate::tool_calls::{ToolCall, Tools};

pub(crate) const START: &str = "<|start|>";
pub(crate) const CHANNEL: &str = "<|channel|>";
pub(crate) const CONSTRAIN: &str = "<|constrain|>";
pub(crate) const MESSAGE: &str = "<|message|>";
pub(crate) const END: &str = "<|end|>";
/// The tokens that end an answer, a call, and a message that others follow.
pub(crate) const LAST: [&str; 2] = ["<|return|>", "<|call|>"];
/// All marks. They are special tokens.
pub(crate) const MARKS: [&str; 7] = [START, CHANNEL, CONSTRAIN, MESSAGE, END, LAST[0], LAST[1]];
/// What ends a message. Some answers leave out the end before the next one.
const ENDS: [&str; 5] = [END, LAST[0], LAST[1], START, CHANNEL];
/// What a message may begin with.
const HEADS: [&str; 4] = [START, CHANNEL, MESSAGE, "to="];
/// Who answers.
const ROLE: &str = "assistant";
/// Bytes of a header. Longer ones are text.
const LONGEST_HEADER: usize = 500;
/// What stands in front of the name of a tool.
pub(crate) const FUNCTIONS: &str = "functions.";

/// Whether a model's template writes messages with channels.
pub(crate) fn is_written(template_has: impl Fn(&str) -> bool) -> bool {
    [CHANNEL, MESSAGE, START].into_iter().all(template_has)
}

/// The header of the answer's first message that a prompt ends with: what stands behind its last `<|start|>`.
pub(crate) fn opened_by(prompt: &str) -> Option<&str> {
    let start = prompt.rfind(START)? + START.len();
    let header = &prompt[start..];
    (!header.contains(END) && !LAST.iter().any(|mark| header.contains(mark))).then_some(header)
}

/// What a message is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Text,
    /// Of a tool of this name.
    Call(String),
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Until `<|message|>`. `has_role`: it has been said who answers.
    Header {
        has_role: bool,
    },
    Body(Kind),
}

/// Takes an answer apart as it comes.
#[derive(Debug)]
pub(crate) struct HarmonyReader {
    state: State,
    /// `None`: there are no tools.
    tools: Option<Tools>,
    held: String,
    /// Whether there has been reasoning, and text. Messages of the same kind are lines of their own.
    has: [bool; 2],
    /// A line has to end before more of this kind comes.
    breaks: bool,
}

impl HarmonyReader {
    /// `opened`: the header that the prompt has put in front of the answer.
    pub(crate) fn new(opened: Option<&str>, tools: Option<Tools>) -> HarmonyReader {
        let opened = opened.unwrap_or_default();
        let header = opened.strip_prefix(ROLE).unwrap_or(opened);
        let mut reader = HarmonyReader {
            state: State::Header { has_role: true },
            tools,
            held: String::new(),
            has: [false; 2],
            breaks: false,
        };
        // It is read as if the answer had it, and what is behind it is not shown.
        reader.push(header);
        reader
    }

    pub(crate) fn push(&mut self, new: &str) -> Parts {
        self.held += new;
        let mut parts = Parts::default();
        while self.step(&mut parts) {}
        parts
    }

    /// What was held back, once nothing more comes.
    pub(crate) fn finish(mut self) -> Parts {
        let mut parts = Parts::default();
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Header { has_role: true }) {
            State::Body(kind) => self.add(&kind, &held, &mut parts),
            // Only a header that is no text has marks or a receiver.
            State::Header { .. } if !HEADS.iter().any(|head| held.trim_start().starts_with(head)) => {
                self.add(&Kind::Text, &held, &mut parts);
            }
            State::Header { .. } => {}
        }
        parts
    }

    /// Reads on. False: more has to come.
    fn step(&mut self, parts: &mut Parts) -> bool {
        match &self.state {
            State::Header { has_role } => {
                let has_role = *has_role;
                self.step_header(has_role)
            }
            State::Body(kind) => {
                let kind = kind.clone();
                self.step_body(&kind, parts)
            }
        }
    }

    fn step_header(&mut self, has_role: bool) -> bool {
        let text = self.held.trim_start();
        if let Some(rest) = text.strip_prefix(START) {
            self.held = rest.to_owned();
            self.state = State::Header { has_role: false };
            return true;
        }
        if !has_role {
            if let Some(rest) = text.strip_prefix(ROLE) {
                self.held = rest.to_owned();
                self.state = State::Header { has_role: true };
                return true;
            }
            if ROLE.starts_with(text) {
                return false;
            }
        }
        let is_header = HEADS.iter().any(|head| text.starts_with(head) || head.starts_with(text));
        if !is_header || text.len() > LONGEST_HEADER && !text.contains(MESSAGE) {
            // A model that was trained in another way.
            self.state = State::Body(Kind::Text);
            return true;
        }
        let Some((header, rest)) = text.split_once(MESSAGE) else { return false };
        let kind = self.kind(header);
        self.held = rest.to_owned();
        self.breaks = true;
        self.state = State::Body(kind);
        true
    }

    fn step_body(&mut self, kind: &Kind, parts: &mut Parts) -> bool {
        let end = ENDS.iter().filter_map(|mark| Some((self.held.find(mark)?, *mark))).min_by_key(|(place, _)| *place);
        let Some((place, mark)) = end else {
            // The arguments of a call are read once they are there.
            if !matches!(kind, Kind::Call(_)) {
                let keep = ENDS.iter().map(|mark| beginning(&self.held, mark)).max().unwrap_or(0);
                let rest = self.held.split_off(self.held.len() - keep);
                let text = std::mem::replace(&mut self.held, rest);
                self.add(kind, &text, parts);
            }
            return false;
        };
        let mut rest = self.held.split_off(place);
        let text = std::mem::take(&mut self.held);
        self.add(kind, &text, parts);
        // The beginning of the next message is its own.
        if ![START, CHANNEL].contains(&mark) {
            rest.drain(..mark.len());
        }
        self.held = rest;
        self.state = State::Header { has_role: true };
        true
    }

    /// Adds text of a message. That of a call is all of it.
    fn add(&mut self, kind: &Kind, text: &str, parts: &mut Parts) {
        if let Kind::Call(name) = kind
            && let Some(arguments) = arguments(text)
        {
            parts.calls.push(ToolCall::new(name, arguments));
            return;
        }
        if text.is_empty() {
            return;
        }
        let is_reasoning = *kind == Kind::Reasoning;
        let of_kind = if is_reasoning { &mut parts.reasoning } else { &mut parts.text };
        if std::mem::take(&mut self.breaks) && self.has[usize::from(is_reasoning)] {
            of_kind.push('\n');
        }
        self.has[usize::from(is_reasoning)] = true;
        *of_kind += text;
    }

    /// What a message with this header is.
    fn kind(&self, header: &str) -> Kind {
        let behind = |mark: &str| header.split_once(mark).map_or("", |(_, rest)| rest);
        let word = |text: &str| {
            let end = text.find(|letter: char| letter.is_whitespace() || letter == '<').unwrap_or(text.len());
            text[..end].to_owned()
        };
        let (channel, receiver) = (word(behind(CHANNEL)), word(behind("to=")));
        let name = receiver.strip_prefix(FUNCTIONS);
        match (&self.tools, name) {
            (Some(_), Some(name)) if !name.is_empty() => Kind::Call(name.to_owned()),
            (Some(tools), None) if tools.has(&receiver) => Kind::Call(receiver.clone()),
            // Tools of the model's own, which nobody answers.
            (_, None) if !receiver.is_empty() && receiver != ROLE => Kind::Reasoning,
            _ if channel == "analysis" => Kind::Reasoning,
            _ => Kind::Text,
        }
    }
}

/// The arguments of a call as JSON, if they are.
fn arguments(text: &str) -> Option<String> {
    let value: Value = serde_json::from_str(text.trim()).ok()?;
    value.is_object().then(|| value.to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    type Read = (String, String, Vec<(String, String)>);

    fn read<'a>(opened: Option<&str>, with_tools: bool, pieces: impl Iterator<Item = &'a str>) -> Read {
        let tools = json!([{"type": "function", "function": {"name": "weather"}}]);
        let mut reader = HarmonyReader::new(opened, with_tools.then(|| Tools::new(tools)));
        let mut all = Parts::default();
        let mut add = |parts: Parts| {
            all.reasoning += &parts.reasoning;
            all.text += &parts.text;
            all.calls.extend(parts.calls);
        };
        pieces.for_each(|piece| add(reader.push(piece)));
        add(reader.finish());
        (all.reasoning, all.text, all.calls.into_iter().map(|call| (call.name, call.arguments)).collect())
    }

    /// Whole, letter by letter, and cut at each place the answer reads the same.
    fn expect(opened: Option<&str>, with_tools: bool, answer: &str, want: &Read) {
        assert_eq!(read(opened, with_tools, [answer].into_iter()), *want, "{answer}");
        let letters: Vec<String> = answer.chars().map(String::from).collect();
        assert_eq!(read(opened, with_tools, letters.iter().map(String::as_str)), *want, "by letters: {answer}");
        for (place, _) in answer.char_indices() {
            let (first, second) = answer.split_at(place);
            assert_eq!(read(opened, with_tools, [first, second].into_iter()), *want, "cut at {place}: {answer}");
        }
    }

    /// (the header in the prompt, with tools, answer, reasoning, text, calls)
    #[test]
    fn messages_by_their_channels() {
        let of_template = Some("assistant");
        let thought = "<|channel|>analysis<|message|>hm, hm<|end|><|start|>assistant";
        let call = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": \"Paris\"}";
        let paris = || vec![("weather".to_owned(), "{\"city\":\"Paris\"}".to_owned())];
        let plain = |text: &str| format!("{thought}<|channel|>final<|message|>{text}");
        for (opened, with_tools, answer, reasoning, text, calls) in [
            (of_template, false, plain("Hello"), "hm, hm", "Hello", vec![]),
            (of_template, false, plain("Hello<|return|>"), "hm, hm", "Hello", vec![]),
            (of_template, false, "<|channel|>final<|message|>a < b <| c".to_owned(), "", "a < b <| c", vec![]),
            (of_template, false, "<|channel|>analysis<|message|>never done".to_owned(), "never done", "", vec![]),
            (of_template, true, format!("{thought}{call}<|call|>"), "hm, hm", "", paris()),
            // `<|call|>` ends the answer, so that it is not seen.
            (of_template, true, format!("{thought}{call}"), "hm, hm", "", paris()),
            // As the template writes it.
            (
                of_template,
                true,
                " to=functions.weather<|channel|>commentary json<|message|>{\"city\": \"Paris\"}<|call|>".to_owned(),
                "",
                "",
                paris(),
            ),
            (of_template, true, call.replace("functions.", ""), "", "", paris()),
            // What the model says before it calls.
            (
                of_template,
                true,
                format!("<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant{call}"),
                "",
                "Let me see.",
                paris(),
            ),
            (of_template, true, format!("{call}<|call|><|start|>assistant{call}"), "", "", [paris(), paris()].concat()),
            // Two messages of a kind are two lines.
            (of_template, false, format!("{thought}{}", plain("Hi")), "hm, hm\nhm, hm", "Hi", vec![]),
            // The end is left out.
            (
                of_template,
                false,
                "<|channel|>analysis<|message|>hm<|channel|>final<|message|>Hi".to_owned(),
                "hm",
                "Hi",
                vec![],
            ),
            // The prompt has the header, or some of it.
            (Some("assistant<|channel|>final<|message|>"), false, "Hello".to_owned(), "", "Hello", vec![]),
            (Some("assistant<|channel|>"), false, "analysis<|message|>hm".to_owned(), "hm", "", vec![]),
            (None, false, format!("<|start|>assistant{}", plain("Hi")), "hm, hm", "Hi", vec![]),
            // Tools of the model's own are part of its thoughts.
            (of_template, true, "<|channel|>analysis to=python code<|message|>1 + 1".to_owned(), "1 + 1", "", vec![]),
            // Without tools, and cut off: text.
            (of_template, false, call.to_owned(), "", "{\"city\": \"Paris\"}", vec![]),
            (of_template, true, call[..call.len() - 3].to_owned(), "", "{\"city\": \"Pari", vec![]),
            // A model that was trained in another way.
            (of_template, false, "Hello there".to_owned(), "", "Hello there", vec![]),
            (of_template, false, "to".to_owned(), "", "to", vec![]),
            (of_template, false, String::new(), "", "", vec![]),
            (of_template, false, "<|channel|>ana".to_owned(), "", "", vec![]),
        ] {
            expect(opened, with_tools, &answer, &(reasoning.to_owned(), text.to_owned(), calls));
        }
    }

    #[test]
    fn headers_that_prompts_end_with() {
        for (prompt, want) in [
            ("<|start|>user<|message|>Hi<|end|><|start|>assistant", Some("assistant")),
            ("<|start|>assistant<|channel|>final<|message|>", Some("assistant<|channel|>final<|message|>")),
            ("<|start|>user<|message|>Hi<|end|>", None),
            ("Hi", None),
        ] {
            assert_eq!(opened_by(prompt), want, "{prompt}");
        }
    }
}
