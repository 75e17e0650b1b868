//! Answers to many requests at a time: continuous batching.
//!
//! Owns: which request is read, which are continued together, and the memory of their keys and
//! values. Must never know: text, connections, threads. Start reading at [`Engine::step`].
//!
//! **On the CPU an answer does not depend on what else is under way.** Prompts are read alone, in
//! parts of 512 tokens that always begin at the same places. At most eight rows are continued in
//! one pass, and products of up to eight rows have one order of sums (see `generate_rows`). What
//! was read of an earlier prompt is used again where that changes no bit (see `prefixes`).
//!
//! An answer that is alone may look ahead: tokens that followed the last ones before are proposed, and go through
//! the model with the next one (see `lookup`). They are taken as long as they are what is chosen anyway.
//!
//! Where several processes hold the layers, as many passes are under way as there are processes (see `over_stages`).

mod group;
mod over_stages;
mod prefixes;

use std::collections::VecDeque;
use std::sync::Arc;

use thiserror::Error;

use self::group::{Group, Job};
use self::over_stages::{Flights, Part, begin_alike};
use self::prefixes::Prefixes;
use crate::decoder::cache::KeyValueCache;
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::form::Form;
use crate::passes::generate::PROMPT_PART;
use crate::passes::generate_rows::MOST_AHEAD;
use crate::passes::lookup::{Lookup, Speculated};
use crate::passes::token_rules::{Chooser, ChosenToken, TokenRules};

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
    /// The model with its adapter. Requests of the same one are continued together.
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
    /// Bytes of keys and values of earlier prompts.
    pub prefix_bytes: usize,
    /// Tokens that were proposed, and those of them that were taken.
    pub speculated: Speculated,
    /// The most passes that were under way at once, where several processes hold the layers of the model.
    pub most_passes: usize,
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
        match model.row_bytes(tokens) {
            bytes if bytes > self.cache_bytes => {
                Err(Refusal::TooLarge { prompt, answer, bytes, most: self.cache_bytes })
            }
            _ => Ok(()),
        }
    }

    /// The most tokens that an answer to a prompt of so many tokens can have.
    pub fn longest_answer(&self, model: &Model, prompt: usize) -> usize {
        let mut tokens = model.config.max_position_embeddings;
        while tokens > prompt && model.row_bytes(tokens) > self.cache_bytes {
            // Bytes grow by powers of two.
            tokens = tokens.next_power_of_two() / 2;
        }
        tokens.saturating_sub(prompt)
    }
}

/// A request whose prompt is read.
struct Reading {
    job: Job,
    cache: KeyValueCache,
    end: usize,
}

