//! One end of a cable: two queue pairs, their slots, and what travels between them. `QueuePair` is
//! the binding's own type in `verbs.rs`.
//!
//! `slots.rs` decides what to do; this file does it. A wire that fails keeps what came before its
//! end.

use std::time::{Duration, Instant};

use thiserror::Error;

use crate::device::{Device, failed_on, mtu_number};
use crate::error::{RdmaError, os_text};
use crate::layout::{WC_RETRY_EXC_ERR, WC_SUCCESS, WorkCompletion, status_name};
use crate::message::{HEAD_BYTES, Head, ReadHead, Received};
use crate::offer::{QueueOffer, QueuePairKind, WireOffer, WireTerms};
use crate::slots::{Arrived, Lane, LaneBook, Report, SlotSizes, Violation, WireBook};
use crate::verbs::{Failed, Path, QueuePair};

/// How long leaving waits for posted receives to come back, after the last that did. Not every
/// driver gives them back, and destroying the queue pair ends them anyway.
const DRAIN: Duration = Duration::from_millis(2);

/// The shortest sleep of a wait.
pub(crate) const SHORTEST_SLEEP: Duration = Duration::from_micros(20);

/// Marks a completion as a receive's; the rest of the id is the slot.
const RECEIVE: u64 = 1 << 32;

/// One lane of a wire: a queue pair and where its slots are, receives first.
pub(crate) struct Queue {
    pair: QueuePair,
    /// Slots to receive into that there is memory for, and the bytes of one. What was agreed on may
    /// be less.
    receives: usize,
    stride: usize,
    /// Bytes of a message.
    message: usize,
    last_sent: Instant,
}

impl Queue {
    /// A queue pair of `device` for a lane `depth` deep with slots of `slot_bytes`, and what to
    /// tell the peer of it.
    pub(crate) fn make(
        device: &Device,
        kind: QueuePairKind,
        lane: Lane,
        depth: usize,
        slot_bytes: usize,
    ) -> Result<(Queue, QueueOffer), RdmaError> {
        let (pair, real_depth) = device.queue_pair(kind, lane, depth, slot_bytes)?;
        let offer = QueueOffer { number: pair.number(), first_packet: any_packet(), depth: real_depth };
        let receives = lane.slots(depth);
        let queue = Queue { pair, receives, stride: slot_bytes, message: slot_bytes, last_sent: Instant::now() };
        Ok((queue, offer))
    }

    fn receive_at(&self, slot: usize) -> usize {
        slot * self.stride
    }

    fn send_at(&self, slot: usize) -> usize {
        (self.receives + slot) * self.stride
    }

    fn post_receive(&mut self, slot: usize) -> Result<(), Failed> {
        self.pair.post_receive(RECEIVE | slot as u64, self.receive_at(slot), self.message)
    }

    /// Sends a slot that holds `head` and `payload`.
    fn send(&mut self, slot: usize, head: &Head, payload: &[u8]) -> Result<(), Failed> {
        let at = self.send_at(slot);
        self.pair.write(at, head);
        self.pair.write(at + HEAD_BYTES, payload);
        self.pair.post_send(slot as u64, at, self.message)?;
        self.last_sent = Instant::now();
        Ok(())
    }
}

/// Where the count of packets begins: anywhere, so that packets of an earlier connection are not
/// taken for this one's.
fn any_packet() -> u32 {
    let mut bytes = [0; 4];
    // Without randomness the count begins at 0, which works too.
    let _ = getrandom::fill(&mut bytes);
    u32::from_le_bytes(bytes) & 0x00ff_ffff
}

/// A wire that is broken: nothing moves on it any more.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("wire {wire} to rank {peer} is broken: {what}")]
pub struct BrokenWire {
    /// The rank at the other end.
    pub peer: usize,
    /// The number of the wire among those to this peer.
    pub wire: usize,
    /// The peer closed it. Most likely the peer ended.
    pub closed: bool,
    /// The queue pair, its device, and what happened.
    pub what: String,
}

/// A cable's end: two queue pairs and their books.
pub(crate) struct Wire {
    peer: usize,
    number: usize,
    small: Queue,
    bulk: Queue,
    book: WireBook,
    read_head: ReadHead,
    /// Messages taken, modulo 2^32: the sequence that is due.
    messages_taken: u32,
    /// What ended the wire. Messages that came before are still handed out.
    broken: Option<BrokenWire>,
    device: String,
}

impl Wire {
    /// The wire of that `number` to `peer`, still to be connected.
    pub(crate) fn new(
        peer: usize,
        number: usize,
        device: &str,
        [small, bulk]: [Queue; 2],
        terms: WireTerms,
        read_head: ReadHead,
    ) -> Wire {
        Wire {
            peer,
            number,
            small,
            bulk,
            book: WireBook::new(terms.small_depth, terms.bulk_depth),
            read_head,
            messages_taken: 0,
            broken: None,
            device: device.to_string(),
        }
    }

