//! The engine: many requests at a time, each of which gets the answer that it gets alone.

#[macro_use]
#[path = "golden/each_family.rs"]
mod each_family;
mod heard;
mod made;

use std::sync::Arc;

use finetune_model::{Engine, EngineCounts, EngineEnd, EngineSettings, Model, Refusal, Sampling, TokenRules};

use heard::{DRAWN, Heard, SETTINGS, STEPS, base, finish, request, submit, text, with_adapter};

/// (the step at which it comes, tokens of the prompt, most tokens of the answer)
const ROWS: [(usize, usize, usize); 12] = [
    (0, 90, 5),
    (0, 1, 40),
    (1, 30, 60),
    (1, 64, 1),
    (3, 33, 100),
    (7, 200, 30),
    (8, 2, 20),
    (9, 5, 20),
    (9, 6, 20),
    (9, 7, 20),
    (30, 70, 10),
    (95, 12, 10),
];

/// Rows come and go: more than one group, rows longer than the group, groups that shrink.
fn an_answer_does_not_depend_on_what_else_is_answered(family: &'static str) {
    let model = Arc::new(with_adapter(&base(family), family));
    for sampling in [Sampling::GREEDY, DRAWN] {
        let mut engine = Engine::new(SETTINGS);
        let mut heard = Vec::new();
        for step in 0..100 {
            for (first, (_, length, most)) in (3..).zip(ROWS).filter(|(_, (at, ..))| *at == step) {
                let asked = request(&model, &text(length, first), most, sampling.into());
                heard.push((first, length, most, submit(&mut engine, asked)));
            }
            engine.step();
        }
        finish(&mut engine);
        assert_eq!(heard.len(), ROWS.len());
        for (first, length, most, heard) in heard {
            let alone = model.generate(&text(length, first), most, sampling, &[], &mut |_| {}).expect("an answer");
            assert_eq!(heard.tokens(), alone.tokens, "{family}: row {first}, {sampling:?}");
            assert_eq!(heard.end(), Some(EngineEnd::Length), "{family}: row {first}");
        }
    }
}

of_each_family!(an_answer_does_not_depend_on_what_else_is_answered);

/// Bits, not only tokens: with the logarithms of probabilities.
fn alone_or_among_others_an_answer_has_the_same_bits(family: &'static str) {
    let rules = TokenRules { logprobs: Some(5), ..TokenRules::from(DRAWN) };
    let model = Arc::new(base(family));
    let alone = |length: usize| {
        let mut engine = Engine::new(SETTINGS);
        let heard = submit(&mut engine, request(&model, &text(length, 5), 20, rules.clone()));
        finish(&mut engine);
        heard.chosen()
    };
    let mut engine = Engine::new(SETTINGS);
    let lengths = [4, 77, 600, 20, 9, 130, 64, 65, 40, 3];
    let heard = lengths.map(|length| {
        let heard = submit(&mut engine, request(&model, &text(length, 5), 20, rules.clone()));
        engine.step();
        heard
    });
    finish(&mut engine);
    for (length, heard) in lengths.into_iter().zip(heard) {
        assert_eq!(heard.chosen(), alone(length), "{family}: {length} tokens");
    }
}

of_each_family!(alone_or_among_others_an_answer_has_the_same_bits);

#[test]
fn adapters_at_the_same_time_answer_as_each_does_alone() {
    let family = "qwen3";
    let base = base(family);
    let models = [Arc::new(with_adapter(&base, family)), Arc::new(base)];
    let mut engine = Engine::new(SETTINGS);
    let prompt = text(20, 3);
    let heard: Vec<Heard> =
        (0..8).map(|n| submit(&mut engine, request(&models[n % 2], &prompt, 12, DRAWN.into()))).collect();
    finish(&mut engine);
    let alone = models.each_ref().map(|model| model.generate(&prompt, 12, DRAWN, &[], &mut |_| {}).expect("an answer"));
    assert_ne!(alone[0].tokens, alone[1].tokens, "the adapter does something");
    for (n, heard) in heard.iter().enumerate() {
        assert_eq!(heard.tokens(), alone[n % 2].tokens, "request {n}");
    }
}

