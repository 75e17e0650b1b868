//! How much memory a run takes at its largest step, and what would make it less.
//!
//! Counts what the decoder keeps for its backward pass, tensor by tensor, in the number type that it has there.
//! docs/memory.md holds the estimate against measured peaks.

use finetune_dataset::{Dataset, Row};
use finetune_model::footprint::{self, AttentionSizes};
use finetune_model::{FloatType, HAS_GPU_BACKEND, LoraTarget, LoraTargets, ModelConfig, Placement, expected_tensors};
use finetune_recipe::{Method, Recipe};
use finetune_store::human_bytes;
use serde::Serialize;

use crate::error::TrainError;

/// Bytes at the largest step, and seconds for the whole run.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Estimate {
    pub weights: u64,
    /// Trained parameters, their gradients and moments.
    pub trained: u64,
    pub activations: u64,
    pub logits: u64,
    /// The program itself: code, tokenizer, rows, what the allocator holds back. On a GPU what its pools cannot use.
    pub program: u64,
    pub total: u64,
    /// On the CPU, where it can be measured without compiling anything.
    pub seconds: Option<f64>,
}

/// What of a recipe decides about memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Tokens of the largest micro-batch, its longest row, and its trained tokens.
    tokens: u64,
    longest: u64,
    trained_tokens: u64,
    checkpointing: bool,
    full: bool,
    /// What the rows take, which stay in main memory.
    rows: u64,
    /// Whether held-back rows are answered before.
    answers: bool,
}

impl Load {
    /// The largest micro-batch: the longest rows together, none longer than `limit`.
    fn of(subject: &Subject<'_>, micro_batch_size: usize, checkpointing: bool, limit: usize) -> Load {
        let (recipe, data) = (subject.recipe, subject.train);
        let mut lengths: Vec<(usize, usize)> = data
            .rows
            .iter()
            .map(|row| {
                (row.tokens.len().min(limit), row.trained.iter().take(limit).filter(|&&trained| trained).count())
            })
            .collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        let largest = &lengths[..micro_batch_size.min(lengths.len())];
        Load {
            tokens: largest.iter().map(|(length, _)| *length as u64).sum(),
            longest: largest.first().map_or(0, |(length, _)| *length as u64),
            trained_tokens: largest.iter().map(|(_, trained)| *trained as u64).sum(),
            checkpointing,
            full: recipe.train.method == Method::Full,
            rows: rows_bytes(data) + subject.eval.map_or(0, rows_bytes) + subject.text,
            answers: recipe.eval.samples + recipe.eval.exact_match > 0,
        }
    }
}

/// Tokens and targets of all rows (heaps round each list up, by a tenth on average), what is noted of each, and the list of
/// them, which has grown by doubling.
fn rows_bytes(data: &Dataset) -> u64 {
    let each = size_of::<Row>() as u64 * 3 / 2 + 32;
    data.counts.tokens * 11 / 2 + data.rows.len() as u64 * each
}

/// Parameters of the model, and how many of them are trained.
pub(crate) struct Sizes {
    pub(crate) parameters: u64,
    pub(crate) trained: u64,
}

pub(crate) fn sizes(config: &ModelConfig, targets: Option<&LoraTargets>) -> Sizes {
    let shapes = expected_tensors(config);
    let parameters: u64 = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
    let Some(targets) = targets else { return Sizes { parameters, trained: parameters } };
    let width = |module: &str| {
        let found = shapes.iter().find(|(name, _)| name.strip_suffix(".weight") == Some(module));
        found.map_or(0, |(_, shape)| shape.iter().sum::<usize>())
    };
    let trained = targets.iter().map(|target| (target.rank * width(&target.module)) as u64).sum();
    Sizes { parameters, trained }
}

/// Which of a layer's linear layers have a branch: those keep their input for the backward pass. One layer stands for all.
#[derive(Clone, Copy, Debug)]
struct Branches {
    /// Layers from the lowest one with a branch on: nothing below is differentiated.
    layers: usize,
    /// Of 0 to 1, over these layers: how many keep the input of q, k, v; of gate and up; of down. (That
    /// of o is attention's output, which is kept anyway.)
    attention_input: f64,
    mlp_input: f64,
    down_input: f64,
    /// Σ of the ranks in all layers.
    ranks: f64,
}

