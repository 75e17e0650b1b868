//! An estimate of how much memory a run takes at its largest step.
//!
//! Counts what the decoder keeps for its backward pass, tensor by tensor, in the number type that
//! it has there. docs/memory.md compares the estimate with measured peaks.

use finetune_dataset::{Dataset, Row};
use finetune_model::footprint::{self, AttentionSizes};
use finetune_model::{
    Adaptation, AttentionWidths, EXPERTS_IN_MEMORY, FloatType, HAS_GPU_BACKEND, LayerKept, LayerSizes, ModelConfig,
    PackedSizes, Placement, Stage, expected_tensors,
};
use finetune_recipe::{Method, Recipe};
use serde::Serialize;

use crate::error::TrainError;
use crate::local_steps::Meetings;

mod counted;

pub(crate) use self::counted::Counted;

/// Bytes at the largest step, and seconds for the whole run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Estimate {
    /// Bytes of the frozen weights.
    pub weights: u64,
    /// Trained parameters, their gradients and moments, in bytes.
    pub trained: u64,
    /// Bytes of activations and of the memory that operations take while they run.
    pub activations: u64,
    /// Bytes of the logits that the loss is computed from.
    pub logits: u64,
    /// Bytes of the program itself: code, tokenizer, rows, what the allocator holds back. On a GPU:
    /// what its pools cannot use.
    pub program: u64,
    /// Bytes of all of these.
    pub total: u64,
    /// Seconds of the whole run, on the CPU; `None` on a GPU, where measuring would mean compiling
    /// first.
    pub seconds: Option<f64>,
}

/// The sizes of the largest step that decide about memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepShape {
    /// Tokens of the largest micro-batch.
    tokens: u64,
    /// Tokens of its longest row.
    longest: u64,
    /// Targets of the largest micro-batch.
    trained_tokens: u64,
    /// Micro-batches that go through each layer together.
    at_once: u64,
    /// Layers that this process computes, if it does not compute all.
    held_layers: Option<u64>,
    /// Whether layers are computed again in the backward pass.
    checkpointing: bool,
    /// Whether all weights are trained.
    full: bool,
    /// Parts of a step whose gradients this process keeps apart until they are summed.
    shares: u64,
    /// Whether each of these parts has parameters and moments of its own.
    alone: bool,
    /// Bytes of the rows, which stay in main memory.
    rows: u64,
    /// Whether held-back rows are answered before training.
    answers: bool,
}

impl StepShape {
    /// The largest micro-batch: the longest rows together, none longer than `limit`.
    pub(crate) fn new(subject: &Subject<'_>, micro_batch_size: usize, checkpointing: bool, limit: usize) -> StepShape {
        let (recipe, data) = (subject.recipe, subject.train);
        let limit = limit.min(subject.sizing.longest);
        let mut lengths: Vec<(usize, usize)> = data
            .rows
            .iter()
            .map(|row| {
                (row.tokens.len().min(limit), row.trained.iter().take(limit).filter(|&&trained| trained).count())
            })
            .collect();
        let count = micro_batch_size.min(recipe.train.global_batch_size).min(lengths.len());
        if count < lengths.len() {
            lengths.select_nth_unstable_by(count, |a, b| b.cmp(a));
        }
        let stage = subject.sizing.placement.stage();
        let largest = &mut lengths[..count];
        largest.sort_unstable_by(|a, b| b.cmp(a));
        StepShape {
            tokens: largest.iter().map(|(length, _)| *length as u64).sum(),
            longest: largest.first().map_or(0, |(length, _)| *length as u64),
            // The losses are computed where the last layer is.
            trained_tokens: match stage.is_none_or(|stage| stage.last() == stage.mine) {
                true => largest.iter().map(|(_, trained)| *trained as u64).sum(),
                false => 0,
            },
            at_once: subject.sizing.at_once as u64,
            held_layers: stage.map(|stage| (0..stage.of_layer.len()).filter(|&n| stage.holds(n)).count() as u64),
            checkpointing: checkpointing || subject.sizing.placement.reads_layers() || stage.is_some(),
            full: recipe.train.method == Method::Full,
            shares: subject.sizing.shares as u64,
            alone: Meetings::of(recipe).is_some(),
            rows: rows_bytes(data) + subject.eval.map_or(0, rows_bytes) + subject.sizing.text_bytes,
            answers: recipe.eval.samples + recipe.eval.exact_match > 0,
        }
    }
}

