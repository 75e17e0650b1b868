//! Each operation over a packed matrix compared with its composed form over the same matrix in f32,
//! decoded by `PackedMatrix::value`: values and every gradient, for every form.
//!
//! The tests run on the CPU. With `FINETUNE_TEST_DEVICE=gpu` they run on the first GPU, a software
//! renderer if there is no other.

use burn::tensor::{DType, Device, Tensor, TensorData};
use finetune_kernels::devices::{gpus, is_cpu};
use finetune_kernels::weight::{self, PackedWeight, Weight};
use finetune_kernels::{Dropout, Targets, composed, operations};
use finetune_packed::{Codes, Decoder, Groups, NibbleOrder, Numbers, PackedMatrix, Rounding, Zeros};
use finetune_random::Stream;
use half::{bf16, f16};

mod tested;

/// Outputs of each matrix.
const OUTPUTS: usize = 21;

fn device() -> Device {
    tested::device().autodiff()
}

/// The number types that the device computes in.
fn compute_types() -> Vec<DType> {
    match gpus(true).into_iter().next() {
        Some(gpu) if !is_cpu(&device()) => gpu.types.iter().map(|kind| kind.dtype()).collect(),
        _ => vec![DType::F32],
    }
}

/// How far norms may lie apart, relative to the reference: roundings of the inputs, of the results
/// and, for a branch, of what is between.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 5e-3,
        DType::BF16 => 4e-2,
        _ => 1e-5,
    }
}

fn normal(seed: u64, count: usize) -> Vec<f32> {
    Stream::new(seed, 9, 0, 0).normal(count, 1.0)
}

fn bytes(seed: u64, count: usize) -> Vec<u8> {
    normal(seed, count).iter().map(|value| (value * 1e4) as i32 as u8).collect()
}

/// Scales: positive, between 0.01 and about 0.1.
fn scales(seed: u64, count: usize) -> Vec<f32> {
    normal(seed, count).iter().map(|value| 0.01 + 0.03 * value.abs()).collect()
}

fn in_f16(values: Vec<f32>) -> Numbers {
    Numbers::F16(values.into_iter().map(f16::from_f32).collect())
}

fn in_bf16(values: Vec<f32>) -> Numbers {
    Numbers::BF16(values.into_iter().map(bf16::from_f32).collect())
}

/// Two levels, four factors for each scale.
fn in_two_levels(seed: u64, count: usize) -> Numbers {
    let scales = scales(seed, count.div_ceil(4)).into_iter().map(|scale| f16::from_f32(scale / 40.0)).collect();
    let factors = bytes(seed + 1, count).into_iter().map(|byte| (byte % 64) as i8 - 20).collect();
    Numbers::Product { scales, factors, per: 4 }
}

/// [`OUTPUTS`] rows of random codes; `padded` rows start with a word.
fn codes(columns: usize, bits: usize, padded: bool, order: NibbleOrder) -> Codes {
    let row_bits = if padded { (columns * bits).next_multiple_of(32) } else { columns * bits };
    Codes::new(bytes(bits as u64, (OUTPUTS * row_bits).div_ceil(8)), bits, row_bits, order)
}

fn row_groups(columns: usize) -> Groups {
    Groups::Blocks { rows: 1, columns }
}

/// MLX's form: code · scale + bias over groups of 32 columns.
fn affine(columns: usize, bits: usize, padded: bool, numbers: &dyn Fn(Vec<f32>) -> Numbers) -> PackedMatrix {
    let groups = row_groups(32);
    let count = groups.count([OUTPUTS, columns]);
    // Values of about one size, whatever the number of bits.
    let steps = (1 << bits) as f32 / 16.0;
    PackedMatrix {
        shape: [OUTPUTS, columns],
        codes: codes(columns, bits, padded, NibbleOrder::LowFirst),
        scales: numbers(scales(1, count).iter().map(|scale| scale / steps).collect()),
        groups,
        decoder: Decoder::Affine { biases: numbers(normal(2, count).iter().map(|bias| bias * 0.1).collect()) },
        rounding: Rounding::None,
    }
}

/// A form with a value for each code.
fn table(columns: usize, bits: usize, order: NibbleOrder, groups: Groups, scales: Numbers) -> PackedMatrix {
    PackedMatrix {
        shape: [OUTPUTS, columns],
        codes: codes(columns, bits, false, order),
        scales,
        groups,
        decoder: Decoder::Table { table: normal(3, 1 << bits) },
        rounding: Rounding::None,
    }
}

