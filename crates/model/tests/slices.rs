//! Slices of every layer on several threads, which add up what they make: the answers of the whole model. Bounds are
//! those of `goldens.rs`; the sums are taken in another order than in one process.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier, Mutex};

use finetune_advice::Advice as _;
use finetune_model::adapter::Adapter;
use finetune_model::{
    ChosenToken, Engine, Model, ModelConfig, ModelError, Placement, RowRequest, Sampling, Slice, Sums, TokenRules,
    not_in_slices,
};

mod golden;
mod heard;
mod made;

use golden::{LOGITS, goldens, largest_difference};

/// Tokens of an answer.
const ANSWER: usize = 12;

/// Threads of this process that add up numbers.
struct Threads {
    barrier: Barrier,
    given: Mutex<Vec<Vec<f32>>>,
}

/// One of them.
struct OfThread {
    all: Arc<Threads>,
    mine: usize,
}

impl OfThread {
    /// Combines the numbers of all, in the order of the threads.
    fn combine(&self, values: &mut [f32], with: fn(f32, f32) -> f32) {
        self.all.given.lock().expect("no panic")[self.mine] = values.to_vec();
        self.all.barrier.wait();
        let given = self.all.given.lock().expect("no panic").clone();
        let (first, rest) = given.split_first().expect("a thread");
        values.copy_from_slice(first);
        for other in rest {
            assert_eq!(other.len(), values.len(), "all are at the same place");
            values.iter_mut().zip(other).for_each(|(value, other)| *value = with(*value, *other));
        }
        // Nobody gives the next numbers before all have read these.
        self.all.barrier.wait();
    }
}

impl Sums for OfThread {
    fn sum(&self, values: &mut [f32]) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.combine(values, |a, b| a + b);
        Ok(())
    }

    fn largest(&self, values: &mut [f32]) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.combine(values, f32::max);
        Ok(())
    }
}

/// Logits of a text, and the answer to it.
type Said = (Vec<f32>, Vec<u32>);

/// Tokens that say nothing: 3, 10, 17, ...
fn text(vocabulary: usize) -> Vec<u32> {
    (0..40).map(|n| ((3 + 7 * n) % vocabulary) as u32).collect()
}

fn said(model: &Model) -> Said {
    let text = text(model.config.vocabulary);
    let logits = model.logits(&text).expect("logits");
    let answer = model.generate(&text, ANSWER, Sampling::GREEDY, &[], &mut |_| {}).expect("an answer");
    // Several tokens of a row in a pass are the same ones.
    let request = RowRequest { prompt: &text, max_new_tokens: ANSWER, sampling: Sampling::GREEDY, end_ids: &[] };
    let ahead = model.generate_ahead(&request, 4, &mut |_| true).expect("an answer");
    assert_eq!(ahead.tokens, answer.tokens);
    (logits, answer.tokens)
}

/// A model, perhaps with an adapter.
fn load(base: &Path, adapter: Option<&Path>, placement: &Placement) -> Result<Model, ModelError> {
    let mut model = Model::load(base, placement)?;
    if let Some(adapter) = adapter {
        let adapter = Adapter::read(adapter, &model.config).expect("the adapter loads");
        model.attach(&adapter)?;
    }
    Ok(model)
}

