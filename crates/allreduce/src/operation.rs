//! Carries out a plan over a transport, without ever waiting: [`Operation::poll`] moves what can be
//! moved now.

use std::collections::HashMap;
use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};

use crate::arithmetic::{self, Arrived};
use crate::frame::{Descriptor, FrameError, HEADER_BYTES, Header, Reduction, WireDtype, crc32c};
use crate::mutations::Mutations;
use crate::plan::{Action, After, Incoming, Outgoing, Plan, Source};
use crate::transport::{Broken, Transport, Want};

/// Bytes from which a checksum that is used again costs less than another.
const REMEMBERED: usize = 4096;

/// What ends an operation before its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Broken(Broken),
    Frame { peer: usize, link: usize, error: FrameError },
}

impl From<Broken> for Fault {
    fn from(broken: Broken) -> Fault {
        Fault::Broken(broken)
    }
}

/// The state of one link that outlives an operation, and the memory it reuses.
#[derive(Default)]
struct LinkState {
    frames_sent: u32,
    frames_received: u32,
    /// The frame that is leaving: its header, once prepared, and how much of it has left.
    header_out: Option<[u8; HEADER_BYTES]>,
    sent: usize,
    header_in: Vec<u8>,
    header_checked: Option<Header>,
    filled: usize,
    /// Frames that are converted or added rather than copied. f32 for its alignment.
    staging_out: Vec<f32>,
    staging_in: Vec<f32>,
}

/// The links of one group as all its operations use them.
pub(crate) struct Links {
    rank: usize,
    session: u64,
    mutations: Mutations,
    states: Vec<Vec<LinkState>>,
    scratch: Vec<f32>,
    narrow: Vec<f32>,
    /// Payload bytes sent and received since the group was made.
    pub(crate) bytes_sent: u64,
    pub(crate) bytes_received: u64,
}

impl Links {
    pub(crate) fn new(rank: usize, world: usize, session: u64) -> Links {
        let states = (0..world).map(|_| Vec::new()).collect();
        Links {
            rank,
            session,
            mutations: Mutations::default(),
            states,
            scratch: Vec::new(),
            narrow: Vec::new(),
            bytes_sent: 0,
            bytes_received: 0,
        }
    }

    /// The same with planted bugs.
    #[cfg(test)]
    pub(crate) fn with(self, mutations: Mutations) -> Links {
        Links { mutations, ..self }
    }

    fn state(&mut self, peer: usize, link: usize) -> &mut LinkState {
        let states = &mut self.states[peer];
        if states.len() <= link {
            states.resize_with(link + 1, || LinkState { header_in: vec![0; HEADER_BYTES], ..LinkState::default() });
        }
        &mut states[link]
    }
}

/// The caller's memory. `data` is aligned for its elements.
pub(crate) struct Buffers<'a> {
    pub(crate) data: &'a mut [u8],
    pub(crate) input: &'a [u8],
}

/// What one poll did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Polled {
    Done,
    Moved,
    Idle,
}

/// A plan on its way.
pub(crate) struct Operation {
    plan: Plan,
    pub(crate) number: u64,
    pub(crate) descriptor: Descriptor,
    /// Frames sent and received, per channel.
    cursors: Vec<(usize, usize)>,
    remaining: usize,
    /// Checksums of final frames, each of which goes to every rank.
    checksums: HashMap<Range<usize>, u32>,
}

impl Operation {
    pub(crate) fn new(plan: Plan, number: u64, descriptor: Descriptor) -> Operation {
        let remaining = plan.channels.iter().map(|channel| channel.sends.len() + channel.receives.len()).sum();
        let cursors = vec![(0, 0); plan.channels.len()];
        Operation { cursors, remaining, plan, number, descriptor, checksums: HashMap::new() }
    }

