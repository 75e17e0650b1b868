//! Packed matrices in a GPU's memory, and embeddings by row.
//!
//! Codes stay as they are in the file. Scales, biases, zero points and the table follow each other
//! in one buffer of 32-bit words, each list in the type that its file has it in. A matrix is decoded
//! into a temporary tensor whenever it is multiplied; burn's memory pool gives that memory to the
//! next one.

use std::ops::Range;

use burn::backend::{DispatchDevice, TensorMetadata};
use burn::tensor::{DType, Device, Shape, TensorData};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use finetune_packed::{Decoder, Groups, NibbleOrder, Numbers, PackedMatrix, Rounding, Zeros};

use super::packed_kernels::{Form, Grouping, Meaning, NO_SHIFT, PackedArgument, decode_kernel, few_rows_kernel};
use super::packed_numbers::{Grid, NumberKind};
use super::pointwise::{gather_rows, scaled};
use super::reduce::launch as launch_rows;
use super::tensor::{buffer, each_row, element, elements_of, empty, upload_u32};
use super::watch;
use crate::fused::Fused;
use crate::operations::PackedRows;
use crate::weight::{FrozenValues, Held, PackedWeight};

/// The most rows of x that [`PackedBuffers::few_rows`] multiplies. The card's matrix units take
/// eight at least.
pub(super) const FEW_ROWS: usize = 8;

/// A packed matrix [o, i] in the memory of a GPU.
#[derive(Debug)]
pub(crate) struct PackedBuffers {
    shape: [usize; 2],
    /// The codes, 32 bits a word.
    words: CubeTensor,
    /// The other lists, each from a word of its own on.
    tables: CubeTensor,
    place: PackedArgument,
    form: Form,
}

impl PackedBuffers {
    /// The matrix in the memory of a GPU. Its codes are handed over to whoever uploads them, beside the computing: a
    /// layer of a large model has a gigabyte of them.
    ///
    /// # Panics
    /// If the matrix has fewer codes, scales, biases, zero points or table entries than its shape
    /// and groups call for: kernels do not check.
    pub(crate) fn upload(matrix: PackedMatrix, device: &Device) -> PackedBuffers {
        ensure_whole(&matrix);
        let device = cube_device(device);
        let columns = matrix.shape[1];
        let mut tables = Tables::default();
        let mut place = place_of(columns, matrix.codes.row_bits());
        let mut form = form_of(matrix.codes.bits(), matrix.codes.row_bits());
        form.high_first = matrix.codes.order() == NibbleOrder::HighFirst;
        form.rounding = match matrix.rounding {
            Rounding::None => Grid::F32,
            Rounding::F16 => Grid::F16,
            Rounding::BF16 => Grid::BF16,
        };
        set_groups(&matrix.groups, columns, &mut form, &mut place, &mut tables);
        let scales = tables.numbers(&matrix.scales);
        (form.scales, place.scales, place.scale_factors, place.factors_a_scale) = scales;
        match &matrix.decoder {
            Decoder::Affine { biases } => {
                form.meaning = Meaning::Affine;
                let biases = tables.numbers(biases);
                (form.biases, place.biases, place.bias_factors, place.factors_a_bias) = biases;
            }
            Decoder::Shifted { zeros, factor } => {
                form.meaning = Meaning::Shifted;
                (form.factor, place.factor) = (*factor != 1.0, *factor);
                match zeros {
                    Zeros::All(zero) => place.zero = f32::from(*zero),
                    Zeros::Each(zeros) => (form.each_zero, place.zeros) = (true, tables.bytes(zeros)),
                }
            }
            Decoder::Table { table } => {
                form.meaning = Meaning::Table;
                place.table = tables.words(table.iter().map(|value| value.to_bits()));
            }
        }
        let shape = matrix.shape;
        let words = words_on(&device, matrix.codes.into_bytes());
        let mut tables = tables.0;
        tables.resize(tables.len().max(1), 0);
        let count = tables.len();
        let tables = on(&device, TensorData::new(tables, [count]));
        PackedBuffers { shape, words, tables, place, form }
    }

