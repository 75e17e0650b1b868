//! Blocks of GGUF files against gguf-py (`scripts/make_gguf_blocks_golden.py`).

use std::path::PathBuf;

use finetune_packed::files::mxfp4_blocks;
use finetune_packed::gguf::{BlockType, from_blocks, to_mxfp4_blocks};
use finetune_store::TensorFile;

const TYPES: [(&str, BlockType); 11] = [
    ("Q4_0", BlockType::Q4_0),
    ("Q4_1", BlockType::Q4_1),
    ("Q5_0", BlockType::Q5_0),
    ("Q5_1", BlockType::Q5_1),
    ("Q8_0", BlockType::Q8_0),
    ("Q2_K", BlockType::Q2K),
    ("Q3_K", BlockType::Q3K),
    ("Q4_K", BlockType::Q4K),
    ("Q5_K", BlockType::Q5K),
    ("Q6_K", BlockType::Q6K),
    ("MXFP4", BlockType::Mxfp4),
];

fn golden() -> TensorFile {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/gguf/blocks.safetensors");
    TensorFile::open(&path).expect("blocks of gguf-py")
}

/// The shape, the blocks and the values of a type.
fn of(golden: &TensorFile, name: &str) -> ([usize; 2], Vec<u8>, Vec<f32>) {
    let view = golden.get(&format!("{name}.values")).expect("values");
    let values = view.bytes().expect("bytes");
    let values = values.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    let blocks = golden.get(&format!("{name}.blocks")).expect("blocks").bytes().expect("bytes");
    ([view.shape[0], view.shape[1]], blocks, values)
}

#[test]
fn values_are_those_of_gguf_py_bit_for_bit() {
    let golden = golden();
    for (name, kind) in TYPES {
        let (shape, blocks, values) = of(&golden, name);
        let matrix = from_blocks(kind, shape, &blocks).expect(name);
        // Sixteen values of a table come to those of MXFP4, whatever the shape.
        let table = if kind == BlockType::Mxfp4 { 64 } else { 0 };
        assert_eq!(matrix.bytes(), kind.packed_bytes(shape) + table, "{name}");
        let places = (0..shape[0]).flat_map(|row| (0..shape[1]).map(move |column| (row, column)));
        for ((row, column), value) in places.zip(&values) {
            let found = matrix.value(row, column);
            // gguf-py's zeros have no sign in MXFP4.
            let is_zero = kind == BlockType::Mxfp4 && found == 0.0 && *value == 0.0;
            let is_same = found.to_bits() == value.to_bits() || is_zero;
            assert!(is_same, "{name} [{row}, {column}]: {found:e} for {value:e}");
        }
    }
}

/// Of all types MXFP4 alone becomes blocks of ggml's again, and these are the same bytes.
#[test]
fn blocks_in_mxfp4_go_there_and_back() {
    let golden = golden();
    for (name, kind) in TYPES {
        let (shape, blocks, _) = of(&golden, name);
        let again = to_mxfp4_blocks(&from_blocks(kind, shape, &blocks).expect(name));
        assert_eq!(again, (kind == BlockType::Mxfp4).then_some(blocks), "{name}");
    }
}

/// gpt-oss's file has neighbours in a byte, ggml the codes that are 16 apart.
#[test]
fn codes_of_gpt_oss_in_the_order_of_ggml() {
    // The codes 0 to 15, then 15 to 0; another block with the number of its byte in both halves.
    let rising = (0..8).map(|n| 2 * n | (2 * n + 1) << 4);
    let falling = (0..8).map(|n| (15 - 2 * n) | (14 - 2 * n) << 4);
    let codes: Vec<u8> = rising.chain(falling).chain((0..16).map(|n| n * 17)).collect();
    let matrix = mxfp4_blocks(codes, vec![127, 3], [2, 32]).expect("a matrix");
    let blocks = to_mxfp4_blocks(&matrix).expect("blocks");
    let first: Vec<u8> = (0..16).map(|n| n | (15 - n) << 4).collect();
    let second: Vec<u8> = (0..16).map(|n| n / 2 | (8 + n / 2) << 4).collect();
    assert_eq!(blocks, [vec![127], first, vec![3], second].concat());
    let again = from_blocks(BlockType::Mxfp4, [2, 32], &blocks).expect("the same matrix");
    let values = |matrix: &finetune_packed::PackedMatrix| -> Vec<f32> {
        (0..64).map(|place| matrix.value(place / 32, place % 32)).collect()
    };
    assert_eq!(values(&again), values(&matrix));
}

/// Bits an element in memory: those of the file, up to the factors of 6 bits that take a byte here.
#[test]
fn nothing_grows_much_in_memory() {
    for (name, kind) in TYPES {
        let [of_file, here] = [kind.bytes(), kind.packed_bytes([1, kind.elements()])];
        let more = (here as f64 - of_file as f64) * 8.0 / kind.elements() as f64;
        assert!((0.0..=0.5).contains(&more), "{name}: {more} bits an element more than the file's");
    }
}

#[test]
fn wrong_sizes_and_scales_are_refused() {
    let golden = golden();
    for (name, kind) in TYPES {
        let ([rows, columns], blocks, _) = of(&golden, name);
        for (shape, bytes) in [
            ([rows, columns - 16], &blocks[..]),
            ([rows + 1, columns], &blocks[..]),
            ([rows, columns], &blocks[1..]),
            ([usize::MAX, columns], &blocks[..]),
        ] {
            assert!(from_blocks(kind, shape, bytes).is_err(), "{name} {shape:?}");
        }
        if kind == BlockType::Mxfp4 {
            let mut damaged = blocks.clone();
            damaged[columns / 32 * 17] = 0xff;
            let error = from_blocks(kind, [rows, columns], &damaged).expect_err(name).to_string();
            assert!(error.ends_with(&format!("scale {} is NaN", columns / 32)), "{name}: {error}");
            continue;
        }
        for (number, shown) in [([0x00, 0x7c], "inf"), ([0x00, 0xfc], "-inf"), ([0x01, 0x7e], "NaN")] {
            let mut damaged = blocks.clone();
            let place = match kind {
                BlockType::Q2K => 80,
                BlockType::Q3K => 108,
                BlockType::Q6K => 208,
                _ => 0,
            };
            // The first block of the second row.
            let place = columns / kind.elements() * kind.bytes() + place;
            damaged[place..place + 2].copy_from_slice(&number);
            let error = from_blocks(kind, [rows, columns], &damaged).expect_err(name).to_string();
            assert!(error.ends_with(&format!("the scale of block 0 of row 1 is {shown}")), "{name}: {error}");
        }
    }
}
