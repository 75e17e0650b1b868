//! How many layers each of the ranks gets that hold a model together: as many on each as on any other, unless
//! they differ in memory or speed, or the recipe says it. No number of a run depends on it.

use finetune_model::{Arrangement, FloatType, Placement, Stage, product_rate};
use finetune_recipe::{Method, ResidencyChoice};

use crate::dealing::{Blocks, Why, levelled};
use crate::error::TrainError;
use crate::memory::{Counted, Sizes, Sizing, Subject, sizes};
use crate::product_time::{Multiplied, operations, tokens_at_once};
use crate::ranks::Ranks;
use crate::residency::{micro_batches, most_at_once, on_the_disk, read_in_step, way_on_disk};

#[cfg(test)]
mod tests;

/// Ways in which a rank can have room for its layers, the fastest first: in memory with micro-batches that keep
/// all ranks busy, in memory with one at a time, from the disk. Where the recipe leaves fewer, the last one is
/// there again.
const WAYS: usize = 3;

/// The most layers that a rank has room for: [whether the first one is among them][whether the last one is].
pub(crate) type Room = [[usize; 2]; 2];

/// What a rank has to offer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Offer {
    /// Operations per second of its products. 0: not known.
    pub(crate) rate: f64,
    /// Whether the CPU computes, which ranks of one host share.
    pub(crate) on_cpu: bool,
    /// Whether it has room for the whole model.
    pub(crate) whole: bool,
    /// For each of the [`WAYS`], operations per second that its disk keeps up with: those of a layer, by the time in
    /// which it is read. Infinite: nothing is read, or it is not known.
    pub(crate) reads: [f64; WAYS],
    /// For each of the [`WAYS`].
    pub(crate) room: [Room; WAYS],
    /// For each of the [`WAYS`], whether layers stay on the disk.
    pub(crate) from_disk: [bool; WAYS],
}

/// How the layers of ranks lie that hold a model together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrangements {
    pub(crate) in_memory: Arrangement,
    /// Where a rank reads its layers from the disk.
    pub(crate) from_disk: Arrangement,
}

impl Arrangements {
    /// The same wherever the layers are.
    pub(crate) fn always(arrangement: Arrangement) -> Arrangements {
        Arrangements { in_memory: arrangement, from_disk: arrangement }
    }

    pub(crate) fn of(self, from_disk: bool) -> Arrangement {
        if from_disk { self.from_disk } else { self.in_memory }
    }
}

/// The rank of each layer of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dealt {
    pub(crate) stage: Stage,
    pub(crate) arrangement: Arrangement,
    pub(crate) why: Why,
    /// Whether all have room in memory.
    pub(crate) in_memory: bool,
}

impl Offer {
    const NUMBERS: usize = 3 + WAYS + WAYS * 4 + WAYS;

    /// What this rank offers. `disk`: bytes per second that it reads, if that is known; `available`: bytes of memory
    /// that it may take, if that can be told; `world`: all ranks.
    pub(crate) fn new(subject: &Subject<'_>, disk: Option<f64>, available: Option<u64>, world: usize) -> Offer {
        Offer::at_rate(measured(&subject.sizing.placement), subject, disk, available, world)
    }

    /// The same of a rank whose speed is known.
    pub(crate) fn at_rate(
        rate: f64,
        subject: &Subject<'_>,
        disk: Option<f64>,
        available: Option<u64>,
        world: usize,
    ) -> Offer {
        let Sizing { placement, layers, .. } = subject.sizing;
        let looked = Looked { subject, counted: subject.counted(), available };
        let enough = micro_batches(subject).min(world);
        let can_read = subject.recipe.train.method == Method::Lora && !layers.is_empty();
        let ways = match subject.recipe.model.residency {
            ResidencyChoice::Disk if can_read => [(true, enough), (true, 1), (true, 1)],
            ResidencyChoice::Auto if can_read => [(false, enough), (false, 1), (true, 1)],
            _ => [(false, enough), (false, 1), (false, 1)],
        };
        let kept_up = disk.filter(|_| can_read).map_or(f64::INFINITY, |disk| disk * looked.operations_of_byte(world));
        Offer {
            rate,
            on_cpu: placement.is_cpu(),
            whole: looked.fits(None, false, 1),
            reads: ways.map(|(from_disk, _)| if from_disk { kept_up } else { f64::INFINITY }),
            room: ways.map(|(from_disk, at_once)| looked.room(from_disk, at_once)),
            from_disk: ways.map(|(from_disk, _)| from_disk),
        }
    }

