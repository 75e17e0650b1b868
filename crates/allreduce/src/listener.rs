//! Accepts connections for a rank: lets in callers that hold the token, and keeps strangers from
//! disturbing them.
//!
//! Each connection is authenticated in a thread of its own, under one deadline. If too many are
//! being authenticated, the oldest is closed. A rank finishes in a millisecond; a stranger that
//! sends single bytes does not.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::config::Config;
use crate::handshake::{HANDSHAKE_TIME, HandshakeError, Hello, Purpose, Trusted, answer};
use crate::notice::{Notice, Notices};
use crate::roster::Answer;
use crate::secret::Secret;

/// Connections that are authenticated at the same time.
const MOST_PENDING: usize = 64;

/// Connections that wait to be accepted, if the system lets as many.
const MOST_WAITING: i32 = 512;

/// How soon the accepting thread notices that the group is gone.
const LOOK: Duration = Duration::from_millis(50);

/// An authenticated connection that no rank has taken yet.
pub(crate) struct Arrival {
    pub(crate) hello: Hello,
    pub(crate) connection: Trusted,
    pub(crate) from: SocketAddr,
}

#[derive(Default)]
struct Room {
    arrivals: Vec<Arrival>,
    /// Being authenticated: a number and a handle to close the connection with.
    pending: VecDeque<(u64, TcpStream)>,
    accepted: u64,
}

struct Shared {
    rank: usize,
    secret: Secret,
    run: String,
    notices: Notices,
    room: Mutex<Room>,
    changed: Condvar,
    closing: AtomicBool,
}

