//! Rows of `--data`, which no recipe describes.
//!
//! The rows of a run have the columns and the format that its recipe names, and rows that are held
//! back from it mostly have the same. So these names are tried first.

use std::path::PathBuf;

use finetune_dataset::{ChatTokenizer, Dataset, DatasetError};
use finetune_recipe::{Data, Format, Overlong, TrainOn};

use crate::source::Source;

/// How rows are read without a recipe. `of_run`: how the run read its own.
fn reading(files: &[PathBuf], of_run: Option<&Data>) -> Data {
    Data {
        train: files.to_vec(),
        eval: vec![],
        eval_share: None,
        columns: of_run.map(|data| data.columns.clone()).unwrap_or_default(),
        weights: Vec::new(),
        max_rows: None,
        format: of_run.map_or(Format::Auto, |data| data.format),
        max_seq_len: usize::MAX,
        overlong: Overlong::Error,
        packing: false,
        train_on: TrainOn::Assistant,
        shuffle: false,
        chat_template: None,
        chat_template_kwargs: std::collections::BTreeMap::new(),
        add_tokens: Vec::new(),
        date: None,
    }
}

/// All rows of files, as the run of `source` names their columns. Files in which no row can be read
/// so are read by our own names, and `say` tells it. `keep_text` as in [`Dataset::load`].
///
/// # Errors
/// As [`Dataset::load`].
pub(super) fn rows_of_files(
    files: &[PathBuf],
    source: &Source,
    tokenizer: Option<&ChatTokenizer>,
    vocabulary: usize,
    keep_text: usize,
    say: &dyn Fn(&str),
) -> Result<Dataset, DatasetError> {
    let load = |data: &Data| Dataset::load(files, data, tokenizer, vocabulary, keep_text, &|_| {});
    let (usual, as_run) = (reading(files, None), reading(files, source.of_run.as_ref()));
    let names_more = !as_run.columns.is_empty() || as_run.format != Format::Auto;
    let rows = match load(&as_run) {
        Err(DatasetError::BadRows(bad)) if names_more && bad.total == bad.counts.rows => match load(&usual) {
            Ok(rows) => {
                say("no row has the columns and the format of the run's recipe: the usual names are taken");
                rows
            }
            Err(_) => return Err(DatasetError::BadRows(bad)),
        },
        outcome => outcome?,
    };
    rows.notices.iter().for_each(|notice| say(notice));
    Ok(rows)
}
