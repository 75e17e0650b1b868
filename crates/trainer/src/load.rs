//! Whether other programs take the processor away from this one while something is measured.

/// The part of a measurement from which on other programs are worth a word: what is measured varies by as much.
const MUCH: f64 = 0.2;

/// What the threads of this process have had of processors so far, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// How long they ran.
    ran: u64,
    /// How long they could have run and no processor was free.
    waited: u64,
}

impl Load {
    /// `None`: the system does not say it. Linux does, for each thread.
    pub(crate) fn so_far() -> Option<Load> {
        let threads = std::fs::read_dir("/proc/self/task").ok()?;
        let of_thread = |thread: std::io::Result<std::fs::DirEntry>| {
            Load::parse(&std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?)
        };
        // A thread may end before its file is read.
        let sum = |sum: Load, one: Load| Load { ran: sum.ran + one.ran, waited: sum.waited + one.waited };
        threads.filter_map(of_thread).reduce(sum)
    }

    /// The part of the time since then for which other programs had the processor, if it is worth a word.
    pub(crate) fn others_since(self) -> Option<f64> {
        Load::so_far()?.waited_since(self).filter(|part| *part > MUCH)
    }

    /// A line of `schedstat`: nanoseconds on a processor, nanoseconds of waiting for one, turns.
    fn parse(text: &str) -> Option<Load> {
        let mut numbers = text.split_ascii_whitespace().map(str::parse);
        Some(Load { ran: numbers.next()?.ok()?, waited: numbers.next()?.ok()? })
    }

    /// The part of the time since `before` in which threads waited, of that in which they had something to do. `None`:
    /// they had nothing.
    pub(crate) fn waited_since(self, before: Load) -> Option<f64> {
        let ran = self.ran.saturating_sub(before.ran);
        let waited = self.waited.saturating_sub(before.waited);
        (ran + waited > 0).then(|| waited as f64 / (ran + waited) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_is_a_part_of_the_time() {
        let [before, after] = ["100 50 7\n", "400 150 9\n"].map(|text| Load::parse(text).expect("numbers"));
        assert_eq!(before, Load { ran: 100, waited: 50 });
        assert_eq!(after.waited_since(before), Some(0.25));
        assert_eq!(before.waited_since(before), None);
        assert!(["", "100", "x 1"].iter().all(|text| Load::parse(text).is_none()));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn linux_says_how_long_threads_ran() {
        // Other tests' threads, which begin and end meanwhile, are in the sum of all.
        let mine = || Load::parse(&std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat"));
        let before = mine().expect("numbers");
        let sum =
            std::hint::black_box((0..50_000_000u64).fold(0u64, |sum, n| sum.wrapping_add(std::hint::black_box(n))));
        let after = mine().expect("numbers");
        assert!(sum > 0 && after.ran > before.ran, "{before:?} {after:?}");
        assert!(after.waited_since(before).is_some_and(|part| (0.0..1.0).contains(&part)));
        assert!(Load::so_far().is_some_and(|all| all.ran > 0));
    }
}
