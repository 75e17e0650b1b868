//! What the other ranks have done of what the first one asked them for beside computing, on the first rank: forms that
//! they read, and adapters that they load. A request begins once all of them have its form, and an adapter is there once
//! all of them have it, so that no engine waits for either while others are answered.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::others::{Heard, Reply};

/// How often it is looked whether the others are done.
const LOOK: Duration = Duration::from_millis(2);

/// What the other ranks are asked for.
pub(crate) struct Elsewhere {
    heard: Heard,
    /// The host of each rank.
    hosts: Vec<String>,
    state: Mutex<State>,
}

struct State {
    /// The number of what is asked for next.
    next: u64,
    /// What somebody waits for.
    expected: BTreeMap<u64, Answers>,
}

/// What the ranks have said of something.
struct Answers {
    /// The ranks that have said nothing.
    missing: BTreeSet<usize>,
    /// The first rank that could not, and why.
    refusal: Option<(usize, String)>,
}

impl Elsewhere {
    /// `hosts`: of all ranks. `models`: how many there are at the start. They have the first numbers.
    pub(crate) fn new(heard: Heard, hosts: Vec<String>, models: u64) -> Arc<Elsewhere> {
        let state = Mutex::new(State { next: models, expected: BTreeMap::new() });
        Arc::new(Elsewhere { heard, hosts, state })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something that the others are asked for, with a number of its own.
    pub(crate) fn expect(self: &Arc<Elsewhere>) -> Expected {
        let mut state = self.lock();
        // What nobody waits for any more leaves the lines. Whoever waits hears of an error.
        let _ = self.take_in(&mut state);
        let number = state.next;
        state.next += 1;
        let missing = (1..self.hosts.len()).collect();
        state.expected.insert(number, Answers { missing, refusal: None });
        drop(state);
        Expected { elsewhere: Arc::clone(self), number }
    }

    /// Takes in what has been said, of whatever it is.
    fn take_in(&self, state: &mut State) -> Result<(), String> {
        for Reply { rank, number, refusal } in (self.heard)()? {
            // Of what nobody waits for any more nothing is kept.
            let Some(answers) = state.expected.get_mut(&number) else { continue };
            answers.missing.remove(&rank);
            answers.refusal = answers.refusal.take().or(refusal.map(|what| (rank, what)));
        }
        Ok(())
    }

    /// A rank, for people.
    fn name(&self, rank: usize) -> String {
        format!("rank {rank} ({})", self.hosts.get(rank).map_or("", String::as_str))
    }
}

/// Something that the other ranks are asked for.
pub(crate) struct Expected {
    elsewhere: Arc<Elsewhere>,
    number: u64,
}

/// What has become of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Became {
    /// All ranks have done it.
    Done,
    /// This rank could not, for this reason.
    Refused(String, String),
    /// These ranks have not come to it.
    Late(String),
}

impl Expected {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Waits until all of them have done it, or one could not.
    ///
    /// # Errors
    /// A sentence, if a rank is lost.
    pub(crate) async fn wait(&self, longest: Duration) -> Result<Became, String> {
        let began = Instant::now();
        loop {
            let became = self.became()?;
            if !matches!(became, Became::Late(_)) || began.elapsed() >= longest {
                return Ok(became);
            }
            sleep(LOOK).await;
        }
    }

    fn became(&self) -> Result<Became, String> {
        let mut state = self.elsewhere.lock();
        self.elsewhere.take_in(&mut state)?;
        let Answers { missing, refusal } = state.expected.get(&self.number).expect("it is there until this is dropped");
        let name = |rank: usize| self.elsewhere.name(rank);
        Ok(match refusal {
            Some((rank, what)) => Became::Refused(name(*rank), what.clone()),
            None if missing.is_empty() => Became::Done,
            None => Became::Late(missing.iter().map(|rank| name(*rank)).collect::<Vec<_>>().join(", ")),
        })
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.elsewhere.lock().expected.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    /// Three ranks, two models at the start, and what the others say.
    fn three_ranks() -> (Arc<Elsewhere>, Arc<Mutex<Vec<Reply>>>) {
        let said = Arc::<Mutex<Vec<Reply>>>::default();
        let own = Arc::clone(&said);
        let heard: Heard = Arc::new(move || Ok(std::mem::take(&mut *own.lock().expect("no panic"))));
        (Elsewhere::new(heard, ["a", "b", "c"].map(str::to_owned).into(), 2), said)
    }

    fn done(rank: usize, number: u64) -> Reply {
        Reply { rank, number, refusal: None }
    }

    fn late(ranks: &str) -> Result<Became, String> {
        Ok(Became::Late(ranks.to_owned()))
    }

    #[tokio::test]
    async fn it_is_there_once_every_rank_has_done_it() {
        let (elsewhere, said) = three_ranks();
        let say = |replies: &[Reply]| said.lock().expect("no panic").extend_from_slice(replies);
        let (first, second) = (elsewhere.expect(), elsewhere.expect());
        assert_eq!([first.number(), second.number()], [2, 3], "behind those of the models");
        say(&[done(2, 2), done(1, 3)]);
        assert_eq!(first.wait(SHORT).await, late("rank 1 (b)"));
        say(&[done(2, 3)]);
        assert_eq!(second.wait(Duration::ZERO).await, Ok(Became::Done), "whoever asks takes in what is said of all");
        assert_eq!(first.wait(SHORT).await, late("rank 1 (b)"));
        let later = async {
            sleep(SHORT).await;
            say(&[done(1, 2)]);
        };
        let (waited, ()) = tokio::join!(first.wait(Duration::from_secs(60)), later);
        assert_eq!(waited, Ok(Became::Done));
        drop((first, second));
        say(&[done(1, 2), done(1, 99)]);
        let third = elsewhere.expect();
        assert_eq!(third.wait(SHORT).await, late("rank 1 (b), rank 2 (c)"), "what is said of others");
        assert_eq!(elsewhere.lock().expected.len(), 1, "nothing is kept of what nobody waits for");
    }

    /// Nobody waits for the other ranks then.
    #[tokio::test]
    async fn a_rank_that_cannot_is_named_with_its_reason() {
        let (elsewhere, said) = three_ranks();
        let expected = elsewhere.expect();
        let what = || Some("there is no adapter".to_owned());
        said.lock().expect("no panic").push(Reply { refusal: what(), ..done(2, expected.number()) });
        let want = Became::Refused("rank 2 (c)".to_owned(), "there is no adapter".to_owned());
        assert_eq!(expected.wait(Duration::from_secs(60)).await, Ok(want.clone()));
        said.lock().expect("no panic").push(Reply { refusal: what(), ..done(1, expected.number()) });
        assert_eq!(expected.wait(SHORT).await, Ok(want), "the first reason counts");
    }

    #[tokio::test]
    async fn a_rank_that_is_lost_ends_the_waiting() {
        let heard: Heard = Arc::new(|| Err("rank 1 is lost".to_owned()));
        let elsewhere = Elsewhere::new(heard, ["a", "b"].map(str::to_owned).into(), 1);
        assert_eq!(elsewhere.expect().wait(Duration::from_secs(60)).await, Err("rank 1 is lost".to_owned()));
    }
}
