//! Answers to many requests at a time: continuous batching.
//!
//! Owns: which request is read, which are continued together, and the memory of their keys and
//! values. Must never know: text, connections, threads. Start reading at [`Engine::step`].
//!
//! **On the CPU an answer does not depend on what else is under way.** Prompts are read in parts of
//! 512 tokens that always begin at the same places; several short ones are a part together where that
//! changes no bit (see `reading`). At most sixteen rows are continued in one pass (on a GPU eight), and
//! products of up to sixteen rows have one order of sums (see `generate_rows`). What was read of an earlier
//! prompt is used again where that changes no bit (see `prefixes`).
//!
//! Requests with different adapters of one base share passes, unless an adapter is more than branches
//! beside the base's products (see `sharing`).
//!
//! An answer that is alone may look ahead: tokens that followed the last ones before are proposed, and go through
//! the model with the next one (see `lookup`). They are taken as long as they are what is chosen anyway.
//!
//! Where several processes hold the layers, as many passes are under way as there are processes (see `over_stages`).

mod group;
mod over_stages;
mod prefixes;
mod reading;

use std::collections::VecDeque;
use std::sync::Arc;

use thiserror::Error;

use self::group::{Group, Job};
use self::over_stages::Flights;
use self::prefixes::Prefixes;
use self::reading::Reading;
use crate::model::Model;
use crate::passes::form::Form;
use crate::passes::generate_rows::MOST_AHEAD;
use crate::passes::lookup::{Lookup, Speculated};
use crate::passes::token_rules::{Chooser, ChosenToken, Logprobs, TokenRules};

/// Bounds of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineSettings {
    /// The most requests that are answered at a time.
    pub slots: usize,
    /// The most requests that wait.
    pub queue: usize,
    /// The most bytes of keys and values of requests that are answered.
    pub cache_bytes: usize,
    /// The most bytes of keys and values of earlier prompts.
    pub prefix_bytes: usize,
    /// The most tokens that are proposed at a time, at most [`MOST_AHEAD`]. 0: none.
    pub speculate: usize,
}

/// A prompt, and how it is continued.
pub struct EngineRequest {
    /// The model with its adapter. Requests of the same one are continued together, and so are those of clones of
    /// one base with plain LoRA.
    pub model: Arc<Model>,
    /// The tokens that are continued.
    pub prompt: Vec<u32>,
    /// The most tokens of the answer.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub rules: TokenRules,
    /// The tokens that end the answer.
    pub end_ids: Vec<u32>,
    /// The form that the answer has to have.
    pub form: Option<Box<dyn Form>>,
}

/// What happens to a request.
#[derive(Clone, Debug, PartialEq)]
pub enum EngineEvent {
    /// Its turn has come. So many tokens of its prompt are known from an earlier one.
    Begun {
        /// All of them, if the request before has read the same prompt.
        cached: usize,
    },
    /// What the model thinks of the next tokens of the prompt, if that was asked for. It begins with the second token, as
    /// nothing is in front of the first.
    Prompt(Vec<Logprobs>),
    /// A new token, which is no end token.
    Token(ChosenToken),
    /// Nothing more comes.
    Ended(EngineEnd),
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub enum EngineEnd {
    /// One of the end tokens came.
    EndToken(u32),
    /// So many tokens were allowed.
    Length,
    /// The model failed, for this reason.
    Failed(String),
}

/// Who asked. If it is dropped without [`EngineEvent::Ended`], the engine has ended.
pub trait Listener: Send {
    /// Hears what happens, on the thread of the engine. Returns whether more is wanted. If not,
    /// nothing more comes.
    fn hear(&mut self, event: EngineEvent) -> bool;

    /// Whether nobody waits for the answer any more.
    fn is_gone(&self) -> bool;
}

/// Why a request is not taken.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Too many wait already.
    #[error("{waiting} requests are waiting already")]
    QueueFull {
        /// So many.
        waiting: usize,
    },
    /// There is nothing to continue.
    #[error("the prompt has no tokens")]
    Empty,
    /// A token that the model does not have.
    #[error("the prompt has the token {token}, and the model has {vocabulary} tokens")]
    Token {
        /// The token.
        token: u32,
        /// Tokens of the model.
        vocabulary: usize,
    },
    /// The model was made for fewer tokens.
    #[error("{prompt} tokens of the prompt and {answer} of the answer are more than the model's {positions} positions")]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Most tokens of the answer.
        answer: usize,
        /// Tokens that the model was made for.
        positions: usize,
    },
    /// Its keys and values would never fit.
    #[error("keys and values of {prompt} + {answer} tokens take {bytes} bytes, and there are {most} for all requests")]
    TooLarge {
        /// Tokens of the prompt.
        prompt: usize,
        /// Most tokens of the answer.
        answer: usize,
        /// Bytes of their keys and values.
        bytes: usize,
        /// Bytes that there are.
        most: usize,
    },
}

