//! What can be wrong with a launcher's variables. Every message names the variable.

use std::io;
use std::path::PathBuf;

use finetune_advice::Advice;
use finetune_allreduce::DeviceMatrixError;

use super::Launcher;
use super::variables::Number;

/// Longer values are no rank and no address; messages cut them.
const LONGEST_VALUE: usize = 128;

/// What is wrong with a launcher's variables.
#[derive(Debug, thiserror::Error)]
pub enum EnvironmentError {
    /// A number is expected.
    #[error("{name}={value} is not a whole number")]
    NotANumber {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
    },

    /// One of two variables that belong together.
    #[error("{name}={value} is set, but {missing} is not")]
    Missing {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// The other variable.
        missing: &'static str,
        /// Whose variables were read.
        launcher: Launcher,
    },

    /// The number of ranks is 0.
    #[error("{name}={value} says that there are no ranks")]
    NoRanks {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: usize,
    },

    /// Every process has the same rank.
    #[error(
        "RANK={rank}, but {launcher} started this process as number {theirs} of {world} ({name}={theirs}): RANK was set before {launcher} started its processes"
    )]
    RankOfAnother {
        /// The value of `RANK`.
        rank: usize,
        /// The launcher's variable with the rank.
        name: &'static str,
        /// Its value.
        theirs: usize,
        /// The number of ranks.
        world: usize,
        /// Who started this process.
        launcher: Launcher,
    },

    /// A launcher started several processes, and another one's variable says otherwise.
    #[error("WORLD_SIZE={world}, but {launcher} started {theirs} processes ({name}={theirs})")]
    WorldOfAnother {
        /// The value of `WORLD_SIZE`.
        world: usize,
        /// The launcher's variable with the number of ranks.
        name: &'static str,
        /// Its value.
        theirs: usize,
        /// Who started this process.
        launcher: Launcher,
    },

    /// One of several processes of a launcher whose variables are not read.
    #[error("{name}={world}: this is one of {world} processes, but their launcher's variables are not read")]
    NotRead {
        /// The launcher's variable with the number of processes.
        name: &'static str,
        /// Its value.
        world: usize,
        /// The launcher's variable with the rank.
        rank: &'static str,
    },

    /// A rank is not below the number of ranks, in all or on this host.
    #[error("{name}={value} is too high: {world_name} counts {world} in all, so the last one is {}", world.saturating_sub(1))]
    RankTooHigh {
        /// The variable with the rank.
        name: &'static str,
        /// Its value.
        value: usize,
        /// The variable with the number of ranks.
        world_name: &'static str,
        /// Its value.
        world: usize,
    },

    /// A host has more ranks than there are in all.
    #[error("{name}={value} has more ranks on this host than {world_name}={world} has in all")]
    TooManyHere {
        /// The variable with the number of ranks on this host.
        name: &'static str,
        /// Its value.
        value: usize,
        /// The variable with the number of ranks.
        world_name: &'static str,
        /// Its value.
        world: usize,
    },

    /// A port is expected.
    #[error("{name}={value} is not a port: {what}")]
    Port {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is wrong.
        what: &'static str,
    },

    /// An address, with or without a port.
    #[error("{name}={value} cannot be used: {what}")]
    Address {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is wrong.
        what: &'static str,
    },

    /// Slurm's list of nodes cannot be read.
    #[error("{name}={value} is not a list of hosts: {what}")]
    NodeList {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What is wrong.
        what: &'static str,
    },

    /// No variable has the address of rank 0.
    #[error("by the variables of {launcher} this process is rank {rank} of {world}{}, and none says where rank 0 is", on_this_host(*local_world))]
    NoAddress {
        /// Whose variables were read.
        launcher: Launcher,
        /// This rank.
        rank: usize,
        /// The number of ranks.
        world: usize,
        /// The number of ranks on this host, if it is known.
        local_world: Option<usize>,
    },

    /// A file that a variable names cannot be read.
    #[error("{name} names {}, which cannot be read: {source}", path.display())]
    Unreadable {
        /// The variable.
        name: &'static str,
        /// The file that it names.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },

    /// The file of `MLX_IBV_DEVICES` is no matrix of devices.
    #[error("{name} names {}: {source}", path.display())]
    Devices {
        /// The variable.
        name: &'static str,
        /// The file that it names.
        path: PathBuf,
        /// What is wrong.
        source: DeviceMatrixError,
    },

    /// `what` begins with the rank that it is about, if it is about one.
    #[error("{name} names {}: {what}", path.display())]
    Hosts {
        /// The variable.
        name: &'static str,
        /// The file that it names.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },

    /// Two variables disagree on the number of ranks.
    #[error("{name} names {}, which is for {ranks} ranks, but {world_name} counts {world}", path.display())]
    WorldMismatch {
        /// The variable.
        name: &'static str,
        /// The file that it names.
        path: PathBuf,
        /// The number of ranks in the file.
        ranks: usize,
        /// The variable with the number of ranks.
        world_name: &'static str,
        /// Its value.
        world: usize,
    },
}

fn on_this_host(local_world: Option<usize>) -> String {
    local_world.map(|count| format!(" ({count} of them on this host)")).unwrap_or_default()
}

/// A value as it may stand in a message: quoted, on one line and not longer than one.
pub(super) fn shown(value: &str) -> String {
    let short: String = value.chars().take(LONGEST_VALUE).collect();
    let dots = if short.len() < value.len() { "…" } else { "" };
    format!("{short:?}{dots}")
}

impl EnvironmentError {
    pub(super) fn rank_too_high(rank: &Number, world: &Number) -> Self {
        let (world_name, world) = (world.name, world.value);
        if world == 0 {
            return Self::NoRanks { name: world_name, value: world };
        }
        Self::RankTooHigh { name: rank.name, value: rank.value, world_name, world }
    }

    /// Compares `RANK` and `WORLD_SIZE` with the variables of the launcher that started this
    /// process. Scripts may number the ranks anew, or make groups of parts of a step. But the same
    /// rank for all processes, or a group of one for each, is a mistake.
    pub(super) fn agree(
        rank: Option<&Number>,
        world: &Number,
        launcher: Launcher,
        their_rank: &Number,
        tasks: &Number,
    ) -> Result<(), Self> {
        let Some(rank) = rank else {
            let (world, name, theirs) = (world.value, tasks.name, tasks.value);
            return Err(Self::WorldOfAnother { world, name, theirs, launcher });
        };
        if world.value == 1 && tasks.value > 1 {
            return Err(Self::WorldOfAnother { world: 1, name: tasks.name, theirs: tasks.value, launcher });
        }
        if world.value == tasks.value && rank.value == 0 && their_rank.value > 0 {
            let (name, theirs) = (their_rank.name, their_rank.value);
            return Err(Self::RankOfAnother { rank: 0, name, theirs, world: world.value, launcher });
        }
        Ok(())
    }
}

impl Advice for EnvironmentError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::NotANumber { name, .. } => {
                vec![format!("set {name} to a number such as 2, or unset the variables of the launcher to train alone")]
            }
            Self::Missing { missing: missing @ ("MASTER_PORT" | "PET_MASTER_PORT"), .. } => vec![format!(
                "export {missing} too: one free port of rank 0's host, the same for every rank, such as 29500"
            )],
            Self::Missing { name, missing: "LOCAL_RANK", launcher, .. } => {
                vec![format!("{launcher} sets both: export LOCAL_RANK too, or unset {name}")]
            }
            Self::Missing { name, .. } if name.starts_with("PET_") => vec![
                "Kubeflow's trainer sets both; an elastic job has no node ranks, there let torchrun start this program"
                    .to_owned(),
                format!("to train alone, `unset {name}`"),
            ],
            Self::Missing { name, missing: "MLX_HOSTFILE", launcher, .. } => vec![
                format!(
                    "{launcher} also sets MLX_HOSTFILE, MLX_IBV_DEVICES or MLX_WORLD_SIZE, which say how many ranks there are; or start with `finetune launch`"
                ),
                format!("to train alone, `unset {name}`"),
            ],
            Self::Missing { name, missing, launcher, .. } => vec![
                format!("{launcher} sets both: export {missing} too, or start with `finetune launch -n N`"),
                format!("to train alone, `unset {name}`"),
            ],
            Self::RankOfAnother { launcher, .. } => vec![format!(
                "leave RANK and WORLD_SIZE out, the variables of {launcher} are read; or set RANK in each process: sh -c 'RANK=${} exec finetune run …'",
                launcher.rank_variable()
            )],
            Self::WorldOfAnother { launcher, .. } => vec![
                format!("`unset RANK WORLD_SIZE`: the variables of {launcher} are read"),
                format!("if each process is to train alone: `env -u {} finetune run …`", launcher.rank_variable()),
            ],
            Self::NotRead { name, rank, .. } => hand_over(name, rank),
            Self::NoRanks { name, .. } => vec![format!("set {name} to the number of processes, 1 or more")],
            Self::RankTooHigh { name, .. } => vec![format!("give each process its own {name}, counted from 0")],
            Self::TooManyHere { name, world_name, .. } => {
                vec![format!("{name} counts the processes on this host, {world_name} those on all hosts")]
            }
            Self::Port { name, .. } => {
                vec![format!("set {name} to a free port of rank 0's host, 1 to 65535, such as 29500")]
            }
            // The variable holds host and port.
            Self::Address { name, .. } if name.ends_with("COORDINATOR") => vec![format!(
                "set {name} to the address and a free port of rank 0's host, such as 10.0.0.1:32323 or [fd00::1]:32323"
            )],
            Self::Address { name, .. } => {
                vec![format!("set {name} to a name or address of rank 0's host, such as gpu01 or 10.0.0.1")]
            }
            Self::NodeList { name, .. } => vec![
                format!("Slurm writes it like gpu[01-03,07],login1; check what changes {name}"),
                "or export MASTER_ADDR, the name of rank 0's host, before srun".to_owned(),
            ],
            Self::NoAddress { launcher, .. } => vec![address_hint(*launcher).to_owned()],
            Self::Unreadable { name, .. } => {
                vec![format!("the file must be there on every host; `unset {name}` to train without it")]
            }
            Self::Devices { source, .. } => source.hints(),
            Self::Hosts { .. } => vec![
                "it is a list with the addresses of each rank, such as [[\"10.0.0.1:5000\"], [\"10.0.0.2:5000\"]]"
                    .to_owned(),
                "a hostfile with \"ssh\" and \"ips\" is for the launcher: `finetune launch --hostfile FILE`".to_owned(),
            ],
            Self::WorldMismatch { name, world_name, .. } => {
                vec![format!("both count the ranks: correct the one that is wrong, or unset {name} or {world_name}")]
            }
        }
    }
}

fn hand_over(world: &str, rank: &str) -> Vec<String> {
    vec![
        format!(
            "hand them over: sh -c 'RANK=${rank} WORLD_SIZE=${world} MASTER_ADDR=HOST MASTER_PORT=29500 exec finetune run …'"
        ),
        format!("to train alone, `unset {world}`"),
    ]
}

fn address_hint(launcher: Launcher) -> &'static str {
    match launcher {
        Launcher::Torchrun | Launcher::Kubeflow => {
            "export MASTER_ADDR and MASTER_PORT, rank 0's host and a free port there, the same for every rank"
        }
        Launcher::OpenMpi => {
            "hand rank 0's host to every rank: `mpirun -x MASTER_ADDR=HOST …`, where HOST is a name or address that the other hosts reach"
        }
        Launcher::Pmi => {
            "hand rank 0's host to every rank: `mpiexec -genv MASTER_ADDR HOST …`, where HOST is a name or address that the other hosts reach"
        }
        Launcher::Slurm => "export MASTER_ADDR, the name of rank 0's host, before srun",
        Launcher::Mlx => {
            "set MLX_JACCL_COORDINATOR to the address and a free port of rank 0's host, such as 10.0.0.1:32323, or MLX_HOSTFILE"
        }
    }
}