    /// Moves what can be moved now: at most one frame per direction of each link.
    pub(crate) fn poll(
        &mut self,
        links: &mut Links,
        transport: &mut dyn Transport,
        buffers: &mut Buffers<'_>,
    ) -> Result<Polled, Fault> {
        if links.scratch.len() < self.plan.scratch {
            links.scratch.resize(self.plan.scratch, 0.0);
        }
        let mut moved = false;
        let mut closed = None;
        // What the peer sent before it closed its links may say more than that they are closed. So
        // it is read first.
        let mut unless_closed = |outcome| match outcome {
            Err(Fault::Broken(broken)) if broken.closed => {
                closed.get_or_insert(broken);
                Ok(false)
            }
            outcome => outcome,
        };
        for channel in 0..self.plan.channels.len() {
            moved |= unless_closed(self.poll_send(channel, links, transport, buffers))?;
            moved |= unless_closed(self.poll_receive(channel, links, transport, buffers))?;
        }
        match (self.remaining, moved, closed) {
            (0, _, _) => Ok(Polled::Done),
            (_, true, _) => Ok(Polled::Moved),
            (_, false, None) => Ok(Polled::Idle),
            (_, false, Some(broken)) => Err(Fault::Broken(broken)),
        }
    }

    /// The links that have to move before this operation can.
    pub(crate) fn wants(&self, wants: &mut Vec<Want>) {
        wants.clear();
        for (channel, &(sent, received)) in self.plan.channels.iter().zip(&self.cursors) {
            let send = channel.sends.get(sent).is_some_and(|next| self.is_due(next.after));
            let receive = channel.receives.get(received).is_some_and(|next| self.is_due(next.after));
            if send || receive {
                wants.push(Want { peer: channel.peer, link: channel.link, receive, send });
            }
        }
    }

    fn is_due(&self, after: Option<After>) -> bool {
        after.is_none_or(|after| self.cursors[after.channel].1 >= after.receives)
    }

    fn header(&self, from: usize, session: u64, sequence: u32, length: usize, payload_crc: u32) -> Header {
        Header {
            session,
            from: from as u16,
            operation: self.number,
            descriptor: self.descriptor,
            sequence,
            length: length as u32,
            payload_crc,
        }
    }

    fn poll_send(
        &mut self,
        index: usize,
        links: &mut Links,
        transport: &mut dyn Transport,
        buffers: &mut Buffers<'_>,
    ) -> Result<bool, Fault> {
        let channel = &self.plan.channels[index];
        let Some(frame) = channel.sends.get(self.cursors[index].0).filter(|frame| self.is_due(frame.after)) else {
            return Ok(false);
        };
        let (peer, link) = (channel.peer, channel.link);
        let (rank, session) = (links.rank, links.session);
        let wire = self.descriptor.wire;
        let length = frame.at.len() * self.descriptor.element.wire_bytes(wire);
        let state = links.state(peer, link);
        if state.header_out.is_none() && wire != WireDtype::Exact {
            narrow(wire, frame, buffers, &mut state.staging_out);
        }
        let payload = match wire {
            WireDtype::Exact => exact(frame, buffers, self.descriptor.element.bytes()),
            _ => &cast_slice(&state.staging_out)[..length],
        };
        let header = match state.header_out {
            Some(header) => header,
            None => {
                let again = frame.is_final && frame.source == Source::Data && wire == WireDtype::Exact;
                let crc = if !transport.checks_payloads(peer, link) {
                    0
                } else if again && length >= REMEMBERED && self.plan.channels.len() > 1 {
                    *self.checksums.entry(frame.at.clone()).or_insert_with(|| crc32c(payload))
                } else {
                    crc32c(payload)
                };
                let header = self.header(rank, session, state.frames_sent, length, crc).encode();
                state.header_out = Some(header);
                header
            }
        };
        let moved = transport.send(peer, link, &header, payload, &mut state.sent)?;
        if state.sent == HEADER_BYTES + length {
            (state.header_out, state.sent) = (None, 0);
            state.frames_sent = state.frames_sent.wrapping_add(1);
            self.cursors[index].0 += 1;
            self.remaining -= 1;
            links.bytes_sent += length as u64;
        }
        Ok(moved)
    }

