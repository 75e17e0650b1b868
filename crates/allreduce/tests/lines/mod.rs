//! Lines between the ranks of a group, for tests over any network.

use finetune_allreduce::{Group, Receiver, Sender};

/// A line to the next rank, with room for so many messages, and one from the rank before, around.
pub(crate) fn around(group: &Group, room: usize) -> (Sender, Receiver) {
    let (rank, world) = (group.rank(), group.world());
    let (mut sender, mut receiver) = (None, None);
    for from in 0..world {
        let to = (from + 1) % world;
        let (color, key) = match rank {
            rank if rank == from => (0, 0),
            rank if rank == to => (0, 1),
            // In a group of its own.
            rank => (1 + rank, 0),
        };
        let part = group.split(color as u64, key).unwrap_or_else(|error| panic!("{error}"));
        if rank == from {
            sender = Some(part.sender(room).expect("a thread"));
        } else if rank == to {
            receiver = Some(part.receiver().expect("a thread"));
        }
    }
    (sender.expect("a next rank"), receiver.expect("a rank before"))
}
