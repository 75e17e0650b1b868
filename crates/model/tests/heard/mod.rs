//! An engine of golden models, and who listens to it.
#![allow(dead_code, reason = "each test file takes what it needs")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use finetune_model::adapter::Adapter;
use finetune_model::{
    ChosenToken, Engine, EngineEnd, EngineEvent, EngineRequest, EngineSettings, Listener, Logprobs, Model, Placement,
    Sampling, TokenRules,
};

use crate::made;

/// Models with rotary embeddings of two kinds, windows, experts, latent attention, states, convolutions, and one that
/// reads long texts again.
pub(crate) const FAMILIES: [&str; 11] = [
    "llama",
    "qwen3",
    "qwen3_moe",
    "gemma3",
    "gpt_oss",
    "deepseek_v3",
    "glm4_moe_lite",
    "qwen3_5",
    "lfm2",
    "gemma4",
    "phi3",
];

pub(crate) const SETTINGS: EngineSettings =
    EngineSettings { slots: 16, queue: 16, cache_bytes: 1 << 30, prefix_bytes: 64 << 20, speculate: 0 };

pub(crate) const DRAWN: Sampling = Sampling { temperature: 1.3, top_p: 0.95, seed: 11 };

/// Steps after which an engine hangs.
pub(crate) const STEPS: usize = 10_000;

/// A golden model that takes long texts.
pub(crate) fn base(family: &str) -> Model {
    let mut model = Model::load(&made::golden(family), &Placement::cpu(None)).expect("the model loads");
    model.config.max_position_embeddings = 8192;
    model
}

pub(crate) fn with_adapter(base: &Model, family: &str) -> Model {
    let mut model = base.clone();
    let adapter = Adapter::read(&made::golden(family).join("adapter"), &model.config).expect("the adapter loads");
    model.attach(&adapter).expect("attached");
    model
}

/// Tokens that say nothing: 3, 10, 17, ...
pub(crate) fn text(length: usize, first: u32) -> Vec<u32> {
    (0..length as u32).map(|n| (first + 7 * n) % 96).collect()
}

/// What a listener has heard, and whether it has left.
#[derive(Clone, Default)]
pub(crate) struct Heard {
    events: Arc<Mutex<Vec<EngineEvent>>>,
    is_gone: Arc<AtomicBool>,
}

impl Listener for Heard {
    fn hear(&mut self, event: EngineEvent) -> bool {
        self.events.lock().expect("no panic").push(event);
        !self.is_gone()
    }

    fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::SeqCst)
    }
}

impl Heard {
    pub(crate) fn leave(&self) {
        self.is_gone.store(true, Ordering::SeqCst);
    }

    pub(crate) fn events(&self) -> Vec<EngineEvent> {
        self.events.lock().expect("no panic").clone()
    }

    pub(crate) fn chosen(&self) -> Vec<ChosenToken> {
        let token = |event| if let EngineEvent::Token(chosen) = event { Some(chosen) } else { None };
        self.events().into_iter().filter_map(token).collect()
    }

    pub(crate) fn tokens(&self) -> Vec<u32> {
        self.chosen().iter().map(|chosen| chosen.token).collect()
    }

    /// What the model thinks of the tokens of the prompt, from the second one on.
    pub(crate) fn scores(&self) -> Vec<Logprobs> {
        let scores = |event| if let EngineEvent::Prompt(scores) = event { scores } else { Vec::new() };
        self.events().into_iter().flat_map(scores).collect()
    }

    /// Tokens of the prompt that were known. `None`: its turn has not come.
    pub(crate) fn cached(&self) -> Option<usize> {
        self.events().iter().find_map(|event| match event {
            EngineEvent::Begun { cached } => Some(*cached),
            _ => None,
        })
    }

    pub(crate) fn end(&self) -> Option<EngineEnd> {
        match self.events().pop() {
            Some(EngineEvent::Ended(end)) => Some(end),
            _ => None,
        }
    }
}

pub(crate) fn request(model: &Arc<Model>, prompt: &[u32], max_new_tokens: usize, rules: TokenRules) -> EngineRequest {
    let (model, prompt) = (Arc::clone(model), prompt.to_vec());
    EngineRequest { model, prompt, max_new_tokens, rules, end_ids: Vec::new(), form: None }
}

pub(crate) fn submit(engine: &mut Engine, request: EngineRequest) -> Heard {
    let heard = Heard::default();
    engine.submit(request, Box::new(heard.clone())).expect("taken");
    heard
}

pub(crate) fn finish(engine: &mut Engine) {
    for _ in 0..STEPS {
        if engine.is_idle() {
            return;
        }
        engine.step();
    }
    panic!("the engine hangs: {:?}", engine.counts());
}
