//! Two ranks over a real verbs device: skipped if `FINETUNE_RDMA_DEVICE` names none.
//!
//! `scripts/rdma-vm.sh` runs them with soft-RoCE on any Linux machine. With `rxe0` and `rxe1` (its
//! layout `veth`) packets cross a wire between two devices; with one device they do not leave it:
//!
//! ```text
//! cargo test --release -p finetune-rdma --test pair --no-run    # prints the program's path
//! scripts/rdma-vm.sh -d veth -e FINETUNE_RDMA_DEVICE=rxe0 -- PATH --nocapture
//! ```

use std::sync::{Barrier, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use finetune_rdma::{
    Announced, BrokenWire, HEAD_BYTES, Head, Limits, Offer, Prepared, QueuePairKind, Received, WireOptions, Wires,
    rdma_devices,
};

/// Longest time between two looks at a wire.
const LOOK: Duration = Duration::from_millis(10);

/// The devices of the two ranks, and the right to use them alone: limits are per process, and so
/// are open files.
fn devices() -> Option<([String; 2], MutexGuard<'static, ()>)> {
    static ALONE: Mutex<()> = Mutex::new(());
    let Ok(device) = std::env::var("FINETUNE_RDMA_DEVICE") else {
        println!("SKIPPED: no RDMA device (FINETUNE_RDMA_DEVICE names none)");
        return None;
    };
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let all = rdma_devices().expect("a verbs library");
    let other = if device == "rxe0" && all.iter().any(|device| device.name == "rxe1") { "rxe1" } else { &device };
    Some(([device.clone(), other.to_string()], guard))
}

fn options(kind: QueuePairKind) -> WireOptions {
    WireOptions { kind, ..WireOptions::default() }
}

/// Connected ranks 0 and 1 with `wires` wires, under Apple's limits.
fn pair(devices: &[String; 2], wires: usize, options: [&WireOptions; 2]) -> [Wires; 2] {
    let prepare = |rank: usize| {
        let mut names = vec![Vec::new(), Vec::new()];
        names[1 - rank] = vec![devices[rank].clone(); wires];
        Prepared::new(rank, &names, options[rank], Some(&Limits::apple())).unwrap_or_else(|error| panic!("{error}"))
    };
    let ((first, first_offer), (second, second_offer)) = (prepare(0), prepare(1));
    let offers = [first_offer, second_offer].map(|offer| {
        let json = serde_json::to_string(&offer).expect("JSON");
        serde_json::from_str::<Offer>(&json).expect("an offer")
    });
    [first, second].map(|prepared| prepared.connect(&offers, read_head).unwrap_or_else(|error| panic!("{error}")))
}

/// The head of a message: its sequence, the length of its payload, and zeros.
fn head(sequence: u32, payload: &[u8]) -> Head {
    let mut head = [0; HEAD_BYTES];
    head[..4].copy_from_slice(&sequence.to_le_bytes());
    head[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    head
}

fn read_head(head: &Head) -> Option<Announced> {
    let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
    Some(Announced { sequence: number(0), payload_bytes: number(4) })
}

/// Bytes that differ from message to message and from rank to rank.
fn payload(from: usize, sequence: usize, length: usize) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(31) ^ sequence.wrapping_mul(7) ^ from) as u8).collect()
}

/// Sends and receives messages of these lengths, both at once, and compares what comes. The whole
/// is given a minute.
fn exchange(
    wires: &mut Wires,
    rank: usize,
    wire: usize,
    sends: &[usize],
    receives: &[usize],
    first: usize,
) -> Result<(), BrokenWire> {
    let peer = 1 - rank;
    let began = Instant::now();
    let (mut sent, mut received, mut round) = (0, 0, 0);
    while sent < sends.len() || received < receives.len() {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "rank {rank}: {sent} sent and {received} received in a minute"
        );
        let mut moved = false;
        if let Some(&length) = sends.get(sent) {
            let payload = payload(rank, first + sent, length);
            let left = wires.send(peer, wire, &head((first + sent) as u32, &payload), &payload)?;
            moved |= left;
            sent += usize::from(left);
        }
        if let Some(&length) = receives.get(received) {
            let (mut head, mut bytes) = ([0; HEAD_BYTES], vec![0; length]);
            let came = wires.receive(peer, wire, &mut head, &mut bytes)?;
            if came != Received::Nothing {
                moved = true;
                let sequence = read_head(&head).expect("every head can be read").sequence;
                assert_eq!(sequence as usize, first + received, "rank {rank}: order");
                assert_eq!(came, Received::Message, "rank {rank}: message {received}");
                assert!(bytes == payload(peer, first + received, length), "rank {rank}: message {received} differs");
                received += 1;
            }
        }
        if moved {
            round = 0;
        } else {
            wires.idle(round);
            round += 1;
        }
    }
    Ok(())
}

