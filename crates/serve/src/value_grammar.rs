//! Arguments of calls that are not written as a JSON object: rules of a grammar by the schema of a tool.
//!
//! Qwen3-Coder, Qwen3.5 and GLM have marks around each argument, with texts as they are and other values as JSON.
//! Gemma 4, LFM2 and OLMo 3 have literals of their own. Keys come in the order of the schema, and those that it does
//! not name do not come.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::call_form::Tags;
use crate::call_grammar::Rules;
use crate::forms::quoted;
use crate::literals::{QUOTE, is_name, word_value};
use crate::schema_kinds::{chain, kinds};
use crate::text_grammar::text;

/// Values that a tool may have at most, as each has a rule of its own.
const MOST_RULES: usize = 2000;
/// Bytes of the schemas of a tool's arguments.
const MOST_BYTES: usize = 1 << 20;
/// What of a schema says nothing about its values, or is kept.
const KNOWN: [&str; 32] = [
    "$comment",
    "$defs",
    "$id",
    "$ref",
    "$schema",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "default",
    "definitions",
    "deprecated",
    "description",
    "enum",
    "example",
    "examples",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "format",
    "items",
    "maxItems",
    "maxLength",
    "maximum",
    "minItems",
    "minLength",
    "minimum",
    "multipleOf",
    "pattern",
    "properties",
    "required",
    "title",
    "type",
];

/// What is about a schema, not about its values.
const SAYS_NOTHING: [&str; 12] = [
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "default",
    "definitions",
    "deprecated",
    "description",
    "example",
    "examples",
    "nullable",
    "title",
];

/// How values are written.
#[derive(Clone, Copy)]
pub(crate) enum Notation<'a> {
    /// Each argument between marks.
    Tagged(&'a Tags),
    Gemma,
    Python,
}

/// Writes the rules of one tool's arguments.
pub(crate) struct Written<'a> {
    rules: &'a mut Rules,
    /// The `parameters`, within which references are.
    root: &'a Value,
    notation: Notation<'a>,
    /// The number of the tool, which its rules have in their names.
    tool: usize,
    count: usize,
    /// Bytes of schemas, each of which has all `$defs`.
    bytes: usize,
    /// Rules of references, and that of any value.
    known: BTreeMap<String, String>,
}

impl<'a> Written<'a> {
    pub(crate) fn new(rules: &'a mut Rules, root: &'a Value, notation: Notation<'a>, tool: usize) -> Written<'a> {
        Written { rules, root, notation, tool, count: 0, bytes: 0, known: BTreeMap::new() }
    }

    /// What stands between the beginning of the arguments and their end.
    ///
    /// # Errors
    /// What cannot be kept, in words.
    pub(crate) fn arguments(&mut self) -> Result<String, String> {
        let nothing = json!({});
        let root = if self.root.is_null() { &nothing } else { self.root };
        let schema = self.resolved(root)?;
        let is_object = schema.get("type").is_none_or(|kind| kind == "object");
        if !is_object || ["allOf", "anyOf", "const", "enum"].iter().any(|key| schema.get(key).is_some()) {
            return Err("they have to be an object with `properties`".to_owned());
        }
        self.check(schema)?;
        match self.notation {
            Notation::Tagged(tags) => self.tagged(schema, tags),
            Notation::Gemma => self.members(schema, "}"),
            Notation::Python => self.members(schema, ")"),
        }
    }

    fn name(&mut self) -> Result<String, String> {
        self.count += 1;
        if self.count > MOST_RULES {
            return Err(format!("they have more than {MOST_RULES} values"));
        }
        Ok(format!("t{}v{}", self.tool, self.count))
    }

    fn rule(&mut self, body: &str) -> Result<String, String> {
        let name = self.name()?;
        self.rules.add(&name, body);
        Ok(name)
    }

    /// The schema behind references and lists of one. What stands beside these would be lost, and is refused.
    fn resolved<'s>(&self, schema: &'s Value) -> Result<&'s Value, String>
    where
        'a: 's,
    {
        let mut chain = chain(schema, self.root).ok_or("a `$ref` that leads nowhere")?;
        let last = chain.pop().unwrap_or(schema);
        // A type beside them is that of what they lead to.
        let says = |key: &&String| *key != "type" && !SAYS_NOTHING.contains(&key.as_str()) && !key.starts_with("x-");
        for fields in chain.into_iter().filter_map(Value::as_object) {
            if let [first, second, ..] = fields.keys().filter(says).collect::<Vec<_>>()[..] {
                return Err(format!("`{second}` beside `{first}`"));
            }
        }
        Ok(last)
    }

