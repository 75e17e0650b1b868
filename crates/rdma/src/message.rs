//! What callers send over a wire: a head of 64 bytes and a payload.

/// Bytes of a head.
pub const HEAD_BYTES: usize = 64;

/// The first bytes of a message, which the caller fills. They must not begin with `FTCR`: that
/// marks a report, which the two ends of a wire send each other.
pub type Head = [u8; HEAD_BYTES];

/// What a head says of its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    /// The count of messages before this one in this direction of the wire, modulo 2^32.
    pub sequence: u32,
    /// Bytes of the payload.
    pub payload_bytes: u32,
}

/// Reads a head; none if it is damaged.
///
/// Messages of different sizes travel over different queue pairs, so they may arrive in another
/// order. A wire hands them out in the order of their sequences. A damaged message is handed out
/// when no other is due: the caller checks the head and the payload.
pub type ReadHead = fn(&Head) -> Option<Announced>;

/// What came of a call to receive a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// No message has come.
    Nothing,
    /// Head and payload of the next message, whose slot is free again.
    Message,
    /// The head of a message whose payload has another length than was asked for. The message stays
    /// in its slot.
    Head,
}
