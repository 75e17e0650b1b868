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
    /// Counts a trained part. White space may follow its end, as in most templates.
    pub(crate) fn add(&mut self, part: &[u32], tokenizer: &ChatTokenizer) -> Result<(), DatasetError> {
        self.parts += 1;
        let mut end = None;
        for id in part.iter().rev() {
            if tokenizer.is_special(*id) {
                // Of several, the first that the model's own files name as an end. If they name
                // none of them, the last.
                if tokenizer.eos_ids().contains(id) || end.is_none() {
                    end = Some(*id);
                }
            } else if !tokenizer.decode(&[*id], false)?.trim().is_empty() {
                break;
            }
        }
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
            let opening = tokenizer.and_then(ChatTokenizer::next_turn_end).map_or_else(String::new, |name| {
                format!(
                    ". The chat template ends an answer with {name} of the next turn, which is no part of the answer; \
                     train_on = \"all\" trains it where another turn follows"
                )
            });
            notices.push(format!(
                "{} of {} answers end in no special token of this tokenizer, the first with {shown:?}: the model does not \
                 learn to stop there{opening}",
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

    /// The token that opens the turn behind an answer, where the model's files name it as an end and the
    /// template writes none of its own (GLM-4).
    fn next_turn_end(&self) -> Option<String> {
        let next = self.behind_answer(&[message("user", "Bye")]).filter(|id| self.eos_ids().contains(id))?;
        let is_own = self.template_end().is_some_and(|end| self.eos_ids().contains(&end));
        if is_own { None } else { self.id_to_token(next) }
    }

    /// The special token that the template writes behind an answer which these messages follow.
    fn behind_answer(&self, next: &[Value]) -> Option<u32> {
        const ANSWER: &str = "Hello";
        let messages = [&[message("user", "Hi"), message("assistant", ANSWER)], next].concat();
        let text = self.render(&messages, None, false).ok()?.text;
        let behind = text.get(text.rfind(ANSWER)? + ANSWER.len()..)?;
        self.encode_chat(behind).ok()?.first().copied().filter(|id| self.is_special(*id))
    }
}

impl From<EndCounts> for Ends {
    fn from(counted: EndCounts) -> Self {
        Self { tokens: counted.tokens.into_iter().collect(), without: counted.without, parts: counted.parts }
    }
}
