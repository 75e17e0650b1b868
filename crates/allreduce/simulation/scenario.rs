//! What goes wrong in a run, drawn from its seed, and what the ranks must say of it.

use std::collections::BTreeSet;
use std::time::Duration;

use super::random::Random;
use super::wires::Model;
use super::work::AlgorithmChoice;
use crate::session::Timing;

/// Something that happens to the ranks or between them at a given time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Freeze(usize),
    Thaw(usize),
    /// The process ends and the system closes its connections; `resets`: what was on its way is
    /// lost.
    Crash {
        rank: usize,
        resets: bool,
    },
    /// Its caller says that it stops.
    Abort(usize),
    /// From now on nothing arrives at `to` from `from`. `loses`: frames of an RDMA link are not
    /// even kept.
    Block {
        from: usize,
        to: usize,
        loses: bool,
    },
    Unblock {
        from: usize,
        to: usize,
    },
    /// The data connections of two ranks break, at both ends; `closed` as in
    /// [`crate::transport::Broken`].
    BreakData {
        a: usize,
        b: usize,
        closed: bool,
    },
    CloseControl {
        a: usize,
        b: usize,
    },
    Attack {
        from: usize,
        to: usize,
        attack: Attack,
    },
}

/// What an attacker or a broken cable does to a control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attack {
    /// A bit of the next message is flipped.
    Flip,
    /// The last message is sent again.
    Replay,
    /// A record in the sender's name, sealed with another key.
    Forge,
}

/// Something that happens to one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Damage {
    Flip,
    Drop,
    Double,
    /// It arrives late, and others overtake it.
    Delay,
    /// The same frame of an earlier group takes its place.
    Stale,
    /// The same frame of an earlier group arrives before it.
    StaleBefore,
}

/// The `frame`-th frame from one rank to another over the first link.
#[derive(Clone, Copy, Debug)]
pub(super) struct FrameFault {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) frame: usize,
    pub(super) damage: Damage,
}

/// What the ranks must say in the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// Everything finishes, and no rank gives an alarm.
    Nothing,
    /// All say that these were lost: the certain ones, and perhaps those that followed soon after.
    Lost { crashed: bool, certain: BTreeSet<usize>, possible: BTreeSet<usize> },
    /// All say that these two do not hear each other.
    Separated(usize, usize),
    /// The others say that it fell silent; it says that it is cut off.
    CutOff(usize),
    /// It is not heard, or hears no rank, but not both.
    HalfCutOff(usize),
    /// Each side says that the other fell silent.
    Halves(BTreeSet<usize>),
    /// It slept about as long as the timeout, or longer (`surely`), and woke up.
    Slept { rank: usize, surely: bool },
    /// It did something else than the others.
    Diverged(usize),
    /// Its caller stopped it.
    Aborted(usize),
    /// A frame was damaged on its way.
    Damaged { from: usize, to: usize, damage: Damage },
    /// The data connection of the two broke.
    Broken(usize, usize),
    /// Too much happened: only no wrong sum, no panic, no hang.
    NoHang,
}

/// A rank that computes for a long time before one operation, or does another operation there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stray {
    pub(super) rank: usize,
    pub(super) task: usize,
}

/// One run's conditions.
#[derive(Clone, Debug)]
pub(super) struct Scenario {
    pub(super) world: usize,
    pub(super) model: Model,
    pub(super) choice: AlgorithmChoice,
    pub(super) tasks: usize,
    pub(super) longest_pause: Duration,
    pub(super) timeout: Duration,
    /// The network's usual delay, and the longest it ever takes.
    pub(super) latency: Duration,
    pub(super) spike: Duration,
    pub(super) linger: Duration,
    pub(super) straggler: Option<(Stray, Duration)>,
    pub(super) divergent: Option<Stray>,
    pub(super) changes: Vec<(Duration, Change)>,
    pub(super) frame_faults: Vec<FrameFault>,
    pub(super) expected: Expected,
}

const SECOND: Duration = Duration::from_secs(1);

fn milliseconds(count: u64) -> Duration {
    Duration::from_millis(count)
}