/// Receives into `bytes` for five seconds; the head, and what came.
fn receive_soon(wires: &mut Wires, peer: usize, bytes: &mut [u8]) -> (Head, Received) {
    let mut head = [0; HEAD_BYTES];
    let began = Instant::now();
    loop {
        let came = wires.receive(peer, 0, &mut head, bytes).expect("no failure");
        if came != Received::Nothing || began.elapsed() >= Duration::from_secs(5) {
            return (head, came);
        }
    }
}

/// Runs both ranks as threads; neither leaves before both are done.
fn together(ranks: [Wires; 2], work: impl Fn(&mut Wires, usize) + Sync) {
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        for (rank, mut wires) in ranks.into_iter().enumerate() {
            let (barrier, work) = (&barrier, &work);
            scope.spawn(move || {
                work(&mut wires, rank);
                barrier.wait();
            });
        }
    });
}

fn every_size_class(kind: QueuePairKind) {
    let Some((devices, _guard)) = devices() else { return };
    let options = options(kind);
    let ranks = pair(&devices, 2, [&options, &options]);
    for wire in ranks[0].descriptions() {
        println!("wire {}: {wire}", wire.wire);
    }
    let bulk = ranks[0].next_payload_bytes(usize::MAX);
    let lengths = [0, 1, 4, 63, 4031, 4032, 4033, 4096, 20_000, bulk - 1, bulk, 8, bulk, 0, 5000];
    let many: Vec<usize> = (0..20).flat_map(|_| lengths).collect();
    let began = Instant::now();
    together(ranks, |wires, rank| {
        for wire in 0..2 {
            exchange(wires, rank, wire, &many, &many, 0).unwrap_or_else(|broken| panic!("rank {rank}: {broken:?}"));
        }
    });
    let bytes: usize = 2 * many.iter().sum::<usize>();
    println!(
        "{kind}: 2 wires, {} messages of 0 to {bulk} bytes each way on each, {bytes} bytes each way compared, {:?}",
        many.len(),
        began.elapsed()
    );
}

#[test]
fn real_verbs_uc_messages_of_every_size_class_cross_both_ways() {
    every_size_class(QueuePairKind::Unreliable);
}

#[test]
fn real_verbs_rc_messages_of_every_size_class_cross_both_ways() {
    every_size_class(QueuePairKind::Reliable);
}

/// Every pair of three ranks, one of them over two devices if there are two, under the device's own
/// limits.
#[test]
fn real_verbs_three_ranks_meet_pairwise() {
    let Some((devices, _guard)) = devices() else { return };
    let options = options(QueuePairKind::Unreliable);
    // Two devices reach each other, and need not reach themselves.
    let device = |rank: usize, peer: usize| devices[usize::from(rank > peer)].clone();
    let names = |rank: usize| -> Vec<Vec<String>> {
        (0..3).map(|peer| if peer == rank { vec![] } else { vec![device(rank, peer)] }).collect()
    };
    let prepare = |rank| Prepared::new(rank, &names(rank), &options, None).unwrap_or_else(|error| panic!("{error}"));
    let (prepared, offers): (Vec<_>, Vec<_>) = (0..3).map(prepare).unzip();
    let connect = |prepared: Prepared| prepared.connect(&offers, read_head).unwrap_or_else(|error| panic!("{error}"));
    let mut ranks: Vec<Wires> = prepared.into_iter().map(connect).collect();
    for length in [10, 50_000] {
        let pairs = (0..3).flat_map(|rank| (0..3).map(move |peer| (rank, peer))).filter(|(rank, peer)| rank != peer);
        let sequence = u32::from(length != 10);
        for (rank, peer) in pairs.clone() {
            let payload = payload(rank, peer, length);
            assert_eq!(ranks[rank].send(peer, 0, &head(sequence, &payload), &payload), Ok(true));
        }
        for (rank, peer) in pairs {
            let mut bytes = vec![0; length];
            receive_soon(&mut ranks[peer], rank, &mut bytes);
            assert!(bytes == payload(rank, peer, length), "from {rank} to {peer}");
        }
    }
    println!("three ranks: {}", ranks[1].descriptions().iter().map(ToString::to_string).collect::<Vec<_>>().join("; "));
}

