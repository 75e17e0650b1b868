//! Why a host has not answered over ssh.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::complaint::{Trouble, hint, shown};

/// Most lines of a host's output in a message.
const MOST_LINES: usize = 20;

/// Why there is no answer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Unanswered {
    /// ssh is not there, or may not be started.
    #[error("ssh cannot be started: {0}")]
    Start(io::Error),
    /// ssh itself failed.
    #[error("{}", told(words, "ssh failed without a word"))]
    Ssh {
        /// Its words.
        words: String,
    },
    /// The program does not exist at the host.
    #[error("there is no such program: {}{}", program.display(), tilde(program))]
    NoProgram {
        /// Its path.
        program: PathBuf,
    },
    /// The command ended with an exit code other than 0.
    #[error("{}", told(words, &wordless(*code)))]
    Failed {
        /// The exit code.
        code: i32,
        /// What it said.
        words: String,
    },
    /// The login ended before the command was there.
    #[error("its login ended with exit code {code} before the command ran{}", with(words))]
    Login {
        /// The exit code.
        code: i32,
        /// What it said.
        words: String,
    },
    /// Nothing came in time.
    #[error("no answer within {seconds} s{}", with(words))]
    Silent {
        /// How long it was given.
        seconds: u64,
        /// What was said before.
        words: String,
    },
    /// A login file reads what is sent to the command.
    #[error("its login files keep what is sent on standard input, or start another shell that waits for it")]
    ReadsInput,
    /// The login makes a terminal, and a terminal echoes.
    #[error("it gives programs a terminal, which would show the secret of the run")]
    Terminal,
    /// A signal came in the meantime.
    #[error("stopped by a signal")]
    Stopped,
    /// There are no random numbers for the mark of an answer.
    #[error("the system's random generator failed: {0}")]
    Random(String),
    /// A file that is to be sent cannot be read.
    #[error("what is to be sent cannot be read: {0}")]
    Read(io::Error),
}

impl Unanswered {
    /// What the reader of the message can do next.
    pub fn hint(&self, host: &str) -> Option<String> {
        let text = match self {
            Self::Start(_) => "is ssh installed?".to_owned(),
            Self::Login { words, .. } if hint(host, words).is_none() => format!(
                "`ssh -o BatchMode=yes {host} echo there` must print `there`: does a login file there end the login, or ~/.ssh/config send ssh into the background (ForkAfterAuthentication)?"
            ),
            Self::Login { words, .. } | Self::Ssh { words } | Self::Failed { words, .. } => {
                return hint(host, words).map(|(_, hint)| hint);
            }
            Self::Silent { .. } => format!(
                "`ssh -o BatchMode=yes {host} true` must end by itself: is the host awake, and does a login file there wait for something?"
            ),
            Self::ReadsInput => format!(
                "look into ~/.bashrc, ~/.zshrc, ~/.profile and the like at {host}: what reads input or starts a shell belongs behind `case $- in *i*)`; StdinNull in ~/.ssh/config keeps it too"
            ),
            Self::Terminal => format!("take RequestTTY, -t and the like out of what starts ssh to {host}"),
            Self::NoProgram { .. } | Self::Stopped | Self::Random(_) | Self::Read(_) => return None,
        };
        Some(text)
    }

    /// Whether the user has to correct something, or the host may be there again later.
    pub fn trouble(&self) -> Trouble {
        match self {
            Self::Ssh { words } => hint("", words).map_or(Trouble::Absent, |(trouble, _)| trouble),
            Self::Silent { .. } => Trouble::Absent,
            _ => Trouble::Mistake,
        }
    }
}

fn told(words: &str, otherwise: &str) -> String {
    if words.trim().is_empty() { otherwise.to_owned() } else { lines(words) }
}

fn wordless(code: i32) -> String {
    format!("it answered with exit code {code}")
}

fn with(words: &str) -> String {
    if words.trim().is_empty() { String::new() } else { format!(": {}", lines(words)) }
}

/// The last lines of a host's output, indented below the first.
fn lines(words: &str) -> String {
    let all: Vec<String> = words.trim().lines().map(|line| shown(line.trim_end())).collect();
    all[all.len().saturating_sub(MOST_LINES)..].join("\n    ")
}

fn tilde(program: &std::path::Path) -> &'static str {
    if program.starts_with("~") { " (~ is not expanded there: give the whole path)" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_come_back_is_told_from_mistakes() {
        let ssh = |words: &str| Unanswered::Ssh { words: words.to_owned() };
        assert_eq!(ssh("ssh: connect to host a port 22: No route to host").trouble(), Trouble::Absent);
        assert_eq!(ssh("Host key verification failed.").trouble(), Trouble::Mistake);
        assert_eq!(ssh("").to_string(), "ssh failed without a word");
        assert_eq!(Unanswered::ReadsInput.trouble(), Trouble::Mistake);
        for (words, says) in [("\n", "a echo there"), ("bye", "a echo there"), ("No space left on device", "is full")] {
            let hint = Unanswered::Login { code: 1, words: words.to_owned() }.hint("a").expect("always one");
            assert!(hint.contains(says), "{words}: {hint}");
        }
        let none = Unanswered::NoProgram { program: "~/bin/finetune".into() };
        assert!(none.to_string().contains("~/bin/finetune (~ is not expanded"), "{none}");
        let failed = Unanswered::Failed { code: 2, words: "a\u{1b}[2J\nb\n".to_owned() };
        assert_eq!(failed.to_string(), "a\\u{1b}[2J\n    b");
    }
}
