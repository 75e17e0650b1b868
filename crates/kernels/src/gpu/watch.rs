//! Notices work that a driver dropped.
//!
//! Metal ends a command buffer that runs too long, or that there is no memory for, and wgpu reports
//! nothing. What is read afterwards is what the memory held before, perhaps the last step's loss.
//!
//! A counter on the device is therefore raised after every few products, which is at least once in
//! every command buffer. Whenever values are read, the counter is compared with the number of times
//! that it was to be raised.

use std::cell::RefCell;

use burn::tensor::{DType, Shape};
use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::ops::numeric::zeros;
use burn_cubecl::tensor::CubeTensor;

/// Products from one tick of the counter to the next. A layer has dozens of kernels, and a command
/// buffer holds 32.
const EVERY: u32 = 4;

/// The environment variable that turns the watch on for any GPU, for tests. On macOS it is always
/// on.
const VARIABLE: &str = "FINETUNE_WATCH_DEVICE";

/// The counts of one thread.
struct Watch {
    /// The ticks that the device carried out: u32 [1].
    counter: CubeTensor,
    /// The products launched.
    products: u32,
    /// The ticks launched.
    ticks: u32,
}

thread_local! {
    // A device does the work of one thread in its order.
    static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
}

fn is_on() -> bool {
    use std::sync::OnceLock;
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| cfg!(target_os = "macos") || std::env::var_os(VARIABLE).is_some())
}

/// Adds 1 to the counter.
#[cube(launch)]
fn raise(counter: &mut [u32]) {
    if ABSOLUTE_POS == 0 {
        counter[0] += 1;
    }
}

/// Counts a product that was launched on the device of `like`.
pub(super) fn tick(like: &CubeTensor) {
    if !is_on() {
        return;
    }
    WATCH.with_borrow_mut(|watch| {
        let watch = watch.get_or_insert_with(|| {
            let counter = zeros(like.device.clone(), Shape::from([1]), DType::U32);
            Watch { counter, products: 0, ticks: 0 }
        });
        watch.products = watch.products.wrapping_add(1);
        if watch.products.is_multiple_of(EVERY) {
            watch.ticks = watch.ticks.wrapping_add(1);
            let counter = watch.counter.clone().into_buffer_arg();
            raise::launch(&watch.counter.client, CubeCount::Static(1, 1, 1), CubeDim::new_1d(1), counter);
        }
    });
}

/// How much of this thread's work was dropped so far, in words. `None`: nothing.
pub(crate) fn dropped() -> Option<String> {
    WATCH.with_borrow_mut(|slot| {
        let watch = slot.as_ref()?;
        let bytes = match watch.counter.client.read_one(watch.counter.handle.clone()) {
            Ok(bytes) => bytes,
            Err(error) => return Some(error.to_string()),
        };
        let counted = u32::from_bytes(&bytes)[0];
        if counted == watch.ticks {
            return None;
        }
        let (missing, all) = (watch.ticks.wrapping_sub(counted), watch.ticks);
        // The next check counts from zero: the caller has been told of these.
        *slot = None;
        Some(format!("{missing} of {all} parts of the work were dropped by the driver, without an error"))
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Tensor, TensorData};

    use super::*;
    use crate::devices::gpus;

    #[test]
    fn gpu_work_that_was_dropped_is_noticed() {
        if std::env::var("FINETUNE_TEST_DEVICE").as_deref() != Ok("gpu") {
            println!("SKIPPED: FINETUNE_TEST_DEVICE is not gpu");
            return;
        }
        if !is_on() {
            println!("SKIPPED: {VARIABLE} is not set");
            return;
        }
        let gpu = gpus(true).into_iter().next().expect("a GPU, or a software renderer");
        let matrix = || Tensor::<2>::from_data(TensorData::new(vec![1.0f32; 64], [8, 8]), &gpu.device);
        for _ in 0..3 * EVERY {
            crate::operations::linear(matrix(), matrix());
        }
        assert_eq!(dropped(), None);
        // A tick that never reached the device.
        WATCH.with_borrow_mut(|watch| watch.as_mut().expect("ticks").ticks += 1);
        assert_eq!(dropped().as_deref(), Some("1 of 4 parts of the work were dropped by the driver, without an error"));
        assert_eq!(dropped(), None);
    }
}
