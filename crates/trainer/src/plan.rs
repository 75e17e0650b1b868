//! `finetune plan`: the ways in which a recipe can run on given machines, what each takes, and how long a step
//! is. What each rank takes is in `each_rank`, what ranks send each other of what they learn in `exchange`, how long a
//! step is in `seconds`, what there is to say besides in `said` and `nothing_fits`.

mod each_rank;
mod exchange;
mod nothing_fits;
mod said;
mod seconds;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use finetune_allreduce::DeviceMatrix;
use finetune_model::{Arrangement, Order, Stage, not_in_stages};
use finetune_recipe::{Distributed, Method, Parallel, Recipe, ResidencyChoice, SharesChoice, StagesChoice};
use serde::Serialize;

use crate::base_model::{directory_of_config, model_directory};
use crate::date;
use crate::dealing::Why;
use crate::device_plan::ThisHost;
use crate::disk_need::DiskNeed;
use crate::error::TrainError;
use crate::examine::{Examined, Extent, examine};
use crate::load::Load;
use crate::memory::{Counted, Sizes, Sizing, Subject, sizes};
use crate::product_time::{Operations, Rates, tokens_at_once};
use crate::residency::micro_batches;
use crate::resume::Resume;
use crate::stages::{Offer, arrangements, deal, forms_chain, given, of_each_stage};

use self::each_rank::Needs;
pub use self::each_rank::RankNeed;
use self::seconds::{Together, seconds_over};

/// Machines that a plan is made for, alike but for their memory.
#[derive(Clone, Debug, Serialize)]
pub struct Machines {
    /// How many there are. Each is one rank.
    pub hosts: usize,
    /// What a hostfile calls them, in the order of their ranks; empty without one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Bytes of memory that a rank may take, if that can be told. The least, where they differ.
    pub memory: Option<u64>,
    /// Bytes of memory of each rank, where they differ.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub memory_of_each: Vec<u64>,
    /// Bytes per second that are read from a disk.
    pub disk: f64,
    /// Bytes per second that a rank sends to another.
    pub link: f64,
    /// Which of them are cabled to which, if a hostfile says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cables: Option<DeviceMatrix>,
    /// Which of `disk` and `link` nobody has said or measured.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub assumed: Vec<&'static str>,
}

/// A way in which a recipe can run. Figures are those of one rank; where ranks differ, of the one that takes most.
/// Those of each are in `ranks`.
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
    /// Bytes of gradients, and of what goes from layer to layer, that are sent in a step. If ranks make steps alone,
    /// those of averages, as a mean over all steps.
    pub sent: u64,
    /// Machines that hold the layers of one model together.
    pub stages: usize,
    /// How the layers of these lie, where they do not go round a ring: `contiguous` or `wave`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement: Option<&'static str>,
    /// How many layers each of these holds, where the recipe says it, or their numbers differ because their memory does.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<usize>,
    /// Seconds of the products of a step. `None` on a GPU, whose rate is not known before kernels are compiled.
    pub computing_seconds: Option<f64>,
    /// Seconds that a step waits for layers: what reading takes longer than computing.
    pub reading_seconds: Option<f64>,
    /// Seconds that a step waits for gradients or averages. What goes from layer to layer is in `computing_seconds`.
    pub sending_seconds: f64,
    /// Seconds of a step.
    pub seconds: Option<f64>,
    /// The part of a step in which it computes.
    pub busy: Option<f64>,
    /// The same if layers went round a ring, where they do not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub busy_in_ring: Option<f64>,
    /// What each rank takes.
    pub ranks: Vec<RankNeed>,
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
    /// What gradients or averages are on the way between ranks: `f32` or `bf16`.
    pub wire: &'static str,
    /// Steps from one exchange to the next. 1: each step is made together.
    pub sync_every: u64,
    /// Steps of the run.
    pub steps: u64,
    /// The ways, the fastest first.
    pub ways: Vec<Way>,
    /// The number of the first way that fits.
    pub best: Option<usize>,
    /// What to change: what would take less, if none fits, or what would send less, if the best way waits for the link.
    pub hints: Vec<String>,
    /// What is not here, and what was assumed in its place.
    pub notices: Vec<String>,
}

