//! Packed weights in files, against what the programs that wrote them decode
//! (`scripts/make_packed_file_goldens.py` made the files).

use std::path::{Path, PathBuf};

use finetune_packed::files::{self, PackedConfig};
use finetune_store::{TensorFile, TensorSet, TensorView};
use serde_json::{Map, Value};

const FAMILIES: [&str; 9] = ["mlx", "bitsandbytes", "compressed", "fp8", "modelopt", "mxfp4", "gptq", "gptq_v2", "awq"];

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/files").join(family)
}

fn config(family: &str) -> PackedConfig {
    let path = golden(family).join("config.json");
    let text = std::fs::read_to_string(&path).expect("config.json");
    let keys: Map<String, Value> = serde_json::from_str(&text).expect("an object");
    PackedConfig::parse(&keys, &path).expect("the configuration of a golden")
}

fn floats(tensor: TensorView<'_>) -> Vec<f32> {
    let bytes = tensor.bytes().expect("the bytes of a golden");
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

#[test]
fn values_are_those_of_the_reference_bit_for_bit() {
    let mut weights = 0;
    for family in FAMILIES {
        let (set, config) = (TensorSet::open_model(&golden(family)).expect("a golden"), config(family));
        let expected = TensorFile::open(&golden(family).join("expected.safetensors")).expect("expected values");
        for name in expected.names() {
            let tensor = expected.get(name).expect("a tensor by its own name");
            let shape: [usize; 2] = tensor.shape.try_into().expect("a matrix");
            let packed = files::find(&set, &config, name, shape).unwrap_or_else(|error| panic!("{family}: {error}"));
            let packed = packed.unwrap_or_else(|| panic!("{family}: {name} was not found"));
            let matrix = packed.read().unwrap_or_else(|error| panic!("{family}: {error}"));
            assert_eq!(packed.memory(), matrix.bytes() as u64, "{family}: the memory of {name}");
            for (place, value) in floats(tensor).into_iter().enumerate() {
                let (row, column) = (place / shape[1], place % shape[1]);
                let own = matrix.value(row, column);
                assert!(
                    own.to_bits() == value.to_bits(),
                    "{family}: {name} ({}) at {row}, {column}: {own:e} instead of {value:e}",
                    packed.format()
                );
            }
            weights += 1;
        }
    }
    assert_eq!(weights, 67, "weights of goldens");
}

#[test]
fn configurations_are_named_in_words() {
    let cases = [
        ("mlx", Some("MLX 4-bit, groups of 64")),
        ("bitsandbytes", Some("bitsandbytes NF4, double quantization")),
        ("compressed", Some("compressed-tensors mixed-precision, 4-bit, groups of 32")),
        ("fp8", Some("FP8 E4M3, blocks of 128 x 128")),
        ("gptq", Some("GPTQ 4-bit, groups of 32, act-order")),
        ("awq", Some("AWQ 4-bit, groups of 32")),
    ];
    for (family, words) in cases {
        assert_eq!(config(family).describe().as_deref(), words);
        assert!(config(family).is_packed(), "{family}");
    }
    let nothing = PackedConfig::parse(&Map::new(), Path::new("config.json")).expect("no keys");
    assert_eq!((nothing.describe(), nothing.is_packed()), (None, false));
}

#[test]
fn formats_are_named_in_the_words_of_their_users() {
    let cases = [
        ("mlx", "affine_4_64_bf16.weight", [3, 192], "MLX 4-bit, groups of 64"),
        ("mlx", "nvfp4_4_16_f16.weight", [3, 160], "NVFP4, groups of 16"),
        ("bitsandbytes", "nf4_24x128_double_bfloat16.weight", [24, 128], "bitsandbytes NF4, double quantization"),
        ("bitsandbytes", "fp4_3x64_float32.weight", [3, 64], "bitsandbytes FP4, blocks of 128"),
        ("bitsandbytes", "int8_3x64.weight", [3, 64], "bitsandbytes int8"),
        ("compressed", "int4_group32.weight", [48, 128], "compressed-tensors 4-bit, groups of 32"),
        ("compressed", "int4_order.weight", [8, 64], "compressed-tensors 4-bit, groups of 32, act-order"),
        ("compressed", "int8_asym.weight", [6, 40], "compressed-tensors 8-bit, a scale a row"),
        ("compressed", "float_tensor.weight", [3, 64], "FP8 E4M3, one scale"),
        ("fp8", "blocks.weight", [129, 132], "FP8 E4M3, blocks of 128 x 128"),
        ("mxfp4", "blocks", [6, 96], "MXFP4, groups of 32"),
        ("gptq", "b3_32x32_order.weight", [32, 32], "GPTQ 3-bit, groups of 16, act-order"),
        ("gptq", "b4_48x96.weight", [48, 96], "GPTQ 4-bit, groups of 32"),
        ("awq", "gemm_48x96.weight", [48, 96], "AWQ 4-bit, groups of 32"),
    ];
    for (family, name, shape, words) in cases {
        let set = TensorSet::open_model(&golden(family)).expect("a golden");
        let found = files::find(&set, &config(family), name, shape).expect(name).expect(name);
        assert_eq!(found.format().to_string(), words, "{family}: {name}");
    }
}

#[test]
fn plain_weights_and_absent_ones_are_no_packed_ones() {
    for family in ["mlx", "bitsandbytes", "compressed"] {
        let set = TensorSet::open_model(&golden(family)).expect("a golden");
        for name in ["kept.weight", "absent.weight"] {
            assert!(files::find(&set, &config(family), name, [3, 32]).expect(name).is_none(), "{family}: {name}");
        }
    }
}

#[test]
fn all_tensors_of_a_weight_are_its_parts() {
    for family in FAMILIES {
        let (set, config) = (TensorSet::open_model(&golden(family)).expect("a golden"), config(family));
        let expected = TensorFile::open(&golden(family).join("expected.safetensors")).expect("expected values");
        let mut parts = vec!["kept.weight".to_owned()];
        for name in expected.names() {
            let shape: [usize; 2] = expected.get(name).expect(name).shape.try_into().expect("a matrix");
            let found = files::find(&set, &config, name, shape).expect(name).expect(name);
            parts.extend(found.parts().into_iter().map(str::to_owned));
        }
        for name in set.names() {
            assert!(parts.iter().any(|part| part == name), "{family}: {name} is no part of a weight");
        }
    }
}
