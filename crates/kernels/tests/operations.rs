//! Each fused operation compared with its composed form (value and every gradient) and with finite
//! differences.
//!
//! The tests run on the CPU. With `FINETUNE_TEST_DEVICE=gpu` they run on the first GPU, a software
//! renderer if there is no other.

use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use finetune_kernels::devices::{gpus, is_cpu};
use finetune_kernels::{
    Activation, AttentionShape, Dropout, LatePart, RopeTable, Segment, Segments, Targets, attention, composed,
    operations,
};
use finetune_random::Stream;

mod tested;

fn device() -> Device {
    tested::device().autodiff()
}

/// The number types that a frozen weight is held in: on a GPU those that it computes in.
fn held_types() -> Vec<DType> {
    match gpus(true).into_iter().next() {
        Some(gpu) if !is_cpu(&device()) => gpu.types.iter().map(|kind| kind.dtype()).collect(),
        _ => vec![DType::F32, DType::BF16, DType::F16],
    }
}

fn normal(seed: u64, dims: &[usize]) -> Vec<f32> {
    Stream::new(seed, 9, 0, 0).normal(dims.iter().product(), 1.0)
}

/// A check of an operation over `N` matrices: its value, and the gradients of Σ out · weights.
struct Check<'a, const N: usize> {
    name: &'a str,
    shapes: [[usize; 2]; N],
    /// The inputs that require gradients.
    trained: [bool; N],
}

type Operation<'a, const N: usize> = &'a dyn Fn([Tensor<2>; N]) -> Tensor<2>;

impl<const N: usize> Check<'_, N> {
    fn run(&self, inputs: &[Vec<f32>; N], operation: Operation<N>) -> (Vec<f32>, Vec<Vec<f32>>) {
        let mut n = 0;
        let tensors: [Tensor<2>; N] = std::array::from_fn(|_| {
            let tensor = Tensor::from_data(TensorData::new(inputs[n].clone(), self.shapes[n]), &device());
            n += 1;
            if self.trained[n - 1] { tensor.require_grad() } else { tensor }
        });
        let out = operation(tensors.clone());
        let weights = Tensor::<2>::from_data(TensorData::new(normal(77, &out.dims()), out.dims()), &device());
        let gradients: Gradients = (out.clone() * weights).sum().backward();
        let gradients = tensors
            .iter()
            .zip(self.trained)
            .filter(|(_, trained)| *trained)
            .map(|(tensor, _)| vec_of(tensor.grad(&gradients).expect("a gradient for each trained input")))
            .collect();
        (vec_of(out), gradients)
    }

    fn check(&self, fused: Operation<N>, composed: Operation<N>) {
        let inputs: [Vec<f32>; N] = std::array::from_fn(|n| normal(n as u64 + 1, &self.shapes[n]));
        let (value, gradients) = self.run(&inputs, fused);
        let (want_value, want_gradients) = self.run(&inputs, composed);
        assert_close(&format!("{}: value", self.name), &value, &want_value, 1e-5);
        assert_eq!(gradients.len(), want_gradients.len());
        for (n, (got, want)) in gradients.iter().zip(&want_gradients).enumerate() {
            assert_close(&format!("{}: gradient of trained input {n}", self.name), got, want, 1e-5);
        }
        self.finite_differences(&inputs, fused, &gradients);
    }

    /// Three random directions through all trained inputs at once: (f(x + e) - f(x - e)) / 2 =
    /// gradient · e.
    fn finite_differences(&self, inputs: &[Vec<f32>; N], operation: Operation<N>, gradients: &[Vec<f32>]) {
        for direction in 0..3 {
            let step = 1e-2f32;
            let moves: [Vec<f32>; N] =
                std::array::from_fn(|n| normal(100 + direction * 10 + n as u64, &self.shapes[n]));
            let moved = |sign: f32| -> f64 {
                let inputs: [Vec<f32>; N] = std::array::from_fn(|n| {
                    let factor = if self.trained[n] { sign * step } else { 0.0 };
                    inputs[n].iter().zip(&moves[n]).map(|(x, e)| x + factor * e).collect()
                });
                let (value, _) = self.run(&inputs, operation);
                let weights = normal(77, &[value.len()]);
                value.iter().zip(&weights).map(|(v, w)| f64::from(*v) * f64::from(*w)).sum()
            };
            let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * f64::from(step));
            let mut trained = gradients.iter();
            let mut analytic = 0.0;
            let mut scale = 0.0;
            for n in (0..N).filter(|&n| self.trained[n]) {
                let gradient = trained.next().expect("a gradient for each trained input");
                for (g, e) in gradient.iter().zip(&moves[n]) {
                    analytic += f64::from(*g) * f64::from(*e);
                    scale += (f64::from(*g) * f64::from(*e)).powi(2);
                }
            }
            // The bound covers the step's own error, of third order, and f32 rounding of the
            // values.
            let bound = 0.02 * scale.sqrt() + 1e-2;
            assert!(
                (numeric - analytic).abs() < bound,
                "{}: direction {direction}: {numeric} against {analytic}",
                self.name
            );
        }
    }
}

