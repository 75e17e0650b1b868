//! How many layers each of several ranks gets that hold a model together, by speed and room: what training and answers
//! have in common.

use std::ops::Range;

use finetune_model::Stage;

/// Ranks whose speeds differ by less than this count as equally fast: what is measured varies.
const EQUALLY_FAST: f64 = 1.25;

/// Why ranks have so many layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// As many on each as on any other.
    Alike,
    /// As the recipe says.
    Recipe,
    /// A faster rank has more.
    Speed,
    /// A rank with a faster disk has more.
    Disk,
    /// A rank with more memory has more.
    Memory,
}

impl Why {
    const ALL: [Why; 5] = [Why::Alike, Why::Recipe, Why::Speed, Why::Disk, Why::Memory];

    /// As a rank tells it to the others.
    pub(crate) fn number(self) -> i32 {
        Why::ALL.iter().position(|why| *why == self).unwrap_or(0) as i32
    }

    /// What another rank has told.
    pub(crate) fn of_number(number: i32) -> Why {
        usize::try_from(number).ok().and_then(|number| Why::ALL.get(number).copied()).unwrap_or(Why::Alike)
    }

    /// ", as their speed allows"; nothing where each has as many.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Why::Alike => "",
            Why::Recipe => ", as parallel.layers says",
            Why::Speed => ", as their speed allows",
            Why::Disk => ", as their disks and speed allow",
            Why::Memory => ", as their memory and speed allow",
        }
    }
}

/// "12, 10 and 8"
pub(crate) fn listed(counts: &[usize]) -> String {
    let numbers: Vec<String> = counts.iter().map(usize::to_string).collect();
    match numbers.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, before)) => format!("{} and {last}", before.join(", ")),
        None => String::new(),
    }
}

/// Speeds of which those that are nearly equal are equal. If one is not known, all are equal.
pub(crate) fn levelled(rates: &[f64]) -> Vec<f64> {
    if !rates.iter().all(|rate| *rate > 0.0 && rate.is_finite()) {
        return vec![1.0; rates.len()];
    }
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mut levels: Vec<f64> = Vec::new();
    for rate in sorted {
        if levels.last().is_none_or(|level| rate >= level * EQUALLY_FAST) {
            levels.push(rate);
        }
    }
    let level = |rate: &f64| levels.iter().rev().find(|level| *level <= rate).copied().unwrap_or(*rate);
    rates.iter().map(level).collect()
}

/// Whether a rank has room for some layers.
pub(crate) type Fits<'a> = &'a dyn Fn(usize, Range<usize>) -> bool;

/// Layers that are dealt out next to each other, in the order of the ranks.
pub(crate) struct Blocks<'a> {
    pub(crate) layers: usize,
    /// What each rank does in a second, [`levelled`].
    pub(crate) speeds: &'a [f64],
    /// How much there is to do for some layers on a rank.
    pub(crate) size: &'a dyn Fn(usize, Range<usize>) -> f64,
}

