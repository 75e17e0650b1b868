//! The rows of a recipe, to train on and to evaluate.

use std::path::{Path, PathBuf};

use finetune_dataset::{ChatTokenizer, Dataset, Part, TextSource, resolve_files, unused_files};
use finetune_model::ModelConfig;
use finetune_recipe::{Data as DataKeys, Recipe};
use finetune_store::Cache;

use crate::error::TrainError;

/// Training rows, evaluation rows, and the tokenizer that made them.
pub struct Data {
    /// Rows to train on.
    pub train: Dataset,
    /// Rows to evaluate; `None` without any.
    pub eval: Option<Dataset>,
    /// `None` if the model directory has none, and rows are tokens.
    pub tokenizer: Option<ChatTokenizer>,
}

impl Data {
    /// What is odd about the rows and the tokenizer. Notices that evaluation rows share with
    /// training rows are given once.
    pub fn notices(&self) -> Vec<String> {
        let mut notices: Vec<String> =
            self.tokenizer.iter().flat_map(|tokenizer| tokenizer.notices().iter().cloned()).collect();
        let eval = self.eval.as_ref().map(|eval| eval.notices.clone()).unwrap_or_default();
        notices.extend(rows_notices(self.train.notices.clone(), eval));
        notices
    }
}

/// Notices of training rows, and those of evaluation rows that differ from them.
pub(crate) fn rows_notices(train: Vec<String>, mut eval: Vec<String>) -> Vec<String> {
    eval.retain(|notice| !train.contains(notice));
    train.into_iter().chain(eval.into_iter().map(|notice| format!("evaluation rows: {notice}"))).collect()
}

/// Reads all rows of the recipe. `model`: the model's directory. `progress` is called with the
/// number of rows read.
///
/// # Errors
/// If a file or the tokenizer cannot be read, if a row is wrong, or if no row is left to train on.
pub fn load_data(
    recipe: &Recipe,
    model: &Path,
    config: &ModelConfig,
    progress: &dyn Fn(u64),
) -> Result<Data, TrainError> {
    let (train_files, eval_files) = resolve_files(&recipe.data.train, &recipe.data.eval)?;
    let tokenizer = open_tokenizer(recipe, model)?;
    let reader = RowReader::new(recipe, model, config, tokenizer.as_ref(), progress);
    let train = reader.train(&train_files)?;
    let eval_files = reader.files_to_evaluate(&train_files, eval_files);
    let eval = if eval_files.is_empty() { None } else { Some(reader.eval(&eval_files)?) };
    Ok(Data { train, eval, tokenizer })
}

/// The tokenizer of the recipe's model with the recipe's template, its variables and date.
pub(crate) fn open_tokenizer(recipe: &Recipe, model: &Path) -> Result<Option<ChatTokenizer>, TrainError> {
    let (chat_template, date) = (recipe.data.chat_template.as_deref(), recipe.data.date.as_deref());
    let variables = Some(&recipe.data.chat_template_kwargs);
    let source = TextSource { model_dir: model, adapter: None, chat_template, date, variables };
    let tokenizer = ChatTokenizer::open_with(&source, &recipe.data.add_tokens)?;
    match tokenizer {
        None if !recipe.data.add_tokens.is_empty() => Err(ChatTokenizer::missing(model).into()),
        tokenizer => Ok(tokenizer),
    }
}

/// Rows of embedding and output layer: the model's, or more if the recipe adds tokens for which the
/// model has none.
pub(crate) fn vocabulary(recipe: &Recipe, config: &ModelConfig, tokenizer: Option<&ChatTokenizer>) -> usize {
    let tokens = tokenizer.filter(|_| !recipe.data.add_tokens.is_empty()).map_or(0, ChatTokenizer::vocab_size);
    config.vocabulary.max(tokens)
}

/// Reads files of rows as a recipe says.
pub(crate) struct RowReader<'a> {
    recipe: &'a Recipe,
    model: &'a Path,
    vocabulary: usize,
    tokenizer: Option<&'a ChatTokenizer>,
    progress: &'a dyn Fn(u64),
    /// Where tokens of rows are kept from one command to the next.
    cache: Option<Cache>,
}

impl<'a> RowReader<'a> {
    pub(crate) fn new(
        recipe: &'a Recipe,
        model: &'a Path,
        config: &ModelConfig,
        tokenizer: Option<&'a ChatTokenizer>,
        progress: &'a dyn Fn(u64),
    ) -> RowReader<'a> {
        let vocabulary = vocabulary(recipe, config, tokenizer);
        RowReader { recipe, model, vocabulary, tokenizer, progress, cache: Cache::of_user("rows") }
    }

    /// Rows to train on. There has to be at least one.
    pub(crate) fn train(&self, files: &[PathBuf]) -> Result<Dataset, TrainError> {
        // The text of one row is kept: it tells whether the rows have prompts.
        let mut rows = self.read(files, &self.recipe.data, Part::Train, 1)?;
        rows.notices.extend(unused_files(&self.recipe.data.train, &self.recipe.data.eval));
        if rows.rows.is_empty() {
            return Err(TrainError::NoRows { path: files.first().cloned().unwrap_or_default() });
        }
        Ok(rows)
    }

    /// The files that hold rows to evaluate: those of `data.eval`, or with `data.eval_share` those of
    /// `data.train`.
    pub(crate) fn files_to_evaluate(&self, train: &[PathBuf], eval: Vec<PathBuf>) -> Vec<PathBuf> {
        if self.recipe.data.eval_share.is_some() { train.to_vec() } else { eval }
    }

    /// Rows to evaluate, with the texts of those that are answered.
    pub(crate) fn eval(&self, files: &[PathBuf]) -> Result<Dataset, TrainError> {
        let keep_text = self.recipe.eval.samples.max(self.recipe.eval.exact_match);
        let data = &self.recipe.data;
        if data.eval_share.is_some() {
            return self.read(files, data, Part::HeldBack, keep_text);
        }
        let all = DataKeys { weights: Vec::new(), max_rows: None, ..data.clone() };
        self.read(files, &all, Part::Train, keep_text)
    }

    /// Reads rows, and keeps the texts of the first `keep_text` of them.
    fn read(&self, files: &[PathBuf], data: &DataKeys, part: Part, keep_text: usize) -> Result<Dataset, TrainError> {
        let (cache, tokenizer, vocabulary) = (self.cache.as_ref(), self.tokenizer, self.vocabulary);
        Dataset::load_part_kept(cache, files, data, part, tokenizer, vocabulary, keep_text, self.progress)
            .map_err(|error| error.in_model(self.model).into())
    }
}
