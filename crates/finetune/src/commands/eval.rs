//! `finetune eval`: loss and perplexity on a file.

use std::process::ExitCode;

use finetune_trainer::numbers::counted;
use finetune_trainer::{TrainError, evaluate};

use crate::cli::EvalArguments;
use crate::commands::opening::{self, Purpose};
use crate::commands::rows_of_files::rows_of_files;
use crate::failure::Failure;
use crate::hub_files;
use crate::output;
use crate::progress::{Progress, Verbosity};
use crate::source::{Source, data_file};

/// Rows per forward pass: enough to keep the matrix products busy, whatever the row length.
const ROWS: usize = 8;

pub(crate) fn eval(arguments: EvalArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let files = hub_files::rows(&arguments.data)?;
    files.iter().try_for_each(|file| data_file("--data", file))?;
    let source = Source::open(&arguments.model)?;
    let say = |line: &str| opening::say(verbosity, line);
    source.notices.iter().for_each(|notice| say(notice));
    let model = opening::open(&source, &arguments.model, Purpose::Losses, None, &say)?;
    let tokenizer = source.tokenizer()?;
    if let Some(tokenizer) = &tokenizer {
        tokenizer.notices().iter().for_each(|notice| say(notice));
    }
    let rows = rows_of_files(&files, &source, tokenizer.as_ref(), model.config.vocabulary, 0, &say)
        .map_err(|error| error.in_model(&source.model))?;
    let limit = model.config.max_position_embeddings;
    let beyond = rows.rows.iter().filter(|row| row.tokens.len() > limit).count();
    if beyond > 0 {
        say(&format!(
            "{beyond} of {} rows are longer than the {limit} positions that the model was made for (the longest has {} tokens): their loss says little",
            rows.rows.len(),
            rows.counts.longest
        ));
    }
    let mut show = Progress::new(if arguments.json { Verbosity::Quiet } else { verbosity }, 1);
    show.start("evaluating", rows.rows.len() as u64);
    let sums = evaluate(&model, &rows, ROWS, &mut |done| show.position(done as u64));
    show.finish();
    let sums = sums?;
    let loss = sums.loss / sums.trained_tokens.max(1) as f64;
    if !loss.is_finite() {
        let rows = sums.bad_rows().into_iter().take(8).map(|row| rows.origin(row)).collect();
        return Err(TrainError::NotFiniteEvaluation { rows }.into());
    }
    if arguments.json {
        let object = serde_json::json!({
            "loss": loss,
            "perplexity": loss.exp(),
            "tokens": sums.trained_tokens,
            "rows": rows.rows.len(),
            "rows_beyond_context": beyond,
        });
        output::line(&object.to_string())?;
    } else {
        output::line(&format!("loss        {loss:.6}\nperplexity  {:.4}", loss.exp()))?;
        output::line(&format!(
            "tokens      {} trained, in {}",
            sums.trained_tokens,
            counted(rows.rows.len() as u64, "row")
        ))?;
        if beyond > 0 {
            output::line(&format!(
                "too long    {}, beyond the model's {limit} positions",
                counted(beyond as u64, "row")
            ))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