    /// Refuses what nobody looks at.
    fn check(&self, schema: &Value) -> Result<(), String> {
        match schema {
            Value::Object(fields) => match fields.keys().find(|key| !KNOWN.contains(&key.as_str())) {
                Some(key) if !key.starts_with("x-") && key != "strict" && key != "nullable" => {
                    Err(format!("`{key}` of a schema"))
                }
                _ => Ok(()),
            },
            Value::Bool(true) => Ok(()),
            _ => Err("a schema that no value fits".to_owned()),
        }
    }

    /// The properties of an object, and whether each has to be there.
    fn properties(schema: &Value) -> Result<Vec<(&String, &Value, bool)>, String> {
        let empty = Map::new();
        let none = Vec::new();
        let properties = schema.get("properties").and_then(Value::as_object);
        let required = schema.get("required").and_then(Value::as_array).unwrap_or(&none);
        let is_there = |key: &Value| key.as_str().is_some_and(|key| properties.unwrap_or(&empty).contains_key(key));
        if let Some(key) = required.iter().find(|key| !is_there(key)) {
            return Err(format!("`required` has {key}, and `properties` has not"));
        }
        let all = properties.into_iter().flatten();
        Ok(all.map(|(key, schema)| (key, schema, required.iter().any(|one| one == key))).collect())
    }

    fn tagged(&mut self, schema: &Value, tags: &Tags) -> Result<String, String> {
        let mut parts = Vec::new();
        for (key, schema, is_required) in Self::properties(schema)? {
            if key.is_empty() || key.trim() != key || key.contains(['<', '>', '\n']) {
                return Err(format!("the name of the property {key:?} cannot stand between marks"));
            }
            let value = self.tagged_value(key, schema, tags)?;
            let part = format!("{} {value}", quoted(&format!("{}{key}{}", tags.key, tags.value)));
            parts.push(if is_required { part } else { format!("({part})?") });
        }
        // A rule may be empty, but has to have a body.
        Ok(if parts.is_empty() { "\"\"".to_owned() } else { parts.join(" ") })
    }

