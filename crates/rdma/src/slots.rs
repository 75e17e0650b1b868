//! The protocol of a wire, as pure bookkeeping: which slots are free, who may send, and when credit
//! goes back.
//!
//! A wire has two **lanes**, each a queue pair: `small` with slots of one 4 KiB frame, `bulk` with
//! larger ones. A message fills a slot, whatever its length: Apple's devices want both ends to post
//! equally many 4 KiB frames.
//!
//! **Credit.** A message that finds no receive posted is lost silently (UC on Linux) or stalls
//! the queue (Apple). So a sender begins with a credit for each receive that the peer has
//! posted for it (the `depth` of the lane), spends one per message, and never sends without. The
//! peer takes a message out of its slot, posts the slot again, and reports how many it has dealt
//! with, once that is half the depth more than it reported before. Reports are totals since the
//! beginning, for both lanes at once: the next report makes good for a lost one.
//!
//! **Why a report finds a receive posted, too.** Reports travel on the small lane and cost no
//! credit; instead the lane has [`REPORT_RECEIVES`] receives more than its depth. That is enough: a
//! report is sent when some lane of depth D has dealt with at least ⌈D/2⌉ messages since the report
//! before, which the peer sent on credit that it has not got back. As it can have no more than D
//! such messages, at most ⌊D / ⌈D/2⌉⌋ ≤ 2 reports for one lane, so 4 for both, are on their way at
//! any time. The peer posts a report's receive again before it uses the credit, so the four are
//! free before a fifth can be due. A keep-alive is no report: it spends a credit like data. Its
//! totals count on the small lane only, because there it keeps its place among the reports. If it
//! overtook them on the other lane, it would give credit while their receives are still taken.
//!
//! **Slots to send from** come free when the device says so. The small lane keeps
//! [`REPORT_RECEIVES`] of them for reports.

use std::collections::VecDeque;

use crate::message::{Announced, HEAD_BYTES, Head};

#[cfg(test)]
mod tests;

/// Bytes of Apple's unit of depth, and of a slot of the small lane.
pub(crate) const FRAME_BYTES: usize = 4096;

/// Receives on the small lane beyond its depth: see the top of the file.
pub(crate) const REPORT_RECEIVES: usize = 4;

/// The least depth of a lane: with one slot, sender and receiver would alternate.
pub(crate) const LEAST_DEPTH: usize = 2;

/// One of the two queue pairs of a wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    Small,
    Bulk,
}

impl Lane {
    pub(crate) const BOTH: [Lane; 2] = [Lane::Small, Lane::Bulk];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Lane::Small => "small",
            Lane::Bulk => "bulk",
        }
    }

    /// Slots to receive into, for a depth: sends have as many.
    pub(crate) fn slots(self, depth: usize) -> usize {
        match self {
            Lane::Small => depth + REPORT_RECEIVES,
            Lane::Bulk => depth,
        }
    }
}

/// How long slots are: the same for all ranks that connect to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotSizes {
    /// A multiple of [`FRAME_BYTES`], at least two of them.
    pub(crate) bulk_bytes: usize,
}

impl SlotSizes {
    pub(crate) fn slot_bytes(self, lane: Lane) -> usize {
        match lane {
            Lane::Small => FRAME_BYTES,
            Lane::Bulk => self.bulk_bytes,
        }
    }

    /// Payload bytes that fit beside the head.
    pub(crate) fn payload_bytes(self, lane: Lane) -> usize {
        self.slot_bytes(lane) - HEAD_BYTES
    }

    /// The lane of a message: both ends know it from the length of the payload.
    pub(crate) fn lane(self, payload: usize) -> Lane {
        if payload <= self.payload_bytes(Lane::Small) { Lane::Small } else { Lane::Bulk }
    }

    /// Payload bytes of the next message when `remaining` are to go. The rest after whole bulk
    /// slots goes in small ones if it is at most a quarter of a bulk slot, which would travel in
    /// full.
    pub(crate) fn next_payload_bytes(self, remaining: usize) -> usize {
        let (small, bulk) = (self.payload_bytes(Lane::Small), self.payload_bytes(Lane::Bulk));
        if remaining >= bulk {
            return bulk; // a multiple of 8, as head and slots are
        }
        let small_messages = remaining.div_ceil(small);
        let few = self.bulk_bytes / FRAME_BYTES / 4;
        if small_messages <= few.max(1) { remaining.min(small) } else { remaining }
    }
}

