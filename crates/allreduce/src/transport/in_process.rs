//! Ranks that are threads of one process: virtual ranks, and the tests.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::frame::HEADER_BYTES;
use crate::transport::{Backend, Broken, LONGEST_SLEEP, Transport, Want};

/// Payload bytes of a frame: small enough to stay in a core's cache on its way.
const FRAME_BYTES: usize = 64 << 10;

/// Frames that may wait on one link before its sender has to wait.
const DEPTH: usize = 16;

#[derive(Default)]
struct Mailboxes {
    /// Per sender and link.
    frames: Vec<Vec<VecDeque<Vec<u8>>>>,
    /// Frames taken out of mailboxes, to be filled again.
    spare: Vec<Vec<u8>>,
    gone: bool,
}

/// What one rank receives, and how it is woken when something changes for it.
#[derive(Default)]
struct Place {
    mailboxes: Mutex<Mailboxes>,
    bell: Condvar,
    rings: Mutex<u64>,
}

impl Place {
    fn lock(&self) -> MutexGuard<'_, Mailboxes> {
        // A panic of another thread cannot leave a queue half changed.
        self.mailboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        *self.rings.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.bell.notify_all();
    }
}

/// The links of one rank to the other threads' ranks.
pub(crate) struct InProcess {
    rank: usize,
    places: Arc<Vec<Place>>,
    rings_seen: u64,
}

/// The transports of all ranks of a group within this process.
pub(crate) fn connect(world: usize, links: usize) -> Vec<InProcess> {
    let place = |_| Place {
        mailboxes: Mutex::new(Mailboxes {
            frames: (0..world).map(|_| (0..links).map(|_| VecDeque::new()).collect()).collect(),
            ..Mailboxes::default()
        }),
        ..Place::default()
    };
    let places: Arc<Vec<Place>> = Arc::new((0..world).map(place).collect());
    (0..world).map(|rank| InProcess { rank, places: Arc::clone(&places), rings_seen: 0 }).collect()
}

impl Transport for InProcess {
    fn backend(&self) -> Backend {
        Backend::InProcess
    }

    fn frame_bytes(&self, remaining: usize) -> usize {
        remaining.min(FRAME_BYTES)
    }

    fn send(
        &mut self,
        peer: usize,
        link: usize,
        header: &[u8; HEADER_BYTES],
        payload: &[u8],
        sent: &mut usize,
    ) -> Result<bool, Broken> {
        let place = &self.places[peer];
        let mut mailboxes = place.lock();
        if mailboxes.gone {
            return Err(Broken { peer, link, closed: true, what: "its thread has left the group".into() });
        }
        if mailboxes.frames[self.rank][link].len() >= DEPTH {
            return Ok(false);
        }
        let mut frame = mailboxes.spare.pop().unwrap_or_default();
        frame.clear();
        frame.extend_from_slice(header);
        frame.extend_from_slice(payload);
        *sent = frame.len();
        mailboxes.frames[self.rank][link].push_back(frame);
        drop(mailboxes);
        place.ring();
        Ok(true)
    }

    fn receive(
        &mut self,
        peer: usize,
        link: usize,
        header: &mut [u8; HEADER_BYTES],
        payload: &mut [u8],
        filled: &mut usize,
    ) -> Result<bool, Broken> {
        let mut mailboxes = self.places[self.rank].lock();
        let Some(frame) = mailboxes.frames[peer][link].pop_front() else {
            drop(mailboxes);
            if self.places[peer].lock().gone {
                // What the peer sent before it left is in our mailbox by now.
                if self.places[self.rank].lock().frames[peer][link].is_empty() {
                    return Err(Broken { peer, link, closed: true, what: "its thread has left the group".into() });
                }
            }
            return Ok(false);
        };
        header.copy_from_slice(&frame[..HEADER_BYTES]);
        *filled = HEADER_BYTES;
        if frame.len() == HEADER_BYTES + payload.len() {
            payload.copy_from_slice(&frame[HEADER_BYTES..]);
            *filled = frame.len();
        }
        if mailboxes.spare.len() < DEPTH {
            mailboxes.spare.push(frame);
        }
        drop(mailboxes);
        self.places[peer].ring(); // there is room again
        Ok(true)
    }

    fn idle(&mut self, _: &[Want], round: u32) {
        if round < 64 {
            std::thread::yield_now();
            return;
        }
        let place = &self.places[self.rank];
        let rings = place.rings.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = self.rings_seen;
        let unchanged = |rings: &mut u64| *rings == seen;
        let waited = place.bell.wait_timeout_while(rings, LONGEST_SLEEP, unchanged);
        self.rings_seen = *waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.places[self.rank].lock().gone = true;
        for place in self.places.iter() {
            place.ring();
        }
    }
}
