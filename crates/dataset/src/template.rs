//! Chat templates: messages in, text out, the same text as transformers' `apply_chat_template` to the byte.
//!
//! A template comes from whoever published the model, so it runs bounded: a number of steps, a size of its text.

use std::io::{self, Write};
use std::ops::Range;

use minijinja::{Environment, Error, Value};

use crate::error::DatasetError;
use crate::{generation, python_methods, source};

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub text: String,
    /// Byte ranges of the `{% generation %}` blocks, in order of their ends; empty if the template has none.
    pub generation_spans: Vec<Range<usize>>,
}

/// A template's instructions per rendering. The largest published template takes under 100 per message and 10 more per pair
/// of messages, so a conversation of a thousand messages stays below 11 million.
const STEPS: u64 = 50_000_000;

/// Bytes of a rendered conversation: no row is longer than 16 MiB, and no template repeats it this often.
const LONGEST_TEXT: usize = 256 << 20;

/// Bytes of a template's source. The longest published one has 17 thousand.
pub(crate) const LONGEST_SOURCE: u64 = 1 << 20;

const NAME: &str = "chat_template";

pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    /// The file it came from, for messages.
    origin: String,
    /// `bos_token` and the like, as the template sees them.
    special_tokens: Vec<(String, String)>,
    pub(crate) has_generation: bool,
}

impl ChatTemplate {
    pub(crate) fn compile(
        source: &str,
        origin: String,
        special_tokens: Vec<(String, String)>,
    ) -> Result<Self, DatasetError> {
        let (source, has_generation) = source::rewrite(source);
        // minijinja keeps a template in its environment only if it borrows the source. Leaked: one per tokenizer, and a
        // process loads one tokenizer. Compiling for each rendering instead would double the time to load a dataset.
        let source: &'static str = Box::leak(source.into_boxed_str());
        let mut environment = Environment::new();
        // As `_compile_jinja_template` of transformers/utils/chat_template_utils.py sets up jinja2.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_formatter(python_methods::print);
        environment.set_fuel(Some(STEPS));
        python_methods::install(&mut environment);
        environment.add_function(generation::FUNCTION, generation::function);
        environment.add_template(NAME, source).map_err(|error| DatasetError::TemplateSyntax {
            origin: origin.clone(),
            line: error.line().unwrap_or(1),
            reason: reason(&error),
        })?;
        Ok(Self { environment, origin, special_tokens, has_generation })
    }

    /// `tools`: the list, or none. The marks of `generation.rs` must not occur in either.
    pub(crate) fn render(
        &self,
        messages: &[Value],
        tools: &Value,
        add_generation_prompt: bool,
    ) -> Result<Rendered, DatasetError> {
        let failed = |error: Error| DatasetError::Template {
            reason: format!(
                "the chat template ({}, line {}) stopped: {}",
                self.origin,
                error.line().unwrap_or(1),
                reason(&error)
            ),
        };
        let special_tokens = self.special_tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let variables: Value = special_tokens
            .chain([
                ("messages", Value::from(messages.to_vec())),
                ("tools", tools.clone()),
                ("documents", Value::from(())),
                ("add_generation_prompt", Value::from(add_generation_prompt)),
            ])
            .collect();
        let mut text = BoundedText(Vec::new());
        let template = self.environment.get_template(NAME).map_err(failed)?;
        template.render_captured_to(variables, &mut text).map_err(failed)?;
        let text = String::from_utf8(text.0)
            .map_err(|_| DatasetError::Template { reason: "the chat template wrote half a character".to_owned() })?;
        let (text, generation_spans) = generation::take_marks(text);
        Ok(Rendered { text, generation_spans })
    }
}

/// What went wrong, with the first cause: errors within macros come wrapped.
fn reason(error: &Error) -> String {
    let mut deepest: &dyn std::error::Error = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    match deepest.downcast_ref::<Error>() {
        Some(cause) => cause.detail().map_or_else(|| cause.kind().to_string(), str::to_owned),
        None => deepest.to_string(),
    }
}

struct BoundedText(Vec<u8>);

impl Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > LONGEST_TEXT {
            return Err(io::Error::other(format!("the rendered text exceeds {LONGEST_TEXT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Messages as a template sees them, with what transformers adds: reasoning under all of its names
/// (`_alias_reasoning_fields`), of which templates read one or another.
pub(crate) fn to_values(messages: &[serde_json::Value]) -> Result<Vec<Value>, DatasetError> {
    messages
        .iter()
        .map(|message| {
            refuse_marks(message)?;
            let reasoning = ["reasoning_content", "thinking", "reasoning"]
                .iter()
                .filter_map(|name| message.get(name))
                .find(|value| !value.is_null());
            let (Some(reasoning), Some(object)) = (reasoning, message.as_object()) else {
                return Ok(Value::from_serialize(message));
            };
            let mut aliased = serde_json::Map::new();
            aliased.insert("thinking".to_owned(), reasoning.clone());
            aliased.extend(object.iter().map(|(key, value)| (key.clone(), value.clone())));
            aliased.insert("reasoning_content".to_owned(), reasoning.clone());
            Ok(Value::from_serialize(aliased))
        })
        .collect()
}

pub(crate) fn tools_value(tools: Option<&serde_json::Value>) -> Result<Value, DatasetError> {
    match tools {
        Some(tools) => {
            refuse_marks(tools)?;
            Ok(Value::from_serialize(tools))
        }
        None => Ok(Value::from(())),
    }
}

fn refuse_marks(value: &serde_json::Value) -> Result<(), DatasetError> {
    let refused = match value {
        serde_json::Value::String(text) => generation::has_mark(text),
        serde_json::Value::Array(items) => return items.iter().try_for_each(refuse_marks),
        serde_json::Value::Object(entries) => {
            return entries.iter().try_for_each(|(key, value)| {
                refuse_marks(value)?;
                if generation::has_mark(key) { Err(marks_error()) } else { Ok(()) }
            });
        }
        _ => false,
    };
    if refused { Err(marks_error()) } else { Ok(()) }
}

fn marks_error() -> DatasetError {
    DatasetError::Template {
        reason: "the text holds U+FDD0 or U+FDD1, Unicode noncharacters that this program marks spans with".to_owned(),
    }
}
