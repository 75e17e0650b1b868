//! Short convolutions and the gated delta rule, token by token and in chunks, compared with their composed
//! forms on the CPU: values and every gradient.
//!
//! The tests run on the CPU. With `FINETUNE_TEST_DEVICE=gpu` they run on the first GPU, a software
//! renderer if there is no other.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use finetune_kernels::devices::{gpus, is_cpu};
use finetune_kernels::{DeltaShape, FloatType, composed, operations};
use finetune_random::Stream;

mod tested;

fn device() -> Device {
    tested::device().autodiff()
}

fn cpu() -> Device {
    Device::flex().autodiff()
}

fn normal(seed: u64, [rows, columns]: [usize; 2]) -> Vec<f32> {
    Stream::new(seed, 9, 0, 0).normal(rows * columns, 1.0)
}

fn tensor(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn floats(tensor: Tensor<2>) -> Vec<f32> {
    tensor.cast(DType::F32).into_data().try_to_vec().expect("f32 data")
}

type Inputs = [(Vec<f32>, [usize; 2])];
type Operation<'a> = &'a dyn Fn(&[Tensor<2>]) -> Tensor<2>;

/// The value of an operation over these inputs, and its gradient for those that are trained.
fn run(inputs: &Inputs, trained: &[bool], device: &Device, operation: Operation<'_>) -> Vec<Vec<f32>> {
    let make = |((values, shape), &trained): (&(Vec<f32>, [usize; 2]), &bool)| {
        let input = tensor(values.clone(), *shape, device);
        if trained { input.require_grad() } else { input }
    };
    let tensors: Vec<Tensor<2>> = inputs.iter().zip(trained).map(make).collect();
    let out = operation(&tensors);
    let gradients = (out.clone() * tensor(normal(77, out.dims()), out.dims(), device)).sum().backward();
    let of_trained = tensors.iter().zip(trained).filter(|(_, trained)| **trained);
    let of_inputs = of_trained.map(|(input, _)| floats(input.grad(&gradients).expect("a gradient")));
    std::iter::once(floats(out.clone().inner())).chain(of_inputs).collect()
}

/// Panics if the norm of a difference is more than `bound` of that of what is wanted.
fn assert_close(name: &str, got: &[Vec<f32>], want: &[Vec<f32>], bound: f64) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (n, (got, want)) in got.iter().zip(want).enumerate() {
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let size = norm(&mut want.iter().map(|v| f64::from(*v)));
        assert_eq!(got.len(), want.len(), "{name}: result {n} of another size");
        // Single tokens have no state that could be forgotten: a gradient of zeros.
        if size == 0.0 {
            assert!(got.iter().all(|value| value.abs() < 1e-6), "{name}: result {n} is not zero");
            continue;
        }
        assert!(size > 0.01, "{name}: result {n} is too small to compare");
        assert!(difference <= bound * size, "{name}: result {n}: relative difference {:e}", difference / size);
    }
}

#[test]
fn short_convolutions() {
    for (rows, channels, taps) in [(vec![5, 1, 9], 20, 4), (vec![70, 2], 36, 3), (vec![1, 1, 1], 8, 4)] {
        let tokens = rows.iter().sum();
        let shapes = [[tokens, channels], [channels, taps], [rows.len() * (taps - 1), channels]];
        let inputs: Vec<_> = shapes.iter().zip(1..).map(|(shape, seed)| (normal(seed, *shape), *shape)).collect();
        let lengths: Arc<[usize]> = rows.clone().into();
        for has_silu in [true, false] {
            for trained in [[true, true, false], [true, false, false]] {
                let got = run(&inputs, &trained, &device(), &|x| {
                    let [u, w, past] = [0, 1, 2].map(|n| x[n].clone());
                    operations::short_convolution(u, w, past, lengths.clone(), has_silu)
                });
                let want = run(&inputs, &trained, &cpu(), &|x| {
                    composed::short_convolution(x[0].clone(), x[1].clone(), x[2].clone(), &lengths, has_silu)
                });
                assert_close(&format!("rows {rows:?}, SiLU {has_silu}, {trained:?}"), &got, &want, 1e-5);
            }
        }
    }
}

