//! Frames over TCP connections: several per peer if asked for, never blocking, one system call per
//! frame and direction.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::frame::HEADER_BYTES;
use crate::transport::{Backend, Broken, LONGEST_SLEEP, Transport, Want};

/// Send and receive buffers of connections within one machine.
const SAME_MACHINE_BUFFER: usize = 512 << 10;

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
    /// How long a wait polls before it sleeps. None: long if every rank of this host has a core,
    /// otherwise short.
    pub busy_poll: Option<Duration>,
    /// Payload bytes of a frame.
    pub frame_bytes: usize,
}

impl Default for TcpOptions {
    fn default() -> TcpOptions {
        TcpOptions { streams: 1, buffer_bytes: None, busy_poll: None, frame_bytes: 512 << 10 }
    }
}

/// The connections of one rank: `streams[peer][link]`.
pub(crate) struct Tcp {
    streams: Vec<Vec<TcpStream>>,
    frame_bytes: usize,
    busy_poll: Duration,
    /// There are more ranks than cores, so a rank that polls yields its core to those that could
    /// send.
    crowded: bool,
    idle_since: Instant,
}

impl Tcp {
    /// `streams[peer]` are the connections to that peer, in the same order at both ends; none for
    /// this rank itself.
    pub(crate) fn new(streams: Vec<Vec<TcpStream>>, options: &TcpOptions, ranks_here: usize) -> io::Result<Tcp> {
        for stream in streams.iter().flatten() {
            match prepare(stream, options) {
                // The peer has closed already. The first frame reports it, and the control
                // connections say why.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotConnected | io::ErrorKind::InvalidInput) => {}
                done => done?,
            }
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let crowded = ranks_here > cores;
        // With a core for every rank a spinning wait costs nothing. Otherwise it takes the core
        // that the peer needs.
        let busy_poll = options.busy_poll.unwrap_or(Duration::from_micros(if crowded { 20 } else { 200 }));
        let frame_bytes = options.frame_bytes.max(4096) & !7;
        Ok(Tcp { streams, frame_bytes, busy_poll, crowded, idle_since: Instant::now() })
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
        let stream = &mut self.streams[peer][link];
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
        let stream = &mut self.streams[peer][link];
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
        let mut waiting: Vec<PollFd<'_>> = wants
            .iter()
            .map(|want| {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, want.receive);
                flags.set(PollFlags::OUT, want.send);
                PollFd::new(&self.streams[want.peer][want.link], flags)
            })
            .collect();
        let timeout = Timespec::try_from(LONGEST_SLEEP).ok();
        // Interrupted or not: the caller looks at the sockets again.
        let _ = poll(&mut waiting, timeout.as_ref());
    }
}