#[test]
fn real_verbs_more_messages_than_depth_go_one_way() {
    let Some((devices, _guard)) = devices() else { return };
    for kind in [QueuePairKind::Unreliable, QueuePairKind::Reliable] {
        // The second rank offers less of everything: the least holds.
        let (wide, narrow) = (
            options(kind),
            WireOptions { bulk_bytes: 16 << 10, bulk_depth: 3, small_depth: 5, mtu: 1024, ..options(kind) },
        );
        let mut ranks = pair(&devices, 1, [&wide, &narrow]);
        let bulk = ranks[0].next_payload_bytes(usize::MAX);
        assert_eq!((bulk, ranks[1].next_payload_bytes(usize::MAX)), ((16 << 10) - 64, (16 << 10) - 64));
        let wire = &ranks[0].descriptions()[0];
        assert_eq!((wire.bulk_depth, wire.small_depth, wire.mtu), (3, 5, 1024));
        // Without a receiver that takes messages, as many leave as the lane is deep, and no more.
        let mut depths = Vec::new();
        for length in [bulk, 100] {
            let payload = payload(0, depths.iter().sum(), length);
            let mut count = 0;
            loop {
                let sequence = (depths.iter().sum::<usize>() + count) as u32;
                if !ranks[0].send(1, 0, &head(sequence, &payload), &payload).expect("no failure") {
                    break;
                }
                count += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            depths.push(count);
        }
        assert_eq!(depths, [3, 5]);
        // Taken in any case: the payloads are those of the first message of each length.
        let mut expected = depths.iter().zip([bulk, 100]).flat_map(|(&count, length)| vec![length; count]);
        for sequence in 0..8 {
            let mut bytes = vec![0; expected.next().expect("eight messages")];
            let (_, came) = receive_soon(&mut ranks[1], 0, &mut bytes);
            assert_eq!(came, Received::Message, "message {sequence}");
            assert_eq!(bytes, payload(0, if sequence < 3 { 0 } else { 3 }, bytes.len()));
        }
        // And now hundreds of times the depth, one way only.
        let lengths: Vec<usize> = (0..1500).map(|at| if at % 3 == 0 { bulk } else { at % 4000 }).collect();
        together(ranks, |wires, rank| {
            let (sends, receives) = if rank == 0 { (&lengths[..], &[][..]) } else { (&[][..], &lengths[..]) };
            exchange(wires, rank, 0, sends, receives, 8).unwrap_or_else(|broken| panic!("{broken:?}"));
        });
        println!(
            "{kind}: {} messages one way over lanes 3 and 5 deep, after 3 + 5 that waited for credit",
            lengths.len()
        );
    }
}

/// A message of a length that is not expected, over the same lane and over the other one: only the
/// head is handed out, as often as it is asked for.
#[test]
fn real_verbs_a_message_of_another_length_stops_after_its_head() {
    let Some((devices, _guard)) = devices() else { return };
    let options = options(QueuePairKind::Unreliable);
    for (sent_length, expected_length) in
        [(100, 200), (200, 100), (60_000, 50_000), (100, 60_000), (60_000, 100), (4000, 65_472)]
    {
        let mut ranks = pair(&devices, 1, [&options, &options]);
        let sent = payload(0, 0, sent_length);
        assert_eq!(ranks[0].send(1, 0, &head(0, &sent), &sent), Ok(true));
        let mut bytes = vec![7; expected_length];
        for _ in 0..2 {
            let (head, came) = receive_soon(&mut ranks[1], 0, &mut bytes);
            assert_eq!(came, Received::Head, "{sent_length} for {expected_length}");
            assert_eq!(read_head(&head).map(|head| head.payload_bytes as usize), Some(sent_length));
            assert!(bytes.iter().all(|&byte| byte == 7), "the rest is left as it was");
        }
        assert_eq!(ranks[1].poll(0, 0), Ok(()));
    }
    println!("a message of another length is announced and left alone");
}

#[test]
fn real_verbs_setting_up_and_tearing_down_leaks_nothing() {
    let Some((devices, _guard)) = devices() else { return };
    let open_files = || std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count());
    let resident_kib = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<usize>().ok()).unwrap_or(0)
    };
    let options = WireOptions { bulk_depth: 4, ..options(QueuePairKind::Unreliable) };
    let began = Instant::now();
    let mut before = (0, 0);
    for round in 0..200 {
        let mut ranks = pair(&devices, 1, [&options, &options]);
        let payload = payload(0, 0, 1000);
        assert_eq!(ranks[0].send(1, 0, &head(0, &payload), &payload), Ok(true));
        drop(ranks);
        if round == 9 {
            before = (open_files(), resident_kib());
        }
    }
    // What is prepared and never connected goes away, too.
    for _ in 0..20 {
        let names = [vec![], vec![devices[0].clone()]];
        let _ = Prepared::new(0, &names, &options, Some(&Limits::apple())).expect("prepared");
    }
    let after = (open_files(), resident_kib());
    println!(
        "220 cycles in {:?}; open files and KiB of memory after 10: {before:?}, after all: {after:?}",
        began.elapsed()
    );
    assert_eq!(before.0, after.0);
    // Every cycle registers 1.6 MiB.
    assert!(after.1 < before.1 + (16 << 10), "memory leaks");
}

