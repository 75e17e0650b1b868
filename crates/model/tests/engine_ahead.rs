//! The engine: tokens that are proposed, several answers to one prompt, answers of a form.

mod heard;
mod made;

use std::sync::Arc;

use finetune_model::{
    ChosenToken, Engine, EngineCounts, EngineEnd, EngineSettings, Form, MOST_AHEAD, RowRequest, Sampling, Speculated,
    TokenRules,
};

use heard::{DRAWN, FAMILIES, Heard, SETTINGS, base, finish, request, submit, text};

/// How an answer comes that proposes so many tokens, the tokens and logarithms first.
fn answered(
    model: &Arc<finetune_model::Model>,
    prompt: &[u32],
    rules: &TokenRules,
    speculate: usize,
) -> (Vec<ChosenToken>, Option<EngineEnd>, Speculated) {
    let mut engine = Engine::new(EngineSettings { speculate, ..SETTINGS });
    let heard = submit(&mut engine, request(model, prompt, 40, rules.clone()));
    finish(&mut engine);
    (heard.chosen(), heard.end(), engine.counts().speculated)
}

/// Bits, not only tokens: with the logarithms of probabilities. Models that cannot take tokens back propose none.
#[test]
fn looking_ahead_changes_no_bit() {
    let mut all = Speculated::default();
    for family in FAMILIES {
        let model = Arc::new(base(family));
        let takes_back = !["qwen3_5", "lfm2", "phi3"].contains(&family);
        let mut of_family = Speculated::default();
        for sampling in [Sampling::GREEDY, Sampling { temperature: 0.4, ..DRAWN }, DRAWN] {
            let plain = TokenRules { logprobs: Some(5), ..TokenRules::from(sampling) };
            // Few tokens, so that much is there before; and penalties, which depend on what was taken.
            let few = TokenRules { top_k: 2, ..plain.clone() };
            let penalised = TokenRules { frequency_penalty: 0.3, ..few.clone() };
            for rules in [plain, few, penalised] {
                for length in [3, 150] {
                    let prompt = text(length, 3);
                    let (want, want_end, none) = answered(&model, &prompt, &rules, 0);
                    assert_eq!(none, Speculated::default());
                    for speculate in [1, 3, 100] {
                        let (got, end, counts) = answered(&model, &prompt, &rules, speculate);
                        let words = format!("{family}: {length} tokens, {speculate} ahead, {rules:?}");
                        assert_eq!((got, end), (want.clone(), want_end.clone()), "{words}");
                        assert!(counts.accepted <= counts.proposed, "{words}");
                        of_family.proposed += counts.proposed;
                        of_family.accepted += counts.accepted;
                    }
                }
            }
        }
        assert_eq!(of_family.proposed > 0, takes_back, "{family}");
        all.accepted += of_family.accepted;
        all.proposed += of_family.proposed;
    }
    assert!(all.accepted > 0 && all.accepted < all.proposed, "{all:?}");
}

/// A text that repeats itself takes far fewer passes, and stops at its last token all the same.
#[test]
fn what_repeats_itself_takes_few_passes() {
    let model = Arc::new(base("llama"));
    let rules = TokenRules { logit_bias: vec![(5, 100.0)], ..TokenRules::from(Sampling::GREEDY) };
    for most in [1, 2, 3, 9, 40] {
        let mut engine = Engine::new(EngineSettings { speculate: MOST_AHEAD, ..SETTINGS });
        let heard = submit(&mut engine, request(&model, &[5, 5, 5], most, rules.clone()));
        let mut steps = 0;
        while !engine.is_idle() {
            engine.step();
            steps += 1;
        }
        assert_eq!((heard.tokens(), heard.end()), (vec![5; most], Some(EngineEnd::Length)));
        assert!(steps <= 1 + most / 8 + 1, "{most} tokens in {steps} steps");
        let Speculated { proposed, accepted } = engine.counts().speculated;
        assert_eq!(proposed, accepted);
    }
}