    fn to_numbers(self) -> [f64; Offer::NUMBERS] {
        let mut numbers = [0.0; Offer::NUMBERS];
        let room = self.room.iter().flatten().flatten().map(|layers| *layers as f64);
        let truth = |is: bool| f64::from(u8::from(is));
        let known = [self.rate, truth(self.on_cpu), truth(self.whole)];
        let all = known.into_iter().chain(self.reads).chain(room).chain(self.from_disk.map(truth));
        numbers.iter_mut().zip(all).for_each(|(place, number)| *place = number);
        numbers
    }

    fn from_numbers(numbers: &[f64]) -> Offer {
        let (mut reads, mut room) = ([f64::INFINITY; WAYS], [Room::default(); WAYS]);
        reads.iter_mut().zip(&numbers[3..]).for_each(|(place, kept_up)| *place = *kept_up);
        let places = room.iter_mut().flatten().flatten();
        places.zip(&numbers[3 + WAYS..]).for_each(|(place, layers)| *place = *layers as usize);
        let from_disk = std::array::from_fn(|way| numbers[3 + WAYS + WAYS * 4 + way] > 0.0);
        Offer { rate: numbers[0], on_cpu: numbers[1] > 0.0, whole: numbers[2] > 0.0, reads, room, from_disk }
    }

    /// Operations per second in one of the [`WAYS`] with so many layers: a layer takes as long as it is computed, or
    /// read if that takes longer. A rank with room in memory for them reads none. 0: not known.
    fn speed(&self, way: usize, layers: usize) -> f64 {
        let in_memory = WAYS - 2;
        let has_room = self.reads[in_memory].is_infinite() && self.room[in_memory][0][0] >= layers;
        match self.rate > 0.0 {
            true if has_room => self.rate,
            true => self.rate.min(self.reads[way]),
            false => 0.0,
        }
    }

    /// What all ranks offer. All call it together.
    pub(crate) fn gathered(self, ranks: &Ranks) -> Result<Vec<Offer>, TrainError> {
        let numbers = ranks.gather(&self.to_numbers())?;
        let mut offers: Vec<Offer> = numbers.chunks(Offer::NUMBERS).map(Offer::from_numbers).collect();
        let hosts: Vec<&str> = ranks.group().who().iter().map(|who| who.host.as_str()).collect();
        share_hosts(&mut offers, &hosts);
        Ok(offers)
    }
}

impl Dealt {
    /// What rank 0 has dealt, for all: rounding may differ between processors. All ranks call it together, with
    /// as many layers.
    pub(crate) fn told_by_first(self, ranks: &Ranks) -> Result<Dealt, TrainError> {
        let arrangements = [Arrangement::Ring, Arrangement::Contiguous, Arrangement::Wave];
        let arrangement = arrangements.iter().position(|arrangement| *arrangement == self.arrangement).unwrap_or(0);
        let of_layer = self.stage.of_layer.iter().map(|rank| *rank as i32);
        let mut told: Vec<i32> = of_layer.chain([arrangement as i32, self.why.number()]).collect();
        ranks.group().broadcast(&mut told, 0)?;
        let why = told.pop().map_or(self.why, Why::of_number);
        let arrangement = told.pop().and_then(|number| arrangements.get(number as usize).copied());
        let arrangement = arrangement.unwrap_or(self.arrangement);
        let of_layer = told.iter().map(|rank| *rank as usize).collect();
        Ok(Dealt { stage: Stage { of_layer, ..self.stage }, arrangement, why, ..self })
    }
}

