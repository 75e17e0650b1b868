//! Weights of one byte an element with scales beside them: FP8 of makers, of compressed-tensors and
//! of Model Optimizer, whole numbers of compressed-tensors, MXFP8.
//!
//! ```text
//! P.weight  F8_E4M3 [o, i] or I8 [o, i]
//! P.weight_scale_inv or P.weight_scale   F32, F16, BF16, F8_E8M0: [], [1], [o, 1], [o, i / group]
//!                                        or [o / 128, i / 128], where blocks at the edges are cut
//!                                        U8, E8M0: [o, i / 32]
//! P.weight_zero_point                    I8, as the scales, for I8 only
//! ```
//!
//! Both names mean the same: the value is the code times the scale. Scales of inputs
//! (`input_scale`, `activation_scale`) are for products in 8 bits and are passed over.
//!
//! Sources: DeepSeek-V3's README_WEIGHTS.md, transformers' integrations/finegrained_fp8.py,
//! compressors/naive_quantized of compressed-tensors 0.20.

use finetune_store::{Dtype, TensorView};

use super::config::{Method, PackedConfig};
use super::module::{FLOATS, Module, check_count, check_dtype, check_shape, wrong};
use super::{Format, Found, Layout, Scales, bitsandbytes, fp4, numbers, tables};
use crate::{Codes, Decoder, Groups, NibbleOrder, PackedError, PackedMatrix, Rounding, Zeros};

/// What the codes are.
#[derive(Clone, Copy, Debug)]
enum Kind<'a> {
    /// E4M3.
    Float,
    /// Signed, with zero points perhaps.
    Whole { zeros: Option<TensorView<'a>> },
}

#[derive(Debug)]
struct Scaled<'a> {
    shape: [usize; 2],
    codes: TensorView<'a>,
    scales: TensorView<'a>,
    groups: Groups,
    kind: Kind<'a>,
}

pub(super) fn find<'a>(module: &Module<'a>, config: &PackedConfig) -> Result<Found<'a>, PackedError> {
    let codes = module.need(".weight")?;
    if module.get(".weight_scale_2").is_some() {
        return fp4::find_modelopt(module);
    }
    let scales = match (module.get(".weight_scale_inv"), module.get(".weight_scale")) {
        (Some(scales), None) => scales,
        (None, Some(scales)) => scales,
        (Some(scales), Some(_)) => {
            return Err(wrong(&scales, format!("`{}.weight_scale` is there too", module.stem)));
        }
        (None, None) => module.need(".weight_scale")?,
    };
    check_dtype(&codes, &[Dtype::F8_E4M3, Dtype::I8])?;
    check_shape(&codes, &[module.rows, module.columns])?;
    let zeros = module.get(".weight_zero_point");
    if codes.dtype == Dtype::I8 {
        check_dtype(&scales, &FLOATS)?;
        let arrangement = arrangement(module, &scales, None)?;
        if let Some(zeros) = &zeros {
            check_dtype(zeros, &[Dtype::I8])?;
            check_count(zeros, scales.size() / scales.dtype.size())?;
        }
        let format = Format::Compressed { bits: 8, scales: arrangement, act_order: false };
        return Ok(found(module, codes, scales, arrangement, Kind::Whole { zeros }, format));
    }
    if let Some(zeros) = zeros {
        return Err(wrong(&zeros, format!("`{}` has codes that are floats, which have no zero points", codes.name)));
    }
    if scales.dtype == Dtype::U8 {
        return find_mxfp8(module, codes, scales);
    }
    check_dtype(&scales, &[Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F8_E8M0])?;
    let block = match config.method() {
        Some(Method::Fp8 { block }) => *block,
        _ => None,
    };
    let arrangement = arrangement(module, &scales, block)?;
    Ok(found(module, codes, scales, arrangement, Kind::Float, Format::Fp8 { scales: arrangement }))
}

/// E4M3 codes of any dtype, and E8M0 scales for 32 elements of a row: MLX, compressed-tensors.
pub(super) fn find_mxfp8<'a>(
    module: &Module<'a>,
    codes: TensorView<'a>,
    scales: TensorView<'a>,
) -> Result<Found<'a>, PackedError> {
    if !module.columns.is_multiple_of(32) {
        return Err(module.wrong(format!("groups of 32 do not divide its {} columns", module.columns)));
    }
    check_shape(&scales, &[module.rows, module.columns / 32])?;
    Ok(found(module, codes, scales, Scales::Groups(32), Kind::Float, Format::Mxfp8))
}

