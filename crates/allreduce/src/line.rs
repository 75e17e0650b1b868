//! Lines: messages from one rank to another, which travel while both compute.
//!
//! ```text
//! send ──▶ queue ──▶ thread ── length, then frames ──▶ thread ──▶ queue ──▶ receive
//! ```
//!
//! A line is a group of two ranks with a thread at each end. What carries its frames is what carries those of the
//! group: both ends know of no transport. A rank that waits in [`Sender::send`] or [`Receiver::receive`] is inside an
//! operation, with the deadlines of one; the threads are not.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::{GroupContext, Interrupted};
use crate::error::GroupError;
use crate::frame::Descriptor;
use crate::group::{Group, Inner};
use crate::operation::Fault;
use crate::operation_driver::{EXPLANATION, OWN_STOP, cause_of};
use crate::queue::{Bounds, Queue};
use crate::transport::Backend;
use crate::verdict::Cause;

#[cfg(test)]
mod tests;

/// What has arrived before it is asked for: two messages, so that one comes while the other is used. More of them if
/// they are short.
const ARRIVED: Bounds = Bounds { messages: 2, bytes: 1 << 20 };

/// Between two looks of a rank that waits at whether the group has failed.
const LOOK: Duration = Duration::from_millis(10);

/// Between two looks of a thread that has nothing to send: what ends it wakes it.
const REST: Duration = Duration::from_secs(10);

/// One end of a line.
struct Line {
    /// The two ranks.
    group: Group,
    /// The rank at the other end, as a rank of the group of two.
    peer: usize,
    backend: Backend,
    queue: Queue,
    /// Grows with what the thread moves.
    moved: AtomicU64,
    /// The end is dropped.
    ended: AtomicBool,
    /// The other end has closed the line between two messages: nothing is lost, unless more is asked for.
    closed_by_peer: Mutex<Option<Fault>>,
    messages: AtomicU64,
    bytes: AtomicU64,
    waited_nanoseconds: AtomicU64,
}

/// The end of a line that messages are sent from. Dropping it sends what was put into it.
pub struct Sender {
    line: Arc<Line>,
    thread: Option<JoinHandle<()>>,
}

/// The end of a line where messages arrive.
pub struct Receiver {
    line: Arc<Line>,
    thread: Option<JoinHandle<()>>,
}

impl Group {
    /// Makes a group of two ranks a line to the other one, which calls [`Group::receiver`]. `queued`: the most messages
    /// that wait to be sent.
    ///
    /// # Errors
    /// If there is no thread for it.
    ///
    /// # Panics
    /// If the group has not two ranks.
    pub fn sender(self, queued: usize) -> io::Result<Sender> {
        let line = Line::new(self, Bounds { messages: queued.max(1), bytes: 0 });
        let thread = line.start("line out", Line::send_all)?;
        Ok(Sender { line, thread: Some(thread) })
    }

    /// The other end of [`Group::sender`].
    ///
    /// # Errors
    /// If there is no thread for it.
    ///
    /// # Panics
    /// If the group has not two ranks.
    pub fn receiver(self) -> io::Result<Receiver> {
        let line = Line::new(self, ARRIVED);
        let thread = line.start("line in", Line::receive_all)?;
        Ok(Receiver { line, thread: Some(thread) })
    }
}

impl Sender {
    /// Sends a message. Returns at once, unless as many as there may be wait to be sent.
    ///
    /// # Errors
    /// If the group has failed.
    pub fn send(&self, message: Vec<u8>) -> Result<(), GroupError> {
        let line = &self.line;
        let bytes = message.len();
        if line.context().membership.status().has_failed() {
            return Err(line.failure(bytes));
        }
        if let Err(message) = line.queue.put_now(message) {
            let has_room = |goes_on: &mut dyn FnMut() -> bool| line.queue.wait_for_room(LOOK, goes_on).then_some(());
            line.wait(bytes, has_room)?;
            line.queue.put_now(message).map_err(|_| line.failure(bytes))?;
        }
        line.count(bytes);
        Ok(())
    }

    /// Bytes of all messages so far.
    pub fn bytes(&self) -> u64 {
        self.line.bytes.load(Ordering::Relaxed)
    }

    /// What carries them.
    pub fn backend(&self) -> Backend {
        self.line.backend
    }
}

impl Receiver {
    /// The next message, which the other rank sends with [`Sender::send`], and which has `bytes` bytes.
    ///
    /// # Errors
    /// If the group has failed, or a message of another length comes.
    pub fn receive(&self, bytes: usize) -> Result<Vec<u8>, GroupError> {
        let line = &self.line;
        let message = match line.queue.take_now() {
            Some(message) => message,
            None => line.wait(bytes, |goes_on| line.queue.take(LOOK, goes_on))?,
        };
        line.taken(message, bytes)
    }

