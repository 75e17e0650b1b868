//! From what the ranks saw to what happened: a pure function, so all survivors say the same.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::frame::Descriptor;
use crate::progress::Progress;

/// Why a rank stopped, as it reports itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The caller called [`crate::Group::abort`].
    Failed {
        /// What it said.
        message: String,
        /// The caller's own number for it.
        code: i32,
    },
    /// A frame of another operation arrived.
    Diverged {
        /// The rank it came from.
        peer: usize,
        /// The number of this rank's operation.
        operation: u64,
        /// This rank's operation.
        mine: Descriptor,
        /// The number of the peer's operation.
        peer_operation: u64,
        /// The peer's operation.
        theirs: Descriptor,
    },
    /// A frame was damaged, lost or foreign.
    Damaged {
        /// The rank it came from.
        peer: usize,
        /// The link it came over.
        link: usize,
        /// What was wrong with it.
        what: String,
    },
    /// A data connection broke although the peer is alive.
    Broken {
        /// The rank at its other end.
        peer: usize,
        /// The link.
        link: usize,
        /// The system's message.
        what: String,
    },
    /// A rank that this one needs for its operation has left the group in good order.
    Left {
        /// The rank.
        peer: usize,
    },
    /// An operation made no progress within its deadline though all ranks are alive.
    Stalled {
        /// The ranks that this one waits for.
        waiting_for: Vec<usize>,
        /// How long, in seconds.
        seconds: u64,
        /// The number of the operation.
        operation: u64,
        /// The operation.
        mine: Descriptor,
    },
}

/// What one rank saw when the group failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) from: usize,
    /// Later versions replace earlier ones.
    pub(crate) version: u32,
    pub(crate) cause: Option<Cause>,
    /// Ranks whose connection closed without a farewell.
    pub(crate) closed: BTreeSet<usize>,
    /// Ranks that said nothing for the timeout.
    pub(crate) silent: BTreeSet<usize>,
    /// Where this rank was.
    pub(crate) progress: Progress,
    /// Where the ranks in `closed` and `silent` last said they were.
    pub(crate) last_seen: Vec<(usize, Progress)>,
}

impl Record {
    pub(crate) fn new(from: usize) -> Record {
        Record {
            from,
            version: 0,
            cause: None,
            closed: BTreeSet::new(),
            silent: BTreeSet::new(),
            progress: Progress::default(),
            last_seen: Vec::new(),
        }
    }
}

/// What ended a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// A rank said why it stopped.
    Reported {
        /// The rank.
        by: usize,
        /// Why.
        cause: Cause,
        /// Where it was.
        at: Progress,
    },
    /// Ranks ended or froze, or their hosts are cut off.
    Lost {
        /// Those whose connections closed: they were killed or crashed.
        closed: BTreeSet<usize>,
        /// Those that fell silent: frozen, or their network is gone.
        silent: BTreeSet<usize>,
        /// Where each last was.
        last_seen: BTreeMap<usize, Progress>,
    },
    /// These pairs cannot hear each other though both ranks are alive.
    Separated {
        /// The pairs, lower rank first.
        pairs: BTreeSet<(usize, usize)>,
    },
    /// This rank hears no other.
    CutOff,
}

/// What happened, by the records of all ranks that can hear each other.
///
/// What a rank reports of itself comes first: it is certain. Then come closed connections, then
/// silence. A silent rank is lost only if no rank hears it: a rank that wrote a record is alive.
pub(crate) fn judge(me: usize, world: usize, records: &BTreeMap<usize, Record>) -> Verdict {
    let alive = |rank: &usize| records.contains_key(rank);
    let closed: BTreeSet<usize> =
        records.values().flat_map(|record| &record.closed).copied().filter(|rank| !alive(rank)).collect();
    // A link that breaks because the peer died is the peer's death.
    let explained = |cause: &Cause| match cause {
        Cause::Broken { peer, .. } | Cause::Damaged { peer, .. } => closed.contains(peer),
        Cause::Stalled { .. } => !closed.is_empty(),
        // A rank that wrote a record left because of what the record says.
        Cause::Left { peer } => records.get(peer).is_some_and(|record| record.version > 0),
        Cause::Failed { .. } | Cause::Diverged { .. } => false,
    };
    let weight = |cause: &Cause| match cause {
        Cause::Failed { .. } => 0,
        Cause::Diverged { .. } => 1,
        Cause::Damaged { .. } => 2,
        Cause::Left { .. } => 3,
        Cause::Broken { .. } => 4,
        Cause::Stalled { .. } => 5,
    };
    let reported = records
        .values()
        .filter_map(|record| record.cause.as_ref().map(|cause| (record, cause)))
        .filter(|(_, cause)| !explained(cause))
        .min_by_key(|(record, cause)| (weight(cause), record.from));
    if let Some((record, cause)) = reported {
        return Verdict::Reported { by: record.from, cause: cause.clone(), at: record.progress };
    }
    let accused: BTreeSet<usize> = records.values().flat_map(|record| &record.silent).copied().collect();
    let silent: BTreeSet<usize> =
        accused.iter().copied().filter(|rank| !alive(rank) && !closed.contains(rank)).collect();
    if closed.is_empty() && silent.len() + 1 == world && world > 2 && silent.iter().all(|&rank| rank != me) {
        return Verdict::CutOff;
    }
    if closed.is_empty() && silent.is_empty() {
        let pairs = records.values().flat_map(|record| {
            let from = record.from;
            record.silent.iter().chain(&record.closed).map(move |&rank| (rank.min(from), rank.max(from)))
        });
        return Verdict::Separated { pairs: pairs.collect() };
    }
    let mut last_seen = BTreeMap::new();
    for (rank, progress) in records.values().flat_map(|record| &record.last_seen) {
        if closed.contains(rank) || silent.contains(rank) {
            let latest: &mut Progress = last_seen.entry(*rank).or_insert(*progress);
            if (progress.operation, progress.moved) > (latest.operation, latest.moved) {
                *latest = *progress;
            }
        }
    }
    Verdict::Lost { closed, silent, last_seen }
}
