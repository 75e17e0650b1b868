//! Damaged weights of GPTQ and AWQ.

use finetune_store::Dtype;

use crate::damaged::*;
use crate::made::Change::*;

const B4_48X96: &[Damage] = &[
    (&[Remove("b4_48x96.qweight")], "its part `b4_48x96.qweight` is missing"),
    (&[Remove("b4_48x96.qzeros")], "its part `b4_48x96.qzeros` is missing"),
    (&[Remove("b4_48x96.scales")], "its part `b4_48x96.scales` is missing"),
    (
        &[Cast("b4_48x96.qweight", Dtype::I32, &[11, 48])],
        "it has shape [11, 48], and a matrix of 48 x 96 has [3 · bits, 48] in GPTQ",
    ),
    (&[Cast("b4_48x96.qweight", Dtype::I16, &[12, 48])], "b4_48x96.qweight: AWQ in the version gemv_fast is not read"),
    (&[Cast("b4_48x96.qweight", Dtype::I32, &[48, 12])], "b4_48x96.qweight: AWQ in the version gemv is not read"),
    (&[Cast("b4_48x96.qweight", Dtype::I64, &[12, 48])], "b4_48x96.qweight: it is I64, and I32 is needed"),
    (&[Cast("b4_48x96.qzeros", Dtype::I32, &[3, 5])], "b4_48x96.qzeros: it has shape [3, 5], and [3, 6] is needed"),
    (&[Cast("b4_48x96.scales", Dtype::F16, &[3, 47])], "b4_48x96.scales: it has shape [3, 47], and [3, 48] is needed"),
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
    (&[Bytes("b4_48x96.g_idx", 0, &[255, 255, 255, 255])], "b4_48x96.g_idx: column 0 is in group -1, and there are 3"),
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
        &[Config(r#"{"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}}"#)],
        "b4_48x96.weight: GPTQ in the form marlin is not read",
    ),
];

const GEMM_48X96: &[Damage] = &[
    (&[Remove("gemm_48x96.qzeros")], "its part `gemm_48x96.qzeros` is missing"),
    (&[Cast("gemm_48x96.qzeros", Dtype::I32, &[4, 6])], "gemm_48x96.qzeros: it has shape [4, 6], and [3, 6] is needed"),
    (&[Cast("gemm_48x96.g_idx", Dtype::I32, &[96])], "gemm_48x96.g_idx: AWQ has no order of columns"),
    (
        &[Config(r#"{"quantization_config": {"quant_method": "awq", "group_size": 128}}"#)],
        "gemm_48x96.scales: it has groups of 32, and config.json says 128",
    ),
    (
        &[Config(r#"{"quantization_config": {"quant_method": "awq", "version": "GEMV"}}"#)],
        "AWQ in the version gemv is not read",
    ),
];

#[test]
fn gptq_and_awq() {
    refused("gptq", "b4_48x96.weight", [48, 96], B4_48X96);
    refused("awq", "gemm_48x96.weight", [48, 96], GEMM_48X96);
}
