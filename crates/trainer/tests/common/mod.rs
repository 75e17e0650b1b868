//! Several ranks, each a thread of this process.

#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod deeper;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use finetune_allreduce::{Algorithm, Group};
use finetune_recipe::Recipe;
use finetune_trainer::{EvalRow, Event, Outcome, Ranks, Resume, Run, StepRow, ThisHost, TrainError, prepare, train};

pub(crate) fn goldens(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(family)
}

/// A recipe on a golden model with dropout, an evaluation and a last step that is not full.
pub(crate) fn recipe(output: &Path, sets: &[&str]) -> Recipe {
    let directory = goldens("qwen3");
    let text = format!(
        "[model]\npath = {directory:?}\n[lora]\nrank = 4\ndropout = 0.1\n[data]\ntrain = {rows:?}\neval = {rows:?}\nformat = \"tokens\"\n\
         [train]\nglobal_batch_size = 7\nmicro_batch_size = 2\nmax_steps = 6\n[optimizer]\nlearning_rate = 1e-2\n\
         [eval]\nevery = 3\n[checkpoint]\nevery = 2\n",
        rows = directory.join("rows.jsonl"),
    );
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    Recipe::parse(&text, Path::new("ranks.toml"), &sets, Some(output)).unwrap_or_else(|error| panic!("{error}"))
}

/// What rank 0 told during a run.
#[derive(Default)]
pub(crate) struct Told {
    pub(crate) steps: Vec<StepRow>,
    pub(crate) evaluations: Vec<EvalRow>,
    /// Shares of each rank, each time they were assigned anew.
    pub(crate) assignments: Vec<Vec<usize>>,
}

impl Told {
    pub(crate) fn losses(&self) -> Vec<f64> {
        self.steps.iter().map(|row| row.loss).collect()
    }

    pub(crate) fn norms(&self) -> Vec<f64> {
        self.steps.iter().map(|row| row.grad_norm).collect()
    }
}

/// Runs `world` ranks. Every one must end like the first. `stop` is called before each step with
/// (rank, step).
pub(crate) fn run(
    world: usize,
    topology: Option<Algorithm>,
    resume: &Resume,
    recipe: impl Fn(usize) -> Recipe + Sync,
    stop: impl Fn(usize, u64) -> i32 + Sync,
) -> (Told, Vec<Result<Outcome, TrainError>>) {
    run_altered(world, topology, resume, recipe, stop, |_, _| {})
}

/// [`run`], with something done to a rank's run before its first step.
pub(crate) fn run_altered(
    world: usize,
    topology: Option<Algorithm>,
    resume: &Resume,
    recipe: impl Fn(usize) -> Recipe + Sync,
    stop: impl Fn(usize, u64) -> i32 + Sync,
    alter: impl Fn(usize, &mut Run) + Sync,
) -> (Told, Vec<Result<Outcome, TrainError>>) {
    run_watched(world, topology, resume, recipe, alter, |rank, event, signal| {
        if let Event::Step { row, .. } = event {
            signal.store(stop(rank, row.step), Ordering::SeqCst);
        }
    })
}

/// As [`run_altered`]. `watch` is called with the events of every rank, and the signal that it may
/// set.
pub(crate) fn run_watched(
    world: usize,
    topology: Option<Algorithm>,
    resume: &Resume,
    recipe: impl Fn(usize) -> Recipe + Sync,
    alter: impl Fn(usize, &mut Run) + Sync,
    watch: impl Fn(usize, &Event<'_>, &AtomicI32) + Sync,
) -> (Told, Vec<Result<Outcome, TrainError>>) {
    run_on(&ThisHost::default(), world, topology, resume, recipe, alter, watch)
}

/// As [`run_watched`], on such a host.
pub(crate) fn run_on(
    host: &ThisHost,
    world: usize,
    topology: Option<Algorithm>,
    resume: &Resume,
    recipe: impl Fn(usize) -> Recipe + Sync,
    alter: impl Fn(usize, &mut Run) + Sync,
    watch: impl Fn(usize, &Event<'_>, &AtomicI32) + Sync,
) -> (Told, Vec<Result<Outcome, TrainError>>) {
    let (recipe, alter, watch) = (&recipe, &alter, &watch);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = Group::in_process(world, topology)
            .into_iter()
            .map(|group| {
                scope.spawn(move || {
                    let (rank, recipe) = (group.rank(), recipe(group.rank()));
                    let ranks = Arc::new(Ranks::new(group, recipe.distributed.virtual_ranks)?);
                    let mut prepared = prepare(recipe, resume, &ranks, host, &|_| {})?;
                    alter(rank, &mut prepared.run);
                    let (mut told, signal) = (Told::default(), AtomicI32::new(0));
                    let outcome = train(&mut prepared.run, &signal, &mut |event| {
                        watch(rank, &event, &signal);
                        match event {
                            Event::Step { row, .. } => told.steps.push(row.clone()),
                            Event::Evaluated { row, .. } => told.evaluations.push(row.clone()),
                            Event::SharesAssigned { shares } => told.assignments.push(shares.to_vec()),
                            _ => {}
                        }
                    });
                    outcome.map(|outcome| (told, outcome))
                })
            })
            .collect();
        let mut first = Told::default();
        let mut outcomes = Vec::new();
        for (rank, thread) in ranks.into_iter().enumerate() {
            outcomes.push(thread.join().expect("no panic").map(|(told, outcome)| {
                if rank == 0 {
                    first = told;
                }
                outcome
            }));
        }
        (first, outcomes)
    })
}

/// Runs to the end.
pub(crate) fn whole(world: usize, topology: Option<Algorithm>, output: &Path, sets: &[&str]) -> Told {
    let (told, outcomes) = run(world, topology, &Resume::Newest, |_| recipe(output, sets), |_, _| 0);
    for outcome in outcomes {
        assert!(matches!(outcome, Ok(Outcome::Finished { step: 6, .. })), "{world} ranks: {outcome:?}");
    }
    told
}

pub(crate) fn adapter(output: &Path) -> Vec<u8> {
    std::fs::read(output.join("adapter/adapter_model.safetensors")).expect("an adapter")
}

/// The checkpoint after step 6, but for what says when it was made.
pub(crate) fn state(output: &Path) -> Vec<Vec<u8>> {
    let checkpoint = output.join("checkpoints/step-000006");
    let files = ["adapter_model.safetensors", "optimizer.safetensors"];
    files.iter().map(|file| std::fs::read(checkpoint.join(file)).expect("a file of the checkpoint")).collect()
}
