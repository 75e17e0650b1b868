//! Bounds on foreign work. A chat template is a stranger's program, a tokenizer.json and a Parquet
//! file are a stranger's data. The crates that read them expect well-meant input: one line of either can
//! overflow the stack, fill the memory, run forever or panic.
//!
//! Foreign work runs on threads of its own, with a large stack. The caller waits for the result and
//! watches them. When the work has run out of something, the caller goes on without it. No system
//! can stop a thread safely, so it is left behind asleep, or running if it ran out of time. The
//! reading then ends with an error, and the process soon after.
//!
//! Time is counted here. Memory and stack need the program's help: its allocator calls
//! [`allocated`] and [`freed`], its handler of SIGSEGV and SIGBUS calls [`faulted`]. If a program
//! does neither, those two bounds are missing and the rest holds.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::DatasetError;

/// Bytes of a guarded thread's stack: enough to free a list nested 100,000 deep. Pages that are
/// never touched cost nothing.
const STACK: usize = 64 << 20;

/// How often a waiting caller looks at the threads, and the most time that one look counts for. A
/// process that was stopped for an hour (Ctrl-Z) has not worked for an hour. Nor has one that gets
/// a tenth of a core (a container, a busy machine): there the looks come late, as the work does.
const GLANCE: Duration = Duration::from_millis(20);

/// What a piece of foreign work may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) time: Duration,
    /// The most bytes that it may hold at a time.
    pub(crate) bytes: usize,
}

/// Whose work it is, with the file that a person has to look at.
#[derive(Clone, Debug)]
pub(crate) enum Foreign {
    Template(String),
    Tokenizer(String),
    Parquet(String),
}

impl Foreign {
    pub(crate) fn error(&self, line: Option<usize>, reason: &str) -> DatasetError {
        let reason = reason.to_owned();
        match self {
            Foreign::Template(origin) => DatasetError::TemplateBounds { origin: origin.clone(), line, reason },
            Foreign::Tokenizer(path) => DatasetError::TokenizerBounds { path: path.clone(), reason },
            Foreign::Parquet(path) => DatasetError::ParquetBounds { path: path.clone(), reason },
        }
    }
}

/// Values of [`ThreadState::ended`]: how the work of a thread has ended, if not by itself.
const RUNS: u8 = 0;
const OUT_OF_MEMORY: u8 = 1;
const OUT_OF_STACK: u8 = 2;

/// What others know of one thread's foreign work.
struct ThreadState {
    /// Goes up by one at the start and at the end of each piece of work, so it is odd during one.
    turn: AtomicU64,
    milliseconds: AtomicU64,
    bytes: AtomicU64,
    ended: AtomicU8,
    foreign: Mutex<Option<Foreign>>,
}

/// Why no more work is begun.
struct Stopped {
    foreign: Foreign,
    line: Option<usize>,
    reason: String,
}

