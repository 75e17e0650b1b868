//! Files that are cut, changed or made up: an error that names the file, and neither a panic nor
//! much memory.

use std::path::PathBuf;

use finetune_gguf::{File, GgufError, TensorInfo, TensorType, Value, header};

fn golden() -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/gguf/golden.gguf");
    std::fs::read(path).expect("a file of gguf-py")
}

fn open(bytes: &[u8]) -> Result<File, GgufError> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::io::Write::write_all(&mut file.as_file(), bytes).expect("its bytes");
    File::open(file.path())
}

#[test]
fn a_file_that_ends_early_is_refused() {
    let golden = golden();
    let whole = open(&golden).expect("a whole file");
    let tensors: u64 = whole.tensors().iter().map(|tensor| tensor.bytes().expect("a size").next_multiple_of(32)).sum();
    let start = golden.len() - tensors as usize;
    for length in (0..start).step_by(7).chain([start, golden.len() - 64]) {
        let error = open(&golden[..length]).expect_err("a part of a file");
        assert!(matches!(error, GgufError::Malformed { .. }), "{length}: {error}");
    }
}

/// A file that is cut after it was opened, whichever way it is read.
#[test]
fn a_file_that_gets_shorter_is_an_error() {
    let tensor = TensorInfo { name: "numbers".into(), shape: vec![500, 1000], kind: TensorType::F32 };
    let numbers: Vec<u8> = (0..500_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut bytes = header(&Vec::new(), std::slice::from_ref(&tensor)).expect("a header");
    let start = bytes.len();
    bytes.extend(&numbers);
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::io::Write::write_all(&mut file.as_file(), &bytes).expect("its bytes");
    let mut readers = [(); 2].map(|()| File::open(file.path()).expect("a whole file"));
    readers[1].pass_cache();
    for reader in &readers {
        assert!(reader.bytes("numbers").expect("all of them") == numbers);
        let part = reader.part("numbers", 70_001..900_000).expect("some of them");
        assert!(part == numbers[70_001..900_000]);
    }
    file.as_file().set_len(start as u64 + 1_000_000).expect("a shorter file");
    for reader in &readers {
        // What is left may be another file's by now.
        for part in [0..1_000_000, 0..2_000_000] {
            let error = reader.part("numbers", part).expect_err("a changed file");
            let path = file.path().display().to_string();
            assert!(matches!(error, GgufError::Store(_)) && error.to_string().contains(&path), "{error}");
            let lengths = format!("it had {} bytes, and has {} now", bytes.len(), start + 1_000_000);
            assert!(error.to_string().contains(&lengths), "{error}");
        }
    }
}

/// Each byte of the header is changed in turn.
#[test]
fn a_changed_byte_never_panics() {
    let golden = golden();
    let mut opened = 0;
    for place in 0..2000 {
        for bit in [0x01, 0x80] {
            let mut bytes = golden.clone();
            bytes[place] ^= bit;
            if let Ok(file) = open(&bytes) {
                opened += 1;
                for tensor in file.tensors() {
                    let _ = file.values(&tensor.name);
                }
            }
        }
    }
    assert!(opened > 100, "most changes of values and names leave a file: {opened}");
}

/// (what is made up, the bytes behind the magic, part of the error)
#[test]
fn lengths_that_cannot_be() {
    let number = |number: u64| number.to_le_bytes().to_vec();
    let start = |version: u32, tensors: u64, keys: u64| {
        [b"GGUF".to_vec(), version.to_le_bytes().to_vec(), number(tensors), number(keys)].concat()
    };
    let key = [number(1), b"k".to_vec()].concat();
    let table = [
        ("another format", b"GGML".to_vec(), "does not begin with `GGUF`"),
        ("another version", start(1, 0, 0), "GGUF of version 1"),
        ("big-endian", b"GGUF\0\0\0\x03".to_vec(), "GGUF of version 50331648"),
        ("keys without end", start(3, 0, u64::MAX), "keys"),
        ("a text without end", [start(3, 0, 1), number(u64::MAX)].concat(), "ends too early"),
        (
            "an array without end",
            [start(3, 0, 1), key.clone(), 9_u32.to_le_bytes().to_vec(), 4_u32.to_le_bytes().to_vec(), number(1 << 60)]
                .concat(),
            "ends too early",
        ),
        ("no type", [start(3, 0, 1), key, 13_u32.to_le_bytes().to_vec()].concat(), "13 is no type of a value"),
    ];
    for (what, bytes, part) in table {
        let error = open(&bytes).expect_err(what).to_string();
        assert!(error.contains(part), "{what}: {error}");
    }
}

#[test]
fn what_the_format_cannot_hold() {
    let tensor = |name: &str, shape: &[usize], kind| TensorInfo { name: name.to_owned(), shape: shape.to_vec(), kind };
    let long = "x".repeat(64);
    #[expect(clippy::type_complexity, reason = "a table of cases")]
    let table: [(Vec<(String, Value)>, Vec<TensorInfo>, &str); 7] = [
        (vec![("k".into(), Value::U8(1)), ("k".into(), Value::U8(2))], vec![], "the key `k` twice"),
        (vec![("k".into(), Value::Array(vec![]))], vec![], "an array without values"),
        (vec![("k".into(), Value::Array(vec![Value::U8(1), Value::I8(1)]))], vec![], "an array of several types"),
        (vec![], vec![tensor("a", &[3], TensorType::F32), tensor("a", &[3], TensorType::F32)], "the tensor `a` twice"),
        (vec![], vec![tensor("a", &[4, 31], TensorType::Q8_0)], "the tensor `a` of shape [4, 31] as q8_0"),
        (vec![], vec![tensor("a", &[1, 1, 1, 1, 1], TensorType::F32)], "of 5 dimensions"),
        (vec![], vec![tensor(&long, &[1], TensorType::F32)], "of 1 dimensions"),
    ];
    for (metadata, tensors, part) in table {
        let error = header(&metadata, &tensors).expect_err(part).to_string();
        assert!(error.contains(part), "{error}, expected {part}");
    }
    assert!(TensorType::Q8_0.encode(&[1.0; 33]).is_err() && TensorType::Q8_0.decode(&[0; 33]).is_err());
    assert!(TensorType::F32.decode(&[0; 3]).is_err() && TensorType::F16.decode(&[0; 3]).is_err());
}
