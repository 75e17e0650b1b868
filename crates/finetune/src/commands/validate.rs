//! `finetune validate`: everything that can go wrong, before training.

use std::net::TcpListener;
use std::path::Path;
use std::process::ExitCode;

use finetune_dataset::DatasetError;
use finetune_hub::Need;
use finetune_recipe::{Recipe, StagesChoice};
use finetune_trainer::numbers::counted;
use finetune_trainer::{DiskNeed, Estimate, Fault, FirstRow, Problem, ThisHost, Validation};

use crate::cli::ValidateArguments;
use crate::commands::preflight::free_bytes;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::given_recipe::GivenRecipe;
use crate::progress::{Progress, Verbosity, about, bytes, thousands};
use crate::row_text::{RowText, Shown, stops};
use crate::{hub_files, memory, output};

pub(crate) fn validate(arguments: ValidateArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let given = GivenRecipe::of(&arguments.recipe, arguments.eval.as_deref())?;
    let mut recipe = given.load(&arguments.recipe.sets, None)?;
    hub_files::localize(&mut recipe, &Need::Model)?;
    let mut show = Progress::new(if arguments.json { Verbosity::Quiet } else { verbosity }, 1);
    let host = ThisHost {
        memory: memory::machine_bytes(),
        disk: free_bytes(&recipe.output_dir),
        recipe_file: given.file().map(Path::to_path_buf),
        ..ThisHost::default()
    };
    show.start("reading rows", 0);
    let mut found = finetune_trainer::validate(&recipe, &host, &|rows| show.position(rows));
    show.finish();
    found.problems.extend(address_problem(&recipe));
    if arguments.json {
        output::line(&serde_json::to_string(&found).expect("plain data"))?;
        return Ok(exit(&found.problems).into());
    }
    let command = command(recipe.parallel.stages, given.file(), !arguments.recipe.sets.is_empty());
    let shown = if verbosity == Verbosity::Verbose { Shown::Whole } else { Shown::Shortened };
    let first_row = found.first_row.as_ref().map(|first| row_lines(first, shown)).transpose()?;
    output::colored(&text(&found, &first_row.unwrap_or_default(), &command))?;
    for (n, problem) in found.problems.iter().enumerate() {
        if n > 0 {
            crate::stderr::complain!();
        }
        Failure::bad_input(problem.message.clone(), problem.hints.clone()).print();
    }
    Ok(exit(&found.problems).into())
}

/// If there is one kind of problem only, what a run would end with; bad input if there are several.
fn exit(problems: &[Problem]) -> Exit {
    fault(problems).map_or(Exit::Done, Exit::from)
}

fn fault(problems: &[Problem]) -> Option<Fault> {
    let first = problems.first()?.fault;
    Some(if problems.iter().all(|problem| problem.fault == first) { first } else { Fault::Input })
}

/// The problem that keeps the run from serving its numbers at the recipe's address, if there is
/// one.
fn address_problem(recipe: &Recipe) -> Option<Problem> {
    let address = recipe.log.prometheus.as_ref()?;
    let error = TcpListener::bind(address).err()?;
    let hint = "log.prometheus is host:port of this machine, such as \"127.0.0.1:9400\"; leave it out to serve nothing";
    let message = format!("log.prometheus = {address:?}: {error}");
    Some(Problem { message, hints: vec![hint.to_owned()], fault: Fault::Input })
}

/// What starts the run.
fn command(stages: StagesChoice, file: Option<&Path>, has_sets: bool) -> String {
    let StagesChoice::Count(stages @ 2..) = stages else { return "`finetune run`".to_owned() };
    let what = file.map_or("--model M --data FILE".to_owned(), |file| file.display().to_string());
    let sets = if has_sets { " with the same --set" } else { "" };
    format!("`finetune launch -n {stages} -- {what}`{sets}")
}

/// The first row as the model will see it, and where answers end.
fn row_lines(first: &FirstRow, shown: Shown) -> Result<String, DatasetError> {
    let tokenizer = first.tokenizer.as_ref();
    let row = RowText::new(&first.row, tokenizer);
    let mut lines = format!("first row   {}\n", row.heading(&first.origin));
    for line in row.text(shown)?.lines() {
        lines += format!("            {line}").trim_end();
        lines.push('\n');
    }
    if let Some(tokenizer) = tokenizer {
        lines += &format!("ends at     {}\n", stops(tokenizer, &first.ends));
    }
    Ok(lines)
}

