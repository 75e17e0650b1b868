//! What a launcher's variables say of this process: its rank, the number of ranks, and where rank 0
//! is.
//!
//! Six families of launchers are understood; none needs to know this program. Several may have left
//! their variables in one environment: `srun` starts `torchrun`, which starts us. So they are asked
//! in a fixed order: **the innermost first**, which can only have set its variables for this very
//! process.
//!
//! 1. `RANK`, `WORLD_SIZE`: torchrun, Ray, and scripts that copy another launcher's variables
//!    (`RANK=$SLURM_PROCID …`, SkyPilot's). An explicit setting has precedence over all others.
//! 2. `MLX_RANK` or `JACCL_RANK`: mlx.launch, which runs under no other launcher and starts none.
//! 3. `OMPI_COMM_WORLD_RANK`: Open MPI. In a Slurm job its daemons are a job step, so each of its
//!    ranks also carries the `SLURM_PROCID` of a daemon, which is no rank.
//! 4. `PMI_RANK`, `PMIX_RANK`: MPICH, Intel MPI, Cray's PALS, for the same reason. Slurm's own PMI
//!    plugins set them too. Then they repeat what Slurm says, and Slurm is asked, which also knows
//!    the hosts.
//! 5. `SLURM_PROCID`: srun.
//! 6. `PET_NODE_RANK`: Kubeflow's trainer, which sets torchrun's arguments, once for a whole pod.
//!
//! An empty variable counts as not set.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use finetune_allreduce::{DeviceMatrix, MAX_DEVICE_FILE_BYTES};

mod address;
mod error;
mod mlx;
mod mpi;
mod slurm;
mod torchrun;
mod variables;

#[cfg(test)]
mod tests;

pub use address::HostPort;
pub use error::EnvironmentError;

use variables::{Number, Variables};

/// What the variables say, checked: `rank < world`, `local_rank < local_world <= world`, and the
/// rendezvous is there if `world` is above 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Environment {
    pub(crate) rank: usize,
    /// The number of ranks.
    pub(crate) world: usize,
    /// The rank among the ranks of this host, from 0.
    pub(crate) local_rank: usize,
    /// The number of ranks on this host. If the launcher does not say it: all ranks if the
    /// rendezvous is on the loopback interface, otherwise as many as `local_rank` proves.
    pub(crate) local_world: usize,
    /// Where rank 0 listens. Under torchrun itself the port is not `MASTER_PORT`, which its agent
    /// holds, but one made from it.
    pub(crate) rendezvous: Option<HostPort>,
    pub(crate) launcher: Launcher,
    /// The RDMA devices between the ranks (`MLX_IBV_DEVICES`).
    pub(crate) devices: Option<DeviceMatrix>,
    /// The addresses of each rank, "ip:port" (`MLX_HOSTFILE`). Rank 0's first one is also the
    /// rendezvous, unless another is named.
    pub(crate) hosts: Option<Vec<Vec<String>>>,
    /// A mesh is to be run as a ring (`MLX_JACCL_RING`, whatever its value).
    pub(crate) prefer_ring: bool,
    /// The launcher's name for this job, if it has one: the same in all ranks of a job.
    pub(crate) job: Option<String>,
    /// A note that is worth a line.
    pub(crate) note: Option<String>,
}

/// Whose variables were read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// `RANK` and `WORLD_SIZE`.
    Torchrun,
    /// `PET_NODE_RANK` and `PET_NNODES`: Kubeflow's trainer.
    Kubeflow,
    /// `OMPI_COMM_WORLD_RANK`: Open MPI.
    OpenMpi,
    /// `PMI_RANK` or `PMIX_RANK`: MPICH, Intel MPI, Cray's PALS.
    Pmi,
    /// `SLURM_PROCID`: srun.
    Slurm,
    /// `MLX_RANK` or `JACCL_RANK`: mlx.launch.
    Mlx,
}

impl fmt::Display for Launcher {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Torchrun => "torchrun",
            Self::Kubeflow => "Kubeflow's trainer",
            Self::OpenMpi => "Open MPI's mpirun",
            Self::Pmi => "mpiexec",
            Self::Slurm => "srun",
            Self::Mlx => "mlx.launch",
        })
    }
}