impl Branches {
    fn of(config: &ModelConfig, targets: Option<&LoraTargets>) -> Branches {
        let Some(targets) = targets else {
            let layers = config.layers;
            return Branches { layers, attention_input: 1.0, mlp_input: 1.0, down_input: 1.0, ranks: 0.0 };
        };
        let layer_of = |module: &str| module.split('.').find_map(|part| part.parse::<usize>().ok());
        let first = targets.iter().filter_map(|target| layer_of(&target.module)).min().unwrap_or(0);
        let layers = config.layers - first.min(config.layers - 1);
        let share = |names: &[&str]| {
            let keeps = |layer: usize| {
                let prefix = format!("model.layers.{layer}.");
                targets.iter().any(|target| {
                    let part = target.module.strip_prefix(&prefix).and_then(|rest| rest.rsplit('.').next());
                    part.is_some_and(|part| names.contains(&part))
                })
            };
            (first..config.layers).filter(|&layer| keeps(layer)).count() as f64 / layers as f64
        };
        Branches {
            layers,
            attention_input: share(&["q_proj", "k_proj", "v_proj"]),
            mlp_input: share(&["gate_proj", "up_proj"]),
            down_input: share(&["down_proj"]),
            ranks: targets.iter().map(|target| target.rank as f64).sum(),
        }
    }
}

/// Code, tables, threads and small pieces of memory: measured, see benches/memory.py.
const PROGRAM_BYTES: u64 = if HAS_GPU_BACKEND { 64 << 20 } else { 56 << 20 };
/// What answering held-back rows leaves behind.
const ANSWERING_BYTES: u64 = 32 << 20;

/// Where a model is computed, as far as memory goes.
#[derive(Clone, Copy, Debug)]
struct Where {
    cpu: bool,
    compute: FloatType,
    /// What frozen matrices are held in.
    held: FloatType,
}

impl Where {
    fn of(placement: &Placement, stored: FloatType) -> Where {
        Where { cpu: placement.is_cpu(), compute: placement.compute(), held: placement.held(stored) }
    }
}

/// The estimate for a model of this shape under this load.
fn estimate(config: &ModelConfig, targets: Option<&LoraTargets>, load: &Load, place: Where) -> Estimate {
    const FLOAT: u64 = 4;
    let cpu = place.cpu;
    let compute = place.compute.bytes() as u64;
    let Sizes { parameters, trained } = self::sizes(config, targets);
    let branches = Branches::of(config, targets);
    let (tokens, hidden) = (load.tokens, config.hidden_size as u64);
    let query = (config.heads * config.head_dim) as u64;
    let key = (config.key_value_heads * config.head_dim) as u64;
    let inner = config.intermediate_size as u64;
    let layers = branches.layers as u64;
    let share = |part: f64, width: u64| (part * width as f64) as u64;

    // Kept for the backward pass of a layer: a norm's input, that of linear layers with a branch where nothing else keeps it,
    // rotated queries and keys, values and attention's output (norms of heads keep theirs too); gate and up.
    let head_norms = if config.query_key_norm { query + key } else { 0 };
    let attention_part = hidden + 2 * query + 2 * key + head_norms + share(branches.attention_input, hidden);
    let mlp_part = hidden + 2 * inner + share(branches.mlp_input, hidden) + share(branches.down_input, inner);
    let ranks = (branches.ranks / layers as f64) as u64;
    let per_token = |width: u64| compute * tokens * width;
    let numbers = FLOAT * tokens * (config.heads as u64 + 2);
    let layer = per_token(attention_part + mlp_part + ranks) + numbers;

    // On top of that while a layer is worked on backwards: gradients of the MLP's widest tensors and of the residual stream;
    // or, when those are gone, what attention takes.
    let sizes = AttentionSizes { tokens, longest: load.longest, heads: config.heads as u64, query, key };
    let attention = if cpu { footprint::cpu_attention(sizes) } else { footprint::gpu_attention(sizes, place.compute) };
    let last_layer =
        (layer + per_token(3 * inner + 2 * hidden)).max(per_token(attention_part + ranks) + numbers + attention);
    let others = if load.checkpointing { layers * per_token(hidden) } else { (layers - 1) * layer };
    // Or, before the way back: the last layer's and the last norm's output, logits, and each trained row's gradient.
    let vocabulary = config.vocabulary as u64;
    let piece = if cpu {
        footprint::cpu_logits(vocabulary, load.trained_tokens)
    } else {
        footprint::gpu_logits(vocabulary, load.trained_tokens, place.compute)
    };
    let top = if load.checkpointing { 0 } else { layer };
    let rows = FLOAT * load.trained_tokens * hidden;
    let loss = top + per_token(2 * hidden) + rows;
    let (peak, unused_piece) =
        if loss + piece > last_layer { (others + loss + piece, 0) } else { (others + last_layer, piece) };
    // Logits are reported apart; where the way back takes more than they do, they are in its place before it.
    let logits = piece.min(peak);
    let activations = peak - logits;

    let held = if load.full { FloatType::F32 } else { place.held };
    let weights = parameters * held.bytes() as u64;
    // Values, gradients and two moments on the host; values, old and new, and gradients as tensors. Many small pieces: measured,
    // ten times the values come about.
    let copies = match (cpu, load.full) {
        (true, true) => 6,
        (true, false) => 10,
        // The host has the moments. On the card: values, old and new, gradients one by one and together.
        (false, _) => 4,
    };
    let trained_bytes = trained * FLOAT * copies;
    let weights = if load.full { 0 } else { weights };
    let widened = if cpu && held != FloatType::F32 { footprint::cpu_widened(vocabulary, hidden) } else { 0 };
    let answering = if load.answers { ANSWERING_BYTES } else { 0 };
    let program = if cpu { PROGRAM_BYTES + load.rows + widened + answering } else { 0 };
    // What pools and heaps hold that the largest moment has no use for: such as, on the CPU, the logits' block; there it is
    // an eighth at most.
    let slack = if cpu { (peak / 16 + unused_piece).min((weights + trained_bytes + peak) / 8) } else { peak / 10 };
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

/// Refuses a run whose estimate is beyond what there is.
pub(crate) fn check(
    estimate: &Estimate,
    available: Option<u64>,
    knobs: impl FnOnce() -> Vec<String>,
) -> Result<(), TrainError> {
    match available {
        Some(available) if estimate.total > available => {
            Err(TrainError::Memory { needed: estimate.total, available, weights: estimate.weights, knobs: knobs() })
        }
        _ => Ok(()),
    }
}

/// What an estimate is of: a recipe with its model and rows, at its place.
pub(crate) struct Subject<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) config: &'a ModelConfig,
    /// `None` where all weights are trained.
    pub(crate) targets: Option<&'a LoraTargets>,
    pub(crate) train: &'a Dataset,
    pub(crate) eval: Option<&'a Dataset>,
    /// Bytes of the tokenizer's files that go into every checkpoint.
    pub(crate) text: u64,
    pub(crate) placement: &'a Placement,
    /// The number type of the base model's file.
    pub(crate) stored: FloatType,
    /// Whether the device computes in bf16.
    pub(crate) has_bf16: bool,
}

