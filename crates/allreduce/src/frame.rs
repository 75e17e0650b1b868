//! The header before every payload, and what a receiver checks of it.
//!
//! A frame is 64 bytes of header and the payload, little-endian throughout:
//!
//! ```text
//! 0 magic u32 | 4 version u8 | 5 kind u8 | 6 reduction u8 | 7 element u8 | 8 wire u8 | 9 algorithm u8 | 10 from u16
//! 12 root u16 | 14 zero u16 | 16 sequence u32 | 20 length u32 | 24 session u64 | 32 operation u64
//! 40 elements u64 | 48 tag u64 | 56 CRC32C of the payload u32 | 60 CRC32C of bytes 0..60 u32
//! ```
//!
//! Every frame repeats what operation it belongs to. A rank that does something else than its peers
//! (another length, type, layout, or operation) gets an error at the first frame instead of a hang.
//! `sequence` counts the frames of one direction of one link: a lost, doubled or swapped frame
//! shows as a gap. The two checksums are separate so that a damaged length is never believed. A payload that
//! goes through memory of one machine has none (0): there it is as safe as in the buffers of both ranks.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::mutations::{Bug, Mutations};

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 64;

/// CRC32C (Castagnoli), as iSCSI, ext4 and RDMA's own wires use it.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// The same of bytes that lie in several places.
fn crc32c_of(parts: &[&[u8]]) -> u32 {
    if let [whole] | [whole, []] = parts {
        return crc32c(whole);
    }
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    parts.iter().for_each(|part| digest.update(part));
    digest.finalize() as u32
}

const MAGIC: u32 = u32::from_le_bytes(*b"FTAR");

/// Version of the frames, the handshake and the control messages. Ranks with another one are
/// refused when they join.
pub const PROTOCOL_VERSION: u8 = 1;

macro_rules! coded {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $code:literal, $text:literal;)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$variant_meta])* $variant = $code,)+ }

        impl $name {
            fn of(code: u8) -> Option<$name> {
                match code { $($code => Some($name::$variant),)+ _ => None }
            }

            /// The name that messages and tables use.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str(self.name())
            }
        }
    };
}

coded! {
    /// A collective operation, or one of the two point-to-point ones.
    Kind {
        /// Every rank gets the reduction of all ranks' data.
        AllReduce = 1, "all_reduce";
        /// Every rank gets its segment of the reduction.
        ReduceScatter = 2, "reduce_scatter";
        /// Every rank gets every rank's block.
        AllGather = 3, "all_gather";
        /// Every rank gets the root's data.
        Broadcast = 4, "broadcast";
        /// Rank j gets block j of every rank.
        AllToAll = 5, "all_to_all";
        /// No rank goes on before all ranks are here.
        Barrier = 6, "barrier";
        /// One rank to another; both ends call it this on the wire.
        Send = 7, "send";
    }
}

coded! {
    /// How elements are combined.
    Reduction {
        /// The sum.
        Sum = 1, "sum";
        /// The largest; NaN if there is one.
        Max = 2, "max";
        /// The smallest; NaN if there is one.
        Min = 3, "min";
    }
}

coded! {
    /// What an element is in memory.
    Element {
        /// Plain bytes, moved and never reduced.
        Byte = 1, "byte";
        /// 32-bit floating point.
        F32 = 2, "f32";
    }
}

coded! {
    /// What an element is on the wire. Sums are always taken in f32.
    ///
    /// Decision: `finetune` uses the 16-bit types only in its benchmark. They stay because layers
    /// spread over machines will send activations in 16 bits.
    WireDtype {
        /// As in memory.
        Exact = 1, "exact";
        /// Rounded to bfloat16 before each transfer: half the bytes.
        Bf16 = 2, "bf16";
        /// Rounded to IEEE half precision before each transfer: half the bytes, infinite above
        /// 65504.
        F16 = 3, "f16";
    }
}

coded! {
    /// How the bytes travel. [`crate::Group`] says which order of summation each one has.
    Algorithm {
        /// Everything to everyone, reduced by each rank for itself: one hop.
        Direct = 1, "direct";
        /// Everything to rank 0, which reduces it and sends it to everyone: two hops, the fewest
        /// messages.
        Star = 4, "star";
        /// Each rank reduces one segment and hands it to all: two hops, over every pair of ranks.
        Mesh = 2, "mesh";
        /// From neighbour to neighbour in both directions: 2(N-1) hops, over N cables.
        Ring = 3, "ring";
    }
}

impl Element {
    /// Bytes in memory.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Element::Byte => 1,
            Element::F32 => 4,
        }
    }

    /// Bytes on the wire.
    pub(crate) fn wire_bytes(self, wire: WireDtype) -> usize {
        match (self, wire) {
            (Element::Byte, _) => 1,
            (Element::F32, WireDtype::Exact) => 4,
            (Element::F32, WireDtype::Bf16 | WireDtype::F16) => 2,
        }
    }
}

