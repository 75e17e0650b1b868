//! From separate processes to a group: all ranks call rank 0, get the roster, and then call each
//! other.
//!
//! Rank 0 takes connections at the rendezvous address. When all ranks have called, it sends each
//! the roster with a fresh session number. Then each rank calls those below it, once for control
//! and once per data stream, and waits for those above it. Every connection starts with the
//! handshake of `handshake.rs`.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::calling::call_in;
use crate::config::Config;
use crate::connector::{Connector, connect, pair};
use crate::handshake::{HANDSHAKE_TIME, Patience, Purpose, Trusted, call};
use crate::interfaces;
use crate::introduction::{Found, LOOK, introduction, resolve, resolve_by};
use crate::join_error::JoinError;
use crate::listener::{self, Arrival, Listener};
use crate::notice::Notice;
use crate::random_bytes::random_bytes;
use crate::roster::{Answer, Member};
use crate::same_machine::{Connections, DataLink, data_links};
use crate::waiting::WaitNotices;

/// How long rank 0 waits for another rank in place of one that it turned away, if runs have no
/// names.
const DIFFERS_PATIENCE: Duration = Duration::from_secs(15);

/// How long rank 0 tells ranks that come late why there is no group.
const LINGER: Duration = Duration::from_secs(1);

/// How long a rank that has failed tries to tell the others.
const EXCUSE: Duration = Duration::from_secs(2);

/// Characters of an error that others are told.
const LONGEST_EXCUSE: usize = 2000;

/// Addresses of one rank that others try.
const MOST_ADDRESSES: usize = 16;

/// A complete group's connections.
pub(crate) struct Joined {
    pub(crate) session: u64,
    pub(crate) members: Vec<Member>,
    pub(crate) control: BTreeMap<usize, Trusted>,
    pub(crate) data: Vec<Vec<DataLink>>,
    pub(crate) listener: Listener,
    pub(crate) streams: usize,
}

/// Makes the group, or says who is missing and why.
pub(crate) fn join(config: &Config) -> Result<Joined, JoinError> {
    let deadline = Instant::now() + config.join_timeout;
    let (listener, session, streams, mut members, first) =
        if config.rank == 0 { gather(config, deadline)? } else { call_in(config, deadline)? };
    let told = |until: Instant| {
        let is_ours =
            |purpose: &Purpose| matches!(purpose, Purpose::GaveUp { session: other, .. } if *other == session);
        let arrival = listener.take(until, |hello| is_ours(&hello.purpose) && hello.rank < config.world)?;
        let Purpose::GaveUp { peer, tried, .. } = arrival.hello.purpose else { return None };
        Some(pair(&members, arrival.hello.rank, peer.min(config.world - 1), tried))
    };
    // If a rank ends now, the others must not wait until the time is up. Rank 0 sees that rank end;
    // the others see that rank 0 gives up.
    let check = || {
        let gone = first.iter().find(|(_, trusted)| listener::is_closed(&trusted.stream));
        // A rank that cannot reach another tells rank 0 before it ends.
        let until = Instant::now() + if gone.is_some() { LINGER } else { Duration::ZERO };
        if let Some(error) = (config.rank == 0).then(|| told(until)).flatten() {
            return Err(error);
        }
        gone.map_or(Ok(()), |(&peer, _)| {
            let (rank, host) = (config.rank, &members[peer].host);
            Err(JoinError::Peer { rank, peer, why: format!("it ({host}) ended or gave up; its output says why") })
        })
    };
    let connector = Connector::new(config, &members, &listener, deadline, HANDSHAKE_TIME, &check);
    let connected = connect_all(&connector, config, session, streams).inspect_err(|error| {
        if let JoinError::Pair { peer, tried, .. } = error
            && config.rank > 0
        {
            // If this fails too, rank 0 still sees that this rank ends.
            let gave_up = || Purpose::GaveUp { session, peer: *peer, tried: tried.clone() };
            let _ = connector.call(0, &gave_up);
        }
    });
    let reached = connector.reached.take();
    let (mut control, connections) = connected?;
    let data = data_links(config, connections, deadline, &check)?;
    for (peer, address) in reached {
        // Later connections go where the first one went.
        let addresses = &mut members[peer].addresses;
        addresses.retain(|other| *other != address);
        addresses.insert(0, address);
    }
    control.extend(first);
    Ok(Joined { session, members, control, data, listener, streams })
}

