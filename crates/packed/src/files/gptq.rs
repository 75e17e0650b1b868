//! GPTQ, of 2, 3, 4 and 8 bits, and AWQ in the version `gemm`.
//!
//! ```text
//!           GPTQ                                           AWQ
//! P.qweight I32 [i · bits / 32, o], streams along i        I32 [i, o / 8], outputs 0 2 4 6 1 3 5 7
//! P.qzeros  I32 [groups, o · bits / 32], streams along o   I32 [groups, o / 8], in the same order
//! P.scales  F16, BF16 or F32 [groups, o]                   the same
//! P.g_idx   I32 [i], the group of each input               -
//! ```
//!
//! The value is (code - zero) · scale. GPTQ files store the zero point less one, unless
//! `checkpoint_format` is `gptq_v2`. A word of a stream of 3 bits has codes that go on in the next
//! word, as in every little-endian stream.
//!
//! A stream along the inputs is a row of codes already, once the words are transposed.
//!
//! Sources: utils/model.py and utils/model_dequant.py of GPTQModel f4c327a1, utils/packing_utils.py
//! of AutoAWQ 0.2.7.

use finetune_store::{Dtype, TensorView};

use super::config::{Gptq, Method, PackedConfig};
use super::group_index::{GroupIndex, Unset};
use super::module::{FLOATS, Module, check_dtype, check_shape, matrix, wrong};
use super::{Format, Found, Layout, numbers, unpack};
use crate::{Codes, Decoder, Groups, NibbleOrder, Numbers, PackedError, PackedMatrix, Rounding, Zeros};

/// How the codes and zero points are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    /// Streams of bits, with the zero points as they are or less one.
    Gptq { bits: usize, exact_zeros: bool },
    /// 8 outputs a word.
    Awq,
}

#[derive(Debug)]
struct Transposed<'a> {
    shape: [usize; 2],
    codes: TensorView<'a>,
    zeros: TensorView<'a>,
    scales: TensorView<'a>,
    groups: Groups,
    packing: Packing,
}

pub(super) fn find<'a>(module: &Module<'a>, config: &PackedConfig) -> Result<Found<'a>, PackedError> {
    let codes = module.need(".qweight")?;
    let [outputs, inputs] = module.shape();
    if codes.dtype == Dtype::I16 {
        return Err(not_read(&codes, "AWQ in the version gemv_fast"));
    }
    check_dtype(&codes, &[Dtype::I32])?;
    let of_gptq = |bits: &usize| (inputs * bits).is_multiple_of(32) && codes.shape == [inputs * bits / 32, outputs];
    if let Some(bits) = [2, 3, 4, 8].into_iter().find(of_gptq) {
        return find_gptq(module, config, codes, bits);
    }
    if outputs.is_multiple_of(8) && codes.shape == [inputs, outputs / 8] {
        return find_awq(module, config, codes);
    }
    if inputs.is_multiple_of(8) && codes.shape == [outputs, inputs / 8] {
        return Err(not_read(&codes, "AWQ in the version gemv"));
    }
    let what = format!(
        "it has shape {:?}, and a matrix of {outputs} x {inputs} has [{} · bits, {outputs}] in GPTQ (2, 3, 4 and 8 bits) and [{inputs}, {}] in AWQ",
        codes.shape,
        inputs / 32,
        outputs / 8
    );
    Err(wrong(&codes, what))
}

fn not_read(codes: &TensorView<'_>, format: &str) -> PackedError {
    PackedError::NotRead {
        path: Some(codes.path().to_owned()),
        name: codes.name.to_owned(),
        format: format.to_owned(),
        instead: "use an upload in the version `gemm`, or the 16-bit model with `model.quantization`",
    }
}

fn find_gptq<'a>(
    module: &Module<'a>,
    config: &PackedConfig,
    codes: TensorView<'a>,
    bits: usize,
) -> Result<Found<'a>, PackedError> {
    let [outputs, inputs] = module.shape();
    // Old directories have their settings in quantize_config.json, and are of the first form.
    let settings = match config.method() {
        Some(Method::Gptq(settings)) => settings.clone(),
        None => Gptq::default(),
        Some(_) => return Err(wrong(&codes, "it has the shape of GPTQ, and config.json names another quant_method")),
    };
    let (zeros, scales, count) = groups(module, (outputs * bits).div_ceil(32))?;
    if let Some(said) = settings.bits.filter(|said| *said != bits && !settings.dynamic) {
        return Err(wrong(&codes, format!("it has {bits} bits, and config.json says {said}")));
    }
    let said = settings.group.filter(|_| !settings.dynamic).map(|group| if group == 0 { inputs } else { group });
    let group = match said {
        Some(group) if inputs.div_ceil(group) == count => group,
        Some(group) => {
            let what = format!("it has {count} groups, and config.json says groups of {group} of the {inputs} inputs");
            return Err(wrong(&scales, what));
        }
        None => module.group_size(&scales, inputs, count)?,
    };
    let index = match module.get(".g_idx") {
        Some(tensor) => GroupIndex::read(&tensor, inputs, count, group, Unset::Refused)?,
        None => GroupIndex::Ordinary,
    };
    let format = Format::Gptq { bits, group, act_order: index != GroupIndex::Ordinary };
    let groups = index.groups(count).unwrap_or(Groups::Blocks { rows: 1, columns: group });
    let packing = Packing::Gptq { bits, exact_zeros: settings.exact_zeros };
    let layout = Transposed { shape: module.shape(), codes, zeros, scales, groups, packing };
    Ok(Found { format, layout: Box::new(layout) })
}

