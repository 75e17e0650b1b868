//! How ranks meet: all of them, in time, or with an error on each that says who is to blame.

use std::net::TcpListener;
use std::time::Duration;

use finetune_allreduce::{Algorithm, Config, Group, JoinError, Secret};

use crate::alone;
use crate::attacks::{complete, waiting, works};
use crate::children::{Cluster, LONG, Rank, TOKEN, free_address, spec};
use crate::rank::{Act, Event, Spec, say, sum};
use crate::system::Signal;
use crate::timing::in_time;

fn script() -> Vec<Act> {
    vec![say("here"), Act::UntilTold(vec![sum(1000)])]
}

/// Starts ranks with what `change` makes of their specs.
fn start(world: usize, change: impl Fn(usize, &mut Spec)) -> Cluster {
    let rendezvous = free_address();
    let rank = |rank| {
        let mut spec = spec(rank, world, &rendezvous, script());
        change(rank, &mut spec);
        Rank::start(&spec)
    };
    Cluster { ranks: (0..world).map(rank).collect(), rendezvous }
}

#[test]
fn ranks_join_in_time() {
    let _alone = alone();
    for world in [2, 3, 8] {
        let times = in_time(&format!("{world} ranks"), 1000.0, || {
            let mut cluster = start(world, |_, _| ());
            let times = cluster.ranks.iter().map(Rank::joined).collect();
            works(&mut cluster, "a join");
            times
        });
        println!("{world} ranks join: {times}");
    }
}

#[test]
fn addresses_may_be_names_or_of_the_other_family() {
    let _alone = alone();
    for host in ["localhost", "[::1]"] {
        let Ok(listener) = TcpListener::bind(format!("{host}:0")) else {
            println!("SKIPPED: this machine has no {host}");
            continue;
        };
        // A name can have addresses of both families; the port must be free on all.
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let mut cluster = start(3, |_, spec| spec.rendezvous = format!("{host}:{port}"));
        cluster.said("here");
        works(&mut cluster, host);
    }
}

#[test]
fn settings_that_must_be_the_same_are_compared() {
    let _alone = alone();
    type Change = fn(&mut Spec);
    let changes: [Change; 3] = [
        |spec| spec.streams = 2,
        |spec| spec.timeout = Duration::from_secs(7),
        |spec| spec.topology = Some(Algorithm::Ring),
    ];
    for change in changes {
        let cluster = start(3, |rank, spec| {
            if rank == 2 {
                change(spec);
            }
        });
        for rank in &cluster.ranks {
            let (kind, text, _) = rank.no_group();
            assert_eq!(kind, "Differs", "{text}");
            assert!(text.starts_with("rank 2 (") && text.contains("settings"), "{text}");
        }
    }
}

#[test]
fn ranks_that_differ_are_told_in_what() {
    let _alone = alone();
    type Claims = Vec<(String, String)>;
    let claims = |claims: &[(&str, &str)]| -> Claims {
        claims.iter().map(|(name, content)| (name.to_string(), content.to_string())).collect()
    };
    // What one of three ranks claims, and what the error says of it. The others claim a recipe
    // "one" and a program "two".
    let cases = [
        (claims(&[("recipe", "ONE"), ("program", "two")]), "its recipe is not rank 0's"),
        (claims(&[("recipe", "one"), ("program", "TWO")]), "its program is not rank 0's"),
        (claims(&[("recipe", "one")]), "it does not say what its program is"),
        (claims(&[("recipe", "one"), ("programme", "two")]), "it does not say what its program is"),
        (claims(&[("recipe", "one"), ("program", "two"), ("data", "3")]), "claims that rank 0 does not"),
        (claims(&[]), "it does not say what its recipe is"),
    ];
    for (claims, expected) in &cases {
        for culprit in [1, 2] {
            let cluster = start(3, |rank, spec| {
                if rank == culprit {
                    spec.claims = claims.clone();
                }
            });
            for rank in &cluster.ranks {
                let (kind, text, _) = rank.no_group();
                assert_eq!(kind, "Differs", "rank {} of {claims:?}: {text}", rank.rank);
                assert!(text.starts_with(&format!("rank {culprit} (")), "{text}");
                assert!(text.contains(expected), "{text}");
            }
        }
    }
    // The order of claims is not a difference.
    let mut cluster = start(2, |rank, spec| {
        if rank == 1 {
            spec.claims.reverse();
        }
    });
    cluster.said("here");
    works(&mut cluster, "claims in another order");
}

