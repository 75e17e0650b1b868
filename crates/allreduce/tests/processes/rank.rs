//! What a child process does: joins a group and plays a script.

use std::io::{BufRead, Write};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use finetune_advice::Advice;
use finetune_allreduce::{
    Algorithm, BackendChoice, Config, Group, GroupError, JoinError, Notice, Reduce, Reduction, Secret, WireDtype,
};
use serde::{Deserialize, Serialize};

use crate::script;
use crate::system::milliseconds;

/// The variable that makes a rank of this binary.
pub(crate) const VARIABLE: &str = "ALLREDUCE_TEST_RANK";

/// What a child is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Spec {
    pub(crate) rank: usize,
    pub(crate) world: usize,
    pub(crate) rendezvous: String,
    pub(crate) run: String,
    /// None: [`Secret::loopback`].
    pub(crate) token: Option<String>,
    pub(crate) claims: Vec<(String, String)>,
    pub(crate) timeout: Duration,
    pub(crate) join_timeout: Duration,
    pub(crate) operation_timeout: Duration,
    pub(crate) streams: usize,
    pub(crate) topology: Option<Algorithm>,
    /// Listens at all addresses.
    pub(crate) everywhere: bool,
    /// Data go through memory rather than connections.
    pub(crate) shared_memory: bool,
    pub(crate) script: Vec<Act>,
}

/// One thing that a rank does.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Act {
    AllReduce {
        elements: usize,
        reduction: Reduction,
        wire: WireDtype,
        tag: u64,
        algorithm: Option<Algorithm>,
    },
    ReduceScatter {
        elements: usize,
    },
    AllGather {
        bytes: usize,
    },
    Broadcast {
        bytes: usize,
        root: usize,
    },
    AllToAll {
        bytes: usize,
    },
    Send {
        bytes: usize,
        to: usize,
    },
    Recv {
        bytes: usize,
        from: usize,
    },
    Barrier,
    /// So many reductions in the background, and waits for all.
    Background {
        elements: usize,
        buffers: usize,
    },
    /// What follows happens in the group of this colour.
    Split {
        color: u64,
    },
    /// Does nothing, but looks whether the group still stands.
    Idle,
    Sleep {
        milliseconds: u64,
    },
    Step {
        step: u64,
    },
    /// Prints a line, so that the parent knows.
    Say {
        what: String,
    },
    /// Waits for a line from the parent.
    Await,
    /// Again and again, until something fails.
    Forever(Vec<Act>),
    /// Again and again, until the parent says so to any rank.
    UntilTold(Vec<Act>),
    /// Stops with so many copies of a message.
    Abort {
        message: String,
        copies: usize,
    },
    /// Drops the group.
    Leave,
    /// The operations of `script.rs`.
    Results {
        big: bool,
    },
}

/// The sum of so many elements, by whichever way.
pub(crate) fn sum(elements: usize) -> Act {
    sum_by(elements, None)
}

/// The sum of so many elements.
pub(crate) fn sum_by(elements: usize, algorithm: Option<Algorithm>) -> Act {
    Act::AllReduce { elements, reduction: Reduction::Sum, wire: WireDtype::Exact, tag: 0, algorithm }
}

/// Prints a line.
pub(crate) fn say(what: &str) -> Act {
    Act::Say { what: what.into() }
}

/// What a child says. Times in milliseconds of the monotonic clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// Joining begins.
    Started {
        at: f64,
    },
    Joined {
        at: f64,
        took: f64,
    },
    Said {
        at: f64,
        what: String,
    },
    Refused {
        why: String,
    },
    Silent {
        rank: usize,
    },
    Back {
        rank: usize,
    },
    /// The digest of each result, by name.
    Results {
        digests: Vec<(String, String)>,
    },
    /// The group failed.
    Error {
        at: f64,
        text: String,
        root_cause: String,
        lost: Vec<usize>,
        verdict: String,
        flight: usize,
    },
    /// The group, or one split off it, did not come about.
    NoGroup {
        at: f64,
        kind: String,
        text: String,
    },
    /// The script is over.
    Done {
        at: f64,
    },
}

