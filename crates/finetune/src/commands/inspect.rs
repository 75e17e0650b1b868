//! `finetune inspect`: what a row looks like to the model.

use std::process::ExitCode;

use finetune_model::ModelConfig;
use finetune_recipe::Recipe;
use finetune_trainer::{load_data, model_directory};

use crate::cli::InspectArguments;
use crate::failure::Failure;
use crate::output;

pub(crate) fn inspect(arguments: InspectArguments) -> Result<ExitCode, Failure> {
    let recipe = Recipe::load(&arguments.recipe.recipe, &arguments.recipe.sets, None)?;
    let model = model_directory(&recipe)?;
    let config = ModelConfig::load(&model)?;
    let data = load_data(&recipe, &model, &config, &|_| {})?;
    let rows = data.train.rows.len();
    let row = arguments.row.checked_sub(1).and_then(|row| data.train.rows.get(row).map(|found| (row, found)));
    let Some((index, row)) = row else {
        return Err(Failure::arguments(
            format!("--row {}: there is no such row", arguments.row),
            format!("the training data has rows 1 to {rows}"),
        ));
    };
    let name = |id: u32| data.tokenizer.as_ref().and_then(|tokenizer| tokenizer.id_to_token(id)).unwrap_or_default();
    let decoded = match &data.tokenizer {
        Some(tokenizer) => tokenizer.decode(&row.tokens, false)?,
        None => String::new(),
    };
    if arguments.json {
        let object = serde_json::json!({
            "row": arguments.row,
            "origin": data.train.origin(index),
            "token_ids": row.tokens,
            "tokens": row.tokens.iter().map(|&id| name(id)).collect::<Vec<_>>(),
            "trained": row.trained,
            "text": decoded,
        });
        output::line(&object.to_string())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = String::new();
    let trained = row.trained.iter().filter(|&&trained| trained).count();
    out += &format!(
        "{}: {} tokens, {trained} trained on (green and underlined)\n\n",
        data.train.origin(index),
        row.tokens.len()
    );
    // Stretches of tokens that are trained on or not, decoded together so that bytes form characters again.
    let mut start = 0;
    while start < row.tokens.len() {
        let length = row.trained[start..].iter().take_while(|&&trained| trained == row.trained[start]).count();
        let stretch = &row.tokens[start..start + length];
        let text = match &data.tokenizer {
            Some(tokenizer) => tokenizer.decode(stretch, false)?,
            None => stretch.iter().map(|id| format!("{id} ")).collect(),
        };
        if row.trained[start] {
            out += &format!("\x1b[32;4m{text}\x1b[0m");
        } else {
            out += &text;
        }
        start += length;
    }
    out += "\n\n";
    for (n, (&id, trained)) in row.tokens.iter().zip(&row.trained).enumerate() {
        out += &format!("{n:>5} {id:>7} {} {:?}\n", if *trained { "trained" } else { "       " }, name(id));
    }
    output::colored(&out)?;
    Ok(ExitCode::SUCCESS)
}
