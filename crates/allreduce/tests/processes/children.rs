//! Child processes as the parent sees them: started, listened to, struck, and always ended.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::rank::{Act, Event, Spec, VARIABLE};
use crate::system::{Signal, milliseconds, send};

/// Longer than anything takes on a machine that is not hopelessly overloaded.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// What all ranks of the tests share; it must not appear in anything that they print.
pub(crate) const TOKEN: &str = "canary-2f6b61c4f0a94e8b8d53-token-of-the-tests";

/// An address of this machine where nothing listens. Linux gives every process its own loopback
/// addresses, so no other test's port is taken. Trying the address out would do harm: a process
/// that another thread is just starting inherits what is open here for a moment.
pub(crate) fn free_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let port = 20_000 + NEXT.fetch_add(1, Ordering::Relaxed) % 10_000;
        if cfg!(target_os = "linux") {
            let process = std::process::id();
            return format!("127.{}.{}.{}:{port}", 1 + (process >> 16) % 250, (process >> 8) & 255, process & 255);
        }
        let address = format!("127.0.0.1:{port}");
        if TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
}

/// The spec of a rank with the usual settings.
pub(crate) fn spec(rank: usize, world: usize, rendezvous: &str, script: Vec<Act>) -> Spec {
    Spec {
        rank,
        world,
        rendezvous: rendezvous.into(),
        run: "a run".into(),
        token: Some(TOKEN.into()),
        claims: vec![("recipe".into(), "one".into()), ("program".into(), "two".into())],
        timeout: Duration::from_secs(5),
        join_timeout: Duration::from_secs(30),
        operation_timeout: Duration::from_secs(60),
        streams: 1,
        topology: None,
        everywhere: false,
        shared_memory: true,
        script,
    }
}

#[derive(Default)]
struct Heard {
    events: Vec<Event>,
    /// Everything that the child printed.
    output: String,
    /// How many of its two outputs have ended.
    ended: usize,
}

#[derive(Default)]
struct Ear {
    heard: Mutex<Heard>,
    news: Condvar,
}

impl Ear {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(self: &Arc<Self>, from: impl Read + Send + 'static) -> JoinHandle<()> {
        let ear = Arc::clone(self);
        std::thread::spawn(move || {
            for line in BufReader::new(from).lines().map_while(Result::ok) {
                let mut heard = ear.heard();
                heard.events.extend(serde_json::from_str::<Event>(&line));
                heard.output.push_str(&line);
                heard.output.push('\n');
                drop(heard);
                ear.news.notify_all();
            }
            ear.heard().ended += 1;
            ear.news.notify_all();
        })
    }
}

/// An error as a child printed it.
#[derive(Clone, Debug)]
pub(crate) struct Failed {
    pub(crate) at: f64,
    pub(crate) text: String,
    pub(crate) root_cause: String,
    pub(crate) lost: Vec<usize>,
    #[expect(dead_code, reason = "shown when a test fails")]
    pub(crate) verdict: String,
}

/// A child process.
pub(crate) struct Rank {
    pub(crate) rank: usize,
    child: Child,
    ear: Arc<Ear>,
    readers: Vec<JoinHandle<()>>,
}

impl Rank {
    pub(crate) fn start(spec: &Spec) -> Rank {
        Rank::start_with(Command::new(std::env::current_exe().expect("this program has a path")), spec)
    }

