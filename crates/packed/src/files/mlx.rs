//! MLX: codes in rows of 32-bit words, little-endian, the first element lowest.
//!
//! ```text
//! P.weight  U32 [o, i · bits / 32]
//! P.scales  F16, BF16 or F32 [o, i / group]    P.biases  the same      mode affine
//! P.scales  U8 [o, i / 32], E8M0                                       modes mxfp4, mxfp8
//! P.scales  U8 [o, i / 16], E4M3                                       mode nvfp4
//! ```
//!
//! The shapes tell bits and group. transformers' "metal" writes the same with `qbiases`
//! (integrations/metal_quantization.py).

use finetune_store::{Dtype, TensorView};

use super::config::PackedConfig;
use super::fp4::{Fp4, Kind};
use super::module::{FLOATS, Module, check_dtype, check_shape, matrix, wrong};
use super::{Format, Found, Layout, foreign, numbers, scaled};
use crate::{Codes, Decoder, Groups, NibbleOrder, PackedError, PackedMatrix, Rounding};

#[derive(Debug)]
struct Affine<'a> {
    shape: [usize; 2],
    codes: TensorView<'a>,
    scales: TensorView<'a>,
    biases: TensorView<'a>,
    bits: usize,
    group: usize,
}

pub(super) fn find<'a>(module: &Module<'a>, config: &PackedConfig) -> Result<Found<'a>, PackedError> {
    let [rows, columns] = module.shape();
    let (codes, scales) = (module.need(".weight")?, module.need(".scales")?);
    check_dtype(&codes, &[Dtype::U32])?;
    let [code_rows, words] = matrix(&codes)?;
    let bits = words * 32 / columns;
    if code_rows != rows || bits * columns != words * 32 {
        let what = format!("it has shape {:?}, which packs no matrix of {rows} x {columns}", codes.shape);
        return Err(wrong(&codes, what));
    }
    let [_, groups] = matrix(&scales)?;
    check_shape(&scales, &[rows, groups])?;
    let group = module.group_size(&scales, columns, groups)?;
    let (mode, found) = match scales.dtype {
        Dtype::U8 => find_floats(module, codes, scales, bits, group)?,
        _ => ("affine", find_affine(module, codes, scales, bits, group)?),
    };
    if let Some(said) = config.mlx_of(&module.stem)
        && (said.bits, said.group, said.mode.as_str()) != (bits, group, mode)
    {
        let what = format!(
            "its tensors have {bits} bits and groups of {group}, mode {mode}, and config.json says of it {} bits and groups of {}, mode {}",
            said.bits,
            said.group,
            foreign::short(&said.mode)
        );
        return Err(module.wrong(what));
    }
    Ok(found)
}

fn find_affine<'a>(
    module: &Module<'a>,
    codes: TensorView<'a>,
    scales: TensorView<'a>,
    bits: usize,
    group: usize,
) -> Result<Found<'a>, PackedError> {
    check_dtype(&scales, &FLOATS)?;
    let biases = match module.get(".qbiases") {
        // transformers' metal packs 32 / bits elements a word, which is the same for these only.
        Some(biases) if matches!(bits, 2 | 4 | 8) => biases,
        _ => module.need(".biases")?,
    };
    check_dtype(&biases, &FLOATS)?;
    check_shape(&biases, scales.shape)?;
    if !matches!(bits, 2 | 3 | 4 | 5 | 6 | 8) || !matches!(group, 32 | 64 | 128) {
        let what = format!(
            "its tensors have {bits} bits and groups of {group}, and MLX has 2, 3, 4, 5, 6 and 8 bits and groups of 32, 64 and 128"
        );
        return Err(module.wrong(what));
    }
    let layout = Affine { shape: module.shape(), codes, scales, biases, bits, group };
    Ok(Found { format: Format::Mlx { bits, group }, layout: Box::new(layout) })
}

/// The modes whose codes are floats, and their names.
fn find_floats<'a>(
    module: &Module<'a>,
    codes: TensorView<'a>,
    scales: TensorView<'a>,
    bits: usize,
    group: usize,
) -> Result<(&'static str, Found<'a>), PackedError> {
    for end in [".biases", ".qbiases"] {
        if let Some(biases) = module.get(end) {
            return Err(wrong(&biases, format!("`{}` is U8, and such scales have no biases", scales.name)));
        }
    }
    if let Some(global) = module.get(".global_scale") {
        return Err(PackedError::NotRead {
            path: Some(global.path().to_owned()),
            name: global.name.to_owned(),
            format: "MLX NVFP4 with a scale of the whole tensor".to_owned(),
            instead: "use an upload in mode `affine` or `mxfp4`",
        });
    }
    match (bits, group) {
        (4, 32) => Ok(("mxfp4", Fp4::found(module.shape(), codes, scales, Kind::Mx))),
        (4, 16) => Ok(("nvfp4", Fp4::found(module.shape(), codes, scales, Kind::Nv))),
        (8, 32) => Ok(("mxfp8", scaled::find_mxfp8(module, codes, scales)?)),
        _ => Err(wrong(&scales, format!("no mode of MLX has {bits} bits and groups of {group} with U8 scales"))),
    }
}

impl Layout for Affine<'_> {
    fn memory(&self) -> u64 {
        (self.codes.size() + self.scales.size() + self.biases.size()) as u64
    }

    fn read(&self) -> Result<PackedMatrix, PackedError> {
        // Scales may be negative and zero: MLX scales by the edge of larger magnitude, and a
        // group of zeros has bias 0.
        Ok(PackedMatrix {
            shape: self.shape,
            codes: Codes::new(self.codes.bytes()?, self.bits, self.shape[1] * self.bits, NibbleOrder::LowFirst),
            scales: numbers::read(&self.scales)?,
            groups: Groups::Blocks { rows: 1, columns: self.group },
            decoder: Decoder::Affine { biases: numbers::read(&self.biases)? },
            rounding: Rounding::None,
        })
    }
}
