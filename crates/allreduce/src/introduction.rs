//! How ranks find rank 0, and what they and rank 0 say to each other first.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use crate::config::Config;
use crate::handshake::{Purpose, Trusted};
use crate::interfaces;
use crate::join_error::JoinError;
use crate::listener::Listener;
use crate::notice::Notice;
use crate::roster::Member;

/// Between two tries to find out rank 0's address.
const RESOLVE_EVERY: Duration = Duration::from_millis(500);

/// Between two looks at whether ranks that have joined are still there.
pub(crate) const LOOK: Duration = Duration::from_millis(200);

/// What a rank knows once all have called: the listener, the session, streams per pair, all ranks, and the
/// control connections that there are.
pub(crate) type Found = (Listener, u64, usize, Vec<Member>, BTreeMap<usize, Trusted>);

/// The addresses of the rendezvous. The inner error may be temporary: a cluster can publish a name
/// after the ranks that ask for it have started.
pub(crate) fn resolve(config: &Config) -> Result<io::Result<Vec<SocketAddr>>, JoinError> {
    let rendezvous = &config.rendezvous;
    let parts = rendezvous.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let Some((host, port)) = parts.filter(|(host, _)| !host.is_empty()) else {
        return Err(JoinError::Config(format!("the rendezvous address {rendezvous:?} is not host:port")));
    };
    // The system's resolver knows zones such as fe80::1%en2; the standard library's parser of
    // addresses does not.
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let addresses: Vec<SocketAddr> = match (host, port).to_socket_addrs() {
        Ok(addresses) => addresses.collect(),
        Err(error) => return Ok(Err(error)),
    };
    if config.secret.is_loopback_only() && !addresses.iter().all(|address| address.ip().is_loopback()) {
        return Err(JoinError::Config(format!(
            "without a token ranks can join on this machine only, and {rendezvous} is not a loopback address. Give all ranks the same token"
        )));
    }
    Ok(Ok(addresses))
}

/// The addresses of the rendezvous, tried again until they resolve or `deadline` comes.
pub(crate) fn resolve_by(config: &Config, deadline: Instant) -> Result<Vec<SocketAddr>, JoinError> {
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

/// The introduction of this rank. `port`: where it listens.
pub(crate) fn introduction(config: &Config, port: u16) -> Purpose {
    let mut addresses = config.addresses.clone();
    if config.listens_everywhere() {
        addresses.extend(interfaces::own());
    }
    Purpose::Join {
        port,
        host: config.host.clone(),
        pid: std::process::id(),
        claims: config.claims_as_text(),
        addresses,
    }
}
