//! Passes that are under way one behind the other, where several processes hold the layers of a model: while the
//! last process computes one, the others compute the next ones.
//!
//! A pass is of a group of answers or of a part of a prompt. A step begins passes until as many are under way as
//! there are processes, and takes the tokens of the oldest one. What had its last pass longest ago comes first, so
//! answers and prompts take turns. Why nobody waits for ever is said in `stage`.
//!
//! All processes have the same requests and do the same steps. So nothing here may depend on what only one of them
//! knows, such as who listens or how many bytes its layers take.

use std::collections::VecDeque;
use std::sync::Arc;

use super::group::{Group, Job};
use super::prefixes::is_known_from;
use super::{Engine, Reading};
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::lookup::Speculated;
use crate::stage::Said;

/// A part of a prompt that is read.
pub(super) struct Part {
    pub(super) model: Arc<Model>,
    pub(super) said: Said,
    /// The request, if the part is its last one.
    pub(super) last: Option<Reading>,
}

enum Flight {
    Part(Box<Part>),
    /// Of the group whose last pass has this number.
    Group(u64),
}

/// The passes that are under way, the oldest first.
#[derive(Default)]
pub(super) struct Flights {
    all: VecDeque<Flight>,
    /// The most that there may be. 0: no request has come yet.
    at_once: usize,
    /// The most that there were.
    most: usize,
    /// Passes that were begun.
    begun: u64,
    /// The number of the last pass of a prompt.
    last_part: u64,
    /// What has happened, if a pass has failed.
    lost: Option<String>,
}

impl Flights {
    /// So many may be under way for a model that is asked.
    pub(super) fn may_be(&mut self, at_once: usize) {
        self.at_once = self.at_once.max(at_once);
    }

    pub(super) fn at_once(&self) -> usize {
        self.at_once.max(1)
    }

    pub(super) fn most(&self) -> usize {
        self.most
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The requests whose prompts are read to their ends, the oldest first.
    pub(super) fn last_parts(&self) -> impl Iterator<Item = &Job> {
        self.all.iter().filter_map(|flight| match flight {
            Flight::Part(part) => part.last.as_ref().map(|reading| &reading.job),
            Flight::Group(_) => None,
        })
    }

    fn push(&mut self, flight: Flight) {
        self.all.push_back(flight);
        self.most = self.most.max(self.all.len());
    }
}

/// Whether the prompt of one request begins with what will be known of another's when that is read. The first of
/// them is waited for then.
pub(super) fn begin_alike(read: &Job, waiting: &Job) -> bool {
    Arc::ptr_eq(&read.model, &waiting.model) && is_known_from(&read.prompt, &waiting.prompt)
}

impl Engine {
    /// What has happened to another process that holds layers, or to a pass on this one. Nothing that is computed
    /// afterwards would fit what the others compute, so the processes have to start again.
    pub fn lost(&self) -> Option<&str> {
        self.flights.lost.as_deref()
    }

    /// Waits for what is under way and begins nothing more. Processes that hold a model together do so before they
    /// part. Nobody hears of it.
    pub fn drain(&mut self) {
        while let Some(flight) = self.flights.all.pop_front() {
            let (model, said) = match flight {
                Flight::Part(part) => {
                    let Part { model, said, .. } = *part;
                    (model, said)
                }
                Flight::Group(number) => {
                    let Some(group) = self.group_of(number) else { continue };
                    let Some(said) = group.leave_pass() else { continue };
                    (Arc::clone(group.model()), said)
                }
            };
            if model.logits_of(said).is_err() {
                // The others are gone.
                self.flights.all.clear();
            }
        }
    }

    /// Begins as many passes as may be under way, and takes the tokens of the oldest.
    pub(super) fn step_over_stages(&mut self) {
        if let Err(error) = self.begin_passes().and_then(|()| self.finish_pass()) {
            self.fail_all(&error);
        }
    }

    fn begin_passes(&mut self) -> Result<(), ModelError> {
        self.spread();
        loop {
            self.begin_next();
            if self.flights.all.len() >= self.flights.at_once() {
                return Ok(());
            }
            let rests = (0..self.groups.len()).filter(|&n| !self.groups[n].is_under_way());
            let group = rests.map(|n| (self.groups[n].begun(), n)).min();
            let has_turn = |(begun, _): &(u64, usize)| self.reading.is_none() || *begun < self.flights.last_part;
            let number = self.flights.begun + 1;
            if let Some((_, n)) = group.filter(has_turn) {
                let model = self.groups[n].model();
                // Speculation is for an answer that has the model to itself.
                let is_only = self.groups.iter().filter(|group| group.is_of(model)).count() == 1;
                self.groups[n].begin(number, is_only)?;
                self.flights.push(Flight::Group(number));
            } else if let Some(reading) = self.reading.take() {
                let part = self.begin_part(reading)?;
                self.flights.push(Flight::Part(Box::new(part)));
                self.flights.last_part = number;
            } else {
                return Ok(());
            }
            self.flights.begun = number;
        }
    }

    /// Takes what the oldest pass says.
    fn finish_pass(&mut self) -> Result<(), ModelError> {
        match self.flights.all.pop_front() {
            None => Ok(()),
            Some(Flight::Part(part)) => self.finish_part(*part),
            Some(Flight::Group(number)) => {
                let finished = self.group_of(number).map_or(Ok(Speculated::default()), Group::finish);
                let Speculated { proposed, accepted } = finished?;
                self.speculated.proposed += proposed;
                self.speculated.accepted += accepted;
                self.groups.retain(|group| group.len() > 0);
                Ok(())
            }
        }
    }

    /// The group whose pass under way has this number.
    fn group_of(&mut self, number: u64) -> Option<&mut Group> {
        self.groups.iter_mut().find(|group| group.is_under_way() && group.begun() == number)
    }

    /// Makes more groups of the answers, as long as more passes may be under way than there are groups. On the CPU
    /// it changes no answer who goes through the model with whom.
    fn spread(&mut self) {
        while self.groups.len() < self.flights.at_once() {
            let mut by_size: Vec<usize> = (0..self.groups.len()).collect();
            by_size.sort_by_key(|&n| std::cmp::Reverse(self.groups[n].len()));
            match by_size.into_iter().find_map(|n| self.groups[n].split()) {
                Some(others) => self.groups.push(others),
                None => return,
            }
        }
    }

    /// Ends all answers that were begun, and drops all passes that are under way.
    fn fail_all(&mut self, error: &ModelError) {
        for flight in std::mem::take(&mut self.flights.all) {
            if let Flight::Part(part) = flight
                && let Some(mut reading) = part.last
            {
                reading.job.fail(error);
            }
        }
        if let Some(mut reading) = self.reading.take() {
            reading.job.fail(error);
        }
        self.groups.drain(..).for_each(|mut group| group.fail(error));
        self.flights.lost = Some(error.to_string());
    }
}
