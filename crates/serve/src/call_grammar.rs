//! The grammar of calls of tools: what a template writes around them (`call_form.rs`), and arguments that fit the
//! schemas of the tools, in the notation of the model.

use serde_json::{Value, json};

use crate::call_form::{Arguments, CallForm};
use crate::forms::{arguments, quoted};
use crate::literals::is_name;
use crate::value_grammar::{Notation, Written};

/// Rules of a grammar, and the grammars that they refer to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rules {
    pub(crate) text: String,
    pub(crate) grammars: Vec<Value>,
}

impl Rules {
    /// A rule in a line of its own.
    pub(crate) fn add(&mut self, name: &str, body: &str) {
        self.text += &format!("{name}: {body}\n");
    }

    /// A grammar by its schema. Returns what refers to it.
    pub(crate) fn add_json(&mut self, name: &str, schema: Value) -> String {
        self.grammars.push(json!({"name": name, "json_schema": schema}));
        format!("@{name}")
    }
}

/// The rule `arguments{n}` of each tool: all that stands between its name and what follows the call.
///
/// # Errors
/// A sentence that says what of a tool's `parameters` cannot be kept in this notation.
pub(crate) fn arguments_of(form: &CallForm, tools: &[&Value]) -> Result<Rules, String> {
    let mut rules = Rules::default();
    for (n, tool) in tools.iter().enumerate() {
        let parameters = &tool["function"]["parameters"];
        let refused = |what: String| {
            let name = tool["function"]["name"].as_str().unwrap_or_default();
            format!("the `parameters` of `{name}`, as this model writes them: {what}")
        };
        let (name, notation) = (format!("arguments{n}"), form.notation());
        let body = match notation {
            None => rules.add_json(&format!("tool{n}"), arguments(tool)),
            Some(notation) => Written::new(&mut rules, parameters, notation, n).arguments().map_err(refused)?,
        };
        rules.add(&name, &body);
    }
    Ok(rules)
}

/// The rule `calls`, with all that it needs. `begun`: what of the beginning of calls stands in front of it.
///
/// # Errors
/// As [`arguments_of`], or a name that the notation has no place for.
pub(crate) fn calls(form: &CallForm, tools: &[&Value], one: bool, begun: &str) -> Result<Rules, String> {
    let mut rules = arguments_of(form, tools)?;
    rules.add("first", &alternatives(form, tools, form.open.strip_prefix(begun).unwrap_or(&form.open))?);
    let more = match form.next.as_ref().filter(|_| !one) {
        None => "",
        Some(next) => {
            rules.add("more", &alternatives(form, tools, next)?);
            " more*"
        }
    };
    let close = if form.close.is_empty() { String::new() } else { quoted(&form.close) };
    rules.add("calls", format!("first{more} {close}").trim());
    Ok(rules)
}

/// A call of any of the tools, with this in front of its name: a word of its own would end before a text that begins alike.
fn alternatives(form: &CallForm, tools: &[&Value], before: &str) -> Result<String, String> {
    let is_json = form.open.ends_with('"');
    let mut bodies = Vec::new();
    for (n, tool) in tools.iter().enumerate() {
        let name = tool["function"]["name"].as_str().unwrap_or_default();
        if !is_json && !is_name(name) {
            return Err(format!("the name of the tool {name:?} has other letters than this model's calls have"));
        }
        // The quotes around it are the form's. A name may end with one of its own.
        let within = quoted(name);
        let within = within.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(&within);
        let name = before.to_owned() + if is_json { within } else { name };
        bodies.push(match &form.arguments {
            Arguments::Json { between, counted: false } => format!("{} arguments{n}", quoted(&(name + between))),
            Arguments::Json { between, counted: true } => {
                format!("{} /[0-9]{{1,3}}/ {} arguments{n}", quoted(&(name + ":")), quoted(between))
            }
            Arguments::Tagged(tags) => format!("{} arguments{n}", quoted(&(name + &tags.begin))),
            Arguments::Gemma => format!("{} arguments{n}", quoted(&(name + "{"))),
            Arguments::Python => format!("{} arguments{n}", quoted(&(name + "("))),
        });
    }
    Ok(bodies.join(" | "))
}

impl CallForm {
    /// How values are written. `None`: as JSON.
    fn notation(&self) -> Option<Notation<'_>> {
        match &self.arguments {
            Arguments::Json { .. } => None,
            Arguments::Tagged(tags) => Some(Notation::Tagged(tags)),
            Arguments::Gemma => Some(Notation::Gemma),
            Arguments::Python => Some(Notation::Python),
        }
    }
}
