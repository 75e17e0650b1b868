//! Chat templates: messages in, text out, the same text as transformers' `apply_chat_template` to
//! the byte.
//!
//! A template comes from the publisher of the model, so it runs within bounds. They are on its
//! source (`template_rewrite.rs`), the number of its steps and the size of its text. `guard.rs`
//! bounds its time, memory and stack.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use chrono::NaiveDateTime;
use finetune_recipe::Variable;
use minijinja::{Environment, Error, ErrorKind, Value};

use crate::error::DatasetError;
use crate::guard::{self, Bounds, Foreign};
use crate::template_problem::TemplateProblem;
use crate::text_source::TemplateSource;
use crate::{generation, integers, python_methods, template_rewrite};

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// What the template wrote.
    pub text: String,
    /// Byte ranges in `text` of the `{% generation %}` blocks, in order of their ends. Empty if the
    /// template has none.
    pub generation_spans: Vec<Range<usize>>,
}

/// The most instructions of a template per rendering: (number of messages up to which the bound
/// holds, instructions). The largest published template takes under 100 per message and 10 more per
/// pair of messages. So 64 messages take 50 thousand and 1,000 take 11 million. Beyond that the
/// time decides.
const STEPS: [(usize, u64); 3] = [(64, 5_000_000), (1000, 50_000_000), (usize::MAX, 5_000_000_000)];

/// The most bytes of a rendered conversation. No row is longer than 16 MiB, and no template repeats
/// it this often.
const LONGEST_TEXT: usize = 64 << 20;

/// The most bytes that a rendering may hold. One of 16 MiB of text holds about five copies of it.
const MEMORY: usize = 384 << 20;

/// The most time of a rendering, which takes a thousandth of it on a slow host.
const TIME: Duration = Duration::from_secs(4);
/// The time that each message adds to the bound.
const TIME_PER_MESSAGE: Duration = Duration::from_millis(10);

const NAME: &str = "chat_template";

/// The templates of a model: one, or one for conversations with tools beside it.
pub(crate) struct ChatTemplate {
    default: Option<Arc<Compiled>>,
    tool_use: Option<Arc<Compiled>>,
    sources: Vec<TemplateSource>,
    /// The variables of the recipe.
    given: Vec<(String, serde_json::Value)>,
    /// What every rendering gets: `documents`, `bos_token` and the like, then the variables of the
    /// recipe. Those of a row come behind, and replace them.
    variables: Vec<(String, Value)>,
    /// Whether every template has `{% generation %}` blocks.
    pub(crate) has_generation: bool,
}

/// One template, for conversations of any length.
struct Compiled {
    /// (Number of messages up to which the environment is used, environment), ascending.
    environments: Vec<(usize, Environment<'static>)>,
    foreign: Foreign,
    origin: String,
    has_generation: bool,
}

impl ChatTemplate {
    /// Compiles templates. `sources`: at least one. `special_tokens`: (name, text). `variables`:
    /// those of every rendering. `now`: what a template is told when it asks for the time.
    ///
    /// # Errors
    /// [`DatasetError::TemplateSyntax`], [`DatasetError::TemplateBounds`],
    /// [`DatasetError::NoThreads`]. [`DatasetError::Template`] if a variable cannot be given.
    pub(crate) fn compile(
        sources: Vec<TemplateSource>,
        special_tokens: Vec<(String, String)>,
        variables: Option<&BTreeMap<String, Variable>>,
        now: NaiveDateTime,
    ) -> Result<Self, DatasetError> {
        let named = |name: &str| {
            let found = sources.iter().find(|source| source.name == name);
            found.map(|source| Compiled::new(source, now).map(Arc::new)).transpose()
        };
        let (default, tool_use) = (named("default")?, named("tool_use")?);
        let has_generation = [&default, &tool_use].into_iter().flatten().all(|compiled| compiled.has_generation);
        let given: Vec<_> = variables.into_iter().flatten().map(|(name, value)| (name.clone(), json(value))).collect();
        let values = given.iter().map(|(name, value)| Ok((name.clone(), to_value(value)?)));
        let values = values.collect::<Result<Vec<_>, DatasetError>>()?;
        let special_tokens = special_tokens.into_iter().map(|(name, text)| (name, Value::from(text)));
        let variables = [("documents".to_owned(), Value::from(()))].into_iter().chain(special_tokens).chain(values);
        Ok(Self { default, tool_use, sources, given, variables: variables.collect(), has_generation })
    }

    /// The sources, as they were read.
    pub(crate) fn sources(&self) -> &[TemplateSource] {
        &self.sources
    }

