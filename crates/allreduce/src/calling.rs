//! How a rank above 0 joins: it calls rank 0 at all its addresses until rank 0 sends the roster.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::connector::connect;
use crate::handshake::{HANDSHAKE_TIME, HandshakeError, Patience, call};
use crate::interfaces;
use crate::introduction::{Found, LOOK, introduction, resolve_by};
use crate::join_error::{JoinError, Met};
use crate::listener::Listener;
use crate::roster::Answer;
use crate::waiting::WaitNotices;

/// How long a wrong token or version may come from an earlier run that is about to end.
const FOREIGN_PATIENCE: Duration = Duration::from_secs(3);

/// How long a rank that has reached rank 0 waits beyond its own deadline: rank 0 reports at the end
/// of its own.
const GRACE: Duration = Duration::from_secs(2);

/// A try at all of rank 0's addresses that came to nothing.
struct Missed {
    /// Each address with what came of it.
    tried: String,
    met: Met,
}

/// Any other rank: calls rank 0 until it answers.
pub(crate) fn call_in(config: &Config, deadline: Instant) -> Result<Found, JoinError> {
    let began = Instant::now();
    let mut wait_notices = WaitNotices::new(config, deadline);
    let mut pause = Duration::from_millis(5);
    let mut foreign_since: Option<Instant> = None;
    loop {
        let last = match call_once(config, deadline, &mut wait_notices) {
            Ok(Ok(found)) => return Ok(found),
            Ok(Err(refused)) => return Err(refused),
            Err(last) => last,
        };
        let foreign = !matches!(last.met, Met::Nobody | Met::Itself | Met::Silence);
        foreign_since = if foreign { foreign_since.or_else(|| Some(Instant::now())) } else { None };
        if Instant::now() + pause >= deadline || foreign_since.is_some_and(|since| since.elapsed() > FOREIGN_PATIENCE) {
            return Err(JoinError::Unreachable {
                rank: config.rank,
                address: config.rendezvous.clone(),
                seconds: began.elapsed().as_secs(),
                last: last.tried,
                met: last.met,
            });
        }
        wait_notices.say(|| format!("waiting for rank 0 at {}: {}", config.rendezvous, last.tried));
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

/// One try at each of rank 0's addresses.
fn call_once(
    config: &Config,
    deadline: Instant,
    wait_notices: &mut WaitNotices<'_>,
) -> Result<Result<Found, JoinError>, Missed> {
    let addresses = match resolve_by(config, deadline) {
        Ok(addresses) => addresses,
        Err(error) => return Ok(Err(error)),
    };
    // Without a token all ranks are on one machine, whose addresses are rank 0's too.
    let is_own = |address: &SocketAddr| address.ip().is_loopback() || interfaces::is_own(*address);
    let itself = config.listens_everywhere() && addresses.iter().all(is_own);
    let mut missed = Missed { tried: String::new(), met: if itself { Met::Itself } else { Met::Nobody } };
    let one = addresses.len() == 1 && addresses[0].to_string() == config.rendezvous;
    for address in addresses {
        let error = match call_at(config, address, deadline, wait_notices) {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        missed.met = match error {
            HandshakeError::Token => Met::OtherToken,
            HandshakeError::Version { .. } => Met::OtherVersion,
            HandshakeError::Foreign => Met::OtherProgram,
            HandshakeError::OtherRun { .. } => Met::OtherRun,
            HandshakeError::Late => Met::Silence,
            _ => missed.met,
        };
        let comma = if missed.tried.is_empty() { "" } else { ", " };
        // The message already names the rendezvous; it names an address only if that is another
        // one.
        missed.tried += &if one { error.to_string() } else { format!("{comma}{}: {error}", address.ip()) };
    }
    if missed.met == Met::Itself {
        missed.tried += &format!("; that is an address of this machine ({}) itself", config.host);
    }
    Err(missed)
}

fn call_at(
    config: &Config,
    address: SocketAddr,
    deadline: Instant,
    wait_notices: &mut WaitNotices<'_>,
) -> Result<Result<Found, JoinError>, HandshakeError> {
    let stream = connect(address, HANDSHAKE_TIME)?;
    let (local, rank_0) = (stream.local_addr()?, stream.peer_addr()?);
    let listener = match Listener::open_in_range(config, local.ip()) {
        Ok(listener) => listener,
        Err(error) => return Ok(Err(JoinError::System { what: "this rank cannot listen for the others", error })),
    };
    let purpose = introduction(config, listener.address().port());
    let patience = Patience::of(HANDSHAKE_TIME);
    let mut connection = call(stream, patience, &config.secret, &config.run, config.rank, config.world, purpose)?;
    let end = deadline + GRACE;
    let answer = loop {
        match connection.receive::<Answer>(end.min(Instant::now() + LOOK)) {
            Err(HandshakeError::Late) if Instant::now() >= end => return Err(HandshakeError::NoRoster),
            Err(HandshakeError::Late) => {
                wait_notices.say(|| format!("rank 0 is at {rank_0}; waiting for the other ranks"));
            }
            answer => break answer?,
        }
    };
    match answer {
        Answer::Refused { rank, host, why } => Ok(Err(JoinError::Differs { rank, host, why })),
        Answer::Missing { missing, seconds, here, world } => {
            Ok(Err(JoinError::Missing { missing, seconds, here, world, address: config.rendezvous.clone() }))
        }
        Answer::Failed { rank, host, why, code } => Ok(Err(JoinError::Failed { rank, host, why, code })),
        Answer::OtherRun { run } => Err(HandshakeError::OtherRun { theirs: run, ours: config.run.clone() }),
        Answer::Roster { session, streams, mut members } => {
            if members.len() != config.world || !(1..=64).contains(&streams) {
                return Err(HandshakeError::Foreign);
            }
            // The address at which this rank reached rank 0 replaces the one in the roster.
            members[0].addresses = vec![rank_0];
            Ok(Ok((listener, session, streams, members, BTreeMap::from([(0, connection)]))))
        }
    }
}
