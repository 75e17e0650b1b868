//! bitsandbytes: NF4 and FP4 with and without double quantization, and int8.
//!
//! ```text
//! P.weight                      U8 [n / 2, 1]: the matrix as one line, the even element in the
//!                               high half of a byte. Another storage type has the same bytes
//! P.weight.quant_map            F32 [16]
//! P.weight.absmax               F32 [n / blocksize], or U8 with double quantization
//! P.weight.nested_absmax        F32 [blocks / nested_blocksize]
//! P.weight.nested_quant_map     F32 [256]
//! P.weight.quant_state.bitsandbytes__nf4   U8: JSON, with dtype, shape, blocksize, nested_offset
//!
//! P.weight  I8 [o, i]    P.SCB  F32 [o]    P.weight_format  U8, 0: row-major        int8
//! ```
//!
//! Sources: `QuantState.as_dict` and `dequantize_4bit` (functional.py), `int8_vectorwise_dequant`
//! (_ops.py), `LinearFormat` (nn/modules.py) of bitsandbytes 0.50.

use finetune_store::{Dtype, TensorView};
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::module::{Module, check_count, check_dtype, check_shape, wrong};
use super::{Format, Found, Layout, numbers};
use crate::{Codes, Decoder, Groups, NibbleOrder, Numbers, PackedError, PackedMatrix, Rounding, Zeros};

const NF4_STATE: &str = ".weight.quant_state.bitsandbytes__nf4";
const FP4_STATE: &str = ".weight.quant_state.bitsandbytes__fp4";
/// Bytes of the JSON; it has about 200.
const MAX_STATE_BYTES: usize = 4096;
/// `dequantize_4bit` takes no others.
const BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];
/// What bitsandbytes multiplies with in the place of a division by 127: f32's nearest to its
/// 7.874015718698502e-3.
const ONE_127TH: f32 = 7.874_016e-3;

/// Scales that are packed too.
#[derive(Clone, Copy, Debug)]
struct Nested<'a> {
    absmax: TensorView<'a>,
    map: TensorView<'a>,
    block: usize,
    offset: f32,
}

#[derive(Debug)]
struct FourBits<'a> {
    shape: [usize; 2],
    codes: TensorView<'a>,
    map: TensorView<'a>,
    absmax: TensorView<'a>,
    nested: Option<Nested<'a>>,
    block: usize,
    rounding: Rounding,
}

pub(super) fn find_4_bits<'a>(module: &Module<'a>) -> Result<Found<'a>, PackedError> {
    let (tensor, nf4) = match (module.get(NF4_STATE), module.get(FP4_STATE)) {
        (Some(state), None) => (state, true),
        (None, Some(state)) => (state, false),
        (Some(state), Some(_)) => return Err(wrong(&state, format!("`{}{FP4_STATE}` is there too", module.stem))),
        (None, None) => {
            return Err(module.need(NF4_STATE).err().unwrap_or_else(|| module.wrong("it has no quant_state")));
        }
    };
    let state = State::read(tensor)?;
    let kind = state.text("quant_type")?;
    if kind != if nf4 { "nf4" } else { "fp4" } {
        return Err(wrong(&tensor, format!("its quant_type is {kind:?}")));
    }
    state.check_shape([module.rows, module.columns])?;
    let block = state.count("blocksize")?;
    if !BLOCK_SIZES.contains(&block) {
        return Err(wrong(
            &tensor,
            format!("its blocksize is {block}, and bitsandbytes has 32 to 4096 by powers of two"),
        ));
    }
    let codes = module.need(".weight")?;
    if codes.size() != module.elements().div_ceil(2) {
        let what = format!(
            "it has {} bytes, and {} x {} codes of 4 bits take {}",
            codes.size(),
            module.rows,
            module.columns,
            module.elements().div_ceil(2)
        );
        return Err(wrong(&codes, what));
    }
    check_dtype(&codes, &[Dtype::U8, Dtype::I8, Dtype::BF16, Dtype::F16, Dtype::F32])?;
    let map = module.need(".weight.quant_map")?;
    check_dtype(&map, &[Dtype::F32])?;
    check_count(&map, 16)?;
    let absmax = module.need(".weight.absmax")?;
    let blocks = module.elements().div_ceil(block);
    let nested = nested(module, &state, blocks)?;
    check_dtype(&absmax, if nested.is_some() { &[Dtype::U8] } else { &[Dtype::F32] })?;
    check_count(&absmax, blocks)?;
    let rounding = state.rounding()?;
    let format = Format::Bitsandbytes4 { nf4, double: nested.is_some(), block };
    let shape = [module.rows, module.columns];
    Ok(Found { format, layout: Box::new(FourBits { shape, codes, map, absmax, nested, block, rounding }) })
}