    /// A matrix [o, i] of 16-bit floats as one whose codes are the floats' bits. No element is
    /// moved. `None` for another number type.
    pub(super) fn of_halves(matrix: &CubeTensor) -> Option<PackedBuffers> {
        let kind = match matrix.dtype {
            DType::F16 => NumberKind::F16,
            DType::BF16 => NumberKind::BF16,
            _ => return None,
        };
        let shape = [matrix.shape()[0], matrix.shape()[1]];
        let row_bits = 16 * shape[1];
        let mut form = form_of(16, row_bits);
        (form.meaning, form.scales, form.steady) = (Meaning::Float, kind, true);
        let words = Shape::from([elements_of(matrix).div_ceil(2)]);
        let (client, device, handle) = (matrix.client.clone(), matrix.device.clone(), matrix.handle.clone());
        let words = CubeTensor::new_contiguous(client, device, words, handle, DType::U32);
        let tables = words.clone();
        Some(PackedBuffers { shape, words, tables, place: place_of(shape[1], row_bits), form })
    }

    /// [o, i]
    pub(super) fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Rows of the matrix, decoded: [rows, i].
    pub(super) fn rows(&self, rows: Range<usize>, dtype: DType) -> CubeTensor {
        assert!(rows.start <= rows.end && rows.end <= self.shape[0], "rows of the matrix");
        self.decode(rows.len(), rows.start, None, dtype)
    }

    /// The rows that `rows` names, decoded: u32 [n] -> [n, i]. The caller has checked that all are
    /// below o.
    fn gathered(&self, rows: &CubeTensor, dtype: DType) -> CubeTensor {
        self.decode(elements_of(rows), 0, Some(rows), dtype)
    }

    fn decode(&self, count: usize, first: usize, rows: Option<&CubeTensor>, dtype: DType) -> CubeTensor {
        let columns = self.shape[1];
        let out = empty(&self.words, [count, columns], dtype);
        // Without a list of rows, the kernel reads none, but needs one to bind.
        let row_list = rows.unwrap_or(&self.words);
        launch_rows!(
            decode_kernel,
            out.client,
            count,
            columns,
            [
                buffer(&self.words),
                buffer(&self.tables),
                buffer(row_list),
                buffer(&out),
                self.place.launch(),
                first,
                self.form,
                grid_of(dtype),
                rows.is_some(),
            ],
            element(dtype)
        );
        out
    }

    /// `x Wᵀ` for x [t, i] of 1 to [`FEW_ROWS`] rows, without decoding W into memory: [t, o].
    pub(super) fn few_rows(&self, x: &CubeTensor) -> CubeTensor {
        let [outputs, columns] = self.shape;
        let tokens = x.shape()[0];
        assert!((1..=FEW_ROWS).contains(&tokens) && x.shape()[1] == columns, "a few rows of inputs");
        let out = empty(x, [tokens, outputs], x.dtype);
        launch_rows!(
            few_rows_kernel,
            out.client,
            outputs,
            columns.div_ceil(self.form.span),
            [
                buffer(&self.words),
                buffer(&self.tables),
                buffer(x),
                buffer(&out),
                self.place.launch(),
                outputs,
                self.form,
                grid_of(x.dtype),
                tokens,
            ],
            element(x.dtype)
        );
        watch::tick(&out);
        out
    }
}

/// All elements of a matrix in the memory of a GPU.
pub(crate) fn dense_on(values: FrozenValues, shape: [usize; 2], device: &Device) -> CubeTensor {
    let device = cube_device(device);
    let data = match values {
        FrozenValues::F32(values) => TensorData::new(values, shape),
        FrozenValues::F16(values) => TensorData::new(values, shape),
        FrozenValues::Bf16(values) => TensorData::new(values, shape),
    };
    on(&device, data)
}