    /// The variables of the recipe.
    pub(crate) fn given(&self) -> &[(String, serde_json::Value)] {
        &self.given
    }

    /// Whether the source of a template has a text in it.
    pub(crate) fn mentions(&self, text: &str) -> bool {
        self.sources.iter().any(|source| source.source.contains(text))
    }

    /// Whether a template asks for the time.
    pub(crate) fn uses_date(&self) -> bool {
        self.mentions(python_methods::STRFTIME)
    }

    /// The template for a conversation, chosen as transformers does: the one for tools if there are
    /// some.
    fn chosen(&self, tools: &Value) -> Result<&Arc<Compiled>, DatasetError> {
        let with_tools = self.tool_use.as_ref().filter(|_| !tools.is_none());
        with_tools.or(self.default.as_ref()).ok_or_else(|| {
            let names: Vec<&str> = self.sources.iter().map(|source| source.name.as_str()).collect();
            DatasetError::Template(TemplateProblem::NoDefault(names.join(", ")))
        })
    }

    /// Renders a conversation. `tools`: the list, or none. `extra`: variables of the row
    /// (`chat_template_kwargs`, `documents`). The marks of `generation.rs` must not occur in any of them.
    ///
    /// # Errors
    /// [`DatasetError::Template`] if the template does not take this conversation.
    /// [`DatasetError::TemplateBounds`] if it ran out of something. Then no other conversation of
    /// the same file should be tried.
    pub(crate) fn render(
        &self,
        messages: &[Value],
        tools: &Value,
        extra: &[(String, Value)],
        add_generation_prompt: bool,
    ) -> Result<Rendered, DatasetError> {
        let given = self.variables.iter().chain(extra).map(|(name, value)| (name.as_str(), value.clone()));
        let variables: Value = given
            .chain([
                ("messages", Value::from(messages.to_vec())),
                ("tools", tools.clone()),
                ("add_generation_prompt", Value::from(add_generation_prompt)),
            ])
            .collect();
        let compiled = self.chosen(tools)?.clone();
        let foreign = compiled.foreign.clone();
        let count = messages.len();
        let more = TIME_PER_MESSAGE.saturating_mul(u32::try_from(count).unwrap_or(u32::MAX));
        let bounds = Bounds { time: TIME.saturating_add(more), bytes: MEMORY };
        guard::watched(&foreign, bounds, move || compiled.render(variables, count))?
    }
}

impl Compiled {
    fn new(template: &TemplateSource, now: NaiveDateTime) -> Result<Self, DatasetError> {
        let origin = template.origin.display().to_string();
        let source = template_rewrite::with_line_feeds(&template.source).into_owned();
        template_rewrite::check(&source).map_err(|(line, what)| DatasetError::TemplateBounds {
            origin: origin.clone(),
            line: Some(line),
            reason: format!("{what}, which no template for chats needs"),
        })?;
        let foreign = Foreign::Template(origin);
        let bounds = Bounds { time: TIME, bytes: MEMORY };
        guard::watched(&foreign.clone(), bounds, move || Self::parse(&source, foreign, now))?
    }

    fn parse(source: &str, foreign: Foreign, now: NaiveDateTime) -> Result<Self, DatasetError> {
        let (Foreign::Template(origin) | Foreign::Tokenizer(origin) | Foreign::Parquet(origin)) = &foreign;
        let origin = origin.clone();
        let (source, has_generation) = template_rewrite::rewrite(source);
        // minijinja keeps a template in its environment only if it borrows the source. So the
        // source is leaked: once per tokenizer, and a process loads one tokenizer. Compiling for
        // each rendering instead would double the time to load a dataset.
        let source: &'static str = Box::leak(source.into_boxed_str());
        let mut environments = Vec::with_capacity(STEPS.len());
        for (messages, steps) in STEPS {
            let mut environment = Environment::new();
            // As `_compile_jinja_template` of transformers/utils/chat_template_utils.py sets up
            // jinja2.
            environment.set_trim_blocks(true);
            environment.set_lstrip_blocks(true);
            environment.set_formatter(python_methods::print);
            environment.set_fuel(Some(steps));
            // Otherwise an error keeps copies of all variables, which nobody reads.
            environment.set_debug(false);
            python_methods::install(&mut environment, now);
            environment.add_template(NAME, source).map_err(|error| DatasetError::TemplateSyntax {
                origin: origin.clone(),
                line: error.line().unwrap_or(1),
                reason: reason(&error),
            })?;
            environments.push((messages, environment));
        }
        Ok(Self { environments, foreign, origin, has_generation })
    }

