//! What survives a power cut, drawn from a seed.

use super::rng::SplitMix64;

/// Which of the pending changes survive.
#[derive(Clone, Copy)]
pub(super) enum Survival {
    KeepNone,
    KeepAll,
    /// Each by the toss of a coin.
    Mixed,
}

impl Survival {
    /// Draws the two extremes often enough that no test misses them.
    pub(super) fn draw(random: &mut SplitMix64) -> Self {
        match random.below(8) {
            0 => Self::KeepNone,
            1 => Self::KeepAll,
            _ => Self::Mixed,
        }
    }

    pub(super) fn keeps(self, random: &mut SplitMix64) -> bool {
        match self {
            Self::KeepNone => false,
            Self::KeepAll => true,
            Self::Mixed => random.below(2) == 0,
        }
    }
}

/// What is left of a file with pending bytes.
pub(super) fn survivor(bytes: &[u8], synced: &[u8], survival: Survival, random: &mut SplitMix64) -> Vec<u8> {
    match survival {
        Survival::KeepNone => return synced.to_vec(),
        Survival::KeepAll => return bytes.to_vec(),
        Survival::Mixed => {}
    }
    let cut = random.below(bytes.len() as u64 + 1) as usize;
    match random.below(5) {
        0 => synced.to_vec(),
        1 => Vec::new(),
        2 => bytes[..cut].to_vec(),
        // The length was on disk before the bytes were.
        3 => [&bytes[..cut], &vec![0; bytes.len() - cut]].concat(),
        _ => bytes.to_vec(),
    }
}
