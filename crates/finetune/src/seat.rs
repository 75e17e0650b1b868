//! Where this process stands among the ranks of a run, and how it joins them.
//!
//! `finetune launch` says it on standard input, other launchers in their variables; nobody: then it trains alone.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use finetune_allreduce::{Algorithm, BackendChoice, Config, DeviceMatrix, Group, Notice, Secret};
use finetune_launch::workers::{self, Order};
use finetune_recipe::{BackendChoice as Backend, Distributed, Recipe, TopologyChoice};
use finetune_rendezvous::Environment;
use finetune_trainer::Ranks;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::signals::Signals;

/// How long ranks wait for each other at the start: a scheduler may start some of them minutes later than others, our launcher
/// starts all at once.
const JOIN_TIMEOUT: Duration = Duration::from_secs(300);
const LAUNCHED_JOIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest wait for a rank that is alive: rank 0 writes checkpoints and answers held-back rows while the others wait.
const LONGEST_WAIT: Duration = Duration::from_secs(6 * 3600);

/// The file with the token, where no flag names it.
const TOKEN_FILE: &str = "FINETUNE_TOKEN_FILE";

/// This process's rank, and where the others are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Seat {
    pub(crate) rank: usize,
    pub(crate) world: usize,
    /// Place among the ranks of this machine, and how many they are.
    pub(crate) local_rank: usize,
    pub(crate) local_world: usize,
    /// host:port of rank 0.
    pub(crate) rendezvous: String,
    /// Addresses of this rank's machine, as a hostfile says.
    pub(crate) addresses: Vec<String>,
    /// Ranks of another run are turned away.
    pub(crate) run: String,
    /// None: this machine only.
    pub(crate) token: Option<String>,
    /// RDMA devices between the ranks, as in MLX_IBV_DEVICES.
    pub(crate) devices: Option<serde_json::Value>,
    pub(crate) prefer_ring: bool,
    /// Who started it, for messages; empty under our launcher.
    pub(crate) started_by: String,
    /// Started by `finetune launch`.
    pub(crate) launched: bool,
    /// Steps go to the launcher as data: it has the terminal, and shows them.
    pub(crate) narrates: bool,
}

impl Seat {
    const ALONE: Seat = Seat {
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
        narrates: false,
    };

    /// As `finetune launch` says on standard input. What it says later goes to `signals`.
    pub(crate) fn assigned(signals: &Arc<Signals>) -> Result<Seat, Failure> {
        let signals = Arc::clone(signals);
        let hear = move |order: Order| match order {
            Order::Stop(signal) => signals.receive(signal),
            Order::Gone => signals.abandoned(),
        };
        workers::assignment(hear)
            .map_err(|error| Failure::arguments(error, "--assigned is for ranks that `finetune launch` starts"))
    }

    /// As the launcher's variables say. The second value is what is worth a line.
    pub(crate) fn of_environment(token_file: Option<&Path>) -> Result<(Seat, Vec<String>), Failure> {
        let environment = Environment::of_process()
            .map_err(|error| Failure::Arguments { message: error.to_string(), hints: error.hints() })?;
        let Some(environment) = environment else { return Ok((Seat::ALONE, idle_tasks().into_iter().collect())) };
        let Environment { rank, world, local_rank, local_world, rendezvous, devices, prefer_ring, .. } = environment;
        let (started_by, run) = (environment.launcher.words(), environment.job.unwrap_or_default());
        let file = token_file.map(Path::to_owned).or_else(|| std::env::var_os(TOKEN_FILE).map(Into::into));
        let token = file.as_deref().map(read_token).transpose()?;
        let open = file.as_deref().and_then(readable_by_others);
        let rendezvous = match rendezvous {
            // Ranks of one machine need no token, and no address but its own.
            Some(place) if token.is_none() && local_world == world => format!("127.0.0.1:{}", place.port),
            Some(place) if rank > 0 && local_world < world && place.is_unspecified() => {
                return Err(Failure::arguments(
                    format!(
                        "MASTER_ADDR={} is no address that rank 0 can be called by from another machine",
                        place.host
                    ),
                    "set it to a name or address of rank 0's host on all ranks but rank 0",
                ));
            }
            Some(place) if token.is_none() && !place.is_loopback() => return Err(no_token(world)),
            Some(place) => place.to_string(),
            None => String::new(),
        };
        let devices = devices.and_then(|devices| serde_json::from_str(&devices.to_json()).ok());
        let places = Seat { rank, world, local_rank, local_world, ..Seat::ALONE };
        let seat = Seat { rendezvous, run, token, devices, prefer_ring, started_by, ..places };
        Ok((seat, environment.note.into_iter().chain(open).collect()))
    }

    /// Tells the others why this rank has failed before it could join them.
    pub(crate) fn excuse(&self, failure: &Failure) {
        if let Ok(config) = self.config() {
            Group::excuse(&config, &failure.fact(), failure.code());
        }
    }

