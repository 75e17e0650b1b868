//! Hostile safetensors headers: refused with a reason, without a panic.
#![expect(clippy::disallowed_methods, reason = "a test writes bad files")]

use std::collections::BTreeMap;
use std::fs;

use finetune_store::{Dtype, Header, StoreError, TensorFile, encode_tensors};

/// A header of one tensor.
fn one(dtype: &str, shape: &str, begin: &str, end: &str) -> String {
    format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#)
}

/// A header of two tensors, the first at bytes 0 to 4.
fn two(begin: u32, end: u32) -> String {
    format!(
        r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4]}},
            "b":{{"dtype":"U8","shape":[4],"data_offsets":[{begin},{end}]}}}}"#
    )
}

/// (bytes of the file, part of the reason)
fn check(table: &[(Vec<u8>, &str)]) {
    let directory = tempfile::tempdir().unwrap();
    for (position, (bytes, reason)) in table.iter().enumerate() {
        let error = Header::parse(bytes).expect_err(&format!("case {position}, {reason}"));
        assert!(error.contains(reason), "case {position}: {error:.200} is not about {reason}");
        let path = directory.path().join("bad.safetensors");
        fs::write(&path, bytes).unwrap();
        let error = TensorFile::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::Malformed { .. }));
        assert!(error.to_string().contains("bad.safetensors"));
    }
    let error = TensorFile::open(directory.path()).unwrap_err();
    assert!(error.to_string().contains("not a regular file"), "{error}");
}

#[test]
fn headers_that_are_no_json_are_refused_with_a_reason() {
    let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let deep_ignored = format!(
        r#"{{"a":{{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":{}{}}}}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    check(&[
        (vec![], "too short"),
        (vec![0; 7], "too short"),
        (vec![0; 8], "does not start with '{'"),
        (vec![0xff; 16], "more than 16 MiB"),
        (((16_u64 << 20) + 1).to_le_bytes().to_vec(), "more than 16 MiB"),
        (9_u64.to_le_bytes().to_vec(), "the file ends before"),
        (file(" {}", 0), "does not start with '{'"),
        (file("{", 0), "EOF"),
        (file("{}{}", 0), "trailing"),
        (file("[]", 0), "does not start with '{'"),
        (file("{\"a\":\"\u{0}\"}", 0), "not what the format asks for"),
        (file("not JSON", 4), "does not start with '{'"),
        (file("{\u{7f}", 4), "not what the format asks for"),
        (file(&deep, 4), "not what the format asks for"),
        (file(&deep_ignored, 4), "unknown field"),
    ]);
}

#[test]
fn malformed_headers_are_refused_with_a_reason() {
    let many_dimensions = one("U8", &format!("[{}4]", "1,".repeat(64)), "0", "4");
    let many_tensors = format!(
        "{{{}}}",
        (0..100_001)
            .map(|i| format!(r#""{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#))
            .collect::<Vec<_>>()
            .join(",")
    );
    let twice = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                    "a":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}"#;
    check(&[
        (file(&one("U9", "[4]", "0", "4"), 4), "dtype \"U9\""),
        (file(&one("F4", "[8]", "0", "4"), 4), "dtype \"F4\""),
        (file(&one("U8", "[4]", "0", "5"), 4), "outside the file"),
        (file(&one("U8", "[4]", "4", "0"), 4), "outside the file"),
        (file(&one("U8", "[3]", "0", "4"), 4), "needs 3 bytes but has 4"),
        (file(&one("F32", "[4]", "0", "4"), 4), "needs 16 bytes but has 4"),
        (file(&one("U8", "[-4]", "0", "4"), 4), "not what the format asks for"),
        (file(&one("U8", "[4.0]", "0", "4"), 4), "not what the format asks for"),
        (file(&one("U8", "4", "0", "4"), 4), "not what the format asks for"),
        (file(&one("U8", "[4]", "-1", "4"), 4), "not what the format asks for"),
        (file(&one("U8", "[4]", "0", "99999999999999999999"), 4), "not what the format asks for"),
        (file(&one("U8", "[4294967296,4294967296]", "0", "4"), 4), "too large"),
        (file(&one("F64", "[2305843009213693952]", "0", "0"), 0), "too large"),
        (file(&one("U8", "[18446744073709551615,2]", "0", "4"), 4), "too large"),
        (file(&many_dimensions, 4), "65 dimensions"),
        (file(&many_tensors, 0), "more than 100000 tensors"),
        (file(&one("U8", "[4]", "1", "5"), 5), "belong to no tensor"),
        (file(&one("U8", "[4]", "0", "4"), 5), "at its end"),
        (file("{}", 1), "at its end"),
        (file(&two(2, 6), 6), "overlaps"),
        (file(&two(0, 4), 4), "overlaps"),
        (file(&two(5, 9), 9), "belong to no tensor"),
        (file(twice, 4), "comes twice"),
        (file(r#"{"__metadata__":{"a":1}}"#, 0), "not what the format asks for"),
        (file(r#"{"__metadata__":{"a":"1","a":"2"}}"#, 0), "comes twice"),
        (file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "comes twice"),
        (file(r#"{"a":{"dtype":"U8","shape":[4]}}"#, 4), "missing field"),
        (file(r#"{"a":{"dtype":"U8","shape":[4],"shape":[4],"data_offsets":[0,4]}}"#, 4), "duplicate"),
    ]);
    // MLX writes null if there are no texts.
    for good in [file("{}", 0), file("{}  ", 0), file(&two(4, 8), 8), file(r#"{"__metadata__":null}"#, 0)] {
        Header::parse(&good).unwrap();
    }
}

#[test]
fn random_damage_never_panics_and_agrees_with_the_reference() {
    let tensors = [
        ("z.weight".to_string(), Dtype::F32, vec![2, 3], vec![1; 24].into()),
        ("a.weight".to_string(), Dtype::BF16, vec![5], vec![2; 10].into()),
        ("empty".to_string(), Dtype::I64, vec![0, 4], vec![].into()),
    ];
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let good = encode_tensors(&tensors, &metadata).unwrap();
    let header_end = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut random = random_numbers(7);
    let mut accepted = 0;
    for case in 0..100_000 {
        let bytes = if case % 4 == 0 {
            (0..random() % 64).map(|_| random() as u8).collect()
        } else {
            let mut bytes = good.clone();
            for _ in 0..=random() % 3 {
                let position = random() as usize % header_end;
                bytes[position] = match random() % 3 {
                    0 => random() as u8,
                    1 => b"{}[]\",:0189 "[random() as usize % 12],
                    _ => bytes[random() as usize % header_end],
                };
            }
            if random().is_multiple_of(8) {
                bytes.truncate(random() as usize % bytes.len());
            }
            bytes
        };
        if let Ok(header) = Header::parse(&bytes) {
            accepted += 1;
            // The format's own crate must agree on all that we accept.
            let reference =
                safetensors::SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("case {case}: {error}"));
            assert_eq!(reference.len(), header.tensors.len(), "case {case}");
            for tensor in &header.tensors {
                let view = reference.tensor(&tensor.name).unwrap();
                assert_eq!(view.shape(), tensor.shape, "case {case}");
                let start = header.data_start;
                assert_eq!(view.data(), &bytes[start + tensor.begin..start + tensor.end]);
            }
        }
    }
    assert!(accepted > 100, "{accepted} of the damaged headers are still valid: too few to compare");
}

fn file(json: &str, data: usize) -> Vec<u8> {
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(json.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    bytes
}

fn random_numbers(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    }
}
