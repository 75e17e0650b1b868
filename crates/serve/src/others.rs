//! Other ranks that hold parts of the models, layers or slices of all layers: each has an engine of its own, which
//! takes the same requests and does the same steps. The first rank answers clients, and tells the others what its
//! engine does (`leading.rs`); the others do so (`following.rs`).

use std::sync::Arc;

use finetune_model::{EngineRequest, EngineSettings, Hops, Model, TokenRules};
use serde::{Deserialize, Serialize};

/// Whether all ranks are there; otherwise what has happened.
pub type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// What the other ranks have said since they were asked last. It does not wait.
pub type Heard = Arc<dyn Fn() -> Result<Vec<Reply>, String> + Send + Sync>;

/// What another rank says of a form that it was to read, or of an adapter that it was to load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The rank.
    pub rank: usize,
    /// The number that the first rank gave what it asked for.
    pub number: u64,
    /// Why it could not. `None`: it is done.
    pub refusal: Option<String>,
}

/// What the first rank needs to tell the others.
pub struct Others {
    /// The models at the start, in the order in which all ranks have them.
    pub models: Vec<Arc<Model>>,
    /// The connections.
    pub hops: Arc<dyn Hops>,
    /// The host of each rank.
    pub hosts: Vec<String>,
    /// Whether all of them are still there; otherwise what has happened. It does not wait.
    pub check: Check,
    /// Keeps the connections usable while nothing is computed.
    pub rest: Box<dyn Fn() + Send>,
    /// What the others say.
    pub heard: Heard,
}

/// What the others are told before a step, in the order in which they do it.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// Bounds of the engine, before the first step.
    #[serde(default)]
    pub(crate) settings: Option<[usize; 5]>,
    /// Adapters to load, beside the steps.
    #[serde(default)]
    pub(crate) loads: Vec<Load>,
    /// Forms that requests will have, each with the number of its model and one of its own: the first rank begins to read
    /// them.
    #[serde(default)]
    pub(crate) forms: Vec<(u64, String, u64)>,
    #[serde(default)]
    pub(crate) requests: Vec<Order>,
    /// Models that no request names any more: what was kept of their prompts goes before the step, on all ranks.
    #[serde(default)]
    pub(crate) unloads: Vec<u64>,
    #[serde(default)]
    pub(crate) gone: Vec<u64>,
    #[serde(default)]
    pub(crate) has_step: bool,
    #[serde(default)]
    pub(crate) is_end: bool,
}

/// An adapter to load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Load {
    /// The number that the model gets, which answers to this have, too.
    pub(crate) number: u64,
    pub(crate) name: String,
    /// Below the directory that each rank was started with.
    pub(crate) path: String,
    /// The hash of the first rank's.
    #[serde(default)]
    pub(crate) content: Option<String>,
}

/// A request.
#[derive(Serialize, Deserialize)]
pub(crate) struct Order {
    /// Its number.
    pub(crate) model: u64,
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_new_tokens: usize,
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    pub(crate) seed: u64,
    pub(crate) top_k: usize,
    pub(crate) min_p: f64,
    pub(crate) penalties: [f64; 3],
    pub(crate) logit_bias: Vec<(u32, f32)>,
    pub(crate) end_ids: Vec<u32>,
    #[serde(default)]
    pub(crate) not_before: (Vec<u32>, usize),
    /// How many logarithms of probabilities are wanted: the rank that chooses tokens has the logits.
    #[serde(default)]
    pub(crate) logprobs: Option<usize>,
    #[serde(default)]
    pub(crate) of_prompt: bool,
    /// The form that the answer has to have: the rank that chooses tokens does so by this grammar.
    #[serde(default)]
    pub(crate) grammar: Option<String>,
}

impl Order {
    /// What the others have to know of a request. `model`: the number of its model.
    pub(crate) fn of(request: &EngineRequest, model: u64, grammar: Option<&str>) -> Order {
        let TokenRules { sampling, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, .. } =
            request.rules;
        Order {
            model,
            prompt: request.prompt.clone(),
            max_new_tokens: request.max_new_tokens,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            seed: sampling.seed,
            top_k,
            min_p,
            penalties: [repetition_penalty, presence_penalty, frequency_penalty],
            logit_bias: request.rules.logit_bias.clone(),
            end_ids: request.end_ids.clone(),
            not_before: request.rules.not_before.clone(),
            logprobs: request.rules.logprobs,
            of_prompt: request.rules.of_prompt,
            grammar: grammar.map(str::to_owned),
        }
    }
}

impl Others {
    /// Tells all others.
    pub(crate) fn tell(&self, orders: &Orders) -> Result<(), String> {
        let text = serde_json::to_vec(orders).expect("plain data");
        for other in 1..self.hosts.len() {
            let length = (text.len() as u64).to_le_bytes().to_vec();
            let sent = self.hops.send(other, length).and_then(|()| self.hops.send(other, text.clone()));
            sent.map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    pub(crate) fn begin(&self, settings: EngineSettings) -> Result<(), String> {
        let EngineSettings { slots, queue, cache_bytes, prefix_bytes, speculate } = settings;
        let settings = Some([slots, queue, cache_bytes, prefix_bytes, speculate]);
        self.tell(&Orders { settings, ..Orders::default() })
    }

    /// Keeps all connections usable while nothing is computed.
    pub(crate) fn rest(&self) -> Result<(), String> {
        self.tell(&Orders::default())?;
        (self.rest)();
        Ok(())
    }

    pub(crate) fn end(&self) -> Result<(), String> {
        self.tell(&Orders { is_end: true, ..Orders::default() })
    }
}
