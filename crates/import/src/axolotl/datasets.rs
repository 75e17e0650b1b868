//! axolotl's `datasets`: a list, in which each has a path, a type and names of columns.

use crate::draft::Draft;
use crate::places::{self, Rows};
use crate::source::{Given, Source};
use crate::text::quoted;
use crate::variables;
use crate::yaml::{Node, Value};

/// Keys of a dataset that are read here.
const READ: [&str; 12] = [
    "path",
    "data_files",
    "ds_type",
    "split",
    "type",
    "field",
    "field_messages",
    "message_field_role",
    "message_field_content",
    "message_property_mappings",
    "roles_to_train",
    "field_tools",
];

pub(super) fn map(source: &Source<'_>, draft: &mut Draft) {
    let given = source.get("datasets").or_else(|| source.get("pretraining_dataset"));
    if let Some(given) = &given {
        let sets = list(given.node);
        rows(draft, "data.train", given, &sets);
        format(draft, given, &sets);
        columns(draft, given, &sets);
        others(draft, given, &sets);
        train_on(source, draft, &sets);
    }
    evaluation(source, draft);
    template(source, draft);
    if let Some(given) = source.get("chat_template_kwargs") {
        variables::carry(draft, &given);
    }
    tokens(source, draft);
}

/// The datasets: maps of a list, or one map.
fn list(node: &Node) -> Vec<&Node> {
    match &node.value {
        Value::List(items) => items.iter().filter(|item| matches!(item.value, Value::Map(_))).collect(),
        Value::Map(_) => vec![node],
        Value::Scalar { .. } => Vec::new(),
    }
}

fn text<'a>(set: &'a Node, key: &str) -> Option<&'a str> {
    set.entry(key)?.node.text()
}

/// Texts of a list; one text is a list of one.
pub(super) fn texts(node: &Node) -> Option<Vec<String>> {
    match &node.value {
        Value::List(items) => items.iter().map(|item| item.text().map(str::to_owned)).collect(),
        Value::Scalar { .. } => Some(vec![node.text()?.to_owned()]),
        Value::Map(_) => None,
    }
}

fn rows(draft: &mut Draft, key: &'static str, given: &Given<'_>, sets: &[&Node]) {
    let mut rows = Rows::default();
    for set in sets {
        let path = text(set, "path").unwrap_or_default();
        let files = set.entry("data_files").and_then(|entry| texts(&entry.node)).unwrap_or_default();
        let reader = matches!(path, "json" | "csv" | "parquet" | "text" | "arrow");
        match (reader, files.is_empty()) {
            (true, false) => files.iter().for_each(|file| rows.add(file, None)),
            // Files of a data set of the hub have no name of their own here.
            (false, false) => rows.add(&format!("{path}: {}", files.join(", ")), None),
            _ if text(set, "ds_type").is_some() && !places::is_path(path) => rows.add(&format!("./{path}"), None),
            _ => rows.add(path, text(set, "split")),
        }
    }
    if sets.is_empty() {
        draft.left(given, "not understood: a list of datasets is meant");
        return;
    }
    rows.write(draft, key, &[given]);
}

/// Our format of a type of axolotl, and what is different.
fn kind(set: &Node) -> Option<(&'static str, &'static str)> {
    match text(set, "type")? {
        "chat_template" => Some(match text(set, "field_messages") {
            Some("conversations") if is_sharegpt(set) => ("sharegpt", "`conversations` of `from` and `value`"),
            _ => ("messages", "through the chat template"),
        }),
        "sharegpt" => Some(("sharegpt", "through the model's chat template here")),
        "alpaca" => Some(("alpaca", "through the model's chat template here, not Alpaca's own words")),
        "completion" | "pretrain" => Some(("text", "every token is trained on")),
        _ => None,
    }
}

fn is_sharegpt(set: &Node) -> bool {
    names(set).iter().all(|(ours, theirs)| match *ours {
        "role" => theirs == "from",
        "content" => theirs == "value",
        _ => true,
    })
}