/// Bytes of all rows: tokens and targets, the record of each row, and the list of records. Heaps
/// round each list up, by a tenth on average. The list of records has grown by doubling.
fn rows_bytes(data: &Dataset) -> u64 {
    let each = size_of::<Row>() as u64 * 3 / 2 + 32;
    data.counts.tokens * 11 / 2 + data.rows.len() as u64 * each
}

/// Parameters of the model, and how many of them are trained.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) parameters: u64,
    pub(crate) trained: u64,
}

/// Counts the parameters. `adaptation`: `None` if all weights are trained.
pub(crate) fn sizes(config: &ModelConfig, adaptation: Option<&Adaptation>) -> Sizes {
    let shapes = expected_tensors(config);
    let parameters: u64 = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
    let Some(adaptation) = adaptation else { return Sizes { parameters, trained: parameters } };
    let (branches, saved) = adaptation.elements(config);
    Sizes { parameters, trained: branches + saved }
}

/// Code, tables, threads and small pieces of memory, in bytes: measured, see benches/memory.py.
const PROGRAM_BYTES: u64 = if HAS_GPU_BACKEND { 64 << 20 } else { 60 << 20 };
/// Bytes that answering held-back rows leaves behind: measured.
const ANSWERING_BYTES: u64 = 32 << 20;

/// Device and number types of a model, as far as they decide about memory, and what of it is packed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Precision {
    /// Whether the CPU computes.
    pub(crate) cpu: bool,
    /// The number type of activations.
    pub(crate) compute: FloatType,
    /// The number type that frozen matrices are held in, unless they are packed.
    pub(crate) held: FloatType,
    /// The packed matrices.
    pub(crate) packed: PackedSizes,
    /// Bytes that are taken while the largest matrix is packed, before the first step.
    pub(crate) loading: u64,
    /// Elements of matrices whose rows stay in the files.
    pub(crate) by_row: u64,
    /// Bytes of layers and of an embedding that stay in the files, and of what other processes hold.
    pub(crate) on_disk: u64,
    /// Threads that multiply on the CPU.
    pub(crate) threads: usize,
}

impl Precision {
    pub(crate) fn new(sizing: &Sizing) -> Precision {
        let Sizing { config, placement, stored, packed, loading, by_row, layers, ends, .. } = sizing;
        let held = placement.held(*stored);
        Precision {
            cpu: placement.is_cpu(),
            compute: placement.compute(),
            held,
            packed: *packed,
            loading: *loading,
            by_row: *by_row,
            on_disk: on_disk(layers, held, placement)
                + ends_elsewhere(ends, config.tied_embeddings, held, placement)
                + embedding_on_disk(sizing, held),
            threads: rayon::current_num_threads(),
        }
    }
}

/// Bytes of the layers that are not in memory: those of other processes, and where layers are read from the
/// disk, all of its own but the two largest ones next to each other. Of these the experts are not in memory either, but
/// a few, where each is read when it is multiplied.
fn on_disk(layers: &[LayerSizes], held: FloatType, placement: &Placement) -> u64 {
    let is_mine = |n: usize| placement.stage().is_none_or(|stage| stage.holds(n));
    let of = |mine: bool| layers.iter().enumerate().filter(move |(n, _)| is_mine(*n) == mine).map(|(_, layer)| layer);
    let bytes = |mine: bool| of(mine).map(|layer| layer.bytes(held)).sum::<u64>();
    if !placement.reads_layers() {
        return bytes(false);
    }
    let reads_experts = placement.reads_experts();
    let read = |layer: &LayerSizes| {
        if reads_experts { layer.bytes_without_experts(held) } else { layer.bytes(held) }
    };
    let read: Vec<u64> = of(true).map(read).collect();
    let two = read.windows(2).map(|two| two[0] + two[1]).max().unwrap_or(0);
    // The last layer is followed by the first, if that is another one.
    let turn = read.first().unwrap_or(&0) + read.iter().skip(1).next_back().unwrap_or(&0);
    let largest = of(true).map(|layer| layer.experts.largest(held)).max().unwrap_or(0);
    let experts = if reads_experts { EXPERTS_IN_MEMORY as u64 * largest } else { 0 };
    bytes(false) + bytes(true).saturating_sub(two.max(turn) + experts)
}