/// The matrix of a weight that is multiplied with tensors of a GPU.
pub(super) fn buffers(weight: &PackedWeight) -> &PackedBuffers {
    match &*weight.held {
        Held::Gpu(buffers) => buffers,
        Held::DenseOnGpu(_) => unreachable!("a matrix of all elements is multiplied as such"),
        Held::Host(_) | Held::Bf16(_) | Held::F16(_) | Held::F32(_) | Held::OnShelf(..) => {
            unreachable!("a matrix of the host is not multiplied with tensors of a GPU")
        }
    }
}

impl Fused<CubeBackend, 1> for PackedRows {
    type Saved = ();

    fn forward(self, [like]: [CubeTensor; 1], _: [bool; 1]) -> (CubeTensor, ()) {
        let [count, _] = self.w.shape();
        assert!(self.rows.iter().all(|&row| (row as usize) < count), "a row beyond the matrix");
        let rows = upload_u32(&like, &self.rows);
        let values = match &*self.w.held {
            Held::DenseOnGpu(tensor) => scaled(&gather_rows(tensor, &rows, 0, self.rows.len()), like.dtype, 1.0),
            _ => buffers(&self.w).gathered(&rows, like.dtype),
        };
        (values, ())
    }

    fn backward(_: (), _: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        [None]
    }
}

/// The lists of a matrix, one after the other, in little-endian words.
#[derive(Default)]
struct Tables(Vec<u32>);

impl Tables {
    /// Adds a list. Returns the word that it begins at, as all of these do.
    fn words(&mut self, words: impl Iterator<Item = u32>) -> usize {
        let start = self.0.len();
        self.0.extend(words);
        start
    }

    fn bytes(&mut self, bytes: &[u8]) -> usize {
        self.words(bytes.chunks(4).map(|bytes| bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte))))
    }

    /// Two numbers of 16 bits a word.
    fn halves(&mut self, len: usize, bits: impl Fn(usize) -> u16) -> usize {
        let half = |n: usize| if n < len { u32::from(bits(n)) } else { 0 };
        self.words((0..len.div_ceil(2)).map(|word| half(2 * word) | half(2 * word + 1) << 16))
    }

    /// (kind, start, start of the factors, factors that share a number); the last two are for
    /// products.
    fn numbers(&mut self, numbers: &Numbers) -> (NumberKind, usize, usize, usize) {
        let (kind, start) = match numbers {
            Numbers::F32(values) => (NumberKind::F32, self.words(values.iter().map(|value| value.to_bits()))),
            Numbers::F16(values) => (NumberKind::F16, self.halves(values.len(), |n| values[n].to_bits())),
            Numbers::BF16(values) => (NumberKind::BF16, self.halves(values.len(), |n| values[n].to_bits())),
            Numbers::E8M0(values) => (NumberKind::E8M0, self.bytes(values)),
            Numbers::E4M3(values) => (NumberKind::E4M3, self.bytes(values)),
            Numbers::Product { scales, factors, per } => {
                let start = self.halves(scales.len(), |n| scales[n].to_bits());
                let factors: Vec<u8> = factors.iter().map(|&factor| factor as u8).collect();
                return (NumberKind::Product, start, self.bytes(&factors), *per);
            }
        };
        (kind, start, 0, 1)
    }
}

/// The argument of a matrix without lists, each of whose elements is a group.
fn place_of(columns: usize, row_bits: usize) -> PackedArgument {
    PackedArgument {
        columns,
        row_words: row_bits / 32,
        row_bits: row_bits % 32,
        group_rows: 1,
        group_size: 1,
        row_groups: columns,
        scales: 0,
        scale_factors: 0,
        factors_a_scale: 1,
        biases: 0,
        bias_factors: 0,
        factors_a_bias: 1,
        zeros: 0,
        zero: 0.0,
        factor: 1.0,
        table: 0,
        column_groups: 0,
        nothing: 0,
    }
}

/// The form of codes of `bits` each whose rows start `row_bits` apart. What a code means is filled
/// in by the caller.
fn form_of(bits: usize, row_bits: usize) -> Form {
    let aligned = 32usize.is_multiple_of(bits) && row_bits.is_multiple_of(32);
    Form {
        bits,
        high_first: false,
        crossing: !32usize.is_multiple_of(bits) || !row_bits.is_multiple_of(bits),
        aligned,
        span: if aligned { 32 / bits } else { 8 },
        steady: false,
        grouping: Grouping::Blocks,
        group_shift: 0,
        meaning: Meaning::Table,
        scales: NumberKind::F32,
        biases: NumberKind::F32,
        each_zero: false,
        factor: false,
        rounding: Grid::F32,
    }
}

