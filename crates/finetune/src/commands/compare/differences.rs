//! The settings that differ between runs.

use finetune_recipe::Recipe;

/// The value of a recipe that cannot be read.
const UNKNOWN: &str = "?";

/// Every key whose value is not the same in all recipes, with the values. The output directory
/// always differs, and is left out. `None`: a recipe that cannot be read.
pub(super) fn differences(recipes: &[Option<&Recipe>]) -> Vec<(&'static str, Vec<String>)> {
    let entries: Vec<_> = recipes.iter().map(|recipe| recipe.map(Recipe::entries)).collect();
    let Some(first) = entries.iter().flatten().next() else { return Vec::new() };
    let mut differ = Vec::new();
    for (n, (key, value)) in first.iter().enumerate() {
        let known: Vec<Option<&str>> =
            entries.iter().map(|entries| entries.as_ref().map(|entries| entries[n].1.as_str())).collect();
        if *key == "output_dir" || known.iter().flatten().all(|other| other == value) {
            continue;
        }
        // Quotes of a text say nothing here.
        let plain = |value: &str| {
            let text = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
            text.filter(|text| !text.contains(['"', '\\'])).unwrap_or(value).to_owned()
        };
        differ.push((*key, known.iter().map(|value| value.map_or(UNKNOWN.to_owned(), plain)).collect()));
    }
    differ
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn recipe(more: &str, output: &str) -> Recipe {
        let text = format!("[model]\npath = \"acme/tiny\"\n[data]\ntrain = \"t.jsonl\"\n{more}");
        Recipe::parse(&text, Path::new("/r.toml"), &[], Some(Path::new(output)))
            .unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn keys_that_differ_with_their_values() {
        let one = recipe("[train]\nmax_steps = 40\n[schedule]\nname = \"linear\"\n", "a");
        let two = recipe("[lora]\nrank = 8\n[schedule]\nname = \"cosine\"\n[log]\non_end = 'echo \"x\"'\n", "b");
        let texts = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>();
        let want = vec![
            ("lora.rank", texts(&["16", "8", "?"])),
            ("train.epochs", texts(&["none", "1", "?"])),
            ("train.max_steps", texts(&["40", "none", "?"])),
            ("schedule.name", texts(&["linear", "cosine", "?"])),
            ("log.on_end", texts(&["none", r#""echo \"x\"""#, "?"])),
        ];
        assert_eq!(differences(&[Some(&one), Some(&two), None]), want);
        let elsewhere = Recipe { output_dir: "c".into(), ..one.clone() };
        assert!(differences(&[Some(&one), Some(&elsewhere)]).is_empty(), "each run has a directory of its own");
        assert!(differences(&[None, None]).is_empty());
    }
}
