//! Device files: what they say, what is wrong with them.

use expect_test::{Expect, expect};

use super::*;

/// The examples of MLX's documentation and of this file.
const MESH: &str = r#"[[null,"rdma_en5","rdma_en4"],["rdma_en5",null,"rdma_en3"],["rdma_en4","rdma_en3",null]]"#;
const RING_OF_4: &str = r#"[[null,["a","b"],null,["c","d"]],[["a","b"],null,["c","d"],null],[null,["a","b"],null,["c","d"]],[["a","b"],null,["c","d"],null]]"#;

#[test]
fn text_reads_back() {
    for text in [MESH, RING_OF_4, "[[null]]", r#"[[null,"mlx5_0"],[["mlx5_0","mlx5_1"],null]]"#] {
        assert_eq!(DeviceMatrix::parse(text).unwrap().to_json(), text);
    }
    // Other ways to write the same.
    for (text, same) in [("[[[]]]", "[[null]]"), (r#"[[null,["a"]],["b",[]]]"#, r#"[[null,"a"],["b",null]]"#)] {
        assert_eq!(DeviceMatrix::parse(text).unwrap().to_json(), same);
    }
    let matrix = DeviceMatrix::parse(RING_OF_4).unwrap();
    assert_eq!(matrix.world(), 4);
    assert_eq!(matrix.wires(0, 3), ["c", "d"]);
    assert!(matrix.wires(0, 2).is_empty());
}

#[test]
fn shapes() {
    // A digit a cell: its number of cables.
    type Pairs = &'static [(usize, usize)];
    #[rustfmt::skip]
    let cases: &[(&[&str], Shape, Pairs, Pairs)] = &[
        (&["0"], Shape::Mesh, &[], &[]),
        (&["01", "10"], Shape::Mesh, &[], &[]),
        (&["03", "30"], Shape::Mesh, &[], &[]),
        (&["00", "00"], Shape::Neither, &[(0, 1)], &[(0, 1)]),
        (&["01", "00"], Shape::Neither, &[(0, 1)], &[(0, 1)]),
        (&["02", "10"], Shape::Neither, &[(0, 1)], &[(0, 1)]),
        (&["011", "101", "110"], Shape::Mesh, &[], &[]),
        // Uneven pairs: a mesh, but no ring of 2 wires.
        (&["021", "201", "110"], Shape::Mesh, &[], &[(1, 2), (2, 0)]),
        (&["0101", "1010", "0101", "1010"], Shape::Ring, &[(0, 2), (1, 3)], &[]),
        (&["0212", "2021", "1202", "2120"], Shape::Mesh, &[], &[]),
        (&["0202", "2020", "0201", "2010"], Shape::Neither, &[(0, 2), (1, 3)], &[(2, 3)]),
        (&["0101", "1010", "0100", "1000"], Shape::Neither, &[(0, 2), (1, 3), (2, 3)], &[(2, 3)]),
        // A cable too many one way only.
        (&["0111", "1011", "1101", "2110"], Shape::Neither, &[(0, 3)], &[(0, 1), (1, 2), (2, 3), (3, 0)]),
        (&["0100", "1010", "0101", "0010"], Shape::Neither, &[(0, 2), (0, 3), (1, 3)], &[(3, 0)]),
    ];
    for (rows, shape, mesh, ring) in cases {
        let names = |count: u8| (0..count - b'0').map(|n| format!("rdma_en{n}")).collect::<Vec<_>>();
        let matrix = DeviceMatrix::new(rows.iter().map(|row| row.bytes().map(names).collect()).collect()).unwrap();
        assert_eq!(matrix.shape(), *shape, "{rows:?}");
        assert_eq!(matrix.missing_for_mesh(), *mesh, "{rows:?}");
        assert_eq!(matrix.missing_for_ring(), *ring, "{rows:?}");
        assert_eq!(DeviceMatrix::parse(&matrix.to_json()).unwrap(), matrix);
    }
}

/// Of a ring of four: two neighbours are a mesh, in either order, and two others have no cable.
#[test]
fn a_part_of_a_matrix_keeps_its_cables() {
    let matrix = DeviceMatrix::parse(RING_OF_4).unwrap();
    let pair = matrix.between(&[3, 0]);
    assert_eq!((pair.world(), pair.shape()), (2, Shape::Mesh));
    assert_eq!((pair.wires(0, 1), pair.wires(1, 0)), (matrix.wires(3, 0), matrix.wires(0, 3)));
    assert_eq!(matrix.between(&[0, 2]).shape(), Shape::Neither);
    assert_eq!(matrix.between(&[0, 1, 2, 3]), matrix);
}

#[test]
fn cables_in_words() {
    let matrix = DeviceMatrix::parse(
        r#"[[null,"a",null,null],["a",null,["a","b"],"c"],[null,"a",null,["a","b"]],[null,null,["a","b"],null]]"#,
    )
    .unwrap();
    let pairs = [(0, 1), (0, 2), (1, 2), (2, 1), (1, 3), (3, 1), (2, 3)];
    let seen = pairs.map(|(i, j)| matrix.cables_between(i, j)).join("\n");
    expect![[r#"
        1 cable between rank 0 and rank 1
        no cable between rank 0 and rank 2
        2 cables from rank 1 to rank 2 but 1 back
        1 cable from rank 2 to rank 1 but 2 back
        1 cable from rank 1 to rank 3 but none back
        1 cable from rank 1 to rank 3 but none back
        2 cables between rank 2 and rank 3"#]]
    .assert_eq(&seen);
}

/// What each text is refused with; every error has one hint.
fn check_errors(cases: &[(&str, Expect)]) {
    for (text, expected) in cases {
        let error = DeviceMatrix::parse(text).unwrap_err();
        expected.assert_eq(&error.to_string());
        assert_eq!(error.hints().len(), 1);
    }
}

#[test]
fn errors_of_rows() {
    let many_ranks = format!("[{}]", ["[]"; 65].join(","));
    let too_long = " ".repeat(MAX_DEVICE_FILE_BYTES + 1);
    check_errors(&[
        ("", expect!["the device matrix is not JSON: EOF while parsing a value at line 1 column 0"]),
        ("[[null],", expect!["the device matrix is not JSON: EOF while parsing a value at line 1 column 8"]),
        (too_long.as_str(), expect!["1048577 bytes are too long for a device matrix, the limit is 1048576"]),
        (r#"{"devices": []}"#, expect!["the device matrix is an object, not a list of rows"]),
        (r#""rdma_en5""#, expect!["the device matrix is a string, not a list of rows"]),
        ("[]", expect!["the device matrix has no rows"]),
        (many_ranks.as_str(), expect!["the device matrix has 65 rows, the limit is 64 ranks"]),
        ("[[null,null],null]", expect!["row 1 of the device matrix is null, not a list of cells"]),
        (r#"[[null,"a"],["a"]]"#, expect!["row 1 of the device matrix has 1 cells, but there are 2 rows"]),
        (r#"[[null,"a","b"],["a",null]]"#, expect!["row 0 of the device matrix has 3 cells, but there are 2 rows"]),
        (
            r#"[[null,"a"],["a","b"]]"#,
            expect!["row 1, column 1 of the device matrix is not null, but a rank has no cable to itself"],
        ),
    ]);
}

#[test]
fn errors_of_cells() {
    let long_name = format!(r#"[[null,"{}"],["a",null]]"#, "n".repeat(65));
    let many_names = format!(r#"[[null,["{}"]],["a",null]]"#, ["a"; 17].join(r#"",""#));
    check_errors(&[
        (
            "[[null,5],[5,null]]",
            expect![
                "row 0, column 1 of the device matrix: a number is not null, a device name or a list of device names"
            ],
        ),
        (
            "[[null,true],[null,null]]",
            expect![
                "row 0, column 1 of the device matrix: a boolean is not null, a device name or a list of device names"
            ],
        ),
        (
            r#"[[null,"a"],[["a",null],null]]"#,
            expect![
                "row 1, column 0 of the device matrix: a list with null is not null, a device name or a list of device names"
            ],
        ),
        (
            r#"[[null,[["a"]]],["a",null]]"#,
            expect![
                "row 0, column 1 of the device matrix: a list with a list is not null, a device name or a list of device names"
            ],
        ),
        (
            r#"[[null,""],["a",null]]"#,
            expect![[r#"row 0, column 1 of the device matrix: "" is not a device name: it is empty"#]],
        ),
        (
            r#"[[null,"a"],[["a",""],null]]"#,
            expect![[r#"row 1, column 0 of the device matrix: "" is not a device name: it is empty"#]],
        ),
        (
            r#"[[null,"../x\n"],["a",null]]"#,
            expect![[
                r#"row 0, column 1 of the device matrix: "../x\n" is not a device name: it has a character other than letters, digits, '_', '.' and '-'"#
            ]],
        ),
        (
            long_name.as_str(),
            expect![[
                r#"row 0, column 1 of the device matrix: "nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn" is not a device name: it is longer than 64 bytes"#
            ]],
        ),
        (many_names.as_str(), expect!["row 0, column 1 of the device matrix: it has 17 device names, the limit is 16"]),
    ]);
}

#[test]
fn damaged_text_never_panics() {
    for position in 0..RING_OF_4.len() {
        let _ = DeviceMatrix::parse(&RING_OF_4[..position]);
        for byte in ["[", "]", ",", "\"", "0", "n", "\\", "\u{fffd}"] {
            let _ = DeviceMatrix::parse(&format!("{}{byte}{}", &RING_OF_4[..position], &RING_OF_4[position + 1..]));
        }
    }
    assert!(DeviceMatrix::parse(&"[".repeat(100_000)).is_err());
}

#[test]
fn serde_writes_and_reads_the_same_form() {
    let matrix = DeviceMatrix::parse(RING_OF_4).unwrap();
    let text = serde_json::to_string(&matrix).unwrap();
    assert_eq!(text, matrix.to_json());
    assert_eq!(serde_json::from_str::<DeviceMatrix>(&text).unwrap(), matrix);
    let error = serde_json::from_str::<DeviceMatrix>("[[null]").unwrap_err();
    assert!(error.is_eof(), "{error}");
    let error = serde_json::from_str::<DeviceMatrix>(r#"[["a"]]"#).unwrap_err().to_string();
    assert!(error.contains("a rank has no cable to itself"), "{error}");
}

/// (pairs that are wired of so many ranks, ranks that hold a model together, whether these are chains)
#[test]
fn chains_are_rings_with_one_cable_missing() {
    let wired = |world: usize, pairs: &[(usize, usize)]| {
        let is_wired = |i: usize, j: usize| pairs.contains(&(i, j)) || pairs.contains(&(j, i));
        let cell = |i: usize, j: usize| if is_wired(i, j) { vec!["rdma_en2".to_owned()] } else { Vec::new() };
        DeviceMatrix::new((0..world).map(|i| (0..world).map(|j| cell(i, j)).collect()).collect()).unwrap()
    };
    for (world, pairs, length, want) in [
        (4, &[(0, 1), (1, 2), (2, 3)][..], 4, true),
        (4, &[(0, 1), (1, 2), (2, 3), (3, 0)], 4, false),
        // More cables than a chain needs do no harm.
        (4, &[(0, 1), (1, 2), (2, 3), (0, 2)], 4, true),
        (3, &[(0, 1), (1, 2)], 3, true),
        // Two are each other's neighbours both ways.
        (2, &[(0, 1)], 2, false),
        // A gap in the middle, and a star.
        (4, &[(0, 1), (2, 3), (3, 0)], 4, false),
        (4, &[(0, 1), (0, 2), (0, 3)], 4, false),
        // Two models of three ranks, of which one could go round.
        (6, &[(0, 1), (1, 2), (2, 0), (3, 4), (4, 5)], 3, true),
        (6, &[(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)], 3, false),
        (6, &[(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], 4, false),
        (1, &[], 1, false),
        (3, &[(0, 1), (1, 2)], 0, false),
    ] {
        assert_eq!(wired(world, pairs).is_chain(length), want, "{pairs:?}, {length} of {world}");
    }
    // One way only.
    let there = DeviceMatrix::parse(r#"[[null,"a",null],[null,null,"a"],[null,"a",null]]"#).unwrap();
    assert!(!there.is_chain(3));
}
