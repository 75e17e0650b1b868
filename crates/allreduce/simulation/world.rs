//! The world around the ranks: a clock and a queue of what is going to happen.

use std::collections::BTreeMap;
use std::time::Duration;

use super::network::{Direction, Parcel};
use super::random::Random;
use super::rank::{Pace, Process, Rank, Settings};
use super::scenario::{Change, Scenario};
use super::wires::{LinkSettings, SimTransport};
use super::work::{LINKS, Task};
use crate::frame::HEADER_BYTES;
use crate::mutations::Mutations;
use crate::sealed::Seals;
use crate::secret::{Seal, Secret};
use crate::session::Timing;

/// The number of the group; frames of an earlier one have another.
pub(super) const SESSION: u64 = 0x5e55_1011;

/// Something that will happen.
pub(super) enum Event {
    Arrival {
        from: usize,
        to: usize,
        parcel: Parcel,
    },
    /// The control thread of a rank has slept enough.
    Control(usize),
    /// The same of the thread that calls the group.
    Engine(usize),
    Change(Change),
}

pub(super) struct World {
    pub(super) now: Duration,
    pub(super) scenario: Scenario,
    pub(super) ranks: Vec<Rank>,
    /// By time, then in the order of insertion.
    pub(super) queue: BTreeMap<(Duration, u64), Event>,
    entries: u64,
    pub(super) random: Random,
    /// From each rank to each other.
    pub(super) directions: Vec<Direction>,
    pub(super) control_timers: Vec<Option<Duration>>,
    pub(super) engine_timers: Vec<Option<Duration>>,
    pub(super) tasks: Vec<Task>,
    /// When the first fault took effect.
    pub(super) struck: Option<Duration>,
    /// When each rank left the group in good order.
    pub(super) left: Vec<Option<Duration>>,
    pub(super) frozen_since: Vec<Duration>,
    pub(super) traced: bool,
    pub(super) events: u64,
}

impl World {
    pub(super) fn new(seed: u64, mutations: Mutations, traced: bool) -> World {
        let mut random = Random::new(seed);
        let (mut conditions, mut work) = (random.branch(), random.branch());
        let scenario = Scenario::draw(&mut conditions);
        let tasks = draw_tasks(&scenario, &mut work);
        let world = scenario.world;
        let frame_bytes = frame_bytes(&tasks, world, &mut random);
        let settings = Settings {
            world,
            timing: Timing::new(scenario.timeout),
            timeout: scenario.timeout,
            operation_timeout: scenario.operation_timeout(),
            frame_bytes,
            mutations,
        };
        let most_at_once = frame_bytes * random.pick(&[1, 1, 2]) + HEADER_BYTES * random.pick(&[0, 1, 2]);
        let room = (frame_bytes + HEADER_BYTES) * random.pick(&[1, 2, 8]);
        let link = LinkSettings { model: scenario.model, links: LINKS, frame_bytes, most_at_once, room };
        let mut seals = seals(world, mutations);
        let ranks: Vec<Rank> = (0..world)
            .map(|rank| {
                let pace = Pace {
                    start: random.between(Duration::ZERO, settings.timing.heartbeat),
                    begin: settings.timing.heartbeat + random.between(Duration::ZERO, scenario.spike),
                    linger: scenario.linger.mul_f64(0.5 + random.below(100) as f64 / 100.0),
                    last_words: random.between(Duration::ZERO, Duration::from_millis(300)),
                };
                let transport = SimTransport::new(world, link, random.branch());
                let tasks = tasks_of(rank, &tasks, &scenario, &mut work);
                Rank::new(rank, settings, pace, SESSION, std::mem::take(&mut seals[rank]), transport, tasks)
            })
            .collect();
        let mut simulation = World {
            now: Duration::ZERO,
            ranks,
            queue: BTreeMap::new(),
            entries: 0,
            random,
            directions: (0..world * world).map(|_| Direction::default()).collect(),
            control_timers: vec![None; world],
            engine_timers: vec![None; world],
            tasks,
            struck: None,
            left: vec![None; world],
            frozen_since: vec![Duration::ZERO; world],
            traced,
            events: 0,
            scenario,
        };
        for (at, change) in simulation.scenario.changes.clone() {
            simulation.put(at, Event::Change(change));
        }
        for rank in 0..world {
            simulation.set_timers(rank);
        }
        simulation
    }

    /// Runs to the end: all ranks have left or are no more. A wrong result or a hang is an error.
    pub(super) fn run(&mut self) -> Result<(), String> {
        let horizon = self.scenario.horizon();
        self.trace(|world| format!("{:?}", world.scenario));
        for (number, task) in self.tasks.iter().enumerate() {
            self.trace(|_| format!("operation {number}: {} after {:?}", task.descriptor, task.pause));
        }
        let mut thaws = self.scenario.changes.iter().filter(|(_, change)| matches!(change, Change::Thaw(_))).count();
        loop {
            let over = |rank: &Rank| match rank.process {
                Process::Running => rank.has_left(),
                Process::Frozen => thaws == 0,
                Process::Dead => true,
            };
            if self.ranks.iter().all(over) {
                return Ok(());
            }
            let Some(((at, _), event)) = self.queue.pop_first() else {
                return Err("nothing is going to happen any more".into());
            };
            self.now = at;
            self.events += 1;
            if at > horizon {
                let stuck: Vec<usize> = self.ranks.iter().filter(|rank| !over(rank)).map(|rank| rank.rank).collect();
                return Err(format!("ranks {stuck:?} hang: no end after {horizon:?}"));
            }
            match event {
                Event::Arrival { from, to, parcel } => self.arrive(from, to, parcel)?,
                Event::Control(rank) => {
                    if self.control_timers[rank] == Some(at) {
                        self.control_timers[rank] = None;
                        self.control(rank)?;
                    }
                }
                Event::Engine(rank) => {
                    if self.engine_timers[rank] == Some(at) {
                        self.engine_timers[rank] = None;
                    }
                    self.engine(rank)?;
                }
                Event::Change(change) => {
                    thaws -= usize::from(matches!(change, Change::Thaw(_)));
                    self.change(change)?;
                }
            }
        }
    }

