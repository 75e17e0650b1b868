//! The thread that keeps a group's membership: reads and writes the control connections and calls
//! the [`ControlDriver`]. It does nothing else, so neither a long computation nor a waiting
//! operation can keep it from answering.
//!
//! It has no rules of its own: those are in `control_driver.rs` and `session.rs`.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::control_driver::{Arrived, ControlDriver, Effect, Inbox};
use crate::error::{GroupFailure, Who};
use crate::group_status::GroupStatus;
use crate::handshake::Trusted;
use crate::notice::{Notice, Notices};
use crate::session::{Session, Timing, Warning};
use crate::verdict::{Cause, Verdict};

/// Unsent bytes at which a peer that reads nothing gets no more heartbeats.
const MOST_BACKLOG: usize = 64 << 10;

/// How long a rank may take to learn by itself that the group has failed. With what the verdict takes, a lost rank is
/// named within a second.
const UNTOLD: Duration = Duration::from_millis(600);

enum Order {
    Report(Cause),
    Leave,
}

/// A handle on the control thread.
pub(crate) struct Control {
    pub(crate) status: Arc<GroupStatus>,
    orders: Sender<Order>,
    wake: OwnedFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Control {
    /// Takes over the control connections of a complete group.
    ///
    /// # Errors
    /// If the system gives no thread, or none of what one needs.
    pub(crate) fn start(
        rank: usize,
        who: Arc<Vec<Who>>,
        connections: BTreeMap<usize, Trusted>,
        timing: Timing,
        notices: Notices,
    ) -> io::Result<Control> {
        let (mut sockets, mut seals) = (BTreeMap::new(), BTreeMap::new());
        for (peer, connection) in connections {
            let (stream, keys) = connection.into_parts();
            stream.set_nonblocking(true)?;
            let _ = rustix::net::sockopt::set_socket_keepalive(&stream, true);
            sockets.insert(peer, Socket { stream, backlog: Vec::new(), open: true });
            seals.insert(peer, keys);
        }
        let status = Arc::new(GroupStatus::new());
        let (orders, received) = channel();
        let (woken, wake) = rustix::pipe::pipe()?;
        rustix::io::ioctl_fionbio(&woken, true)?;
        let thread = std::thread::Builder::new().name("allreduce-control".into()).spawn({
            let status = Arc::clone(&status);
            move || {
                let session = Session::new(rank, who.len(), timing, status.now());
                let driver = ControlDriver::new(session, seals, Arc::clone(&status));
                Thread { driver, sockets, status, orders: received, woken, rank, who, notices, unsaid: None }.run();
            }
        })?;
        Ok(Control { status, orders, wake, thread: Mutex::new(Some(thread)) })
    }

    /// Says why this rank stops; the verdict follows in the status.
    pub(crate) fn report(&self, cause: Cause) {
        self.order(Order::Report(cause));
    }

    /// Says farewell to all peers, and closes the connections. A second call does nothing.
    pub(crate) fn leave(&self) {
        self.order(Order::Leave);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    fn order(&self, order: Order) {
        if self.orders.send(order).is_ok() {
            let _ = rustix::io::write(&self.wake, &[0]);
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.leave();
    }
}

/// One control connection and what has not left for it yet.
struct Socket {
    stream: TcpStream,
    backlog: Vec<u8>,
    open: bool,
}

impl Socket {
    fn send(&mut self, bytes: &[u8]) {
        if self.open {
            self.backlog.extend_from_slice(bytes);
            self.flush();
        }
    }

    fn flush(&mut self) {
        while self.open && !self.backlog.is_empty() {
            match self.stream.write(&self.backlog) {
                Ok(written) => drop(self.backlog.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The reading side finds out what happened.
                Err(_) => self.backlog.clear(),
            }
        }
    }

    /// Reads what is there without blocking.
    fn read(&mut self, from: usize) -> Arrived {
        let mut arrived = Arrived { from, bytes: Vec::new(), ended: false };
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(read) if read > 0 => arrived.bytes.extend_from_slice(&bytes[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return arrived,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    arrived.ended = true;
                    return arrived;
                }
            }
        }
    }
}

struct Thread {
    driver: ControlDriver,
    sockets: BTreeMap<usize, Socket>,
    status: Arc<GroupStatus>,
    orders: Receiver<Order>,
    woken: OwnedFd,
    rank: usize,
    who: Arc<Vec<Who>>,
    notices: Notices,
    /// What ended the group, and when, until it is known that this rank has learned it.
    unsaid: Option<(Duration, Verdict)>,
}

impl Thread {
    fn run(mut self) {
        loop {
            self.wait();
            let inbox = self.read();
            let leaving = inbox.leaving;
            for effect in self.driver.poll(self.status.now(), inbox) {
                self.apply(effect);
            }
            self.say_end();
            if leaving {
                for socket in self.sockets.values_mut() {
                    socket.flush();
                    let _ = socket.stream.shutdown(Shutdown::Write);
                }
                return;
            }
        }
    }

    fn wait(&mut self) {
        let until = self.driver.next_poll().saturating_sub(self.status.now());
        let mut waiting = vec![PollFd::new(&self.woken, PollFlags::IN)];
        for socket in self.sockets.values().filter(|socket| socket.open) {
            let flags = if socket.backlog.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
            waiting.push(PollFd::new(&socket.stream, flags));
        }
        let _ = poll(&mut waiting, Timespec::try_from(until).ok().as_ref());
        let mut bytes = [0; 64];
        while rustix::io::read(&self.woken, &mut bytes).is_ok_and(|read| read == bytes.len()) {}
    }

    /// What the connections and this rank's other threads have brought.
    fn read(&mut self) -> Inbox {
        let mut inbox = Inbox::default();
        for (&peer, socket) in self.sockets.iter_mut().filter(|(_, socket)| socket.open) {
            socket.flush();
            inbox.arrived.push(socket.read(peer));
            if socket.backlog.len() > MOST_BACKLOG {
                inbox.congested.push(peer);
            }
        }
        loop {
            match self.orders.try_recv() {
                Ok(Order::Report(cause)) => inbox.reports.push(cause),
                Ok(Order::Leave) | Err(TryRecvError::Disconnected) => {
                    inbox.leaving = true;
                    return inbox;
                }
                Err(TryRecvError::Empty) => return inbox,
            }
        }
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::Send { to, bytes } => {
                if let Some(socket) = self.sockets.get_mut(&to) {
                    socket.send(&bytes);
                }
            }
            Effect::Ended { peer } | Effect::Distrusted { peer } => {
                if let Some(socket) = self.sockets.get_mut(&peer) {
                    socket.open = false;
                    let _ = socket.stream.shutdown(Shutdown::Both);
                }
            }
            Effect::Warn(Warning::Silent { rank, for_, .. }) => {
                (self.notices)(Notice::Silent { rank, host: self.who[rank].host.clone(), silence: for_ });
            }
            Effect::Warn(Warning::Back { rank }) => (self.notices)(Notice::Back { rank }),
            Effect::End(verdict) => {
                self.unsaid = Some((self.status.now(), verdict.clone()));
                self.status.end(verdict);
            }
        }
    }

    /// A rank that computes, reads or writes for long learns of the end later than its user should.
    fn say_end(&mut self) {
        let now = self.status.now();
        let Some((_, verdict)) = self.unsaid.take_if(|(since, _)| now.saturating_sub(*since) >= UNTOLD) else { return };
        if self.status.is_told() {
            return;
        }
        let (rank, step, who) = (self.rank, self.status.progress().step, Arc::clone(&self.who));
        let failure = GroupFailure { rank, verdict, operation: None, step, who, flight: Vec::new() };
        (self.notices)(Notice::Failed { what: failure.root_cause(), rank, step });
    }
}
