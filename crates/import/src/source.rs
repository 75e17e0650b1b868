//! The tree of a configuration, with a record of the keys that were looked at.

use std::cell::RefCell;
use std::collections::BTreeSet;

use crate::yaml::{Entry, Node, Value};

/// Maps whose keys are named one by one, even if none of them was taken over.
const TABLES: [&str; 8] = [
    "tokenizer",
    "checkpointer",
    "model",
    "optimizer",
    "lr_scheduler",
    "lora_parameters",
    "lr_schedule",
    "optimizer_config",
];

/// A configuration that is being mapped.
pub(crate) struct Source<'a> {
    root: &'a Node,
    /// Paths of keys that a mapper has taken over.
    used: RefCell<BTreeSet<String>>,
}

/// A key that the user gave a value.
#[derive(Clone, Debug)]
pub(crate) struct Given<'a> {
    /// "lora_parameters.rank".
    pub(crate) path: String,
    /// Of the key, from 1.
    pub(crate) line: usize,
    pub(crate) node: &'a Node,
}

impl Given<'_> {
    /// "rank = 8 (line 3)".
    pub(crate) fn named(&self) -> String {
        format!("{} = {} (line {})", self.name(), self.node.shown(), self.line)
    }

    /// "rank (line 3)".
    pub(crate) fn place(&self) -> String {
        format!("{} (line {})", self.name(), self.line)
    }

    /// The path on one line, and short.
    fn name(&self) -> String {
        crate::text::short(&self.path, 80)
    }

    pub(crate) fn is(&self, word: &str) -> bool {
        self.node.text().is_some_and(|text| text.eq_ignore_ascii_case(word))
    }
}

impl<'a> Source<'a> {
    pub(crate) fn new(root: &'a Node) -> Source<'a> {
        Source { root, used: RefCell::default() }
    }

    /// The value at "a.b" if there is one that is not null. The key counts as looked at.
    pub(crate) fn get(&self, path: &str) -> Option<Given<'a>> {
        let entry = self.entry(path)?;
        if entry.node.is_null() {
            return None;
        }
        self.used.borrow_mut().insert(path.to_owned());
        Some(Given { path: path.to_owned(), line: entry.line, node: &entry.node })
    }

    /// The null at "a.b", if a null in that place means something. The key counts as looked at.
    pub(crate) fn null(&self, path: &str) -> Option<Given<'a>> {
        let entry = self.entry(path).filter(|entry| entry.node.is_null())?;
        self.used.borrow_mut().insert(path.to_owned());
        Some(Given { path: path.to_owned(), line: entry.line, node: &entry.node })
    }

    /// The value at a path, without a mark.
    pub(crate) fn peek(&self, path: &str) -> Option<&'a Node> {
        self.entry(path).map(|entry| &entry.node).filter(|node| !node.is_null())
    }

    pub(crate) fn text(&self, path: &str) -> Option<&'a str> {
        self.peek(path)?.text()
    }

    /// Whether the value at a path is a yes.
    pub(crate) fn is_on(&self, path: &str) -> bool {
        self.peek(path).and_then(Node::bool) == Some(true)
    }

    fn entry(&self, path: &str) -> Option<&'a Entry> {
        let (parents, name) = path.rsplit_once('.').map_or((None, path), |(parents, name)| (Some(parents), name));
        let mut node = self.root;
        for parent in parents.into_iter().flat_map(|parents| parents.split('.')) {
            node = &node.entry(parent)?.node;
        }
        node.entry(name)
    }

    /// Every key that no mapper has taken over, with its line. Of a map in which some keys were
    /// taken over, the others are listed one by one.
    pub(crate) fn rest(&self) -> Vec<Given<'a>> {
        let mut rest = Vec::new();
        self.collect("", self.root, &mut rest);
        rest
    }

    /// Keys that stand twice in one map: of each all but the last.
    pub(crate) fn doubles(&self) -> Vec<Given<'a>> {
        let entries = self.root.entries();
        let again = |at: usize, entry: &Entry| entries[at + 1..].iter().any(|later| later.key == entry.key);
        let doubles = entries.iter().enumerate().filter(|(at, entry)| again(*at, entry));
        doubles.map(|(_, entry)| Given { path: entry.key.clone(), line: entry.line, node: &entry.node }).collect()
    }

    fn collect(&self, prefix: &str, node: &'a Node, rest: &mut Vec<Given<'a>>) {
        for (at, entry) in node.entries().iter().enumerate() {
            let path = if prefix.is_empty() { entry.key.clone() } else { format!("{prefix}.{}", entry.key) };
            let last = !node.entries()[at + 1..].iter().any(|later| later.key == entry.key);
            let (itself, inside) = {
                let used = self.used.borrow();
                let below = format!("{path}.");
                (used.contains(&path), used.iter().any(|used| used.starts_with(&below)))
            };
            match &entry.node.value {
                _ if itself || !last => {}
                Value::Map(_) if inside || TABLES.contains(&path.as_str()) => self.collect(&path, &entry.node, rest),
                _ => rest.push(Given { path, line: entry.line, node: &entry.node }),
            }
        }
    }
}