fn found<'a>(
    module: &Module<'_>,
    codes: TensorView<'a>,
    scales: TensorView<'a>,
    arrangement: Scales,
    kind: Kind<'a>,
    format: Format,
) -> Found<'a> {
    let groups = arrangement.groups(module.shape());
    Found { format, layout: Box::new(Scaled { shape: module.shape(), codes, scales, groups, kind }) }
}

/// Rows and columns of a block that config.json says nothing of.
const BLOCK: [usize; 2] = [128, 128];

/// Which elements share a scale, by the shape of the scales. Blocks are as the configuration has
/// them, otherwise of 128 x 128.
pub(super) fn arrangement(
    module: &Module<'_>,
    scales: &TensorView<'_>,
    block: Option<[usize; 2]>,
) -> Result<Scales, PackedError> {
    arranged(scales.shape, module.shape(), block).ok_or_else(|| no_arrangement(module, scales, block.unwrap_or(BLOCK)))
}

/// The same of scales of this shape. `None`: they are none of a matrix of this shape.
pub(super) fn arranged(scales: &[usize], [rows, columns]: [usize; 2], block: Option<[usize; 2]>) -> Option<Scales> {
    let [height, width] = block.unwrap_or(BLOCK);
    match *scales {
        [] | [1] | [1, 1] => Some(Scales::Matrix),
        [of_rows] | [of_rows, 1] if of_rows == rows => Some(Scales::Rows),
        [of_rows, of_columns] if [of_rows, of_columns] == [rows.div_ceil(height), columns.div_ceil(width)] => {
            Some(Scales::Blocks(height, width))
        }
        [of_rows, of_columns] if of_rows == rows && of_columns > 0 && columns.is_multiple_of(of_columns) => {
            Some(Scales::Groups(columns / of_columns))
        }
        _ => None,
    }
}

fn no_arrangement(module: &Module<'_>, scales: &TensorView<'_>, [height, width]: [usize; 2]) -> PackedError {
    let [rows, columns] = module.shape();
    let what = format!(
        "it has shape {:?}, and a matrix of {rows} x {columns} has scales of shape [1], [{rows}, 1], [{rows}, groups] or, in blocks of {height} x {width}, [{}, {}]",
        scales.shape,
        rows.div_ceil(height),
        columns.div_ceil(width)
    );
    wrong(scales, what)
}

impl Scales {
    /// The same as groups of a matrix.
    pub(super) fn groups(self, [rows, columns]: [usize; 2]) -> Groups {
        match self {
            Scales::Matrix => Groups::Blocks { rows, columns },
            Scales::Rows => Groups::Blocks { rows: 1, columns },
            Scales::Groups(columns) => Groups::Blocks { rows: 1, columns },
            Scales::Blocks(rows, columns) => Groups::Blocks { rows, columns },
        }
    }
}

impl Layout for Scaled<'_> {
    fn memory(&self) -> u64 {
        let of_kind = match self.kind {
            Kind::Float => 4 * 256,
            Kind::Whole { zeros } => zeros.map_or(0, |zeros| zeros.size()),
        };
        (self.codes.size() + self.scales.size() + of_kind) as u64
    }

    fn read(&self) -> Result<PackedMatrix, PackedError> {
        let bytes = self.codes.bytes()?;
        let (bytes, decoder) = match self.kind {
            Kind::Float => {
                tables::check_e4m3(&self.codes, &bytes)?;
                (bytes, Decoder::Table { table: tables::e4m3_table() })
            }
            Kind::Whole { zeros } => {
                let zeros = match zeros {
                    Some(zeros) => Zeros::Each(bitsandbytes::shift(zeros.bytes()?)),
                    None => Zeros::All(128),
                };
                (bitsandbytes::shift(bytes), Decoder::Shifted { zeros, factor: 1.0 })
            }
        };
        // Scales may be zero, of a block of zeros.
        let scales = match self.scales.dtype {
            Dtype::U8 => numbers::read_e8m0(&self.scales)?,
            _ => numbers::read(&self.scales)?,
        };
        Ok(PackedMatrix {
            shape: self.shape,
            codes: Codes::new(bytes, 8, 8 * self.shape[1], NibbleOrder::LowFirst),
            scales,
            groups: self.groups.clone(),
            decoder,
            rounding: Rounding::None,
        })
    }
}