/// Control connections between ranks above 0, then data connections between all: for each rank, none
/// for this one itself.
fn connect_all(
    connector: &Connector<'_>,
    config: &Config,
    session: u64,
    streams: usize,
) -> Result<(BTreeMap<usize, Trusted>, Connections), JoinError> {
    let Config { rank, world, .. } = *config;
    let mut control = BTreeMap::new();
    for peer in (1..world).filter(|&peer| peer != rank && rank != 0) {
        control.insert(peer, connector.connect(peer, |to| Purpose::Control { session, to })?);
    }
    let mut data = Vec::new();
    for peer in 0..world {
        let links = (0..streams).filter(|_| peer != rank);
        let links = links.map(|stream| connector.connect(peer, |to| Purpose::Data { session, stream, to }));
        data.push((peer, links.collect::<Result<Vec<_>, _>>()?));
    }
    Ok((control, data))
}

/// Rank 0's listener.
fn open(config: &Config, deadline: Instant) -> Result<Listener, JoinError> {
    let addresses = resolve_by(config, deadline)?;
    let rendezvous = || config.rendezvous.clone();
    let mut error = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for &address in &addresses {
        let is_here = |ip: IpAddr| ip.is_loopback() || ip.is_unspecified() || interfaces::is_own(address);
        let opened = if config.listens_everywhere() && !is_here(address.ip()) {
            let why = format!("{} is no address of this machine ({})", address.ip(), config.host);
            Err(io::Error::new(io::ErrorKind::AddrNotAvailable, why))
        } else {
            Listener::open(config, address.ip(), address.port())
        };
        match opened {
            Ok(listener) => return Ok(listener),
            Err(failed) => error = failed,
        }
    }
    if error.kind() == io::ErrorKind::AddrInUse
        && let Some(who) = addresses.iter().find_map(|&address| rank_0_already(config, address))
    {
        return Err(JoinError::SecondRankZero { address: rendezvous(), who });
    }
    Err(JoinError::Listen { address: rendezvous(), error })
}

/// What another rank 0 of this run says, if it holds the rendezvous port already. None: something
/// else holds it.
fn rank_0_already(config: &Config, address: SocketAddr) -> Option<String> {
    let Config { rank, world, secret, run, .. } = config;
    let ip = if address.ip().is_unspecified() { IpAddr::from([127, 0, 0, 1]) } else { address.ip() };
    let stream = connect(SocketAddr::new(ip, address.port()), LINGER).ok()?;
    let mut connection =
        call(stream, Patience::of(LINGER), secret, run, *rank, *world, introduction(config, 0)).ok()?;
    match connection.receive::<Answer>(Instant::now() + LINGER).ok()? {
        Answer::Refused { why, .. } => Some(why),
        Answer::OtherRun { run } => Some(format!("run {run:?} has its rank 0 there")),
        _ => None,
    }
}

