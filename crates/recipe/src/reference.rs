//! `recipes/README.md`, made from the declarations of the keys so that it cannot go stale.

use std::fmt::Write;

use crate::keys::{Absent, ELSEWHERE, KEYS, Key, TABLES};

const OPENING: &str = "\
# Recipes

<!-- Made from crates/recipe/src/tables and reference.rs:
UPDATE=1 cargo test -p finetune-recipe --test reference -->

A recipe is a TOML file that says what to train, on what, and how. The shortest one:

```toml
[model]
path = \"Qwen/Qwen3-0.6B\"

[data]
train = \"data/train.jsonl\"
```

Everything else has a default. `finetune validate RECIPE.toml` finds what is wrong with a recipe
before anything is trained; a mistyped key, or another tool's name for one, is an error that names
the right key.

- Paths are relative to the recipe file, also those given with `--set`; `--output-dir` alone is
  relative to the current directory.
- `--set key.path=value` overrides any key and is checked the same way:
  `--set lora.rank=8 --set data.eval=valid.jsonl`. Strings need no quotes there. Setting one of two
  keys that exclude each other removes the other.
- The run directory holds `recipe.toml`, the recipe as resolved with every default written out. It
  runs by itself.
- A number may be written without a fraction: `alpha = 32` is `32.0`.
";

/// The whole page, in Markdown.
pub fn markdown() -> String {
    let mut page = String::from(OPENING);
    for table in [""].iter().chain(TABLES) {
        let heading = if table.is_empty() { "At the top of the file".to_owned() } else { format!("`[{table}]`") };
        let _ = writeln!(page, "\n## {heading}\n\n| key | value | default | meaning |\n| --- | --- | --- | --- |");
        for key in KEYS.iter().filter(|key| key.table() == *table) {
            let cells = [format!("`{}`", key.name()), (key.words)(), default(key), key.about.to_owned()];
            let _ = writeln!(page, "| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
        }
    }
    let _ = writeln!(page, "\n## Rules between keys\n");
    for key in KEYS {
        if let Some(one) = key.replaces() {
            let _ = writeln!(page, "- `{one}` and `{}`: one of them.", key.path);
        }
    }
    page.push_str(
        "- `eval.early_stopping_patience`, `eval.samples` and `eval.exact_match` need `data.eval`,\n  \
         `data.eval_share`, or a directory as `data.train`.\n\
         - `data.weights` has one number for each entry of `data.train`.\n\
         - `parallel.layers` has one number for each of `parallel.stages`.\n\
         - `train.method = \"full\"` takes no key of `[lora]` and no `model.quantization`.\n\
         - `train.micro_batch_size` is a maximum: where a rank's share of the global batch is smaller, that\n  \
         is taken.\n",
    );
    let _ = writeln!(page, "\n## Coming from another tool\n\n| there | here |\n| --- | --- |");
    let named = KEYS.iter().flat_map(|key| key.rivals.iter().map(move |(theirs, note)| (*theirs, here(key, note))));
    let mut rows: Vec<(&str, String)> = named.filter(|(theirs, _)| !theirs.contains('.')).collect();
    let elsewhere = ELSEWHERE.iter().filter(|(theirs, _)| !theirs.contains('.'));
    rows.extend(elsewhere.map(|(theirs, instead)| (*theirs, (*instead).to_owned())));
    rows.sort();
    for (theirs, here) in rows {
        let _ = writeln!(page, "| `{theirs}` | {here} |");
    }
    page
}

/// What a rival's name is here.
fn here(key: &Key, note: &str) -> String {
    if note.is_empty() { format!("`{}`", key.path) } else { format!("`{}`; {note}", key.path) }
}

/// What holds if the key is not given.
fn default(key: &Key) -> String {
    match key.absent {
        Absent::Is(text) => format!("`{}`", text()),
        Absent::Required(_) => "required".to_owned(),
        Absent::Unset(meaning) => format!("unset: {meaning}"),
    }
}
