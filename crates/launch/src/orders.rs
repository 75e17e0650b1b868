//! What a worker reads from its standard input: one line that says what it is, then orders.

use std::io::{self, BufRead, BufReader, Read};

use serde::de::DeserializeOwned;

/// Longest line that a worker reads.
const LONGEST_LINE: u64 = 1 << 20;

/// What a worker is told after its first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// To finish what it does, as after this signal.
    Stop(i32),
    /// The launcher is gone, or wants the worker to end.
    Gone,
}

/// The worker's side: reads the first line. Orders that come later go to `hear`, the last of them
/// [`Order::Gone`].
///
/// # Errors
/// If the first line is not JSON of a `T`.
pub fn assignment<T: DeserializeOwned>(mut hear: impl FnMut(Order) + Send + 'static) -> Result<T, String> {
    let mut line = String::new();
    let mut stdin = BufReader::new(io::stdin());
    let mut first = (&mut stdin).take(LONGEST_LINE);
    first.read_line(&mut line).map_err(|error| format!("no assignment on standard input: {error}"))?;
    let assignment = serde_json::from_str(&line).map_err(|error| format!("not an assignment: {error}"))?;
    std::thread::spawn(move || {
        let mut line = String::new();
        while stdin.by_ref().take(LONGEST_LINE).read_line(&mut line).is_ok_and(|read| read > 0) {
            match line.trim().split_once(' ') {
                Some(("stop", signal)) => signal.parse().into_iter().for_each(|signal| hear(Order::Stop(signal))),
                _ => break,
            }
            line.clear();
        }
        hear(Order::Gone);
    });
    Ok(assignment)
}
