//! compressed-tensors' `pack-quantized`, of 4 and 8 bits.
//!
//! ```text
//! P.weight_packed      I32 [o, i · bits / 32]: rows of words, the first element lowest, codes with
//!                      2^(bits - 1) added
//! P.weight_scale       F16, BF16 or F32: [1], [o, 1] or [o, groups]
//! P.weight_shape       I64 [2]: o, i
//! P.weight_zero_point  I32 [o · bits / 32, groups], packed along o like the codes; asymmetric only
//! P.weight_g_idx       I32 [i]: the group of each column, or -1 everywhere
//! ```
//!
//! The value is (code - zero) · scale, where symmetric weights have 2^(bits - 1) as zero point.
//! Source: compressors/pack_quantized of compressed-tensors 0.20.

use finetune_store::{Dtype, TensorView};

use super::config::PackedConfig;
use super::group_index::{GroupIndex, Unset};
use super::module::{FLOATS, Module, check_count, check_dtype, check_shape, wrong};
use super::{Format, Found, Layout, Scales, bitsandbytes, fp4, numbers, scaled, unpack};
use crate::{Codes, Decoder, Groups, NibbleOrder, PackedError, PackedMatrix, Rounding, Zeros};

/// How the name of the tensor ends that has a weight's shape.
pub(super) const SHAPE: &str = ".weight_shape";

#[derive(Debug)]
struct Packed<'a> {
    shape: [usize; 2],
    codes: TensorView<'a>,
    scales: TensorView<'a>,
    zeros: Option<TensorView<'a>>,
    bits: usize,
    /// Groups of a row.
    count: usize,
    groups: Groups,
}

pub(super) fn find<'a>(module: &Module<'a>, config: &PackedConfig) -> Result<Found<'a>, PackedError> {
    let (codes, scales) = (module.need(".weight_packed")?, module.need(".weight_scale")?);
    if codes.dtype == Dtype::U8 {
        return fp4::find_compressed(module);
    }
    let [rows, columns] = module.shape();
    check_dtype(&codes, &[Dtype::I32])?;
    check_dtype(&scales, &FLOATS)?;
    check_shape_tensor(module)?;
    let words = |bits: usize| (columns * bits).div_ceil(32);
    let bits = [4, 8].into_iter().filter(|bits| codes.shape == [rows, words(*bits)] && config.has_scheme(*bits, None));
    let Some(bits) = bits.reduce(|first, _| first) else {
        let what = format!(
            "it has shape {:?}, and {rows} x {columns} codes of 4 or 8 bits have [{rows}, {}] or [{rows}, {}]{}",
            codes.shape,
            words(4),
            words(8),
            config.schemes_in_words()
        );
        return Err(wrong(&codes, what));
    };
    let arrangement = match scaled::arrangement(module, &scales, None)? {
        Scales::Blocks(..) => return Err(wrong(&scales, "it has blocks of rows, which packed codes do not have")),
        arrangement => arrangement,
    };
    let count = if let Scales::Groups(group) = arrangement { columns / group } else { 1 };
    let index = match module.get(".weight_g_idx") {
        Some(tensor) => GroupIndex::read(&tensor, columns, count, columns / count, Unset::Ordinary)?,
        None => GroupIndex::Ordinary,
    };
    if let Scales::Groups(group) = arrangement
        && !config.has_scheme(bits, Some(group))
    {
        let what = format!("its tensors have {bits} bits and groups of {group}{}", config.schemes_in_words());
        return Err(module.wrong(what));
    }
    let zeros = module.get(".weight_zero_point");
    if let Some(zeros) = &zeros {
        check_zeros(zeros, arrangement, rows, count, bits)?;
    }
    let act_order = index != GroupIndex::Ordinary;
    let groups = index.groups(count).unwrap_or_else(|| arrangement.groups(module.shape()));
    let format = Format::Compressed { bits, scales: arrangement, act_order };
    let shape = module.shape();
    Ok(Found { format, layout: Box::new(Packed { shape, codes, scales, zeros, bits, count, groups }) })
}

