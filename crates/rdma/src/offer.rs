//! What every rank tells the others before queue pairs are connected, and what follows from it.
//!
//! Pure: the caller carries the offers between ranks, and the same offers lead to the same sizes on
//! every rank.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use crate::error::RdmaError;
use crate::slots::{FRAME_BYTES, LEAST_DEPTH, Lane, SlotSizes};

#[cfg(test)]
mod tests;

/// Version of what the two ends of a wire tell each other.
const VERSION: u32 = 1;

/// The kind of connection between two queue pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueuePairKind {
    /// Unreliable connected: the only kind that Thunderbolt has.
    #[default]
    #[serde(rename = "uc")]
    Unreliable,
    /// Reliable connected: acknowledged and repeated by the device. A dead peer shows as an error
    /// after about a second.
    #[serde(rename = "rc")]
    Reliable,
}

impl std::fmt::Display for QueuePairKind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            QueuePairKind::Unreliable => "uc",
            QueuePairKind::Reliable => "rc",
        })
    }
}

/// How queue pairs are used. Sizes and depths are what this rank offers; the least of all offers
/// holds.
#[derive(Clone, Debug, PartialEq)]
pub struct WireOptions {
    /// The kind of queue pair; all ranks must have the same.
    pub kind: QueuePairKind,
    /// Bytes of a bulk slot: a multiple of 4096, at least 8192.
    pub bulk_bytes: usize,
    /// Bulk messages on their way in one direction of a wire.
    pub bulk_depth: usize,
    /// Small messages (4 KiB) on their way in one direction of a wire.
    pub small_depth: usize,
    /// Largest packet on the wire in bytes: 256, 512, 1024, 2048 or 4096.
    pub mtu: usize,
    /// Polls before a wait begins to sleep.
    pub busy_polls: u32,
}

impl Default for WireOptions {
    fn default() -> WireOptions {
        // 16 x 64 KiB are 256 frames of 4 KiB in each direction: a quarter of what Apple's queues
        // were seen to take.
        WireOptions {
            kind: QueuePairKind::default(),
            bulk_bytes: 64 << 10,
            bulk_depth: 16,
            small_depth: 32,
            mtu: 4096,
            busy_polls: 50,
        }
    }
}

impl WireOptions {
    /// Refuses what cannot work on any device.
    pub(crate) fn check(&self) -> Result<(), RdmaError> {
        let refuse = |what: String| Err(RdmaError::Option { what });
        if !self.bulk_bytes.is_multiple_of(FRAME_BYTES) || self.bulk_bytes < 2 * FRAME_BYTES {
            return refuse(format!("bulk slots of {} bytes: give a multiple of 4096, at least 8192", self.bulk_bytes));
        }
        let least = self.bulk_depth.min(self.small_depth);
        if least < LEAST_DEPTH {
            return refuse(format!("a depth of {least}: give at least {LEAST_DEPTH}"));
        }
        if !matches!(self.mtu, 256 | 512 | 1024 | 2048 | 4096) {
            return refuse(format!("an MTU of {} bytes: give 256, 512, 1024, 2048 or 4096", self.mtu));
        }
        Ok(())
    }
}

/// What a rank has to say to all others before they connect: its devices' addresses, its queue
/// pairs and its sizes. Written as JSON by serde.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    version: u32,
    pub(crate) kind: QueuePairKind,
    pub(crate) bulk_bytes: usize,
    /// Per peer and wire; none for the rank itself.
    pub(crate) wires: Vec<Vec<WireOffer>>,
}

/// One end of a wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WireOffer {
    pub(crate) device: String,
    pub(crate) gid: Ipv6Addr,
    pub(crate) lid: u16,
    pub(crate) mtu: usize,
    pub(crate) small: QueueOffer,
    pub(crate) bulk: QueueOffer,
}

/// One queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct QueueOffer {
    pub(crate) number: u32,
    pub(crate) first_packet: u32,
    pub(crate) depth: usize,
}

impl WireOffer {
    pub(crate) fn queue(&self, lane: Lane) -> &QueueOffer {
        match lane {
            Lane::Small => &self.small,
            Lane::Bulk => &self.bulk,
        }
    }
}

/// What the two ends of a wire agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WireTerms {
    pub(crate) mtu: usize,
    pub(crate) small_depth: usize,
    pub(crate) bulk_depth: usize,
}

/// What follows from all offers for one rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) sizes: SlotSizes,
    /// Per peer and wire.
    pub(crate) wires: Vec<Vec<WireTerms>>,
}

