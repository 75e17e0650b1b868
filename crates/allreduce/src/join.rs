//! From separate processes to a group: everybody calls rank 0, gets the roster, and then everybody else.
//!
//! Rank 0 takes connections at the rendezvous address. When all ranks have called, it sends each the roster with a fresh
//! session number. Then each rank calls those below it, once for control and once per data stream, and waits for those
//! above it. Every connection starts with the handshake of `handshake.rs`.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::handshake::{HANDSHAKE_TIME, HandshakeError, Purpose, Trusted, call};
use crate::join_error::JoinError;
use crate::lobby::{self, Arrival, Lobby};
use crate::notice::Notice;
use crate::secret::random_bytes;

/// How long a wrong token or version is taken for a leftover of an earlier run that will go away.
const FOREIGN_PATIENCE: Duration = Duration::from_secs(3);

/// How long rank 0 tells ranks that come a little later why there is no group.
const LINGER: Duration = Duration::from_secs(1);

/// How long a rank that has reached rank 0 waits beyond its own time for what rank 0 says at the end of its own.
const GRACE: Duration = Duration::from_secs(2);

/// Between two tries to find out rank 0's address.
const RESOLVE_EVERY: Duration = Duration::from_millis(500);

/// Between two looks at whether ranks that have joined are still there.
const LOOK: Duration = Duration::from_millis(200);

/// A rank as the roster lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) host: String,
    pub(crate) pid: u32,
    ip: IpAddr,
    port: u16,
}

/// What rank 0 says to a rank that has called.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    Refused { rank: usize, host: String, why: String },
    Missing { missing: String, seconds: u64, here: usize, world: usize },
    OtherRun { run: String },
    Roster { session: u64, streams: usize, members: Vec<Member> },
}

/// A complete group's connections.
pub(crate) struct Joined {
    pub(crate) session: u64,
    pub(crate) members: Vec<Member>,
    pub(crate) control: BTreeMap<usize, Trusted>,
    pub(crate) data: Vec<Vec<TcpStream>>,
    pub(crate) lobby: Lobby,
    pub(crate) streams: usize,
}

/// Makes the group, or says who is missing and why.
pub(crate) fn join(config: &Config) -> Result<Joined, JoinError> {
    let deadline = Instant::now() + config.join_timeout;
    let (lobby, session, streams, members, first) =
        if config.rank == 0 { gather(config, deadline)? } else { call_in(config, deadline)? };
    let mut data: Vec<Vec<TcpStream>> = (0..config.world).map(|_| Vec::new()).collect();
    // A rank that ends now must not be waited for until the time is up. Rank 0 sees it; the others see that rank 0 gives up.
    let stands = || match first.iter().find(|(_, trusted)| lobby::is_closed(&trusted.stream)) {
        Some((&peer, _)) => {
            let (rank, host) = (config.rank, &members[peer].host);
            Err(JoinError::Peer { rank, peer, why: format!("it ({host}) ended or gave up; its output says why") })
        }
        None => Ok(()),
    };
    let patience = HANDSHAKE_TIME;
    let mut control = BTreeMap::new();
    let circle = Circle { config, members: &members, lobby: &lobby, deadline, patience, stands: &stands };
    for peer in (1..config.world).filter(|&peer| peer != config.rank && config.rank != 0) {
        control.insert(peer, circle.connect(peer, || Purpose::Control { session })?);
    }
    for peer in (0..config.world).filter(|&peer| peer != config.rank) {
        for stream in 0..streams {
            let trusted = circle.connect(peer, || Purpose::Data { session, stream })?;
            data[peer].push(trusted.stream);
        }
    }
    control.extend(first);
    Ok(Joined { session, members, control, data, lobby, streams })
}

type Found = (Lobby, u64, usize, Vec<Member>, BTreeMap<usize, Trusted>);

/// What is needed to connect to any member of a group.
pub(crate) struct Circle<'a> {
    pub(crate) config: &'a Config,
    pub(crate) members: &'a [Member],
    pub(crate) lobby: &'a Lobby,
    pub(crate) deadline: Instant,
    /// How long one try to reach a member may take.
    pub(crate) patience: Duration,
    /// Whether it is still worth trying: a group within a group fails with it.
    pub(crate) stands: &'a dyn Fn() -> Result<(), JoinError>,
}