fn delta_shape(rows: &[usize], [key_heads, value_heads, key_dim, value_dim]: [usize; 4]) -> DeltaShape {
    let (begins_empty, keeps_states) = (false, true);
    DeltaShape { rows: rows.into(), key_heads, value_heads, key_dim, value_dim, begins_empty, keeps_states }
}

/// Inputs of a rule. `forgets`: the size of the logarithms of what a state keeps. `shared`: the part of u that
/// all tokens have in common.
fn delta_inputs(shape: &DeltaShape, forgets: f32, shared: f32) -> Vec<(Vec<f32>, [usize; 2])> {
    let (tokens, heads) = (shape.rows.iter().sum(), shape.value_heads);
    let width = 2 * shape.key_heads * shape.key_dim + heads * shape.value_dim;
    let states = [shape.rows.len() * shape.key_dim, heads * shape.value_dim];
    let shapes = [[tokens, width], [tokens, heads], [tokens, heads], states];
    let mut inputs: Vec<_> = shapes.iter().zip(1..).map(|(shape, seed)| (normal(seed, *shape), *shape)).collect();
    let of_all = normal(50, [1, width]);
    let values = inputs[0].0.iter_mut().enumerate();
    values.for_each(|(n, value)| *value = (1.0 - shared) * *value + shared * of_all[n % width]);
    // Logarithms of shares that are kept, and shares.
    inputs[1].0.iter_mut().for_each(|g| *g = -forgets * g.abs());
    inputs[2].0.iter_mut().for_each(|beta| *beta = 1.0 / (1.0 + (-*beta).exp()));
    inputs
}

type Rule = fn(Tensor<2>, Tensor<2>, Tensor<2>, Tensor<2>, DeltaShape) -> Tensor<2>;

const RULES: [(&str, Rule); 2] =
    [("delta_rule", operations::delta_rule), ("chunked_delta_rule", operations::chunked_delta_rule)];

fn applied<'a>(rule: Rule, shape: &'a DeltaShape) -> impl Fn(&[Tensor<2>]) -> Tensor<2> + use<'a> {
    move |x| rule(x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone(), shape.clone())
}

/// Rows longer than a chunk, that end with one, of one token, and value heads that share a key head.
#[test]
fn gated_delta_rules() {
    let heads = [2, 4, 6, 19];
    let cases: [(&[usize], bool, [usize; 4], f32); 6] = [
        (&[7, 1, 12], true, heads, 0.3),
        (&[150], false, heads, 0.3),
        (&[64, 65], true, heads, 0.3),
        (&[3, 130, 64, 1, 70], false, [1, 1, 5, 4], 0.05),
        (&[1, 1, 1], true, [3, 3, 4, 4], 0.3),
        (&[40], true, [1, 3, 8, 8], 2.0),
    ];
    for (rows, keeps_states, heads, forgets) in cases {
        let shape = DeltaShape { keeps_states, ..delta_shape(rows, heads) };
        let inputs = delta_inputs(&shape, forgets, 0.0);
        let want = run(&inputs, &[true; 4], &cpu(), &|x| {
            composed::delta_rule(x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone(), &shape)
        });
        for (name, rule) in RULES {
            let got = run(&inputs, &[true; 4], &device(), &applied(rule, &shape));
            assert_close(&format!("{name} {rows:?}"), &got, &want, 1e-5);
        }
        // The states that are given are not read, and get no gradient.
        let shape = DeltaShape { begins_empty: true, ..shape };
        let trained = [true, true, true, false];
        let want = run(&inputs, &trained, &cpu(), &|x| {
            let zeros = x[3].clone() * 0.0;
            let [u, g, beta] = [0, 1, 2].map(|n| x[n].clone());
            composed::delta_rule(u, g, beta, zeros, &DeltaShape { begins_empty: false, ..shape.clone() })
        });
        for (name, rule) in RULES {
            let got = run(&inputs, &trained, &device(), &applied(rule, &shape));
            assert_close(&format!("{name} {rows:?} from nothing"), &got, &want, 1e-5);
        }
    }
}