/// What an operation is: ranks that meet in one must agree on all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// The operation.
    pub kind: Kind,
    /// How elements are combined; `Sum` if nothing is.
    pub reduction: Reduction,
    /// Elements in memory.
    pub element: Element,
    /// Elements on the wire.
    pub wire: WireDtype,
    /// How the bytes travel.
    pub algorithm: Algorithm,
    /// The rank that the data comes from; 0 if there is none.
    pub root: u16,
    /// Elements of the caller's buffer.
    pub elements: u64,
    /// What the caller says the elements are, as a digest of their layout; 0 if it says nothing.
    pub tag: u64,
}

impl std::fmt::Display for Descriptor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Descriptor { kind, reduction, element, wire, algorithm, root, elements, tag } = self;
        write!(formatter, "{kind}")?;
        match kind {
            Kind::AllReduce | Kind::ReduceScatter => write!(formatter, " ({reduction}) of {elements} {element}")?,
            Kind::Broadcast => write!(formatter, " of {elements} bytes from rank {root}")?,
            Kind::Barrier => {}
            _ => write!(formatter, " of {elements} bytes")?,
        }
        if *wire != WireDtype::Exact {
            write!(formatter, ", {wire} on the wire")?;
        }
        if !matches!(kind, Kind::Send) {
            write!(formatter, ", {algorithm}")?;
        }
        if *tag != 0 {
            write!(formatter, ", layout {tag:016x}")?;
        }
        Ok(())
    }
}

/// The decoded header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// The group this frame is for.
    pub(crate) session: u64,
    /// The sender's rank in that group.
    pub(crate) from: u16,
    /// The count of operations before this one.
    pub(crate) operation: u64,
    /// What the operation is.
    pub(crate) descriptor: Descriptor,
    /// The count of frames before this one in this direction of this link, modulo 2^32.
    pub(crate) sequence: u32,
    /// Bytes of the payload.
    pub(crate) length: u32,
    /// CRC32C of the payload.
    pub(crate) payload_crc: u32,
}

/// A frame that must not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum FrameError {
    /// Bytes 0..60 do not have the checksum in 60..64.
    #[error("the header of a frame is damaged (its checksum does not match)")]
    HeaderDamaged,
    /// Not a frame, or one of another program.
    #[error("the bytes received are not a frame of this protocol")]
    Foreign,
    /// The payload does not have the checksum of the header.
    #[error("the payload of frame {sequence} is damaged (its checksum does not match)")]
    PayloadDamaged {
        /// The frame.
        sequence: u32,
    },
    /// The group is another, or the sender is not the peer of this link.
    #[error("a frame of another group or rank arrived (session {session:016x}, rank {from})")]
    Stale {
        /// The session of the frame.
        session: u64,
        /// The rank of the frame.
        from: u16,
    },
    /// A frame is missing before this one, or this one came twice.
    #[error("frame {found} arrived where frame {expected} was due: a frame was lost, doubled or overtaken")]
    OutOfSequence {
        /// The sequence that was due.
        expected: u32,
        /// The sequence that came.
        found: u32,
    },
    /// The peer is in another operation, or sees this one otherwise.
    #[error("the peer is in operation {theirs_operation}: {theirs}; this rank in operation {mine_operation}: {mine}")]
    Diverged {
        /// Our operation's number.
        mine_operation: u64,
        /// Our operation.
        mine: Descriptor,
        /// The peer's operation's number.
        theirs_operation: u64,
        /// The peer's operation.
        theirs: Descriptor,
    },
    /// Same operation, but the peer cut it into frames of another length.
    #[error("a frame of {found} bytes arrived where one of {expected} was due")]
    Length {
        /// Bytes that were due.
        expected: u32,
        /// Bytes announced.
        found: u32,
    },
}

