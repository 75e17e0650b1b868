use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::*;
use crate::disk::RealDisk;
use crate::replace::replace_file;

const LENGTH: usize = 3 * AT_ONCE + 12_345;

/// Bytes that no two places nearby have alike.
fn content() -> Vec<u8> {
    (0..LENGTH as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// A file, and the readers of it by name: one for each way that its bytes may come.
fn readers(path: &Path) -> Vec<(&'static str, FileReader)> {
    let open = || File::open(path).expect("the file");
    let opened = OpenedFile::new(path, &path.metadata().expect("the file"));
    let mut past_cache = FileReader::new(open(), opened.clone());
    past_cache.pass_cache();
    // No read of a file that is open for writing alone succeeds.
    let unreadable = OpenOptions::new().append(true).open(path).expect("the file");
    let refused = PastCache { file: unreadable, alignment: PAGE, has_failed: AtomicBool::new(false) };
    // Most disks refuse it.
    let direct = open_past_cache(&open()).map_or_else(open, |(file, _)| file);
    let barely_aligned = PastCache { file: direct, alignment: 2, has_failed: AtomicBool::new(false) };
    let with = |past_cache| FileReader {
        file: open(),
        opened: opened.clone(),
        past_cache: Some(past_cache),
        reads: Arc::default(),
    };
    let again = FileReader::new(open(), opened.clone()).again().expect("a second reader");
    vec![
        ("through the cache", FileReader::new(open(), opened.clone())),
        ("a second reader", again),
        ("past the cache", past_cache),
        ("refused", with(refused)),
        ("barely aligned", with(barely_aligned)),
    ]
}

#[test]
fn every_way_gives_the_same_bytes() {
    let directory = tempfile::tempdir().expect("a directory");
    let (path, content) = (directory.path().join("file"), content());
    replace_file(&RealDisk, &path, &content).expect("a file");
    for (name, reader) in readers(&path) {
        for (start, length) in [
            (0, 0),
            (0, LENGTH),
            (0, AT_ONCE),
            (0, LEAST - 1),
            (0, LEAST),
            (1, LEAST),
            (PAGE - 1, LEAST + 2),
            (PAGE, AT_ONCE),
            (8, AT_ONCE - 8),
            (8, AT_ONCE),
            (AT_ONCE - 1, AT_ONCE + 2),
            (AT_ONCE + 511, 2 * AT_ONCE),
            (LENGTH - LEAST, LEAST),
            (LENGTH - 2 * AT_ONCE - 7, 2 * AT_ONCE + 7),
            (LENGTH, 0),
        ] {
            let (mut bytes, read_before) = (vec![0; length], reader.bytes_read());
            reader.read_exact_at(&mut bytes, start as u64).unwrap_or_else(|e| panic!("{name} {start} {length}: {e}"));
            assert!(bytes == content[start..start + length], "{name}: {length} bytes from {start} on");
            assert!(!reader.is_reading() && reader.bytes_read() == read_before + length as u64, "{name} {length}");
            let vector = reader.read_vec_at(length, start as u64);
            assert!(vector.unwrap_or_else(|e| panic!("{name} {start} {length}: {e}")) == bytes, "{name}: a vector");
            assert_eq!(reader.bytes_read(), read_before + 2 * length as u64, "{name} {length}");
        }
    }
}

/// Who waits for rows of a matrix, which have a reader of their own, looks at the reader of the file.
#[test]
fn reads_of_a_second_reader_are_seen() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("file");
    replace_file(&RealDisk, &path, &content()).expect("a file");
    let opened = OpenedFile::new(&path, &path.metadata().expect("the file"));
    let reader = FileReader::new(File::open(&path).expect("the file"), opened);
    let again = reader.again().expect("a second reader");
    again.read_exact_at(&mut [0; 100], 7).expect("bytes");
    reader.read_exact_at(&mut [0; 10], 7).expect("bytes");
    assert_eq!((reader.bytes_read(), again.bytes_read()), (110, 110));
    let _under_way = UnderWay::new(&again.reads);
    assert!(reader.is_reading());
}

#[test]
fn what_is_not_there_is_an_error() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("file");
    replace_file(&RealDisk, &path, &content()).expect("a file");
    let readers = readers(&path);
    let expect_end = |start: usize, length: usize| {
        for (name, reader) in &readers {
            let filled = reader.fill(&mut vec![0; length], start as u64);
            for found in [filled, reader.append(&mut Vec::new(), length, start as u64)] {
                let error = found.expect_err("an end");
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{name}: {length} bytes from {start} on");
            }
        }
    };
    expect_end(LENGTH - LEAST, LEAST + 1);
    expect_end(LENGTH + 5, AT_ONCE);
    // It is cut while it is open: inside of a page, and at its end.
    for length in [2 * AT_ONCE + 100, AT_ONCE] {
        let file = OpenOptions::new().write(true).open(&path).expect("the file");
        file.set_len(length as u64).expect("a shorter file");
        expect_end(0, LENGTH);
        expect_end(length - LEAST, LEAST + 1);
        for (name, reader) in &readers {
            reader.fill(&mut vec![0; LEAST], (length - LEAST) as u64).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}

/// What happens to a file while it is open: its name, what is done, and what a read says then. `None`: a read has
/// the bytes of before.
type Change<'a> = (&'a str, &'a dyn Fn(&Path), Option<&'a str>);

fn for_writing(path: &Path) -> File {
    OpenOptions::new().write(true).open(path).expect("the file")
}

#[test]
#[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
fn what_is_written_to_while_it_is_open_is_refused() {
    let other: Vec<u8> = content().iter().map(|byte| byte ^ 1).collect();
    let touched = Some("its time of modification is another");
    let changes: [Change<'_>; 9] = [
        ("nothing", &|_| (), None),
        ("its last byte", &|path| for_writing(path).write_all_at(&[7], LENGTH as u64 - 1).expect("a byte"), touched),
        ("all bytes, as many", &|path| for_writing(path).write_all(&other).expect("bytes"), touched),
        ("emptied and filled again", &|path| std::fs::write(path, &other).expect("bytes"), touched),
        ("cut", &|path| for_writing(path).set_len(9).expect("a cut"), Some("it had 3158073 bytes, and has 9 now")),
        (
            "longer",
            &|path| for_writing(path).set_len(LENGTH as u64 + 1).expect("a longer file"),
            Some("and has 3158074 now"),
        ),
        // The reader has the file that it opened, whoever has the name.
        ("another file with its name", &|path| replace_file(&RealDisk, path, &other).expect("a file"), None),
        ("removed", &|path| std::fs::remove_file(path).expect("the file"), None),
        (
            "a second name, other permissions",
            &|path| {
                std::fs::hard_link(path, path.with_extension("second")).expect("a link");
                let mut permissions = path.metadata().expect("the file").permissions();
                permissions.set_readonly(true);
                std::fs::set_permissions(path, permissions).expect("permissions");
            },
            None,
        ),
    ];
    for (what, change, want) in changes {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        std::fs::write(&path, content()).expect("a file");
        // Some systems know times by a few milliseconds only. Nobody changes a model that fast, but tests do.
        let earlier = SystemTime::now() - Duration::from_secs(60);
        for_writing(&path).set_modified(earlier).expect("an earlier time");
        let readers = readers(&path);
        change(&path);
        for (name, reader) in &readers {
            for length in [LEAST - 1, LENGTH] {
                let mut bytes = vec![0; length];
                match (reader.read_exact_at(&mut bytes, 0), want) {
                    (Ok(()), None) => assert!(bytes == content()[..length], "{what}, {name}: other bytes"),
                    (Err(error @ StoreError::Changed { .. }), Some(want)) => {
                        let error = error.to_string();
                        assert!(error.contains(want) && error.contains("file was changed"), "{what}, {name}: {error}");
                    }
                    (found, _) => panic!("{what}, {name}: {found:?}"),
                }
            }
        }
    }
}

/// Who opens a file again by its name wants the same one.
#[test]
#[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
fn another_file_with_the_name_is_told_apart() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("file");
    std::fs::write(&path, b"bytes").expect("a file");
    let opened = OpenedFile::new(&path, &path.metadata().expect("the file"));
    opened.expect_in_place().expect("the same file");
    // The old file is kept, so that its inode is not given to the new one.
    std::fs::rename(&path, directory.path().join("old")).expect("another name");
    assert!(matches!(opened.expect_in_place(), Err(StoreError::Io { .. })));
    std::fs::write(&path, b"bytes").expect("a file");
    let error = opened.expect_in_place().expect_err("another file").to_string();
    assert!(error.contains("another file has its name now"), "{error}");
}

