//! Requests that are continued together: of one model, or of models that share passes.

use std::sync::Arc;

use rayon::prelude::*;

use super::{EngineEnd, EngineEvent, Listener, PassCounts, is_read_again};
use crate::decoder::cache::{KeyValueCache, RowsCache};
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::choices::{Choice, Chosen};
use crate::passes::generate_ahead::chosen_ahead;
use crate::passes::generate_rows::MOST_AHEAD;
use crate::passes::lookup::{Lookup, Speculated};
use crate::passes::token_rules::{Chooser, ChosenToken};

/// A request, and what has become of it.
pub(super) struct Job {
    pub(super) model: Arc<Model>,
    pub(super) prompt: Vec<u32>,
    pub(super) max_new_tokens: usize,
    /// Chooses its tokens, on the process that has the logits. That of any other stays as it was.
    pub(super) chooser: Chooser,
    pub(super) lookup: Lookup,
    pub(super) end_ids: Vec<u32>,
    pub(super) listener: Box<dyn Listener>,
    /// The token that goes through the model next.
    pub(super) next: u32,
    /// Tokens of the answer so far.
    pub(super) answered: usize,
    /// Its number among all requests.
    pub(super) number: u64,
    /// Whether the listener has said that no more is wanted.
    pub(super) is_left: bool,
}

impl Job {
    /// Bytes of its keys and values at their longest, once its prompt is read.
    pub(super) fn bytes(&self) -> usize {
        self.model.row_bytes(self.prompt.len() + self.max_new_tokens)
    }

    /// The same from when its prompt is read on.
    pub(super) fn bytes_from_prompt(&self) -> usize {
        self.model.request_bytes(self.prompt.len(), self.max_new_tokens)
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
        self.answered += 1;
        self.lookup.push(chosen.token);
        if self.end_ids.contains(&chosen.token) {
            self.tell(EngineEvent::Ended(EngineEnd::EndToken(chosen.token)));
            return false;
        }
        self.tell(EngineEvent::Token(chosen));
        self.end_if_full()
    }

    /// Tells the listener, and remembers whether more is wanted. One that wants no more hears no more: a pass may
    /// still be under way.
    pub(super) fn tell(&mut self, event: EngineEvent) {
        if !self.is_left {
            self.is_left = !self.listener.hear(event);
        }
    }

    /// Whether nobody waits for the answer any more.
    pub(super) fn is_gone(&self) -> bool {
        self.is_left || self.listener.is_gone()
    }

    /// Ends the answer if no more tokens are allowed. Returns whether it goes on.
    pub(super) fn end_if_full(&mut self) -> bool {
        let is_full = self.answered >= self.max_new_tokens;
        if is_full {
            self.tell(EngineEvent::Ended(EngineEnd::Length));
        }
        !is_full
    }

    /// Whether it hears what the model thinks of its prompt, which is read alone then, and as a whole.
    pub(super) fn is_scored(&self) -> bool {
        self.chooser.of_prompt().is_some()
    }

    /// Chooses the next token from its logits.
    pub(super) fn choose(&mut self, logits: &[f32]) -> Choice {
        Some(self.chooser.next(logits))
    }

    /// Tells the listener that the model failed.
    pub(super) fn fail(&mut self, error: &ModelError) {
        self.tell(EngineEvent::Ended(EngineEnd::Failed(error.to_string())));
    }
}

enum Caches {
    Together(RowsCache),
    /// Of one request.
    Alone(KeyValueCache),
}

/// A pass that was begun.
struct Pass {
    /// The model that it goes through, or one of those that share it.
    model: Arc<Model>,
    chosen: Chosen,
    /// The numbers of the requests that are in it, in the order of its rows. Others may have joined between them
    /// since; none of them leaves before it is over.
    numbers: Vec<u64>,
    /// Tokens that were proposed.
    proposed: Vec<u32>,
}

/// At most [`Model::most_rows`] requests of models that share passes. Those of one model lie next to each other.
pub(super) struct Group {
    jobs: Vec<Job>,
    caches: Caches,
    /// The pass that is under way. Its keys and values are in the caches already.
    pass: Option<Pass>,
    /// The number of the last pass among all of the engine. 0: there was none.
    begun: u64,
}