/// A listener that leaves in the middle of a pass hears no more, and an end token ends it.
#[test]
fn an_answer_that_looks_ahead_ends_where_it_ends_alone() {
    struct Until(Heard, usize);
    impl finetune_model::Listener for Until {
        fn hear(&mut self, event: finetune_model::EngineEvent) -> bool {
            self.0.hear(event);
            self.0.tokens().len() < self.1
        }

        fn is_gone(&self) -> bool {
            false
        }
    }
    let model = Arc::new(base("llama"));
    let rules = TokenRules { logit_bias: vec![(5, 100.0)], ..TokenRules::from(Sampling::GREEDY) };
    let mut engine = Engine::new(EngineSettings { speculate: MOST_AHEAD, ..SETTINGS });
    let heard = Heard::default();
    let asked = request(&model, &[5, 5, 5], 40, rules.clone());
    engine.submit(asked, Box::new(Until(heard.clone(), 4))).expect("taken");
    finish(&mut engine);
    assert_eq!((heard.tokens(), heard.end()), (vec![5; 4], None));
    // The penalty brings another token, which ends the answer, after some that were proposed.
    let rules = TokenRules { frequency_penalty: 1.0, logit_bias: vec![(5, 60.0), (6, 50.0)], ..rules };
    let ends = |speculate| {
        let mut engine = Engine::new(EngineSettings { speculate, ..SETTINGS });
        let mut asked = request(&model, &[5, 5, 5], 40, rules.clone());
        asked.end_ids = vec![6];
        let heard = submit(&mut engine, asked);
        finish(&mut engine);
        (heard.tokens(), heard.end(), engine.counts().speculated.accepted)
    };
    let (alone, ahead) = (ends(0), ends(MOST_AHEAD));
    assert_eq!((&alone.0, &alone.1), (&ahead.0, &ahead.1));
    assert_eq!(ahead.1, Some(EngineEnd::EndToken(6)));
    assert!(ahead.2 > 0);
}

/// Answers that join one that looks ahead, and those that are left alone again, stay what they are.
#[test]
fn rows_come_and_go_beside_one_that_looks_ahead() {
    for family in ["llama", "gemma3", "qwen3_moe"] {
        let model = Arc::new(base(family));
        let rules = TokenRules { top_k: 2, logprobs: Some(3), ..TokenRules::from(DRAWN) };
        let mut engine = Engine::new(EngineSettings { speculate: MOST_AHEAD, ..SETTINGS });
        let mut heard = Vec::new();
        for (length, most, steps) in [(150, 120, 9), (20, 10, 12), (70, 9, 14), (64, 30, 0)] {
            heard.push((length, most, submit(&mut engine, request(&model, &text(length, 3), most, rules.clone()))));
            (0..steps).for_each(|_| engine.step());
        }
        finish(&mut engine);
        for (length, most, heard) in heard {
            let mut engine = Engine::new(SETTINGS);
            let alone = submit(&mut engine, request(&model, &text(length, 3), most, rules.clone()));
            finish(&mut engine);
            assert_eq!(heard.chosen(), alone.chosen(), "{family}: {length} tokens");
        }
        assert!(engine.counts().speculated.proposed > 0, "{family}");
    }
}

/// `generate` with tokens ahead says what it says without.
#[test]
fn generate_looks_ahead_with_the_same_tokens() {
    for family in FAMILIES {
        let model = base(family);
        for sampling in [Sampling::GREEDY, Sampling { temperature: 0.4, ..DRAWN }] {
            for (prompt, max_new_tokens) in [(text(150, 3), 60), (text(1, 3), 9), (text(9, 3), 1), (text(9, 3), 0)] {
                let alone = model.generate(&prompt, max_new_tokens, sampling, &[], &mut |_| {}).expect("an answer");
                let end = alone.tokens.get(20).copied();
                for end_ids in [vec![], end.into_iter().collect()] {
                    let want =
                        model.generate(&prompt, max_new_tokens, sampling, &end_ids, &mut |_| {}).expect("an answer");
                    let request = RowRequest { prompt: &prompt, max_new_tokens, sampling, end_ids: &end_ids };
                    for ahead in [0, 1, MOST_AHEAD, 50] {
                        let mut seen = Vec::new();
                        let mut each = |token| {
                            seen.push(token);
                            true
                        };
                        let got = model.generate_ahead(&request, ahead, &mut each).expect("an answer");
                        assert_eq!((&got.tokens, got.stopped_by), (&want.tokens, want.stopped_by), "{family} {ahead}");
                        assert_eq!(seen.len() + usize::from(got.stopped_by.is_some()), got.tokens.len());
                    }
                }
            }
        }
    }
    let model = base("llama");
    let refused = RowRequest { prompt: &[1_000_000], max_new_tokens: 1, sampling: DRAWN, end_ids: &[] };
    assert!(model.generate_ahead(&refused, 3, &mut |_| true).is_err());
}

