//! Frames in slots: connecting queue pairs in two phases, and moving frames over them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::device::{Demand, Device, Limits};
use super::error::RdmaError;
use super::offer::{Offer, WireDescription, WireOffer, WireOptions, address_text};
use super::slots::{FRAME_BYTES, Lane, SlotSizes};
use super::wire::{Queue, SHORTEST_SLEEP, Wire};
use crate::frame::HEADER_BYTES;
use crate::transport::{Backend, Broken, LONGEST_SLEEP, Transport, Want};

/// How long leaving waits for messages that are on their way: a retry of a reliable queue pair, and
/// room.
const LINGER: Duration = Duration::from_secs(1);

/// Queue pairs that wait for the other ranks' offers.
pub(crate) struct Prepared {
    rank: usize,
    options: WireOptions,
    offer: Offer,
    /// Per peer and wire, for each lane.
    queues: Vec<Vec<[Queue; 2]>>,
    /// Dropped last.
    devices: BTreeMap<String, Device>,
}

/// The wires of one rank to the others.
pub(crate) struct Rdma {
    wires: Vec<Vec<Wire>>,
    sizes: SlotSizes,
    busy_polls: u32,
    descriptions: Vec<WireDescription>,
    /// Dropped last: queue pairs go before the device that they belong to.
    _devices: BTreeMap<String, Device>,
}

impl Rdma {
    /// The first phase: opens devices and makes queue pairs. `wires[peer]` names this rank's device
    /// for each wire to that peer, in the same order as the peer names its own. It is empty for the
    /// rank itself and for peers without a cable. Without `limits`, those of the device hold
    /// (Apple's on a Mac).
    ///
    /// # Errors
    /// If an option is wrong, or a device is missing or refuses.
    pub(crate) fn prepare(
        rank: usize,
        wires: &[Vec<String>],
        options: &WireOptions,
        limits: Option<&Limits>,
    ) -> Result<(Prepared, Offer), RdmaError> {
        options.check()?;
        assert!(wires[rank].is_empty(), "a rank has no wire to itself");
        let depth = |lane| match lane {
            Lane::Small => options.small_depth,
            Lane::Bulk => options.bulk_depth,
        };
        let sizes = SlotSizes { bulk_bytes: options.bulk_bytes };
        let slots_bytes = |lane: Lane| lane.slots(depth(lane)) * sizes.slot_bytes(lane);
        let mut demands: BTreeMap<&str, Demand> = BTreeMap::new();
        for name in wires.iter().flatten() {
            let demand = demands.entry(name).or_default();
            demand.queue_pairs += 2;
            demand.memory_bytes += 2 * (slots_bytes(Lane::Small) + slots_bytes(Lane::Bulk));
            demand.message_bytes = options.bulk_bytes;
            demand.frames = slots_bytes(Lane::Small).max(slots_bytes(Lane::Bulk)) / FRAME_BYTES;
        }
        let mut devices = BTreeMap::new();
        for (&name, demand) in &demands {
            devices.insert(name.to_string(), Device::open(name, demand, limits)?);
        }
        let make = |name: &String| -> Result<([Queue; 2], WireOffer), RdmaError> {
            let device = &devices[name];
            let queue = |lane| Queue::make(device, options.kind, lane, depth(lane), sizes.slot_bytes(lane));
            let ((small, small_offer), (bulk, bulk_offer)) = (queue(Lane::Small)?, queue(Lane::Bulk)?);
            let offer = WireOffer {
                device: name.clone(),
                gid: device.port.gid,
                lid: device.port.lid,
                mtu: device.port.mtu.min(options.mtu),
                small: small_offer,
                bulk: bulk_offer,
            };
            Ok(([small, bulk], offer))
        };
        let (mut queues, mut offers) = (Vec::new(), Vec::new());
        for names in wires {
            let made = names.iter().map(make).collect::<Result<Vec<_>, RdmaError>>()?;
            let (of_peer, offers_of_peer) = made.into_iter().unzip();
            queues.push(of_peer);
            offers.push(offers_of_peer);
        }
        let offer = Offer::new(options, offers);
        Ok((Prepared { rank, options: options.clone(), offer: offer.clone(), queues, devices }, offer))
    }

    /// What this rank's wires are.
    pub(crate) fn wires(&self) -> &[WireDescription] {
        &self.descriptions
    }
}