/// Operations per second; 0 if they cannot be measured.
fn measured(placement: &Placement) -> f64 {
    let compute = if placement.is_cpu() { FloatType::F32 } else { placement.compute() };
    product_rate(placement.device(), compute).unwrap_or(0.0)
}

/// Ranks of one host that compute on its CPU are equally fast: they were measured while the others computed, or not.
/// So are their disks, which count as the slowest of them was measured.
fn share_hosts(offers: &mut [Offer], hosts: &[&str]) {
    let before = offers.to_vec();
    for (offer, host) in offers.iter_mut().zip(hosts) {
        for (other, _) in before.iter().zip(hosts).filter(|(_, of)| *of == host) {
            offer.reads.iter_mut().zip(other.reads).for_each(|(reads, other)| *reads = reads.min(other));
        }
    }
    for (offer, host) in offers.iter_mut().zip(hosts).filter(|(offer, _)| offer.on_cpu) {
        let there =
            || before.iter().zip(hosts).filter(|(other, of)| other.on_cpu && *of == host).map(|(other, _)| other);
        offer.rate = there().map(|other| other.rate).sum::<f64>() / there().count() as f64;
    }
}

/// A run whose memory is looked at with other layers.
struct Looked<'a> {
    subject: &'a Subject<'a>,
    counted: Counted,
    available: Option<u64>,
}

impl Looked<'_> {
    fn fits(&self, stage: Option<Stage>, from_disk: bool, at_once: usize) -> bool {
        let sizing = self.subject.sizing;
        let placements = if from_disk { on_the_disk(sizing) } else { vec![sizing.placement.clone()] };
        let fits = |placement: Placement| {
            let total = || self.total(placement.with_stage(stage.clone()), at_once);
            self.available.is_none_or(|available| total() <= available)
        };
        placements.into_iter().any(fits)
    }

    /// Bytes of memory with this placement.
    fn total(&self, placement: Placement, at_once: usize) -> u64 {
        let sizing = Sizing { placement, at_once, ..self.subject.sizing.clone() };
        Subject { sizing: &sizing, ..*self.subject }.estimate_counted(&self.counted).total
    }

    /// Operations of the layers in a step for each byte that is read of all layers in it, with as many micro-batches
    /// together as have room if the rank has as many layers as any other.
    fn operations_of_byte(&self, world: usize) -> f64 {
        let Subject { recipe, train, sizing, .. } = self.subject;
        let Sizing { config, adaptation, layers, .. } = sizing;
        let Sizes { parameters, .. } = sizes(config, adaptation.as_ref());
        let rows = recipe.train.global_batch_size.min(train.rows.len());
        let multiplied = Multiplied::of(config, parameters);
        // No layer is read while the losses are computed, but for the next one.
        let of_step = operations(recipe.train.method, train, rows, multiplied, true).layers.total();
        let (all, mine) = (micro_batches(self.subject), layers.len().div_ceil(world.max(1)));
        let stage = Some(self.holding(mine, false, false));
        let at_once = most_at_once(all, |at_once| self.fits(stage.clone(), true, at_once));
        let placement =
            way_on_disk(sizing, self.available, |placement| self.total(placement.clone().with_stage(stage.clone()), 1));
        let read = read_in_step(
            &Sizing { placement, at_once, ..Sizing::clone(sizing) },
            all,
            tokens_at_once(recipe, train, rows),
        );
        of_step / read.max(1) as f64
    }

    fn room(&self, from_disk: bool, at_once: usize) -> Room {
        let layers = self.subject.sizing.config.layers.len();
        let mut room = Room::default();
        for (has_first, has_last) in [(false, false), (false, true), (true, false), (true, true)] {
            let fits = |count: usize| self.fits(Some(self.holding(count, has_first, has_last)), from_disk, at_once);
            let least = usize::from(has_first) + usize::from(has_last && layers > 1);
            let most = layers.saturating_sub(usize::from(!has_first) + usize::from(!has_last));
            room[usize::from(has_first)][usize::from(has_last)] = if most < least.max(1) || fits(most) {
                layers
            } else if fits(least.max(1)) {
                most_at_once(most - 1, fits)
            } else {
                0
            };
        }
        room
    }

    /// A rank with the largest layers, so many, and with or without the first and the last one.
    fn holding(&self, count: usize, has_first: bool, has_last: bool) -> Stage {
        let Sizing { config, layers, placement, stored, .. } = self.subject.sizing;
        let (number, held) = (config.layers.len(), placement.held(*stored));
        let ends = [(0, has_first), (number - 1, has_last)];
        let rank = |n: usize| match ends.iter().filter(|(end, _)| *end == n).map(|(_, has)| *has).max() {
            Some(true) => 0,
            None => 1,
            Some(false) => 2,
        };
        let bytes = |n: usize| layers.get(n).map_or(0, |layer| layer.bytes(held));
        let mut order: Vec<usize> = (0..number).collect();
        order.sort_by_key(|&n| (rank(n), std::cmp::Reverse(bytes(n)), n));
        let mut of_layer = vec![1; number];
        order.iter().take(count).for_each(|&n| of_layer[n] = 0);
        Stage { of_layer: of_layer.into(), mine: 0 }
    }
}

