//! Conversations in files: rows to train on, and conversations to go on with.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use finetune_store::recognize;
use serde_json::{Map, Value, json};

use crate::commands::conversation;
use crate::failure::Failure;

/// The most bytes of a row that is looked at to tell what a file holds.
const LOOKED_AT: u64 = 1 << 20;

/// Adds a row to a file of such rows. Nothing else is written to.
pub(super) fn save(path: &Path, row: &Value) -> Result<(), Failure> {
    let failed = |error: std::io::Error| {
        Failure::arguments(format!("/save {}: {error}", path.display()), "name a file in a folder that is there")
    };
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(failed)?;
    let (empty, whole_lines) = (is_empty(&file).map_err(failed)?, ends_with_line(&mut file).map_err(failed)?);
    if !empty && !begins_with_row(&mut file).map_err(failed)? {
        return Err(Failure::arguments(
            format!("/save {}: it is {}, not rows of messages", path.display(), recognize(path).describe()),
            "name a new file, or one that has rows as {\"messages\": [...]}",
        ));
    }
    let start = if empty || whole_lines { "" } else { "\n" };
    file.write_all(format!("{start}{row}\n").as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
}

fn is_empty(file: &File) -> std::io::Result<bool> {
    Ok(file.metadata()?.len() == 0)
}

fn ends_with_line(file: &mut File) -> std::io::Result<bool> {
    if is_empty(file)? {
        return Ok(true);
    }
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

/// Whether the first line is a conversation.
fn begins_with_row(file: &mut File) -> std::io::Result<bool> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(LOOKED_AT).read_to_end(&mut bytes)?;
    let first = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok(serde_json::from_slice::<Value>(first).is_ok_and(|row| row["messages"].is_array()))
}

/// The conversation of a file. Of several rows it is the last one; then its number is returned too.
pub(super) fn load(option: &str, path: &Path) -> Result<(Map<String, Value>, Option<usize>), Failure> {
    let text = conversation::read(option, path)?;
    let rows: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let is_row = |line: &&str| line.trim_start().starts_with('{') && line.trim_end().ends_with('}');
    let (text, number) = match rows.last() {
        Some(last) if rows.len() > 1 && rows.iter().all(is_row) => (*last, Some(rows.len())),
        _ => (text.as_str(), None),
    };
    let object = conversation::object(option, text, path)?;
    if object["messages"] == json!([]) {
        return Err(Failure::arguments(
            format!("{option} {} has no message", path.display()),
            "a conversation is meant, as /save writes it",
        ));
    }
    Ok((object, number))
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
mod tests {
    use super::*;

    #[test]
    fn rows_are_added_and_the_last_is_loaded() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("own.jsonl");
        let row = |text: &str| json!({"messages": [{"role": "user", "content": text}]});
        save(&path, &row("one")).expect("a new file");
        // As an editor leaves it.
        let text = std::fs::read_to_string(&path).expect("text");
        std::fs::write(&path, text.trim_end()).expect("written");
        save(&path, &row("two\nlines")).expect("one more row");
        let text = std::fs::read_to_string(&path).expect("text");
        let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(rows, [row("one"), row("two\nlines")]);
        let (loaded, number) = load("/load", &path).expect("a conversation");
        assert_eq!((Value::Object(loaded), number), (rows[1].clone(), Some(2)));
    }

    #[test]
    fn other_files_are_not_touched() {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in [
            ("recipe.toml", "seed = 1\n"),
            ("notes.txt", "Hello"),
            ("prompts.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n"),
            ("list.json", "[{\"messages\": []}]"),
        ] {
            let path = folder.path().join(name);
            std::fs::write(&path, text).expect("written");
            let refused = save(&path, &json!({"messages": []})).expect_err(name);
            assert!(refused.lines().contains("not rows of messages"), "{}", refused.lines());
            assert_eq!(std::fs::read_to_string(&path).expect("text"), text, "{name}");
        }
        assert!(save(folder.path(), &json!({})).is_err(), "a folder");
        assert!(save(&folder.path().join("no/such.jsonl"), &json!({})).is_err());
        for (name, says) in [("notes.txt", "no JSON"), ("nothing", "cannot be read"), ("prompts.jsonl", "no list")] {
            let refused = load("/load", &folder.path().join(name)).expect_err(name);
            assert!(refused.lines().contains(says), "{}", refused.lines());
        }
    }
}