/// (tokens that the prompt has in common with the first, more tokens, tokens that are known in whole parts, and with
/// pieces of parts)
/// Latent attention reads the last part of some in one way, and of others in the other.
const PROMPTS: [(usize, usize, usize, usize); 9] = [
    (1100, 0, 1024, 1024),
    (1100, 200, 1024, 1088),
    (700, 100, 512, 640),
    (1024, 0, 512, 896),
    (1024, 1, 1024, 1024),
    (1024, 12, 1024, 1024),
    (500, 300, 0, 384),
    (130, 0, 0, 64),
    (65, 64, 0, 64),
];

/// Models whose experts get as many rows as tokens choose them: of their prompts only whole parts are known.
const WITH_EXPERTS: [&str; 11] = [
    "deepseek_v3",
    "deepseek_v3_plain",
    "gemma4_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "gpt_oss_experts",
    "gpt_oss_mxfp4",
    "gpt_oss_mxfp4_experts",
    "qwen3_moe",
    "qwen3_moe_experts",
];
/// Models with states.
const WITH_STATES: [&str; 5] = ["lfm2", "lfm2_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next"];
/// A model that reads long texts again, and knows nothing of earlier ones.
const READ_AGAIN: &str = "phi3";

/// How many tokens are known of each of [`PROMPTS`] once the first one was read.
enum Known {
    Nothing,
    WholeParts,
    Pieces,
}

fn known_beginnings_change_no_bit(model: &Arc<Model>, known: &Known, what: &str) {
    let rules = TokenRules { logprobs: Some(5), ..TokenRules::from(DRAWN) };
    let first = text(1100, 3);
    for (common, more, whole, pieces) in PROMPTS {
        let known = match known {
            Known::Nothing => 0,
            Known::WholeParts => whole,
            Known::Pieces => pieces,
        };
        let prompt = [&first[..common], &text(more, 50)].concat();
        let answer = |engine: &mut Engine| {
            let heard = submit(engine, request(model, &prompt, 8, rules.clone()));
            finish(engine);
            heard
        };
        let fresh = answer(&mut Engine::new(SETTINGS));
        let mut engine = Engine::new(SETTINGS);
        submit(&mut engine, request(model, &first, 8, rules.clone()));
        finish(&mut engine);
        let heard = answer(&mut engine);
        let words = format!("{what}: {common} common tokens, {more} more");
        assert_eq!((fresh.cached(), heard.cached()), (Some(0), Some(known)), "{words}");
        assert_eq!(heard.chosen(), fresh.chosen(), "{words}");
        assert_eq!(answer(&mut engine).chosen(), fresh.chosen(), "{words}: the same once more");
    }
}

/// All families but those with states, which [`states_go_on_from_where_they_were_kept`] looks at.
#[test]
fn a_known_beginning_changes_no_bit() {
    let families = with_families!(names_of!());
    let named = WITH_EXPERTS.iter().chain(&WITH_STATES).chain([&READ_AGAIN]);
    named.for_each(|name| assert!(families.contains(name), "{name}"));
    std::thread::scope(|scope| {
        for family in families.into_iter().filter(|family| !WITH_STATES.contains(family)) {
            let known = match family {
                READ_AGAIN => Known::Nothing,
                family if WITH_EXPERTS.contains(&family) => Known::WholeParts,
                _ => Known::Pieces,
            };
            scope.spawn(move || known_beginnings_change_no_bit(&Arc::new(base(family)), &known, family));
        }
    });
}

/// Products of an adapter of low rank have an order of sums of their own.
#[test]
fn with_an_adapter_of_low_rank_whole_parts_are_known() {
    let model = Arc::new(with_adapter(&base("llama"), "llama"));
    known_beginnings_change_no_bit(&model, &Known::WholeParts, "an adapter");
}

