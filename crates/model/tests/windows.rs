//! Models with sliding windows, whose caches forget: answers past the window are those of whole passes, alone, together
//! and behind prompts that are known.

mod golden;
mod heard;
mod made;

use std::sync::Arc;

use finetune_model::{Engine, EngineSettings, Model, Refusal, TokenRules};

use golden::greedy_as_in_whole_passes;
use heard::{DRAWN, SETTINGS, STEPS, base, finish, request, submit, text};

/// Whether pieces of parts of prompts are known, which experts do not allow.
const FAMILIES: [(&str, bool); 9] = [
    ("gemma2", true),
    ("gemma3", true),
    ("gemma4", true),
    ("gemma4_k_eq_v", true),
    ("gemma4_moe", false),
    ("gpt_oss", false),
    ("mistral", true),
    ("muse_glimmer", true),
    ("olmo3", true),
];

/// The windows are of five tokens, and what is not needed is forgotten from 89 tokens on. On the CPU, or with
/// `FINETUNE_TEST_DEVICE=gpu` on the first GPU.
#[test]
fn with_a_cache_that_forgets_each_token_is_that_of_a_whole_pass() {
    for (family, _) in FAMILIES {
        let model = Model::load(&made::golden(family), &golden::placement()).expect("the model loads");
        assert!(model.config.layers.iter().any(|layer| layer.window == Some(5)), "{family}");
        let tokens = greedy_as_in_whole_passes(family, &model, 120);
        assert_eq!(tokens.len(), 120, "{family}");
    }
}

/// (tokens that the prompt has in common with the first one of 2,600, more tokens, tokens that are
/// known in whole parts, and with pieces of parts). The first one has forgotten what lies more than 1,024 tokens in front
/// of its end.
const PROMPTS: [(usize, usize, usize, usize); 5] =
    [(2600, 100, 2560, 2560), (2100, 100, 2048, 2048), (1700, 100, 0, 1664), (1500, 100, 0, 0), (600, 40, 0, 0)];

/// Where a prompt would go on from keys that are gone, it is read again.
#[test]
fn a_known_beginning_of_a_text_that_has_forgotten_changes_no_bit() {
    let rules = TokenRules { logprobs: Some(5), ..TokenRules::from(DRAWN) };
    let first = text(2600, 3);
    for (family, has_pieces) in FAMILIES {
        let model = Arc::new(base(family));
        for (common, more, whole, pieces) in PROMPTS {
            let prompt = [&first[..common], &text(more, 50)].concat();
            let answer = |engine: &mut Engine, prompt: &[u32]| {
                let heard = submit(engine, request(&model, prompt, 8, rules.clone()));
                finish(engine);
                heard
            };
            let fresh = answer(&mut Engine::new(SETTINGS), &prompt);
            let mut engine = Engine::new(SETTINGS);
            answer(&mut engine, &first);
            let heard = answer(&mut engine, &prompt);
            let words = format!("{family}: {common} common tokens, {more} more");
            assert_eq!(heard.cached(), Some(if has_pieces { pieces } else { whole }), "{words}");
            assert_eq!(heard.chosen(), fresh.chosen(), "{words}");
        }
    }
}

/// A short prompt that is kept serves those that begin as it does, also behind a long one that has forgotten it.
#[test]
fn a_system_prompt_stays_known_behind_a_long_question() {
    let model = Arc::new(base("gemma3"));
    let system = text(640, 3);
    let mut engine = Engine::new(SETTINGS);
    let known = [(0, 80), (3000, 40), (70, 50)].map(|(more, first)| {
        let prompt = [system.clone(), text(more, first)].concat();
        let heard = submit(&mut engine, request(&model, &prompt, 4, DRAWN.into()));
        finish(&mut engine);
        let fresh = model.generate(&prompt, 4, DRAWN, &[], &mut |_| {}).expect("an answer");
        assert_eq!(heard.tokens(), fresh.tokens);
        heard.cached()
    });
    assert_eq!(known, [Some(0), Some(640), Some(640)]);
}

/// Three answers of 300 tokens fit where not one would, if layers kept all keys.
#[test]
fn answers_in_a_window_take_the_bytes_of_the_window() {
    let model = Arc::new(base("mistral"));
    let one = model.row_bytes(320);
    assert_eq!((one, one), (model.row_bytes(96), model.row_bytes(4000)), "all layers have a window");
    let settings = EngineSettings { cache_bytes: 3 * one, ..SETTINGS };
    let mut engine = Engine::new(settings);
    let heard: Vec<_> =
        (0..4).map(|first| submit(&mut engine, request(&model, &text(20, first), 300, DRAWN.into()))).collect();
    let mut most = 0;
    for _ in 0..STEPS {
        engine.step();
        let counts = engine.counts();
        assert!(counts.cache_bytes <= settings.cache_bytes, "{counts:?}");
        most = most.max(counts.running);
        if engine.is_idle() {
            break;
        }
    }
    assert_eq!(most, 3);
    for (first, heard) in (0..).zip(heard) {
        let alone = model.generate(&text(20, first), 300, DRAWN, &[], &mut |_| {}).expect("an answer");
        assert_eq!(heard.tokens(), alone.tokens, "row {first}");
    }
}

/// A prompt needs more than an answer: it is kept for later ones.
#[test]
fn a_prompt_that_does_not_fit_is_refused_with_the_bytes_of_its_reading() {
    let model: Model = base("mistral");
    let settings = EngineSettings { cache_bytes: model.prompt_bytes(1000) - 1, ..SETTINGS };
    let prompt = text(1000, 3);
    let bytes = model.prompt_bytes(1000);
    assert_eq!(
        settings.check(&model, &prompt, 8),
        Err(Refusal::TooLarge { prompt: 1000, answer: 8, bytes, most: bytes - 1 })
    );
    assert_eq!(settings.check(&model, &prompt[..500], 7000), Ok(()));
    assert_eq!((settings.longest_answer(&model, 1000), settings.longest_answer(&model, 500)), (0, 8192 - 500));
}