/// Rank 0 waits for all other ranks.
fn gather(config: &Config, deadline: Instant) -> Result<Found, JoinError> {
    let began = Instant::now();
    let listener = open(config, deadline)?;
    let mut wait_notices = WaitNotices::new(config, deadline);
    let mut joined: BTreeMap<usize, (Trusted, Member)> = BTreeMap::new();
    // A rank that was turned away and may have been of another run.
    let mut strays: Option<(Instant, JoinError)> = None;
    while joined.len() + 1 < config.world {
        let arrival = listener.take(deadline.min(Instant::now() + LOOK), |hello| {
            matches!(hello.purpose, Purpose::Join { .. } | Purpose::Failed { .. })
        });
        joined.retain(|_, (connection, _)| waits(&connection.stream));
        let outcome = match arrival {
            Some(arrival) => admit(config, arrival, &mut joined),
            None if Instant::now() < deadline => Ok(()),
            None => Err(JoinError::Missing {
                missing: crate::error::ranks(&missing(config, &joined)),
                seconds: began.elapsed().as_secs(),
                here: joined.len() + 1,
                world: config.world,
                address: config.rendezvous.clone(),
            }),
        };
        let outcome = match outcome {
            // A rank that gives the run's name is of this run. Without a name it may be of another
            // run, which uses the same port by mistake.
            Err(error @ JoinError::Differs { .. }) if config.run.is_empty() => {
                strays = Some((Instant::now() + DIFFERS_PATIENCE, error));
                Ok(())
            }
            outcome => outcome,
        };
        strays =
            strays.filter(|(_, error)| matches!(error, JoinError::Differs { rank, .. } if !joined.contains_key(rank)));
        let outcome = match strays.take_if(|(until, _)| Instant::now() >= *until) {
            Some((_, error)) => outcome.and(Err(error)),
            None => outcome,
        };
        if let Err(error) = outcome {
            tell_all(config, &listener, &error, joined);
            return Err(error);
        }
        wait_notices.say(|| waiting_for(config, &joined));
    }
    let session = u64::from_le_bytes(random()?[..8].try_into().expect("eight bytes"));
    // The others know where they reached it.
    let me = Member { host: config.host.clone(), pid: std::process::id(), addresses: vec![listener.address()] };
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
    Ok((listener, session, streams, members, control))
}

/// Tells the waiting ranks why this one, which failed before it could join, will not come.
pub(crate) fn excuse(config: &Config, why: &str, code: u8) {
    let until = Instant::now() + EXCUSE;
    let why: String = why.chars().take(LONGEST_EXCUSE).collect();
    if config.rank > 0 {
        let failed = || Purpose::Failed { why: why.clone(), code };
        let Config { rank, world, secret, run, .. } = config;
        while Instant::now() < until {
            let addresses = resolve(config).ok().and_then(Result::ok).unwrap_or_default();
            let told = addresses.iter().any(|&address| {
                let stream = connect(address, LINGER);
                let patience = Patience::of(LINGER);
                stream.is_ok_and(|stream| call(stream, patience, secret, run, *rank, *world, failed()).is_ok())
            });
            if told {
                return;
            }
            std::thread::sleep(LOOK);
        }
        return;
    }
    let Ok(listener) = open(config, until) else { return };
    let answer = Answer::Failed { rank: 0, host: config.host.clone(), why, code };
    for _ in 1..config.world {
        let Some(mut arrival) = listener.take(until, |hello| matches!(hello.purpose, Purpose::Join { .. })) else {
            return;
        };
        let _ = arrival.connection.send(&answer, until);
    }
}

/// Who is here and who is awaited, for people.
fn waiting_for(config: &Config, joined: &BTreeMap<usize, (Trusted, Member)>) -> String {
    let here = joined.iter().map(|(rank, (_, member))| format!(", {rank} on {}", member.host));
    format!(
        "{} of {} ranks are here (0 on {}{}); waiting for {} to call {}",
        joined.len() + 1,
        config.world,
        config.host,
        here.collect::<String>(),
        crate::error::ranks(&missing(config, joined)),
        config.rendezvous
    )
}

fn missing(config: &Config, joined: &BTreeMap<usize, (Trusted, Member)>) -> Vec<usize> {
    (1..config.world).filter(|rank| !joined.contains_key(rank)).collect()
}

fn random() -> Result<[u8; 32], JoinError> {
    random_bytes().map_err(|error| JoinError::System {
        what: "the system gave no random numbers",
        error: io::Error::other(error.to_string()),
    })
}

/// Whether a rank that has joined still waits for the roster. Otherwise it has gone, or it has sent
/// something too early.
fn waits(stream: &TcpStream) -> bool {
    let _ = stream.set_nonblocking(true);
    let waits = stream.peek(&mut [0]).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
    let _ = stream.set_nonblocking(false);
    waits
}

