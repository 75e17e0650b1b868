//! Which rows a step takes, and which of them a rank takes. Both are pure functions, so nothing of
//! them is ever saved.

use std::sync::{Arc, Mutex};

use crate::epoch_random::EpochRandom;

/// The order of training. The rows of a step depend on (seed, step) only, never on the number of
/// ranks. Each epoch takes every row exactly once. The last step of an epoch takes the rows that
/// are left.
#[derive(Debug)]
pub struct Plan {
    rows: usize,
    global_batch_size: usize,
    seed: u64,
    shuffle: bool,
    /// The order of the epoch that was asked for last. Computing an order takes a pass over all
    /// rows, and steps come in order.
    latest: Mutex<Option<(u64, Arc<Vec<u32>>)>>,
}

impl Clone for Plan {
    fn clone(&self) -> Self {
        Self::new(self.rows, self.global_batch_size, self.seed, self.shuffle)
    }
}

impl Plan {
    /// The plan for a dataset of `rows` rows. A `global_batch_size` of 0 counts as 1.
    ///
    /// # Panics
    /// With 2^32 rows or more.
    pub fn new(rows: usize, global_batch_size: usize, seed: u64, shuffle: bool) -> Self {
        assert!(u32::try_from(rows).is_ok(), "a dataset has fewer than 2^32 rows");
        Self { rows, global_batch_size: global_batch_size.max(1), seed, shuffle, latest: Mutex::new(None) }
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
        if !self.shuffle {
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
        let mut order: Vec<u32> = (0..self.rows as u32).collect();
        let mut random = EpochRandom::new(self.seed, epoch);
        // Fisher and Yates, from the end. Each of the n! orders is equally likely.
        for last in (1..order.len()).rev() {
            order.swap(last, random.below(last as u64 + 1) as usize);
        }
        let order = Arc::new(order);
        *latest = Some((epoch, Arc::clone(&order)));
        order
    }
}
