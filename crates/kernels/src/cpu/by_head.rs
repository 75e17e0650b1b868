//! Products of each head's vector with the head's own rows of a weight, as text is generated with latent
//! attention.
//!
//! A head's rows are read once for all tokens, into the second-level cache unless they lie in memory in
//! f32. An element is one sum in one order, whatever the number of tokens and of threads and the way the
//! weight is held: a token has the bits that it has alone.

use burn::backend::{Flex, TensorMetadata};
use burn_flex::FlexTensor;
use finetune_packed::InstructionSet;
use rayon::prelude::*;

use super::buffer::{floats, tensor, uninitialized};
use super::simd;
use super::weight::CpuWeight;
use crate::by_head::HeadRows;
use crate::fused::Fused;
use crate::operations::{HeadProduct, PackedHeadProduct};

/// Products of fewer multiplications than this are not worth handing to another thread.
const SMALL: usize = 1 << 17;

/// x [t, h, n] times each head's rows of w [o, i] -> [t, h, i], or transposed, x [t, h, i] -> [t, h, n].
fn product(x: &FlexTensor, w: &CpuWeight, rows: HeadRows, is_transposed: bool) -> FlexTensor {
    let [tokens, heads, width] = x.shape().dims::<3>();
    let [_, inputs] = w.shape();
    let outputs = if is_transposed { rows.count } else { inputs };
    let job = |head: usize| {
        let mut of_head = uninitialized(tokens * width);
        for (of_head, x) in of_head.chunks_mut(width.max(1)).zip(floats(x)[head * width..].chunks(heads * width)) {
            of_head.copy_from_slice(&x[..width]);
        }
        match is_transposed {
            true => transposed(&of_head, w, rows.of(head)),
            false => plain(&of_head, w, rows.of(head)),
        }
    };
    let results: Vec<Vec<f32>> = if tokens * heads * rows.count * inputs <= SMALL {
        (0..heads).map(job).collect()
    } else {
        (0..heads).into_par_iter().map(job).collect()
    };
    let mut out = uninitialized(tokens * heads * outputs);
    for (n, out) in out.chunks_mut(outputs.max(1)).enumerate() {
        out.copy_from_slice(&results[n % heads][n / heads * outputs..][..outputs]);
    }
    tensor(out, [tokens, heads, outputs])
}

/// x [t, n] times n rows [n, i] -> [t, i]. Sums are in the order of the rows.
fn plain(x: &[f32], w: &CpuWeight, rows: std::ops::Range<usize>) -> Vec<f32> {
    let [_, inputs] = w.shape();
    let mut out = uninitialized(x.len() / rows.len().max(1) * inputs);
    if let Some(values) = w.floats() {
        simd::weighted_sums(x, &values[rows.start * inputs..], inputs, inputs, &mut out);
        return out;
    }
    let mut block = uninitialized(rows.len() * inputs);
    for (row, block) in rows.zip(block.chunks_mut(inputs.max(1))) {
        w.read(row, 0, block);
    }
    simd::weighted_sums(x, &block, inputs, inputs, &mut out);
    out
}

/// x [t, i] times n transposed rows [n, i] -> [t, n]. Sums are those of [`super::few_rows`].
fn transposed(x: &[f32], w: &CpuWeight, rows: std::ops::Range<usize>) -> Vec<f32> {
    let [_, inputs] = w.shape();
    let (set, tokens) = (InstructionSet::best(), x.len() / inputs.max(1));
    let mut split = uninitialized(x.len());
    for (x, split) in x.chunks(inputs.max(1)).zip(split.chunks_mut(inputs.max(1))) {
        set.split(x, split);
    }
    let mut products = uninitialized(rows.len() * tokens);
    w.rows().products(set, rows.start, &split, inputs, &mut products);
    if tokens == 1 {
        return products;
    }
    let mut out = uninitialized(products.len());
    for (row, products) in products.chunks(tokens.max(1)).enumerate() {
        for (t, product) in products.iter().enumerate() {
            out[t * rows.len() + row] = *product;
        }
    }
    out
}

impl Fused<Flex, 2> for HeadProduct {
    type Saved = ();

    fn forward(self, [x, w]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, ()) {
        (product(&x, &w.into(), self.rows, self.is_transposed), ())
    }

    fn backward((): (), _: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        unreachable!("text is generated without gradients")
    }
}

impl Fused<Flex, 1> for PackedHeadProduct {
    type Saved = ();

    fn forward(self, [x]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, ()) {
        (product(&x, &self.w.into(), self.rows, self.is_transposed), ())
    }

    fn backward((): (), _: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        unreachable!("text is generated without gradients")
    }
}
