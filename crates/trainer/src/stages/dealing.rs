//! How many layers each of the ranks gets that hold a model together: as many on each as on any other, unless
//! they differ in memory or speed, or the recipe says it. No number of a run depends on it.

use finetune_model::{FloatType, Placement, Stage, product_rate};
use finetune_recipe::{Method, ResidencyChoice};

use crate::error::TrainError;
use crate::memory::{Counted, Sizes, Sizing, Subject, sizes};
use crate::product_time::operations;
use crate::ranks::Ranks;
use crate::residency::{micro_batches, most_at_once};

/// Ranks whose speeds differ by less than this count as equally fast: what is measured varies.
const EQUALLY_FAST: f64 = 1.25;

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
}

/// Why ranks have so many layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// As many on each as on any other.
    Alike,
    /// As the recipe says.
    Recipe,
    /// A faster rank has more.
    Speed,
    /// A rank with a faster disk has more.
    Disk,
    /// A rank with more memory has more.
    Memory,
}

/// The rank of each layer of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dealt {
    pub(crate) stage: Stage,
    pub(crate) why: Why,
    /// Whether all have room in memory.
    pub(crate) in_memory: bool,
}

impl Offer {
    const NUMBERS: usize = 3 + WAYS + WAYS * 4;

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
        }
    }

    fn to_numbers(self) -> [f64; Offer::NUMBERS] {
        let mut numbers = [0.0; Offer::NUMBERS];
        let room = self.room.iter().flatten().flatten().map(|layers| *layers as f64);
        let known = [self.rate, f64::from(u8::from(self.on_cpu)), f64::from(u8::from(self.whole))];
        let all = known.into_iter().chain(self.reads).chain(room);
        numbers.iter_mut().zip(all).for_each(|(place, number)| *place = number);
        numbers
    }

    fn from_numbers(numbers: &[f64]) -> Offer {
        let (mut reads, mut room) = ([f64::INFINITY; WAYS], [Room::default(); WAYS]);
        reads.iter_mut().zip(&numbers[3..]).for_each(|(place, kept_up)| *place = *kept_up);
        let places = room.iter_mut().flatten().flatten();
        places.zip(&numbers[3 + WAYS..]).for_each(|(place, layers)| *place = *layers as usize);
        Offer { rate: numbers[0], on_cpu: numbers[1] > 0.0, whole: numbers[2] > 0.0, reads, room }
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
        let whys = [Why::Alike, Why::Recipe, Why::Speed, Why::Disk, Why::Memory];
        let why = whys.iter().position(|why| *why == self.why).unwrap_or(0);
        let mut told: Vec<i32> = self.stage.of_layer.iter().chain([&why]).map(|number| *number as i32).collect();
        ranks.group().broadcast(&mut told, 0)?;
        let why = told.pop().and_then(|why| whys.get(why as usize).copied()).unwrap_or(self.why);
        let of_layer = told.iter().map(|rank| *rank as usize).collect();
        Ok(Dealt { stage: Stage { of_layer, ..self.stage }, why, ..self })
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
        let placement = sizing.placement.clone().with_stage(stage).with_layers_from_disk(from_disk);
        let sizing = Sizing { placement, at_once, ..sizing.clone() };
        let subject = Subject { sizing: &sizing, ..*self.subject };
        self.available.is_none_or(|available| subject.estimate_counted(&self.counted).total <= available)
    }

    /// Operations of a step for each byte of layers that it reads: each layer twice for each group of the
    /// micro-batches that have room together, if the rank has as many layers as any other.
    fn operations_of_byte(&self, world: usize) -> f64 {
        let Subject { recipe, train, sizing, .. } = self.subject;
        let Sizing { config, adaptation, placement, stored, layers, .. } = sizing;
        let held = placement.held(*stored);
        let bytes: u64 = layers.iter().map(|layer| layer.bytes(held)).sum();
        let Sizes { parameters, .. } = sizes(config, adaptation.as_ref());
        let rows = recipe.train.global_batch_size.min(train.rows.len());
        let active = parameters.saturating_sub(config.idle_parameters());
        let of_step = operations(recipe.train.method, train, rows, active, true).total();
        let (all, mine) = (micro_batches(self.subject), layers.len().div_ceil(world.max(1)));
        let fits = |at_once: usize| self.fits(Some(self.holding(mine, false, false)), true, at_once);
        let groups = all.div_ceil(most_at_once(all, fits));
        of_step / (2 * groups as u64 * bytes.max(1)) as f64
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
            Offer { rate: a.rate.min(b.rate), on_cpu: a.on_cpu && b.on_cpu, whole: a.whole && b.whole, reads, room }
        }))
    };
    (0..stages).filter_map(of_stage).collect()
}