/// Why the time may be far too long.
fn beside_others(part: Option<f64>) -> String {
    part.map_or(String::new(), |part| {
        format!(", less on a free machine: others had {:.0} % of the processor while it was measured", 100.0 * part)
    })
}

/// What was found. With problems, that is not all. `first_row`: lines about it. `command`: what
/// starts the run.
fn text(found: &Validation, first_row: &str, command: &str) -> String {
    let mut text = String::new();
    if let (Some(architecture), Some(parameters)) = (found.architecture, found.parameters) {
        let trained =
            found.trained_parameters.map_or(String::new(), |trained| format!(", {} trained", thousands(trained)));
        text += &format!("model       {architecture}, {} parameters{trained}\n", thousands(parameters));
    }
    for (name, data) in [("train", found.train.as_ref()), ("eval", found.eval.as_ref())] {
        let Some(data) = data else { continue };
        text += &format!(
            "{name:<12}{}, {}, {} trained; lengths: median {}, 95 % {}, longest {}\n",
            counted(data.rows as u64, "row"),
            counted(data.tokens, "token"),
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
    if let (Some(steps), Some(per_epoch)) = (found.steps, found.steps_per_epoch) {
        text += &format!("steps       {} ({} per epoch)\n", thousands(steps), thousands(per_epoch));
    }
    text += &found.estimate.as_ref().map_or(String::new(), memory_line);
    text += &found.disk.as_ref().map_or(String::new(), disk_line);
    text += &found.device.as_ref().map_or(String::new(), |device| format!("device      {device}\n"));
    text += &found.estimate.as_ref().map_or(String::new(), |estimate| match estimate.seconds {
        Some(seconds) => format!("time        {} here{}\n", about(seconds), beside_others(found.others)),
        None => "time        to be seen: it is not measured on GPUs before training\n".to_owned(),
    });
    text += first_row;
    for notice in &found.notices {
        text += &format!("note        {notice}\n");
    }
    if found.problems.is_empty() {
        text += &format!("\nnothing stands in the way of {command}\n");
    }
    text
}

fn memory_line(estimate: &Estimate) -> String {
    let Estimate { weights, trained, activations, logits, program, total, .. } = estimate;
    format!(
        "memory      about {}: weights {}, trained state {}, activations {}, logits {}, program {}\n",
        bytes(*total),
        bytes(*weights),
        bytes(*trained),
        bytes(*activations),
        bytes(*logits),
        bytes(*program)
    )
}

fn disk_line(need: &DiskNeed) -> String {
    let DiskNeed { checkpoint, checkpoints, result, total, free, .. } = need;
    let free = free.map_or(String::new(), |free| format!("; {} are free", bytes(free)));
    let up_to = if *checkpoints > 1 { "up to " } else { "" };
    let many = format!("{up_to}{}", counted(*checkpoints, "checkpoint"));
    format!("disk        about {}: {many} of {}, result {}{free}\n", bytes(*total), bytes(*checkpoint), bytes(*result))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_cannot_be_served_at() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let taken = taken.local_addr().expect("an address").to_string();
        for (address, is_problem) in [("127.0.0.1:0", false), ("256.1.1.1:1", true), (taken.as_str(), true)] {
            let text = format!("[model]\npath = \"m\"\n[data]\ntrain = \"r\"\n[log]\nprometheus = {address:?}\n");
            let recipe = Recipe::parse(&text, std::path::Path::new("r.toml"), &[], None).expect("a recipe");
            assert_eq!(address_problem(&recipe).is_some(), is_problem, "{address}");
        }
    }

    #[test]
    fn kinds_of_problems() {
        let problems = |faults: &[Fault]| -> Vec<Problem> {
            let problem = |fault: &Fault| Problem { message: String::new(), hints: Vec::new(), fault: *fault };
            faults.iter().map(problem).collect()
        };
        for (faults, want) in [
            (&[][..], None),
            (&[Fault::Input], Some(Fault::Input)),
            (&[Fault::DiskOrMemory, Fault::DiskOrMemory], Some(Fault::DiskOrMemory)),
            (&[Fault::DiskOrMemory, Fault::Input], Some(Fault::Input)),
        ] {
            assert_eq!(fault(&problems(faults)), want, "{faults:?}");
        }
    }
}
