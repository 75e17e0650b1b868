//! Short convolutions and the gated delta rule, compared with their composed forms: values and every
//! gradient. CPU only.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use finetune_kernels::{DeltaShape, composed, operations};
use finetune_random::Stream;

fn normal(seed: u64, [rows, columns]: [usize; 2]) -> Vec<f32> {
    Stream::new(seed, 9, 0, 0).normal(rows * columns, 1.0)
}

fn tensor(values: Vec<f32>, shape: [usize; 2]) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), &Device::flex().autodiff())
}

type Operation<'a> = &'a dyn Fn(&[Tensor<2>]) -> Tensor<2>;

/// The value of an operation over these inputs, and its gradient for those that are trained.
fn run(inputs: &[(Vec<f32>, [usize; 2])], trained: &[bool], operation: Operation<'_>) -> Vec<Vec<f32>> {
    let make = |((values, shape), &trained): (&(Vec<f32>, [usize; 2]), &bool)| {
        let input = tensor(values.clone(), *shape);
        if trained { input.require_grad() } else { input }
    };
    let tensors: Vec<Tensor<2>> = inputs.iter().zip(trained).map(make).collect();
    let out = operation(&tensors);
    let gradients = (out.clone() * tensor(normal(77, out.dims()), out.dims())).sum().backward();
    let floats = |tensor: Tensor<2>| tensor.into_data().try_to_vec::<f32>().expect("f32 data");
    let of_trained = tensors.iter().zip(trained).filter(|(_, trained)| **trained);
    let of_inputs = of_trained.map(|(input, _)| floats(input.grad(&gradients).expect("a gradient")));
    std::iter::once(floats(out.clone().inner())).chain(of_inputs).collect()
}

/// Panics if values or gradients of two operations lie apart.
fn compare(
    name: &str,
    inputs: &[(Vec<f32>, [usize; 2])],
    trained: &[bool],
    fused: Operation<'_>,
    other: Operation<'_>,
) {
    let (got, want) = (run(inputs, trained, fused), run(inputs, trained, other));
    for (n, (got, want)) in got.iter().zip(&want).enumerate() {
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let size = norm(&mut want.iter().map(|v| f64::from(*v)));
        assert!(got.len() == want.len() && size > 0.01, "{name}: result {n} of another size");
        assert!(difference <= 1e-5 * size, "{name}: result {n}: relative difference {:e}", difference / size);
    }
}

#[test]
fn short_convolutions() {
    let (rows, channels, taps) = ([5, 1, 9], 20, 4);
    let tokens = rows.iter().sum();
    let shapes = [[tokens, channels], [channels, taps], [rows.len() * (taps - 1), channels]];
    let inputs: Vec<_> = shapes.iter().zip(1..).map(|(shape, seed)| (normal(seed, *shape), *shape)).collect();
    let lengths: Arc<[usize]> = rows.into();
    for has_silu in [true, false] {
        compare(
            &format!("short_convolution, SiLU {has_silu}"),
            &inputs,
            &[true, true, false],
            &|x| operations::short_convolution(x[0].clone(), x[1].clone(), x[2].clone(), lengths.clone(), has_silu),
            &|x| composed::short_convolution(x[0].clone(), x[1].clone(), x[2].clone(), &lengths, has_silu),
        );
    }
}

/// Rows longer than the chunks of the backward pass, of one token, and value heads that share a key head.
#[test]
fn gated_delta_rules() {
    for (rows, keeps_states) in [(vec![7, 1, 12], true), (vec![150], false), (vec![64, 65], true)] {
        let shape = DeltaShape {
            rows: rows.clone().into(),
            key_heads: 2,
            value_heads: 4,
            key_dim: 6,
            value_dim: 19,
            keeps_states,
        };
        let tokens = rows.iter().sum();
        let shapes = [[tokens, 2 * 12 + 4 * 19], [tokens, 4], [tokens, 4], [rows.len() * 6, 4 * 19]];
        let mut inputs: Vec<_> = shapes.iter().zip(1..).map(|(shape, seed)| (normal(seed, *shape), *shape)).collect();
        // Logarithms of shares that are kept, and shares.
        inputs[1].0.iter_mut().for_each(|g| *g = -0.3 * g.abs());
        inputs[2].0.iter_mut().for_each(|beta| *beta = 1.0 / (1.0 + (-*beta).exp()));
        compare(
            &format!("delta_rule {rows:?}"),
            &inputs,
            &[true; 4],
            &|x| operations::delta_rule(x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone(), shape.clone()),
            &|x| composed::delta_rule(x[0].clone(), x[1].clone(), x[2].clone(), x[3].clone(), &shape),
        );
    }
}

/// A row that is read in parts, from the states of the part before, has the bits of one that is read at
/// once, and rows do not see each other.
#[test]
fn parts_of_rows_have_the_same_bits() {
    let shape = |rows: Vec<usize>, keeps_states| DeltaShape {
        rows: rows.into(),
        key_heads: 1,
        value_heads: 2,
        key_dim: 6,
        value_dim: 5,
        keeps_states,
    };
    let run = |first: usize, count: usize, rows: Vec<usize>, states: Tensor<2>| {
        let part = |seed, columns| tensor(normal(seed, [20, columns]), [20, columns]).narrow(0, first, count);
        let (u, g, beta) = (part(1, 22), part(2, 2).abs().neg(), part(3, 2).abs());
        let out = operations::delta_rule(u, g, beta, states, shape(rows, true));
        let last = out.dims()[0] - count;
        (out.clone().narrow(0, 0, count), out.narrow(0, count, last))
    };
    let zeros = |rows: usize| tensor(vec![0.0; rows * 6 * 10], [rows * 6, 10]);
    let bits = |t: Tensor<2>| -> Vec<u32> {
        t.into_data().try_to_vec::<f32>().expect("f32").into_iter().map(f32::to_bits).collect()
    };
    let (whole, end) = run(0, 20, vec![20], zeros(1));
    let (first, between) = run(0, 13, vec![13], zeros(1));
    let (second, last) = run(13, 7, vec![7], between);
    assert_eq!(bits(Tensor::cat(vec![first.clone(), second], 0)), bits(whole));
    assert_eq!(bits(last), bits(end));
    let (both, _) = run(0, 20, vec![13, 7], zeros(2));
    assert_eq!(bits(both.narrow(0, 0, 13)), bits(first));
}
