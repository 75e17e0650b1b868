//! Results on stdout. A reader that has gone away (`| head`) is no error.

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