/// The state of the threads of one pool. It is never freed, since a thread that is left behind goes
/// on using it.
struct PoolState {
    threads: Vec<ThreadState>,
    is_stopped: AtomicBool,
    stopped: Mutex<Option<Stopped>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PoolState {
    fn new(threads: usize) -> PoolState {
        let thread_state = |_| ThreadState {
            turn: AtomicU64::new(0),
            milliseconds: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            ended: AtomicU8::new(RUNS),
            foreign: Mutex::new(None),
        };
        PoolState {
            threads: (0..threads).map(thread_state).collect(),
            is_stopped: AtomicBool::new(false),
            stopped: Mutex::new(None),
        }
    }

    /// Lets no more work begin. The first reason counts.
    fn stop(&self, foreign: Foreign, line: Option<usize>, reason: String) {
        locked(&self.stopped).get_or_insert(Stopped { foreign, line, reason });
        self.is_stopped.store(true, Ordering::Release);
    }

    fn stopped(&self) -> Option<DatasetError> {
        if !self.is_stopped.load(Ordering::Acquire) {
            return None;
        }
        locked(&self.stopped).as_ref().map(|stopped| stopped.foreign.error(stopped.line, &stopped.reason))
    }
}

/// Which thread of which pool a guarded thread is.
#[derive(Clone, Copy)]
struct Guarded {
    pool_state: &'static PoolState,
    index: usize,
}

thread_local! {
    static GUARDED: Cell<Option<Guarded>> = const { Cell::new(None) };
    /// Whether foreign work is under way on this thread.
    static AT_WORK: Cell<bool> = const { Cell::new(false) };
    /// Bytes that the foreign work on this thread may still take.
    static LEFT: Cell<usize> = const { Cell::new(0) };
}

/// To be called by the program's allocator before it hands out this many bytes. It does not return
/// if foreign work asks for more than it may have.
#[inline]
pub fn allocated(bytes: usize) {
    if AT_WORK.get() {
        match LEFT.get().checked_sub(bytes) {
            Some(left) => LEFT.set(left),
            None => fall_asleep(OUT_OF_MEMORY),
        }
    }
}

/// To be called by the program's allocator for each block that comes back.
#[inline]
pub fn freed(bytes: usize) {
    if AT_WORK.get() {
        LEFT.set(LEFT.get().saturating_add(bytes));
    }
}

/// To be called first by the program's handler of SIGSEGV and SIGBUS, on the stack of signals. It
/// does not return if the fault is one of foreign work, and otherwise does nothing. It calls
/// nothing that a signal handler may not call.
pub fn faulted() {
    if AT_WORK.get() {
        fall_asleep(OUT_OF_STACK);
    }
}

#[cold]
fn fall_asleep(how: u8) -> ! {
    if let Some(Guarded { pool_state, index }) = GUARDED.get() {
        pool_state.threads[index].ended.store(how, Ordering::Release);
    }
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

/// Does foreign work within its bounds. If this is no guarded thread, the work is done on one.
///
/// # Errors
/// [`DatasetError::TemplateBounds`] or [`DatasetError::TokenizerBounds`], also for a panic of the
/// work. These end everything that [`on_guarded_threads`] has under way.
/// [`DatasetError::NoThreads`].
pub(crate) fn watched<R: Send + 'static>(
    foreign: &Foreign,
    bounds: Bounds,
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, DatasetError> {
    match GUARDED.get() {
        Some(guarded) => at_work(guarded, foreign, bounds, work),
        None => {
            let foreign = foreign.clone();
            on_guarded_threads(move || match GUARDED.get() {
                Some(guarded) => at_work(guarded, &foreign, bounds, work),
                None => unreachable!("every thread of a pool is guarded"),
            })?
        }
    }
}

fn at_work<R>(
    guarded: Guarded,
    foreign: &Foreign,
    bounds: Bounds,
    work: impl FnOnce() -> R,
) -> Result<R, DatasetError> {
    let Guarded { pool_state, index } = guarded;
    if let Some(error) = pool_state.stopped() {
        return Err(error);
    }
    let thread_state = &pool_state.threads[index];
    *locked(&thread_state.foreign) = Some(foreign.clone());
    thread_state.milliseconds.store(bounds.time.as_millis() as u64, Ordering::Relaxed);
    thread_state.bytes.store(bounds.bytes as u64, Ordering::Relaxed);
    thread_state.turn.fetch_add(1, Ordering::Release);
    LEFT.set(bounds.bytes);
    AT_WORK.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    AT_WORK.set(false);
    thread_state.turn.fetch_add(1, Ordering::Release);
    result.map_err(|panic| {
        let reason = format!("it failed within: {}", panic_text(panic.as_ref()));
        let error = foreign.error(None, &reason);
        pool_state.stop(foreign.clone(), None, reason);
        error
    })
}

/// Ends everything that this thread's pool has under way, for a reason that foreign work found
/// itself. Returns the error.
pub(crate) fn stop(foreign: &Foreign, line: Option<usize>, reason: &str) -> DatasetError {
    if let Some(Guarded { pool_state, .. }) = GUARDED.get() {
        pool_state.stop(foreign.clone(), line, reason.to_owned());
    }
    foreign.error(line, reason)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
    text.chars().take(200).collect()
}

/// Runs `work`, which calls [`watched`] on the threads of a pool, on as many as rayon gives it.
/// When one of them has run out of something, this function returns early and leaves the work
/// behind.
///
/// # Errors
/// The first error of [`watched`], whether or not `work` has passed it on.
/// [`DatasetError::NoThreads`].
///
/// # Panics
/// As `work` does.
pub(crate) fn on_guarded_threads<R: Send + 'static>(
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, DatasetError> {
    if GUARDED.get().is_some() {
        return Ok(work());
    }
    let pool = Pool::take()?;
    let (sender, receiver) = mpsc::channel();
    pool.threads.spawn(move || {
        // Nobody listens if the work was left behind.
        let _ = sender.send(panic::catch_unwind(AssertUnwindSafe(work)));
    });
    let mut watch = Watch::new(pool.pool_state);
    loop {
        match receiver.recv_timeout(GLANCE) {
            Ok(result) => {
                let stopped = pool.pool_state.stopped();
                pool.give_back();
                return match (stopped, result) {
                    (Some(error), _) => Err(error),
                    (None, Ok(result)) => Ok(result),
                    (None, Err(panic)) => panic::resume_unwind(panic),
                };
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some(error) = watch.look() {
                    return Err(error);
                }
            }
            Err(RecvTimeoutError::Disconnected) => unreachable!("the work is caught, so the answer is sent"),
        }
    }
}

/// Threads with their state.
struct Pool {
    threads: ThreadPool,
    pool_state: &'static PoolState,
}

/// Pools that wait for work. Outside of tests one at a time is in use.
static IDLE: Mutex<Vec<Pool>> = Mutex::new(Vec::new());

impl Pool {
    fn take() -> Result<Pool, DatasetError> {
        if let Some(pool) = locked(&IDLE).pop() {
            return Ok(pool);
        }
        keep_quiet();
        let count = thread_count();
        let pool_state: &'static PoolState = Box::leak(Box::new(PoolState::new(count)));
        let threads = ThreadPoolBuilder::new()
            .num_threads(count)
            .stack_size(STACK)
            .thread_name(|index| format!("text-{index}"))
            .start_handler(move |index| GUARDED.set(Some(Guarded { pool_state, index })))
            .build()
            .map_err(|error| DatasetError::NoThreads { reason: error.to_string() })?;
        Ok(Pool { threads, pool_state })
    }

    /// Returns the pool for the next caller. All its threads have finished, with or without an
    /// error.
    fn give_back(self) {
        *locked(&self.pool_state.stopped) = None;
        self.pool_state.is_stopped.store(false, Ordering::Release);
        locked(&IDLE).push(self);
    }
}

/// The number of threads of rayon's own pool. That pool is not asked, since asking starts it.
fn thread_count() -> usize {
    let chosen = std::env::var("RAYON_NUM_THREADS").ok().and_then(|count| count.parse().ok());
    let count = chosen.filter(|count| *count > 0).or_else(|| thread::available_parallelism().ok().map(usize::from));
    count.unwrap_or(1)
}

/// Silences the report of a panic of foreign work, which becomes an error instead.
fn keep_quiet() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |information| {
            if !AT_WORK.get() {
                usual(information);
            }
        }));
    });
}