impl Shared {
    fn room(&self) -> MutexGuard<'_, Room> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open listener and the ranks that have come through it.
pub(crate) struct Listener {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens at `port` (0: any free one) of `ip`, or of all addresses if `config` wants that.
    ///
    /// # Errors
    /// If the port cannot be had, or no thread.
    pub(crate) fn open(config: &Config, ip: IpAddr, port: u16) -> io::Result<Listener> {
        let listener =
            if config.listens_everywhere() { listen_everywhere(port)? } else { TcpListener::bind((ip, port))? };
        // The standard library lets 128 connections wait. A caller that finds no place tries again
        // only after a second.
        let _ = rustix::net::listen(&listener, MOST_WAITING);
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            rank: config.rank,
            secret: config.secret.clone(),
            run: config.run.clone(),
            notices: config.notices.clone(),
            room: Mutex::default(),
            changed: Condvar::new(),
            closing: AtomicBool::new(false),
        });
        let thread = std::thread::Builder::new().name("allreduce-door".into()).spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared)
        })?;
        Ok(Listener { shared, address, thread: Some(thread) })
    }

    /// Listens at the first free port of those that `config` allows.
    ///
    /// # Errors
    /// If none of them is free, or there is no thread.
    pub(crate) fn open_in_range(config: &Config, ip: IpAddr) -> io::Result<Listener> {
        let Some((first, last)) = config.ports else { return Listener::open(config, ip, 0) };
        for port in first..=last {
            match Listener::open(config, ip, port) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                opened => return opened,
            }
        }
        let why = format!("no port from {first} to {last} is free (distributed.ports)");
        Err(io::Error::new(io::ErrorKind::AddrInUse, why))
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for an arrival that `wanted` accepts; `None` at the deadline.
    pub(crate) fn take(&self, deadline: Instant, mut wanted: impl FnMut(&Hello) -> bool) -> Option<Arrival> {
        let mut room = self.shared.room();
        loop {
            if let Some(index) = room.arrivals.iter().position(|arrival| wanted(&arrival.hello)) {
                return Some(room.arrivals.remove(index));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            room = self.shared.changed.wait_timeout(room, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        for (_, stream) in self.shared.room().pending.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Listens at all addresses of both families; of IPv4 alone if the system has no IPv6.
fn listen_everywhere(port: u16) -> io::Result<TcpListener> {
    let both = || -> io::Result<TcpListener> {
        let socket = rustix::net::socket(AddressFamily::INET6, SocketType::STREAM, None)?;
        rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
        sockopt::set_ipv6_v6only(&socket, false)?;
        // As in the standard library: closing connections of an earlier run do not hold the port.
        sockopt::set_socket_reuseaddr(&socket, true)?;
        rustix::net::bind(&socket, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
        rustix::net::listen(&socket, MOST_WAITING)?;
        Ok(TcpListener::from(socket))
    };
    match both() {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        opened => opened,
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let timeout = Timespec::try_from(LOOK).ok();
    while !shared.closing.load(Ordering::Relaxed) {
        match listener.accept() {
            // Connections that were closed at once get no thread.
            Ok((stream, _)) if is_closed(&stream) => {}
            Ok((stream, from)) => {
                // If one socket listens for both families, an IPv4 caller appears as an IPv4-mapped
                // IPv6 address.
                let from = SocketAddr::new(from.ip().to_canonical(), from.port());
                authenticate(stream, from, shared);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], timeout.as_ref());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Most likely out of descriptors: the connections that are being authenticated free
            // some.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Whether the other side has closed the connection.
pub(crate) fn is_closed(stream: &TcpStream) -> bool {
    let _ = stream.set_nonblocking(true);
    let closed = match stream.peek(&mut [0]) {
        Ok(read) => read == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    };
    let _ = stream.set_nonblocking(false);
    closed
}

fn authenticate(stream: TcpStream, from: SocketAddr, shared: &Arc<Shared>) {
    let Ok(handle) = stream.try_clone() else { return };
    let number = {
        let mut room = shared.room();
        if room.pending.len() >= MOST_PENDING
            && let Some((_, oldest)) = room.pending.pop_front()
        {
            let _ = oldest.shutdown(Shutdown::Both);
        }
        room.accepted += 1;
        let number = room.accepted;
        room.pending.push_back((number, handle));
        number
    };
    let ours = Arc::clone(shared);
    let thread = std::thread::Builder::new().name("allreduce-question".into()).stack_size(128 << 10);
    let spawned = thread.spawn(move || {
        let answered = answer(stream, &ours.secret);
        let mut room = ours.room();
        let before = room.pending.len();
        room.pending.retain(|(other, _)| *other != number);
        let was_closed = room.pending.len() == before;
        match answered {
            // The caller saw its connection closed, and comes again.
            Ok(_) if was_closed => {}
            Ok((hello, mut connection, welcome)) if hello.run != ours.run => {
                drop(room);
                // The caller holds the token, so it may know the run's name.
                if matches!(hello.purpose, Purpose::Join { .. }) && welcome.say(&connection).is_ok() {
                    let answer = Answer::OtherRun { run: ours.run.clone() };
                    let _ = connection.send(&answer, Instant::now() + HANDSHAKE_TIME);
                }
                (ours.notices)(Notice::Refused {
                    from,
                    why: format!("it belongs to run {:?}, not to {:?}", hello.run, ours.run),
                });
            }
            Ok((hello, ..)) if hello.purpose.to().is_some_and(|to| to != ours.rank) => {
                drop(room);
                let why = format!("it calls rank {}, this is rank {}", hello.purpose.to().unwrap_or(0), ours.rank);
                (ours.notices)(Notice::Refused { from, why });
            }
            Ok((hello, connection, welcome)) => {
                // A few bytes on a fresh connection: this does not block.
                if welcome.say(&connection).is_err() {
                    return;
                }
                // Connections that no rank took and whose callers have gone are dropped here.
                room.arrivals.retain(|arrival| !is_closed(&arrival.connection.stream));
                room.arrivals.push(Arrival { hello, connection, from });
                drop(room);
                ours.changed.notify_all();
            }
            Err(error) => {
                drop(room);
                refused(&ours, from, &error);
            }
        }
    });
    if spawned.is_err() {
        shared.room().pending.retain(|(other, _)| *other != number);
    }
}

fn refused(shared: &Shared, from: SocketAddr, error: &HandshakeError) {
    if !shared.closing.load(Ordering::Relaxed) {
        (shared.notices)(Notice::Refused { from, why: error.to_string() });
    }
}
