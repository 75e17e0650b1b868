//! The one question to a host: a shell script that runs every reading command and prints what they
//! say between marks. [`finetune_launch::Transcript`] reads the answer.

use std::path::Path;

use finetune_launch::shell::quoted;

/// What to ask besides the plain facts.
#[derive(Debug, Clone, Copy)]
pub struct Questions<'a> {
    /// The program whose version is asked for: a name for the search path, or a path.
    pub program: &'a Path,
    /// The folder whose free disk space counts; a path that starts with '~' is not expanded.
    pub folder: &'a Path,
    /// Whether `sudo -n true` is tried, which leaves a line in the host's log.
    pub root: bool,
}

impl Default for Questions<'_> {
    fn default() -> Self {
        Self { program: Path::new("finetune"), folder: Path::new("."), root: false }
    }
}

/// The script for `sh -s`, with `mark` in front of everything that is not a command's output.
pub(crate) fn text(mark: &str, questions: &Questions<'_>) -> String {
    format!(
        "mark={}\nprogram={}\nfolder={}\nroot={}\n{}",
        quoted(mark),
        quoted(&questions.program.to_string_lossy()),
        quoted(&questions.folder.to_string_lossy()),
        if questions.root { "ask" } else { "leave" },
        include_str!("questions/facts.sh"),
    )
}