fn vec_of<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("f32 data")
}

/// Panics if the norm of the difference over the norm of the reference is not below the bound.
fn assert_close(what: &str, got: &[f32], want: &[f32], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let size = norm(&mut want.iter().map(|v| f64::from(*v)));
    // The absolute part is for gradients of zero, such as those of a query that sees one key.
    assert!(difference <= bound * size + 1e-5, "{what}: relative difference {:e}", difference / size);
}

#[test]
fn linear_frozen_and_trained() {
    for trained in [[true, false], [true, true], [false, true]] {
        Check { name: "linear", shapes: [[13, 20], [9, 20]], trained }
            .check(&|[x, w]| operations::linear(x, w), &|[x, w]| composed::linear(x, w));
    }
}

#[test]
fn lora_linear_with_and_without_dropout() {
    let shapes = [[14, 20], [12, 20], [3, 20], [12, 3]];
    let dropout = Dropout {
        probability: 0.3,
        stream: Stream::new(5, 2, 3, 4),
        tokens: (0..14).map(|t| (t / 7, t % 7)).collect(),
    };
    for x_trained in [true, false] {
        for dropout in [None, Some(dropout.clone())] {
            let trained = [x_trained, false, true, true];
            let name = format!("lora_linear, x trained {x_trained}, dropout {}", dropout.is_some());
            Check { name: &name, shapes, trained }
                .check(&|[x, w, a, b]| operations::lora_linear(x, w, a, b, 1.7, dropout.clone()), &|[x, w, a, b]| {
                    composed::lora_linear(x, w, a, b, 1.7, dropout.clone())
                });
        }
    }
}

/// Norms are constants: they get no gradient.
#[test]
fn magnitudes_scale_outputs() {
    let shapes = [[14, 20], [1, 20], [1, 20]];
    let flat = |t: Tensor<2>| t.reshape([20]);
    // Norms are positive.
    let norms = |t: Tensor<2>| flat(t).square() + 0.5;
    for trained in [[true, true, false], [false, true, false], [true, false, false]] {
        Check { name: &format!("magnitude, trained {trained:?}"), shapes, trained }
            .check(&|[z, m, n]| operations::magnitude(z, flat(m), norms(n)), &|[z, m, n]| {
                composed::magnitude(z, flat(m), norms(n))
            });
    }
    let shapes = [[14, 20], [14, 20], [14, 20], [1, 20], [1, 20]];
    for trained in [[true, true, true, true, false], [false, false, true, true, false]] {
        Check { name: &format!("dropped_magnitude, trained {trained:?}"), shapes, trained }.check(
            &|[y, d, b, m, n]| operations::dropped_magnitude(y, d, b, flat(m), norms(n), 1.7),
            &|[y, d, b, m, n]| composed::dropped_magnitude(y, d, b, flat(m), norms(n), 1.7),
        );
    }
}

#[test]
fn dropout_of_an_input_is_its_own_backward_pass() {
    let dropout = Dropout {
        probability: 0.3,
        stream: Stream::new(5, 2, 3, 4),
        tokens: (0..14).map(|t| (t / 7, t % 7)).collect(),
    };
    Check { name: "drop_input", shapes: [[14, 20]], trained: [true] }
        .check(&|[x]| operations::drop_input(x, dropout.clone()), &|[x]| composed::drop_input(x, &dropout));
}

/// A small weight, and one of several blocks of rows, also held in 16 bits.
#[test]
fn norms_of_a_weight_with_its_branch() {
    let tensor = |seed: u64, rows: usize, columns: usize| {
        Tensor::<2>::from_data(TensorData::new(normal(seed, &[rows, columns]), [rows, columns]), &device().inner())
    };
    for (outputs, inputs, rank) in [(9, 20, 3), (1000, 9000, 4)] {
        for dtype in held_types() {
            let (w, a, b) = (tensor(1, outputs, inputs), tensor(2, rank, inputs), tensor(3, outputs, rank));
            let held = w.cast(dtype);
            let want = composed::merged_norms(held.clone().cast(DType::F32), a.clone(), b.clone(), 0.7);
            let got = operations::merged_norms(held, a, b, 0.7);
            assert_close(&format!("merged_norms {outputs} {dtype:?}"), &vec_of(got), &vec_of(want), 1e-6);
        }
    }
}