impl Circle<'_> {
    /// The higher rank calls, the lower one takes the call.
    pub(crate) fn connect(&self, peer: usize, purpose: impl Fn() -> Purpose) -> Result<Trusted, JoinError> {
        let Config { rank, world, secret, run, .. } = self.config;
        let failed = |why: String| JoinError::Peer { rank: *rank, peer, why };
        if peer > *rank {
            let wanted = purpose();
            loop {
                let look = self.deadline.min(Instant::now() + LOOK / 4);
                if let Some(arrival) = self.lobby.take(look, |hello| hello.rank == peer && hello.purpose == wanted) {
                    return Ok(arrival.connection);
                }
                (self.stands)()?;
                if Instant::now() >= self.deadline {
                    let (host, seconds) = (&self.members[peer].host, self.config.join_timeout.as_secs());
                    return Err(failed(format!("it ({host}) did not call within {seconds} s")));
                }
            }
        }
        let member = &self.members[peer];
        let address = SocketAddr::new(member.ip, member.port);
        loop {
            // The peer is listening: it said so. A refused or broken connection is an accident worth another try.
            let error = match connect(address, self.patience).map_err(HandshakeError::from) {
                Ok(stream) => match call(stream, self.patience, secret, run, *rank, *world, purpose()) {
                    Ok(trusted) => return Ok(trusted),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            (self.stands)()?;
            if Instant::now() >= self.deadline || !matches!(error, HandshakeError::Io(_) | HandshakeError::Late) {
                return Err(failed(format!("{} at {address}: {error}", member.host)));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn connect(address: SocketAddr, patience: Duration) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, patience.min(Duration::from_secs(2)))?;
    // Calling a free port of the ephemeral range on this very machine can, once in thousands of tries, meet itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
    }
    Ok(stream)
}

/// The addresses of the rendezvous; the inner error may pass: in a cluster a name can come later than those who ask for it.
fn resolve(config: &Config) -> Result<io::Result<Vec<SocketAddr>>, JoinError> {
    let rendezvous = &config.rendezvous;
    let addresses: Vec<SocketAddr> = match rendezvous.to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            return Err(JoinError::Config(format!("the rendezvous address {rendezvous:?} is not host:port: {error}")));
        }
        Err(error) => return Ok(Err(error)),
    };
    if config.secret.is_loopback_only() && !addresses.iter().all(|address| address.ip().is_loopback()) {
        return Err(JoinError::Config(format!(
            "without a token ranks can join on this machine only, and {rendezvous} is not a loopback address. Give all ranks the same token"
        )));
    }
    Ok(Ok(addresses))
}

/// The same, tried until it works.
fn resolve_by(config: &Config, deadline: Instant) -> Result<Vec<SocketAddr>, JoinError> {
    let began = Instant::now();
    loop {
        let error = match resolve(config)? {
            Ok(addresses) => return Ok(addresses),
            Err(error) => error,
        };
        if Instant::now() + RESOLVE_EVERY >= deadline {
            let (address, seconds) = (config.rendezvous.clone(), began.elapsed().as_secs());
            return Err(JoinError::Unresolved { address, seconds, error });
        }
        if began.elapsed() < RESOLVE_EVERY {
            (config.notices)(Notice::Unresolved { address: config.rendezvous.clone(), why: error.to_string() });
        }
        std::thread::sleep(RESOLVE_EVERY);
    }
}

