//! Experts whose matrices are never all in memory: each is read whenever it is multiplied.
//!
//! A layer of Kimi K2 has 384 experts, which take 9.5 GB; two such layers are more than many machines have. What else
//! is in a layer takes a few hundred megabytes and is read as ever. The price is that all micro-batches of a step share
//! the reading of a layer, but not that of an expert: it is read anew for each of them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::time::Duration;

use finetune_kernels::footprint::EXPERTS_AT_ONCE;
use finetune_kernels::{PackedWeight, Shelf, Weight};
use finetune_store::failpoint;

use super::{LayerSource, READERS, Reading, waiting};
use crate::error::ModelError;
use crate::files::fetch::Fetched;
use crate::lora::layer_of;
use crate::tree::{Decoder, Matrix};

/// Experts' matrices that are in memory at most where each is read whenever it is multiplied: as many are read as wait
/// for their products, and some are multiplied.
pub const EXPERTS_IN_MEMORY: usize = 2 * READERS + EXPERTS_AT_ONCE;

/// The experts' matrices of the layers that are read.
#[derive(Clone, Debug)]
struct ExpertShelf {
    reading: Arc<Reading>,
    /// They only describe what is to be read.
    matrices: Arc<[Matrix]>,
}

impl Shelf for ExpertShelf {
    fn bring(&self, numbers: Vec<usize>) -> Receiver<PackedWeight> {
        let (give, brought) = sync_channel(READERS);
        let shelf = self.clone();
        // A thread for each product. None of them waits for another: they share the threads that read, which wait for
        // nobody.
        let work = move || {
            if let Err(error) = shelf.give_out(&numbers, &give) {
                shelf.reading.fail(error);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("experts".to_owned()).spawn(work) {
            self.reading.fail(ModelError::Layers { what: error.to_string() });
        }
        brought
    }

    fn waited(&self, time: Duration) {
        self.reading.waited(time);
    }
}

impl ExpertShelf {
    /// Reads these matrices, some at a time, and hands them over, until nobody takes them any more.
    fn give_out(&self, numbers: &[usize], give: &SyncSender<PackedWeight>) -> Result<(), ModelError> {
        for some in numbers.chunks(READERS) {
            failpoint::hit("experts.read");
            let matrices = some.iter().map(|&number| &self.matrices[number]);
            for (fetched, matrix) in self.read(some)?.into_iter().zip(matrices) {
                let Weight::Packed(weight) = fetched.onto(matrix.shape, &self.reading.placement) else {
                    let what = format!("{} is no matrix of an expert", matrix.name);
                    return Err(ModelError::Layers { what });
                };
                if give.send(weight).is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Reads these matrices, and gives a disk up that brings nothing.
    fn read(&self, numbers: &[usize]) -> Result<Vec<Fetched>, ModelError> {
        let (done, read) = channel();
        let (shelf, wanted) = (self.clone(), numbers.to_vec());
        // Among the threads that read: one whose read hangs never comes back.
        self.reading.pool.spawn(move || {
            let matrices: Vec<&Matrix> = wanted.iter().map(|&number| &shelf.matrices[number]).collect();
            // Nobody waits any more if it was given up.
            let _ = done.send(shelf.reading.all(&matrices));
        });
        let first = numbers.first().and_then(|&number| layer_of(&self.matrices[number].name));
        let (what, progress) = (format!("layer {}", first.unwrap_or(0)), || self.reading.files.reading());
        self.reading.patience.receive(&read, &what, &progress, &waiting::tell)?
    }
}

impl Decoder {
    /// Leaves the experts' matrices of those layers that `holds` accepts in the files of `source`.
    pub(crate) fn leave_experts(&mut self, source: &LayerSource, holds: impl Fn(usize) -> bool) {
        let layers = self.layers.iter_mut().enumerate().filter(|(n, _)| holds(*n));
        let places: Vec<&mut Matrix> =
            layers.flat_map(|(_, layer)| layer.absent()).filter(|matrix| matrix.is_of_expert).collect();
        let matrices = places.iter().map(|matrix| Matrix::clone(matrix)).collect();
        let shelf: Arc<dyn Shelf> = Arc::new(ExpertShelf { reading: source.reading.clone(), matrices });
        for (number, matrix) in places.into_iter().enumerate() {
            let shape = matrix.shape;
            matrix.set_weight(Weight::Packed(PackedWeight::on_shelf(shelf.clone(), number, shape)));
        }
    }

    /// Fails if an expert could not be read since the last call.
    ///
    /// # Errors
    /// With the reason.
    pub(crate) fn expect_experts(&self) -> Result<(), ModelError> {
        match self.source.as_ref().and_then(|source| source.reading.take_failure()) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}
