//! Prompts whose turn it is: which of them are read in one pass, and what comes behind them.

use std::ops::Range;
use std::sync::Arc;

use super::group::{Group, Job, share};
use super::prefixes::known_behind;
use super::{Engine, EngineEvent, is_read_again};
use crate::decoder::cache::KeyValueCache;
use crate::model::Model;
use crate::passes::generate::PROMPT_PART;
use crate::passes::sharing::{FEW, PromptPart};

/// A request whose prompt is read.
pub(super) struct Reading {
    pub(super) job: Job,
    pub(super) cache: KeyValueCache,
    /// The tokens that are read or were known.
    end: usize,
}

/// The part of a prompt of so many tokens that is read next, behind those before `begin`.
fn next_part(begin: usize, length: usize) -> Range<usize> {
    begin..length.min(begin - begin % PROMPT_PART + PROMPT_PART)
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
        let are_long = self.next_part().len() > FEW && tokens > FEW;
        are_long && share(&self.job.model, model) && self.job.model.reads_together() && model.reads_together()
    }
}

impl Engine {
    /// Lets the first of the waiting requests begin, if there is room for them and their prompts can be read in one
    /// pass. None overtakes another.
    pub(super) fn begin_next(&mut self) {
        while self.counts().running < self.settings.slots {
            let begins = self.waiting.front().is_some_and(|job| self.may_begin(job) && self.has_room(job));
            let Some(mut job) = begins.then(|| self.waiting.pop_front()).flatten() else { return };
            let cache = match is_read_again(&job.model) {
                true => KeyValueCache::default(),
                false => self.prefixes.take(&job.model, &job.prompt),
            };
            job.tell(EngineEvent::Begun { cached: cache.tokens().len() });
            match job.end_if_full() {
                true => self.reading.push(Reading { end: cache.tokens().len(), job, cache }),
                false => self.prefixes.put(&job.model, cache),
            }
        }
    }

    /// Whether no prompt is read, or the next parts of all and of this request's make a part together.
    fn may_begin(&self, job: &Job) -> bool {
        if self.reading.is_empty() {
            return true;
        }
        let known = self.prefixes.known(&job.model, &job.prompt);
        let own = next_part(known, job.prompt.len()).len();
        let all: usize = self.reading.iter().map(|reading| reading.next_part().len()).sum();
        // A prompt that begins as another one waits for it, if it knows more then.
        let waits_for = |other: &Job| {
            let is_same = Arc::ptr_eq(&other.model, &job.model);
            let knows_more = || known_behind(&job.model, &other.prompt, &job.prompt) > known;
            is_same && (other.prompt == job.prompt || knows_more())
        };
        let mut readings = self.reading.iter();
        all + own <= PROMPT_PART && readings.all(|other| other.may_share(&job.model, own) && !waits_for(&other.job))
    }

    /// Whether the keys and values of a request fit beside those of the running ones, in rooms of their own. One
    /// request alone always fits.
    fn has_room(&self, job: &Job) -> bool {
        let is_alone = self.groups.is_empty() && self.reading.is_empty();
        is_alone || self.bytes().saturating_add(job.bytes()) <= self.settings.cache_bytes
    }

    /// Bytes of keys and values of the running requests at their longest.
    fn bytes(&self) -> usize {
        let of_groups = self.groups.iter().map(|group| group.bytes_with(None));
        let of_reading = self.reading.iter().map(|reading| reading.job.bytes());
        of_groups.chain(of_reading).fold(0, usize::saturating_add)
    }

    /// The group that a request joins: all of its rows get the room of the longest, which has to fit.
    fn place_of(&self, job: &Job) -> Option<usize> {
        let all = self.bytes();
        let fits = |group: &Group| {
            let more = group.bytes_with(Some(job)).saturating_sub(group.bytes_with(None));
            group.takes(&job.model) && all.saturating_add(more) <= self.settings.cache_bytes
        };
        self.groups.iter().position(fits)
    }

    /// Reads the next part of the prompt whose turn it is, and in the same pass those of the ones behind it that
    /// share passes with it. Behind the last part of a prompt comes the first token.
    pub(super) fn read_parts(&mut self) {
        let count = self.reads_together();
        if count == 0 {
            return;
        }
        self.passes.prompt_passes += 1;
        self.passes.prompt_parts += count as u64;
        let readings = &mut self.reading[..count];
        let is_mixed = readings.iter().any(|other| !Arc::ptr_eq(&other.job.model, &readings[0].job.model));
        self.passes.mixed_passes += u64::from(is_mixed);
        let logits = match readings {
            [Reading { job, cache, end }] => {
                let part = next_part(*end, job.prompt.len());
                *end = part.end;
                if *end == job.prompt.len() && cache.has_states() {
                    // A state cannot go back, so it is kept where the last whole part ends.
                    self.prefixes.put(&job.model, cache.clone());
                }
                job.model.read(&job.prompt[part], cache)
            }
            several => {
                let parts = several.iter_mut().map(|Reading { job, cache, end }| {
                    let (job, part): (&Job, _) = (job, next_part(*end, job.prompt.len()));
                    *end = part.end;
                    PromptPart { model: &job.model, tokens: &job.prompt[part], cache }
                });
                Model::read_parts(&mut parts.collect::<Vec<_>>())
            }
        };
        let logits = match logits {
            Ok(logits) => logits,
            Err(error) => return self.reading.drain(..count).for_each(|mut reading| reading.job.fail(&error)),
        };
        let mut place = 0;
        for logits in logits.chunks(logits.len() / count) {
            if self.reading[place].is_read() {
                let Reading { job, cache, .. } = self.reading.remove(place);
                self.finish_reading(job, cache, logits);
            } else {
                place += 1;
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

    /// Keeps a prompt that is read, and chooses the first token of its answer from the logits behind it.
    fn finish_reading(&mut self, job: Job, cache: KeyValueCache, logits: &[f32]) {
        if !cache.has_states() && !is_read_again(&job.model) {
            self.prefixes.put(&job.model, cache.clone());
        }
        let (model, prompt) = (Arc::clone(&job.model), job.prompt.clone());
        self.answer(job, cache.clone(), logits);
        // Requests of the same prompt behind this one go on from here.
        while let Some(mut job) = self.next_of(&model, &prompt) {
            job.tell(EngineEvent::Begun { cached: prompt.len() });
            if job.end_if_full() {
                self.answer(job, cache.clone(), logits);
            }
        }
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
            match self.place_of(&job) {
                Some(place) => self.groups[place].add(job, cache),
                None => self.groups.push(Group::new(job, cache)),
            }
        }
    }
}
