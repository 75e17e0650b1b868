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
use super::module::{FLOATS, Module, check_dtype, check_shape, matrix, wrong};
use super::{Format, Found, Layout, numbers, tables};
use crate::{Codes, Decoder, Groups, NibbleOrder, PackedError, PackedMatrix, Rounding};

/// What the scales are.
#[derive(Clone, Copy, Debug)]
enum Kind<'a> {
    Affine { biases: TensorView<'a> },
    Mxfp4,
    Mxfp8,
    Nvfp4,
}

#[derive(Debug)]
struct Mlx<'a> {
    shape: [usize; 2],
    codes: TensorView<'a>,
    scales: TensorView<'a>,
    kind: Kind<'a>,
    bits: usize,
    group: usize,
}

pub(super) fn find<'a>(module: &Module<'a>, config: &PackedConfig) -> Result<Found<'a>, PackedError> {
    let [rows, columns] = [module.rows, module.columns];
    let (codes, scales) = (module.need(".weight")?, module.need(".scales")?);
    check_dtype(&codes, &[Dtype::U32])?;
    let [code_rows, words] = matrix(&codes)?;
    let bits = (words * 32) / columns;
    if code_rows != rows || bits * columns != words * 32 {
        let what = format!("it has shape {:?}, which packs no matrix of {rows} x {columns}", codes.shape);
        return Err(wrong(&codes, what));
    }
    let [_, groups] = matrix(&scales)?;
    check_shape(&scales, &[rows, groups])?;
    let group = module.group_size(&scales, columns, groups)?;
    let kind = kind(module, &scales, bits, group)?;
    let (mode, format) = match kind {
        Kind::Affine { .. } => ("affine", Format::Mlx { bits, group }),
        Kind::Mxfp4 => ("mxfp4", Format::Mxfp4),
        Kind::Mxfp8 => ("mxfp8", Format::Mxfp8),
        Kind::Nvfp4 => ("nvfp4", Format::Nvfp4),
    };
    if let Some(said) = config.mlx_of(&module.stem)
        && (said.bits, said.group, said.mode.as_str()) != (bits, group, mode)
    {
        let what = format!(
            "its tensors have {bits} bits and groups of {group}, mode {mode}, and config.json says of it {} bits and groups of {}, mode {}",
            said.bits, said.group, said.mode
        );
        return Err(module.wrong(what));
    }
    Ok(Found { format, layout: Box::new(Mlx { shape: [rows, columns], codes, scales, kind, bits, group }) })
}

fn kind<'a>(module: &Module<'a>, scales: &TensorView<'a>, bits: usize, group: usize) -> Result<Kind<'a>, PackedError> {
    if let Some(global) = module.get(".global_scale") {
        let name = global.name.to_owned();
        let instead = "use an upload in mode `affine` or `mxfp4`";
        let format = "MLX NVFP4 with a scale of the whole tensor".to_owned();
        return Err(PackedError::NotRead { path: Some(global.path().to_owned()), name, format, instead });
    }
    if scales.dtype == Dtype::U8 {
        if let Some(biases) = module.get(".biases") {
            return Err(wrong(&biases, format!("`{}` is U8, and such scales have no biases", scales.name)));
        }
        return match (bits, group) {
            (4, 32) => Ok(Kind::Mxfp4),
            (8, 32) => Ok(Kind::Mxfp8),
            (4, 16) => Ok(Kind::Nvfp4),
            _ => Err(wrong(scales, format!("no mode of MLX has {bits} bits and groups of {group} with U8 scales"))),
        };
    }
    check_dtype(scales, &FLOATS)?;
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
    Ok(Kind::Affine { biases })
}

impl Layout for Mlx<'_> {
    fn memory(&self) -> u64 {
        let of_kind = match self.kind {
            Kind::Affine { biases } => biases.size(),
            Kind::Mxfp4 | Kind::Nvfp4 => size_of_val(&tables::E2M1),
            Kind::Mxfp8 => 4 * 256,
        };
        (self.codes.size() + self.scales.size() + of_kind) as u64
    }

    fn read(&self) -> Result<PackedMatrix, PackedError> {
        let bytes = self.codes.bytes()?;
        // Scales may be negative and zero: MLX scales by the edge of larger magnitude, and a
        // group of zeros has bias 0.
        let (scales, decoder) = match self.kind {
            Kind::Affine { biases } => {
                (numbers::read(&self.scales)?, Decoder::Affine { biases: numbers::read(&biases)? })
            }
            Kind::Mxfp4 => (numbers::read_e8m0(&self.scales)?, Decoder::Table { table: tables::E2M1.to_vec() }),
            Kind::Nvfp4 => (numbers::read_e4m3(&self.scales)?, Decoder::Table { table: tables::E2M1.to_vec() }),
            Kind::Mxfp8 => {
                tables::check_e4m3(&self.codes, &bytes)?;
                (numbers::read_e8m0(&self.scales)?, Decoder::Table { table: tables::e4m3_table() })
            }
        };
        Ok(PackedMatrix {
            shape: self.shape,
            codes: Codes::new(bytes, self.bits, self.shape[1] * self.bits, NibbleOrder::LowFirst),
            scales,
            groups: Groups::Blocks { rows: 1, columns: self.group },
            decoder,
            rounding: Rounding::None,
        })
    }
}