    /// As [`Receiver::receive`], but `None` if no message has arrived yet. It does not wait.
    ///
    /// # Errors
    /// As [`Receiver::receive`].
    pub fn arrived(&self, bytes: usize) -> Result<Option<Vec<u8>>, GroupError> {
        let line = &self.line;
        match line.queue.take_now() {
            Some(message) => line.taken(message, bytes).map(Some),
            None if line.context().membership.status().has_failed() => Err(line.failure(bytes)),
            None => Ok(None),
        }
    }

    /// Bytes of all messages so far.
    pub fn bytes(&self) -> u64 {
        self.line.bytes.load(Ordering::Relaxed)
    }

    /// How long this rank has waited for them.
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.line.waited_nanoseconds.load(Ordering::Relaxed))
    }

    /// What carries them.
    pub fn backend(&self) -> Backend {
        self.line.backend
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.line.end(&mut self.thread);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.line.end(&mut self.thread);
    }
}

/// Closes a queue when its thread ends, in whichever way.
struct Closing<'a>(&'a Queue);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Line {
    fn new(group: Group, bounds: Bounds) -> Arc<Line> {
        assert_eq!(group.world(), 2, "a line joins two ranks");
        Arc::new(Line {
            peer: 1 - group.rank(),
            backend: group.backend(),
            group,
            queue: Queue::new(bounds),
            moved: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            closed_by_peer: Mutex::new(None),
            messages: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            waited_nanoseconds: AtomicU64::new(0),
        })
    }

    fn start(self: &Arc<Self>, name: &str, work: fn(&Line)) -> io::Result<JoinHandle<()>> {
        let line = Arc::clone(self);
        let thread = std::thread::Builder::new().name(name.to_owned());
        thread.spawn(move || {
            let _closing = Closing(&line.queue);
            work(&line);
        })
    }

