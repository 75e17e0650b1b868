//! Messages from a file or pipe: each line is one, or the lines between quotes.

use std::io::{BufRead, Read, stdin};

use super::editor::Next;
use super::input::Joined;
use crate::failure::Failure;

/// Longest text, in bytes: as a row of a dataset.
const LONGEST: usize = 16 << 20;

#[derive(Default)]
pub(super) struct Lines {
    joined: Joined,
    /// Lines that were read.
    count: usize,
}

impl Lines {
    /// The number of the last line that was read.
    pub(super) fn line(&self) -> usize {
        self.count
    }

    /// Reads the next text.
    pub(super) fn next(&mut self) -> Result<Next, Failure> {
        self.next_of(&mut stdin().lock())
    }

    fn next_of(&mut self, input: &mut dyn BufRead) -> Result<Next, Failure> {
        let (mut text, first) = (None::<String>, self.count + 1);
        loop {
            let Some(line) = self.line_of(input)? else {
                return match text {
                    None => Ok(Next::End),
                    Some(text) if text.ends_with('\\') => Ok(Next::Entered(self.joined.take(text))),
                    Some(_) => Err(Failure::arguments(
                        format!("line {first} of standard input begins a text with \"\"\" that does not end"),
                        "end it with \"\"\" at the end of a line",
                    )),
                };
            };
            let whole = match text {
                Some(begun) => format!("{begun}\n{line}"),
                None => line,
            };
            if whole.len() > LONGEST {
                return Err(too_long(first));
            }
            if !self.joined.goes_on(&whole) {
                return Ok(Next::Entered(self.joined.take(whole)));
            }
            text = Some(whole);
        }
    }

    /// The next line without its end.
    fn line_of(&mut self, input: &mut dyn BufRead) -> Result<Option<String>, Failure> {
        let mut bytes = Vec::new();
        let unreadable = |error: std::io::Error| {
            Failure::arguments(format!("standard input cannot be read: {error}"), "pipe in a text, a message a line")
        };
        input.take(LONGEST as u64 + 2).read_until(b'\n', &mut bytes).map_err(unreadable)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        self.count += 1;
        for end in *b"\n\r" {
            if bytes.last() == Some(&end) {
                bytes.pop();
            }
        }
        if bytes.len() > LONGEST {
            return Err(too_long(self.count));
        }
        let text = String::from_utf8(bytes).map_err(|_| {
            Failure::arguments(format!("line {} of standard input is not UTF-8 text", self.count), "save it as UTF-8")
        })?;
        Ok(Some(text))
    }
}

fn too_long(line: usize) -> Failure {
    let message = format!("the text at line {line} of standard input has more than {LONGEST} bytes");
    Failure::arguments(message, "is this the text you meant?")
}

#[cfg(test)]
mod tests {
    use super::super::input::Entered;
    use super::*;

    fn all(text: &[u8]) -> (Vec<Entered>, Option<String>) {
        let (mut lines, mut input, mut got) = (Lines::default(), text, Vec::new());
        loop {
            match lines.next_of(&mut input) {
                Ok(Next::Entered(entered)) => got.push(entered),
                Ok(_) => return (got, None),
                Err(failure) => return (got, Some(failure.fact())),
            }
        }
    }

    #[test]
    fn each_line_is_a_text_unless_it_goes_on() {
        let line = |text: &str| Entered::Line(text.to_owned());
        let (got, error) = all(b"one\r\n\ntwo \\\nthree\n\"\"\"\n a\n\n/b\n\"\"\"\nlast");
        let want = [line("one"), line(""), line("two \nthree"), Entered::Block(" a\n\n/b".to_owned()), line("last")];
        assert_eq!((got, error), (want.to_vec(), None));
        assert_eq!(all(b"one \\"), (vec![line("one \\")], None), "a backslash at the end of all");
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, says) in [
            (&b"one\n\"\"\"\ntwo\n"[..], "line 2 of standard input begins a text"),
            (b"one\ntwo \xff\n", "line 2 of standard input is not UTF-8"),
        ] {
            let (got, error) = all(text);
            assert_eq!(got.len(), 1);
            assert!(error.as_deref().is_some_and(|error| error.starts_with(says)), "{error:?}");
        }
    }
}
