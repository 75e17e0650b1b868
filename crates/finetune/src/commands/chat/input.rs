//! Several lines as one text: a line that ends with a backslash goes on, and so does a text behind
//! three quotes until three quotes end a line.

/// Encloses a text of several lines.
const QUOTES: &str = "\"\"\"";

/// What was entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entered {
    /// It may be a command.
    Line(String),
    /// It was enclosed in quotes, so it is a message.
    Block(String),
}

/// Puts the lines of a text together.
#[derive(Debug, Default)]
pub(super) struct Joined {
    /// The text up to each backslash that was typed to go on. Those of a pasted text are its own.
    continued: Vec<String>,
}

impl Joined {
    /// Whether another line belongs to the text that was entered so far.
    pub(super) fn goes_on(&mut self, text: &str) -> bool {
        if has_block(text) {
            return !is_closed(text);
        }
        let goes_on = text.ends_with('\\');
        if goes_on {
            self.continued.push(text.to_owned());
        }
        goes_on
    }

    /// What a whole text means. The next one begins.
    pub(super) fn take(&mut self, mut text: String) -> Entered {
        let continued = std::mem::take(&mut self.continued);
        if text.trim_start().starts_with(QUOTES) && is_closed(&text) {
            return Entered::Block(without_quotes(&text).to_owned());
        }
        for begun in continued.iter().rev() {
            if text.strip_prefix(begun.as_str()).is_some_and(|rest| rest.starts_with('\n')) {
                text.remove(begun.len() - 1);
            }
        }
        Entered::Line(text)
    }
}

/// A text without the quotes around it, and without the line breaks next to them.
pub(super) fn without_quotes(text: &str) -> &str {
    let inner = text.trim().strip_prefix(QUOTES).and_then(|rest| rest.strip_suffix(QUOTES));
    let Some(inner) = inner else { return text };
    let inner = inner.strip_prefix('\n').unwrap_or(inner);
    inner.strip_suffix('\n').unwrap_or(inner)
}

fn has_block(text: &str) -> bool {
    let start = text.trim_start();
    start.starts_with(QUOTES) || start.starts_with('/') && start.contains(QUOTES)
}

fn is_closed(text: &str) -> bool {
    text.trim_end().ends_with(QUOTES) && text.matches(QUOTES).count() > 1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines that are entered one after the other, and the texts that come of them.
    #[test]
    fn lines_become_texts() {
        let line = |text: &str| Entered::Line(text.to_owned());
        let block = |text: &str| Entered::Block(text.to_owned());
        for (lines, want) in [
            ("one\ntwo", vec![line("one"), line("two")]),
            ("one\\\ntwo", vec![line("one\ntwo")]),
            ("one\\\n\\\nthree\nfour", vec![line("one\n\nthree"), line("four")]),
            ("\"\"\"\none\n\n/two\n\"\"\"\nthree", vec![block("one\n\n/two"), line("three")]),
            ("\"\"\"one\ntwo\"\"\"", vec![block("one\ntwo")]),
            ("\"\"\"one\"\"\"", vec![block("one")]),
            ("\"\"\"\"\"\"", vec![block("")]),
            ("\"\"\"\nC:\\\n\"\"\"", vec![block("C:\\")]),
            ("/system \"\"\"\none\ntwo\n\"\"\"", vec![line("/system \"\"\"\none\ntwo\n\"\"\"")]),
            ("say \"\"\" now", vec![line("say \"\"\" now")]),
        ] {
            let (mut joined, mut text, mut got) = (Joined::default(), None::<String>, Vec::new());
            for line in lines.split('\n') {
                let whole = text.take().map_or_else(|| line.to_owned(), |begun| format!("{begun}\n{line}"));
                if joined.goes_on(&whole) {
                    text = Some(whole);
                } else {
                    got.push(joined.take(whole));
                }
            }
            assert_eq!((got, text), (want, None), "{lines}");
        }
    }

    /// What was pasted keeps its backslashes; only those that were typed to go on are taken out.
    #[test]
    fn pasted_backslashes_stay() {
        let mut joined = Joined::default();
        assert!(!joined.goes_on("curl -X \\\n  a"));
        assert_eq!(joined.take("curl -X \\\n  a".to_owned()), Entered::Line("curl -X \\\n  a".to_owned()));
        assert!(joined.goes_on("see: \\"));
        assert!(!joined.goes_on("see: \\\ncurl -X \\\n  a"));
        let want = Entered::Line("see: \ncurl -X \\\n  a".to_owned());
        assert_eq!(joined.take("see: \\\ncurl -X \\\n  a".to_owned()), want);
    }

    #[test]
    fn quotes_around_an_argument() {
        for (text, want) in
            [("\"\"\"\na\nb\n\"\"\"", "a\nb"), ("a", "a"), ("\"\"\"a", "\"\"\"a"), ("\"\"\" a \"\"\"", " a ")]
        {
            assert_eq!(without_quotes(text), want);
        }
    }
}
