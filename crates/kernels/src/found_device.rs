//! A device that this build can train on, its kind, and the number types that it computes in.

use burn::tensor::{DType, Device};

/// A number type that a model is held and computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FloatType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of an f32.
    BF16,
}

impl FloatType {
    /// The name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            FloatType::F32 => "f32",
            FloatType::F16 => "f16",
            FloatType::BF16 => "bf16",
        }
    }

    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        self.dtype().size()
    }

    /// burn's name of the type.
    pub fn dtype(self) -> DType {
        match self {
            FloatType::F32 => DType::F32,
            FloatType::F16 => DType::F16,
            FloatType::BF16 => DType::BF16,
        }
    }
}

/// The kind of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The processor.
    Cpu,
    /// A card with memory of its own.
    DiscreteGpu,
    /// A GPU that shares the machine's memory.
    IntegratedGpu,
    /// A software renderer: a program that does a GPU's work on the CPU, correctly and slowly.
    SoftwareGpu,
}

impl DeviceKind {
    /// The kind in words, for messages.
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
    /// burn's handle of the device.
    pub device: Device,
    /// The kind of the device.
    pub kind: DeviceKind,
    /// The driver's name of the device.
    pub name: String,
    /// What kernels are compiled for: "Metal", "Vulkan", "Vulkan (WGSL)", or "native" on the CPU.
    pub api: &'static str,
    /// Bytes that the device can hold, if it reports them.
    pub memory: Option<u64>,
    /// The number types that the device computes in. f32 is always among them.
    pub types: Vec<FloatType>,
}

impl FoundDevice {
    /// The CPU, which is in every build.
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
