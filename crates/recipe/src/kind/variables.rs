//! Variables of chat templates.

use std::collections::BTreeMap;

use toml::de::{DeTable, DeValue};

use super::{Kind, Written};
use crate::canonical::{by_name, float, list, quoted};
use crate::hint;
use crate::problem::Problem;

/// A value for a chat template.
#[derive(Clone, Debug, PartialEq)]
pub enum Variable {
    /// True or false.
    Switch(bool),
    /// A whole number.
    Integer(i64),
    /// A finite number with a fraction.
    Number(f64),
    /// A text; dates are texts too.
    Text(String),
    /// A list.
    List(Vec<Variable>),
    /// A table.
    Table(BTreeMap<String, Variable>),
}

/// Variables that every template is given, and arguments of transformers' `apply_chat_template`
/// itself.
pub const RESERVED_VARIABLES: [&str; 7] = [
    "messages",
    "conversation",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "chat_template",
];

/// A table of variables.
pub(crate) struct Variables;

impl Kind for Variables {
    type Value = BTreeMap<String, Variable>;

    fn read(&self, written: &Written<'_, '_>) -> Result<BTreeMap<String, Variable>, Problem> {
        let DeValue::Table(entries) = written.value else {
            let problem = written.wrong_type("a table of variables");
            return Err(problem.hint("for example { enable_thinking = false }"));
        };
        let is_reserved = |name: &str| RESERVED_VARIABLES.contains(&name);
        match entries.iter().find(|(name, _)| is_reserved(name.get_ref())) {
            Some((name, value)) => written.part(value, |value| Err(reserved(value, name.get_ref()))),
            None => table(written, entries),
        }
    }

    fn write(&self, value: &BTreeMap<String, Variable>) -> String {
        by_name(value, text_of)
    }

    fn is_table(&self) -> bool {
        true
    }

    fn words(&self) -> String {
        "table of variables".to_owned()
    }

    fn schema(&self) -> String {
        let names = list(&RESERVED_VARIABLES, |name| quoted(name));
        format!(r#""type": "object", "propertyNames": {{ "not": {{ "enum": {names} }} }}"#)
    }
}

fn reserved(value: &Written<'_, '_>, name: &str) -> Problem {
    let problem =
        value.problem(format!("`{}` has the key `{}`, which is not a template's own", value.key, hint::shown(name)));
    problem.hint("the variables that a template reads by itself, such as enable_thinking")
}

fn table<'i>(written: &Written<'_, 'i>, entries: &DeTable<'i>) -> Result<BTreeMap<String, Variable>, Problem> {
    entries.iter().map(|(name, value)| Ok((name.get_ref().to_string(), written.part(value, variable)?))).collect()
}

fn variable(written: &Written<'_, '_>) -> Result<Variable, Problem> {
    match written.value {
        DeValue::Boolean(flag) => Ok(Variable::Switch(*flag)),
        DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Ok(Variable::Integer(number)),
            Err(_) => {
                let number = hint::shown(number.as_str());
                Err(written.problem(format!("`{}` has a number beyond 64 bits: {number}", written.key)))
            }
        },
        DeValue::Float(number) => match number.as_str().parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(Variable::Number(number)),
            _ => Err(written.problem(format!("`{}` has a number that is not finite", written.key))),
        },
        // Any text but an empty one is true for a template.
        DeValue::String(text) if matches!(text.as_ref(), "true" | "false" | "True" | "False") => {
            let problem = written.problem(format!("`{}` has the text {}", written.key, quoted(text)));
            Err(problem.hint(format!("write it without quotes: {}", text.to_lowercase())))
        }
        DeValue::String(text) => Ok(Variable::Text(text.to_string())),
        DeValue::Datetime(date) => Ok(Variable::Text(date.to_string())),
        DeValue::Array(items) => Ok(Variable::List(written.items(items, variable)?)),
        DeValue::Table(entries) => Ok(Variable::Table(table(written, entries)?)),
    }
}

fn text_of(value: &Variable) -> String {
    match value {
        Variable::Switch(flag) => flag.to_string(),
        Variable::Integer(number) => number.to_string(),
        Variable::Number(number) => float(*number),
        Variable::Text(text) => quoted(text),
        Variable::List(items) => list(items, text_of),
        Variable::Table(entries) => by_name(entries, text_of),
    }
}
