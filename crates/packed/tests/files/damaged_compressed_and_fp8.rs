//! Damaged weights of compressed-tensors, FP8 and MXFP4.

use finetune_store::Dtype;

use crate::damaged::*;
use crate::made::Change::*;

const INT4_ASYM: &[Damage] = &[
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
    (&[Cast("int4_asym.weight_packed", Dtype::I64, &[13, 4])], "int4_asym.weight_packed: it is I64, and I32 is needed"),
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
        &[Cast("int4_asym.weight_zero_point", Dtype::I8, &[13, 4]), Bytes("int4_asym.weight_zero_point", 0, &[8])],
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
];

const INT4_ORDER: &[Damage] = &[
    (&[Bytes("int4_order.weight_g_idx", 4, &[2])], "int4_order.weight_g_idx: column 1 is in group 2, and there are 2"),
    (&[Bytes("int4_order.weight_g_idx", 4, &[255, 255, 255, 255])], "column 1 is in group -1, and there are 2"),
    (&[Cast("int4_order.weight_g_idx", Dtype::I32, &[63])], "it has shape [63], and [64] is needed"),
];

const BYTES_ASYM: &[Damage] = &[
    (&[Remove("bytes_asym.weight_scale")], "its part `bytes_asym.weight_scale` is missing"),
    (
        &[Cast("bytes_asym.weight_zero_point", Dtype::I32, &[6, 2])],
        "bytes_asym.weight_zero_point: it is I32, and I8 is needed",
    ),
    (&[Cast("bytes_asym.weight_zero_point", Dtype::I8, &[6, 1])], "it has 6 elements, and 12 are needed"),
];

const NVFP4: &[Damage] = &[
    (&[Remove("nvfp4.weight_global_scale")], "its part `nvfp4.weight_global_scale` is missing"),
    (&[Bytes("nvfp4.weight_global_scale", 0, &[0; 4])], "nvfp4.weight_global_scale: it is 0"),
    (&[Bytes("nvfp4.weight_global_scale", 0, NAN)], "nvfp4.weight_global_scale: number 0 is NaN"),
    (&[Bytes("nvfp4.weight_scale", 0, &[0x7f])], "nvfp4.weight_scale: number 0 is NaN"),
    (&[Bytes("nvfp4.weight_global_scale", 0, &[1, 0, 0, 0])], "nvfp4.weight_scale: number 0 is inf"),
    (&[Cast("nvfp4.weight_zero_point", Dtype::I8, &[6, 3])], "codes that are floats, which have no zero points"),
];

#[test]
fn compressed_tensors() {
    refused("compressed", "int4_asym.weight", [13, 64], INT4_ASYM);
    refused("compressed", "int4_order.weight", [8, 64], INT4_ORDER);
    refused("compressed", "bytes_asym.weight", [6, 64], BYTES_ASYM);
    refused("compressed", "nvfp4.weight", [6, 48], NVFP4);
}

const BLOCKS: &[Damage] = &[
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
    (&[Cast("blocks.weight_zero_point", Dtype::I8, &[2, 2])], "codes that are floats, which have no zero points"),
    (&[Bytes("blocks.weight", 200, &[0x7f])], "blocks.weight: element 200 is NaN"),
    (&[Bytes("blocks.weight_scale_inv", 12, NAN)], "blocks.weight_scale_inv: number 3 is NaN"),
    (
        &[Config(r#"{"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}"#)],
        "in blocks of 64 x 64, [3, 3]",
    ),
];

const MODELOPT_NVFP4: &[Damage] = &[
    (&[Remove("nvfp4.weight_scale")], "its part `nvfp4.weight_scale` is missing"),
    (&[Cast("nvfp4.weight_scale", Dtype::U8, &[5, 3])], "nvfp4.weight_scale: it is U8, and F8_E4M3 is needed"),
    (&[Cast("nvfp4.weight_scale_2", Dtype::F32, &[5])], "it has 5 elements, and 1 are needed"),
];

const BLOCKS_ALONE: &[Damage] = &[
    (&[Remove("blocks_scales")], "blocks: its part `blocks_scales` is missing"),
    (&[Cast("blocks_blocks", Dtype::U8, &[6, 3, 15])], "it has shape [6, 3, 15], and [6, 3, 16] is needed"),
    (&[Bytes("blocks_scales", 5, &[255])], "blocks_scales: number 5 is NaN"),
    (&[Cast("blocks", Dtype::BF16, &[6, 96])], "it is there twice"),
];

#[test]
fn fp8() {
    refused("fp8", "blocks.weight", [129, 132], BLOCKS);
    refused("modelopt", "nvfp4.weight", [5, 48], MODELOPT_NVFP4);
    refused("mxfp4", "blocks", [6, 96], BLOCKS_ALONE);
}
