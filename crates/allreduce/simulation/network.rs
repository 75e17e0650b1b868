//! The network between the ranks: delays, order, what is held back, and the ends of connections.

use std::collections::VecDeque;
use std::time::Duration;

use super::rank::{Process, SealedMessage};
use super::scenario::{FrameFault, Scenario};
use super::wires::{Ending, Model, Piece};
use super::work::LINKS;
use super::world::{Event, World};
use crate::random_bytes::KEY_BYTES;
use crate::sealed::LENGTH_BYTES;
use crate::session::Message;

/// What travels from one rank to another.
pub(super) enum Parcel {
    Data { link: usize, bytes: Vec<u8> },
    DataEnd { link: usize, ending: Ending },
    Control(Vec<u8>),
    ControlEnd,
}

/// The way from one rank to another, control and data.
#[derive(Default)]
pub(super) struct Direction {
    /// How many faults block it now.
    pub(super) blocked: usize,
    pub(super) loses: bool,
    pub(super) held: VecDeque<Parcel>,
    pub(super) last_control: Duration,
    pub(super) last_data: [Duration; LINKS],
    pub(super) frames: usize,
    pub(super) flip_next: bool,
    pub(super) last_message: Vec<u8>,
}

/// What a sealed message says; the seal is not checked.
fn sealed_message(bytes: &[u8]) -> Message {
    let body = &bytes[LENGTH_BYTES..bytes.len() - KEY_BYTES];
    serde_json::from_slice(body).expect("the sender's own message")
}

impl World {
    pub(super) fn direction(&mut self, from: usize, to: usize) -> &mut Direction {
        &mut self.directions[from * self.scenario.world + to]
    }

    pub(super) fn delay(&mut self) -> Duration {
        let Scenario { latency, spike, .. } = self.scenario;
        let most = if self.random.one_in(64) { spike } else { latency };
        self.random.between(latency / 5, most.max(latency / 2))
    }