/// Rank 0: waits for everybody.
fn gather(config: &Config, deadline: Instant) -> Result<Found, JoinError> {
    let began = Instant::now();
    let mut error = io::Error::from(io::ErrorKind::AddrNotAvailable);
    let mut lobby = None;
    for address in resolve_by(config, deadline)? {
        match Lobby::open(address.ip(), address.port(), config.secret.clone(), &config.run, config.notices.clone()) {
            Ok(open) => {
                lobby = Some(open);
                break;
            }
            Err(failed) => error = failed,
        }
    }
    let lobby = lobby.ok_or_else(|| JoinError::Listen { address: config.rendezvous.clone(), error })?;
    let mut joined: BTreeMap<usize, (Trusted, Member)> = BTreeMap::new();
    while joined.len() + 1 < config.world {
        let arrival =
            lobby.take(deadline.min(Instant::now() + LOOK), |hello| matches!(hello.purpose, Purpose::Join { .. }));
        joined.retain(|_, (connection, _)| waits(&connection.stream));
        let outcome = match arrival {
            Some(arrival) => admit(config, arrival, &mut joined),
            None if Instant::now() < deadline => Ok(()),
            None => {
                let missing: Vec<usize> = (1..config.world).filter(|rank| !joined.contains_key(rank)).collect();
                Err(JoinError::Missing {
                    missing: crate::error::ranks(&missing),
                    seconds: began.elapsed().as_secs(),
                    here: joined.len() + 1,
                    world: config.world,
                    address: config.rendezvous.clone(),
                })
            }
        };
        if let Err(error) = outcome {
            tell_all(config, &lobby, &error, joined);
            return Err(error);
        }
    }
    let session = u64::from_le_bytes(random()?[..8].try_into().expect("eight bytes"));
    let me = Member {
        host: config.host.clone(),
        pid: std::process::id(),
        ip: lobby.address().ip(),
        port: lobby.address().port(),
    };
    let members: Vec<Member> = std::iter::once(me).chain(joined.values().map(|(_, member)| member.clone())).collect();
    let streams = config.tcp.streams.max(1);
    let mut control = BTreeMap::new();
    for (rank, (mut connection, _)) in joined {
        let roster = Answer::Roster { session, streams, members: members.clone() };
        connection.send(&roster, deadline).map_err(|error| JoinError::Peer {
            rank: 0,
            peer: rank,
            why: error.to_string(),
        })?;
        control.insert(rank, connection);
    }
    Ok((lobby, session, streams, members, control))
}

fn random() -> Result<[u8; 32], JoinError> {
    random_bytes().map_err(|error| JoinError::System {
        what: "the system gave no random numbers",
        error: io::Error::other(error.to_string()),
    })
}

