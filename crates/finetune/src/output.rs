//! Results on stdout. A reader that has gone away (`| head`) is no error.

use std::borrow::Cow;
use std::io::{ErrorKind, Write};

/// Writes text to stdout as it is.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    write(&mut std::io::stdout().lock(), text)
}

/// [`print`] with a line break.
pub(crate) fn line(text: &str) -> std::io::Result<()> {
    print(&format!("{text}\n"))
}

/// [`print`] for text with colors. They are taken out if no terminal shows them.
pub(crate) fn colored(text: &str) -> std::io::Result<()> {
    write(&mut anstream::stdout().lock(), text)
}

fn write(out: &mut dyn Write, text: &str) -> std::io::Result<()> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// Text that a terminal may get: line feeds and tabs stay. Other control characters, and those that
/// turn the direction of writing around, are shown instead of obeyed. Carriage returns go: they
/// would let a line write over itself.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    let is_plain = |letter: char| !letter.is_control() && !is_turning(letter) || matches!(letter, '\n' | '\t');
    if text.chars().all(is_plain) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '\r' => {}
            letter if is_plain(letter) => shown.push(letter),
            letter => shown.extend(letter.escape_default()),
        }
    }
    Cow::Owned(shown)
}

/// Overrides and isolates of the direction of writing, which have no end of their own.
fn is_turning(letter: char) -> bool {
    matches!(letter, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn a_terminal_gets_no_orders() {
        for (text, want) in [
            ("plain é 漢 👩‍👧\n\ttab", "plain é 漢 👩‍👧\n\ttab"),
            ("a\r\nb\rc", "a\nbc"),
            ("\u{1b}[2J\u{7}", "\\u{1b}[2J\\u{7}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("abc\u{202e}def", "abc\\u{202e}def"),
        ] {
            assert_eq!(printable(text), want);
        }
    }
}
