//! Which data connections lead through memory: those between two processes of one machine.
//!
//! The caller makes the memory and offers it over the connection; the callee opens it and says
//! whether it could. Ranks that share an address may still be on two machines (a tunnel), in two
//! containers or of two users: then the callee cannot open what was offered, and the connection
//! carries the data itself. The connection stays open in any case: over it the two wake each other,
//! and it closes when one of them ends.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use finetune_memory_pipe::{NONCE_BYTES, Offer, Pipe};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::frame::HEADER_BYTES;
use crate::handshake::{HandshakeError, Trusted};
use crate::join_error::JoinError;
use crate::random_bytes::random_bytes;
use crate::transport::tcp::MEMORY_FRAME;

/// Bytes that a pipe holds in each direction: a frame with its header, so that ranks that share a core
/// pass on a whole one each time. The pipes of eight ranks stay in the processor's cache.
const CAPACITY: usize = MEMORY_FRAME + HEADER_BYTES;

/// Between two looks at whether the group has failed.
const LOOK: Duration = Duration::from_millis(50);

/// How long a closed connection is given to be explained by its rank's death.
const EXPLANATION: Duration = Duration::from_secs(1);

/// A connection that carries data, itself or through memory.
pub(crate) struct DataLink {
    pub(crate) stream: TcpStream,
    pub(crate) pipe: Option<Pipe>,
}

/// The connections to each rank that are to carry data.
pub(crate) type Connections = Vec<(usize, Vec<Trusted>)>;

/// What the caller says first.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Proposal {
    /// The connection carries the data.
    Connection,
    /// This memory does, if the callee can open it.
    Memory { pid: u32, descriptor: i32, capacity: usize, nonce: [u8; NONCE_BYTES] },
}

/// What the callee answers to an offer of memory.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Taken,
    Declined,
}

/// Makes data links of the connections to some ranks, each with that rank. All of them have to be
/// there: nobody waits for a rank that still waits for others.
///
/// # Errors
/// If a rank ends, says nothing until the deadline, or the group has failed.
pub(crate) fn data_links(
    config: &Config,
    connections: Connections,
    deadline: Instant,
    check: &dyn Fn() -> Result<(), JoinError>,
) -> Result<Vec<Vec<DataLink>>, JoinError> {
    let agreement = Agreement { config, deadline, check };
    let mut offered = Vec::new();
    for (peer, links) in connections {
        let offer = |trusted| agreement.offer(peer, trusted);
        offered.push((peer, links.into_iter().map(offer).collect::<Result<Vec<_>, _>>()?));
    }
    let mut answered = Vec::new();
    for (peer, links) in offered {
        let answer = |(trusted, pipe)| agreement.answer(peer, trusted, pipe);
        answered.push((peer, links.into_iter().map(answer).collect::<Result<Vec<_>, _>>()?));
    }
    let mut agreed = Vec::new();
    for (peer, links) in answered {
        let settle = |(trusted, pipe)| agreement.settle(peer, trusted, pipe);
        agreed.push(links.into_iter().map(settle).collect::<Result<Vec<_>, _>>()?);
    }
    Ok(agreed)
}

/// Memory that this rank made, and the file that keeps it open for the other.
type Made = (Pipe, std::fs::File);

/// Memory that this rank made, or opened, for one connection.
enum Memory {
    None,
    Made(Made),
    Opened(Pipe),
}

struct Agreement<'a> {
    config: &'a Config,
    deadline: Instant,
    check: &'a dyn Fn() -> Result<(), JoinError>,
}

impl Agreement<'_> {
    fn calls(&self, peer: usize) -> bool {
        peer < self.config.rank
    }

    fn offer(&self, peer: usize, mut trusted: Trusted) -> Result<(Trusted, Memory), JoinError> {
        if !self.calls(peer) {
            return Ok((trusted, Memory::None));
        }
        let made = if self.config.tcp.shared_memory && is_same_address(&trusted.stream) { made() } else { None };
        let (proposal, memory) = match made {
            Some((pipe, offer, file)) => {
                let Offer { pid, descriptor, capacity, nonce } = offer;
                (Proposal::Memory { pid, descriptor, capacity, nonce }, Memory::Made((pipe, file)))
            }
            None => (Proposal::Connection, Memory::None),
        };
        trusted.send(&proposal, self.deadline).map_err(|error| self.failed(peer, &error))?;
        Ok((trusted, memory))
    }

    fn answer(&self, peer: usize, mut trusted: Trusted, memory: Memory) -> Result<(Trusted, Memory), JoinError> {
        if self.calls(peer) {
            return Ok((trusted, memory));
        }
        let Proposal::Memory { pid, descriptor, capacity, nonce } = self.hear(peer, &mut trusted)? else {
            return Ok((trusted, Memory::None));
        };
        let offer = Offer { pid, descriptor, capacity, nonce };
        let wanted = self.config.tcp.shared_memory && capacity == CAPACITY;
        let opened = if wanted { Pipe::open(&offer).ok() } else { None };
        let answer = if opened.is_some() { Answer::Taken } else { Answer::Declined };
        trusted.send(&answer, self.deadline).map_err(|error| self.failed(peer, &error))?;
        Ok((trusted, opened.map_or(Memory::None, Memory::Opened)))
    }

    fn settle(&self, peer: usize, mut trusted: Trusted, memory: Memory) -> Result<DataLink, JoinError> {
        let pipe = match memory {
            Memory::None => None,
            Memory::Opened(pipe) => Some(pipe),
            Memory::Made((pipe, _file)) => match self.hear(peer, &mut trusted)? {
                Answer::Taken => Some(pipe),
                Answer::Declined => None,
            },
        };
        Ok(DataLink { stream: trusted.stream, pipe })
    }

    fn hear<T: DeserializeOwned>(&self, peer: usize, trusted: &mut Trusted) -> Result<T, JoinError> {
        loop {
            match trusted.receive(self.deadline.min(Instant::now() + LOOK)) {
                Err(HandshakeError::Late) if Instant::now() < self.deadline => (self.check)()?,
                heard => return heard.map_err(|error| self.failed(peer, &error)),
            }
        }
    }

    /// Why a connection is of no more use: the group's failure explains it, if it fails at once.
    fn failed(&self, peer: usize, error: &HandshakeError) -> JoinError {
        let until = Instant::now() + EXPLANATION;
        while Instant::now() < until {
            if let Err(explained) = (self.check)() {
                return explained;
            }
            std::thread::sleep(LOOK / 10);
        }
        let why = format!("its data connection ended at the start: {error}");
        JoinError::Peer { rank: self.config.rank, peer, why }
    }
}

/// Memory for one connection, if the system has any.
fn made() -> Option<(Pipe, Offer, std::fs::File)> {
    let nonce = *random_bytes().ok()?.first_chunk::<NONCE_BYTES>()?;
    Pipe::create(CAPACITY, nonce).ok()
}

fn is_same_address(stream: &TcpStream) -> bool {
    matches!((stream.peer_addr(), stream.local_addr()), (Ok(peer), Ok(local)) if peer.ip() == local.ip())
}
