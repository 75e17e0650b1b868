//! Prompts whose turn it is: which of them are read in one pass, and what comes behind them.
//!
//! Without several processes a pass is finished as soon as it is begun. With them, others are begun before (see
//! `over_stages`).

use std::ops::Range;
use std::sync::Arc;

use super::group::{Group, Job, share};
use super::prefixes::{fresh, known_behind};
use super::{Engine, EngineEvent};
use crate::decoder::cache::KeyValueCache;
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::choices::{Choice, Chosen};
use crate::passes::generate::PROMPT_PART;
use crate::passes::sharing::PromptPart;
use crate::passes::token_rules::ChosenToken;

/// A request whose prompt is read.
pub(super) struct Reading {
    pub(super) job: Job,
    pub(super) cache: KeyValueCache,
    /// The tokens that are read or were known.
    end: usize,
}

/// A pass over parts of prompts that was begun.
pub(super) struct Parts {
    /// The model that it goes through, or one of those that share it.
    pub(super) model: Arc<Model>,
    /// The first token of each answer whose prompt is read to its end, behind what is thought of the tokens of a prompt.
    pub(super) chosen: Chosen,
    scored: Scored,
    /// The logits behind each part, if this process has them.
    logits: Option<Vec<f32>>,
    /// Of each part the request, if it is the last part of its prompt.
    pub(super) last: Vec<Option<Reading>>,
}

/// How many tokens of a prompt a pass tells what is thought of.
#[derive(Clone, Copy, Default)]
struct Scored {
    /// The number of the request.
    request: u64,
    tokens: usize,
    /// So many of the likeliest tokens are told with each.
    top: usize,
}

/// The part of a prompt of so many tokens that is read next, behind those before `begin`.
fn next_part(begin: usize, length: usize) -> Range<usize> {
    begin..length.min(begin - begin % PROMPT_PART + PROMPT_PART)
}

impl Job {
    /// What a pass over this part of the prompt tells: of each token behind one of the part.
    fn scored_in(&self, part: &Range<usize>) -> Scored {
        let targets = part.len().min(self.prompt.len() - 1 - part.start);
        let scored = |top| Scored { request: self.number, tokens: targets, top };
        self.chooser.of_prompt().map(scored).unwrap_or_default()
    }
}

impl Reading {
    fn next_part(&self) -> Range<usize> {
        next_part(self.end, self.job.prompt.len())
    }

    fn is_read(&self) -> bool {
        self.end == self.job.prompt.len()
    }

    /// Whether its next part may be read in one pass with a part of so many tokens of another model.
    fn may_share(&self, model: &Arc<Model>, tokens: usize) -> bool {
        let own = &self.job.model;
        let are_long = || self.next_part().len() > own.shares_above() && tokens > model.shares_above();
        !self.job.is_scored() && share(own, model) && own.reads_together() && model.reads_together() && are_long()
    }
}

impl Engine {
    /// Lets the first of the waiting requests begin, if there is room for them and their prompts can be read in one
    /// pass. None overtakes another.
    pub(super) fn begin_next(&mut self) {
        while self.counts().running < self.settings.slots {
            let begins = self.waiting.front().is_some_and(|job| self.may_begin(job) && self.has_room(job));
            let Some(mut job) = begins.then(|| self.waiting.pop_front()).flatten() else { return };
            let cache = match job.is_scored() {
                true => fresh(&job.model),
                false => self.prefixes.take(&job.model, &job.prompt),
            };
            job.tell(EngineEvent::Begun { cached: cache.tokens().len() });
            match job.is_scored() || job.end_if_full() {
                true => self.reading.push(Reading { end: cache.tokens().len(), job, cache }),
                false => self.prefixes.put(&job.model, cache),
            }
        }
    }

