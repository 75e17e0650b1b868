//! Frozen matrices of layers that are read from the disk whenever a pass comes to them.
//!
//! A thread reads the next layer while the one before is computed. No more than two layers are in memory: the
//! one that was given last, and the one that is read ahead. Experts may be left out of both: `experts.rs`. Of an
//! embedding that no head shares, a pass reads the rows of its tokens.

mod experts;

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use finetune_kernels::Weight;
use finetune_store::failpoint;
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::base_files::BaseFiles;
use crate::files::by_row::ByRow;
use crate::files::fetch::{Fetched, fetch};
use crate::placement::Placement;
use crate::tree::{Decoder, Home, Layer, Matrix, Slot};

mod waiting;

pub use self::experts::EXPERTS_IN_MEMORY;
pub(crate) use self::waiting::DiskProgress;
use self::waiting::Patience;
pub use self::waiting::{DiskWait, tell_of_disk_waits};

/// Most threads that read at a time. A disk serves a few requests at once better than one after the other.
const READERS: usize = 4;

/// The absent matrices of a layer, in the order of the tree. They only describe what is to be read.
#[derive(Clone, Debug)]
struct Absent {
    layer: usize,
    matrices: Vec<Matrix>,
}

impl Absent {
    fn of(n: usize, layer: &mut Layer) -> Absent {
        let matrices = layer.absent().into_iter().map(|matrix| matrix.clone()).collect();
        Absent { layer: n, matrices }
    }

    fn is(&self, other: &Absent) -> bool {
        let names = |absent: &Absent| -> Vec<String> { absent.matrices.iter().map(|m| m.name.clone()).collect() };
        self.layer == other.layer && names(self) == names(other)
    }
}

/// Where layers are ordered and given out.
struct Desk {
    /// `None`: it is closed.
    orders: Option<Sender<Absent>>,
    read: Receiver<Result<Vec<Fetched>, ModelError>>,
    /// What was ordered and not yet taken: at most one layer.
    ahead: Option<Absent>,
    /// What was given last.
    given: Option<(Absent, Vec<Weight>)>,
    thread: Option<JoinHandle<()>>,
    patience: Patience,
    /// Whether the last wait has ended without a layer.
    has_given_up: bool,
    /// What the files say of their reads.
    progress: Box<dyn Fn() -> DiskProgress + Send>,
}

/// The files of a base, and the threads that read matrices of them.
struct Reading {
    files: BaseFiles,
    config: ModelConfig,
    placement: Placement,
    /// A pool of its own: a pass that waits for what is read may hold every thread of the shared one.
    pool: rayon::ThreadPool,
    /// How long a disk that brings nothing is waited for.
    patience: Patience,
    nanoseconds_waited: AtomicU64,
    /// Why an expert could not be read, until it is told.
    failure: Mutex<Option<ModelError>>,
}

impl std::fmt::Debug for Reading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reading").field("files", &self.files.path()).finish_non_exhaustive()
    }
}

