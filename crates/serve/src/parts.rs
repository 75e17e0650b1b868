//! What of an answer is reasoning, what text, and what calls of tools, as it comes.

use finetune_dataset::{REASONING_TAGS, Reasoning};

use crate::harmony::HarmonyReader;
use crate::tool_calls::{CallReader, ToolCall};

/// What may be shown of an answer. Empty texts stand for nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Parts {
    pub(crate) reasoning: String,
    pub(crate) text: String,
    pub(crate) calls: Vec<ToolCall>,
}

/// Takes an answer apart. `marking.rs` says which reader a model's answers need.
pub(crate) enum PartReader {
    /// Reasoning between tags, then text and calls.
    Tagged(TaggedReader),
    /// Messages with channels.
    Harmony(HarmonyReader),
}

impl PartReader {
    pub(crate) fn push(&mut self, new: &str) -> Parts {
        match self {
            PartReader::Tagged(reader) => reader.push(new),
            PartReader::Harmony(reader) => reader.push(new),
        }
    }

    /// What was held back, once nothing more comes.
    pub(crate) fn finish(self) -> Parts {
        match self {
            PartReader::Tagged(reader) => reader.finish(),
            PartReader::Harmony(reader) => reader.finish(),
        }
    }
}

/// Takes an answer apart that may begin with reasoning between tags.
pub(crate) struct TaggedReader {
    reasoning: Reasoning,
    /// `None`: there are no tools.
    calls: Option<CallReader>,
    /// White space at the end of the reasoning so far, which goes if the reasoning ends.
    space: String,
    has_reasoning: bool,
    /// All of the reasoning so far is white space.
    is_blank: bool,
    has_text: bool,
}

impl TaggedReader {
    /// `opened`: what the template has put in front of the answer, from a tag of reasoning on.
    pub(crate) fn new(opened: Option<&str>, calls: Option<CallReader>) -> TaggedReader {
        TaggedReader {
            reasoning: Reasoning::new(opened),
            calls,
            space: String::new(),
            has_reasoning: opened.is_some(),
            is_blank: true,
            has_text: false,
        }
    }

    fn push(&mut self, new: &str) -> Parts {
        let mut parts = Parts::default();
        for (text, is_reasoning) in self.reasoning.push(new) {
            self.add(&text, is_reasoning, &mut parts);
        }
        parts
    }

    /// What was held back, once nothing more comes.
    fn finish(mut self) -> Parts {
        let mut parts = Parts::default();
        if let Some((text, is_reasoning)) = self.reasoning.finish() {
            self.add(&text, is_reasoning, &mut parts);
        }
        if let Some(calls) = self.calls.take() {
            let (text, calls) = calls.finish();
            parts.text += &text;
            parts.calls = calls;
        }
        parts
    }

    fn add(&mut self, text: &str, is_reasoning: bool, parts: &mut Parts) {
        if is_reasoning {
            parts.reasoning += &self.within_tags(text);
            return;
        }
        // Templates put empty lines between reasoning and text.
        let text = if self.has_reasoning && !self.has_text { text.trim_start() } else { text };
        self.has_text |= !text.is_empty();
        match &mut self.calls {
            Some(calls) => parts.text += &calls.push(text),
            None => parts.text += text,
        }
    }

    /// A piece of the reasoning without its tags and the white space beside them. Each tag is whole
    /// in one piece.
    fn within_tags(&mut self, text: &str) -> String {
        let is_first = !self.has_reasoning;
        self.has_reasoning = true;
        let mut opening = REASONING_TAGS.iter().filter(|_| is_first);
        let text = opening.find_map(|(open, _)| text.trim_start().strip_prefix(open)).unwrap_or(text);
        let closed = REASONING_TAGS.iter().find_map(|(_, close)| text.strip_suffix(close));
        let text = std::mem::take(&mut self.space) + closed.unwrap_or(text);
        let end = text.trim_end().len();
        if closed.is_none() {
            self.space = text[end..].to_owned();
        }
        let text = &text[..end];
        // Nothing was shown yet if all so far is white space.
        match self.is_blank {
            true => {
                let text = text.trim_start();
                self.is_blank = text.is_empty();
                text.to_owned()
            }
            false => text.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::call_formats::formats;
    use crate::tool_calls::Tools;

    fn read(opened: Option<&str>, with_tools: bool, answer: &str) -> (String, String, usize) {
        let calls = with_tools.then(|| CallReader::new(formats(str::is_empty), Tools::new(json!([]))));
        let mut reader = TaggedReader::new(opened, calls);
        let mut all = Parts::default();
        for letter in answer.chars() {
            let parts = reader.push(&letter.to_string());
            all.reasoning += &parts.reasoning;
            all.text += &parts.text;
        }
        let parts = reader.finish();
        (all.reasoning + &parts.reasoning, all.text + &parts.text, parts.calls.len())
    }

    #[test]
    fn reasoning_text_and_calls() {
        let call = "<tool_call>{\"name\": \"now\"}</tool_call>";
        for (opened, with_tools, answer, want) in [
            (None, false, "Hello".to_owned(), ("", "Hello", 0)),
            (None, false, "<think>\nhm, hm\n</think>\n\nHello\n".to_owned(), ("hm, hm", "Hello\n", 0)),
            (Some("<think>\n"), false, "hm\n</think>\n\nHello".to_owned(), ("hm", "Hello", 0)),
            (None, false, "<think>\n\n</think>\n\nHello".to_owned(), ("", "Hello", 0)),
            (None, false, "<think>never done ".to_owned(), ("never done", "", 0)),
            (None, false, "<|channel>thought\nhm\n<channel|>Hello".to_owned(), ("hm", "Hello", 0)),
            (None, false, format!("Hello {call}"), ("", &format!("Hello {call}"), 0)),
            (None, true, format!("Hello {call}"), ("", "Hello ", 1)),
            (None, true, format!("<think>hm</think>\n\n{call}"), ("hm", "", 1)),
        ] {
            let (reasoning, text, calls) = read(opened, with_tools, &answer);
            assert_eq!((reasoning.as_str(), text.as_str(), calls), want, "{answer}");
        }
    }
}
