//! The ranks that hold the layers of one model together, and what connects them.
//!
//! Ranks that follow each other hold one model: with 2 stages, ranks 0 and 1, then ranks 2 and 3, and so on. Each
//! such model is a replica, which computes shares of a step as one rank without stages does.

mod dealing;
mod files;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::time::Duration;

use finetune_allreduce::{Backend, DeviceMatrix, Receiver, Sender};
use finetune_model::{Arrangement, Hops, Model, ModelConfig, Stage};
use finetune_recipe::{BackendChoice, PlacementChoice, Recipe, ResidencyChoice, StagesChoice};
use finetune_store::failpoint;

use crate::dealing::{Why, listed};
use crate::error::TrainError;
use crate::evaluate::FROM_DISK;
use crate::memory::{Sizing, Subject};
use crate::ranks::Ranks;
use crate::residency;

use self::dealing::Dealt;
pub(crate) use self::dealing::{Arrangements, Offer, alike, deal, of_each_stage};
pub(crate) use self::files::{disk_rate, fetch_missing};

/// The layers of this rank, and how the ranks have come by theirs.
#[derive(Clone, Debug)]
pub(crate) struct Chosen {
    pub(crate) stage: Stage,
    arrangement: Arrangement,
    why: Why,
    /// Whether the cables have decided how the layers lie.
    by_cables: bool,
}

/// The layers of this rank, if the recipe spreads a model over several. `available`: bytes of memory that this rank may
/// take, if that can be told; `disk`: measures bytes per second of its disk; `cables`: which ranks are cabled, if that
/// is known. All ranks call it together; `None`: there is only this process, which stands for the first rank.
///
/// # Errors
/// If the model cannot be spread so, or the number of ranks is no multiple of the stages.
pub(crate) fn choose(
    subject: &Subject<'_>,
    available: Option<u64>,
    disk: &dyn Fn() -> Option<f64>,
    cables: Option<&DeviceMatrix>,
    ranks: Option<&Ranks>,
) -> Result<Option<Chosen>, TrainError> {
    let Sizing { config, adaptation, .. } = subject.sizing;
    let (recipe, layers) = (subject.recipe, config.layers.len());
    let choice = recipe.parallel.stages;
    if choice == StagesChoice::Count(1) {
        return ranks.map_or(Ok(()), |ranks| ranks.settle(1)).map(|()| None);
    }
    let refusal = adaptation.as_ref().and_then(|adaptation| finetune_model::not_in_stages(config, adaptation));
    let can_choose = adaptation.is_some() && refusal.is_none();
    // Looking at memory and speed takes a moment, so it is only done where something depends on it.
    let depends = recipe.parallel.layers.is_empty() && can_choose;
    let offers = match ranks.filter(|ranks| depends && ranks.group().world() > 1) {
        Some(ranks) => {
            let may_read = recipe.model.residency != ResidencyChoice::Memory;
            let disk = may_read.then(disk).flatten();
            Offer::new(subject, disk, available, ranks.group().world()).gathered(ranks)?
        }
        None => Vec::new(),
    };
    let is_chain = |stages: usize| forms_chain(recipe, cables, stages, ranks);
    let deal = |stages: usize| {
        deal(layers, &of_each_stage(&offers, stages), arrangements(recipe.parallel.placement, is_chain(stages)))
    };
    let stages = match choice {
        StagesChoice::Count(stages) => stages,
        StagesChoice::Auto => match ranks {
            Some(ranks) => ranks.largest(fewest(layers, &offers, ranks, &deal) as i32)? as usize,
            None => 1,
        },
    };
    if let Some(ranks) = ranks {
        ranks.settle(stages)?;
    }
    if stages == 1 {
        return Ok(None);
    }
    if let Some(what) = refusal {
        return Err(TrainError::NotInStages { what });
    }
    if stages > layers {
        return Err(TrainError::NotInStages { what: few_layers(config, stages) });
    }
    check_layers(&recipe.parallel.layers, layers)?;
    let mut dealt = match offers.is_empty() {
        true => undealt(subject, available, stages, arrangements(recipe.parallel.placement, is_chain(stages)), ranks)?,
        false => deal(stages),
    };
    if let Some(ranks) = ranks {
        dealt = dealt.told_by_first(ranks)?;
        dealt.stage.mine = ranks.group().rank() % stages;
    }
    let Dealt { stage, arrangement, why, .. } = dealt;
    let by_cables = recipe.parallel.placement == PlacementChoice::Auto && arrangement != Arrangement::Ring;
    Ok(Some(Chosen { stage, arrangement, why, by_cables }))
}

