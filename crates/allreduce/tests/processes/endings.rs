//! Ranks that stop by themselves: with a message, without one, or because they do different things.

use finetune_allreduce::{Algorithm, Reduction, WireDtype};

use crate::alone;
use crate::children::{Cluster, Failed};
use crate::rank::{Act, say, sum, sum_by};
use crate::timing::{Times, at_once, in_time};

/// Waits for the error of every rank. All must give the same root cause, which names `named`.
fn same_error(cluster: &Cluster, ranks: impl Iterator<Item = usize>, named: &[usize], what: &str) -> Vec<Failed> {
    let failed: Vec<Failed> = ranks.map(|rank| cluster.ranks[rank].error()).collect();
    for error in &failed {
        assert_eq!(error.root_cause, failed[0].root_cause, "{what}: ranks differ");
        for rank in named {
            let name = format!("rank {rank} (");
            let process = format!("process {})", cluster.ranks[*rank].process());
            let both = error.root_cause.contains(&name) && error.root_cause.contains(&process);
            assert!(both, "{what}: {} does not name rank {rank}", error.text);
        }
    }
    failed
}

/// How long after the last rank had said "now" each one had its error.
fn since_now(cluster: &Cluster, failed: &[Failed]) -> Times {
    let now = cluster.ranks.iter().map(|rank| rank.said("now")).fold(0.0, f64::max);
    failed.iter().map(|error| error.at - now).collect()
}

fn reduce(elements: usize, reduction: Reduction, wire: WireDtype, tag: u64) -> Act {
    Act::AllReduce { elements, reduction, wire, tag, algorithm: None }
}

#[test]
fn ranks_that_do_different_things_are_both_named() {
    let _alone = alone();
    let broadcast = |root| Act::Broadcast { bytes: 5000, root };
    let tagged = |tag| reduce(1000, Reduction::Sum, WireDtype::Exact, tag);
    let way = |way| sum_by(1000, Some(way));
    let background = Act::Background { elements: 70_000, buffers: 2 };
    // What the others do, what one rank does, and a word of each that the error must have.
    type Case = (&'static str, Vec<Act>, Vec<Act>, [&'static str; 2]);
    let cases: Vec<Case> = vec![
        ("length", vec![sum(1000)], vec![sum(1001)], ["of 1000 f32", "of 1001 f32"]),
        ("nothing", vec![sum(1000)], vec![sum(0)], ["of 1000 f32", "of 0 f32"]),
        ("large", vec![sum(3_000_000)], vec![sum(2_999_999)], ["of 3000000 f32", "of 2999999 f32"]),
        ("layout", vec![tagged(0xabc)], vec![tagged(0xabd)], ["0000000000000abc", "0000000000000abd"]),
        ("reduction", vec![sum(9)], vec![reduce(9, Reduction::Max, WireDtype::Exact, 0)], ["(sum)", "(max)"]),
        ("wire", vec![sum(9)], vec![reduce(9, Reduction::Sum, WireDtype::Bf16, 0)], ["of 9 f32", "bf16 on the wire"]),
        ("way", vec![way(Algorithm::Direct)], vec![way(Algorithm::Mesh)], ["direct", "mesh"]),
        ("ring", vec![way(Algorithm::Mesh)], vec![way(Algorithm::Ring)], ["mesh", "ring"]),
        // Here no rank gets a frame of the other operation: each waits for one that waits as well.
        ("star", vec![way(Algorithm::Star)], vec![broadcast(0)], ["star", "broadcast"]),
        ("barrier", vec![sum(1000)], vec![Act::Barrier], ["all_reduce", "barrier"]),
        ("gather", vec![sum(1000)], vec![Act::AllGather { bytes: 4000 }], ["all_reduce", "all_gather"]),
        ("scatter", vec![sum(1000)], vec![Act::ReduceScatter { elements: 1000 }], ["all_reduce", "reduce_scatter"]),
        ("broadcast", vec![Act::Barrier], vec![broadcast(0)], ["barrier", "broadcast"]),
        (
            "all to all",
            vec![Act::AllToAll { bytes: 8 }],
            vec![Act::AllGather { bytes: 8 }],
            ["all_to_all", "all_gather"],
        ),
        ("background", vec![background.clone()], vec![sum(7)], ["of 70000 f32", "of 7 f32"]),
        ("order", vec![sum(5), sum(6)], vec![sum(6), sum(5)], ["of 5 f32", "of 6 f32"]),
        ("one less", vec![sum(5), sum(5), sum(8)], vec![sum(5), sum(8)], ["of 5 f32", "of 8 f32"]),
        ("one more", vec![Act::Barrier, sum(8)], vec![Act::Barrier, Act::Barrier, sum(8)], ["barrier", "of 8 f32"]),
        ("one less of equals", vec![sum(5), sum(5), Act::Barrier], vec![sum(5), Act::Barrier], ["of 5 f32", "barrier"]),
    ];
    let mut times = Times::default();
    let mut count = 0;
    for (name, usual, different, words) in &cases {
        for (world, culprit) in [(2, 1), (3, 0), (4, 2)] {
            let what = format!("{name}, rank {culprit} of {world}");
            times.extend(in_time(&what, 1000.0, || {
                let script = |rank| {
                    let acts = if rank == culprit { different } else { usual };
                    // A rank that gets through, such as the root of a broadcast, learns of it all
                    // the same.
                    [&[say("now")], acts.as_slice(), &[Act::Idle]].concat()
                };
                let cluster = Cluster::start(world, script, |_| ());
                let failed = same_error(&cluster, 0..world, &[culprit], &what);
                let cause = &failed[0].root_cause;
                assert!(cause.contains("do different things"), "{what}: {cause}");
                assert!(words.iter().all(|word| cause.contains(word)), "{what}, {words:?}: {cause}");
                since_now(&cluster, &failed)
            }));
            count += 1;
        }
    }
    println!("divergence: {count} cases, {times}");
}

