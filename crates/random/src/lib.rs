//! Random numbers as a pure function of a key and a position, so that no state has to be saved.
//!
//! **Owns** Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
//! 3", SC 2011). The order of rows, fresh weights, dropout and sampling all draw from it.
//!
//! **Must never know** what its numbers are used for.
//!
//! **Start reading** at [`Stream`].

#![forbid(unsafe_code)]
#![warn(missing_docs)]

/// The random numbers of one purpose: of a seed, and of three numbers that tell it from other
/// streams (purpose, step, module).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: [u32; 2],
}

impl Stream {
    /// The stream of these numbers. Streams of different arguments are independent of each other.
    pub fn new(seed: u64, purpose: u32, step: u64, module: u32) -> Stream {
        let key = [seed as u32, (seed >> 32) as u32];
        let block = philox([step as u32, (step >> 32) as u32, module, purpose], key);
        Stream { key: [block[0] ^ block[2], block[1] ^ block[3]] }
    }

    /// The four random words at this position.
    #[inline(always)]
    pub fn block(&self, position: [u32; 4]) -> [u32; 4] {
        philox(position, self.key)
    }

    /// The key that [`philox`] draws the blocks with, for a device that draws them itself.
    pub fn key(&self) -> [u32; 2] {
        self.key
    }

    /// `len` numbers uniform in [-bound, bound).
    pub fn uniform(&self, len: usize, bound: f32) -> Vec<f32> {
        self.words(len).map(|word| (unit(word) * 2.0 - 1.0) * bound).collect()
    }

    /// `len` normal numbers with mean 0 and this standard deviation (Box–Muller in f64, rounded
    /// once).
    pub fn normal(&self, len: usize, deviation: f32) -> Vec<f32> {
        let mut words = self.words(len.next_multiple_of(2));
        let mut values = Vec::with_capacity(len + 1);
        while values.len() < len {
            let (Some(a), Some(b)) = (words.next(), words.next()) else { unreachable!("as many words as values") };
            // (a + 1) / 2^32 is never 0, so its logarithm is finite.
            let radius = (-2.0 * ((f64::from(a) + 1.0) / 4_294_967_296.0).ln()).sqrt() * f64::from(deviation);
            let angle = f64::from(b) / 4_294_967_296.0 * std::f64::consts::TAU;
            values.push((radius * angle.cos()) as f32);
            values.push((radius * angle.sin()) as f32);
        }
        values.truncate(len);
        values
    }

    fn words(&self, len: usize) -> impl Iterator<Item = u32> + '_ {
        (0..len.div_ceil(4) as u64).flat_map(|n| self.block([n as u32, (n >> 32) as u32, 0, 0])).take(len)
    }
}

/// A word as a number in [0, 1), with 24 random bits.
#[inline(always)]
pub fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// One block of 128 random bits: ten rounds of Philox4x32 with the constants of the paper.
#[inline(always)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key[0] = key[0].wrapping_add(0x9E37_79B9);
            key[1] = key[1].wrapping_add(0xBB67_AE85);
        }
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with the authors' Random123 library (`kat_vectors`, philox4x32
    /// 10).
    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox(counter, key), want, "counter {counter:x?} key {key:x?}");
        }
    }

    #[test]
    fn normal_has_the_moments_of_a_normal() {
        let values = Stream::new(7, 1, 0, 0).normal(100_001, 2.0);
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / 100_001.0;
        let variance = values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / 100_001.0;
        assert_eq!(values.len(), 100_001);
        assert!(mean.abs() < 0.03 && (variance - 4.0).abs() < 0.06, "mean {mean} variance {variance}");
    }
}