/// Answers requests, a step at a time.
pub struct Engine {
    settings: EngineSettings,
    waiting: VecDeque<Job>,
    reading: Option<Reading>,
    groups: Vec<Group>,
    prefixes: Prefixes,
    speculated: Speculated,
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
            reading: None,
            groups: Vec::new(),
            prefixes: Prefixes::new(settings.prefix_bytes),
            speculated: Speculated::default(),
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
        let (next, is_left) = (0, false);
        self.waiting.push_back(Job {
            model,
            prompt,
            max_new_tokens,
            chooser,
            lookup,
            end_ids,
            listener,
            next,
            number,
            is_left,
        });
        Ok(())
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.reading.is_none() && self.groups.is_empty() && self.flights.is_empty()
    }

    /// What it is doing.
    pub fn counts(&self) -> EngineCounts {
        let rows: usize = self.groups.iter().map(Group::len).sum();
        EngineCounts {
            waiting: self.waiting.len(),
            running: rows + self.being_read().count(),
            prefix_bytes: self.prefixes.bytes(),
            speculated: self.speculated,
            most_passes: self.flights.most(),
        }
    }

    /// The requests whose prompts are read, the one whose parts are begun last.
    fn being_read(&self) -> impl Iterator<Item = &Job> {
        self.flights.last_parts().chain(self.reading.as_ref().map(|reading| &reading.job))
    }

    /// Does a piece of the work: reads at most one part of one prompt, and makes one token of each
    /// answer, or more if it looks ahead. Requests that nobody waits for end first.
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
        let jobs = self.waiting.iter().chain(self.reading.as_ref().map(|reading| &reading.job)).chain(running);
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
        if let Some(reading) = self.reading.take() {
            // The request has heard of an error.
            let _ = self.begin_part(reading).and_then(|part| self.finish_part(part));
        }
        for group in &mut self.groups {
            let Speculated { proposed, accepted } = group.step();
            self.speculated.proposed += proposed;
            self.speculated.accepted += accepted;
        }
        self.groups.retain(|group| group.len() > 0);
    }

    fn leave(&mut self, gone: &[u64]) {
        self.prefixes.leave_unloaded();
        self.waiting.retain(|job| !gone.contains(&job.number));
        if let Some(Reading { job, cache, .. }) = self.reading.take_if(|reading| gone.contains(&reading.job.number)) {
            self.prefixes.put(&job.model, cache);
        }
        self.groups.iter_mut().for_each(|group| group.leave(gone));
        self.groups.retain(|group| group.len() > 0);
    }

    /// Lets the first of the waiting requests begin, if there is room for it.
    fn begin_next(&mut self) {
        while self.reading.is_none() && self.counts().running < self.settings.slots {
            let may_begin =
                |job: &Job| self.has_room(job) && !self.flights.last_parts().any(|other| begin_alike(other, job));
            let fits = self.waiting.front().is_some_and(may_begin);
            let Some(mut job) = fits.then(|| self.waiting.pop_front()).flatten() else { return };
            let cache = match is_read_again(&job.model) {
                true => KeyValueCache::default(),
                false => self.prefixes.take(&job.model, &job.prompt),
            };
            job.tell(EngineEvent::Begun { cached: cache.tokens().len() });
            match job.end_if_full() {
                true => self.reading = Some(Reading { end: cache.tokens().len(), job, cache }),
                false => self.prefixes.put(&job.model, cache),
            }
        }
    }

    /// Whether the keys and values of a request fit beside those of the running ones. One request
    /// alone always fits.
    fn has_room(&self, job: &Job) -> bool {
        if let Some(longest) = self.being_read().map(Job::bytes).max() {
            // Nobody knows yet which group those join that are read: each row may get the room of the longest.
            let of_groups =
                self.groups.iter().map(|group| group.bytes_with(None).checked_div(group.len()).unwrap_or(0));
            let longest = of_groups.chain([longest, job.bytes()]).max().unwrap_or(0);
            return longest.saturating_mul(self.counts().running + 1) <= self.settings.cache_bytes;
        }
        let place = self.place_of(&job.model);
        let mut bytes = if place.is_none() { job.bytes() } else { 0 };
        for (n, group) in self.groups.iter().enumerate() {
            bytes += group.bytes_with((place == Some(n)).then_some(job));
        }
        self.groups.is_empty() || bytes <= self.settings.cache_bytes
    }

    /// The group that a request joins: the first with a place. Where several passes may be under way, a request has
    /// a group of its own until there are so many, and joins the smallest then.
    fn place_of(&self, model: &Arc<Model>) -> Option<usize> {
        let mut takes = (0..self.groups.len()).filter(|&n| self.groups[n].takes(model));
        match self.flights.at_once() {
            1 => takes.next(),
            at_once if self.groups.len() < at_once => None,
            _ => takes.min_by_key(|&n| self.groups[n].len()),
        }
    }

    /// Begins to read the next part of the prompt whose turn it is. The request hears of an error.
    fn begin_part(&mut self, mut reading: Reading) -> Result<Part, ModelError> {
        let (begin, length) = (reading.end, reading.job.prompt.len());
        reading.end = length.min(begin - begin % PROMPT_PART + PROMPT_PART);
        let is_last = reading.end == length;
        let Reading { job, cache, end } = &mut reading;
        if is_last && job.model.has_states() {
            // A state cannot go back, so it is kept where the last whole part ends.
            self.prefixes.put(&job.model, cache.clone());
        }
        let model = Arc::clone(&job.model);
        let said = match model.begin_read(&job.prompt[begin..*end], cache) {
            Ok(said) => said,
            Err(error) => {
                job.fail(&error);
                return Err(error);
            }
        };
        if is_last {
            return Ok(Part { model, said, last: Some(reading) });
        }
        self.reading = Some(reading);
        Ok(Part { model, said, last: None })
    }

    /// Waits for a part. Behind the last one comes the first token. The request hears of an error.
    fn finish_part(&mut self, Part { model, said, last }: Part) -> Result<(), ModelError> {
        let logits = model.logits_of(said);
        let Some(Reading { mut job, cache, .. }) = last else { return logits.map(drop) };
        let logits = match logits {
            Ok(logits) => logits,
            Err(error) => {
                job.fail(&error);
                return Err(error);
            }
        };
        if !model.has_states() && !is_read_again(&model) {
            self.prefixes.put(&model, cache.clone());
        }
        let prompt = job.prompt.clone();
        self.answer(job, cache.clone(), &logits);
        // Requests of the same prompt behind this one go on from here.
        while let Some(mut job) = self.next_of(&model, &prompt) {
            job.tell(EngineEvent::Begun { cached: prompt.len() });
            if job.end_if_full() {
                self.answer(job, cache.clone(), &logits);
            }
        }
        Ok(())
    }

    /// The first of the waiting requests, if it has this prompt and there is room for it.
    fn next_of(&mut self, model: &Arc<Model>, prompt: &[u32]) -> Option<Job> {
        let has_slot = self.counts().running < self.settings.slots;
        let fits = |job: &Job| has_slot && Arc::ptr_eq(&job.model, model) && job.prompt == prompt && self.has_room(job);
        let fits = self.waiting.front().is_some_and(fits);
        fits.then(|| self.waiting.pop_front()).flatten()
    }

    /// Chooses the first token of an answer, from the logits behind its prompt.
    fn answer(&mut self, mut job: Job, cache: KeyValueCache, logits: &[f32]) {
        let chosen = job.chooser.next(logits);
        if job.take(chosen) {
            match self.place_of(&job.model) {
                Some(place) => self.groups[place].add(job, cache),
                None => self.groups.push(Group::new(job, cache)),
            }
        }
    }
}

/// Whether a long text has other positions, so that all of it is read again when it becomes long
/// (LongRoPE). Such requests are continued alone, and nothing of them is kept.
fn is_read_again(model: &Model) -> bool {
    model.config.is_long(usize::MAX)
}
