//! A rank that is killed or frozen, at any point of its work, is known to all others in time and by
//! name.

use std::time::Duration;

use finetune_allreduce::Algorithm;

use crate::alone;
use crate::children::{Cluster, Failed, LONG};
use crate::rank::{Act, Event, say, sum, sum_by};
use crate::system::Signal;
use crate::timing::{Times, at_once, in_time};

/// What the ranks are doing when it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Between operations.
    Idle,
    /// The victim waits with others in an operation that one rank is late for.
    Waiting,
    /// The victim is the one that the others wait for.
    Late,
    /// One large reduction after the other.
    Stream,
    /// The same in the background.
    Background,
    /// In a group within the group.
    Part,
    /// Again and again at making groups within the group.
    Splitting,
}

const PHASES: [Phase; 7] =
    [Phase::Idle, Phase::Waiting, Phase::Late, Phase::Stream, Phase::Background, Phase::Part, Phase::Splitting];

#[derive(Clone, Copy, Debug)]
struct Loss {
    phase: Phase,
    world: usize,
    victim: usize,
    timeout: Duration,
}

impl Loss {
    fn script(&self, rank: usize) -> Vec<Act> {
        let here = say("here");
        let color = (rank % 2) as u64;
        let late = (self.victim + 1) % self.world;
        match self.phase {
            Phase::Idle => vec![here, Act::Idle],
            Phase::Waiting if rank == late => vec![here, Act::Idle],
            Phase::Late if rank == self.victim => vec![here, Act::Sleep { milliseconds: 60_000 }],
            // By turns an operation whose ranks all wait for each other, and one that goes from one
            // to the next.
            Phase::Waiting if self.victim.is_multiple_of(2) => vec![here, sum(1000)],
            Phase::Waiting => vec![here, Act::Broadcast { bytes: 1 << 20, root: late }],
            Phase::Late => vec![here, Act::Barrier],
            Phase::Stream => {
                let ways =
                    [Some(Algorithm::Star), Some(Algorithm::Ring), Some(Algorithm::Direct), Some(Algorithm::Mesh)];
                vec![here, Act::Forever(vec![sum_by(1 << 20, ways[self.victim])])]
            }
            Phase::Background => vec![here, Act::Forever(vec![Act::Background { elements: 1 << 19, buffers: 3 }])],
            Phase::Part => vec![Act::Split { color }, here, Act::Forever(vec![sum(10_000)])],
            Phase::Splitting => vec![here, Act::Forever(vec![Act::Split { color }])],
        }
    }

    /// A little later than when all say that they are there: at another moment for each case, the
    /// same one in every run.
    fn in_the_midst(&self, cluster: &Cluster) {
        cluster.said("here");
        let spread = (self.victim * 37 + self.world * 59 + self.phase as usize * 83) % 100;
        std::thread::sleep(Duration::from_millis(60 + spread as u64));
    }

    /// What the survivors say: all the same, and about the victim only.
    fn survivors(&self, cluster: &Cluster, how: &str) -> Vec<Failed> {
        let failed: Vec<Failed> = cluster.without(self.victim).map(|rank| rank.error()).collect();
        for error in &failed {
            assert_eq!(error.lost, [self.victim], "{self:?}: {}", error.text);
            let expected = format!("process {}) was lost: {how}", cluster.ranks[self.victim].process());
            assert!(error.root_cause.starts_with(&format!("rank {} (", self.victim)), "{self:?}: {}", error.text);
            assert!(error.root_cause.contains(&expected), "{self:?}: {}", error.text);
            assert!(error.text.starts_with(&error.root_cause), "{self:?}: {}", error.text);
            assert_eq!(error.root_cause, failed[0].root_cause, "{self:?}: survivors differ");
        }
        failed
    }

    fn start(&self) -> Cluster {
        let cluster = Cluster::start(self.world, |rank| self.script(rank), |spec| spec.timeout = self.timeout);
        self.in_the_midst(&cluster);
        cluster
    }

    fn kill(&self) -> Times {
        let mut cluster = self.start();
        let at = cluster.ranks[self.victim].strike(Signal::Kill);
        let failed = self.survivors(&cluster, "its connections closed");
        for rank in &mut cluster.ranks {
            let expected = (rank.rank != self.victim).then_some(3);
            assert_eq!(rank.exit_code(), expected, "{self:?}: rank {}:\n{}", rank.rank, rank.output());
        }
        failed.iter().map(|error| error.at - at).collect()
    }

