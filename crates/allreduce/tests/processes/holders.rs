//! Those who hold the token and are wrong all the same: late, twice, of another group, or out of
//! their minds. And those between two ranks, who hold nothing and change what passes.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};

use crate::alone;
use crate::attacks::{Recording, complete, waiting, works};
use crate::children::{Cluster, Rank, TOKEN, free_address, spec};
use crate::rank::{Act, say as say_line, sum};
use crate::system::milliseconds;
use crate::timing::{Times, in_time};
use crate::wire::{Relay, closed, connect, first_message, key_of, say, shake};

fn script() -> Vec<Act> {
    vec![say_line("here"), Act::UntilTold(vec![sum(1000)])]
}

/// The Hello of a rank of three with the right claims.
fn hello_of(rank: impl Into<Value>, recording: &Recording) -> Value {
    let mut hello: Value = serde_json::from_slice(&recording.hello).expect("a Hello is JSON");
    (hello["rank"], hello["world"]) = (rank.into(), json!(3));
    hello
}

/// Waits for the third rank, with so much of a delay at most.
fn complete_in_time(cluster: &mut Cluster, what: &str) {
    let took = complete(cluster);
    assert!(took < 5000.0, "{what}: {took} ms");
}

#[test]
fn a_rank_for_which_there_is_no_place_is_named_by_all() {
    let _alone = alone();
    let recording = Recording::make();
    for rank in [3, 65_536, u64::MAX] {
        let (cluster, doors) = waiting();
        let (mut stream, key) = shake(doors[0], &hello_of(rank, &recording), &key_of(TOKEN));
        let expected = format!("there is no place for a rank {rank} beside rank 0 of 3 ranks");
        assert_eq!(first_message(&mut stream, &key)["refused"]["why"], expected);
        closed(stream, "no place");
        for rank in &cluster.ranks {
            let (kind, text, _) = rank.no_group();
            assert_eq!(kind, "Differs", "{text}");
            assert!(text.contains(&expected), "{text}");
        }
    }
}