    pub(super) fn trace(&self, line: impl FnOnce(&World) -> String) {
        if self.traced {
            eprintln!("{:>12.6} {}", self.now.as_secs_f64(), line(self));
        }
    }

    pub(super) fn put(&mut self, at: Duration, event: Event) {
        self.entries += 1;
        self.queue.insert((at, self.entries), event);
    }

    pub(super) fn set_timers(&mut self, rank: usize) {
        if self.ranks[rank].process != Process::Running || self.ranks[rank].has_left() {
            return;
        }
        let control = self.ranks[rank].next_control().max(self.now);
        if self.control_timers[rank] != Some(control) {
            self.control_timers[rank] = Some(control);
            self.put(control, Event::Control(rank));
        }
        if let Some(engine) = self.ranks[rank].next_engine(self.now).map(|at| at.max(self.now))
            && self.engine_timers[rank] != Some(engine)
        {
            self.engine_timers[rank] = Some(engine);
            self.put(engine, Event::Engine(rank));
        }
    }

    pub(super) fn control(&mut self, rank: usize) -> Result<(), String> {
        let knew = self.ranks[rank].verdict.is_some();
        self.ranks[rank].control(self.now);
        self.post(rank);
        match &self.ranks[rank].verdict {
            Some((_, verdict)) if !knew => {
                self.trace(|_| format!("rank {rank}: verdict {verdict:?}"));
                self.engine(rank)
            }
            _ => {
                self.set_timers(rank);
                Ok(())
            }
        }
    }

    pub(super) fn engine(&mut self, rank: usize) -> Result<(), String> {
        let had_left = self.ranks[rank].has_left();
        let done = self.ranks[rank].done;
        self.ranks[rank].engine(self.now);
        for (number, mut memory) in std::mem::take(&mut self.ranks[rank].results) {
            let strayed = self.scenario.divergent.is_some_and(|stray| stray.rank == rank && stray.task <= number);
            if !strayed {
                let wrong = self.tasks[number].check(rank, self.scenario.world, &mut memory).err();
                if let Some(wrong) = wrong {
                    return Err(format!("rank {rank}, operation {number}: wrong result: {wrong}"));
                }
            }
        }
        if done != self.ranks[rank].done {
            self.trace(|world| format!("rank {rank}: {} operations done", world.ranks[rank].done));
        }
        if let Some(complaint) = &self.ranks[rank].complaint {
            return Err(format!("rank {rank}: {complaint}"));
        }
        self.post(rank);
        self.send_frames(rank);
        if self.ranks[rank].has_orders() {
            return self.control(rank);
        }
        if self.ranks[rank].has_left() && !had_left {
            self.trace(|_| format!("rank {rank}: leaves"));
            self.left[rank] = Some(self.now);
            self.close_connections(rank, "the peer closed the connection");
        }
        self.set_timers(rank);
        Ok(())
    }
}

/// The operations of a run. No two in a row look alike, so a rank that leaves one out is found.
fn draw_tasks(scenario: &Scenario, random: &mut Random) -> Vec<Task> {
    let mut tasks: Vec<Task> = Vec::new();
    while tasks.len() < scenario.tasks {
        let task = Task::random(random, scenario.world, scenario.choice, scenario.longest_pause);
        if tasks.last().is_none_or(|last| last.descriptor != task.descriptor) {
            tasks.push(task);
        }
    }
    tasks
}

/// What one rank makes of the operations.
fn tasks_of(rank: usize, tasks: &[Task], scenario: &Scenario, random: &mut Random) -> Vec<Task> {
    let mut tasks = tasks.to_vec();
    if let Some((stray, pause)) = scenario.straggler
        && stray.rank == rank
    {
        tasks[stray.task].pause += pause;
    }
    if let Some(stray) = scenario.divergent
        && stray.rank == rank
    {
        if random.one_in(3) {
            tasks.remove(stray.task);
        } else {
            tasks[stray.task] = tasks[stray.task].diverged(random, scenario.world, scenario.choice);
        }
    }
    tasks
}

/// Short frames, so that there are many; longer ones if there would be too many.
fn frame_bytes(tasks: &[Task], world: usize, random: &mut Random) -> usize {
    let longest = tasks.iter().map(|task| task.descriptor.elements as usize * 4).max().unwrap_or(0);
    let asked = random.pick(&[16, 64, 128, 256, 512, 1024, 4096]);
    let fewest = longest / world / 12;
    asked.max(fewest) & !7
}

/// The control connections: two keys for each pair.
fn seals(world: usize, mutations: Mutations) -> Vec<BTreeMap<usize, Seals>> {
    let secret = Secret::loopback();
    let key = |from: usize, to: usize| {
        Seal::new(&secret.tag("simulated", &[&(from as u64).to_le_bytes(), &(to as u64).to_le_bytes()]))
    };
    let pair = |rank: usize, peer: usize| Seals::new(key(rank, peer), key(peer, rank)).with(mutations);
    (0..world)
        .map(|rank| (0..world).filter(|&peer| peer != rank).map(|peer| (peer, pair(rank, peer))).collect())
        .collect()
}
