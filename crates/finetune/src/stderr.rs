//! Standard error. It may be a file on a full disk or a pipe that nobody reads any more: what cannot be said there is lost,
//! and the work goes on.

/// `eprintln!` that never fails, with colors where a terminal shows them.
macro_rules! complain {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(anstream::stderr().lock(), $($words)*);
    }};
}
pub(crate) use complain;
