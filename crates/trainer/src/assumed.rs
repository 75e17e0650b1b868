//! What stands for the parts of a model that are not here, where only sizes are asked for.

use std::path::{Path, PathBuf};

use finetune_dataset::{Counts, Dataset, Ends, Origin, Row};
use finetune_model::{FloatType, assumed_of_packing, stated_packing};
use finetune_recipe::Recipe;
use finetune_store::{Holding, recognize};

use crate::error::TrainError;
use crate::whole_lines::{TooLong, WholeLines};

/// The most rows that are counted, and the most tokens of a micro-batch: more are no real recipe's, and would take
/// long.
const MOST_ROWS: usize = 1 << 20;
const MOST_TOKENS: usize = 1 << 26;

/// What is said where a directory has a config.json and no weights.
pub(crate) fn no_weights(directory: &Path, stored: FloatType) -> String {
    let packing = stated_packing(directory);
    let packed = match (packing.describe(), assumed_of_packing(&packing, stored)) {
        (None, _) => String::new(),
        (Some(words), Some(assumed)) => format!(" where it does not say {words}: {assumed}"),
        (Some(words), None) => {
            format!(", not packed: config.json says {words}, which the files would take less memory with")
        }
    };
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
///
/// # Errors
/// [`TrainError::NotJson`] for a line that is longer than any row.
pub(crate) fn longest_rows(recipe: &Recipe, files: &[PathBuf]) -> Result<Option<Dataset>, TrainError> {
    let (length, micro_batch) = (recipe.data.max_seq_len, recipe.train.micro_batch_size);
    if length.checked_mul(micro_batch).is_none_or(|tokens| tokens > MOST_TOKENS) {
        return Ok(None);
    }
    let too_long = |TooLong(line)| TrainError::NotJson { lines: vec![line] };
    let counted = files.iter().map(|file| lines(file)).collect::<Result<Vec<_>, _>>().map_err(too_long)?;
    let lines: Option<usize> = counted.into_iter().sum();
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
    Ok(Some(Dataset {
        rows: (0..rows).map(row).collect(),
        files: files.to_vec(),
        counts: Counts { rows, tokens, trained_tokens: tokens - rows as u64, longest: length, ..Counts::default() },
        digest: String::new(),
        notices: Vec::new(),
        ends: Ends::default(),
        weights: Vec::new(),
    }))
}

/// Lines of a file of JSON lines that are not blank. `None`: it is no such file.
fn lines(file: &Path) -> Result<Option<usize>, TooLong> {
    if !matches!(recognize(file), Holding::JsonLines | Holding::JsonObject) {
        return Ok(None);
    }
    let lines = WholeLines::open(file).into_iter().flatten().take(MOST_ROWS);
    lines.map(|line| line.map(|_| 1usize)).sum::<Result<usize, TooLong>>().map(Some)
}

#[cfg(test)]
mod tests {
    use finetune_store::{RealDisk, replace_file};

    use super::*;
    use crate::test_recipe::test_recipe;

    /// What a config.json says is packed counts so where it tells the sizes, and what was assumed is said.
    #[test]
    fn what_is_assumed_of_packed_weights_is_said() {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/packed");
        let said = no_weights(&goldens.join("fp8_blocks"), FloatType::BF16);
        let want = "in bf16 where it does not say FP8 E4M3, blocks of 128 x 128: routers and the output layer are not \
                    packed, and scales are f32";
        assert!(said.ends_with(want), "{said}");
        let folder = tempfile::tempdir().expect("a directory");
        let config = br#"{"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}"#;
        replace_file(&RealDisk, &folder.path().join("config.json"), config).expect("a file");
        let said = no_weights(folder.path(), FloatType::BF16);
        assert!(said.contains("in bf16, not packed: config.json says HQQ"), "{said}");
    }

    #[test]
    fn rows_are_as_many_as_lines_and_as_long_as_allowed() {
        let folder = tempfile::tempdir().expect("a directory");
        let file = folder.path().join("rows.jsonl");
        replace_file(&RealDisk, &file, b"{\"text\": \"a\"}\n\n{\"text\": \"b\"}\n{\"text\": \"c\"}").expect("a file");
        let recipe = test_recipe("max_seq_len = 7\n[train]\nmicro_batch_size = 2\n");
        let found = longest_rows(&recipe, &[file.clone(), file]).expect("short lines").expect("rows");
        assert_eq!(found.rows.iter().map(|row| row.tokens.len()).collect::<Vec<_>>(), [7, 7, 0, 0, 0, 0]);
        assert_eq!((found.counts.tokens, found.counts.trained_tokens, found.counts.longest), (42, 36, 7));
        // Without lines to count, a step's.
        let found = longest_rows(&recipe, &[folder.path().join("none")]).expect("no lines").expect("rows");
        assert_eq!(found.rows.len(), recipe.train.global_batch_size);
    }

    /// A file of one line of any size takes no memory.
    #[test]
    fn a_line_that_is_no_row_is_named() {
        let folder = tempfile::tempdir().expect("a directory");
        let file = folder.path().join("rows.jsonl");
        let text = format!("{{\"text\": \"a\"}}\n{{\"text\": \"{}\"}}\n", "b".repeat(17 << 20));
        replace_file(&RealDisk, &file, text.as_bytes()).expect("a file");
        let error = longest_rows(&test_recipe("max_seq_len = 7\n"), &[file]).expect_err("17 MiB").to_string();
        assert!(error.ends_with("rows.jsonl:2: the row is longer than 16 MiB"), "{error}");
    }

    #[test]
    fn sizes_that_no_machine_has_are_not_made() {
        for keys in [
            "max_seq_len = 9223372036854775807\n[train]\nmicro_batch_size = 2\n",
            "max_seq_len = 2048\n[train]\nmicro_batch_size = 16777216\n",
        ] {
            assert!(longest_rows(&test_recipe(keys), &[]).is_ok_and(|rows| rows.is_none()), "{keys}");
        }
    }
}
