//! What the model calls: the operations of this crate, on whichever device their tensors are.
//!
//! Activations (x, h, q, k, v, y and their gradients) have the number type that a run computes in.
//! A frozen weight may be held in another one, 16 bits wide: it is converted where it is
//! multiplied. Trained parameters, norms and biases are f32.
//!
//! The functions are generated from the table below, see `extension.rs`. A new operation is a row
//! here, an `impl Fused` in `cpu` and another in `gpu`, and its reference in [`crate::composed`].

use std::ops::Range;
use std::sync::Arc;

use crate::arguments::{Activation, AttentionShape, Dropout, RopeTable, Targets};
use crate::by_head::HeadRows;
use crate::delta::DeltaShape;
use crate::dispatch::{Dispatch, ExpertWeights};
use crate::extension::LatePart;
use crate::weight::PackedWeight;

crate::extension::operations! {
    /// `x Wᵀ`: x [t, i], w [o, i] -> [t, o].
    ///
    /// If `w` does not require gradients, none is computed for it, and x is not kept.
    fn linear(x: Tensor<2>, w: Tensor<2>) -> Tensor<2> = Linear;

    /// `x Wᵀ + scale · drop(x) Aᵀ Bᵀ` (Hu et al. 2021, "LoRA"): x [t, i], w [o, i], a [r, i],
    /// b [o, r] -> [t, o].
    ///
    /// `w` is frozen: it gets no gradient. Without `dropout`, `drop(x)` is x.
    fn lora_linear(
        x: Tensor<2>, w: Tensor<2>, a: Tensor<2>, b: Tensor<2>;
        scale: f32, dropout: Option<Dropout>
    ) -> Tensor<2> = LoraLinear;

    /// `y` with `scale · x Aᵀ Bᵀ` added to some rows: y [t, o], x [t, i], a [r, i], b [o, r] -> [t, o].
    ///
    /// On the CPU a row has the bits that it has in [`lora_linear`] of these rows alone, if it has those of
    /// [`linear`] in `y`. See [`crate::row_branch`].
    ///
    /// # Panics
    /// If a gradient is asked for, or a row is beyond y. On a GPU: it is composed there.
    fn add_low_rank(
        y: Tensor<2>, x: Tensor<2>, a: Tensor<2>, b: Tensor<2>; rows: Range<usize>, scale: f32
    ) -> Tensor<2> = AddLowRank;

    /// `z · m / n`, output by output (Liu et al. 2024, "DoRA"): z [t, o], magnitudes m [o], norms
    /// n [o] -> [t, o].
    ///
    /// `n` is a constant: it gets no gradient.
    fn magnitude(z: Tensor<2>, m: Tensor<1>, n: Tensor<1>) -> Tensor<2> = Magnitude;

    /// `y + (m/n - 1) · dropped + m/n · scale · branch`, output by output: DoRA where the input of
    /// the branch went through dropout. y, dropped and branch [t, o], m and n [o] -> [t, o].
    ///
    /// `y` is x Wᵀ, `dropped` drop(x) Wᵀ and `branch` drop(x) Aᵀ Bᵀ. `n` is a constant.
    fn dropped_magnitude(
        y: Tensor<2>, dropped: Tensor<2>, branch: Tensor<2>, m: Tensor<1>, n: Tensor<1>; scale: f32
    ) -> Tensor<2> = DroppedMagnitude;

    /// The Euclidean norms of the rows of `W + scale · B A`, in f32: w [o, i], a [r, i], b [o, r]
    /// -> [o]. None of them gets a gradient.
    ///
    /// The matrix is formed, a block of rows at a time.
    fn merged_norms(w: Tensor<2>, a: Tensor<2>, b: Tensor<2>; scale: f32) -> Tensor<1> = MergedNorms;

    /// drop(x): x [t, i] -> [t, i].
    fn drop_input(x: Tensor<2>; dropout: Dropout) -> Tensor<2> = DropInput;

    /// `gamma · x / sqrt(mean(x²) + eps)` over the last dimension (Zhang and Sennrich 2019, "Root
    /// Mean Square Layer Normalization"): x [.., d], gamma [d] -> [.., d].
    fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>; eps: f64) -> Tensor<D> = RmsNorm;

    /// Rotary position embedding (Su et al. 2021, "RoFormer") in Hugging Face's layout:
    /// x [t, heads, d], a table of t tokens -> [t, heads, d].
    ///
    /// Element n of a head turns together with element n + d/2.
    ///
    /// # Panics
    /// If the table was made for another number of tokens or another d.
    fn rope(x: Tensor<3>; table: RopeTable) -> Tensor<3> = Rope;

    /// Causal attention inside each segment: q [t, h, d], k [s, k, d], v [s, k, y] -> [t, h, y].
    ///
    /// On a GPU y is d: [`crate::attention`] sees to that. `s` is the number of keys, t without a cache. Query
    /// heads n · h/k to (n + 1) · h/k - 1 use key/value head n (Ainslie et al. 2023, "GQA").
    ///
    /// # Panics
    /// If h is no multiple of k.
    fn causal_attention(
        q: Tensor<3>, k: Tensor<3>, v: Tensor<3>; shape: AttentionShape
    ) -> Tensor<3> = CausalAttention;

    /// [`causal_attention`], in which each query head gives a part of its probability to a sink: that of a
    /// key with the score `sinks` [h] and no value (Xiao et al. 2023, "Efficient Streaming Language Models
    /// with Attention Sinks"; gpt-oss).
    ///
    /// # Panics
    /// If h is no multiple of k.
    fn sink_attention(
        q: Tensor<3>, k: Tensor<3>, v: Tensor<3>, sinks: Tensor<1>; shape: AttentionShape
    ) -> Tensor<3> = SinkAttention;

    /// `activation(gate) · up` (Shazeer 2020, "GLU Variants Improve Transformer"): both [t, f] ->
    /// [t, f].
    fn gated(gate: Tensor<2>, up: Tensor<2>; activation: Activation) -> Tensor<2> = Gated;

    /// `-ln softmax(h[position_n] Wᵀ)[target_n]` for each of n targets: h [t, i], w [v, i] -> [n].
    ///
    /// # Panics
    /// If there are no targets.
    fn linear_cross_entropy(h: Tensor<2>, w: Tensor<2>; targets: Targets) -> Tensor<1> = LinearCrossEntropy,
        requires !targets.is_empty(), "a micro-batch without trained tokens has no loss to differentiate";

    /// As [`linear_cross_entropy`], with a LoRA branch on the output layer. The logits are
    /// `h Wᵀ + scale · g Bᵀ`: h [t, i], w [v, i], g [t, r], b [v, r] -> [n].
    ///
    /// `g` is drop(h) Aᵀ. `w` is frozen: it gets no gradient.
    ///
    /// # Panics
    /// If there are no targets.
    fn lora_cross_entropy(
        h: Tensor<2>, w: Tensor<2>, g: Tensor<2>, b: Tensor<2>; scale: f32, targets: Targets
    ) -> Tensor<1> = LoraCrossEntropy,
        requires !targets.is_empty(), "a micro-batch without trained tokens has no loss to differentiate";

    /// `a + b`, the residual connection: both [t, o] and of one number type -> [t, o].
    fn residual(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> = Residual;

    /// `y + bias` for every token: y [t, o], bias [o] -> [t, o].
    fn bias(y: Tensor<2>, bias: Tensor<1>) -> Tensor<2> = Bias;

    /// A zero, [1], that y's gradient `d_y` flows back from: both [t, o].
    ///
    /// `gradient_seed(y, d_y).backward()` continues a backward pass that was cut at y.
    fn gradient_seed(y: Tensor<2>, d_y: Tensor<2>) -> Tensor<1> = GradientSeed;

    /// y, to whose gradient `part` is added in the backward pass: y [t, o], part t · o numbers -> [t, o].
    ///
    /// So a gradient can depend on what is known only behind the forward pass. y and `part` are f32.
    ///
    /// # Panics
    /// In the backward pass: if `part` is not set by then, or has another length.
    fn late_gradient(y: Tensor<2>; part: LatePart) -> Tensor<2> = LateGradient;

    /// [`linear`] of a packed w [o, i], which gets no gradient.
    fn packed_linear(x: Tensor<2>; w: PackedWeight) -> Tensor<2> = PackedLinear;

    /// [`lora_linear`] of a packed w [o, i].
    fn packed_lora_linear(
        x: Tensor<2>, a: Tensor<2>, b: Tensor<2>; w: PackedWeight, scale: f32, dropout: Option<Dropout>
    ) -> Tensor<2> = PackedLoraLinear;

    /// [`merged_norms`] of a packed w [o, i].
    fn packed_merged_norms(a: Tensor<2>, b: Tensor<2>; w: PackedWeight, scale: f32) -> Tensor<1> = PackedMergedNorms;

    /// [`linear_cross_entropy`] of a packed w [v, i].
    ///
    /// # Panics
    /// If there are no targets.
    fn packed_cross_entropy(h: Tensor<2>; w: PackedWeight, targets: Targets) -> Tensor<1> = PackedCrossEntropy,
        requires !targets.is_empty(), "a micro-batch without trained tokens has no loss to differentiate";

    /// [`lora_cross_entropy`] of a packed w [v, i].
    ///
    /// # Panics
    /// If there are no targets.
    fn packed_lora_cross_entropy(
        h: Tensor<2>, g: Tensor<2>, b: Tensor<2>; w: PackedWeight, scale: f32, targets: Targets
    ) -> Tensor<1> = PackedLoraCrossEntropy,
        requires !targets.is_empty(), "a micro-batch without trained tokens has no loss to differentiate";

    /// The weights of each token's k experts, from a router's logits of all: logits [t, e] -> [t, k].
    /// `chosen` [t, k] holds the experts.
    fn expert_weights(logits: Tensor<2>; chosen: Arc<[u32]>, rule: ExpertWeights) -> Tensor<2> = WeightsOfExperts;

    /// Each token once for each of its k experts, sorted by expert: x [t, i] -> [t · k, i].
    fn dispatch_rows(x: Tensor<2>; dispatch: Dispatch) -> Tensor<2> = DispatchRows;

    /// The sum of each token's k rows, each times its weight, in the order of the choices:
    /// y [t · k, o], weights [t, k] -> [t, o].
    fn combine(y: Tensor<2>, weights: Tensor<2>; dispatch: Dispatch) -> Tensor<2> = Combine;

    /// `x Wᵀ` with the matrix [o, i] of each row's expert, which gets no gradient: x [t · k, i] ->
    /// [t · k, o].
    fn expert_linear(x: Tensor<2>; experts: Arc<[PackedWeight]>, dispatch: Dispatch) -> Tensor<2> = ExpertLinear;

    /// [`expert_linear`] with a LoRA branch for each of e experts: a [e · r, i], b [e · o, r].
    fn expert_lora_linear(
        x: Tensor<2>, a: Tensor<2>, b: Tensor<2>; experts: Arc<[PackedWeight]>, dispatch: Dispatch, scale: f32
    ) -> Tensor<2> = ExpertLoraLinear;

    /// A causal convolution of each channel over the tokens of each row, perhaps with SiLU behind it:
    /// u [t, c], w [c, k], past [m · (k - 1), c] -> [t, c].
    ///
    /// `rows` are the numbers of tokens of m rows, `past` the inputs of each row before its first token,
    /// zeros at its beginning. `past` gets no gradient.
    fn short_convolution(
        u: Tensor<2>, w: Tensor<2>, past: Tensor<2>; rows: Arc<[usize]>, has_silu: bool
    ) -> Tensor<2> = ShortConvolution;

    /// The gated delta rule (Yang et al. 2024) of each row, from states that it begins with: u
    /// [t, 2 a x + h y] with queries, keys and values, g and beta [t, h], states [m x, h y] (any tensor if
    /// rows begin empty) -> [t, h y], and below that, if it is asked for, the last states [m x, h y].
    ///
    /// Queries and keys are normalized; g is the logarithm of what a state keeps, beta how much of its error
    /// it makes good. All but u are f32, and so is the result.
    fn delta_rule(
        u: Tensor<2>, g: Tensor<2>, beta: Tensor<2>, states: Tensor<2>; shape: DeltaShape
    ) -> Tensor<2> = DeltaRule;

    /// Each head's vector times its rows W of a matrix: x [t, h, n], w [o, i] -> x W, [t, h, i]; or, with
    /// them transposed, x [t, h, i] -> x Wᵀ, [t, h, n]. See [`crate::by_head`].
    ///
    /// # Panics
    /// If a gradient is asked for. On a GPU: it is composed there.
    fn head_product(x: Tensor<3>, w: Tensor<2>; rows: HeadRows, is_transposed: bool) -> Tensor<3> = HeadProduct;

    /// [`head_product`] of a packed w [o, i].
    ///
    /// # Panics
    /// As [`head_product`].
    fn packed_head_product(
        x: Tensor<3>; w: PackedWeight, rows: HeadRows, is_transposed: bool
    ) -> Tensor<3> = PackedHeadProduct;

    /// [`delta_rule`] by products of matrices, in chunks of tokens: what it is on a GPU. On the CPU it is slower
    /// than the other, and for tests.
    fn chunked_delta_rule(
        u: Tensor<2>, g: Tensor<2>, beta: Tensor<2>, states: Tensor<2>; shape: DeltaShape
    ) -> Tensor<2> = ChunkedDeltaRule;

    /// Rows of a packed embedding w [v, hidden], in the number type and on the device of `like` [n]
    /// -> [t, hidden]. They have no gradient.
    ///
    /// # Panics
    /// If a row is beyond the matrix.
    fn packed_rows(like: Tensor<1>; w: PackedWeight, rows: Vec<u32>) -> Tensor<2> = PackedRows;
}
