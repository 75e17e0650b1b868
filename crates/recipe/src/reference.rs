//! `recipes/README.md`, made from the table of keys so that it cannot go stale.

use std::fmt::Write;

use crate::keys::{Absent, Bounds, ELSEWHERE, EXCLUSIVE, KEYS, Key, Kind, TABLES};

const OPENING: &str = "\
# Recipes

<!-- Made from crates/recipe/src/keys.rs and reference.rs: UPDATE=1 cargo test -p finetune-recipe --test reference -->

A recipe is a TOML file that says what to train, on what, and how. The shortest one:

```toml
[model]
path = \"Qwen/Qwen3-0.6B\"

[data]
train = \"data/train.jsonl\"
```

Everything else has a default. `finetune validate RECIPE.toml` finds what is wrong with a recipe before anything is
trained; a mistyped key, or another tool's name for one, is an error that names the right key.

- Paths are relative to the recipe file, also those given with `--set`; `--output-dir` alone is relative to the current directory.
- `--set key.path=value` overrides any key and is checked the same way: `--set lora.rank=8 --set data.eval=valid.jsonl`. Strings
  need no quotes there. Setting one of two keys that exclude each other removes the other.
- The run directory holds `recipe.toml`, the recipe as resolved with every default written out. It runs by itself.
- A number may be written without a fraction: `alpha = 32` is `32.0`.
";

/// The whole page, in Markdown.
pub fn markdown() -> String {
    let mut page = String::from(OPENING);
    for table in [""].iter().chain(TABLES) {
        let heading = if table.is_empty() { "At the top of the file".to_owned() } else { format!("`[{table}]`") };
        let _ = writeln!(page, "\n## {heading}\n\n| key | value | default | meaning |\n| --- | --- | --- | --- |");
        for key in KEYS.iter().filter(|key| key.table() == *table) {
            let cells = [format!("`{}`", key.name()), kind(key.kind), default(key), key.about.to_owned()];
            let _ = writeln!(page, "| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
        }
    }
    let _ = writeln!(page, "\n## Rules between keys\n");
    for [one, other] in EXCLUSIVE {
        let _ = writeln!(page, "- `{one}` and `{other}`: one of them.");
    }
    page.push_str(
        "- `eval.early_stopping_patience`, `eval.samples` and `eval.exact_match` need `data.eval` (or a directory as `data.train`).\n\
         - `train.method = \"full\"` takes no key of `[lora]` and no `model.quantization`.\n\
         - `train.micro_batch_size` is a maximum: where a rank's share of the global batch is smaller, that is taken.\n",
    );
    let _ = writeln!(page, "\n## Coming from another tool\n\n| there | here |\n| --- | --- |");
    let named = KEYS.iter().flat_map(|key| key.rivals.iter().map(move |(theirs, note)| (*theirs, here(key, note))));
    let mut rows: Vec<(&str, String)> = named.filter(|(theirs, _)| !theirs.contains('.')).collect();
    rows.extend(ELSEWHERE.iter().map(|(theirs, instead)| (*theirs, (*instead).to_owned())));
    rows.sort();
    for (theirs, here) in rows {
        let _ = writeln!(page, "| `{theirs}` | {here} |");
    }
    page
}

fn here(key: &Key, note: &str) -> String {
    if note.is_empty() { format!("`{}`", key.path) } else { format!("`{}`; {note}", key.path) }
}

fn default(key: &Key) -> String {
    match key.default {
        Absent::Is(text) => format!("`{text}`"),
        Absent::Required => "required".to_owned(),
        Absent::Unset(meaning) => format!("unset: {meaning}"),
    }
}

fn kind(kind: Kind) -> String {
    match kind {
        Kind::Text => "text".to_owned(),
        Kind::Address => "host:port".to_owned(),
        Kind::Date => "date".to_owned(),
        Kind::Ports => "port, or range of ports".to_owned(),
        Kind::Path => "path".to_owned(),
        Kind::Paths => "path, or list of paths".to_owned(),
        Kind::Integer { min } => format!("integer, {min} or more"),
        Kind::Float(bounds) => format!("number, {}", range(bounds)),
        Kind::FloatPair(bounds) => format!("two numbers, each {}", range(bounds)),
        Kind::Boolean => "`true`, `false`".to_owned(),
        Kind::OneOf(words) => words.iter().map(|word| format!("`\"{word}\"`")).collect::<Vec<_>>().join(", "),
        Kind::Duration => "duration".to_owned(),
        Kind::Targets => "text, or list of names".to_owned(),
        Kind::Names => "list of names".to_owned(),
        Kind::Indices => "list of integers".to_owned(),
        Kind::IntegerByName { min } => format!("table of integers, {min} or more"),
        Kind::FloatByName(bounds) => format!("table of numbers, {}", range(bounds)),
    }
}

fn range(bounds: Bounds) -> &'static str {
    match bounds {
        Bounds::Positive => "above 0",
        Bounds::NotNegative => "0 or more",
        Bounds::Share => "0 to 1",
        Bounds::BelowOne => "0 or more and below 1",
    }
}
