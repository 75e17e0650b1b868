//! Which rows a step takes, and which of them a rank takes. Both are pure functions, so nothing of
//! them is ever saved.

use std::sync::{Arc, Mutex};

use crate::epoch_random::EpochRandom;

/// The order of training. The rows of a step depend on (seed, step) only, never on the number of
/// ranks. Each epoch takes every row exactly once, unless rows have weights. The last step of an epoch takes the rows that
/// are left.
#[derive(Debug)]
pub struct Plan {
    /// Places of an epoch: its rows, each as often as it comes.
    rows: usize,
    /// Rows one after the other that have a weight. Empty: each row comes once.
    parts: Vec<Part>,
    global_batch_size: usize,
    seed: u64,
    shuffle: bool,
    /// The order of the epoch that was asked for last. Computing an order takes a pass over all
    /// rows, and steps come in order.
    latest: Mutex<Option<(u64, Arc<Vec<u32>>)>>,
}

/// Rows of a file.
#[derive(Debug, Clone, Copy)]
struct Part {
    rows: usize,
    /// How often each of them comes in an epoch.
    whole: usize,
    /// How many of them come once more. Each epoch chooses others.
    more: usize,
}

impl Clone for Plan {
    fn clone(&self) -> Self {
        Self { parts: self.parts.clone(), ..Self::new(self.rows, self.global_batch_size, self.seed, self.shuffle) }
    }
}

impl Plan {
    /// The plan for a dataset of `rows` rows. A `global_batch_size` of 0 counts as 1.
    ///
    /// # Panics
    /// With 2^32 rows or more.
    pub fn new(rows: usize, global_batch_size: usize, seed: u64, shuffle: bool) -> Self {
        assert!(u32::try_from(rows).is_ok(), "a dataset has fewer than 2^32 rows");
        let (global_batch_size, latest) = (global_batch_size.max(1), Mutex::new(None));
        Self { rows, parts: Vec::new(), global_batch_size, seed, shuffle, latest }
    }

    /// As [`Plan::new`], for rows with weights: of each part the number of rows, and how often each
    /// of them comes in an epoch. With a weight of 2.5 each row comes twice, and half of the rows,
    /// others in each epoch, a third time. A part with a weight gives at least one row.
    ///
    /// # Panics
    /// With 2^32 rows or more.
    pub fn weighted(parts: &[(usize, f64)], global_batch_size: usize, seed: u64, shuffle: bool) -> Self {
        let part = |&(rows, weight): &(usize, f64)| {
            let whole = weight.max(0.0).floor();
            let more = ((weight - whole) * rows as f64).round() as usize;
            let whole = whole as usize;
            Part { rows, whole, more: if whole == 0 && weight > 0.0 { more.max(1).min(rows) } else { more } }
        };
        let parts: Vec<Part> = parts.iter().map(part).collect();
        let places = parts.iter().map(|part| part.rows * part.whole + part.more).sum();
        assert!(parts.iter().map(|part| part.rows).sum::<usize>() <= u32::MAX as usize, "fewer than 2^32 rows");
        Self { parts, ..Self::new(places, global_batch_size, seed, shuffle) }
    }

    /// Steps of an epoch. 0 only if there are no rows.
    pub fn steps_per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.global_batch_size) as u64
    }

    /// The epoch, from 0, of a step, from 0.
    pub fn epoch(&self, step: u64) -> u64 {
        step / self.steps_per_epoch().max(1)
    }

    /// The indices of the rows of a step, from 0, in order. They are all of one epoch.
    pub fn rows(&self, step: u64) -> Vec<usize> {
        let first = (step % self.steps_per_epoch().max(1)) as usize * self.global_batch_size;
        let places = first..(first + self.global_batch_size).min(self.rows);
        if !self.shuffle && self.parts.is_empty() {
            return places.collect();
        }
        let order = self.order(self.epoch(step));
        order[places].iter().map(|row| *row as usize).collect()
    }

    /// A rank's share of the rows of a step. The shares of all ranks, in rank order, are the step's
    /// rows. Their sizes differ by at most one, and a share may be empty.
    pub fn share(&self, step: u64, rank: usize, world: usize) -> Vec<usize> {
        let rows = self.rows(step);
        let world = world.max(1);
        let bound = |rank: usize| (rows.len() as u128 * rank.min(world) as u128 / world as u128) as usize;
        rows[bound(rank)..bound(rank.saturating_add(1))].to_vec()
    }

    fn order(&self, epoch: u64) -> Arc<Vec<u32>> {
        let mut latest = self.latest.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((known, order)) = latest.as_ref()
            && *known == epoch
        {
            return Arc::clone(order);
        }
        let mut order: Vec<u32> = match self.parts.is_empty() {
            true => (0..self.rows as u32).collect(),
            false => self.places(epoch),
        };
        if self.shuffle {
            let mut random = EpochRandom::new(self.seed, epoch);
            // Fisher and Yates, from the end. Each of the n! orders is equally likely.
            for last in (1..order.len()).rev() {
                order.swap(last, random.below(last as u64 + 1) as usize);
            }
        }
        let order = Arc::new(order);
        *latest = Some((epoch, Arc::clone(&order)));
        order
    }

    /// The rows of an epoch in file order: all that come at least once, then all that come at least
    /// twice, and so on.
    fn places(&self, epoch: u64) -> Vec<u32> {
        let mut random = EpochRandom::of_choice(self.seed, epoch);
        let (mut first, mut chosen) = (0u32, Vec::with_capacity(self.parts.len()));
        for part in &self.parts {
            let mut rows: Vec<u32> = (first..first + part.rows as u32).collect();
            first += part.rows as u32;
            // The beginning of Fisher and Yates' order: each choice is equally likely.
            for place in 0..part.more {
                let other = place + random.below((part.rows - place) as u64) as usize;
                rows.swap(place, other);
            }
            rows.truncate(part.more);
            rows.sort_unstable();
            chosen.push(rows);
        }
        let rounds = self.parts.iter().map(|part| part.whole + usize::from(part.more > 0)).max().unwrap_or(0);
        let mut places = Vec::with_capacity(self.rows);
        for round in 0..rounds {
            let mut first = 0u32;
            for (part, chosen) in self.parts.iter().zip(&chosen) {
                if round < part.whole {
                    places.extend(first..first + part.rows as u32);
                } else if round == part.whole {
                    places.extend(chosen);
                }
                first += part.rows as u32;
            }
        }
        places
    }
}
