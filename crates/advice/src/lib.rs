//! What an error tells its reader to do.
//!
//! **Owns** the one trait by which every library error gives its hints. The error's sentence says
//! what was found and where. Its hints say what to do about it, and the program prints them in
//! lines of their own.
//!
//! **Must never know** any error, and how hints are shown.
//!
//! **Start reading** at [`Advice`].

#![forbid(unsafe_code)]
#![warn(missing_docs)]

/// An error that knows what its reader can do next.
pub trait Advice {
    /// What to do, most useful first. Each hint is one sentence without a full stop. Empty if
    /// nothing is known that helps.
    fn hints(&self) -> Vec<String>;
}

impl<T: Advice + ?Sized> Advice for Box<T> {
    fn hints(&self) -> Vec<String> {
        (**self).hints()
    }
}
