//! Two sides of one pipe, in one process.

#![cfg(target_os = "linux")]

use finetune_memory_pipe::{Moved, NONCE_BYTES, Offer, Pipe};

const NONCE: [u8; NONCE_BYTES] = [7; NONCE_BYTES];

fn pair(capacity: usize) -> (Pipe, Pipe) {
    let (first, offer, _file) = Pipe::create(capacity, NONCE).expect("memory");
    (first, Pipe::open(&offer).expect("the offer holds"))
}

fn moved(bytes: usize) -> Result<Moved, finetune_memory_pipe::Damaged> {
    Ok(Moved { bytes, wake: false })
}

#[test]
fn bytes_arrive_in_both_directions_and_around_the_end() {
    let (mut a, mut b) = pair(64);
    for round in 0..50u8 {
        let (header, payload) = ([round; 5], [round + 100; 20]);
        for (from, to) in [(0, 1), (1, 0)] {
            let (writer, reader) = if from < to { (&mut a, &mut b) } else { (&mut b, &mut a) };
            assert_eq!(writer.write(&[&header, &payload]), moved(25), "round {round}");
            let (mut head, mut body) = ([0; 5], [0; 20]);
            assert_eq!(reader.read(&mut [&mut head, &mut body]), moved(25), "round {round}");
            assert_eq!((head, body), (header, payload), "round {round}");
        }
    }
}

#[test]
fn a_full_pipe_takes_no_more_and_an_empty_one_gives_none() {
    let (mut a, mut b) = pair(64);
    assert_eq!(b.read(&mut [&mut [0; 8]]), moved(0));
    assert_eq!(a.write(&[&[1; 40], &[2; 40]]), moved(64));
    assert_eq!(a.write(&[&[3; 8]]), moved(0));
    let mut read = [0; 80];
    assert_eq!(b.read(&mut [&mut read]), moved(64));
    assert_eq!(read[..64], [[1; 40].as_slice(), &[2; 24]].concat());
    assert_eq!(a.write(&[&[3; 8]]), moved(8));
}

#[test]
fn who_sleeps_is_woken_once() {
    let (mut a, mut b) = pair(64);
    assert!(!b.sleep(1, false), "nothing to read");
    assert_eq!(a.write(&[&[1]]), Ok(Moved { bytes: 1, wake: true }));
    assert_eq!(a.write(&[&[1]]), moved(1), "already woken");
    assert!(b.sleep(1, false), "two bytes wait");
    b.awake();
    assert_eq!(a.write(&[&[1; 62]]), moved(62), "b is awake");
    assert!(!a.sleep(0, true), "no room");
    assert_eq!(b.read(&mut [&mut [0; 9]]), Ok(Moved { bytes: 9, wake: true }));
    assert!(a.sleep(0, true), "room for nine");
}

/// Looks at `bytes` bytes of the pipe. Returns them and the length of the first part, if they came.
fn looked(pipe: &mut Pipe, bytes: usize) -> Option<(Vec<u8>, usize)> {
    let mut seen = None;
    let moved = pipe.read_in_place(bytes, |parts| seen = Some((parts.concat(), parts[0].len()))).expect("whole");
    assert_eq!(moved.bytes, if seen.is_some() { bytes } else { 0 });
    seen
}

#[test]
fn what_is_looked_at_is_whole_and_in_order() {
    let (mut a, mut b) = pair(64);
    assert_eq!(looked(&mut b, 8), None, "nothing is there");
    assert_eq!(a.write(&[&[1; 7]]), moved(7));
    assert_eq!(looked(&mut b, 8), None, "one byte is missing");
    assert_eq!(a.write(&[&[2; 49]]), moved(49));
    assert_eq!(looked(&mut b, 8), Some(([[1; 7].as_slice(), &[2]].concat(), 8)));
    assert_eq!(b.read(&mut [&mut [0; 40]]), moved(40), "the two ways of reading take turns");
    let next: Vec<u8> = (0..56).collect();
    assert_eq!(a.write(&[&next]), moved(56), "what was read has made room");
    assert_eq!(looked(&mut b, 8), Some((vec![2; 8], 8)));
    assert_eq!(looked(&mut b, 24), Some((next[..24].to_vec(), 8)), "around the end, cut at 8 bytes");
}

#[test]
fn what_lies_around_the_end_is_never_cut_within_a_number() {
    let (mut a, mut b) = pair(64);
    assert_eq!(a.write(&[&[9; 61]]), moved(61));
    assert_eq!(b.read(&mut [&mut [0; 61]]), moved(61));
    let bytes: Vec<u8> = (0..64).collect();
    assert_eq!(a.write(&[&bytes]), moved(64));
    assert_eq!(looked(&mut b, 64), Some((bytes, 64)), "three bytes lie before the end: put together");
    assert_eq!(looked(&mut b, 1), None);
}

#[test]
fn who_sleeps_for_many_bytes_is_not_kept_awake_by_few() {
    let (mut a, mut b) = pair(64);
    assert_eq!(a.write(&[&[1; 20]]), moved(20));
    assert!(!b.sleep(21, false), "20 of 21 are there");
    assert_eq!(a.write(&[&[1]]), Ok(Moved { bytes: 1, wake: true }));
    assert!(b.sleep(21, false), "all are there");
    assert!(!b.sleep(0, false), "it waits for nothing");
}

#[test]
fn threads_pass_a_stream_unchanged() {
    let (mut a, mut b) = pair(4096);
    const TOTAL: usize = 8 << 20;
    let byte = |at: usize| (at.wrapping_mul(2_654_435_761) >> 13) as u8;
    std::thread::scope(|threads| {
        threads.spawn(move || {
            let bytes: Vec<u8> = (0..TOTAL).map(byte).collect();
            let mut sent = 0;
            while sent < TOTAL {
                let piece = 1 + sent % 5000;
                sent += a.write(&[&bytes[sent..(sent + piece).min(TOTAL)]]).expect("whole").bytes;
            }
        });
        let (mut received, mut buffer) = (0, [0; 3000]);
        while received < TOTAL {
            let bytes = b.read(&mut [&mut buffer]).expect("whole").bytes;
            for (offset, &found) in buffer[..bytes].iter().enumerate() {
                assert_eq!(found, byte(received + offset), "byte {}", received + offset);
            }
            received += bytes;
        }
    });
}

#[test]
fn only_what_was_offered_is_opened() {
    let (_pipe, offer, _file) = Pipe::create(64, NONCE).expect("memory");
    let other_file = tempfile::tempfile().expect("a file");
    other_file.set_len(4096 + 128).expect("as long");
    let plain = std::os::fd::AsRawFd::as_raw_fd(&other_file);
    for (what, wrong) in [
        ("another number", Offer { nonce: [8; NONCE_BYTES], ..offer.clone() }),
        ("another length", Offer { capacity: 128, ..offer.clone() }),
        ("another file", Offer { descriptor: plain, nonce: [0; NONCE_BYTES], ..offer.clone() }),
        ("no such file", Offer { descriptor: 9999, ..offer.clone() }),
        ("no such process", Offer { pid: u32::MAX, ..offer.clone() }),
    ] {
        assert!(Pipe::open(&wrong).is_err(), "{what}");
    }
    assert!(Pipe::open(&offer).is_ok());
}
