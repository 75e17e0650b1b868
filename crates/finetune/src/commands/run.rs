//! `finetune run`: the main job.

use std::process::ExitCode;
use std::time::Instant;

use finetune_recipe::Recipe;
use finetune_trainer::{Event, Outcome, Prepared, Resume, prepare, train};

use crate::cli::RunArguments;
use crate::failure::Failure;
use crate::progress::{self, Progress, Verbosity};
use crate::signals::Signals;
use crate::{memory, output};

pub(crate) fn run(arguments: RunArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let start = Instant::now();
    let recipe = Recipe::load(&arguments.recipe.recipe, &arguments.recipe.sets, arguments.output_dir.as_deref())?;
    let resume = match arguments.resume {
        None => Resume::No,
        Some(None) => Resume::Newest,
        Some(Some(path)) => Resume::From(path),
    };
    let signals = Signals::listen()?;
    let mut show = Progress::new(verbosity, recipe.log.every);
    show.start("reading rows", 0);
    let prepared = prepare(recipe, &resume, memory::machine_bytes(), &|rows| show.position(rows));
    show.finish();
    let Prepared { mut run, notices } = prepared?;
    for notice in &notices {
        show.say(notice);
    }
    let counts = run.train.counts;
    show.say(&format!(
        "{} rows, {} tokens ({} trained), longest {}{}",
        progress::thousands(run.train.rows.len() as u64),
        progress::thousands(counts.tokens),
        progress::thousands(counts.trained_tokens),
        counts.longest,
        losses(counts.truncated, counts.dropped),
    ));
    if verbosity == Verbosity::Verbose {
        show.say(&format!("ready after {:.2} s", start.elapsed().as_secs_f64()));
    }
    let directory = run.directory.clone();
    signals.finish_steps();
    let outcome = train(&mut run, &signals.stop, &mut |event| show_event(&mut show, event, start, verbosity));
    show.finish();
    match outcome? {
        Outcome::Finished { step, before, after } => {
            output::print(&progress::answers(before.as_ref(), after.as_ref()))?;
            show.say(&format!(
                "\n{step} steps in {}, peak memory {}\nresult and checkpoints in {}; open report.html there",
                progress::duration(start.elapsed().as_secs_f64()),
                progress::bytes(memory::peak_bytes()),
                directory.display(),
            ));
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Stopped { step, signal } => {
            show.say(&match step {
                0 => "stopped before the first step: there is nothing to save".to_owned(),
                step => format!("stopped after step {step}, which is saved; go on with --resume"),
            });
            Ok(ExitCode::from(128 + signal as u8))
        }
    }
}

fn show_event(show: &mut Progress, event: Event<'_>, start: Instant, verbosity: Verbosity) {
    if let Event::Step { row, .. } = &event
        && verbosity == Verbosity::Verbose
        && row.step == 1
    {
        show.say(&format!("first step done {:.2} s after the start", start.elapsed().as_secs_f64()));
    }
    show.show(event);
}

fn losses(truncated: usize, dropped: usize) -> String {
    let mut text = String::new();
    for (count, what) in [(truncated, "truncated"), (dropped, "dropped")] {
        if count > 0 {
            text += &format!(", {count} {what}");
        }
    }
    text
}