    /// Whether no prompt is read, or the next parts of all and of this request's make a part together. Where several
    /// processes hold the layers, prompts whose last parts are under way may be followed, and no pass is shared.
    fn may_begin(&self, job: &Job) -> bool {
        if self.being_read().next().is_none() {
            return true;
        }
        if job.is_scored() {
            return self.reading.is_empty();
        }
        let known = self.prefixes.known(&job.model, &job.prompt);
        // A prompt that begins as another one waits for it, if it knows more then.
        let waits_for = |other: &Job| {
            let is_same = Arc::ptr_eq(&other.model, &job.model);
            let knows_more = || known_behind(&job.model, &other.prompt, &job.prompt) > known;
            is_same && (other.prompt == job.prompt || knows_more())
        };
        if self.being_read().any(waits_for) {
            return false;
        }
        let own = next_part(known, job.prompt.len()).len();
        let all: usize = self.reading.iter().map(|reading| reading.next_part().len()).sum();
        let share = || {
            let is_one_part = self.flights.at_once() == 1 && all + own <= PROMPT_PART;
            is_one_part && self.reading.iter().all(|other| other.may_share(&job.model, own))
        };
        self.reading.is_empty() || share()
    }

    /// Whether the keys and values of a request fit beside those of the running ones, in rooms of their own. One
    /// request alone always fits.
    fn has_room(&self, job: &Job) -> bool {
        let is_alone = self.groups.is_empty() && self.being_read().next().is_none();
        is_alone || self.bytes().saturating_add(job.bytes_from_prompt()) <= self.settings.cache_bytes
    }

    /// Bytes of keys and values of the running requests at their longest.
    pub(super) fn bytes(&self) -> usize {
        let of_groups = self.groups.iter().map(|group| group.bytes_with(None));
        of_groups.chain(self.being_read().map(Job::bytes_from_prompt)).fold(0, usize::saturating_add)
    }

    /// The group that a request joins, the first with a place: all of its rows get the room of the longest, which has
    /// to fit. Where several passes may be under way, a request has a group of its own until there are so many, and
    /// joins the smallest then.
    fn place_of(&self, job: &Job) -> Option<usize> {
        let all = self.bytes();
        let fits = |&n: &usize| {
            let group = &self.groups[n];
            let more = group.bytes_with(Some(job)).saturating_sub(group.bytes_with(None));
            group.takes(&job.model) && all.saturating_add(more) <= self.settings.cache_bytes
        };
        let mut places = (0..self.groups.len()).filter(fits);
        match self.flights.at_once() {
            1 => places.next(),
            at_once if self.groups.len() < at_once => None,
            _ => places.min_by_key(|&n| self.groups[n].len()),
        }
    }

    /// Begins to read the next part of the prompt whose turn it is, and in the same pass those of the ones behind it
    /// that share passes with it. `None`: no prompt is read. The requests hear of an error.
    pub(super) fn begin_parts(&mut self) -> Result<Option<Parts>, ModelError> {
        let count = self.reads_together();
        let Some(first) = self.reading.first() else { return Ok(None) };
        let model = Arc::clone(&first.job.model);
        let is_mixed = self.reading[..count].iter().any(|other| !Arc::ptr_eq(&other.job.model, &model));
        self.passes.prompt_passes += 1;
        self.passes.prompt_parts += count as u64;
        self.passes.mixed_passes += u64::from(is_mixed);
        let mut scored = Scored::default();
        let read = match &mut self.reading[..count] {
            [Reading { job, cache, end }] => {
                let part = next_part(*end, job.prompt.len());
                *end = part.end;
                if *end == job.prompt.len() && model.has_states() {
                    // A state cannot go back, so it is kept where the last whole part ends.
                    self.prefixes.put(&job.model, cache.clone());
                }
                scored = job.scored_in(&part);
                read_part(&model, job, part, cache)
            }
            several => {
                let parts = several.iter_mut().map(|Reading { job, cache, end }| {
                    let (job, part): (&Job, _) = (job, next_part(*end, job.prompt.len()));
                    *end = part.end;
                    PromptPart { model: &job.model, tokens: &job.prompt[part], cache }
                });
                Model::begin_parts(&mut parts.collect::<Vec<_>>()).map(|logits| (logits, Vec::new()))
            }
        };
        let (logits, scores) = match read {
            Ok(read) => read,
            Err(error) => {
                self.reading.drain(..count).for_each(|mut reading| reading.job.fail(&error));
                return Err(error);
            }
        };
        let (mut last, mut place) = (Vec::with_capacity(count), 0);
        for _ in 0..count {
            let is_read = self.reading[place].is_read();
            last.push(is_read.then(|| self.reading.remove(place)));
            place += usize::from(!is_read);
        }
        match choose_first(&model, logits.as_deref(), (scored, scores), &mut last) {
            Ok(chosen) => Ok(Some(Parts { model, chosen, scored, logits, last })),
            Err(error) => {
                last.into_iter().flatten().for_each(|mut reading| reading.job.fail(&error));
                Err(error)
            }
        }
    }

