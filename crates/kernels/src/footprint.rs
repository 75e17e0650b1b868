//! How much memory the operations take while they work, beside what goes in and comes out; and the limits that decide it.

use crate::FloatType;

/// Bytes of f32 logits alive at a time on the CPU. Large enough that packing W again for each piece costs little.
const CPU_LOGITS: usize = 32 << 20;
/// The same on a GPU, where their gradients come on top. Large enough for products that fill a card.
const GPU_LOGITS: usize = 256 << 20;
/// Bytes of f32 scores alive at a time on a GPU; the backward pass has the like of it four times.
pub(crate) const GPU_SCORES: usize = 64 << 20;
/// Most queries of a block of attention on a GPU: more would compute scores of queries and keys that do not see each other.
pub(crate) const GPU_QUERIES: usize = 512;

/// Trained positions whose logits are made at a time on the CPU.
pub(crate) fn cpu_logit_rows(vocabulary: usize) -> usize {
    (CPU_LOGITS / 4 / vocabulary).clamp(32, 1024)
}

/// The same on a GPU.
pub(crate) fn gpu_logit_rows(vocabulary: usize) -> usize {
    (GPU_LOGITS / 4 / vocabulary).clamp(32, 4096)
}

/// Sizes of the attention of one layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSizes {
    pub tokens: u64,
    /// Tokens of the longest row.
    pub longest: u64,
    pub heads: u64,
    /// Elements of a token's queries, and of its keys.
    pub query: u64,
    pub key: u64,
}

/// Bytes of the backward pass of causal attention on the CPU: each head's gradients until they are put together.
pub fn cpu_attention(sizes: AttentionSizes) -> u64 {
    4 * sizes.tokens * (sizes.query + 2 * sizes.key)
}

/// Bytes of a piece of logits on the CPU.
pub fn cpu_logits(vocabulary: u64, trained_tokens: u64) -> u64 {
    4 * vocabulary * trained_tokens.min(cpu_logit_rows(vocabulary as usize) as u64)
}

/// Bytes that a weight held in 16 bits takes on the CPU while it is multiplied: the widest is the output layer's.
pub fn cpu_widened(vocabulary: u64, hidden: u64) -> u64 {
    (4 * vocabulary * hidden).min(2 * crate::cpu::half_weights::BLOCK_BYTES as u64)
}

/// Bytes of the backward pass of causal attention on a GPU: keys and values by head, sums of their gradients, and a block of
/// scores, of their gradients, and of both in the number type that is multiplied.
pub fn gpu_attention(sizes: AttentionSizes, compute: FloatType) -> u64 {
    let AttentionSizes { tokens, longest, heads, query, key } = sizes;
    let number = compute.bytes() as u64;
    let queries = tokens.next_multiple_of(64).min(GPU_QUERIES as u64);
    let keys = (longest + queries).min(tokens).next_multiple_of(64);
    let scores = (heads * queries * keys).min(GPU_SCORES as u64 / 4);
    scores * (8 + 2 * number) + tokens * key * (2 * number + 8) + tokens * (query + 2 * key) * number
}

/// Bytes of a piece of logits and its gradients on a GPU.
pub fn gpu_logits(vocabulary: u64, trained_tokens: u64, compute: FloatType) -> u64 {
    let rows = trained_tokens.min(gpu_logit_rows(vocabulary as usize) as u64);
    rows * vocabulary * (4 + compute.bytes() as u64)
}