/// Examines a recipe and plans it. Nothing is written. `progress` is called with the number of rows read.
///
/// # Errors
/// What `run` would refuse the recipe for, other than its memory and a model whose weights are not here.
pub fn plan(recipe: &Recipe, machines: Machines, progress: &dyn Fn(u64)) -> Result<MachinesPlan, TrainError> {
    let mut recipe = recipe.clone();
    recipe.data.date = Some(date::choose(&recipe, &Resume::Newest));
    recipe.model.residency = ResidencyChoice::Memory;
    let model = model_directory(&recipe).or_else(|problem| directory_of_config(&recipe).ok_or(problem));
    // Without a limit, so that the estimate is no problem.
    let host = ThisHost::default();
    let mut found = examine(Examined::default(), &recipe, model, &host, Extent::Plan, None, progress);
    let mut notices = std::mem::take(&mut found.assumptions);
    let mut ready = found.ready()?;
    // The recipe's own ranks say nothing about those of other ways.
    ready.sizing.at_once = 1;
    ready.sizing.placement = ready.sizing.placement.clone().with_stage(None);
    let adaptation = ready.sizing.adaptation.as_ref();
    let Sizes { parameters, trained } = sizes(&ready.sizing.config, adaptation);
    let subject = Subject { recipe: &recipe, train: &ready.train, eval: ready.eval.as_ref(), sizing: &ready.sizing };
    let disk = DiskNeed::new(&recipe, trained, ready.steps, ready.eval.is_some(), ready.sizing.text_bytes, None);
    let mut planner = Planner {
        counted: subject.counted(),
        written: each_rank::written(&recipe, &machines.names, machines.hosts, disk.total, disk.of_copies()),
        base: Planner::whole_base(&subject, &ready.directory, parameters),
        subject,
        is_from_hub: recipe.model.hub_id().is_some() && !Path::new(&recipe.model.path).exists(),
        directory: ready.directory.clone(),
        machines: machines.clone(),
        parameters,
        rates: BTreeMap::new(),
    };
    let mut load = None;
    if ready.sizing.placement.is_cpu() {
        let before = Load::so_far();
        planner.rates = planner.measured(&ready.directory);
        load = before.and_then(said::other_load);
    }
    let mut ways = planner.ways();
    if let (true, Some(virtual_ranks)) = (ways.is_empty(), recipe.distributed.virtual_ranks) {
        return Err(TrainError::VirtualRanks { virtual_ranks, replicas: machines.hosts });
    }
    ways.sort_by(|a, b| a.computing_seconds.partial_cmp(&b.computing_seconds).unwrap_or(std::cmp::Ordering::Equal));
    ways.sort_by(|a, b| a.seconds.partial_cmp(&b.seconds).unwrap_or(std::cmp::Ordering::Equal));
    notices.extend(said::assumed_ring(&recipe, &machines, &ways));
    notices.extend(said::passed_over(&recipe, &machines, planner.not_spread()));
    notices.extend(load);
    let best = ways.iter().position(|way| way.fits != Some(false));
    let hints = match best {
        Some(best) => exchange::hints(&recipe, &machines, &ways[best]),
        None => planner.nothing_fits(&ways),
    };
    Ok(MachinesPlan {
        machines,
        parameters,
        trained_parameters: trained,
        layers: ready.sizing.layer_bytes(),
        disk: disk.total,
        wire: exchange::wire(&recipe),
        sync_every: exchange::sync_every(&recipe),
        steps: ready.steps,
        ways,
        best,
        hints,
        notices,
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

/// How the layers lie on machines.
struct Arranged {
    stage: Option<Stage>,
    arrangement: Arrangement,
    why: Why,
}

impl Arranged {
    /// How the layers lie if they do not go round a ring, and as they would go round one.
    fn other_than_ring(&self) -> Option<(&'static str, Stage)> {
        let in_ring = || {
            let counts = self.stage.as_ref()?.counts();
            Some(match self.why {
                Why::Alike => Stage::in_turn(counts.iter().sum(), counts.len(), 0),
                _ => Stage::dealt(&counts, 0),
            })
        };
        match self.arrangement {
            Arrangement::Ring => None,
            Arrangement::Contiguous => Some(("contiguous", in_ring()?)),
            Arrangement::Wave => Some(("wave", in_ring()?)),
        }
    }

    /// How many layers each has, where the recipe says it, or their numbers differ because their memory or their disks
    /// do.
    fn uneven(&self) -> Vec<usize> {
        let is_uneven = matches!(self.why, Why::Recipe | Why::Memory | Why::Disk);
        self.stage.iter().filter(|_| is_uneven).flat_map(Stage::counts).collect()
    }
}

struct Planner<'a> {
    subject: Subject<'a>,
    /// No way changes it.
    counted: Counted,
    machines: Machines,
    /// Bytes that each rank writes.
    written: Vec<u64>,
    /// Bytes of the base's files of weights.
    base: u64,
    is_from_hub: bool,
    directory: PathBuf,
    parameters: u64,
    /// Operations per second of the CPU, by the tokens of a micro-batch. None on a GPU.
    rates: BTreeMap<usize, Rates>,
}

impl Planner<'_> {
    fn ways(&self) -> Vec<Way> {
        let set = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
        let memory = "model.residency=memory";
        let whole = Form { stages: 1, again: true, from_disk: false };
        let layers = &self.subject.sizing.layers;
        let has_frozen = self.subject.recipe.train.method == Method::Lora && !layers.is_empty();
        let mut ways = Vec::new();
        if self.can_have(1) {
            let once = set(&[memory, "train.gradient_checkpointing=false"]);
            ways.push(self.way("in memory", once, Form { again: false, ..whole }));
            let again = set(&[memory, "train.gradient_checkpointing=true"]);
            ways.push(self.way("in memory, layers computed again", again, whole));
        }
        if has_frozen && self.can_have(1) {
            let form = Form { from_disk: true, ..whole };
            ways.push(self.way("layers from the disk", set(&["model.residency=disk"]), form));
        }
        let most = if has_frozen && self.not_spread().is_none() { self.machines.hosts.min(layers.len()) } else { 1 };
        for stages in (2..=most).filter(|stages| self.can_have(*stages)) {
            let spread = format!("parallel.stages={stages}");
            let form = Form { stages, ..whole };
            ways.push(self.way("layers over machines, in memory", set(&[&spread, memory]), form));
            let form = Form { from_disk: true, ..form };
            ways.push(self.way("layers over machines, from disks", set(&[&spread, "model.residency=disk"]), form));
        }
        ways
    }

    /// Why machines cannot hold the model together, if they cannot.
    fn not_spread(&self) -> Option<String> {
        let Sizing { config, adaptation, layers, .. } = self.subject.sizing;
        // These say how averages are taken, which ranks that hold a model together have none of.
        let Distributed { outer_learning_rate, outer_momentum, shares, .. } = self.subject.recipe.distributed;
        if outer_learning_rate.is_some() || outer_momentum.is_some() {
            return Some(
                "distributed.outer_learning_rate and outer_momentum are for ranks that train alone".to_owned(),
            );
        }
        if shares == SharesChoice::Measured {
            return Some("distributed.shares = \"measured\" shares rows out, and ranks would share layers".to_owned());
        }
        match adaptation {
            Some(adaptation) if !layers.is_empty() => not_in_stages(config, adaptation),
            _ => Some("train.method = \"full\" has no frozen layers".to_owned()),
        }
    }

    /// Whether so many of the machines can have a model.
    fn can_have(&self, stages: usize) -> bool {
        let hosts = self.machines.hosts;
        let shares = self.subject.recipe.distributed.virtual_ranks;
        hosts.is_multiple_of(stages) && shares.is_none_or(|shares| shares.is_multiple_of(hosts / stages))
    }

    fn way(&self, name: &'static str, settings: Vec<String>, form: Form) -> Way {
        let Form { stages, again, from_disk } = form;
        let Machines { hosts, disk, link, .. } = self.machines;
        let replicas = hosts / stages;
        let (recipe, mut settings) = self.recipe_of(form, settings);
        let sizing = Sizing { shares: exchange::shares(&recipe, replicas), ..self.subject.sizing.clone() };
        let subject = Subject { recipe: &recipe, sizing: &sizing, ..self.subject };
        let held = self.arranged(&subject, stages);
        let stage = held.stage.as_ref();
        settings.extend(self.instead_of_stages(stages, stage));
        // Those of one model.
        let micro_batches = micro_batches(&subject).div_ceil(replicas);
        let Needs { ranks, at_once, by_experts } =
            self.needs(&subject, stage, micro_batches, self.tokens_at_once(replicas));
        let name = match (by_experts, stages) {
            (false, _) => name,
            (true, 1) => "layers from the disk, experts one by one",
            (true, _) => "layers over machines, from disks, experts one by one",
        };
        let read = ranks.iter().map(|rank| rank.read).max().unwrap_or(0);
        let learned = exchange::sent(&recipe, exchange::most_trained(&ranks), replicas);
        let alone = self.rates(replicas).map(|rates| self.alone(rates, replicas, again));
        let (hops, of_hops) = self.hops(stage, replicas, &recipe);
        let order = if from_disk { Order::Layers } else { Order::MicroBatches };
        let together = Together { micro_batches, at_once, order, hop: of_hops / link };
        let computing = |stage: Option<&Stage>| {
            alone.map(|alone| stage.map_or_else(|| alone.total(), |stage| seconds_over(stage, alone, together)))
        };
        let sending = learned as f64 / link;
        // No layer is read while the losses are computed, but for the next one.
        let head = alone.map_or(0.0, |alone| alone.head);
        let reading = |computing: f64| (read as f64 / disk - (computing - head)).max(0.0);
        let whole = |computing: f64| computing + reading(computing) + sending;
        let busy = |seconds: f64| alone.map(|alone| alone.total() / stages as f64 / seconds);
        let (placement, ring) = held.other_than_ring().unzip();
        let busy_in_ring = ring.and_then(|ring| busy(whole(computing(Some(&ring))?)));
        let computing = computing(stage);
        let seconds = computing.map(whole);
        Way {
            name,
            settings,
            memory: ranks.iter().map(|rank| rank.memory).max().unwrap_or(0),
            fits: ranks.iter().try_fold(true, |all, rank| rank.fits.map(|fits| all && fits)),
            at_once,
            read,
            sent: learned + hops,
            stages,
            placement,
            layers: held.uneven(),
            computing_seconds: computing,
            reading_seconds: computing.map(reading),
            sending_seconds: sending,
            seconds,
            busy: seconds.and_then(busy),
            busy_in_ring,
            ranks,
        }
    }

    /// The recipe of a way, and its settings with what else makes it so.
    fn recipe_of(&self, form: Form, mut settings: Vec<String>) -> (Recipe, Vec<String>) {
        let mut recipe = self.subject.recipe.clone();
        recipe.train.gradient_checkpointing = form.again;
        recipe.model.residency = if form.from_disk { ResidencyChoice::Disk } else { ResidencyChoice::Memory };
        if form.stages > 1 && exchange::sync_every(&recipe) > 1 {
            // None of the ranks that hold a model together can make steps alone.
            recipe.distributed = Distributed { sync_every: Some(1), ..recipe.distributed };
            settings.push("distributed.sync_every=1".to_owned());
        }
        (recipe, settings)
    }

    /// What the recipe says of the ranks of a model that this way has otherwise.
    fn instead_of_stages(&self, stages: usize, stage: Option<&Stage>) -> Vec<String> {
        let Parallel { stages: asked, layers, .. } = &self.subject.recipe.parallel;
        let whole = (stages == 1 && *asked != StagesChoice::Count(1)).then(|| "parallel.stages=1".to_owned());
        let counts = || stage.map_or_else(|| vec![self.subject.sizing.config.layers.len()], Stage::counts);
        let is_other = !layers.is_empty() && layers.len() != stages;
        whole.into_iter().chain(is_other.then(|| format!("parallel.layers={:?}", counts()))).collect()
    }

    /// Which layers machines hold that have the layers of a model together, and why.
    fn arranged(&self, subject: &Subject<'_>, stages: usize) -> Arranged {
        let Machines { hosts, memory_of_each, cables, .. } = &self.machines;
        let layers = subject.sizing.config.layers.len();
        if stages == 1 {
            return Arranged { stage: None, arrangement: Arrangement::Ring, why: Why::Alike };
        }
        let is_chain = forms_chain(subject.recipe, cables.as_ref(), stages, None);
        let arrangements = arrangements(subject.recipe.parallel.placement, is_chain);
        let counts = &subject.recipe.parallel.layers;
        // Of another number of machines they say nothing.
        let counts = if counts.len() == stages { counts.as_slice() } else { &[] };
        if memory_of_each.is_empty() || !counts.is_empty() {
            let arrangement = arrangements.of(subject.recipe.model.residency == ResidencyChoice::Disk);
            let (stage, why) = given(counts, arrangement, layers, stages);
            return Arranged { stage: Some(stage), arrangement, why };
        }
        let replicas = hosts / stages;
        let rate = self.rates(replicas).map_or(0.0, |rates| rates.of_all(&self.operations(replicas, true)));
        let disk = Some(self.machines.disk);
        let offer = |memory: &u64| Offer::at_rate(rate, subject, disk, Some(*memory), *hosts);
        let offers: Vec<Offer> = memory_of_each.iter().map(offer).collect();
        let dealt = deal(layers, &of_each_stage(&offers, stages), arrangements);
        Arranged { stage: Some(dealt.stage), arrangement: dealt.arrangement, why: dealt.why }
    }

    /// Bytes that the machine which sends most sends from layer to layer in a step, and those of one micro-batch on one
    /// way.
    fn hops(&self, stage: Option<&Stage>, replicas: usize, recipe: &Recipe) -> (u64, f64) {
        let Some(stage) = stage else { return (0, 0.0) };
        let Sizing { config, placement, .. } = self.subject.sizing;
        let train = self.subject.train;
        let rows = recipe.train.global_batch_size.min(train.rows.len()).div_ceil(replicas);
        let tokens = train.counts.tokens as f64 / train.rows.len().max(1) as f64;
        let of_row = tokens * (config.hidden_size * placement.compute().bytes()) as f64;
        // Where a machine hands on to another one, it sends forward, and the other one back.
        let changes = || stage.of_layer.windows(2).filter(|two| two[0] != two[1]);
        let of_machine = |machine: usize| changes().filter(|two| two.contains(&machine)).count();
        let hops = (0..stage.count()).map(of_machine).max().unwrap_or(0);
        let all = (rows as f64 * of_row * hops as f64) as u64;
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

    /// Operations of the layers in a model's part of a step.
    fn operations(&self, replicas: usize, again: bool) -> Operations {
        self.of_step(replicas, again).layers
    }
}
