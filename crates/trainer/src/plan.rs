//! `finetune plan`: the ways in which a recipe can run on given machines, what each takes, and how long a step
//! is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use finetune_model::{Seconds, Stage, not_in_stages};
use finetune_recipe::{Method, Recipe, ResidencyChoice};
use serde::Serialize;

use crate::base_model::model_directory;
use crate::date;
use crate::device_plan::ThisHost;
use crate::disk_need::DiskNeed;
use crate::error::TrainError;
use crate::examine::{Examined, Extent, examine};
use crate::memory::{Precision, Sizes, Sizing, Subject, sizes};
use crate::product_time::{Operations, Rates, operations, tokens_at_once};
use crate::residency::{choose, micro_batches};
use crate::resume::Resume;
use crate::stages::{Offer, Why, deal, of_each_stage};

/// Machines that a plan is made for, alike but for their memory.
#[derive(Clone, Debug, Serialize)]
pub struct Machines {
    /// How many there are. Each is one rank.
    pub hosts: usize,
    /// Bytes of memory that a rank may take, if that can be told. The least, where they differ.
    pub memory: Option<u64>,
    /// Bytes of memory of each rank, where they differ.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub memory_of_each: Vec<u64>,
    /// Bytes per second that are read from a disk.
    pub disk: f64,
    /// Bytes per second that a rank sends to another.
    pub link: f64,
}

/// A way in which a recipe can run. Figures are those of one rank; where ranks differ, of the one that takes most.
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
    /// Bytes of gradients, and of what goes from layer to layer, that are sent in a step.
    pub sent: u64,
    /// Machines that hold the layers of one model together.
    pub stages: usize,
    /// How many layers each of these holds, where their numbers differ because their memory does.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<usize>,
    /// Seconds of the products of a step. `None` on a GPU, whose rate is not known before kernels are compiled.
    pub computing_seconds: Option<f64>,
    /// Seconds that a step waits for layers: what reading takes longer than computing.
    pub reading_seconds: Option<f64>,
    /// Seconds that a step waits for what is sent: gradients, and what goes from layer to layer where that takes
    /// longer than computing.
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
    let mut planner = Planner { subject, machines: machines.clone(), parameters, trained, rates: BTreeMap::new() };
    if ready.sizing.placement.is_cpu() {
        planner.rates = planner.measured(&ready.directory);
    }
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

/// What distinguishes a way from others.
#[derive(Clone, Copy)]
struct Form {
    /// Machines that hold the layers of one model together.
    stages: usize,
    /// Whether layers are computed again in the backward pass.
    again: bool,
    /// Whether layers are read from the disk.
    from_disk: bool,
}

/// Seconds of a step on one machine with all layers.
#[derive(Clone, Copy)]
struct Alone {
    /// Of the forward pass.
    forward: f64,
    /// Of the way back, with what is computed again there.
    back: f64,
}

impl Alone {
    fn total(&self) -> f64 {
        self.forward + self.back
    }
}

/// Seconds of a step whose layers are spread. `hop`: of one micro-batch from one machine to the next.
fn spread(stage: &Stage, alone: Alone, micro_batches: usize, at_once: usize, hop: f64) -> f64 {
    let parts = (stage.of_layer.len() * micro_batches.max(1)) as f64;
    let seconds = Seconds { forward: alone.forward / parts, back: alone.back / parts, hop };
    let group = |count: usize| stage.simulate(count, 0, seconds).map_or(f64::INFINITY, |done| done.seconds);
    let (groups, rest) = (micro_batches / at_once.max(1), micro_batches % at_once.max(1));
    groups as f64 * group(at_once) + if rest > 0 { group(rest) } else { 0.0 }
}

/// The layers of each machine.
struct Spread {
    stage: Option<Stage>,
    why: Why,
    /// (number, bytes of memory)
    machines: Vec<(usize, Option<u64>)>,
}

struct Planner<'a> {
    subject: Subject<'a>,
    machines: Machines,
    parameters: u64,
    trained: u64,
    /// Operations per second of the CPU, by the tokens of a micro-batch. None on a GPU.
    rates: BTreeMap<usize, Rates>,
}

