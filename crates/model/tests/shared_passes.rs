//! Requests with different adapters of one base, which share passes: each gets the bits that it gets alone.

mod heard;
mod made;

use std::sync::Arc;

use finetune_model::{
    Adaptation, ChosenToken, Engine, EngineEnd, EngineSettings, LoraTarget, MOST_AHEAD, Model, PassCounts, Placement,
    TokenRules, target_layers,
};
use finetune_random::Stream;

use heard::{DRAWN, Heard, SETTINGS, base, finish, request, submit, text, with_adapter};

/// Dense models, of which the second half of the prompts is read together too; and models with experts, latent
/// attention, states, convolutions, and layers that share keys and values.
const FAMILIES: [&str; 10] =
    ["llama", "qwen3", "gemma3", "gemma4", "qwen3_moe", "gpt_oss", "deepseek_v3", "glm4_moe_lite", "qwen3_5", "lfm2"];

/// Ends of the names of layers in one family or another.
const INTO: [&str; 4] = ["q_proj", "q_b_proj", "in_proj_qkv", "in_proj"];
const OUT_OF: [&str; 6] = ["o_proj", "kv_b_proj", "out_proj", "down_proj", "w2", "lm_head"];

/// What an adapter has on the layers whose names end so.
fn on(model: &Model, ends: &[&str], rank: usize, alpha: f64) -> Adaptation {
    let layers = target_layers(&model.config).into_iter().map(|layer| layer.module);
    let is_meant = |module: &String| ends.iter().any(|end| module.ends_with(end)) && !module.contains(".experts.");
    let target = |module| LoraTarget { module, rank, alpha, use_rslora: false, use_dora: false };
    Adaptation { targets: layers.filter(is_meant).map(target).collect(), saved: Vec::new(), dropout: 0.0 }
}

/// A clone of a base with an adapter that does something.
fn adapted(base: &Model, adaptation: Adaptation, seed: u64) -> Arc<Model> {
    let mut model = base.clone();
    assert!(!adaptation.targets.is_empty(), "the family has such layers");
    model.add_adapter(adaptation, seed).expect("an adapter");
    let values = Stream::new(seed, 9, 0, 0).normal(model.layout().len(), 0.2);
    model.set_parameters(&values);
    Arc::new(model)
}

/// A base without adapter, and with adapters of different ranks, scales and layers.
fn models(family: &str) -> [Arc<Model>; 4] {
    let base = base(family);
    let wide = adapted(&base, on(&base, &[INTO.as_slice(), &OUT_OF].concat(), 16, 8.0), 1);
    let narrow = adapted(&base, on(&base, &OUT_OF, 3, 5.0), 2);
    let golden = Arc::new(with_adapter(&base, family));
    [Arc::new(base), wide, golden, narrow]
}

fn rules() -> TokenRules {
    TokenRules { logprobs: Some(5), ..TokenRules::from(DRAWN) }
}

/// The answer of a model that nothing else is asked, with the logarithms of probabilities.
fn alone(model: &Arc<Model>, prompt: &[u32], most: usize) -> Vec<ChosenToken> {
    let mut engine = Engine::new(SETTINGS);
    let heard = submit(&mut engine, request(model, prompt, most, rules()));
    finish(&mut engine);
    assert_eq!(heard.end(), Some(EngineEnd::Length));
    heard.chosen()
}

/// (tokens of the prompt, most tokens of the answer, steps behind it). Prompts are read while answers are made, and
/// more than one at a time; answers begin and end at different times, and there are more than a pass takes.
const REQUESTS: [(usize, usize, usize); 16] = [
    (4, 30, 1),
    (20, 25, 0),
    (90, 25, 3),
    (70, 20, 0),
    (130, 9, 0),
    (100, 20, 0),
    (65, 12, 2),
    (600, 12, 0),
    (64, 12, 0),
    (66, 3, 0),
    (80, 20, 5),
    (1, 20, 0),
    (200, 8, 0),
    (250, 8, 0),
    (9, 8, 0),
    (77, 1, 0),
];