/// (code - zero) · scale · factor.
fn shifted(columns: usize, bits: usize, groups: Groups, scales: Numbers, zeros: Zeros, factor: f32) -> PackedMatrix {
    PackedMatrix {
        shape: [OUTPUTS, columns],
        codes: codes(columns, bits, false, NibbleOrder::LowFirst),
        scales,
        groups,
        decoder: Decoder::Shifted { zeros, factor },
        rounding: Rounding::None,
    }
}

/// A matrix of every form, with its name.
fn forms() -> Vec<(&'static str, PackedMatrix)> {
    let flat = |columns: usize| (OUTPUTS * columns).div_ceil(64);
    let (blocks, of_columns) = (
        Groups::Blocks { rows: 16, columns: 16 },
        Groups::OfColumns { group: (0..40).map(|column| column * 7 % 3).collect(), count: 3 },
    );
    let nf4 = table(33, 4, NibbleOrder::HighFirst, Groups::Flat { elements: 64 }, Numbers::F32(scales(4, flat(33))));
    let fp4 = table(64, 4, NibbleOrder::HighFirst, Groups::Flat { elements: 64 }, Numbers::F32(scales(4, flat(64))));
    let e8m0 = Numbers::E8M0(bytes(5, OUTPUTS * 2).into_iter().map(|byte| 120 + byte % 6).collect());
    let e4m3 = Numbers::E4M3(bytes(6, OUTPUTS * 4).into_iter().map(|byte| byte % 0x38).collect());
    let fp8_scales = Numbers::F32(scales(7, blocks.count([OUTPUTS, 40])));
    let zeros = Zeros::Each(bytes(8, OUTPUTS * 3).into_iter().map(|byte| byte % 17).collect());
    let q5 = PackedMatrix {
        scales: in_two_levels(9, OUTPUTS * 2),
        decoder: Decoder::Affine { biases: in_two_levels(11, OUTPUTS * 2) },
        ..affine(64, 5, true, &Numbers::F32)
    };
    vec![
        ("mlx4", affine(64, 4, true, &in_bf16)),
        ("mlx4, a width that ends in mid-word", affine(36, 4, true, &in_f16)),
        ("2 bits, scales in f32", affine(64, 2, true, &Numbers::F32)),
        ("3 bits", affine(64, 3, true, &in_f16)),
        ("5 bits, rows from mid-word on", affine(41, 5, false, &in_f16)),
        ("6 bits", affine(64, 6, true, &in_bf16)),
        ("8 bits", affine(64, 8, true, &in_f16)),
        ("nf4, rows from mid-byte on", PackedMatrix { rounding: Rounding::BF16, ..nf4 }),
        ("fp4 in f16", PackedMatrix { rounding: Rounding::F16, ..fp4 }),
        ("int8", shifted(40, 8, row_groups(40), Numbers::F32(scales(12, OUTPUTS)), Zeros::All(128), 1.0 / 127.0)),
        ("gptq in the order of activations", shifted(40, 4, of_columns, in_f16(scales(13, OUTPUTS * 3)), zeros, 1.0)),
        ("fp8 in blocks", table(40, 8, NibbleOrder::LowFirst, blocks, fp8_scales)),
        ("mxfp4", table(64, 4, NibbleOrder::LowFirst, row_groups(32), e8m0)),
        ("nvfp4", table(64, 4, NibbleOrder::LowFirst, row_groups(16), e4m3)),
        ("two levels of scales", q5),
    ]
}

/// All elements by the definition.
fn decoded(matrix: &PackedMatrix) -> Vec<f32> {
    let [rows, columns] = matrix.shape;
    (0..rows).flat_map(|row| (0..columns).map(move |column| matrix.value(row, column))).collect()
}

fn tensor(values: Vec<f32>, shape: [usize; 2]) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), &device())
}

fn vec_of<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.cast(DType::F32).into_data().try_to_vec().expect("f32 data")
}

/// Panics if the norm of the difference over the norm of the reference is not below the bound.
fn assert_close(what: &str, got: &[f32], want: &[f32], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let size = norm(&mut want.iter().map(|v| f64::from(*v)));
    assert!(difference <= bound * size + 1e-5, "{what}: relative difference {:e}", difference / size);
}

/// An input that requires gradients: its shape and its number type.
type Input = ([usize; 2], DType);

