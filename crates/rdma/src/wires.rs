//! All wires of a rank: connecting them in two phases, and moving messages over them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::device::{Demand, Device, Limits};
use crate::error::RdmaError;
use crate::message::{Head, ReadHead, Received};
use crate::offer::{Offer, WireDescription, WireOffer, WireOptions, address_text};
use crate::slots::{FRAME_BYTES, Lane, SlotSizes};
use crate::wire::{BrokenWire, Queue, SHORTEST_SLEEP, Wire};

/// How long leaving waits for messages that are on their way: a retry of a reliable queue pair, and
/// room.
const LINGER: Duration = Duration::from_secs(1);

/// Longest time that [`Wires::idle`] sleeps.
pub const LONGEST_SLEEP: Duration = Duration::from_millis(1);

/// Queue pairs of a rank that wait for the other ranks' offers.
pub struct Prepared {
    rank: usize,
    options: WireOptions,
    offer: Offer,
    /// Per peer and wire, for each lane.
    queues: Vec<Vec<[Queue; 2]>>,
    /// Dropped last.
    devices: BTreeMap<String, Device>,
}

/// The wires of one rank to the others.
pub struct Wires {
    wires: Vec<Vec<Wire>>,
    sizes: SlotSizes,
    busy_polls: u32,
    descriptions: Vec<WireDescription>,
    /// Dropped last: queue pairs go before the device that they belong to.
    _devices: BTreeMap<String, Device>,
}

impl Prepared {
    /// The first phase: opens devices and makes queue pairs. `wires[peer]` names this rank's device
    /// for each wire to that peer, in the same order as the peer names its own. It is empty for the
    /// rank itself and for peers without a cable. Without `limits`, those of the device hold
    /// (Apple's on a Mac). The offer is for all other ranks: the caller brings it to them.
    ///
    /// # Panics
    /// If `wires[rank]` is missing or not empty.
    ///
    /// # Errors
    /// If an option is wrong, or a device is missing or refuses.
    pub fn new(
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

    /// The second phase, with the offers of all ranks in their order: connects, and posts all
    /// receives. Before the first message is sent, every rank must have returned from here: the
    /// caller sees to that. `read_head` reads the heads of the caller's messages.
    ///
    /// # Errors
    /// If the offers do not fit together, or a device refuses.
    pub fn connect(self, offers: &[Offer], read_head: ReadHead) -> Result<Wires, RdmaError> {
        let Prepared { rank, options, offer, queues, devices } = self;
        assert_eq!(offers.get(rank), Some(&offer), "rank {rank}'s own offer is among all");
        let terms = Offer::agree(rank, offers)?;
        let mut wires = Vec::with_capacity(offers.len());
        let mut descriptions = Vec::new();
        for (peer, queues) in queues.into_iter().enumerate() {
            let mut of_peer = Vec::with_capacity(queues.len());
            for (number, queues) in queues.into_iter().enumerate() {
                let (own, theirs) = (&offer.wires[peer][number], &offers[peer].wires[rank][number]);
                let agreed = terms.wires[peer][number];
                let mut wire = Wire::new(peer, number, &own.device, queues, agreed, read_head);
                wire.connect(&devices[&own.device], terms.sizes, own, theirs, agreed.mtu)?;
                of_peer.push(wire);
                descriptions.push(WireDescription {
                    peer,
                    wire: number,
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
        Ok(Wires { wires, sizes: terms.sizes, busy_polls, descriptions, _devices: devices })
    }
}

/// All calls take a peer's rank and the number of one of the wires to it. They panic if there is no
/// such wire. None of them blocks, except [`Wires::idle`].
impl Wires {
    /// What this rank's wires are.
    pub fn descriptions(&self) -> &[WireDescription] {
        &self.descriptions
    }

    /// Payload bytes of the next message when `remaining` bytes are to go: at most `remaining`, and
    /// a multiple of 8 if less. The same on every rank.
    pub fn next_payload_bytes(&self, remaining: usize) -> usize {
        self.sizes.next_payload_bytes(remaining)
    }

    /// Sends a message whose payload is no longer than [`Wires::next_payload_bytes`] allows. False:
    /// no slot is free for it yet, here or at the peer. Head and payload may change after the call.
    ///
    /// # Errors
    /// If the wire is broken.
    ///
    /// # Panics
    /// If the payload does not fit a slot.
    pub fn send(&mut self, peer: usize, wire: usize, head: &Head, payload: &[u8]) -> Result<bool, BrokenWire> {
        let lane = self.sizes.lane(payload.len());
        assert!(payload.len() <= self.sizes.payload_bytes(lane), "a payload longer than a slot");
        let wire = &mut self.wires[peer][wire];
        wire.poll();
        if wire.send(lane, head, payload) {
            return Ok(true);
        }
        wire.broken().map(|()| false)
    }

    /// Receives the next message if its payload is as long as `payload`, or only its head.
    ///
    /// # Errors
    /// If the wire is broken, and all messages that came before were handed out.
    pub fn receive(
        &mut self,
        peer: usize,
        wire: usize,
        head: &mut Head,
        payload: &mut [u8],
    ) -> Result<Received, BrokenWire> {
        let wire = &mut self.wires[peer][wire];
        wire.poll();
        match wire.receive(self.sizes, head, payload) {
            Received::Nothing => wire.broken().map(|()| Received::Nothing),
            received => Ok(received),
        }
    }

    /// Takes what the device has for a wire, and leaves messages in their slots.
    ///
    /// # Errors
    /// If the wire is broken.
    pub fn poll(&mut self, peer: usize, wire: usize) -> Result<(), BrokenWire> {
        let wire = &mut self.wires[peer][wire];
        wire.poll();
        wire.broken()
    }

    /// Sends something over every queue pair that sent nothing for `unused_for`: Apple's go bad
    /// when idle for about 20 minutes. Call it now and then while nothing else is sent. It costs a
    /// credit like a message, so a peer that never polls is not overrun.
    ///
    /// # Errors
    /// If a wire is broken.
    pub fn keep_alive(&mut self, unused_for: Duration) -> Result<(), BrokenWire> {
        for wire in self.wires.iter_mut().flatten() {
            wire.poll();
            wire.keep_alive(unused_for);
            wire.broken()?;
        }
        Ok(())
    }

    /// Waits a little, when nothing has come for the `round`-th time in a row (from 0). There is
    /// nothing to wait on: Apple's library is only known to be polled. So a wait spins at first,
    /// then sleeps, longer the longer nothing comes, [`LONGEST_SLEEP`] at most.
    pub fn idle(&self, round: u32) {
        let Some(over) = round.checked_sub(self.busy_polls) else {
            std::hint::spin_loop();
            return;
        };
        let sleep = SHORTEST_SLEEP.saturating_mul(1 << (over / 100).min(16));
        std::thread::sleep(sleep.min(LONGEST_SLEEP));
    }
}

/// Waits up to a second for messages that are on their way, and frees everything.
impl Drop for Wires {
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