/// Whether the cables lead from rank to rank and not back, where so many hold a model together. They count where they
/// are used.
pub(crate) fn forms_chain(
    recipe: &Recipe,
    cables: Option<&DeviceMatrix>,
    stages: usize,
    ranks: Option<&Ranks>,
) -> bool {
    let fits = |cables: &&DeviceMatrix| ranks.is_none_or(|ranks| cables.world() == ranks.group().world());
    let is_used = recipe.distributed.backend != BackendChoice::Tcp;
    is_used && cables.filter(fits).is_some_and(|cables| cables.is_chain(stages))
}

/// How layers lie: as the recipe says, or as the cables do. From the disk a rank with its layers next to each other
/// would hand nothing on before it comes to the last of them.
pub(crate) fn arrangements(choice: PlacementChoice, is_chain: bool) -> Arrangements {
    match choice {
        PlacementChoice::Auto if is_chain => {
            Arrangements { in_memory: Arrangement::Contiguous, from_disk: Arrangement::Wave }
        }
        PlacementChoice::Auto | PlacementChoice::Ring => Arrangements::always(Arrangement::Ring),
        PlacementChoice::Contiguous => Arrangements::always(Arrangement::Contiguous),
        PlacementChoice::Wave => Arrangements::always(Arrangement::Wave),
    }
}

/// As few stages as have the memory; the most that there can be if none have. Without offers: 1. `deal`: to so many.
fn fewest(layers: usize, offers: &[Offer], ranks: &Ranks, deal: &dyn Fn(usize) -> Dealt) -> usize {
    let possible: Vec<usize> = (1..=offers.len().min(layers)).filter(|&stages| ranks.can_have(stages)).collect();
    let fits = |stages: &usize| match *stages {
        1 => offers.iter().all(|offer| offer.whole),
        stages => deal(stages).in_memory,
    };
    possible.iter().copied().find(fits).or(possible.last().copied()).unwrap_or(1)
}

/// Refuses numbers of layers that the recipe says and that are not those of the model.
fn check_layers(counts: &[usize], layers: usize) -> Result<(), TrainError> {
    let sum = counts.iter().fold(0usize, |sum, count| sum.saturating_add(*count));
    match counts.is_empty() || sum == layers {
        true => Ok(()),
        false => Err(TrainError::LayersOfRanks { counts: counts.to_vec(), sum, layers }),
    }
}

/// The layers of each rank where the recipe says how many they are, or as many on each as on any other.
pub(crate) fn given(counts: &[usize], arrangement: Arrangement, layers: usize, stages: usize) -> (Stage, Why) {
    match counts.is_empty() {
        true => (alike(arrangement, layers, stages), Why::Alike),
        false => (Stage::arranged(arrangement, counts, 0), Why::Recipe),
    }
}