#[test]
fn ranks_with_another_number_of_ranks_are_named() {
    let _alone = alone();
    for (world, culprit, claimed) in [(3, 1, 4), (3, 2, 5), (2, 1, 3)] {
        let cluster = start(world, |rank, spec| {
            if rank == culprit {
                spec.world = claimed;
            }
        });
        for rank in &cluster.ranks {
            let (kind, text, _) = rank.no_group();
            assert_eq!(kind, "Differs", "{text}");
            let expected = format!("it was started as one of {claimed} ranks, rank 0 as one of {world}");
            assert!(text.starts_with(&format!("rank {culprit} (")) && text.contains(&expected), "{text}");
        }
    }
}

#[test]
fn missing_ranks_are_named_by_those_who_are_there() {
    let _alone = alone();
    // Time enough for all processes to start, also on a busy machine.
    let soon = Duration::from_secs(6);
    for (present, missing) in [(vec![0, 1], "ranks 2 and 3"), (vec![0, 2, 3], "rank 1"), (vec![0], "ranks 1, 2 and 3")]
    {
        let rendezvous = free_address();
        let start = |rank: &usize| {
            let mut spec = spec(*rank, 4, &rendezvous, script());
            spec.join_timeout = soon;
            Rank::start(&spec)
        };
        // In this order rank 0 is the last one whose time is up: what it says counts.
        let ranks: Vec<Rank> = present.iter().rev().map(start).collect();
        for rank in &ranks {
            let (kind, text, _) = rank.no_group();
            assert_eq!(kind, "Missing", "rank {}: {text}", rank.rank);
            let here = format!("{missing} did not join within 6 s; {} of 4 ranks are here", present.len());
            assert!(text.starts_with(&here) && text.contains(&rendezvous), "{text}");
        }
    }
}

#[test]
fn without_rank_0_its_address_is_named() {
    let _alone = alone();
    let rendezvous = free_address();
    let mut lonely = spec(1, 2, &rendezvous, script());
    lonely.join_timeout = Duration::from_secs(1);
    let (kind, text, _) = Rank::start(&lonely).no_group();
    assert_eq!(kind, "Unreachable");
    assert!(text.starts_with(&format!("rank 1 did not reach rank 0 at {rendezvous} within ")), "{text}");
    assert!(text.contains("refused") && text.contains("firewall"), "{text}");
}

#[test]
fn a_port_that_is_taken_is_said_at_once() {
    let _alone = alone();
    let rendezvous = free_address();
    let _taken = TcpListener::bind(&rendezvous).expect("a free port");
    let (kind, text, _) = Rank::start(&spec(0, 2, &rendezvous, script())).no_group();
    assert_eq!(kind, "Listen");
    assert!(text.contains(&format!("cannot listen at {rendezvous}: Address already in use")), "{text}");
}

#[test]
fn a_rank_that_starts_again_before_all_are_here_joins() {
    let _alone = alone();
    let (mut cluster, _) = waiting();
    for _ in 0..5 {
        cluster.ranks[1].strike(Signal::Kill);
        // Its place is free again as soon as rank 0 hears that it is gone, not before.
        cluster.ranks[1].exit_code();
        cluster.ranks[1] = Rank::start(&spec(1, 3, &cluster.rendezvous, script()));
        std::thread::sleep(Duration::from_millis(30));
    }
    complete(&mut cluster);
    works(&mut cluster, "started again");
}