    /// Sends the sealed messages that a rank has written.
    pub(super) fn post(&mut self, rank: usize) {
        let sealed_messages = std::mem::take(&mut self.ranks[rank].sealed_messages);
        if self.traced {
            self.trace_messages(rank, &sealed_messages);
        }
        for SealedMessage { to, mut bytes } in sealed_messages {
            self.direction(rank, to).last_message.clone_from(&bytes);
            if std::mem::take(&mut self.direction(rank, to).flip_next) {
                self.struck.get_or_insert(self.now);
                let bit = self.random.below(bytes.len() * 8);
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
            if self.random.one_in(16) {
                let rest = bytes.split_off(self.random.below(bytes.len()));
                self.send_control(rank, to, bytes);
                bytes = rest;
            }
            self.send_control(rank, to, bytes);
        }
        for peer in std::mem::take(&mut self.ranks[rank].shut) {
            self.send_on_control(rank, peer, Parcel::ControlEnd);
        }
    }

    /// One line per message, however many ranks get it; heartbeats aside.
    pub(super) fn trace_messages(&self, rank: usize, sealed_messages: &[SealedMessage]) {
        let mut rest: Vec<(usize, Message)> =
            sealed_messages.iter().map(|message| (message.to, sealed_message(&message.bytes))).collect();
        rest.retain(|(_, message)| !matches!(message, Message::Heartbeat(_)));
        while let Some((_, first)) = rest.first().cloned() {
            let same: Vec<usize> = rest.iter().filter(|(_, message)| *message == first).map(|(to, _)| *to).collect();
            self.trace(|_| format!("rank {rank} to {same:?}: {first:?}"));
            rest.retain(|(_, message)| *message != first);
        }
    }

    pub(super) fn send_control(&mut self, from: usize, to: usize, bytes: Vec<u8>) {
        self.send_on_control(from, to, Parcel::Control(bytes));
    }

    pub(super) fn send_on_control(&mut self, from: usize, to: usize, parcel: Parcel) {
        let at = self.now + self.delay();
        let last = &mut self.direction(from, to).last_control;
        *last = at.max(*last);
        let at = *last;
        self.put(at, Event::Arrival { from, to, parcel });
    }

    pub(super) fn send_data(&mut self, from: usize, to: usize, link: usize, bytes: Vec<u8>) {
        let at = self.now + self.delay();
        let last = &mut self.direction(from, to).last_data[link];
        *last = at.max(*last);
        let at = *last;
        self.put(at, Event::Arrival { from, to, parcel: Parcel::Data { link, bytes } });
    }

    /// Fetches what a rank has sent and read on its data links.
    pub(super) fn send_frames(&mut self, rank: usize) {
        for peer in (0..self.scenario.world).filter(|&peer| peer != rank) {
            for link in 0..LINKS {
                for piece in self.ranks[rank].transport.fetch_outgoing(peer, link) {
                    self.send_piece(rank, peer, link, piece);
                }
                let taken = self.ranks[rank].transport.fetch_taken(peer, link);
                if taken > 0 {
                    self.make_room(rank, peer, link, taken);
                }
            }
        }
    }

    /// `reader` has taken (or the network has lost) what `sender` sent: there is room for more.
    pub(super) fn make_room(&mut self, reader: usize, sender: usize, link: usize, bytes: usize) {
        if self.ranks[sender].transport.make_room(reader, link, bytes) {
            let at = self.now + self.scenario.latency / 2;
            self.put(at, Event::Engine(sender));
        }
    }

    pub(super) fn send_piece(&mut self, from: usize, to: usize, link: usize, mut piece: Piece) {
        if link == 0 && piece.starts_frame && !self.scenario.frame_faults.is_empty() {
            let frame = self.direction(from, to).frames;
            self.direction(from, to).frames += 1;
            let due = |fault: &FrameFault| (fault.from, fault.to, fault.frame) == (from, to, frame);
            if let Some(fault) = self.scenario.frame_faults.iter().copied().find(due) {
                self.trace(|_| format!("{:?} strikes frame {frame} from {from} to {to}", fault.damage));
                match self.damage(from, to, piece, fault.damage) {
                    Some(left) => piece = left,
                    None => return,
                }
            }
        }
        self.send_data(from, to, link, piece.bytes);
    }

    pub(super) fn arrive(&mut self, from: usize, to: usize, parcel: Parcel) -> Result<(), String> {
        if self.direction(from, to).blocked == 0 {
            return self.hand_over(from, to, parcel);
        }
        match parcel {
            Parcel::Data { link, bytes } if self.scenario.model == Model::Frames && self.direction(from, to).loses => {
                self.make_room(to, from, link, bytes.len());
            }
            parcel => self.direction(from, to).held.push_back(parcel),
        }
        Ok(())
    }

    pub(super) fn hand_over(&mut self, from: usize, to: usize, parcel: Parcel) -> Result<(), String> {
        let rank = &mut self.ranks[to];
        if rank.process == Process::Dead {
            return Ok(());
        }
        let data = match parcel {
            Parcel::Data { link, bytes } => {
                rank.transport.arrive(from, link, bytes);
                true
            }
            Parcel::DataEnd { link, ending } => {
                rank.transport.end(from, link, ending);
                true
            }
            Parcel::Control(bytes) => {
                rank.arrive(from, &bytes);
                false
            }
            Parcel::ControlEnd => {
                rank.end(from);
                false
            }
        };
        if data { self.engine(to) } else { self.control(to) }
    }

    /// The system closes all connections of a rank, after what is on its way.
    pub(super) fn close_connections(&mut self, rank: usize, what: &'static str) {
        for peer in (0..self.scenario.world).filter(|&peer| peer != rank) {
            self.send_on_control(rank, peer, Parcel::ControlEnd);
            if self.scenario.model == Model::Stream {
                self.break_data(rank, peer, Ending { closed: true, what });
            }
        }
    }

    /// The end of the data links, as `to` sees it.
    pub(super) fn break_data(&mut self, from: usize, to: usize, ending: Ending) {
        for link in 0..LINKS {
            let at = (self.now + self.delay()).max(self.direction(from, to).last_data[link]);
            self.put(at, Event::Arrival { from, to, parcel: Parcel::DataEnd { link, ending } });
        }
    }
}
