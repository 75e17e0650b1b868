//! YAML text as a tree in which every key and value knows its line.
//!
//! Scalars stay as text: what they are is asked when they are used. The rules are those of YAML 1.1
//! as PyYAML has them, which all four tools read their files with: `on` is true, and a number may
//! have underscores. `1e-5` is a number here; where PyYAML takes it for a string, the tools convert
//! it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_saphyr::granit_parser::{Event, Parser, ScalarStyle, ScanError};

use crate::ImportError;

/// Nodes of a tree, at most: aliases of aliases would fill the memory. The longest published
/// configuration has a few hundred.
const MOST_NODES: usize = 4_000;
/// Lists and maps inside each other, at most.
const DEEPEST: usize = 64;

/// A value and the line that it begins at.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) value: Value,
    /// From 1.
    pub(crate) line: usize,
}

#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// `plain`: written without quotes, so that it may be a number or the like.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A key with its value.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) key: String,
    /// The key's.
    pub(crate) line: usize,
    pub(crate) node: Node,
}

impl Node {
    /// The entries of a map; empty for anything else.
    pub(crate) fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    /// The entry of a key in a map. If the key stands there twice, the last counts, as in PyYAML.
    pub(crate) fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries().iter().rev().find(|entry| entry.key == key)
    }

    /// Whether the value says that there is none.
    pub(crate) fn is_null(&self) -> bool {
        match &self.value {
            Value::Scalar { text, plain: true } => matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"),
            Value::List(items) => items.is_empty(),
            Value::Map(entries) => entries.is_empty(),
            Value::Scalar { .. } => false,
        }
    }

    /// The text of a scalar that is not null.
    pub(crate) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, .. } if !self.is_null() => Some(text),
            _ => None,
        }
    }

    pub(crate) fn bool(&self) -> Option<bool> {
        match self.text()?.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" => Some(true),
            "false" | "no" | "off" => Some(false),
            _ => None,
        }
    }

    /// A finite number. `1:30` (90 in YAML 1.1) and `010` (8 there) are none: nobody means that.
    pub(crate) fn number(&self) -> Option<f64> {
        let text = self.text()?.replace('_', "");
        let digits = text.trim_start_matches(['-', '+']);
        let octal = digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit());
        let begins = digits.starts_with(|letter: char| letter.is_ascii_digit() || letter == '.');
        if octal || !begins {
            return None;
        }
        text.parse::<f64>().ok().filter(|number| number.is_finite())
    }

    /// A number without a fraction, such as `3` and `3.0`.
    pub(crate) fn integer(&self) -> Option<i64> {
        let number = self.number()?;
        // Beyond 2^53 the text of an integer and the number are not the same.
        (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64)
    }

    /// The value as it may stand in a comment: on one line, and short.
    pub(crate) fn shown(&self) -> String {
        let text = match &self.value {
            Value::Scalar { .. } if self.is_null() => "null".to_owned(),
            Value::Scalar { text, plain: true } => text.clone(),
            Value::Scalar { text, .. } => format!("\"{text}\""),
            Value::List(items) => {
                let items: Vec<String> = items.iter().take(6).map(Node::shown).collect();
                format!("[{}]", items.join(", "))
            }
            Value::Map(entries) => {
                let entries = entries.iter().take(6).map(|entry| format!("{}: {}", entry.key, entry.node.shown()));
                format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
            }
        };
        crate::text::short(&text, 60)
    }
}

