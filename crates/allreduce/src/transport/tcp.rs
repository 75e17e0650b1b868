//! Frames over TCP connections: several per peer if asked for, never blocking, one system call per
//! frame and direction.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use finetune_memory_pipe::{Damaged, Moved, Pipe};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::frame::HEADER_BYTES;
use crate::same_machine::DataLink;
use crate::transport::{Backend, Broken, LONGEST_SLEEP, Transport, Want};

/// Send and receive buffers of connections within one machine.
const SAME_MACHINE_BUFFER: usize = 512 << 10;

/// Payload bytes of a frame between ranks that all share one machine: sent, checked and added while it
/// lies in a core's nearest caches.
pub(crate) const MEMORY_FRAME: usize = 64 << 10;

/// How long a wait polls before it sleeps.
const BUSY_POLL: Duration = Duration::from_micros(200);

/// Polls before a wait begins to yield to other processes: some ten microseconds.
const SPINS: u32 = 16;

/// How TCP connections are used.
#[derive(Clone, Debug, PartialEq)]
pub struct TcpOptions {
    /// Connections per pair of ranks. More than one helps if a single one does not fill the
    /// network.
    pub streams: usize,
    /// Send and receive buffers of each connection in bytes. None: 512 KiB within a machine,
    /// otherwise the system's choice.
    pub buffer_bytes: Option<usize>,
    /// How long a wait polls before it sleeps. None: 200 µs.
    pub busy_poll: Option<Duration>,
    /// Payload bytes of a frame.
    pub frame_bytes: usize,
    /// Ranks of one machine exchange data through memory that they share, where the system has it
    /// (Linux). The connections then only wake them.
    pub shared_memory: bool,
}

impl Default for TcpOptions {
    fn default() -> TcpOptions {
        TcpOptions { streams: 1, buffer_bytes: None, busy_poll: None, frame_bytes: 512 << 10, shared_memory: true }
    }
}

/// One connection, and the memory beside it if it leads to a process of this machine.
struct Link {
    stream: TcpStream,
    pipe: Option<Pipe>,
    /// The peer has closed the connection. What it left in the memory is still read.
    closed: bool,
    /// Bytes that have to be in the memory before anything can be done with them.
    needs: usize,
}

/// The connections of one rank: `links[peer][link]`.
pub(crate) struct Tcp {
    links: Vec<Vec<Link>>,
    frame_bytes: usize,
    busy_poll: Duration,
    /// There are more ranks than cores, so a rank that polls yields its core to those that could
    /// send.
    crowded: bool,
    idle_since: Instant,
}

impl Tcp {
    /// `links[peer]` are the connections to that peer, in the same order at both ends; none for this
    /// rank itself.
    pub(crate) fn new(links: Vec<Vec<DataLink>>, options: &TcpOptions, ranks_here: usize) -> io::Result<Tcp> {
        for link in links.iter().flatten() {
            match prepare(&link.stream, options) {
                // The peer has closed already. The first frame reports it, and the control
                // connections say why.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotConnected | io::ErrorKind::InvalidInput) => {}
                done => done?,
            }
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let crowded = ranks_here > cores;
        // With a core for every rank a spinning wait costs nothing; otherwise each look gives the
        // core to those that could send.
        let busy_poll = options.busy_poll.unwrap_or(BUSY_POLL);
        // All ranks answer alike, also if some memory could not be opened.
        let through_memory = options.shared_memory && ranks_here == links.len();
        let most = if through_memory { MEMORY_FRAME } else { usize::MAX };
        let frame_bytes = options.frame_bytes.min(most).max(4096) & !7;
        let link = |DataLink { stream, pipe }| Link { stream, pipe, closed: false, needs: 1 };
        let links = links.into_iter().map(|links| links.into_iter().map(link).collect()).collect();
        Ok(Tcp { links, frame_bytes, busy_poll, crowded, idle_since: Instant::now() })
    }

    /// Tells the peers that this rank sleeps until it can move what it wants to. Returns whether it
    /// must not sleep, because it can now.
    fn says_that_it_sleeps(&mut self, wants: &[Want]) -> bool {
        let mut can_move = false;
        for want in wants {
            let link = &mut self.links[want.peer][want.link];
            let needs = if want.receive { link.needs } else { 0 };
            can_move |= link.closed || link.pipe.as_mut().is_some_and(|pipe| pipe.sleep(needs, want.send));
        }
        can_move
    }

    fn broken(peer: usize, link: usize, error: &io::Error) -> Broken {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof, WriteZero};
        let closed = matches!(
            error.kind(),
            BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof | WriteZero
        );
        Broken { peer, link, closed, what: error.to_string() }
    }
}

impl Link {
    /// What a call to the pipe moved, as bytes of a frame.
    fn moved(
        &mut self,
        peer: usize,
        link: usize,
        moved: Result<Moved, Damaged>,
        frame: &mut usize,
    ) -> Result<bool, Broken> {
        match moved {
            Ok(Moved { bytes: 0, .. }) if self.closed => {
                Err(Broken { peer, link, closed: true, what: "the peer closed the connection".into() })
            }
            Ok(Moved { bytes, wake }) => {
                *frame += bytes;
                if wake {
                    // If the connection is full, the peer has more than enough to wake it. If it is
                    // closed, the next wait sees it.
                    let _ = self.stream.write(&[0]);
                }
                Ok(bytes > 0)
            }
            Err(damaged) => Err(Broken { peer, link, closed: false, what: damaged.to_string() }),
        }
    }

