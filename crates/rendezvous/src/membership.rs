//! One rank of a group: which one it is, where and how it finds the others, and the one way to join
//! them.
//!
//! `finetune launch` and `finetune cluster bench` write a [`Membership`] to the standard input of
//! each rank that they start. Under other launchers it is made from their variables
//! ([`Membership::from_launcher`]).

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use finetune_advice::Advice;
use finetune_allreduce::{Algorithm, Config, DeviceMatrix, Group, JoinError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::launchers::{Environment, EnvironmentError};
use crate::token::{self, TOKEN_FILE};

#[cfg(test)]
mod tests;

/// How long ranks of another launcher wait for each other: a scheduler may start some of them
/// minutes later than others.
const JOIN_TIMEOUT: Duration = Duration::from_secs(300);
/// The same under our launcher, which starts all ranks at once.
const LAUNCHED_JOIN_TIMEOUT: Duration = Duration::from_secs(60);

/// How to make a token.
const MAKE_TOKEN: &str = "(umask 077; head -c 24 /dev/urandom | base64 > token)";

/// What a rank knows of itself and its group before it joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Below `world`.
    pub rank: usize,
    /// The number of ranks.
    pub world: usize,
    /// The rank among the ranks of this host, below `local_world`.
    pub local_rank: usize,
    /// The number of ranks on this host.
    pub local_world: usize,
    /// `host:port` where rank 0 listens; empty if `world` is 1.
    pub rendezvous: String,
    /// Addresses of this rank's host, as a hostfile names them, the best first.
    pub addresses: Vec<String>,
    /// The name of the run: ranks of another run are turned away.
    pub run: String,
    /// None: the ranks are on this host only, and share a secret of their user.
    pub token: Option<String>,
    /// The RDMA devices between the ranks.
    pub devices: Option<DeviceMatrix>,
    /// A mesh is to be run as a ring.
    pub prefer_ring: bool,
    /// Who started the rank, for messages; empty under our launcher.
    pub started_by: String,
    /// Started by our launcher.
    pub launched: bool,
}

/// Why a process does not become a rank of its group.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MembershipError {
    /// A launcher's variables contradict each other, or some are missing.
    #[error(transparent)]
    Variables(Box<EnvironmentError>),
    /// The token file cannot be read.
    #[error("the token file {}: {source}", path.display())]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A token has fewer than 16 characters.
    #[error("the token{} is too short: {length} of at least 16 characters", in_file(path.as_deref()))]
    ShortToken {
        /// The file that it is in.
        path: Option<PathBuf>,
        /// Its length.
        length: usize,
    },
    /// The secret of the ranks of one machine can be kept nowhere.
    #[error("there is no place for a secret that the ranks of this machine share: {source}")]
    NoSecret {
        /// What the system says.
        source: io::Error,
    },
    /// Ranks on several machines have no token.
    #[error("the {world} ranks are on several machines and have no token by which to know each other")]
    NoToken {
        /// The number of ranks.
        world: usize,
    },
    /// The address of rank 0 is one to listen at, not one to call.
    #[error("MASTER_ADDR={host} is no address that rank 0 can be called by from another machine")]
    Unspecified {
        /// The address.
        host: String,
    },
    /// The ranks did not meet.
    #[error(transparent)]
    Join(Box<JoinError>),
}

fn in_file(path: Option<&Path>) -> String {
    path.map(|path| format!(" in {}", path.display())).unwrap_or_default()
}

impl From<EnvironmentError> for MembershipError {
    fn from(error: EnvironmentError) -> Self {
        Self::Variables(Box::new(error))
    }
}

impl From<JoinError> for MembershipError {
    fn from(error: JoinError) -> Self {
        Self::Join(Box::new(error))
    }
}

impl Advice for MembershipError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Variables(error) => error.hints(),
            Self::TokenFile { .. } => {
                vec!["all ranks read the same token from it, at least 16 characters".to_owned()]
            }
            Self::ShortToken { .. } => vec![format!("make one that all ranks get: {MAKE_TOKEN}")],
            Self::NoSecret { .. } => {
                vec![format!("set TMPDIR to a directory of your own, or name a file with a token: {TOKEN_FILE}")]
            }
            Self::NoToken { .. } => vec![
                format!("put one into a file that only you can read and all ranks see: {MAKE_TOKEN}"),
                format!("then name the file: --token-file token, or the variable {TOKEN_FILE}"),
            ],
            Self::Unspecified { .. } => {
                vec!["set it to a name or address of rank 0's host on all ranks but rank 0".to_owned()]
            }
            Self::Join(error) => error.hints(),
        }
    }
}