fn tell(event: &Event) {
    let line = serde_json::to_string(event).expect("events are plain data");
    // A whole line with one call: threads do not mix theirs. The parent may be gone; then so are
    // we, by the life-line.
    let _ = std::io::stdout().lock().write_all(format!("\n{line}\n").as_bytes());
    let _ = std::io::stdout().lock().flush();
}

enum Failure {
    Group(GroupError),
    Join(JoinError),
}

impl From<GroupError> for Failure {
    fn from(error: GroupError) -> Failure {
        Failure::Group(error)
    }
}

impl From<JoinError> for Failure {
    fn from(error: JoinError) -> Failure {
        match error {
            JoinError::Group(error) => Failure::Group(error),
            error => Failure::Join(error),
        }
    }
}

/// Lines of the parent. Its end is ours: a child never outlives the test.
fn life_line() -> Receiver<String> {
    let (lines, received) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let _ = lines.send(line);
        }
        std::process::exit(9);
    });
    received
}

fn config(spec: &Spec) -> Config {
    let secret = match &spec.token {
        Some(token) => Secret::from_token(token).expect("a token of the tests is long enough"),
        None => Secret::loopback(),
    };
    let mut config = Config::new(spec.rank, spec.world, spec.rendezvous.clone(), secret);
    config.run = spec.run.clone();
    config.backend = BackendChoice::Tcp;
    for (name, content) in &spec.claims {
        config.claim(name, content.as_bytes());
    }
    (config.timeout, config.join_timeout) = (spec.timeout, spec.join_timeout);
    config.operation_timeout = spec.operation_timeout;
    config.tcp.streams = spec.streams;
    config.topology = spec.topology;
    config.everywhere = spec.everywhere;
    config.tcp.shared_memory = spec.shared_memory;
    let refusals = Mutex::new(0);
    config.notices = Arc::new(move |notice| match notice {
        Notice::Refused { why, .. } => {
            // A flood of strangers must not become a flood of lines.
            let mut refusals = refusals.lock().expect("no panic in here");
            *refusals += 1;
            if *refusals <= 500 {
                tell(&Event::Refused { why });
            }
        }
        Notice::Waiting { what, .. } => tell(&Event::Said { at: milliseconds(), what }),
        Notice::Silent { rank, .. } => tell(&Event::Silent { rank }),
        Notice::Back { rank } => tell(&Event::Back { rank }),
        _ => {}
    });
    config
}

/// Joins, plays the script, and ends the process: 0 done, 3 the group failed, 4 there was no group.
pub(crate) fn run(spec: &str) {
    let spec: Spec = serde_json::from_str(spec).expect("the parent writes what this reads");
    let lines = life_line();
    let config = config(&spec);
    tell(&Event::Started { at: milliseconds() });
    let began = milliseconds();
    let group = match Group::join(&config) {
        Ok(group) => group,
        Err(error) => {
            let code = fail(&error.into());
            std::process::exit(code);
        }
    };
    tell(&Event::Joined { at: milliseconds(), took: milliseconds() - began });
    let mut player = Player { group: Some(group), part: None, lines };
    let code = match player.play(&spec.script) {
        Ok(()) => 0,
        Err(failure) => fail(&failure),
    };
    drop(player);
    if code == 0 {
        tell(&Event::Done { at: milliseconds() });
    }
    std::process::exit(code);
}

fn fail(failure: &Failure) -> i32 {
    let at = milliseconds();
    match failure {
        Failure::Group(error) => {
            let (text, root_cause) = (error.to_string(), error.root_cause());
            let (lost, verdict) = (error.lost_ranks(), format!("{:?}", error.verdict));
            tell(&Event::Error { at, text, root_cause, lost, verdict, flight: error.flight.len() });
            3
        }
        Failure::Join(error) => {
            let debug = format!("{error:?}");
            let kind = debug.split([' ', '(']).next().unwrap_or_default().to_owned();
            let text = format!("{error}\n{}", error.hints().join("\n"));
            tell(&Event::NoGroup { at, kind, text });
            4
        }
    }
}

