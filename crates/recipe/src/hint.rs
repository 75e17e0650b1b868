//! What to write instead of a key, table or value that is unknown.

use toml::de::DeValue;

use crate::choices::ValueRival;
use crate::keys::{ELSEWHERE, KEYS, Key, TABLE_RIVALS, TABLES};

/// Longer names, in bytes, are no typing slips. They are not compared, which would take time.
const LONGEST_NAME: usize = 64;

/// A name as it may stand in a message: on one line, and cut where it is longer than one.
pub(crate) fn shown(name: &str) -> String {
    let short: String = name.chars().take(LONGEST_NAME).collect();
    let dots = if short.len() < name.len() { "…" } else { "" };
    format!("{}{dots}", short.escape_debug())
}

/// The TOML type of a value, in words.
pub(crate) fn type_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// Hints for a key that is not in this table; "" is the top. The likeliest reason decides.
pub(crate) fn unknown_key(table: &str, written: &str) -> Vec<String> {
    // In this order: another tool's name in this table, our name in another table, another tool's
    // name in any table, a typing slip.
    let name = plain(written);
    let at = |key: &&Key| key.table() == table && key.name() == name;
    if let Some(key) = KEYS.iter().find(at) {
        return vec![format!("did you mean `{}`?", key.name())];
    }
    let scoped = format!("{table}.{name}");
    if let Some((key, note)) = rival(&scoped) {
        return vec![ours(table, key, note)];
    }
    if let Some((_, instead)) = ELSEWHERE.iter().find(|(theirs, _)| *theirs == scoped) {
        return vec![(*instead).to_owned()];
    }
    if TABLES.contains(&name.as_str()) {
        return vec![format!("[{name}] is a table of its own, not inside [{table}]")];
    }
    let same: Vec<&Key> = KEYS.iter().filter(|key| key.name() == name).collect();
    if !same.is_empty() {
        return vec![belongs(&name, &same)];
    }
    if let Some((key, note)) = rival(&name) {
        return vec![ours(table, key, note)];
    }
    if let Some((_, instead)) = ELSEWHERE.iter().find(|(theirs, _)| *theirs == name) {
        return vec![(*instead).to_owned()];
    }
    nearest(table, &name).into_iter().chain(all_names(table)).take(1).collect()
}

/// Hints for a table that is unknown.
pub(crate) fn unknown_table(written: &str) -> Vec<String> {
    let name = plain(written);
    let rival = TABLE_RIVALS.iter().find(|(theirs, _)| *theirs == name).map(|(_, ours)| *ours);
    if let Some(table) = rival {
        return vec![format!("ours is [{table}]")];
    }
    if let Some((_, instead)) = ELSEWHERE.iter().find(|(theirs, _)| *theirs == name) {
        return vec![(*instead).to_owned()];
    }
    if let Some((_, table)) = closest(&name, TABLES.iter().map(|table| (*table, *table))) {
        return vec![format!("did you mean [{table}]?")];
    }
    if let Some(key) = KEYS.iter().find(|key| key.name() == name && key.table() != "") {
        return vec![format!("`{name}` is a key in [{}]", key.table())];
    }
    vec![format!("the tables are [{}]", TABLES.join("], ["))]
}

/// Hints for a word that is not among the allowed ones.
pub(crate) fn wrong_word(written: &str, allowed: &'static [&'static str], rivals: &[ValueRival]) -> Vec<String> {
    let word = written.trim().to_lowercase();
    let rival = rivals.iter().find(|rival| rival.theirs == word);
    let near = closest(&word, allowed.iter().map(|allowed| (*allowed, *allowed))).map(|(_, ours)| ours);
    let mut hints = Vec::new();
    match (rival.map(|rival| rival.ours).or(near), rival.map_or("", |rival| rival.instead)) {
        (Some(ours), "") => hints.push(format!("did you mean \"{ours}\"?")),
        (Some(_), instead) => hints.push(instead.to_owned()),
        (None, _) => {}
    }
    if matches!(word.as_str(), "none" | "null" | "") && rival.is_none() {
        hints.push("leave the key out for its default".to_owned());
    }
    hints
}

