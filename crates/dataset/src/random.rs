//! Random numbers that are a pure function of a key and a counter: nothing to save, nothing to replay.
//!
//! Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// One block of 128 random bits.
pub(crate) fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
        }
        let left = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let right = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (right >> 32) as u32 ^ counter[1] ^ key[0],
            right as u32,
            (left >> 32) as u32 ^ counter[3] ^ key[1],
            left as u32,
        ];
    }
    counter
}

/// The last word of the counter, so that no other use of the same seed draws the same bits.
const SHUFFLE_DOMAIN: u32 = u32::from_be_bytes(*b"plan");

/// The sequence of numbers that shuffles one epoch.
pub(crate) struct EpochRandom {
    key: [u32; 2],
    epoch: u64,
    block: u32,
    spare: Option<u64>,
}

impl EpochRandom {
    pub(crate) fn new(seed: u64, epoch: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], epoch, block: 0, spare: None }
    }

    fn next(&mut self) -> u64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let counter = [self.block, self.epoch as u32, (self.epoch >> 32) as u32, SHUFFLE_DOMAIN];
        let words = philox(counter, self.key);
        self.block = self.block.wrapping_add(1);
        self.spare = Some(u64::from(words[2]) | u64::from(words[3]) << 32);
        u64::from(words[0]) | u64::from(words[1]) << 32
    }

    /// A number in `0..bound`, each equally likely: Lemire's multiplication, "Fast random integer generation in an
    /// interval" (2019), which rejects the few draws that would favor some numbers. `bound` is at least 1.
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

    /// The vectors of Random123's `kat_vectors`.
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

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
