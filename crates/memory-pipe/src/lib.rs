//! Byte pipes through memory that two processes of one machine share.
//!
//! **Owns** the memory (a file without a name, Linux's memfd), its layout, and the rules by which
//! one process writes what the other reads. A connection within one machine copies every byte into
//! the system and out again, with a call for each piece; a pipe copies it once into the memory and
//! once out, without a call.
//!
//! **Must never know** frames, ranks and what the bytes mean. It never waits: who finds nothing to
//! read says that it sleeps ([`Pipe::sleep`]), and the other side learns from [`Moved::wake`] that
//! it has to be woken, by whatever means the two have.
//!
//! **Start reading** at [`Pipe`].

#![warn(missing_docs)]

mod pipe;
mod ring;

pub use pipe::{NONCE_BYTES, Offer, Pipe};
pub use ring::{Damaged, Moved};