fn check_shape_tensor(module: &Module<'_>) -> Result<(), PackedError> {
    let tensor = module.need(SHAPE)?;
    let (lengths, shape) = (lengths_in(&tensor)?, module.shape());
    if lengths.iter().zip(shape).all(|(length, needed)| u64::try_from(*length) == Ok(needed as u64)) {
        return Ok(());
    }
    Err(wrong(&tensor, format!("it says {lengths:?}, and the model has {shape:?}")))
}

/// The shape of a weight, out of the tensor that has it.
pub(super) fn shape_in(tensor: &TensorView<'_>) -> Result<[usize; 2], PackedError> {
    let lengths = lengths_in(tensor)?;
    match lengths.iter().map(|&length| usize::try_from(length)).collect::<Result<Vec<_>, _>>().as_deref() {
        Ok(&[rows, columns]) => Ok([rows, columns]),
        _ => Err(wrong(tensor, format!("it says {lengths:?}, and two lengths are needed"))),
    }
}

/// Two numbers.
fn lengths_in(tensor: &TensorView<'_>) -> Result<Vec<i64>, PackedError> {
    check_dtype(tensor, &[Dtype::I64, Dtype::I32])?;
    check_count(tensor, 2)?;
    let bytes = tensor.bytes()?;
    Ok(match tensor.dtype {
        Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes))).collect(),
    })
}

/// Zero points are packed along the rows, or whole numbers of a byte in older files.
fn check_zeros(
    zeros: &TensorView<'_>,
    scales: Scales,
    rows: usize,
    count: usize,
    bits: usize,
) -> Result<(), PackedError> {
    check_dtype(zeros, &[Dtype::I32, Dtype::I8])?;
    match (zeros.dtype, scales) {
        (Dtype::I8, Scales::Matrix) => check_count(zeros, 1),
        (Dtype::I8, _) => check_count(zeros, rows * count),
        (_, Scales::Matrix) => Err(wrong(zeros, "it is packed, and a single zero point is not")),
        _ => check_shape(zeros, &[(rows * bits).div_ceil(32), count]),
    }
}

impl Layout for Packed<'_> {
    fn memory(&self) -> u64 {
        let scales = self.scales.size() / self.scales.dtype.size();
        let zeros = if self.zeros.is_some() { scales } else { 0 };
        (self.codes.size() + self.scales.size() + zeros) as u64
    }

    fn read(&self) -> Result<PackedMatrix, PackedError> {
        let [rows, _] = self.shape;
        let words = self.codes.shape[1];
        let zeros = match &self.zeros {
            None => Zeros::All(1 << (self.bits - 1)),
            Some(zeros) if zeros.dtype == Dtype::I8 => Zeros::Each(self.byte_zeros(zeros)?),
            Some(zeros) => Zeros::Each(unpack::along_rows(&zeros.bytes()?, rows, self.count, self.bits)),
        };
        Ok(PackedMatrix {
            shape: self.shape,
            codes: Codes::new(self.codes.bytes()?, self.bits, 32 * words, NibbleOrder::LowFirst),
            scales: numbers::read(&self.scales)?,
            groups: self.groups.clone(),
            decoder: Decoder::Shifted { zeros, factor: 1.0 },
            rounding: Rounding::None,
        })
    }
}

impl Packed<'_> {
    fn byte_zeros(&self, tensor: &TensorView<'_>) -> Result<Vec<u8>, PackedError> {
        if self.bits == 8 {
            return Ok(bitsandbytes::shift(tensor.bytes()?));
        }
        let zero = |(place, byte): (usize, u8)| match i16::from(byte.cast_signed()) + 8 {
            zero @ 0..16 => Ok(zero as u8),
            _ => Err(wrong(tensor, format!("number {place} is {}, outside -8 to 7", byte.cast_signed()))),
        };
        tensor.bytes()?.into_iter().enumerate().map(zero).collect()
    }
}
