//! How two ranks authenticate each other over a fresh TCP connection.
//!
//! ```text
//! caller → "FTAR", length, Hello {protocol, run, purpose, rank, world, nonce, …}
//! callee → length, Challenge {protocol, nonce}, tag("callee", Hello, Challenge)
//! caller → tag("caller", Hello, Challenge)
//! callee → tag("welcome", Hello, Challenge)
//! both:    two keys from Hello and Challenge; every control message from here on is sealed
//! ```
//!
//! All tags are made with the token and cover everything that was said, both nonces included. So a
//! recorded handshake opens nothing, a tag sent back to its maker has the wrong role, and a Hello
//! whose rank was changed fails. The whole exchange has one deadline, however slowly bytes arrive.
//!
//! The callee sends the welcome once it keeps the connection for good. A callee with too many
//! callers may close a connection at the last moment; without the welcome that caller would think
//! that it is in.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::frame::PROTOCOL_VERSION;
use crate::random_bytes::{KEY_BYTES, hex, random_bytes};
use crate::sealed::{SealError, Seals};
use crate::secret::{Seal, Secret, Tag};

const MAGIC: &[u8; 4] = b"FTAR";

/// Longest Hello or Challenge.
const LONGEST_GREETING: usize = 16 << 10;

/// Time for a whole handshake.
pub(crate) const HANDSHAKE_TIME: Duration = Duration::from_secs(5);

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Purpose {
    /// To join a group at its rank 0; becomes the control connection between the two.
    Join {
        /// Where this rank takes connections.
        port: u16,
        host: String,
        pid: u32,
        /// What all ranks have to agree on: a name and a digest each.
        claims: Vec<(String, String)>,
        /// The addresses of its machine that it knows of, the likeliest first.
        #[serde(default)]
        addresses: Vec<IpAddr>,
    },
    /// The control connection between two ranks of a group. `to`: the rank that is called. An
    /// address can lead to another machine than the one that gave it.
    Control { session: u64, to: usize },
    /// A data connection of a group.
    Data { session: u64, stream: usize, to: usize },
    /// To tell rank 0 that this rank has failed before it could join, and with which exit code it
    /// ends.
    Failed { why: String, code: u8 },
    /// To tell rank 0 that this rank cannot reach `peer`; `tried` says where and what came of it.
    GaveUp { session: u64, peer: usize, tried: String },
}

impl Purpose {
    /// The rank that is called, if the caller says it.
    pub(crate) fn to(&self) -> Option<usize> {
        match self {
            Purpose::Control { to, .. } | Purpose::Data { to, .. } => Some(*to),
            Purpose::GaveUp { .. } => Some(0),
            Purpose::Failed { .. } => Some(0),
            Purpose::Join { .. } => None,
        }
    }
}

/// The caller's first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) protocol: u8,
    pub(crate) run: String,
    pub(crate) rank: usize,
    pub(crate) world: usize,
    pub(crate) purpose: Purpose,
    pub(crate) nonce: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Challenge {
    protocol: u8,
    nonce: String,
}

/// A handshake that failed.
#[derive(Debug, Error)]
pub(crate) enum HandshakeError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it did not finish the handshake in time")]
    Late,
    #[error(
        "it was reached, but did not say in time that all ranks are there; it may belong to a group that is at work"
    )]
    NoRoster,
    #[error("it does not speak this protocol")]
    Foreign,
    #[error("it speaks version {theirs} of the protocol, this program version {PROTOCOL_VERSION}")]
    Version { theirs: u8 },
    #[error("it belongs to run {theirs:?}, this rank to run {ours:?}")]
    OtherRun { theirs: String, ours: String },
    #[error("it does not hold the token of this run")]
    Token,
    #[error("{0}")]
    Seal(#[from] SealError),
    #[error("the system gave no random numbers: {0}")]
    Random(getrandom::Error),
}

/// A connection between two ranks that know each other.
pub(crate) struct Trusted {
    pub(crate) stream: TcpStream,
    seals: Seals,
}

/// How a caller waits for the rank that it calls.
#[derive(Clone, Copy)]
pub(crate) struct Patience<'a> {
    pub(crate) longest: Duration,
    /// Between two looks at whether to go on.
    pub(crate) look: Duration,
    pub(crate) goes_on: &'a dyn Fn() -> bool,
}