/// Heads as wide as those of the published models, and keys that repeat: in chunks it is what it is token by
/// token on the CPU. Powers of a chunk's corrections would be 10¹⁷ there.
#[test]
fn chunks_of_wide_heads_and_of_keys_that_repeat() {
    for (rows, forgets, shared, bound) in [(&[200, 20], 0.3, 0.0, 1e-5), (&[130, 64], 0.001, 0.99, 1e-4)] {
        let shape = delta_shape(rows, [1, 2, 128, 128]);
        let inputs = delta_inputs(&shape, forgets, shared);
        let want = run(&inputs, &[true; 4], &cpu(), &applied(operations::delta_rule, &shape));
        let got = run(&inputs, &[true; 4], &device(), &applied(operations::chunked_delta_rule, &shape));
        assert_close(&format!("{rows:?}, {shared} shared"), &got, &want, bound);
    }
}

/// The number types of a GPU: within what their 11 and 8 bits allow.
#[test]
fn gpu_inputs_of_sixteen_bits() {
    let Some(gpu) = gpus(true).into_iter().next().filter(|_| !is_cpu(&device())) else {
        println!("SKIPPED: FINETUNE_TEST_DEVICE is not gpu");
        return;
    };
    let shape = delta_shape(&[70, 3], [2, 4, 8, 8]);
    let inputs = delta_inputs(&shape, 0.3, 0.0);
    let want = run(&inputs, &[true; 4], &cpu(), &applied(operations::delta_rule, &shape));
    for kind in gpu.types.iter().filter(|kind| **kind != FloatType::F32) {
        let got = run(&inputs, &[true; 4], &device(), &|x| {
            let u = x[0].clone().cast(kind.dtype());
            operations::delta_rule(u, x[1].clone(), x[2].clone(), x[3].clone(), shape.clone())
        });
        assert_close(&format!("{kind:?}"), &got, &want, if *kind == FloatType::F16 { 3e-3 } else { 3e-2 });
    }
}

/// A row that is read in parts, from the states of the part before, is what it is at once, and rows do not see
/// each other. On the CPU, token by token, to the bit.
#[test]
fn parts_of_rows_are_those_of_the_whole() {
    for (name, rule) in RULES {
        let run = |first: usize, count: usize, rows: &[usize], states: Tensor<2>| {
            let part =
                |seed, columns| tensor(normal(seed, [90, columns]), [90, columns], &device()).narrow(0, first, count);
            let (u, g, beta) = (part(1, 22), part(2, 2).abs() * -0.3, part(3, 2).abs() * 0.5);
            let out = rule(u, g, beta, states, delta_shape(rows, [1, 2, 6, 5]));
            let last = out.dims()[0] - count;
            (out.clone().narrow(0, 0, count), out.narrow(0, count, last))
        };
        let zeros = |rows: usize| tensor(vec![0.0; rows * 6 * 10], [rows * 6, 10], &device());
        let has_bits = name == "delta_rule" && is_cpu(&device());
        let same = |what: &str, got: Tensor<2>, want: Tensor<2>| {
            let (got, want) = (floats(got), floats(want));
            match has_bits {
                true => assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}: {what}"),
                false => assert_close(&format!("{name}: {what}"), &[got], &[want], 1e-5),
            }
        };
        let (whole, end) = run(0, 90, &[90], zeros(1));
        let (first, between) = run(0, 83, &[83], zeros(1));
        let (second, last) = run(83, 7, &[7], between);
        same("parts", Tensor::cat(vec![first.clone(), second], 0), whole);
        same("last states", last, end);
        let (both, _) = run(0, 90, &[83, 7], zeros(2));
        same("rows", both.narrow(0, 0, 83), first);
        let alone = run(83, 7, &[7], zeros(1)).0;
        let (both, _) = run(0, 90, &[83, 7], zeros(2));
        same("a second row", both.narrow(0, 83, 7), alone);
    }
}