/// A state cannot go back, so it is kept where the last whole part of the prompt ends.
#[test]
fn states_go_on_from_where_they_were_kept() {
    for family in WITH_STATES {
        let model = Arc::new(base(family));
        let first = text(1100, 3);
        let ask = |engine: &mut Engine, prompt: &[u32]| {
            let heard = submit(engine, request(&model, prompt, 8, DRAWN.into()));
            finish(engine);
            heard
        };
        let mut engine = Engine::new(SETTINGS);
        ask(&mut engine, &first);
        for (common, more, known) in [(1100, 200, 1024), (700, 100, 0), (1100, 0, 1024)] {
            let prompt = [&first[..common], &text(more, 50)].concat();
            let (heard, fresh) = (ask(&mut engine, &prompt), ask(&mut Engine::new(SETTINGS), &prompt));
            assert_eq!(heard.cached(), Some(known), "{family}: {common} common tokens");
            assert_eq!(heard.tokens(), fresh.tokens(), "{family}: {common} common tokens");
        }
    }
}

/// Behind a long question a system prompt is known again, as long as there is room for both.
#[test]
fn a_state_of_a_system_prompt_stays_known_where_there_is_room() {
    let system = text(600, 3);
    for family in WITH_STATES {
        let model = Arc::new(base(family));
        let just_the_long_one = model.prompt_bytes(1600);
        for (prefix_bytes, again) in [(SETTINGS.prefix_bytes, 512), (just_the_long_one, 0)] {
            let mut engine = Engine::new(EngineSettings { prefix_bytes, ..SETTINGS });
            let known = [(100, 80), (1000, 40), (70, 50)].map(|(more, first)| {
                let prompt = [system.clone(), text(more, first)].concat();
                let ask = |engine: &mut Engine| {
                    let heard = submit(engine, request(&model, &prompt, 2, DRAWN.into()));
                    finish(engine);
                    heard
                };
                let (heard, fresh) = (ask(&mut engine), ask(&mut Engine::new(SETTINGS)));
                assert_eq!(heard.tokens(), fresh.tokens(), "{family}: {more} more");
                assert!(engine.counts().prefix_bytes <= prefix_bytes, "{family}: {:?}", engine.counts());
                heard.cached()
            });
            assert_eq!(known, [Some(0), Some(512), Some(again)], "{family}: {prefix_bytes} bytes");
        }
    }
}

/// Of a base and its adapter each has beginnings of its own.
#[test]
fn beginnings_belong_to_their_model_and_go_with_it() {
    let base = base("llama");
    let adapted = Arc::new(with_adapter(&base, "llama"));
    let base = Arc::new(base);
    let prompt = text(600, 3);
    let mut engine = Engine::new(SETTINGS);
    for (model, known) in [(&base, 0), (&adapted, 0), (&base, 512), (&adapted, 512)] {
        let heard = submit(&mut engine, request(model, &prompt, 2, DRAWN.into()));
        finish(&mut engine);
        assert_eq!(heard.cached(), Some(known));
    }
    let both = engine.counts().prefix_bytes;
    drop(adapted);
    engine.step();
    assert_eq!(engine.counts().prefix_bytes, both / 2, "the adapter's are gone");
}

/// Processes that hold a model together drop it at different times, so what was kept of it goes when they are told.
#[test]
fn beginnings_of_a_model_are_forgotten_while_somebody_holds_it() {
    let base = base("llama");
    let adapted = Arc::new(with_adapter(&base, "llama"));
    let base = Arc::new(base);
    let prompt = text(600, 3);
    let mut engine = Engine::new(SETTINGS);
    let known = |engine: &mut Engine, model: &Arc<Model>| {
        let heard = submit(engine, request(model, &prompt, 2, DRAWN.into()));
        finish(engine);
        heard.cached()
    };
    assert_eq!([&base, &adapted].map(|model| known(&mut engine, model)), [Some(0), Some(0)]);
    let both = engine.counts().prefix_bytes;
    engine.forget(&adapted);
    assert_eq!(engine.counts().prefix_bytes, both / 2);
    assert_eq!([&base, &adapted].map(|model| known(&mut engine, model)), [Some(512), Some(0)]);
}

#[test]
fn beginnings_take_no_more_bytes_than_they_may() {
    let model = Arc::new(base("llama"));
    let one = model.row_bytes(600);
    let mut engine = Engine::new(EngineSettings { prefix_bytes: 2 * one, ..SETTINGS });
    let mut ask = |first: u32| {
        let heard = submit(&mut engine, request(&model, &text(600, first), 2, DRAWN.into()));
        finish(&mut engine);
        assert!(engine.counts().prefix_bytes <= 2 * one, "{:?}", engine.counts());
        heard.cached()
    };
    // The third takes the place of the one that was used longest ago.
    let known = [1, 2, 1, 3, 1, 2].map(&mut ask);
    assert_eq!(known, [Some(0), Some(0), Some(512), Some(0), Some(512), Some(0)]);
}