impl Subject<'_> {
    /// Seconds are left out: to know them costs a measurement.
    pub(crate) fn estimate(&self) -> Estimate {
        let train = &self.recipe.train;
        let load = Load::of(self, train.micro_batch_size, train.gradient_checkpointing, usize::MAX);
        estimate(self.config, self.targets, &load, Where::of(self.placement, self.stored))
    }

    /// What a smaller setting of each kind would take, in words; those that help most first.
    pub(crate) fn knobs(&self) -> Vec<String> {
        let Subject { recipe, config, targets, train: data, .. } = *self;
        let place = Where::of(self.placement, self.stored);
        let (micro, checkpointing) = (recipe.train.micro_batch_size, recipe.train.gradient_checkpointing);
        let total = |micro: usize, checkpointing: bool, limit: usize, place: Where| {
            estimate(config, targets, &Load::of(self, micro, checkpointing, limit), place).total
        };
        let now = total(micro, checkpointing, usize::MAX, place);
        let mut options: Vec<(u64, String)> = Vec::new();
        if !checkpointing {
            options.push((total(micro, true, usize::MAX, place), "train.gradient_checkpointing = true".to_owned()));
        }
        if micro > 1 {
            let fewer = (micro.min(data.rows.len()) / 2).max(1);
            options.push((total(fewer, checkpointing, usize::MAX, place), format!("train.micro_batch_size = {fewer}")));
        }
        if micro > 2 && !checkpointing {
            options.push((
                total(1, true, usize::MAX, place),
                "train.gradient_checkpointing = true and train.micro_batch_size = 1".to_owned(),
            ));
        }
        let half = data.counts.longest / 2;
        if half > 64 {
            let text = format!("data.max_seq_len = {half} with overlong = \"truncate\"");
            options.push((total(micro, checkpointing, half, place), text));
        }
        if let Some((rank, fewer)) = targets.and_then(lower_rank) {
            let load = Load::of(self, micro, checkpointing, usize::MAX);
            options.push((estimate(config, Some(&fewer), &load, place).total, format!("lora.rank = {rank}")));
        }
        if self.has_bf16 && !place.cpu && place.compute == FloatType::F32 {
            let narrow = Where { compute: FloatType::BF16, held: FloatType::BF16, ..place };
            options.push((total(micro, checkpointing, usize::MAX, narrow), "model.dtype = \"bf16\"".to_owned()));
        }
        options.retain(|(bytes, _)| *bytes < now - now / 50);
        options.sort_by_key(|(bytes, _)| *bytes);
        options
            .into_iter()
            .map(|(bytes, setting)| format!("{setting}: about {} instead of {}", human_bytes(bytes), human_bytes(now)))
            .collect()
    }
}