    /// Freezes the victim; later lets it go on, when it must notice by itself that it is over.
    fn freeze(&self) -> (Times, Times) {
        let mut cluster = self.start();
        let at = cluster.ranks[self.victim].strike(Signal::Stop);
        let failed = self.survivors(&cluster, "it fell silent");
        for rank in cluster.without(self.victim) {
            let warned =
                rank.all(|event| matches!(event, Event::Silent { rank } if *rank == self.victim).then_some(()));
            assert_eq!(warned.len(), 1, "{self:?}: rank {} warns once:\n{}", rank.rank, rank.output());
        }
        let victim = &mut cluster.ranks[self.victim];
        let again = victim.strike(Signal::Continue);
        // One that sleeps in its own code has not been asked.
        let mut noticed = Times::default();
        if self.phase != Phase::Late {
            let error = victim.error();
            noticed.extend([error.at - again]);
            assert_eq!(victim.exit_code(), Some(3));
        }
        (failed.iter().map(|error| error.at - at).collect(), noticed)
    }
}

fn losses(phase: Phase, timeout: u64) -> Vec<Loss> {
    let loss = |world, victim| Loss { phase, world, victim, timeout: Duration::from_secs(timeout) };
    [3, 4].into_iter().flat_map(|world| (0..world).map(move |victim| loss(world, victim))).collect()
}

#[test]
fn a_killed_rank_is_known_to_all_within_a_second() {
    let _alone = alone();
    for phase in PHASES {
        let mut times = Times::default();
        for loss in losses(phase, 5) {
            times.extend(in_time(&format!("{loss:?}"), 1000.0, || loss.kill()));
        }
        println!("killed, {phase:?}: {times}");
    }
}

#[test]
fn a_killed_rank_of_two_is_known_to_the_other() {
    let _alone = alone();
    let mut times = Times::default();
    for phase in PHASES {
        let loss = Loss { phase, world: 2, victim: phase as usize % 2, timeout: Duration::from_secs(2) };
        times.extend(in_time(&format!("{loss:?}"), 1000.0, || loss.kill()));
    }
    println!("killed, of two: {times}");
}

fn freezes(losses: &[Loss], what: &str) {
    let outcomes = at_once(6, losses, |loss| {
        let limit = loss.timeout.as_secs_f64() * 1e3 + 500.0;
        let mut noticed = Times::default();
        let times = in_time(&format!("{loss:?}"), limit, || {
            let (times, victim) = loss.freeze();
            noticed = victim;
            times
        });
        (times, noticed)
    });
    let (times, noticed): (Vec<Times>, Vec<Times>) = outcomes.into_iter().unzip();
    let (times, noticed): (Times, Times) =
        (times.into_iter().flatten().collect(), noticed.into_iter().flatten().collect());
    println!("frozen, {what}: {times}; it noticed, once it went on: {noticed}");
}

#[test]
fn a_frozen_rank_is_known_to_all_within_the_timeout() {
    let _alone = alone();
    for phase in PHASES {
        freezes(&losses(phase, 2), &format!("{phase:?}, timeout 2 s"));
    }
}

#[test]
fn a_frozen_rank_is_known_to_all_within_the_usual_five_seconds() {
    let _alone = alone();
    let loss = |(phase, world, victim)| Loss { phase, world, victim, timeout: Duration::from_secs(5) };
    let cases = [
        (Phase::Idle, 3, 0),
        (Phase::Waiting, 3, 2),
        (Phase::Late, 4, 1),
        (Phase::Stream, 4, 3),
        (Phase::Background, 2, 0),
        (Phase::Part, 4, 0),
    ];
    freezes(&cases.map(loss), "timeout 5 s");
}

#[test]
fn a_pause_of_a_second_harms_nobody() {
    let _alone = alone();
    let cases: Vec<(usize, u64, Vec<Act>)> = [3, 5]
        .into_iter()
        .flat_map(|timeout| {
            (0..3).flat_map(move |paused| {
                let idle = vec![Act::Sleep { milliseconds: 3 }];
                [idle, vec![sum(300_000)], vec![Act::Background { elements: 100_000, buffers: 2 }]]
                    .map(|acts| (paused, timeout, acts))
            })
        })
        .collect();
    at_once(6, &cases, |(paused, timeout, acts)| {
        let script = |_| vec![say("here"), Act::UntilTold(acts.clone())];
        let mut cluster = Cluster::start(3, script, |spec| spec.timeout = Duration::from_secs(*timeout));
        cluster.said("here");
        std::thread::sleep(Duration::from_millis(100));
        cluster.ranks[*paused].strike(Signal::Stop);
        std::thread::sleep(Duration::from_secs(1));
        cluster.ranks[*paused].strike(Signal::Continue);
        // Long enough for a late alarm to go off.
        std::thread::sleep(Duration::from_secs(*timeout / 2));
        cluster.ranks[1].tell();
        for rank in &mut cluster.ranks {
            rank.wait("that it is done", LONG, |event| match event {
                Event::Error { text, .. } => panic!("a pause of a second of rank {paused}: {text}"),
                Event::Done { .. } => Some(()),
                _ => None,
            });
            assert_eq!(rank.exit_code(), Some(0));
        }
    });
}
