//! A matrix of a model as an operation takes it: all elements, or packed.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use finetune_packed::PackedMatrix;
use half::{bf16, f16};

use crate::arguments::{Dropout, Targets};
use crate::operations;
use crate::shelf::{self, Shelf};

/// A frozen matrix in a few bits an element, on the device where it is multiplied.
///
/// It has no gradient. On the CPU its elements are decoded to f32 exactly, and multiplied so unless
/// products in bf16 are asked for. On a GPU they are rounded to the number type of the activations.
#[derive(Clone, Debug)]
pub struct PackedWeight {
    shape: [usize; 2],
    pub(crate) held: Arc<Held>,
    /// Whether the CPU multiplies it in bf16, with sums in f32.
    pub(crate) in_bf16: bool,
}

/// Where the codes are.
#[derive(Debug)]
#[cfg_attr(gpu_backend, expect(clippy::large_enum_variant, reason = "a model has some hundred matrices"))]
pub(crate) enum Held {
    /// In the memory of the host.
    Host(PackedMatrix),
    /// In the memory of the host, all elements, row-major.
    Bf16(Vec<bf16>),
    /// The same in f16.
    F16(Vec<f16>),
    /// The same in f32.
    F32(Vec<f32>),
    /// Nowhere in memory: what has this number there is read whenever it is multiplied.
    OnShelf(Arc<dyn Shelf>, usize),
    /// In the memory of a GPU.
    #[cfg(gpu_backend)]
    Gpu(crate::gpu::PackedBuffers),
    /// All elements, in the memory of a GPU.
    #[cfg(gpu_backend)]
    DenseOnGpu(burn_cubecl::tensor::CubeTensor),
}

/// All elements of a frozen matrix, row-major.
#[derive(Clone, Debug)]
pub enum FrozenValues {
    /// In f32.
    F32(Vec<f32>),
    /// In f16.
    F16(Vec<f16>),
    /// In bf16.
    Bf16(Vec<bf16>),
}

impl FrozenValues {
    fn len(&self) -> usize {
        match self {
            FrozenValues::F32(values) => values.len(),
            FrozenValues::F16(values) => values.len(),
            FrozenValues::Bf16(values) => values.len(),
        }
    }
}

/// A matrix [o, i] of a model.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "a model has some hundred matrices")]
pub enum Weight {
    /// All elements, in f32 or a 16-bit type.
    Dense(Tensor<2>),
    /// In a few bits an element.
    Packed(PackedWeight),
}

impl PackedWeight {
    /// A packed matrix on a device. On a GPU the host keeps no copy.
    pub fn new(matrix: PackedMatrix, device: &Device) -> PackedWeight {
        let shape = matrix.shape;
        #[cfg(gpu_backend)]
        if !crate::devices::is_cpu(device) {
            let held = Arc::new(Held::Gpu(crate::gpu::PackedBuffers::upload(matrix, device)));
            return PackedWeight { shape, held, in_bf16: false };
        }
        let _ = device;
        PackedWeight { shape, held: Arc::new(Held::Host(matrix)), in_bf16: false }
    }

    /// A matrix [o, i] in bf16 that the CPU multiplies in bf16, with sums in f32.
    ///
    /// # Panics
    /// If there are not o · i values.
    pub fn bf16(values: Vec<bf16>, shape: [usize; 2]) -> PackedWeight {
        assert_eq!(values.len(), shape[0] * shape[1], "a value for each element");
        PackedWeight { shape, held: Arc::new(Held::Bf16(values)), in_bf16: true }
    }

    /// All elements of a frozen matrix [o, i] on a device: that of an expert, which is multiplied
    /// together with others and never trained itself.
    ///
    /// # Panics
    /// If there are not o · i values.
    pub fn of_values(values: FrozenValues, shape: [usize; 2], device: &Device) -> PackedWeight {
        assert_eq!(values.len(), shape[0] * shape[1], "a value for each element");
        #[cfg(gpu_backend)]
        if !crate::devices::is_cpu(device) {
            let held = Arc::new(Held::DenseOnGpu(crate::gpu::dense_on(values, shape, device)));
            return PackedWeight { shape, held, in_bf16: false };
        }
        let _ = device;
        PackedWeight::in_host_memory(values, shape)
    }

