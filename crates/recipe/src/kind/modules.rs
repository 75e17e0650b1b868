//! Names of the model's modules, numbers of its layers, and values by name.

use std::collections::BTreeMap;

use toml::de::DeValue;

use super::paths::TEXT_SCHEMA;
use super::{Count, Kind, Written};
use crate::TargetModules;
use crate::canonical::{by_name, list, quoted};
use crate::problem::Problem;

/// A list of names that are not empty.
pub(crate) struct Names;

impl Kind for Names {
    type Value = Vec<String>;

    fn read(&self, written: &Written<'_, '_>) -> Result<Vec<String>, Problem> {
        match written.value {
            DeValue::Array(items) => written.items(items, |item| item.text().map(str::to_owned)),
            _ => Err(written.wrong_type("a list of names")),
        }
    }

    fn write(&self, value: &Vec<String>) -> String {
        list(value, |name| quoted(name))
    }

    fn words(&self) -> String {
        "list of names".to_owned()
    }

    fn schema(&self) -> String {
        format!(r#""type": "array", "items": {{ {TEXT_SCHEMA} }}"#)
    }
}

/// "all-linear", a list of names, or a regular expression.
pub(crate) struct Targets;

impl Kind for Targets {
    type Value = TargetModules;

    fn read(&self, written: &Written<'_, '_>) -> Result<TargetModules, Problem> {
        match written.value {
            DeValue::String(text) if text == "all-linear" => Ok(TargetModules::AllLinear),
            DeValue::String(_) => Ok(TargetModules::Regex(written.text()?.to_owned())),
            DeValue::Array(items) if items.is_empty() => {
                Err(written.problem(format!("`{}` must name a module", written.key)).hint("or \"all-linear\""))
            }
            DeValue::Array(_) => Ok(TargetModules::Names(Names.read(written)?)),
            _ => Err(written.wrong_type("\"all-linear\", a list of names, or a regular expression")),
        }
    }

    fn write(&self, value: &TargetModules) -> String {
        match value {
            TargetModules::AllLinear => quoted("all-linear"),
            TargetModules::Names(names) => Names.write(names),
            TargetModules::Regex(regex) => quoted(regex),
        }
    }

    fn words(&self) -> String {
        "text, or list of names".to_owned()
    }

    fn schema(&self) -> String {
        format!(r#""anyOf": [{{ {TEXT_SCHEMA} }}, {{ {}, "minItems": 1 }}]"#, Names.schema())
    }
}

/// A list of layers, or one layer, counted from 0.
pub(crate) struct Layers;

impl Kind for Layers {
    type Value = Vec<usize>;

    fn read(&self, written: &Written<'_, '_>) -> Result<Vec<usize>, Problem> {
        match written.value {
            DeValue::Array(items) if items.is_empty() => {
                let message = format!("`{}` must name a layer", written.key);
                Err(written.problem(message).hint("leave it out for all layers"))
            }
            DeValue::Array(items) => written.items(items, |item| Count(0).read(item)),
            DeValue::Integer(_) => Ok(vec![Count(0).read(written)?]),
            _ => Err(written.wrong_type("a list of layers, counted from 0")),
        }
    }

    fn write(&self, value: &Vec<usize>) -> String {
        list(value, usize::to_string)
    }

    fn words(&self) -> String {
        "list of integers".to_owned()
    }

    fn schema(&self) -> String {
        let layer = Count(0).schema();
        let layers = format!(r#""type": "array", "items": {{ {layer} }}, "minItems": 1"#);
        format!(r#""anyOf": [{{ {layer} }}, {{ {layers} }}]"#)
    }
}

/// A table of names and values of another kind.
pub(crate) struct ByName<K>(pub(crate) K);

impl<K: Kind> Kind for ByName<K> {
    type Value = BTreeMap<String, K::Value>;

    fn read(&self, written: &Written<'_, '_>) -> Result<BTreeMap<String, K::Value>, Problem> {
        let DeValue::Table(entries) = written.value else {
            let problem = written.wrong_type("a table of module names and numbers");
            return Err(problem.hint("for example { \"q_proj\" = 8 }"));
        };
        entries
            .iter()
            .map(|(name, value)| Ok((name.get_ref().to_string(), written.part(value, |value| self.0.read(value))?)))
            .collect()
    }

    fn write(&self, value: &BTreeMap<String, K::Value>) -> String {
        by_name(value, |item| self.0.write(item))
    }

    fn is_table(&self) -> bool {
        true
    }

    /// "integer, 1 or more" becomes "table of integers, 1 or more".
    fn words(&self) -> String {
        format!("table of {}", self.0.words().replacen(',', "s,", 1))
    }

    fn schema(&self) -> String {
        format!(r#""type": "object", "additionalProperties": {{ {} }}"#, self.0.schema())
    }
}
