//! `finetune run`: the main job, as one process or as one of several ranks.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use finetune_recipe::Recipe;
use finetune_rendezvous::{Membership, identity};
use finetune_trainer::numbers::{counted, thousands};
use finetune_trainer::{Event, Outcome, Prepared, Ranks, Resume, Run, ThisHost, prepare, train};

use crate::cli::RunArguments;
use crate::commands::preflight::free_bytes;
use crate::disk_waits::{self, DiskWaits};
use crate::end_command::EndCommand;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::given_recipe::GivenRecipe;
use crate::membership::{self, Assignment};
use crate::progress::{self, Progress, Verbosity};
use crate::rank_event::{self, RankEvent};
use crate::signals::Signals;
use crate::sleep_inhibitor::SleepInhibitor;
use crate::work::Work;
use crate::{allocator, closing, flight, hub_files, memory, output, prometheus};

pub(crate) fn run(arguments: RunArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let (launched, mut ending) = (arguments.assigned, None);
    let outcome = train_as_one_rank(arguments, verbosity, &mut ending);
    if let Some(event) = outcome.as_ref().err().and_then(rank_event::of_failure).filter(|_| launched) {
        rank_event::send(&event);
    }
    if let Some(command) = ending {
        command.tell(outcome.as_ref().map_or_else(Failure::exit, |exit| *exit));
    }
    Ok(outcome?.into())
}

/// `ending` gets the command that runs after the end, once there is something to end.
fn train_as_one_rank(
    arguments: RunArguments,
    verbosity: Verbosity,
    ending: &mut Option<EndCommand>,
) -> Result<Exit, Failure> {
    let start = Instant::now();
    let signals = Signals::listen()?;
    let (assignment, notes) = match arguments.assigned {
        true => (Assignment::read(&signals)?, Vec::new()),
        false => Assignment::of_launcher(arguments.token_file.as_deref())?,
    };
    let (membership, narrates) = (&assignment.membership, assignment.narrates);
    // The others wait for this rank: if it fails before it joins, they are told.
    let (mut recipe, given) = read_recipe(&arguments).inspect_err(|failure| membership::excuse(membership, failure))?;
    membership::share_cores(membership);
    know_rank(membership, verbosity);
    // Rank 0 speaks for all. The other ranks speak of themselves only.
    let (first, loudness) = (membership.rank == 0, verbosity);
    let verbosity = if first { verbosity } else { Verbosity::Quiet };
    let mut show = Progress::new(verbosity, recipe.log.every);
    notes.iter().for_each(|note| show.say(note));
    let ranks = membership::join(&assignment, &recipe, loudness)?;
    // Not before the others have joined: they would wait for a rank 0 that has ended.
    if let Some(address) = recipe.log.prometheus.as_ref().filter(|_| first) {
        prometheus::serve(address)?;
    }
    flight::belong_to(&recipe.output_dir);
    hub_files::settle(&mut recipe, arguments.resume.is_some(), membership, &ranks)?;
    let host = this_host(membership, &recipe, given.file());
    let mut run = prepared(recipe, &resume_of(&arguments), &ranks, &host, &mut show)?;
    say_ready(&show, verbosity, start);
    introduce(&run, &show);
    allocator::prepare_last_words(&run.cheaper_settings());
    *ending = first.then(|| EndCommand::of(&run.recipe)).flatten();
    let _inhibitor = SleepInhibitor::start();
    let work = work_to_save(&signals, verbosity);
    let (tells, narrates) = (membership.launched && first, narrates && first);
    if tells {
        rank_event::send(&RankEvent::Working);
    }
    let mut advice = closing::advice_on_shares(&run.recipe, ranks.group().world());
    let (mut waits, from) = (DiskWaits::default(), run.state.step);
    let outcome = train(&mut run, &signals.stop, &mut |event| {
        work.see(&event);
        let notice = waits.see(&event);
        ending.iter_mut().for_each(|ending| ending.see(&event));
        prometheus::show(&event, &|rank| ranks.group().who()[rank].host.clone());
        rank_event::of_event(&event).iter().filter(|_| tells).for_each(rank_event::send);
        match progress::narrate(&event).filter(|_| narrates) {
            // Ignore the error: if the launcher is gone, the end of standard input says so.
            Some(line) => drop(output::line(&line)),
            None => show_event(&mut show, event, start, verbosity, &ranks, &mut advice),
        }
        notice.iter().for_each(|notice| show.say(notice));
    });
    show.finish();
    let outcome = outcome?;
    if let (Outcome::Finished { before, after, .. }, true) = (&outcome, first) {
        output::print(&progress::answers(before.as_ref(), after.as_ref()))?;
    }
    let exit = conclude(&run, &outcome, (from, start.elapsed()), &waits, &program(arguments.assigned), &show);
    if exit == Exit::Done {
        if first && loudness == Verbosity::Quiet {
            // A user who asked for results only wants to know where they are.
            output::line(&closing::result(&run.recipe).display().to_string())?;
        }
        flight::forget();
    }
    Ok(exit)
}