impl Launcher {
    /// The variable that holds a process's rank.
    fn rank_variable(self) -> &'static str {
        match self {
            Self::Torchrun => "RANK",
            Self::Kubeflow => "PET_NODE_RANK",
            Self::OpenMpi => "OMPI_COMM_WORLD_RANK",
            Self::Pmi => "PMI_RANK",
            Self::Slurm => "SLURM_PROCID",
            Self::Mlx => "MLX_RANK",
        }
    }

    /// Its name in messages. A user who sets the variables by hand knows these, not torchrun.
    pub(crate) fn words(self) -> String {
        match self {
            Self::Torchrun => "RANK and WORLD_SIZE".to_owned(),
            other => other.to_string(),
        }
    }
}

/// What one launcher says, before it is checked.
struct Unchecked {
    launcher: Launcher,
    rank: Number,
    world: Number,
    local_rank: Option<Number>,
    local_world: Option<Number>,
    rendezvous: Option<HostPort>,
}

impl Environment {
    /// Reads the variables of a launcher. `Ok(None)`: no launcher started this process, it trains
    /// alone.
    ///
    /// `variables` and `files` stand for the process's environment and for the disk, so that tests
    /// need neither.
    pub(crate) fn read(
        variables: &dyn Fn(&str) -> Option<String>,
        files: &dyn Fn(&Path) -> io::Result<String>,
    ) -> Result<Option<Self>, EnvironmentError> {
        let variables = Variables::new(variables);
        let mlx = mlx::Files::read(&variables, files)?;
        let Some(unchecked) = unchecked(&variables, &mlx)? else {
            return mlx.without_rank().or_else(|| not_read(&variables)).map_or(Ok(None), Err);
        };
        let (job, note) = (job(&variables, unchecked.launcher), torchrun::more_processes(&variables, &unchecked));
        let environment = unchecked.checked(mlx)?;
        Ok(Some(Self { job, note, ..environment }))
    }

    /// [`Environment::read`] with this process's environment.
    pub(crate) fn of_process() -> Result<Option<Self>, EnvironmentError> {
        Self::read(&process_variable, &read_text)
    }

    /// The number of tasks of a Slurm job, if this process was started in the job without `srun`:
    /// from the batch script or an interactive shell. `Some` only if [`Environment::read`] returns
    /// `None`.
    pub(crate) fn slurm_tasks_without_srun(variables: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
        slurm::tasks_without_srun(&Variables::new(variables))
    }
}

