//! Adds RDMA to a group that already talks over TCP: who is cabled to whom, what can be used, and
//! what is said if not.
//!
//! All ranks decide together: each tells the others over TCP what it has, and all draw the same
//! conclusion. A rank that cannot have its device takes the whole group back to TCP, or to an error
//! if RDMA was asked for. A group within a group that goes over RDMA does so too, with queue pairs of
//! its own.

use finetune_rdma::{Limits, Offer, Prepared, QueuePairKind, WireDescription, WireOptions};
use serde::{Deserialize, Serialize};

use crate::choose::Reach;
use crate::config::{BackendChoice, Config};
use crate::devices::{DeviceMatrix, Shape};
use crate::engine::Network;
use crate::error::{GroupError, ranks};
use crate::frame::Algorithm;
use crate::group::Group;
use crate::join_error::JoinError;
use crate::notice::Notice;
use crate::transport::rdma::{Rdma, read_head};

/// The part of the cabling that is used.
struct Cabling {
    reach: Reach,
    /// Cables between two ranks; the same between all that are joined.
    wires: usize,
    /// This rank's devices for each peer.
    mine: Vec<Vec<String>>,
}

/// Uses RDMA for this group if `config` wants it and all ranks can.
///
/// # Errors
/// If the group fails, or RDMA was asked for and is not available.
pub(crate) fn attach(group: &Group, session: u64, config: &Config) -> Result<(), JoinError> {
    let Some(devices) = &config.rdma.devices else {
        let missing = "no device matrix says which device leads to which rank";
        return if config.backend == BackendChoice::Rdma { Err(JoinError::Rdma(missing.into())) } else { Ok(()) };
    };
    if config.backend == BackendChoice::Tcp {
        return Ok(());
    }
    let wired = match cabling(devices, config) {
        Ok(cabling) => {
            if cabling.reach == Reach::Neighbours && config.topology != Some(Algorithm::Ring) {
                let missing = words(devices, &devices.missing_for_mesh());
                let what = format!("data goes around a ring instead of over a mesh: {missing}");
                (config.notices)(Notice::FellBack { what });
            }
            wire(group, session, config, cabling)?
        }
        Err(why) => Err(why),
    };
    match wired {
        Ok(network) => {
            group.engine().networks.insert(0, network);
            group.measure_algorithms().map_err(JoinError::Group)
        }
        Err(why) => fall_back(config, "data goes over TCP", why),
    }
}

/// Whether RDMA is wanted and the cables of all ranks make no form for it, such as a chain: some ranks can use it.
pub(crate) fn is_for_some(config: &Config) -> bool {
    let devices = config.rdma.devices.as_ref().filter(|devices| devices.world() == config.world);
    config.backend != BackendChoice::Tcp && devices.is_some_and(|devices| devices.shape() == Shape::Neither)
}

/// Uses RDMA for a group within a group, if its ranks are cabled to each other. `config`: that of the first group.
///
/// # Errors
/// As [`attach`].
pub(crate) fn attach_within(group: &Group, session: u64, config: &Config) -> Result<(), JoinError> {
    let members = &group.inner.members;
    let Some(devices) = config.rdma.devices.as_ref().map(|devices| devices.between(members)) else { return Ok(()) };
    if devices.shape() == Shape::Neither {
        return Ok(());
    }
    let (rank, world) = (group.rank(), group.world());
    // Two ranks that reach each other are neighbours in any ring.
    let topology = config.topology.filter(|_| world > 2);
    let config = Config { rank, world, topology, ..config.clone() };
    let wired = match cabling(&devices, &config) {
        Ok(cabling) => wire(group, session, &config, cabling)?,
        Err(why) => Err(why),
    };
    match wired {
        Ok(network) => {
            group.engine().networks.insert(0, network);
            Ok(())
        }
        Err(why) => fall_back(&config, &format!("data between {} goes over TCP", ranks(members)), why),
    }
}

fn fall_back(config: &Config, what: &str, why: String) -> Result<(), JoinError> {
    if config.backend == BackendChoice::Rdma {
        return Err(JoinError::Rdma(why));
    }
    (config.notices)(Notice::FellBack { what: format!("{what}: {why}") });
    Ok(())
}

/// Connects the ranks of a group over RDMA, or says why they cannot: the same on all of them.
///
/// # Errors
/// If the group fails.
fn wire(group: &Group, session: u64, config: &Config, cabling: Cabling) -> Result<Result<Network, String>, JoinError> {
    let failed = JoinError::Group;
    let options = WireOptions {
        kind: if config.rdma.reliable { QueuePairKind::Reliable } else { QueuePairKind::Unreliable },
        ..WireOptions::default()
    };
    let strict = config.rdma.strict.then(Limits::apple);
    let prepared = Prepared::new(config.rank, &cabling.mine, &options, strict.as_ref());
    let (prepared, outcome) = match prepared {
        Ok((prepared, offer)) => (Some(prepared), Outcome { offer: Some(offer), failed: None }),
        Err(error) => (None, Outcome { offer: None, failed: Some(error.to_string()) }),
    };
    let offers = match exchange(group, &outcome).map_err(failed)? {
        Ok(offers) => offers,
        Err(why) => return Ok(Err(why)),
    };
    let offers: Vec<Offer> = offers.into_iter().filter_map(|outcome| outcome.offer).collect();
    let connected = match prepared {
        Some(prepared) if offers.len() == config.world => prepared.connect(&offers, read_head),
        _ => return Ok(Err("a rank made no offer".into())),
    };
    // People know ranks by their numbers in the first group.
    let connected = connected.map_err(|error| error.with_ranks(&group.inner.members));
    let outcome = Outcome { offer: None, failed: connected.as_ref().err().map(ToString::to_string) };
    // After this exchange every rank has posted its receives.
    if let Err(why) = exchange(group, &outcome).map_err(failed)? {
        return Ok(Err(why));
    }
    let connected = match connected {
        Ok(connected) => connected,
        Err(error) => return Ok(Err(error.to_string())),
    };
    for wire in connected.descriptions() {
        let wire = WireDescription { peer: group.inner.members[wire.peer], ..wire.clone() };
        (config.notices)(Notice::Wired { wire: wire.to_string() });
    }
    let Cabling { reach, wires, .. } = cabling;
    let rdma = Box::new(Rdma::new(connected));
    Ok(Ok(Network::new(rdma, config.rank, config.world, session, reach, wires, config.topology)))
}

