//! Which rows are held back for evaluation (`data.eval_share`), and what a part of the rows is.

use finetune_recipe::Format;
use serde_json::{Map, Value};

use crate::row;

/// Which rows of the files are read, if `data.eval_share` holds a part of them back. Without it
/// [`Part::Train`] is all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The rows to train on.
    Train,
    /// The rows that are held back.
    HeldBack,
}

impl Part {
    /// The part that a row belongs to.
    ///
    /// It depends on what the row says in the keys of its format, and on nothing else: not on its
    /// place, its file, other rows, the order of keys, or the machine. Equal rows go the same way. A
    /// row that is held back at some share is also held back at every larger one.
    pub(crate) fn of(row: &Map<String, Value>, format: Format, share: f64) -> Part {
        let mut text = String::new();
        let mut keys: Vec<&str> = row::used(format).iter().copied().filter(|key| says(row.get(*key))).collect();
        keys.sort_unstable();
        for key in keys {
            text.push_str(key);
            text.push('\0');
            canonical(&row[key], &mut text);
            text.push('\0');
        }
        let hash = blake3::hash(text.as_bytes());
        let [first, ..] = *hash.as_bytes().as_chunks::<8>().0 else { return Part::Train };
        // A product with a power of two is exact.
        let below = (share * 2f64.powi(64)) as u128;
        if u128::from(u64::from_le_bytes(first)) < below { Part::HeldBack } else { Part::Train }
    }
}

/// Whether a value says something. A table has an empty cell where a row of JSON has no key.
fn says(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Array(items)) => !items.is_empty(),
        Some(_) => true,
    }
}

/// A value with its keys in order, without those that are null: Arrow gives each object the keys of
/// all.
fn canonical(value: &Value, text: &mut String) {
    match value {
        Value::Object(object) => {
            let mut entries: Vec<_> = object.iter().filter(|(_, value)| !value.is_null()).collect();
            entries.sort_unstable_by_key(|(key, _)| key.as_str());
            text.push('{');
            for (key, value) in entries {
                text.push_str(&Value::from(key.as_str()).to_string());
                text.push(':');
                canonical(value, text);
                text.push(',');
            }
            text.push('}');
        }
        Value::Array(items) => {
            text.push('[');
            for item in items {
                canonical(item, text);
                text.push(',');
            }
            text.push(']');
        }
        other => text.push_str(&other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn part(row: &Value, share: f64) -> Part {
        Part::of(row.as_object().expect("a row"), Format::PromptCompletion, share)
    }

    #[test]
    fn the_part_depends_on_what_the_row_says_only() {
        for n in 0..200 {
            let row = json!({"prompt": format!("{n}"), "completion": "b"});
            let same = [
                json!({"completion": "b", "prompt": format!("{n}")}),
                json!({"prompt": format!("{n}"), "completion": "b", "id": n, "system": null, "tools": []}),
                json!({"prompt": format!("{n}"), "completion": "b", "system": ""}),
            ];
            assert!(same.iter().all(|other| part(other, 0.3) == part(&row, 0.3)), "{n}");
            if part(&row, 0.3) == Part::HeldBack {
                assert_eq!(part(&row, 0.4), Part::HeldBack, "{n}");
            }
        }
        let chat = json!({"prompt": [{"role": "user", "content": "a"}], "completion": [{"content": "b"}]});
        let filled =
            json!({"prompt": [{"role": "user", "content": "a", "name": null}], "completion": [{"content": "b"}]});
        assert!((1..100).all(|n| part(&chat, f64::from(n) / 100.0) == part(&filled, f64::from(n) / 100.0)));
    }

    /// The numbers are those of every machine and version: rows must not change sides.
    #[test]
    fn the_share_is_what_was_asked_for_and_stays() {
        let held = |n: &u32| part(&json!({"prompt": n.to_string(), "completion": "b"}), 0.1) == Part::HeldBack;
        let count = (0..10_000).filter(held).count();
        // 1,000 expected; 150 is five standard deviations.
        assert!(count.abs_diff(1000) < 150, "{count}");
        let first: Vec<u32> = (0..60).filter(held).collect();
        assert_eq!(first, FIRST);
    }

    /// Computed once with Python's blake3 from the same text.
    const FIRST: [u32; 5] = [10, 31, 35, 36, 48];
}
