//! Standard error. It may be a file on a full disk, or a pipe without a reader. A line that cannot
//! be written is lost, and the work goes on.

/// `eprintln!` that never fails. Colors are left out if no terminal shows them.
macro_rules! complain {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(anstream::stderr().lock(), $($words)*);
    }};
}
pub(crate) use complain;