/// Fills in which elements share a scale.
fn set_groups(groups: &Groups, columns: usize, form: &mut Form, place: &mut PackedArgument, tables: &mut Tables) {
    let span = form.span;
    match groups {
        Groups::Blocks { rows, columns: size } => {
            (place.group_rows, place.group_size, place.row_groups) = (*rows, *size, columns.div_ceil(*size));
            form.steady = size.is_multiple_of(span) || *size >= columns;
        }
        Groups::Flat { elements } => {
            form.grouping = Grouping::Flat;
            place.group_size = *elements;
            form.steady = elements.is_multiple_of(span) && columns.is_multiple_of(span);
        }
        Groups::OfColumns { group, count } => {
            form.grouping = Grouping::OfColumns;
            place.row_groups = *count;
            place.column_groups = tables.words(group.iter().copied());
        }
    }
    let size = place.group_size;
    form.group_shift = if size.is_power_of_two() { size.trailing_zeros() } else { NO_SHIFT };
}

/// The grid of the numbers of a type.
fn grid_of(dtype: DType) -> Grid {
    match dtype {
        DType::F16 => Grid::F16,
        DType::BF16 => Grid::BF16,
        _ => Grid::F32,
    }
}

/// Panics if a list is too short for the matrix.
fn ensure_whole(matrix: &PackedMatrix) {
    let PackedMatrix { shape, codes, scales, groups, decoder, .. } = matrix;
    let [rows, columns] = *shape;
    assert!(codes.bytes().len() >= codes.bytes_needed(rows, columns), "a code for each element");
    let count = groups.count(*shape);
    assert!(scales.len() >= count, "a scale for each group");
    if let Groups::OfColumns { group, count } = groups {
        let inside = group.iter().all(|&group| (group as usize) < *count);
        assert!(group.len() >= columns && inside, "a group for each column");
    }
    match decoder {
        Decoder::Affine { biases } => assert!(biases.len() >= count, "a bias for each group"),
        Decoder::Shifted { zeros: Zeros::Each(zeros), .. } => {
            assert!(zeros.len() >= count, "a zero point for each group");
        }
        Decoder::Shifted { .. } => {}
        Decoder::Table { table } => assert!(table.len() >= 1 << codes.bits(), "a value for each code"),
    }
    for numbers in [Some(scales), if let Decoder::Affine { biases } = decoder { Some(biases) } else { None }] {
        if let Some(Numbers::Product { scales, factors, per }) = numbers {
            assert!(*per > 0 && scales.len() * per >= factors.len(), "a scale for each factor");
        }
    }
}

/// burn's handle of a GPU.
fn cube_device(device: &Device) -> CubeDevice {
    match device.clone().without_autodiff().as_dispatch() {
        DispatchDevice::Cube(device) => device.clone(),
        other => unreachable!("{other:?} is no GPU"),
    }
}

/// The bytes on the device as little-endian words. Bytes that lack to the last word are zero, and
/// there is one word at least: a kernel needs a buffer to bind.
fn words_on(device: &CubeDevice, mut bytes: Vec<u8>) -> CubeTensor {
    let words = bytes.len().div_ceil(4).max(1);
    bytes.resize(4 * words, 0);
    let bytes = on(device, TensorData::new(bytes, [4 * words]));
    CubeTensor::new_contiguous(bytes.client, bytes.device, Shape::from([words]), bytes.handle, DType::U32)
}

/// Elements on the device, without a copy of them on the way there.
fn on(device: &CubeDevice, data: TensorData) -> CubeTensor {
    let (bytes, shape, dtype) = data.into_parts();
    let client = device.client();
    let handle = client.create(bytes);
    CubeTensor::new_contiguous(client, device.clone(), shape, handle, dtype)
}
