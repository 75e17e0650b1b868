//! Each operation of a group: which plan, over which transport, with which buffers.

use std::ops::Range;
use std::sync::{MutexGuard, PoisonError};

use bytemuck::{cast_slice, cast_slice_mut};

use crate::arithmetic;
use crate::choose::Reach;
use crate::engine::{Engine, Interrupted, Network};
use crate::error::GroupError;
use crate::frame::{Algorithm, Descriptor, Element, Kind, Reduction, WireDtype};
use crate::group::{Inner, Reduce};
use crate::operation::Buffers;
use crate::plan::{self, Plan, segment};

/// Bytes per rank below which several links to a peer cost more frames than they save time.
const BYTES_PER_LINK: usize = 128 << 10;

impl Inner {
    pub(crate) fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs an operation when those that were called before it are done.
    pub(crate) fn turn<T>(&self, operation: impl FnOnce(&Inner) -> T) -> T {
        let ticket = self.ticket_lock.ticket();
        self.ticket_lock.pass(ticket, || operation(self))
    }

    /// Carries out a collective operation, with as many of the transport's links and frames as its
    /// size is worth.
    fn run(
        &self,
        engine: &mut Engine,
        network: usize,
        descriptor: Descriptor,
        buffers: Buffers<'_>,
    ) -> Result<(), GroupError> {
        let Network { transport, wires, .. } = &engine.networks[network];
        let bytes = descriptor.element.wire_bytes(descriptor.wire);
        let length = |remaining: usize| (transport.frame_bytes(remaining * bytes) / bytes).max(1);
        let links = (descriptor.elements as usize * bytes / self.world / BYTES_PER_LINK).clamp(1, (*wires).max(1));
        let plan = plan::collective(&descriptor, self.rank, self.world, links, &length);
        let number = engine.operations;
        engine.operations += 1;
        engine.run(network, plan, number, descriptor, buffers)
    }

    pub(crate) fn all_reduce(&self, data: &mut [f32], reduce: &Reduce) -> Result<(), GroupError> {
        let (rank, world, elements) = (self.rank, self.world, data.len());
        if world == 1 {
            return Ok(());
        }
        let mut engine = self.engine();
        let reach = |algorithm| if algorithm == Algorithm::Ring { Reach::Neighbours } else { Reach::Pairs };
        let network = reduce.algorithm.map_or(0, |algorithm| engine.network(reach(algorithm)));
        let bytes = elements * Element::F32.wire_bytes(reduce.wire);
        let algorithm = reduce.algorithm.unwrap_or_else(|| engine.networks[network].choice.algorithm(bytes));
        let descriptor = Descriptor {
            kind: Kind::AllReduce,
            reduction: reduce.reduction,
            element: Element::F32,
            wire: reduce.wire,
            algorithm,
            root: 0,
            elements: elements as u64,
            tag: reduce.tag,
        };
        arithmetic::round_to_wire(reduce.wire, &mut data[plan::rounded_before(algorithm, elements, world, rank)]);
        if algorithm != Algorithm::Direct {
            let buffers = Buffers { data: cast_slice_mut(data), input: &[] };
            return self.run(&mut engine, network, descriptor, buffers);
        }
        // The data change while they are sent, so what leaves comes from a copy.
        let mut snapshot = std::mem::take(&mut engine.snapshot);
        snapshot.clear();
        snapshot.extend_from_slice(data);
        let buffers = Buffers { data: cast_slice_mut(data), input: cast_slice(&snapshot) };
        let done = self.run(&mut engine, network, descriptor, buffers);
        engine.snapshot = snapshot;
        arithmetic::round_to_wire(reduce.wire, data);
        done
    }

    pub(crate) fn reduce_scatter(&self, data: &mut [f32], reduction: Reduction) -> Result<Range<usize>, GroupError> {
        let (rank, world, elements) = (self.rank, self.world, data.len());
        let mine = segment(elements, world, rank);
        if world == 1 {
            return Ok(mine);
        }
        let mut engine = self.engine();
        let algorithm = engine.networks[0].choice.two_step();
        let descriptor = Descriptor {
            kind: Kind::ReduceScatter,
            reduction,
            element: Element::F32,
            wire: WireDtype::Exact,
            algorithm,
            root: 0,
            elements: elements as u64,
            tag: 0,
        };
        self.run(&mut engine, 0, descriptor, Buffers { data: cast_slice_mut(data), input: &[] })?;
        Ok(mine)
    }