fn nested<'a>(module: &Module<'a>, state: &State<'_>, blocks: usize) -> Result<Option<Nested<'a>>, PackedError> {
    let ends = [".weight.nested_absmax", ".weight.nested_quant_map"];
    if module.names(&ends).is_empty() && !state.has("nested_offset") && !state.has("nested_blocksize") {
        return Ok(None);
    }
    let [absmax, map] = [module.need(ends[0])?, module.need(ends[1])?];
    for tensor in [&absmax, &map] {
        check_dtype(tensor, &[Dtype::F32])?;
    }
    let dtype = state.text("nested_dtype")?;
    if dtype != "float32" {
        return Err(wrong(&state.tensor, format!("its nested_dtype is {dtype:?}, and `float32` is needed")));
    }
    let block = state.count("nested_blocksize")?;
    if !block.is_power_of_two() {
        return Err(wrong(&state.tensor, format!("its nested_blocksize is {block}, and a power of two is needed")));
    }
    check_count(&absmax, blocks.div_ceil(block))?;
    check_count(&map, 256)?;
    Ok(Some(Nested { absmax, map, block, offset: state.number("nested_offset")? }))
}

/// The weight whose numbers beside its tensors are in the one of this name. `None`: that has no such numbers.
pub(super) fn weight_of_state(name: &str) -> Option<&str> {
    let stem = [NF4_STATE, FP4_STATE].into_iter().find_map(|end| name.strip_suffix(end))?;
    name.get(..stem.len() + ".weight".len())
}

/// The shape of a weight, out of the numbers beside its tensors.
pub(super) fn shape_in_state(tensor: TensorView<'_>) -> Result<[usize; 2], PackedError> {
    let state = State::read(tensor)?;
    match *state.shape().unwrap_or_default() {
        [rows, columns] => Ok([rows, columns]),
        _ => Err(state.wrong("shape", "a list of two lengths")),
    }
}

/// The numbers beside the tensors.
struct State<'a> {
    tensor: TensorView<'a>,
    json: Map<String, Value>,
}

impl<'a> State<'a> {
    fn read(tensor: TensorView<'a>) -> Result<Self, PackedError> {
        check_dtype(&tensor, &[Dtype::U8])?;
        if tensor.size() > MAX_STATE_BYTES {
            return Err(wrong(&tensor, format!("it has {} bytes, more than {MAX_STATE_BYTES}", tensor.size())));
        }
        match serde_json::from_slice(&tensor.bytes()?) {
            Ok(json) => Ok(Self { tensor, json }),
            Err(error) => Err(wrong(&tensor, format!("it is no JSON object: {error}"))),
        }
    }

    fn has(&self, key: &str) -> bool {
        self.json.get(key).is_some_and(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, needed: &str) -> PackedError {
        let what = match self.json.get(key) {
            Some(value) => format!("its {key} is {}, and {needed} is needed", cut(value)),
            None => format!("it has no {key}"),
        };
        wrong(&self.tensor, what)
    }

    fn text(&self, key: &str) -> Result<&str, PackedError> {
        self.json.get(key).and_then(Value::as_str).ok_or_else(|| self.wrong(key, "a text"))
    }

    fn count(&self, key: &str) -> Result<usize, PackedError> {
        let count = self.json.get(key).and_then(Value::as_u64).and_then(|count| usize::try_from(count).ok());
        count.filter(|count| *count > 0).ok_or_else(|| self.wrong(key, "a whole number from 1 on"))
    }

    fn number(&self, key: &str) -> Result<f32, PackedError> {
        let number = self.json.get(key).and_then(Value::as_f64).map(|number| number as f32);
        number.filter(|number| number.is_finite()).ok_or_else(|| self.wrong(key, "a number of f32"))
    }

    fn check_shape(&self, [rows, columns]: [usize; 2]) -> Result<(), PackedError> {
        if self.shape().as_deref() == Some(&[rows, columns]) {
            return Ok(());
        }
        Err(self.wrong("shape", &format!("[{rows}, {columns}]")))
    }

    fn shape(&self) -> Option<Vec<usize>> {
        let length = |value: &Value| value.as_u64().and_then(|length| usize::try_from(length).ok());
        self.json.get("shape")?.as_array()?.iter().map(length).collect()
    }

    fn rounding(&self) -> Result<Rounding, PackedError> {
        match self.text("dtype")? {
            "float32" => Ok(Rounding::None),
            "float16" => Ok(Rounding::F16),
            "bfloat16" => Ok(Rounding::BF16),
            _ => Err(self.wrong("dtype", "`float32`, `float16` or `bfloat16`")),
        }
    }
}

fn cut(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

impl FourBits<'_> {
    fn scales(&self) -> Result<Vec<f32>, PackedError> {
        let Some(nested) = self.nested else {
            let scales = numbers::read_f32(&self.absmax)?;
            // The largest magnitude of a block: 0 for a block of zeros, and never less.
            return match scales.iter().position(|scale| *scale < 0.0) {
                Some(place) => Err(wrong(&self.absmax, format!("number {place} is {}, below 0", scales[place]))),
                None => Ok(scales),
            };
        };
        let (of_blocks, map) = (numbers::read_f32(&nested.absmax)?, numbers::read_f32(&nested.map)?);
        let codes = self.absmax.bytes()?;
        // The product is rounded, then the sum: bitsandbytes stores the one before it adds the
        // other. A scale near 0 may come out below it.
        let value =
            |(place, code): (usize, &u8)| map[usize::from(*code)] * of_blocks[place / nested.block] + nested.offset;
        let scales: Vec<f32> = codes.iter().enumerate().map(value).collect();
        numbers::check_f32(&self.absmax, &scales)?;
        Ok(scales)
    }
}

impl Layout for FourBits<'_> {
    fn memory(&self) -> u64 {
        let blocks = self.absmax.size() / self.absmax.dtype.size();
        (self.codes.size() + 4 * blocks + 4 * 16) as u64
    }