/// Which ranks of several models do the same in each. `offers`: of all ranks.
pub(crate) fn of_each_stage(offers: &[Offer], stages: usize) -> Vec<Offer> {
    let of_stage = |stage: usize| {
        let mut all = offers.iter().skip(stage).step_by(stages).copied();
        let first = all.next()?;
        Some(all.fold(first, |a, b| {
            let mut room = a.room;
            let places = room.iter_mut().flatten().flatten();
            places.zip(b.room.iter().flatten().flatten()).for_each(|(a, b)| *a = (*a).min(*b));
            let reads = std::array::from_fn(|way| a.reads[way].min(b.reads[way]));
            let from_disk = std::array::from_fn(|way| a.from_disk[way] || b.from_disk[way]);
            let (rate, on_cpu, whole) = (a.rate.min(b.rate), a.on_cpu && b.on_cpu, a.whole && b.whole);
            Offer { rate, on_cpu, whole, reads, room, from_disk }
        }))
    };
    (0..stages).filter_map(of_stage).collect()
}

/// As many layers on each rank as on any other.
pub(crate) fn alike(arrangement: Arrangement, layers: usize, ranks: usize) -> Stage {
    Stage::arranged(arrangement, &unbounded(arrangement, layers, &vec![1.0; ranks]), 0)
}

/// As many layers for each rank as its speed is, whatever its memory.
fn unbounded(arrangement: Arrangement, layers: usize, speeds: &[f64]) -> Vec<usize> {
    let shares = || shares(layers, speeds, &vec![layers; speeds.len()]);
    let counts = match arrangement {
        Arrangement::Contiguous => blocks(layers, speeds).by_speed(),
        Arrangement::Ring => shares(),
        Arrangement::Wave => shares().map(|counts| with_the_last_way(counts, speeds)),
    };
    counts.unwrap_or_default()
}

/// The same numbers of layers where equally fast ranks that have one more are the first on the last way of a wave.
fn with_the_last_way(mut counts: Vec<usize>, speeds: &[f64]) -> Vec<usize> {
    let are_alike = speeds.windows(2).all(|two| two[0] == two[1]);
    // Every other way begins at the last rank.
    if are_alike && counts.last().is_some_and(|fewest| !fewest.is_multiple_of(2)) {
        counts.reverse();
    }
    counts
}

/// Layers count as equally large.
fn blocks(layers: usize, speeds: &[f64]) -> Blocks<'_> {
    Blocks { layers, speeds, size: &|_, range| range.len() as f64 }
}