/// Bytes of embedding and output layer, if only other processes hold them.
fn ends_elsewhere(ends: &[LayerSizes; 2], is_tied: bool, held: FloatType, placement: &Placement) -> u64 {
    let has = [placement.holds_embedding(is_tied), placement.holds_output()];
    ends.iter().zip(has).filter(|(_, has)| !has).map(|(end, _)| end.bytes(held)).sum()
}

/// Bytes of this process's embedding, if its rows stay in the file until tokens need them.
fn embedding_on_disk(sizing: &Sizing, held: FloatType) -> u64 {
    let Sizing { placement, embedding_by_row, ends: [embedding, _], config, .. } = sizing;
    let is_here = placement.holds_embedding(config.tied_embeddings);
    if *embedding_by_row && placement.reads_layers() && is_here { embedding.bytes(held) } else { 0 }
}

/// Bytes of an f32 number.
const FLOAT: u64 = 4;
/// Smaller blocks come from mimalloc's heaps, whose pages they share with what comes and goes around them. Kept inputs of
/// that size were measured to take twice their bytes (8 micro-batches, 124 layers from the disk).
const SMALL_BLOCK: u64 = 256 << 10;
/// Of larger ones half of their bytes more were measured (24 layers, blocks of 1 MiB), and no more than this (of 8 MiB).
const MOST_SCATTERED: u64 = 24 << 20;

/// What a step takes besides weights, trained parameters and the program, at its largest moment.
struct Peak {
    /// Bytes of everything that is there at that moment.
    bytes: u64,
    /// Bytes of the logits that are formed at a time.
    logits: u64,
    /// Bytes of the logits if they are not there at that moment, otherwise 0.
    unused_logits: u64,
    /// Bytes that kept inputs leave unused between them.
    scattered: u64,
}

