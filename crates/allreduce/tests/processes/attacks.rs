//! Connections from strangers: whatever they send, they are refused, and neither a join nor a
//! running group is disturbed.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};

use crate::alone;
use crate::children::{Cluster, LONG, Rank, TOKEN, free_address, spec};
use crate::rank::{Act, Event, say as say_line, sum};
use crate::timing::{Times, at_once, in_time};
use crate::wire::{Relay, challenge, closed, connect, framed, hello, join, key_of, key_of_nobody, say, tag};

/// What an eavesdropper recorded of an earlier join with the same token and run.
pub(crate) struct Recording {
    pub(crate) hello: Vec<u8>,
    pub(crate) tag: Vec<u8>,
}

impl Recording {
    /// Joins two ranks, the second one through a relay that listens.
    pub(crate) fn make() -> Recording {
        let rendezvous = free_address();
        let script = || vec![Act::Barrier];
        let relay = Relay::start(rendezvous.parse().expect("an address"), |_, _| ());
        let ranks = [
            Rank::start(&spec(0, 2, &rendezvous, script())),
            Rank::start(&spec(1, 2, &relay.address.to_string(), script())),
        ];
        ranks.iter().for_each(Rank::done);
        let heard = relay.heard.lock().expect("no panic in here");
        // The relay may have been called before rank 0 listened.
        let said = heard.iter().find(|said| said.len() > 200).expect("a handshake went through the relay");
        let length = u32::from_le_bytes(said[4..8].try_into().expect("four bytes")) as usize;
        let (hello, rest) = said[8..].split_at(length);
        assert!(hello.windows(4).any(|word| word == b"join"), "{}", String::from_utf8_lossy(hello));
        Recording { hello: hello.to_vec(), tag: rest[..32].to_vec() }
    }
}

/// A challenge as it travels: its length, two fields, the tag.
const CHALLENGE_BYTES: usize = 4 + 89 + 32;

/// Does something at an address and gives the connections that must be closed then.
type Run = Box<dyn Fn(SocketAddr, &Recording) -> Vec<TcpStream> + Send + Sync>;

struct Attack {
    name: &'static str,
    /// A word of the notice that says why it was refused; "" where there is nothing to refuse.
    why: &'static str,
    run: Run,
}

fn attack(
    name: &'static str,
    why: &'static str,
    run: impl Fn(SocketAddr, &Recording) -> Vec<TcpStream> + Send + Sync + 'static,
) -> Attack {
    Attack { name, why, run: Box::new(run) }
}

/// Says these bytes and listens.
fn bytes(name: &'static str, why: &'static str, said: Vec<u8>) -> Attack {
    attack(name, why, move |address, _| vec![say(connect(address), &said)])
}

/// Says these bytes, closes its own side and listens.
fn ended(name: &'static str, why: &'static str, said: Vec<u8>) -> Attack {
    attack(name, why, move |address, _| {
        let stream = say(connect(address), &said);
        let _ = stream.shutdown(Shutdown::Write);
        vec![stream]
    })
}

/// Says a Hello, and what `answer` makes of the Hello and the challenge as its tag.
fn tagged(
    name: &'static str,
    why: &'static str,
    hello: Value,
    answer: impl Fn(&[u8], &[u8], &[u8; 32]) -> Vec<u8> + Send + Sync + 'static,
) -> Attack {
    attack(name, why, move |address, _| {
        let hello = hello.to_string().into_bytes();
        let (stream, challenge) = challenge(connect(address), &hello);
        let answer = answer(&hello, &challenge.body, &challenge.tag);
        vec![say(stream, &answer)]
    })
}

fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(|_| byte()).collect()
}

/// The beginning of a TLS 1.2 handshake.
fn client_hello() -> Vec<u8> {
    let mut bytes = vec![0x16, 0x03, 0x01, 0x00, 0xc8, 0x01, 0x00, 0x00, 0xc4, 0x03, 0x03];
    bytes.extend(noise(7, 194));
    bytes
}

/// Words of the notices about refused connections.
const FOREIGN: &str = "does not speak this protocol";
const NO_TOKEN: &str = "does not hold the token";
const ENDED_EARLY: &str = "end of file";

/// All attacks, by what the attacker knows.
fn attacks() -> Vec<Attack> {
    [knowing_nothing(), knowing_the_first_bytes(), knowing_all_but_the_token(), with_a_recording()]
        .into_iter()
        .flatten()
        .collect()
}

fn knowing_nothing() -> Vec<Attack> {
    vec![
        attack("a port scan", "", |address, _| {
            (0..200).for_each(|_| drop(connect(address)));
            Vec::new()
        }),
        bytes("HTTP", FOREIGN, b"GET / HTTP/1.1\r\nHost: a\r\nUser-Agent: b\r\n\r\n".to_vec()),
        bytes("TLS", FOREIGN, client_hello()),
        bytes("SSH", FOREIGN, b"SSH-2.0-OpenSSH_9.6\r\n".to_vec()),
        bytes("zeros", FOREIGN, vec![0; 1 << 20]),
        attack("noise", FOREIGN, |address, _| (0..20).map(|seed| say(connect(address), &noise(seed, 4096))).collect()),
        ended("one byte", ENDED_EARLY, b"F".to_vec()),
        bytes("silence", "in time", Vec::new()),
    ]
}

