//! What an error tells its reader to do.
//!
//! **Owns** the trait that an error with advice implements. The error's `Display` says what
//! happened; its hints say what to do about it.
//!
//! **Must never know** any error, and how hints are shown.
//!
//! **Start reading** at [`Advice`].

#![forbid(unsafe_code)]
#![warn(missing_docs)]

/// An error that knows what its reader can do next.
pub trait Advice {
    /// What to do, most useful first. Empty if nothing helps that the message does not say.
    fn hints(&self) -> Vec<String>;
}

impl<T: Advice + ?Sized> Advice for Box<T> {
    fn hints(&self) -> Vec<String> {
        (**self).hints()
    }
}
