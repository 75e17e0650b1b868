//! Floats of 4 bits, E2M1: MXFP4 and NVFP4 of MLX, compressed-tensors, gpt-oss and NVIDIA's Model
//! Optimizer.
//!
//! All have two codes a byte, the first in the low half. 32 or 16 elements of a row share a scale:
//!
//! ```text
//! codes                              scales                             scale of the whole tensor
//! P.weight        U32 [o, i / 8]     P.scales        U8 [o, i / 32]                          MLX
//! P.weight_packed U8  [o, i / 2]     P.weight_scale  U8 [o, i / 32]            compressed-tensors
//! P.weight_packed U8  [o, i / 2]     P.weight_scale  F8_E4M3 [o, i / 16]
//!                                                    P.weight_global_scale F32 [1]: divides
//! P.weight        U8  [o, i / 2]     P.weight_scale  F8_E4M3 [o, i / 16]          Model Optimizer
//!                                                    P.weight_scale_2 F32 []: multiplies
//! X_blocks        U8  [o, i / 32, 16]  X_scales      U8 [o, i / 32]                       gpt-oss
//! ```
//!
//! Sources: compressors/nvfp4 and mxfp4 of compressed-tensors 0.20, gpt_oss/torch/weights.py.

use finetune_store::{Dtype, TensorView};

use super::module::{Module, check_count, check_dtype, check_shape, wrong};
use super::{Format, Found, Layout, numbers, tables};
use crate::{Codes, Decoder, Groups, NibbleOrder, Numbers, PackedError, PackedMatrix, Rounding};

/// What the scales are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind<'a> {
    /// E8M0, for 32 elements.
    Mx,
    /// E4M3, for 16 elements.
    Nv,
    /// The same, multiplied with an F32 number or divided by it.
    NvOf { whole: TensorView<'a>, divides: bool },
}

#[derive(Debug)]
pub(super) struct Fp4<'a> {
    shape: [usize; 2],
    codes: TensorView<'a>,
    scales: TensorView<'a>,
    kind: Kind<'a>,
}

impl<'a> Fp4<'a> {
    /// Tensors whose dtypes and shapes have been checked.
    pub(super) fn found(shape: [usize; 2], codes: TensorView<'a>, scales: TensorView<'a>, kind: Kind<'a>) -> Found<'a> {
        let format = match kind {
            Kind::Mx => Format::Mxfp4,
            Kind::Nv | Kind::NvOf { .. } => Format::Nvfp4,
        };
        Found { format, layout: Box::new(Fp4 { shape, codes, scales, kind }) }
    }

    fn scales(&self) -> Result<Numbers, PackedError> {
        let (whole, divides) = match self.kind {
            Kind::Mx => return numbers::read_e8m0(&self.scales),
            Kind::Nv => return numbers::read_e4m3(&self.scales),
            Kind::NvOf { whole, divides } => (whole, divides),
        };
        let number = numbers::read_f32(&whole)?;
        let number = number.first().copied().filter(|number| *number != 0.0);
        let number = number.ok_or_else(|| wrong(&whole, "it is 0"))?;
        let of_groups = numbers::read_e4m3(&self.scales)?;
        let scale = |place| if divides { of_groups.get(place) / number } else { of_groups.get(place) * number };
        let scales: Vec<f32> = (0..of_groups.len()).map(scale).collect();
        numbers::check_f32(&self.scales, &scales)?;
        Ok(Numbers::F32(scales))
    }
}

/// compressed-tensors' `mxfp4-pack-quantized` and `nvfp4-pack-quantized`.
pub(super) fn find_compressed<'a>(module: &Module<'a>) -> Result<Found<'a>, PackedError> {
    let (codes, scales) = (module.need(".weight_packed")?, module.need(".weight_scale")?);
    if let Some(zeros) = module.get(".weight_zero_point") {
        return Err(wrong(&zeros, format!("`{}` has codes that are floats, which have no zero points", codes.name)));
    }
    let whole = module.get(".weight_global_scale");
    if scales.dtype == Dtype::U8 && whole.is_none() {
        check_pairs(module, &codes, &scales, 32)?;
        return Ok(Fp4::found(module.shape(), codes, scales, Kind::Mx));
    }
    check_dtype(&scales, &[Dtype::F8_E4M3])?;
    check_pairs(module, &codes, &scales, 16)?;
    let whole = module.need(".weight_global_scale")?;
    check_dtype(&whole, &[Dtype::F32])?;
    check_count(&whole, 1)?;
    Ok(Fp4::found(module.shape(), codes, scales, Kind::NvOf { whole, divides: true }))
}

