//! The formats that are known and not read: by their `quant_method`, and by tensors that only they
//! have.

use super::module::Module;
use crate::PackedError;

/// A format that is not read.
#[derive(Clone, Debug)]
pub(super) struct Foreign {
    /// Its name.
    pub(super) format: String,
    /// What to use in its place.
    pub(super) instead: &'static str,
}

const INSTEAD: &str = "use the 16-bit model with `model.quantization`, or an upload in MLX, bitsandbytes, GPTQ, AWQ, FP8 or compressed-tensors form";

/// `quant_method` and the name that people know.
const METHODS: [(&str, &str); 19] = [
    ("aqlm", "AQLM"),
    ("bitnet", "BitNet"),
    ("eetq", "EETQ"),
    ("exl2", "EXL2"),
    ("exl3", "EXL3"),
    ("fbgemm_fp8", "FBGEMM FP8"),
    ("fouroversix", "Four Over Six"),
    ("fp_quant", "FP-Quant"),
    ("gemma", "Gemma's own quantization"),
    ("higgs", "HIGGS"),
    ("hqq", "HQQ"),
    ("marlin", "Marlin"),
    ("quanto", "Quanto"),
    ("quark", "AMD Quark"),
    ("quip", "QuIP#"),
    ("sinq", "SINQ"),
    ("spqr", "SpQR"),
    ("torchao", "torchao"),
    ("vptq", "VPTQ"),
];

/// The end of a tensor's name behind the layer's, and the format that alone has it.
const TENSORS: [(&str, &str); 15] = [
    (".W_q", "HQQ"),
    (".q_weight", "EXL2"),
    (".trellis", "EXL3"),
    (".codebooks", "AQLM"),
    (".centroids.weight", "VPTQ"),
    (".dense_weights", "SpQR"),
    (".weight._data", "Quanto"),
    (".weight_scales", "EETQ"),
    (".Qidxs", "QuIP#"),
    (".B", "Marlin"),
    (".weight.bitmask", "compressed-tensors in the sparse form sparse-24-bitmask"),
    (".bitmask", "compressed-tensors in the sparse form sparse-24-bitmask"),
    (".meta", "compressed-tensors in the sparse form marlin-24"),
    (".weight_qdata", "torchao"),
    (".weight.qdata", "torchao"),
];

/// The format of a `quant_method` that no reader has.
pub(super) fn of_method(method: &str) -> Foreign {
    match METHODS.iter().find(|(known, _)| *known == method) {
        Some((_, name)) => named(name),
        None => named(&format!("the quantization method {:?}", short(method))),
    }
}

/// A format of this name, with the general advice.
pub(super) fn named(format: &str) -> Foreign {
    Foreign { format: format.to_owned(), instead: INSTEAD }
}

/// A text of config.json for a message: at most 40 characters, none of them orders to a terminal.
pub(super) fn short(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(40).collect()
}

/// Refuses a weight whose tensors show a format that is not read.
pub(super) fn check(module: &Module<'_>) -> Result<(), PackedError> {
    for (end, format) in TENSORS {
        if let Some(tensor) = module.get(end) {
            return Err(PackedError::NotRead {
                path: Some(tensor.path().to_owned()),
                name: tensor.name.to_owned(),
                format: format.to_owned(),
                instead: INSTEAD,
            });
        }
    }
    Ok(())
}