struct Player {
    group: Option<Group>,
    /// A group split off.
    part: Option<Group>,
    lines: Receiver<String>,
}

impl Player {
    fn group(&self) -> &Group {
        self.part.as_ref().or(self.group.as_ref()).expect("a script ends with Leave")
    }

    fn play(&mut self, script: &[Act]) -> Result<(), Failure> {
        script.iter().try_for_each(|act| self.act(act))
    }

    fn act(&mut self, act: &Act) -> Result<(), Failure> {
        match act {
            Act::AllReduce { elements, reduction, wire, tag, algorithm } => {
                let reduce = Reduce { reduction: *reduction, wire: *wire, tag: *tag, algorithm: *algorithm };
                let (mut data, mine) = (vec![1.0; *elements], self.group().world() as f32);
                self.group().all_reduce_with(&mut data, &reduce)?;
                let right = *reduction != Reduction::Sum || data.iter().all(|&value| value == mine);
                assert!(right, "a sum of ones over {mine} ranks");
            }
            Act::ReduceScatter { elements } => {
                self.group().reduce_scatter(&mut vec![1.0; *elements], Reduction::Sum)?;
            }
            Act::AllGather { bytes } => {
                let mut all = vec![0u8; bytes * self.group().world()];
                self.group().all_gather(&vec![1u8; *bytes], &mut all)?;
            }
            Act::Broadcast { bytes, root } => self.group().broadcast(&mut vec![0u8; *bytes], *root)?,
            Act::AllToAll { bytes } => {
                let bytes = bytes * self.group().world();
                self.group().all_to_all(&vec![1u8; bytes], &mut vec![0u8; bytes])?;
            }
            Act::Send { bytes, to } => self.group().send(&vec![1u8; *bytes], *to)?,
            Act::Recv { bytes, from } => self.group().recv(&mut vec![0u8; *bytes], *from)?,
            Act::Barrier => self.group().barrier()?,
            Act::Background { elements, buffers } => {
                let begin = |_| self.group().start_all_reduce(vec![1.0; *elements], Reduce::SUM);
                let pending: Vec<_> = (0..*buffers).map(begin).collect();
                for pending in pending {
                    pending.wait()?;
                }
            }
            Act::Split { color } => {
                let part = self.group.as_ref().expect("a group to split").split(*color, 0)?;
                self.part = Some(part);
            }
            Act::Idle => loop {
                self.group().check()?;
                std::thread::sleep(Duration::from_millis(2));
            },
            Act::Sleep { milliseconds } => std::thread::sleep(Duration::from_millis(*milliseconds)),
            Act::Step { step } => self.group().set_step(*step),
            Act::Say { what } => tell(&Event::Said { at: milliseconds(), what: what.clone() }),
            Act::Await => drop(self.lines.recv()),
            Act::Forever(acts) => loop {
                self.play(acts)?;
                self.group().check()?;
                if self.group().world() == 1 {
                    // Operations of a group of one take no time: do not burn a core meanwhile.
                    std::thread::sleep(Duration::from_millis(1));
                }
            },
            Act::UntilTold(acts) => self.play_until_told(acts)?,
            Act::Abort { message, copies } => {
                self.group().abort(&message.repeat(*copies), 2);
                self.group().check()?;
            }
            Act::Leave => (self.part, self.group) = (None, None),
            Act::Results { big } => {
                let began = Instant::now();
                let digests = script::play(self.group(), *big, false);
                tell(&Event::Results { digests });
                tell(&Event::Said { at: milliseconds(), what: format!("results took {:?}", began.elapsed()) });
            }
        }
        Ok(())
    }

    fn play_until_told(&mut self, acts: &[Act]) -> Result<(), Failure> {
        let mut told = [0.0];
        while told == [0.0] {
            self.play(acts)?;
            told = [f32::from(u8::from(self.lines.try_recv().is_ok()))];
            self.group().all_reduce(&mut told, Reduction::Max)?;
        }
        Ok(())
    }
}
