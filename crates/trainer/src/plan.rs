//! `finetune plan`: the ways in which a recipe can run on given machines, what each takes, and how long a step
//! is.

use finetune_model::matmul_rate;
use finetune_recipe::{Method, Recipe, ResidencyChoice};
use serde::Serialize;

use crate::base_model::model_directory;
use crate::date;
use crate::device_plan::ThisHost;
use crate::disk_need::DiskNeed;
use crate::error::TrainError;
use crate::examine::{Examined, Extent, examine};
use crate::memory::{Precision, Sizes, Sizing, Subject, sizes};
use crate::residency::{choose, micro_batches};
use crate::resume::Resume;
use crate::validate::operations;

/// Machines that a plan is made for, all alike.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Machines {
    /// How many there are. Each is one rank.
    pub hosts: usize,
    /// Bytes of memory that a rank may take, if that can be told.
    pub memory: Option<u64>,
    /// Bytes per second that are read from a disk.
    pub disk: f64,
    /// Bytes per second that a rank sends to another.
    pub link: f64,
}

/// A way in which a recipe can run. Figures are those of one rank.
#[derive(Clone, Debug, Serialize)]
pub struct Way {
    /// What it is, for people.
    pub name: &'static str,
    /// The recipe's keys that make it so, as `--set` takes them.
    pub settings: Vec<String>,
    /// Bytes of memory at the largest step.
    pub memory: u64,
    /// Whether that is there; `None` if the memory is not known.
    pub fits: Option<bool>,
    /// Micro-batches that go through each layer together.
    pub at_once: usize,
    /// Bytes of layers that are read in a step.
    pub read: u64,
    /// Bytes of gradients that are sent in a step.
    pub sent: u64,
    /// Seconds of the products of a step. `None` on a GPU, whose rate is not known before kernels are compiled.
    pub computing_seconds: Option<f64>,
    /// Seconds that a step waits for layers: what reading takes longer than computing.
    pub reading_seconds: Option<f64>,
    /// Seconds that gradients travel.
    pub sending_seconds: f64,
    /// Seconds of a step.
    pub seconds: Option<f64>,
    /// The part of a step in which it computes.
    pub busy: Option<f64>,
}

/// What a recipe takes on given machines.
#[derive(Clone, Debug, Serialize)]
pub struct MachinesPlan {
    /// The machines.
    pub machines: Machines,
    /// Parameters of the model.
    pub parameters: u64,
    /// Parameters that are trained.
    pub trained_parameters: u64,
    /// Bytes of all layers' frozen matrices, as they are held.
    pub layers: u64,
    /// Bytes of the run directory on rank 0's disk.
    pub disk: u64,
    /// Steps of the run.
    pub steps: u64,
    /// The ways, the fastest first.
    pub ways: Vec<Way>,
    /// The number of the first way that fits.
    pub best: Option<usize>,
    /// What would take less, if none fits.
    pub hints: Vec<String>,
}

/// Examines a recipe and plans it. Nothing is written. `progress` is called with the number of rows read.
///
/// # Errors
/// What `run` would refuse the recipe for, other than its memory.
pub fn plan(recipe: &Recipe, machines: Machines, progress: &dyn Fn(u64)) -> Result<MachinesPlan, TrainError> {
    let mut recipe = recipe.clone();
    recipe.data.date = Some(date::choose(&recipe, &Resume::Newest));
    recipe.model.residency = ResidencyChoice::Memory;
    let model = model_directory(&recipe);
    // Without a limit, so that the estimate is no problem.
    let host = ThisHost::default();
    let ready = examine(Examined::default(), &recipe, model, &host, Extent::Run, None, progress).ready()?;
    let adaptation = ready.sizing.adaptation.as_ref();
    let Sizes { parameters, trained } = sizes(&ready.sizing.config, adaptation);
    let subject = Subject { recipe: &recipe, train: &ready.train, eval: ready.eval.as_ref(), sizing: &ready.sizing };
    let disk = DiskNeed::new(&recipe, trained, ready.steps, ready.eval.is_some(), ready.sizing.text_bytes, None);
    let rate = ready.sizing.placement.is_cpu().then(matmul_rate);
    let planner = Planner { subject, machines, parameters, trained, rate };
    let mut ways = planner.ways();
    ways.sort_by(|a, b| a.computing_seconds.partial_cmp(&b.computing_seconds).unwrap_or(std::cmp::Ordering::Equal));
    ways.sort_by(|a, b| a.seconds.partial_cmp(&b.seconds).unwrap_or(std::cmp::Ordering::Equal));
    let best = ways.iter().position(|way| way.fits != Some(false));
    let hints = if best.is_none() { planner.subject.cheaper_settings() } else { Vec::new() };
    let layers = ready.sizing.layer_bytes();
    Ok(MachinesPlan {
        machines,
        parameters,
        trained_parameters: trained,
        layers,
        disk: disk.total,
        steps: ready.steps,
        ways,
        best,
        hints,
    })
}

