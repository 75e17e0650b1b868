//! Follows files of a folder at another host. Nothing is needed there but a POSIX shell.
//!
//! One session runs a loop that looks once a second. What has come to the growing file is sent, and
//! small files if they have changed. Everything is read into a variable first, so that the length
//! in front of it is right whatever happens to the file meanwhile.

use std::path::Path;
use std::sync::atomic::AtomicI32;
use std::time::Duration;

use crate::session::{Next, Session, ended, new_mark};
use crate::shell::{path_word, quoted};
use crate::ssh::Remote;
use crate::unanswered::Unanswered;

/// The loop says something every second. A host that is silent for so long is gone.
const PATIENCE: Duration = Duration::from_secs(20);

/// The most bytes of a file that are sent at a time.
const PIECE: usize = 1 << 20;

/// The longest line in front of what is sent.
const LONGEST_HEAD: usize = 4 << 10;

/// Which files of a folder are followed.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The folder. A relative one, and one that begins with `~/`, is below the home directory.
    pub folder: &'a Path,
    /// The file that grows.
    pub growing: &'a str,
    /// Small files, sent as a whole.
    pub whole: &'a [&'a str],
    /// The file that names the process that works in the folder, and its host.
    pub lock: &'a str,
    /// A folder in it, of whose entries `prefix` and a number the last name is sent.
    pub numbered: (&'a str, &'a str),
    /// Folders that are there once the work is done.
    pub results: &'a [&'a str],
}

