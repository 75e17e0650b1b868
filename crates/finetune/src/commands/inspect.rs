//! `finetune inspect`: what a row looks like to the model.

use std::process::ExitCode;

use finetune_dataset::{ChatTokenizer, Dataset, Row};
use finetune_hub::Need;
use finetune_model::ModelConfig;
use finetune_trainer::{load_data, model_directory};

use crate::cli::InspectArguments;
use crate::failure::Failure;
use crate::given_recipe::GivenRecipe;
use crate::hub_files;
use crate::output;
use crate::row_text::{RowText, Shown, stops};

pub(crate) fn inspect(arguments: InspectArguments) -> Result<ExitCode, Failure> {
    let mut recipe = GivenRecipe::of(&arguments.recipe, None)?.load(&arguments.recipe.sets, None)?;
    hub_files::localize(&mut recipe, &Need::Text)?;
    let model = model_directory(&recipe)?;
    finetune_store::refuse_stand_ins(&model)?;
    let config = ModelConfig::load(&model)?;
    let data = load_data(&recipe, &model, &config, &|_| {})?;
    let rows = match (&data.eval, arguments.eval) {
        (_, false) => &data.train,
        (Some(rows), true) => rows,
        (None, true) => {
            return Err(Failure::arguments(
                "--eval: the recipe names no rows to evaluate on",
                "data.eval names a file of them, data.eval_share takes a part of the training rows",
            ));
        }
    };
    let (index, row) = chosen(rows, &arguments)?;
    let tokenizer = data.tokenizer.as_ref();
    if arguments.json {
        let name = |id: u32| tokenizer.and_then(|tokenizer| tokenizer.id_to_token(id)).unwrap_or_default();
        let decoded = tokenizer.map_or(Ok(String::new()), |tokenizer| tokenizer.decode(&row.tokens, false))?;
        let object = serde_json::json!({
            "row": index + 1,
            "origin": rows.origin(index),
            "token_ids": row.tokens,
            "tokens": row.tokens.iter().map(|&id| name(id)).collect::<Vec<_>>(),
            "trained": row.trained,
            "text": decoded,
        });
        output::line(&object.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let shown = RowText::new(row, tokenizer);
    let mut out = format!("{}\n\n{}\n\n", shown.heading(&rows.origin(index)), shown.text(Shown::Whole)?);
    if let Some(tokenizer) = tokenizer {
        out += &format!("an answer ends at {}\n\n", stops(tokenizer, &rows.ends.tokens));
    }
    for (n, (&id, &trained)) in row.tokens.iter().zip(&row.trained).enumerate() {
        let mark = if trained { "trained" } else { "       " };
        out += &format!("{n:>5} {id:>7} {mark} {}\n", readable(id, tokenizer)?);
    }
    output::colored(&out)?;
    Ok(ExitCode::SUCCESS)
}

fn chosen<'a>(rows: &'a Dataset, arguments: &InspectArguments) -> Result<(usize, &'a Row), Failure> {
    let count = rows.rows.len();
    if arguments.longest {
        // The first of equals.
        let longest = rows.rows.iter().enumerate().rev().max_by_key(|(_, row)| row.tokens.len());
        return longest.ok_or_else(|| Failure::arguments("--longest: there is no row", "name another file of rows"));
    }
    let found = arguments.row.checked_sub(1).and_then(|row| rows.rows.get(row).map(|found| (row, found)));
    found.ok_or_else(|| {
        let kind = if arguments.eval { "evaluation" } else { "training" };
        Failure::arguments(
            format!("--row {}: there is no such row", arguments.row),
            format!("the {kind} data has rows 1 to {count}"),
        )
    })
}

/// The text of a token, quoted. If the token is only a part of a character, its name.
fn readable(id: u32, tokenizer: Option<&ChatTokenizer>) -> Result<String, Failure> {
    let Some(tokenizer) = tokenizer else { return Ok(String::new()) };
    let name = tokenizer.id_to_token(id).unwrap_or_default();
    // SentencePiece writes a space as this sign, and its decoder drops the first one of a text.
    if name.contains('\u{2581}') {
        return Ok(format!("{:?}", name.replace('\u{2581}', " ")));
    }
    let text = tokenizer.decode(&[id], false)?;
    Ok(if text.is_empty() || text.contains(char::REPLACEMENT_CHARACTER) {
        format!("{name} (a part of a character)")
    } else {
        format!("{text:?}")
    })
}
