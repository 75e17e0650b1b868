//! Requests of one model that are continued together.

use std::sync::Arc;

use rayon::prelude::*;

use super::{EngineEnd, EngineEvent, Listener, is_read_again};
use crate::decoder::cache::{KeyValueCache, RowsCache};
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::generate_rows::ROWS;
use crate::passes::lookup::{Lookup, Speculated};
use crate::passes::token_rules::{Chooser, ChosenToken};

/// A request, and what has become of it.
pub(super) struct Job {
    pub(super) model: Arc<Model>,
    pub(super) prompt: Vec<u32>,
    pub(super) max_new_tokens: usize,
    pub(super) chooser: Chooser,
    pub(super) lookup: Lookup,
    pub(super) end_ids: Vec<u32>,
    pub(super) listener: Box<dyn Listener>,
    /// The token that goes through the model next.
    pub(super) next: u32,
    /// Its number among all requests.
    pub(super) number: u64,
    /// Whether the listener has said that no more is wanted.
    pub(super) is_left: bool,
}

impl Job {
    /// Bytes of its keys and values at their longest.
    pub(super) fn bytes(&self) -> usize {
        self.model.row_bytes(self.prompt.len() + self.max_new_tokens)
    }

    /// Tells the listener of a new token, or that there is none. Returns whether the answer goes
    /// on.
    pub(super) fn take(&mut self, chosen: Result<ChosenToken, ModelError>) -> bool {
        let chosen = match chosen {
            Ok(chosen) => chosen,
            Err(error) => {
                self.fail(&error);
                return false;
            }
        };
        self.next = chosen.token;
        self.lookup.push(chosen.token);
        if self.end_ids.contains(&chosen.token) {
            self.listener.hear(EngineEvent::Ended(EngineEnd::EndToken(chosen.token)));
            return false;
        }
        self.tell(EngineEvent::Token(chosen));
        self.end_if_full()
    }

    /// Tells the listener, and remembers whether more is wanted.
    pub(super) fn tell(&mut self, event: EngineEvent) {
        self.is_left |= !self.listener.hear(event);
    }

    /// Whether nobody waits for the answer any more.
    pub(super) fn is_gone(&self) -> bool {
        self.is_left || self.listener.is_gone()
    }

    /// Ends the answer if no more tokens are allowed. Returns whether it goes on.
    pub(super) fn end_if_full(&mut self) -> bool {
        let is_full = self.chooser.chosen() >= self.max_new_tokens;
        if is_full {
            self.listener.hear(EngineEvent::Ended(EngineEnd::Length));
        }
        !is_full
    }

    fn fail(&mut self, error: &ModelError) {
        self.listener.hear(EngineEvent::Ended(EngineEnd::Failed(error.to_string())));
    }
}

enum Caches {
    Together(RowsCache),
    /// Of one request.
    Alone(KeyValueCache),
}

/// At most [`ROWS`] requests of one model.
pub(super) struct Group {
    model: Arc<Model>,
    jobs: Vec<Job>,
    caches: Caches,
}

impl Group {
    pub(super) fn new(job: Job, cache: KeyValueCache) -> Group {
        let caches = match is_read_again(&job.model) {
            true => Caches::Alone(cache),
            false => Caches::Together(RowsCache::join(vec![cache])),
        };
        Group { model: Arc::clone(&job.model), jobs: vec![job], caches }
    }

    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Whether a request of this model may join.
    pub(super) fn takes(&self, model: &Arc<Model>) -> bool {
        let has_place = matches!(self.caches, Caches::Together(_)) && self.jobs.len() < ROWS;
        has_place && Arc::ptr_eq(&self.model, model)
    }

    /// Bytes of keys and values at their longest, perhaps with one more request. All rows get the
    /// room of the longest.
    pub(super) fn bytes_with(&self, another: Option<&Job>) -> usize {
        let jobs = self.jobs.iter().chain(another);
        let longest = jobs.map(Job::bytes).max().unwrap_or(0);
        longest.saturating_mul(self.jobs.len() + usize::from(another.is_some()))
    }

