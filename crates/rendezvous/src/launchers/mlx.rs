//! MLX's variables: two files that describe the group, and the rank in it.
//!
//! mlx.launch writes the files into the temporary directory of each host: `MLX_HOSTFILE` (backend
//! "ring") with the addresses of each rank, `MLX_IBV_DEVICES` (backend "jaccl") with the devices
//! between them. They are read under any launcher; with another one they add to what it says.
//! (ml-explore/mlx, python/mlx/_distributed_utils/launch.py and
//! mlx/distributed/jaccl/lib/jaccl/jaccl.cpp, which also gives `JACCL_` names precedence over
//! `MLX_` ones.)

use std::io;
use std::path::{Path, PathBuf};

use finetune_allreduce::{DeviceMatrix, MAX_DEVICE_FILE_BYTES};
use serde_json::Value;

use super::address::{self, HostPort, pair};
use super::error::{EnvironmentError, shown};
use super::torchrun::{MASTER_ADDR, MASTER_PORT};
use super::variables::{Number, Variables};
use super::{Launcher, Unchecked};

const HOSTFILE: &str = "MLX_HOSTFILE";
const DEVICES: [&str; 2] = ["JACCL_IBV_DEVICES", "MLX_IBV_DEVICES"];
const RANK: [&str; 2] = ["JACCL_RANK", "MLX_RANK"];
const COORDINATOR: [&str; 2] = ["JACCL_COORDINATOR", "MLX_JACCL_COORDINATOR"];
const RING: [&str; 2] = ["JACCL_RING", "MLX_JACCL_RING"];

/// A file that a variable names.
pub(super) struct Named<T> {
    name: &'static str,
    path: PathBuf,
    pub(super) content: T,
}

pub(super) struct Files {
    pub(super) devices: Option<Named<DeviceMatrix>>,
    /// Empty for a single rank, for which mlx.launch writes an empty file.
    pub(super) hosts: Option<Named<Vec<Vec<String>>>>,
    pub(super) prefer_ring: bool,
}

impl Files {
    pub(super) fn read(
        variables: &Variables<'_>,
        files: &dyn Fn(&Path) -> io::Result<String>,
    ) -> Result<Self, EnvironmentError> {
        let read = |names: &[&'static str]| {
            variables.first(names).map(|setting| {
                let (name, path) = (setting.name, PathBuf::from(setting.value));
                match files(&path) {
                    Ok(content) => Ok(Named { name, path, content }),
                    Err(source) => Err(EnvironmentError::Unreadable { name, path, source }),
                }
            })
        };
        let devices =
            read(&DEVICES).transpose()?.map(|Named { name, path, content }| match DeviceMatrix::parse(&content) {
                Ok(content) => Ok(Named { name, path, content }),
                Err(source) => Err(EnvironmentError::Devices { name, path, source }),
            });
        let hosts = read(&[HOSTFILE]).transpose()?.map(|Named { name, path, content }| match hosts(&content) {
            Ok(content) => Ok(Named { name, path, content }),
            Err(what) => Err(EnvironmentError::Hosts { name, path, what }),
        });
        let prefer_ring = RING.iter().any(|name| variables.exists(name));
        Ok(Self { devices: devices.transpose()?, hosts: hosts.transpose()?, prefer_ring })
    }

    /// The error that there is a group but no rank in it.
    pub(super) fn without_rank(&self) -> Option<EnvironmentError> {
        let devices = self.devices.as_ref().map(|file| (file.name, &file.path));
        let (name, path) = devices.or_else(|| self.hosts.as_ref().map(|file| (file.name, &file.path)))?;
        let value = shown(&path.to_string_lossy());
        Some(EnvironmentError::Missing { name, value, missing: RANK[1], launcher: Launcher::Mlx })
    }

    pub(super) fn check_world(&self, world: &Number) -> Result<(), EnvironmentError> {
        match self.worlds().into_iter().flatten().find(|(_, _, ranks)| *ranks != world.value) {
            None => Ok(()),
            Some((name, path, ranks)) => Err(EnvironmentError::WorldMismatch {
                name,
                path: path.to_path_buf(),
                ranks,
                world_name: world.name,
                world: world.value,
            }),
        }
    }