impl Membership {
    /// The only rank of its group.
    pub fn alone() -> Membership {
        Membership {
            rank: 0,
            world: 1,
            local_rank: 0,
            local_world: 1,
            rendezvous: String::new(),
            addresses: Vec::new(),
            run: String::new(),
            token: None,
            devices: None,
            prefer_ring: false,
            started_by: String::new(),
            launched: false,
        }
    }

    /// What the variables of a launcher say of this process, and notes that are worth a line each.
    /// `Ok(None)`: no launcher started it. `token_file` has the token; without it the variable
    /// `FINETUNE_TOKEN_FILE` names the file.
    ///
    /// # Errors
    /// If the variables contradict each other, or the ranks are on several hosts and have no token.
    pub fn from_launcher(token_file: Option<&Path>) -> Result<Option<(Membership, Vec<String>)>, MembershipError> {
        let Some(environment) = Environment::of_process()? else { return Ok(None) };
        let named = || std::env::var_os(TOKEN_FILE).filter(|name| !name.is_empty()).map(PathBuf::from);
        let file = token_file.map(Path::to_owned).or_else(named);
        let token = file.as_deref().map(token::read).transpose()?;
        let open = file.as_deref().and_then(token::readable_by_others);
        let note = environment.note.clone();
        let membership = Membership::from_environment(environment, token)?;
        Ok(Some((membership, note.into_iter().chain(open).collect())))
    }

    fn from_environment(environment: Environment, token: Option<String>) -> Result<Membership, MembershipError> {
        let Environment { rank, world, local_rank, local_world, launcher, devices, prefer_ring, job, .. } = environment;
        let rendezvous = match environment.rendezvous {
            // Ranks of one host need no token, and no address but its own.
            Some(address) if token.is_none() && local_world == world => format!("127.0.0.1:{}", address.port),
            Some(address) if rank > 0 && local_world < world && address.is_unspecified() => {
                return Err(MembershipError::Unspecified { host: address.host });
            }
            Some(address) if token.is_none() && !address.is_loopback() => {
                return Err(MembershipError::NoToken { world });
            }
            Some(address) => address.to_string(),
            None => String::new(),
        };
        Ok(Membership {
            rank,
            world,
            local_rank,
            local_world,
            rendezvous,
            addresses: Vec::new(),
            run: job.unwrap_or_default(),
            token,
            devices,
            prefer_ring,
            started_by: launcher.words(),
            launched: false,
        })
    }

    /// The configuration of the group with everything that the membership says; all else is as
    /// usual.
    fn config(&self) -> Result<Config, MembershipError> {
        let secret = token::secret(self.token.as_deref(), self.world)?;
        let mut config = Config::new(self.rank, self.world, self.rendezvous.clone(), secret);
        config.run.clone_from(&self.run);
        // Our own launcher knows whether all ranks are here. The variables of other launchers say
        // it of rank 0 alone.
        config.everywhere = !(self.launched && self.local_world == self.world);
        config.addresses = self.addresses.iter().filter_map(|address| address.parse().ok()).collect();
        config.started_by.clone_from(&self.started_by);
        config.join_timeout = if self.launched { LAUNCHED_JOIN_TIMEOUT } else { JOIN_TIMEOUT };
        config.topology = self.prefer_ring.then_some(Algorithm::Ring);
        config.rdma.devices.clone_from(&self.devices);
        Ok(config)
    }

    /// Joins the other ranks, which must run the same version. `settings` changes what the
    /// membership does not say, and adds what else the ranks must agree on.
    ///
    /// # Errors
    /// If there is no secret for the group, or the ranks do not meet.
    pub fn join(&self, settings: impl FnOnce(&mut Config)) -> Result<Group, MembershipError> {
        let mut config = self.config()?;
        config.claim("version of finetune", env!("CARGO_PKG_VERSION").as_bytes());
        settings(&mut config);
        Ok(Group::join(&config)?)
    }

    /// Tells the other ranks why this one failed before it could join them, and with which exit
    /// code it ends.
    pub fn excuse(&self, why: &str, code: u8) {
        if let Ok(config) = self.config() {
            Group::excuse(&config, why, code);
        }
    }
}

/// How many tasks of a Slurm job stay idle because this process was started in it without `srun`.
/// `Some` only if [`Membership::from_launcher`] returns `None`.
pub fn slurm_tasks_without_srun() -> Option<usize> {
    Environment::slurm_tasks_without_srun(&|name| std::env::var(name).ok())
}
