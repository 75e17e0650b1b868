//! Promises about time: measured, printed, and given another chance on a machine that is
//! overloaded.

use std::fmt;
use std::sync::Mutex;

/// Milliseconds, as measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Times(Vec<f64>);

impl Times {
    pub(crate) fn longest(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }

    fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
    }
}

impl FromIterator<f64> for Times {
    fn from_iter<T: IntoIterator<Item = f64>>(times: T) -> Times {
        Times(times.into_iter().collect())
    }
}

impl Extend<f64> for Times {
    fn extend<T: IntoIterator<Item = f64>>(&mut self, times: T) {
        self.0.extend(times);
    }
}

impl IntoIterator for Times {
    type Item = f64;
    type IntoIter = std::vec::IntoIter<f64>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl fmt::Display for Times {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "median {:.0} ms, max {:.0} ms of {}", self.median(), self.longest(), self.0.len())
    }
}

/// Runs `attempt` until its longest time is within `limit` (milliseconds), five times at most: the
/// machine may be busy with something else, the promise is for one that is not. Everything but the
/// time is `attempt`'s to assert, every time.
pub(crate) fn in_time(what: &str, limit: f64, mut attempt: impl FnMut() -> Times) -> Times {
    for left in (0..5).rev() {
        let times = attempt();
        if times.longest() <= limit {
            return times;
        }
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        println!("{what}: {:.0} ms are more than {limit:.0}; load {}; {left} tries left", times.longest(), load.trim());
    }
    panic!("{what}: not within {limit:.0} ms in five tries");
}

/// Does `work` for all of `items`, several at a time, and gives the results in order.
pub(crate) fn at_once<T: Sync, R: Send>(threads: usize, items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let (next, done) = (Mutex::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = {
                        let mut next = next.lock().expect("no panic in here");
                        *next += 1;
                        *next - 1
                    };
                    let Some(item) = items.get(index) else { return };
                    let result = work(item);
                    done.lock().expect("no panic in here").push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no panic in here");
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}