impl Patience<'_> {
    pub(crate) fn of(longest: Duration) -> Patience<'static> {
        Patience { longest, look: longest, goes_on: &|| true }
    }
}

/// A stream whose reads and writes share one deadline.
struct Timed<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
    patience: Patience<'a>,
}

impl<'a> Timed<'a> {
    fn until(stream: &'a TcpStream, deadline: Instant) -> Timed<'a> {
        Timed { stream, deadline, patience: Patience::of(Duration::MAX) }
    }

    fn remaining(&self) -> Result<Duration, HandshakeError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(HandshakeError::Late) } else { Ok(left.min(self.patience.look)) }
    }

    fn read_exact(&mut self, mut bytes: &mut [u8]) -> Result<(), HandshakeError> {
        while !bytes.is_empty() {
            self.stream.set_read_timeout(Some(self.remaining()?))?;
            match self.stream.read(bytes) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(read) => bytes = &mut bytes[read..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.remaining()?;
                    if !(self.patience.goes_on)() {
                        return Err(HandshakeError::Late);
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        self.stream.set_write_timeout(Some(self.remaining()?))?;
        self.stream.write_all(bytes).map_err(HandshakeError::from)
    }

    fn read_greeting(&mut self) -> Result<Vec<u8>, HandshakeError> {
        let mut length = [0; 4];
        self.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > LONGEST_GREETING {
            return Err(HandshakeError::Foreign);
        }
        let mut bytes = vec![0; length];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn read_tag(&mut self) -> Result<Tag, HandshakeError> {
        let mut tag = [0; KEY_BYTES];
        self.read_exact(&mut tag)?;
        Ok(Tag::from_bytes(tag))
    }
}

fn greeting<T: Serialize>(message: &T) -> Vec<u8> {
    let body = serde_json::to_vec(message).expect("greetings are plain data");
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&body);
    bytes
}

fn nonce() -> Result<String, HandshakeError> {
    random_bytes().map(|bytes| hex(&bytes)).map_err(HandshakeError::Random)
}

/// The caller's side, on a connection just made.
pub(crate) fn call(
    stream: TcpStream,
    patience: Patience<'_>,
    secret: &Secret,
    run: &str,
    rank: usize,
    world: usize,
    purpose: Purpose,
) -> Result<Trusted, HandshakeError> {
    stream.set_nodelay(true)?;
    let mut timed = Timed { stream: &stream, deadline: Instant::now() + patience.longest, patience };
    let hello = Hello { protocol: PROTOCOL_VERSION, run: run.into(), rank, world, purpose, nonce: nonce()? };
    let hello = greeting(&hello);
    timed.write_all(&[MAGIC.as_slice(), &hello].concat())?;
    let challenge = timed.read_greeting()?;
    let protocol = serde_json::from_slice::<Challenge>(&challenge).map_err(|_| HandshakeError::Foreign)?.protocol;
    if protocol != PROTOCOL_VERSION {
        return Err(HandshakeError::Version { theirs: protocol });
    }
    let said: [&[u8]; 2] = [&hello[4..], &challenge];
    if timed.read_tag()? != secret.tag("callee", &said) {
        return Err(HandshakeError::Token);
    }
    timed.write_all(secret.tag("caller", &said).bytes())?;
    if timed.read_tag()? != secret.tag("welcome", &said) {
        return Err(HandshakeError::Token);
    }
    let keys = (secret.tag("key of the caller", &said), secret.tag("key of the callee", &said));
    Ok(Trusted { seals: Seals::new(Seal::new(&keys.0), Seal::new(&keys.1)), stream })
}

/// The callee's side, on a connection just accepted. The caller waits for [`Welcome::say`].
pub(crate) fn answer(stream: TcpStream, secret: &Secret) -> Result<(Hello, Trusted, Welcome), HandshakeError> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    let mut timed = Timed::until(&stream, Instant::now() + HANDSHAKE_TIME);
    let mut magic = [0; 4];
    timed.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Err(HandshakeError::Foreign);
    }
    let hello_bytes = timed.read_greeting()?;
    let hello: Hello = serde_json::from_slice(&hello_bytes).map_err(|_| HandshakeError::Foreign)?;
    let challenge = greeting(&Challenge { protocol: PROTOCOL_VERSION, nonce: nonce()? });
    let said: [&[u8]; 2] = [&hello_bytes, &challenge[4..]];
    timed.write_all(&[&challenge, secret.tag("callee", &said).bytes().as_slice()].concat())?;
    if hello.protocol != PROTOCOL_VERSION {
        return Err(HandshakeError::Version { theirs: hello.protocol });
    }
    if timed.read_tag()? != secret.tag("caller", &said) {
        return Err(HandshakeError::Token);
    }
    let keys = (secret.tag("key of the caller", &said), secret.tag("key of the callee", &said));
    let trusted = Trusted { seals: Seals::new(Seal::new(&keys.1), Seal::new(&keys.0)), stream };
    Ok((hello, trusted, Welcome(secret.tag("welcome", &said))))
}

