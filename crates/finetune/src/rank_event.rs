//! What a rank tells its launcher: lines of standard output that begin with a mark, among lines
//! that are shown.
//!
//! They say when there is something to save or to finish, what was saved, and whose failure a rank has only
//! heard of.

use std::path::PathBuf;

use finetune_trainer::Event;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::output;

/// No line of text begins with it, nor any other line of data.
const MARK: &str = "\u{1}told ";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum RankEvent {
    /// From now on a signal finishes a step and saves it, or lets answers come to their end.
    Working,
    /// A checkpoint is there.
    Saved { step: u64, path: PathBuf },
    /// The rank ends because of the failure of these ranks.
    EndedBy { ranks: Vec<usize> },
}

/// Tells the launcher. If it is gone, the end of standard input says so.
pub(crate) fn send(event: &RankEvent) {
    let _ = output::line(&format!("{MARK}{}", serde_json::to_string(event).expect("plain data")));
}

/// The event of a line, if it is one.
pub(crate) fn parse(line: &str) -> Option<RankEvent> {
    serde_json::from_str(line.strip_prefix(MARK)?).ok()
}

pub(crate) fn of_event(event: &Event<'_>) -> Option<RankEvent> {
    match event {
        Event::Saved { step, path } => {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            Some(RankEvent::Saved { step: *step, path })
        }
        _ => None,
    }
}

/// The event that names the ranks whose failure it was, if not this rank's own.
pub(crate) fn of_failure(failure: &Failure) -> Option<RankEvent> {
    let ranks = failure.blamed();
    (!ranks.is_empty()).then_some(RankEvent::EndedBy { ranks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_text_tell_nothing() {
        let event = RankEvent::EndedBy { ranks: vec![0, 2] };
        let line = format!("{MARK}{}", serde_json::to_string(&event).expect("plain data"));
        assert_eq!(parse(&line), Some(event));
        for line in ["", "told {}", "\u{1}{\"Begin\":{}}", "\u{1}told {\"EndedBy\":7}"] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }
}