impl Reading {
    /// # Errors
    /// If the system gives no more threads, or `FINETUNE_DISK_TIMEOUT` is no number of seconds.
    fn new(mut files: BaseFiles, config: ModelConfig, placement: Placement) -> Result<Reading, ModelError> {
        if let Some(memory) = placement.host_memory() {
            files.pass_cache_of(memory);
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(READERS)
            .thread_name(|n| format!("layers-{n}"))
            .build()
            .map_err(|error| ModelError::Layers { what: error.to_string() })?;
        let (nanoseconds_waited, failure) = (AtomicU64::new(0), Mutex::new(None));
        let patience = Patience::of_environment()?;
        Ok(Reading { files, config, placement, pool, patience, nanoseconds_waited, failure })
    }

    /// What these matrices describe, some at a time.
    ///
    /// # Errors
    /// If one cannot be read, or has a number that is not finite.
    fn all(&self, matrices: &[&Matrix]) -> Result<Vec<Fetched>, ModelError> {
        let read = |matrix: &&Matrix| fetch(&self.files, &self.config, &self.placement, matrix);
        let each: Vec<_> = self.pool.install(|| matrices.par_iter().map(read).collect());
        each.into_iter().collect()
    }

    fn waited(&self, time: Duration) {
        self.nanoseconds_waited.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Keeps the first reason.
    fn fail(&self, error: ModelError) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn take_failure(&self) -> Option<ModelError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What reads the layers of a base.
pub(crate) struct LayerSource {
    desk: Mutex<Desk>,
    reading: Arc<Reading>,
    layers_read: AtomicU64,
}

impl std::fmt::Debug for LayerSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LayerSource").field("layers_read", &self.layers_read).finish_non_exhaustive()
    }
}

impl LayerSource {
    /// Starts the thread that reads.
    ///
    /// # Errors
    /// If the system gives no more threads, or `FINETUNE_DISK_TIMEOUT` is no number of seconds.
    pub(crate) fn start(
        files: BaseFiles,
        config: ModelConfig,
        placement: Placement,
    ) -> Result<LayerSource, ModelError> {
        let (orders, ordered) = channel::<Absent>();
        let (done, read) = channel();
        let reading = Arc::new(Reading::new(files, config, placement)?);
        let (of_thread, watched, patience) = (reading.clone(), reading.clone(), reading.patience);
        let work = move || {
            for what in ordered {
                failpoint::hit("layers.read");
                let matrices: Vec<&Matrix> = what.matrices.iter().collect();
                if done.send(of_thread.all(&matrices)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("layers".to_owned()).spawn(work);
        let thread = thread.map_err(|error| ModelError::Layers { what: error.to_string() })?;
        let desk = Desk {
            orders: Some(orders),
            read,
            ahead: None,
            given: None,
            thread: Some(thread),
            patience,
            has_given_up: false,
            progress: Box::new(move || watched.files.reading()),
        };
        Ok(LayerSource { desk: Mutex::new(desk), reading, layers_read: AtomicU64::new(0) })
    }

    /// The weights of a layer's absent matrices, in their order. `next` is read meanwhile. A caller that still
    /// holds the weights of another layer holds a third one in memory.
    ///
    /// # Errors
    /// If they cannot be read, or one has a number that is not finite.
    fn weights(&self, what: &Absent, next: Option<Absent>) -> Result<Vec<Weight>, ModelError> {
        let mut desk = self.desk.lock().unwrap_or_else(PoisonError::into_inner);
        if !desk.given.as_ref().is_some_and(|(given, _)| given.is(what)) {
            // Before anything arrives: no third layer.
            desk.given = None;
            let start = Instant::now();
            if desk.ahead.as_ref().is_some_and(|ahead| !ahead.is(what)) {
                // Not wanted any more, nor what was wrong with it.
                drop(desk.take()?);
            }
            if desk.ahead.is_none() {
                desk.order(what.clone());
            }
            let fetched = desk.take()??;
            self.reading.waited(start.elapsed());
            self.give(&mut desk, what, fetched);
        }
        desk.order_next(what, next);
        let placement = &self.reading.placement;
        if !placement.is_cpu() {
            // What is uploaded waits in main memory until the device comes to it. So the layers before are waited for
            // here, with this one on its way: no more than one waits there, and none for the upload.
            placement.device().sync().map_err(|error| ModelError::device(error.to_string()))?;
        }
        Ok(desk.given.as_ref().map(|(_, weights)| weights.clone()).unwrap_or_default())
    }

    /// Gives a layer that has been read already, for [`LayerSource::weights`] to find, and has `next` read meanwhile.
    /// Waits for nothing: a layer that is not here yet is left to that.
    ///
    /// # Errors
    /// If it could not be read, or has a number that is not finite.
    fn give_ahead(&self, what: &Absent, next: Option<Absent>) -> Result<(), ModelError> {
        let mut desk = self.desk.lock().unwrap_or_else(PoisonError::into_inner);
        if !desk.ahead.as_ref().is_some_and(|ahead| ahead.is(what)) {
            return Ok(());
        }
        let Ok(read) = desk.read.try_recv() else { return Ok(()) };
        (desk.ahead, desk.given, desk.has_given_up) = (None, None, false);
        self.give(&mut desk, what, read?);
        desk.order_next(what, next);
        Ok(())
    }

    /// Puts what was read of a layer where it is computed. What was given before is gone by now.
    fn give(&self, desk: &mut Desk, what: &Absent, fetched: Vec<Fetched>) {
        self.layers_read.fetch_add(1, Ordering::Relaxed);
        let placement = &self.reading.placement;
        let place = |fetched: Vec<Fetched>| {
            let each = fetched.into_iter().zip(&what.matrices);
            each.map(|(fetched, matrix)| fetched.onto(matrix.shape, placement)).collect()
        };
        let weights = match placement.is_cpu() {
            true => place(fetched),
            // Memory of exactly their size, which the next layer of the same shape takes over.
            false => placement.device().memory_persistent_allocations(fetched, place),
        };
        desk.given = Some((what.clone(), weights));
    }

    /// Rows of a matrix of these files, one behind the other.
    ///
    /// # Errors
    /// If they cannot be read, or have a number that is not finite.
    pub(crate) fn rows(&self, matrix: &ByRow, rows: &[u32]) -> Result<Vec<f32>, ModelError> {
        let (start, reading) = (Instant::now(), &self.reading);
        let (done, read) = channel();
        let (of_thread, wanted) = (matrix.clone(), rows.to_vec());
        // Among the threads that read: one whose read hangs never comes back, and nobody waits for it any more.
        reading.pool.spawn(move || {
            let _ = done.send(of_thread.read(&wanted));
        });
        let read = reading.patience.receive(&read, &matrix.name, &|| reading.files.reading(), &waiting::tell);
        reading.waited(start.elapsed());
        read?
    }

    /// How long passes have waited for layers, rows and experts since the last call, and how many layers were read.
    pub(crate) fn take_waited(&self) -> (Duration, u64) {
        let waited = self.reading.nanoseconds_waited.swap(0, Ordering::Relaxed);
        (Duration::from_nanos(waited), self.layers_read.swap(0, Ordering::Relaxed))
    }
}

impl Desk {
    fn order(&mut self, what: Absent) {
        // If the thread is gone, `take` says so.
        let _ = self.orders.as_ref().map(|orders| orders.send(what.clone()));
        self.ahead = Some(what);
    }

    /// Has `next` read while `what` is computed, unless something is ordered or this is all there is.
    fn order_next(&mut self, what: &Absent, next: Option<Absent>) {
        if let Some(next) = next.filter(|next| self.ahead.is_none() && !next.is(what)) {
            self.order(next);
        }
    }

    /// Waits for what was ordered, which is what was read or what is wrong with it.
    ///
    /// # Errors
    /// If nothing comes. It stays ordered: whatever comes after all is not taken for another layer.
    fn take(&mut self) -> Result<Result<Vec<Fetched>, ModelError>, ModelError> {
        let what = format!("layer {}", self.ahead.as_ref().map_or(0, |ahead| ahead.layer));
        let read = self.patience.receive(&self.read, &what, &*self.progress, &waiting::tell);
        self.has_given_up = read.is_err();
        let read = read?;
        self.ahead = None;
        Ok(read)
    }
}

impl Drop for LayerSource {
    fn drop(&mut self) {
        let desk = self.desk.get_mut().unwrap_or_else(PoisonError::into_inner);
        desk.orders = None;
        desk.patience = desk.patience.at_the_end();
        // A thread whose read hangs would hold this one up for ever. The end of the process ends it too.
        let is_over = !desk.has_given_up && (desk.ahead.is_none() || desk.take().is_ok());
        if let Some(thread) = desk.thread.take().filter(|_| is_over) {
            let _ = thread.join();
        }
    }
}

impl Layer {
    /// The matrices that are not in memory.
    fn absent(&mut self) -> Vec<&mut Matrix> {
        let absent = |slot| match slot {
            Slot::Matrix(matrix) if matrix.is_absent() => Some(matrix),
            _ => None,
        };
        self.slots().into_iter().filter_map(absent).collect()
    }
}

impl Decoder {
    /// Layer `n` with all of its weights. If they are read from the disk, layer `next` is read meanwhile, and
    /// the result has to be dropped before the next one is asked for: no third layer is in memory then.
    ///
    /// # Errors
    /// If they cannot be read, or one has a number that is not finite.
    pub(crate) fn layer(&self, n: usize, next: Option<usize>) -> Result<Cow<'_, Layer>, ModelError> {
        let Some(source) = &self.source else { return Ok(Cow::Borrowed(&self.layers[n])) };
        let mut layer = self.layers[n].clone();
        if layer.absent().is_empty() {
            return Ok(Cow::Borrowed(&self.layers[n]));
        }
        let next = next.map(|next| self.absent(next));
        let weights = source.weights(&Absent::of(n, &mut layer), next)?;
        for (matrix, weight) in layer.absent().into_iter().zip(weights) {
            matrix.set_weight(weight);
        }
        for linear in layer.linears() {
            if let Some(branch) = &mut linear.lora {
                branch.update_norms(&linear.weight);
            }
        }
        Ok(Cow::Owned(layer))
    }

    /// Has layer `n` put onto the device, if it comes from the disk and has been read by now, and layer `next` read
    /// meanwhile. It is for whoever has handed the device all of its work on the layer before, has dropped that, and is
    /// about to wait for the device: the upload is behind that work then, and in no other memory.
    ///
    /// # Errors
    /// As [`Decoder::layer`].
    pub(crate) fn layer_ahead(&self, n: Option<usize>, next: Option<usize>) -> Result<(), ModelError> {
        let (Some(source), Some(n)) = (&self.source, n) else { return Ok(()) };
        source.give_ahead(&self.absent(n), next.map(|next| self.absent(next)))
    }

    fn absent(&self, n: usize) -> Absent {
        Absent::of(n, &mut self.layers[n].clone())
    }

    /// Loads those matrices of the layers that `has` accepts whose names `wanted` does, to stay.
    ///
    /// # Errors
    /// As [`Decoder::layer`].
    pub(crate) fn load_for_good(
        &mut self,
        has: &dyn Fn(Home) -> bool,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(), ModelError> {
        for n in (0..self.layers.len()).filter(|&n| has(Home::Layer(n))) {
            let is_wanted = |matrix: &&mut Matrix| wanted(&matrix.name);
            if !self.layers[n].absent().iter().any(is_wanted) {
                continue;
            }
            let mut read = self.layer(n, None)?.into_owned();
            let all: Vec<Matrix> = read
                .slots()
                .into_iter()
                .filter_map(|slot| if let Slot::Matrix(matrix) = slot { Some(matrix.clone()) } else { None })
                .collect();
            for matrix in self.layers[n].absent().into_iter().filter(is_wanted) {
                if let Some(read) = all.iter().find(|read| read.name == matrix.name) {
                    matrix.set_as(read);
                }
            }
        }
        Ok(())
    }

    /// Names of the matrices inside those layers that `wanted` accepts.
    pub(crate) fn names_in_layers(&mut self, wanted: impl Fn(usize) -> bool) -> HashSet<String> {
        let layers = self.layers.iter_mut().enumerate().filter(|(n, _)| wanted(*n));
        let slots = layers.flat_map(|(_, layer)| layer.slots());
        slots
            .filter_map(|slot| if let Slot::Matrix(matrix) = slot { Some(matrix.name.clone()) } else { None })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A source of layers without matrices, each of which is there when `wait` ends.
    fn source_that(wait: impl Fn() + Send + 'static) -> LayerSource {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/qwen3");
        let (config, files) = BaseFiles::open(&base, None).expect("a golden model");
        let mut source = LayerSource::start(files, config, Placement::cpu(None)).expect("a thread");
        let (orders, ordered) = channel::<Absent>();
        let (done, read) = channel();
        let work = move || {
            for _ in ordered {
                wait();
                if done.send(Ok(Vec::new())).is_err() {
                    return;
                }
            }
        };
        let desk = source.desk.get_mut().expect("no panic");
        (desk.orders, desk.read, desk.thread) = (Some(orders), read, Some(std::thread::spawn(work)));
        source
    }

    fn layer(layer: usize) -> Absent {
        Absent { layer, matrices: Vec::new() }
    }

    #[test]
    fn the_wait_for_what_was_read_ahead_in_vain_counts() {
        let source = source_that(|| std::thread::sleep(Duration::from_secs(1)));
        source.weights(&layer(0), Some(layer(1))).expect("layer 0");
        source.take_waited();
        source.weights(&layer(5), None).expect("layer 5");
        let (waited, read) = source.take_waited();
        assert!(waited > Duration::from_millis(1100), "{waited:?} are no more than layer 5 alone took");
        assert_eq!(read, 1);
    }

    #[test]
    fn what_was_read_is_given_ahead_and_what_was_not_is_not_waited_for() {
        let (open, gate) = channel::<()>();
        let source = source_that(move || gate.recv().unwrap_or_default());
        open.send(()).expect("layer 0 is read");
        source.weights(&layer(0), Some(layer(1))).expect("layer 0");
        source.take_waited();
        // Another layer than the one that is read, and one that cannot have been read.
        source.give_ahead(&layer(5), None).expect("nothing");
        source.give_ahead(&layer(1), Some(layer(2))).expect("nothing yet");
        assert_eq!(source.take_waited(), (Duration::ZERO, 0));
        open.send(()).expect("layer 1 is read");
        let mut read = 0;
        while read == 0 {
            std::thread::sleep(Duration::from_millis(1));
            source.give_ahead(&layer(1), Some(layer(2))).expect("layer 1 once it is there");
            read = source.take_waited().1;
        }
        // It is there, and so is the order of the next one: nothing more is waited for or ordered.
        source.weights(&layer(1), Some(layer(3))).expect("layer 1, which was given");
        assert_eq!(source.take_waited(), (Duration::ZERO, 0));
        assert_eq!(source.desk.lock().expect("no panic").ahead.as_ref().map(|ahead| ahead.layer), Some(2));
        open.send(()).expect("layer 2 is read");
        source.weights(&layer(2), None).expect("layer 2");
        assert_eq!(source.take_waited().1, 1);
    }
}
