//! Packed weights whose tensors or configuration do not add up. Each is refused by name.

use std::path::Path;

use finetune_advice::Advice;
use finetune_store::Dtype;

use crate::made::Change::{Bytes, Cast, Config, Remove, Text};
use crate::made::{Change, Files};

/// What is done to the files, and words of the error.
type Damage = (&'static [Change], &'static str);

const NAN: &[u8] = &f32::NAN.to_le_bytes();
const INFINITE: &[u8] = &f32::INFINITY.to_le_bytes();
const MINUS_ONE: &[u8] = &(-1.0f32).to_le_bytes();
/// Of F16.
const NAN_16: &[u8] = &[0x00, 0x7e];

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
fn refused(family: &str, weight: &str, shape: [usize; 2], cases: &[Damage]) {
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
fn mlx() {
    refused(
        "mlx",
        "affine_4_32_f32.weight",
        [3, 160],
        &[
            (
                &[Remove("affine_4_32_f32.scales")],
                "affine_4_32_f32.weight: its part `affine_4_32_f32.scales` is missing",
            ),
            (&[Remove("affine_4_32_f32.biases")], "its part `affine_4_32_f32.biases` is missing"),
            (&[Remove("affine_4_32_f32.weight")], "its part `affine_4_32_f32.weight` is missing"),
            (
                &[Cast("affine_4_32_f32.weight", Dtype::I32, &[3, 20])],
                "affine_4_32_f32.weight: it is I32, and U32 is needed",
            ),
            (
                &[Cast("affine_4_32_f32.weight", Dtype::U32, &[3, 19])],
                "it has shape [3, 19], which packs no matrix of 3 x 160",
            ),
            (
                &[Cast("affine_4_32_f32.weight", Dtype::F32, &[3, 160])],
                "it is there twice: as it is, and packed with `affine_4_32_f32.biases`",
            ),
            (
                &[Cast("affine_4_32_f32.scales", Dtype::F64, &[3, 5])],
                "affine_4_32_f32.scales: it is F64, and F32 or F16 or BF16 is needed",
            ),
            (&[Cast("affine_4_32_f32.scales", Dtype::F32, &[3, 0])], "it has 0 groups a row"),
            (
                &[Cast("affine_4_32_f32.scales", Dtype::F32, &[3, 3])],
                "it has 3 groups a row, which do not divide the 160 columns",
            ),
            (&[Cast("affine_4_32_f32.scales", Dtype::F32, &[9])], "it has shape [9], and two dimensions are needed"),
            (
                &[Cast("affine_4_32_f32.biases", Dtype::F32, &[3, 2])],
                "affine_4_32_f32.biases: it has shape [3, 2], and [3, 5] is needed",
            ),
            (
                &[
                    Cast("affine_4_32_f32.scales", Dtype::F32, &[3, 1]),
                    Cast("affine_4_32_f32.biases", Dtype::F32, &[3, 1]),
                ],
                "its tensors have 4 bits and groups of 160, and MLX has",
            ),
            (&[Cast("affine_4_32_f32.weight", Dtype::U32, &[3, 35])], "its tensors have 7 bits and groups of 32"),
            (&[Bytes("affine_4_32_f32.scales", 4, NAN)], "affine_4_32_f32.scales: number 1 is NaN"),
            (&[Bytes("affine_4_32_f32.biases", 8, INFINITE)], "affine_4_32_f32.biases: number 2 is inf"),
            (
                &[Cast("affine_4_32_f32.scales", Dtype::U8, &[3, 5])],
                "`affine_4_32_f32.scales` is U8, and such scales have no biases",
            ),
            (&[Cast("affine_4_32_f32.qweight", Dtype::I32, &[1])], "it is packed in two formats"),
            (
                &[Config(
                    r#"{"quantization": {"bits": 4, "group_size": 64, "affine_4_32_f32": {"bits": 8, "group_size": 64}}}"#,
                )],
                "its tensors have 4 bits and groups of 32, mode affine, and config.json says of it 8 bits and groups of 64, mode affine",
            ),
        ],
    );
    refused(
        "mlx",
        "mxfp4_4_32_f32.weight",
        [3, 160],
        &[
            (&[Cast("mxfp4_4_32_f32.scales", Dtype::U8, &[3, 2])], "no mode of MLX has 4 bits and groups of 80"),
            (&[Bytes("mxfp4_4_32_f32.scales", 7, &[255])], "mxfp4_4_32_f32.scales: number 7 is NaN"),
            (
                &[Cast("mxfp4_4_32_f32.global_scale", Dtype::F32, &[])],
                "MLX NVFP4 with a scale of the whole tensor is not read",
            ),
        ],
    );
    refused(
        "mlx",
        "mxfp8_8_32_bf16.weight",
        [3, 160],
        &[(&[Bytes("mxfp8_8_32_bf16.weight", 70, &[0xff])], "mxfp8_8_32_bf16.weight: element 70 is NaN")],
    );
}

#[test]
fn bitsandbytes_with_four_bits() {
    const STATE: &str = "nf4_24x128_double_bfloat16.weight.quant_state.bitsandbytes__nf4";
    refused(
        "bitsandbytes",
        "nf4_24x128_double_bfloat16.weight",
        [24, 128],
        &[
            (&[Remove(STATE)], "its part `nf4_24x128_double_bfloat16.weight.quant_state.bitsandbytes__nf4` is missing"),
            (&[Remove("nf4_24x128_double_bfloat16.weight")], "its part `nf4_24x128_double_bfloat16.weight` is missing"),
            (&[Remove("nf4_24x128_double_bfloat16.weight.absmax")], "double_bfloat16.weight.absmax` is missing"),
            (&[Remove("nf4_24x128_double_bfloat16.weight.quant_map")], "double_bfloat16.weight.quant_map` is missing"),
            (&[Remove("nf4_24x128_double_bfloat16.weight.nested_absmax")], "weight.nested_absmax` is missing"),
            (&[Remove("nf4_24x128_double_bfloat16.weight.nested_quant_map")], "weight.nested_quant_map` is missing"),
            (&[Cast(STATE, Dtype::U8, &[90])], "it is no JSON object: EOF while parsing"),
            (&[Cast(STATE, Dtype::U8, &[5000])], "it has 5000 bytes, more than 4096"),
            (&[Cast(STATE, Dtype::I8, &[100])], "it is I8, and U8 is needed"),
            (&[Text(STATE, "\"nf4\"", "\"fp4\"")], "its quant_type is \"fp4\""),
            (&[Text(STATE, "[24, 128]", "[128, 24]")], "its shape is [128,24], and [24, 128] is needed"),
            (&[Text(STATE, "[24, 128]", "[24, 1e400]")], "it is no JSON object"),
            (&[Text(STATE, "\"blocksize\": 64", "\"blocksize\": 48")], "its blocksize is 48"),
            (
                &[Text(STATE, "\"blocksize\": 64", "\"blocksize\": -64")],
                "its blocksize is -64, and a whole number from 1 on is needed",
            ),
            (
                &[Text(STATE, "\"blocksize\": 64", "\"blocksize\": 128")],
                "weight.absmax: it has 48 elements, and 24 are needed",
            ),
            (
                &[Text(STATE, "\"bfloat16\"", "\"float8\"")],
                "its dtype is \"float8\", and `float32`, `float16` or `bfloat16` is needed",
            ),
            (&[Text(STATE, "\"nested_blocksize\": 256", "\"nested_blocksize\": 255")], "its nested_blocksize is 255"),
            (
                &[Text(STATE, "\"nested_blocksize\": 256", "\"nested_blocksize\": 16")],
                "nested_absmax: it has 1 elements, and 3 are needed",
            ),
            (&[Text(STATE, "\"float32\"", "\"float16\"")], "its nested_dtype is \"float16\", and `float32` is needed"),
            (
                &[Text(STATE, "\"nested_offset\": ", "\"nested_offset\": 1e300, \"was\": ")],
                "its nested_offset is 1e+300, and a number of f32 is needed",
            ),
            (&[Text(STATE, "\"nested_offset\": ", "\"nested_offset\": null, \"was\": ")], "its nested_offset is null"),
            (
                &[Cast("nf4_24x128_double_bfloat16.weight", Dtype::U8, &[1535, 1])],
                "it has 1535 bytes, and 24 x 128 codes of 4 bits take 1536",
            ),
            (&[Cast("nf4_24x128_double_bfloat16.weight", Dtype::BF16, &[24, 128])], "it is there twice"),
            (
                &[Cast("nf4_24x128_double_bfloat16.weight.quant_map", Dtype::F32, &[15])],
                "quant_map: it has 15 elements, and 16 are needed",
            ),
            (
                &[Cast("nf4_24x128_double_bfloat16.weight.quant_map", Dtype::F16, &[16])],
                "quant_map: it is F16, and F32 is needed",
            ),
            (
                &[Cast("nf4_24x128_double_bfloat16.weight.nested_quant_map", Dtype::F32, &[255])],
                "it has 255 elements, and 256 are needed",
            ),
            (
                &[Cast("nf4_24x128_double_bfloat16.weight.absmax", Dtype::F32, &[48])],
                "weight.absmax: it is F32, and U8 is needed",
            ),
            (&[Bytes("nf4_24x128_double_bfloat16.weight.quant_map", 60, NAN)], "weight.quant_map: number 15 is NaN"),
            (
                &[Bytes("nf4_24x128_double_bfloat16.weight.nested_absmax", 0, INFINITE)],
                "weight.nested_absmax: number 0 is inf",
            ),
            (
                &[Cast("nf4_24x128_double_bfloat16.weight.quant_state.bitsandbytes__fp4", Dtype::U8, &[2])],
                "bitsandbytes__fp4` is there too",
            ),
        ],
    );
    refused(
        "bitsandbytes",
        "nf4_24x176_bfloat16.weight",
        [24, 176],
        &[
            (&[Bytes("nf4_24x176_bfloat16.weight.absmax", 4, MINUS_ONE)], "weight.absmax: number 1 is -1, below 0"),
            (&[Bytes("nf4_24x176_bfloat16.weight.absmax", 4, NAN)], "weight.absmax: number 1 is NaN"),
            (
                &[Cast("nf4_24x176_bfloat16.weight.absmax", Dtype::F32, &[65])],
                "weight.absmax: it has 65 elements, and 66 are needed",
            ),
        ],
    );
}

#[test]
fn bitsandbytes_int8() {
    refused(
        "bitsandbytes",
        "int8_12x176.weight",
        [12, 176],
        &[
            (&[Remove("int8_12x176.SCB")], "its part `int8_12x176.SCB` is missing"),
            (&[Cast("int8_12x176.SCB", Dtype::F32, &[11])], "int8_12x176.SCB: it has 11 elements, and 12 are needed"),
            (&[Cast("int8_12x176.weight", Dtype::U8, &[12, 176])], "int8_12x176.weight: it is U8, and I8 is needed"),
            (&[Cast("int8_12x176.weight", Dtype::F16, &[12, 176])], "it is there twice"),
            (&[Bytes("int8_12x176.SCB", 4, NAN)], "int8_12x176.SCB: number 1 is NaN"),
            (&[Bytes("int8_12x176.SCB", 4, MINUS_ONE)], "int8_12x176.SCB: number 1 is -1, below 0"),
            (
                &[Bytes("int8_12x176.weight_format", 0, &[2])],
                "weight_format: bitsandbytes int8 in the order 2 of a CUDA card is not read",
            ),
            (
                &[Cast("int8_12x176.weight_format", Dtype::U8, &[2])],
                "weight_format: it has 2 elements, and 1 are needed",
            ),
        ],
    );
    refused(
        "bitsandbytes",
        "int8_12x176.weight",
        [12, 176],
        &[(
            &[Remove("int8_12x176.SCB"), Remove("int8_12x176.weight_format")],
            "it is I8, and no tensor beside it says what its codes mean",
        )],
    );
}

#[test]
fn compressed_tensors() {
    refused(
        "compressed",
        "int4_asym.weight",
        [13, 64],
        &[
            (&[Remove("int4_asym.weight_packed")], "its part `int4_asym.weight_packed` is missing"),
            (&[Remove("int4_asym.weight_scale")], "its part `int4_asym.weight_scale` is missing"),
            (&[Remove("int4_asym.weight_shape")], "its part `int4_asym.weight_shape` is missing"),
            (
                &[Bytes("int4_asym.weight_shape", 0, &[12])],
                "int4_asym.weight_shape: it says [12, 64], and the model has [13, 64]",
            ),
            (&[Bytes("int4_asym.weight_shape", 7, &[255])], "int4_asym.weight_shape: it says [-"),
            (&[Cast("int4_asym.weight_shape", Dtype::I64, &[3])], "it has 3 elements, and 2 are needed"),
            (
                &[Cast("int4_asym.weight_packed", Dtype::I32, &[13, 7])],
                "it has shape [13, 7], and 13 x 64 codes of 4 or 8 bits have [13, 8] or [13, 16]",
            ),
            (
                &[Cast("int4_asym.weight_packed", Dtype::I64, &[13, 4])],
                "int4_asym.weight_packed: it is I64, and I32 is needed",
            ),
            (
                &[Cast("int4_asym.weight_scale", Dtype::BF16, &[13, 5])],
                "it has shape [13, 5], and a matrix of 13 x 64 has scales of shape",
            ),
            (
                &[Cast("int4_asym.weight_zero_point", Dtype::I32, &[13, 4])],
                "int4_asym.weight_zero_point: it has shape [13, 4], and [2, 4] is needed",
            ),
            (
                &[Cast("int4_asym.weight_zero_point", Dtype::I64, &[2, 4])],
                "int4_asym.weight_zero_point: it is I64, and I32 or I8 is needed",
            ),
            (
                &[
                    Cast("int4_asym.weight_zero_point", Dtype::I8, &[13, 4]),
                    Bytes("int4_asym.weight_zero_point", 0, &[8]),
                ],
                "int4_asym.weight_zero_point: number 0 is 8, outside -8 to 7",
            ),
            (&[Bytes("int4_asym.weight_scale", 0, &[0xc0, 0x7f])], "int4_asym.weight_scale: number 0 is NaN"),
            (&[Cast("int4_asym.weight", Dtype::BF16, &[13, 64])], "it is there twice"),
            (
                &[Cast("int4_asym.weight_g_idx", Dtype::I32, &[64])],
                "int4_asym.weight_g_idx: all columns are in group 0, and there are 4 groups",
            ),
            (
                &[Config(
                    r#"{"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 128}}}}}"#,
                )],
                "its tensors have 4 bits and groups of 16, and config.json says 4 bits in groups of 128",
            ),
            (
                &[Config(
                    r#"{"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}}"#,
                )],
                "and config.json says 8 bits",
            ),
        ],
    );
    refused(
        "compressed",
        "int4_order.weight",
        [8, 64],
        &[
            (
                &[Bytes("int4_order.weight_g_idx", 4, &[2])],
                "int4_order.weight_g_idx: column 1 is in group 2, and there are 2",
            ),
            (&[Bytes("int4_order.weight_g_idx", 4, &[255, 255, 255, 255])], "column 1 is in group -1, and there are 2"),
            (&[Cast("int4_order.weight_g_idx", Dtype::I32, &[63])], "it has shape [63], and [64] is needed"),
        ],
    );
    refused(
        "compressed",
        "bytes_asym.weight",
        [6, 64],
        &[
            (&[Remove("bytes_asym.weight_scale")], "its part `bytes_asym.weight_scale` is missing"),
            (
                &[Cast("bytes_asym.weight_zero_point", Dtype::I32, &[6, 2])],
                "bytes_asym.weight_zero_point: it is I32, and I8 is needed",
            ),
            (&[Cast("bytes_asym.weight_zero_point", Dtype::I8, &[6, 1])], "it has 6 elements, and 12 are needed"),
        ],
    );
    refused(
        "compressed",
        "nvfp4.weight",
        [6, 48],
        &[
            (&[Remove("nvfp4.weight_global_scale")], "its part `nvfp4.weight_global_scale` is missing"),
            (&[Bytes("nvfp4.weight_global_scale", 0, &[0; 4])], "nvfp4.weight_global_scale: it is 0"),
            (&[Bytes("nvfp4.weight_global_scale", 0, NAN)], "nvfp4.weight_global_scale: number 0 is NaN"),
            (&[Bytes("nvfp4.weight_scale", 0, &[0x7f])], "nvfp4.weight_scale: number 0 is NaN"),
            (&[Bytes("nvfp4.weight_global_scale", 0, &[1, 0, 0, 0])], "nvfp4.weight_scale: number 0 is inf"),
            (
                &[Cast("nvfp4.weight_zero_point", Dtype::I8, &[6, 3])],
                "codes that are floats, which have no zero points",
            ),
        ],
    );
}

#[test]
fn fp8() {
    refused(
        "fp8",
        "blocks.weight",
        [129, 132],
        &[
            (&[Remove("blocks.weight_scale_inv")], "its part `blocks.weight_scale` is missing"),
            (
                &[Cast("blocks.weight_scale", Dtype::F32, &[2, 2])],
                "blocks.weight_scale_inv: `blocks.weight_scale` is there too",
            ),
            (
                &[Cast("blocks.weight_scale_inv", Dtype::F32, &[2, 3])],
                "it has shape [2, 3], and a matrix of 129 x 132 has scales of shape",
            ),
            (&[Cast("blocks.weight_scale_inv", Dtype::F32, &[2, 2, 1])], "in blocks of 128 x 128, [2, 2]"),
            (&[Cast("blocks.weight_scale_inv", Dtype::I32, &[2, 2])], "blocks.weight_scale_inv: it is I32, and F32"),
            (
                &[Cast("blocks.weight", Dtype::F8_E5M2, &[129, 132])],
                "blocks.weight: it is F8_E5M2, and F8_E4M3 or I8 is needed",
            ),
            (
                &[Cast("blocks.weight_zero_point", Dtype::I8, &[2, 2])],
                "codes that are floats, which have no zero points",
            ),
            (&[Bytes("blocks.weight", 200, &[0x7f])], "blocks.weight: element 200 is NaN"),
            (&[Bytes("blocks.weight_scale_inv", 12, NAN)], "blocks.weight_scale_inv: number 3 is NaN"),
            (
                &[Config(r#"{"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}"#)],
                "in blocks of 64 x 64, [3, 3]",
            ),
        ],
    );
    refused(
        "modelopt",
        "nvfp4.weight",
        [5, 48],
        &[
            (&[Remove("nvfp4.weight_scale")], "its part `nvfp4.weight_scale` is missing"),
            (&[Cast("nvfp4.weight_scale", Dtype::U8, &[5, 3])], "nvfp4.weight_scale: it is U8, and F8_E4M3 is needed"),
            (&[Cast("nvfp4.weight_scale_2", Dtype::F32, &[5])], "it has 5 elements, and 1 are needed"),
        ],
    );
    refused(
        "mxfp4",
        "blocks",
        [6, 96],
        &[
            (&[Remove("blocks_scales")], "blocks: its part `blocks_scales` is missing"),
            (&[Cast("blocks_blocks", Dtype::U8, &[6, 3, 15])], "it has shape [6, 3, 15], and [6, 3, 16] is needed"),
            (&[Bytes("blocks_scales", 5, &[255])], "blocks_scales: number 5 is NaN"),
            (&[Cast("blocks", Dtype::BF16, &[6, 96])], "it is there twice"),
        ],
    );
}

#[test]
fn gptq_and_awq() {
    refused(
        "gptq",
        "b4_48x96.weight",
        [48, 96],
        &[
            (&[Remove("b4_48x96.qweight")], "its part `b4_48x96.qweight` is missing"),
            (&[Remove("b4_48x96.qzeros")], "its part `b4_48x96.qzeros` is missing"),
            (&[Remove("b4_48x96.scales")], "its part `b4_48x96.scales` is missing"),
            (
                &[Cast("b4_48x96.qweight", Dtype::I32, &[11, 48])],
                "it has shape [11, 48], and a matrix of 48 x 96 has [3 · bits, 48] in GPTQ",
            ),
            (
                &[Cast("b4_48x96.qweight", Dtype::I16, &[12, 48])],
                "b4_48x96.qweight: AWQ in the version gemv_fast is not read",
            ),
            (
                &[Cast("b4_48x96.qweight", Dtype::I32, &[48, 12])],
                "b4_48x96.qweight: AWQ in the version gemv is not read",
            ),
            (&[Cast("b4_48x96.qweight", Dtype::I64, &[12, 48])], "b4_48x96.qweight: it is I64, and I32 is needed"),
            (
                &[Cast("b4_48x96.qzeros", Dtype::I32, &[3, 5])],
                "b4_48x96.qzeros: it has shape [3, 5], and [3, 6] is needed",
            ),
            (
                &[Cast("b4_48x96.scales", Dtype::F16, &[3, 47])],
                "b4_48x96.scales: it has shape [3, 47], and [3, 48] is needed",
            ),
            (
                &[Cast("b4_48x96.scales", Dtype::F16, &[0, 48]), Cast("b4_48x96.qzeros", Dtype::I32, &[0, 6])],
                "b4_48x96.scales: it has 0 groups of 96 inputs",
            ),
            (
                &[
                    Cast("b4_48x96.scales", Dtype::F16, &[5, 48]),
                    Cast("b4_48x96.qzeros", Dtype::I32, &[5, 6]),
                    Remove("b4_48x96.g_idx"),
                ],
                "it has 5 groups a row, which do not divide the 96 columns",
            ),
            (&[Bytes("b4_48x96.scales", 2, NAN_16)], "b4_48x96.scales: number 1 is NaN"),
            (&[Bytes("b4_48x96.g_idx", 0, &[3])], "b4_48x96.g_idx: column 0 is in group 3, and there are 3"),
            (
                &[Bytes("b4_48x96.g_idx", 0, &[255, 255, 255, 255])],
                "b4_48x96.g_idx: column 0 is in group -1, and there are 3",
            ),
            (&[Cast("b4_48x96.g_idx", Dtype::I32, &[95])], "b4_48x96.g_idx: it has shape [95], and [96] is needed"),
            (
                &[Cast("b4_48x96.weight", Dtype::F16, &[48, 96])],
                "it is there twice: as it is, and packed with `b4_48x96.qweight`",
            ),
            (
                &[Config(r#"{"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": 32}}"#)],
                "b4_48x96.qweight: it has 4 bits, and config.json says 8",
            ),
            (
                &[Config(r#"{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}"#)],
                "it has 3 groups, and config.json says groups of 128 of the 96 inputs",
            ),
            (
                &[Config(r#"{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1}}"#)],
                "it has 3 groups, and config.json says groups of 96 of the 96 inputs",
            ),
            (
                &[Config(r#"{"quantization_config": {"quant_method": "awq"}}"#)],
                "it has the shape of GPTQ, and config.json names another",
            ),
            (
                &[Config(
                    r#"{"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}}"#,
                )],
                "b4_48x96.weight: GPTQ in the form marlin is not read",
            ),
        ],
    );
    refused(
        "awq",
        "gemm_48x96.weight",
        [48, 96],
        &[
            (&[Remove("gemm_48x96.qzeros")], "its part `gemm_48x96.qzeros` is missing"),
            (
                &[Cast("gemm_48x96.qzeros", Dtype::I32, &[4, 6])],
                "gemm_48x96.qzeros: it has shape [4, 6], and [3, 6] is needed",
            ),
            (&[Cast("gemm_48x96.g_idx", Dtype::I32, &[96])], "gemm_48x96.g_idx: AWQ has no order of columns"),
            (
                &[Config(r#"{"quantization_config": {"quant_method": "awq", "group_size": 128}}"#)],
                "gemm_48x96.scales: it has groups of 32, and config.json says 128",
            ),
            (
                &[Config(r#"{"quantization_config": {"quant_method": "awq", "version": "GEMV"}}"#)],
                "AWQ in the version gemv is not read",
            ),
        ],
    );
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