/// The value, and the gradients of Σ out · weights.
fn outcome<const N: usize>(inputs: [Input; N], operation: &dyn Fn([Tensor<2>; N]) -> Tensor<2>) -> Vec<Vec<f32>> {
    let mut seed = 50;
    let tensors = inputs.map(|(shape, dtype)| {
        seed += 1;
        tensor(normal(seed, shape[0] * shape[1]), shape).cast(dtype).require_grad()
    });
    let out = operation(tensors.clone());
    let shape = out.dims();
    let weights = tensor(normal(77, shape[0] * shape[1]), shape);
    let gradients = (out.clone().cast(DType::F32) * weights).sum().backward();
    let mut results = vec![vec_of(out)];
    results.extend(tensors.iter().map(|input| vec_of(input.grad(&gradients).expect("a gradient"))));
    results
}

/// A check of an operation over packed matrices.
struct Check<'a, const N: usize> {
    name: &'a str,
    /// For a width of the matrix: the shapes of the inputs, activations first.
    shapes: &'a dyn Fn(usize) -> [[usize; 2]; N],
    /// How many of the inputs are activations. They have the number type that is computed in.
    activations: usize,
}

impl<const N: usize> Check<'_, N> {
    fn run(
        &self,
        packed: &dyn Fn([Tensor<2>; N], Weight) -> Tensor<2>,
        dense: &dyn Fn([Tensor<2>; N], Tensor<2>) -> Tensor<2>,
    ) {
        for (form, matrix) in forms() {
            let shapes = (self.shapes)(matrix.shape[1]);
            let w = tensor(decoded(&matrix), matrix.shape);
            let want = outcome(shapes.map(|shape| (shape, DType::F32)), &|inputs| dense(inputs, w.clone()));
            let held = PackedWeight::new(matrix, &device());
            for dtype in compute_types() {
                let types: [DType; N] = std::array::from_fn(|n| if n < self.activations { dtype } else { DType::F32 });
                let inputs: [Input; N] = std::array::from_fn(|n| (shapes[n], types[n]));
                let got = outcome(inputs, &|inputs| packed(inputs, Weight::Packed(held.clone())));
                for (n, (got, want)) in got.iter().zip(&want).enumerate() {
                    let what = if n == 0 { "value".to_owned() } else { format!("gradient of input {}", n - 1) };
                    assert_close(&format!("{} {dtype:?}, {form}: {what}", self.name), got, want, bound(dtype));
                }
            }
        }
    }
}

/// Bit for bit: embeddings by row, in an order of the caller's. In 16 bits each value is rounded to
/// the nearest.
#[test]
fn rows_are_decoded_to_the_defined_values() {
    for (form, matrix) in forms() {
        let rows: Vec<u32> = (0..OUTPUTS as u32).rev().chain([3, 3]).collect();
        let values = rows.iter().flat_map(|&row| (0..matrix.shape[1]).map(move |column| (row, column)));
        let values: Vec<f32> = values.map(|(row, column)| matrix.value(row as usize, column)).collect();
        let held = PackedWeight::new(matrix, &device());
        for dtype in compute_types() {
            let like = Tensor::<1>::from_data(TensorData::new(vec![0.0f32], [1]), &device()).cast(dtype);
            let got = vec_of(weight::packed_rows(like, held.clone(), rows.clone()));
            let want = values.iter().map(|&value| match dtype {
                DType::F16 => f16::from_f32(value).to_f32(),
                DType::BF16 => bf16::from_f32(value).to_f32(),
                _ => value,
            });
            for (n, (got, want)) in got.iter().zip(want).enumerate() {
                assert!(got.to_bits() == want.to_bits(), "{form} {dtype:?}, element {n}: {got} {want}");
            }
            assert_eq!(got.len(), values.len(), "{form}");
        }
    }
}

/// A single row, as many as are multiplied without decoding the matrix into memory, and more.
#[test]
fn packed_linear() {
    for tokens in [1, 8, 13] {
        Check { name: "linear", shapes: &|width| [[tokens, width]], activations: 1 }
            .run(&|[x], w| weight::linear(x, w), &|[x], w| composed::linear(x, w));
    }
}

#[test]
fn packed_lora_linear_with_and_without_dropout() {
    let dropout = Dropout {
        probability: 0.3,
        stream: Stream::new(5, 2, 3, 4),
        tokens: (0..14).map(|t| (t / 7, t % 7)).collect(),
    };
    for dropout in [None, Some(dropout)] {
        let name = format!("lora_linear, dropout {}", dropout.is_some());
        Check { name: &name, shapes: &|width| [[14, width], [3, width], [OUTPUTS, 3]], activations: 1 }
            .run(&|[x, a, b], w| weight::lora_linear(x, w, a, b, 1.7, dropout.clone()), &|[x, a, b], w| {
                composed::lora_linear(x, w, a, b, 1.7, dropout.clone())
            });
    }
}

