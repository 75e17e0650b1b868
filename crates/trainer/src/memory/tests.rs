//! The table of docs/memory.md is that of the estimate.

use finetune_model::LoraTarget;
use serde_json::json;

use super::*;

/// (name, hidden, inner, layers, heads, key heads, tied) of Llama 3's sizes.
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

fn all_linear(config: &ModelConfig, rank: usize) -> Adaptation {
    let target = |module| LoraTarget { module, rank, alpha: 32.0, use_rslora: false, use_dora: false };
    let targets = finetune_model::linear_modules(config).into_iter().map(target).collect();
    Adaptation { targets, ..Adaptation::default() }
}

fn gigabytes(shape: (&str, usize, usize, usize, usize, usize, bool), tokens: u64, checkpointing: bool) -> f64 {
    let config = config(shape);
    let step = StepShape {
        tokens,
        longest: tokens,
        trained_tokens: tokens,
        at_once: 1,
        held_layers: None,
        checkpointing,
        full: false,
        shares: 1,
        alone: false,
        rows: 0,
        answers: false,
    };
    let packed = PackedSizes::default();
    let precision = Precision {
        cpu: false,
        compute: FloatType::BF16,
        held: FloatType::BF16,
        packed,
        loading: 0,
        by_row: 0,
        on_disk: 0,
        threads: 2,
    };
    estimate(&config, Some(&all_linear(&config, 16)), &step, precision).total as f64 / f64::from(1 << 30)
}

/// The table of docs/memory.md: one row of this many tokens, bf16 on a GPU, rank 16 on all
/// linear layers.
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

/// Less is never estimated for more, and checkpointing helps.
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

/// A LoRA step of one row of `tokens` on the CPU.
fn on_cpu(config: &ModelConfig, adaptation: &Adaptation, tokens: u64, step: StepShape) -> Estimate {
    let (compute, held, packed) = (FloatType::F32, FloatType::BF16, PackedSizes::default());
    let precision = Precision { cpu: true, compute, held, packed, loading: 0, by_row: 0, on_disk: 0, threads: 2 };
    estimate(config, Some(adaptation), &StepShape { tokens, longest: tokens, ..step }, precision)
}

/// One token as one share of a step, whose layers are computed again.
pub(super) const ONE_SHARE: StepShape = StepShape {
    tokens: 1,
    longest: 1,
    trained_tokens: 1,
    at_once: 1,
    held_layers: None,
    checkpointing: true,
    full: false,
    shares: 1,
    alone: false,
    rows: 0,
    answers: false,
};

/// What is trained counts the same whatever a step takes. Each share of a step has gradients of its own.
#[test]
fn what_is_trained_counts_with_each_share() {
    let config = config(SHAPES[0]);
    let adaptation = all_linear(&config, 16);
    let trained = sizes(&config, Some(&adaptation)).trained * FLOAT;
    for tokens in [1, 4096] {
        let total = |step: StepShape| on_cpu(&config, &adaptation, tokens, step).trained;
        assert_eq!(total(ONE_SHARE), 6 * trained, "{tokens}");
        // Gradients of all layers are there together.
        assert_eq!(total(StepShape { checkpointing: false, ..ONE_SHARE }), 7 * trained, "{tokens}");
        let more = |shares, alone| total(StepShape { shares, alone, ..ONE_SHARE }) - total(ONE_SHARE);
        assert_eq!(more(3, false), 2 * trained, "{tokens}");
        // Parameters, two moments and a change of each share that makes steps alone.
        assert_eq!(more(1, true), 4 * trained, "{tokens}");
        assert_eq!(more(3, true), (2 + 12) * trained, "{tokens}");
    }
}

/// Beside LoRA they take ten times their values.
#[test]
fn modules_that_are_trained_in_full_count_more() {
    let config = config(SHAPES[1]);
    let lora = all_linear(&config, 16);
    let with_norm = Adaptation { saved: vec!["model.norm".to_owned()], ..lora.clone() };
    let [without, with] = [&lora, &with_norm].map(|adaptation| on_cpu(&config, adaptation, 64, ONE_SHARE).trained);
    assert_eq!(with - without, 10 * config.hidden_size as u64 * FLOAT);
}

/// A weight is multiplied in blocks of f32: of the widest matrix of a layer, and with more threads in wider ones. Where
/// no losses are computed, the output layer takes none.
#[test]
fn widened_weights_count_with_the_widest_matrix_and_the_threads() {
    const MIB: u64 = 1 << 20;
    let widened = |shape, trained_tokens, threads| {
        let config = config(shape);
        let step = StepShape { trained_tokens, ..ONE_SHARE };
        Counted::new(&config, None).widened(&config, &step, threads) / MIB
    };
    // down_proj: 28,672 products a column, 272 columns for each thread. The output layer's blocks are of 32 MiB.
    assert_eq!([2, 8, 16].map(|threads| widened(SHAPES[2], 1, threads)), [59, 298, 896]);
    assert_eq!([0, 1].map(|trained| widened(SHAPES[0], trained, 2)), [21, 32]);
}