    /// What moves bytes and reduces nothing.
    fn moving(kind: Kind, algorithm: Algorithm, root: usize, bytes: usize) -> Descriptor {
        Descriptor {
            kind,
            reduction: Reduction::Sum,
            element: Element::Byte,
            wire: WireDtype::Exact,
            algorithm,
            root: root as u16,
            elements: bytes as u64,
            tag: 0,
        }
    }

    pub(crate) fn all_gather(&self, all: &mut [u8]) -> Result<(), GroupError> {
        if self.world == 1 {
            return Ok(());
        }
        let mut engine = self.engine();
        let algorithm = engine.networks[0].choice.two_step();
        let descriptor = Self::moving(Kind::AllGather, algorithm, 0, all.len());
        self.run(&mut engine, 0, descriptor, Buffers { data: all, input: &[] })
    }

    pub(crate) fn broadcast(&self, data: &mut [u8], root: usize) -> Result<(), GroupError> {
        let bytes = data.len();
        if self.world == 1 {
            return Ok(());
        }
        let mut engine = self.engine();
        // Two ranks are a chain already. A long message goes along a chain, so that the root sends
        // it only once.
        let algorithm = match engine.networks[0].choice.algorithm(bytes) {
            Algorithm::Mesh | Algorithm::Ring => Algorithm::Ring,
            Algorithm::Direct | Algorithm::Star => Algorithm::Direct,
        };
        let descriptor = Self::moving(Kind::Broadcast, algorithm, root, bytes);
        self.run(&mut engine, 0, descriptor, Buffers { data, input: &[] })
    }

    pub(crate) fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<(), GroupError> {
        if self.world == 1 {
            return Ok(());
        }
        let mut engine = self.engine();
        let network = engine.network(Reach::Pairs);
        let descriptor = Self::moving(Kind::AllToAll, Algorithm::Direct, 0, send.len());
        self.run(&mut engine, network, descriptor, Buffers { data: receive, input: send })
    }

    /// How the next message to (`sending`) or from `peer` travels: network, plan, number and descriptor.
    fn next_message(
        &self,
        engine: &mut Engine,
        peer: usize,
        bytes: usize,
        sending: bool,
    ) -> (usize, Plan, u64, Descriptor) {
        let network = engine.network(Reach::Pairs);
        let count = &mut engine.messages[peer];
        let count = if sending { &mut count.0 } else { &mut count.1 };
        let number = *count;
        *count += 1;
        let Network { transport, wires, .. } = &engine.networks[network];
        let links = (bytes / BYTES_PER_LINK).clamp(1, (*wires).max(1));
        let plan = plan::point_to_point(peer, sending, bytes, links, &|remaining| transport.frame_bytes(remaining));
        (network, plan, number, Self::message_descriptor(bytes))
    }

    /// What a message between two ranks is.
    pub(crate) fn message_descriptor(bytes: usize) -> Descriptor {
        Self::moving(Kind::Send, Algorithm::Direct, 0, bytes)
    }

    pub(crate) fn message(&self, peer: usize, data: &mut [u8], input: &[u8], sending: bool) -> Result<(), GroupError> {
        let mut engine = self.engine();
        let bytes = data.len().max(input.len());
        let (network, plan, number, descriptor) = self.next_message(&mut engine, peer, bytes, sending);
        engine.run(network, plan, number, descriptor, Buffers { data, input })
    }

    /// The same beside the operations of this rank: see [`Engine::run_beside`].
    pub(crate) fn message_beside(
        &self,
        peer: usize,
        data: &mut [u8],
        input: &[u8],
        sending: bool,
        goes_on: &mut dyn FnMut(bool) -> bool,
    ) -> Result<(), Interrupted> {
        let mut engine = self.engine();
        let bytes = data.len().max(input.len());
        let (network, plan, number, descriptor) = self.next_message(&mut engine, peer, bytes, sending);
        engine.run_beside(network, plan, number, descriptor, Buffers { data, input }, goes_on)
    }

    pub(crate) fn barrier(&self) -> Result<(), GroupError> {
        if self.world == 1 {
            return Ok(());
        }
        let mut engine = self.engine();
        // Not through rank 0: every rank says at once what it is doing, so one that does something
        // else gets an error.
        let algorithm = match engine.networks[0].choice.two_step() {
            Algorithm::Ring => Algorithm::Ring,
            _ => Algorithm::Direct,
        };
        let descriptor = Self::moving(Kind::Barrier, algorithm, 0, 0);
        self.run(&mut engine, 0, descriptor, Buffers { data: &mut [], input: &[] })
    }
}
