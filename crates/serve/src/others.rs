//! Other ranks that hold parts of the models, layers or slices of all layers: each has an engine of its own, which
//! takes the same requests and does the same steps. The first rank answers clients, and tells the others what its
//! engine does.

use std::sync::Arc;
use std::thread;

use finetune_model::{Engine, EngineEvent, EngineRequest, EngineSettings, Hops, Listener, Model, Sampling, TokenRules};
use serde::{Deserialize, Serialize};

use crate::catalog::Served;
use crate::others_forms::Forms;

/// Whether all ranks are there; otherwise what has happened.
pub type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The numbers of the forms that other ranks have read since it was asked last: each once from every rank. It does not
/// wait.
pub type HaveRead = Arc<dyn Fn() -> Result<Vec<u64>, String> + Send + Sync>;

/// What the first rank needs to tell the others.
pub struct Others {
    /// The models, in the order in which all ranks have them.
    pub models: Vec<Arc<Model>>,
    /// The connections.
    pub hops: Arc<dyn Hops>,
    /// How many ranks there are.
    pub world: usize,
    /// Whether all of them are still there; otherwise what has happened. It does not wait.
    pub check: Check,
    /// Keeps the connections usable while nothing is computed.
    pub rest: Box<dyn Fn() + Send>,
    /// Which forms the others have read.
    pub have_read: HaveRead,
}

/// What the others are told before a step.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Orders {
    /// Bounds of the engine, before the first step.
    #[serde(default)]
    pub(crate) settings: Option<[usize; 5]>,
    #[serde(default)]
    pub(crate) requests: Vec<Order>,
    /// Forms that requests will have, each with the number of its model and one of its own: the first rank begins to read
    /// them.
    #[serde(default)]
    pub(crate) forms: Vec<(usize, String, u64)>,
    #[serde(default)]
    pub(crate) gone: Vec<u64>,
    #[serde(default)]
    pub(crate) has_step: bool,
    #[serde(default)]
    pub(crate) is_end: bool,
}

/// A request.
#[derive(Serialize, Deserialize)]
pub(crate) struct Order {
    model: usize,
    prompt: Vec<u32>,
    max_new_tokens: usize,
    temperature: f64,
    top_p: f64,
    seed: u64,
    top_k: usize,
    min_p: f64,
    penalties: [f64; 3],
    logit_bias: Vec<(u32, f32)>,
    end_ids: Vec<u32>,
    /// How many logarithms of probabilities are wanted: the rank that chooses tokens has the logits.
    #[serde(default)]
    logprobs: Option<usize>,
    /// The form that the answer has to have: the rank that chooses tokens does so by this grammar.
    #[serde(default)]
    grammar: Option<String>,
}

impl Others {
    /// What the others have to know of a request.
    pub(crate) fn order(&self, request: &EngineRequest, grammar: Option<&str>) -> Order {
        let TokenRules { sampling, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, .. } =
            request.rules;
        Order {
            model: self.number(&request.model).expect("only these models are served"),
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
            logprobs: request.rules.logprobs,
            grammar: grammar.map(str::to_owned),
        }
    }

    /// The number of a model among those that all ranks have.
    pub(crate) fn number(&self, model: &Arc<Model>) -> Option<usize> {
        self.models.iter().position(|other| Arc::ptr_eq(other, model))
    }

    /// Tells all others.
    pub(crate) fn tell(&self, orders: &Orders) -> Result<(), String> {
        let text = serde_json::to_vec(orders).expect("plain data");
        for other in 1..self.world {
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

/// Nobody listens on the ranks that do not answer clients.
struct Nobody;

impl Listener for Nobody {
    fn hear(&mut self, _: EngineEvent) -> bool {
        true
    }

    fn is_gone(&self) -> bool {
        false
    }
}

/// Does what the first rank does, until that ends. `rest`: keeps connections usable while nothing is computed.
/// `has_read`: tells the first rank the number of a form that is read.
///
/// # Errors
/// If it is lost, or says what makes no sense.
pub fn follow(
    served: &[Served],
    hops: &dyn Hops,
    rest: &dyn Fn(),
    has_read: &(dyn Fn(u64) + Sync),
) -> Result<(), String> {
    thread::scope(|scope| compute(served, &mut Forms::start(scope, served, has_read), hops, rest))
}

fn compute(served: &[Served], forms: &mut Forms<'_>, hops: &dyn Hops, rest: &dyn Fn()) -> Result<(), String> {
    let mut engine: Option<Engine> = None;
    loop {
        let heard = hear(hops)?;
        if let Some([slots, queue, cache_bytes, prefix_bytes, speculate]) = heard.settings {
            engine = Some(Engine::new(EngineSettings { slots, queue, cache_bytes, prefix_bytes, speculate }));
        }
        if heard.is_end {
            // The first rank does so too.
            engine.iter_mut().for_each(Engine::drain);
            return Ok(());
        }
        let engine = engine.as_mut().ok_or("the first rank has not said how it computes")?;
        for (model, text, number) in heard.forms {
            // Only whoever chooses tokens needs forms.
            match served.get(model).is_some_and(|served| served.model().chooses()) {
                true => forms.announce(model, text, number),
                false => forms.skip(number),
            }
        }
        for order in heard.requests {
            engine.submit(request(order, served, forms)?, Box::new(Nobody)).map_err(|refusal| refusal.to_string())?;
        }
        match heard.has_step {
            true => engine.step_without(&heard.gone),
            false => rest(),
        }
        if let Some(what) = engine.lost() {
            return Err(what.to_owned());
        }
    }
}

fn hear(hops: &dyn Hops) -> Result<Orders, String> {
    /// More than any request has.
    const MOST: u64 = 1 << 30;
    let receive = |length: usize| hops.receive(0, length).map_err(|error| error.to_string());
    let length = u64::from_le_bytes(receive(8)?.try_into().map_err(|_| "eight bytes are meant")?);
    if length > MOST {
        return Err("the first rank says what makes no sense".to_owned());
    }
    serde_json::from_slice(&receive(length as usize)?).map_err(|error| error.to_string())
}

fn request(order: Order, served: &[Served], forms: &mut Forms<'_>) -> Result<EngineRequest, String> {
    let Order { model, grammar, prompt, max_new_tokens, temperature, top_p, seed, top_k, min_p, penalties, .. } = order;
    let [repetition_penalty, presence_penalty, frequency_penalty] = penalties;
    let sampling = Sampling { temperature, top_p, seed };
    let rules = TokenRules {
        top_k,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias: order.logit_bias,
        logprobs: order.logprobs,
        ..TokenRules::from(sampling)
    };
    let number = model;
    let model = served.get(number).ok_or("the first rank has other models")?.model();
    let form = grammar.filter(|_| model.chooses()).map(|grammar| forms.of(number, grammar));
    Ok(EngineRequest { model, prompt, max_new_tokens, rules, end_ids: order.end_ids, form })
}
