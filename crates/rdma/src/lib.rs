//! Messages over RDMA verbs: Thunderbolt between Macs (macOS 26.2 and later), RoCE and soft-RoCE on
//! Linux.
//!
//! **Owns** the verbs library and its binding, devices and their limits, queue pairs, the slots and
//! credits of a wire, and all `unsafe` that this takes. A *wire* is one cable between two devices;
//! here it is two queue pairs at each end.
//!
//! **Must never know** what its messages mean or what its callers make of a rank. A rank is a
//! number that tells peers apart. A message is a head of 64 bytes and a payload. [`ReadHead`] is
//! all that is known of a head.
//!
//! **Start reading** at [`Prepared`], which opens devices and makes an [`Offer`]. The caller brings
//! the offers to all ranks; [`Prepared::connect`] gives the [`Wires`]. Then:
//!
//! - `slots.rs` has the protocol: slots, credits, and why a receive is always posted. Pure, no
//!   device.
//! - `offer.rs` has what ranks tell each other before they connect, and what they agree on. Pure.
//! - `wires.rs` connects in two phases; `wire.rs` moves the messages of one cable: into registered
//!   slots and out of them.
//! - `device.rs` opens a device and holds it to its limits; `library.rs` finds the verbs library;
//!   `functions.rs` looks up its functions; `verbs.rs` calls them; `layout.rs` has the C structures
//!   and numbers, compared with the C header by a test. `unsafe` code is in `functions.rs` and
//!   `verbs.rs` only.
//!
//! One code path for both systems, so what is tested with soft-RoCE is what runs on a Mac.
//!
//! # What Apple's devices demand, and where it is met
//!
//! Sources: Apple TN3205 and reports about MLX's JACCL; none of it could be tried here on a Mac.
//!
//! | demand | here |
//! | --- | --- |
//! | unreliable connected (UC) queue pairs, send and receive only | the default; nothing else is used |
//! | at most 10 queue pairs a device | two a wire, counted per process before the driver is asked |
//! | about 100 memory regions a device | one a device and group of ranks |
//! | a device must not be opened twice, and has about 11 protection domains | one of each a process, shared by its groups |
//! | messages of at most 4095 × 4096 bytes | [`Limits::message_bytes`] |
//! | depth counts frames of 4 KiB, not messages | counted in the same unit: [`Limits::frames_in_flight`] |
//! | both ends post the same number of 4 KiB frames | a message is always a whole slot, however little is in it |
//! | page-aligned memory, local write only | one page-aligned slab per device, local write only |
//! | no acknowledgement; a lost message is lost silently | receives are posted before credit is given; every message has a sequence number and a checksum, which the caller checks; a completed send only means that its slot is free |
//! | connections over IPv4-mapped GIDs | searched, with its own index |
//! | queue pairs go bad when idle for about 20 minutes | [`Wires::keep_alive`] |
//!
//! Linux is bound by the same rules if [`Limits::apple`] is asked for, and the tests ask for it.
//! Soft-RoCE proves correctness only: it is slower than TCP.

#![deny(unsafe_code)]
#![warn(missing_docs)]

mod device;
mod error;
#[allow(unsafe_code)] // where they are looked up
mod functions;
mod layout;
mod library;
mod message;
mod offer;
mod slots;
#[allow(unsafe_code)] // where they are called
mod verbs;
mod wire;
mod wires;

pub use device::{Limits, RdmaDevice, rdma_devices};
pub use error::RdmaError;
pub use message::{Announced, HEAD_BYTES, Head, ReadHead, Received};
pub use offer::{Offer, QueuePairKind, WireDescription, WireOptions};
pub use wire::BrokenWire;
pub use wires::{LONGEST_SLEEP, Prepared, Wires};
