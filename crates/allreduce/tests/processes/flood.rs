//! Strangers in great numbers, who do not stop while a join goes on and while the group works. All
//! of them are threads of this test, bounded in number and time, and all connections stay within
//! this machine.

use std::collections::VecDeque;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::alone;
use crate::attacks::{complete, waiting, works};
use crate::system::allow_open_files;
use crate::timing::{Times, in_time};
use crate::wire::{challenge, connect, framed, hello, join};

/// Longest time that a flood lasts, and most connections that it makes.
const LONGEST: Duration = Duration::from_secs(10);
const MOST: usize = 50_000;

/// What a join may be delayed by, in milliseconds.
const SECOND: f64 = 1000.0;

struct Flood<'a> {
    doors: &'a [SocketAddr],
    over: AtomicBool,
    made: AtomicUsize,
    began: Instant,
}

impl Flood<'_> {
    fn goes_on(&self) -> bool {
        let within = self.began.elapsed() < LONGEST && self.made.load(Ordering::Relaxed) < MOST;
        within && !self.over.load(Ordering::Relaxed)
    }

    /// One more connection to one of the listeners. None: the system gives no more for now.
    fn stranger(&self) -> Option<TcpStream> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let door = self.doors[number % self.doors.len()];
        TcpStream::connect_timeout(&door, Duration::from_millis(20)).ok()
    }

    /// So many connections that send one byte of a Hello every 50 ms. With `persistent`, each one
    /// that is closed comes again.
    fn drip(&self, sockets: usize, persistent: bool) {
        let said = framed(hello(1, 3, join()).to_string().as_bytes());
        let mut strangers: Vec<(Option<TcpStream>, usize)> = Vec::new();
        while self.goes_on() {
            if strangers.len() < sockets {
                let more = (sockets - strangers.len()).min(200);
                strangers.extend((0..more).map(|_| (self.stranger(), 0)));
            }
            for (stranger, at) in &mut strangers {
                let next = &said[*at..=*at];
                let alive = stranger.as_mut().is_some_and(|stranger| stranger.write_all(next).is_ok());
                if alive {
                    *at = (*at + 1).min(said.len() - 1);
                } else if persistent {
                    (*stranger, *at) = (self.stranger(), 0);
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// So many connections that say nothing at all.
    fn silence(&self, sockets: usize) {
        let strangers: Vec<_> = (0..sockets).map(|_| self.stranger()).collect();
        while self.goes_on() {
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(strangers);
    }

    /// One connection after the other.
    fn knock(&self, pause: Duration) {
        while self.goes_on() {
            drop(self.stranger());
            std::thread::sleep(pause);
        }
    }

    /// The same, each with a Hello that is answered with a challenge.
    fn ask(&self, pause: Duration) {
        let hello = hello(1, 3, join()).to_string();
        while self.goes_on() {
            std::thread::sleep(pause);
            if let Some(mut stranger) = self.stranger() {
                let _ = stranger.write_all(&framed(hello.as_bytes()));
            }
        }
    }

    /// A thousand connections at a time, each of which goes as far as it can without the token, and
    /// stays.
    fn crowd(&self, pause: Duration) {
        let hello = hello(1, 3, join()).to_string();
        let mut strangers = VecDeque::new();
        while self.goes_on() {
            std::thread::sleep(pause);
            if let Some(mut stranger) = self.stranger() {
                let _ = stranger.write_all(&framed(hello.as_bytes()));
                strangers.push_back(stranger);
            }
            if strangers.len() > 1000 {
                strangers.pop_front();
            }
        }
    }
}

/// Joins the third rank and lets the group work while `strangers` are at it, in so many threads.
fn under(name: &str, threads: usize, limit: f64, strangers: impl Fn(&Flood<'_>) + Sync) {
    let mut made = 0;
    let mut worked = 0.0;
    let times = in_time(name, limit, || {
        let (mut cluster, doors) = waiting();
        let flood =
            Flood { doors: &doors, over: AtomicBool::new(false), made: AtomicUsize::new(0), began: Instant::now() };
        let took = std::thread::scope(|scope| {
            for _ in 0..threads {
                let thread = std::thread::Builder::new().stack_size(128 << 10);
                thread.spawn_scoped(scope, || strangers(&flood)).expect("a thread");
            }
            // Let it gather strength.
            std::thread::sleep(Duration::from_millis(300));
            let took = complete(&mut cluster);
            let began = Instant::now();
            std::thread::sleep(Duration::from_millis(500));
            works(&mut cluster, name);
            worked = began.elapsed().as_secs_f64() * 1e3;
            flood.over.store(true, Ordering::Relaxed);
            took
        });
        made = flood.made.load(Ordering::Relaxed);
        Times::from_iter([took])
    });
    println!(
        "{name}: {made} connections; the join meanwhile: {:.0} ms; half a second of work: {worked:.0} ms",
        times.longest()
    );
}

#[test]
fn a_thousand_slow_strangers_delay_nobody() {
    let _alone = alone();
    allow_open_files(4096);
    under("1,000 that drip", 1, SECOND, |flood| flood.drip(1000, false));
    under("1,000 that drip and come again", 1, SECOND, |flood| flood.drip(1000, true));
    under("1,000 that say nothing", 1, SECOND, |flood| flood.silence(1000));
}

#[test]
fn a_flood_of_strangers_delays_nobody() {
    let _alone = alone();
    allow_open_files(4096);
    // Two to four thousand connections per second; more than four hundred at the same moment.
    let pause = Duration::from_micros(500);
    under("a flood that knocks", 2, SECOND, |flood| flood.knock(pause));
    under("a flood that says Hello", 2, SECOND, |flood| flood.ask(pause));
    under("a flood that says Hello and stays", 2, SECOND, |flood| flood.crowd(pause));
    under("four hundred at once, again and again", 400, SECOND, |flood| flood.knock(Duration::from_millis(200)));
}

/// Here the strangers have the cores to themselves most of the time, and close out every caller
/// again and again before its handshake is over. Nothing is promised about time, but no rank may
/// think that it is in when it is not.
#[test]
fn a_flood_without_bounds_breaks_no_group() {
    let _alone = alone();
    allow_open_files(4096);
    under("a flood without bounds", 2, 15_000.0, |flood| flood.crowd(Duration::ZERO));
}

/// The whole way of a stranger who is patient: a challenge, and then nothing.
#[test]
fn a_crowd_that_waits_with_a_challenge_is_thinned_out() {
    let _alone = alone();
    let (mut cluster, doors) = waiting();
    let hello = hello(1, 3, join()).to_string();
    let strangers: Vec<TcpStream> = (0..80).map(|_| challenge(connect(doors[0]), hello.as_bytes()).0).collect();
    let took = complete(&mut cluster);
    assert!(took < 5000.0, "{took} ms: as long as strangers are questioned");
    works(&mut cluster, "a crowd");
    drop(strangers);
}