/// Strangers that know the first bytes of the protocol.
fn knowing_the_first_bytes() -> Vec<Attack> {
    let right = right_of(1);
    let with = |name: &str, value: Value| {
        let mut hello = right_of(1);
        hello[name] = value;
        framed(hello.to_string().as_bytes())
    };
    let truncated = framed(right.to_string().as_bytes())[..100].to_vec();
    vec![
        bytes("a giant length", FOREIGN, [b"FTAR".as_slice(), &u32::MAX.to_le_bytes()].concat()),
        bytes("a length too long", FOREIGN, [b"FTAR".as_slice(), &(16u32 * 1024 + 1).to_le_bytes()].concat()),
        bytes("an empty Hello", FOREIGN, framed(b"")),
        ended("a truncated Hello", ENDED_EARLY, truncated.clone()),
        bytes("a truncated Hello, then silence", "in time", truncated),
        bytes("a Hello that is no JSON", FOREIGN, framed(&noise(3, 300))),
        bytes("a Hello of brackets", FOREIGN, framed("[".repeat(16 << 10).as_bytes())),
        bytes("a Hello of nested objects", FOREIGN, framed("{\"run\":".repeat(2000).as_bytes())),
        bytes("a Hello without fields", FOREIGN, framed(b"{}")),
        bytes("a negative rank", FOREIGN, with("rank", json!(-1))),
        bytes("a rank beyond all numbers", FOREIGN, with("rank", json!(1e300))),
        bytes("a rank in words", FOREIGN, with("rank", json!("one"))),
        bytes("an unknown purpose", FOREIGN, with("purpose", json!({"command": {"run": "reboot"}}))),
        bytes(
            "a rank of 2^64",
            FOREIGN,
            framed(right.to_string().replace("\"rank\":1", "\"rank\":18446744073709551616").as_bytes()),
        ),
    ]
}

fn knowing_all_but_the_token() -> Vec<Attack> {
    let right = || right_of(1);
    let wrong_tag =
        |key: [u8; 32]| move |hello: &[u8], body: &[u8], _: &[u8; 32]| tag(&key, "caller", &[hello, body]).to_vec();
    vec![
        ended("a Hello and no more", ENDED_EARLY, framed(right().to_string().as_bytes())),
        tagged("a tag of zeros", NO_TOKEN, right(), |_, _, _| vec![0; 32]),
        tagged("a tag of noise", NO_TOKEN, right(), |_, _, _| noise(1, 32)),
        tagged("half a tag, then silence", "in time", right(), |_, _, _| vec![0; 16]),
        tagged("another token", NO_TOKEN, right(), wrong_tag(key_of("another token, as long as that"))),
        tagged("no token", NO_TOKEN, right(), wrong_tag(key_of_nobody())),
        tagged("a reflected tag", NO_TOKEN, right(), |_, _, tag| tag.to_vec()),
        tagged(
            "a control connection without the token",
            NO_TOKEN,
            hello(2, 3, json!({"control": {"session": 1, "to": 0}})),
            |_, _, _| vec![1; 32],
        ),
        tagged(
            "a data connection without the token",
            NO_TOKEN,
            hello(2, 3, json!({"data": {"session": 1, "stream": 0, "to": 0}})),
            |_, _, _| vec![1; 32],
        ),
        attack("a tag reflected from another connection", NO_TOKEN, |address, _| {
            let hello = right_of(2).to_string().into_bytes();
            let (one, _) = challenge(connect(address), &hello);
            let (other, challenge) = challenge(connect(address), &hello);
            vec![say(one, &challenge.tag), say(other, &challenge.tag)]
        }),
    ]
}

/// Attackers who recorded a rank of this very run, and one who has the token and another version of
/// the program.
fn with_a_recording() -> Vec<Attack> {
    vec![
        attack("a replayed handshake", NO_TOKEN, |address, recording| {
            let (stream, _) = challenge(connect(address), &recording.hello);
            vec![say(stream, &recording.tag)]
        }),
        attack("a replayed handshake in one go", NO_TOKEN, |address, recording| {
            let all = [framed(&recording.hello), recording.tag.clone(), noise(4, 500)].concat();
            vec![say(connect(address), &all)]
        }),
        attack("a recorded Hello with another rank", NO_TOKEN, |address, recording| {
            let hello = String::from_utf8(recording.hello.clone()).expect("JSON");
            let hello = hello.replace("\"rank\":1", "\"rank\":2");
            let (stream, _) = challenge(connect(address), hello.as_bytes());
            vec![say(stream, &recording.tag)]
        }),
        tagged(
            "another version",
            "speaks version 2",
            {
                let mut hello = right_of(1);
                hello["protocol"] = json!(2);
                hello
            },
            |hello, body, _| tag(&key_of(TOKEN), "caller", &[hello, body]).to_vec(),
        ),
        // One that is cut off at its best.
        attack("a reset in the middle", "", |address, recording| {
            let (stream, _) = challenge(connect(address), &recording.hello);
            let linger = Some(Duration::ZERO);
            rustix::net::sockopt::set_socket_linger(&stream, linger).expect("an option that every system has");
            drop(stream);
            Vec::new()
        }),
    ]
}