    fn queue(&mut self, lane: Lane) -> &mut Queue {
        match lane {
            Lane::Small => &mut self.small,
            Lane::Bulk => &mut self.bulk,
        }
    }

    fn lane(&mut self, lane: Lane) -> &mut LaneBook {
        self.book.lane_mut(lane)
    }

    /// Connects both lanes to the peer's and posts all receives. Receives could be posted earlier,
    /// but this order is the one that is known from Apple's devices. No rank sends before all ranks
    /// have come through here.
    pub(crate) fn connect(
        &mut self,
        device: &Device,
        sizes: SlotSizes,
        own: &WireOffer,
        theirs: &WireOffer,
        mtu: usize,
    ) -> Result<(), RdmaError> {
        let failed = |failed| failed_on(&device.name, failed);
        for lane in Lane::BOTH {
            let path = Path {
                number: theirs.queue(lane).number,
                first_packet: theirs.queue(lane).first_packet,
                lid: theirs.lid,
                gid: theirs.gid.octets(),
                own_gid_index: device.port.gid_index,
                mtu: mtu_number(mtu),
            };
            let queue = self.queue(lane);
            queue.message = sizes.slot_bytes(lane);
            queue.pair.ready_to_receive(&path).map_err(failed)?;
            queue.pair.ready_to_send(own.queue(lane).first_packet).map_err(failed)?;
            for slot in 0..self.lane(lane).receiving.slots() {
                self.queue(lane).post_receive(slot).map_err(failed)?;
                self.lane(lane).receiving.posted(slot);
            }
        }
        Ok(())
    }

    /// An error if the wire has ended.
    pub(crate) fn broken(&self) -> Result<(), BrokenWire> {
        self.broken.clone().map_or(Ok(()), Err)
    }

    /// Ends the wire, unless it has ended: the first cause is the one to report.
    fn break_off(&mut self, lane: Lane, closed: bool, what: &str) {
        let (peer, wire, device) = (self.peer, self.number, self.device.clone());
        let pair = self.queue(lane).pair.number();
        let what = format!("{} queue pair {pair} of {device}: {what}", lane.name());
        self.broken.get_or_insert(BrokenWire { peer, wire, closed, what });
    }

    fn break_off_failed(&mut self, lane: Lane, failed: Failed) {
        let what = format!("{} failed: {}", failed.call, os_text(failed.errno));
        self.break_off(lane, false, &what);
    }

    fn break_off_violated(&mut self, lane: Lane, violation: Violation) {
        self.break_off(lane, false, &violation.to_string());
    }

    /// Takes what the device has for this wire: completed sends, messages, credit. Sends credit
    /// back that is due.
    pub(crate) fn poll(&mut self) {
        for lane in Lane::BOTH {
            self.poll_lane(lane);
        }
        self.send_report();
    }

    fn poll_lane(&mut self, lane: Lane) {
        let mut completions = [WorkCompletion::default(); 16];
        loop {
            let count = match self.queue(lane).pair.poll(&mut completions) {
                Ok(count) => count,
                Err(failed) => return self.break_off_failed(lane, failed),
            };
            for completion in &completions[..count] {
                self.complete(lane, completion);
            }
            if count < completions.len() {
                return;
            }
        }
    }

    fn complete(&mut self, lane: Lane, completion: &WorkCompletion) {
        let (receive, slot) = (completion.wr_id & RECEIVE != 0, (completion.wr_id & !RECEIVE) as usize);
        let known = match receive {
            true => self.lane(lane).receiving.filled(slot),
            false => self.lane(lane).sending.completed(slot),
        };
        if let Err(violation) = known {
            return self.break_off_violated(lane, violation);
        }
        let status = completion.status;
        if status != WC_SUCCESS {
            let what = if receive { "receive" } else { "send" };
            let what = format!("a {what} ended with status {status} ({})", status_name(status));
            self.break_off(lane, status == WC_RETRY_EXC_ERR, &what);
        } else if receive {
            self.arrive(lane, slot);
        }
    }

    /// A message came. One of the caller's waits in its slot for its turn; a report is handled at
    /// once.
    fn arrive(&mut self, lane: Lane, slot: usize) {
        let mut head = [0; HEAD_BYTES];
        let queue = self.queue(lane);
        queue.pair.read(queue.receive_at(slot), &mut head);
        match Report::decode(&head) {
            None => {
                let announced = (self.read_head)(&head);
                self.lane(lane).receiving.queue(Arrived { slot, announced });
            }
            Some(Ok(report)) => {
                // Before the credit is used: see `slots.rs`.
                self.post_receive(lane, slot);
                if let Err(violation) = self.book.reported(lane, report) {
                    self.break_off_violated(lane, violation);
                }
            }
            Some(Err(violation)) => self.break_off_violated(lane, violation),
        }
    }

