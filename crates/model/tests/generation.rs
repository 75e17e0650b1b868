//! Every family's greedy answers against those of transformers with its cache: `generation.json`, which
//! `scripts/golden_generation.py` made. Each token is compared, and none is excused: where rounding might choose
//! another one, the script takes another prompt.

#[macro_use]
#[path = "golden/each_family.rs"]
mod each_family;
mod golden;
mod heard;
mod made;

use std::sync::Arc;

use finetune_model::adapter::Adapter;
use finetune_model::{Engine, Model, Sampling, TokenRules};
use serde_json::Value;

use golden::{LOGITS, directory, json, placement};
use heard::{Heard, SETTINGS, finish, request, submit};

/// What transformers says after a prompt.
struct Answer {
    prompt: Vec<u32>,
    /// Divides the logits above 0 of tokens that were there, and multiplies those below. 1: nothing changes.
    repetition_penalty: f64,
    tokens: Vec<u32>,
    /// Of the tokens, by the model's own logits.
    logprobs: Vec<f64>,
    /// How far the best token is ahead of the second at least.
    margin: f64,
}

impl Answer {
    fn read(value: &Value) -> Answer {
        let number = |key: &str| value[key].as_f64().expect("a number");
        let list = |key: &str| value[key].as_array().expect("a list").iter();
        let tokens = |key: &str| list(key).map(|token| token.as_u64().expect("a token") as u32).collect();
        Answer {
            prompt: tokens("prompt"),
            repetition_penalty: number("repetition_penalty"),
            tokens: tokens("tokens"),
            logprobs: list("logprobs").map(|logprob| logprob.as_f64().expect("a number")).collect(),
            margin: number("margin"),
        }
    }

    fn has_penalty(&self) -> bool {
        self.repetition_penalty != 1.0
    }

    fn rules(&self) -> TokenRules {
        let repetition_penalty = self.repetition_penalty;
        TokenRules { repetition_penalty, logprobs: Some(0), ..TokenRules::from(Sampling::GREEDY) }
    }
}

/// Base and adapter, each with its answers. They share the matrices of the base, as models of one server do.
fn models(family: &str) -> [(&'static str, Arc<Model>, Vec<Answer>); 2] {
    let golden = json(&directory(family).join("generation.json"));
    let base = Model::load(&directory(family), &placement()).expect("the model loads");
    let mut adapted = base.clone();
    let adapter = Adapter::read(&directory(family).join("adapter"), &base.config).expect("the adapter loads");
    adapted.attach(&adapter).expect("an adapter of this model");
    [("base", base), ("adapter", adapted)].map(|(name, model)| {
        let answers: Vec<Answer> = golden[name].as_array().expect("a list").iter().map(Answer::read).collect();
        assert_eq!(answers.iter().filter(|answer| answer.has_penalty()).count(), 2, "{family} {name}");
        assert_eq!(answers.iter().map(|answer| answer.tokens.len()).collect::<Vec<_>>(), [24; 5], "{family} {name}");
        let smallest = answers.iter().map(|answer| answer.margin).fold(f64::INFINITY, f64::min);
        assert!(smallest > 6.0 * f64::from(LOGITS), "{family} {name}: rounding may choose a token, {smallest:e}");
        (name, Arc::new(model), answers)
    })
}

fn tokens_are_those_of_transformers(family: &'static str) {
    for (name, model, answers) in models(family) {
        for Answer { prompt, tokens, .. } in answers.iter().filter(|answer| !answer.has_penalty()) {
            let got = model.generate(prompt, tokens.len(), Sampling::GREEDY, &[], &mut |_| {}).expect("an answer");
            assert_eq!(got.tokens, *tokens, "{family} {name}: {} tokens in the prompt", prompt.len());
        }
    }
}

of_each_family!(tokens_are_those_of_transformers);

/// With and without an adapter, with and without a penalty, all at once: tokens, and how likely each was.
fn answers_at_the_same_time_are_those_of_transformers(family: &'static str) {
    let models = models(family);
    let mut engine = Engine::new(SETTINGS);
    let mut heard: Vec<(&str, &Answer, Heard)> = Vec::new();
    for (name, model, answers) in &models {
        for answer in answers {
            let asked = request(model, &answer.prompt, answer.tokens.len(), answer.rules());
            heard.push((name, answer, submit(&mut engine, asked)));
        }
    }
    finish(&mut engine);
    for (name, answer, heard) in heard {
        let words = format!("{family} {name}: {} tokens, {}", answer.prompt.len(), answer.repetition_penalty);
        assert_eq!(heard.tokens(), answer.tokens, "{words}");
        for (n, (got, want)) in heard.chosen().iter().zip(&answer.logprobs).enumerate() {
            let logprob = got.logprobs.as_ref().expect("they were asked for").chosen;
            let difference = (f64::from(logprob) - want).abs();
            assert!(difference < f64::from(LOGITS), "{words}: token {n} differs by {difference:e}");
        }
    }
}

of_each_family!(answers_at_the_same_time_are_those_of_transformers);