    /// All elements of a frozen matrix [o, i] that the CPU multiplies.
    pub(crate) fn in_host_memory(values: FrozenValues, shape: [usize; 2]) -> PackedWeight {
        let held = match values {
            FrozenValues::F32(values) => Held::F32(values),
            FrozenValues::F16(values) => Held::F16(values),
            FrozenValues::Bf16(values) => Held::Bf16(values),
        };
        PackedWeight { shape, held: Arc::new(held), in_bf16: false }
    }

    /// A frozen matrix [o, i] that the CPU reads from a shelf whenever it multiplies it.
    pub fn on_shelf(shelf: Arc<dyn Shelf>, number: usize, shape: [usize; 2]) -> PackedWeight {
        PackedWeight { shape, held: Arc::new(Held::OnShelf(shelf, number)), in_bf16: false }
    }

    /// The shelf that it is read from, and its number there. `None`: it is in memory.
    pub(crate) fn place(&self) -> Option<(&Arc<dyn Shelf>, usize)> {
        match &*self.held {
            Held::OnShelf(shelf, number) => Some((shelf, *number)),
            _ => None,
        }
    }

    /// The same in memory, read if it is not there.
    pub(crate) fn in_memory(self) -> PackedWeight {
        match self.place() {
            Some((shelf, number)) => shelf::single(shelf, number, self.shape),
            None => self,
        }
    }

    /// The same matrix, multiplied in bf16 on the CPU, with sums in f32.
    pub fn with_bf16_products(self) -> PackedWeight {
        PackedWeight { in_bf16: true, ..self }
    }

    /// [o, i]
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }
}

impl Weight {
    /// [o, i]
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Weight::Dense(tensor) => tensor.dims(),
            Weight::Packed(packed) => packed.shape(),
        }
    }
}

/// As [`operations::linear`].
pub fn linear(x: Tensor<2>, w: Weight) -> Tensor<2> {
    match w {
        Weight::Dense(w) => operations::linear(x, w),
        Weight::Packed(w) => operations::packed_linear(x, w),
    }
}

/// As [`operations::lora_linear`].
pub fn lora_linear(
    x: Tensor<2>,
    w: Weight,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f32,
    dropout: Option<Dropout>,
) -> Tensor<2> {
    match w {
        Weight::Dense(w) => operations::lora_linear(x, w, a, b, scale, dropout),
        Weight::Packed(w) => operations::packed_lora_linear(x, a, b, w, scale, dropout),
    }
}

/// As [`operations::merged_norms`].
pub fn merged_norms(w: Weight, a: Tensor<2>, b: Tensor<2>, scale: f32) -> Tensor<1> {
    match w {
        Weight::Dense(w) => operations::merged_norms(w, a, b, scale),
        Weight::Packed(w) => operations::packed_merged_norms(a, b, w, scale),
    }
}

/// As [`operations::linear_cross_entropy`].
pub fn linear_cross_entropy(h: Tensor<2>, w: Weight, targets: Targets) -> Tensor<1> {
    match w {
        Weight::Dense(w) => operations::linear_cross_entropy(h, w, targets),
        Weight::Packed(w) => operations::packed_cross_entropy(h, w, targets),
    }
}

/// As [`operations::lora_cross_entropy`].
pub fn lora_cross_entropy(
    h: Tensor<2>,
    w: Weight,
    g: Tensor<2>,
    b: Tensor<2>,
    scale: f32,
    targets: Targets,
) -> Tensor<1> {
    match w {
        Weight::Dense(w) => operations::lora_cross_entropy(h, w, g, b, scale, targets),
        Weight::Packed(w) => operations::packed_lora_cross_entropy(h, g, b, w, scale, targets),
    }
}

/// Rows of a packed embedding [v, hidden] in the number type of `like`, on its device -> [t, hidden].
/// They have no gradient.
///
/// # Panics
/// If a row is beyond the matrix.
pub fn packed_rows(like: Tensor<1>, w: PackedWeight, rows: Vec<u32>) -> Tensor<2> {
    operations::packed_rows(like, w, rows)
}
