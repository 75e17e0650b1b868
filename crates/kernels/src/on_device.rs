//! Copies of a table on a device, kept with the table. The angles and positions of a micro-batch
//! are the same in every layer, so they are uploaded once.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Copies of one table on the device of a run, by a key of the caller's. Clones share the copies.
#[derive(Clone, Default)]
pub(crate) struct OnDevice(Arc<Mutex<BTreeMap<usize, Box<dyn Any + Send>>>>);

impl std::fmt::Debug for OnDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnDevice")
    }
}

#[cfg_attr(not(gpu_backend), expect(dead_code, reason = "GPUs only"))]
impl OnDevice {
    /// The copy under `key`. `make` makes it if there is none.
    pub(crate) fn get<T: Clone + Send + 'static>(&self, key: usize, make: impl FnOnce() -> T) -> T {
        let mut copies = self.0.lock().expect("no copy is made twice at once");
        let copy = copies.entry(key).or_insert_with(|| Box::new(make()));
        copy.downcast_ref::<T>().expect("one type for a table").clone()
    }
}