/// A connected wire, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WireDescription {
    /// The rank at the other end.
    pub peer: usize,
    /// The number of the wire among those to this peer.
    pub wire: usize,
    /// This end's device.
    pub device: String,
    /// This end's address.
    pub address: String,
    /// The other end's device.
    pub peer_device: String,
    /// The other end's address.
    pub peer_address: String,
    /// The kind of queue pair.
    pub kind: QueuePairKind,
    /// Largest packet in bytes.
    pub mtu: usize,
    /// Small messages on their way in one direction.
    pub small_depth: usize,
    /// Bulk messages on their way in one direction.
    pub bulk_depth: usize,
    /// Bytes of a bulk message.
    pub bulk_bytes: usize,
}

impl std::fmt::Display for WireDescription {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let WireDescription { peer, device, address, peer_device, peer_address, kind, mtu, .. } = self;
        let (small, bulk, kib) = (self.small_depth, self.bulk_depth, self.bulk_bytes >> 10);
        write!(
            formatter,
            "{device} ({address}) to rank {peer}'s {peer_device} ({peer_address}): {kind}, MTU {mtu}, {small} x 4 KiB and \
             {bulk} x {kib} KiB deep"
        )
    }
}

/// An address as people write it: IPv4 if it is one.
pub(crate) fn address_text(gid: Ipv6Addr) -> String {
    gid.to_ipv4_mapped().map_or_else(|| gid.to_string(), |address| address.to_string())
}

impl Offer {
    pub(crate) fn new(options: &WireOptions, wires: Vec<Vec<WireOffer>>) -> Offer {
        Offer { version: VERSION, kind: options.kind, bulk_bytes: options.bulk_bytes, wires }
    }

    /// What all ranks' offers come to for `rank`: the least of every size and depth.
    ///
    /// # Errors
    /// If two ranks do not fit together.
    pub(crate) fn agree(rank: usize, offers: &[Offer]) -> Result<Terms, RdmaError> {
        let mine = &offers[rank];
        let world = offers.len();
        for (peer, theirs) in offers.iter().enumerate() {
            let differ = |what: String| Err(RdmaError::Disagreement { rank, peer, what });
            if theirs.version != mine.version {
                return differ("they run different versions of this program: install the same on both".into());
            }
            if theirs.kind != mine.kind {
                return differ(format!(
                    "this one offers {} queue pairs and the other one {}: configure the same kind everywhere (Thunderbolt \
                     has only uc)",
                    mine.kind, theirs.kind
                ));
            }
            if theirs.wires.len() != world {
                return differ(format!("the other one counts {} ranks, this one {world}", theirs.wires.len()));
            }
            if theirs.bulk_bytes < 2 * FRAME_BYTES || !theirs.bulk_bytes.is_multiple_of(FRAME_BYTES) {
                return differ(format!("the other one offers slots of {} bytes", theirs.bulk_bytes));
            }
        }
        let bulk_bytes = offers.iter().map(|offer| offer.bulk_bytes).min().expect("at least this rank's");
        let mut wires = Vec::with_capacity(world);
        for (peer, theirs) in offers.iter().enumerate() {
            let (mine, theirs) = (&mine.wires[peer], &theirs.wires[rank]);
            if mine.len() != theirs.len() {
                let what = format!(
                    "this one has {} wires to it ({}), it has {} back ({}): name one device at each end of every cable",
                    mine.len(),
                    devices(mine),
                    theirs.len(),
                    devices(theirs)
                );
                return Err(RdmaError::Disagreement { rank, peer, what });
            }
            let terms = mine.iter().zip(theirs).map(|(mine, theirs)| agree_wire(rank, peer, mine, theirs));
            wires.push(terms.collect::<Result<Vec<WireTerms>, RdmaError>>()?);
        }
        Ok(Terms { sizes: SlotSizes { bulk_bytes }, wires })
    }
}

fn devices(wires: &[WireOffer]) -> String {
    if wires.is_empty() {
        return "none".into();
    }
    wires.iter().map(|wire| wire.device.as_str()).collect::<Vec<_>>().join(", ")
}

fn agree_wire(rank: usize, peer: usize, mine: &WireOffer, theirs: &WireOffer) -> Result<WireTerms, RdmaError> {
    let terms = WireTerms {
        mtu: mine.mtu.min(theirs.mtu),
        small_depth: mine.small.depth.min(theirs.small.depth),
        bulk_depth: mine.bulk.depth.min(theirs.bulk.depth),
    };
    let packets = [theirs.small, theirs.bulk].iter().all(|queue| queue.first_packet < 1 << 24);
    let depths = terms.small_depth.min(terms.bulk_depth) >= LEAST_DEPTH;
    if !packets || !depths || !matches!(terms.mtu, 256 | 512 | 1024 | 2048 | 4096) {
        let what = format!("its offer for {} makes no sense: {theirs:?}", theirs.device);
        return Err(RdmaError::Disagreement { rank, peer, what });
    }
    Ok(terms)
}
