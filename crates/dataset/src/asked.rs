//! A conversation that a model is to answer. It is read as a row of messages is: the model is asked in the words that it
//! was trained on, and nothing is left out without a word.

use finetune_recipe::Format;
use serde_json::{Map, Value};

use crate::chat;
use crate::error::DatasetError;
use crate::failure::Failure;
use crate::problem::RowProblem;
use crate::row;
use crate::tokenizer::ChatTokenizer;

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
}

fn in_conversation(problem: RowProblem) -> DatasetError {
    DatasetError::Conversation(Box::new(problem))
}
