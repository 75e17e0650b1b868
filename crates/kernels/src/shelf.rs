//! Matrices that are not in memory, and are read whenever they are multiplied: the experts of a layer that is larger
//! than memory.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use crate::weight::{FrozenValues, PackedWeight};

/// Where such matrices are. Each has a number. They are multiplied by the CPU.
pub trait Shelf: Debug + Send + Sync {
    /// Reads the matrices of these numbers, a few ahead of those that were taken, and gives them out in this order.
    /// If one cannot be read, nothing more comes, and the shelf knows why: whoever made the product asks it.
    ///
    /// What reads must not wait for a thread of the shared pool: all of them may wait for what it reads.
    fn bring(&self, numbers: Vec<usize>) -> Receiver<PackedWeight>;

    /// Takes note that a product has waited this long for a matrix.
    fn waited(&self, time: Duration);
}

/// The next matrix that is brought; `None`: it could not be read.
pub(crate) fn next(shelf: &dyn Shelf, brought: &Receiver<PackedWeight>) -> Option<PackedWeight> {
    let start = Instant::now();
    let weight = brought.recv().ok();
    shelf.waited(start.elapsed());
    weight
}

/// One matrix [o, i] alone. One that cannot be read has NaN everywhere, so that nothing is made of it unseen.
pub(crate) fn single(shelf: &Arc<dyn Shelf>, number: usize, [outputs, inputs]: [usize; 2]) -> PackedWeight {
    let read = next(&**shelf, &shelf.bring(vec![number]));
    read.unwrap_or_else(|| {
        let values = FrozenValues::F32(vec![f32::NAN; outputs * inputs]);
        PackedWeight::in_host_memory(values, [outputs, inputs])
    })
}