/// What speaks of this process later says which rank it is.
fn know_rank(membership: &Membership, verbosity: Verbosity) {
    finetune_store::failpoint::set_label(membership.rank.to_string());
    disk_waits::say_silence((membership.world > 1).then_some(membership.rank), verbosity);
}

fn say_ready(show: &Progress, verbosity: Verbosity, start: Instant) {
    if verbosity == Verbosity::Verbose {
        show.say(&format!("ready after {:.2} s", start.elapsed().as_secs_f64()));
    }
}

/// What the run has to know of its surroundings.
fn this_host(membership: &Membership, recipe: &Recipe, recipe_file: Option<&Path>) -> ThisHost {
    ThisHost {
        memory: memory::machine_bytes(),
        local_rank: membership.local_rank,
        local_world: membership.local_world,
        machine: identity::machine(),
        cables: membership.devices.clone(),
        disk: free_bytes(&recipe.output_dir),
        recipe_file: recipe_file.map(Path::to_path_buf),
        peak_memory: Some(memory::peak_bytes),
        commit: Some(env!("FINETUNE_COMMIT")).filter(|commit| *commit != "unknown"),
        fetch: hub_files::names_model(recipe).then_some(hub_files::fetch_shards),
    }
}

/// The recipe and where it is from.
fn read_recipe(arguments: &RunArguments) -> Result<(Recipe, GivenRecipe), Failure> {
    let given = GivenRecipe::of(&arguments.recipe, arguments.eval.as_deref())?;
    Ok((given.load(&arguments.recipe.sets, arguments.output_dir.as_deref())?, given))
}

fn resume_of(arguments: &RunArguments) -> Resume {
    match &arguments.resume {
        None => Resume::No,
        Some(None) => Resume::Newest,
        Some(Some(path)) => Resume::From(path.clone()),
    }
}

/// The run, ready for its first step. Says what was read, and what the user should know.
fn prepared(
    recipe: Recipe,
    resume: &Resume,
    ranks: &Arc<Ranks>,
    host: &ThisHost,
    show: &mut Progress,
) -> Result<Run, Failure> {
    allocator::stay_within_share_of(host);
    show.start("reading rows", 0);
    let prepared = prepare(recipe, resume, ranks, host, &|rows| show.position(rows));
    show.finish();
    let Prepared { run, notices } = prepared?;
    notices.iter().for_each(|notice| show.say(notice));
    let counts = run.train.counts;
    show.say(&format!(
        "{}, {} ({} trained), longest {}{}",
        counted(run.train.rows.len() as u64, "row"),
        counted(counts.tokens, "token"),
        progress::thousands(counts.trained_tokens),
        counts.longest,
        losses(counts.truncated, counts.dropped),
    ));
    Ok(run)
}

/// From now on a signal finishes a step and saves it. Unless the rank is quiet, the signal is
/// answered with what the returned [`Work`] has seen.
fn work_to_save(signals: &Signals, verbosity: Verbosity) -> Work {
    let work = Work::new();
    if verbosity > Verbosity::Quiet {
        let work = work.clone();
        signals.finish_steps(move |heard| work.words(heard));
    } else {
        signals.finish_steps_silently();
    }
    work
}

