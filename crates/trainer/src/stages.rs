//! The ranks that hold the layers of one model together, and what connects them.
//!
//! Ranks that follow each other hold one model: with 2 stages, ranks 0 and 1, then ranks 2 and 3, and so on. Each
//! such model is a replica, which computes shares of a step as one rank without stages does.

mod dealing;
mod files;

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::time::Duration;

use finetune_allreduce::{Backend, Receiver, Sender};
use finetune_model::{Hops, Model, ModelConfig, Stage};
use finetune_recipe::{Recipe, ResidencyChoice, StagesChoice};
use finetune_store::failpoint;

use crate::error::TrainError;
use crate::evaluate::FROM_DISK;
use crate::memory::{Sizing, Subject};
use crate::ranks::Ranks;

use self::dealing::Dealt;
pub(crate) use self::dealing::{Offer, Why, deal, levelled, of_each_stage};
pub(crate) use self::files::{digest_together, disk_rate, fetch_missing};

/// The layers of this rank, if the recipe spreads a model over several, and why there are so many. `available`:
/// bytes of memory that this rank may take, if that can be told; `disk`: measures bytes per second of its disk. All
/// ranks call it together; `None`: there is only this process, which stands for the first rank.
///
/// # Errors
/// If the model cannot be spread so, or the number of ranks is no multiple of the stages.
pub(crate) fn choose(
    subject: &Subject<'_>,
    available: Option<u64>,
    disk: &dyn Fn() -> Option<f64>,
    ranks: Option<&Ranks>,
) -> Result<Option<(Stage, Why)>, TrainError> {
    let Sizing { config, adaptation, .. } = subject.sizing;
    let (choice, layers) = (subject.recipe.parallel.stages, config.layers.len());
    if choice == StagesChoice::Count(1) {
        return ranks.map_or(Ok(()), |ranks| ranks.settle(1)).map(|()| None);
    }
    let refusal = adaptation.as_ref().and_then(|adaptation| finetune_model::not_in_stages(config, adaptation));
    let can_choose = adaptation.is_some() && refusal.is_none();
    // Looking at memory and speed takes a moment, so it is only done where something depends on it.
    let depends = subject.recipe.parallel.layers.is_empty() && can_choose;
    let offers = match ranks.filter(|ranks| depends && ranks.group().world() > 1) {
        Some(ranks) => {
            let may_read = subject.recipe.model.residency != ResidencyChoice::Memory;
            let disk = may_read.then(disk).flatten();
            Offer::new(subject, disk, available, ranks.group().world()).gathered(ranks)?
        }
        None => Vec::new(),
    };
    let stages = match choice {
        StagesChoice::Count(stages) => stages,
        StagesChoice::Auto => match ranks {
            Some(ranks) => ranks.largest(fewest(layers, &offers, ranks) as i32)? as usize,
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
        return Err(few_layers(config, stages));
    }
    let mut dealt = asked(&subject.recipe.parallel.layers, layers)?.unwrap_or_else(|| match offers.is_empty() {
        true => Dealt { stage: Stage::in_turn(layers, stages, 0), why: Why::Alike, in_memory: true },
        false => deal(layers, &of_each_stage(&offers, stages)),
    });
    if let Some(ranks) = ranks {
        dealt = dealt.told_by_first(ranks)?;
        dealt.stage.mine = ranks.group().rank() % stages;
    }
    Ok(Some((dealt.stage, dealt.why)))
}

/// As few stages as have the memory; the most that there can be if none have. Without offers: 1.
fn fewest(layers: usize, offers: &[Offer], ranks: &Ranks) -> usize {
    let possible: Vec<usize> = (1..=offers.len().min(layers)).filter(|&stages| ranks.can_have(stages)).collect();
    let fits = |stages: &usize| match *stages {
        1 => offers.iter().all(|offer| offer.whole),
        stages => deal(layers, &of_each_stage(offers, stages)).in_memory,
    };
    possible.iter().copied().find(fits).or(possible.last().copied()).unwrap_or(1)
}

/// The layers of each rank as the recipe says them, if it does.
fn asked(counts: &[usize], layers: usize) -> Result<Option<Dealt>, TrainError> {
    let sum = counts.iter().fold(0usize, |sum, count| sum.saturating_add(*count));
    match counts.is_empty() {
        true => Ok(None),
        false if sum == layers => Ok(Some(Dealt { stage: Stage::dealt(counts, 0), why: Why::Recipe, in_memory: true })),
        false => Err(TrainError::LayersOfRanks { counts: counts.to_vec(), sum, layers }),
    }
}

pub(crate) fn few_layers(config: &ModelConfig, stages: usize) -> TrainError {
    TrainError::NotInStages {
        what: format!("the model has {} layers, fewer than {stages} stages", config.layers.len()),
    }
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
pub(crate) fn notice(stage: &Stage, why: Why, replicas: usize) -> String {
    let (stages, layers) = (stage.count(), stage.of_layer.len());
    let of_replicas = if replicas == 1 { String::new() } else { format!(", {replicas} times") };
    let numbers: Vec<String> = stage.counts().iter().map(usize::to_string).collect();
    let (last, before) = numbers.split_last().map_or(("", String::new()), |(last, rest)| (last, rest.join(", ")));
    let by = match why {
        Why::Alike => None,
        Why::Recipe => Some("parallel.layers says"),
        Why::Speed => Some("their speed allows"),
        Why::Disk => Some("their disks and speed allow"),
        Why::Memory => Some("their memory and speed allow"),
    };
    let which = match by {
        None => format!("layer n is on the (n mod {stages})th"),
        Some(by) => format!("{before} and {last} of them in turn, as {by}"),
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
            // Ranks that this link does not concern are in groups of their own.
            let (color, key) = match mine {
                mine if mine == from => (rank / count, 0),
                mine if mine == to => (rank / count, 1),
                _ => (world + rank, 0),
            };
            let group = ranks.group().split(color as u64, key).map_err(TrainError::Stages)?;
            if mine == from {
                connections.outgoing.insert(to, group.sender(queue).map_err(no_thread)?);
            } else if mine == to {
                connections.incoming.insert(from, group.receiver().map_err(no_thread)?);
            }
        }
        Ok(connections)
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