/// What an engine is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineCounts {
    /// Requests that wait.
    pub waiting: usize,
    /// Requests whose prompts are read or whose answers are made.
    pub running: usize,
    /// Bytes that the keys and values of those take at their longest: what [`EngineSettings::cache_bytes`] bounds.
    pub cache_bytes: usize,
    /// Bytes of keys and values of earlier prompts.
    pub prefix_bytes: usize,
    /// Tokens that were proposed, and those of them that were taken.
    pub speculated: Speculated,
    /// Passes since the start.
    pub passes: PassCounts,
    /// The most passes that were under way at once, where several processes hold the layers of the model.
    pub most_passes: usize,
}

/// How often tokens have gone through a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassCounts {
    /// Passes over parts of prompts.
    pub prompt_passes: u64,
    /// The parts of single prompts in them.
    pub prompt_parts: u64,
    /// Passes over the next tokens of answers.
    pub answer_passes: u64,
    /// The answers in them.
    pub answer_rows: u64,
    /// Passes of both kinds with requests of different adapters, or of the base and an adapter.
    pub mixed_passes: u64,
}

impl EngineSettings {
    /// Checks what can be known of a request before its turn.
    ///
    /// # Errors
    /// A [`Refusal`] that is not [`Refusal::QueueFull`].
    pub fn check(&self, model: &Model, prompt: &[u32], answer: usize) -> Result<(), Refusal> {
        let (vocabulary, positions) = (model.config.vocabulary, model.config.max_position_embeddings);
        if prompt.is_empty() {
            return Err(Refusal::Empty);
        }
        if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(Refusal::Token { token, vocabulary });
        }
        let (prompt, tokens) = (prompt.len(), prompt.len().saturating_add(answer));
        if tokens > positions {
            return Err(Refusal::TooLong { prompt, answer, positions });
        }
        match model.request_bytes(prompt, answer) {
            bytes if bytes > self.cache_bytes => {
                Err(Refusal::TooLarge { prompt, answer, bytes, most: self.cache_bytes })
            }
            _ => Ok(()),
        }
    }

    /// The most tokens that an answer to a prompt of so many tokens can have.
    pub fn longest_answer(&self, model: &Model, prompt: usize) -> usize {
        let fits = |tokens: usize| model.request_bytes(prompt, tokens.saturating_sub(prompt)) <= self.cache_bytes;
        let (mut tokens, mut most) = (0, model.config.max_position_embeddings);
        // Bytes never shrink with tokens.
        while tokens < most {
            let middle = most - (most - tokens) / 2;
            match fits(middle) {
                true => tokens = middle,
                false => most = middle - 1,
            }
        }
        tokens.saturating_sub(prompt)
    }
}

/// Answers requests, a step at a time.
pub struct Engine {
    settings: EngineSettings,
    waiting: VecDeque<Job>,
    /// Those whose prompts are read, in the order in which they have come.
    reading: Vec<Reading>,
    groups: Vec<Group>,
    prefixes: Prefixes,
    speculated: Speculated,
    passes: PassCounts,
    /// Requests that were taken.
    taken: u64,
    /// The passes that are under way, where several processes hold the layers.
    flights: Flights,
}

impl Engine {
    /// An engine without requests.
    pub fn new(settings: EngineSettings) -> Engine {
        Engine {
            settings,
            waiting: VecDeque::new(),
            reading: Vec::new(),
            groups: Vec::new(),
            prefixes: Prefixes::new(settings.prefix_bytes),
            speculated: Speculated::default(),
            passes: PassCounts::default(),
            taken: 0,
            flights: Flights::default(),
        }
    }