fn find_awq<'a>(module: &Module<'a>, config: &PackedConfig, codes: TensorView<'a>) -> Result<Found<'a>, PackedError> {
    let [outputs, inputs] = module.shape();
    let said = match config.method() {
        Some(Method::Awq { group }) => *group,
        None => None,
        Some(_) => return Err(wrong(&codes, "it has the shape of AWQ, and config.json names another quant_method")),
    };
    let (zeros, scales, count) = groups(module, outputs / 8)?;
    let group = module.group_size(&scales, inputs, count)?;
    if let Some(said) = said.filter(|said| *said != group) {
        return Err(wrong(&scales, format!("it has groups of {group}, and config.json says {said}")));
    }
    if let Some(index) = module.get(".g_idx") {
        return Err(wrong(&index, "AWQ has no order of columns"));
    }
    let groups = Groups::Blocks { rows: 1, columns: group };
    let layout = Transposed { shape: module.shape(), codes, zeros, scales, groups, packing: Packing::Awq };
    Ok(Found { format: Format::Awq { group }, layout: Box::new(layout) })
}

/// Zero points of so many words a group, scales, and the number of groups.
fn groups<'a>(module: &Module<'a>, words: usize) -> Result<(TensorView<'a>, TensorView<'a>, usize), PackedError> {
    let (zeros, scales) = (module.need(".qzeros")?, module.need(".scales")?);
    check_dtype(&zeros, &[Dtype::I32])?;
    check_dtype(&scales, &FLOATS)?;
    let [count, _] = matrix(&scales)?;
    check_shape(&scales, &[count, module.rows])?;
    check_shape(&zeros, &[count, words])?;
    if count == 0 || count > module.columns {
        return Err(wrong(&scales, format!("it has {count} groups of {} inputs", module.columns)));
    }
    Ok((zeros, scales, count))
}

impl Transposed<'_> {
    fn count(&self) -> usize {
        self.scales.shape[0]
    }

    /// [o, groups]
    fn scales(&self) -> Result<Numbers, PackedError> {
        let [rows, count] = [self.shape[0], self.count()];
        // Checked in the order of the file, so that the message has the place in the tensor.
        let numbers = numbers::read(&self.scales)?;
        let order = |place: usize| place % count * rows + place / count;
        Ok(match numbers {
            Numbers::F32(values) => Numbers::F32((0..values.len()).map(|place| values[order(place)]).collect()),
            Numbers::F16(values) => Numbers::F16((0..values.len()).map(|place| values[order(place)]).collect()),
            Numbers::BF16(values) => Numbers::BF16((0..values.len()).map(|place| values[order(place)]).collect()),
            other => other,
        })
    }

    /// [o, groups]
    fn zeros(&self) -> Result<Vec<u8>, PackedError> {
        let ([rows, _], count) = (self.shape, self.count());
        let mut bytes = self.zeros.bytes()?;
        let (bits, exact) = match self.packing {
            Packing::Awq => {
                let zeros = unpack::along_columns(bytes, count, rows, 4);
                return Ok(unpack::awq_zeros(&zeros, count));
            }
            Packing::Gptq { bits, exact_zeros } => (bits, exact_zeros),
        };
        if exact {
            return Ok(unpack::along_columns(bytes, count, rows, bits));
        }
        if bits == 3 {
            let zeros = unpack::along_columns(bytes, count, rows, bits);
            return Ok(zeros.into_iter().map(|zero| (zero + 1) & 7).collect());
        }
        // All zero points of a word at a time, as GPTQModel takes one off them: a zero point of 0
        // borrows from the next one, and gives it back here.
        let ones = u32::MAX / ((1 << bits) - 1);
        for word in bytes.as_chunks_mut::<4>().0 {
            *word = u32::from_le_bytes(*word).wrapping_add(ones).to_le_bytes();
        }
        Ok(unpack::along_columns(bytes, count, rows, bits))
    }
}

impl Layout for Transposed<'_> {
    fn memory(&self) -> u64 {
        let [rows, columns] = self.shape;
        let codes = match self.packing {
            Packing::Gptq { .. } => self.codes.size(),
            Packing::Awq => rows * columns.div_ceil(2),
        };
        (codes + self.scales.size() + rows * self.count()) as u64
    }

    fn read(&self) -> Result<PackedMatrix, PackedError> {
        let [rows, columns] = self.shape;
        let bytes = self.codes.bytes()?;
        let (codes, bits, row_bits) = match self.packing {
            Packing::Gptq { bits, .. } => {
                let words = columns * bits / 32;
                (unpack::transpose::<4>(&bytes, words, rows), bits, 32 * words)
            }
            Packing::Awq => (unpack::awq_codes(&bytes, columns, rows), 4, 8 * columns.div_ceil(2)),
        };
        drop(bytes);
        Ok(PackedMatrix {
            shape: self.shape,
            codes: Codes::new(codes, bits, row_bits, NibbleOrder::LowFirst),
            scales: self.scales()?,
            groups: self.groups.clone(),
            decoder: Decoder::Shifted { zeros: Zeros::Each(self.zeros()?), factor: 1.0 },
            rounding: Rounding::None,
        })
    }
}
