//! The program's exit codes: each once, with what it means. Schedulers act on them.
//! docs/exit-codes.md and README.md have the same table, which a test compares with this file.

use std::process::ExitCode;

use finetune_launch::restart::PEER_LOST;
use finetune_trainer::Fault;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Done,
    /// A panic, or a wrong result of `cluster bench`.
    Bug,
    /// Recipe, data, model, arguments; hosts on which a run would not work.
    Input,
    /// A rank or the network was lost: another try may succeed.
    PeerLost,
    /// A loss, a gradient or a merged weight is not finite.
    Numbers,
    /// The disk is full or fails, or there is too little memory.
    DiskOrMemory,
    /// This signal asked to stop. What there was to save is saved, unless a second signal came.
    Stopped(i32),
}

impl Exit {
    /// The exit code. After a signal it is what shells report for a program that a signal ended.
    pub(crate) fn number(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Bug => 1,
            Exit::Input => 2,
            Exit::PeerLost => PEER_LOST,
            Exit::Numbers => 4,
            Exit::DiskOrMemory => 5,
            Exit::Stopped(signal) => 128 + signal as u8,
        }
    }

    /// The end of a rank that hears from another one that it ends with `code`. What ends one rank
    /// ends all, in the same way.
    pub(crate) fn of_other_rank(code: u8) -> Exit {
        let shared = [Exit::Input, Exit::PeerLost, Exit::Numbers, Exit::DiskOrMemory];
        shared.into_iter().find(|exit| exit.number() == code).unwrap_or(Exit::PeerLost)
    }

    /// Ends the process at once.
    pub(crate) fn end(self) -> ! {
        std::process::exit(self.number().into())
    }
}

impl From<Fault> for Exit {
    fn from(fault: Fault) -> Exit {
        match fault {
            Fault::Input => Exit::Input,
            Fault::Peers => Exit::PeerLost,
            Fault::Numbers => Exit::Numbers,
            Fault::DiskOrMemory => Exit::DiskOrMemory,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.number())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory;
    use finetune_launch::restart;
    use signal_hook::consts::{SIGINT, SIGTERM};

    use super::*;

    /// The signals that have a row. docs/exit-codes.md says in a sentence what others give.
    const ALL: [Exit; 8] = [
        Exit::Done,
        Exit::Bug,
        Exit::Input,
        Exit::PeerLost,
        Exit::Numbers,
        Exit::DiskOrMemory,
        Exit::Stopped(SIGINT),
        Exit::Stopped(SIGTERM),
    ];

    /// What the tables say.
    fn meaning(exit: Exit) -> &'static str {
        match exit {
            Exit::Done => "done",
            Exit::Bug => "a bug of ours",
            Exit::Input => "bad input",
            Exit::PeerLost => "another rank was lost",
            Exit::Numbers => "loss or gradient not finite",
            Exit::DiskOrMemory => "disk or memory",
            Exit::Stopped(SIGINT) => "stopped by SIGINT (Ctrl-C), after saving",
            Exit::Stopped(SIGTERM) => "stopped by SIGTERM, after saving",
            Exit::Stopped(signal) => panic!("signal {signal} has no row"),
        }
    }

    /// The first two cells of each row of the table of exit codes, which begins with `header`.
    fn rows(file: &str, header: &str) -> Vec<(u8, String)> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(file);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let table = text.lines().skip_while(|line| !line.starts_with(header)).skip(2);
        let cells = table.take_while(|line| line.starts_with('|')).map(|line| {
            let mut cells = line.trim_matches('|').split('|').map(str::trim);
            (cells.next().unwrap_or_default(), cells.next().unwrap_or_default())
        });
        cells
            .map(|(code, meaning)| {
                let code = code.parse::<u8>().unwrap_or_else(|error| panic!("{file}: exit code {code:?}: {error}"));
                (code, meaning.to_owned())
            })
            .collect()
    }

    #[test]
    fn the_tables_have_each_exit_code_once_and_no_other() {
        let expected: Vec<(u8, String)> = ALL.map(|exit| (exit.number(), meaning(exit).to_owned())).to_vec();
        assert_eq!(rows("docs/exit-codes.md", "| code | meaning |"), expected);
        assert_eq!(rows("README.md", "| exit code | meaning |"), expected);
    }

    #[test]
    fn faults_of_a_run_have_the_numbers_that_ranks_tell_each_other() {
        for fault in [Fault::Input, Fault::Peers, Fault::Numbers, Fault::DiskOrMemory] {
            assert_eq!(i32::from(Exit::from(fault).number()), fault.number(), "{fault:?}");
            assert_eq!(Exit::of_other_rank(fault.number() as u8), Exit::from(fault));
        }
        for code in [0, 1, 6, 130] {
            assert_eq!(Exit::of_other_rank(code), Exit::PeerLost, "{code}");
        }
    }

    /// A bug is nothing to plan for, so the help leaves it out.
    #[test]
    fn the_help_of_run_has_them() {
        let command = crate::cli::Cli::command();
        let run = command.find_subcommand("run").expect("a command");
        let text = run.get_long_about().expect("a long help").to_string();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        for exit in [Exit::Done, Exit::Input, Exit::PeerLost, Exit::Numbers, Exit::DiskOrMemory] {
            let entry = format!("{} {}", exit.number(), meaning(exit));
            assert!(text.contains(&entry), "{entry} is not in: {text}");
        }
    }

    #[test]
    fn the_launcher_has_the_same_numbers() {
        assert_eq!(restart::BAD_INPUT, Exit::Input.number());
        for exit in [Exit::Bug, Exit::Input, Exit::PeerLost, Exit::Numbers, Exit::DiskOrMemory] {
            assert_eq!(restart::exit_code(exit.number().into()), exit.number(), "{exit:?}");
        }
    }
}