    /// Who this rank is, where rank 0 is, and how they know each other: all that no recipe says.
    fn config(&self) -> Result<Config, Failure> {
        let secret = secret(self.token.as_deref(), self.world)?;
        let mut config = Config::new(self.rank, self.world, self.rendezvous.clone(), secret);
        config.run.clone_from(&self.run);
        // Our own launcher knows whether all ranks are here; the others' variables can say it of rank 0 alone.
        config.everywhere = !(self.launched && self.local_world == self.world);
        config.addresses = self.addresses.iter().filter_map(|address| address.parse().ok()).collect();
        config.started_by.clone_from(&self.started_by);
        Ok(config)
    }

    /// Joins the others, who must have been started with the same program and recipe.
    pub(crate) fn join(
        &self,
        recipe: &Recipe,
        notice: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<Arc<Ranks>, Failure> {
        let mut config = self.config()?;
        let Distributed { backend, topology, timeout, virtual_ranks, join_timeout, ports, .. } = recipe.distributed;
        config.backend = match backend {
            Backend::Auto => BackendChoice::Auto,
            Backend::Tcp => BackendChoice::Tcp,
            Backend::Rdma => BackendChoice::Rdma,
        };
        config.topology = match topology {
            TopologyChoice::Auto => self.prefer_ring.then_some(Algorithm::Ring),
            TopologyChoice::Ring => Some(Algorithm::Ring),
            TopologyChoice::Mesh => Some(Algorithm::Mesh),
        };
        config.ports = ports;
        let usual = if self.launched { LAUNCHED_JOIN_TIMEOUT } else { JOIN_TIMEOUT };
        let join_timeout = join_timeout.unwrap_or(usual);
        (config.timeout, config.join_timeout, config.operation_timeout) = (timeout, join_timeout, LONGEST_WAIT);
        config.rdma.devices = self.devices.as_ref().and_then(|devices| DeviceMatrix::parse(&devices.to_string()).ok());
        config.notices = Arc::new(notice);
        config.claim("version of finetune", env!("CARGO_PKG_VERSION").as_bytes());
        for (key, value) in recipe.shared() {
            config.claim(&format!("recipe ({key})"), value.as_bytes());
        }
        Ok(Arc::new(Ranks::new(Group::join(&config)?, virtual_ranks)?))
    }

    /// Shares the cores of this machine among its ranks, unless somebody has decided that already.
    pub(crate) fn share_cores(&self) {
        if self.local_world > 1 && std::env::var_os("RAYON_NUM_THREADS").is_none() {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let threads = (cores / self.local_world).max(1);
            // It fails only where the pool is there already, which then works as well.
            let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
        }
    }
}

/// A run in a batch script without `srun` trains alone, which may not be what was meant.
fn idle_tasks() -> Option<String> {
    let tasks = Environment::slurm_tasks_without_srun(&|name| std::env::var(name).ok())?;
    Some(format!(
        "this Slurm job has {tasks} tasks, of which this process is none: `srun finetune run …` trains on all"
    ))
}

pub(crate) fn read_token(file: &Path) -> Result<String, Failure> {
    let text = std::fs::read_to_string(file).map_err(|error| {
        Failure::arguments(
            format!("the token file {}: {error}", file.display()),
            "all ranks read the same token from it, at least 16 characters",
        )
    })?;
    Ok(text.trim().to_owned())
}

/// What ranks know each other by: a token, or on one machine what only this user can have.
pub(crate) fn secret(token: Option<&str>, world: usize) -> Result<Secret, Failure> {
    match token {
        Some(token) => Secret::from_token(token)
            .ok_or_else(|| Failure::arguments("the token is too short", "at least 16 characters")),
        None if world == 1 => Ok(Secret::loopback()),
        None => Secret::of_user().map_err(|error| {
            Failure::arguments(
                format!("there is no place for a secret that the ranks of this machine share: {error}"),
                format!("set TMPDIR to a directory of your own, or name a file with a token: {TOKEN_FILE}"),
            )
        }),
    }
}

/// A word about a token that is no secret. Kubernetes makes its files readable by a group, so it is no error.
fn readable_by_others(file: &Path) -> Option<String> {
    let mode = file.metadata().ok()?.permissions().mode() & 0o777;
    (mode & 0o077 != 0).then(|| {
        format!(
            "the token file {} can be read by others (mode {mode:o}), and whoever reads it may join: chmod 600 {}",
            file.display(),
            file.display()
        )
    })
}

fn no_token(world: usize) -> Failure {
    Failure::Arguments {
        message: format!("the {world} ranks are on several machines and have no token by which to know each other"),
        hints: vec![
            "put one into a file that only you can read and all ranks see: (umask 077; head -c 24 /dev/urandom | base64 > token)".into(),
            format!("then name the file: --token-file token, or the variable {TOKEN_FILE}"),
        ],
    }
}