#[test]
fn connections_of_another_group_are_nobodys() {
    let _alone = alone();
    let recording = Recording::make();
    // The address at which rank `to` listens.
    let purposes = |to: usize| {
        [
            json!({"control": {"session": 1, "to": to}}),
            json!({"data": {"session": 1, "stream": 0, "to": to}}),
            json!({"data": {"session": u64::MAX, "stream": u64::MAX, "to": to}}),
        ]
    };
    let visit = |doors: &[SocketAddr]| -> Vec<TcpStream> {
        let doors = doors.iter().enumerate();
        let visits = doors.flat_map(|(to, door)| purposes(to).map(move |purpose| (*door, purpose)));
        let visit = |(door, purpose): (SocketAddr, Value)| {
            let mut hello = hello_of(2, &recording);
            hello["purpose"] = purpose;
            say(shake(door, &hello, &key_of(TOKEN)).0, b"garbage that nobody reads")
        };
        visits.map(visit).collect()
    };
    let (mut cluster, doors) = waiting();
    let before = visit(&doors);
    complete_in_time(&mut cluster, "another group");
    let meanwhile = visit(&doors);
    works(&mut cluster, "another group");
    // At the latest when the group ends, all connections are closed without a message.
    for stream in before.into_iter().chain(meanwhile) {
        assert!(closed(stream, "another group").is_empty());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn callers_that_nobody_waits_for_do_not_pile_up() {
    let _alone = alone();
    let recording = Recording::make();
    let (mut cluster, doors) = waiting();
    complete_in_time(&mut cluster, "callers");
    let open = |rank: &Rank| std::fs::read_dir(format!("/proc/{}/fd", rank.process())).expect("a process").count();
    let before = open(&cluster.ranks[0]);
    let mut hello = hello_of(2, &recording);
    hello["purpose"] = json!({"data": {"session": 1, "stream": 0, "to": 0}});
    for _ in 0..300 {
        drop(shake(doors[0], &hello, &key_of(TOKEN)));
    }
    let after = open(&cluster.ranks[0]);
    assert!(after < before + 100, "{before} open files, {after} after 300 callers");
    works(&mut cluster, "callers that nobody waits for");
}

#[test]
fn a_rank_that_speaks_before_its_turn_loses_its_place() {
    let _alone = alone();
    let recording = Recording::make();
    for last_words in [b"garbage".as_slice(), &[0xff; 70_000]] {
        let rendezvous = free_address();
        let mut cluster = Cluster { ranks: vec![Rank::start(&spec(0, 3, &rendezvous, script()))], rendezvous };
        drop(connect(cluster.address()));
        let (stream, _) = shake(cluster.address(), &hello_of(1, &recording), &key_of(TOKEN));
        let stream = say(stream, last_words);
        cluster.ranks.push(Rank::start(&spec(1, 3, &cluster.rendezvous, script())));
        complete_in_time(&mut cluster, "garbage after a handshake");
        closed(stream, "garbage after a handshake");
        works(&mut cluster, "garbage after a handshake");
    }
}

/// The last rank comes, and ends before its connections to the others are made: no rank waits for
/// it until the time is up.
#[test]
fn a_rank_that_ends_while_the_group_is_set_up_is_named() {
    let _alone = alone();
    let recording = Recording::make();
    let times = in_time("ended in the middle of a join", 2000.0, || {
        let (cluster, doors) = waiting();
        let (mut stream, key) = shake(doors[0], &hello_of(2, &recording), &key_of(TOKEN));
        assert_eq!(first_message(&mut stream, &key)["roster"]["members"].as_array().map(Vec::len), Some(3));
        drop(stream);
        let at = milliseconds();
        let errors = cluster.ranks.iter().map(|rank| (rank.rank, rank.no_group()));
        let times = errors.map(|(rank, (kind, text, when))| {
            assert_eq!(kind, "Peer", "{text}");
            let lost = if rank == 0 { "rank 0 lost rank 2" } else { "rank 1 lost rank 0" };
            assert!(text.contains(lost), "{text}");
            when - at
        });
        times.collect()
    });
    println!("ended in the middle of a join: {times}");
}

#[test]
fn a_rank_that_comes_when_the_group_is_complete_disturbs_nobody() {
    let _alone = alone();
    let recording = Recording::make();
    let (mut cluster, doors) = waiting();
    complete_in_time(&mut cluster, "a group");
    let visits: Vec<TcpStream> =
        (0..3u64).map(|rank| shake(doors[0], &hello_of(rank, &recording), &key_of(TOKEN)).0).collect();
    let mut late = spec(1, 3, &cluster.rendezvous, script());
    late.join_timeout = Duration::from_secs(1);
    let (kind, text, _) = Rank::start(&late).no_group();
    assert_eq!(kind, "Unreachable", "{text}");
    assert!(text.contains("a group that is at work"), "{text}");
    works(&mut cluster, "ranks that come too late");
    visits.into_iter().for_each(|stream| assert!(closed(stream, "too late").is_empty()));
}

/// A relay between rank 2 and rank 0 changes the rank in its first Hello. Neither side believes it,
/// and the next try, which passes unchanged, succeeds. The recorded bytes of the first try open
/// nothing.
#[test]
fn a_hello_that_was_changed_on_the_way_is_not_believed() {
    let _alone = alone();
    let changes: [(&str, &str); 4] = [
        ("\"rank\":2", "\"rank\":1"),
        ("\"world\":3", "\"world\":4"),
        ("\"run\":\"a run\"", "\"run\":\"b run\""),
        ("\"stream\":0", "\"stream\":1"),
    ];
    for (from, to) in changes {
        in_time(&format!("{from} becomes {to}"), 1000.0, || {
            let rendezvous = free_address();
            let change = move |number: usize, bytes: &mut Vec<u8>| {
                let said = String::from_utf8_lossy(bytes).into_owned();
                if number < 2 && said.contains(from) {
                    *bytes = bytes.clone();
                    let at = said.find(from).expect("just seen");
                    // The length and the magic are plain bytes: the text begins where it does in
                    // the lossy copy.
                    bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
                }
            };
            let mut ranks: Vec<Rank> = (0..2).map(|rank| Rank::start(&spec(rank, 3, &rendezvous, script()))).collect();
            let address: SocketAddr = rendezvous.parse().expect("an address");
            drop(connect(address));
            let relay = Relay::start(address, change);
            ranks.push(Rank::start(&spec(2, 3, &relay.address.to_string(), script())));
            let mut cluster = Cluster { ranks, rendezvous };
            cluster.said("here");
            let took = cluster.ranks[2].joined();
            works(&mut cluster, "a changed Hello");
            Times::from_iter([took])
        });
    }
}

/// A stranger listens where rank 0 should. It knows the protocol and not the token.
#[test]
fn an_impostor_in_the_place_of_rank_0_learns_nothing_and_delays_little() {
    let _alone = alone();
    let rendezvous = free_address();
    let listener = TcpListener::bind(&rendezvous).expect("a free port");
    let mut early = vec![Rank::start(&spec(1, 3, &rendezvous, script()))];
    for answer in 0..4u8 {
        use std::io::Read;
        let (mut caller, _) = listener.accept().expect("rank 1 calls again and again");
        caller.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let mut said = vec![0; 8];
        caller.read_exact(&mut said).expect("magic and length");
        let length = u32::from_le_bytes(said[4..].try_into().expect("four bytes")) as usize;
        let mut hello = vec![0; length];
        caller.read_exact(&mut hello).expect("a Hello");
        assert!(!String::from_utf8_lossy(&hello).contains(TOKEN));
        let challenge = json!({"protocol": 1, "nonce": "00"}).to_string();
        let framed = |body: &[u8]| [&(body.len() as u32).to_le_bytes(), body].concat();
        let caller = match answer {
            0 => say(caller, &[framed(challenge.as_bytes()), vec![0; 32]].concat()),
            1 => say(caller, &framed(&hello)),
            2 => say(caller, &u32::MAX.to_le_bytes()),
            _ => say(caller, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        };
        // The rank goes away without its own tag: there is nothing to take to the real rank 0.
        assert!(closed(caller, "an impostor").is_empty());
    }
    drop(listener);
    early.insert(0, Rank::start(&spec(0, 3, &rendezvous, script())));
    let mut cluster = Cluster { ranks: early, rendezvous };
    complete_in_time(&mut cluster, "an impostor");
    works(&mut cluster, "an impostor");
}

/// A rank that meets something else at rank 0's address says so soon, and does not try until its
/// time is up.
#[test]
fn something_else_at_the_address_is_called_that() {
    let _alone = alone();
    let rendezvous = free_address();
    let listener = TcpListener::bind(&rendezvous).expect("a free port");
    std::thread::spawn(move || {
        for caller in listener.incoming().map_while(Result::ok) {
            drop(say(caller, b"220 mail.example.org ESMTP\r\n"));
        }
    });
    let times = in_time("something else", 6000.0, || {
        let rank = Rank::start(&spec(1, 2, &rendezvous, script()));
        let (kind, text, at) = rank.no_group();
        assert_eq!(kind, "Unreachable");
        assert!(text.contains("it does not speak this protocol"), "{text}");
        let started = rank.all(|event| match event {
            crate::rank::Event::Started { at } => Some(*at),
            _ => None,
        });
        Times::from_iter([at - started[0]])
    });
    println!("something else at the address: {times}");
}