#[test]
fn rms_norm_of_frozen_and_trained_gamma() {
    for trained in [[true, false], [true, true]] {
        Check { name: "rms_norm", shapes: [[70, 24], [1, 24]], trained }
            .check(&|[x, g]| operations::rms_norm(x, g.reshape([24]), 1e-5), &|[x, g]| {
                composed::rms_norm(x, g.reshape([24]), 1e-5)
            });
    }
}

#[test]
fn rope_turns_pairs() {
    let positions: Vec<u32> = (0..40).map(|t| t % 23).collect();
    let table = RopeTable::new(&positions, &[1.0, 0.3, 0.1, 0.01], |_| 1.0);
    Check { name: "rope", shapes: [[40, 24]], trained: [true] }
        .check(&|[x]| operations::rope(x.reshape([40, 3, 8]), table.clone()).reshape([40, 24]), &|[x]| {
            composed::rope(x.reshape([40, 3, 8]), &table).reshape([40, 24])
        });
}

/// (name, rows, queries, keys, query heads, key heads, window)
type AttentionCase = (&'static str, Segments, usize, usize, usize, usize, Option<usize>);

/// Rows shorter and longer than a block, a row of a single token, grouped heads, windows, a cache.
#[test]
fn causal_attention_over_rows_of_unequal_length() {
    let cases: [AttentionCase; 6] = [
        ("one row", Segments::rows(&[10]), 10, 10, 2, 2, None),
        ("rows", Segments::rows(&[5, 1, 70, 130]), 206, 206, 4, 2, None),
        ("all heads on one key head", Segments::rows(&[67]), 67, 67, 3, 1, None),
        ("window 1", Segments::rows(&[9, 4]), 13, 13, 2, 1, Some(1)),
        ("window 5", Segments::rows(&[80, 3]), 83, 83, 2, 2, Some(5)),
        ("cache", vec![Segment { query_start: 0, queries: 3, key_start: 2, keys: 75 }].into(), 3, 77, 4, 2, Some(70)),
    ];
    for (name, segments, queries, keys, query_heads, key_heads, window) in cases {
        let width = 8;
        let shape = AttentionShape { segments, scale: 0.35, window, softcap: None };
        let (q_dims, k_dims) = ([queries, query_heads, width], [keys, key_heads, width]);
        let run = |operation: &dyn Fn(Tensor<3>, Tensor<3>, Tensor<3>) -> Tensor<3>, [q, k, v]: [Tensor<2>; 3]| {
            operation(q.reshape(q_dims), k.reshape(k_dims), v.reshape(k_dims)).reshape([queries, query_heads * width])
        };
        let shapes = [[queries, query_heads * width], [keys, key_heads * width], [keys, key_heads * width]];
        Check { name, shapes, trained: [true; 3] }
            .check(&|inputs| run(&|q, k, v| operations::causal_attention(q, k, v, shape.clone()), inputs), &|inputs| {
                run(&|q, k, v| composed::causal_attention(q, k, v, &shape), inputs)
            });
    }
}

/// (name, window, soft cap, whether there are sinks, elements of a value head)
type AttentionKind = (&'static str, Option<usize>, Option<f32>, bool, usize);

const KINDS: [AttentionKind; 6] = [
    ("narrow values", None, None, false, 4),
    ("wide values", Some(5), None, false, 12),
    ("soft cap", None, Some(0.7), false, 8),
    ("sinks", None, None, true, 8),
    ("sinks and a window", Some(3), None, true, 8),
    ("all of them", Some(9), Some(1.5), true, 6),
];

/// The kinds of attention of some families, over whole rows and over single queries behind a cache.
#[test]
fn attention_with_caps_sinks_and_values_of_another_width() {
    let (query_heads, key_heads, width) = (4, 2, 8);
    let rows = [("rows", Segments::rows(&[5, 1, 70]), 76, 76), ("next", Segments::next_tokens([0..3, 4..80]), 2, 80)];
    for ((part, segments, queries, keys), (name, window, softcap, has_sinks, value_width)) in
        rows.into_iter().flat_map(|row| KINDS.map(|kind| (row.clone(), kind)))
    {
        let name = format!("{name}, {part}");
        let shape = AttentionShape { segments, scale: 0.35, window, softcap };
        let (query, value) = (query_heads * width, key_heads * value_width);
        let shapes = [[queries, query], [keys, key_heads * width], [keys, value], [1, query_heads]];
        let out = [queries, query_heads * value_width];
        let parts = |[q, k, v, sinks]: [Tensor<2>; 4]| {
            let heads = [q.reshape([queries, query_heads, width]), k.reshape([keys, key_heads, width])];
            let sinks = sinks.reshape([query_heads]);
            // Without sinks these inputs have a gradient too: zero.
            (heads, v.reshape([keys, key_heads, value_width]), has_sinks.then_some(sinks.clone()), sinks.sum() * 0.0)
        };
        let fused = |inputs: [Tensor<2>; 4]| {
            let ([q, k], v, sinks, nothing) = parts(inputs);
            attention(q, k, v, sinks, shape.clone()).reshape(out) + nothing.unsqueeze()
        };
        let composed = |inputs: [Tensor<2>; 4]| {
            let ([q, k], v, sinks, nothing) = parts(inputs);
            let result = match sinks {
                Some(sinks) => composed::sink_attention(q, k, v, sinks, &shape),
                None => composed::causal_attention(q, k, v, &shape),
            };
            result.reshape(out) + nothing.unsqueeze()
        };
        Check { name: &name, shapes, trained: [true; 4] }.check(&fused, &composed);
        let inputs: [Tensor<2>; 4] = std::array::from_fn(|n| {
            let values = TensorData::new(normal(n as u64 + 1, &shapes[n]), shapes[n]);
            Tensor::from_data(values, &device().inner())
        });
        let got = vec_of(fused(inputs.clone()));
        assert_close(&format!("{name}, without gradients"), &got, &vec_of(composed(inputs)), 1e-5);
    }
}

/// The next tokens of rows whose keys are cached, with unused places before and between them. On the
/// CPU, a row has the bits that it has alone.
#[test]
fn one_query_for_each_row_of_a_cache() {
    let ranges = [3..4, 10..45, 64..197, 200..2300];
    let tensor =
        |seed, dims: [usize; 3]| Tensor::<3>::from_data(TensorData::new(normal(seed, &dims), dims), &device().inner());
    for (query_heads, key_heads, width, window) in
        // A large group is cut into pieces if there are few rows.
        [
            (4, 2, 8, None),
            (3, 1, 80, None),
            (2, 2, 36, Some(20)),
            (6, 2, 64, None),
            (40, 1, 72, None),
            (32, 2, 24, Some(9)),
        ]
    {
        let (k, v) = (tensor(1, [2304, key_heads, width]), tensor(2, [2304, key_heads, width]));
        let q = tensor(3, [ranges.len(), query_heads, width]);
        let shape = |segments| AttentionShape { segments, scale: 0.15, window, softcap: None };
        let all = shape(Segments::next_tokens(ranges.clone()));
        let got = vec_of(operations::causal_attention(q.clone(), k.clone(), v.clone(), all.clone()));
        let want = vec_of(composed::causal_attention(q.clone(), k.clone(), v.clone(), &all));
        assert_close(&format!("{query_heads} heads of {width}, window {window:?}"), &got, &want, 1e-5);
        for (row, keys) in ranges.clone().into_iter().enumerate().filter(|_| is_cpu(&device())) {
            let alone = shape(Segments::next_tokens([keys]));
            let alone = operations::causal_attention(q.clone().narrow(0, row, 1), k.clone(), v.clone(), alone);
            let size = query_heads * width;
            assert!(vec_of(alone) == got[row * size..(row + 1) * size], "row {row}, {query_heads} heads of {width}");
        }
    }
}

#[test]
fn gated_units_of_both_inputs() {
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Clamped] {
        Check { name: &format!("{activation:?}"), shapes: [[30, 21], [30, 21]], trained: [true, true] }
            .check(&|[g, u]| operations::gated(g, u, activation), &|[g, u]| composed::gated(g, u, activation));
    }
}

#[test]
fn linear_cross_entropy_on_some_positions() {
    let targets = Targets::new((0..70).map(|n| n * 3 % 100).collect(), (0..70).map(|n| n * 7 % 33).collect());
    for trained in [[true, false], [true, true], [false, true]] {
        let name = format!("linear_cross_entropy, trained {trained:?}");
        Check { name: &name, shapes: [[100, 16], [33, 16]], trained }
            .check(&|[h, w]| operations::linear_cross_entropy(h, w, targets.clone()).reshape([1, 70]), &|[h, w]| {
                composed::linear_cross_entropy(h, w, &targets).reshape([1, 70])
            });
        let capped = targets.clone().capped(Some(2.5));
        Check { name: &format!("{name}, capped"), shapes: [[100, 16], [33, 16]], trained }
            .check(&|[h, w]| operations::linear_cross_entropy(h, w, capped.clone()).reshape([1, 70]), &|[h, w]| {
                composed::linear_cross_entropy(h, w, &capped).reshape([1, 70])
            });
    }
}

#[test]
fn lora_cross_entropy_on_some_positions() {
    let targets = Targets::new((0..70).map(|n| n * 3 % 100).collect(), (0..70).map(|n| n * 7 % 33).collect());
    let shapes = [[100, 16], [33, 16], [100, 3], [33, 3]];
    for trained in [[true, false, true, true], [false, false, true, true], [false, false, false, true]] {
        let name = format!("lora_cross_entropy, trained {trained:?}");
        Check { name: &name, shapes, trained }.check(
            &|[h, w, g, b]| operations::lora_cross_entropy(h, w, g, b, 0.6, targets.clone()).reshape([1, 70]),
            &|[h, w, g, b]| composed::lora_cross_entropy(h, w, g, b, 0.6, &targets).reshape([1, 70]),
        );
    }
}

/// The softmax of large logits must neither overflow nor become NaN.
#[test]
fn cross_entropy_of_huge_logits_is_finite() {
    let h = Tensor::<2>::from_data(TensorData::new(vec![1000.0f32, -1000.0], [1, 2]), &device());
    let w = Tensor::<2>::from_data(TensorData::new(vec![10.0f32, 0.0, 0.0, 10.0, -10.0, 0.0], [3, 2]), &device());
    let losses = vec_of(operations::linear_cross_entropy(h, w, Targets::new(vec![0, 0], vec![0, 1])));
    assert_eq!(losses[0], 0.0);
    assert!((losses[1] - 20_000.0).abs() < 1.0, "{losses:?}");
}

/// A weight that the CPU holds in 16 bits gives the bits of the same weight held in f32. The cases
/// are products that are widened in one block and in several, a small batch, and the output layer.
#[test]
fn sixteen_bit_weights_give_the_same_bits_on_the_cpu() {
    let device = Device::flex().autodiff();
    let tensor = |seed, rows: usize, columns: usize| {
        Tensor::<2>::from_data(TensorData::new(normal(seed, &[rows, columns]), [rows, columns]), &device)
    };
    for dtype in [DType::BF16, DType::F16] {
        for (tokens, outputs, inputs) in [(70, 64, 48), (3, 300, 200), (90, 13_000, 400), (90, 500, 9_000)] {
            let held = tensor(1, outputs, inputs).cast(dtype);
            let [narrow, wide] = [held.clone(), held.cast(DType::F32)].map(|w| {
                let x = tensor(2, tokens, inputs).require_grad();
                let y = operations::linear(x.clone(), w);
                let gradients = (y.clone() * tensor(3, tokens, outputs)).sum().backward();
                (vec_of(y), vec_of(x.grad(&gradients).expect("a gradient")))
            });
            assert!(narrow == wide, "linear {dtype:?} {tokens} {outputs} {inputs}");
        }
        let (tokens, vocabulary, width) = (40, 30_000, 320);
        let held = tensor(4, vocabulary, width).cast(dtype);
        let targets = Targets::new((0..tokens as u32).collect(), (0..tokens as u32).map(|n| n * 700).collect());
        let [narrow, wide] = [held.clone(), held.cast(DType::F32)].map(|w| {
            let h = tensor(5, tokens, width).require_grad();
            let losses = operations::linear_cross_entropy(h.clone(), w, targets.clone());
            let gradients = losses.clone().sum().backward();
            (vec_of(losses), vec_of(h.grad(&gradients).expect("a gradient")))
        });
        assert!(narrow == wide, "linear_cross_entropy {dtype:?}");
    }
}

/// What is set behind the forward pass is added to the gradient, and the value stays.
#[test]
fn a_late_part_is_added_to_the_gradient() {
    let (shape, part) = ([3, 4], LatePart::default());
    let y = Tensor::<2>::from_data(TensorData::new(normal(5, &shape), shape), &device()).require_grad();
    let out = operations::late_gradient(y.clone(), part.clone());
    assert_eq!(vec_of(out.clone().inner()), normal(5, &shape));
    part.set(normal(6, &shape)).expect("set once");
    let gradients = (out * 2.0).sum().backward();
    let want: Vec<f32> = normal(6, &shape).iter().map(|part| 2.0 + part).collect();
    assert_eq!(vec_of(y.grad(&gradients).expect("a gradient")), want);
}