    fn read(&self) -> Result<PackedMatrix, PackedError> {
        let columns = self.shape[1];
        // The same groups. Those inside a row are quicker to decode.
        let groups = match columns.is_multiple_of(self.block) {
            true => Groups::Blocks { rows: 1, columns: self.block },
            false => Groups::Flat { elements: self.block },
        };
        Ok(PackedMatrix {
            shape: self.shape,
            codes: Codes::new(self.codes.bytes()?, 4, 4 * columns, NibbleOrder::HighFirst),
            scales: Numbers::F32(self.scales()?),
            groups,
            decoder: Decoder::Table { table: numbers::read_f32(&self.map)? },
            rounding: self.rounding,
        })
    }
}

#[derive(Debug)]
struct Int8<'a> {
    shape: [usize; 2],
    codes: TensorView<'a>,
    scales: TensorView<'a>,
}

pub(super) fn find_int8<'a>(module: &Module<'a>) -> Result<Found<'a>, PackedError> {
    let (codes, scales) = (module.need(".weight")?, module.need(".SCB")?);
    check_dtype(&codes, &[Dtype::I8])?;
    check_shape(&codes, &[module.rows, module.columns])?;
    check_dtype(&scales, &[Dtype::F32])?;
    check_count(&scales, module.rows)?;
    // Files of before the key are row-major too.
    if let Some(format) = module.get(".weight_format") {
        check_dtype(&format, &[Dtype::U8])?;
        check_count(&format, 1)?;
        let order = format.bytes()?;
        if order != [0] {
            return Err(PackedError::NotRead {
                path: Some(format.path().to_owned()),
                name: format.name.to_owned(),
                format: format!("bitsandbytes int8 in the order {} of a CUDA card", order[0]),
                instead: "save the model again with a bitsandbytes of 2024 or later, which writes row-major codes",
            });
        }
    }
    let shape = [module.rows, module.columns];
    Ok(Found { format: Format::Bitsandbytes8, layout: Box::new(Int8 { shape, codes, scales }) })
}

/// Signed codes of 8 bits as unsigned ones whose zero is 128.
pub(super) fn shift(mut codes: Vec<u8>) -> Vec<u8> {
    codes.par_chunks_mut(1 << 16).for_each(|codes| codes.iter_mut().for_each(|code| *code ^= 0x80));
    codes
}

impl Layout for Int8<'_> {
    fn memory(&self) -> u64 {
        (self.codes.size() + self.scales.size()) as u64
    }

    fn read(&self) -> Result<PackedMatrix, PackedError> {
        let scales = numbers::read_f32(&self.scales)?;
        // The largest magnitude of a row: 0 for a row of zeros, and never less.
        if let Some(place) = scales.iter().position(|scale| *scale < 0.0) {
            return Err(wrong(&self.scales, format!("number {place} is {}, below 0", scales[place])));
        }
        Ok(PackedMatrix {
            shape: self.shape,
            codes: Codes::new(shift(self.codes.bytes()?), 8, 8 * self.shape[1], NibbleOrder::LowFirst),
            scales: Numbers::F32(scales),
            groups: Groups::Blocks { rows: 1, columns: self.shape[1] },
            decoder: Decoder::Shifted { zeros: Zeros::All(128), factor: ONE_127TH },
            rounding: Rounding::None,
        })
    }
}