/// What has been seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// There is no such folder.
    Missing,
    /// Bytes that have come to the growing file. `fresh`: it is another file than before, or the
    /// first; these are its first bytes.
    Grown {
        /// Whether what came before is void.
        fresh: bool,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A small file as it is now.
    Whole {
        /// Its place in [`Files::whole`].
        file: usize,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// The end of a look.
    State {
        /// Whether a process works in the folder; `None` if it is one of a third host.
        held: Option<bool>,
        /// The last of the numbered entries.
        newest: Option<u64>,
        /// Whether one of the results is there.
        has_result: bool,
        /// Whether there is more to read already.
        more: bool,
    },
}

/// Files at another host that are being followed. Dropping it ends the loop there.
pub struct Follow {
    session: Session,
    parser: Parser,
}

impl Follow {
    /// Begins. A signal number in `stop` ends the attempt.
    ///
    /// # Errors
    /// If the login fails or takes too long.
    pub fn open(remote: &Remote, files: &Files<'_>, stop: &AtomicI32) -> Result<Follow, Unanswered> {
        let mark = new_mark()?;
        let session = Session::open(remote, &script(&mark, files), stop)?;
        Ok(Follow { session, parser: Parser { mark, bytes: Vec::new() } })
    }

    /// Waits for what is seen next.
    ///
    /// # Errors
    /// If the connection is lost, or a signal number appears in `stop`.
    pub fn next(&mut self, stop: &AtomicI32) -> Result<Seen, Unanswered> {
        loop {
            if let Some(seen) = self.parser.next() {
                return Ok(seen);
            }
            match self.session.next(stop, PATIENCE, &|| 0)? {
                Next::Output(bytes) => self.parser.bytes.extend(bytes),
                Next::Ended(code) => {
                    // The last words may have come with the end.
                    return self.parser.next().ok_or_else(|| ended(code, self.session.words()));
                }
            }
        }
    }
}

/// The loop, for a POSIX shell.
fn script(mark: &str, files: &Files<'_>) -> String {
    let folder = files.folder.strip_prefix("~").unwrap_or(files.folder);
    let enter =
        if folder.as_os_str().is_empty() { "cd".to_owned() } else { format!("CDPATH= cd -- {}", path_word(folder)) };
    let home = if folder.is_relative() { "cd || exit 2\n" } else { "" };
    let mut script = format!(
        "{home}LC_ALL=C; export LC_ALL\nmark={mark}\n{enter} >/dev/null 2>&1 || {{ printf '%s missing\\n' \"$mark\"; exit 0; }}\n\
         at=0 id=\nwhile :; do\n"
    );
    // In this order: whoever lets go of the lock has written the small files, and whoever has written
    // them has written all of the growing one.
    script += &format!(
        "held=0 pid= host=\n{{ read -r pid host <{lock}; }} 2>/dev/null\nif [ -n \"$pid\" ]; then\n    \
         if [ \"$host\" != \"$(uname -n)\" ]; then held=unknown\n    \
         elif kill -0 \"$pid\" 2>/dev/null || ps -p \"$pid\" >/dev/null 2>&1; then held=1; fi\nfi\n",
        lock = quoted(files.lock),
    );
    for (n, name) in files.whole.iter().enumerate() {
        let name = quoted(name);
        script += &format!(
            "if [ -f {name} ]; then\n    now=$(head -c {PIECE} {name}; printf x)\n    if [ \"$now\" != \"$whole{n}\" ]; then\n        \
             whole{n}=$now; now=${{now%x}}\n        printf '%s whole {n} %s\\n%s' \"$mark\" \"${{#now}}\" \"$now\"\n    fi\nfi\n"
        );
    }
    script += &grown(files.growing);
    let (numbered, prefix) = files.numbered;
    let results: Vec<String> = files.results.iter().map(|name| format!("[ -d {} ]", quoted(name))).collect();
    let results = if results.is_empty() { "false".to_owned() } else { results.join(" || ") };
    script += &format!(
        "newest=$(ls {numbered} 2>/dev/null | grep '^{prefix}[0-9][0-9]*$' | sed 's/^{prefix}//' | sort -n | tail -n 1)\n\
         result=0; if {results}; then result=1; fi\n\
         printf '%s state %s %s %s %s\\n' \"$mark\" \"$held\" \"$result\" \"$more\" \"$newest\" || exit 0\n\
         [ \"$more\" = 1 ] || sleep 1\ndone\n",
        numbered = quoted(numbered),
    );
    script
}

/// The part of the loop that sends what has come to a file.
fn grown(name: &str) -> String {
    let name = quoted(name);
    format!(
        "more=0\nif [ -f {name} ]; then\n    now=$(ls -i {name} | awk '{{ print $1 }}'); size=$(($(wc -c <{name})))\n    fresh=0\n    \
         if [ \"$now\" != \"$id\" ] || [ \"$size\" -lt \"$at\" ]; then id=$now at=0 fresh=1; fi\n    \
         if [ \"$fresh\" = 1 ] || [ \"$size\" -gt \"$at\" ]; then\n        \
         now=$(tail -c \"+$((at + 1))\" {name} | head -c {PIECE}; printf x); now=${{now%x}}\n        \
         printf '%s grown %s %s\\n%s' \"$mark\" \"$fresh\" \"${{#now}}\" \"$now\" || exit 0\n        at=$((at + ${{#now}}))\n        \
         if [ \"${{#now}}\" -ge {PIECE} ]; then more=1; fi\n    fi\nfi\n"
    )
}

/// Takes apart what the loop prints.
struct Parser {
    mark: String,
    bytes: Vec<u8>,
}

impl Parser {
    /// The next thing that has come as a whole.
    fn next(&mut self) -> Option<Seen> {
        loop {
            let end = match self.bytes.iter().take(LONGEST_HEAD).position(|&byte| byte == b'\n') {
                Some(end) => end,
                None => {
                    // Not ours: a head is shorter.
                    if self.bytes.len() > LONGEST_HEAD {
                        self.bytes.clear();
                    }
                    return None;
                }
            };
            let head = String::from_utf8_lossy(&self.bytes[..end]).into_owned();
            let words: Vec<&str> = head.split(' ').collect();
            let length = match words[..] {
                [mark, "grown", _, length] | [mark, "whole", _, length] if mark == self.mark => {
                    length.parse::<usize>().ok().filter(|&length| length <= PIECE)
                }
                _ => Some(0),
            };
            let length = length.unwrap_or(0);
            if self.bytes.len() < end + 1 + length {
                return None;
            }
            let content = self.bytes[end + 1..end + 1 + length].to_vec();
            self.bytes.drain(..end + 1 + length);
            if let Some(seen) = seen(&words, &self.mark, content) {
                return Some(seen);
            }
        }
    }
}

/// What a head and its content say; `None` for other output.
fn seen(words: &[&str], own: &str, bytes: Vec<u8>) -> Option<Seen> {
    match *words {
        [mark, "missing"] if mark == own => Some(Seen::Missing),
        [mark, "grown", fresh, _] if mark == own => Some(Seen::Grown { fresh: fresh == "1", bytes }),
        [mark, "whole", file, _] if mark == own => Some(Seen::Whole { file: file.parse().ok()?, bytes }),
        [mark, "state", held, result, more, newest] if mark == own => Some(Seen::State {
            held: (held != "unknown").then_some(held == "1"),
            newest: newest.parse().ok(),
            has_result: result == "1",
            more: more == "1",
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
