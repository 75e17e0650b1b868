//! A rank that computes with the first one, and answers no clients: it does what it is told, in the order in which it is
//! told.

use std::sync::Arc;
use std::thread;

use finetune_model::{Engine, EngineEvent, EngineRequest, EngineSettings, Hops, Listener, Sampling, TokenRules};

use crate::catalog::{Loader, Served};
use crate::others::{Order, Orders};
use crate::others_forms::Forms;
use crate::others_models::{Loading, Models};

/// Tells the first rank of a number that it gave a form or an adapter: it is done, or why it is not.
pub type Tell = Arc<dyn Fn(u64, Option<&str>) + Send + Sync>;

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

/// Does what the first rank does, until that ends. `served`: the models, in the order in which all ranks have them.
/// `rest`: keeps connections usable while nothing is computed. `loader`: loads this rank's part of an adapter.
///
/// # Errors
/// If it is lost, or says what makes no sense.
pub fn follow(
    served: Vec<Served>,
    hops: &dyn Hops,
    rest: &dyn Fn(),
    tell: &Tell,
    loader: Loader,
) -> Result<(), String> {
    let models = Arc::new(Models::new(served));
    let loading = Loading::start(Arc::clone(&models), loader, Arc::clone(tell)).map_err(|error| error.to_string())?;
    let has_read = |number| tell(number, None);
    thread::scope(|scope| {
        let forms = Forms::start(scope, &models, &has_read);
        Following { models: &models, loading, forms, engine: None }.compute(hops, rest)
    })
}

/// What the thread that computes has.
struct Following<'a, 'scope> {
    models: &'a Models,
    loading: Loading,
    forms: Forms<'scope>,
    engine: Option<Engine>,
}

impl Following<'_, '_> {
    fn compute(mut self, hops: &dyn Hops, rest: &dyn Fn()) -> Result<(), String> {
        loop {
            let heard = hear(hops)?;
            if let Some([slots, queue, cache_bytes, prefix_bytes, speculate]) = heard.settings {
                self.engine = Some(Engine::new(EngineSettings { slots, queue, cache_bytes, prefix_bytes, speculate }));
            }
            if heard.is_end {
                // The first rank does so too.
                self.engine.iter_mut().for_each(Engine::drain);
                return Ok(());
            }
            self.take(heard, rest)?;
        }
    }

    fn take(&mut self, heard: Orders, rest: &dyn Fn()) -> Result<(), String> {
        let engine = self.engine.as_mut().ok_or("the first rank has not said how it computes")?;
        for load in heard.loads {
            self.loading.ask(load);
        }
        for (model, text, number) in heard.forms {
            // Only whoever chooses tokens needs forms.
            match self.models.get(model).is_some_and(|served| served.model().chooses()) {
                true => self.forms.announce(model, text, number),
                false => self.forms.skip(number),
            }
        }
        for order in heard.requests {
            let request = request(order, self.models, &mut self.forms)?;
            engine.submit(request, Box::new(Nobody)).map_err(|refusal| refusal.to_string())?;
        }
        for number in heard.unloads {
            self.forms.forget(number);
            // Whoever reads a form for it may hold it for a while.
            if let Some(served) = self.models.remove(number) {
                engine.forget(&served.model);
            }
        }
        match heard.has_step {
            true => engine.step_without(&heard.gone),
            false => rest(),
        }
        engine.lost().map_or(Ok(()), |what| Err(what.to_owned()))
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

fn request(order: Order, models: &Models, forms: &mut Forms<'_>) -> Result<EngineRequest, String> {
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
        of_prompt: order.of_prompt,
        not_before: order.not_before,
        ..TokenRules::from(sampling)
    };
    let number = model;
    let model = models.get(number).ok_or("the first rank has other models")?.model();
    let form = grammar.filter(|_| model.chooses()).map(|grammar| forms.of(number, grammar));
    Ok(EngineRequest { model, prompt, max_new_tokens, rules, end_ids: order.end_ids, form })
}