/// Tells the ranks that are here, and those that come a moment later, why there is no group.
fn tell_all(config: &Config, listener: &Listener, error: &JoinError, mut joined: BTreeMap<usize, (Trusted, Member)>) {
    let (answer, mut others) = match error {
        JoinError::Differs { rank, host, why } => {
            joined.remove(rank);
            let answer = Answer::Refused { rank: *rank, host: host.clone(), why: why.clone() };
            (answer, config.world.saturating_sub(2 + joined.len()))
        }
        JoinError::Failed { rank, host, why, code } => {
            let answer = Answer::Failed { rank: *rank, host: host.clone(), why: why.clone(), code: *code };
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
        && let Some(mut arrival) = listener.take(until, |hello| matches!(hello.purpose, Purpose::Join { .. }))
    {
        let _ = arrival.connection.send(&answer, until);
        others -= 1;
    }
}

/// Takes a rank in, or ends the join. A rank that holds the token and the run's name, but disagrees
/// on the rest, is misconfigured.
fn admit(config: &Config, arrival: Arrival, joined: &mut BTreeMap<usize, (Trusted, Member)>) -> Result<(), JoinError> {
    let Arrival { hello, mut connection, from } = arrival;
    let (port, host, pid, claims, addresses) = match hello.purpose {
        Purpose::Join { port, host, pid, claims, addresses } => (port, host, pid, claims, addresses),
        Purpose::Failed { why, code } => {
            let host = from.ip().to_string();
            return Err(JoinError::Failed { rank: hello.rank, host, why, code });
        }
        _ => return Ok(()),
    };
    let soon = Instant::now() + Duration::from_secs(1);
    if hello.rank == 0 {
        let why =
            format!("another process is rank 0 there already, on {} (process {})", config.host, std::process::id());
        let _ = connection.send(&Answer::Refused { rank: 0, host, why: why.clone() }, soon);
        (config.notices)(Notice::Refused { from, why: "it is rank 0 too".to_owned() });
        return Ok(());
    }
    let ours: Vec<(String, String)> = config.claims_as_text();
    let why = if hello.world != config.world {
        Some(format!("it was started as one of {} ranks, rank 0 as one of {}", hello.world, config.world))
    } else if hello.rank >= config.world {
        Some(format!("there is no place for a rank {} beside rank 0 of {} ranks", hello.rank, config.world))
    } else {
        difference(&ours, &claims)
    };
    if let Some(why) = why {
        let refusal = Answer::Refused { rank: hello.rank, host: host.clone(), why: why.clone() };
        let _ = connection.send(&refusal, soon);
        let told = format!("rank {} ({host}) was turned away: {why}", hello.rank);
        (config.notices)(Notice::TurnedAway { what: told });
        return Err(JoinError::Differs { rank: hello.rank, host, why });
    }
    if let Some((_, member)) = joined.get(&hello.rank) {
        let why = format!("rank {} has already joined from {} (process {})", hello.rank, member.host, member.pid);
        let _ = connection.send(&Answer::Refused { rank: hello.rank, host, why }, soon);
        return Ok(());
    }
    let addresses = reachable(from, &addresses, port);
    joined.insert(hello.rank, (connection, Member { host, pid, addresses }));
    Ok(())
}

/// The addresses at which a rank may be reached: those that it gave, then the one it came `from`,
/// both at `port`.
fn reachable(from: SocketAddr, addresses: &[IpAddr], port: u16) -> Vec<SocketAddr> {
    // Loopback and link-local addresses mean nothing to other machines.
    let is_far = |ip: &IpAddr| !ip.is_loopback() && !ip.is_unspecified() && !is_link_local(*ip);
    let mut all: Vec<SocketAddr> = Vec::new();
    let far = addresses.iter().copied().filter(is_far).take(MOST_ADDRESSES);
    let seen = SocketAddr::new(from.ip(), port);
    // A rank on rank 0's machine appears as loopback, which only ranks on that machine can use.
    let seen_first = !from.ip().is_loopback();
    let ordered: Vec<SocketAddr> = if seen_first {
        std::iter::once(seen).chain(far.map(|ip| SocketAddr::new(ip, port))).collect()
    } else {
        far.map(|ip| SocketAddr::new(ip, port)).chain([seen]).collect()
    };
    for address in ordered {
        if !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

/// The first claim in which two ranks differ, as text for people.
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