#[test]
fn messages_and_parts_diverge_too() {
    let _alone = alone();
    let color = |rank: usize| (rank % 2) as u64;
    let part = |rank: usize, act: Act| vec![Act::Split { color: color(rank) }, say("now"), act, Act::Idle];
    let message = |rank: usize| match rank {
        0 => vec![say("now"), Act::Send { bytes: 100, to: 2 }, Act::Idle],
        2 => vec![say("now"), Act::Recv { bytes: 101, from: 0 }, Act::Idle],
        _ => vec![say("now"), Act::Idle],
    };
    let in_part = |rank: usize| part(rank, if rank == 3 { sum(11) } else { sum(10) });
    let mixed = |rank: usize| match rank {
        1 => vec![say("now"), Act::Send { bytes: 8, to: 0 }, Act::Idle],
        _ => vec![say("now"), Act::Barrier, Act::Idle],
    };
    type Case<'a> = (&'a str, &'a dyn Fn(usize) -> Vec<Act>, [usize; 2]);
    let cases: [Case<'_>; 3] =
        [("message", &message, [0, 2]), ("part", &in_part, [1, 3]), ("message and barrier", &mixed, [0, 1])];
    for (what, script, named) in cases {
        let times = in_time(what, 1000.0, || {
            let cluster = Cluster::start(4, script, |_| ());
            let failed = same_error(&cluster, 0..4, &named, what);
            assert!(failed[0].root_cause.contains("do different things"), "{what}: {}", failed[0].text);
            since_now(&cluster, &failed)
        });
        println!("divergence, {what}: {times}");
    }
}

/// What the others do while one rank stops.
fn occupations() -> [(&'static str, Vec<Act>); 5] {
    [
        ("idle", vec![Act::Idle]),
        ("waiting", vec![Act::Barrier, Act::Idle]),
        ("large", vec![sum(3_000_000), Act::Idle]),
        ("background", vec![Act::Background { elements: 200_000, buffers: 3 }, Act::Idle]),
        ("messages", vec![]),
    ]
}

/// The others' script: in `messages` they wait for a message of the one that stops.
fn occupied(acts: &[Act], from: usize) -> Vec<Act> {
    let begin = [Act::Step { step: 7 }, say("now")];
    let recv = [Act::Recv { bytes: 10, from }];
    [&begin[..], if acts.is_empty() { &recv[..] } else { acts }].concat()
}

#[test]
fn who_stops_with_a_message_is_quoted_by_all() {
    let _alone = alone();
    let mut times = Times::default();
    for (occupation, acts) in occupations() {
        for (world, who) in [(2, 0), (3, 2), (4, 1)] {
            let what = format!("{occupation}, rank {who} of {world}");
            times.extend(in_time(&what, 1000.0, || {
                let message = "the loss is not a number in rows 3 to 5\n\"é\" \u{1}";
                let abort = [Act::Step { step: 7 }, Act::Sleep { milliseconds: 100 }, say("now")];
                let abort = [&abort[..], &[Act::Abort { message: message.into(), copies: 1 }]].concat();
                let script = |rank| if rank == who { abort.clone() } else { occupied(&acts, who) };
                let cluster = Cluster::start(world, script, |_| ());
                let failed = same_error(&cluster, 0..world, &[who], &what);
                let expected = format!("stopped in step 7: {message}");
                assert!(failed[0].root_cause.ends_with(&expected), "{what}: {}", failed[0].root_cause);
                since_now(&cluster, &failed)
            }));
        }
    }
    println!("stopped with a message: {times}");
}

#[test]
fn a_message_of_any_length_arrives() {
    let _alone = alone();
    for (part, copies) in [("é\n", 700_000), ("\u{1}", 200_000), ("", 0)] {
        let message = part.repeat(copies);
        let abort = vec![say("now"), Act::Abort { message: part.into(), copies }];
        let script = |rank| if rank == 1 { abort.clone() } else { vec![say("now"), Act::Barrier] };
        let cluster = Cluster::start(3, script, |_| ());
        let failed = same_error(&cluster, 0..3, &[1], "a long message");
        let (_, quoted) = failed[0].root_cause.split_once("stopped in step 0: ").expect("its message");
        let common = quoted.chars().zip(message.chars()).take_while(|(quoted, said)| quoted == said).count();
        assert!(common >= 1000.min(message.chars().count()), "{common} characters of it: {quoted:.100}");
    }
}

#[test]
fn who_leaves_while_others_need_it_is_named() {
    let _alone = alone();
    let mut cases = Vec::new();
    for (occupation, acts) in occupations().into_iter().skip(1) {
        for (world, who) in [(2, 1), (3, 0), (4, 2)] {
            cases.extend([false, true].map(|exits| (occupation, acts.clone(), world, who, exits)));
        }
    }
    let times = at_once(4, &cases, |(occupation, acts, world, who, exits)| {
        let what = format!("{occupation}, rank {who} of {world}, exits: {exits}");
        in_time(&what, 2000.0, || {
            let mut leave = vec![Act::Sleep { milliseconds: 100 }, say("now"), Act::Leave];
            leave.extend((!exits).then_some(Act::Await));
            let script = |rank| if rank == *who { leave.clone() } else { occupied(acts, *who) };
            let cluster = Cluster::start(*world, script, |_| ());
            let failed = same_error(&cluster, (0..*world).filter(|rank| rank != who), &[*who], &what);
            let text = &failed[0].text;
            assert!(text.contains("has left the group"), "{what}: {text}");
            assert!(!text.contains("firewall"), "{what}: {text}");
            since_now(&cluster, &failed)
        })
    });
    let times: Times = times.into_iter().flatten().collect();
    println!("left: {times}");
}

#[test]
fn who_leaves_when_all_is_done_harms_nobody() {
    let _alone = alone();
    // Ranks end far apart, the first one in the middle of the others' idle time.
    let script = |rank: usize| {
        let pause = Act::Sleep { milliseconds: 300 * rank as u64 };
        vec![sum(1000), Act::Split { color: 1 }, sum(10), pause, say("still well"), Act::Leave]
    };
    let mut cluster = Cluster::start(4, script, |_| ());
    cluster.done();
    for rank in &mut cluster.ranks {
        assert_eq!(rank.exit_code(), Some(0), "{}", rank.output());
    }
}
