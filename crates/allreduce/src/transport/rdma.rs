//! RDMA verbs: frames are the messages of `finetune-rdma`, and their headers its heads.

use std::time::Duration;

use finetune_rdma::{Announced, BrokenWire, Head, Received, Wires};

use crate::frame::{HEADER_BYTES, Header};
use crate::transport::{Backend, Broken, LONGEST_SLEEP, Transport, Want};

// A rank that waits must see in time that its group failed.
const _: () = assert!(finetune_rdma::LONGEST_SLEEP.as_nanos() <= LONGEST_SLEEP.as_nanos());

/// The wires of one rank to the others. A wire is a link.
pub(crate) struct Rdma {
    wires: Wires,
}

impl Rdma {
    /// Frames over connected wires, which read headers with [`read_head`].
    pub(crate) fn new(wires: Wires) -> Rdma {
        Rdma { wires }
    }
}

/// What the header of a frame announces; none if it is damaged.
pub(crate) fn read_head(head: &Head) -> Option<Announced> {
    let Header { sequence, length, .. } = Header::decode(head).ok()?;
    Some(Announced { sequence, payload_bytes: length })
}

impl From<BrokenWire> for Broken {
    fn from(BrokenWire { peer, wire, closed, what }: BrokenWire) -> Broken {
        Broken { peer, link: wire, closed, what }
    }
}

impl Transport for Rdma {
    fn backend(&self) -> Backend {
        Backend::Rdma
    }

    fn frame_bytes(&self, remaining: usize) -> usize {
        self.wires.next_payload_bytes(remaining)
    }

    fn send(
        &mut self,
        peer: usize,
        link: usize,
        header: &[u8; HEADER_BYTES],
        payload: &[u8],
        sent: &mut usize,
    ) -> Result<bool, Broken> {
        let left = self.wires.send(peer, link, header, payload)?;
        if left {
            *sent = HEADER_BYTES + payload.len();
        }
        Ok(left)
    }

    fn receive(
        &mut self,
        peer: usize,
        link: usize,
        header: &mut [u8; HEADER_BYTES],
        payload: &mut [u8],
        filled: &mut usize,
    ) -> Result<bool, Broken> {
        if *filled >= HEADER_BYTES {
            // A frame of another length: it stays where it is.
            self.wires.poll(peer, link)?;
            return Ok(false);
        }
        *filled = match self.wires.receive(peer, link, header, payload)? {
            Received::Nothing => return Ok(false),
            Received::Head => HEADER_BYTES,
            Received::Message => HEADER_BYTES + payload.len(),
        };
        Ok(true)
    }

    fn keep_alive(&mut self, unused_for: Duration) -> Result<(), Broken> {
        self.wires.keep_alive(unused_for).map_err(Broken::from)
    }

    fn idle(&mut self, _: &[Want], round: u32) {
        self.wires.idle(round);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_a_header_or_it_is_damaged() {
        use crate::frame::{Algorithm, Descriptor, Element, Kind, Reduction, WireDtype};

        let descriptor = Descriptor {
            kind: Kind::Send,
            reduction: Reduction::Sum,
            element: Element::Byte,
            wire: WireDtype::Exact,
            algorithm: Algorithm::Direct,
            root: 0,
            elements: 0,
            tag: 0,
        };
        let header = Header { session: 1, from: 0, operation: 0, descriptor, sequence: 7, length: 300, payload_crc: 0 };
        let mut head = header.encode();
        assert_eq!(read_head(&head), Some(Announced { sequence: 7, payload_bytes: 300 }));
        // What marks a report of the wire itself.
        assert_ne!(head[..4], *b"FTCR");
        head[20] ^= 1;
        assert_eq!(read_head(&head), None);
    }
}
