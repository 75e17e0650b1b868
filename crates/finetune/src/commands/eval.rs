//! `finetune eval`: loss and perplexity on a file.

use std::process::ExitCode;

use finetune_dataset::{ChatTokenizer, Dataset};
use finetune_model::Model;
use finetune_model::adapter::Adapter;
use finetune_recipe::{Data, Format, Overlong, TrainOn};
use finetune_trainer::{Machine, Place, TrainError, evaluate, stored_type};

use crate::cli::{EvalArguments, ModelArguments};
use crate::failure::Failure;
use crate::output;
use crate::progress::{Progress, Verbosity};

/// Rows per forward pass: enough to keep the matrix products busy, whatever the row length.
const ROWS: usize = 8;

/// A model directory with an adapter, if one is given.
pub(super) fn open(arguments: &ModelArguments) -> Result<Model, Failure> {
    let wanted = finetune_recipe::Model {
        path: arguments.directory.to_string_lossy().into_owned(),
        device: arguments.device.into(),
        dtype: arguments.dtype.into(),
        quantization: None,
    };
    let place = Place::choose(&wanted, &Machine::default(), stored_type(&arguments.directory))?;
    for notice in &place.notices {
        anstream::eprintln!("{notice}");
    }
    let mut opened = Model::load(&arguments.directory, &place.placement)?;
    for notice in opened.notices() {
        anstream::eprintln!("{notice}");
    }
    if let Some(adapter) = &arguments.adapter {
        let adapter = Adapter::read(adapter, &opened.config)?;
        for notice in &adapter.notices {
            anstream::eprintln!("{notice}");
        }
        opened.attach(&adapter);
    }
    Ok(opened)
}

pub(crate) fn eval(arguments: EvalArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    if !arguments.data.exists() {
        return Err(Failure::arguments(
            format!("--data {}: there is no such file", arguments.data.display()),
            "the path is relative to the current directory",
        ));
    }
    let model = open(&arguments.model)?;
    let tokenizer = ChatTokenizer::load_if_present(&arguments.model.directory, None)?;
    let data = Data {
        train: vec![arguments.data.clone()],
        eval: vec![],
        format: Format::Auto,
        max_seq_len: usize::MAX,
        overlong: Overlong::Error,
        packing: false,
        train_on: TrainOn::Assistant,
        shuffle: false,
        chat_template: None,
        date: None,
    };
    let rows = Dataset::load(&data.train, &data, tokenizer.as_ref(), model.config.vocabulary, &|_| {})?;
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
        });
        output::line(&object.to_string())?;
    } else {
        output::line(&format!("loss        {loss:.6}\nperplexity  {:.4}", loss.exp()))?;
        output::line(&format!("tokens      {} trained, in {} rows", sums.trained_tokens, rows.rows.len()))?;
    }
    Ok(ExitCode::SUCCESS)
}