    fn end(&self, thread: &mut Option<JoinHandle<()>>) {
        self.ended.store(true, Ordering::Relaxed);
        self.queue.close();
        if let Some(thread) = thread.take() {
            let _ = thread.join();
        }
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    fn context(&self) -> &GroupContext {
        &self.group.inner.context
    }

    fn count(&self, bytes: usize) {
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// A message that has to have so many bytes.
    fn taken(&self, message: Vec<u8>, bytes: usize) -> Result<Vec<u8>, GroupError> {
        if message.len() != bytes {
            self.report(self.diverged(bytes, message.len()));
            return Err(self.failure(bytes));
        }
        self.count(bytes);
        Ok(message)
    }

    /// Something has moved.
    fn add_moved(&self) {
        self.moved.fetch_add(1, Ordering::Relaxed);
        self.context().membership.status().add_moved_beside();
    }

    /// Keeps the links usable while the thread has nothing to do.
    fn rest(&self) -> bool {
        self.group.keep_alive();
        true
    }

    /// The thread of a sender.
    fn send_all(&self) {
        while let Some(message) = self.queue.take(REST, &mut || self.rest()) {
            let mut moved_at = Instant::now();
            let mut goes_on = |moved: bool| {
                if moved {
                    self.add_moved();
                    moved_at = Instant::now();
                }
                // Who drops a sender waits for what the other end still takes.
                !self.has_ended() || moved_at.elapsed() < self.context().timeout
            };
            let length = (message.len() as u64).to_le_bytes();
            for part in [&length[..], &message] {
                let sent = self.group.inner.message_beside(self.peer, &mut [], part, true, &mut goes_on);
                if let Err(interrupted) = sent {
                    return self.on_interrupted(interrupted, false);
                }
            }
        }
    }

    /// The thread of a receiver.
    fn receive_all(&self) {
        let mut goes_on = |moved: bool| {
            if moved {
                self.add_moved();
            }
            !self.has_ended()
        };
        let mut hear = |part: &mut [u8]| self.group.inner.message_beside(self.peer, part, &[], false, &mut goes_on);
        while self.queue.wait_for_room(REST, &mut || self.rest()) {
            let mut length = [0; 8];
            if let Err(interrupted) = hear(&mut length) {
                return self.on_interrupted(interrupted, true);
            }
            let Some(mut message) = zeros(u64::from_le_bytes(length)) else {
                let what = format!("it announces a message of {} bytes", u64::from_le_bytes(length));
                let peer = self.peer_of_all();
                return self.report(Cause::Damaged { peer, link: 0, what });
            };
            if let Err(interrupted) = hear(&mut message) {
                return self.on_interrupted(interrupted, false);
            }
            if self.queue.put_now(message).is_err() {
                return;
            }
        }
    }

    /// A thread cannot go on. `is_between`: it waited for a message to begin.
    fn on_interrupted(&self, interrupted: Interrupted, is_between: bool) {
        let Interrupted::Fault { fault, begun } = interrupted else { return };
        if is_closed(&fault) && is_between && !begun {
            // The other rank may be done before this one is.
            *self.closed_by_peer.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault);
        } else {
            self.report_fault(fault);
        }
    }

    fn report_fault(&self, fault: Fault) {
        // The death of the other rank most likely explains a closed link.
        let explained = is_closed(&fault) && self.fails_within(EXPLANATION);
        if !explained && !self.has_ended() {
            self.report(cause_of(fault, &self.group.inner.members));
        }
    }

    /// Whether the group fails within that time.
    fn fails_within(&self, within: Duration) -> bool {
        self.context().membership.status().wait_for_verdict(within).is_some()
    }

    fn report(&self, cause: Cause) {
        let context = self.context();
        context.membership.report(context.rank, cause);
        self.fails_within(context.timeout * 2);
    }

    /// Waits inside an operation, for what `until` waits for as long as it is told to go on.
    fn wait<T>(
        &self,
        bytes: usize,
        until: impl FnOnce(&mut dyn FnMut() -> bool) -> Option<T>,
    ) -> Result<T, GroupError> {
        let (context, began) = (self.context(), Instant::now());
        let (status, patience) = (context.membership.status(), context.patience());
        status.enter(None);
        let moved = || self.moved.load(Ordering::Relaxed);
        let (mut watch, mut stalled) = (Watch::new(status.now(), moved()), None);
        let came = until(&mut || {
            let now = status.now();
            let idle = watch.idle(now, moved());
            stalled = patience.is_over(now, idle, status).then_some(idle);
            stalled.is_none() && !status.has_failed()
        });
        status.stop_waiting();
        self.waited_nanoseconds.fetch_add(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
        if let Some(came) = came {
            return Ok(came);
        }
        let closed = self.closed_by_peer.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (stalled, closed) {
            (Some(idle), _) => self.report(self.stalled(idle, bytes)),
            (None, Some(fault)) => self.report_fault(fault),
            (None, None) => {}
        }
        Err(self.failure(bytes))
    }

    /// The other rank, as a rank of the first group.
    fn peer_of_all(&self) -> usize {
        self.group.inner.members[self.peer]
    }

    fn this_message(&self, bytes: usize) -> (u64, Descriptor) {
        (self.messages.load(Ordering::Relaxed), Inner::message_descriptor(bytes))
    }

    fn stalled(&self, idle: Duration, bytes: usize) -> Cause {
        let (operation, mine) = self.this_message(bytes);
        Cause::Stalled { waiting_for: vec![self.peer_of_all()], seconds: idle.as_secs(), operation, mine }
    }

    fn diverged(&self, bytes: usize, found: usize) -> Cause {
        let ((operation, mine), (peer_operation, theirs)) = (self.this_message(bytes), self.this_message(found));
        Cause::Diverged { peer: self.peer_of_all(), operation, mine, peer_operation, theirs }
    }

    /// Why the group has failed.
    fn failure(&self, bytes: usize) -> GroupError {
        self.group.engine().failure(Some(self.this_message(bytes)))
    }
}

fn is_closed(fault: &Fault) -> bool {
    matches!(fault, Fault::Broken(broken) if broken.closed)
}

/// So many zeros, if there is memory for them.
fn zeros(bytes: u64) -> Option<Vec<u8>> {
    let mut zeros = Vec::new();
    zeros.try_reserve_exact(usize::try_from(bytes).ok()?).ok()?;
    zeros.resize(bytes as usize, 0);
    Some(zeros)
}

/// For how long nothing has moved.
struct Watch {
    since: Duration,
    looked: Duration,
    moved: u64,
}

impl Watch {
    fn new(now: Duration, moved: u64) -> Watch {
        Watch { since: now, looked: now, moved }
    }

    /// A process that was stopped has not waited, and the others may have been stopped with it.
    fn idle(&mut self, now: Duration, moved: u64) -> Duration {
        if moved != self.moved || now.saturating_sub(self.looked) > OWN_STOP {
            (self.since, self.moved) = (now, moved);
        }
        self.looked = now;
        now.saturating_sub(self.since)
    }
}