    fn poll_receive(
        &mut self,
        index: usize,
        links: &mut Links,
        transport: &mut dyn Transport,
        buffers: &mut Buffers<'_>,
    ) -> Result<bool, Fault> {
        let channel = &self.plan.channels[index];
        let Some(frame) = channel.receives.get(self.cursors[index].1).filter(|frame| self.is_due(frame.after)) else {
            return Ok(false);
        };
        let (peer, link) = (channel.peer, channel.link);
        let (session, mutations) = (links.session, links.mutations);
        let (element, wire) = (self.descriptor.element, self.descriptor.wire);
        let length = frame.at.len() * element.wire_bytes(wire);
        let fault = |error| Fault::Frame { peer, link, error };
        let is_added = wire == WireDtype::Exact && frame.action != Action::Store;
        if is_added && transport.holds(peer, link, length) {
            return self.poll_held(index, length, links, transport, buffers);
        }

        let mut scratch = std::mem::take(&mut links.scratch);
        let state = links.state(peer, link);
        let payload: &mut [u8] = match (wire, frame.action) {
            (WireDtype::Exact, Action::Store) => &mut buffers.data[bytes_of(&frame.at, element.bytes())],
            (WireDtype::Exact, Action::Scratch { at }) => cast_slice_mut(&mut scratch[at..at + frame.at.len()]),
            _ => {
                state.staging_in.resize(state.staging_in.len().max(length.div_ceil(4)), 0.0);
                &mut cast_slice_mut(&mut state.staging_in)[..length]
            }
        };
        let header: &mut [u8; HEADER_BYTES] = state.header_in.as_mut_slice().try_into().expect("64 bytes");
        let before = state.filled;
        let received = transport.receive(peer, link, header, payload, &mut state.filled);
        let mut complete = false;
        let result = received.map_err(Fault::from).and_then(|_| {
            if state.filled >= HEADER_BYTES && state.header_checked.is_none() {
                let sequence = state.frames_received;
                let checked = self.checked(header, peer, session, sequence, length, mutations);
                state.header_checked = Some(checked.map_err(fault)?);
            }
            if state.filled == HEADER_BYTES + length {
                let header = state.header_checked.take().expect("checked before the payload");
                if transport.checks_payloads(peer, link) {
                    header.check_payload(&[payload], mutations).map_err(fault)?;
                }
                complete = true;
            }
            Ok(state.filled != before)
        });
        if complete {
            let staging = std::mem::take(&mut state.staging_in);
            self.apply(frame, &staging, &mut scratch, &mut links.narrow, buffers);
            links.state(peer, link).staging_in = staging;
            self.received(index, length, links);
        }
        links.scratch = scratch;
        result
    }

    /// Receives a frame that is added from where the transport holds it, so that its payload is
    /// never copied.
    fn poll_held(
        &mut self,
        index: usize,
        length: usize,
        links: &mut Links,
        transport: &mut dyn Transport,
        buffers: &mut Buffers<'_>,
    ) -> Result<bool, Fault> {
        let channel = &self.plan.channels[index];
        let frame = &channel.receives[self.cursors[index].1];
        let (peer, link) = (channel.peer, channel.link);
        let (session, mutations) = (links.session, links.mutations);
        let fault = |error| Fault::Frame { peer, link, error };
        links.state(peer, link); // It is there from now on.
        let Links { states, scratch, .. } = links;
        let state = &mut states[peer][link];
        let before = state.filled;
        let header_in: &mut [u8; HEADER_BYTES] = state.header_in.as_mut_slice().try_into().expect("64 bytes");
        if state.filled < HEADER_BYTES {
            transport.receive(peer, link, header_in, &mut [], &mut state.filled)?;
        }
        if state.filled < HEADER_BYTES {
            return Ok(state.filled != before);
        }
        let header = match state.header_checked {
            Some(header) => header,
            None => self.checked(header_in, peer, session, state.frames_received, length, mutations).map_err(fault)?,
        };
        state.header_checked = Some(header);
        let mut sound = Ok(());
        let checks = transport.checks_payloads(peer, link);
        let came = transport.look(peer, link, length, &mut |parts| {
            sound = if checks { header.check_payload(&parts, mutations) } else { Ok(()) };
            if sound.is_ok() {
                self.apply_parts(frame, parts, scratch, buffers);
            }
        })?;
        let moved = came || state.filled != before;
        sound.map_err(fault)?;
        if came {
            self.received(index, length, links);
        }
        Ok(moved)
    }

    /// Reads a header that arrived, and compares it with the one that is due.
    fn checked(
        &self,
        bytes: &[u8; HEADER_BYTES],
        peer: usize,
        session: u64,
        sequence: u32,
        length: usize,
        mutations: Mutations,
    ) -> Result<Header, FrameError> {
        let header = Header::decode(bytes)?;
        header.check(&self.header(peer, session, sequence, length, header.payload_crc), mutations)?;
        Ok(header)
    }