/// The larger of two moments: when the loss is formed, and when a layer is differentiated.
fn peak(config: &ModelConfig, layers: &[LayerKept], step: &StepShape, precision: Precision) -> Peak {
    let compute = precision.compute.bytes() as u64;
    let (tokens, hidden) = (step.tokens, config.hidden_size as u64);
    let per_token = |width: u64| compute * tokens * width;

    // What a layer keeps for its backward pass.
    let numbers = |layer: &LayerKept| FLOAT * tokens * layer.statistics;
    let kept = |layer: &LayerKept| per_token(layer.mixer + layer.feed_forward + layer.branches) + numbers(layer);
    // While a layer is differentiated: what its feed-forward part takes on top. Then that part is
    // released, and attention takes its own.
    let differentiated = |layer: &LayerKept| {
        let AttentionWidths { heads, query, key } = layer.attention;
        let sizes = AttentionSizes { tokens, longest: step.longest, heads, query, key };
        let attention = match precision.cpu {
            true => footprint::cpu_attention(sizes),
            false => footprint::gpu_attention(sizes, precision.compute),
        };
        let delta = match layer.delta {
            Some(sizes) if !precision.cpu => footprint::gpu_delta(sizes, tokens, step.longest),
            _ => 0,
        };
        let mixer = per_token(layer.mixer + layer.branches) + numbers(layer) + attention + delta;
        (kept(layer) + per_token(layer.taken)).max(mixer)
    };
    // The layers below are there at the same time. With checkpointing it is the inputs of all.
    let all_kept = layers.iter().map(&kept).sum::<u64>();
    // Each micro-batch beside the one that is computed has what came out of its last layer, and a gradient.
    let held = step.held_layers.unwrap_or(layers.len() as u64);
    // What waits for the next process, or has come from the one before: no micro-batch is on two ways at once. Of a
    // GPU's it is in main memory.
    let is_sent = precision.cpu && step.held_layers.is_some();
    let waiting = if is_sent { step.at_once * per_token(hidden) } else { 0 };
    let inputs = step.at_once * held * per_token(hidden) + (step.at_once - 1) * per_token(2 * hidden) + waiting;
    let backward = if step.checkpointing {
        inputs + layers.iter().map(differentiated).max().unwrap_or(0)
    } else {
        let below = layers.iter().scan(0, |below, layer| {
            let now = *below + differentiated(layer);
            *below += kept(layer);
            Some(now)
        });
        below.max().unwrap_or(0)
    };
    // Before the backward pass: the outputs of the last layer and the last norm, logits, and the
    // gradient of each trained row.
    let vocabulary = config.vocabulary as u64;
    let logits = match precision.cpu {
        true => footprint::cpu_logits(vocabulary, step.trained_tokens),
        false => footprint::gpu_logits(vocabulary, step.trained_tokens, precision.compute),
    };
    let rows = FLOAT * step.trained_tokens * hidden;
    let for_layers = if step.checkpointing { inputs } else { all_kept };
    let loss = for_layers + per_token(2 * hidden) + rows + logits;
    let (bytes, unused_logits) = if loss > backward { (loss, 0) } else { (backward, logits) };
    let scattered = match (precision.cpu && step.checkpointing, per_token(hidden) < SMALL_BLOCK) {
        (false, _) => 0,
        (true, true) => inputs,
        (true, false) => (inputs / 2).min(MOST_SCATTERED),
    };
    Peak { bytes, logits, unused_logits, scattered }
}

/// The estimate for a model of this shape at this step.
#[cfg(test)]
pub(crate) fn estimate(
    config: &ModelConfig,
    adaptation: Option<&Adaptation>,
    step: &StepShape,
    precision: Precision,
) -> Estimate {
    estimate_of(config, &Counted::new(config, adaptation), None, step, precision)
}

/// The same for a model that is counted already, on a process that holds the layers of `stage`.
fn estimate_of(
    config: &ModelConfig,
    counted: &Counted,
    stage: Option<&Stage>,
    step: &StepShape,
    precision: Precision,
) -> Estimate {
    let cpu = precision.cpu;
    let Sizes { parameters, .. } = counted.sizes;
    let Peak { bytes: peak, logits, unused_logits, scattered } = peak(config, &counted.layers, step, precision);
    // While a matrix is packed, nothing of a step is there. On a GPU it is done in the host's memory.
    let peak = if cpu { peak.max(precision.loading) } else { peak };
    // Logits are reported apart. If the backward pass takes more than they do, they lie in memory
    // that it takes later.
    let logits = logits.min(peak);
    // A GPU decodes a packed matrix into memory that all of them share.
    let scratch = if cpu { 0 } else { precision.packed.largest * precision.compute.bytes() as u64 };
    let activations = peak - logits + scratch;
    let held = if step.full { FloatType::F32 } else { precision.held };
    let PackedSizes { elements: packed, bytes: packed_bytes, .. } = precision.packed;
    let weights = if step.full {
        0
    } else {
        let all = parameters.saturating_sub(packed + precision.by_row) * held.bytes() as u64 + packed_bytes;
        all.saturating_sub(precision.on_disk)
    };
    let trained_bytes = counted.trained_bytes(stage, step, cpu);
    // Packed matrices are decoded in blocks of the same size as 16-bit ones are widened in.
    let widened = match cpu && (held != FloatType::F32 || packed > 0) {
        true => counted.widened(config, step, precision.threads),
        false => 0,
    };
    let answering = if step.answers { ANSWERING_BYTES } else { 0 };
    let program = if cpu { PROGRAM_BYTES + step.rows + widened + answering } else { 0 };
    // What pools and heaps hold that the largest moment cannot use. On the CPU these are freed blocks that nothing of
    // their size follows, such as the logits' and those of widened weights: an eighth of all blocks at most.
    let in_blocks = weights + trained_bytes + peak + widened;
    let unused = if cpu { (peak / 16 + unused_logits + 2 * widened).min(in_blocks / 8) } else { peak / 10 };
    let slack = unused + scattered;
    Estimate {
        weights,
        trained: trained_bytes,
        activations,
        logits,
        program: program + slack,
        total: weights + trained_bytes + activations + logits + program + slack,
        seconds: None,
    }
}

