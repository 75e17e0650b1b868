//! DoRA's magnitudes on a GPU, and dropout as an operation of its own. The method is that of
//! `cpu/magnitude.rs`. Magnitudes and norms are f32.

#![allow(clippy::too_many_arguments, reason = "a kernel takes its buffers and sizes one by one")]

use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::DType;
use burn_cubecl::CubeBackend;
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::tensor::CubeTensor;

use super::linear::dropped;
use super::matrix::Matrix;
use super::pointwise::{add, gather_rows, scaled};
use super::product::{column_sums, product};
use super::reduce;
use super::tensor::{
    buffer, each_element, element, elements_of, empty, last, launch_elements as launch, same_shape, upload_u32,
};
use crate::arguments::Dropout;
use crate::fused::Fused;
use crate::operations::{DropInput, DroppedMagnitude, Magnitude, MergedNorms, PackedMergedNorms};

/// Bytes of a block of rows of a weight with its branch, in f32.
const BLOCK_BYTES: usize = 64 << 20;

/// Panics unless m and n hold an f32 number for each output of x.
fn ensure_outputs(x: &CubeTensor, m: &CubeTensor, n: &CubeTensor) {
    let fits = |tensor: &CubeTensor| elements_of(tensor) == last(x) && tensor.dtype == DType::F32;
    assert!(fits(m) && fits(n), "a magnitude and a norm for each output");
}

/// `x · (m/n - minus) · times`, output by output.
fn by_factor(x: &CubeTensor, m: &CubeTensor, n: &CubeTensor, minus: f32, times: f32) -> CubeTensor {
    ensure_outputs(x, m, n);
    let out = empty(x, x.shape(), x.dtype);
    launch!(
        factor_kernel,
        x.client,
        elements_of(x),
        buffer(x),
        buffer(m),
        buffer(n),
        buffer(&out),
        minus,
        times,
        element(x.dtype),
    );
    out
}

/// The gradient of m, [o] in f32: `Σ over tokens of d_y · (a + b · scale) / n`.
fn magnitude_gradient(d_y: &CubeTensor, a: &CubeTensor, b: &CubeTensor, n: &CubeTensor, scale: f32) -> CubeTensor {
    same_shape(&[d_y, a, b]);
    ensure_outputs(d_y, n, n);
    let parts = empty(d_y, d_y.shape(), DType::F32);
    launch!(
        gradient_kernel,
        d_y.client,
        elements_of(d_y),
        buffer(d_y),
        buffer(a),
        buffer(b),
        buffer(n),
        buffer(&parts),
        scale,
        element(d_y.dtype),
    );
    column_sums(&parts)
}

impl Fused<CubeBackend, 3> for Magnitude {
    type Saved = [CubeTensor; 3];

    fn forward(self, [z, m, n]: [CubeTensor; 3], _: [bool; 3]) -> (CubeTensor, Self::Saved) {
        (by_factor(&z, &m, &n, 0.0, 1.0), [z, m, n])
    }

    fn backward([z, m, n]: Self::Saved, d_y: CubeTensor, wanted: [bool; 3]) -> [Option<CubeTensor>; 3] {
        let d_z = wanted[0].then(|| by_factor(&d_y, &m, &n, 0.0, 1.0));
        let d_m = wanted[1].then(|| magnitude_gradient(&d_y, &z, &z, &n, 0.0));
        [d_z, d_m, None]
    }
}

/// What the backward pass of [`DroppedMagnitude`] needs.
#[derive(Clone, Debug)]
pub(crate) struct SavedDropped {
    dropped: CubeTensor,
    branch: CubeTensor,
    m: CubeTensor,
    n: CubeTensor,
    scale: f32,
}

impl Fused<CubeBackend, 5> for DroppedMagnitude {
    type Saved = SavedDropped;

    fn forward(self, [y, dropped, branch, m, n]: [CubeTensor; 5], _: [bool; 5]) -> (CubeTensor, SavedDropped) {
        let scale = self.scale;
        same_shape(&[&y, &dropped, &branch]);
        ensure_outputs(&y, &m, &n);
        let out = empty(&y, y.shape(), y.dtype);
        launch!(
            dropped_kernel,
            y.client,
            elements_of(&y),
            buffer(&y),
            buffer(&dropped),
            buffer(&branch),
            buffer(&m),
            buffer(&n),
            buffer(&out),
            scale,
            element(y.dtype),
        );
        (out, SavedDropped { dropped, branch, m, n, scale })
    }

