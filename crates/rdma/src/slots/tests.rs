//! The protocol of a wire without a device: tables, and random runs that must neither overrun a
//! receive nor stall.

use super::*;

#[test]
fn messages_are_cut_by_what_remains_alone() {
    let sizes = SlotSizes { bulk_bytes: 64 << 10 };
    let (small, bulk) = (sizes.payload_bytes(Lane::Small), sizes.payload_bytes(Lane::Bulk));
    assert_eq!((small, bulk), (4032, 65472));
    let table = [
        (0, 0),
        (1, 1),
        (4032, 4032),
        (4033, 4032),
        (4 * 4032, 4032),
        (4 * 4032 + 1, 4 * 4032 + 1),
        (bulk - 1, bulk - 1),
        (bulk, bulk),
        (bulk + 1, bulk),
        (1 << 40, bulk),
    ];
    for (remaining, bytes) in table {
        assert_eq!(sizes.next_payload_bytes(remaining), bytes, "{remaining}");
    }
    for bulk_bytes in [8 << 10, 12 << 10, 64 << 10, 512 << 10, 4095 << 12] {
        let sizes = SlotSizes { bulk_bytes };
        for remaining in (0..3 * bulk_bytes).step_by(if bulk_bytes > 1 << 20 { 4093 } else { 61 }) {
            let bytes = sizes.next_payload_bytes(remaining);
            assert!(bytes <= remaining && (bytes > 0) == (remaining > 0));
            assert!(bytes == remaining || bytes.is_multiple_of(8), "{bytes} of {remaining}");
            assert!(bytes <= sizes.payload_bytes(sizes.lane(bytes)));
        }
    }
}

#[test]
fn reports_read_back_and_damage_shows() {
    let report = Report { on_credit: true, small: 7, bulk: u32::MAX };
    let mut bytes = report.encode();
    assert_eq!(Report::decode(&bytes), Some(Ok(report)));
    bytes[9] ^= 1;
    assert_eq!(Report::decode(&bytes), Some(Err(Violation::DamagedReport)));
    bytes[0] ^= 1;
    assert_eq!(Report::decode(&bytes), None, "something else: the caller's");
    assert_eq!(Report::decode(&[0; HEAD_BYTES]), None);
}

#[test]
fn the_checksum_of_reports_is_crc32c() {
    // RFC 3720, appendix B.4.
    assert_eq!([crc32c(&[0; 32]), crc32c(&[0xff; 32])], [0x8a91_36aa, 0x62a8_ab43]);
}

#[test]
fn credit_is_spent_and_comes_back() {
    let mut book = WireBook::new(3, 2);
    let mut slots = Vec::new();
    while let Some(slot) = book.lane_mut(Lane::Small).sending.take() {
        slots.push(slot);
    }
    assert_eq!(slots.len(), 3, "as many as the lane is deep");
    let report = |small| Report { on_credit: false, small, bulk: 0 };
    book.reported(Lane::Small, report(2)).expect("two of three");
    book.reported(Lane::Small, report(2)).expect("the same again says nothing new");
    assert_eq!(book.lane(Lane::Small).sending.credit(), 2);
    let too_much = Err(Violation::TooMuchCredit { reported: 4, sent: 3 });
    assert_eq!(book.reported(Lane::Small, report(4)), too_much);
    let sending = &mut book.lane_mut(Lane::Small).sending;
    assert_eq!(sending.take(), None, "the slots that are free are for reports");
    assert_eq!(sending.completed(slots[0]), Ok(()));
    assert_eq!(sending.completed(slots[0]), Err(Violation::UnknownSlot { slot: slots[0] }));
    assert_eq!(sending.completed(99), Err(Violation::UnknownSlot { slot: 99 }));
    assert_eq!(sending.take(), Some(slots[0]));
    assert_eq!((sending.credit(), sending.under_way()), (1, 3));
}

/// A small generator of random numbers: the runs are the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % bound
    }
}

/// What is on a lane from one end to the other.
#[derive(Clone, Copy, Debug)]
enum Message {
    Data(u32),
    Report(Report),
}

/// One end of a wire, and what a device would hold for it.
struct End {
    book: WireBook,
    /// Receives posted and not filled, in the order of posting, per lane.
    posted: [std::collections::VecDeque<usize>; 2],
    /// Sends that the device has not completed, per lane.
    incomplete: [Vec<usize>; 2],
    /// Messages that came and were not polled yet, per lane.
    unpolled: [std::collections::VecDeque<(usize, Message)>; 2],
    /// Messages sent and taken, per lane.
    sent: [u32; 2],
    taken: [u32; 2],
    most_reports_waiting: usize,
}

fn announced(sequence: u32) -> Announced {
    Announced { sequence, payload_bytes: 0 }
}

fn index(lane: Lane) -> usize {
    match lane {
        Lane::Small => 0,
        Lane::Bulk => 1,
    }
}

impl End {
    fn new(depths: [usize; 2]) -> End {
        let mut end = End {
            book: WireBook::new(depths[0], depths[1]),
            posted: Default::default(),
            incomplete: Default::default(),
            unpolled: Default::default(),
            sent: [0; 2],
            taken: [0; 2],
            most_reports_waiting: 0,
        };
        for lane in Lane::BOTH {
            for slot in 0..end.book.lane(lane).receiving.slots() {
                end.post(lane, slot);
            }
        }
        end
    }

    fn post(&mut self, lane: Lane, slot: usize) {
        self.book.lane_mut(lane).receiving.posted(slot);
        self.posted[index(lane)].push_back(slot);
    }

