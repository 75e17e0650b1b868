//! Right results, the same bits everywhere: on every rank, in every run, over TCP and between
//! threads.

use std::time::Instant;

use finetune_allreduce::{Algorithm, Group};

use crate::alone;
use crate::children::{Cluster, LONG};
use crate::rank::{Act, Event, Spec};
use crate::script;

type Digests = Vec<(String, String)>;

/// What threads of this process get, each result checked against what it must be.
fn between_threads(world: usize, topology: Option<Algorithm>, big: bool) -> Vec<Digests> {
    std::thread::scope(|scope| {
        let play = |group: Group| scope.spawn(move || script::play(&group, big, true));
        let ranks: Vec<_> = Group::in_process(world, topology).into_iter().map(play).collect();
        ranks.into_iter().map(|rank| rank.join().expect("right results")).collect()
    })
}

/// What processes get.
fn between_processes(world: usize, topology: Option<Algorithm>, streams: usize, big: bool) -> Vec<Digests> {
    between_processes_as(world, big, |spec| (spec.topology, spec.streams) = (topology, streams))
}

/// What processes get that are told more than what to do.
fn between_processes_as(world: usize, big: bool, change: impl Fn(&mut Spec)) -> Vec<Digests> {
    let results = |_| vec![Act::Results { big }];
    let cluster = Cluster::start(world, results, change);
    cluster.done();
    let digests = |event: &Event| match event {
        Event::Results { digests } => Some(digests.clone()),
        _ => None,
    };
    cluster.ranks.iter().map(|rank| rank.wait("its results", LONG, digests)).collect()
}

fn compare(found: &[Digests], expected: &[Digests], what: &str) {
    for (rank, (found, expected)) in found.iter().zip(expected).enumerate() {
        // What is played once only comes last.
        assert!(found.len() > 200 && found.len() <= expected.len(), "{what}, rank {rank}: {} results", found.len());
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found, expected, "{what}, rank {rank}: processes against threads");
        }
    }
}

/// Ranks agree, and so do ways that promise the same bits.
fn agree(ranks: &[Digests], what: &str) {
    for (rank, digests) in ranks.iter().enumerate().skip(1) {
        for (this, first) in digests.iter().zip(&ranks[0]).filter(|(this, _)| this.0.starts_with('=')) {
            assert_eq!(this, first, "{what}: rank {rank} against rank 0");
        }
    }
    let mut pairs = 0;
    for (name, mesh) in ranks[0].iter().filter(|(name, _)| name.starts_with("=mesh")) {
        for way in ["=star", "=direct", "=auto"] {
            let other = name.replace("=mesh", way);
            let found =
                ranks[0].iter().find(|(name, _)| *name == other).expect("whatever goes by mesh goes otherwise too");
            assert_eq!(found.1, *mesh, "{what}: {other} against mesh");
            pairs += 1;
        }
    }
    assert!(pairs > 120, "{what}: {pairs} pairs of results with the same bits");
}

#[test]
fn every_operation_is_right_and_gives_the_same_bits_everywhere() {
    let _alone = alone();
    let began = Instant::now();
    let mut operations = 0;
    for world in [2, 3, 4, 5, 8] {
        let expected = between_threads(world, None, true);
        agree(&expected, &format!("{world} threads"));
        for (run, big) in [true, false].into_iter().enumerate() {
            let found = between_processes(world, None, 1, big);
            compare(&found, &expected, &format!("{world} ranks, run {run}"));
            operations += found[0].len();
        }
        println!("{world} ranks: {} results alike after {:.1} s", expected[0].len(), began.elapsed().as_secs_f64());
    }
    for world in [2, 5] {
        for topology in [Algorithm::Ring, Algorithm::Mesh, Algorithm::Direct, Algorithm::Star] {
            let expected = between_threads(world, Some(topology), false);
            let found = between_processes(world, Some(topology), 1, false);
            compare(&found, &expected, &format!("{world} ranks by {topology}"));
            operations += found[0].len();
        }
    }
    println!("{operations} operations of processes in {:.1} s", began.elapsed().as_secs_f64());
}

#[test]
fn several_connections_per_pair_give_the_same_bits() {
    let _alone = alone();
    for world in [2, 4] {
        let expected = between_threads(world, None, true);
        let found = between_processes(world, None, 2, true);
        compare(&found, &expected, &format!("{world} ranks, 2 streams"));
    }
}

/// Sums are taken from shared memory where it is used, and otherwise from what connections brought.
#[test]
fn connections_and_memory_give_the_same_bits() {
    let _alone = alone();
    for world in [2, 4] {
        let expected = between_threads(world, None, true);
        let found = between_processes_as(world, true, |spec| spec.shared_memory = false);
        compare(&found, &expected, &format!("{world} ranks without shared memory"));
    }
}