#[test]
fn rank_0_may_start_again_too() {
    let _alone = alone();
    let (mut cluster, _) = waiting();
    for _ in 0..3 {
        cluster.ranks[0].strike(Signal::Kill);
        cluster.ranks[0].exit_code();
        std::thread::sleep(Duration::from_millis(30));
        cluster.ranks[0] = Rank::start(&spec(0, 3, &cluster.rendezvous, script()));
        std::thread::sleep(Duration::from_millis(30));
    }
    complete(&mut cluster);
    works(&mut cluster, "started again");
}

#[test]
fn a_rank_that_is_there_twice_is_told_so() {
    let _alone = alone();
    let (mut cluster, _) = waiting();
    let second = Rank::start(&spec(1, 3, &cluster.rendezvous, script()));
    let (kind, text, _) = second.no_group();
    assert_eq!(kind, "Differs");
    let first = "rank 1 has already joined from ";
    assert!(text.contains(first) && text.contains(&format!("(process {})", cluster.ranks[1].process())), "{text}");
    complete(&mut cluster);
    works(&mut cluster, "a rank that is there twice");
}

#[test]
fn a_second_rank_0_is_told_who_is_first() {
    let _alone = alone();
    let (mut cluster, _) = waiting();
    let second = Rank::start(&spec(0, 3, &cluster.rendezvous, script()));
    let (kind, text, _) = second.no_group();
    assert_eq!(kind, "SecondRankZero");
    let first = format!("(process {})", cluster.ranks[0].process());
    assert!(text.contains("another process is rank 0 there already") && text.contains(&first), "{text}");
    complete(&mut cluster);
    works(&mut cluster, "a second rank 0");
}

/// Without a name of the run a rank with another recipe may be of another job, which has the port
/// by mistake.
#[test]
fn a_rank_of_another_job_does_not_end_the_join() {
    let _alone = alone();
    let rendezvous = free_address();
    let nameless = |rank: usize, recipe: &str| {
        let mut spec = spec(rank, 2, &rendezvous, script());
        spec.run = String::new();
        spec.claims[0].1 = recipe.into();
        Rank::start(&spec)
    };
    let first = nameless(0, "one");
    let (kind, text, _) = nameless(1, "two").no_group();
    assert_eq!(kind, "Differs", "{text}");
    std::thread::sleep(Duration::from_millis(300));
    let ranks = vec![first, nameless(1, "one")];
    let mut cluster = Cluster { ranks, rendezvous: rendezvous.clone() };
    cluster.said("here");
    works(&mut cluster, "a stray");
}

#[test]
fn who_waits_says_for_whom() {
    let _alone = alone();
    let rendezvous = free_address();
    let lonely = Rank::start(&spec(1, 2, &rendezvous, script()));
    let said = |rank: &Rank, part: &str| {
        rank.wait(part, LONG, |event| match event {
            Event::Said { what, .. } if what.contains(part) => Some(()),
            _ => None,
        });
    };
    said(&lonely, &format!("waiting for rank 0 at {rendezvous}: "));
    drop(lonely);
    let rendezvous = free_address();
    let first = Rank::start(&spec(0, 3, &rendezvous, script()));
    said(&first, "1 of 3 ranks are here");
    said(&first, &format!("waiting for ranks 1 and 2 to call {rendezvous}"));
}

/// What rank 0 calls its own address need not be what the others call it.
#[test]
fn rank_0_may_call_its_machine_localhost() {
    let _alone = alone();
    // Connecting a datagram socket sends nothing, and tells this machine's address.
    let own = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.1:9")?;
        socket.local_addr()
    });
    let Ok(own) = own.map(|address| address.ip()).map_err(|error| println!("SKIPPED: no network: {error}")) else {
        return;
    };
    let port = free_address().parse::<std::net::SocketAddr>().expect("an address").port();
    let mut cluster = start(3, |rank, spec| {
        spec.everywhere = true;
        spec.rendezvous = if rank == 0 { format!("localhost:{port}") } else { format!("{own}:{port}") };
    });
    cluster.said("here");
    works(&mut cluster, "localhost");
}