impl Header {
    /// The 64 bytes of this header; the payload's checksum is taken over `payload`.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let Descriptor { kind, reduction, element, wire, algorithm, root, elements, tag } = self.descriptor;
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4] = PROTOCOL_VERSION;
        bytes[5..10].copy_from_slice(&[kind as u8, reduction as u8, element as u8, wire as u8, algorithm as u8]);
        bytes[10..12].copy_from_slice(&self.from.to_le_bytes());
        bytes[12..14].copy_from_slice(&root.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.length.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.session.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.operation.to_le_bytes());
        bytes[40..48].copy_from_slice(&elements.to_le_bytes());
        bytes[48..56].copy_from_slice(&tag.to_le_bytes());
        bytes[56..60].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header; every field is checked to be one that [`Header::encode`] can write.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if u32_at(0) != MAGIC || bytes[4] != PROTOCOL_VERSION {
            return Err(FrameError::Foreign);
        }
        if u32_at(60) != crc32c(&bytes[..60]) {
            return Err(FrameError::HeaderDamaged);
        }
        let descriptor = Descriptor {
            kind: Kind::of(bytes[5]).ok_or(FrameError::Foreign)?,
            reduction: Reduction::of(bytes[6]).ok_or(FrameError::Foreign)?,
            element: Element::of(bytes[7]).ok_or(FrameError::Foreign)?,
            wire: WireDtype::of(bytes[8]).ok_or(FrameError::Foreign)?,
            algorithm: Algorithm::of(bytes[9]).ok_or(FrameError::Foreign)?,
            root: u16_at(12),
            elements: u64_at(40),
            tag: u64_at(48),
        };
        Ok(Header {
            session: u64_at(24),
            from: u16_at(10),
            operation: u64_at(32),
            descriptor,
            sequence: u32_at(16),
            length: u32_at(20),
            payload_crc: u32_at(56),
        })
    }

    /// Compares a header that arrived with the one that is due (`payload_crc` aside).
    ///
    /// The order of the checks decides what is reported: first whether the frame is for us at all,
    /// then whether one is missing, and then what it says about the peer.
    pub(crate) fn check(&self, due: &Header, mutations: Mutations) -> Result<(), FrameError> {
        if (self.session, self.from) != (due.session, due.from) && !mutations.has(Bug::StaleSessionAccepted) {
            return Err(FrameError::Stale { session: self.session, from: self.from });
        }
        if self.sequence != due.sequence && !mutations.has(Bug::SequenceNotChecked) {
            return Err(FrameError::OutOfSequence { expected: due.sequence, found: self.sequence });
        }
        let same = (self.operation, self.descriptor) == (due.operation, due.descriptor);
        if !same && !mutations.has(Bug::DivergenceNotChecked) {
            return Err(FrameError::Diverged {
                mine_operation: due.operation,
                mine: due.descriptor,
                theirs_operation: self.operation,
                theirs: self.descriptor,
            });
        }
        if self.length != due.length {
            return Err(FrameError::Length { expected: due.length, found: self.length });
        }
        Ok(())
    }

    /// Compares the payload, which may lie in several places, with the checksum of this header.
    pub(crate) fn check_payload(&self, parts: &[&[u8]], mutations: Mutations) -> Result<(), FrameError> {
        if crc32c_of(parts) == self.payload_crc || mutations.has(Bug::ChecksumNotChecked) {
            return Ok(());
        }
        Err(FrameError::PayloadDamaged { sequence: self.sequence })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let descriptor = Descriptor {
            kind: Kind::AllReduce,
            reduction: Reduction::Sum,
            element: Element::F32,
            wire: WireDtype::Exact,
            algorithm: Algorithm::Ring,
            root: 3,
            elements: 1 << 40,
            tag: 0xfeed_beef,
        };
        Header {
            session: 77,
            from: 2,
            operation: 9,
            descriptor,
            sequence: 41,
            length: 5,
            payload_crc: crc32c(b"hello"),
        }
    }

    #[test]
    fn the_checksum_is_crc32c() {
        // RFC 3720, appendix B.4.
        let ascending: Vec<u8> = (0..32).collect();
        for (bytes, crc) in [(vec![0; 32], 0x8a91_36aa), (vec![0xff; 32], 0x62a8_ab43), (ascending, 0x46dd_794e)] {
            assert_eq!(crc32c(&bytes), crc, "{bytes:?}");
            for cut in 0..=bytes.len() {
                assert_eq!(crc32c_of(&[&bytes[..cut], &bytes[cut..]]), crc, "{bytes:?} cut at {cut}");
            }
        }
    }

    #[test]
    fn headers_read_back() {
        assert_eq!(Header::decode(&header().encode()), Ok(header()));
        assert_eq!(header().check(&header(), Mutations::default()), Ok(()));
        assert_eq!(header().check_payload(&[b"hello"], Mutations::default()), Ok(()));
        assert_eq!(
            header().check_payload(&[b"hel", b"lp"], Mutations::default()),
            Err(FrameError::PayloadDamaged { sequence: 41 })
        );
    }

    #[test]
    fn no_damaged_header_is_believed() {
        let bytes = header().encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut damaged = bytes;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&damaged).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn each_difference_has_its_own_name() {
        let other = |change: fn(&mut Header)| {
            let mut theirs = header();
            change(&mut theirs);
            theirs.check(&header(), Mutations::default()).expect_err("a difference")
        };
        assert!(matches!(other(|header| header.session = 1), FrameError::Stale { session: 1, from: 2 }));
        assert!(matches!(other(|header| header.from = 1), FrameError::Stale { session: 77, from: 1 }));
        let gap = FrameError::OutOfSequence { expected: 41, found: 43 };
        assert_eq!(other(|header| header.sequence = 43), gap);
        assert!(matches!(other(|header| header.operation = 10), FrameError::Diverged { theirs_operation: 10, .. }));
        assert!(matches!(other(|header| header.descriptor.tag = 1), FrameError::Diverged { .. }));
        assert!(matches!(other(|header| header.descriptor.elements = 1), FrameError::Diverged { .. }));
        assert_eq!(other(|header| header.length = 4), FrameError::Length { expected: 5, found: 4 });
    }
}
