//! The one error of a group's operations. Its message says who, what and where. Its hints say what
//! to do.

use std::fmt;
use std::sync::Arc;

use finetune_advice::Advice;

use crate::flight::FlightEntry;
use crate::frame::Descriptor;
use crate::progress::Progress;
use crate::verdict::{Cause, Verdict};

/// Who the ranks of a group are, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    /// The host, per rank.
    pub host: String,
    /// The process, per rank.
    pub pid: u32,
}

/// A group that has failed. It is of no more use, and what was being reduced is lost.
///
/// Boxed, so that a good result stays small.
#[derive(Clone, Debug)]
pub struct GroupError(pub(crate) Box<GroupFailure>);

impl std::ops::Deref for GroupError {
    type Target = GroupFailure;

    fn deref(&self) -> &GroupFailure {
        &self.0
    }
}

/// What is known of a failed group.
#[derive(Clone, Debug)]
pub struct GroupFailure {
    /// This rank.
    pub rank: usize,
    /// What happened, the same on every survivor that the others could reach.
    pub verdict: Verdict,
    /// The operation that this rank was in.
    pub operation: Option<(u64, Descriptor)>,
    /// The step that this rank was in.
    pub step: u64,
    /// All ranks.
    pub who: Arc<Vec<Who>>,
    /// The last operations of this rank, oldest first.
    pub flight: Vec<FlightEntry>,
}

/// "rank 2" or "ranks 1, 2 and 5".
pub(crate) fn ranks(ranks: &[usize]) -> String {
    let words: Vec<String> = ranks.iter().map(usize::to_string).collect();
    match words.split_last() {
        None => "no rank".into(),
        Some((only, [])) => format!("rank {only}"),
        Some((last, rest)) => format!("ranks {} and {last}", rest.join(", ")),
    }
}

impl GroupFailure {
    /// The ranks that are gone, if that is what happened.
    pub fn lost_ranks(&self) -> Vec<usize> {
        match &self.verdict {
            Verdict::Lost { closed, silent, .. } => closed.union(silent).copied().collect(),
            _ => Vec::new(),
        }
    }

    fn rank_at(&self, rank: usize) -> String {
        match self.who.get(rank) {
            Some(Who { host, pid }) => format!("rank {rank} ({host}, process {pid})"),
            None => format!("rank {rank}"),
        }
    }

    fn where_it_was(progress: &Progress) -> String {
        let Progress { step, operation, inside, .. } = progress;
        match inside {
            true => format!("in operation {operation} of step {step}"),
            false => format!("in step {step}, after operation {operation}"),
        }
    }

    /// What happened, without this rank's own part: the same text on all survivors.
    pub fn root_cause(&self) -> String {
        match &self.verdict {
            Verdict::Lost { closed, silent, last_seen } => {
                let describe = |rank: &usize, how: &str| {
                    let seen =
                        last_seen.get(rank).map(|progress| format!(", last seen {}", Self::where_it_was(progress)));
                    format!("{} {how}{}", self.rank_at(*rank), seen.unwrap_or_default())
                };
                let closed = closed.iter().map(|rank| describe(rank, "was lost: its connections closed"));
                let silent = silent.iter().map(|rank| describe(rank, "was lost: it fell silent"));
                closed.chain(silent).collect::<Vec<_>>().join("; ")
            }
            Verdict::Separated { pairs } => {
                let pairs: Vec<String> =
                    pairs.iter().map(|&(a, b)| format!("{} and {}", self.rank_at(a), self.rank_at(b))).collect();
                format!("{} do not hear each other, though both are alive", pairs.join(", nor do "))
            }
            Verdict::CutOff => format!("{} hears no other rank: its network is gone", self.rank_at(self.rank)),
            Verdict::Reported { by, cause, at } => format!("{} {}", self.rank_at(*by), self.cause(cause, at)),
        }
    }

    fn cause(&self, cause: &Cause, at: &Progress) -> String {
        match cause {
            Cause::Failed { message, .. } => format!("stopped in step {}: {message}", at.step),
            Cause::Diverged { peer, operation, mine, peer_operation, theirs } => format!(
                "and {} do different things in step {}: operation {operation} is {mine} on the one, operation {peer_operation} is {theirs} on the other",
                self.rank_at(*peer),
                at.step
            ),
            Cause::Damaged { peer, link, what } => {
                format!("got a damaged frame from {} over link {link}: {what}", self.rank_at(*peer))
            }
            Cause::Broken { peer, link, what } => {
                format!("lost its data link {link} to {}: {what}", self.rank_at(*peer))
            }
            Cause::Left { peer } => format!("cannot go on: {} has left the group", self.rank_at(*peer)),
            Cause::Stalled { waiting_for, seconds, operation, mine } => {
                format!("has waited {seconds} s for {} in operation {operation} ({mine})", ranks(waiting_for))
            }
        }
    }
}

impl fmt::Display for GroupError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.", self.root_cause())?;
        if let Some((number, descriptor)) = &self.operation {
            write!(formatter, " Rank {} was in operation {number} ({descriptor}) of step {}.", self.rank, self.step)?;
        }
        Ok(())
    }
}

impl std::error::Error for GroupError {}

impl Advice for GroupError {
    fn hints(&self) -> Vec<String> {
        let hint = match &self.verdict {
            Verdict::Lost { silent, .. } if !silent.is_empty() => {
                "look whether the silent rank's process is stopped, its machine asleep or its cable out"
            }
            Verdict::Lost { .. } => "look at the end of the lost rank's output",
            Verdict::Separated { .. } => "look at the cable and the firewall between the two",
            Verdict::CutOff => "look at this machine's cables",
            Verdict::Reported { by, cause, .. } => match cause {
                Cause::Failed { .. } => return vec![format!("look at the output of rank {by}")],
                Cause::Left { peer } => {
                    return vec![format!(
                        "all ranks must do the same operations before they leave: look at the end of rank {peer}'s output"
                    )];
                }
                Cause::Diverged { .. } => "all ranks must run the same program on the same input",
                Cause::Damaged { .. } => "look at the cable; nothing of the frame was used",
                Cause::Broken { .. } => "look at the cable and the firewall between the two",
                Cause::Stalled { .. } => {
                    "if no rank is busy, a connection between two of them lets nothing through: look at cables and firewalls"
                }
            },
        };
        vec![hint.to_owned()]
    }
}
