//! How answers end: the token that a model learns to stop with.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::error::DatasetError;
use crate::tokenizer::ChatTokenizer;

/// How the trained parts of chats end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// Special tokens that end a trained part, ascending.
    pub tokens: Vec<u32>,
    /// Trained parts that end in no special token.
    pub without: usize,
    /// All trained parts.
    pub parts: usize,
}

/// Tokens that open the next turn, where answers end with them: GLM's templates write nothing
/// behind an answer, and the model stops when it comes to `<|user|>` or `<|observation|>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NextTurn {
    pub(crate) behind_answer: u32,
    pub(crate) behind_call: Option<u32>,
}

/// The most tokens of an end that a notice shows.
const SHOWN: usize = 12;

/// Ends, counted over one row or over many.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct EndCounts {
    tokens: BTreeSet<u32>,
    without: usize,
    parts: usize,
    /// The end of the first part that has no special token.
    first_without: Option<String>,
}

impl EndCounts {
    /// Counts a trained part with its end.
    pub(crate) fn add(
        &mut self,
        part: &[u32],
        end: Option<u32>,
        tokenizer: &ChatTokenizer,
    ) -> Result<(), DatasetError> {
        self.parts += 1;
        match end {
            Some(id) => {
                self.tokens.insert(id);
            }
            None => {
                self.without += 1;
                if self.first_without.is_none() {
                    let shown = &part[part.len().saturating_sub(SHOWN)..];
                    self.first_without = Some(tokenizer.decode(shown, false)?);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn join(&mut self, other: Self) {
        self.tokens.extend(other.tokens);
        self.without += other.without;
        self.parts += other.parts;
        if self.first_without.is_none() {
            self.first_without = other.first_without;
        }
    }

    /// What a person should know about them.
    pub(crate) fn notices(&self, tokenizer: Option<&ChatTokenizer>) -> Vec<String> {
        let mut notices = Vec::new();
        if self.without > 0 {
            let shown = self.first_without.as_deref().unwrap_or_default();
            notices.push(format!(
                "{} of {} answers end in no special token of this tokenizer, the first with {shown:?}: the model does not \
                 learn to stop there",
                self.without, self.parts
            ));
        }
        let Some(tokenizer) = tokenizer else { return notices };
        let unknown = self.tokens.iter().filter(|id| !tokenizer.eos_ids().contains(id));
        let names: Vec<String> =
            unknown.map(|id| tokenizer.id_to_token(*id).unwrap_or_else(|| id.to_string())).collect();
        if !names.is_empty() {
            notices.push(format!(
                "answers end with {}, which the files of the base model name as no end: the results of a run name it in \
                 generation_config.json, and a program that reads the base's instead does not stop there",
                names.join(", ")
            ));
        }
        notices
    }
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

impl ChatTokenizer {
    /// The special token that the chat template writes behind an answer. `None`: there is no
    /// template, it does not take a question with its answer, or it writes something else there.
    pub fn template_end(&self) -> Option<u32> {
        self.behind_answer(&[])
    }

    /// The special token that a trained part ends with. White space may follow it, as in most
    /// templates.
    pub(crate) fn end_of(&self, part: &[u32]) -> Result<Option<u32>, DatasetError> {
        let mut end = None;
        for id in part.iter().rev() {
            if self.is_special(*id) {
                // Of several, the first that the model's own files name as an end. If they name
                // none of them, the last.
                if self.eos_ids().contains(id) || end.is_none() {
                    end = Some(*id);
                }
            } else if !self.decode(&[*id], false)?.trim().is_empty() {
                break;
            }
        }
        Ok(end)
    }

    /// The tokens of the next turn that answers end with. `None`: the template writes an end of its
    /// own behind an answer, or the model's files do not name that token as an end.
    pub(crate) fn next_turn(&self) -> Option<NextTurn> {
        let is_end = |id: &u32| self.eos_ids().contains(id);
        let has_own = self.template_end().is_some_and(|end| is_end(&end));
        let behind_answer = self.behind_answer(&[message("user", "Bye")]).filter(is_end).filter(|_| !has_own)?;
        Some(NextTurn { behind_answer, behind_call: self.behind_call().filter(is_end) })
    }

    /// The special token that the template writes behind a call whose result follows.
    fn behind_call(&self) -> Option<u32> {
        const ID: &str = "call00001";
        let function = json!({"name": "look", "arguments": {"at": "it"}});
        let calls = json!([{"type": "function", "id": ID, "function": function}]);
        let call = json!({"role": "assistant", "content": "", "tool_calls": calls});
        let result = json!({"role": "tool", "content": "Hello", "tool_call_id": ID, "name": "look"});
        let messages = [message("user", "Hi"), call, result];
        let text = self.render(&messages[..2], None, false).ok()?.text;
        let with_result = self.render(&messages, None, false).ok()?.text;
        self.first_special(with_result.strip_prefix(&text)?)
    }

    /// The special token that the template writes behind an answer which these messages follow.
    fn behind_answer(&self, next: &[Value]) -> Option<u32> {
        const ANSWER: &str = "Hello";
        let messages = [&[message("user", "Hi"), message("assistant", ANSWER)], next].concat();
        let text = self.render(&messages, None, false).ok()?.text;
        let behind = text.get(text.rfind(ANSWER)? + ANSWER.len()..)?;
        self.first_special(behind)
    }

    /// The special token that a text begins with.
    fn first_special(&self, text: &str) -> Option<u32> {
        self.encode_chat(text).ok()?.first().copied().filter(|id| self.is_special(*id))
    }
}

impl From<EndCounts> for Ends {
    fn from(counted: EndCounts) -> Self {
        Self { tokens: counted.tokens.into_iter().collect(), without: counted.without, parts: counted.parts }
    }
}