impl Scenario {
    pub(super) fn draw(random: &mut Random) -> Scenario {
        let world = random.pick(&[2, 2, 3, 3, 3, 4, 4, 4, 5, 5]);
        let world = if random.one_in(25) { 8 } else { world };
        let timeout = SECOND * random.pick(&[5, 5, 5, 2, 10]);
        let timing = Timing::new(timeout);
        let mut scenario = Scenario {
            world,
            model: random.pick(&[Model::Stream, Model::Stream, Model::Frames]),
            choice: random.pick(&[
                AlgorithmChoice::AroundTheRing,
                AlgorithmChoice::OverAllPairs,
                AlgorithmChoice::OverAllPairs,
                AlgorithmChoice::Mixed,
            ]),
            tasks: 2 + random.below(5),
            longest_pause: milliseconds(random.pick(&[1, 5, 50, 300])),
            timeout,
            latency: Duration::from_micros(random.pick(&[5, 30, 100, 1000])),
            spike: timing.collect / 5,
            linger: random.pick(&[Duration::ZERO, milliseconds(3), milliseconds(400)]),
            straggler: None,
            divergent: None,
            changes: Vec::new(),
            frame_faults: Vec::new(),
            expected: Expected::Nothing,
        };
        match random.below(100) {
            0..4 => scenario.spike = scenario.latency,
            4..22 => scenario.harmless(random, &timing),
            22..34 => scenario.crash(random, &timing),
            34..46 => scenario.freeze(random, &timing),
            46..58 => scenario.partition(random),
            58..63 => scenario.sleep(random, &timing),
            63..71 => scenario.diverge(random),
            71 => scenario.abort(random),
            72..85 => scenario.damage(random),
            85..93 => scenario.attack(random),
            _ => scenario.chaos(random),
        }
        scenario.changes.sort_by_key(|(at, _)| *at);
        scenario
    }

    /// A time while the ranks work.
    fn some_time(&self, random: &mut Random) -> Duration {
        let begin = Timing::new(self.timeout).heartbeat;
        begin + random.between(Duration::ZERO, milliseconds(20) + self.longest_pause * self.tasks as u32 / 2)
    }

    fn at(&mut self, time: Duration, change: Change) {
        self.changes.push((time, change));
    }

    /// Nothing arrives at `to` from `from` between the two times.
    fn block(&mut self, from: usize, to: usize, start: Duration, end: Option<Duration>, loses: bool) {
        self.at(start, Change::Block { from, to, loses });
        if let Some(end) = end {
            self.at(end, Change::Unblock { from, to });
        }
    }

    /// Keeps finished ranks in the group until a silence from `at` on is known, most of the time.
    fn stay(&mut self, random: &mut Random) {
        if !random.one_in(4) {
            self.linger = self.timeout * 2;
        }
    }

    fn harmless(&mut self, random: &mut Random, timing: &Timing) {
        let rank = random.below(self.world);
        let at = self.some_time(random);
        // A pause that all others must put up with, whenever in a heartbeat it begins.
        let longest = timing.silence - timing.heartbeat * 2 - self.spike;
        match random.below(6) {
            0 => self.spike = SECOND.min(self.timeout / 5),
            1 => {
                self.at(at, Change::Freeze(rank));
                self.at(at + SECOND, Change::Thaw(rank));
            }
            2 => {
                let end = at + random.between(longest / 2, longest);
                self.at(at, Change::Freeze(rank));
                self.at(end, Change::Thaw(rank));
            }
            // The whole group is stopped (a machine with all of it, a debugger) and goes on, one
            // rank after the other.
            3 => {
                let end = at + random.between(timing.own_freeze * 2, self.timeout * 3);
                for rank in 0..self.world {
                    let spread = timing.heartbeat * 2;
                    self.at(at + random.between(Duration::ZERO, spread), Change::Freeze(rank));
                    self.at(end + random.between(Duration::ZERO, spread), Change::Thaw(rank));
                }
            }
            4 => {
                let stray = Stray { rank, task: random.below(self.tasks) };
                self.straggler = Some((stray, random.between(self.timeout, self.timeout * 3 / 2)));
            }
            // Links stop one by one and are restored in another order.
            _ => {
                for from in 0..self.world {
                    for to in (0..self.world).filter(|&to| to != from) {
                        if random.one_in(2) {
                            let start = at + random.between(Duration::ZERO, longest / 2);
                            let end = start + random.between(Duration::ZERO, longest);
                            self.block(from, to, start, Some(end), false);
                        }
                    }
                }
            }
        }
    }