impl Planner<'_> {
    fn ways(&self) -> Vec<Way> {
        let set = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
        let memory = "model.residency=memory";
        let whole = Form { stages: 1, again: true, from_disk: false };
        let mut ways = vec![
            self.way("in memory", set(&[memory, "train.gradient_checkpointing=false"]), Form { again: false, ..whole }),
            self.way("in memory, layers computed again", set(&[memory, "train.gradient_checkpointing=true"]), whole),
        ];
        let Sizing { layers, config, adaptation, .. } = self.subject.sizing;
        if self.subject.recipe.train.method != Method::Lora || layers.is_empty() {
            return ways;
        }
        ways.push(self.way("layers from the disk", set(&["model.residency=disk"]), Form { from_disk: true, ..whole }));
        let can_be_spread = adaptation.as_ref().is_some_and(|adaptation| not_in_stages(config, adaptation).is_none());
        let hosts = self.machines.hosts;
        for stages in (2..=hosts.min(layers.len())).filter(|stages| can_be_spread && hosts.is_multiple_of(*stages)) {
            let spread = format!("parallel.stages={stages}");
            let form = Form { stages, ..whole };
            ways.push(self.way("layers over machines, in memory", set(&[&spread, memory]), form));
            let form = Form { from_disk: true, ..form };
            ways.push(self.way("layers over machines, from disks", set(&[&spread, "model.residency=disk"]), form));
        }
        ways
    }

    fn way(&self, name: &'static str, settings: Vec<String>, form: Form) -> Way {
        let Form { stages, again, from_disk } = form;
        let Machines { hosts, disk, link, .. } = self.machines;
        let replicas = hosts / stages;
        let mut recipe = self.subject.recipe.clone();
        recipe.train.gradient_checkpointing = again;
        recipe.model.residency = if from_disk { ResidencyChoice::Disk } else { ResidencyChoice::Memory };
        let subject = Subject { recipe: &recipe, ..self.subject };
        let shares = recipe.distributed.virtual_ranks.map_or(1, |shares| shares.div_ceil(replicas));
        let sizing = Sizing { shares, ..subject.sizing.clone() };
        let subject = Subject { sizing: &sizing, ..subject };
        let Spread { stage, why, machines } = self.spread(&subject, stages);
        // Those of one model.
        let micro_batches = micro_batches(&subject).div_ceil(replicas);
        let of_machine = |(mine, memory): &(usize, Option<u64>)| {
            let stage = stage.clone().map(|stage| Stage { mine: *mine, ..stage });
            let placement = subject.sizing.placement.clone().with_stage(stage);
            let sizing = Sizing { placement, ..subject.sizing.clone() };
            choose(&Subject { sizing: &sizing, ..subject }, *memory).0
        };
        let sizings: Vec<Sizing> = machines.iter().map(of_machine).collect();
        let at_once = sizings.iter().map(|sizing| sizing.at_once).min().unwrap_or(1).min(micro_batches);
        let sizings: Vec<Sizing> = sizings.into_iter().map(|sizing| Sizing { at_once, ..sizing }).collect();
        let needed = |sizing: &Sizing| Subject { sizing, ..subject }.estimate().total;
        let needed: Vec<u64> = sizings.iter().map(needed).collect();
        let mut fits = needed.iter().zip(&machines).map(|(needed, (_, memory))| memory.map(|memory| *needed <= memory));
        let groups = micro_batches.div_ceil(at_once);
        let read =
            sizings.iter().map(|sizing| if from_disk { self.read(sizing, groups) } else { 0 }).max().unwrap_or(0);
        // Each rank sends all but its own part of the gradients of its layers to those with the same layers, twice: the
        // sums of the parts, and the whole.
        let gradients = 4 * self.trained.div_ceil(stages as u64) * 2 * (replicas as u64 - 1) / replicas as u64;
        let alone = self.rates(replicas).map(|rates| self.alone(rates, replicas, again));
        let (hops, of_hops) = self.hops(stage.as_ref(), replicas, &recipe);
        let computing = match &stage {
            None => alone.map(|alone| alone.total()),
            Some(stage) => alone.map(|alone| spread(stage, alone, micro_batches, at_once, of_hops / link)),
        };
        let reading = computing.map(|computing| (read as f64 / disk - computing).max(0.0));
        let sending = gradients as f64 / link;
        let seconds = computing.zip(reading).map(|(computing, reading)| computing + reading + sending);
        Way {
            name,
            settings,
            memory: needed.iter().copied().max().unwrap_or(0),
            fits: fits.try_fold(true, |all, one| one.map(|one| all && one)),
            at_once,
            read,
            sent: gradients + hops,
            stages,
            layers: if matches!(why, Why::Memory | Why::Disk) {
                stage.map_or(Vec::new(), |stage| stage.counts())
            } else {
                Vec::new()
            },
            computing_seconds: computing,
            reading_seconds: reading,
            sending_seconds: sending,
            seconds,
            busy: alone.zip(seconds).map(|(alone, seconds)| alone.total() / stages as f64 / seconds),
        }
    }

    /// Which layers machines hold that have the layers of a model together, and which of them are looked at, each
    /// with its memory: all that differ.
    fn spread(&self, subject: &Subject<'_>, stages: usize) -> Spread {
        let Machines { hosts, memory, memory_of_each, .. } = &self.machines;
        let layers = subject.sizing.config.layers.len();
        if stages == 1 {
            return Spread { stage: None, why: Why::Alike, machines: vec![(0, *memory)] };
        }
        if memory_of_each.is_empty() {
            let stage = Stage::in_turn(layers, stages, 0);
            // It has as many layers as any, the output layer, and the logits besides. The first one may need more where
            // its embedding is the larger matrix.
            let Sizing { ends: [embedding, output], config, placement, stored, .. } = subject.sizing;
            let held = placement.held(*stored);
            let is_larger = !config.tied_embeddings && embedding.bytes(held) > output.bytes(held);
            let looked_at = [(stage.last(), true), (0, is_larger && stage.last() != 0)];
            let machines = looked_at.into_iter().filter(|(_, is)| *is).map(|(machine, _)| (machine, *memory)).collect();
            return Spread { stage: Some(stage), why: Why::Alike, machines };
        }
        let replicas = hosts / stages;
        let rate = self.rates(replicas).map_or(0.0, |rates| rates.of_all(&self.operations(replicas, true)));
        let disk = Some(self.machines.disk);
        let offer = |memory: &u64| Offer::at_rate(rate, subject, disk, Some(*memory), *hosts);
        let offers: Vec<Offer> = memory_of_each.iter().map(offer).collect();
        let dealt = deal(layers, &of_each_stage(&offers, stages));
        let machines = (0..stages).map(|mine| (mine, memory_of_each.iter().skip(mine).step_by(stages).min().copied()));
        Spread { stage: Some(dealt.stage), why: dealt.why, machines: machines.collect() }
    }

    /// Bytes that a step reads: each layer twice, but the last one, where a group turns back, once.
    fn read(&self, sizing: &Sizing, groups: usize) -> u64 {
        let held = Precision::new(sizing).held;
        let last = sizing.layers.last().map_or(0, |layer| layer.bytes(held));
        let is_mine = |n: usize| sizing.placement.stage().is_none_or(|stage| stage.holds(n));
        let mine = sizing.layers.iter().enumerate().filter(|(n, _)| is_mine(*n));
        let mine: u64 = mine.map(|(_, layer)| layer.bytes(held)).sum();
        groups as u64 * (2 * mine).saturating_sub(last)
    }

    /// Bytes that a machine sends from layer to layer in a step, and those of one micro-batch on one way.
    fn hops(&self, stage: Option<&Stage>, replicas: usize, recipe: &Recipe) -> (u64, f64) {
        let Some(stage) = stage else { return (0, 0.0) };
        let Sizing { config, placement, layers, .. } = self.subject.sizing;
        let train = self.subject.train;
        let rows = recipe.train.global_batch_size.min(train.rows.len()).div_ceil(replicas);
        let tokens = train.counts.tokens as f64 / train.rows.len().max(1) as f64;
        let of_row = tokens * (config.hidden_size * placement.compute().bytes()) as f64;
        // Forward behind each layer but the last, back behind each but the first.
        let hops = 2 * (layers.len() - 1);
        let all = (rows as f64 * of_row * hops as f64 / stage.count() as f64) as u64;
        (all, of_row * recipe.train.micro_batch_size as f64)
    }

    /// The rates of micro-batches as machines have them, whether each has the whole model or several hold it.
    fn measured(&self, directory: &Path) -> BTreeMap<usize, Rates> {
        let (hosts, method) = (self.machines.hosts, self.subject.recipe.train.method);
        let replicas = (1..=hosts).filter(|replicas| hosts.is_multiple_of(*replicas));
        let tokens: BTreeSet<usize> = replicas.map(|replicas| self.tokens_at_once(replicas)).collect();
        let measured = |tokens| Rates::measured(method, directory, &self.subject.sizing.placement, tokens);
        tokens.into_iter().map(|tokens| (tokens, measured(tokens))).collect()
    }

    fn tokens_at_once(&self, replicas: usize) -> usize {
        tokens_at_once(self.subject.recipe, self.subject.train, self.rows(replicas))
    }

    fn rates(&self, replicas: usize) -> Option<&Rates> {
        self.rates.get(&self.tokens_at_once(replicas))
    }

    /// Rows of a model's part of a step.
    fn rows(&self, replicas: usize) -> usize {
        let train = &self.subject.recipe.train;
        train.global_batch_size.min(self.subject.train.rows.len()).div_ceil(replicas)
    }

    /// Seconds of a model's part of a step.
    fn alone(&self, rates: &Rates, replicas: usize, again: bool) -> Alone {
        let forward = self.operations(replicas, false).forward / rates.forward;
        Alone { forward, back: rates.seconds(&self.operations(replicas, again)) - forward }
    }

    /// Operations of a model's part of a step.
    fn operations(&self, replicas: usize, again: bool) -> Operations {
        let active = self.parameters.saturating_sub(self.subject.sizing.config.idle_parameters());
        operations(self.subject.recipe.train.method, self.subject.train, self.rows(replicas), active, again)
    }
}
