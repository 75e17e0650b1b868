//! Packed weights whose tensors or configuration do not add up. Each is refused by name.

use std::path::Path;

use finetune_advice::Advice;
use finetune_store::Dtype;

use crate::made::Change::{Cast, Config};
use crate::made::{Change, Files};

/// What is done to the files, and words of the error.
pub(crate) type Damage = (&'static [Change], &'static str);

pub(crate) const NAN: &[u8] = &f32::NAN.to_le_bytes();
pub(crate) const INFINITE: &[u8] = &f32::INFINITY.to_le_bytes();
pub(crate) const MINUS_ONE: &[u8] = &(-1.0f32).to_le_bytes();
/// Of F16.
pub(crate) const NAN_16: &[u8] = &[0x00, 0x7e];

/// Weights of all families, and how an error of another shape names them.
const WEIGHTS: [(&str, &str, [usize; 2], &str); 10] = [
    ("mlx", "affine_4_32_f32.weight", [3, 160], "affine_4_32_f32.weight"),
    ("bitsandbytes", "nf4_24x128_double_bfloat16.weight", [24, 128], "nf4_24x128_double_bfloat16.weight"),
    ("bitsandbytes", "int8_3x64.weight", [3, 64], "int8_3x64.weight"),
    ("compressed", "int4_group32.weight", [48, 128], "int4_group32.weight"),
    ("compressed", "bytes_channel.weight", [6, 40], "bytes_channel.weight"),
    ("fp8", "blocks.weight", [129, 132], "blocks.weight"),
    ("modelopt", "nvfp4.weight", [5, 48], "nvfp4.weight"),
    ("mxfp4", "blocks", [6, 96], "blocks"),
    ("gptq", "b4_48x96.weight", [48, 96], "b4_48x96."),
    ("awq", "gemm_48x96.weight", [48, 96], "gemm_48x96."),
];