    /// The device of the receiver puts a message into the oldest posted receive.
    fn deliver(&mut self, lane: Lane, message: Message) {
        let slot = self.posted[index(lane)].pop_front();
        let slot = slot.unwrap_or_else(|| panic!("{message:?} finds no receive posted on the {} lane", lane.name()));
        self.unpolled[index(lane)].push_back((slot, message));
        let reports =
            |(_, message): &&(usize, Message)| matches!(message, Message::Report(report) if !report.on_credit);
        self.most_reports_waiting = self.most_reports_waiting.max(self.unpolled[0].iter().filter(reports).count());
    }

    fn poll(&mut self, lane: Lane) {
        while let Some((slot, message)) = self.unpolled[index(lane)].pop_front() {
            self.book.lane_mut(lane).receiving.filled(slot).expect("a posted slot");
            match message {
                Message::Data(sequence) => {
                    let arrived = Arrived { slot, announced: Some(announced(sequence)) };
                    self.book.lane_mut(lane).receiving.queue(arrived);
                }
                Message::Report(report) => {
                    self.post(lane, slot);
                    self.book.reported(lane, report).expect("an honest report");
                }
            }
        }
    }

    fn take_message(&mut self, lane: Lane) {
        let Some(head) = self.book.lane(lane).receiving.head() else { return };
        let due = Some(announced(self.taken[index(lane)]));
        assert_eq!(head.announced, due, "messages of a lane keep their order");
        self.taken[index(lane)] += 1;
        self.book.lane_mut(lane).receiving.taken();
        self.post(lane, head.slot);
    }

    /// Sends what it can of: data, a keep-alive, a due report. The device may complete it at any
    /// time later.
    fn send(&mut self, lane: Lane, keep_alive: bool, to: &mut End) {
        let Some(slot) = self.book.lane_mut(lane).sending.take() else { return };
        self.incomplete[index(lane)].push(slot);
        if keep_alive {
            let report = self.book.totals(true);
            self.book.report_sent(lane, report);
            return to.deliver(lane, Message::Report(report));
        }
        let sequence = self.sent[index(lane)];
        self.sent[index(lane)] += 1;
        to.deliver(lane, Message::Data(sequence));
    }

    fn send_report(&mut self, to: &mut End) {
        if let Some((slot, report)) = self.book.take_report() {
            self.incomplete[0].push(slot);
            self.book.report_sent(Lane::Small, report);
            to.deliver(Lane::Small, Message::Report(report));
        }
    }

    fn complete_one(&mut self, lane: Lane, random: &mut Random) {
        let incomplete = &mut self.incomplete[index(lane)];
        if !incomplete.is_empty() {
            let slot = incomplete.swap_remove(random.below(incomplete.len()));
            self.book.lane_mut(lane).sending.completed(slot).expect("a busy slot");
        }
    }
}

/// Every message is delivered the moment it is sent, which is the worst for the receiver;
/// everything else happens in random order. No message may miss a receive, and in the end
/// everything has arrived.
#[test]
fn random_runs_never_overrun_and_never_stall() {
    let mut most_reports_waiting = 0;
    for seed in 0..400 {
        let mut random = Random(seed);
        let depths = [2 + random.below(7), 2 + random.below(7)];
        let mut ends = [End::new(depths), End::new(depths)];
        // Each run has its own temper: who is lazy, and about what.
        let weights: Vec<usize> = (0..10).map(|_| 1 + random.below(12)).collect();
        for _ in 0..3000 {
            let (left, right) = ends.split_at_mut(1);
            let (mut own, mut other) = (&mut left[0], &mut right[0]);
            if random.below(2) == 0 {
                std::mem::swap(&mut own, &mut other);
            }
            let mut choice = random.below(weights.iter().sum());
            let action = weights.iter().position(|&weight| match choice.checked_sub(weight) {
                Some(rest) => {
                    choice = rest;
                    false
                }
                None => true,
            });
            match action.expect("within the sum") {
                0 => own.send(Lane::Small, false, other),
                1 => own.send(Lane::Bulk, false, other),
                2 => own.send(Lane::BOTH[random.below(2)], true, other),
                3 => own.poll(Lane::Small),
                4 => own.poll(Lane::Bulk),
                5 => own.take_message(Lane::Small),
                6 => own.take_message(Lane::Bulk),
                7 | 8 => own.send_report(other),
                _ => own.complete_one(Lane::BOTH[random.below(2)], &mut random),
            }
        }
        // Now both ends do everything: each can still fill both lanes many times over.
        let goal = ends.each_ref().map(|end| end.sent.map(|sent| sent + 50));
        for _ in 0..1000 {
            for (turn, goal) in goal.iter().enumerate() {
                let (left, right) = ends.split_at_mut(1);
                let (own, other) =
                    if turn == 0 { (&mut left[0], &mut right[0]) } else { (&mut right[0], &mut left[0]) };
                for lane in Lane::BOTH {
                    own.complete_one(lane, &mut random);
                    own.poll(lane);
                    own.take_message(lane);
                    own.send_report(other);
                    if own.sent[index(lane)] < goal[index(lane)] {
                        own.send(lane, false, other);
                    }
                }
            }
        }
        for (end, other) in [(0, 1), (1, 0)] {
            assert_eq!(ends[end].sent, goal[end], "seed {seed} stalls");
            assert_eq!(ends[other].taken, ends[end].sent, "seed {seed} loses messages");
            most_reports_waiting = most_reports_waiting.max(ends[end].most_reports_waiting);
        }
    }
    assert_eq!(most_reports_waiting, REPORT_RECEIVES, "the runs reach the bound that slots.rs derives");
}
