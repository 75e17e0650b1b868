//! How a `finetune run` becomes a rank of its group: who says so, and what the recipe adds.
//!
//! `finetune launch` says it on standard input, other launchers in their variables. Without a
//! launcher the process trains alone.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use finetune_allreduce::{Algorithm, BackendChoice, Config, Group, Notice};
use finetune_launch::{Order, assignment};
use finetune_recipe::{BackendChoice as Backend, Distributed, Recipe, TopologyChoice};
use finetune_rendezvous::{Membership, slurm_tasks_without_srun};
use finetune_trainer::Ranks;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::progress::Verbosity;
use crate::signals::Signals;
use crate::stderr::complain;
use crate::version;

/// Longest wait for a rank that is alive. Rank 0 writes checkpoints and answers held-back rows
/// while the others wait.
const LONGEST_WAIT: Duration = Duration::from_secs(6 * 3600);

/// The first line of the standard input of a rank that `finetune launch` starts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Assignment {
    #[serde(flatten)]
    pub(crate) membership: Membership,
    /// The ports at which all ranks listen, if the launcher's user has chosen them.
    pub(crate) ports: Option<(u16, u16)>,
    /// Steps go to the launcher as data: it has the terminal, and shows them.
    pub(crate) narrates: bool,
}

impl Assignment {
    /// Reads the line. Orders that come later go to `signals`.
    pub(crate) fn read(signals: &Arc<Signals>) -> Result<Assignment, Failure> {
        let signals = Arc::clone(signals);
        let hear = move |order: Order| match order {
            Order::Stop(signal) => signals.receive(signal),
            Order::Gone => signals.abandoned(),
        };
        assignment(hear)
            .map_err(|error| Failure::arguments(error, "--assigned is for ranks that `finetune launch` starts"))
    }

    /// As the launcher's variables say, or alone. The second value: notes that are worth a line
    /// each.
    pub(crate) fn of_launcher(token_file: Option<&Path>) -> Result<(Assignment, Vec<String>), Failure> {
        let found = Membership::from_launcher(token_file)?;
        let (membership, notes) = found.unwrap_or_else(|| (Membership::alone(), idle_tasks().into_iter().collect()));
        Ok((Assignment { membership, ports: None, narrates: false }, notes))
    }
}

/// Joins the other ranks that hold a model together, which must have been started with the same words.
pub(crate) fn join_to_use(assignment: &Assignment, words: &str, verbosity: Verbosity) -> Result<Group, Failure> {
    let group = assignment.membership.join(|config| {
        set_up(config, verbosity);
        config.ports = assignment.ports;
        config.claim("command", words.as_bytes());
    })?;
    Ok(group)
}

/// Joins the other ranks, which must have been started with the same program and recipe.
pub(crate) fn join(assignment: &Assignment, recipe: &Recipe, verbosity: Verbosity) -> Result<Arc<Ranks>, Failure> {
    let Distributed { backend, topology, timeout, virtual_ranks, join_timeout, ports, .. } = recipe.distributed;
    let group = assignment.membership.join(|config| {
        config.backend = match backend {
            Backend::Auto => BackendChoice::Auto,
            Backend::Tcp => BackendChoice::Tcp,
            Backend::Rdma => BackendChoice::Rdma,
        };
        config.topology = match topology {
            TopologyChoice::Auto => config.topology,
            TopologyChoice::Ring => Some(Algorithm::Ring),
            TopologyChoice::Mesh => Some(Algorithm::Mesh),
        };
        config.ports = assignment.ports.or(ports);
        config.timeout = timeout;
        config.join_timeout = join_timeout.unwrap_or(config.join_timeout);
        set_up(config, verbosity);
        for (key, value) in recipe.shared() {
            config.claim(&format!("recipe ({key})"), value.as_bytes());
        }
    })?;
    Ok(Arc::new(Ranks::new(group, virtual_ranks)?))
}

/// What all groups have in common: the same build of the program, patience, and notices on stderr.
fn set_up(config: &mut Config, verbosity: Verbosity) {
    let first = config.rank == 0;
    config.operation_timeout = LONGEST_WAIT;
    config.notices = Arc::new(move |notice: Notice| say_notice(&notice, first, verbosity));
    config.claim("build of finetune", version::build().as_bytes());
}

/// What the group says: how it came about on rank 0, trouble on whichever rank sees it.
fn say_notice(notice: &Notice, first: bool, verbosity: Verbosity) {
    let wanted = match notice {
        Notice::Joined { world: 1, .. } => return,
        Notice::Unresolved { .. } | Notice::Waiting { .. } | Notice::TurnedAway { .. } | Notice::Failed { .. } => {
            Verbosity::Normal
        }
        Notice::Joined { .. } | Notice::FellBack { .. } if first => Verbosity::Normal,
        Notice::Silent { .. } | Notice::Back { .. } if first => Verbosity::Normal,
        Notice::Chosen { .. } if !first => return,
        _ => Verbosity::Verbose,
    };
    if verbosity >= wanted {
        complain!("{notice}");
    }
}

/// Tells the other ranks why this one has failed before it could join them.
pub(crate) fn excuse(membership: &Membership, failure: &Failure) {
    membership.excuse(&failure.fact(), failure.exit().number());
}

/// Shares the cores of this host among its ranks, unless the number of threads is set already.
pub(crate) fn share_cores(membership: &Membership) {
    if membership.local_world > 1 && std::env::var_os("RAYON_NUM_THREADS").is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (cores / membership.local_world).max(1);
        // Ignore the error: the pool is there already, which then works as well.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
}

/// A run in a batch script without `srun` trains alone, which may not be what the user meant.
fn idle_tasks() -> Option<String> {
    let tasks = slurm_tasks_without_srun()?;
    Some(format!(
        "this Slurm job has {tasks} tasks, of which this process is none: `srun finetune run …` trains on all"
    ))
}
