//! `finetune validate`: everything that can go wrong, before training.

use std::process::ExitCode;

use finetune_recipe::Recipe;
use finetune_trainer::{Estimate, Findings, Machine, findings};

use crate::cli::ValidateArguments;
use crate::failure::Failure;
use crate::progress::{Progress, Verbosity, bytes, duration, thousands};
use crate::{memory, output, source};

pub(crate) fn validate(arguments: ValidateArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let file = source::recipe_path(&arguments.recipe.recipe)?;
    let recipe = Recipe::load(&file, &arguments.recipe.sets, None)?;
    let mut show = Progress::new(if arguments.json { Verbosity::Quiet } else { verbosity }, 1);
    let machine = Machine { memory: memory::machine_bytes(), ..Machine::default() };
    show.start("reading rows", 0);
    let found = findings(&recipe, &machine, &|rows| show.position(rows));
    show.finish();
    let found = found?;
    if arguments.json {
        output::line(&serde_json::to_string(&found).expect("plain data"))?;
    } else {
        output::print(&text(&found))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn text(found: &Findings) -> String {
    let mut text = format!(
        "model       {}, {} parameters, {} trained\n",
        found.architecture,
        thousands(found.parameters),
        thousands(found.trained_parameters)
    );
    for (name, data) in [("train", Some(&found.train)), ("eval", found.eval.as_ref())] {
        let Some(data) = data else { continue };
        text += &format!(
            "{name:<12}{} rows, {} tokens, {} trained; lengths: median {}, 95 % {}, longest {}\n",
            thousands(data.rows as u64),
            thousands(data.tokens),
            thousands(data.trained_tokens),
            data.median_length,
            data.length_95,
            data.longest,
        );
        text += &format!(
            "            {} truncated, {} dropped, {} without a trained token, {} trained on every token\n",
            data.truncated, data.dropped, data.zero_label, data.unmasked
        );
    }
    text += &format!("steps       {} ({} per epoch)\n", thousands(found.steps), thousands(found.steps_per_epoch));
    let Estimate { weights, trained, activations, logits, program, total, seconds } = &found.estimate;
    text += &format!(
        "memory      about {}: weights {}, trained state {}, activations {}, logits {}, program {}\n",
        bytes(*total),
        bytes(*weights),
        bytes(*trained),
        bytes(*activations),
        bytes(*logits),
        bytes(*program)
    );
    text += &format!("device      {}\n", found.device);
    text += &match seconds {
        Some(seconds) => format!("time        about {} here\n", duration(*seconds)),
        None => "time        to be seen: it is not measured on GPUs before training\n".to_owned(),
    };
    for notice in &found.notices {
        text += &format!("note        {notice}\n");
    }
    text += "\nnothing stands in the way of `finetune run`\n";
    text
}
