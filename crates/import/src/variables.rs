//! Variables of a chat template: a map of YAML as an inline table of TOML.

use crate::draft::Draft;
use crate::source::Given;
use crate::text::{number, quoted};
use crate::yaml::{Node, Value};

/// Lists and maps inside each other, at most.
const DEEPEST: usize = 8;

/// `data.chat_template_kwargs`, from a map of the same meaning.
pub(crate) fn carry(draft: &mut Draft, given: &Given<'_>) {
    let table = matches!(given.node.value, Value::Map(_)).then(|| value(given.node, DEEPEST)).flatten();
    match table {
        Some(table) => draft.carry("data.chat_template_kwargs", table, given),
        None => draft.left(given, "not understood: a map of true, false, numbers, texts and lists is meant"),
    }
}

/// As TOML. None for a null, which TOML has not, and for a number whose value is not clear.
fn value(node: &Node, deepest: usize) -> Option<String> {
    let inside = deepest.checked_sub(1)?;
    match &node.value {
        Value::Scalar { text, plain: false } => Some(quoted(text)),
        Value::Scalar { text, plain: true } => plain(node, text),
        Value::List(items) => {
            let items = items.iter().map(|item| value(item, inside)).collect::<Option<Vec<String>>>()?;
            Some(format!("[{}]", items.join(", ")))
        }
        Value::Map(entries) => {
            // Of a key that stands twice the last counts.
            let counting = |at: usize| !entries[at + 1..].iter().any(|later| later.key == entries[at].key);
            let kept = entries.iter().enumerate().filter(|(at, _)| counting(*at));
            let pair = |key: &str, node: &Node| Some(format!("{} = {}", name(key), value(node, inside)?));
            let pairs = kept.map(|(_, entry)| pair(&entry.key, &entry.node)).collect::<Option<Vec<String>>>()?;
            Some(if pairs.is_empty() { "{}".to_owned() } else { format!("{{ {} }}", pairs.join(", ")) })
        }
    }
}

/// A scalar without quotes, as PyYAML reads it.
fn plain(node: &Node, text: &str) -> Option<String> {
    if node.is_null() {
        return None;
    }
    if let Some(flag) = node.bool() {
        return Some(flag.to_string());
    }
    if let Some(found) = node.number() {
        let whole = text.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'+' | b'-' | b'_'));
        return (!whole || node.integer().is_some()).then(|| number(found, text));
    }
    (!is_other_number(text)).then(|| quoted(text))
}

/// Whether PyYAML takes a text for a number that [`Node::number`] does not: `010`, `0x1f`, `1:30`, `.inf`.
fn is_other_number(text: &str) -> bool {
    let digits = text.trim_start_matches(['-', '+']);
    let based = digits.len() > 1 && digits.starts_with('0');
    let counted = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit() || b":._".contains(&byte));
    based && digits.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        || counted
        || digits.starts_with('.')
}

fn name(key: &str) -> String {
    let bare = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
    if !key.is_empty() && key.bytes().all(bare) { key.to_owned() } else { quoted(key) }
}