/// Deals the layers of a model out to ranks with these offers: as their speeds are, as far as there is room. Where
/// layers are read, a disk that does not keep up bounds a rank's speed.
pub(crate) fn deal(layers: usize, offers: &[Offer], arrangements: Arrangements) -> Dealt {
    let rates: Vec<f64> = offers.iter().map(|offer| offer.rate).collect();
    let mut arrangement = arrangements.in_memory;
    for way in 0..WAYS {
        arrangement = arrangements.of(offers.iter().any(|offer| offer.from_disk[way]));
        let by = |speeds: &[f64]| unbounded(arrangement, layers, speeds);
        let by_rate = by(&levelled(&rates));
        let speed = |(offer, layers): (&Offer, &usize)| offer.speed(way, *layers);
        let speeds = levelled(&offers.iter().zip(&by_rate).map(speed).collect::<Vec<_>>());
        let Some(stage) = with_room(layers, &speeds, offers, way, arrangement) else { continue };
        let why = match stage.counts() {
            counts if counts == by(&vec![1.0; offers.len()]) => Why::Alike,
            counts if counts == by_rate => Why::Speed,
            counts if counts == by(&speeds) => Why::Disk,
            _ => Why::Memory,
        };
        return Dealt { stage, arrangement, why, in_memory: way + 1 < WAYS };
    }
    // None has room. Whoever looks at the memory next says so.
    Dealt { stage: alike(arrangement, layers, offers.len()), arrangement, why: Why::Alike, in_memory: false }
}

/// The rank of each layer, if all have room in one of the [`WAYS`].
fn with_room(layers: usize, speeds: &[f64], offers: &[Offer], way: usize, arrangement: Arrangement) -> Option<Stage> {
    if arrangement != Arrangement::Contiguous {
        return in_turn_with_room(layers, speeds, offers, way, arrangement);
    }
    let fits = |rank: usize, range: std::ops::Range<usize>| {
        let ends = [range.start == 0, range.end == layers].map(usize::from);
        range.len() <= offers[rank].room[way][ends[0]][ends[1]]
    };
    let counts = blocks(layers, speeds).with_room(&fits)?;
    Some(Stage::in_order(&counts, 0))
}

/// The same for layers in turn. The last layer is where turns come to by themselves, or in a ring on the first rank
/// that has room for what goes with it.
fn in_turn_with_room(
    layers: usize,
    speeds: &[f64],
    offers: &[Offer],
    way: usize,
    arrangement: Arrangement,
) -> Option<Stage> {
    let unbounded = Some(unbounded(arrangement, layers, speeds)).filter(|counts| counts.len() == offers.len())?;
    let others = if arrangement == Arrangement::Ring { 0..offers.len() } else { 0..0 };
    std::iter::once(None).chain(others.map(Some)).find_map(|last| {
        let placed = |counts: &[usize]| match last {
            Some(last) => Stage::ending_on(last, counts, 0),
            None => Stage::arranged(arrangement, counts, 0),
        };
        let mut counts = unbounded.clone();
        // Who has the first layer, and by itself the last one, follows from the numbers of layers, and these from
        // the room beside what goes with those two.
        for _ in 0..=offers.len() {
            let stage = placed(&counts);
            let (first, last) = (stage.of_layer.first().copied(), stage.last());
            let room_of =
                |rank: usize| offers[rank].room[way][usize::from(first == Some(rank))][usize::from(last == rank)];
            let room: Vec<usize> = (0..offers.len()).map(room_of).collect();
            if counts.iter().zip(&room).all(|(count, room)| count <= room) {
                return Some(stage);
            }
            counts = shares(layers, speeds, &room)?;
        }
        None
    })
}

/// So many layers for each rank that the slowest takes as short as it can, at least 1 and at most `room` each.
/// `None` if there is no room. Layers count as equally large.
fn shares(layers: usize, speeds: &[f64], room: &[usize]) -> Option<Vec<usize>> {
    let mut counts = vec![1; speeds.len()];
    if room.contains(&0) || layers < counts.len() {
        return None;
    }
    for _ in counts.len()..layers {
        let seconds = |rank: usize| (counts[rank] + 1) as f64 / speeds[rank];
        let free = (0..counts.len()).filter(|&rank| counts[rank] < room[rank]);
        let next = free.min_by(|&a, &b| seconds(a).total_cmp(&seconds(b)))?;
        counts[next] += 1;
    }
    Some(counts)
}
