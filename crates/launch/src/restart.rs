//! Which rank is to blame for the end of a launch, and whether another try is worth it.

use std::ops::RangeInclusive;

use crate::workers::WorkerExit;

/// Exit code of a rank, and of a launch, with wrong input: another try ends the same way.
pub const BAD_INPUT: u8 = 2;
/// Exit code of a rank, and of a launch, that lost a rank: another try may succeed.
pub const PEER_LOST: u8 = 3;
/// The program's exit codes for failures.
const FAILURES: RangeInclusive<i32> = 1..=5;

/// The shell's exit code if a program cannot be run.
pub const NOT_RUNNABLE: i32 = 126;
/// The shell's exit code if there is no such program.
pub const NO_PROGRAM: i32 = 127;
/// ssh's exit code if ssh itself failed, or its connection broke. A worker that has ended before it
/// began counts as one.
pub const SSH_FAILED: i32 = 255;

/// The rank that ended the run, if one failed: a rank with an error of its own before ranks that
/// lost another one or only heard of a failure, and of those the earliest. `heard_of`: per rank,
/// the ranks whose failure it reports. `stop`: the signal that the ranks were told to stop by, or
/// 0.
pub fn culprit(exits: &[WorkerExit], heard_of: &[Vec<usize>], stop: i32) -> Option<usize> {
    let failed = |exit: &WorkerExit| exit.code != 0 && (stop == 0 || exit.code != 128 + stop);
    let failed = exits.iter().enumerate().filter(|(_, exit)| failed(exit));
    failed
        .min_by_key(|(rank, exit)| {
            let heard = heard_of.get(*rank).is_some_and(|ranks| !ranks.is_empty());
            (heard, exit.code == i32::from(PEER_LOST), exit.after)
        })
        .map(|(rank, _)| rank)
}

/// The launcher's exit code for a rank that ended with `code`. A rank that was killed, or whose
/// connection broke, is a lost one.
pub fn exit_code(code: i32) -> u8 {
    match code {
        NOT_RUNNABLE | NO_PROGRAM => BAD_INPUT,
        code if FAILURES.contains(&code) => code as u8,
        _ => PEER_LOST,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{culprit, exit_code};
    use crate::workers::WorkerExit;

    #[test]
    fn the_rank_that_failed_first_is_named_and_gives_the_exit_code() {
        /// The ranks' codes, a signal that was passed on, and who is named with which exit code.
        type Case = (&'static [i32], i32, Option<(usize, u8)>);
        let cases: [Case; 9] = [
            (&[0, 0], 0, None),
            (&[3, 137, 3], 0, Some((1, 3))),
            (&[3, 3, 2], 0, Some((2, 2))),
            (&[3, 4], 0, Some((1, 4))),
            (&[5, 3], 0, Some((0, 5))),
            (&[130, 130], 2, None),
            (&[130, 137], 2, Some((1, 3))),
            (&[3, 255], 0, Some((1, 3))),
            (&[127, 3], 0, Some((0, 2))),
        ];
        for (codes, stop, expected) in cases {
            let exit = |(rank, &code): (usize, &i32)| WorkerExit {
                code,
                after: Duration::from_millis(rank as u64),
                forced: false,
                left: None,
            };
            let exits: Vec<WorkerExit> = codes.iter().enumerate().map(exit).collect();
            let found = culprit(&exits, &[], stop).map(|rank| (rank, exit_code(exits[rank].code)));
            assert_eq!(found, expected, "{codes:?}");
        }
    }

    /// Those that heard of a failure end with its exit code, and often before the rank that failed.
    #[test]
    fn a_rank_that_only_heard_of_the_failure_is_not_blamed() {
        let exit = |code, after| WorkerExit { code, after: Duration::from_millis(after), forced: false, left: None };
        for (exits, heard_of, expected) in [
            (vec![exit(2, 30), exit(2, 10), exit(2, 20)], vec![vec![], vec![0], vec![0]], 0),
            (vec![exit(5, 10), exit(5, 40)], vec![vec![1], vec![]], 1),
            (vec![exit(3, 10), exit(137, 40), exit(3, 5)], vec![vec![1], vec![], vec![1]], 1),
            // None of the ranks that are left failed by itself.
            (vec![exit(3, 30), exit(3, 10)], vec![vec![2], vec![2]], 1),
        ] {
            assert_eq!(culprit(&exits, &heard_of, 0), Some(expected), "{heard_of:?}");
        }
    }
}
