//! What lets a recipe fit on machines that have too little memory for it: other settings, or more such machines.

use std::collections::BTreeMap;

use finetune_store::human_bytes;

use super::{Form, Machines, Planner, Way};
use crate::cheaper_settings::{Changed, Outcome, Setting, that_fit};
use crate::memory::{Sizes, Subject, sizes};

impl Planner<'_> {
    /// What to change, if none of these ways fits. Each setting is looked at in all ways again, so none of them is
    /// proposed as if it were not there.
    pub(super) fn nothing_fits(&self, ways: &[Way]) -> Vec<String> {
        let Some(now) = ways.iter().map(|way| way.memory).min() else { return Vec::new() };
        let mut settings = self.subject.settings();
        settings.retain(|setting| !matches!(setting, Setting::FromDisk | Setting::Checkpointing));
        let with = |settings: &[&Setting]| {
            let changed = Changed::new(&self.subject, settings);
            let ways = self.of(changed.subject(&self.subject), self.machines.clone()).ways();
            // The first that fits is the fastest of them, as far as that is known without measuring.
            let first = ways.iter().find(|way| way.fits == Some(true)).or(ways.iter().min_by_key(|way| way.memory));
            let of = |way: &Way| (way.memory, way.fits == Some(true), format!(", {}", way.name));
            let (bytes, fits, words) = first.map_or((now, false, String::new()), of);
            Outcome { bytes, fits, words }
        };
        let mut hints = that_fit(settings, now, &with);
        hints.extend(self.more_machines());
        hints
    }

    /// The fewest machines of the same memory that hold the layers together.
    fn more_machines(&self) -> Option<String> {
        let layers = self.subject.sizing.layers.len();
        let memory = self.machines.memory.filter(|_| self.not_spread().is_none())?;
        let way = |hosts: usize| {
            let alike = Machines {
                hosts,
                names: Vec::new(),
                memory_of_each: Vec::new(),
                cables: None,
                ..self.machines.clone()
            };
            let planner = self.of(Subject { ..self.subject }, alike);
            [false, true].map(|from_disk| {
                let name =
                    if from_disk { "layers over machines, from disks" } else { "layers over machines, in memory" };
                planner.way(name, Vec::new(), Form { stages: hosts, again: true, from_disk })
            })
        };
        let fits = |hosts: usize| way(hosts).into_iter().find(|way| way.fits == Some(true));
        let fewest = fewest(self.machines.hosts.max(1) + 1, layers, |hosts| fits(hosts).is_some())?;
        let way = fits(fewest)?;
        let (memory, needed) = (human_bytes(memory), human_bytes(way.memory));
        let name = way.name.replace("machines", &format!("{fewest} machines"));
        Some(format!("--hosts {fewest}, each with {memory}: {name}, take {needed} at most on each"))
    }

    /// A planner of another run on other machines, without times.
    fn of<'b>(&'b self, subject: Subject<'b>, machines: Machines) -> Planner<'b> {
        let Sizes { parameters, .. } = sizes(&subject.sizing.config, subject.sizing.adaptation.as_ref());
        Planner {
            counted: subject.counted(),
            subject,
            written: vec![0; machines.hosts],
            base: self.base,
            is_from_hub: false,
            directory: self.directory.clone(),
            machines,
            parameters,
            rates: BTreeMap::new(),
        }
    }
}

/// The least number from `first` to `last` that is enough, if more are enough wherever fewer are.
fn fewest(first: usize, last: usize, is_enough: impl Fn(usize) -> bool) -> Option<usize> {
    if first > last || !is_enough(last) {
        return None;
    }
    let (mut low, mut high) = (first, last);
    while low < high {
        let middle = low.midpoint(high);
        if is_enough(middle) { high = middle } else { low = middle + 1 }
    }
    Some(low)
}

#[cfg(test)]
mod tests {
    use super::fewest;

    #[test]
    fn the_fewest_that_are_enough() {
        for enough in 2..=9 {
            assert_eq!(fewest(2, 8, |count| count >= enough), (enough <= 8).then_some(enough));
        }
        assert_eq!(fewest(9, 8, |_| true), None);
    }
}
