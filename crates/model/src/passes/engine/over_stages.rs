//! Passes that are under way one behind the other, where several processes hold the layers of a model: while the
//! last process computes one, the others compute the next ones.
//!
//! A pass is of a group of answers or of a part of a prompt. A step begins passes until as many are under way as
//! there are processes, and takes the tokens of the oldest one. What had its last pass longest ago comes first, so
//! answers and prompts take turns. Why nobody waits for ever is said in `stage`.
//!
//! Answers with different adapters of one base are a group here too (see `sharing`). Prompts are read one by one: two
//! passes one behind the other keep two processes busy, and one pass over both prompts keeps one.
//!
//! All processes have the same requests and do the same steps. So nothing here may depend on what only one of them
//! knows, such as who listens or how many bytes its layers take.

use std::collections::VecDeque;

use super::Engine;
use super::group::{Group, Job};
use super::reading::{Parts, Reading};
use crate::error::ModelError;
use crate::passes::lookup::Speculated;

enum Flight {
    Parts(Parts),
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
        let jobs = self.all.iter().filter_map(|flight| match flight {
            Flight::Parts(parts) => Some(parts.last.iter().flatten().map(|reading| &reading.job)),
            Flight::Group(_) => None,
        });
        jobs.flatten()
    }

    /// Of each part of a prompt that is read, the request, if it is the last part.
    pub(super) fn last_mut(&mut self) -> impl Iterator<Item = &mut Option<Reading>> {
        let read = self.all.iter_mut().filter_map(|flight| match flight {
            Flight::Parts(parts) => Some(&mut parts.last),
            Flight::Group(_) => None,
        });
        read.flatten()
    }

    fn push(&mut self, flight: Flight) {
        self.all.push_back(flight);
        self.most = self.most.max(self.all.len());
    }
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
            let (model, chosen) = match flight {
                Flight::Parts(Parts { model, chosen, .. }) => (model, chosen),
                Flight::Group(number) => {
                    let Some(pass) = self.group_of(number).and_then(Group::leave_pass) else { continue };
                    pass
                }
            };
            if model.taken(chosen).is_err() {
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
            let has_turn = |(begun, _): &(u64, usize)| self.reading.is_empty() || *begun < self.flights.last_part;
            let number = self.flights.begun + 1;
            if let Some((_, n)) = group.filter(has_turn) {
                // Speculation is for an answer that has the model to itself, and the base with all of its adapters.
                let share = |other: &Group| self.groups[n].jobs().iter().any(|job| other.shares_with(&job.model));
                let is_only = self.groups.iter().filter(|&other| share(other)).count() == 1;
                self.groups[n].begin(number, is_only, &mut self.passes)?;
                self.flights.push(Flight::Group(number));
            } else if let Some(parts) = self.begin_parts()? {
                self.flights.push(Flight::Parts(parts));
                self.flights.last_part = number;
            } else {
                return Ok(());
            }
            self.flights.begun = number;
        }
    }

    /// Takes what was chosen in the oldest pass.
    fn finish_pass(&mut self) -> Result<(), ModelError> {
        match self.flights.all.pop_front() {
            None => Ok(()),
            Some(Flight::Parts(parts)) => self.finish_parts(parts),
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

    /// Takes in what the last process has chosen in all passes that are under way. What it says next comes behind it.
    pub(super) fn hear_all(&mut self) -> Result<(), ModelError> {
        for n in 0..self.flights.all.len() {
            let number = match &mut self.flights.all[n] {
                Flight::Parts(Parts { model, chosen, .. }) => {
                    model.hear(chosen)?;
                    continue;
                }
                Flight::Group(number) => *number,
            };
            self.group_of(number).map_or(Ok(()), Group::hear)?;
        }
        Ok(())
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
            if let Flight::Parts(parts) = flight {
                parts.last.into_iter().flatten().for_each(|mut reading| reading.job.fail(error));
            }
        }
        self.reading.drain(..).for_each(|mut reading| reading.job.fail(error));
        self.groups.drain(..).for_each(|mut group| group.fail(error));
        self.flights.lost = Some(error.to_string());
    }
}