#[test]
fn ranks_of_others_are_turned_away_and_told_why() {
    let _alone = alone();
    type Change = fn(&mut Spec);
    let cases: [(&str, Change); 4] = [
        ("it does not hold the token", |spec| spec.token = Some("another token, long enough".into())),
        ("it does not hold the token", |spec| spec.token = None),
        ("it belongs to run \"a run\", this rank to run \"another\"", |spec| spec.run = "another".into()),
        ("it belongs to run \"a run\", this rank to run \"\"", |spec| spec.run = String::new()),
    ];
    let (mut cluster, _) = waiting();
    let others: Vec<Rank> = cases
        .iter()
        .map(|(_, change)| {
            let mut spec = spec(2, 3, &cluster.rendezvous, script());
            change(&mut spec);
            Rank::start(&spec)
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let took = complete(&mut cluster);
    assert!(took < 5000.0, "{took} ms");
    for (rank, (expected, _)) in others.iter().zip(&cases) {
        // In time for somebody who watches, not only when its time is up; it is patient with
        // leftovers of an earlier run.
        let (kind, text, _) = rank.no_group();
        assert_eq!(kind, "Unreachable", "{text}");
        assert!(text.contains(expected), "{text}");
    }
    works(&mut cluster, "ranks of others");
}

/// Errors that need no network, as [`Group::join`] gives them.
#[test]
fn what_cannot_work_is_refused_before_anybody_is_called() {
    let join = |config: &Config| Group::join(config).err().expect("an error");
    let token = || Secret::from_token(TOKEN).expect("a token");
    let config = |rank, world, rendezvous: &str, secret| Config::new(rank, world, rendezvous, secret);
    let mut hasty = config(1, 2, "127.0.0.1:1", token());
    hasty.timeout = Duration::from_millis(100);
    let cases = [
        (config(2, 2, "127.0.0.1:1", token()), "rank 2 is not below the number of ranks, 2"),
        (config(usize::MAX, 2, "127.0.0.1:1", token()), "is not below the number of ranks"),
        (config(0, 0, "127.0.0.1:1", token()), "rank 0 is not below the number of ranks, 0"),
        (config(0, 70_000, "127.0.0.1:1", token()), "70000 ranks are more than a group can have"),
        (hasty, "too short to tell a slow rank from a lost one"),
        (config(1, 2, "192.0.2.1:1", Secret::loopback()), "192.0.2.1:1 is not a loopback address"),
        (config(0, 2, "192.0.2.1:1", Secret::loopback()), "192.0.2.1:1 is not a loopback address"),
        (config(0, 2, "0.0.0.0:1", Secret::loopback()), "0.0.0.0:1 is not a loopback address"),
        (config(1, 2, "[2001:db8::1]:1", Secret::loopback()), "is not a loopback address"),
        (config(1, 2, "nonsense", token()), "\"nonsense\" is not host:port"),
        (config(0, 2, "", token()), "\"\" is not host:port"),
    ];
    for (config, expected) in &cases {
        let error = join(config);
        assert!(matches!(error, JoinError::Config(_)), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!format!("{error:?} {error}").contains(TOKEN));
    }
    // A name may come later than those who ask for it: they try until their time is up.
    for rank in [0, 1] {
        let mut config = config(rank, 2, "no-such-host.invalid:1", token());
        config.join_timeout = Duration::from_secs(2);
        let error = join(&config);
        assert!(matches!(error, JoinError::Unresolved { .. }), "{error:?}");
        assert!(error.to_string().contains("no-such-host.invalid:1 could not be resolved within"), "{error}");
    }
    assert!(Secret::from_token("  fifteen bytes..  ").is_none() && Secret::from_token("sixteen bytes...").is_some());
    let key = blake3::derive_key("finetune allreduce 2026-11 token", TOKEN.as_bytes());
    let shown = format!("{:?}", token());
    assert_eq!(shown, "Secret(not shown)");
    assert!(!shown.contains(&blake3::Hash::from_bytes(key).to_hex().to_string()));
}

#[test]
fn a_group_of_one_needs_nobody() {
    let _alone = alone();
    let mut cluster = start(1, |_, spec| spec.rendezvous = "nowhere at all".into());
    assert!(cluster.ranks[0].joined() < 1000.0);
    works(&mut cluster, "a group of one");
}