/// NVIDIA Model Optimizer's NVFP4.
pub(super) fn find_modelopt<'a>(module: &Module<'a>) -> Result<Found<'a>, PackedError> {
    let (codes, scales) = (module.need(".weight")?, module.need(".weight_scale")?);
    check_dtype(&codes, &[Dtype::U8])?;
    check_dtype(&scales, &[Dtype::F8_E4M3])?;
    check_pairs(module, &codes, &scales, 16)?;
    let whole = module.need(".weight_scale_2")?;
    check_dtype(&whole, &[Dtype::F32])?;
    check_count(&whole, 1)?;
    Ok(Fp4::found(module.shape(), codes, scales, Kind::NvOf { whole, divides: false }))
}

/// Two codes a byte, and a scale for each `group` elements of a row.
fn check_pairs(
    module: &Module<'_>,
    codes: &TensorView<'_>,
    scales: &TensorView<'_>,
    group: usize,
) -> Result<(), PackedError> {
    if !module.columns.is_multiple_of(group) {
        return Err(module.wrong(format!("groups of {group} do not divide its {} columns", module.columns)));
    }
    check_shape(codes, &[module.rows, module.columns / 2])?;
    check_shape(scales, &[module.rows, module.columns / group])
}

/// gpt-oss's blocks, of one matrix.
pub(super) fn find_blocks<'a>(module: &Module<'a>) -> Result<Found<'a>, PackedError> {
    let (codes, scales) = (module.need("_blocks")?, module.need("_scales")?);
    for tensor in [&codes, &scales] {
        check_dtype(tensor, &[Dtype::U8])?;
    }
    if !module.columns.is_multiple_of(32) {
        return Err(module.wrong(format!("blocks of 32 do not divide its {} columns", module.columns)));
    }
    check_shape(&codes, &[module.rows, module.columns / 32, 16])?;
    check_shape(&scales, &[module.rows, module.columns / 32])?;
    Ok(Fp4::found(module.shape(), codes, scales, Kind::Mx))
}

/// The matrix `[o, i]` of MXFP4 blocks: `codes` [o, i / 32, 16], `scales` [o, i / 32]. Of stacked
/// experts, those of one expert.
///
/// # Errors
/// [`PackedError::Malformed`] for other numbers of bytes than the shape needs, and for scales that
/// are NaN.
pub fn mxfp4_blocks(codes: Vec<u8>, scales: Vec<u8>, shape: [usize; 2]) -> Result<PackedMatrix, PackedError> {
    let [rows, columns] = shape;
    let groups = if columns.is_multiple_of(32) { rows.checked_mul(columns / 32) } else { None };
    let fits = groups
        .is_some_and(|groups| scales.len() == groups && codes.len() / 16 == groups && codes.len().is_multiple_of(16));
    if !fits {
        let what = format!("{} bytes of codes and {} of scales are no {rows} x {columns}", codes.len(), scales.len());
        return Err(PackedError::malformed(what));
    }
    if let Some(place) = scales.iter().position(|scale| *scale == 0xff) {
        return Err(PackedError::malformed(format!("scale {place} is NaN")));
    }
    Ok(matrix(shape, codes, Numbers::E8M0(scales), 32))
}

/// The codes and scales that [`mxfp4_blocks`] makes this matrix of. `None`: it is packed otherwise.
pub fn parts_of_mxfp4(matrix: &PackedMatrix) -> Option<(&[u8], &[u8])> {
    let PackedMatrix { shape: [rows, columns], codes, scales, groups, decoder, rounding } = matrix;
    let Numbers::E8M0(scales) = scales else { return None };
    let is_mxfp4 = matches!(groups, Groups::Blocks { rows: 1, columns: 32 })
        && matches!(decoder, Decoder::Table { table } if table.as_slice() == tables::E2M1)
        && *rounding == Rounding::None
        && (codes.bits(), codes.order()) == (4, NibbleOrder::LowFirst);
    let fits = columns.is_multiple_of(32)
        && codes.row_bits() == 4 * columns
        && codes.bytes().len() == rows * columns / 2
        && scales.len() == rows * columns / 32;
    (is_mxfp4 && fits).then_some((codes.bytes(), scales.as_slice()))
}

fn matrix(shape: [usize; 2], codes: Vec<u8>, scales: Numbers, group: usize) -> PackedMatrix {
    PackedMatrix {
        shape,
        codes: Codes::new(codes, 4, 4 * shape[1], NibbleOrder::LowFirst),
        scales,
        groups: Groups::Blocks { rows: 1, columns: group },
        decoder: Decoder::Table { table: tables::E2M1.to_vec() },
        rounding: Rounding::None,
    }
}

impl Layout for Fp4<'_> {
    fn memory(&self) -> u64 {
        let scale = if matches!(self.kind, Kind::NvOf { .. }) { 4 } else { 1 };
        (self.codes.size() + scale * self.scales.size() + size_of_val(&tables::E2M1)) as u64
    }

    fn read(&self) -> Result<PackedMatrix, PackedError> {
        let group = if matches!(self.kind, Kind::Mx) { 32 } else { 16 };
        Ok(matrix(self.shape, self.codes.bytes()?, self.scales()?, group))
    }
}
