//! The memory that operations take while they work, beside their inputs and results, and the limits
//! that decide it. Other libraries (cuBLAS, cuDNN, MLX) call this memory the workspace.

use crate::FloatType;

/// Bytes of f32 logits alive at a time on the CPU. W is packed again for each piece of logits;
/// pieces of this size make that cheap.
const CPU_LOGITS: usize = 32 << 20;
/// Bytes of f32 logits alive at a time on a GPU, not counting their gradients. Products of this
/// size fill a card.
const GPU_LOGITS: usize = 256 << 20;
/// Queries of a block of attention on the CPU: its scores stay in the second-level cache up to 2,000 keys. On a GPU
/// keys and queries of a block begin at multiples of it: parts of tensors can then be used without a copy. Whoever lets
/// attention begin or forget keys somewhere else than at a multiple of it changes the order of its sums.
pub const ATTENTION_BLOCK: usize = 64;
/// Bytes of f32 scores alive at a time on a GPU. The backward pass holds four tensors of that
/// shape.
pub(crate) const GPU_SCORES: usize = 64 << 20;
/// Most queries of a block of attention on a GPU. Larger blocks would compute more scores of
/// queries and keys that do not see each other.
pub(crate) const GPU_QUERIES: usize = 512;
/// Tokens of a chunk of the delta rule on a GPU.
pub(crate) const DELTA_CHUNK: usize = 64;
/// Bytes that the backward pass of the delta rule takes at a time on a GPU, if heads can be computed apart.
const GPU_DELTA: u64 = 512 << 20;

/// Most experts that are multiplied at a time where they are read for it: more than a disk keeps up with.
pub const EXPERTS_AT_ONCE: usize = 8;

/// Trained positions whose logits are computed at a time on the CPU.
pub(crate) fn cpu_logit_rows(vocabulary: usize) -> usize {
    (CPU_LOGITS / 4 / vocabulary).clamp(256, 1024)
}

/// Trained positions whose logits are computed at a time on a GPU.
pub(crate) fn gpu_logit_rows(vocabulary: usize) -> usize {
    (GPU_LOGITS / 4 / vocabulary).clamp(32, 4096)
}

/// Sizes of the attention of one layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSizes {
    /// Tokens of the micro-batch.
    pub tokens: u64,
    /// Tokens of the longest row.
    pub longest: u64,
    /// Query heads.
    pub heads: u64,
    /// Elements of a token's queries, of all heads together.
    pub query: u64,
    /// Elements of a token's keys, of all heads together; its values have as many.
    pub key: u64,
}

/// Bytes of the backward pass of causal attention on the CPU: the gradients of each head, before
/// they are copied into the tensors of all heads.
pub fn cpu_attention(sizes: AttentionSizes) -> u64 {
    4 * sizes.tokens * (sizes.query + 2 * sizes.key)
}

/// Bytes of a piece of logits on the CPU.
///
/// `trained_tokens` is the number of trained tokens of the micro-batch.
pub fn cpu_logits(vocabulary: u64, trained_tokens: u64) -> u64 {
    4 * vocabulary * trained_tokens.min(cpu_logit_rows(vocabulary as usize) as u64)
}

/// Bytes that a weight [o, i] held in 16 bits, or packed, takes on the CPU while it is multiplied: a block in f32. More
/// threads get wider blocks, so that each has enough columns.
pub fn cpu_widened(shape: [usize; 2], threads: usize) -> u64 {
    crate::cpu::weight::read_at_a_time(shape, threads) as u64
}

/// The same of an output layer [vocabulary, hidden].
pub fn cpu_widened_output(shape: [usize; 2], threads: usize) -> u64 {
    crate::cpu::weight::read_of_output(shape, threads) as u64
}

/// Bytes of the backward pass of causal attention on a GPU.
///
/// These are keys and values by head, the sums of their gradients, a block of scores, a block of
/// their gradients, and both blocks in the number type that is multiplied.
pub fn gpu_attention(sizes: AttentionSizes, compute: FloatType) -> u64 {
    let AttentionSizes { tokens, longest, heads, query, key } = sizes;
    let number = compute.bytes() as u64;
    let block = ATTENTION_BLOCK as u64;
    let queries = tokens.next_multiple_of(block).min(GPU_QUERIES as u64);
    let keys = (longest + queries).min(tokens).next_multiple_of(block);
    let scores = (heads * queries * keys).min(GPU_SCORES as u64 / 4);
    scores * (8 + 2 * number) + tokens * key * (2 * number + 8) + tokens * (query + 2 * key) * number
}

/// Heads of a gated delta rule, and elements of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaSizes {
    /// Key heads.
    pub key_heads: u64,
    /// Value heads.
    pub value_heads: u64,
    /// Elements of a key head.
    pub key: u64,
    /// Elements of a value head.
    pub value: u64,
}

impl DeltaSizes {
    /// Bytes that the backward pass takes on a GPU for each place of each key head. For each of its value heads
    /// these are a dozen tensors of keys, ten of values, as many of products between the places of a chunk,
    /// and three of states.
    fn bytes_of_place(&self) -> u64 {
        let chunk = DELTA_CHUNK as u64;
        let of_head = 12 * self.key + 10 * self.value + 10 * chunk + 3 * self.key * self.value / chunk;
        4 * of_head * self.value_heads / self.key_heads.max(1)
    }
}

/// Key heads of a gated delta rule that a GPU computes at a time, where all chunks have so many places.
pub(crate) fn gpu_delta_heads(sizes: DeltaSizes, places: u64) -> u64 {
    (GPU_DELTA / (places * sizes.bytes_of_place()).max(1)).clamp(1, sizes.key_heads)
}

/// Bytes of the backward pass of the gated delta rule on a GPU, for so many tokens of rows of which the longest
/// has `longest`. Beside the heads that are computed at a time, it has the gradients of all in f32.
pub fn gpu_delta(sizes: DeltaSizes, tokens: u64, longest: u64) -> u64 {
    // Each row may have a chunk that is almost empty.
    let chunk = longest.next_power_of_two().min(DELTA_CHUNK as u64);
    let places = tokens + tokens.div_ceil(longest.max(1)) * chunk;
    let width = 2 * sizes.key_heads * sizes.key + sizes.value_heads * sizes.value;
    gpu_delta_heads(sizes, places) * places * sizes.bytes_of_place() + 4 * tokens * 2 * width
}

/// Bytes of a piece of logits and of its gradients on a GPU.
///
/// `trained_tokens` is the number of trained tokens of the micro-batch.
pub fn gpu_logits(vocabulary: u64, trained_tokens: u64, compute: FloatType) -> u64 {
    let rows = trained_tokens.min(gpu_logit_rows(vocabulary as usize) as u64);
    rows * vocabulary * (4 + compute.bytes() as u64)
}