/// How layers lie whose numbers do not depend on what ranks offer. Where the cables choose between two arrangements, it
/// is the one for layers from the disk if a rank would have to read its layers in the other one, and all have room in
/// it. All ranks call it together.
fn undealt(
    subject: &Subject<'_>,
    available: Option<u64>,
    stages: usize,
    arrangements: Arrangements,
    ranks: Option<&Ranks>,
) -> Result<Dealt, TrainError> {
    const IN_MEMORY: i32 = 0;
    const FROM_DISK: i32 = 1;
    const NO_ROOM: i32 = 2;
    let parallel = &subject.recipe.parallel;
    let of = |arrangement| given(&parallel.layers, arrangement, subject.sizing.config.layers.len(), stages);
    let mut says = IN_MEMORY;
    if arrangements.in_memory != arrangements.from_disk {
        let mine = ranks.map_or(0, |ranks| ranks.group().rank() % stages);
        let counted = subject.counted();
        let look = |arrangement| {
            let (stage, _) = of(arrangement);
            residency::of_layers(subject, &counted, Stage { mine, ..stage }, available)
        };
        says = match (look(arrangements.in_memory).reads, look(arrangements.from_disk).fits) {
            (_, false) => NO_ROOM,
            (true, true) => FROM_DISK,
            (false, true) => IN_MEMORY,
        };
    }
    // Whether they wait for each other here depends on the recipe alone, which all ranks have alike.
    if let Some(ranks) = ranks.filter(|_| parallel.placement == PlacementChoice::Auto) {
        says = ranks.largest(says)?;
    }
    let arrangement = arrangements.of(says == FROM_DISK);
    let (stage, why) = of(arrangement);
    Ok(Dealt { stage, arrangement, why, in_memory: says == IN_MEMORY })
}

pub(crate) fn few_layers(config: &ModelConfig, stages: usize) -> String {
    format!("the model has {} layers, fewer than {stages} stages", config.layers.len())
}

/// Settles what needs no look at the model, before the long work.
pub(crate) fn settle_early(recipe: &Recipe, ranks: &Ranks) -> Result<(), TrainError> {
    match recipe.parallel.stages {
        StagesChoice::Count(stages) => ranks.settle(stages),
        StagesChoice::Auto => Ok(()),
    }
}

/// Ranks that hold a model together go through it with the same micro-batches: with as many at once as all have
/// room for. Returns whether there are such ranks.
pub(crate) fn agree_on_groups(sizing: &mut Sizing, ranks: &Ranks) -> Result<bool, TrainError> {
    if sizing.placement.stage().is_none() {
        return Ok(false);
    }
    sizing.at_once = -ranks.largest(-(sizing.at_once as i32))? as usize;
    Ok(true)
}

/// Connects a loaded model with the other ranks that hold it. `at_once`: the micro-batches that go through it together
/// in a step. Returns what the user should know of it.
pub(crate) fn connect(model: &mut Model, ranks: &Ranks, at_once: usize) -> Result<Option<String>, TrainError> {
    let Some(stage) = model.placement().stage().cloned() else { return Ok(None) };
    let queue = Stage::most_queued(at_once.max(FROM_DISK));
    let connections = ranks.connect(&stage, queue)?;
    let carried = connections.carried();
    model.connect(connections);
    Ok(carried)
}

/// What the user should know about where the layers are.
pub(crate) fn notice(chosen: &Chosen, replicas: usize) -> String {
    let Chosen { stage, arrangement, why, by_cables } = chosen;
    let (stages, layers) = (stage.count(), stage.of_layer.len());
    let of_replicas = if replicas == 1 { String::new() } else { format!(", {replicas} times") };
    let chain = if *by_cables { ", as the cables form a chain" } else { "" };
    let (counts, by) = (listed(&stage.counts()), why.words());
    let which = match arrangement {
        Arrangement::Ring if *why == Why::Alike => format!("layer n is on the (n mod {stages})th"),
        Arrangement::Ring => format!("{counts} of them in turn{by}"),
        Arrangement::Contiguous => format!("{counts} of them next to each other{chain}{by}"),
        Arrangement::Wave => format!("{counts} of them in turn there and back{chain}{by}"),
    };
    format!(
        "the {layers} layers are spread over {stages} ranks{of_replicas}: {which}; the bits are those of one process"
    )
}

/// Connections between the stages of a replica. For each direction between two of them there is a line of the group,
/// whose messages travel while layers are computed.
pub(crate) struct Connections {
    outgoing: BTreeMap<usize, Sender>,
    incoming: BTreeMap<usize, Receiver>,
    /// The rank of the first stage.
    first: usize,
}

/// What the connections of a rank have moved and waited for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Moved {
    /// Payload bytes.
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// (stage, how long was waited for it)
    pub(crate) waited: Vec<(usize, Duration)>,
}

