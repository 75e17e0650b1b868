//! The thread that keeps a group's membership: reads and writes the control connections and feeds the [`Session`].
//!
//! It does nothing else, so that neither a long computation nor a collective that waits can keep it from answering.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::handshake::Trusted;
use crate::notice::{Notice, Notices};
use crate::session::{Action, Doing, Event, Message, Progress, Session, Timing, Warning};
use crate::verdict::{Cause, Verdict};

/// Unsent bytes at which a peer that reads nothing gets no more heartbeats.
const MOST_BACKLOG: usize = 64 << 10;

/// What the collectives and the control thread tell each other.
#[derive(Default)]
pub(crate) struct Board {
    pub(crate) step: AtomicU64,
    operation: AtomicU64,
    inside: AtomicBool,
    moved: AtomicU64,
    doing: Mutex<Option<Doing>>,
    /// Set together with `verdict`; cheap to look at.
    failed: AtomicBool,
    verdict: Mutex<Option<Verdict>>,
    ended: Condvar,
    peers: Mutex<BTreeMap<usize, Heard>>,
}

/// What a peer last said.
struct Heard {
    progress: Progress,
    /// Since when it says so (or has left), and when it last spoke.
    since: Instant,
    last: Instant,
    left: bool,
}

impl Board {
    pub(crate) fn progress(&self) -> Progress {
        Progress {
            step: self.step.load(Ordering::Relaxed),
            operation: self.operation.load(Ordering::Relaxed),
            inside: self.inside.load(Ordering::Relaxed),
            moved: self.moved.load(Ordering::Relaxed),
            doing: *self.doing.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// An operation begins. `doing`: what it is, if all ranks of its group take part.
    pub(crate) fn enter(&self, doing: Option<Doing>) {
        self.operation.fetch_add(1, Ordering::Relaxed);
        self.inside.store(true, Ordering::Relaxed);
        *self.doing.lock().unwrap_or_else(PoisonError::into_inner) = doing;
    }

    /// It has ended; `moved` bytes have been moved so far.
    pub(crate) fn leave(&self, moved: u64) {
        self.inside.store(false, Ordering::Relaxed);
        *self.doing.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.set_moved(moved);
    }

    /// So many bytes have been moved so far.
    pub(crate) fn set_moved(&self, moved: u64) {
        self.moved.store(moved, Ordering::Relaxed);
    }

    fn hear(&self, peer: usize, message: &Message) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match (message, peers.get_mut(&peer)) {
            (Message::Heartbeat(progress), Some(heard)) if heard.progress == *progress => heard.last = now,
            (Message::Heartbeat(progress), _) => {
                peers.insert(peer, Heard { progress: *progress, since: now, last: now, left: false });
            }
            (Message::Farewell, Some(heard)) => (heard.left, heard.since) = (true, now),
            _ => {}
        }
    }

    /// Whether all of `peers` other ranks have for so long been gone, or inside an operation without moving a byte. They
    /// must still say so: one that is silent may be frozen.
    pub(crate) fn is_standstill(&self, peers: usize, for_: Duration) -> bool {
        let known = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let stands = |heard: &Heard| {
            let says_so = heard.progress.inside && heard.last.elapsed() < for_ / 5;
            (heard.left || says_so) && heard.since.elapsed() >= for_
        };
        known.len() == peers && known.values().all(stands)
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(crate) fn verdict(&self) -> Option<Verdict> {
        self.verdict.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first verdict stays.
    pub(crate) fn end(&self, verdict: Verdict) {
        let mut ours = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        ours.get_or_insert(verdict);
        self.failed.store(true, Ordering::Release);
        self.ended.notify_all();
    }

    /// Waits for a verdict that is on its way.
    pub(crate) fn wait_for_verdict(&self, longest: Duration) -> Option<Verdict> {
        let verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.ended.wait_timeout_while(verdict, longest, |verdict| verdict.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

enum Order {
    Report(Cause),
    Leave,
}

/// A handle on the control thread.
pub(crate) struct Control {
    pub(crate) board: Arc<Board>,
    orders: Sender<Order>,
    wake: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Takes over the control connections of a complete group.
    pub(crate) fn start(
        rank: usize,
        hosts: Vec<String>,
        connections: BTreeMap<usize, Trusted>,
        timing: Timing,
        notices: Notices,
    ) -> io::Result<Control> {
        for connection in connections.values() {
            connection.stream.set_nonblocking(true)?;
            let _ = rustix::net::sockopt::set_socket_keepalive(&connection.stream, true);
        }
        let board = Arc::new(Board::default());
        let (orders, received) = channel();
        let (woken, wake) = rustix::pipe::pipe()?;
        rustix::io::ioctl_fionbio(&woken, true)?;
        let thread = std::thread::Builder::new().name("allreduce-control".into()).spawn({
            let board = Arc::clone(&board);
            move || {
                let start = Instant::now();
                let session = Session::new(rank, hosts.len(), timing, Duration::ZERO);
                let lines = connections.into_iter().map(|(peer, trusted)| (peer, Line::new(trusted))).collect();
                Thread { start, session, lines, board, orders: received, woken, hosts, notices }.run();
            }
        })?;
        Ok(Control { board, orders, wake, thread: Some(thread) })
    }

    /// Says why this rank stops; the verdict follows on the board.
    pub(crate) fn report(&self, cause: Cause) {
        self.order(Order::Report(cause));
    }

    fn order(&self, order: Order) {
        if self.orders.send(order).is_ok() {
            let _ = rustix::io::write(&self.wake, &[0]);
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.order(Order::Leave);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One control connection and what has not left for it yet.
struct Line {
    trusted: Trusted,
    backlog: Vec<u8>,
    open: bool,
}

impl Line {
    fn new(trusted: Trusted) -> Line {
        Line { trusted, backlog: Vec::new(), open: true }
    }

    fn send(&mut self, message: &Message) {
        let skip = matches!(message, Message::Heartbeat(_)) && self.backlog.len() > MOST_BACKLOG;
        if self.open && !skip {
            let bytes = self.trusted.sealed(message);
            self.backlog.extend_from_slice(&bytes);
            self.flush();
        }
    }

    fn flush(&mut self) {
        while self.open && !self.backlog.is_empty() {
            match self.trusted.stream.write(&self.backlog) {
                Ok(written) => drop(self.backlog.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The reading side finds out what happened.
                Err(_) => self.backlog.clear(),
            }
        }
    }
}

struct Thread {
    start: Instant,
    session: Session,
    lines: BTreeMap<usize, Line>,
    board: Arc<Board>,
    orders: Receiver<Order>,
    woken: OwnedFd,
    hosts: Vec<String>,
    notices: Notices,
}

impl Thread {
    fn run(mut self) {
        loop {
            self.wait();
            self.session.set_progress(self.board.progress());
            // What has arrived is read before time is judged: a rank that was stopped itself must not accuse the others.
            self.read();
            let leaving = self.obey();
            self.feed(Event::Tick);
            if leaving {
                for line in self.lines.values_mut() {
                    line.flush();
                    let _ = line.trusted.stream.shutdown(std::net::Shutdown::Write);
                }
                return;
            }
        }
    }

    fn wait(&mut self) {
        let until = self.session.next_tick().saturating_sub(self.start.elapsed());
        let mut waiting = vec![PollFd::new(&self.woken, PollFlags::IN)];
        for line in self.lines.values().filter(|line| line.open) {
            let flags = if line.backlog.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
            waiting.push(PollFd::new(&line.trusted.stream, flags));
        }
        let _ = poll(&mut waiting, Timespec::try_from(until).ok().as_ref());
        let mut bytes = [0; 64];
        while rustix::io::read(&self.woken, &mut bytes).is_ok_and(|read| read == bytes.len()) {}
    }

    fn read(&mut self) {
        let peers: Vec<usize> = self.lines.iter().filter(|(_, line)| line.open).map(|(&peer, _)| peer).collect();
        for peer in peers {
            let line = self.lines.get_mut(&peer).expect("a line of this group");
            line.flush();
            match line.trusted.read_available::<Message>() {
                Ok(Some(messages)) => {
                    for message in messages {
                        self.board.hear(peer, &message);
                        self.feed(Event::Received { from: peer, message });
                    }
                }
                // A message that does not open is no better than a closed connection: nothing after it can be believed. The
                // peer is to see it closed too, rather than wait for the silence.
                Ok(None) | Err(_) => {
                    line.open = false;
                    let _ = line.trusted.stream.shutdown(std::net::Shutdown::Both);
                    self.feed(Event::Closed { from: peer });
                }
            }
        }
    }

    /// Whether this rank leaves.
    fn obey(&mut self) -> bool {
        loop {
            match self.orders.try_recv() {
                Ok(Order::Report(cause)) => self.feed(Event::Report(cause)),
                Ok(Order::Leave) | Err(TryRecvError::Disconnected) => {
                    self.feed(Event::Leave);
                    return true;
                }
                Err(TryRecvError::Empty) => return false,
            }
        }
    }

    fn feed(&mut self, event: Event) {
        for action in self.session.on(self.start.elapsed(), event) {
            match action {
                Action::Send { to, message } => {
                    if let Some(line) = self.lines.get_mut(&to) {
                        line.send(&message);
                    }
                }
                Action::Warn(Warning::Silent { rank, for_, .. }) => {
                    (self.notices)(Notice::Silent { rank, host: self.hosts[rank].clone(), silence: for_ });
                }
                Action::Warn(Warning::Back { rank }) => (self.notices)(Notice::Back { rank }),
                Action::End(verdict) => self.board.end(verdict),
            }
        }
    }
}
