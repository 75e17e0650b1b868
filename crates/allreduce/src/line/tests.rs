//! Lines between threads of one process. `tests/processes` has them over TCP, `tests/verbs.rs` over RDMA.

use super::*;

/// The groups of two ranks, and a line from the first to the second.
fn line(queued: usize) -> ([Group; 2], Sender, Receiver) {
    let groups: [Group; 2] = Group::in_process(2, None).try_into().ok().expect("two ranks");
    let [first, second] = &groups;
    let (sender, receiver) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| second.split(0, 1).expect("a pair").receiver().expect("a thread"));
        let sender = first.split(0, 0).expect("a pair").sender(queued).expect("a thread");
        (sender, receiver.join().expect("no panic"))
    });
    (groups, sender, receiver)
}

fn message(number: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at.wrapping_mul(31) ^ number.wrapping_mul(7)) as u8).collect()
}

/// Waits until `is_so`, a few seconds at most.
fn expect_soon(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn messages_of_all_lengths_arrive_in_their_order() {
    let (_groups, sender, receiver) = line(4);
    let lengths = [0, 1, 8, 4031, 4032, 65_536, 65_537, 300_001, 0, 5];
    let count = 20 * lengths.len();
    let length = |number: usize| lengths[number % lengths.len()];
    std::thread::scope(|scope| {
        let sends = || (0..count).try_for_each(|number| sender.send(message(number, length(number))));
        let sending = scope.spawn(sends);
        for number in 0..count {
            let received = receiver.receive(length(number)).expect("a message");
            assert!(received == message(number, length(number)), "message {number}");
        }
        sending.join().expect("no panic").expect("all sent");
    });
    let all: usize = (0..count).map(length).sum();
    assert_eq!((sender.bytes(), receiver.bytes()), (all as u64, all as u64));
}

/// Who only looks takes what is there, and waits for nothing.
#[test]
fn looking_for_a_message_does_not_wait() {
    let (_groups, sender, receiver) = line(4);
    assert_eq!(receiver.arrived(3).expect("a line"), None);
    (0..2).for_each(|number| sender.send(message(number, 3)).expect("room"));
    for number in 0..2 {
        let message = message(number, 3);
        expect_soon("a message", || match receiver.arrived(3).expect("a line") {
            None => false,
            Some(arrived) => {
                assert_eq!(arrived, message, "message {number}");
                true
            }
        });
    }
    assert_eq!(receiver.arrived(3).expect("a line"), None);
    assert_eq!((receiver.bytes(), receiver.waited()), (6, Duration::ZERO));
}

/// Two messages have arrived before the receiver asks for any, and the sender may leave then.
#[test]
fn messages_travel_before_they_are_asked_for() {
    let (_groups, sender, receiver) = line(4);
    let bytes = 1 << 20;
    (0..2).for_each(|number| sender.send(message(number, bytes)).expect("room"));
    drop(sender);
    for number in 0..2 {
        assert!(receiver.receive(bytes).expect("a message") == message(number, bytes));
    }
    assert!(receiver.waited() < Duration::from_secs(1), "{:?}", receiver.waited());
}

/// Nobody keeps more than its bounds: with two messages arrived, one on its way and three queued the sender waits.
#[test]
fn a_sender_waits_for_a_receiver_that_takes_nothing() {
    let (_groups, sender, receiver) = line(3);
    let (bytes, count) = (1 << 20, 20);
    let sent = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            for number in 0..count {
                sender.send(message(number, bytes)).expect("the group has not failed");
                sent.fetch_add(1, Ordering::Relaxed);
            }
        });
        expect_soon("six messages have room", || sent.load(Ordering::Relaxed) >= 6);
        std::thread::sleep(Duration::from_millis(200));
        assert!(sent.load(Ordering::Relaxed) <= 6, "{sent:?} messages have left the sender");
        for number in 0..count {
            assert!(receiver.receive(bytes).expect("a message") == message(number, bytes), "message {number}");
        }
        sending.join().expect("no panic");
    });
}

/// A thread that waits for a message is not inside an operation: only a rank that asks for one is. Otherwise ranks that
/// compute for long would seem to wait for each other.
#[test]
fn only_who_asks_for_a_message_is_inside_an_operation() {
    let (groups, sender, receiver) = line(1);
    let is_inside = || groups[1].inner.context.membership.status().progress().inside;
    std::thread::sleep(Duration::from_millis(50));
    assert!(!is_inside());
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(3));
        expect_soon("the receiver waits", is_inside);
        let moved = groups[1].inner.context.membership.status().progress().moved;
        sender.send(vec![1, 2, 3]).expect("room");
        assert_eq!(receiving.join().expect("no panic").expect("a message"), [1, 2, 3]);
        assert!(groups[1].inner.context.membership.status().progress().moved > moved, "what moves is seen");
    });
    assert!(!is_inside());
    assert!(receiver.waited() > Duration::ZERO);
}

#[test]
fn a_message_of_another_length_is_named() {
    let (groups, sender, receiver) = line(1);
    sender.send(vec![0; 10]).expect("room");
    let error = receiver.receive(12).expect_err("another length").to_string();
    assert!(error.contains("do different things") && error.contains("of 12 bytes on the one"), "{error}");
    assert!(error.contains("of 10 bytes on the other"), "{error}");
    assert!(groups[0].check().is_err() && sender.send(vec![0]).is_err(), "the group has failed");
}

#[test]
fn who_waits_for_a_message_learns_that_the_group_has_failed() {
    let (groups, _sender, receiver) = line(1);
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| receiver.receive(1));
        std::thread::sleep(Duration::from_millis(50));
        groups[0].abort("its rows are gone", 2);
        let error = receiving.join().expect("no panic").expect_err("a failure").to_string();
        assert!(error.contains("its rows are gone"), "{error}");
    });
}

/// A rank may leave when all that it has to send is sent. That is no failure, until more is asked for.
#[test]
fn a_sender_that_has_left_is_missed_when_more_is_asked_for() {
    let (groups, sender, receiver) = line(1);
    sender.send(vec![7]).expect("room");
    drop(sender);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(receiver.receive(1).expect("what was sent"), [7]);
    assert!(groups[1].check().is_ok(), "nothing is missed");
    let began = Instant::now();
    let error = receiver.receive(1).expect_err("nobody sends").to_string();
    assert!(error.contains("lost its data link 0 to rank 0"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// Neither end hangs if the other one leaves with messages on their way.
#[test]
fn an_end_that_leaves_early_blocks_nobody() {
    let (_groups, sender, receiver) = line(8);
    (0..8).for_each(|number| sender.send(message(number, 1 << 20)).expect("room"));
    let began = Instant::now();
    drop(receiver);
    drop(sender);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}

#[test]
fn a_watch_counts_from_the_last_movement_and_not_while_the_process_was_stopped() {
    let at = Duration::from_millis;
    let mut watch = Watch::new(at(0), 0);
    assert_eq!(watch.idle(at(100), 0), at(100));
    assert_eq!(watch.idle(at(200), 1), at(0));
    assert_eq!(watch.idle(at(1500), 1), at(1300));
    assert_eq!(watch.idle(at(9000), 1), at(0), "it was stopped for 7.5 s");
    assert_eq!(watch.idle(at(9500), 1), at(500));
}
