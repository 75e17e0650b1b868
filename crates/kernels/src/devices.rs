//! Which devices there are, and which number types each computes in.

use std::sync::{Mutex, PoisonError};

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Device};

/// A number type that a model is held and computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FloatType {
    F32,
    F16,
    BF16,
}

impl FloatType {
    /// As recipes spell it.
    pub fn name(self) -> &'static str {
        match self {
            FloatType::F32 => "f32",
            FloatType::F16 => "f16",
            FloatType::BF16 => "bf16",
        }
    }

    pub fn bytes(self) -> usize {
        self.dtype().size()
    }

    pub fn dtype(self) -> DType {
        match self {
            FloatType::F32 => DType::F32,
            FloatType::F16 => DType::F16,
            FloatType::BF16 => DType::BF16,
        }
    }
}

/// What kind of thing a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu,
    /// A card with memory of its own.
    DiscreteGpu,
    /// A GPU that shares the machine's memory.
    IntegratedGpu,
    /// A program that does a GPU's work on the CPU: right, and slow.
    SoftwareGpu,
}

impl DeviceKind {
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Cpu => "CPU",
            DeviceKind::DiscreteGpu => "GPU",
            DeviceKind::IntegratedGpu => "GPU, shares the machine's memory",
            DeviceKind::SoftwareGpu => "software renderer",
        }
    }
}

/// A device that this build can train on.
#[derive(Clone, Debug)]
pub struct FoundDevice {
    pub device: Device,
    pub kind: DeviceKind,
    /// As the driver calls it.
    pub name: String,
    /// What kernels are compiled for: "Metal", "Vulkan", or the CPU's own.
    pub api: &'static str,
    /// Bytes that the device may be asked to hold, where it says so.
    pub memory: Option<u64>,
    /// Number types that it computes in; f32 always.
    pub types: Vec<FloatType>,
}

impl FoundDevice {
    /// The CPU, which every build has.
    pub fn cpu() -> FoundDevice {
        FoundDevice {
            device: Device::flex(),
            kind: DeviceKind::Cpu,
            name: "CPU".to_owned(),
            api: "native",
            memory: None,
            types: vec![FloatType::F32],
        }
    }
}

/// Whether tensors of this device are worked on by the CPU's kernels.
pub fn is_cpu(device: &Device) -> bool {
    matches!(device.clone().without_autodiff().as_dispatch(), DispatchDevice::Flex(_))
}

/// Whether this build has a GPU backend at all.
pub const HAS_GPU_BACKEND: bool = cfg!(gpu_backend);

/// All GPUs, discrete ones first, software renderers last if they are wanted; empty where the build has no GPU backend. A card
/// that two APIs reach is listed once.
pub fn gpus(software: bool) -> Vec<FoundDevice> {
    #[cfg(gpu_backend)]
    return crate::gpu::devices::gpus(software);
    #[cfg(not(gpu_backend))]
    {
        let _ = software;
        Vec::new()
    }
}

/// Hands waiting work to the device. A GPU's driver ends programs whose command buffers run long; a layer at a time is short.
pub fn submit(device: &Device) {
    if !is_cpu(device) {
        // An error here comes back with the next value that is read.
        let _ = device.flush();
    }
}

/// Bytes that a device has reserved for tensors, `None` on the CPU.
pub fn reserved_bytes(device: &Device) -> Option<u64> {
    if is_cpu(device) { None } else { device.memory_pool_usage().map(|usage| usage.bytes_reserved) }
}

/// What a device's own thread said when it ran out of memory; wgpu reports that by a panic there, and to whoever reads the
/// tensor only that it was never there.
static OUT_OF_MEMORY: Mutex<Option<String>> = Mutex::new(None);

/// For the program's panic hook: takes the message of a panic if it is such a report. Then it is no bug.
pub fn note_panic(message: &str) -> bool {
    let lower = message.to_lowercase();
    let reported = lower.contains("wgpu error") && (lower.contains("out of memory") || lower.contains("outofmemory"));
    if reported {
        *OUT_OF_MEMORY.lock().unwrap_or_else(PoisonError::into_inner) = Some(message.to_owned());
    }
    reported
}

/// The report, if there was one since it was last taken.
pub fn take_out_of_memory() -> Option<String> {
    OUT_OF_MEMORY.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// What a driver dropped of the calling thread's work without an error, where that can happen.
pub fn dropped_work(device: &Device) -> Option<String> {
    #[cfg(gpu_backend)]
    if !is_cpu(device) {
        return crate::gpu::watch::dropped();
    }
    let _ = device;
    None
}