    fn render(&self, variables: Value, messages: usize) -> Result<Rendered, DatasetError> {
        let fitting = self.environments.iter().find(|(most, _)| messages <= *most);
        let Some((_, environment)) = fitting else { unreachable!("the last holds for any number") };
        let mut text = BoundedText { bytes: Vec::new(), is_full: false };
        let outcome = environment
            .get_template(NAME)
            .and_then(|template| template.render_captured_to(variables, &mut text).map(drop));
        if let Err(error) = outcome {
            let line = error.line();
            return Err(if text.is_full {
                guard::stop(&self.foreign, line, &format!("it writes more than {} MiB of text", LONGEST_TEXT >> 20))
            } else if is_out_of_fuel(&error) {
                guard::stop(&self.foreign, line, &format!("it takes too many steps for {messages} messages"))
            } else {
                let (line, reason) = (line.unwrap_or(1), reason(&error));
                DatasetError::Template(TemplateProblem::Stopped { origin: self.origin.clone(), line, reason })
            });
        }
        let text = String::from_utf8(text.bytes).map_err(|_| DatasetError::Template(TemplateProblem::HalfCharacter))?;
        let (text, generation_spans) = generation::take_marks(text);
        Ok(Rendered { text, generation_spans })
    }
}

/// Whether a rendering took too many steps. Errors within macros are wrapped in others.
fn is_out_of_fuel(error: &Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The first cause of an error. Errors within macros are wrapped in others.
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

struct BoundedText {
    bytes: Vec<u8>,
    is_full: bool,
}

impl Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > LONGEST_TEXT {
            self.is_full = true;
            return Err(io::Error::other("the rendered text is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Messages as a template sees them. Reasoning is put under all of its names, as transformers does
/// (`_alias_reasoning_fields`), since templates read one or another.
pub(crate) fn to_values(messages: &[serde_json::Value]) -> Result<Vec<Value>, DatasetError> {
    messages
        .iter()
        .map(|message| {
            let reasoning = ["reasoning_content", "thinking", "reasoning"]
                .iter()
                .filter_map(|name| message.get(name))
                .find(|value| !value.is_null());
            let (Some(reasoning), Some(object)) = (reasoning, message.as_object()) else {
                return to_value(message);
            };
            let mut aliased = serde_json::Map::new();
            aliased.insert("thinking".to_owned(), reasoning.clone());
            aliased.extend(object.iter().map(|(key, value)| (key.clone(), value.clone())));
            aliased.insert("reasoning_content".to_owned(), reasoning.clone());
            to_value(&serde_json::Value::Object(aliased))
        })
        .collect()
}

/// The tools of a row as a template sees them.
pub(crate) fn tools_value(tools: Option<&serde_json::Value>) -> Result<Value, DatasetError> {
    tools.map_or_else(|| Ok(Value::from(())), to_value)
}

/// A JSON value as a template sees it. Long whole numbers (`integers.rs`) become numbers again. The
/// marks of `generation.rs` are refused.
pub(crate) fn to_value(value: &serde_json::Value) -> Result<Value, DatasetError> {
    Ok(match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(flag) => Value::from(*flag),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(number), _, _) => Value::from(number),
            (_, Some(number), _) => Value::from(number),
            (_, _, Some(number)) => Value::from(number),
            _ => Value::from_serialize(number),
        },
        serde_json::Value::String(text) => match integers::digits(text) {
            Some(digits) => integers::value(digits),
            None => Value::from(unmarked(text)?),
        },
        serde_json::Value::Array(items) => {
            Value::from(items.iter().map(to_value).collect::<Result<Vec<Value>, DatasetError>>()?)
        }
        serde_json::Value::Object(entries) => {
            let entries = entries.iter().map(|(key, value)| Ok((Value::from(unmarked(key)?), to_value(value)?)));
            entries.collect::<Result<Vec<(Value, Value)>, DatasetError>>()?.into_iter().collect()
        }
    })
}

/// A variable of a recipe as JSON.
fn json(variable: &Variable) -> serde_json::Value {
    match variable {
        Variable::Switch(flag) => (*flag).into(),
        Variable::Integer(number) => (*number).into(),
        Variable::Number(number) => (*number).into(),
        Variable::Text(text) => text.as_str().into(),
        Variable::List(items) => items.iter().map(json).collect(),
        Variable::Table(entries) => {
            serde_json::Value::Object(entries.iter().map(|(name, value)| (name.clone(), json(value))).collect())
        }
    }
}

fn unmarked(text: &str) -> Result<&str, DatasetError> {
    if !generation::has_mark(text) {
        return Ok(text);
    }
    Err(DatasetError::Template(TemplateProblem::Noncharacter))
}
