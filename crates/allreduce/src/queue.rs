//! Messages that wait between two threads, in their order: a bounded number of them.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many messages a queue holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// So many in any case.
    pub(crate) messages: usize,
    /// More of them while they are less than so many bytes in all.
    pub(crate) bytes: usize,
}

#[derive(Default)]
struct State {
    messages: VecDeque<Vec<u8>>,
    bytes: usize,
    closed: bool,
}

/// A queue with one thread at each end. Who waits looks up every `look`, and asks whether to go on.
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    bounds: Bounds,
}

impl Queue {
    pub(crate) fn new(bounds: Bounds) -> Queue {
        Queue { state: Mutex::default(), changed: Condvar::new(), bounds }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of the other thread cannot leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `is_ready`, or the queue is closed. `None`: `goes_on` has said no.
    fn wait(
        &self,
        look: Duration,
        is_ready: impl Fn(&State) -> bool,
        goes_on: &mut dyn FnMut() -> bool,
    ) -> Option<MutexGuard<'_, State>> {
        let mut state = self.lock();
        while !is_ready(&state) && !state.closed {
            let (waited, timeout) = self.changed.wait_timeout(state, look).unwrap_or_else(PoisonError::into_inner);
            state = waited;
            if timeout.timed_out() && !goes_on() {
                return None;
            }
        }
        Some(state)
    }

    fn has_room(&self, state: &State) -> bool {
        state.messages.len() < self.bounds.messages || state.bytes < self.bounds.bytes
    }

    /// Waits until a message has room. Whether one can be put.
    pub(crate) fn wait_for_room(&self, look: Duration, goes_on: &mut dyn FnMut() -> bool) -> bool {
        self.wait(look, |state| self.has_room(state), goes_on).is_some_and(|state| !state.closed)
    }

    /// Puts a message, if there is room and the queue is open; otherwise gives it back.
    pub(crate) fn put_now(&self, message: Vec<u8>) -> Result<(), Vec<u8>> {
        let mut state = self.lock();
        if state.closed || !self.has_room(&state) {
            return Err(message);
        }
        state.bytes += message.len();
        state.messages.push_back(message);
        self.changed.notify_all();
        Ok(())
    }

    /// The first message, if there is any.
    pub(crate) fn take_now(&self) -> Option<Vec<u8>> {
        self.take_of(&mut self.lock())
    }

    /// Waits for a message. `None`: the queue is closed and empty, or `goes_on` has said no.
    pub(crate) fn take(&self, look: Duration, goes_on: &mut dyn FnMut() -> bool) -> Option<Vec<u8>> {
        let mut state = self.wait(look, |state| !state.messages.is_empty(), goes_on)?;
        self.take_of(&mut state)
    }

    fn take_of(&self, state: &mut State) -> Option<Vec<u8>> {
        let message = state.messages.pop_front()?;
        state.bytes -= message.len();
        self.changed.notify_all();
        Some(message)
    }

    /// Nothing more is put. What is there can still be taken.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK: Duration = Duration::from_millis(1);

    #[test]
    fn a_queue_is_bounded_by_messages_and_small_ones_by_bytes() {
        let queue = Queue::new(Bounds { messages: 2, bytes: 10 });
        for length in [6, 1, 3] {
            assert_eq!(queue.put_now(vec![0; length]), Ok(()), "{length} bytes");
        }
        assert_eq!(queue.put_now(vec![1]), Err(vec![1]), "three messages with ten bytes are there");
        assert!(!queue.wait_for_room(LOOK, &mut || false));
        assert_eq!(queue.take_now().map(|message| message.len()), Some(6));
        assert!(queue.wait_for_room(LOOK, &mut || false));
        assert_eq!(queue.put_now(vec![0; 50]), Ok(()));
        assert_eq!(queue.put_now(vec![1]), Err(vec![1]));
    }

    #[test]
    fn a_closed_queue_gives_what_it_has_and_takes_nothing() {
        let queue = Queue::new(Bounds { messages: 2, bytes: 0 });
        assert_eq!(queue.put_now(vec![7]), Ok(()));
        queue.close();
        assert_eq!(queue.put_now(vec![8]), Err(vec![8]));
        assert!(!queue.wait_for_room(LOOK, &mut || true));
        assert_eq!(queue.take(LOOK, &mut || true), Some(vec![7]));
        assert_eq!(queue.take(LOOK, &mut || true), None);
    }

    #[test]
    fn a_message_wakes_who_waits_for_it() {
        let queue = Queue::new(Bounds { messages: 1, bytes: 0 });
        let long = Duration::from_secs(60);
        std::thread::scope(|scope| {
            let taken = scope.spawn(|| [(); 3].map(|()| queue.take(long, &mut || false)));
            for message in 0..3u8 {
                assert!(queue.wait_for_room(long, &mut || false));
                assert_eq!(queue.put_now(vec![message]), Ok(()));
            }
            assert_eq!(taken.join().expect("no panic"), [Some(vec![0]), Some(vec![1]), Some(vec![2])]);
        });
    }

    #[test]
    fn who_waits_can_give_up() {
        let queue = Queue::new(Bounds { messages: 1, bytes: 0 });
        let mut looks = 0;
        let mut three = || {
            looks += 1;
            looks < 3
        };
        assert_eq!(queue.take(LOOK, &mut three), None);
        assert_eq!(looks, 3);
    }
}
