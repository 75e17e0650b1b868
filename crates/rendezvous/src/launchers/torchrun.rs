//! `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`: torchrun's variables, which most launchers
//! for training set.

use super::address::{self, HostPort, port_of_job};
use super::error::{EnvironmentError, shown};
use super::variables::{Number, Variables};
use super::{Launcher, Unchecked, mlx, started_as};

pub(super) const MASTER_ADDR: &str = "MASTER_ADDR";
pub(super) const MASTER_PORT: &str = "MASTER_PORT";
const PET_MASTER_ADDR: [&str; 2] = ["PET_MASTER_ADDR", MASTER_ADDR];
const PET_MASTER_PORT: [&str; 2] = ["PET_MASTER_PORT", MASTER_PORT];

pub(super) fn read(variables: &Variables<'_>, mlx: &mlx::Files) -> Result<Option<Unchecked>, EnvironmentError> {
    let launcher = Launcher::Torchrun;
    let (rank, world) = (variables.number(&["RANK"])?, variables.number(&["WORLD_SIZE"])?);
    let started_as = if is_torchruns(variables) { None } else { started_as(variables, mlx) };
    // Scripts export WORLD_SIZE for programs that read the rank from Slurm or MPI, as this one does
    // then.
    if let (None, Some(world), Some((_, _, tasks))) = (&rank, &world, &started_as)
        && world.value == tasks.value
    {
        return Ok(None);
    }
    if let (Some(world), Some((by, their_rank, tasks))) = (&world, &started_as) {
        EnvironmentError::agree(rank.as_ref(), world, *by, their_rank, tasks)?;
    }
    let Some((rank, world)) = Number::pair(rank, world, launcher, "RANK", "WORLD_SIZE")? else {
        return Ok(None);
    };
    Ok(Some(Unchecked {
        launcher,
        rank,
        world,
        local_rank: variables.number(&["LOCAL_RANK"])?,
        local_world: variables.number(&["LOCAL_WORLD_SIZE"])?,
        rendezvous: rendezvous(variables, &[MASTER_ADDR], &[MASTER_PORT])?,
    }))
}

/// torchrun numbers its workers itself, whatever started torchrun.
fn is_torchruns(variables: &Variables<'_>) -> bool {
    variables.first(&["TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"]).is_some()
}

/// A note if `WORLD_SIZE` counts several processes per pod and torchrun did not start this one.
pub(super) fn more_processes(variables: &Variables<'_>, unchecked: &Unchecked) -> Option<String> {
    let each = variables.number(&["PET_NPROC_PER_NODE"]).ok().flatten()?;
    let (world, each) = (unchecked.world.value, each.value);
    let by_hand = unchecked.world.name == "WORLD_SIZE" && unchecked.local_world.is_none() && !is_torchruns(variables);
    (by_hand && each > 1 && world > 1 && world.is_multiple_of(each)).then(|| {
        format!(
            "WORLD_SIZE={world} counts {each} processes for each of {} pods (PET_NPROC_PER_NODE={each}). If this is the only one in its pod, set nprocPerNode to 1 or let torchrun start it",
            world / each
        )
    })
}

/// Kubeflow's trainer sets torchrun's arguments as variables, for one process per pod. If that
/// process is this program and not torchrun, a pod is a rank. `PET_NPROC_PER_NODE` is for torchrun
/// and does not count here. (kubeflow/trainer, pkg/runtime/framework/plugins/torch/torch.go.)
pub(super) fn kubeflow(variables: &Variables<'_>) -> Result<Option<Unchecked>, EnvironmentError> {
    let Some((rank, world)) = kubeflow_rank_and_world(variables)? else {
        return Ok(None);
    };
    let rendezvous = rendezvous(variables, &PET_MASTER_ADDR, &PET_MASTER_PORT)?;
    let launcher = Launcher::Kubeflow;
    Ok(Some(Unchecked { launcher, rank, world, local_rank: None, local_world: None, rendezvous }))
}

pub(super) fn kubeflow_rank_and_world(variables: &Variables<'_>) -> Result<Option<(Number, Number)>, EnvironmentError> {
    let launcher = Launcher::Kubeflow;
    // An elastic job has PET_NNODES="1:3" and no node rank: only torchrun can join that.
    let Some(rank) = variables.number(&["PET_NODE_RANK"])? else {
        return match variables.first(&["PET_NNODES"]) {
            Some(nodes) if nodes.value != "1" => Err(EnvironmentError::Missing {
                name: nodes.name,
                value: shown(&nodes.value),
                missing: "PET_NODE_RANK",
                launcher,
            }),
            _ => Ok(None),
        };
    };
    let world = variables.number(&["PET_NNODES"])?.ok_or_else(|| rank.without("PET_NNODES", launcher))?;
    Ok(Some((rank, world)))
}

fn rendezvous(
    variables: &Variables<'_>,
    hosts: &[&'static str],
    ports: &[&'static str],
) -> Result<Option<HostPort>, EnvironmentError> {
    let host = address::host(variables, hosts)?;
    let port = address::port(variables, ports)?;
    let Some(host) = host else {
        return Ok(None);
    };
    let Some(port) = port else {
        let launcher = Launcher::Torchrun;
        return Err(EnvironmentError::Missing { name: hosts[0], value: host, missing: ports[0], launcher });
    };
    // torchrun's agent listens on MASTER_PORT of rank 0's host, and its workers are to be clients
    // of it. Every rank makes another port from that one. (torch/distributed/rendezvous.py,
    // `_torchelastic_use_agent_store`; Python writes the truth value.)
    let is_taken = variables.first(&["TORCHELASTIC_USE_AGENT_STORE"]).is_some_and(|setting| setting.value == "True");
    let port = if is_taken { port_of_job(&port.to_string()) } else { port };
    Ok(Some(HostPort { host, port }))
}