/// Deals the layers of a model out to ranks with these offers: as their speeds are, as far as there is room. Where
/// layers are read, a disk that does not keep up bounds a rank's speed.
pub(crate) fn deal(layers: usize, offers: &[Offer]) -> Dealt {
    let unbounded = vec![layers; offers.len()];
    let by = |speeds: &[f64]| shares(layers, speeds, &unbounded).unwrap_or_default();
    let rates: Vec<f64> = offers.iter().map(|offer| offer.rate).collect();
    let (alike, by_rate) = (by(&vec![1.0; offers.len()]), by(&levelled(&rates)));
    for way in 0..WAYS {
        let speed = |(offer, layers): (&Offer, &usize)| offer.speed(way, *layers);
        let speeds = levelled(&offers.iter().zip(&by_rate).map(speed).collect::<Vec<_>>());
        let Some(stage) = with_room(layers, &speeds, offers, way) else { continue };
        let why = match stage.counts() {
            counts if counts == alike => Why::Alike,
            counts if counts == by_rate => Why::Speed,
            counts if counts == by(&speeds) => Why::Disk,
            _ => Why::Memory,
        };
        return Dealt { stage, why, in_memory: way + 1 < WAYS };
    }
    // None has room. Whoever looks at the memory next says so.
    Dealt { stage: Stage::dealt(&alike, 0), why: Why::Alike, in_memory: false }
}