/// What a peer of this version never does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    /// A completion for a slot with nothing under way.
    UnknownSlot { slot: usize },
    /// More messages reported than were sent.
    TooMuchCredit { reported: u32, sent: u32 },
    /// A report with a wrong checksum.
    DamagedReport,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Violation::UnknownSlot { slot } => write!(formatter, "a completion came for slot {slot}, which is idle"),
            Violation::TooMuchCredit { reported, sent } => {
                write!(formatter, "the peer reports {reported} messages, but {sent} were sent")
            }
            Violation::DamagedReport => write!(formatter, "a credit report is damaged (its checksum does not match)"),
        }
    }
}

/// The slots of one lane that this rank sends from.
#[derive(Clone, Debug)]
pub(crate) struct Sending {
    free: Vec<usize>,
    busy: Vec<bool>,
    /// Slots that data leaves to reports.
    kept: usize,
    depth: u32,
    /// Messages sent on credit, and of those the ones that the peer has reported; modulo 2^32.
    sent: u32,
    reported: u32,
}

impl Sending {
    fn new(lane: Lane, depth: usize) -> Sending {
        let slots = lane.slots(depth);
        Sending {
            free: (0..slots).rev().collect(),
            busy: vec![false; slots],
            kept: slots - depth,
            depth: depth as u32,
            sent: 0,
            reported: 0,
        }
    }

    /// Messages that may be sent now.
    pub(crate) fn credit(&self) -> u32 {
        self.depth - self.sent.wrapping_sub(self.reported)
    }

    /// A slot for a message that costs credit; none while there is no credit or no slot.
    pub(crate) fn take(&mut self) -> Option<usize> {
        if self.credit() == 0 || self.free.len() <= self.kept {
            return None;
        }
        self.sent = self.sent.wrapping_add(1);
        self.take_for_report()
    }

    /// A slot for a message that costs none.
    fn take_for_report(&mut self) -> Option<usize> {
        let slot = self.free.pop()?;
        self.busy[slot] = true;
        Some(slot)
    }

    /// Takes back what [`Sending::take`] did: the message was not sent after all.
    pub(crate) fn cancel(&mut self, slot: usize) {
        self.sent = self.sent.wrapping_sub(1);
        self.cancel_report(slot);
    }

    fn cancel_report(&mut self, slot: usize) {
        self.busy[slot] = false;
        self.free.push(slot);
    }

    /// The device is done with a slot.
    pub(crate) fn completed(&mut self, slot: usize) -> Result<(), Violation> {
        match self.busy.get_mut(slot) {
            Some(busy) if *busy => *busy = false,
            _ => return Err(Violation::UnknownSlot { slot }),
        }
        self.free.push(slot);
        Ok(())
    }

    /// Sends under way.
    pub(crate) fn under_way(&self) -> usize {
        self.busy.len() - self.free.len()
    }

    fn credited(&mut self, total: u32) -> Result<(), Violation> {
        let new = total.wrapping_sub(self.reported);
        if new > self.sent.wrapping_sub(self.reported) {
            return Err(Violation::TooMuchCredit { reported: total, sent: self.sent });
        }
        self.reported = total;
        Ok(())
    }
}

/// A message of the caller that has come and waits to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrived {
    pub(crate) slot: usize,
    /// What the head says, if it is undamaged.
    pub(crate) announced: Option<Announced>,
}

/// The slots of one lane that this rank receives into.
#[derive(Clone, Debug)]
pub(crate) struct Receiving {
    posted: Vec<bool>,
    arrived: VecDeque<Arrived>,
    depth: u32,
    /// Messages on credit that were dealt with, and how many of those the peer was told; modulo
    /// 2^32.
    done: u32,
    told: u32,
}

impl Receiving {
    fn new(lane: Lane, depth: usize) -> Receiving {
        let slots = lane.slots(depth);
        Receiving {
            posted: vec![false; slots],
            arrived: VecDeque::with_capacity(slots),
            depth: depth as u32,
            done: 0,
            told: 0,
        }
    }

    pub(crate) fn slots(&self) -> usize {
        self.posted.len()
    }

    pub(crate) fn posted(&mut self, slot: usize) {
        self.posted[slot] = true;
    }

    /// Receives under way.
    pub(crate) fn under_way(&self) -> usize {
        self.posted.iter().filter(|&&posted| posted).count()
    }

    /// A message came into a slot.
    pub(crate) fn filled(&mut self, slot: usize) -> Result<(), Violation> {
        match self.posted.get_mut(slot) {
            Some(posted) if *posted => *posted = false,
            _ => return Err(Violation::UnknownSlot { slot }),
        }
        Ok(())
    }

    /// The message is the caller's, to be taken in its turn.
    pub(crate) fn queue(&mut self, arrived: Arrived) {
        self.arrived.push_back(arrived);
    }

