//! The clock that all processes share, and signals.

use std::time::{Duration, Instant};

/// Since some point in the past, the same one for all processes of this machine.
pub(crate) fn now() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of this frame, which the call fills.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    assert_eq!(failed, 0, "every system has a monotonic clock");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// [`now`] in milliseconds.
pub(crate) fn milliseconds() -> f64 {
    now().as_secs_f64() * 1e3
}

/// What happens to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    Kill,
    Stop,
    Continue,
}

/// Sends a signal. The process must be a child that has not been waited for, so that its number is
/// still its own.
pub(crate) fn send(signal: Signal, process: u32) {
    let number = match signal {
        Signal::Kill => libc::SIGKILL,
        Signal::Stop => libc::SIGSTOP,
        Signal::Continue => libc::SIGCONT,
    };
    // SAFETY: kill takes no pointers.
    let failed = unsafe { libc::kill(process as libc::pid_t, number) };
    assert_eq!(failed, 0, "{signal:?} to process {process}: {}", std::io::Error::last_os_error());
}

/// Lets this process, and the children that it starts from now on, have so many files and sockets
/// open, if the system does.
pub(crate) fn allow_open_files(wanted: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointers are to an rlimit of this frame, which the first call fills and the
    // second one reads.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_cur.max(wanted.min(limit.rlim_max));
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
}

#[test]
fn the_clock_goes_forward() {
    // The outer one sees more of what holds this thread up, the inner one less.
    let (outer, before, inner) = (Instant::now(), now(), Instant::now());
    std::thread::sleep(Duration::from_millis(20));
    let (inner, clock, outer) = (inner.elapsed(), now() - before, outer.elapsed());
    let slack = Duration::from_millis(1);
    assert!(inner <= clock + slack && clock <= outer + slack, "{clock:?} is not between {inner:?} and {outer:?}");
}