#[test]
fn requests_with_different_adapters_have_the_bits_that_they_have_alone() {
    for family in FAMILIES {
        let models = models(family);
        let asked = |n: usize| (&models[n % models.len()], text(REQUESTS[n].0, n as u32), REQUESTS[n].1);
        let want: Vec<Vec<ChosenToken>> = (0..REQUESTS.len())
            .map(|n| {
                let (model, prompt, most) = asked(n);
                alone(model, &prompt, most)
            })
            .collect();
        for speculate in [0, MOST_AHEAD] {
            let mut engine = Engine::new(EngineSettings { speculate, ..SETTINGS });
            let mut heard = Vec::new();
            for (n, (.., steps)) in REQUESTS.into_iter().enumerate() {
                let (model, prompt, most) = asked(n);
                heard.push(submit(&mut engine, request(model, &prompt, most, rules())));
                (0..steps).for_each(|_| engine.step());
            }
            finish(&mut engine);
            for (n, (heard, want)) in heard.iter().zip(&want).enumerate() {
                assert_eq!(heard.chosen(), *want, "{family}: request {n}, {speculate} ahead");
            }
            let passes = engine.counts().passes;
            assert!(passes.mixed_passes > 0 && passes.answer_rows > passes.answer_passes, "{family}: {passes:?}");
            let is_dense = ["llama", "qwen3", "gemma3", "gemma4"].contains(&family);
            assert_eq!(passes.prompt_parts > passes.prompt_passes, is_dense, "{family}: {passes:?}");
        }
        // Adapters do something, each another thing.
        let prompt = text(30, 3);
        let answers = models.each_ref().map(|model| alone(model, &prompt, 12));
        let are_different = (0..4).all(|n| (0..n).all(|m| answers[n] != answers[m]));
        assert!(are_different, "{family}");
    }
}

/// Three prompts are read in one pass, and each of the next three tokens takes one.
#[test]
fn a_pass_is_made_once_for_all() {
    let models = models("llama");
    let of_each = |prompt: usize| {
        let mut engine = Engine::new(SETTINGS);
        for (n, model) in models.iter().take(3).enumerate() {
            submit(&mut engine, request(model, &text(prompt, n as u32), 4, rules()));
        }
        finish(&mut engine);
        engine.counts().passes
    };
    let answers = PassCounts { answer_passes: 3, answer_rows: 9, mixed_passes: 3, ..PassCounts::default() };
    assert_eq!(of_each(80), PassCounts { prompt_passes: 1, prompt_parts: 3, mixed_passes: 4, ..answers });
    // Together they are more than the 512 tokens of a part: two and one. The answers to the first two are a token
    // ahead of the third, whose last token is made alone.
    let counts = PassCounts { prompt_passes: 2, prompt_parts: 3, answer_passes: 4, answer_rows: 9, mixed_passes: 4 };
    assert_eq!(of_each(200), counts);
}

/// Short prompts would be summed in another order together. They are read in the order in which they came, and their
/// answers share passes as soon as they have begun.
#[test]
fn short_prompts_are_read_alone() {
    let models = models("qwen3");
    let mut engine = Engine::new(SETTINGS);
    let ask = |engine: &mut Engine, (n, length): (usize, usize)| {
        submit(engine, request(&models[n % 4], &text(length, n as u32), 9, rules()))
    };
    let heard: Vec<Heard> = [90, 64, 90, 90].into_iter().enumerate().map(|asked| ask(&mut engine, asked)).collect();
    let begun: Vec<usize> = (0..3)
        .map(|_| {
            engine.step();
            heard.iter().filter(|heard| heard.cached().is_some()).count()
        })
        .collect();
    assert_eq!(begun, [1, 2, 4], "none overtakes the one before it");
    let PassCounts { prompt_passes, prompt_parts, .. } = engine.counts().passes;
    assert_eq!((prompt_passes, prompt_parts), (3, 4));
    finish(&mut engine);
}

