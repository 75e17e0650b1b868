//! The random numbers that shuffle an epoch.

use finetune_random::philox;

/// As [`SHUFFLE_DOMAIN`], of the numbers that choose a part of the rows.
const CHOICE_DOMAIN: u32 = u32::from_be_bytes(*b"part");

/// The last word of the counter. No other use of the same seed has this word, so none draws the
/// same bits.
const SHUFFLE_DOMAIN: u32 = u32::from_be_bytes(*b"plan");

/// The sequence of numbers that shuffles one epoch.
pub(crate) struct EpochRandom {
    key: [u32; 2],
    epoch: u64,
    domain: u32,
    block: u32,
    spare: Option<u64>,
}

impl EpochRandom {
    pub(crate) fn new(seed: u64, epoch: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], epoch, domain: SHUFFLE_DOMAIN, block: 0, spare: None }
    }

    /// Numbers that choose which rows of the epoch come once more than others.
    pub(crate) fn of_choice(seed: u64, epoch: u64) -> Self {
        Self { domain: CHOICE_DOMAIN, ..Self::new(seed, epoch) }
    }

    fn next(&mut self) -> u64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let counter = [self.block, self.epoch as u32, (self.epoch >> 32) as u32, self.domain];
        let words = philox(counter, self.key);
        self.block = self.block.wrapping_add(1);
        self.spare = Some(u64::from(words[2]) | u64::from(words[3]) << 32);
        u64::from(words[0]) | u64::from(words[1]) << 32
    }

    /// A number in `0..bound`, each equally likely. `bound` is at least 1.
    ///
    /// Lemire's multiplication ("Fast random integer generation in an interval", 2019) rejects the
    /// few draws that would favor some numbers.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "a range to draw from is not empty");
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            let low = product as u64;
            if low >= bound || low >= bound.wrapping_neg() % bound {
                return (product >> 64) as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_stays_below_and_reaches_all() {
        let mut random = EpochRandom::new(7, 3);
        let mut seen = [0usize; 6];
        for _ in 0..60_000 {
            seen[random.below(6) as usize] += 1;
        }
        // Six times 10,000 expected; 500 is more than five standard deviations.
        assert!(seen.iter().all(|count| count.abs_diff(10_000) < 500), "{seen:?}");
        assert_eq!(random.below(1), 0);
        assert!(random.below(u64::MAX) < u64::MAX);
    }
}
