//! Results on stdout. A reader that has gone away (`| head`) has seen enough: that is no error.

use std::io::{ErrorKind, Write};

/// Writes text to stdout, colors only where a terminal shows them.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    let mut out = anstream::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// [`print`] with a line break.
pub(crate) fn line(text: &str) -> std::io::Result<()> {
    print(&format!("{text}\n"))
}