/// Refuses a run whose estimate is beyond the available bytes.
pub(crate) fn check(
    estimate: &Estimate,
    available: Option<u64>,
    cheaper: impl FnOnce() -> Vec<String>,
) -> Result<(), TrainError> {
    match available {
        Some(available) if estimate.total > available => {
            Err(TrainError::Memory { needed: estimate.total, available, weights: estimate.weights, cheaper: cheaper() })
        }
        _ => Ok(()),
    }
}

/// What decides about the memory of a run besides its recipe and its rows.
#[derive(Clone, Debug)]
pub(crate) struct Sizing {
    pub(crate) config: ModelConfig,
    /// `None` if all weights are trained.
    pub(crate) adaptation: Option<Adaptation>,
    /// Bytes of the tokenizer's files that go into every checkpoint, and of the matrices with new rows
    /// that do.
    pub(crate) text_bytes: u64,
    /// Tokens of the longest row at most: what is behind them is cut off.
    pub(crate) longest: usize,
    pub(crate) placement: Placement,
    /// The number type of the base model's file.
    pub(crate) stored: FloatType,
    /// The matrices of the base that are packed. Those that new rows make dense count with the bytes
    /// that they take then.
    pub(crate) packed: PackedSizes,
    /// Bytes that are taken while the largest matrix is packed.
    pub(crate) loading: u64,
    /// Elements of matrices whose rows stay in the files.
    pub(crate) by_row: u64,
    /// Whether the embedding's rows stay there too where layers are read from the disk.
    pub(crate) embedding_by_row: bool,
    /// The matrices of each layer; empty if the base has no weights yet.
    pub(crate) layers: Vec<LayerSizes>,
    /// The embedding, and the output layer if that is another matrix.
    pub(crate) ends: [LayerSizes; 2],
    /// Micro-batches that go through each layer together.
    pub(crate) at_once: usize,
    /// Parts of a step whose gradients this process keeps apart until they are summed.
    pub(crate) shares: usize,
    /// Whether the device computes in bf16.
    pub(crate) has_bf16: bool,
}

impl Sizing {
    /// Bytes of all layers' matrices, as they are held.
    pub(crate) fn layer_bytes(&self) -> u64 {
        let held = self.placement.held(self.stored);
        self.layers.iter().map(|layer| layer.bytes(held)).sum()
    }
}

/// A run whose memory is estimated.
pub(crate) struct Subject<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) train: &'a Dataset,
    pub(crate) eval: Option<&'a Dataset>,
    pub(crate) sizing: &'a Sizing,
}

impl Subject<'_> {
    /// The estimate without seconds, which would have to be measured.
    pub(crate) fn estimate(&self) -> Estimate {
        self.estimate_counted(&self.counted())
    }

    /// What decides about memory and takes long to count. No placement changes it.
    pub(crate) fn counted(&self) -> Counted {
        Counted::new(&self.sizing.config, self.sizing.adaptation.as_ref())
    }

    /// [`Subject::estimate`] of what is counted already.
    pub(crate) fn estimate_counted(&self, counted: &Counted) -> Estimate {
        let train = &self.recipe.train;
        let step = StepShape::new(self, train.micro_batch_size, train.gradient_checkpointing, usize::MAX);
        let stage = self.sizing.placement.stage();
        estimate_of(&self.sizing.config, counted, stage, &step, Precision::new(self.sizing))
    }
}

#[cfg(test)]
mod machines;
#[cfg(test)]
mod shipped;

#[cfg(test)]
mod tests;

#[cfg(test)]
mod weights;