/// The last message of a handshake.
pub(crate) struct Welcome(Tag);

impl Welcome {
    /// Tells the caller that its connection is kept.
    pub(crate) fn say(self, connection: &Trusted) -> Result<(), HandshakeError> {
        let deadline = Instant::now() + HANDSHAKE_TIME;
        Timed::until(&connection.stream, deadline).write_all(self.0.bytes())
    }
}

impl Trusted {
    /// Sends one sealed message.
    pub(crate) fn send<T: Serialize>(&mut self, message: &T, deadline: Instant) -> Result<(), HandshakeError> {
        let bytes = self.seals.seal(message);
        Timed::until(&self.stream, deadline).write_all(&bytes)
    }

    /// Waits for one sealed message, and reads nothing beyond it.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self, deadline: Instant) -> Result<T, HandshakeError> {
        let mut timed = Timed::until(&self.stream, deadline);
        loop {
            if let Some(message) = self.seals.next()? {
                return Ok(message);
            }
            let mut bytes = [0; 4096];
            timed.stream.set_read_timeout(Some(timed.remaining()?))?;
            let missing = self.seals.missing().min(bytes.len());
            match timed.stream.read(&mut bytes[..missing]) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(read) => self.seals.push(&bytes[..read]),
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                    timed = Timed::until(&self.stream, deadline);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The connection and the seals of its messages, for an owner that must not block.
    pub(crate) fn into_parts(self) -> (TcpStream, Seals) {
        (self.stream, self.seals)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let caller = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        (caller, listener.accept().expect("a connection").0)
    }

    fn calls(stream: TcpStream, secret: &Secret, goes_on: &dyn Fn() -> bool) -> Result<Trusted, HandshakeError> {
        let patience = Patience { longest: Duration::from_secs(60), look: Duration::from_millis(1), goes_on };
        call(stream, patience, secret, "run", 1, 2, Purpose::Data { session: 7, stream: 0, to: 0 })
    }

    /// A second call would find that the rank has kept the first connection.
    #[test]
    fn a_rank_that_is_slow_to_answer_is_waited_for_on_the_same_connection() {
        let (secret, looks) = (Secret::loopback(), AtomicUsize::new(0));
        let (caller, callee) = connected();
        std::thread::scope(|scope| {
            let answering = scope.spawn(|| {
                while looks.load(Ordering::Relaxed) < 10 {
                    std::thread::yield_now();
                }
                let (hello, trusted, welcome) = answer(callee, &secret).expect("a caller");
                welcome.say(&trusted).expect("it is there");
                hello.rank
            });
            let goes_on = || {
                looks.fetch_add(1, Ordering::Relaxed);
                true
            };
            assert!(calls(caller, &secret, &goes_on).is_ok());
            assert_eq!(answering.join().expect("no panic"), 1);
        });
    }

    #[test]
    fn a_rank_that_is_lost_is_not_waited_for() {
        let looks = AtomicUsize::new(0);
        let (caller, _callee) = connected();
        let goes_on = || looks.fetch_add(1, Ordering::Relaxed) < 3;
        let ended = calls(caller, &Secret::loopback(), &goes_on);
        assert!(matches!(ended, Err(HandshakeError::Late)), "not within a minute");
    }
}
