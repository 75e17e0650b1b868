//! Asks hosts for their facts, all at once, one ssh round trip each.

use std::thread;
use std::time::Duration;

use finetune_launch::gather::{GatherError, MAX_HOSTS_ASKED, ask};

use crate::facts::Facts;
use crate::questions::{Questions, text};

#[cfg(test)]
mod tests;

/// For everything that is asked of a host: `system_profiler` takes one to three seconds.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Asks all hosts at the same time; the answers come in their order. This host is asked without
/// ssh: see [`finetune_rendezvous::is_this_host`].
///
/// # Errors
/// Per host. One that does not answer costs no more than `deadline`, and delays the others no longer
/// than that.
pub fn gather(hosts: &[String], questions: &Questions<'_>, deadline: Duration) -> Vec<Result<Facts, GatherError>> {
    if hosts.len() > MAX_HOSTS_ASKED {
        return hosts.iter().map(|_| Err(GatherError::TooMany { hosts: hosts.len() })).collect();
    }
    thread::scope(|scope| {
        let asked: Vec<_> =
            hosts.iter().map(|host| scope.spawn(move || gather_one(host, questions, deadline))).collect();
        asked.into_iter().map(|asked| asked.join().expect("gathering does not panic")).collect()
    })
}

fn gather_one(host: &str, questions: &Questions<'_>, deadline: Duration) -> Result<Facts, GatherError> {
    let (transcript, arrived) = ask(host, &|mark| text(mark, questions), deadline)?;
    Ok(Facts::from_transcript(host, &transcript, arrived))
}