    fn backward(saved: SavedDropped, d_y: CubeTensor, wanted: [bool; 5]) -> [Option<CubeTensor>; 5] {
        let SavedDropped { dropped, branch, m, n, scale } = saved;
        let d_dropped = wanted[1].then(|| by_factor(&d_y, &m, &n, 1.0, 1.0));
        let d_branch = wanted[2].then(|| by_factor(&d_y, &m, &n, 0.0, scale));
        let d_m = wanted[3].then(|| magnitude_gradient(&d_y, &dropped, &branch, &n, scale));
        [wanted[0].then_some(d_y), d_dropped, d_branch, d_m, None]
    }
}

/// The Euclidean norms of the rows of `W + scale · B A`, [o] in f32.
fn merged_norms(w: &Matrix, a: &CubeTensor, b: &CubeTensor, scale: f32) -> CubeTensor {
    let [outputs, inputs] = w.shape();
    let a = scaled(a, DType::F32, 1.0);
    let b = scaled(b, DType::F32, scale);
    let rows = (BLOCK_BYTES / 4 / inputs.max(1)).max(1);
    let numbers = upload_u32(&a, &(0..outputs as u32).collect::<Vec<_>>());
    let parts: Vec<CubeTensor> = (0..outputs)
        .step_by(rows)
        .map(|start| {
            let end = (start + rows).min(outputs);
            let merged = add(
                &w.rows_in_f32(&numbers, start..end),
                &product(&gather_rows(&b, &numbers, start, end - start), &a, DType::F32),
            );
            reduce::dot(&merged, &merged)
        })
        .collect();
    let squares = if parts.len() == 1 { parts[0].clone() } else { CubeBackend::float_cat(parts, 0) };
    CubeBackend::float_sqrt(squares)
}

impl Fused<CubeBackend, 3> for MergedNorms {
    type Saved = ();

    fn forward(self, [w, a, b]: [CubeTensor; 3], _: [bool; 3]) -> (CubeTensor, ()) {
        (merged_norms(&Matrix::Dense(w), &a, &b, self.scale), ())
    }

    fn backward(_: (), _: CubeTensor, _: [bool; 3]) -> [Option<CubeTensor>; 3] {
        [None, None, None]
    }
}

impl Fused<CubeBackend, 2> for PackedMergedNorms {
    type Saved = ();

    fn forward(self, [a, b]: [CubeTensor; 2], _: [bool; 2]) -> (CubeTensor, ()) {
        (merged_norms(&Matrix::Packed(self.w), &a, &b, self.scale), ())
    }

    fn backward(_: (), _: CubeTensor, _: [bool; 2]) -> [Option<CubeTensor>; 2] {
        [None, None]
    }
}

impl Fused<CubeBackend, 1> for DropInput {
    type Saved = Dropout;

    fn forward(self, [x]: [CubeTensor; 1], _: [bool; 1]) -> (CubeTensor, Dropout) {
        (dropped(&x, Some(&self.dropout)), self.dropout)
    }

    fn backward(dropout: Dropout, d_y: CubeTensor, [wanted]: [bool; 1]) -> [Option<CubeTensor>; 1] {
        // The mask multiplies, so it is its own backward pass.
        [wanted.then(|| dropped(&d_y, Some(&dropout)))]
    }
}

/// `out[t, o] = x[t, o] · (m[o] / n[o] - minus) · times`
#[cube(launch_unchecked)]
fn factor_kernel<T: Float>(
    x: &[T],
    m: &[f32],
    n: &[f32],
    out: &mut [T],
    minus: f32,
    times: f32,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    let o = i % m.len();
    out[i] = T::cast_from(f32::cast_from(x[i]) * (m[o] / n[o] - minus) * times);
}

/// `out[t, o] = d_y[t, o] · (a[t, o] + b[t, o] · scale) / n[o]`, in f32.
#[cube(launch_unchecked)]
fn gradient_kernel<T: Float>(
    d_y: &[T],
    a: &[T],
    b: &[T],
    n: &[f32],
    out: &mut [f32],
    scale: f32,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    let value = f32::cast_from(a[i]) + f32::cast_from(b[i]) * scale;
    out[i] = f32::cast_from(d_y[i]) * value / n[i % n.len()];
}

/// `out = y + (m/n - 1) · dropped + m/n · branch · scale`
#[cube(launch_unchecked)]
fn dropped_kernel<T: Float>(
    y: &[T],
    dropped: &[T],
    branch: &[T],
    m: &[f32],
    n: &[f32],
    out: &mut [T],
    scale: f32,
    #[define(T)] _dtype: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i >= out.len() {
        terminate!();
    }
    let o = i % m.len();
    let factor = m[o] / n[o];
    let change = (factor - 1.0f32) * f32::cast_from(dropped[i]) + factor * f32::cast_from(branch[i]) * scale;
    out[i] = T::cast_from(f32::cast_from(y[i]) + change);
}