#[test]
fn real_verbs_apples_limits_hold() {
    let Some((devices, _guard)) = devices() else { return };
    let options = options(QueuePairKind::Unreliable);
    let prepare = |wires: usize, options: &WireOptions| {
        Prepared::new(0, &[vec![], vec![devices[0].clone(); wires]], options, Some(&Limits::apple())).map(|_| ())
    };
    assert_eq!(prepare(5, &options), Ok(()));
    for (wires, options) in [
        (6, options.clone()),
        (1, WireOptions { bulk_bytes: 4096 * 4096, bulk_depth: 2, ..options.clone() }),
        (1, WireOptions { bulk_depth: 64, ..options.clone() }),
        (1, WireOptions { bulk_bytes: 5000, ..options.clone() }),
    ] {
        println!("refused: {}", prepare(wires, &options).expect_err("beyond Apple's limits"));
    }
    let nobody = Prepared::new(0, &[vec![], vec!["rdma_en5".into()]], &options, None).map(|_| ());
    println!("refused: {}", nobody.expect_err("no such device"));
    println!("devices: {:?}", rdma_devices().expect("a library"));
}

#[test]
fn real_verbs_keep_alives_cost_credit_and_come_back() {
    let Some((devices, _guard)) = devices() else { return };
    let options = options(QueuePairKind::Unreliable);
    let mut ranks = pair(&devices, 1, [&options, &options]);
    // A peer that never looks is not overrun, however often it is called.
    for _ in 0..100 {
        ranks[0].keep_alive(Duration::ZERO).expect("alive");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(ranks[0].send(1, 0, &head(0, &[]), &[]), Ok(false), "keep-alives have used the credit up");
    let lengths = [0, 100, 60_000, 0, 65_472];
    together(ranks, |wires, rank| {
        for _ in 0..20 {
            wires.keep_alive(Duration::ZERO).expect("alive");
        }
        exchange(wires, rank, 0, &lengths, &lengths, 0).unwrap_or_else(|broken| panic!("rank {rank}: {broken:?}"));
        wires.keep_alive(Duration::from_secs(3600)).expect("alive");
    });
    println!("keep-alives: bounded by credit, and messages pass afterwards");
}

/// The peer's queue pairs are gone: RC says so in about a second, UC sees nothing.
#[test]
fn real_verbs_a_peer_that_is_gone_is_an_error_with_rc_and_silence_with_uc() {
    let Some((devices, _guard)) = devices() else { return };
    for kind in [QueuePairKind::Reliable, QueuePairKind::Unreliable] {
        let options = options(kind);
        let [mut survivor, mut gone] = pair(&devices, 1, [&options, &options]);
        // One message that came before the end is still handed out after it.
        let last = payload(1, 0, 300);
        assert_eq!(gone.send(0, 0, &head(0, &last), &last), Ok(true));
        drop(gone);
        let began = Instant::now();
        let message = payload(0, 0, 100);
        let mut broken = None;
        while broken.is_none() && began.elapsed() < Duration::from_secs(4) {
            broken = survivor.send(1, 0, &head(0, &message), &message).err();
            std::thread::sleep(LOOK);
        }
        let (mut bytes, mut last_head) = (vec![0; 300], [0; HEAD_BYTES]);
        assert_eq!(survivor.receive(1, 0, &mut last_head, &mut bytes), Ok(Received::Message));
        assert_eq!(bytes, last);
        let after = survivor.receive(1, 0, &mut last_head, &mut bytes);
        match (kind, broken) {
            (QueuePairKind::Reliable, Some(broken)) => {
                println!("rc, peer gone: after {:?}: {broken:?}", began.elapsed());
                assert!(broken.closed, "most likely it ended");
                assert_eq!(after, Err(broken));
            }
            (QueuePairKind::Unreliable, None) => {
                println!("uc, peer gone: nothing in {:?}", began.elapsed());
                assert_eq!(after, Ok(Received::Nothing));
            }
            (_, other) => panic!("{kind}: {other:?}"),
        }
        let began = Instant::now();
        drop(survivor);
        assert!(began.elapsed() < Duration::from_secs(3), "leaving does not hang");
    }
}
