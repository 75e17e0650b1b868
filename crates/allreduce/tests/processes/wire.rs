//! The handshake as bytes, for those who do not follow it. Made from what `handshake.rs` and
//! `secret.rs` document, not from their code.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::children::LONG;

/// Longer than a rank questions anybody (5 s).
pub(crate) const PATIENCE: Duration = Duration::from_secs(15);

/// The key that a token gives.
pub(crate) fn key_of(token: &str) -> [u8; 32] {
    blake3::derive_key("finetune allreduce 2026-11 token", token.as_bytes())
}

/// The key of those who have no token.
pub(crate) fn key_of_nobody() -> [u8; 32] {
    blake3::derive_key("finetune allreduce 2026-11 loopback", b"")
}

/// A tag over `parts` for a purpose.
pub(crate) fn tag(key: &[u8; 32], purpose: &str, parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    for part in [purpose.as_bytes()].iter().chain(parts) {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

/// What a rank says first.
pub(crate) fn hello(rank: impl Into<Value>, world: impl Into<Value>, purpose: Value) -> Value {
    let (rank, world): (Value, Value) = (rank.into(), world.into());
    let nonce = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
    json!({"protocol": 1, "run": "a run", "rank": rank, "world": world, "purpose": purpose, "nonce": nonce})
}

/// The purpose of a rank that joins with the claims of [`crate::children::spec`].
pub(crate) fn join() -> Value {
    let claim = |name: &str, content: &str| json!([name, blake3::hash(content.as_bytes()).to_hex().as_str()]);
    let claims = [claim("recipe", "one"), claim("program", "two")];
    json!({"join": {"port": 9, "host": "elsewhere", "pid": 1, "claims": claims}})
}

/// Magic, length and body.
pub(crate) fn framed(body: &[u8]) -> Vec<u8> {
    [b"FTAR".as_slice(), &(body.len() as u32).to_le_bytes(), body].concat()
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let deadline = Instant::now() + LONG;
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
                return stream;
            }
            Err(error) => assert!(Instant::now() < deadline, "nobody listens at {address}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends what the other side may refuse to read.
pub(crate) fn say(mut stream: TcpStream, bytes: &[u8]) -> TcpStream {
    let _ = stream.write_all(bytes);
    stream
}

/// A challenge: its body and the callee's tag.
pub(crate) struct Challenge {
    pub(crate) body: Vec<u8>,
    pub(crate) tag: [u8; 32],
}

/// Sends a Hello and reads the challenge.
pub(crate) fn challenge(stream: TcpStream, hello: &[u8]) -> (TcpStream, Challenge) {
    let mut stream = say(stream, &framed(hello));
    let mut length = [0; 4];
    stream.read_exact(&mut length).expect("a challenge's length");
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut body).expect("a challenge");
    let mut tag = [0; 32];
    stream.read_exact(&mut tag).expect("a challenge's tag");
    (stream, Challenge { body, tag })
}

/// A whole handshake with the token's key, and the sealing key of what the callee says next.
pub(crate) fn shake(address: SocketAddr, hello: &Value, key: &[u8; 32]) -> (TcpStream, [u8; 32]) {
    let hello = hello.to_string();
    let (stream, challenge) = challenge(connect(address), hello.as_bytes());
    let said: [&[u8]; 2] = [hello.as_bytes(), &challenge.body];
    assert_eq!(challenge.tag, tag(key, "callee", &said), "the callee holds the token");
    let mut stream = say(stream, &tag(key, "caller", &said));
    let mut welcome = [0; 32];
    stream.read_exact(&mut welcome).expect("a welcome");
    assert_eq!(welcome, tag(key, "welcome", &said));
    (stream, tag(key, "key of the callee", &said))
}

/// The first sealed message on a connection.
pub(crate) fn first_message(stream: &mut TcpStream, key: &[u8; 32]) -> Value {
    let mut length = [0; 4];
    stream.read_exact(&mut length).expect("a message's length");
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut body).expect("a message");
    let mut found = [0; 32];
    stream.read_exact(&mut found).expect("a seal");
    assert_eq!(found, tag(key, "message", &[&0u64.to_le_bytes(), &body]), "sealed with the key of the connection");
    serde_json::from_slice(&body).expect("a message is JSON")
}

/// Waits until the other side closes, and gives all that it said. Panics if it keeps the
/// connection.
pub(crate) fn closed(mut stream: TcpStream, what: &str) -> Vec<u8> {
    let (mut said, mut bytes) = (Vec::new(), [0; 4096]);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return said,
            Ok(read) => said.extend_from_slice(&bytes[..read]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("{what}: the connection is still open after {PATIENCE:?}");
            }
            Err(_) => return said,
        }
        assert!(Instant::now() < deadline, "{what}: still talking after {PATIENCE:?}");
    }
}

/// A relay in front of a rank's listener, which may change or keep what the caller says.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    /// What each caller said, up to 64 KiB.
    pub(crate) heard: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Relay {
    /// Starts relaying. `change` gets the number of the connection and the caller's first bytes.
    /// The threads end with their connections, the accepting one with the test.
    pub(crate) fn start(to: SocketAddr, change: impl Fn(usize, &mut Vec<u8>) + Send + Sync + 'static) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let relay = Relay { address: listener.local_addr().expect("an address"), heard: Arc::default() };
        let (heard, change) = (Arc::clone(&relay.heard), Arc::new(change));
        std::thread::spawn(move || {
            for (number, caller) in listener.incoming().map_while(Result::ok).enumerate() {
                let (heard, change) = (Arc::clone(&heard), Arc::clone(&change));
                heard.lock().expect("no panic in here").push(Vec::new());
                std::thread::spawn(move || {
                    // Nobody there: the caller finds its connection closed, as it would without a
                    // relay.
                    let Ok(callee) = TcpStream::connect(to) else { return };
                    let (back, forth) = (callee.try_clone().expect("a handle"), caller.try_clone().expect("a handle"));
                    let answers = std::thread::spawn(move || pass(back, forth, |_| ()));
                    let mut first = true;
                    pass(caller, callee, |bytes| {
                        if std::mem::take(&mut first) {
                            change(number, bytes);
                        }
                        let heard = &mut heard.lock().expect("no panic in here")[number];
                        if heard.len() < 64 << 10 {
                            heard.extend_from_slice(bytes);
                        }
                    });
                    let _ = answers.join();
                });
            }
        });
        relay
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, mut look: impl FnMut(&mut Vec<u8>)) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(read) = from.read(&mut bytes) {
        let mut passed = bytes[..read].to_vec();
        look(&mut passed);
        if read == 0 || to.write_all(&passed).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