    /// Lets a request join that has read its prompt.
    pub(super) fn add(&mut self, job: Job, cache: KeyValueCache) {
        if let Caches::Together(rows) = &mut self.caches {
            rows.add(cache);
            self.jobs.push(job);
        }
    }

    /// Makes one token of each answer, or perhaps several of the only one. Returns what was proposed.
    pub(super) fn step(&mut self) -> Speculated {
        if let ([job], Caches::Together(rows)) = (self.jobs.as_mut_slice(), &mut self.caches)
            && self.model.takes_back()
        {
            // One token at least is made anyway.
            let room = (job.max_new_tokens - job.chooser.chosen() - 1).min(ROWS - 1);
            let proposed = job.lookup.propose(room);
            if !proposed.is_empty() {
                let (goes_on, speculated) = step_ahead(&self.model, job, rows, &proposed);
                self.keep(&[goes_on]);
                return speculated;
            }
        }
        self.step_one();
        Speculated::default()
    }

    fn step_one(&mut self) {
        let tokens: Vec<u32> = self.jobs.iter().map(|job| job.next).collect();
        let logits = match &mut self.caches {
            Caches::Together(rows) => self.model.read_rows(&tokens, rows),
            Caches::Alone(cache) => self.model.read(&tokens, cache),
        };
        let logits = match logits {
            Ok(logits) => logits,
            Err(error) => {
                self.jobs.drain(..).for_each(|mut job| job.fail(&error));
                return;
            }
        };
        let of_rows = logits.par_chunks(logits.len() / tokens.len());
        let chosen: Vec<_> = self.jobs.par_iter_mut().zip(of_rows).map(|(job, row)| job.chooser.next(row)).collect();
        let goes_on: Vec<bool> = self.jobs.iter_mut().zip(chosen).map(|(job, chosen)| job.take(chosen)).collect();
        self.keep(&goes_on);
    }

    /// The requests.
    pub(super) fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// Ends the requests with these numbers.
    pub(super) fn leave(&mut self, gone: &[u64]) {
        let stays: Vec<bool> = self.jobs.iter().map(|job| !gone.contains(&job.number)).collect();
        self.keep(&stays);
    }

    fn keep(&mut self, stays: &[bool]) {
        let rows: Vec<usize> = (0..stays.len()).filter(|&row| stays[row]).collect();
        if rows.len() == stays.len() {
            return;
        }
        let mut stays = stays.iter();
        self.jobs.retain(|_| stays.next().is_some_and(|stays| *stays));
        if let Caches::Together(caches) = &mut self.caches
            && !rows.is_empty()
        {
            caches.keep_and_shrink(&rows);
        }
    }
}

/// Lets a token and those that were proposed behind it go through the model, and takes tokens as long as they are the
/// proposed ones. Each is chosen from the logits that it has without proposals. Returns whether the answer goes on.
fn step_ahead(model: &Model, job: &mut Job, rows: &mut RowsCache, proposed: &[u32]) -> (bool, Speculated) {
    let tokens = [&[job.next], proposed].concat();
    let logits = match model.read_ahead(&tokens, rows) {
        Ok(logits) => logits,
        Err(error) => {
            job.fail(&error);
            return (false, Speculated::default());
        }
    };
    let (mut accepted, mut goes_on) = (0, true);
    for logits in logits.chunks(logits.len() / tokens.len()) {
        let chosen = job.chooser.next(logits);
        goes_on = job.take(chosen);
        // The listener hears nothing more once it has left.
        if !goes_on || job.is_left || proposed.get(accepted) != Some(&job.next) {
            break;
        }
        accepted += 1;
    }
    rows.forget_last(proposed.len() - accepted);
    job.lookup.judge(proposed.len(), accepted);
    (goes_on, Speculated { proposed: proposed.len() as u64, accepted: accepted as u64 })
}
