//! What travels between the ranks of a simulated world: delayed, damaged, lost, doubled, handed over.

use super::*;

impl World {
    pub(super) fn send_control(&mut self, from: usize, to: usize, bytes: Vec<u8>) {
        self.send_on_control(from, to, Parcel::Control(bytes));
    }

    pub(super) fn send_on_control(&mut self, from: usize, to: usize, parcel: Parcel) {
        let at = self.now + self.delay();
        let last = &mut self.direction(from, to).last_control;
        *last = at.max(*last);
        let at = *last;
        self.put(at, Happening::Arrival { from, to, parcel });
    }

    pub(super) fn send_data(&mut self, from: usize, to: usize, link: usize, bytes: Vec<u8>) {
        let at = self.now + self.delay();
        let last = &mut self.direction(from, to).last_data[link];
        *last = at.max(*last);
        let at = *last;
        self.put(at, Happening::Arrival { from, to, parcel: Parcel::Data { link, bytes } });
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
            self.put(at, Happening::Engine(sender));
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
                self.put(at, Happening::Arrival { from, to, parcel });
                return None;
            }
            (Damage::Stale, Some(twin)) => piece.bytes = twin,
            (_, Some(twin)) => self.send_data(from, to, 0, twin),
            (_, None) => unreachable!("stale frames have a twin"),
        }
        Some(piece)
    }

    /// The same frame with other contents, as an earlier group would have sent it; none if this is not a whole frame.
    pub(super) fn stale_twin(&mut self, piece: &Piece) -> Option<Vec<u8>> {
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
            self.put(at, Happening::Arrival { from, to, parcel: Parcel::DataEnd { link, ending } });
        }
    }
}
