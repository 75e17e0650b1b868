//! The devices that this build can train on, and the number types that each computes in.

use std::sync::{Mutex, PoisonError};

use burn::backend::DispatchDevice;
use burn::tensor::{Device, Tensor};

use crate::cpu::matmul;
use crate::operations;

pub use crate::found_device::{DeviceKind, FloatType, FoundDevice};

/// Whether the CPU's kernels work on the tensors of this device.
pub fn is_cpu(device: &Device) -> bool {
    matches!(device.clone().without_autodiff().as_dispatch(), DispatchDevice::Flex(_))
}

/// Whether this build has a GPU backend.
pub const HAS_GPU_BACKEND: bool = cfg!(gpu_backend);

/// All GPUs: discrete ones first, then integrated ones, then software renderers if `software` asks
/// for them. A card that two APIs reach is listed once. A build without a GPU backend finds none.
pub fn gpus(software: bool) -> Vec<FoundDevice> {
    #[cfg(gpu_backend)]
    return crate::gpu::devices::gpus(software);
    #[cfg(not(gpu_backend))]
    {
        let _ = software;
        Vec::new()
    }
}

/// Hands waiting work to the device. Called after each layer, because a GPU's driver ends programs
/// whose command buffers run long.
pub fn submit(device: &Device) {
    if !is_cpu(device) {
        // An error here is reported again with the next value that is read.
        let _ = device.flush();
    }
}

/// Floating-point operations per second that a device reaches on products in this number type. The call measures
/// it: on a GPU about a tenth of a second of products, the fastest of three times. `None` if the device fails.
pub fn product_rate(device: &Device, compute: FloatType) -> Option<f64> {
    /// Rows and columns of each matrix.
    const SIZE: usize = 1024;
    /// Seconds of the products of one time.
    const LONG_ENOUGH: f64 = 0.03;
    /// The most products of one time: what is handed to a driver in one piece must not run long.
    const MOST: f64 = 64.0;
    if is_cpu(device) {
        return Some(matmul::rate());
    }
    let ones = || Tensor::<2>::ones([SIZE, SIZE], (device, compute.dtype()));
    // Reading a number waits for all products before it.
    let seconds = |products: usize| {
        let (x, w) = (ones(), ones());
        let start = std::time::Instant::now();
        let out = (0..products).fold(x, |x, _| operations::linear(x, w.clone()));
        out.slice([0..1, 0..1]).try_into_data().ok()?;
        Some(start.elapsed().as_secs_f64())
    };
    // The first time compiles the kernel.
    seconds(1)?;
    let products = (LONG_ENOUGH / seconds(1)?.max(1e-9)).clamp(1.0, MOST) as usize;
    let best = (0..3).filter_map(|_| seconds(products)).fold(f64::INFINITY, f64::min);
    let operations = 2.0 * (SIZE as f64).powi(3) * products as f64;
    best.is_finite().then_some(operations / best)
}

/// Bytes that a device has reserved for tensors, `None` on the CPU.
pub fn reserved_bytes(device: &Device) -> Option<u64> {
    if is_cpu(device) { None } else { device.memory_pool_usage().map(|usage| usage.bytes_reserved) }
}

/// The report of a device that ran out of memory. wgpu reports it by a panic in a thread of its
/// own. The thread that reads the tensor is only told that the tensor does not exist.
static OUT_OF_MEMORY: Mutex<Option<String>> = Mutex::new(None);

/// For the program's panic hook: keeps the message of a panic if it reports that a device ran out
/// of memory, for [`take_out_of_memory`]. Returns whether it does; such a panic is no bug.
pub fn note_panic(message: &str) -> bool {
    let lower = message.to_lowercase();
    let reported = lower.contains("wgpu error") && (lower.contains("out of memory") || lower.contains("outofmemory"));
    if reported {
        *OUT_OF_MEMORY.lock().unwrap_or_else(PoisonError::into_inner) = Some(message.to_owned());
    }
    reported
}

/// The report of a device that ran out of memory, if there was one since the last call.
pub fn take_out_of_memory() -> Option<String> {
    OUT_OF_MEMORY.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// How much of the calling thread's work the driver dropped without an error, in words. `None`:
/// nothing, as far as is known.
pub fn dropped_work(device: &Device) -> Option<String> {
    #[cfg(gpu_backend)]
    if !is_cpu(device) {
        return crate::gpu::watch::dropped();
    }
    let _ = device;
    None
}