/// Where every matrix has more than 64 outputs, prompts of more than sixteen tokens are read together, with products in
/// f32 and in bf16.
#[test]
fn short_prompts_are_read_together_where_matrices_are_wide() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut config = made::read_json(&made::golden("llama").join("config.json"));
    for (key, value) in [("hidden_size", 80), ("head_dim", 20), ("intermediate_size", 160)] {
        config[key] = value.into();
    }
    config["max_position_embeddings"] = 8192.into();
    made::write(&directory.path().join("config.json"), config.to_string());
    for placement in [Placement::cpu(None), Placement::cpu_with_bf16_products()] {
        let base = Model::initialize(directory.path(), 5, &placement).expect("a base of random weights");
        let models = [3, 16].map(|rank| adapted(&base, on(&base, &[INTO.as_slice(), &OUT_OF].concat(), rank, 8.0), 1));
        let lengths = [17, 40, 64, 90, 22, 16, 5, 33];
        let asked = |n: usize| (&models[n % 2], text(lengths[n], n as u32));
        let want: Vec<Vec<ChosenToken>> = (0..lengths.len()).map(|n| alone(asked(n).0, &asked(n).1, 9)).collect();
        let mut engine = Engine::new(SETTINGS);
        let ask = |n: usize| submit(&mut engine, request(asked(n).0, &asked(n).1, 9, rules()));
        let heard: Vec<Heard> = (0..lengths.len()).map(ask).collect();
        finish(&mut engine);
        for (n, (heard, want)) in heard.iter().zip(&want).enumerate() {
            assert_eq!(heard.chosen(), *want, "request {n}");
        }
        // The first five in one pass, those of 16 and 5 tokens alone, the last one.
        let PassCounts { prompt_passes, prompt_parts, .. } = engine.counts().passes;
        assert_eq!((prompt_passes, prompt_parts), (4, 8));
    }
}

/// Adapters that are more than branches beside the base's products, and other bases: passes of their own.
#[test]
fn what_cannot_share_has_passes_of_its_own() {
    let llama = base("llama");
    let dora = {
        let mut adaptation = on(&llama, &["q_proj", "down_proj"], 8, 8.0);
        adaptation.targets.iter_mut().for_each(|target| target.use_dora = true);
        adapted(&llama, adaptation, 1)
    };
    let in_full = {
        let adaptation = on(&llama, &["q_proj"], 8, 8.0);
        adapted(&llama, Adaptation { saved: vec!["model.norm".to_owned()], ..adaptation }, 1)
    };
    let embedding = adapted(&llama, on(&llama, &["v_proj", "embed_tokens"], 8, 8.0), 1);
    let mixture = base("qwen3_moe");
    let experts = {
        let layers = target_layers(&mixture.config).into_iter().map(|layer| layer.module);
        let target = |module| LoraTarget { module, rank: 4, alpha: 4.0, use_rslora: false, use_dora: false };
        let targets = layers.filter(|module| module.contains(".experts.")).map(target).collect();
        adapted(&mixture, Adaptation { targets, ..Adaptation::default() }, 1)
    };
    let (llama, mixture) = (Arc::new(llama), Arc::new(mixture));
    for (what, one, other) in [
        ("DoRA", &dora, &llama),
        ("a norm that is trained in full", &in_full, &llama),
        ("the embedding", &embedding, &llama),
        ("experts", &experts, &mixture),
        ("another base", &Arc::new(base("llama")), &llama),
        ("two that cannot", &dora, &in_full),
    ] {
        let mut engine = Engine::new(SETTINGS);
        let prompts = [text(80, 3), text(80, 4)];
        let heard = [(one, &prompts[0]), (other, &prompts[1])]
            .map(|(model, prompt)| submit(&mut engine, request(model, prompt, 8, rules())));
        finish(&mut engine);
        for ((model, prompt), heard) in [one, other].into_iter().zip(&prompts).zip(heard) {
            assert_eq!(heard.chosen(), alone(model, prompt, 8), "{what}");
        }
        let passes = engine.counts().passes;
        assert_eq!((passes.mixed_passes, passes.answer_rows), (0, passes.answer_passes), "{what}: {passes:?}");
    }
}