    /// A value with the mark behind it.
    fn tagged_value(&mut self, key: &str, schema: &Value, tags: &Tags) -> Result<String, String> {
        let root = self.root;
        let kinds = kinds(schema, root);
        let schema = self.resolved(schema).map_err(|what| format!("{what}, of `{key}`"))?;
        self.check(schema)?;
        let mark = tags.end.trim();
        let values = schema.get("const").map(std::slice::from_ref);
        let values = values.or_else(|| schema.get("enum").and_then(Value::as_array).map(Vec::as_slice));
        match values {
            Some(values) if values.iter().any(Value::is_string) => {
                // What is read as another value is none of these.
                let is_plain = |text: &str| kinds == ["string"] || word_value(text.trim()).is_none();
                let one = |value: &Value| match value.as_str() {
                    Some(text) if text.contains(mark) || !is_plain(text) => {
                        Err(format!("the value {value} of `{key}`, which is read in another way"))
                    }
                    Some(text) => Ok(quoted(&format!("{text}{}", tags.end))),
                    None => Ok(quoted(&format!("{value}{}", tags.end))),
                };
                return Ok(format!("({})", values.iter().map(one).collect::<Result<Vec<_>, _>>()?.join(" | ")));
            }
            Some(_) => return self.tagged_json(schema, tags),
            None => {}
        }
        let has_text = kinds.is_empty() || kinds.contains(&"string");
        if !has_text {
            return self.tagged_json(schema, tags);
        }
        let is_text = kinds.is_empty() && is_any(schema) || kinds.iter().all(|kind| ["string", "null"].contains(kind));
        if kinds.is_empty() && !is_any(schema) || !is_text {
            return Err(format!("`{key}` may be a text or something else, and texts have no quotes"));
        }
        let of_text = match schema.get("anyOf").and_then(Value::as_array) {
            None => schema,
            Some(branches) => {
                let is_text = |branch: &&Value| crate::schema_kinds::kinds(branch, root) == ["string"];
                match branches.iter().filter(is_text).collect::<Vec<_>>().as_slice() {
                    [only] => self.resolved(only)?,
                    _ => return Err(format!("the alternatives of `{key}`, of which several are texts")),
                }
            }
        };
        self.check(of_text)?;
        if of_text.get("enum").or_else(|| of_text.get("const")).is_some() {
            let text = self.tagged_value(key, of_text, tags)?;
            return Ok(format!("({text} | {})", quoted(&format!("null{}", tags.end))));
        }
        let (name, body) = (self.name()?, text(of_text, mark)?);
        self.rules.text += &format!("{name}[suffix={}]: {body}\n", quoted(&tags.end));
        Ok(name)
    }

    /// A value as JSON, as templates write it.
    fn tagged_json(&mut self, schema: &Value, tags: &Tags) -> Result<String, String> {
        let mut schema = schema.clone();
        let has_references = schema.to_string().contains("\"$ref\"");
        for key in ["$defs", "definitions"].into_iter().filter(|_| has_references) {
            if let (Some(fields), Some(all)) = (schema.as_object_mut(), self.root.get(key)) {
                fields.entry(key).or_insert_with(|| all.clone());
            }
        }
        let style = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
        if let Some(fields) = schema.as_object_mut() {
            fields.insert("x-guidance".to_owned(), style);
        }
        self.bytes += schema.to_string().len();
        if self.bytes > MOST_BYTES {
            return Err(format!("with their `$defs` they have more than {MOST_BYTES} bytes"));
        }
        let name = self.name()?;
        let json = self.rules.add_json(&name, schema);
        Ok(format!("{json} {}", quoted(&tags.end)))
    }

    /// Keys with their values, and the mark behind them. Any that need not be there may be left out, so what comes next
    /// is a rule for each place, with a comma in front and without.
    fn members(&mut self, schema: &Value, end: &str) -> Result<String, String> {
        let all = Self::properties(schema)?;
        let (mut first, mut next) = (quoted(end), quoted(end));
        for (key, schema, is_required) in all.into_iter().rev() {
            let value = self.value(schema)?;
            let member = match self.notation {
                Notation::Python if end != ")" => format!("{} {value}", quoted(&format!("{}: ", quoted(key)))),
                _ if !is_name(key) => return Err(format!("the name of the property {key:?} has no place in a call")),
                Notation::Python => format!("{} {value}", quoted(&format!("{key}="))),
                _ => format!("{} {value}", quoted(&format!("{key}:"))),
            };
            let behind = self.rule(&next)?;
            let [of_first, of_next] = match is_required {
                true => [format!("{member} {behind}"), format!("{} {member} {behind}", self.comma())],
                false => {
                    let (skipped, comma) = (self.rule(&first)?, self.comma());
                    [format!("{member} {behind} | {skipped}"), format!("{comma} {member} {behind} | {behind}")]
                }
            };
            (first, next) = (of_first, of_next);
        }
        Ok(first)
    }

