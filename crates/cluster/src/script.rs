//! The one question to a host: a shell script that runs every reading command and prints what they said between marks,
//! and the reader of its answer.
//!
//! The marks are random, so that nothing a command prints (or a login shell before it) can pass for one.

use std::collections::BTreeMap;
use std::path::Path;

use crate::shell::quoted;

#[cfg(test)]
mod tests;

/// The largest answers seen are below 100 kB: `system_profiler` of a Mac Studio with docks.
pub(crate) const MAX_ANSWER_BYTES: usize = 8 << 20;
const MAX_SECTION_BYTES: usize = 1 << 20;
const MAX_SECTIONS: usize = 64;

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
        include_str!("script/facts.sh"),
    )
}

/// What one command said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Bytes that are no UTF-8 are replaced; cut after 1 MiB.
    pub text: String,
    /// Its exit status; `None` if it did not end, or nobody saw it.
    pub status: Option<i32>,
}

/// What the script printed, taken apart. Nothing in it is trusted: sections may be missing, cut or nonsense.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Transcript {
    sections: BTreeMap<String, Section>,
    /// Whether the script came to its end.
    pub complete: bool,
}

impl Transcript {
    /// Takes an answer apart. Everything outside the marks (greetings of a login shell) is dropped; of two sections with
    /// one name the first counts. Never fails: an answer without marks has no sections.
    pub fn parse(answer: &[u8], mark: &str) -> Self {
        let answer = String::from_utf8_lossy(&answer[..answer.len().min(MAX_ANSWER_BYTES)]);
        let mut transcript = Self::default();
        let mut open: Option<(String, Section)> = None;
        for line in answer.split_inclusive('\n') {
            let words: Option<Vec<&str>> =
                line.trim_end().strip_prefix(mark).map(|rest| rest.split_whitespace().collect());
            match words.as_deref() {
                Some(["begin", name]) => {
                    transcript.close(open.take());
                    open = Some(((*name).to_owned(), Section { text: String::new(), status: None }));
                }
                Some(["end", name, status]) => {
                    if let Some((open, section)) = &mut open
                        && open == name
                    {
                        section.status = status.parse().ok();
                        // The script puts a line break of its own in front of each mark.
                        if section.text.ends_with('\n') {
                            section.text.pop();
                        }
                    }
                    transcript.close(open.take());
                }
                Some(["done"]) => transcript.complete = true,
                _ => {
                    if let Some((_, section)) = &mut open
                        && section.text.len() + line.len() <= MAX_SECTION_BYTES
                    {
                        section.text.push_str(line);
                    }
                }
            }
        }
        transcript.close(open);
        transcript
    }

    /// A transcript from sections at hand, all of which succeeded: for tests and examples.
    pub fn of(sections: &[(&str, &str)]) -> Self {
        let section = |text: &str| Section { text: text.to_owned(), status: Some(0) };
        let sections = sections.iter().map(|(name, text)| ((*name).to_owned(), section(text))).collect();
        Self { sections, complete: true }
    }

    /// Whether nothing came that the script printed.
    pub fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }

    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.get(name)
    }

    fn close(&mut self, section: Option<(String, Section)>) {
        if let Some((name, section)) = section
            && self.sections.len() < MAX_SECTIONS
        {
            self.sections.entry(name).or_insert(section);
        }
    }
}