#[test]
fn who_leaves_frees_a_slot_and_changes_nothing_for_others() {
    let model = Arc::new(base("llama"));
    let mut engine = Engine::new(EngineSettings { slots: 3, queue: 2, ..SETTINGS });
    let ask = |engine: &mut Engine, first: u32, length: usize| {
        submit(engine, request(&model, &text(length, first), 30, DRAWN.into()))
    };
    let heard: Vec<Heard> = (0..3).map(|first| ask(&mut engine, first, 20)).collect();
    (0..6).for_each(|_| engine.step());
    let (reading, waiting) = (ask(&mut engine, 3, 2000), ask(&mut engine, 4, 20));
    engine.step();
    let (passes, cache_bytes) = (engine.counts().passes, 3 * model.row_bytes(20 + 30));
    assert_eq!(
        engine.counts(),
        EngineCounts { waiting: 2, running: 3, cache_bytes, passes, ..EngineCounts::default() }
    );
    // One that runs and one that waits leave. The other one that waits has its turn.
    heard[1].leave();
    waiting.leave();
    engine.step();
    let counts = engine.counts();
    assert_eq!((counts.waiting, counts.running, reading.cached()), (0, 3, Some(0)));
    let heard_so_far = heard[1].tokens().len();
    // One whose prompt is read leaves. What was read is kept.
    reading.leave();
    engine.step();
    let counts = engine.counts();
    assert!(counts.running == 2 && counts.prefix_bytes > 0, "{counts:?}");
    finish(&mut engine);
    assert_eq!((heard[1].tokens().len(), waiting.events()), (heard_so_far, Vec::new()));
    for first in [0, 2] {
        let alone = model.generate(&text(20, first), 30, DRAWN, &[], &mut |_| {}).expect("an answer");
        assert_eq!(heard[first as usize].tokens(), alone.tokens, "row {first}");
    }
    let again = ask(&mut engine, 3, 2000);
    finish(&mut engine);
    assert_eq!(again.cached(), Some(512));
}

#[test]
fn no_more_requests_are_taken_than_there_are_places() {
    let model = Arc::new(base("llama"));
    let mut engine = Engine::new(EngineSettings { slots: 1, queue: 1, ..SETTINGS });
    let asked = || request(&model, &text(20, 3), 3, DRAWN.into());
    let (first, second) = (submit(&mut engine, asked()), submit(&mut engine, asked()));
    engine.step();
    let refused = engine.submit(asked(), Box::new(Heard::default()));
    assert_eq!(refused, Err(Refusal::QueueFull { waiting: 1 }));
    assert_eq!((first.cached(), second.cached()), (Some(0), None));
    finish(&mut engine);
    assert_eq!(first.tokens(), second.tokens());
    submit(&mut engine, asked());
}

/// Only so many keys and values fit. One answer waits for another, and all come.
#[test]
fn requests_wait_for_memory() {
    let model = Arc::new(base("llama"));
    let settings = EngineSettings { cache_bytes: 2 * model.row_bytes(100), ..SETTINGS };
    let mut engine = Engine::new(settings);
    let heard: Vec<Heard> =
        (0..5).map(|first| submit(&mut engine, request(&model, &text(60, first), 40, DRAWN.into()))).collect();
    let mut most = 0;
    for _ in 0..STEPS {
        engine.step();
        most = most.max(engine.counts().running);
        if engine.is_idle() {
            break;
        }
    }
    assert_eq!(most, 2);
    assert!(heard.iter().all(|heard| heard.tokens().len() == 40));
}