    /// The message whose turn it is on this lane.
    pub(crate) fn head(&self) -> Option<Arrived> {
        self.arrived.front().copied()
    }

    /// The head was copied out of its slot, which can be posted again.
    pub(crate) fn taken(&mut self) {
        self.arrived.pop_front().expect("there is a head");
        self.done = self.done.wrapping_add(1);
    }

    fn is_report_due(&self) -> bool {
        self.done.wrapping_sub(self.told) >= self.depth.div_ceil(2)
    }
}

/// Both directions of one lane.
#[derive(Clone, Debug)]
pub(crate) struct LaneBook {
    pub(crate) sending: Sending,
    pub(crate) receiving: Receiving,
}

/// The books of a wire.
#[derive(Clone, Debug)]
pub(crate) struct WireBook {
    small: LaneBook,
    bulk: LaneBook,
}

impl WireBook {
    pub(crate) fn new(small_depth: usize, bulk_depth: usize) -> WireBook {
        let book =
            |lane, depth| LaneBook { sending: Sending::new(lane, depth), receiving: Receiving::new(lane, depth) };
        WireBook { small: book(Lane::Small, small_depth), bulk: book(Lane::Bulk, bulk_depth) }
    }

    pub(crate) fn lane(&self, lane: Lane) -> &LaneBook {
        match lane {
            Lane::Small => &self.small,
            Lane::Bulk => &self.bulk,
        }
    }

    pub(crate) fn lane_mut(&mut self, lane: Lane) -> &mut LaneBook {
        match lane {
            Lane::Small => &mut self.small,
            Lane::Bulk => &mut self.bulk,
        }
    }

    /// A report or keep-alive came over `lane`, and its receive is posted again.
    pub(crate) fn reported(&mut self, lane: Lane, report: Report) -> Result<(), Violation> {
        if lane == Lane::Small {
            self.small.sending.credited(report.small)?;
            self.bulk.sending.credited(report.bulk)?;
        }
        if report.on_credit {
            let receiving = &mut self.lane_mut(lane).receiving;
            receiving.done = receiving.done.wrapping_add(1);
        }
        Ok(())
    }

    /// A report if one is due, and the slot of the small lane to send it from. None while there is
    /// no slot: it stays due.
    pub(crate) fn take_report(&mut self) -> Option<(usize, Report)> {
        if !self.small.receiving.is_report_due() && !self.bulk.receiving.is_report_due() {
            return None;
        }
        let slot = self.small.sending.take_for_report()?;
        Some((slot, self.totals(false)))
    }

    /// The report or keep-alive was handed to the device.
    pub(crate) fn report_sent(&mut self, lane: Lane, report: Report) {
        if lane == Lane::Small {
            self.small.receiving.told = report.small;
            self.bulk.receiving.told = report.bulk;
        }
    }

    /// The report was not: it stays due.
    pub(crate) fn cancel_report(&mut self, slot: usize) {
        self.small.sending.cancel_report(slot);
    }

    /// What a report or keep-alive says now.
    pub(crate) fn totals(&self, on_credit: bool) -> Report {
        Report { on_credit, small: self.small.receiving.done, bulk: self.bulk.receiving.done }
    }
}

/// What the two ends of a wire tell each other. As little-endian bytes in the place of a head: `0
/// magic u32 | 4 on credit u8 | 5 zero | 8 small u32 | 12 bulk u32 | 16 zero | 60 CRC32C of bytes
/// 0..60 u32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    /// A keep-alive, which has spent a credit; otherwise a report proper.
    pub(crate) on_credit: bool,
    /// Messages dealt with since the beginning, per lane.
    pub(crate) small: u32,
    pub(crate) bulk: u32,
}

impl Report {
    const MAGIC: [u8; 4] = *b"FTCR";

    pub(crate) fn encode(self) -> Head {
        let mut bytes = [0; HEAD_BYTES];
        bytes[..4].copy_from_slice(&Report::MAGIC);
        bytes[4] = u8::from(self.on_credit);
        bytes[8..12].copy_from_slice(&self.small.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.bulk.to_le_bytes());
        let crc = crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// None: the message is the caller's.
    pub(crate) fn decode(bytes: &Head) -> Option<Result<Report, Violation>> {
        if bytes[..4] != Report::MAGIC {
            return None;
        }
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if u32_at(60) != crc32c(&bytes[..60]) {
            return Some(Err(Violation::DamagedReport));
        }
        Some(Ok(Report { on_credit: bytes[4] != 0, small: u32_at(8), bulk: u32_at(12) }))
    }
}

/// CRC32C (Castagnoli), as RDMA's own packets use it.
fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}
