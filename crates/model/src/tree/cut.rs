//! The tree of one slice: which rows, columns and elements of each tensor are here.

use std::ops::Range;

use super::{
    Attention, Beside, Decoder, Experts, FeedForward, FusedGated, Gated, LatentAttention, LatentQueries, Linear, Mixer,
    Projections,
};
use crate::slice::{Along, Cut, Slice, Sliced, VectorCut};

impl Decoder {
    /// Leaves of every layer what the slice holds. `slice::not_in_slices` has found nothing against it.
    pub(crate) fn cut(&mut self, slice: Slice) {
        for layer in &mut self.layers {
            match &mut layer.mixer {
                Mixer::Attention(attention) => attention.cut(slice),
                Mixer::Latent(attention) => attention.cut(slice),
                Mixer::Delta(_) | Mixer::Convolution(_) => unreachable!("refused before"),
            }
            match &mut layer.feed_forward {
                FeedForward::Gated(gated) => gated.cut(slice),
                FeedForward::Fused(fused) => fused.cut(slice),
                FeedForward::Experts(experts) => experts.cut(slice),
                FeedForward::Beside(Beside { dense, experts, .. }) => {
                    dense.cut(slice);
                    experts.cut(slice);
                }
            }
        }
        self.sliced = Some(Sliced { slice, sums: None });
    }
}

/// Elements of these heads, which have so many each, behind `first`.
fn of_heads(heads: &Range<usize>, each: usize, first: usize) -> Range<usize> {
    first + heads.start * each..first + heads.end * each
}

impl Linear {
    /// Keeps these outputs.
    fn keep_outputs(&mut self, ranges: Vec<Range<usize>>) {
        let whole = self.weight.shape;
        if let Some(bias) = &mut self.bias {
            bias.keep(VectorCut::Ranges { whole: whole[0], ranges: ranges.clone() });
        }
        self.weight.keep(Cut { whole, along: Along::Rows(ranges) });
    }

    /// Keeps these inputs. The outputs are summed over the slices, so the first one adds the bias.
    fn keep_inputs(&mut self, range: Range<usize>, slice: Slice) {
        let whole = self.weight.shape;
        self.weight.keep(Cut { whole, along: Along::Columns(range) });
        if let Some(bias) = self.bias.as_mut().filter(|_| !slice.is_first()) {
            bias.keep(VectorCut::Elsewhere { length: whole[0] });
        }
    }
}

impl Attention {
    fn cut(&mut self, slice: Slice) {
        let Attention { head_dim, heads: all_heads, key_value_heads: all_keys, .. } = *self;
        let (heads, keys) = (slice.heads(all_heads), slice.heads(all_keys));
        let of_keys = of_heads(&keys, head_dim, 0);
        match &mut self.projections {
            Projections::Apart { q, k, v } => {
                // With a gate a head has twice as many.
                let each = q.weight.shape[0] / all_heads;
                q.keep_outputs(vec![of_heads(&heads, each, 0)]);
                k.keep_outputs(vec![of_keys.clone()]);
                v.iter_mut().for_each(|v| v.keep_outputs(vec![of_keys.clone()]));
            }
            Projections::Queries { q, .. } => q.keep_outputs(vec![of_heads(&heads, head_dim, 0)]),
            Projections::Fused(qkv) => {
                let (first_key, first_value) = (all_heads * head_dim, (all_heads + all_keys) * head_dim);
                qkv.keep_outputs(vec![
                    of_heads(&heads, head_dim, 0),
                    of_heads(&keys, head_dim, first_key),
                    of_heads(&keys, head_dim, first_value),
                ]);
            }
        }
        if let Some(gate) = &mut self.gate {
            gate.keep_outputs(vec![of_heads(&heads, head_dim, 0)]);
        }
        self.o.keep_inputs(of_heads(&heads, head_dim, 0), slice);
        if let Some(sinks) = &mut self.sinks {
            sinks.keep(VectorCut::Ranges { whole: all_heads, ranges: vec![heads.clone()] });
        }
        (self.heads, self.key_value_heads) = (heads.len(), keys.len());
    }
}

impl LatentAttention {
    fn cut(&mut self, slice: Slice) {
        let (sizes, heads) = (self.sizes, slice.heads(self.heads));
        let (LatentQueries::Direct(queries) | LatentQueries::Compressed { up: queries, .. }) = &mut self.queries;
        queries.keep_outputs(vec![of_heads(&heads, sizes.plain + sizes.turned, 0)]);
        self.up.keep_outputs(vec![of_heads(&heads, sizes.plain + sizes.value, 0)]);
        self.o.keep_inputs(of_heads(&heads, sizes.value, 0), slice);
        self.heads = heads.len();
    }
}

impl Gated {
    fn cut(&mut self, slice: Slice) {
        let columns = slice.columns(self.gate.weight.shape[0]);
        self.gate.keep_outputs(vec![columns.clone()]);
        self.up.keep_outputs(vec![columns.clone()]);
        if let Some(both) = &mut self.gate_up {
            // Its outputs take turns, so those of the same columns lie together.
            let (whole, rows) = (both.weight.shape, 2 * columns.start..2 * columns.end);
            both.weight.keep(Cut { whole, along: Along::Rows([rows].into()) });
        }
        self.down.keep_inputs(columns, slice);
    }
}

impl FusedGated {
    fn cut(&mut self, slice: Slice) {
        let inner = self.down.weight.shape[1];
        let columns = slice.columns(inner);
        self.gate_up.keep_outputs(vec![columns.clone(), inner + columns.start..inner + columns.end]);
        self.down.keep_inputs(columns, slice);
    }
}

impl Experts {
    /// Every slice has a part of each expert: all of them choose the same ones.
    fn cut(&mut self, slice: Slice) {
        self.experts
            .iter_mut()
            .chain(self.shared.as_mut().map(|(expert, _)| expert))
            .for_each(|expert| expert.cut(slice));
    }
}
