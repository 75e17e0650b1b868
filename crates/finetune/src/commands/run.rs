//! `finetune run`: the main job, as one process or as one of several ranks.

use std::process::ExitCode;
use std::time::Instant;

use finetune_allreduce::Notice;
use finetune_recipe::Recipe;
use finetune_trainer::numbers::counted;
use finetune_trainer::{Event, Outcome, Prepared, Ranks, Resume, Run, ThisHost, home, prepare, train};

use crate::cli::RunArguments;
use crate::commands::preflight::free_bytes;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::membership::{self, Assignment};
use crate::progress::{self, Progress, Verbosity};
use crate::rank_event::{self, RankEvent};
use crate::signals::Signals;
use crate::sleep_inhibitor::SleepInhibitor;
use crate::stderr::complain;
use crate::work::Work;
use crate::{allocator, closing, flight, memory, output, prometheus, source};

pub(crate) fn run(arguments: RunArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let launched = arguments.assigned;
    let outcome = train_as_one_rank(arguments, verbosity);
    if let Some(event) = outcome.as_ref().err().and_then(rank_event::of_failure).filter(|_| launched) {
        rank_event::send(&event);
    }
    outcome
}

fn train_as_one_rank(arguments: RunArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let start = Instant::now();
    let signals = Signals::listen()?;
    let (Assignment { membership, narrates }, notes) = match arguments.assigned {
        true => (Assignment::read(&signals)?, Vec::new()),
        false => Assignment::of_launcher(arguments.token_file.as_deref())?,
    };
    let read = || -> Result<_, Failure> {
        let file = source::recipe_path(&arguments.recipe.recipe)?;
        // A run that was copied goes on where it lies.
        let output = arguments.output_dir.clone().or_else(|| home(&file, &arguments.recipe.sets));
        Ok((Recipe::load(&file, &arguments.recipe.sets, output.as_deref())?, file))
    };
    // The others wait for this rank: if it fails before it joins, they are told.
    let (recipe, file) = read().inspect_err(|failure| membership::excuse(&membership, failure))?;
    let resume = match arguments.resume {
        None => Resume::No,
        Some(None) => Resume::Newest,
        Some(Some(path)) => Resume::From(path),
    };
    membership::share_cores(&membership);
    finetune_store::failpoint::set_label(membership.rank.to_string());
    // What one rank says is said; the others speak of themselves only.
    let (first, loudness) = (membership.rank == 0, verbosity);
    let verbosity = if first { verbosity } else { Verbosity::Quiet };
    let mut show = Progress::new(verbosity, recipe.log.every);
    notes.iter().for_each(|note| show.say(note));
    let ranks = membership::join(&membership, &recipe, move |notice| say_notice(&notice, first, loudness))?;
    // Not before the others are there: they would wait for a rank 0 that has ended.
    if let Some(address) = recipe.log.prometheus.as_ref().filter(|_| first) {
        prometheus::serve(address)?;
    }
    let directory = recipe.output_dir.clone();
    flight::belong_to(&directory);
    show.start("reading rows", 0);
    let host = ThisHost {
        memory: memory::machine_bytes(),
        local_rank: membership.local_rank,
        local_world: membership.local_world,
        disk: free_bytes(&directory),
        recipe_file: Some(file),
    };
    let prepared = prepare(recipe, &resume, &ranks, &host, &|rows| show.position(rows));
    show.finish();
    let Prepared { mut run, notices } = prepared?;
    for notice in &notices {
        show.say(notice);
    }
    let counts = run.train.counts;
    show.say(&format!(
        "{}, {} tokens ({} trained), longest {}{}",
        counted(run.train.rows.len() as u64, "row"),
        progress::thousands(counts.tokens),
        progress::thousands(counts.trained_tokens),
        counts.longest,
        losses(counts.truncated, counts.dropped),
    ));
    if verbosity == Verbosity::Verbose {
        show.say(&format!("ready after {:.2} s", start.elapsed().as_secs_f64()));
    }
    closing::panel(&run).iter().for_each(|line| show.say(line));
    show.say(&format!("training on {}", run.device));
    if !run.model.placement().is_cpu() {
        show.say("the first step also compiles the GPU's kernels");
    }
    allocator::prepare_last_words(&run.cheaper_settings());
    let _inhibitor = SleepInhibitor::start();
    let work = Work::new();
    if verbosity > Verbosity::Quiet {
        let work = work.clone();
        signals.finish_steps(move |heard| work.words(heard));
    } else {
        signals.finish_steps_silently();
    }
    let tells = membership.launched && first;
    if tells {
        rank_event::send(&RankEvent::Working);
    }
    let narrates = narrates && first;
    let mut advice = closing::advice_on_shares(&run.recipe, ranks.group().world());
    let outcome = train(&mut run, &signals.stop, &mut |event| {
        work.see(&event);
        prometheus::show(&event, &|rank| ranks.group().who()[rank].host.clone());
        rank_event::of_event(&event).iter().filter(|_| tells).for_each(rank_event::send);
        match progress::narrate(&event).filter(|_| narrates) {
            // A launcher that is gone does not listen; the end of standard input says so, and what to do.
            Some(line) => drop(output::line(&line)),
            None => show_event(&mut show, event, start, verbosity, &ranks, &mut advice),
        }
    });
    show.finish();
    match outcome? {
        Outcome::Finished { step, before, after, summary } => {
            if first {
                output::print(&progress::answers(before.as_ref(), after.as_ref()))?;
            }
            let took = progress::duration(start.elapsed().as_secs_f64());
            show.say(&format!("\n{} in {took}, {}", counted(step, "step"), peaks(&run)));
            closing::outcome(&run.recipe, step, &summary).iter().for_each(|line| show.say(line));
            show.say(&format!("result and checkpoints in {}; open report.html there", directory.display()));
            closing::next_commands(&run, &program(arguments.assigned)).iter().for_each(|line| show.say(line));
            if first && loudness == Verbosity::Quiet {
                // The one thing that whoever asked for nothing but results wants to know.
                output::line(&closing::result(&run.recipe).display().to_string())?;
            }
            flight::forget();
            Ok(ExitCode::SUCCESS)
        }
        Outcome::Stopped { step, signal } => {
            show.say(&match step {
                0 => "stopped before the first step: there is nothing to save".to_owned(),
                step => format!("stopped after step {step}, which is saved; go on with --resume"),
            });
            Ok(Exit::Stopped(signal).into())
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

/// What the group says: how it came about on rank 0, trouble on whichever rank sees it.
fn say_notice(notice: &Notice, first: bool, verbosity: Verbosity) {
    let wanted = match notice {
        Notice::Joined { world: 1, .. } => return,
        Notice::Unresolved { .. } | Notice::Waiting { .. } | Notice::TurnedAway { .. } => Verbosity::Normal,
        Notice::Joined { .. } | Notice::FellBack { .. } if first => Verbosity::Normal,
        Notice::Silent { .. } | Notice::Back { .. } if first => Verbosity::Normal,
        Notice::Chosen { .. } if !first => return,
        _ => Verbosity::Verbose,
    };
    if verbosity >= wanted {
        complain!("{notice}");
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