/// What a rank could do.
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    offer: Option<Offer>,
    failed: Option<String>,
}

/// All ranks' outcomes; or the first failure, as text for people.
fn exchange(group: &Group, mine: &Outcome) -> Result<Result<Vec<Outcome>, String>, GroupError> {
    let mine = serde_json::to_vec(mine).expect("outcomes are plain data");
    let mut lengths = vec![0u64; group.world()];
    group.all_gather(&[mine.len() as u64], &mut lengths)?;
    let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
    let mut padded = mine;
    padded.resize(longest, b' ');
    let mut all = vec![0u8; longest * group.world()];
    group.all_gather(&padded, &mut all)?;
    let mut outcomes = Vec::new();
    for (rank, text) in all.chunks_exact(longest.max(1)).enumerate() {
        let rank = group.inner.members[rank];
        let outcome: Outcome = match serde_json::from_slice(text) {
            Ok(outcome) => outcome,
            Err(error) => return Ok(Err(format!("what rank {rank} says of its devices makes no sense: {error}"))),
        };
        if let Some(why) = &outcome.failed {
            let host = group.who().get(rank).map_or("?", |who| who.host.as_str());
            return Ok(Err(format!("rank {rank} ({host}): {why}")));
        }
        outcomes.push(outcome);
    }
    Ok(Ok(outcomes))
}

/// What is missing between these pairs.
fn words(devices: &DeviceMatrix, pairs: &[(usize, usize)]) -> String {
    pairs.iter().map(|&(a, b)| devices.cables_between(a, b)).collect::<Vec<_>>().join(", ")
}

/// What of the matrix is used, or why nothing is.
fn cabling(devices: &DeviceMatrix, config: &Config) -> Result<Cabling, String> {
    let (rank, world) = (config.rank, config.world);
    if devices.world() != world {
        return Err(format!("the device matrix is for {} ranks, this group has {world}", devices.world()));
    }
    let neighbours = |peer: usize| peer == (rank + 1) % world || peer == (rank + world - 1) % world;
    let ring_asked = config.topology == Some(Algorithm::Ring);
    let ring = devices.missing_for_ring().is_empty();
    let (reach, used): (Reach, &dyn Fn(usize) -> bool) = match devices.shape() {
        Shape::Mesh if !(ring_asked && ring) => (Reach::Pairs, &|peer| peer != rank),
        Shape::Mesh | Shape::Ring => (Reach::Neighbours, &neighbours),
        Shape::Neither => {
            return Err(format!(
                "the cables make neither a mesh nor a closed ring: {}",
                words(devices, &devices.missing_for_ring())
            ));
        }
    };
    // A ring uses the same number of cables all around, a mesh between all pairs: the fewest that
    // any two have.
    let joined = |a: usize, b: usize| a != b && (reach == Reach::Pairs || b == (a + 1) % world);
    let counts = (0..world).flat_map(|a| (0..world).map(move |b| (a, b))).filter(|&(a, b)| joined(a, b));
    let wires = counts.map(|(a, b)| devices.wires(a, b).len()).min().unwrap_or(0);
    let mine = (0..world)
        .map(|peer| if peer != rank && used(peer) { devices.wires(rank, peer)[..wires].to_vec() } else { Vec::new() })
        .collect();
    Ok(Cabling { reach, wires, mine })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    /// Where all ranks use RDMA, or none is to, it is not for some of them.
    #[test]
    fn a_chain_has_rdma_for_some() {
        let chain = r#"[[null,"a",null],["a",null,"b"],[null,"b",null]]"#;
        let mesh = r#"[[null,"a","b"],["a",null,"b"],["a","b",null]]"#;
        for (devices, world, backend, want) in [
            (Some(chain), 3, BackendChoice::Auto, true),
            (Some(chain), 3, BackendChoice::Tcp, false),
            (Some(chain), 2, BackendChoice::Auto, false),
            (Some(mesh), 3, BackendChoice::Auto, false),
            (None, 3, BackendChoice::Auto, false),
        ] {
            let mut config = Config { backend, ..Config::new(0, world, "", Secret::loopback()) };
            config.rdma.devices = devices.map(|text| DeviceMatrix::parse(text).expect("a matrix"));
            assert_eq!(is_for_some(&config), want, "{devices:?} {world} {backend:?}");
        }
    }
}