/// Whether a rank that has joined still waits for the roster: it has neither gone nor said anything, for which it is too early.
fn waits(stream: &TcpStream) -> bool {
    let _ = stream.set_nonblocking(true);
    let waits = stream.peek(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
    let _ = stream.set_nonblocking(false);
    waits
}

/// Tells the ranks that are here, and those that come a moment later, why there is no group.
fn tell_all(config: &Config, lobby: &Lobby, error: &JoinError, mut joined: BTreeMap<usize, (Trusted, Member)>) {
    let (answer, mut others) = match error {
        JoinError::Differs { rank, host, why } => {
            joined.remove(rank);
            let answer = Answer::Refused { rank: *rank, host: host.clone(), why: why.clone() };
            (answer, config.world.saturating_sub(2 + joined.len()))
        }
        JoinError::Missing { missing, seconds, here, world, .. } => {
            (Answer::Missing { missing: missing.clone(), seconds: *seconds, here: *here, world: *world }, 0)
        }
        _ => return,
    };
    for (connection, _) in joined.values_mut() {
        let _ = connection.send(&answer, Instant::now() + LINGER);
    }
    let until = Instant::now() + LINGER;
    while others > 0
        && let Some(mut arrival) = lobby.take(until, |hello| matches!(hello.purpose, Purpose::Join { .. }))
    {
        let _ = arrival.connection.send(&answer, until);
        others -= 1;
    }
}

/// Takes a rank in, or ends the join: who holds the token and the run's name but disagrees on the rest is misconfigured.
fn admit(config: &Config, arrival: Arrival, joined: &mut BTreeMap<usize, (Trusted, Member)>) -> Result<(), JoinError> {
    let Arrival { hello, mut connection, from } = arrival;
    let Purpose::Join { port, host, pid, claims } = hello.purpose else { return Ok(()) };
    let ours: Vec<(String, String)> = config.claims_as_text();
    let why = if hello.world != config.world {
        Some(format!("it was started as one of {} ranks, rank 0 as one of {}", hello.world, config.world))
    } else if hello.rank == 0 || hello.rank >= config.world {
        Some(format!("there is no place for a rank {} beside rank 0 of {} ranks", hello.rank, config.world))
    } else {
        difference(&ours, &claims)
    };
    let soon = Instant::now() + Duration::from_secs(1);
    if let Some(why) = why {
        let refusal = Answer::Refused { rank: hello.rank, host: host.clone(), why: why.clone() };
        let _ = connection.send(&refusal, soon);
        return Err(JoinError::Differs { rank: hello.rank, host, why });
    }
    if let Some((_, member)) = joined.get(&hello.rank) {
        let why = format!("rank {} has already joined from {} (process {})", hello.rank, member.host, member.pid);
        let _ = connection.send(&Answer::Refused { rank: hello.rank, host, why }, soon);
        return Ok(());
    }
    joined.insert(hello.rank, (connection, Member { host, pid, ip: from.ip(), port }));
    Ok(())
}

/// The first claim in which two ranks differ, in words.
fn difference(ours: &[(String, String)], theirs: &[(String, String)]) -> Option<String> {
    let theirs: BTreeMap<&str, &str> = theirs.iter().map(|(name, digest)| (name.as_str(), digest.as_str())).collect();
    for (name, digest) in ours {
        match theirs.get(name.as_str()) {
            Some(other) if other == digest => {}
            Some(other) => {
                let short = |digest: &str| digest.chars().take(12).collect::<String>();
                return Some(format!(
                    "its {name} is not rank 0's ({} there, {} on rank 0). All ranks need the same {name}",
                    short(other),
                    short(digest)
                ));
            }
            None => return Some(format!("it does not say what its {name} is; rank 0 does")),
        }
    }
    (theirs.len() > ours.len()).then(|| "it makes claims that rank 0 does not: the programs differ".to_owned())
}

/// Any other rank: calls rank 0 until it answers.
fn call_in(config: &Config, deadline: Instant) -> Result<Found, JoinError> {
    let began = Instant::now();
    let mut pause = Duration::from_millis(5);
    let mut foreign_since: Option<Instant> = None;
    loop {
        let last = match call_once(config, deadline) {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(refused)) => return Err(refused),
            Err(error) => error,
        };
        let foreign = matches!(
            last,
            HandshakeError::Token
                | HandshakeError::Version { .. }
                | HandshakeError::Foreign
                | HandshakeError::OtherRun { .. }
        );
        foreign_since = if foreign { foreign_since.or_else(|| Some(Instant::now())) } else { None };
        if Instant::now() + pause >= deadline || foreign_since.is_some_and(|since| since.elapsed() > FOREIGN_PATIENCE) {
            return Err(JoinError::Unreachable {
                rank: config.rank,
                address: config.rendezvous.clone(),
                seconds: began.elapsed().as_secs(),
                last: last.to_string(),
            });
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

fn call_once(config: &Config, deadline: Instant) -> Result<Result<Found, JoinError>, HandshakeError> {
    let addresses = match resolve_by(config, deadline) {
        Ok(addresses) => addresses,
        Err(error) => return Ok(Err(error)),
    };
    let mut stream = Err(io::Error::from(io::ErrorKind::AddrNotAvailable));
    for address in addresses {
        stream = connect(address, HANDSHAKE_TIME);
        if stream.is_ok() {
            break;
        }
    }
    let stream = stream?;
    let (local, rank_0) = (stream.local_addr()?, stream.peer_addr()?);
    let lobby = Lobby::open(local.ip(), 0, config.secret.clone(), &config.run, config.notices.clone())?;
    let purpose = Purpose::Join {
        port: lobby.address().port(),
        host: config.host.clone(),
        pid: std::process::id(),
        claims: config.claims_as_text(),
    };
    let mut connection = call(stream, HANDSHAKE_TIME, &config.secret, &config.run, config.rank, config.world, purpose)?;
    let answer = connection.receive::<Answer>(deadline + GRACE).map_err(|error| match error {
        HandshakeError::Late => HandshakeError::NoRoster,
        error => error,
    })?;
    match answer {
        Answer::Refused { rank, host, why } => Ok(Err(JoinError::Differs { rank, host, why })),
        Answer::Missing { missing, seconds, here, world } => {
            Ok(Err(JoinError::Missing { missing, seconds, here, world, address: config.rendezvous.clone() }))
        }
        Answer::OtherRun { run } => Err(HandshakeError::OtherRun { theirs: run, ours: config.run.clone() }),
        Answer::Roster { session, streams, mut members } => {
            if members.len() != config.world || !(1..=64).contains(&streams) {
                return Err(HandshakeError::Foreign);
            }
            // Rank 0 is where we reached it, whatever it thinks its address is.
            (members[0].ip, members[0].port) = (rank_0.ip(), rank_0.port());
            Ok(Ok((lobby, session, streams, members, BTreeMap::from([(0, connection)]))))
        }
    }
}