impl Prepared {
    /// The second phase, with the offers of all ranks in their order: connects, and posts all
    /// receives. Before the first frame is sent, every rank must have returned from here: that is
    /// the caller's barrier.
    ///
    /// # Errors
    /// If the offers do not fit together, or a device refuses.
    pub(crate) fn connect(self, offers: &[Offer]) -> Result<Rdma, RdmaError> {
        let Prepared { rank, options, offer, queues, devices } = self;
        assert_eq!(offers.get(rank), Some(&offer), "rank {rank}'s own offer is among all");
        let terms = Offer::agree(rank, offers)?;
        let mut wires = Vec::with_capacity(offers.len());
        let mut descriptions = Vec::new();
        for (peer, queues) in queues.into_iter().enumerate() {
            let mut of_peer = Vec::with_capacity(queues.len());
            for (link, queues) in queues.into_iter().enumerate() {
                let (own, theirs) = (&offer.wires[peer][link], &offers[peer].wires[rank][link]);
                let agreed = terms.wires[peer][link];
                let mut wire = Wire::new(peer, link, &own.device, queues, agreed);
                wire.connect(&devices[&own.device], terms.sizes, own, theirs, agreed.mtu)?;
                of_peer.push(wire);
                descriptions.push(WireDescription {
                    peer,
                    wire: link,
                    device: own.device.clone(),
                    address: address_text(own.gid),
                    peer_device: theirs.device.clone(),
                    peer_address: address_text(theirs.gid),
                    kind: options.kind,
                    mtu: agreed.mtu,
                    small_depth: agreed.small_depth,
                    bulk_depth: agreed.bulk_depth,
                    bulk_bytes: terms.sizes.bulk_bytes,
                });
            }
            wires.push(of_peer);
        }
        let WireOptions { busy_polls, .. } = options;
        Ok(Rdma { wires, sizes: terms.sizes, busy_polls, descriptions, _devices: devices })
    }
}

impl Transport for Rdma {
    fn backend(&self) -> Backend {
        Backend::Rdma
    }

    fn frame_bytes(&self, remaining: usize) -> usize {
        self.sizes.frame_bytes(remaining)
    }

    fn send(
        &mut self,
        peer: usize,
        link: usize,
        header: &[u8; HEADER_BYTES],
        payload: &[u8],
        sent: &mut usize,
    ) -> Result<bool, Broken> {
        let lane = self.sizes.lane(payload.len());
        assert!(payload.len() <= self.sizes.payload_bytes(lane), "a frame longer than `frame_bytes` allows");
        let wire = &mut self.wires[peer][link];
        wire.poll();
        if wire.send(lane, header, payload) {
            *sent = HEADER_BYTES + payload.len();
            return Ok(true);
        }
        wire.broken().map(|()| false)
    }

    fn receive(
        &mut self,
        peer: usize,
        link: usize,
        header: &mut [u8; HEADER_BYTES],
        payload: &mut [u8],
        filled: &mut usize,
    ) -> Result<bool, Broken> {
        let wire = &mut self.wires[peer][link];
        wire.poll();
        if *filled < HEADER_BYTES && wire.receive(self.sizes, header, payload, filled) {
            return Ok(true);
        }
        wire.broken().map(|()| false)
    }

    /// Sends something over every queue pair that sent nothing for so long: Apple's go bad when
    /// idle for about 20 minutes. Call it now and then while the group rests. It costs a credit
    /// like a frame, so a peer that never polls is not overrun.
    fn keep_alive(&mut self, unused_for: Duration) -> Result<(), Broken> {
        for wire in self.wires.iter_mut().flatten() {
            wire.poll();
            wire.keep_alive(unused_for);
            wire.broken()?;
        }
        Ok(())
    }

    /// There is nothing to wait on: Apple's library is only known to be polled. So a wait spins a
    /// little, then sleeps, longer the longer nothing comes.
    fn idle(&mut self, _: &[Want], round: u32) {
        let Some(over) = round.checked_sub(self.busy_polls) else {
            std::hint::spin_loop();
            return;
        };
        let longest = LONGEST_SLEEP / 10;
        let sleep = SHORTEST_SLEEP.saturating_mul(1 << (over / 100).min(16));
        std::thread::sleep(sleep.min(longest));
    }
}

impl Drop for Rdma {
    fn drop(&mut self) {
        let until = Instant::now() + LINGER;
        for wire in self.wires.iter_mut().flatten() {
            wire.linger(until);
        }
        for wire in self.wires.iter_mut().flatten() {
            wire.drain();
        }
    }
}