    /// Counts a frame that is dealt with.
    fn received(&mut self, index: usize, length: usize, links: &mut Links) {
        let channel = &self.plan.channels[index];
        let state = links.state(channel.peer, channel.link);
        (state.filled, state.header_checked) = (0, None);
        state.frames_received = state.frames_received.wrapping_add(1);
        links.bytes_received += length as u64;
        self.cursors[index].1 += 1;
        self.remaining -= 1;
    }

    /// Applies a complete frame as the plan says.
    fn apply(
        &self,
        frame: &Incoming,
        staging: &[f32],
        scratch: &mut [f32],
        widened: &mut Vec<f32>,
        buffers: &mut Buffers<'_>,
    ) {
        let wire = self.descriptor.wire;
        let elements = frame.at.len();
        let in_place = wire == WireDtype::Exact && matches!(frame.action, Action::Store | Action::Scratch { .. });
        if in_place || elements == 0 {
            return;
        }
        let incoming = match wire {
            WireDtype::Exact => &staging[..elements],
            _ => {
                widened.resize(widened.len().max(elements), 0.0);
                arithmetic::from_wire(wire, &cast_slice(staging)[..elements], &mut widened[..elements]);
                &widened[..elements]
            }
        };
        let data: &mut [f32] = &mut cast_slice_mut(buffers.data)[frame.at.clone()];
        act(self.descriptor.reduction, frame.action, data, scratch, 0, incoming);
    }

    /// The same with a payload that lies in two places, each of whole elements.
    fn apply_parts(&self, frame: &Incoming, parts: [&[u8]; 2], scratch: &mut [f32], buffers: &mut Buffers<'_>) {
        let data: &mut [f32] = &mut cast_slice_mut(buffers.data)[frame.at.clone()];
        let mut start = 0;
        for part in parts {
            let (incoming, _) = part.as_chunks::<4>();
            let end = start + incoming.len();
            act(self.descriptor.reduction, frame.action, &mut data[start..end], scratch, start, incoming);
            start = end;
        }
    }
}

/// Does with elements that arrived what the plan says. `before` elements of their frame came before
/// them.
fn act(
    reduction: Reduction,
    action: Action,
    data: &mut [f32],
    scratch: &mut [f32],
    before: usize,
    incoming: &[impl Arrived],
) {
    let of_scratch = |at: usize| at + before..at + before + incoming.len();
    match action {
        Action::Store => arithmetic::store(data, incoming),
        Action::Add => arithmetic::add(reduction, data, incoming),
        Action::AddBefore => arithmetic::add_before(reduction, data, incoming),
        Action::Scratch { at } => arithmetic::store(&mut scratch[of_scratch(at)], incoming),
        Action::ScratchAdd { at } => arithmetic::add(reduction, &mut scratch[of_scratch(at)], incoming),
        Action::Join { at } => arithmetic::join(reduction, data, &scratch[of_scratch(at)], incoming),
    }
}

fn bytes_of(at: &Range<usize>, element: usize) -> Range<usize> {
    at.start * element..at.end * element
}

/// The bytes of a frame that is sent as it lies in memory.
fn exact<'a>(frame: &Outgoing, buffers: &'a Buffers<'_>, element: usize) -> &'a [u8] {
    let at = bytes_of(&frame.at, element);
    match frame.source {
        Source::Data => &buffers.data[at],
        Source::Input => &buffers.input[at],
    }
}

/// Rounds a frame to the wire's type; what is final is rounded in the caller's buffer too.
fn narrow(wire: WireDtype, frame: &Outgoing, buffers: &mut Buffers<'_>, staging: &mut Vec<f32>) {
    let elements = frame.at.len();
    staging.resize(staging.len().max(elements.div_ceil(2)), 0.0);
    let narrow = &mut cast_slice_mut::<f32, u16>(staging)[..elements];
    match frame.source {
        Source::Input => arithmetic::to_wire(wire, &cast_slice(buffers.input)[frame.at.clone()], narrow),
        Source::Data => {
            let data: &mut [f32] = &mut cast_slice_mut(buffers.data)[frame.at.clone()];
            arithmetic::to_wire(wire, data, narrow);
            if frame.is_final {
                arithmetic::from_wire(wire, narrow, data);
            }
        }
    }
}