impl Group {
    pub(super) fn new(job: Job, cache: KeyValueCache) -> Group {
        let caches = match is_read_again(&job.model) {
            true => Caches::Alone(cache),
            false => Caches::Together(RowsCache::join(vec![cache])),
        };
        Group { jobs: vec![job], caches, pass: None, begun: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    /// The number of the last pass that was begun.
    pub(super) fn begun(&self) -> u64 {
        self.begun
    }

    /// Whether a pass is under way.
    pub(super) fn is_under_way(&self) -> bool {
        self.pass.is_some()
    }

    /// Whether its requests share passes with those of this model.
    pub(super) fn shares_with(&self, model: &Arc<Model>) -> bool {
        self.jobs.first().is_some_and(|job| share(&job.model, model))
    }

    /// Whether a request of this model may join. Proposed tokens may have to be taken back, in all rows.
    pub(super) fn takes(&self, model: &Arc<Model>) -> bool {
        let has_place = matches!(self.caches, Caches::Together(_)) && self.jobs.len() < model.most_rows();
        has_place && self.shares_with(model) && self.pass.as_ref().is_none_or(|pass| pass.proposed.is_empty())
    }

    /// The requests that become a group of their own, so that two passes go one behind the other; `None`: there is
    /// only one request, or a pass is under way. Their keys and values are copied.
    pub(super) fn split(&mut self) -> Option<Group> {
        let (Caches::Together(caches), None) = (&mut self.caches, &self.pass) else { return None };
        let (all, stay) = (self.jobs.len(), self.jobs.len().div_ceil(2));
        if stay == all {
            return None;
        }
        let others = Caches::Together(caches.part(&(stay..all).collect::<Vec<_>>()));
        caches.keep_and_shrink(&(0..stay).collect::<Vec<_>>());
        let jobs = self.jobs.split_off(stay);
        Some(Group { jobs, caches: others, pass: None, begun: self.begun })
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
        self.begin(0, true, passes).and_then(|()| self.finish()).unwrap_or_else(|error| {
            self.fail(&error);
            Speculated::default()
        })
    }

    /// Whether its requests have different models.
    fn is_mixed(&self) -> bool {
        self.jobs.windows(2).any(|jobs| !Arc::ptr_eq(&jobs[0].model, &jobs[1].model))
    }

    /// Begins the next pass, which has this number, and counts it. `looks_ahead`: an only answer may get several
    /// tokens of it.
    pub(super) fn begin(&mut self, number: u64, looks_ahead: bool, passes: &mut PassCounts) -> Result<(), ModelError> {
        let is_mixed = self.is_mixed();
        let proposed = if looks_ahead { self.proposed() } else { Vec::new() };
        let tokens: Vec<u32> = self.jobs.iter().map(|job| job.next).chain(proposed.iter().copied()).collect();
        let models: Vec<Arc<Model>> = self.jobs.iter().map(|job| Arc::clone(&job.model)).collect();
        let Some(model) = models.first() else { return Ok(()) };
        passes.answer_passes += 1;
        passes.answer_rows += self.jobs.len() as u64;
        passes.mixed_passes += u64::from(is_mixed);
        let logits = match &mut self.caches {
            Caches::Together(rows) if !proposed.is_empty() => model.begin_ahead(&tokens, rows)?,
            Caches::Together(rows) if is_mixed => Model::begin_mixed_rows(&models, &tokens, rows)?,
            Caches::Together(rows) => model.begin_rows(&tokens, rows, None)?,
            Caches::Alone(cache) => model.begin_read(&tokens, cache)?,
        };
        let chosen = self.choose(model, logits.as_deref(), &proposed)?;
        let (model, numbers) = (Arc::clone(model), self.jobs.iter().map(|job| job.number).collect());
        self.begun = number;
        self.pass = Some(Pass { model, chosen, numbers, proposed });
        Ok(())
    }

    /// Chooses a token of each answer, or several of the only one: each from the logits that it has without proposals.
    fn choose(&mut self, model: &Model, logits: Option<&[f32]>, proposed: &[u32]) -> Result<Chosen, ModelError> {
        let jobs = &mut self.jobs;
        let mut rows: Vec<Option<usize>> = jobs.iter().map(|job| job.chooser.logprobs()).collect();
        if proposed.is_empty() {
            return model.choose(logits, rows, |logits| {
                let of_rows = logits.par_chunks(logits.len() / jobs.len());
                jobs.par_iter_mut().zip(of_rows).map(|(job, row)| job.choose(row)).collect()
            });
        }
        rows.resize(1 + proposed.len(), rows[0]);
        model.choose(logits, rows, |logits| chosen_ahead(proposed, logits, |_, logits| jobs[0].chooser.next(logits)))
    }

    /// What may come behind the next token, if there is only one answer.
    fn proposed(&self) -> Vec<u32> {
        match (self.jobs.as_slice(), &self.caches) {
            ([job], Caches::Together(_)) if job.model.takes_back() => {
                // One token at least is made anyway.
                let room = (job.max_new_tokens - job.answered - 1).min(MOST_AHEAD);
                job.lookup.propose(room)
            }
            _ => Vec::new(),
        }
    }

    /// Waits for the pass that is under way, and takes its tokens. Returns what was proposed.
    pub(super) fn finish(&mut self) -> Result<Speculated, ModelError> {
        let Some(Pass { model, chosen, numbers, proposed }) = self.pass.take() else {
            return Ok(Speculated::default());
        };
        let choices = model.taken(chosen)?;
        if !proposed.is_empty() {
            return Ok(self.take_ahead(choices, &proposed));
        }
        // Those that have joined since have their first tokens already.
        let jobs = self.jobs.iter_mut().filter(|job| numbers.contains(&job.number));
        let ended = |(job, chosen): (&mut Job, Choice)| (!job.take(chosen?)).then_some(job.number);
        let ended: Vec<u64> = jobs.zip(choices).filter_map(ended).collect();
        self.remove(&ended);
        Ok(Speculated::default())
    }

    /// Takes tokens of the only answer as long as they are the proposed ones.
    fn take_ahead(&mut self, choices: Vec<Choice>, proposed: &[u32]) -> Speculated {
        let ([job], Caches::Together(rows)) = (self.jobs.as_mut_slice(), &mut self.caches) else {
            return Speculated::default();
        };
        let (mut accepted, mut goes_on) = (0, true);
        for chosen in choices.into_iter().flatten() {
            goes_on = job.take(chosen);
            // A listener that has left hears nothing more, and only the first process knows that it has.
            if !goes_on || proposed.get(accepted) != Some(&job.next) {
                break;
            }
            accepted += 1;
        }
        rows.forget_last(proposed.len() - accepted);
        job.lookup.judge(proposed.len(), accepted);
        if !goes_on {
            self.jobs.clear();
        }
        Speculated { proposed: proposed.len() as u64, accepted: accepted as u64 }
    }

    /// Ends all answers, as the model failed.
    pub(super) fn fail(&mut self, error: &ModelError) {
        self.pass = None;
        self.jobs.drain(..).for_each(|mut job| job.fail(error));
    }

    /// Drops the pass that is under way. Returns its model and what it has come to, if it is.
    pub(super) fn leave_pass(&mut self) -> Option<(Arc<Model>, Chosen)> {
        self.pass.take().map(|pass| (pass.model, pass.chosen))
    }

    /// Takes in what was chosen in the pass that is under way, before it is needed.
    pub(super) fn hear(&mut self) -> Result<(), ModelError> {
        self.pass.as_mut().map_or(Ok(()), |pass| pass.model.hear(&mut pass.chosen))
    }

    /// The requests.
    pub(super) fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// Ends the requests with these numbers. Those whose pass is under way stay until it is over.
    pub(super) fn leave(&mut self, gone: &[u64]) {
        if self.is_under_way() {
            return;
        }
        self.remove(gone);
    }

    /// Takes out the requests with these numbers.
    fn remove(&mut self, numbers: &[u64]) {
        let is_out = |job: &Job| numbers.contains(&job.number);
        let stay: Vec<usize> = (0..self.jobs.len()).filter(|&row| !is_out(&self.jobs[row])).collect();
        if stay.len() == self.jobs.len() {
            return;
        }
        self.jobs.retain(|job| !is_out(job));
        if let Caches::Together(caches) = &mut self.caches
            && !stay.is_empty()
        {
            caches.keep_and_shrink(&stay);
        }
    }
}

/// Whether requests of two models may be answered in one pass.
pub(super) fn share(one: &Arc<Model>, other: &Arc<Model>) -> bool {
    Arc::ptr_eq(one, other) || one.shares_passes_with(other)
}