    /// After a wait: takes in what woke this rank, and whether the peer has closed the connection.
    fn wakes_up(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        pipe.awake();
        let mut bells = [0; 64];
        match self.stream.read(&mut bells) {
            Ok(0) => self.closed = true,
            Err(error) if !try_again(&error) => self.closed = true,
            _ => {}
        }
    }
}

fn prepare(stream: &TcpStream, options: &TcpOptions) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    let same_machine = stream.peer_addr()?.ip() == stream.local_addr()?.ip();
    if same_machine {
        // Within a machine nothing is congested, and pacing (BBR) only costs time. Ignore the
        // error: not every kernel permits Reno.
        let _ = rustix::net::sockopt::set_tcp_congestion(stream, "reno");
    }
    // Within a machine there is no delay to fill: a buffer that stays in the cache is faster than a
    // large one.
    if let Some(bytes) = options.buffer_bytes.or(same_machine.then_some(SAME_MACHINE_BUFFER)) {
        rustix::net::sockopt::set_socket_send_buffer_size(stream, bytes)?;
        rustix::net::sockopt::set_socket_recv_buffer_size(stream, bytes)?;
    }
    Ok(())
}

/// Whether a call can be tried again: nothing moved and nothing is wrong.
fn try_again(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl Transport for Tcp {
    fn backend(&self) -> Backend {
        Backend::Tcp
    }

    fn frame_bytes(&self, remaining: usize) -> usize {
        remaining.min(self.frame_bytes)
    }

    fn send(
        &mut self,
        peer: usize,
        link: usize,
        header: &[u8; HEADER_BYTES],
        payload: &[u8],
        sent: &mut usize,
    ) -> Result<bool, Broken> {
        let connection = &mut self.links[peer][link];
        if let Some(pipe) = &mut connection.pipe {
            let done = sent.saturating_sub(HEADER_BYTES);
            let moved = pipe.write(&[&header[(*sent).min(HEADER_BYTES)..], &payload[done..]]);
            return connection.moved(peer, link, moved, sent);
        }
        let stream = &mut connection.stream;
        let written = if *sent < HEADER_BYTES {
            stream.write_vectored(&[IoSlice::new(&header[*sent..]), IoSlice::new(payload)])
        } else {
            stream.write(&payload[*sent - HEADER_BYTES..])
        };
        match written {
            Ok(bytes) => {
                *sent += bytes;
                Ok(bytes > 0)
            }
            Err(error) if try_again(&error) => Ok(false),
            Err(error) => Err(Tcp::broken(peer, link, &error)),
        }
    }

    fn receive(
        &mut self,
        peer: usize,
        link: usize,
        header: &mut [u8; HEADER_BYTES],
        payload: &mut [u8],
        filled: &mut usize,
    ) -> Result<bool, Broken> {
        let connection = &mut self.links[peer][link];
        if let Some(pipe) = &mut connection.pipe {
            connection.needs = 1;
            let done = filled.saturating_sub(HEADER_BYTES);
            let moved = pipe.read(&mut [&mut header[(*filled).min(HEADER_BYTES)..], &mut payload[done..]]);
            return connection.moved(peer, link, moved, filled);
        }
        let stream = &mut connection.stream;
        let read = if *filled < HEADER_BYTES {
            stream.read_vectored(&mut [IoSliceMut::new(&mut header[*filled..]), IoSliceMut::new(payload)])
        } else {
            stream.read(&mut payload[*filled - HEADER_BYTES..])
        };
        match read {
            Ok(0) => Err(Broken { peer, link, closed: true, what: "the peer closed the connection".into() }),
            Ok(bytes) => {
                *filled += bytes;
                Ok(true)
            }
            Err(error) if try_again(&error) => Ok(false),
            Err(error) => Err(Tcp::broken(peer, link, &error)),
        }
    }

    /// What goes through memory is as safe there as in the buffers of both ranks.
    fn checks_payloads(&self, peer: usize, link: usize) -> bool {
        self.links[peer][link].pipe.is_none()
    }

    fn holds(&self, peer: usize, link: usize, length: usize) -> bool {
        self.links[peer][link].pipe.as_ref().is_some_and(|pipe| (1..=pipe.capacity()).contains(&length))
    }

    fn look(
        &mut self,
        peer: usize,
        link: usize,
        length: usize,
        look: &mut dyn FnMut([&[u8]; 2]),
    ) -> Result<bool, Broken> {
        let connection = &mut self.links[peer][link];
        let Some(pipe) = &mut connection.pipe else { return Ok(false) };
        let moved = pipe.read_in_place(length, look);
        connection.needs = if moved == Ok(Moved::default()) { length } else { 1 };
        connection.moved(peer, link, moved, &mut 0)
    }

    fn idle(&mut self, wants: &[Want], round: u32) {
        if round == 0 {
            self.idle_since = Instant::now();
        }
        if self.idle_since.elapsed() < self.busy_poll {
            // A short wait is for the network. In a longer one the peer may need this very core,
            // whatever was counted.
            if self.crowded || round > SPINS {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
            return;
        }
        if !self.says_that_it_sleeps(wants) {
            let mut waiting: Vec<PollFd<'_>> = wants
                .iter()
                .map(|want| {
                    let link = &self.links[want.peer][want.link];
                    let mut flags = PollFlags::empty();
                    flags.set(PollFlags::IN, want.receive || link.pipe.is_some());
                    flags.set(PollFlags::OUT, want.send && link.pipe.is_none());
                    PollFd::new(&link.stream, flags)
                })
                .collect();
            let timeout = Timespec::try_from(LONGEST_SLEEP).ok();
            // Interrupted or not: the caller looks at the links again.
            let _ = poll(&mut waiting, timeout.as_ref());
        }
        for want in wants {
            self.links[want.peer][want.link].wakes_up();
        }
    }
}