    fn comma(&self) -> &'static str {
        match self.notation {
            Notation::Python => "\", \"",
            _ => "\",\"",
        }
    }

    /// An object of any keys.
    fn map(&mut self, schema: &Value) -> Result<String, String> {
        Self::properties(schema)?;
        let any = json!({});
        let value = self.value(schema.get("additionalProperties").unwrap_or(&any))?;
        let member = match self.notation {
            Notation::Python => format!("/\"[^\"\\\\\\x00-\\x1F]*\": / {value}"),
            _ => format!("/[a-zA-Z_][a-zA-Z0-9_]*:/ {value}"),
        };
        let member = self.rule(&member)?;
        Ok(format!("({member} ({} {member})*)? \"}}\"", self.comma()))
    }

    /// The rule of a value. References have one of their own, as they may be within themselves.
    fn value(&mut self, schema: &Value) -> Result<String, String> {
        self.resolved(schema)?;
        // A reference that leads somewhere begins with `#`.
        let key = if is_any(schema) { "any".to_owned() } else { reference(schema).unwrap_or_default().to_owned() };
        if let Some(known) = self.known.get(&key) {
            return Ok(known.clone());
        }
        if key.is_empty() {
            let body = self.body(schema)?;
            return self.rule(&body);
        }
        let name = self.name()?;
        self.known.insert(key, name.clone());
        let body = self.body(schema)?;
        self.rules.add(&name, &body);
        Ok(name)
    }

    fn body(&mut self, schema: &Value) -> Result<String, String> {
        let schema = self.resolved(schema)?.clone();
        self.check(&schema)?;
        if is_any(&schema) {
            return self.any();
        }
        let values = schema.get("const").map(std::slice::from_ref);
        if let Some(values) = values.or_else(|| schema.get("enum").and_then(Value::as_array).map(Vec::as_slice)) {
            let has_quote = |value: &&Value| value.as_str().is_some_and(|text| text.contains(QUOTE));
            if let (Notation::Gemma, Some(value)) = (self.notation, values.iter().find(has_quote)) {
                return Err(format!("the value {value}, which is read in another way"));
            }
            let all: Vec<String> =
                values.iter().flat_map(|value| self.literal(value)).map(|one| quoted(&one)).collect();
            return Ok(all.join(" | "));
        }
        if let Some(branches) = schema.get("anyOf").and_then(Value::as_array) {
            let says_more = |key: &&String| *key != "anyOf" && !SAYS_NOTHING.contains(&key.as_str());
            if let Some(key) = schema.as_object().and_then(|fields| fields.keys().find(says_more)) {
                return Err(format!("`{key}` beside `anyOf`"));
            }
            let all = branches.iter().map(|branch| self.value(branch)).collect::<Result<Vec<_>, _>>()?;
            return Ok(all.join(" | "));
        }
        if schema.get("allOf").is_some() {
            return Err("`allOf` of several schemas".to_owned());
        }
        let kinds: Vec<String> = match schema.get("type") {
            Some(Value::String(kind)) => vec![kind.clone()],
            Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            _ => return Err("a schema that does not say its `type`".to_owned()),
        };
        let all = kinds.iter().map(|kind| self.of_kind(kind, &schema)).collect::<Result<Vec<_>, _>>()?;
        Ok(all.join(" | "))
    }

    fn any(&mut self) -> Result<String, String> {
        let nothing = json!({});
        let kinds = ["string", "number", "boolean", "null", "array", "object"];
        let all = kinds.iter().map(|kind| self.of_kind(kind, &nothing)).collect::<Result<Vec<_>, _>>()?;
        Ok(all.join(" | "))
    }

    fn of_kind(&mut self, kind: &str, schema: &Value) -> Result<String, String> {
        let is_python = matches!(self.notation, Notation::Python);
        match kind {
            "string" => self.string(schema),
            "boolean" => Ok(if is_python { "(\"True\" | \"False\")" } else { "(\"true\" | \"false\")" }.to_owned()),
            "null" => Ok(if is_python { "\"None\"" } else { "\"null\"" }.to_owned()),
            "integer" | "number" => {
                let mut number = json!({"type": kind});
                for key in ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"] {
                    if let Some(bound) = schema.get(key) {
                        number[key] = bound.clone();
                    }
                }
                let name = self.name()?;
                Ok(self.rules.add_json(&name, number))
            }
            "array" => {
                let any = json!({});
                let item = self.value(schema.get("items").unwrap_or(&any))?;
                let bound = |key: &str| schema.get(key).and_then(Value::as_u64);
                let (least, most) = (bound("minItems").unwrap_or(0), bound("maxItems"));
                let comma = self.comma();
                let more = match most {
                    Some(0) => return Ok("\"[]\"".to_owned()),
                    Some(1) => String::new(),
                    Some(most) => format!(" ({comma} {item}){{{},{}}}", least.saturating_sub(1), most - 1),
                    None if least > 1 => format!(" ({comma} {item}){{{},}}", least - 1),
                    None => format!(" ({comma} {item})*"),
                };
                let items = format!("{item}{more}");
                Ok(if least == 0 { format!("\"[\" ({items})? \"]\"") } else { format!("\"[\" {items} \"]\"") })
            }
            "object" => {
                let has_names = schema.get("properties").and_then(Value::as_object).is_some_and(|all| !all.is_empty());
                let is_map = !has_names && schema.get("additionalProperties") != Some(&Value::Bool(false));
                let members = if is_map { self.map(schema)? } else { self.members(schema, "}")? };
                let members = self.rule(&members)?;
                Ok(format!("\"{{\" {members}"))
            }
            other => Err(format!("the `type` {other:?}")),
        }
    }

    fn string(&mut self, schema: &Value) -> Result<String, String> {
        if let Notation::Python = self.notation {
            if let Some(key) = ["pattern", "format"].iter().find(|key| schema.get(**key).is_some()) {
                return Err(format!("the `{key}` of a text between quotes of Python"));
            }
            let bound = |key: &str| schema.get(key).and_then(Value::as_u64);
            let length = match (bound("minLength").unwrap_or(0), bound("maxLength")) {
                (0, None) => "*".to_owned(),
                (least, None) => format!("{{{least},}}"),
                (least, Some(most)) => format!("{{{least},{most}}}"),
            };
            let between =
                |quote: &str| format!("/{quote}(?:[^{quote}\\\\\\x00-\\x1F]|\\\\[\\\\nrt{quote}]){length}{quote}/");
            return Ok(format!("({} | {})", between("\""), between("'")));
        }
        let (name, body) = (self.name()?, text(schema, QUOTE)?);
        self.rules.text += &format!("{name}[suffix={}]: {body}\n", quoted(QUOTE));
        Ok(format!("{} {name}", quoted(QUOTE)))
    }

    /// The ways in which a value may be written.
    fn literal(&self, value: &Value) -> Vec<String> {
        let is_python = matches!(self.notation, Notation::Python);
        match value {
            Value::String(text) if is_python => {
                let within = text.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r").replace('\t', "\\t");
                ['"', '\'']
                    .map(|quote| format!("{quote}{}{quote}", within.replace(quote, &format!("\\{quote}"))))
                    .into()
            }
            Value::String(text) => vec![format!("{QUOTE}{text}{QUOTE}")],
            Value::Bool(value) if is_python => vec![if *value { "True" } else { "False" }.to_owned()],
            Value::Null if is_python => vec!["None".to_owned()],
            // Lists and objects are read as JSON, too.
            other => vec![other.to_string()],
        }
    }
}

/// The first reference that a schema leads to.
fn reference(schema: &Value) -> Option<&str> {
    if let Some(reference) = schema.get("$ref") {
        return reference.as_str();
    }
    let only = |key: &str| match schema.get(key)?.as_array()?.as_slice() {
        [only] => Some(only),
        _ => None,
    };
    ["allOf", "anyOf", "oneOf"].into_iter().find_map(only).and_then(reference)
}

/// Whether any value fits.
fn is_any(schema: &Value) -> bool {
    match schema {
        Value::Object(fields) => fields.keys().all(|key| SAYS_NOTHING.contains(&key.as_str())),
        other => *other == Value::Bool(true),
    }
}
