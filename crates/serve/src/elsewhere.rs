//! Which forms the other ranks have read, on the first rank: a request begins once all of them have, so that no engine
//! waits for a form while others are answered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::others::HaveRead;

/// How often it is looked whether the others are done.
const LOOK: Duration = Duration::from_millis(2);

/// The forms that the other ranks are asked to read.
pub(crate) struct Elsewhere {
    have_read: HaveRead,
    /// How many other ranks there are.
    others: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    asked: u64,
    /// How many ranks have not read a form, of those that somebody waits for.
    missing: BTreeMap<u64, usize>,
}

impl Elsewhere {
    /// `others`: how many other ranks there are.
    pub(crate) fn new(have_read: HaveRead, others: usize) -> Arc<Elsewhere> {
        Arc::new(Elsewhere { have_read, others, state: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A form that the others are asked to read, with a number of its own.
    pub(crate) fn expect(self: &Arc<Elsewhere>) -> Expected {
        let mut state = self.lock();
        state.asked += 1;
        let number = state.asked;
        state.missing.insert(number, self.others);
        drop(state);
        Expected { elsewhere: Arc::clone(self), number }
    }

    /// How many ranks have not read a form. What they say of others is taken in, too.
    fn missing(&self, number: u64) -> Result<usize, String> {
        let mut state = self.lock();
        for number in (self.have_read)()? {
            // Of a form that nobody waits for any more nothing is kept.
            if let Some(missing) = state.missing.get_mut(&number) {
                *missing = missing.saturating_sub(1);
            }
        }
        Ok(state.missing.get(&number).copied().unwrap_or(0))
    }
}

/// A form that the other ranks read.
pub(crate) struct Expected {
    elsewhere: Arc<Elsewhere>,
    number: u64,
}

impl Expected {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Waits until all of them have read it. False: that takes longer.
    ///
    /// # Errors
    /// A sentence, if a rank is lost.
    pub(crate) async fn wait(&self, longest: Duration) -> Result<bool, String> {
        let began = Instant::now();
        while self.elsewhere.missing(self.number)? > 0 {
            if began.elapsed() >= longest {
                return Ok(false);
            }
            sleep(LOOK).await;
        }
        Ok(true)
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.elsewhere.lock().missing.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn a_form_is_there_once_every_rank_has_read_it() {
        let said = Arc::<Mutex<Vec<u64>>>::default();
        let heard = Arc::clone(&said);
        let have_read: HaveRead = Arc::new(move || Ok(std::mem::take(&mut *heard.lock().expect("no panic"))));
        let elsewhere = Elsewhere::new(have_read, 2);
        let say = |numbers: &[u64]| said.lock().expect("no panic").extend(numbers);
        let (first, second) = (elsewhere.expect(), elsewhere.expect());
        assert_ne!(first.number(), second.number());
        say(&[first.number(), second.number()]);
        assert_eq!(first.wait(SHORT).await, Ok(false), "one of two");
        say(&[second.number()]);
        assert_eq!(second.wait(Duration::ZERO).await, Ok(true), "whoever asks takes in what is said of all");
        assert_eq!(first.wait(SHORT).await, Ok(false));
        let late = async {
            sleep(SHORT).await;
            say(&[first.number()]);
        };
        let (waited, ()) = tokio::join!(first.wait(Duration::from_secs(60)), late);
        assert_eq!(waited, Ok(true));
        let number = first.number();
        drop((first, second));
        say(&[number, 99]);
        let third = elsewhere.expect();
        assert_eq!(third.wait(SHORT).await, Ok(false), "what is said of others");
        assert_eq!(elsewhere.lock().missing.len(), 1, "nothing is kept of those that nobody waits for");
    }

    #[tokio::test]
    async fn a_rank_that_is_lost_ends_the_waiting() {
        let elsewhere = Elsewhere::new(Arc::new(|| Err("rank 1 is lost".to_owned())), 1);
        assert_eq!(elsewhere.expect().wait(Duration::from_secs(60)).await, Err("rank 1 is lost".to_owned()));
    }
}
