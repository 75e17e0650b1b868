//! The answer of a script that frames what its commands print with marks, taken apart.
//!
//! The marks are random: nothing that a command or a login shell prints is taken for one.

use std::collections::BTreeMap;

#[cfg(test)]
mod tests;

/// The largest answers seen are below 100 kB: `system_profiler` of a Mac Studio with docks.
pub(crate) const MAX_ANSWER_BYTES: usize = 8 << 20;
const MAX_SECTION_BYTES: usize = 1 << 20;
const MAX_SECTIONS: usize = 64;

/// The output of one command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Bytes that are no UTF-8 are replaced; cut after 1 MiB.
    pub text: String,
    /// Its exit status; `None` if it did not end, or the end of the output is missing.
    pub status: Option<i32>,
}

/// The output of the script by sections. It is not trusted: sections may be missing, cut or
/// nonsense.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Transcript {
    sections: BTreeMap<String, Section>,
    /// Whether the script came to its end.
    pub complete: bool,
}

impl Transcript {
    /// Takes an answer apart. Everything outside the marks (greetings of a login shell) is dropped;
    /// of two sections with one name the first counts. Never fails: an answer without marks has no
    /// sections.
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

    /// Whether there is no section.
    pub fn is_empty(&self) -> bool {
        self.sections.is_empty()
    }

    /// The section of this name, if the host has sent it.
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