fn format(draft: &mut Draft, given: &Given<'_>, sets: &[&Node]) {
    let kinds: Vec<Option<(&str, &str)>> = sets.iter().map(|set| kind(set)).collect();
    match kinds.first() {
        Some(Some((ours, why))) if kinds.iter().all(|kind| kind.is_some_and(|kind| kind.0 == *ours)) => {
            let first = Given { path: format!("{}.type", given.path), line: sets[0].line, node: type_of(sets[0]) };
            draft.other("data.format", quoted(ours), &[&first], why);
        }
        _ => {
            for set in sets {
                if let Some(entry) = set.entry("type") {
                    let path = format!("{}.type", given.path);
                    let named = Given { path, line: entry.line, node: &entry.node };
                    match kind(set) {
                        Some(_) => draft.left(&named, "one format for all rows here; `auto` tells it from the rows"),
                        None => draft.left(&named, "this type is not known here: write the rows in a format of [data]"),
                    }
                }
            }
        }
    }
}

fn type_of(set: &Node) -> &Node {
    set.entry("type").map_or(set, |entry| &entry.node)
}

/// (our key, their name) of what a dataset names.
fn names(set: &Node) -> Vec<(&'static str, String)> {
    let mut names = Vec::new();
    for (theirs, ours) in [
        ("field_messages", "messages"),
        ("message_field_role", "role"),
        ("message_field_content", "content"),
        ("field_tools", "tools"),
        ("field", "text"),
    ] {
        names.extend(text(set, theirs).map(|name| (ours, name.to_owned())));
    }
    for property in set.entry("message_property_mappings").iter().flat_map(|entry| entry.node.entries()) {
        let ours = match property.key.as_str() {
            "role" => "role",
            "content" => "content",
            _ => continue,
        };
        names.retain(|(known, _)| *known != ours);
        names.extend(property.node.text().map(|name| (ours, name.to_owned())));
    }
    names
}

/// Roles, our key for a word that means each, and words that are known without it.
const ROLES: [(&str, &str, &[&str]); 4] = [
    ("user", "user_tag", &["user", "human"]),
    ("assistant", "assistant_tag", &["assistant", "gpt", "bot", "model", "chatbot"]),
    ("system", "system_tag", &["system"]),
    ("tool", "tool_tag", &["tool", "observation"]),
];

/// The words that `roles` has for a role and that are not `known`.
fn words(set: &Node, role: &str, known: &[&str]) -> Vec<String> {
    let roles = set.entry("roles").map(|entry| &entry.node);
    let words = roles.and_then(|roles| roles.entry(role)).and_then(|entry| texts(&entry.node)).unwrap_or_default();
    words.into_iter().filter(|word| !known.contains(&word.as_str())).collect()
}

/// (our key, their word) for who speaks. `all`: words that every conversation of ShareGPT has, too.
fn tags(set: &Node, all: bool) -> Vec<(&'static str, String)> {
    let tag = |(role, tag, known): &(&str, &'static str, &[&str])| {
        let known: &[&str] = known;
        let other = words(set, role, if all { &known[..1] } else { known });
        let strange = words(set, role, known);
        Some((*tag, strange.into_iter().next().or(other.into_iter().next())?))
    };
    ROLES.iter().filter_map(tag).collect()
}

/// Whether each role has one word at most that is not known.
fn has_one_word_each(set: &Node) -> bool {
    let is_role = |name: &str| ROLES.iter().any(|(role, ..)| *role == name);
    let mut roles = set.entry("roles").into_iter().flat_map(|entry| entry.node.entries());
    roles.all(|entry| is_role(&entry.key) && texts(&entry.node).is_some())
        && ROLES.iter().all(|(role, _, known)| words(set, role, known).len() <= 1)
}

fn columns(draft: &mut Draft, given: &Given<'_>, sets: &[&Node]) {
    let of = |set: &Node| match kind(set) {
        Some(("sharegpt", _)) => tags(set, false),
        Some(("messages", _)) => [names(set), tags(set, true)].concat(),
        _ => names(set),
    };
    let all: Vec<Vec<(&str, String)>> = sets.iter().map(|set| of(set)).collect();
    match all.first() {
        Some(first) if all.iter().all(|names| names == first) => places::columns(draft, first, &[given]),
        _ => draft
            .left(given, "each dataset has names of its own for the keys of a row; `data.columns` holds for all rows"),
    }
}

