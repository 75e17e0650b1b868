//! Branches of some rows compared with their composed form, and the bits of rows together with those that they
//! have alone.
//!
//! The tests run on the CPU. With `FINETUNE_TEST_DEVICE=gpu` they run on the first GPU, a software
//! renderer if there is no other.

use std::ops::Range;

use burn::tensor::{Tensor, TensorData};
use finetune_kernels::devices::is_cpu;
use finetune_kernels::row_branch::add_low_rank;
use finetune_kernels::{composed, operations};
use finetune_random::Stream;

mod tested;

use tested::device;

fn normal(seed: u64, dims: [usize; 2]) -> Tensor<2> {
    let values = Stream::new(seed, 9, 0, 0).normal(dims.iter().product(), 1.0);
    Tensor::from_data(TensorData::new(values, dims), &device())
}

fn vec_of(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("f32")
}

fn bits(tensor: Tensor<2>) -> Vec<u32> {
    vec_of(tensor).into_iter().map(f32::to_bits).collect()
}

/// Tokens, inputs, outputs, and the rows and the rank of each branch.
type Case = (usize, usize, usize, Vec<(Range<usize>, usize)>);

fn cases() -> [Case; 4] {
    [
        (1, 20, 12, vec![(0..1, 3)]),
        (8, 70, 33, vec![(0..1, 16), (1..5, 2), (6..8, 8)]),
        (3, 900, 1200, vec![(0..0, 4), (1..3, 64)]),
        (300, 64, 80, vec![(0..70, 1), (70..199, 16)]),
    ]
}

#[test]
fn branches_of_some_rows_are_added_to_them_alone() {
    for (tokens, inputs, outputs, parts) in cases() {
        let (x, y) = (normal(1, [tokens, inputs]), normal(2, [tokens, outputs]));
        let (mut got, mut want) = (y.clone(), vec_of(y));
        for (seed, (rows, rank)) in (3..).zip(parts) {
            let (a, b) = (normal(seed, [rank, inputs]), normal(100 + seed, [outputs, rank]));
            got = add_low_rank(got, x.clone(), a.clone(), b.clone(), rows.clone(), 0.7);
            let low = vec_of(composed::linear(composed::linear(x.clone(), a), b) * 0.7);
            let some = rows.start * outputs..rows.end * outputs;
            want[some.clone()].iter_mut().zip(&low[some]).for_each(|(want, low)| *want += low);
        }
        let got = vec_of(got);
        let size = want.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let difference = got.iter().zip(&want).map(|(got, want)| f64::from(got - want).powi(2)).sum::<f64>().sqrt();
        assert!(difference < 1e-5 * size, "{tokens} tokens: {difference:e} of {size}");
    }
}

/// Up to eight rows, and parts of more than 64 rows: with the bits of a pass over them alone.
#[test]
fn rows_have_the_bits_that_they_have_alone() {
    if !is_cpu(&device()) {
        return;
    }
    for (tokens, inputs, outputs, parts) in cases() {
        let (x, w) = (normal(1, [tokens, inputs]), normal(2, [outputs, inputs]));
        let plain = operations::linear(x.clone(), w.clone());
        for (seed, (rows, rank)) in (3..).zip(parts).filter(|(_, (rows, _))| !rows.is_empty()) {
            let (a, b) = (normal(seed, [rank, inputs]), normal(100 + seed, [outputs, rank]));
            let all = add_low_rank(plain.clone(), x.clone(), a.clone(), b.clone(), rows.clone(), 0.7);
            let own = x.clone().narrow(0, rows.start, rows.len());
            let alone = operations::lora_linear(own, w.clone(), a, b, 0.7, None);
            let together = all.clone().narrow(0, rows.start, rows.len());
            assert!(bits(together) == bits(alone), "rows {rows:?} of {tokens}, rank {rank}");
            // No other row is touched, and neither is what the caller still holds.
            let unchanged = (0..tokens).filter(|row| !rows.contains(row));
            let (all, plain) = (bits(all), bits(plain.clone()));
            let row = |values: &[u32], row: usize| values[row * outputs..][..outputs].to_vec();
            unchanged.for_each(|n| assert_eq!(row(&all, n), row(&plain, n), "row {n}"));
        }
    }
}
