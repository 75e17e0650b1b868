//! Groups within a group.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::choose::Reach;
use crate::config::Config;
use crate::connector::Connector;
use crate::engine::Network;
use crate::frame::Algorithm;
use crate::group::Group;
use crate::handshake::Purpose;
use crate::join_error::JoinError;
use crate::listener::Listener;
use crate::rdma_group;
use crate::roster::Member;
use crate::same_machine::data_links;
use crate::transport::Backend;
use crate::transport::in_process::{self, InProcess};
use crate::transport::tcp::Tcp;

/// How the ranks of a group connect again for a group within it.
#[derive(Clone)]
pub(crate) enum SplitContext {
    Processes(Arc<Processes>),
    Threads { topology: Option<Algorithm>, waiting: Arc<Mutex<BTreeMap<u64, Vec<Option<InProcess>>>>> },
}

pub(crate) struct Processes {
    config: Config,
    listener: Listener,
    members: Vec<Member>,
    streams: usize,
    session: u64,
}

impl SplitContext {
    pub(crate) fn processes(
        config: &Config,
        listener: Listener,
        members: Vec<Member>,
        streams: usize,
        session: u64,
    ) -> SplitContext {
        SplitContext::Processes(Arc::new(Processes { config: config.clone(), listener, members, streams, session }))
    }

    pub(crate) fn threads(topology: Option<Algorithm>) -> SplitContext {
        SplitContext::Threads { topology, waiting: Arc::default() }
    }
}

impl Group {
    /// Splits the group: ranks that pass the same `color` form a new one, ordered by `key`, then by
    /// rank. Every rank of this group must call it. The new group goes over what this one goes over: RDMA between ranks
    /// that are cabled to each other, otherwise TCP (or between threads). Where the cables of all ranks make neither a
    /// mesh nor a ring, so that this group goes over TCP, ranks that are cabled to each other use RDMA all the same. It
    /// fails together with this one.
    ///
    /// # Errors
    /// If the group has failed, or the ranks of the new one cannot connect, or they were to use RDMA and cannot.
    pub fn split(&self, color: u64, key: u64) -> Result<Group, JoinError> {
        let failed = JoinError::Group;
        let mut all = vec![[0u64; 2]; self.world()];
        self.all_gather(&[[color, key]], &mut all).map_err(failed)?;
        let mut ranks: Vec<usize> = (0..self.world()).filter(|&rank| all[rank][0] == color).collect();
        ranks.sort_by_key(|&rank| (all[rank][1], rank));
        let rank = ranks.iter().position(|&rank| rank == self.rank()).expect("this rank has its own color");
        let members: Arc<Vec<usize>> = Arc::new(ranks.iter().map(|&rank| self.inner.members[rank]).collect());
        let split = self.inner.splits.fetch_add(1, Ordering::Relaxed);
        let context = Arc::clone(&self.inner.context);
        let (session, network) = match &self.inner.split_context {
            SplitContext::Threads { topology, waiting } => {
                let session = session_of(0, &self.inner.members, split, color);
                let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
                let places = waiting
                    .entry(session)
                    .or_insert_with(|| in_process::connect(ranks.len(), 1).into_iter().map(Some).collect());
                let transport = places[rank].take().expect("each rank takes its place once");
                if places.iter().all(Option::is_none) {
                    waiting.remove(&session);
                }
                let transport = Box::new(transport);
                (session, Network::new(transport, rank, ranks.len(), session, Reach::Pairs, 1, *topology))
            }
            SplitContext::Processes(processes) => {
                let session = session_of(processes.session, &self.inner.members, split, color);
                let check = || self.check().map_err(failed);
                (session, processes.connect(session, rank, &members, &check)?)
            }
        };
        let split_context = self.inner.split_context.clone();
        let group = Group::assemble(rank, session, vec![network], members, context, split_context);
        if group.world() > 1 {
            group.barrier().map_err(failed)?;
            // What all ranks of this group have agreed on.
            if let SplitContext::Processes(processes) = &self.inner.split_context
                && (self.backend() == Backend::Rdma || rdma_group::is_for_some(&processes.config))
            {
                rdma_group::attach_within(&group, session, &processes.config)?;
            }
        }
        Ok(group)
    }
}

impl Processes {
    fn connect(
        &self,
        session: u64,
        rank: usize,
        members: &[usize],
        check: &dyn Fn() -> Result<(), JoinError>,
    ) -> Result<Network, JoinError> {
        let Processes { config, listener, members: all, .. } = self;
        let deadline = Instant::now() + config.join_timeout;
        // A frozen member must not delay a try for much longer than until it is declared lost.
        let patience = config.timeout / 8;
        let connector = Connector::new(config, all, listener, deadline, patience, check);
        let mut connections = Vec::new();
        for &peer in members {
            let links = (0..self.streams).filter(|_| peer != config.rank);
            let links = links.map(|stream| connector.connect(peer, |to| Purpose::Data { session, stream, to }));
            connections.push((peer, links.collect::<Result<Vec<_>, _>>()?));
        }
        let links = data_links(config, connections, deadline, check)?;
        let hosts = members.iter().filter(|&&member| all[member].host == config.host).count();
        let tcp = Tcp::new(links, &config.tcp, hosts)
            .map_err(|error| JoinError::System { what: "a data connection cannot be set up", error })?;
        let (world, wires) = (members.len(), self.streams);
        Ok(Network::new(Box::new(tcp), rank, world, session, Reach::Pairs, wires, config.topology))
    }
}

/// The number of a new group. All its ranks compute the same one without talking.
fn session_of(parent: u64, members: &[usize], split: u64, color: u64) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for number in [parent, split, color].into_iter().chain(members.iter().map(|&member| member as u64)) {
        hasher.update(&number.to_le_bytes());
    }
    u64::from_le_bytes(hasher.finalize().as_bytes()[..8].try_into().expect("eight bytes"))
}