/// Keys of datasets that nothing above has read, each once.
fn others(draft: &mut Draft, given: &Given<'_>, sets: &[&Node]) {
    for entry in sets.iter().flat_map(|set| set.entries()) {
        let path = format!("{}.{}", given.path, entry.key);
        let named = Given { path, line: entry.line, node: &entry.node };
        match entry.key.as_str() {
            _ if entry.node.is_null() => draft.unset(&named),
            "split" if entry.node.text().is_some_and(|split| split.contains('[')) => {
                draft.left(&named, "a part of a split; `data.max_rows` takes the first rows");
            }
            "roles_to_train" if texts(&entry.node).is_some_and(|roles| roles == ["assistant"] || roles == ["gpt"]) => {
                draft.idle(&named, "train_on is \"assistant\"");
            }
            "roles_to_train" => draft.left(&named, "ours trains on the assistant's turns, or on all"),
            // `columns` has them.
            "roles" if sets.iter().all(|set| has_one_word_each(set)) => {}
            "roles" => draft.left(&named, "`data.columns` has one word for each role, such as user_tag"),
            "train_on_eos" | "train_on_eot" if entry.node.text() == Some("turn") => {
                draft.idle(&named, "the end of each trained turn is trained on here too");
            }
            "chat_template" if entry.node.text() == Some("tokenizer_default") => {
                draft.idle(&named, "the model's own template is used here too");
            }
            "trust_remote_code" => draft.idle(&named, "no code of others is run"),
            "message_property_mappings" => {
                let other =
                    entry.node.entries().iter().any(|property| !["role", "content"].contains(&property.key.as_str()));
                if other {
                    draft.left(&named, "of these, role and content have names of their own here");
                }
            }
            key if READ.contains(&key) => {}
            _ => draft.left(&named, "no counterpart for this key of a dataset"),
        }
    }
}

/// Which tokens are trained on.
fn train_on(source: &Source<'_>, draft: &mut Draft, sets: &[&Node]) {
    let Some(given) = source.get("train_on_inputs") else { return };
    let text_only = sets.iter().all(|set| kind(set).is_some_and(|kind| kind.0 == "text"));
    match given.node.bool() {
        Some(true) => draft.other("data.train_on", quoted("all"), &[&given], "every token"),
        Some(false) if text_only => draft.idle(&given, "plain text is trained on as a whole"),
        Some(false) => draft.other("data.train_on", quoted("assistant"), &[&given], "the answers"),
        None => draft.left(&given, "not understood: true or false is meant"),
    }
}

fn evaluation(source: &Source<'_>, draft: &mut Draft) {
    if let Some(given) = source.get("test_datasets") {
        rows(draft, "data.eval", &given, &list(given.node));
    }
    let Some(given) = source.get("val_set_size") else { return };
    match given.node.number() {
        Some(0.0) => draft.unset(&given),
        Some(share) if share < 1.0 && !draft.has("data.eval") => {
            draft.other("data.eval_share", format!("{share:?}"), &[&given], "a share of the rows, by a hash of each");
        }
        Some(_) => draft.left(&given, "a number of rows there; ours is a share below 1, or a file"),
        None => draft.left(&given, "not understood: a number is meant"),
    }
}

/// The chat template: a name that only axolotl knows, or a file.
fn template(source: &Source<'_>, draft: &mut Draft) {
    if let Some(given) = source.get("chat_template") {
        match given.node.text().unwrap_or_default() {
            "tokenizer_default" => draft.idle(&given, "the model's own template is used here too"),
            "jinja" => draft.idle(&given, "the template is chat_template_jinja"),
            _ => draft
                .left(&given, "the model's own template is used here; `chat_template` in [data] names a Jinja file"),
        }
    }
    if let Some(given) = source.get("chat_template_jinja") {
        match given.node.text() {
            Some(path) if path.ends_with(".jinja") || path.ends_with(".j2") => {
                draft.other("data.chat_template", quoted(path), &[&given], places::RELATIVE);
            }
            _ => draft.left(&given, "write the template into a file, which `chat_template` in [data] names"),
        }
    }
}

/// Special tokens change the tokenizer, but for padding, which there is none of here.
fn tokens(source: &Source<'_>, draft: &mut Draft) {
    if let Some(given) = source.get("special_tokens.pad_token") {
        draft.idle(&given, "rows are never padded");
    }
    for name in ["bos_token", "eos_token", "unk_token"] {
        if let Some(given) = source.get(&format!("special_tokens.{name}")) {
            draft.left(&given, "the tokenizer of the model is used as it is");
        }
    }
    if let Some(given) = source.get("eot_tokens") {
        draft.left(&given, "the end of a turn is where the chat template ends it");
    }
}