    /// Waits for a pass over parts of prompts. Behind the last part of a prompt comes the first token. The requests
    /// hear of an error.
    pub(super) fn finish_parts(&mut self, parts: Parts) -> Result<(), ModelError> {
        let Parts { model, chosen, scored, logits, mut last } = parts;
        let mut scores = match model.taken(chosen) {
            Ok(choices) => choices,
            Err(error) => {
                last.into_iter().flatten().for_each(|mut reading| reading.job.fail(&error));
                return Err(error);
            }
        };
        let choices = scores.split_off(scored.tokens.min(scores.len()));
        self.tell_scores(scored, scores, &mut last);
        let count = last.len();
        let row = |n: usize| logits.as_ref().and_then(|logits| logits.chunks(logits.len() / count).nth(n));
        let is_last = |(_, last): &((usize, Choice), &Option<Reading>)| last.is_some();
        let rows = choices.into_iter().enumerate().zip(&last).filter(is_last);
        let of_last: Vec<(Choice, Option<&[f32]>)> = rows.map(|((n, choice), _)| (choice, row(n))).collect();
        // Until a request has its place in a group, it counts as one that is read.
        self.reading.splice(..0, last.into_iter().flatten());
        for (choice, logits) in of_last {
            let Reading { job, cache, .. } = self.reading.remove(0);
            self.finish_reading(job, cache, choice, logits)?;
        }
        Ok(())
    }

    /// Tells a request what the model thinks of the next tokens of its prompt. Where several processes hold the layers,
    /// later parts of it may be under way. `last`: of this pass, the requests whose prompts are read to their ends.
    fn tell_scores(&mut self, scored: Scored, scores: Vec<Choice>, last: &mut [Option<Reading>]) {
        if scored.tokens == 0 {
            return;
        }
        let read = last.iter_mut().chain(self.flights.last_mut()).flatten();
        let mut jobs = read.chain(&mut self.reading).map(|reading| &mut reading.job);
        // One that has left hears nothing.
        let Some(job) = jobs.find(|job| job.number == scored.request) else { return };
        let scores: Result<Vec<ChosenToken>, ModelError> = scores.into_iter().flatten().collect();
        match scores {
            Ok(scores) => {
                let logprobs = scores.into_iter().filter_map(|score| score.logprobs);
                job.tell(EngineEvent::Prompt(logprobs.collect()));
            }
            Err(error) => {
                job.fail(&error);
                job.is_left = true;
            }
        }
    }

    /// How many of the prompts whose turn it is are read in the next pass.
    fn reads_together(&self) -> usize {
        let Some(first) = self.reading.first() else { return 0 };
        let mut tokens = 0;
        let fits = |reading: &&Reading| {
            let own = reading.next_part().len();
            tokens += own;
            tokens <= PROMPT_PART && first.may_share(&reading.job.model, own)
        };
        self.reading.iter().take_while(fits).count().max(1)
    }

