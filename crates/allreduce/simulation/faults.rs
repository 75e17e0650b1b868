//! What goes wrong, done to the ranks, the connections between them and single frames.

use std::time::Duration;

use super::network::Parcel;
use super::rank::Process;
use super::scenario::{Attack, Change, Damage};
use super::wires::{Ending, Model, Piece};
use super::world::{Event, SESSION, World};
use crate::frame::{HEADER_BYTES, Header, crc32c};
use crate::sealed::seal;
use crate::secret::{Seal, Secret};
use crate::session::Message;
use crate::verdict::{Cause, Record};

impl World {
    pub(super) fn change(&mut self, change: Change) -> Result<(), String> {
        self.trace(|_| format!("{change:?}"));
        let running = |rank: usize| self.ranks[rank].process == Process::Running && !self.ranks[rank].has_left();
        let strikes = match change {
            Change::Freeze(rank) | Change::Crash { rank, .. } | Change::Abort(rank) => running(rank),
            Change::Block { .. } | Change::BreakData { .. } | Change::CloseControl { .. } => true,
            Change::Thaw(_) | Change::Unblock { .. } | Change::Attack { .. } => false,
        };
        if strikes {
            self.struck.get_or_insert(self.now);
        }
        match change {
            Change::Freeze(rank) => self.freeze(rank),
            Change::Thaw(rank) => self.thaw(rank)?,
            Change::Crash { rank, resets } => self.crash(rank, resets),
            Change::Abort(rank) => {
                self.ranks[rank].abort();
                self.control(rank)?;
            }
            Change::Block { from, to, loses } => {
                let direction = self.direction(from, to);
                direction.blocked += 1;
                direction.loses |= loses;
            }
            Change::Unblock { from, to } => {
                self.direction(from, to).blocked -= 1;
                if self.direction(from, to).blocked == 0 {
                    self.direction(from, to).loses = false;
                    for parcel in std::mem::take(&mut self.direction(from, to).held) {
                        self.hand_over(from, to, parcel)?;
                    }
                }
            }
            Change::BreakData { a, b, closed } => {
                let ending = Ending { closed, what: "the network went down under this connection" };
                self.break_data(a, b, ending);
                self.break_data(b, a, ending);
            }
            Change::CloseControl { a, b } => {
                self.send_on_control(a, b, Parcel::ControlEnd);
                self.send_on_control(b, a, Parcel::ControlEnd);
            }
            Change::Attack { from, to, attack } => self.attack(from, to, attack),
        }
        Ok(())
    }

    fn freeze(&mut self, rank: usize) {
        if self.ranks[rank].process == Process::Running {
            self.ranks[rank].process = Process::Frozen;
            self.frozen_since[rank] = self.now;
            (self.control_timers[rank], self.engine_timers[rank]) = (None, None);
        }
    }

    fn thaw(&mut self, rank: usize) -> Result<(), String> {
        if self.ranks[rank].process != Process::Frozen {
            return Ok(());
        }
        let stopped = self.now - self.frozen_since[rank];
        self.ranks[rank].thaw(self.now, stopped);
        // Either of the two threads may be the first.
        if self.random.one_in(2) {
            self.engine(rank)?;
        }
        self.control(rank)?;
        self.engine(rank)
    }

    fn crash(&mut self, rank: usize, resets: bool) {
        if self.ranks[rank].process == Process::Dead || self.ranks[rank].has_left() {
            return;
        }
        self.ranks[rank].process = Process::Dead;
        if resets {
            self.lose_what_is_on_its_way(rank);
        }
        self.close_connections(rank, "Connection reset by peer (os error 104)");
    }

    fn attack(&mut self, from: usize, to: usize, attack: Attack) {
        match attack {
            Attack::Flip => self.direction(from, to).flip_next = true,
            Attack::Replay => {
                let bytes = self.direction(from, to).last_message.clone();
                if !bytes.is_empty() {
                    self.struck.get_or_insert(self.now);
                    self.send_control(from, to, bytes);
                }
            }
            Attack::Forge => {
                let mut record = Record::new(from);
                record.version = 1;
                record.cause = Some(Cause::Failed { message: "says somebody else".into(), code: 0 });
                let key = Secret::loopback().tag("a guess", &[]);
                let bytes = seal(&Message::Record(record), &mut Seal::new(&key));
                self.struck.get_or_insert(self.now);
                self.send_control(from, to, bytes);
            }
        }
    }

    /// A reset overtakes the bytes before it; a frame of an RDMA link that has left arrives.
    fn lose_what_is_on_its_way(&mut self, rank: usize) {
        let stream = self.scenario.model == Model::Stream;
        self.queue.retain(|_, event| match event {
            Event::Arrival { from, parcel: Parcel::Data { .. }, .. } => *from != rank || !stream,
            Event::Arrival { from, parcel: Parcel::Control(_), .. } => *from != rank,
            _ => true,
        });
    }

    /// Does that to a frame. `None`: there is nothing left of it to send.
    pub(super) fn damage(&mut self, from: usize, to: usize, mut piece: Piece, damage: Damage) -> Option<Piece> {
        let stale = matches!(damage, Damage::Stale | Damage::StaleBefore);
        let twin = if stale { self.stale_twin(&piece) } else { None };
        if stale && twin.is_none() {
            return Some(piece);
        }
        self.struck.get_or_insert(self.now);
        match (damage, twin) {
            (Damage::Flip, _) => {
                let bit = self.random.below(piece.bytes.len() * 8);
                piece.bytes[bit / 8] ^= 1 << (bit % 8);
            }
            (Damage::Drop, _) => {
                self.make_room(to, from, 0, piece.bytes.len());
                return None;
            }
            (Damage::Double, _) => self.send_data(from, to, 0, piece.bytes.clone()),
            (Damage::Delay, _) => {
                let at = self.now + self.random.between(Duration::ZERO, Duration::from_millis(5));
                let parcel = Parcel::Data { link: 0, bytes: piece.bytes };
                self.put(at, Event::Arrival { from, to, parcel });
                return None;
            }
            (Damage::Stale, Some(twin)) => piece.bytes = twin,
            (_, Some(twin)) => self.send_data(from, to, 0, twin),
            (_, None) => unreachable!("stale frames have a twin"),
        }
        Some(piece)
    }

    /// The same frame with other contents, as an earlier group would have sent it; none if this is
    /// not a whole frame.
    fn stale_twin(&mut self, piece: &Piece) -> Option<Vec<u8>> {
        let (header, payload) = piece.bytes.split_first_chunk::<HEADER_BYTES>()?;
        let header = Header::decode(header).expect("the sender's own header");
        if header.length as usize != payload.len() {
            return None;
        }
        let payload: Vec<u8> = payload.iter().map(|byte| byte ^ 0x5a).collect();
        let payload_crc = crc32c(&payload);
        let twin = Header { session: SESSION - 1, payload_crc, ..header };
        Some([&twin.encode()[..], &payload].concat())
    }
}
