//! The variables of MPI's launchers. They say the rank but not where rank 0 is. MPI programs learn
//! that from the launcher's daemons, which this program does not talk to.
//!
//! Open MPI 4.1 and 5.0 set `OMPI_COMM_WORLD_{RANK,SIZE,LOCAL_RANK,LOCAL_SIZE}` (docs.open-mpi.org,
//! "Environment variables set for MPI applications") and, through PMIx, `PMIX_NAMESPACE`, the name
//! of the job: a number in 4.1 (seen under 4.1.4: "414449665"), a text in 5.0.
//!
//! MPICH and Intel MPI set `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALRANKID` and `MPI_LOCALNRANKS`, and no
//! name of the job: two such jobs on one host need a `MASTER_PORT` each. (pmodels/mpich,
//! src/pm/hydra/proxy/pmip_cb.c; seen under 4.0.2.) Cray's PALS also sets `PMI_LOCAL_RANK` and
//! `PMI_LOCAL_SIZE`.

use super::address::{self, DEFAULT_PORT, HostPort, port_of_job};
use super::error::EnvironmentError;
use super::torchrun::{MASTER_ADDR, MASTER_PORT};
use super::variables::{Number, Variables};
use super::{Launcher, Unchecked, slurm};

pub(super) fn open_mpi(variables: &Variables<'_>) -> Result<Option<Unchecked>, EnvironmentError> {
    let launcher = Launcher::OpenMpi;
    let Some((rank, world)) = open_mpi_rank_and_world(variables)? else {
        return Ok(None);
    };
    let local_rank = variables.number(&["OMPI_COMM_WORLD_LOCAL_RANK"])?;
    let local_world = variables.number(&["OMPI_COMM_WORLD_LOCAL_SIZE"])?;
    let rendezvous = rendezvous(variables, &world, local_world.as_ref())?;
    Ok(Some(Unchecked { launcher, rank, world, local_rank, local_world, rendezvous }))
}

pub(super) fn open_mpi_rank_and_world(variables: &Variables<'_>) -> Result<Option<(Number, Number)>, EnvironmentError> {
    variables.rank_and_world(Launcher::OpenMpi, &["OMPI_COMM_WORLD_RANK"], &["OMPI_COMM_WORLD_SIZE"])
}

pub(super) fn pmi_rank_and_world(variables: &Variables<'_>) -> Result<Option<(Number, Number)>, EnvironmentError> {
    let rank = variables.number(&["PMI_RANK", "PMIX_RANK"])?;
    let world = variables.number(&["PMI_SIZE"])?;
    if is_slurms(variables, rank.as_ref(), world.as_ref())? {
        return Ok(None);
    }
    Number::pair(rank, world, Launcher::Pmi, "PMI_RANK", "PMI_SIZE")
}

pub(super) fn pmi(variables: &Variables<'_>) -> Result<Option<Unchecked>, EnvironmentError> {
    let launcher = Launcher::Pmi;
    let Some((rank, world)) = pmi_rank_and_world(variables)? else {
        return Ok(None);
    };
    let local_rank = variables.number(&["MPI_LOCALRANKID", "PMI_LOCAL_RANK"])?;
    let local_world = variables.number(&["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"])?;
    let rendezvous = rendezvous(variables, &world, local_world.as_ref())?;
    Ok(Some(Unchecked { launcher, rank, world, local_rank, local_world, rendezvous }))
}

/// Whether these are from a PMI plugin of Slurm: pmix sets `PMIX_RANK` alone, pmi2 `PMI_RANK` and
/// `PMI_SIZE`, both the same as Slurm's own. An mpiexec that runs its daemons as a job step has a
/// rank and a size of its own.
fn is_slurms(
    variables: &Variables<'_>,
    rank: Option<&Number>,
    world: Option<&Number>,
) -> Result<bool, EnvironmentError> {
    if !variables.exists("SLURM_PROCID") {
        return Ok(false);
    }
    let (Some(rank), Some(world)) = (rank, world) else {
        return Ok(true);
    };
    let step = slurm::rank_and_world(variables)?;
    Ok(step.is_some_and(|(of_step, tasks)| of_step.value == rank.value && tasks.value == world.value))
}

fn rendezvous(
    variables: &Variables<'_>,
    world: &Number,
    local_world: Option<&Number>,
) -> Result<Option<HostPort>, EnvironmentError> {
    let host = address::host(variables, &[MASTER_ADDR])?;
    let port = address::port(variables, &[MASTER_PORT])?;
    let is_here = local_world.is_some_and(|local| local.value == world.value);
    let Some(host) = host.or_else(|| is_here.then(|| "127.0.0.1".to_owned())) else {
        return Ok(None);
    };
    let job = || variables.first(&["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID"]);
    let port = port.or_else(|| job().map(|job| port_of_job(&job.value))).unwrap_or(DEFAULT_PORT);
    Ok(Some(HostPort { host, port }))
}
