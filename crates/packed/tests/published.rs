//! Directories that other programs packed (`scripts/make_packed_goldens.py`): every value has the bits
//! that the program itself decodes, or that its format's definition says.

use std::path::{Path, PathBuf};

use finetune_packed::PackedMatrix;
use finetune_packed::files::{PackedConfig, find};
use finetune_store::{TensorFile, TensorSet};
use serde_json::Value;

/// Cases with safetensors files. GGUF files are read by `finetune-model`.
const CASES: [&str; 17] = [
    "nf4",
    "nf4_double",
    "fp4",
    "int8",
    "mlx4",
    "mlx8",
    "mlx3",
    "mlx_mixed",
    "mxfp4",
    "fp8_blocks",
    "fp8_deepseek_v3",
    "int4_kimi_k2",
    "fp8_channels",
    "compressed_int4",
    "gptq",
    "gptq_act_order",
    "awq",
];

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/packed").join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).expect("a golden file")).expect("JSON")
}

/// The packed matrices of a case, by their names.
fn matrices(name: &str) -> Vec<(String, PackedMatrix)> {
    let directory = case(name);
    let path = directory.join("config.json");
    let object = json(&path).as_object().expect("an object").clone();
    let config = PackedConfig::parse(&object, &path).expect("a config of packed weights");
    assert!(config.is_packed(), "{name}");
    let files = TensorSet::open_model(&directory).expect("safetensors");
    let golden = json(&directory.join("golden.json"));
    let read = |(weight, about): (&String, &Value)| {
        let shape = [0, 1].map(|n| about["shape"][n].as_u64().expect("a length") as usize);
        let found = find(&files, &config, weight, shape).unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = found.unwrap_or_else(|| panic!("{name}: {weight} is not packed"));
        let matrix = found.read().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(found.memory(), matrix.bytes() as u64, "{name} {weight}: bytes by the headers");
        (weight.clone(), matrix)
    };
    golden["packed"].as_object().expect("matrices").iter().map(read).collect()
}

fn floats(file: &TensorFile, name: &str) -> Vec<f32> {
    let bytes = file.get(name).unwrap_or_else(|| panic!("{name} in the golden file")).bytes().expect("its bytes");
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// FNV-1a of 64 bits, as the script computes it.
fn fnv(values: &[f32]) -> String {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = values.iter().flat_map(|value| value.to_le_bytes()).fold(0xcbf2_9ce4_8422_2325, mix);
    format!("{hash:016x}")
}

#[test]
fn values_are_those_of_the_programs_that_packed_them() {
    for name in CASES {
        let golden = json(&case(name).join("golden.json"));
        let file = TensorFile::open(&case(name).join("golden.safetensors")).expect("golden.safetensors");
        for (weight, matrix) in matrices(name) {
            let [rows, columns] = matrix.shape;
            let all: Vec<f32> = (0..rows * columns).map(|n| matrix.value(n / columns, n % columns)).collect();
            let ends = [&all[..columns], &all[(rows - 1) * columns..]].concat();
            let want = floats(&file, &format!("ends.{weight}"));
            let other = ends.iter().zip(&want).position(|(got, want)| got.to_bits() != want.to_bits());
            let seen = other.map(|n| (n, ends[n], want[n]));
            assert_eq!(seen, None, "{name} {weight}: number of first and last row, found and decoded by the program");
            let hash = golden["packed"][&weight]["fnv"].as_str().expect("a hash");
            assert_eq!(fnv(&all), hash, "{name} {weight}: first and last row agree, others do not");
        }
    }
}

#[test]
fn rows_and_their_parts_decode_to_the_same_bits() {
    for name in CASES {
        for (weight, matrix) in matrices(name) {
            let [rows, columns] = matrix.shape;
            for row in 0..rows {
                for range in [0..columns, 1..columns, 7..columns - 3, 33..34, columns / 2..columns] {
                    let mut decoded = vec![f32::NAN; range.len()];
                    matrix.decode_row(row, range.clone(), &mut decoded);
                    let want: Vec<f32> = range.clone().map(|column| matrix.value(row, column)).collect();
                    assert!(bits(&decoded) == bits(&want), "{name} {weight}: row {row}, columns {range:?}");
                }
            }
        }
    }
}