fn right_of(rank: usize) -> Value {
    hello(rank, 3, join())
}

/// The address where a rank other than 0 listens, from the tables of the system.
#[cfg(target_os = "linux")]
pub(crate) fn listener_of(rank: &Rank) -> Option<SocketAddr> {
    let sockets = std::fs::read_dir(format!("/proc/{}/fd", rank.process())).ok()?;
    let links = sockets.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let numbers: Vec<String> =
        links.filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())).collect();
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    table.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (ip, port) = words.get(1)?.split_once(':')?;
        let listens =
            words.get(3) == Some(&"0A") && numbers.iter().any(|number| words.get(9) == Some(&number.as_str()));
        let ip = u32::from_str_radix(ip, 16).ok()?.to_ne_bytes();
        listens.then_some(SocketAddr::from((ip, u16::from_str_radix(port, 16).ok()?)))
    })
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn listener_of(_: &Rank) -> Option<SocketAddr> {
    None
}

/// Two of three ranks that wait for the third, and where they listen.
pub(crate) fn waiting() -> (Cluster, Vec<SocketAddr>) {
    let rendezvous = free_address();
    let script = || vec![say_line("here"), Act::UntilTold(vec![sum(1000)])];
    let ranks = (0..2).map(|rank| Rank::start(&spec(rank, 3, &rendezvous, script()))).collect();
    let cluster = Cluster { ranks, rendezvous };
    // Rank 0 listens once it can be called. Rank 1 listens before it calls, and calls a little
    // later.
    drop(connect(cluster.address()));
    let mut doors = vec![cluster.address()];
    let deadline = std::time::Instant::now() + LONG;
    while cfg!(target_os = "linux") && doors.len() < 2 {
        assert!(std::time::Instant::now() < deadline, "rank 1 never listens");
        doors.extend(listener_of(&cluster.ranks[1]));
        std::thread::sleep(Duration::from_millis(2));
    }
    std::thread::sleep(Duration::from_millis(20));
    (cluster, doors)
}

/// Lets the third rank come, and gives how long its join took in milliseconds.
pub(crate) fn complete(cluster: &mut Cluster) -> f64 {
    let script = vec![say_line("here"), Act::UntilTold(vec![sum(1000)])];
    cluster.ranks.push(Rank::start(&spec(2, 3, &cluster.rendezvous, script)));
    let took = cluster.ranks[2].joined();
    cluster.said("here");
    took
}

/// The group still works, and ends well.
pub(crate) fn works(cluster: &mut Cluster, what: &str) {
    cluster.ranks[0].tell();
    for rank in &mut cluster.ranks {
        rank.wait("that it is done", LONG, |event| match event {
            Event::Error { text, .. } | Event::NoGroup { text, .. } => panic!("{what}: {text}"),
            Event::Done { .. } => Some(()),
            _ => None,
        });
        assert_eq!(rank.exit_code(), Some(0), "{what}");
    }
}

fn refused(rank: &Rank, why: &str, times: usize, what: &str) {
    // The last refusal may still be on its way.
    let deadline = std::time::Instant::now() + LONG;
    loop {
        let notices = rank.all(|event| match event {
            Event::Refused { why } => Some(why.clone()),
            _ => None,
        });
        if notices.iter().filter(|notice| notice.contains(why)).count() >= times {
            return;
        }
        let late = std::time::Instant::now() >= deadline;
        assert!(!late, "{what}: rank {} did not refuse {times} times for {why:?}: {notices:?}", rank.rank);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn strangers_disturb_neither_a_join_nor_a_group() {
    let _alone = alone();
    let recording = Recording::make();
    let attacks = attacks();
    assert!(attacks.len() >= 25);
    let times = at_once(3, &attacks, |Attack { name, why, run }| {
        in_time(name, 1000.0, || {
            let (mut cluster, doors) = waiting();
            let mut connections: Vec<TcpStream> = doors.iter().flat_map(|door| run(*door, &recording)).collect();
            let took = complete(&mut cluster);
            connections.extend(doors.iter().flat_map(|door| run(*door, &recording)));
            let expected = connections.len() / doors.len();
            for stream in connections {
                let said = closed(stream, name);
                // A challenge is all that anybody gets without the token.
                assert!(said.len() <= CHALLENGE_BYTES, "{name}: was told {:?}", String::from_utf8_lossy(&said));
            }
            for rank in cluster.ranks.iter().take(doors.len()).filter(|_| !why.is_empty()) {
                refused(rank, why, expected, name);
            }
            works(&mut cluster, name);
            Times::from_iter([took])
        })
    });
    let times: Times = times.into_iter().flatten().collect();
    println!("{} attacks refused twice at each door; the join meanwhile: {times}", attacks.len());
}
