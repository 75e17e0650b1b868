//! A gated delta net (Yang et al. 2024, "Gated Delta Networks"), and what its backward pass keeps.
//!
//! Shape letters: `t` tokens, `c` channels of the convolution, `h` value heads, `y` elements of one, `m`
//! rows.

use std::sync::Arc;

use burn::tensor::{DType, Tensor, activation};
use finetune_kernels::footprint::DeltaSizes;
use finetune_kernels::{Activation, DeltaShape, operations};

use crate::decoder::adapted::Adapted;
use crate::decoder::cache::LayerCache;
use crate::decoder::pass::{Context, linear, norm};
use crate::tree::{DeltaInputs, DeltaNet};

/// x [t, hidden] -> [t, hidden]. With a cache, each row goes on from its state.
///
/// The rule is in f32, whatever activations are held in: its states are sums over all tokens of a row.
pub(crate) fn forward(net: &DeltaNet, x: Tensor<2>, context: &Context, cache: Option<&mut LayerCache>) -> Tensor<2> {
    let tokens = x.dims()[0];
    let rows: Arc<[usize]> = context.segments.iter().map(|segment| segment.queries).collect();
    let shape = DeltaShape { rows: rows.clone(), keeps_states: cache.is_some(), ..net.shape() };
    let (states, taps) = (rows.len() * shape.key_dim, net.taps);
    let [u_tc, z_tv, b_th, a_th] = inputs(net, x.clone(), context);
    let (b_th, a_th) = (b_th.cast(DType::F32), a_th.cast(DType::F32));
    let (channels, compute) = (u_tc.dims()[1], u_tc.dtype());
    let device = x.device();
    let zeros = |shape: [usize; 2]| Tensor::<2>::zeros(shape, (&device, DType::F32));
    let fresh = || [zeros([rows.len() * (taps - 1), channels]), zeros([states, z_tv.dims()[1]])];
    let [past, state] = cache.as_ref().and_then(|cache| cache.recurrent().cloned()).unwrap_or_else(fresh);
    let past = past.cast(compute);
    let kernel = context.parameter(net.convolution.values()).reshape([channels, taps]);
    let convolved = operations::short_convolution(u_tc.clone(), kernel, past.clone(), rows.clone(), true);
    let beta_th = activation::sigmoid(b_th);
    // How fast a head forgets, and how much of that at this token.
    let rate: Tensor<2> = context.parameter(net.decay.values()).exp().neg().unsqueeze();
    let bias: Tensor<2> = context.parameter(net.bias.values()).unsqueeze();
    let g_th = softplus(a_th + bias) * rate;
    let out = operations::delta_rule(convolved, g_th, beta_th, state, shape.clone());
    let out = match cache {
        None => out,
        Some(cache) => {
            let last = out.clone().narrow(0, tokens, states);
            cache.set_recurrent([last_inputs(u_tc, past, &rows, taps - 1), last]);
            out.narrow(0, 0, tokens)
        }
    };
    let heads = out.cast(compute).reshape([tokens, shape.value_heads, shape.value_dim]);
    let normed = norm(&net.norm, heads, context).reshape([tokens, shape.value_heads * shape.value_dim]);
    linear(&net.out, operations::gated(z_tv, normed, Activation::Silu), context)
}

/// Of x [t, hidden]: what is convolved [t, c], the gate of the result [t, h y], and [t, h] each for how much
/// of an error is made good and how much of a state is forgotten.
fn inputs(net: &DeltaNet, x: Tensor<2>, context: &Context) -> [Tensor<2>; 4] {
    let (qkvz, ba) = match &net.inputs {
        DeltaInputs::Apart { qkv, z, b, a } => return [qkv, z, b, a].map(|part| linear(part, x.clone(), context)),
        DeltaInputs::Grouped { qkvz, ba } => (linear(qkvz, x.clone(), context), linear(ba, x, context)),
    };
    let DeltaNet { key_heads, value_heads, key_dim, value_dim, .. } = *net;
    let (tokens, group) = (qkvz.dims()[0], value_heads / key_heads);
    let values = group * value_dim;
    // Some columns of the group of each key head, key head by key head.
    let columns = |made: &Tensor<2>, first: usize, width: usize| {
        let all = made.dims()[1];
        let groups = made.clone().reshape([tokens, key_heads, all / key_heads]);
        groups.narrow(2, first, width).reshape([tokens, key_heads * width])
    };
    let parts = [(0, key_dim), (key_dim, key_dim), (2 * key_dim, values)];
    let u = Tensor::cat(parts.map(|(first, width)| columns(&qkvz, first, width)).into(), 1);
    let z = columns(&qkvz, 2 * key_dim + values, values);
    [u, z, columns(&ba, 0, group), columns(&ba, group, group)]
}

/// ln(1 + e^x), where e^x may be beyond all numbers.
fn softplus(x: Tensor<2>) -> Tensor<2> {
    activation::relu(x.clone()) + x.abs().neg().exp().log1p()
}

/// The last `count` inputs of each row, of those before it and its own: u [t, c], past [m · count, c].
pub(super) fn last_inputs(u: Tensor<2>, past: Tensor<2>, rows: &[usize], count: usize) -> Tensor<2> {
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

    /// Heads and widths, for the memory that the rule itself takes.
    pub(crate) fn sizes(&self) -> DeltaSizes {
        let [key_heads, value_heads, key, value] =
            [self.key_heads, self.value_heads, self.key_dim, self.value_dim].map(|size| size as u64);
        DeltaSizes { key_heads, value_heads, key, value }
    }

    /// Elements that the backward pass keeps of each token: the input of the convolution and its result,
    /// those of the rule beside them, its result before and behind the norm, the gate; and the inputs of
    /// linear layers that are trained.
    pub(crate) fn kept(&self, adapted: &Adapted<'_>) -> u64 {
        let channels = (2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim) as u64;
        let values = (self.value_heads * self.value_dim) as u64;
        let of_heads = 8 * self.value_heads as u64;
        let input = match &self.inputs {
            DeltaInputs::Apart { qkv, z, b, a } => adapted.input_of(&[qkv, z, b, a]),
            DeltaInputs::Grouped { qkvz, ba } => adapted.input_of(&[qkvz, ba]),
        };
        2 * channels + of_heads + 3 * values + input + adapted.input_of(&[&self.out])
    }
}