impl Connections {
    /// Connects all ranks of each replica, which has `count` of them; this is the `mine`th of its own. All ranks
    /// call it together. `queue`: the most messages that wait for one of the others; who sends more waits too.
    ///
    /// # Errors
    /// If a rank cannot be reached.
    pub(crate) fn new(
        ranks: &Ranks,
        [mine, count]: [usize; 2],
        links: Vec<(usize, usize)>,
        queue: usize,
    ) -> Result<Connections, TrainError> {
        let (world, rank) = (ranks.group().world(), ranks.group().rank());
        let no_thread = |error| TrainError::NoThread { error };
        let mut connections =
            Connections { outgoing: BTreeMap::new(), incoming: BTreeMap::new(), first: rank - rank % count };
        for (from, to) in links {
            failpoint::hit("stages.connect");
            // Ranks that this link does not concern are in groups of their own.
            let (color, key) = match mine {
                mine if mine == from => (rank / count, 0),
                mine if mine == to => (rank / count, 1),
                _ => (world + rank, 0),
            };
            let group = ranks.group().split(color as u64, key)?;
            if mine == from {
                connections.outgoing.insert(to, group.sender(queue).map_err(no_thread)?);
            } else if mine == to {
                connections.incoming.insert(from, group.receiver().map_err(no_thread)?);
            }
        }
        Ok(connections)
    }

    /// The next message of another process, which has so many bytes, if it has arrived.
    ///
    /// # Errors
    /// If a rank cannot be reached.
    pub(crate) fn arrived(&self, from: usize, length: usize) -> Result<Option<Vec<u8>>, TrainError> {
        Ok(self.incoming[&from].arrived(length)?)
    }

    /// What was moved and waited for since the beginning.
    pub(crate) fn moved(&self) -> Moved {
        Moved {
            sent: self.outgoing.values().map(Sender::bytes).sum(),
            received: self.incoming.values().map(Receiver::bytes).sum(),
            waited: self.incoming.iter().map(|(&from, receiver)| (from, receiver.waited())).collect(),
        }
    }

    /// What the user should know about what carries tensors to and from this rank. `None`: there is no other.
    pub(crate) fn carried(&self) -> Option<String> {
        let outgoing = self.outgoing.iter().map(|(to, sender)| (*to, sender.backend()));
        let incoming = self.incoming.iter().map(|(from, receiver)| (*from, receiver.backend()));
        carried(&outgoing.chain(incoming).collect::<Vec<_>>(), self.first)
    }
}

/// What carries tensors between this stage and others, if the first one is rank `first`.
fn carried(lines: &[(usize, Backend)], first: usize) -> Option<String> {
    let (_, most) = *lines.iter().max_by_key(|(_, backend)| *backend == Backend::Rdma)?;
    let others: BTreeSet<usize> =
        lines.iter().filter(|(_, backend)| *backend != most).map(|(stage, _)| first + stage).collect();
    let others: Vec<String> = others.iter().map(|rank| format!("; to and from rank {rank} over tcp")).collect();
    Some(format!("between layers, tensors go from rank to rank over {most}{}", others.concat()))
}

impl Hops for Connections {
    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), Box<dyn Error + Send + Sync>> {
        failpoint::hit("hops.send");
        Ok(self.outgoing[&to].send(bytes)?)
    }

    fn receive(&self, from: usize, length: usize) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
        failpoint::hit("hops.receive");
        Ok(self.incoming[&from].receive(length)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_carries_tensors_is_said_with_its_exceptions() {
        let (rdma, tcp) = (Backend::Rdma, Backend::Tcp);
        let said = |lines: &[(usize, Backend)]| carried(lines, 4);
        assert_eq!(said(&[]), None);
        let words = |what: &str| Some(format!("between layers, tensors go from rank to rank over {what}"));
        assert_eq!(said(&[(1, tcp), (2, tcp)]), words("tcp"));
        assert_eq!(said(&[(1, rdma), (1, rdma)]), words("rdma"));
        assert_eq!(said(&[(2, tcp), (1, rdma), (2, tcp)]), words("rdma; to and from rank 6 over tcp"));
    }
}