/// A usual rank, and the branches with it, where they have larger ones.
fn lower_rank(targets: &LoraTargets) -> Option<(usize, LoraTargets)> {
    let highest = targets.iter().map(|target| target.rank).max().unwrap_or(0);
    let rank = if highest > 64 { 64 } else { highest / 2 };
    let fewer = |target: &LoraTarget| LoraTarget { rank: target.rank.min(rank), ..target.clone() };
    (rank >= 4).then(|| (rank, targets.iter().map(fewer).collect()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// (hidden, inner, layers, heads, key heads, tied) of Llama 3's sizes.
    const SHAPES: [(&str, usize, usize, usize, usize, usize, bool); 3] = [
        ("1B", 2048, 8192, 16, 32, 8, true),
        ("8B", 4096, 14336, 32, 32, 8, false),
        ("70B", 8192, 28672, 80, 64, 8, false),
    ];

    fn config(shape: (&str, usize, usize, usize, usize, usize, bool)) -> ModelConfig {
        let (_, hidden, inner, layers, heads, key_heads, tied) = shape;
        let text = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": key_heads, "vocab_size": 128256, "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": tied,
        });
        ModelConfig::parse(&text.to_string(), std::path::Path::new("config.json")).expect("a config")
    }

    fn all_linear(config: &ModelConfig, rank: usize) -> LoraTargets {
        let target = |module| LoraTarget { module, rank, alpha: 32.0, use_rslora: false };
        finetune_model::adapter::linear_modules(config).into_iter().map(target).collect()
    }

    fn gigabytes(shape: (&str, usize, usize, usize, usize, usize, bool), tokens: u64, checkpointing: bool) -> f64 {
        let config = config(shape);
        let load = Load {
            tokens,
            longest: tokens,
            trained_tokens: tokens,
            checkpointing,
            full: false,
            rows: 0,
            answers: false,
        };
        let place = Where { cpu: false, compute: FloatType::BF16, held: FloatType::BF16 };
        estimate(&config, Some(&all_linear(&config, 16)), &load, place).total as f64 / f64::from(1 << 30)
    }

    /// The table of docs/memory.md: one row of this many tokens, bf16 on a GPU, rank 16 on all linear layers.
    #[test]
    fn estimates_of_llama_shapes() {
        let table: String = SHAPES
            .iter()
            .flat_map(|&shape| [false, true].map(|checkpointing| (shape, checkpointing)))
            .map(|(shape, checkpointing)| {
                let cells = [1024, 2048, 4096, 8192, 32768].map(|tokens| gigabytes(shape, tokens, checkpointing));
                let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:.1}")).collect();
                format!("| {} | {} | {} |\n", shape.0, if checkpointing { "on" } else { "off" }, cells.join(" | "))
            })
            .collect();
        println!("{table}");
        let written = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/memory.md"));
        assert!(
            written.expect("docs/memory.md").contains(table.trim_end()),
            "docs/memory.md has another table than\n{table}"
        );
    }

    /// A usual rank instead of a high one, half of a usual one.
    #[test]
    fn ranks_that_take_less() {
        let config = config(SHAPES[0]);
        for (rank, lower) in [(4096, Some(64)), (64, Some(32)), (16, Some(8)), (4, None)] {
            assert_eq!(lower_rank(&all_linear(&config, rank)).map(|(rank, _)| rank), lower, "{rank}");
        }
    }

    /// Less is never estimated for more, and each knob helps.
    #[test]
    fn estimates_grow_with_what_they_count() {
        for shape in SHAPES {
            let grow = [512, 1024, 4096, 16384].map(|tokens| gigabytes(shape, tokens, false));
            assert!(grow.is_sorted(), "{}: {grow:?}", shape.0);
            for tokens in [1024, 8192] {
                assert!(gigabytes(shape, tokens, true) < gigabytes(shape, tokens, false), "{} {tokens}", shape.0);
            }
        }
    }
}