struct Planner<'a> {
    subject: Subject<'a>,
    machines: Machines,
    parameters: u64,
    trained: u64,
    /// Operations per second of the CPU.
    rate: Option<f64>,
}

impl Planner<'_> {
    fn ways(&self) -> Vec<Way> {
        let set = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
        let memory = "model.residency=memory";
        let mut ways = vec![
            self.way("in memory", set(&[memory, "train.gradient_checkpointing=false"]), false, false),
            self.way(
                "in memory, layers computed again",
                set(&[memory, "train.gradient_checkpointing=true"]),
                true,
                false,
            ),
        ];
        let sizing = self.subject.sizing;
        if self.subject.recipe.train.method == Method::Lora && !sizing.layers.is_empty() {
            ways.push(self.way("layers from the disk", set(&["model.residency=disk"]), true, true));
        }
        ways
    }

    fn way(&self, name: &'static str, settings: Vec<String>, again: bool, from_disk: bool) -> Way {
        let Machines { hosts, memory, disk, link } = self.machines;
        let mut recipe = self.subject.recipe.clone();
        recipe.train.gradient_checkpointing = again;
        recipe.model.residency = if from_disk { ResidencyChoice::Disk } else { ResidencyChoice::Memory };
        let subject = Subject { recipe: &recipe, ..self.subject };
        let (sizing, _) = choose(&subject, memory);
        // Those of one rank.
        let micro_batches = micro_batches(&subject).div_ceil(hosts);
        let at_once = sizing.at_once.min(micro_batches);
        let sizing = Sizing { at_once, ..sizing };
        let needed = Subject { sizing: &sizing, ..subject }.estimate().total;
        let read = if from_disk { self.read(&sizing, micro_batches.div_ceil(at_once)) } else { 0 };
        // Each rank sends all but its own part, twice: the sums of the parts, and the whole.
        let sent = 4 * self.trained * 2 * (hosts as u64 - 1) / hosts as u64;
        let computing = self.rate.map(|rate| self.operations(&recipe, again) / rate);
        let reading = computing.map(|computing| (read as f64 / disk - computing).max(0.0));
        let sending = sent as f64 / link;
        let seconds = computing.zip(reading).map(|(computing, reading)| computing + reading + sending);
        Way {
            name,
            settings,
            memory: needed,
            fits: memory.map(|memory| needed <= memory),
            at_once,
            read,
            sent,
            computing_seconds: computing,
            reading_seconds: reading,
            sending_seconds: sending,
            seconds,
            busy: computing.zip(seconds).map(|(computing, seconds)| computing / seconds),
        }
    }

    /// Bytes that a step reads: each layer twice, but the last one, where a group turns back, once.
    fn read(&self, sizing: &Sizing, groups: usize) -> u64 {
        let held = Precision::new(sizing).held;
        let last = sizing.layers.last().map_or(0, |layer| layer.bytes(held));
        groups as u64 * (2 * sizing.layer_bytes()).saturating_sub(last)
    }

    /// Operations of a rank's part of a step.
    fn operations(&self, recipe: &Recipe, again: bool) -> f64 {
        let train = self.subject.train;
        let rows = recipe.train.global_batch_size.min(train.rows.len()).div_ceil(self.machines.hosts);
        let active = self.parameters.saturating_sub(self.subject.sizing.config.idle_parameters());
        operations(recipe.train.method, train, rows, active, again)
    }
}
