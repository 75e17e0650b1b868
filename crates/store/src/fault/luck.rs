//! What happens to survive a power cut, from a seed.

#[derive(Clone, Copy)]
pub(super) enum Luck {
    KeepNone,
    KeepAll,
    Mixed,
}

impl Luck {
    /// The two extremes often enough that no test misses them.
    pub(super) fn draw(random: &mut Random) -> Self {
        match random.below(8) {
            0 => Self::KeepNone,
            1 => Self::KeepAll,
            _ => Self::Mixed,
        }
    }

    pub(super) fn keeps(self, random: &mut Random) -> bool {
        match self {
            Self::KeepNone => false,
            Self::KeepAll => true,
            Self::Mixed => random.below(2) == 0,
        }
    }
}

/// What is left of a file with pending bytes.
pub(super) fn survivor(bytes: &[u8], synced: &[u8], luck: Luck, random: &mut Random) -> Vec<u8> {
    match luck {
        Luck::KeepNone => return synced.to_vec(),
        Luck::KeepAll => return bytes.to_vec(),
        Luck::Mixed => {}
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

/// splitmix64 (Steele, Lea and Flood 2014): a seed gives the same run everywhere.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound.max(1)
    }
}
