//! Operations one after the other in the order in which they were called, whichever thread runs
//! them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::error::GroupError;
use crate::group::{Inner, Reduce};

/// Lets operations through in the order of their tickets.
#[derive(Default)]
pub(crate) struct TicketLock {
    next: AtomicU64,
    serving: Mutex<u64>,
    moved: Condvar,
}

impl TicketLock {
    /// A place in the order of operations.
    pub(crate) fn ticket(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Waits for the ticket's turn, and ends it also if `work` panics.
    pub(crate) fn pass<T>(&self, ticket: u64, work: impl FnOnce() -> T) -> T {
        struct Next<'a>(&'a TicketLock);
        impl Drop for Next<'_> {
            fn drop(&mut self) {
                *self.0.serving.lock().unwrap_or_else(PoisonError::into_inner) += 1;
                self.0.moved.notify_all();
            }
        }
        let serving = self.serving.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.moved.wait_while(serving, |serving| *serving != ticket).unwrap_or_else(PoisonError::into_inner));
        let _next = Next(self);
        work()
    }
}

struct Job {
    ticket: u64,
    data: Vec<f32>,
    reduce: Reduce,
    answer: Sender<Result<Vec<f32>, GroupError>>,
}

/// The thread that reduces in the background.
pub(crate) struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(crate) fn start(inner: &Arc<Inner>) -> Worker {
        let (jobs, received): (Sender<Job>, Receiver<Job>) = channel();
        let inner = Arc::clone(inner);
        let run = move || {
            for Job { ticket, mut data, reduce, answer } in received {
                let done = inner.ticket_lock.pass(ticket, || inner.all_reduce(&mut data, &reduce));
                // The caller has dropped its `Pending`. The others needed this rank's part all the
                // same.
                let _ = answer.send(done.map(|()| data));
            }
        };
        let thread = std::thread::Builder::new().name("allreduce-background".into()).spawn(run);
        Worker { jobs: Some(jobs), thread: thread.ok() }
    }

    pub(crate) fn start_all_reduce(&self, inner: &Inner, data: Vec<f32>, reduce: Reduce) -> Pending {
        let (answer, result) = channel();
        let job = Job { ticket: inner.ticket_lock.ticket(), data, reduce, answer };
        let refused = match (&self.jobs, &self.thread) {
            (Some(jobs), Some(_)) => jobs.send(job).err().map(|refused| refused.0),
            _ => Some(job),
        };
        // Without a thread (the system gave none) the work is done here and now.
        if let Some(Job { ticket, mut data, reduce, answer }) = refused {
            let done = inner.ticket_lock.pass(ticket, || inner.all_reduce(&mut data, &reduce));
            let _ = answer.send(done.map(|()| data));
        }
        Pending { result }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A reduction that goes on in the background.
#[must_use = "the reduced buffer is what `wait` returns"]
pub struct Pending {
    result: Receiver<Result<Vec<f32>, GroupError>>,
}

impl Pending {
    /// Waits for the end and gives the reduced buffer back.
    ///
    /// # Errors
    /// If the group has failed.
    ///
    /// # Panics
    /// If the background thread did.
    pub fn wait(self) -> Result<Vec<f32>, GroupError> {
        self.result.recv().expect("the background thread answers every job")
    }
}