/// The rank of each layer, if all have room in one of the [`WAYS`]. The last layer is where turns come to by
/// themselves, or on the first rank that has room for what goes with it.
fn with_room(layers: usize, speeds: &[f64], offers: &[Offer], way: usize) -> Option<Stage> {
    let unbounded = shares(layers, speeds, &vec![layers; offers.len()])?;
    std::iter::once(None).chain((0..offers.len()).map(Some)).find_map(|last| {
        let placed = |counts: &[usize]| match last {
            Some(last) => Stage::ending_on(last, counts, 0),
            None => Stage::dealt(counts, 0),
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

/// Speeds of which those that are nearly equal are equal. If one is not known, all are equal.
pub(crate) fn levelled(rates: &[f64]) -> Vec<f64> {
    if !rates.iter().all(|rate| *rate > 0.0 && rate.is_finite()) {
        return vec![1.0; rates.len()];
    }
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut levels: Vec<f64> = Vec::new();
    for rate in sorted {
        if levels.last().is_none_or(|level| rate >= level * EQUALLY_FAST) {
            levels.push(rate);
        }
    }
    let level = |rate: &f64| levels.iter().rev().find(|level| *level <= rate).copied().unwrap_or(*rate);
    rates.iter().map(level).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(rate: f64, room: usize) -> Offer {
        Offer { rate, on_cpu: true, whole: false, reads: [f64::INFINITY; WAYS], room: [[[room; 2]; 2]; WAYS] }
    }

    fn counts(layers: usize, offers: &[(f64, usize)]) -> (Vec<usize>, Why) {
        let offers: Vec<Offer> = offers.iter().map(|&(rate, room)| offer(rate, room)).collect();
        let dealt = deal(layers, &offers);
        (dealt.stage.counts(), dealt.why)
    }

    /// (layers, (rate, room) of each rank, layers of each rank, why)
    #[test]
    fn layers_follow_speed_and_memory() {
        #[expect(clippy::type_complexity, reason = "a table of cases")]
        let cases: [(usize, &[(f64, usize)], &[usize], Why); 12] = [
            (5, &[(1.0, 99), (1.0, 99)], &[3, 2], Why::Alike),
            // Less than a quarter is noise, in either order.
            (30, &[(1.0, 99), (1.24, 99), (1.1, 99)], &[10, 10, 10], Why::Alike),
            (30, &[(2.0, 99), (1.0, 99)], &[20, 10], Why::Speed),
            (30, &[(1.0, 99), (2.0, 99), (2.4, 99)], &[6, 12, 12], Why::Speed),
            // One whose speed is not known: all count as equal.
            (30, &[(0.0, 99), (2.0, 99)], &[15, 15], Why::Alike),
            (30, &[(f64::NAN, 99), (2.0, 99)], &[15, 15], Why::Alike),
            (30, &[(1.0, 8), (1.0, 99), (1.0, 99)], &[8, 11, 11], Why::Memory),
            (30, &[(1.0, 99), (3.0, 10)], &[20, 10], Why::Memory),
            (30, &[(1.0, 20), (3.0, 10)], &[20, 10], Why::Memory),
            // A rank that is far slower has a layer all the same.
            (4, &[(100.0, 99), (1.0, 99)], &[3, 1], Why::Speed),
            // None has room: the memory is refused where it is looked at.
            (30, &[(1.0, 8), (1.0, 8)], &[15, 15], Why::Alike),
            (30, &[(1.0, 0), (1.0, 99)], &[15, 15], Why::Alike),
        ];
        for (layers, offers, want, why) in cases {
            assert_eq!(counts(layers, offers), (want.to_vec(), why), "{layers} {offers:?}");
        }
    }

    /// (rate, what the disk keeps up with, layers that have room in memory) of each rank, of 30 layers those of each,
    /// and why
    #[test]
    fn a_disk_that_does_not_keep_up_bounds_a_rank() {
        #[expect(clippy::type_complexity, reason = "a table of cases")]
        let cases: [(&[(f64, f64, usize)], &[usize], Why); 8] = [
            // In memory nothing is read.
            (&[(1.0, 9.0, 99), (1.0, 0.1, 99)], &[15, 15], Why::Alike),
            (&[(2.0, 4.0, 0), (2.0, 1.0, 0)], &[20, 10], Why::Disk),
            (&[(2.0, 9.0, 0), (1.0, 9.0, 0)], &[20, 10], Why::Speed),
            // A fast processor waits for its disk.
            (&[(1.0, 8.0, 0), (4.0, 1.0, 0)], &[15, 15], Why::Alike),
            (&[(4.0, 1.0, 0), (2.0, 9.0, 0)], &[10, 20], Why::Disk),
            // Not known: as if disks kept up.
            (&[(1.0, f64::INFINITY, 0), (2.0, f64::INFINITY, 0)], &[10, 20], Why::Speed),
            // Without a known speed of the products a disk's says nothing.
            (&[(0.0, 2.0, 0), (1.0, 1.0, 0)], &[15, 15], Why::Alike),
            // The other rank holds its layers in memory, and its disk does not matter.
            (&[(1.0, 0.5, 0), (1.0, 0.25, 99)], &[10, 20], Why::Disk),
        ];
        for (ranks, want, why) in cases {
            let offer = |&(rate, kept_up, room): &(f64, f64, usize)| Offer {
                reads: [f64::INFINITY, f64::INFINITY, kept_up],
                room: [[[room; 2]; 2], [[room; 2]; 2], [[99; 2]; 2]],
                ..offer(rate, 0)
            };
            let dealt = deal(30, &ranks.iter().map(offer).collect::<Vec<_>>());
            assert_eq!((dealt.stage.counts(), dealt.why), (want.to_vec(), why), "{ranks:?}");
        }
    }

    /// Equal ranks have what they had before ranks could differ.
    #[test]
    fn equal_ranks_go_round() {
        for ranks in 1..=8 {
            for layers in ranks..80 {
                let dealt = deal(layers, &vec![offer(1.0, layers); ranks]);
                assert_eq!(dealt.stage, Stage::in_turn(layers, ranks, 0), "{layers} on {ranks}");
                assert!(dealt.in_memory && dealt.why == Why::Alike);
            }
        }
    }

    /// The first way in which all have room counts, with what goes with the first and the last layer.
    #[test]
    fn the_ends_take_room() {
        for (ranks, layers) in [(2, 9), (3, 15), (3, 24), (5, 40)] {
            let mut offers = vec![offer(1.0, 10); ranks];
            // Whoever has the last layer has room for four beside the logits.
            for offer in &mut offers {
                offer.room.iter_mut().flatten().for_each(|room| room[1] = 4);
            }
            let dealt = deal(layers, &offers);
            let counts = dealt.stage.counts();
            let has_room = |rank: usize| counts[rank] <= if dealt.stage.last() == rank { 4 } else { 10 };
            assert!(dealt.in_memory && (0..ranks).all(has_room), "{ranks} {layers}: {counts:?}");
            assert_eq!(counts.iter().sum::<usize>(), layers);
        }
        // Not in memory, but from the disk of one of them.
        let mut offers = [offer(1.0, 3), offer(1.0, 3)];
        offers[1].room[2] = [[9; 2]; 2];
        let dealt = deal(9, &offers);
        assert_eq!((dealt.stage.counts(), dealt.in_memory), (vec![3, 6], false));
    }

    #[test]
    fn ranks_of_a_host_share_its_processor() {
        let mut offers = [offer(1.0, 9), offer(3.0, 9), offer(8.0, 9)];
        share_hosts(&mut offers, &["a", "a", "b"]);
        assert_eq!(offers.map(|offer| offer.rate), [2.0, 2.0, 8.0]);
        offers[0].on_cpu = false;
        share_hosts(&mut offers, &["a", "a", "a"]);
        assert_eq!(offers.map(|offer| offer.rate), [2.0, 5.0, 5.0]);
        offers[0].reads[2] = 4.0;
        share_hosts(&mut offers, &["a", "b", "a"]);
        assert_eq!(offers.map(|offer| offer.reads[2]), [4.0, f64::INFINITY, 4.0]);
    }

    /// Of several models, the weakest rank of each stage counts.
    #[test]
    fn replicas_do_the_same() {
        let offers = [offer(2.0, 9), offer(1.0, 7), offer(1.0, 5), offer(1.5, 8)];
        assert_eq!(of_each_stage(&offers, 2), [offer(1.0, 5), offer(1.0, 7)]);
        assert_eq!(of_each_stage(&offers, 4), offers);
        assert_eq!(Offer::from_numbers(&offers[0].to_numbers()), offers[0]);
    }
}
