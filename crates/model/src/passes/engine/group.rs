//! Requests that are continued together: of one model, or of models that share passes.

use std::sync::Arc;

use rayon::prelude::*;

use super::{EngineEnd, EngineEvent, Listener, PassCounts, is_read_again};
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

    pub(super) fn fail(&mut self, error: &ModelError) {
        self.listener.hear(EngineEvent::Ended(EngineEnd::Failed(error.to_string())));
    }
}

enum Caches {
    Together(RowsCache),
    /// Of one request.
    Alone(KeyValueCache),
}

/// At most [`ROWS`] requests of models that share passes. Those of one model lie next to each other.
pub(super) struct Group {
    jobs: Vec<Job>,
    caches: Caches,
}

impl Group {
    pub(super) fn new(job: Job, cache: KeyValueCache) -> Group {
        let caches = match is_read_again(&job.model) {
            true => Caches::Alone(cache),
            false => Caches::Together(RowsCache::join(vec![cache])),
        };
        Group { jobs: vec![job], caches }
    }

    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Whether a request of this model may join.
    pub(super) fn takes(&self, model: &Arc<Model>) -> bool {
        let has_place = matches!(self.caches, Caches::Together(_)) && self.jobs.len() < ROWS;
        has_place && self.jobs.first().is_some_and(|job| share(&job.model, model))
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
            let last = self.jobs.iter().rposition(|other| Arc::ptr_eq(&other.model, &job.model));
            let at = last.map_or(self.jobs.len(), |last| last + 1);
            rows.insert(cache, at);
            self.jobs.insert(at, job);
        }
    }

    /// Makes one token of each answer, or perhaps several of the only one. Counts the pass, and returns what was
    /// proposed.
    pub(super) fn step(&mut self, passes: &mut PassCounts) -> Speculated {
        passes.answer_passes += 1;
        passes.answer_rows += self.jobs.len() as u64;
        passes.mixed_passes += u64::from(self.is_mixed());
        if let ([job], Caches::Together(rows)) = (self.jobs.as_mut_slice(), &mut self.caches)
            && job.model.takes_back()
        {
            // One token at least is made anyway.
            let room = (job.max_new_tokens - job.chooser.chosen() - 1).min(ROWS - 1);
            let proposed = job.lookup.propose(room);
            if !proposed.is_empty() {
                let model = Arc::clone(&job.model);
                let (goes_on, speculated) = step_ahead(&model, job, rows, &proposed);
                self.keep(&[goes_on]);
                return speculated;
            }
        }
        self.step_one();
        Speculated::default()
    }

    /// Whether its requests have different models.
    fn is_mixed(&self) -> bool {
        self.jobs.windows(2).any(|jobs| !Arc::ptr_eq(&jobs[0].model, &jobs[1].model))
    }

    fn step_one(&mut self) {
        let is_mixed = self.is_mixed();
        let tokens: Vec<u32> = self.jobs.iter().map(|job| job.next).collect();
        let models: Vec<&Arc<Model>> = self.jobs.iter().map(|job| &job.model).collect();
        let logits = match &mut self.caches {
            Caches::Together(rows) if is_mixed => Model::read_mixed_rows(&models, &tokens, rows),
            Caches::Together(rows) => models[0].read_rows(&tokens, rows, None),
            Caches::Alone(cache) => models[0].read(&tokens, cache),
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

/// Whether requests of two models may be answered in one pass.
pub(super) fn share(one: &Arc<Model>, other: &Arc<Model>) -> bool {
    Arc::ptr_eq(one, other) || one.shares_passes_with(other)
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