fn files(family: &str) -> Files {
    Files::of(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/files").join(family))
}

#[track_caller]
pub(crate) fn refused(family: &str, weight: &str, shape: [usize; 2], cases: &[Damage]) {
    assert!(files(family).read(weight, shape).expect("the golden itself").is_some(), "{weight} is packed");
    for (changes, words) in cases {
        let mut files = files(family);
        changes.iter().for_each(|change| files.change(*change));
        let error = files.error(weight, shape);
        let message = error.to_string();
        assert!(message.contains(words), "{changes:?}:\n  {message}\nhas no\n  {words}");
        assert!(message.len() < 700 && !message.chars().any(char::is_control), "{message}");
        assert!(!error.hints().is_empty(), "{message}");
    }
}

#[test]
fn matrices_of_other_shapes_than_the_model_has() {
    for (family, weight, [rows, columns], named) in WEIGHTS {
        let huge = usize::MAX / 8;
        for shape in
            [[columns, rows], [rows - 1, columns], [rows, columns + 32], [rows, columns / 2], [rows, 0], [huge, 64]]
        {
            let message = files(family).error(weight, shape).to_string();
            assert!(message.contains(named), "{weight} as {shape:?}: {message}");
        }
    }
}

#[test]
fn no_dtype_and_shape_of_a_tensor_ends_in_a_panic() {
    let dtypes = [Dtype::U8, Dtype::I8, Dtype::F8_E4M3, Dtype::F8_E8M0, Dtype::F16, Dtype::I32, Dtype::U32, Dtype::F32];
    let (mut refused, mut read) = (0, 0);
    for (family, weight, shape, ..) in WEIGHTS {
        let golden = files(family);
        let stem = weight.strip_suffix(".weight").unwrap_or(weight);
        let is_part = |name: &str| {
            name.strip_prefix(stem).is_some_and(|end| end.starts_with('.') || end == "_blocks" || end == "_scales")
        };
        for (name, _, lengths) in golden.tensors().into_iter().filter(|(name, ..)| is_part(name)) {
            let mut shapes = vec![vec![], vec![0], vec![1], vec![0, 0], lengths.iter().rev().copied().collect()];
            for place in 0..lengths.len() {
                for length in [0, 1, lengths[place] / 2, lengths[place] + 1, lengths[place] * 2] {
                    let mut other = lengths.clone();
                    other[place] = length;
                    shapes.push(other);
                }
            }
            shapes.push(lengths);
            for (dtype, lengths) in dtypes.iter().flat_map(|dtype| shapes.iter().map(move |lengths| (dtype, lengths))) {
                let mut changed = files(family);
                changed.cast(&name, *dtype, lengths, 0x5a);
                match changed.read(weight, shape) {
                    Ok(found) => read += usize::from(found.is_some()),
                    Err(_) => refused += 1,
                }
            }
        }
    }
    assert!(read > 30 && refused > 20 * read, "{refused} refused, {read} read");
}

#[test]
fn formats_that_are_not_read_are_named() {
    let methods = [
        ("hqq", "HQQ"),
        ("eetq", "EETQ"),
        ("quanto", "Quanto"),
        ("torchao", "torchao"),
        ("aqlm", "AQLM"),
        ("vptq", "VPTQ"),
        ("bitnet", "BitNet"),
        ("exl2", "EXL2"),
        ("spqr", "SpQR"),
        ("fbgemm_fp8", "FBGEMM FP8"),
        ("marlin", "Marlin"),
        ("a\u{1b}[31m new one", "the quantization method \"a[31m new one\""),
    ];
    for (method, words) in methods {
        let mut changed = files("fp8");
        let method = serde_json::json!({"quantization_config": {"quant_method": method}}).to_string();
        changed.change(Config(method.leak()));
        let error = changed.error("blocks.weight", [129, 132]);
        assert!(error.to_string().ends_with(&format!("blocks.weight: {words} is not read")), "{error}");
        assert!(error.hints()[0].contains("model.quantization"), "{:?}", error.hints());
        // A plain weight is used whatever the configuration says.
        assert!(changed.read("absent.weight", [129, 132]).expect("nothing there").is_none());
    }
    let tensors = [
        ("new.W_q", "new.W_q: HQQ is not read"),
        ("new.q_weight", "new.q_weight: EXL2 is not read"),
        ("new.codebooks", "new.codebooks: AQLM is not read"),
        ("new.dense_weights", "new.dense_weights: SpQR is not read"),
        ("new.weight._data", "new.weight._data: Quanto is not read"),
        ("new.weight_scales", "new.weight_scales: EETQ is not read"),
        ("new.B", "new.B: Marlin is not read"),
    ];
    for (tensor, words) in tensors {
        let mut changed = files("fp8");
        changed.change(Cast(tensor, Dtype::U8, &[4]));
        assert!(changed.error("new.weight", [2, 2]).to_string().ends_with(words), "{tensor}");
    }
}

#[test]
fn configurations_of_the_wrong_types() {
    let cases = [
        (r#"{"quantization": 4}"#, "config.json: `quantization`: it is no object"),
        (r#"{"quantization": {"bits": "four"}}"#, "`quantization.bits`: it is no whole number from 1 on"),
        (
            r#"{"quantization": {"bits": 4, "a": {"group_size": -1}}}"#,
            "`quantization.group_size`: it is no whole number",
        ),
        (r#"{"quantization_config": []}"#, "`quantization_config`: it is no object"),
        (r#"{"quantization_config": {"quant_method": 8}}"#, "`quantization_config.quant_method`: it is no text"),
        (
            r#"{"quantization_config": {"quant_method": "gptq", "bits": 0}}"#,
            "`quantization_config.bits`: it is no whole number",
        ),
        (
            r#"{"quantization_config": {"quant_method": "gptq", "desc_act": 1}}"#,
            "`quantization_config.desc_act`: it is no `true` or `false`",
        ),
        (
            r#"{"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}"#,
            "`quantization_config.weight_block_size`: it is no pair of whole numbers from 1 on",
        ),
        (
            r#"{"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": 1}}}"#,
            "`config_groups.group_0`: it is no object",
        ),
    ];
    for (text, words) in cases {
        let mut changed = files("fp8");
        changed.change(Config(text));
        let message = changed.error("blocks.weight", [129, 132]).to_string();
        assert!(message.contains(words), "{text}:\n  {message}\nhas no\n  {words}");
    }
}

#[test]
fn weights_that_the_configuration_passes_over_are_read_as_they_lie() {
    let cases = [
        (
            "mlx",
            "affine_4_32_f32",
            [3, 160],
            r#"{"quantization": {"bits": 4, "group_size": 64, "affine_4_32_f32": false}}"#,
        ),
        ("mlx", "affine_4_32_f32", [3, 160], r#"{"quantization": {"bits": 8, "group_size": 32}}"#),
        ("mlx", "affine_4_32_f32", [3, 160], "{}"),
        ("bitsandbytes", "int8_3x64", [3, 64], "{}"),
        ("fp8", "blocks", [129, 132], r#"{"quantization_config": null}"#),
    ];
    for (family, module, shape, text) in cases {
        let mut changed = files(family);
        changed.change(Config(text));
        assert!(changed.read(&format!("{module}.weight"), shape).expect(module).is_some(), "{module} with {text}");
    }
}
