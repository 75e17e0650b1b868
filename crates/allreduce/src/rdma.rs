//! Frames over RDMA verbs: Thunderbolt between Macs (macOS 26.2 and later), RoCE and soft-RoCE on
//! Linux. A *wire* is one cable between two devices; here it is two queue pairs at each end.
//!
//! One code path for both systems, so what is tested with soft-RoCE is what runs on a Mac. Read it
//! in this order:
//!
//! - `slots.rs` has the protocol: slots, credits, and why a receive is always posted. Pure, no
//!   device.
//! - `offer.rs` has what ranks tell each other before they connect, and what they agree on. Pure.
//! - `transport.rs` connects in two phases and is the [`Transport`](crate::transport::Transport);
//!   `wire.rs` moves the frames of one cable: into registered slots and out of them.
//! - `device.rs` opens a device and holds it to its limits; `library.rs` finds the verbs library;
//!   `verbs.rs` is the binding, the one file with `unsafe`; `layout.rs` has the C structures and
//!   numbers, compared with the C header by a test.
//!
//! # What Apple's devices demand, and where it is met
//!
//! Sources: Apple TN3205 and reports about MLX's JACCL; none of it could be tried here on a Mac.
//!
//! | demand | here |
//! | --- | --- |
//! | unreliable connected (UC) queue pairs, send and receive only | the default; nothing else is used |
//! | at most 10 queue pairs a device | two a wire, counted per process before the driver is asked |
//! | about 100 memory regions a device | one a device and group |
//! | messages of at most 4095 × 4096 bytes | [`Limits::message_bytes`] |
//! | depth counts frames of 4 KiB, not messages | so do we: [`Limits::frames_in_flight`] |
//! | both ends post the same number of 4 KiB frames | a message is always a whole slot, however little is in it |
//! | page-aligned memory, local write only | one page-aligned slab per device, local write only |
//! | no acknowledgement; a lost message is lost silently | receives are posted before credit is given; every frame has a sequence number and a checksum, which the caller checks; a completed send only means that its slot is free |
//! | connections over IPv4-mapped GIDs | searched, with its own index |
//! | queue pairs go bad when idle for about 20 minutes | [`Rdma::keep_alive`] |
//!
//! Linux is bound by the same rules where `Limits::apple()` is asked for, and the tests ask for it.
//! Soft-RoCE proves correctness only: it is slower than TCP.

mod device;
mod error;
#[allow(unsafe_code)] // where they are looked up
mod functions;
mod layout;
mod library;
mod offer;
mod slots;
mod transport;
#[allow(unsafe_code)] // where they are called
mod verbs;
mod wire;

#[cfg(test)]
mod layout_test;
#[cfg(test)]
mod pair_test;
#[cfg(test)]
mod slots_test;

pub use device::{Limits, RdmaDevice, rdma_devices};
pub use error::RdmaError;
pub(crate) use offer::{Offer, WireOptions};
pub use offer::{QueuePairKind, WireDescription};
pub(crate) use transport::{Prepared, Rdma};