    /// The number of ranks that each file is for.
    fn worlds(&self) -> [Option<(&'static str, &Path, usize)>; 2] {
        let devices = self.devices.as_ref().map(|file| (file.name, &*file.path, file.content.world()));
        let hosts = self.hosts.as_ref().map(|file| (file.name, &*file.path, file.content.len().max(1)));
        [devices, hosts]
    }
}

pub(super) fn rank_and_world(
    variables: &Variables<'_>,
    files: &Files,
) -> Result<Option<(Number, Number)>, EnvironmentError> {
    let Some(rank) = variables.number(&RANK)? else {
        return Ok(None);
    };
    let world = match variables.number(&["MLX_WORLD_SIZE"])? {
        Some(world) => world,
        None => match files.worlds().into_iter().flatten().next() {
            Some((name, _, value)) => Number { name, value },
            None => return Err(rank.without(HOSTFILE, Launcher::Mlx)),
        },
    };
    Ok(Some((rank, world)))
}

pub(super) fn read(variables: &Variables<'_>, files: &Files) -> Result<Option<Unchecked>, EnvironmentError> {
    let launcher = Launcher::Mlx;
    let Some((rank, world)) = rank_and_world(variables, files)? else {
        return Ok(None);
    };
    let rendezvous = rendezvous(variables, files)?;
    let (local_rank, local_world) = local(files, &rank).unzip();
    Ok(Some(Unchecked { launcher, rank, world, local_rank, local_world, rendezvous }))
}

fn rendezvous(variables: &Variables<'_>, files: &Files) -> Result<Option<HostPort>, EnvironmentError> {
    if let Some(setting) = variables.first(&COORDINATOR) {
        return HostPort::of_pair(&setting).map(Some);
    }
    // Checked when it was read.
    let first = files.hosts.as_ref().and_then(|hosts| hosts.content.first()?.first());
    if let Some(rendezvous) = first.and_then(|address| pair(address).ok()) {
        return Ok(Some(rendezvous));
    }
    // What mlx.launch sets for its backend "nccl", then what any launcher may set.
    for (host, port) in [("NCCL_HOST_IP", "NCCL_PORT"), (MASTER_ADDR, MASTER_PORT)] {
        if let (Some(host), Some(port)) = (address::host(variables, &[host])?, address::port(variables, &[port])?) {
            return Ok(Some(HostPort { host, port }));
        }
    }
    Ok(None)
}

/// The local rank of this rank among those with its first address, and their number.
fn local(files: &Files, rank: &Number) -> Option<(Number, Number)> {
    let hosts = &files.hosts.as_ref()?.content;
    let host = |addresses: &Vec<String>| pair(addresses.first()?).ok().map(|pair| pair.host);
    let here = host(hosts.get(rank.value)?)?;
    let count =
        |ranks: &[Vec<String>]| ranks.iter().filter(|addresses| host(addresses).as_ref() == Some(&here)).count();
    let number = |value| Number { name: HOSTFILE, value };
    Some((number(count(&hosts[..rank.value])), number(count(hosts))))
}

/// Reads `[["ip:port", …], …]`, a list for each rank.
fn hosts(text: &str) -> Result<Vec<Vec<String>>, String> {
    if text.len() > MAX_DEVICE_FILE_BYTES {
        return Err(format!("{} bytes are too long for it, the limit is {MAX_DEVICE_FILE_BYTES}", text.len()));
    }
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let value: Value = serde_json::from_str(text).map_err(|error| format!("it is not JSON: {error}"))?;
    let ranks = value.as_array().ok_or("it is not a list")?;
    let addresses = |(rank, value): (usize, &Value)| {
        let addresses = value.as_array().filter(|addresses| !addresses.is_empty());
        let addresses = addresses.ok_or_else(|| format!("rank {rank} has no list of addresses"))?;
        let address = |value: &Value| {
            let address = value.as_str().ok_or_else(|| format!("rank {rank} has an address that is not a string"))?;
            pair(address).map_err(|what| format!("rank {rank} has the address {}: {what}", shown(address)))?;
            Ok(address.to_owned())
        };
        addresses.iter().map(address).collect()
    };
    ranks.iter().enumerate().map(addresses).collect()
}
