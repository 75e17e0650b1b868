//! What stands for the parts of a model that are not here, where only sizes are asked for.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use finetune_dataset::{Counts, Dataset, Ends, Origin, Row};
use finetune_model::{FloatType, states_packing};
use finetune_recipe::Recipe;
use finetune_store::{Holding, recognize};

/// The most rows that are counted, and the most tokens of a micro-batch: more are no real recipe's, and would take
/// long.
const MOST_ROWS: usize = 1 << 20;
const MOST_TOKENS: usize = 1 << 26;

/// What is said where a directory has a config.json and no weights.
pub(crate) fn no_weights(directory: &Path, stored: FloatType) -> String {
    let packed = states_packing(directory).map_or(String::new(), |words| {
        format!(", not packed: config.json says {words}, which the files would take less memory with")
    });
    format!(
        "{}: the weights are not here; sizes are those that config.json says, in {}{packed}",
        directory.display(),
        stored.name()
    )
}

/// What is said where rows cannot be read without a tokenizer.
pub(crate) fn no_tokenizer(recipe: &Recipe) -> String {
    format!(
        "without a tokenizer no row has a length: each counts as data.max_seq_len = {} tokens, all of them trained",
        recipe.data.max_seq_len
    )
}

/// As many rows as these files have lines, each as long as the recipe allows. Of files that are not in lines, a step's
/// rows. `None`: a micro-batch of such rows is too large.
pub(crate) fn longest_rows(recipe: &Recipe, files: &[PathBuf]) -> Option<Dataset> {
    let (length, micro_batch) = (recipe.data.max_seq_len, recipe.train.micro_batch_size);
    length.checked_mul(micro_batch).filter(|tokens| *tokens <= MOST_TOKENS)?;
    let lines: Option<usize> = files.iter().map(|file| lines(file)).sum();
    let rows = lines.filter(|lines| *lines > 0).unwrap_or(recipe.train.global_batch_size).clamp(1, MOST_ROWS);
    // Only the longest rows of a micro-batch are looked at one by one.
    let row = |n: usize| {
        let length = if n < micro_batch { length } else { 0 };
        Row {
            tokens: vec![0; length],
            trained: (0..length).map(|place| place > 0).collect(),
            origin: Origin { file: 0, line: 1, row: 0 },
            prompt_tokens: 0,
            prompt_text: String::new(),
            answer_text: String::new(),
        }
    };
    let tokens = (rows as u64).saturating_mul(length as u64);
    Some(Dataset {
        rows: (0..rows).map(row).collect(),
        files: files.to_vec(),
        counts: Counts { rows, tokens, trained_tokens: tokens - rows as u64, longest: length, ..Counts::default() },
        digest: String::new(),
        notices: Vec::new(),
        ends: Ends::default(),
        weights: Vec::new(),
    })
}

/// Lines of a file of JSON lines that are not blank. `None`: it is no such file.
fn lines(file: &Path) -> Option<usize> {
    if !matches!(recognize(file), Holding::JsonLines | Holding::JsonObject) {
        return None;
    }
    let lines = BufReader::new(std::fs::File::open(file).ok()?).split(b'\n').map_while(Result::ok);
    Some(lines.filter(|line| !line.trim_ascii().is_empty()).take(MOST_ROWS).count())
}

#[cfg(test)]
mod tests {
    use finetune_store::{RealDisk, replace_file};

    use super::*;
    use crate::test_recipe::test_recipe;

    #[test]
    fn rows_are_as_many_as_lines_and_as_long_as_allowed() {
        let folder = tempfile::tempdir().expect("a directory");
        let file = folder.path().join("rows.jsonl");
        replace_file(&RealDisk, &file, b"{\"text\": \"a\"}\n\n{\"text\": \"b\"}\n{\"text\": \"c\"}").expect("a file");
        let recipe = test_recipe("max_seq_len = 7\n[train]\nmicro_batch_size = 2\n");
        let found = longest_rows(&recipe, &[file.clone(), file]).expect("rows");
        assert_eq!(found.rows.iter().map(|row| row.tokens.len()).collect::<Vec<_>>(), [7, 7, 0, 0, 0, 0]);
        assert_eq!((found.counts.tokens, found.counts.trained_tokens, found.counts.longest), (42, 36, 7));
        // Without lines to count, a step's.
        let found = longest_rows(&recipe, &[folder.path().join("none")]).expect("rows");
        assert_eq!(found.rows.len(), recipe.train.global_batch_size);
    }

    #[test]
    fn sizes_that_no_machine_has_are_not_made() {
        for keys in [
            "max_seq_len = 9223372036854775807\n[train]\nmicro_batch_size = 2\n",
            "max_seq_len = 2048\n[train]\nmicro_batch_size = 16777216\n",
        ] {
            assert!(longest_rows(&test_recipe(keys), &[]).is_none(), "{keys}");
        }
    }
}