#[test]
fn a_read_that_is_refused_is_the_last_one_past_the_cache() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("file");
    replace_file(&RealDisk, &path, &content()).expect("a file");
    for (name, reader) in readers(&path) {
        let has_failed = |reader: &FileReader| {
            reader.past_cache.as_ref().is_some_and(|past_cache| past_cache.has_failed.load(Ordering::Relaxed))
        };
        reader.read_exact_at(&mut vec![0; LEAST - 1], 0).expect("bytes");
        assert!(!has_failed(&reader), "{name}: a small part goes through the cache");
        reader.read_exact_at(&mut vec![0; LEAST], 0).expect("bytes");
        assert!(has_failed(&reader) || name != "refused", "{name}");
    }
}

/// (where a part begins, its length, where its pieces begin and end)
#[test]
fn pieces_meet_at_multiples_of_their_size() {
    type Case<'a> = (usize, usize, &'a [(usize, usize)]);
    let cases: [Case<'_>; 4] = [
        (0, 0, &[]),
        (5, 10, &[(5, 15)]),
        (0, 2 * AT_ONCE, &[(0, AT_ONCE), (AT_ONCE, 2 * AT_ONCE)]),
        (AT_ONCE - 1, AT_ONCE + 2, &[(AT_ONCE - 1, AT_ONCE), (AT_ONCE, 2 * AT_ONCE), (2 * AT_ONCE, 2 * AT_ONCE + 1)]),
    ];
    for (start, length, want) in cases {
        let found = pieces(length, start as u64);
        let found: Vec<_> = found.map(|(start, length)| (start as usize, start as usize + length)).collect();
        assert_eq!(found, want, "{start} {length}");
    }
}