/// Several answers to one prompt read it once, with the bits of requests that come alone.
#[test]
fn answers_to_one_prompt_share_it() {
    for family in FAMILIES {
        let model = Arc::new(base(family));
        let rules = |seed| TokenRules { logprobs: Some(3), ..TokenRules::from(Sampling { seed, ..DRAWN }) };
        let prompt = text(600, 3);
        let mut engine = Engine::new(EngineSettings { slots: 3, ..SETTINGS });
        let heard: Vec<Heard> =
            (0..4).map(|seed| submit(&mut engine, request(&model, &prompt, 12, rules(seed)))).collect();
        let other = submit(&mut engine, request(&model, &text(600, 4), 12, rules(0)));
        (0..2).for_each(|_| engine.step());
        let cached: Vec<Option<usize>> = heard.iter().map(Heard::cached).collect();
        assert_eq!(cached, [Some(0), Some(600), Some(600), None], "{family}: there are three slots");
        finish(&mut engine);
        assert_eq!(other.cached(), Some(0));
        for (seed, heard) in (0..).zip(&heard) {
            let mut engine = Engine::new(SETTINGS);
            let alone = submit(&mut engine, request(&model, &prompt, 12, rules(seed)));
            finish(&mut engine);
            assert_eq!(heard.chosen(), alone.chosen(), "{family}: seed {seed}");
        }
        assert_ne!(heard[0].tokens(), heard[1].tokens(), "{family}: seeds differ");
    }
}

/// Allows one token after the other.
struct Dictated(Vec<u32>, [u32; 3]);

impl Form for Dictated {
    fn allowed(&mut self) -> Result<&[u32], String> {
        let next = *self.0.first().ok_or("nothing comes behind it")?;
        self.1 = [0; 3];
        self.1[next as usize / 32] = 1 << (next % 32);
        Ok(&self.1)
    }

    fn take(&mut self, token: u32) -> Result<(), String> {
        assert_eq!(self.0.remove(0), token);
        Ok(())
    }
}

/// A form rules, also over tokens that are proposed; one that fails ends its own answer only.
#[test]
fn an_answer_has_its_form_and_others_have_none() {
    let model = Arc::new(base("llama"));
    let dictated: Vec<u32> = [[7, 8, 9], [7, 8, 9], [7, 8, 95], [7, 8, 9]].concat();
    for speculate in [0, MOST_AHEAD] {
        let mut engine = Engine::new(EngineSettings { speculate, ..SETTINGS });
        let mut asked = request(&model, &text(20, 3), 13, DRAWN.into());
        asked.form = Some(Box::new(Dictated(dictated.clone(), [0; 3])));
        let formed = submit(&mut engine, asked);
        finish(&mut engine);
        assert_eq!(formed.tokens(), dictated);
        let failed =
            EngineEnd::Failed("the answer cannot have the form that was asked for: nothing comes behind it".to_owned());
        assert_eq!(formed.end(), Some(failed));
        assert_eq!(engine.counts().speculated.accepted > 0, speculate > 0);
    }
    let mut engine = Engine::new(SETTINGS);
    let mut asked = request(&model, &text(20, 3), 12, DRAWN.into());
    asked.form = Some(Box::new(Dictated(dictated.clone(), [0; 3])));
    let (formed, free) =
        (submit(&mut engine, asked), submit(&mut engine, request(&model, &text(30, 3), 20, DRAWN.into())));
    finish(&mut engine);
    let alone = model.generate(&text(30, 3), 20, DRAWN, &[], &mut |_| {}).expect("an answer");
    assert_eq!((formed.tokens(), free.tokens()), (dictated, alone.tokens));
    let EngineCounts { prefix_bytes, passes, .. } = engine.counts();
    assert_eq!(engine.counts(), EngineCounts { prefix_bytes, passes, ..EngineCounts::default() });
}