    /// Takes a request, behind those that wait. The listener is dropped if it is refused.
    ///
    /// # Errors
    /// A [`Refusal`].
    pub fn submit(&mut self, request: EngineRequest, listener: Box<dyn Listener>) -> Result<(), Refusal> {
        let EngineRequest { model, prompt, max_new_tokens, rules, end_ids, form } = request;
        self.settings.check(&model, &prompt, max_new_tokens)?;
        let counts = self.counts();
        if counts.waiting + counts.running >= self.settings.queue + self.settings.slots {
            return Err(Refusal::QueueFull { waiting: counts.waiting });
        }
        let (chooser, number) = (Chooser::new(rules, &prompt).with_form(form), self.taken);
        let lookup = Lookup::new(&prompt, self.settings.speculate.min(MOST_AHEAD));
        self.taken += 1;
        self.flights.may_be(model.passes_at_once());
        let (next, answered, is_left) = (0, 0, false);
        self.waiting.push_back(Job {
            model,
            prompt,
            max_new_tokens,
            chooser,
            lookup,
            end_ids,
            listener,
            next,
            answered,
            number,
            is_left,
        });
        Ok(())
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        let is_at_rest = self.reading.is_empty() && self.groups.is_empty() && self.flights.is_empty();
        self.waiting.is_empty() && is_at_rest
    }

    /// What it is doing.
    pub fn counts(&self) -> EngineCounts {
        let rows: usize = self.groups.iter().map(Group::len).sum();
        EngineCounts {
            waiting: self.waiting.len(),
            running: rows + self.being_read().count(),
            cache_bytes: self.bytes(),
            prefix_bytes: self.prefixes.bytes(),
            speculated: self.speculated,
            passes: self.passes,
            most_passes: self.flights.most(),
        }
    }

    /// The requests whose prompts are read, those whose last parts are under way first.
    fn being_read(&self) -> impl Iterator<Item = &Job> {
        self.flights.last_parts().chain(self.reading.iter().map(|reading| &reading.job))
    }

    /// Does a piece of the work: reads at most one part of one prompt, or several short ones in one pass, and makes
    /// one token of each answer, or more if it looks ahead. Requests that nobody waits for end first.
    ///
    /// Where several processes hold the layers, it begins as many passes as may be under way, and makes the tokens
    /// of the oldest.
    pub fn step(&mut self) {
        let gone = self.gone();
        self.step_without(&gone);
    }

    /// The requests that nobody waits for any more, by the order in which they were taken.
    pub fn gone(&self) -> Vec<u64> {
        let running = self.groups.iter().flat_map(Group::jobs);
        let jobs = self.waiting.iter().chain(self.reading.iter().map(|reading| &reading.job)).chain(running);
        jobs.filter(|job| job.is_gone()).map(|job| job.number).collect()
    }

    /// As [`Engine::step`], without these requests, whatever their listeners say. Engines that have taken the
    /// same requests and have done the same steps are in the same state.
    pub fn step_without(&mut self, gone: &[u64]) {
        self.leave(gone);
        if self.flights.at_once() > 1 {
            self.step_over_stages();
            return;
        }
        self.begin_next();
        // Requests have heard of an error.
        let _ = self.begin_parts().and_then(|parts| parts.map_or(Ok(()), |parts| self.finish_parts(parts)));
        for group in &mut self.groups {
            let Speculated { proposed, accepted } = group.step(&mut self.passes);
            self.speculated.proposed += proposed;
            self.speculated.accepted += accepted;
        }
        self.groups.retain(|group| group.len() > 0);
    }

    /// Forgets all prompts that were kept of a model, for which no request is under way. Prompts of a model that nobody
    /// holds any more are forgotten anyway; but each process drops it at a time of its own. Engines that are to stay in
    /// the same state hold their models until they forget them, before the same step.
    pub fn forget(&mut self, model: &Arc<Model>) {
        self.prefixes.forget(model);
    }

    fn leave(&mut self, gone: &[u64]) {
        self.prefixes.leave_unloaded();
        self.waiting.retain(|job| !gone.contains(&job.number));
        let is_gone = |reading: &Reading| gone.contains(&reading.job.number);
        let (gone_ones, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut self.reading).into_iter().partition(is_gone);
        self.reading = stay;
        gone_ones.into_iter().for_each(|reading| self.prefixes.put(&reading.job.model, reading.cache));
        self.groups.iter_mut().for_each(|group| group.leave(gone));
        self.groups.retain(|group| group.len() > 0);
    }
}

/// Whether a long text has other positions, so that all of it is read again when it becomes long
/// (LongRoPE). Such requests are continued alone, and nothing of them is kept.
fn is_read_again(model: &Model) -> bool {
    model.config.is_long(usize::MAX)
}