impl Blocks<'_> {
    /// As many layers on each rank as on any other if all are equally fast, otherwise so many that the slowest takes as
    /// short as it can, whatever their memory. `None`: there are fewer layers than ranks.
    pub(crate) fn by_speed(&self) -> Option<Vec<usize>> {
        let ranks = self.speeds.len();
        match self.speeds.windows(2).all(|two| two[0] == two[1]) {
            true => Some(Stage::contiguous(self.layers, ranks, 0).counts()).filter(|counts| counts.len() == ranks),
            false => self.shortest(None),
        }
    }

    /// The same as far as there is room. `None`: there is none.
    pub(crate) fn with_room(&self, fits: Fits<'_>) -> Option<Vec<usize>> {
        let fit = |counts: &Vec<usize>| {
            let mut start = 0;
            counts.iter().enumerate().all(|(rank, count)| {
                start += count;
                fits(rank, start - count..start)
            })
        };
        self.by_speed().filter(fit).or_else(|| self.shortest(Some(fits)))
    }

    /// The numbers of layers, of which each rank has one at least, with which the slowest rank takes the least time.
    fn shortest(&self, fits: Option<Fits<'_>>) -> Option<Vec<usize>> {
        // [rank][layers on it and on those before]
        let mut best: Vec<Vec<Option<Ways>>> = Vec::with_capacity(self.speeds.len());
        for (rank, speed) in self.speeds.iter().enumerate() {
            let way = |start: usize, end: usize| {
                let before = match rank {
                    0 if start == 0 => Ways { slowest: 0.0, squares: 0.0, count: 0 },
                    0 => return None,
                    _ => best[rank - 1][start]?,
                };
                if fits.is_some_and(|fits| !fits(rank, start..end)) {
                    return None;
                }
                let seconds = (self.size)(rank, start..end) / speed;
                let squares = before.squares + seconds * seconds;
                Some(Ways { slowest: before.slowest.max(seconds), squares, count: end - start })
            };
            let of_end = |end: usize| {
                let ways = (0..end).filter_map(|start| way(start, end));
                ways.min_by(|a, b| a.slowest.total_cmp(&b.slowest).then(a.squares.total_cmp(&b.squares)))
            };
            let ends: Vec<Option<Ways>> = (0..=self.layers).map(of_end).collect();
            best.push(ends);
        }
        let (mut counts, mut end) = (Vec::with_capacity(self.speeds.len()), self.layers);
        for of_rank in best.iter().rev() {
            let count = of_rank[end]?.count;
            counts.push(count);
            end -= count;
        }
        counts.reverse();
        Some(counts)
    }
}

/// Where the layers of the ranks so far end, and how long they take.
#[derive(Clone, Copy)]
struct Ways {
    /// Of the slowest rank.
    slowest: f64,
    /// The sum of the squares of all: of equally slow ways the even one is taken.
    squares: f64,
    /// Layers of the last rank of them.
    count: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (speeds, the most layers that each has room for, how ten layers are dealt)
    #[test]
    fn blocks_follow_speed_and_room() {
        type Case<'a> = (&'a [f64], &'a [usize], Option<&'a [usize]>);
        let cases: [Case<'_>; 6] = [
            (&[1.0, 1.0, 1.0, 1.0], &[9, 9, 9, 9], Some(&[3, 2, 3, 2])),
            (&[1.0, 4.0], &[9, 9], Some(&[2, 8])),
            (&[1.0, 4.0], &[9, 5], Some(&[5, 5])),
            (&[1.0, 1.0, 1.0], &[9, 2, 9], Some(&[4, 2, 4])),
            (&[1.0, 1.0], &[4, 5], None),
            (&[1.0, 4.0, 4.0], &[1, 9, 9], Some(&[1, 5, 4])),
        ];
        for (speeds, room, want) in cases {
            let blocks = Blocks { layers: 10, speeds, size: &|_, range| range.len() as f64 };
            let got = blocks.with_room(&|rank, range| range.len() <= room[rank]);
            let slowest = |counts: &[usize]| {
                counts.iter().zip(speeds).map(|(count, speed)| *count as f64 / speed).fold(0.0, f64::max)
            };
            match (&got, want) {
                (Some(got), Some(want)) => {
                    assert_eq!(got.iter().sum::<usize>(), 10);
                    assert!(got.iter().zip(room).all(|(count, room)| count <= room), "{got:?}");
                    assert_eq!(slowest(got), slowest(want), "{speeds:?} {room:?}: {got:?}");
                }
                _ => assert_eq!(got.as_deref(), want, "{speeds:?} {room:?}"),
            }
        }
        let few = Blocks { layers: 2, speeds: &[1.0, 2.0, 1.0], size: &|_, range| range.len() as f64 };
        assert_eq!(few.by_speed(), None);
    }

    #[test]
    fn what_is_told_is_heard() {
        assert!(Why::ALL.iter().all(|why| Why::of_number(why.number()) == *why));
        assert_eq!(Why::of_number(-1), Why::Alike);
        assert_eq!([listed(&[]), listed(&[3]), listed(&[12, 10, 8])], ["", "3", "12, 10 and 8"]);
    }
}
