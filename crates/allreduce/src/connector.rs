//! Connections between any two members of a group, once each knows all others.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::handshake::{HANDSHAKE_TIME, HandshakeError, Patience, Purpose, Trusted, call};
use crate::join_error::JoinError;
use crate::listener::Listener;
use crate::roster::Member;

/// How long a rank, which rank 0 knows to listen, may be unreachable for another: longer is no
/// accident.
const UNREACHABLE_PATIENCE: Duration = Duration::from_secs(5);

/// Between two looks at whether the group has failed.
const LOOK: Duration = Duration::from_millis(50);

/// What is needed to connect to any member of a group.
pub(crate) struct Connector<'a> {
    config: &'a Config,
    members: &'a [Member],
    listener: &'a Listener,
    deadline: Instant,
    /// How long a member may take to be reached, and between two looks at `check` once it is.
    patience: Duration,
    /// Fails if a connection is of no more use: a group within a group fails with it.
    check: &'a dyn Fn() -> Result<(), JoinError>,
    /// Where members were reached.
    pub(crate) reached: RefCell<BTreeMap<usize, SocketAddr>>,
}

/// Why none of a member's addresses was of use.
pub(crate) struct Failed {
    /// Each address with what came of it.
    pub(crate) tried: String,
    /// The member was reached and did not answer: it is slow or frozen, not unreachable.
    pub(crate) slow: bool,
    /// Another program listens there.
    pub(crate) foreign: bool,
}

impl<'a> Connector<'a> {
    pub(crate) fn new(
        config: &'a Config,
        members: &'a [Member],
        listener: &'a Listener,
        deadline: Instant,
        patience: Duration,
        check: &'a dyn Fn() -> Result<(), JoinError>,
    ) -> Connector<'a> {
        Connector { config, members, listener, deadline, patience, check, reached: RefCell::default() }
    }

    /// The higher rank calls and the lower one accepts. `purpose` gets the rank that is called.
    ///
    /// # Errors
    /// If the peer is unreachable, does not call in time, or the group has failed.
    pub(crate) fn connect(&self, peer: usize, purpose: impl Fn(usize) -> Purpose) -> Result<Trusted, JoinError> {
        let rank = self.config.rank;
        if peer > rank {
            return self.await_call(peer, &purpose(rank));
        }
        let began = Instant::now();
        let mut pause = Duration::from_millis(20);
        loop {
            // The peer listens, as rank 0 knows. A refused or broken connection may be an accident,
            // so try again.
            let failed = match self.call(peer, &|| purpose(peer)) {
                Ok(trusted) => return Ok(trusted),
                Err(failed) => failed,
            };
            (self.check)()?;
            let out_of_reach = !failed.slow && began.elapsed() >= UNREACHABLE_PATIENCE;
            if Instant::now() >= self.deadline || failed.foreign || out_of_reach {
                return Err(pair(self.members, rank, peer, failed.tried));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(250));
        }
    }

    fn await_call(&self, peer: usize, wanted: &Purpose) -> Result<Trusted, JoinError> {
        loop {
            let look = self.deadline.min(Instant::now() + LOOK);
            if let Some(arrival) = self.listener.take(look, |hello| hello.rank == peer && hello.purpose == *wanted) {
                return Ok(arrival.connection);
            }
            (self.check)()?;
            if Instant::now() >= self.deadline {
                let (host, seconds) = (&self.members[peer].host, self.config.join_timeout.as_secs());
                let why = format!("it ({host}) did not call within {seconds} s");
                return Err(JoinError::Peer { rank: self.config.rank, peer, why });
            }
        }
    }

    /// One try at each of a member's addresses.
    pub(crate) fn call(&self, peer: usize, purpose: &dyn Fn() -> Purpose) -> Result<Trusted, Failed> {
        let Config { rank, world, secret, run, .. } = self.config;
        let known = self.reached.borrow().get(&peer).copied();
        // One that is reached keeps the connection when it comes to it, however busy it is. So that is waited for, and
        // not called again.
        let goes_on = || (self.check)().is_ok();
        let longest = HANDSHAKE_TIME.min(self.deadline.saturating_duration_since(Instant::now())).max(self.patience);
        let patience = Patience { longest, look: self.patience, goes_on: &goes_on };
        let addresses = known.map_or_else(|| self.members[peer].addresses.clone(), |address| vec![address]);
        let mut failed = Failed { tried: String::new(), slow: false, foreign: !addresses.is_empty() };
        for address in addresses {
            let error = match connect(address, self.patience) {
                Ok(stream) => match call(stream, patience, secret, run, *rank, *world, purpose()) {
                    Ok(trusted) => {
                        self.reached.borrow_mut().insert(peer, address);
                        return Ok(trusted);
                    }
                    Err(error) => {
                        let slow = matches!(error, HandshakeError::Io(_) | HandshakeError::Late);
                        failed.slow |= slow;
                        failed.foreign &= !slow;
                        error.to_string()
                    }
                },
                Err(error) => {
                    failed.foreign = false;
                    error.to_string()
                }
            };
            if !failed.tried.is_empty() {
                failed.tried += ", ";
            }
            failed.tried += &format!("at {address}: {error}");
        }
        Err(failed)
    }
}

pub(crate) fn pair(members: &[Member], rank: usize, peer: usize, tried: String) -> JoinError {
    let host = |rank: usize| members[rank].host.clone();
    JoinError::Pair { rank, host: host(rank), peer, peer_host: host(peer), tried }
}

pub(crate) fn connect(address: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, patience.min(Duration::from_secs(2)))?;
    // A call to a free ephemeral port of this machine can connect to itself, once in thousands of
    // tries.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
    }
    Ok(stream)
}