    fn crash(&mut self, random: &mut Random, timing: &Timing) {
        let (first, second) = random.pair(self.world);
        let at = self.some_time(random);
        self.at(at, Change::Crash { rank: first, resets: random.one_in(2) });
        let mut possible = BTreeSet::new();
        if self.world > 2 && random.one_in(2) {
            // At once, some time later, or just when the first crash is judged.
            let later = match random.below(4) {
                0 => Duration::ZERO,
                1 => random.between(Duration::ZERO, SECOND),
                _ => timing.collect + random.between(Duration::ZERO, self.latency * 2) - self.latency,
            };
            self.at(at + later, Change::Crash { rank: second, resets: random.one_in(2) });
            possible.insert(second);
        }
        self.expected = Expected::Lost { crashed: true, certain: [first].into(), possible };
    }

    fn freeze(&mut self, random: &mut Random, timing: &Timing) {
        let (first, second) = random.pair(self.world);
        let at = self.some_time(random);
        self.at(at, Change::Freeze(first));
        let mut possible = BTreeSet::new();
        if self.world > 2 && random.one_in(2) {
            // At once, some time later, or so that its silence is noticed just when the first one's
            // is judged.
            let later = match random.below(4) {
                0 => random.between(Duration::ZERO, timing.heartbeat),
                1 => random.between(Duration::ZERO, self.timeout),
                _ => timing.collect_silent + random.between(Duration::ZERO, timing.heartbeat * 4),
            };
            self.at(at + later, Change::Freeze(second));
            possible.insert(second);
        }
        self.expected = Expected::Lost { crashed: false, certain: [first].into(), possible };
    }

    fn partition(&mut self, random: &mut Random) {
        let (a, b) = random.pair(self.world);
        let at = self.some_time(random);
        self.stay(random);
        match random.below(6) {
            0 | 1 => {
                self.block(a, b, at, None, true);
                self.block(b, a, at, None, true);
                self.expected = Expected::Separated(a, b);
            }
            2 => {
                self.block(a, b, at, None, true);
                self.expected = Expected::Separated(a, b);
            }
            3 | 4 => {
                let others: Vec<usize> = (0..self.world).filter(|&other| other != a).collect();
                let directions = if random.one_in(3) { random.below(2) } else { 2 };
                for other in others {
                    if directions != 0 {
                        self.block(a, other, at, None, true);
                    }
                    if directions != 1 {
                        self.block(other, a, at, None, true);
                    }
                }
                self.expected = if directions == 2 { Expected::CutOff(a) } else { Expected::HalfCutOff(a) };
            }
            _ => {
                let side: BTreeSet<usize> = (0..self.world).filter(|&rank| rank == a || random.one_in(2)).collect();
                let side: BTreeSet<usize> = side.into_iter().filter(|&rank| rank != b).collect();
                for from in 0..self.world {
                    for to in (0..self.world).filter(|to| side.contains(to) != side.contains(&from)) {
                        self.block(from, to, at, None, true);
                    }
                }
                self.expected = Expected::Halves(side);
            }
        }
    }

    /// A rank is stopped for about as long as the timeout, or longer, and wakes up.
    fn sleep(&mut self, random: &mut Random, timing: &Timing) {
        let rank = random.below(self.world);
        let at = self.some_time(random);
        let surely = random.one_in(2);
        let most = self.timeout + milliseconds(500);
        let asleep = match surely {
            true => random.between(most, most + SECOND),
            false => random.between(timing.silence - timing.heartbeat * 2, most),
        };
        self.at(at, Change::Freeze(rank));
        self.at(at + asleep, Change::Thaw(rank));
        self.expected = Expected::Slept { rank, surely };
    }

    fn diverge(&mut self, random: &mut Random) {
        let rank = random.below(self.world);
        // With an algorithm of its own for each operation two ranks can wait for each other without
        // a frame between them.
        if self.choice == AlgorithmChoice::Mixed {
            self.choice = AlgorithmChoice::OverAllPairs;
        }
        self.divergent = Some(Stray { rank, task: random.below(self.tasks - 1) });
        self.expected = Expected::Diverged(rank);
    }

    fn abort(&mut self, random: &mut Random) {
        let rank = random.below(self.world);
        let at = self.some_time(random);
        self.at(at, Change::Abort(rank));
        self.expected = Expected::Aborted(rank);
    }

