//! Control messages on a connection: length, JSON, tag. Works on bytes, so the simulation uses it
//! too.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::mutations::Bug;
#[cfg(test)]
use crate::mutations::Mutations;
use crate::random_bytes::KEY_BYTES;
use crate::secret::{Seal, Tag};

/// Longest control message. The largest real one is the roster of a big group.
pub(crate) const LONGEST_MESSAGE: usize = 256 << 10;

/// Bytes of the length before a message.
pub(crate) const LENGTH_BYTES: usize = 4;

/// A control message that must not be believed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum SealError {
    #[error("a control message of {0} bytes was announced; the longest is {LONGEST_MESSAGE}")]
    TooLong(usize),
    #[error("a control message does not carry the right seal: it was changed, replayed or comes from somebody else")]
    Forged,
    #[error("a control message is not of this protocol: {0}")]
    Foreign(String),
}

/// One message as bytes.
pub(crate) fn seal<T: Serialize>(message: &T, seal: &mut Seal) -> Vec<u8> {
    let body = serde_json::to_vec(message).expect("control messages are plain data");
    let mut bytes = Vec::with_capacity(LENGTH_BYTES + body.len() + KEY_BYTES);
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes.extend_from_slice(seal.next(&body).bytes());
    bytes
}

/// The two directions of one control connection.
pub(crate) struct Seals {
    outgoing: Seal,
    incoming: Opener,
}

impl Seals {
    pub(crate) fn new(outgoing: Seal, incoming: Seal) -> Seals {
        Seals { outgoing, incoming: Opener::new(incoming) }
    }

    /// The same with planted bugs.
    #[cfg(test)]
    pub(crate) fn with(mut self, mutations: Mutations) -> Seals {
        (self.outgoing.mutations, self.incoming.seal.mutations) = (mutations, mutations);
        self
    }

    /// One message as bytes.
    pub(crate) fn seal<T: Serialize>(&mut self, message: &T) -> Vec<u8> {
        seal(message, &mut self.outgoing)
    }

    /// Bytes that the next message lacks, as far as they are known: reading no more than these leaves
    /// what follows the message on the connection.
    pub(crate) fn missing(&self) -> usize {
        self.incoming.missing()
    }

    /// Takes in bytes without looking at them.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.incoming.push(bytes);
    }

    /// The next whole message, if it is there.
    pub(crate) fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, SealError> {
        self.incoming.next()
    }

    /// All messages that are whole once `bytes` have arrived. `ended`: the peer closed the
    /// connection after them. `None`: it is closed and nothing is left to read.
    pub(crate) fn open<T: DeserializeOwned>(&mut self, bytes: &[u8], ended: bool) -> Result<Option<Vec<T>>, SealError> {
        self.incoming.push(bytes);
        let mut messages = Vec::new();
        while let Some(message) = self.incoming.next()? {
            messages.push(message);
        }
        Ok((!ended || !messages.is_empty()).then_some(messages))
    }
}

/// Bytes as they come in, given back as whole messages.
struct Opener {
    seal: Seal,
    pending: Vec<u8>,
}

impl Opener {
    fn new(seal: Seal) -> Opener {
        Opener { seal, pending: Vec::new() }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    fn missing(&self) -> usize {
        let whole = match self.pending.split_first_chunk::<LENGTH_BYTES>() {
            None => LENGTH_BYTES,
            Some((length, _)) => LENGTH_BYTES + u32::from_le_bytes(*length) as usize + KEY_BYTES,
        };
        whole.saturating_sub(self.pending.len())
    }

    fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, SealError> {
        let Some((length, rest)) = self.pending.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > LONGEST_MESSAGE {
            return Err(SealError::TooLong(length));
        }
        let Some((body, rest)) = rest.split_at_checked(length) else { return Ok(None) };
        let Some((tag, _)) = rest.split_first_chunk::<KEY_BYTES>() else { return Ok(None) };
        if self.seal.next(body) != Tag::from_bytes(*tag) && !self.seal.mutations.has(Bug::SealNotChecked) {
            return Err(SealError::Forged);
        }
        let message = serde_json::from_slice(body).map_err(|error| SealError::Foreign(error.to_string()))?;
        self.pending.drain(..LENGTH_BYTES + length + KEY_BYTES);
        Ok(Some(message))
    }
}