/// What each of the slices says.
fn of_slices(
    base: &Path,
    adapter: Option<&Path>,
    count: usize,
    placement: &Placement,
) -> Vec<Result<Said, ModelError>> {
    let all = Arc::new(Threads { barrier: Barrier::new(count), given: Mutex::new(vec![Vec::new(); count]) });
    std::thread::scope(|scope| {
        let one = |mine: usize| {
            let all = Arc::clone(&all);
            move || {
                // A slice that waits for the others holds a thread of its pool.
                let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
                pool.install(|| {
                    let placement = placement.clone().with_slice(Some(Slice { mine, count }));
                    let mut model = load(base, adapter, &placement)?;
                    model.connect_slices(Arc::new(OfThread { all, mine }));
                    Ok(said(&model))
                })
            }
        };
        let threads: Vec<_> = (0..count).map(|mine| scope.spawn(one(mine))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// So many slices say what the whole model says, all with the same bits.
#[track_caller]
fn expect_same(what: &str, base: &Path, adapter: Option<&Path>, count: usize, placement: &Placement) {
    let (logits, answer) = said(&load(base, adapter, placement).expect("the model loads"));
    let slices: Result<Vec<Said>, ModelError> = of_slices(base, adapter, count, placement).into_iter().collect();
    let slices = slices.unwrap_or_else(|error| panic!("{what}, {count} slices: {error}"));
    // The bound of the goldens is for logits of up to 1.
    let bound = LOGITS * logits.iter().fold(1.0, |most: f32, logit| most.max(logit.abs()));
    for (own, tokens) in &slices {
        assert_eq!(tokens, &answer, "{what}, {count} slices");
        let difference = largest_difference(own, &logits);
        assert!(difference <= bound, "{what}, {count} slices: {difference:e} of {bound:e}");
        assert!(own.iter().zip(&slices[0].0).all(|(a, b)| a.to_bits() == b.to_bits()), "{what}, {count} slices");
    }
}

fn cpu() -> Placement {
    Placement::cpu(None)
}

fn expect_family(family: &str, count: usize) {
    let base = made::golden(family);
    expect_same(family, &base, None, count, &cpu());
    let adapter = base.join("adapter");
    expect_same(&format!("{family} with its adapter"), &base, Some(&adapter), count, &cpu());
}

/// Rotary embeddings of all kinds, biases, norms of heads, gates of attention, windows, soft caps, sinks, experts with and without a
/// shared one, experts with biases and branches of gate and up together, latent attention, one projection for several.
const FAMILIES: [&str; 21] = [
    "llama",
    "llama3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_moe_experts",
    "gemma2",
    "gemma3",
    "deepseek_v3",
    "deepseek_v3_plain",
    "gpt_oss",
    "gpt_oss_experts",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "granite",
    "granitemoehybrid",
    "ministral3",
    "mistral",
    "muse_glimmer",
    "smollm3",
];

#[test]
fn two_slices_say_what_the_whole_model_says() {
    FAMILIES.iter().for_each(|family| expect_family(family, 2));
    // One key/value head for two slices.
    expect_family("phi3", 2);
    expect_family("gpt_oss_mxfp4", 2);
}

/// Several of them have two key/value heads, of which each is on two slices.
#[test]
fn four_slices_say_what_the_whole_model_says() {
    FAMILIES.iter().for_each(|family| expect_family(family, 4));
}

/// Modules that are trained in full, branches on embedding and output layer: (case, its base)
#[test]
fn adapters_of_other_kinds_are_cut_too() {
    for (case, family) in [
        ("saved_both", "llama"),
        ("saved_untied", "qwen3"),
        ("embedding_tied", "qwen2"),
        ("head_tied", "llama"),
        ("vocabulary_untied", "llama3"),
    ] {
        let adapter = goldens().join("adapters").join(case).join("adapter");
        expect_same(case, &made::golden(family), Some(&adapter), 2, &cpu());
    }
}

/// An adapter with DoRA, without its branches on these modules.
fn dora_without(left_out: &[&str]) -> tempfile::TempDir {
    let is_left_out = |name: &str| left_out.iter().any(|module| name.contains(module));
    made::changed(&goldens().join("adapters/dora/adapter"), made::ADAPTER, |config, tensors| {
        tensors.retain(|tensor| !is_left_out(&tensor.0));
        let targets = config["target_modules"].as_array_mut().expect("a list");
        targets.retain(|target| !is_left_out(target.as_str().expect("a name")));
    })
}

#[test]
fn magnitudes_are_cut_where_outputs_are() {
    let base = made::golden("llama3");
    let adapter = dora_without(&["o_proj", "down_proj"]);
    for count in [2, 4] {
        expect_same("DoRA", &base, Some(adapter.path()), count, &cpu());
    }
    let adapter = dora_without(&["q_proj", "o_proj"]);
    for slice in of_slices(&base, Some(adapter.path()), 2, &cpu()) {
        let error = slice.expect_err("norms over all inputs").to_string();
        assert!(error.contains("DoRA on `model.layers.0.mlp.down_proj`"), "{error}");
    }
}

/// (packed base, slices, part of the refusal)
#[test]
fn packed_matrices_are_cut_between_their_groups() {
    for (case, count, refusal) in [
        ("mlx4", 2, None),
        ("mlx4", 4, None),
        ("mlx8", 2, None),
        ("mlx3", 2, None),
        ("mlx_experts", 2, None),
        ("mxfp4", 2, None),
        ("int8", 4, None),
        ("fp8_channels", 2, None),
        ("compressed_int4", 2, None),
        ("gptq_act_order", 2, None),
        ("gguf_q4_1", 2, None),
        ("gguf_k", 2, None),
        ("mxfp4", 4, Some("model.layers.0.self_attn.o_proj.weight cannot be split over ranks: columns 0 to 15")),
        ("nf4", 2, Some("model.layers.0.mlp.down_proj.weight cannot be split over ranks")),
        ("awq", 2, Some("model.layers.0.mlp.down_proj.weight cannot be split over ranks: columns 0 to 95")),
        ("fp8_blocks", 2, Some("model.layers.0.mlp.gate_proj.weight cannot be split over ranks: rows 0 to 95")),
    ] {
        let directory = goldens().join("packed").join(case);
        let base = if case.starts_with("gguf") { directory.join("model.gguf") } else { directory };
        match refusal {
            None => expect_same(case, &base, None, count, &cpu()),
            Some(words) => {
                let first = of_slices_refused(&base, count);
                assert!(first.to_string().contains(words), "{case}: {first}");
                assert!(first.hints().iter().any(|hint| hint.contains("--parallel stages")), "{case}");
            }
        }
    }
}

/// Why the first slice does not load.
fn of_slices_refused(base: &Path, count: usize) -> ModelError {
    let placement = cpu().with_slice(Some(Slice { mine: 0, count }));
    Model::load(base, &placement).expect_err("it cannot be split")
}

/// What is packed while it is loaded is packed as a whole, and then cut.
#[test]
fn a_base_that_is_packed_while_it_is_loaded() {
    let base: PathBuf = goldens().join("../../datasets/quickstart/base");
    for scheme in ["mlx4", "mxfp4", "int8"] {
        let placement = cpu().quantized(finetune_model::scheme_named(scheme));
        expect_same(scheme, &base, None, 2, &placement);
    }
}

/// Matrices in bf16 and products in bf16 are those of one process; layers may be read from the disk.
#[test]
fn other_placements() {
    let base = made::golden("qwen3");
    for placement in [Placement::cpu(Some(finetune_model::FloatType::BF16)), cpu().with_layers_from_disk(true)] {
        expect_same("qwen3", &base, None, 2, &placement);
    }
}

/// (family, slices, the refusal)
#[test]
fn what_cannot_be_cut_is_refused_by_name() {
    for (family, count, words) in [
        ("llama", 3, "4 query heads with 4 key/value heads do not split over 3 ranks; 2 or 4 do"),
        ("qwen3", 8, "4 query heads with 2 key/value heads do not split over 8 ranks; 2 or 4 do"),
        ("phi3", 4, "2 query heads with 1 key/value heads do not split over 4 ranks; 2 do"),
        ("deepseek_v3", 3, "4 query heads with 4 key/value heads do not split over 3 ranks; 2 or 4 do"),
        ("lfm2", 2, "short convolutions"),
        ("qwen3_5", 2, "gated delta nets"),
        ("qwen3_next", 2, "gated delta nets"),
        ("gemma4", 2, "keys and values of earlier layers"),
        ("gemma4_k_eq_v", 2, "values that are the keys"),
        ("olmo3", 2, "norms queries and keys of all heads together"),
    ] {
        let config = ModelConfig::load(&made::golden(family)).expect("a golden config");
        let said = not_in_slices(&config, count).unwrap_or_else(|| panic!("{family} is cut"));
        assert!(said.contains(words), "{family}: {said}");
        assert_eq!(of_slices_refused(&made::golden(family), count).to_string(), said);
    }
}

/// A row takes the memory of the heads that are here; the short vectors of latent attention are those of all heads.
#[test]
fn keys_and_values_of_own_heads_are_counted() {
    for (family, is_cut) in [("llama", true), ("deepseek_v3", false)] {
        let base = made::golden(family);
        let whole = load(&base, None, &cpu()).expect("the model loads").row_bytes(1000);
        for count in [2, 4] {
            let placement = cpu().with_slice(Some(Slice { mine: count - 1, count }));
            let own = load(&base, None, &placement).expect("the slice loads").row_bytes(1000);
            assert_eq!(own * if is_cut { count } else { 1 }, whole, "{family}");
        }
    }
}

/// A slice that says something else is found, before it would choose another token.
#[test]
fn slices_that_differ_are_found() {
    struct Differs;
    impl Sums for Differs {
        fn sum(&self, _: &mut [f32]) -> Result<(), Box<dyn Error + Send + Sync>> {
            Ok(())
        }

        fn largest(&self, values: &mut [f32]) -> Result<(), Box<dyn Error + Send + Sync>> {
            values[0] += 1.0;
            Ok(())
        }
    }
    let placement = cpu().with_slice(Some(Slice { mine: 0, count: 2 }));
    let mut model = load(&made::golden("llama"), None, &placement).expect("the slice loads");
    let answer = |model: &Model| model.generate(&[3, 10], 2, Sampling::GREEDY, &[], &mut |_| {});
    let error = answer(&model).expect_err("nobody is there").to_string();
    assert!(error.contains("not connected"), "{error}");
    model.connect_slices(Arc::new(Differs));
    assert!(matches!(answer(&model), Err(ModelError::Unlike)));
}

/// (which of two models, tokens of the prompt)
const ASKED: [(usize, usize); 5] = [(0, 80), (1, 90), (0, 20), (1, 3), (1, 70)];

/// What an engine says to these requests, and how many passes different models shared.
fn answered(models: &[Arc<Model>; 2], asked: &[(usize, usize)]) -> (Vec<Vec<ChosenToken>>, u64) {
    let mut engine = Engine::new(heard::SETTINGS);
    let rules = TokenRules { logprobs: Some(5), ..TokenRules::from(heard::DRAWN) };
    let submit = |&(model, length): &(usize, usize)| {
        let request = heard::request(&models[model], &heard::text(length, 3), ANSWER, rules.clone());
        heard::submit(&mut engine, request)
    };
    let heard: Vec<heard::Heard> = asked.iter().map(submit).collect();
    heard::finish(&mut engine);
    (heard.iter().map(heard::Heard::chosen).collect(), engine.counts().passes.mixed_passes)
}

/// Requests with and without an adapter share passes over slices, with the bits that each has alone there.
#[test]
fn adapters_share_passes_over_slices() {
    for family in ["llama", "qwen3_moe", "deepseek_v3"] {
        let all = Arc::new(Threads { barrier: Barrier::new(2), given: Mutex::new(vec![Vec::new(); 2]) });
        let slice = |mine: usize| {
            let placement = cpu().with_slice(Some(Slice { mine, count: 2 }));
            let mut base = load(&made::golden(family), None, &placement).expect("the slice loads");
            base.connect_slices(Arc::new(OfThread { all: Arc::clone(&all), mine }));
            let adapter = Adapter::read(&made::golden(family).join("adapter"), &base.config).expect("an adapter");
            let mut adapted = base.clone();
            adapted.attach(&adapter).expect("attached");
            let models = [base, adapted].map(|mut model| {
                model.config.max_position_embeddings = 8192;
                Arc::new(model)
            });
            let (together, mixed) = answered(&models, &ASKED);
            let alone: Vec<_> = ASKED.iter().flat_map(|asked| answered(&models, &[*asked]).0).collect();
            (together, alone, mixed)
        };
        let (slice, pool) = (&slice, || rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool"));
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2).map(|mine| scope.spawn(move || pool().install(|| slice(mine)))).collect();
            for thread in threads {
                let (together, alone, mixed) = thread.join().expect("no panic");
                assert!(together == alone && mixed > 0, "{family}: {mixed} shared passes");
            }
        });
    }
}