#[test]
fn packed_cross_entropies_on_some_positions() {
    let vocabulary = OUTPUTS as u32;
    let targets = Targets::new((0..70).map(|n| n * 3 % 100).collect(), (0..70).map(|n| n * 7 % vocabulary).collect());
    Check { name: "linear_cross_entropy", shapes: &|width| [[100, width]], activations: 1 }
        .run(&|[h], w| weight::linear_cross_entropy(h, w, targets.clone()).reshape([1, 70]), &|[h], w| {
            composed::linear_cross_entropy(h, w, &targets).reshape([1, 70])
        });
    let shapes = |width: usize| [[100, width], [100, 3], [OUTPUTS, 3]];
    Check { name: "lora_cross_entropy", shapes: &shapes, activations: 2 }.run(
        &|[h, g, b], w| weight::lora_cross_entropy(h, w, g, b, 0.6, targets.clone()).reshape([1, 70]),
        &|[h, g, b], w| composed::lora_cross_entropy(h, w, g, b, 0.6, &targets).reshape([1, 70]),
    );
}

#[test]
fn packed_losses_without_gradients() {
    let targets = Targets::new((0..9).collect(), (0..9).map(|n| n * 2).collect());
    for (form, matrix) in forms() {
        let width = matrix.shape[1];
        let h = tensor(normal(20, 9 * width), [9, width]);
        let want = vec_of(composed::linear_cross_entropy(h.clone(), tensor(decoded(&matrix), matrix.shape), &targets));
        let held = Weight::Packed(PackedWeight::new(matrix, &device()));
        let got = vec_of(weight::linear_cross_entropy(h, held, targets.clone()));
        assert_close(&format!("losses, {form}"), &got, &want, 1e-5);
    }
}

#[test]
fn norms_of_a_packed_matrix_with_its_branch() {
    for (form, matrix) in forms() {
        let width = matrix.shape[1];
        let (a, b) = (tensor(normal(21, 3 * width), [3, width]), tensor(normal(22, OUTPUTS * 3), [OUTPUTS, 3]));
        let want = composed::merged_norms(tensor(decoded(&matrix), matrix.shape), a.clone(), b.clone(), 0.7);
        let held = Weight::Packed(PackedWeight::new(matrix, &device()));
        let got = weight::merged_norms(held, a, b, 0.7);
        assert_close(&format!("merged_norms, {form}"), &vec_of(got), &vec_of(want), 1e-6);
    }
}

/// A GPU multiplies up to eight rows in an order of sums that does not depend on how many they are.
#[test]
fn a_few_rows_give_the_bits_of_each_row_alone() {
    if is_cpu(&device()) {
        println!("SKIPPED: FINETUNE_TEST_DEVICE is not gpu");
        return;
    }
    for (form, matrix) in forms() {
        let width = matrix.shape[1];
        let held = Weight::Packed(PackedWeight::new(matrix, &device()));
        let x = tensor(normal(23, 8 * width), [8, width]);
        let together = vec_of(weight::linear(x.clone(), held.clone()));
        for row in 0..8 {
            let alone = vec_of(weight::linear(x.clone().narrow(0, row, 1), held.clone()));
            assert!(together[row * OUTPUTS..][..OUTPUTS] == alone[..], "{form}, row {row}");
        }
    }
}

/// Weights that are held in 16 bits and not packed, of widths that fill whole words and that do not.
#[test]
fn sixteen_bit_weights_by_a_few_rows() {
    for dtype in compute_types().into_iter().filter(|&dtype| dtype != DType::F32) {
        for (tokens, width) in [(1, 64), (5, 65), (8, 600)] {
            let w = tensor(normal(24, OUTPUTS * width), [OUTPUTS, width]).cast(dtype);
            let x = tensor(normal(25, tokens * width), [tokens, width]).cast(dtype);
            let want = composed::linear(x.clone().cast(DType::F32), w.clone().cast(DType::F32));
            let got = operations::linear(x, w);
            assert_close(&format!("{dtype:?} {tokens}x{width}"), &vec_of(got), &vec_of(want), bound(dtype));
        }
    }
}

#[test]
#[should_panic]
fn a_row_beyond_the_matrix_panics() {
    let (_, matrix) = forms().swap_remove(0);
    let like = Tensor::<1>::from_data(TensorData::new(vec![0.0f32], [1]), &device());
    let _ = weight::packed_rows(like, PackedWeight::new(matrix, &device()), vec![OUTPUTS as u32]).into_data();
}