/// An adapter goes while its answer is made, and another one comes.
#[test]
fn adapters_come_and_go_while_others_answer() {
    for family in ["llama", "qwen3_moe"] {
        let base = base(family);
        let make = |rank: usize, seed: u64| adapted(&base, on(&base, &OUT_OF, rank, 8.0), seed);
        let (first, second) = (make(4, 1), make(9, 2));
        let mut engine = Engine::new(SETTINGS);
        let mut heard = Vec::new();
        for (model, length) in [(&first, 90), (&second, 20), (&first, 100)] {
            heard.push((submit(&mut engine, request(model, &text(length, 5), 20, rules())), length));
            engine.step();
        }
        drop(first);
        (0..3).for_each(|_| engine.step());
        let third = make(16, 3);
        heard.push((submit(&mut engine, request(&third, &text(80, 5), 20, rules())), 80));
        finish(&mut engine);
        assert!(engine.counts().passes.mixed_passes > 0);
        let first = make(4, 1);
        for ((heard, length), model) in heard.iter().zip([&first, &second, &first, &third]) {
            assert_eq!(heard.chosen(), alone(model, &text(*length, 5), 20), "{family}: {length} tokens");
        }
    }
}

/// What was read with one adapter is no beginning for another, also if both were read in one pass.
#[test]
fn beginnings_of_prompts_are_not_shared_between_adapters() {
    let base = base("qwen3");
    let wide = adapted(&base, on(&base, &OUT_OF, 8, 8.0), 1);
    let base = Arc::new(base);
    let (prompt, longer) = (text(200, 3), text(230, 3));
    let mut engine = Engine::new(SETTINGS);
    for model in [&base, &wide] {
        submit(&mut engine, request(model, &prompt, 2, rules()));
    }
    finish(&mut engine);
    assert_eq!(engine.counts().passes.prompt_passes, 1);
    let heard = [&base, &wide].map(|model| submit(&mut engine, request(model, &longer, 8, rules())));
    finish(&mut engine);
    for (heard, model) in heard.iter().zip([&base, &wide]) {
        assert_eq!(heard.cached(), Some(128));
        assert_eq!(heard.chosen(), alone(model, &longer, 8));
    }
    let mut engine = Engine::new(SETTINGS);
    submit(&mut engine, request(&base, &longer, 2, rules()));
    finish(&mut engine);
    let heard = submit(&mut engine, request(&wide, &longer, 2, rules()));
    finish(&mut engine);
    assert_eq!(heard.cached(), Some(0));
}

/// A prompt that begins as one that is read waits for it, if that saves work.
#[test]
fn a_prompt_waits_for_another_one_that_it_begins_as() {
    let model = Arc::new(base("llama"));
    let shared = text(150, 3);
    let prompts = [7, 8].map(|first| [shared.clone(), text(40, first)].concat());
    let mut engine = Engine::new(SETTINGS);
    let heard = prompts.each_ref().map(|prompt| submit(&mut engine, request(&model, prompt, 8, rules())));
    finish(&mut engine);
    // 150 tokens are common: two blocks of 64, but more than 64 tokens have to be left of 190.
    assert_eq!(heard.each_ref().map(Heard::cached), [Some(0), Some(64)]);
    for (prompt, heard) in prompts.iter().zip(heard) {
        assert_eq!(heard.chosen(), alone(&model, prompt, 8));
    }
}

/// All rows of a pass get the room of the longest. Where that does not fit, passes are apart, and none waits.
#[test]
fn a_long_answer_keeps_no_short_one_waiting() {
    let [base, other, ..] = models("llama");
    let bytes = base.row_bytes(2000) + base.row_bytes(60);
    let mut engine = Engine::new(EngineSettings { cache_bytes: bytes, ..SETTINGS });
    let long = submit(&mut engine, request(&base, &text(30, 3), 1970, rules()));
    let short = submit(&mut engine, request(&other, &text(40, 3), 20, rules()));
    (0..3).for_each(|_| engine.step());
    let counts = engine.counts();
    assert_eq!((counts.running, counts.waiting, counts.passes.mixed_passes), (2, 0, 0));
    (0..20).for_each(|_| engine.step());
    assert_eq!((short.end(), long.end()), (Some(EngineEnd::Length), None));
    assert_eq!(short.chosen(), alone(&other, &text(40, 3), 20));
    long.leave();
    finish(&mut engine);
}