    fn damage(&mut self, random: &mut Random) {
        let (from, to) = random.pair(self.world);
        let (a, b) = (from, to);
        if random.one_in(6) {
            let at = self.some_time(random);
            self.model = Model::Stream;
            self.at(at, Change::BreakData { a, b, closed: random.one_in(2) });
            self.expected = Expected::Broken(a, b);
            return;
        }
        let damage = match self.model {
            Model::Stream => random.pick(&[Damage::Flip, Damage::Flip, Damage::Stale, Damage::StaleBefore]),
            Model::Frames => random.pick(&[
                Damage::Flip,
                Damage::Drop,
                Damage::Double,
                Damage::Delay,
                Damage::Stale,
                Damage::StaleBefore,
            ]),
        };
        let most = random.pick(&[3, 10, 40]);
        let frame = random.below(most);
        self.frame_faults.push(FrameFault { from, to, frame, damage });
        self.expected = Expected::Damaged { from, to, damage };
    }

    fn attack(&mut self, random: &mut Random) {
        let (from, to) = random.pair(self.world);
        let at = self.some_time(random);
        self.stay(random);
        let attacks = [Attack::Flip, Attack::Replay, Attack::Forge];
        let change = match random.below(4) {
            0 => Change::CloseControl { a: from, b: to },
            _ => Change::Attack { from, to, attack: random.pick(&attacks) },
        };
        self.at(at, change);
        self.expected = Expected::Separated(from, to);
    }

    /// Several things at once, some of which end again.
    fn chaos(&mut self, random: &mut Random) {
        self.expected = Expected::NoHang;
        for _ in 0..2 + random.below(5) {
            let (a, b) = random.pair(self.world);
            let at = self.some_time(random) + random.between(Duration::ZERO, SECOND);
            let end = random.one_in(2).then(|| at + random.between(Duration::ZERO, self.timeout * 3 / 2));
            let attack = random.pick(&[Attack::Flip, Attack::Replay, Attack::Forge]);
            match random.below(8) {
                0 => self.at(at, Change::Crash { rank: a, resets: random.one_in(2) }),
                1 => {
                    self.at(at, Change::Freeze(a));
                    if let Some(end) = end {
                        self.at(end, Change::Thaw(a));
                    }
                }
                2 => self.block(a, b, at, end, random.one_in(2)),
                3 => {
                    for other in (0..self.world).filter(|&other| other != a) {
                        self.block(a, other, at, end, true);
                        self.block(other, a, at, end, true);
                    }
                }
                4 => self.at(at, Change::BreakData { a, b, closed: random.one_in(2) }),
                5 => self.at(at, Change::CloseControl { a, b }),
                6 => self.at(at, Change::Attack { from: a, to: b, attack }),
                _ => {
                    let damages = match self.model {
                        Model::Stream => &[Damage::Flip, Damage::Stale, Damage::StaleBefore][..],
                        Model::Frames => &[Damage::Drop, Damage::Double, Damage::Delay, Damage::Flip],
                    };
                    let (frame, damage) = (random.below(30), random.pick(damages));
                    self.frame_faults.push(FrameFault { from: a, to: b, frame, damage });
                }
            }
        }
    }

    /// By then every rank must have finished or failed and left.
    pub(super) fn horizon(&self) -> Duration {
        let last = self.changes.iter().map(|(at, _)| *at).max().unwrap_or_default();
        let straggling = self.straggler.map_or(Duration::ZERO, |(_, pause)| pause);
        let working = (self.longest_pause + self.spike * 40) * self.tasks as u32 + straggling + SECOND;
        last + working + self.operation_timeout() + self.timeout * 3 + self.linger
    }

    /// Longer than any rank computes here.
    pub(super) fn operation_timeout(&self) -> Duration {
        self.timeout * 2
    }
}

/// The scenario in one line.
impl std::fmt::Display for Scenario {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Scenario { world, model, timeout, .. } = self;
        write!(formatter, "{world} ranks, {model:?}, timeout {timeout:?}, expected {:?}:", self.expected)?;
        for (at, change) in &self.changes {
            write!(formatter, " {:.4}s {change:?};", at.as_secs_f64())?;
        }
        for fault in &self.frame_faults {
            write!(formatter, " {fault:?};")?;
        }
        if let Some((stray, pause)) = &self.straggler {
            write!(formatter, " rank {} computes {pause:?} before operation {};", stray.rank, stray.task)?;
        }
        if let Some(stray) = &self.divergent {
            write!(formatter, " rank {} diverges at operation {};", stray.rank, stray.task)?;
        }
        Ok(())
    }
}
