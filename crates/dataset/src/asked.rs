//! A conversation that a model is to answer. It is read as a row of messages is: the model is asked in the words that it
//! was trained on, and nothing is left out without a word.

use finetune_recipe::Format;
use serde_json::{Map, Value};

use crate::chat;
use crate::error::DatasetError;
use crate::failure::Failure;
use crate::messages::TrainingFlags;
use crate::problem::RowProblem;
use crate::row::{self, Chat};
use crate::tokenizer::ChatTokenizer;
use crate::variants;

/// The most texts of a conversation times their bytes, if texts in parts are not to be joined: each may be looked for in
/// the whole rendering, which takes a second at this size.
const MOST_LOOKED_THROUGH: u64 = 1 << 33;

/// A conversation as the chat template takes it: what [`ChatTokenizer::render_with`] is given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Asked {
    /// Its messages.
    pub messages: Vec<Value>,
    /// The tools that may be called.
    pub tools: Option<Value>,
    /// Further variables of the template.
    pub variables: Vec<(String, Value)>,
    /// Keys that have no use here.
    pub unused: Vec<String>,
}

impl ChatTokenizer {
    /// The conversation of an object with `messages`. Beside them may stand what a row has: `tools`, `system`,
    /// `documents`, `chat_template_kwargs`.
    ///
    /// # Errors
    /// [`DatasetError::Conversation`] for a message that cannot be, or that the template leaves out. Otherwise as
    /// [`Self::render`].
    pub fn read_asked(&self, mut object: Map<String, Value>) -> Result<Asked, DatasetError> {
        let template = self.template()?;
        let mut unused = row::unused(&object, Format::Messages);
        let asked = row::asked(&mut object, &mut unused);
        let asked = asked.map_err(|problem| in_conversation(row::in_format(problem, Format::Messages)))?;
        let messages = chat::taken_form(template, &asked).map_err(|failure| match failure {
            Failure::All(error) => error,
            Failure::Row(RowProblem::Template(problem)) => DatasetError::Template(problem),
            Failure::Row(problem) | Failure::ZeroLabel(problem) => in_conversation(problem),
        })?;
        Ok(Asked { messages, tools: asked.tools, variables: asked.variables, unused })
    }

    /// These messages with their texts in parts as those of a row: in parts if the chat template takes them, otherwise
    /// joined. What else the template leaves out is not refused here, and very long conversations are joined.
    ///
    /// # Errors
    /// [`DatasetError::NoTemplate`], [`DatasetError::TemplateBounds`].
    pub fn with_parts_taken(
        &self,
        messages: Vec<Value>,
        variables: &[(String, Value)],
    ) -> Result<Vec<Value>, DatasetError> {
        if !messages.iter().any(|message| message["content"].is_array()) {
            return Ok(messages);
        }
        let (texts, bytes) = messages.iter().map(texts_in).fold((0, 0), both);
        if texts * bytes > MOST_LOOKED_THROUGH {
            return Ok(variants::joined(&messages));
        }
        let count = messages.len();
        let asked = Chat {
            messages,
            training: vec![TrainingFlags::default(); count],
            lists: vec![("messages", count)],
            tools: None,
            variables: variables.to_vec(),
            trained_from: 0,
        };
        match chat::taken_form(self.template()?, &asked) {
            Ok(messages) => Ok(messages),
            Err(Failure::All(error)) => Err(error),
            Err(_) => Ok(variants::joined(&asked.messages)),
        }
    }
}

/// The texts and other values within a value, and the bytes of the texts.
fn texts_in(value: &Value) -> (u64, u64) {
    match value {
        Value::String(text) => (1, text.len() as u64),
        Value::Array(items) => items.iter().map(texts_in).fold((0, 0), both),
        Value::Object(entries) => entries.values().map(texts_in).fold((0, 0), both),
        Value::Null | Value::Bool(_) | Value::Number(_) => (1, 0),
    }
}

fn both((texts, bytes): (u64, u64), (more_texts, more_bytes): (u64, u64)) -> (u64, u64) {
    (texts + more_texts, bytes + more_bytes)
}

fn in_conversation(problem: RowProblem) -> DatasetError {
    DatasetError::Conversation(Box::new(problem))
}