    fn post_receive(&mut self, lane: Lane, slot: usize) {
        match self.queue(lane).post_receive(slot) {
            Ok(()) => self.lane(lane).receiving.posted(slot),
            Err(failed) => self.break_off_failed(lane, failed),
        }
    }

    fn send_report(&mut self) {
        if self.broken.is_some() {
            return;
        }
        let Some((slot, report)) = self.book.take_report() else { return };
        match self.small.send(slot, &report.encode(), &[]) {
            Ok(()) => self.book.report_sent(Lane::Small, report),
            Err(failed) => {
                self.book.cancel_report(slot);
                self.refused(Lane::Small, failed);
            }
        }
    }

    /// A device refused a send. Apple's devices refuse before the depth that they report is used
    /// up. Then the send can be tried again when others have completed.
    fn refused(&mut self, lane: Lane, failed: Failed) {
        if failed.errno != libc::ENOMEM || self.lane(lane).sending.under_way() == 0 {
            self.break_off_failed(lane, failed);
        }
    }

    /// Sends a message that costs credit. False: not now, or never more.
    pub(crate) fn send(&mut self, lane: Lane, head: &Head, payload: &[u8]) -> bool {
        if self.broken.is_some() {
            return false;
        }
        let Some(slot) = self.lane(lane).sending.take() else { return false };
        match self.queue(lane).send(slot, head, payload) {
            Ok(()) => true,
            Err(failed) => {
                self.lane(lane).sending.cancel(slot);
                self.refused(lane, failed);
                false
            }
        }
    }

    fn head(&self, lane: Lane) -> Option<(Lane, Arrived)> {
        self.book.lane(lane).receiving.head().map(|head| (lane, head))
    }

    /// The message that is due, on either lane.
    fn due_message(&self) -> Option<(Lane, Arrived)> {
        let mut heads = Lane::BOTH.into_iter().filter_map(|lane| self.head(lane));
        heads.find(|(_, head)| head.announced.is_some_and(|announced| announced.sequence == self.messages_taken))
    }

    /// The message that is due. If it has not come, the first one of the lane where it is expected:
    /// that one is damaged or follows a lost one, which the caller must see.
    fn next_message(&mut self, expected: Lane) -> Option<(Lane, Arrived)> {
        if let Some(due) = self.due_message() {
            return Some(due);
        }
        self.head(expected)?;
        // The one that is due may have come on the other lane since that was polled.
        self.poll();
        self.due_message().or_else(|| self.head(expected))
    }

    /// Copies the next message out of its slot, or only its head if its payload is not as long as
    /// `payload`.
    pub(crate) fn receive(&mut self, sizes: SlotSizes, head: &mut Head, payload: &mut [u8]) -> Received {
        let Some((lane, Arrived { slot, announced })) = self.next_message(sizes.lane(payload.len())) else {
            return Received::Nothing;
        };
        let queue = self.queue(lane);
        let at = queue.receive_at(slot);
        queue.pair.read(at, head);
        let fits = payload.len() <= sizes.payload_bytes(lane);
        if !fits || announced.is_none_or(|announced| announced.payload_bytes as usize != payload.len()) {
            return Received::Head;
        }
        queue.pair.read(at + HEAD_BYTES, payload);
        self.lane(lane).receiving.taken();
        self.messages_taken = self.messages_taken.wrapping_add(1);
        self.post_receive(lane, slot);
        self.send_report();
        Received::Message
    }

    /// Sends something over each lane that sent nothing for so long.
    pub(crate) fn keep_alive(&mut self, unused_for: Duration) {
        for lane in Lane::BOTH {
            if self.queue(lane).last_sent.elapsed() >= unused_for {
                let report = self.book.totals(true);
                if self.send(lane, &report.encode(), &[]) {
                    self.book.report_sent(lane, report);
                }
            }
        }
    }

    /// Waits until the device has sent what it was given. With UC, what has not left when the queue
    /// pair is destroyed is lost.
    pub(crate) fn linger(&mut self, until: Instant) {
        let under_way = |wire: &Wire| Lane::BOTH.iter().any(|&lane| wire.book.lane(lane).sending.under_way() > 0);
        while self.broken.is_none() && under_way(self) && Instant::now() < until {
            for lane in Lane::BOTH {
                self.poll_lane(lane);
            }
            std::thread::sleep(SHORTEST_SLEEP);
        }
    }

    /// Takes everything that is posted back from the device.
    pub(crate) fn drain(&mut self) {
        for lane in Lane::BOTH {
            if self.queue(lane).pair.fail().is_err() {
                continue;
            }
            let posted = |book: &LaneBook| book.sending.under_way() + book.receiving.under_way();
            let (mut before, mut since) = (posted(self.lane(lane)), Instant::now());
            while before > 0 && since.elapsed() < DRAIN {
                self.poll_lane(lane);
                let now = posted(self.lane(lane));
                if now < before {
                    (before, since) = (now, Instant::now());
                } else {
                    std::thread::sleep(SHORTEST_SLEEP);
                }
            }
        }
    }
}
