//! What carries frames: one trait, so that the algorithms are written once.

pub(crate) mod in_process;
pub(crate) mod rdma;
pub(crate) mod tcp;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::frame::HEADER_BYTES;

/// What carries the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// Threads of one process.
    InProcess,
    /// TCP connections.
    Tcp,
    /// RDMA verbs.
    Rdma,
}

impl fmt::Display for Backend {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Backend::InProcess => "in_process",
            Backend::Tcp => "tcp",
            Backend::Rdma => "rdma",
        })
    }
}

/// A link that is broken: nothing moves on it any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    pub(crate) peer: usize,
    pub(crate) link: usize,
    /// The peer closed it. Most likely the peer ended, and the session will say so.
    pub(crate) closed: bool,
    pub(crate) what: String,
}

/// A direction of a link that an operation waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    pub(crate) peer: usize,
    pub(crate) link: usize,
    pub(crate) receive: bool,
    pub(crate) send: bool,
}

/// Longest time that [`Transport::idle`] may sleep. It bounds how late a waiting rank notices that
/// the group failed.
pub(crate) const LONGEST_SLEEP: Duration = Duration::from_millis(10);

/// Links to the other ranks of one group. No call blocks, except `idle`.
///
/// A link is an ordered pair of byte pipes to one peer: one TCP connection, or one wire of RDMA. Both ends know from the plan of an operation which frames travel on it, in which order
/// and how long. A transport only moves them. It keeps no half-sent frames: the caller keeps the
/// frame and the count of bytes that have left.
pub(crate) trait Transport: Send {
    /// What carries the data.
    fn backend(&self) -> Backend;

    /// Payload bytes of the next frame when `remaining` bytes are to go: at most `remaining`, and a
    /// multiple of 8 if less. Every rank of the group answers alike.
    fn frame_bytes(&self, remaining: usize) -> usize;

    /// Whether payloads on this link have a checksum: all that leave this machine.
    fn checks_payloads(&self, _peer: usize, _link: usize) -> bool {
        true
    }

    /// Goes on sending a frame of which `sent` bytes (header first) have left. Returns whether any
    /// more left now. The frame is done, and its memory may change, when `sent` is 64 plus the
    /// payload's length.
    ///
    /// # Errors
    /// If the link is broken.
    fn send(
        &mut self,
        peer: usize,
        link: usize,
        header: &[u8; HEADER_BYTES],
        payload: &[u8],
        sent: &mut usize,
    ) -> Result<bool, Broken>;

    /// Goes on receiving the next frame, whose payload is expected to be as long as `payload`.
    /// Returns whether any more came now. The header is complete once `filled` is 64 and must be
    /// checked before more is asked for: a frame of another length stops at 64.
    ///
    /// # Errors
    /// If the link is broken.
    fn receive(
        &mut self,
        peer: usize,
        link: usize,
        header: &mut [u8; HEADER_BYTES],
        payload: &mut [u8],
        filled: &mut usize,
    ) -> Result<bool, Broken>;

    /// Whether a payload of `length` bytes on this link can be looked at where the transport holds
    /// it, by [`Transport::look`] instead of `receive`, once its header was received.
    fn holds(&self, _peer: usize, _link: usize, _length: usize) -> bool {
        false
    }

    /// Calls `look` with the payload of the next frame where the transport holds it, if all of it
    /// has come, and then lets go of it. The payload is in two parts, of which the first has a
    /// multiple of 8 bytes unless the second is empty. Returns whether it had come. Asked only where
    /// the transport [`holds`](Transport::holds) such payloads.
    ///
    /// # Errors
    /// If the link is broken.
    fn look(
        &mut self,
        _peer: usize,
        _link: usize,
        _length: usize,
        _look: &mut dyn FnMut([&[u8]; 2]),
    ) -> Result<bool, Broken> {
        Ok(false)
    }

    /// Sends something over links that have carried nothing for so long, if the transport needs
    /// that.
    ///
    /// # Errors
    /// If a link is broken.
    fn keep_alive(&mut self, _unused_for: Duration) -> Result<(), Broken> {
        Ok(())
    }

    /// Called when nothing moved, for the `round`-th time in a row (from 0). Spins, yields or
    /// sleeps as suits the transport, at most [`LONGEST_SLEEP`].
    fn idle(&mut self, wants: &[Want], round: u32);
}