#[test]
fn requests_that_can_never_be_answered_are_refused() {
    let model = Arc::new(base("llama"));
    let vocabulary = model.config.vocabulary;
    let small = EngineSettings { cache_bytes: model.row_bytes(128), ..SETTINGS };
    assert_eq!(small.longest_answer(&model, 100), 28);
    assert_eq!(small.longest_answer(&model, 500), 0);
    assert_eq!(SETTINGS.longest_answer(&model, 100), 8092);
    let mut engine = Engine::new(small);
    for (prompt, most, want) in [
        (vec![], 1, Refusal::Empty),
        (vec![1_000_000], 1, Refusal::Token { token: 1_000_000, vocabulary }),
        (text(8000, 3), 193, Refusal::TooLong { prompt: 8000, answer: 193, positions: 8192 }),
        (text(5, 3), usize::MAX, Refusal::TooLong { prompt: 5, answer: usize::MAX, positions: 8192 }),
        (
            text(100, 3),
            29,
            Refusal::TooLarge { prompt: 100, answer: 29, bytes: model.row_bytes(129), most: small.cache_bytes },
        ),
    ] {
        let refused = engine.submit(request(&model, &prompt, most, DRAWN.into()), Box::new(Heard::default()));
        assert_eq!(refused, Err(want));
    }
    assert!(engine.is_idle());
    let nothing = submit(&mut engine, request(&model, &text(5, 3), 0, DRAWN.into()));
    finish(&mut engine);
    assert_eq!((nothing.tokens().len(), nothing.end()), (0, Some(EngineEnd::Length)));
}

#[test]
fn an_end_token_ends_an_answer() {
    let model = Arc::new(base("llama"));
    let prompt = text(20, 3);
    let all = model.generate(&prompt, 12, Sampling::GREEDY, &[], &mut |_| {}).expect("an answer").tokens;
    let end = all[5];
    let place = all.iter().position(|token| *token == end).expect("it is there");
    let mut engine = Engine::new(SETTINGS);
    let mut asked = request(&model, &prompt, 12, Sampling::GREEDY.into());
    asked.end_ids = vec![end];
    let heard = submit(&mut engine, asked);
    finish(&mut engine);
    assert_eq!((heard.tokens(), heard.end()), (all[..place].to_vec(), Some(EngineEnd::EndToken(end))));
}

/// What is thought of a prompt is what the whole of it gives in one pass, and the answer behind it is the same.
#[test]
fn a_prompt_is_scored_while_it_is_read() {
    let rules = TokenRules { logprobs: Some(3), ..TokenRules::from(DRAWN) };
    let scored = TokenRules { of_prompt: true, ..rules.clone() };
    for family in ["llama", "gemma2", "qwen3_moe", "deepseek_v3", "qwen3_5", "phi3"] {
        let model = Arc::new(base(family));
        let vocabulary = model.config.vocabulary;
        // Two parts, but for the model that reads long texts again.
        let prompt = text(if model.config.is_long(600) { 20 } else { 600 }, 3);
        let logits = model.logits(&prompt).expect("logits");
        let mut engine = Engine::new(SETTINGS);
        // The second one waits beside the first. Of the last one the beginning is known, and it has no answer.
        let asked = [(&scored, 8), (&rules, 8), (&scored, 8), (&scored, 0)];
        let heard = asked.map(|(rules, most)| submit(&mut engine, request(&model, &prompt, most, rules.clone())));
        finish(&mut engine);
        for n in [0, 2, 3] {
            let scores = heard[n].scores();
            assert_eq!((scores.len(), heard[n].cached()), (prompt.len() - 1, Some(0)), "{family} {n}");
            for ((score, row), token) in scores.iter().zip(logits.chunks(vocabulary)).zip(&prompt[1..]) {
                let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
                let want = f64::from(row[*token as usize]) - sum.ln();
                assert!((f64::from(score.chosen) - want).abs() < 5e-4, "{family} {n}: {score:?} is not {want}");
                assert_eq!(score.top.len(), 3);
            }
            assert_eq!(heard[n].end(), Some(EngineEnd::Length), "{family} {n}");
        }
        assert!(heard[1].scores().is_empty(), "{family}");
        let mut fresh = Engine::new(SETTINGS);
        let alone = submit(&mut fresh, request(&model, &prompt, 8, rules.clone()));
        finish(&mut fresh);
        for (n, heard) in heard[..3].iter().enumerate() {
            assert_eq!(heard.chosen(), alone.chosen(), "{family} {n}");
        }
        assert!(heard[3].chosen().is_empty(), "{family}");
    }
}