/// How long each thread has been at the same piece of work.
struct Watch {
    pool_state: &'static PoolState,
    /// For each thread: the value of [`ThreadState::turn`] at the last look, and the time since it
    /// changed.
    seen: Vec<(u64, Duration)>,
    before: Instant,
}

impl Watch {
    fn new(pool_state: &'static PoolState) -> Watch {
        Watch { pool_state, seen: vec![(0, Duration::ZERO); pool_state.threads.len()], before: Instant::now() }
    }

    fn look(&mut self) -> Option<DatasetError> {
        let now = Instant::now();
        let passed = now.duration_since(self.before).min(GLANCE);
        self.before = now;
        for (thread_state, seen) in self.pool_state.threads.iter().zip(&mut self.seen) {
            let turn = thread_state.turn.load(Ordering::Acquire);
            let reason = match thread_state.ended.load(Ordering::Acquire) {
                OUT_OF_MEMORY => Some(format!(
                    "it takes more than {} MiB of memory",
                    thread_state.bytes.load(Ordering::Relaxed) >> 20
                )),
                OUT_OF_STACK => Some("it nests too deeply".to_owned()),
                _ if turn % 2 == 0 || turn != seen.0 => {
                    *seen = (turn, Duration::ZERO);
                    None
                }
                _ => {
                    seen.1 += passed;
                    let limit = Duration::from_millis(thread_state.milliseconds.load(Ordering::Relaxed));
                    (seen.1 > limit).then(|| format!("it does not end within {:.0} s", limit.as_secs_f64()))
                }
            };
            if let Some(reason) = reason {
                let foreign = locked(&thread_state.foreign).clone();
                self.pool_state.stop(foreign.unwrap_or_else(|| Foreign::Template("unknown".to_owned())), None, reason);
                break;
            }
        }
        self.pool_state.stopped()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::prelude::*;

    const BOUNDS: Bounds = Bounds { time: Duration::from_millis(300), bytes: usize::MAX };

    /// For work that ends, on a machine that may be busy.
    const PATIENT: Bounds = Bounds { time: Duration::from_secs(60), bytes: usize::MAX };

    fn foreign() -> Foreign {
        Foreign::Template("some.jinja".to_owned())
    }

    fn told(error: DatasetError) -> String {
        match error {
            DatasetError::TemplateBounds { origin, line: None, reason } if origin == "some.jinja" => reason,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn what_ends_comes_back() {
        assert_eq!(watched(&foreign(), PATIENT, || 7).expect("a number"), 7);
        let many = on_guarded_threads(|| {
            let work = (0..100u64).into_par_iter().map(|n| watched(&foreign(), PATIENT, move || n));
            work.collect::<Result<Vec<u64>, DatasetError>>()
        });
        assert_eq!(many.expect("threads").expect("numbers"), (0..100).collect::<Vec<u64>>());
    }

    #[test]
    fn what_does_not_end_is_left_behind() {
        let begin = Instant::now();
        let sleeper = || thread::sleep(Duration::from_secs(30));
        assert!(told(watched(&foreign(), BOUNDS, sleeper).expect_err("too long")).contains("does not end"));
        // The others of the same pool come to an end too, although their work swallows the error.
        let error = on_guarded_threads(move || {
            (0..10_000u64).into_par_iter().for_each(|n| {
                let _ = watched(&foreign(), BOUNDS, move || {
                    thread::sleep(Duration::from_secs(if n == 0 { 30 } else { 0 }))
                });
            });
        });
        assert!(told(error.expect_err("too long")).contains("does not end"));
        assert!(begin.elapsed() < Duration::from_secs(25));
        assert_eq!(watched(&foreign(), PATIENT, || 7).expect("a new pool"), 7);
    }

    #[test]
    fn a_panic_is_an_error() {
        let error = watched(&foreign(), PATIENT, || -> u8 { panic!("no {}", "luck") }).expect_err("a panic");
        assert_eq!(told(error), "it failed within: no luck");
        assert_eq!(watched(&foreign(), PATIENT, || 7).expect("the same pool"), 7);
    }

    #[test]
    fn memory_and_stack_run_out() {
        let bounds = Bounds { bytes: 1000, ..PATIENT };
        let error = watched(&foreign(), bounds, || {
            (0..100).for_each(|_| allocated(100));
        });
        assert!(told(error.expect_err("too much")).contains("memory"));
        let fine = watched(&foreign(), bounds, || {
            (0..100).for_each(|_| {
                allocated(900);
                freed(900);
            });
        });
        fine.expect("never more than 900 at a time");
        assert!(told(watched(&foreign(), bounds, faulted).expect_err("a fault")).contains("nests"));
        // Elsewhere they do nothing.
        allocated(usize::MAX);
        faulted();
    }
}
