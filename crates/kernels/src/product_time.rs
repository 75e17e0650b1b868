//! How long the two products of a training step with frozen matrices take on the CPU: forward, and the gradient
//! of what goes in. A matrix in 16 bits or fewer is widened for each product, so that few rows take longer each
//! than many.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Tensor};

use crate::dispatch::Dispatch;
use crate::found_device::FloatType;
use crate::operations;
use crate::weight::{PackedWeight, Weight, linear};

/// How often all products are made. The fastest time counts.
const TIMES: usize = 3;
/// Seconds after which they are not made again.
const LONG_ENOUGH: f64 = 0.1;

/// Seconds of products.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProductSeconds {
    /// Of the forward pass.
    pub forward: f64,
    /// Of the gradients of what goes in.
    pub backward: f64,
}

/// Of products with these matrices [o, i] of one shape, one after the other, each with so many rows. The call
/// measures it.
pub fn of_linears(weights: &[Weight], rows: usize, device: &Device) -> ProductSeconds {
    let Some([_, inputs]) = weights.first().map(Weight::shape) else { return ProductSeconds::NONE };
    fastest(weights.len(), [rows, inputs], device, |n, x| linear(x, weights[n].clone()))
}

/// The same of experts, whose products are made together, as many on each.
pub fn of_experts(experts: &[PackedWeight], rows: usize, device: &Device) -> ProductSeconds {
    let Some([_, inputs]) = experts.first().map(PackedWeight::shape) else { return ProductSeconds::NONE };
    let chosen: Vec<u32> = (0..experts.len() as u32).flat_map(|expert| std::iter::repeat_n(expert, rows)).collect();
    let dispatch = Dispatch::new(&chosen, 1, experts.len());
    let experts: Arc<[PackedWeight]> = experts.into();
    fastest(1, [chosen.len(), inputs], device, |_, x| operations::expert_linear(x, experts.clone(), dispatch.clone()))
}

impl ProductSeconds {
    const NONE: ProductSeconds = ProductSeconds { forward: 0.0, backward: 0.0 };
}

/// Makes so many products of matrices [rows, inputs] forward, and then their gradients.
fn fastest(
    count: usize,
    shape: [usize; 2],
    device: &Device,
    product: impl Fn(usize, Tensor<2>) -> Tensor<2>,
) -> ProductSeconds {
    let ones = |shape: [usize; 2]| Tensor::<2>::ones(shape, (device, FloatType::F32.dtype()));
    let mut best = ProductSeconds { forward: f64::INFINITY, backward: f64::INFINITY };
    let begin = Instant::now();
    for _ in 0..TIMES {
        let inputs: Vec<Tensor<2>> = (0..count).map(|_| ones(shape).autodiff().require_grad()).collect();
        let start = Instant::now();
        let outputs: Vec<Tensor<2>> = inputs.into_iter().enumerate().map(|(n, x)| product(n, x)).collect();
        best.forward = best.forward.min(start.elapsed().as_secs_f64());
        let seeds: Vec<Tensor<2>> = outputs.iter().map(|y| ones(y.dims())).collect();
        let start = Instant::now();
        for (y, seed) in outputs.into_iter().zip(seeds) {
            let _ = operations::gradient_seed(y, seed).backward();
        }
        best.backward = best.backward.min(start.elapsed().as_secs_f64());
        if begin.elapsed().as_secs_f64() > LONG_ENOUGH {
            break;
        }
    }
    best
}