fn process_variable(name: &str) -> Option<String> {
    // A value that is not UTF-8 is no number and no address. The error about it shows the
    // replacement characters.
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    // One byte above the limit is enough to see that it is exceeded.
    File::open(path)?.take(MAX_DEVICE_FILE_BYTES as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// The name of the job. torchrun writes "none" if there is no name.
fn job(variables: &Variables<'_>, launcher: Launcher) -> Option<String> {
    let names: &[&str] = match launcher {
        Launcher::Torchrun => &["TORCHELASTIC_RUN_ID"],
        Launcher::OpenMpi => &["PMIX_NAMESPACE"],
        Launcher::Slurm => return slurm::job(variables),
        Launcher::Kubeflow | Launcher::Pmi | Launcher::Mlx => &[],
    };
    variables.first(names).map(|job| job.value).filter(|job| job != "none")
}

/// The error that this is one of several processes of a launcher whose variables are not read: each would train alone.
fn not_read(variables: &Variables<'_>) -> Option<EnvironmentError> {
    const OTHERS: [(&str, &str); 3] = [
        ("HOROVOD_SIZE", "HOROVOD_RANK"),
        ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
        ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ];
    OTHERS.into_iter().find_map(|(name, rank)| {
        let world = variables.number(&[name]).ok()??.value;
        let is_started = world > 1 && variables.first(&[rank]).is_some();
        is_started.then_some(EnvironmentError::NotRead { name, world, rank })
    })
}

/// Rank and number of ranks by the launcher that started this process, if that launcher does not
/// set `RANK`.
fn started_as(variables: &Variables<'_>, mlx: &mlx::Files) -> Option<(Launcher, Number, Number)> {
    let of = |launcher, pair: Result<Option<(Number, Number)>, EnvironmentError>| {
        pair.ok().flatten().map(|(rank, world)| (launcher, rank, world))
    };
    of(Launcher::Mlx, mlx::rank_and_world(variables, mlx))
        .or_else(|| of(Launcher::OpenMpi, mpi::open_mpi_rank_and_world(variables)))
        .or_else(|| of(Launcher::Pmi, mpi::pmi_rank_and_world(variables)))
        .or_else(|| of(Launcher::Slurm, slurm::rank_and_world(variables)))
        .or_else(|| of(Launcher::Kubeflow, torchrun::kubeflow_rank_and_world(variables)))
}

/// The first launcher, from the innermost, that has set a rank.
fn unchecked(variables: &Variables<'_>, mlx: &mlx::Files) -> Result<Option<Unchecked>, EnvironmentError> {
    if let Some(unchecked) = torchrun::read(variables, mlx)? {
        return Ok(Some(unchecked));
    }
    if let Some(unchecked) = mlx::read(variables, mlx)? {
        return Ok(Some(unchecked));
    }
    if let Some(unchecked) = mpi::open_mpi(variables)? {
        return Ok(Some(unchecked));
    }
    if let Some(unchecked) = mpi::pmi(variables)? {
        return Ok(Some(unchecked));
    }
    if let Some(unchecked) = slurm::read(variables)? {
        return Ok(Some(unchecked));
    }
    torchrun::kubeflow(variables)
}

impl Unchecked {
    fn checked(self, mlx: mlx::Files) -> Result<Environment, EnvironmentError> {
        let (rank, world) = (self.rank.value, self.world.value);
        if rank >= world {
            return Err(EnvironmentError::rank_too_high(&self.rank, &self.world));
        }
        mlx.check_world(&self.world)?;
        if world > 1 && self.rendezvous.is_none() {
            let local_world = self.local_world.map(|local| local.value);
            return Err(EnvironmentError::NoAddress { launcher: self.launcher, rank, world, local_world });
        }
        let (local_rank, local_world) = self.local()?;
        Ok(Environment {
            rank,
            world,
            local_rank,
            local_world,
            rendezvous: self.rendezvous,
            launcher: self.launcher,
            prefer_ring: mlx.prefer_ring,
            devices: mlx.devices.map(|devices| devices.content),
            hosts: mlx.hosts.map(|hosts| hosts.content).filter(|hosts| !hosts.is_empty()),
            job: None,
            note: None,
        })
    }

    /// Rank and number of ranks on this host.
    fn local(&self) -> Result<(usize, usize), EnvironmentError> {
        let (rank, world) = (self.rank.value, self.world.value);
        let is_here = self.rendezvous.as_ref().map_or(world == 1, HostPort::is_loopback);
        let (local_rank, local_world) = match (&self.local_rank, &self.local_world) {
            (Some(local), None) if local.value >= world => {
                return Err(EnvironmentError::rank_too_high(local, &self.world));
            }
            (Some(local), Some(of)) if local.value >= of.value => {
                return Err(EnvironmentError::rank_too_high(local, of));
            }
            (_, Some(of)) if of.value > world => {
                let (world_name, world) = (self.world.name, world);
                return Err(EnvironmentError::TooManyHere { name: of.name, value: of.value, world_name, world });
            }
            (None, Some(of)) if of.value == 0 => {
                return Err(EnvironmentError::NoRanks { name: of.name, value: 0 });
            }
            // Otherwise all ranks would take local rank 0 and share a GPU.
            (None, Some(of)) if 1 < of.value && of.value < world && self.launcher == Launcher::Torchrun => {
                return Err(of.without("LOCAL_RANK", self.launcher));
            }
            (Some(local), Some(of)) => (local.value, of.value),
            (Some(local), None) => (local.value, if is_here { world } else { local.value + 1 }),
            (None, Some(of)) => (if of.value == world { rank } else { 0 }, of.value),
            (None, None) => (if is_here { rank } else { 0 }, if is_here { world } else { 1 }),
        };
        Ok((local_rank, local_world))
    }
}