/// The first document of a text, which must be a map.
///
/// # Errors
///
/// The text is not YAML, not a map, or larger than any configuration.
pub(crate) fn parse(text: &str, file: &Path) -> Result<Node, ImportError> {
    let mut builder = Builder::default();
    for event in Parser::new_from_str(text) {
        let wrong = |error: ScanError| ImportError::NoYaml {
            file: file.to_owned(),
            line: error.marker().line(),
            column: error.marker().col() + 1,
            message: error.info(),
        };
        let (event, span) = event.map_err(wrong)?;
        let (line, column) = (span.start.line(), span.start.col() + 1);
        builder.take(event, line).map_err(|message| ImportError::NoYaml {
            file: file.to_owned(),
            line,
            column,
            message,
        })?;
    }
    let unknown = |found: &str| ImportError::Unknown { file: file.to_owned(), found: found.to_owned() };
    match builder.root {
        Some(Node { value: Value::Map(entries), .. }) if entries.is_empty() => Err(unknown("it has no keys")),
        Some(root @ Node { value: Value::Map(_), .. }) => Ok(root),
        Some(Node { value: Value::List(_), .. }) => Err(unknown("a list, and a map of keys is meant")),
        Some(_) => Err(unknown("a text without keys")),
        None => Err(unknown("the file is empty")),
    }
}

/// A list or map that is being read.
enum Open {
    List { items: Vec<Node>, line: usize, anchor: usize },
    Map { entries: Vec<Entry>, key: Option<(String, usize)>, line: usize, anchor: usize },
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    root: Option<Node>,
    anchors: BTreeMap<usize, Node>,
    nodes: usize,
}

impl Builder {
    fn take(&mut self, event: Event<'_>, line: usize) -> Result<(), String> {
        match event {
            Event::DocumentStart(..) if self.root.is_some() => {
                return Err("a second document, and a configuration is one".to_owned());
            }
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == ScalarStyle::Plain;
                self.done(Node { value: Value::Scalar { text: text.into_owned(), plain }, line }, anchor)?;
            }
            Event::SequenceStart(_, anchor, _) => self.open.push(Open::List { items: Vec::new(), line, anchor }),
            Event::MappingStart(_, anchor, _) => {
                self.open.push(Open::Map { entries: Vec::new(), key: None, line, anchor });
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open::List { items, line, anchor }) => {
                    self.done(Node { value: Value::List(items), line }, anchor)?;
                }
                Some(Open::Map { entries, line, anchor, .. }) => {
                    self.done(Node { value: Value::Map(merged(entries)), line }, anchor)?;
                }
                None => return Err("a list or map ends that did not begin".to_owned()),
            },
            Event::Alias(id) => {
                let node = self.anchors.get(&id).cloned().ok_or("an alias of a value that has not ended")?;
                self.nodes += size(&node);
                self.done(Node { line, ..node }, 0)?;
            }
            _ => {}
        }
        if self.open.len() > DEEPEST {
            return Err(format!("more than {DEEPEST} lists and maps inside each other"));
        }
        Ok(())
    }

    /// Puts a value that has ended into the list or map around it.
    fn done(&mut self, node: Node, anchor: usize) -> Result<(), String> {
        self.nodes += 1;
        if self.nodes > MOST_NODES {
            return Err(format!("more than {MOST_NODES} values"));
        }
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(Open::List { items, .. }) => items.push(node),
            Some(Open::Map { entries, key, .. }) => match key.take() {
                None => match node.value {
                    Value::Scalar { text, .. } => *key = Some((text, node.line)),
                    _ => return Err("a list or map as a key".to_owned()),
                },
                Some((key, line)) => entries.push(Entry { key, line, node }),
            },
        }
        Ok(())
    }
}

fn size(node: &Node) -> usize {
    1 + match &node.value {
        Value::Scalar { .. } => 0,
        Value::List(items) => items.iter().map(size).sum(),
        Value::Map(entries) => entries.iter().map(|entry| size(&entry.node)).sum(),
    }
}

/// The entries with those of `<<` in front, which every own key overrides.
fn merged(entries: Vec<Entry>) -> Vec<Entry> {
    let (merges, own): (Vec<Entry>, Vec<Entry>) = entries.into_iter().partition(|entry| entry.key == "<<");
    let mut from = Vec::new();
    for merge in merges {
        match merge.node.value {
            Value::Map(entries) => from.extend(entries),
            Value::List(maps) => from.extend(maps.into_iter().rev().flat_map(|map| map.entries().to_vec())),
            Value::Scalar { .. } => {}
        }
    }
    from.retain(|entry| !own.iter().any(|own| own.key == entry.key));
    from.extend(own);
    from
}

#[cfg(test)]
mod tests;