    /// Keeps a prompt that is read, and takes the first token of its answer. Further requests of the prompt get theirs
    /// from the logits behind it.
    fn finish_reading(
        &mut self,
        job: Job,
        cache: KeyValueCache,
        first: Choice,
        logits: Option<&[f32]>,
    ) -> Result<(), ModelError> {
        if !job.model.has_states() {
            self.prefixes.put(&job.model, cache.clone());
        }
        let (model, prompt) = (Arc::clone(&job.model), job.prompt.clone());
        self.answer(job, cache.clone(), first);
        // Requests of the same prompt behind this one go on from here.
        while let Some(mut job) = self.next_of(&model, &prompt) {
            job.tell(EngineEvent::Begun { cached: prompt.len() });
            if job.end_if_full() {
                match self.choose_behind(&mut job, logits) {
                    Ok(first) => self.answer(job, cache.clone(), first),
                    Err(error) => {
                        job.fail(&error);
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// The first token of a request whose prompt another one has just read. The last of several processes chooses it
    /// now, behind what it has said of the passes that are under way.
    fn choose_behind(&mut self, job: &mut Job, logits: Option<&[f32]>) -> Result<Choice, ModelError> {
        if logits.is_none() {
            self.hear_all()?;
        }
        let (model, top) = (Arc::clone(&job.model), job.chooser.logprobs());
        let chosen = model.choose(logits, vec![top], |logits| vec![job.choose(logits)])?;
        Ok(model.taken(chosen)?.pop().flatten())
    }

    /// The first of the waiting requests, if it has this prompt and there is room for it.
    fn next_of(&mut self, model: &Arc<Model>, prompt: &[u32]) -> Option<Job> {
        let has_slot = self.counts().running < self.settings.slots;
        let is_same = |job: &Job| Arc::ptr_eq(&job.model, model) && job.prompt == prompt && !job.is_scored();
        let fits = |job: &Job| has_slot && is_same(job) && self.has_room(job);
        let fits = self.waiting.front().is_some_and(fits);
        fits.then(|| self.waiting.pop_front()).flatten()
    }

    /// Takes the first token of an answer, and lets it go on.
    fn answer(&mut self, mut job: Job, cache: KeyValueCache, first: Choice) {
        // One that was read for what is thought of its prompt may have no answer.
        if job.end_if_full() && first.is_some_and(|chosen| job.take(chosen)) {
            match self.place_of(&job) {
                Some(place) => self.groups[place].add(job, cache),
                None => self.groups.push(Group::new(job, cache)),
            }
        }
    }
}

/// Reads a part of a prompt. Beside the logits behind it is what the model thinks of its tokens, if that was asked for.
fn read_part(
    model: &Model,
    job: &Job,
    part: Range<usize>,
    cache: &mut KeyValueCache,
) -> Result<(Option<Vec<f32>>, Vec<Choice>), ModelError> {
    match job.chooser.of_prompt() {
        None => Ok((model.begin_read(&job.prompt[part], cache)?, Vec::new())),
        Some(top) => {
            let next = job.prompt.get(part.end).copied();
            model.begin_scored(&job.prompt[part], next, cache, top)
        }
    }
}

/// Chooses the first tokens behind the prompts that are read to their ends. What is thought of the tokens of a prompt
/// goes with them.
fn choose_first(
    model: &Model,
    logits: Option<&[f32]>,
    (scored, scores): (Scored, Vec<Choice>),
    last: &mut [Option<Reading>],
) -> Result<Chosen, ModelError> {
    let top = |last: &Option<Reading>| last.as_ref().and_then(|reading| reading.job.chooser.logprobs());
    let of_scores = std::iter::repeat_n(Some(scored.top), scored.tokens);
    let rows = of_scores.chain(last.iter().map(top)).collect();
    model.choose(logits, rows, |logits| {
        let of_parts = logits.chunks(logits.len() / last.len());
        let choose = |(row, last): (&[f32], &mut Option<Reading>)| last.as_mut().and_then(|last| last.job.choose(row));
        scores.into_iter().chain(of_parts.zip(last).map(choose)).collect()
    })
}
