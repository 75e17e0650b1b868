//! What a rank tells the launcher that has started it, besides what is to be shown: lines of its standard output that no text
//! begins like. They say when there is something to save, what was saved, and whose failure a rank has only heard of.

use std::path::PathBuf;

use finetune_allreduce::{GroupError, JoinError, Verdict};
use finetune_trainer::{Event, TrainError};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::output;

/// No line of text begins with it, and no other line of data.
const MARK: &str = "\u{1}told ";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Told {
    /// From now on a signal finishes a step and saves it.
    Working,
    /// A checkpoint is there.
    Saved { step: u64, path: PathBuf },
    /// It ends because of these ranks.
    EndedBy { ranks: Vec<usize> },
}

/// Tells the launcher. One that is gone does not listen; the end of standard input says so, and what to do.
pub(crate) fn tell(told: &Told) {
    let _ = output::line(&format!("{MARK}{}", serde_json::to_string(told).expect("plain data")));
}

/// What a line tells, if it is one.
pub(crate) fn heard(line: &str) -> Option<Told> {
    serde_json::from_str(line.strip_prefix(MARK)?).ok()
}

pub(crate) fn of_event(event: &Event<'_>) -> Option<Told> {
    match event {
        Event::Saved { step, path } => {
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            Some(Told::Saved { step: *step, path })
        }
        _ => None,
    }
}

/// Whose failure it was, if not this rank's own.
pub(crate) fn of_failure(failure: &Failure) -> Option<Told> {
    let ranks = match failure {
        Failure::Train(TrainError::Group { error, .. })
        | Failure::Group(error)
        | Failure::Join(JoinError::Group(error)) => others(error),
        Failure::Join(JoinError::Peer { peer, .. }) => vec![*peer],
        _ => Vec::new(),
    };
    (!ranks.is_empty()).then_some(Told::EndedBy { ranks })
}

fn others(error: &GroupError) -> Vec<usize> {
    match &error.verdict {
        Verdict::Reported { by, .. } if *by != error.rank => vec![*by],
        _ => error.lost_ranks().into_iter().filter(|rank| *rank != error.rank).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_text_tell_nothing() {
        let told = Told::EndedBy { ranks: vec![0, 2] };
        let line = format!("{MARK}{}", serde_json::to_string(&told).expect("plain data"));
        assert_eq!(heard(&line), Some(told));
        for line in ["", "told {}", "\u{1}{\"Begin\":{}}", "\u{1}told {\"EndedBy\":7}"] {
            assert_eq!(heard(line), None, "{line:?}");
        }
    }
}