/// A name in our spelling: lower case, underscores.
fn plain(name: &str) -> String {
    name.trim().replace(['-', ' '], "_").to_lowercase()
}

/// The key that other tools call by this name, and the note on how to convert.
fn rival(name: &str) -> Option<(&'static Key, &'static str)> {
    let note = |key: &'static Key| {
        let (_, note) = key.rivals.iter().find(|(theirs, _)| *theirs == name)?;
        Some((key, *note))
    };
    KEYS.iter().find_map(note)
}

/// Our key for another tool's name that was found in `table`.
fn ours(table: &str, key: &Key, note: &str) -> String {
    let note = if note.is_empty() { String::new() } else { format!("; {note}") };
    if key.table() == table {
        return format!("ours is `{}`{note}", key.name());
    }
    format!("ours is `{}` {}{note}", key.name(), place(key.table()))
}

/// Where a table's keys stand.
fn place(table: &str) -> String {
    if table.is_empty() { "at the top, before the first [table]".to_owned() } else { format!("in [{table}]") }
}

/// The tables that a key of this name belongs in.
fn belongs(name: &str, keys: &[&Key]) -> String {
    let places: Vec<String> = keys.iter().map(|key| place(key.table())).collect();
    match places.split_last() {
        Some((last, rest)) if !rest.is_empty() => {
            format!("`{name}` belongs {} or {last}", rest.join(", "))
        }
        _ => format!("`{name}` belongs {}", places.join("")),
    }
}

/// The key nearest in spelling. Of equally near ones, a key of this table comes first, then any
/// key, then another tool's name.
fn nearest(table: &str, name: &str) -> Option<String> {
    let here = closest(name, KEYS.iter().filter(|key| key.table() == table).map(|key| (key.name(), key)));
    let elsewhere = closest(name, KEYS.iter().map(|key| (key.name(), key)));
    let rivals = KEYS.iter().flat_map(|key| key.rivals.iter().map(move |(theirs, _)| (bare(theirs), key)));
    let theirs = closest(name, rivals);
    let candidates = [here, elsewhere, theirs].into_iter().flatten();
    let (_, key) = candidates.min_by_key(|(distance, _)| *distance)?;
    if key.table() == table {
        return Some(format!("did you mean `{}`?", key.name()));
    }
    Some(format!("did you mean `{}` {}?", key.name(), place(key.table())))
}

/// A rival's name without its table.
fn bare(rival: &'static str) -> &'static str {
    rival.split_once('.').map_or(rival, |(_, name)| name)
}

/// The candidate with the fewest typing slips, and their number. `None` if the slips are too many:
/// more than one, and more than one in four letters.
fn closest<T>(name: &str, candidates: impl Iterator<Item = (&'static str, T)>) -> Option<(usize, T)> {
    if name.len() < 2 || name.len() > LONGEST_NAME {
        return None;
    }
    let slips = |candidate: &str| strsim::damerau_levenshtein(name, candidate);
    let near = candidates.filter(|(candidate, _)| candidate.len() > 1).map(|(candidate, item)| {
        let distance = slips(candidate);
        (distance, distance <= (candidate.len().max(name.len()) / 4).max(1), item)
    });
    near.filter(|(_, close, _)| *close)
        .min_by_key(|(distance, _, _)| *distance)
        .map(|(distance, _, item)| (distance, item))
}

/// The name of a list nearest in spelling.
pub(crate) fn nearest_of(name: &str, names: &[&'static str]) -> Option<&'static str> {
    closest(&plain(name), names.iter().map(|name| (*name, *name))).map(|(_, name)| name)
}

/// The names of all keys of a table.
fn all_names(table: &str) -> Option<String> {
    let names: Vec<String> =
        KEYS.iter().filter(|key| key.table() == table).map(|key| format!("`{}`", key.name())).collect();
    let place = if table.is_empty() { "at the top".to_owned() } else { format!("in [{table}]") };
    Some(format!("the keys {place} are {}", names.join(", ")))
}
