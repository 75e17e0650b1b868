//! Damaged weights of MLX and bitsandbytes.

use finetune_store::Dtype;

use crate::damaged::*;
use crate::made::Change::*;

const AFFINE_4_32_F32: &[Damage] = &[
    (&[Remove("affine_4_32_f32.scales")], "affine_4_32_f32.weight: its part `affine_4_32_f32.scales` is missing"),
    (&[Remove("affine_4_32_f32.biases")], "its part `affine_4_32_f32.biases` is missing"),
    (&[Remove("affine_4_32_f32.weight")], "its part `affine_4_32_f32.weight` is missing"),
    (&[Cast("affine_4_32_f32.weight", Dtype::I32, &[3, 20])], "affine_4_32_f32.weight: it is I32, and U32 is needed"),
    (&[Cast("affine_4_32_f32.weight", Dtype::U32, &[3, 19])], "it has shape [3, 19], which packs no matrix of 3 x 160"),
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
        &[Cast("affine_4_32_f32.scales", Dtype::F32, &[3, 1]), Cast("affine_4_32_f32.biases", Dtype::F32, &[3, 1])],
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
];

const MXFP4_4_32_F32: &[Damage] = &[
    (&[Cast("mxfp4_4_32_f32.scales", Dtype::U8, &[3, 2])], "no mode of MLX has 4 bits and groups of 80"),
    (&[Bytes("mxfp4_4_32_f32.scales", 7, &[255])], "mxfp4_4_32_f32.scales: number 7 is NaN"),
    (&[Cast("mxfp4_4_32_f32.global_scale", Dtype::F32, &[])], "MLX NVFP4 with a scale of the whole tensor is not read"),
];

const MXFP8_8_32_BF16: &[Damage] =
    &[(&[Bytes("mxfp8_8_32_bf16.weight", 70, &[0xff])], "mxfp8_8_32_bf16.weight: element 70 is NaN")];

#[test]
fn mlx() {
    refused("mlx", "affine_4_32_f32.weight", [3, 160], AFFINE_4_32_F32);
    refused("mlx", "mxfp4_4_32_f32.weight", [3, 160], MXFP4_4_32_F32);
    refused("mlx", "mxfp8_8_32_bf16.weight", [3, 160], MXFP8_8_32_BF16);
}

const STATE: &str = "nf4_24x128_double_bfloat16.weight.quant_state.bitsandbytes__nf4";

const NF4_24X128_DOUBLE_BFLOAT16: &[Damage] = &[
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
    (&[Text(STATE, "\"blocksize\": 64", "\"blocksize\": 128")], "weight.absmax: it has 48 elements, and 24 are needed"),
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
    (&[Bytes("nf4_24x128_double_bfloat16.weight.nested_absmax", 0, INFINITE)], "weight.nested_absmax: number 0 is inf"),
    (
        &[Cast("nf4_24x128_double_bfloat16.weight.quant_state.bitsandbytes__fp4", Dtype::U8, &[2])],
        "bitsandbytes__fp4` is there too",
    ),
];

const NF4_24X176_BFLOAT16: &[Damage] = &[
    (&[Bytes("nf4_24x176_bfloat16.weight.absmax", 4, MINUS_ONE)], "weight.absmax: number 1 is -1, below 0"),
    (&[Bytes("nf4_24x176_bfloat16.weight.absmax", 4, NAN)], "weight.absmax: number 1 is NaN"),
    (
        &[Cast("nf4_24x176_bfloat16.weight.absmax", Dtype::F32, &[65])],
        "weight.absmax: it has 65 elements, and 66 are needed",
    ),
];

#[test]
fn bitsandbytes_with_four_bits() {
    refused("bitsandbytes", "nf4_24x128_double_bfloat16.weight", [24, 128], NF4_24X128_DOUBLE_BFLOAT16);
    refused("bitsandbytes", "nf4_24x176_bfloat16.weight", [24, 176], NF4_24X176_BFLOAT16);
}

const INT8_12X176: &[Damage] = &[
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
    (&[Cast("int8_12x176.weight_format", Dtype::U8, &[2])], "weight_format: it has 2 elements, and 1 are needed"),
];

const INT8_12X176_ALONE: &[Damage] = &[(
    &[Remove("int8_12x176.SCB"), Remove("int8_12x176.weight_format")],
    "it is I8, and no tensor beside it says what its codes mean",
)];

#[test]
fn bitsandbytes_int8() {
    refused("bitsandbytes", "int8_12x176.weight", [12, 176], INT8_12X176);
    refused("bitsandbytes", "int8_12x176.weight", [12, 176], INT8_12X176_ALONE);
}