    /// With a command that runs this program, such as one that enters a network namespace first.
    pub(crate) fn start_with(mut command: Command, spec: &Spec) -> Rank {
        let mut child = command
            .args(["rank_process", "--exact", "--nocapture", "--quiet", "--test-threads=1"])
            .env(VARIABLE, serde_json::to_string(spec).expect("a spec is plain data"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a child process");
        let ear = Arc::new(Ear::default());
        let readers =
            vec![ear.listen(child.stdout.take().expect("piped")), ear.listen(child.stderr.take().expect("piped"))];
        Rank { rank: spec.rank, child, ear, readers }
    }

    pub(crate) fn process(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal and says when, in milliseconds.
    pub(crate) fn strike(&self, signal: Signal) -> f64 {
        let at = milliseconds();
        send(signal, self.child.id());
        at
    }

    /// Sends a line.
    pub(crate) fn tell(&mut self) {
        let _ = self.child.stdin.as_mut().expect("piped").write_all(b"go\n");
    }

    /// Everything that the child has printed.
    pub(crate) fn output(&self) -> String {
        self.ear.heard().output.clone()
    }

    /// All that the child has said and `pick` picks, so far.
    pub(crate) fn all<T>(&self, pick: impl Fn(&Event) -> Option<T>) -> Vec<T> {
        self.ear.heard().events.iter().filter_map(pick).collect()
    }

    /// Waits until the child has said what `pick` picks; panics after `longest`.
    pub(crate) fn wait<T>(&self, what: &str, longest: Duration, pick: impl Fn(&Event) -> Option<T>) -> T {
        let deadline = Instant::now() + longest;
        let mut heard = self.ear.heard();
        loop {
            if let Some(found) = heard.events.iter().find_map(&pick) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero() && heard.ended < 2,
                "rank {} (process {}) did not say {what} within {longest:?} or before it ended; it said:\n{}",
                self.rank,
                self.child.id(),
                heard.output
            );
            heard = self.ear.news.wait_timeout(heard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until the child has joined; how long it took in milliseconds, by its own clock.
    pub(crate) fn joined(&self) -> f64 {
        self.wait("that it joined", LONG, |event| match event {
            Event::Joined { took, .. } => Some(*took),
            _ => None,
        })
    }

    /// Waits until the child says so, and when it did.
    pub(crate) fn said(&self, expected: &str) -> f64 {
        self.wait(expected, LONG, |event| match event {
            Event::Said { at, what } if what == expected => Some(*at),
            _ => None,
        })
    }

    /// Waits for the group's error.
    pub(crate) fn error(&self) -> Failed {
        self.wait("that the group failed", LONG, |event| match event.clone() {
            Event::Error { at, text, root_cause, lost, verdict, .. } => {
                Some(Failed { at, text, root_cause, lost, verdict })
            }
            _ => None,
        })
    }

    /// Waits for the error of joining: its kind, its text, and when.
    pub(crate) fn no_group(&self) -> (String, String, f64) {
        self.wait("that there is no group", LONG, |event| match event.clone() {
            Event::NoGroup { kind, text, at } => Some((kind, text, at)),
            _ => None,
        })
    }

    /// Waits for the end of the script.
    pub(crate) fn done(&self) {
        self.wait("that it is done", LONG, |event| matches!(event, Event::Done { .. }).then_some(()));
    }

    /// Waits for the end of the process, which is to come by itself, and gives its exit code.
    pub(crate) fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + LONG;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child to wait for") {
                return status.code();
            }
            assert!(Instant::now() < deadline, "rank {} does not end; it said:\n{}", self.rank, self.output());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        let output = self.output();
        if !std::thread::panicking() {
            assert!(!output.contains(TOKEN), "rank {} printed the token:\n{output}", self.rank);
            assert!(!output.contains("panicked"), "rank {} panicked:\n{output}", self.rank);
        }
    }
}

/// All ranks of a group.
pub(crate) struct Cluster {
    pub(crate) ranks: Vec<Rank>,
    pub(crate) rendezvous: String,
}

impl Cluster {
    /// Starts `world` ranks; `script` says what each does, `change` what is unusual about all of
    /// them.
    pub(crate) fn start(world: usize, script: impl Fn(usize) -> Vec<Act>, change: impl Fn(&mut Spec)) -> Cluster {
        let rendezvous = free_address();
        let start = |rank| {
            let mut spec = spec(rank, world, &rendezvous, script(rank));
            change(&mut spec);
            Rank::start(&spec)
        };
        Cluster { ranks: (0..world).map(start).collect(), rendezvous }
    }

    /// Waits until all have said so.
    pub(crate) fn said(&self, what: &str) {
        for rank in &self.ranks {
            rank.said(what);
        }
    }

    /// Waits for the end of all scripts.
    pub(crate) fn done(&self) {
        for rank in &self.ranks {
            rank.done();
        }
    }

    /// All ranks but this one.
    pub(crate) fn without(&self, victim: usize) -> impl Iterator<Item = &Rank> {
        self.ranks.iter().filter(move |rank| rank.rank != victim)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.rendezvous.parse().expect("an address of the tests")
    }
}
