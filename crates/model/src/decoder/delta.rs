//! A gated delta net (Yang et al. 2024, "Gated Delta Networks"), and what its backward pass keeps.
//!
//! Shape letters: `t` tokens, `c` channels of the convolution, `h` value heads, `y` elements of one, `m`
//! rows.

use std::sync::Arc;

use burn::tensor::{DType, Tensor, activation};
use finetune_kernels::{Activation, DeltaShape, operations};

use crate::decoder::adapted::Adapted;
use crate::decoder::attention::AttentionWidths;
use crate::decoder::cache::LayerCache;
use crate::decoder::pass::{Context, linear, norm};
use crate::tree::DeltaNet;

/// x [t, hidden] -> [t, hidden]. With a cache, each row goes on from its state.
pub(crate) fn forward(net: &DeltaNet, x: Tensor<2>, context: &Context, cache: Option<&mut LayerCache>) -> Tensor<2> {
    let tokens = x.dims()[0];
    let rows: Arc<[usize]> = context.segments.iter().map(|segment| segment.queries).collect();
    let shape = DeltaShape { rows: rows.clone(), keeps_states: cache.is_some(), ..net.shape() };
    let (states, taps) = (rows.len() * shape.key_dim, net.taps);
    let u_tc = linear(&net.qkv, x.clone(), context);
    let z_tv = linear(&net.z, x.clone(), context);
    let channels = u_tc.dims()[1];
    let device = x.device();
    let zeros = |shape: [usize; 2]| Tensor::<2>::zeros(shape, (&device, DType::F32));
    let fresh = || [zeros([rows.len() * (taps - 1), channels]), zeros([states, z_tv.dims()[1]])];
    let [past, state] = cache.as_ref().and_then(|cache| cache.recurrent().cloned()).unwrap_or_else(fresh);
    let kernel = context.parameter(net.convolution.values()).reshape([channels, taps]);
    let convolved = operations::short_convolution(u_tc.clone(), kernel, past.clone(), rows.clone());
    let beta_th = activation::sigmoid(linear(&net.b, x.clone(), context));
    // How fast a head forgets, and how much of that at this token.
    let rate: Tensor<2> = context.parameter(net.decay.values()).exp().neg().unsqueeze();
    let bias: Tensor<2> = context.parameter(net.bias.values()).unsqueeze();
    let g_th = softplus(linear(&net.a, x, context) + bias) * rate;
    let out = operations::delta_rule(convolved, g_th, beta_th, state, shape.clone());
    let out = match cache {
        None => out,
        Some(cache) => {
            let last = out.clone().narrow(0, tokens, states);
            cache.set_recurrent([last_inputs(u_tc, past, &rows, taps - 1), last]);
            out.narrow(0, 0, tokens)
        }
    };
    let heads = out.reshape([tokens, shape.value_heads, shape.value_dim]);
    let normed = norm(&net.norm, heads, context).reshape([tokens, shape.value_heads * shape.value_dim]);
    linear(&net.out, operations::gated(z_tv, normed, Activation::Silu), context)
}

/// ln(1 + e^x), where e^x may be beyond all numbers.
fn softplus(x: Tensor<2>) -> Tensor<2> {
    activation::relu(x.clone()) + x.abs().neg().exp().log1p()
}

/// The last `count` inputs of each row, of those before it and its own: u [t, c], past [m · count, c].
fn last_inputs(u: Tensor<2>, past: Tensor<2>, rows: &[usize], count: usize) -> Tensor<2> {
    let mut start = 0;
    let of_row = |(row, &tokens): (usize, &usize)| {
        let all = vec![past.clone().narrow(0, row * count, count), u.clone().narrow(0, start, tokens)];
        start += tokens;
        Tensor::cat(all, 0).narrow(0, tokens, count)
    };
    Tensor::cat(rows.iter().enumerate().map(of_row).collect(), 0)
}

impl DeltaNet {
    /// Heads and widths, without rows.
    fn shape(&self) -> DeltaShape {
        DeltaShape {
            rows: Arc::new([]),
            key_heads: self.key_heads,
            value_heads: self.value_heads,
            key_dim: self.key_dim,
            value_dim: self.value_dim,
            keeps_states: false,
        }
    }

    /// It has no keys that later tokens look at.
    pub(crate) fn widths() -> AttentionWidths {
        AttentionWidths { heads: 0, query: 0, key: 0 }
    }

    /// Elements that the backward pass keeps of each token: the input of the convolution and its result,
    /// those of the rule beside them, its result before and behind the norm, the gate; and the inputs of
    /// linear layers that are trained.
    pub(crate) fn kept(&self, adapted: &Adapted<'_>) -> u64 {
        let channels = self.qkv.weight.shape[0] as u64;
        let values = (self.value_heads * self.value_dim) as u64;
        let of_heads = 8 * self.value_heads as u64;
        let input = adapted.input_of(&[&self.qkv, &self.z, &self.b, &self.a]);
        2 * channels + of_heads + 3 * values + input + adapted.input_of(&[&self.out])
    }
}
