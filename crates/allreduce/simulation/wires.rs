//! The data links: a [`Transport`] whose bytes go through the simulated network.
//!
//! A rank owns its ends of the links. What it sends lies in `outgoing` until the network fetches
//! it; what the network brings lies in `arrived` until the rank asks for it.

use std::collections::VecDeque;

use super::random::Random;
use crate::frame::HEADER_BYTES;
use crate::transport::{Backend, Broken, Transport, Want};

/// How a link behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Model {
    /// Like TCP: a stream of bytes, in order and complete until it breaks.
    Stream,
    /// Like RDMA over an unreliable connection: whole frames, which can be lost, doubled or
    /// overtaken without notice. It never breaks: a dead peer is silent.
    Frames,
}

/// Bytes on their way.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) bytes: Vec<u8>,
    /// A frame begins with the first byte.
    pub(super) starts_frame: bool,
}

/// How a link ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ending {
    pub(super) closed: bool,
    pub(super) what: &'static str,
}

/// One rank's end of one link.
#[derive(Debug)]
struct End {
    outgoing: Vec<Piece>,
    /// Bytes that may still leave before the peer has taken some.
    room: isize,
    /// The rank wanted to send and could not.
    starved: bool,
    arrived: VecDeque<Vec<u8>>,
    /// Bytes of the first piece that have been read.
    offset: usize,
    /// Bytes read since the network last asked.
    taken: usize,
    ended: Option<Ending>,
}

/// All links of one rank.
#[derive(Debug)]
pub(super) struct SimTransport {
    pub(super) model: Model,
    frame_bytes: usize,
    /// Most bytes that one call sends or receives.
    most_at_once: usize,
    random: Random,
    ends: Vec<Vec<End>>,
}

/// What the links of a run are like.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinkSettings {
    pub(super) model: Model,
    pub(super) links: usize,
    pub(super) frame_bytes: usize,
    pub(super) most_at_once: usize,
    /// Bytes on their way or waiting to be read before a sender has to wait.
    pub(super) room: usize,
}

impl SimTransport {
    pub(super) fn new(world: usize, settings: LinkSettings, random: Random) -> SimTransport {
        let LinkSettings { model, links, frame_bytes, most_at_once, room } = settings;
        let end = || End {
            outgoing: Vec::new(),
            room: room as isize,
            starved: false,
            arrived: VecDeque::new(),
            offset: 0,
            taken: 0,
            ended: None,
        };
        let ends = (0..world).map(|_| (0..links).map(|_| end()).collect()).collect();
        SimTransport { model, frame_bytes, most_at_once, random, ends }
    }

    /// What has left since the network last asked.
    pub(super) fn fetch_outgoing(&mut self, peer: usize, link: usize) -> Vec<Piece> {
        std::mem::take(&mut self.ends[peer][link].outgoing)
    }

    /// Bytes read since the network last asked.
    pub(super) fn fetch_taken(&mut self, peer: usize, link: usize) -> usize {
        std::mem::take(&mut self.ends[peer][link].taken)
    }

    /// The peer has read so many bytes. Whether the rank waits for that.
    pub(super) fn make_room(&mut self, peer: usize, link: usize, bytes: usize) -> bool {
        let end = &mut self.ends[peer][link];
        end.room += bytes as isize;
        std::mem::take(&mut end.starved)
    }

    pub(super) fn arrive(&mut self, peer: usize, link: usize, bytes: Vec<u8>) {
        self.ends[peer][link].arrived.push_back(bytes);
    }

    /// Whether something has arrived that was not read.
    pub(super) fn has_unread(&self, peer: usize, link: usize) -> bool {
        !self.ends[peer][link].arrived.is_empty()
    }

    /// Whether the peer closed the link.
    pub(super) fn is_closed(&self, peer: usize, link: usize) -> bool {
        self.ends[peer][link].ended.is_some_and(|ending| ending.closed)
    }

    /// Nothing comes after what has arrived so far.
    pub(super) fn end(&mut self, peer: usize, link: usize, ending: Ending) {
        self.ends[peer][link].ended.get_or_insert(ending);
    }
}

fn broken(peer: usize, link: usize, ending: Ending) -> Broken {
    Broken { peer, link, closed: ending.closed, what: ending.what.into() }
}

impl Transport for SimTransport {
    fn backend(&self) -> Backend {
        match self.model {
            Model::Stream => Backend::Tcp,
            Model::Frames => Backend::Rdma,
        }
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
        let whole = HEADER_BYTES + payload.len();
        let most = match self.model {
            Model::Stream => 1 + self.random.below(self.most_at_once),
            Model::Frames => whole,
        };
        let end = &mut self.ends[peer][link];
        if let Some(ending) = end.ended {
            return Err(broken(peer, link, ending));
        }
        if end.room <= 0 {
            end.starved = true;
            return Ok(false);
        }
        let count = match self.model {
            Model::Stream => most.min(whole - *sent).min(end.room as usize),
            Model::Frames => whole,
        };
        let mut bytes = Vec::with_capacity(count);
        bytes.extend_from_slice(&header[(*sent).min(HEADER_BYTES)..HEADER_BYTES.min(*sent + count)]);
        let rest = count - bytes.len();
        let from = sent.saturating_sub(HEADER_BYTES);
        bytes.extend_from_slice(&payload[from..from + rest]);
        end.outgoing.push(Piece { bytes, starts_frame: *sent == 0 });
        end.room -= count as isize;
        *sent += count;
        Ok(true)
    }

    fn receive(
        &mut self,
        peer: usize,
        link: usize,
        header: &mut [u8; HEADER_BYTES],
        payload: &mut [u8],
        filled: &mut usize,
    ) -> Result<bool, Broken> {
        let most = 1 + self.random.below(self.most_at_once);
        let end = &mut self.ends[peer][link];
        if end.arrived.is_empty() {
            return end.ended.map_or(Ok(false), |ending| Err(broken(peer, link, ending)));
        }
        if self.model == Model::Frames {
            let frame = end.arrived.pop_front().expect("not empty");
            header.copy_from_slice(&frame[..HEADER_BYTES]);
            *filled = HEADER_BYTES;
            // A frame of another length stops at its header, as the trait says.
            if frame.len() == HEADER_BYTES + payload.len() {
                payload.copy_from_slice(&frame[HEADER_BYTES..]);
                *filled = frame.len();
            }
            end.taken += frame.len();
            return Ok(true);
        }
        let mut left = most.min(HEADER_BYTES + payload.len() - *filled);
        while left > 0 {
            let Some(piece) = end.arrived.front() else { break };
            let here = if *filled < HEADER_BYTES { HEADER_BYTES - *filled } else { left };
            let count = left.min(piece.len() - end.offset).min(here);
            let bytes = &piece[end.offset..end.offset + count];
            match filled.checked_sub(HEADER_BYTES) {
                None => header[*filled..*filled + count].copy_from_slice(bytes),
                Some(at) => payload[at..at + count].copy_from_slice(bytes),
            }
            end.offset += count;
            end.taken += count;
            if end.offset == piece.len() {
                end.arrived.pop_front();
                end.offset = 0;
            }
            *filled += count;
            left -= count;
        }
        Ok(true)
    }

    fn idle(&mut self, _: &[Want], _: u32) {
        unreachable!("the simulation waits by its own clock");
    }
}