/// Says what is trained, how, and on which device.
fn introduce(run: &Run, show: &Progress) {
    closing::panel(run).iter().for_each(|line| show.say(line));
    show.say(&format!("training on {}", run.device));
    if !run.model.placement().is_cpu() {
        show.say("the first step also compiles the GPU's kernels");
    }
}

/// The steps of this process, and how long they took.
fn did(from: u64, step: u64, elapsed: Duration) -> String {
    let steps = match step.saturating_sub(from) {
        0 => return format!("no step was left of {}", thousands(step)),
        1 if from > 0 => format!("step {}", thousands(step)),
        _ if from > 0 => format!("steps {} to {}", thousands(from + 1), thousands(step)),
        _ => counted(step, "step"),
    };
    format!("{steps} in {}", progress::took(elapsed.as_secs_f64()))
}

/// Says how a run has ended, and what to type next. `from`: the step that it went on from. `program`: this program,
/// as a user types it.
fn conclude(
    run: &Run,
    outcome: &Outcome,
    (from, elapsed): (u64, Duration),
    waits: &DiskWaits,
    program: &str,
    show: &Progress,
) -> Exit {
    match outcome {
        Outcome::Finished { step, summary, .. } => {
            show.say(&format!("\n{}, {}{}", did(from, *step, elapsed), peaks(run), waits.ending()));
            closing::outcome(&run.recipe, *step, summary).iter().for_each(|line| show.say(line));
            let directory = run.recipe.output_dir.display();
            show.say(&format!("result and checkpoints in {directory}; open report.html there"));
            closing::next_commands(run, program).iter().for_each(|line| show.say(line));
            Exit::Done
        }
        Outcome::Stopped { step, signal } => {
            show.say(&match step {
                0 => "stopped before the first step: there is nothing to save".to_owned(),
                step => format!("stopped after step {step}, which is saved; go on with --resume"),
            });
            Exit::Stopped(*signal)
        }
    }
}

/// This program as it was typed; a launcher starts ranks by another name.
fn program(assigned: bool) -> String {
    let typed = std::env::args_os().next().filter(|_| !assigned);
    typed.map_or("finetune".to_owned(), |typed| typed.to_string_lossy().into_owned())
}

/// Peak memory beside its estimate.
fn peaks(run: &Run) -> String {
    let main = progress::bytes(memory::peak_bytes());
    let estimate = progress::bytes(run.estimate.total);
    match run.model.device_peak() {
        None => format!("peak memory {main} (estimated {estimate})"),
        Some(device) => {
            format!("peak memory of the GPU {} (estimated {estimate}), of the program {main}", progress::bytes(device))
        }
    }
}

/// `advice`: what to do about a slow rank, which is said once.
fn show_event(
    show: &mut Progress,
    event: Event<'_>,
    start: Instant,
    verbosity: Verbosity,
    ranks: &Ranks,
    advice: &mut Option<String>,
) {
    if let Event::Step { row, .. } = &event
        && verbosity == Verbosity::Verbose
        && row.step == 1
    {
        show.say(&format!("first step done {:.2} s after the start", start.elapsed().as_secs_f64()));
    }
    let name = |rank: usize| format!("rank {rank} ({})", ranks.group().who()[rank].host);
    match event {
        Event::Straggler { rank, factor, steps, seconds, without } => {
            show.say(&progress::straggler(&name(rank), factor, steps, seconds, without));
            advice.take().iter().for_each(|advice| show.say(advice));
        }
        Event::SharesAssigned { shares } => {
            let all: usize = shares.iter().sum();
            let shares: Vec<String> =
                shares.iter().enumerate().map(|(rank, count)| format!("{count} to {}", name(rank))).collect();
            show.say(&format!("of the {all} shares of a step, by measured speed, go {}", shares.join(", ")));
        }
        event => show.show(event),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_run_says_which_steps_took_the_time() {
        let minute = Duration::from_secs(60);
        for (from, step, said) in [
            (0, 150, "150 steps in 1m00s"),
            (0, 1, "1 step in 1m00s"),
            (100, 1500, "steps 101 to 1,500 in 1m00s"),
            (149, 150, "step 150 in 1m00s"),
            (150, 150, "no step was left of 150"),
        ] {
            assert_eq!(did(from, step, minute), said);
        }
    }
}
