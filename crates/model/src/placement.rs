//! Which device a model is on, and in which number types.

use burn::tensor::Device;
use finetune_kernels::FloatType;
use finetune_kernels::devices::is_cpu;
use finetune_packed::Scheme;

use crate::slice::Slice;
use crate::stage::Stage;

/// The device of a model, what it computes in, and what its frozen matrices are held in. Trained
/// parameters, norms and biases are always f32.
#[derive(Clone, Debug)]
pub struct Placement {
    pub(crate) device: Device,
    compute: FloatType,
    /// `None`: as the model's file has them.
    held: Option<FloatType>,
    /// How frozen matrices are packed while they are loaded. `None`: they are not.
    quantization: Option<Scheme>,
    /// Whether the CPU multiplies frozen matrices in bf16, with sums in f32.
    bf16_products: bool,
    /// Whether the frozen matrices of the layers stay in their files, and are read when a pass comes to them.
    reads_layers: bool,
    /// Whether the experts among these are read only when they are multiplied.
    reads_experts: bool,
    /// Bytes of main memory that this process may use. `None`: it is not known.
    host_memory: Option<u64>,
    /// Which layers this process holds. `None`: all.
    stage: Option<Stage>,
    /// Which slice of every layer this process holds. `None`: all of it.
    slice: Option<Slice>,
    /// Whether only those processes hold embedding and output layer that compute with them.
    ends_where_used: bool,
}

impl Placement {
    /// On the CPU, computing in f32. Without `held`, matrices are held as the file has them. That
    /// is exact, and saves half of the memory if the file has 16 bits. Otherwise they are rounded
    /// to `held`.
    pub fn cpu(held: Option<FloatType>) -> Placement {
        Placement {
            device: Device::flex(),
            compute: FloatType::F32,
            held,
            quantization: None,
            bf16_products: false,
            reads_layers: false,
            reads_experts: false,
            host_memory: None,
            stage: None,
            slice: None,
            ends_where_used: false,
        }
    }

    /// On the CPU, with frozen matrices held in bf16 and multiplied in it, with sums in f32. That is
    /// for processors that multiply bf16 faster: [`finetune_kernels::processor::bf16_kernel`]. Everything
    /// else is computed in f32.
    pub fn cpu_with_bf16_products() -> Placement {
        Placement { bf16_products: true, ..Placement::cpu(Some(FloatType::BF16)) }
    }

    /// Whether the CPU multiplies frozen matrices in bf16, with sums in f32.
    pub fn has_bf16_products(&self) -> bool {
        self.bf16_products
    }

    /// On a GPU, held and computed in one number type.
    pub fn gpu(device: Device, compute: FloatType) -> Placement {
        Placement { device, compute, ..Placement::cpu(Some(compute)) }
    }

    /// The same held and computed in another number type, as GPUs do it.
    #[must_use]
    pub fn computing_in(self, compute: FloatType) -> Placement {
        Placement { compute, held: Some(compute), ..self }
    }

    /// The same with frozen matrices that are packed while they are loaded, from the numbers that their
    /// file has. A base that is packed already stays as it is.
    #[must_use]
    pub fn quantized(self, quantization: Option<Scheme>) -> Placement {
        Placement { quantization, ..self }
    }

    /// The same with layers whose frozen matrices are not held, but read from the disk whenever a pass comes
    /// to them: the bits of the model in memory, in the memory of two layers. Of an embedding that is frozen and no
    /// output layer, the rows of a pass's tokens are read, if its file has plain numbers.
    #[must_use]
    pub fn with_layers_from_disk(self, reads_layers: bool) -> Placement {
        Placement { reads_layers, ..self }
    }

    /// Whether the frozen matrices of the layers are read from the disk whenever a pass comes to them.
    pub fn reads_layers(&self) -> bool {
        self.reads_layers
    }

    /// The same with experts that are read whenever they are multiplied, and are no part of the two layers in memory:
    /// for layers from the disk that are larger than memory, on the CPU. The bits are the same.
    #[must_use]
    pub fn with_experts_from_disk(self, reads_experts: bool) -> Placement {
        Placement { reads_experts, ..self }
    }

    /// Whether layers are read from the disk, and the experts among them only when they are multiplied. A GPU takes
    /// whole layers.
    pub fn reads_experts(&self) -> bool {
        self.reads_layers && self.reads_experts && self.is_cpu()
    }

    /// The same on a host where this process may use so many bytes of main memory, if that is known. Layers of a base
    /// that takes more than half of it are read past the system's cache, which could not hold the base.
    #[must_use]
    pub fn with_host_memory(self, host_memory: Option<u64>) -> Placement {
        Placement { host_memory, ..self }
    }

    /// Bytes of main memory that this process may use, if that is known.
    pub(crate) fn host_memory(&self) -> Option<u64> {
        self.host_memory
    }

    /// The same with the layers that this process holds, where several hold the model together.
    #[must_use]
    pub fn with_stage(self, stage: Option<Stage>) -> Placement {
        Placement { stage, ..self }
    }

    /// The same where, of several processes that hold the model together, only that of the first layer holds the
    /// embedding, and only that of the last one the output layer. So none of them can change its vocabulary.
    #[must_use]
    pub fn with_ends_where_used(self, ends_where_used: bool) -> Placement {
        Placement { ends_where_used, ..self }
    }

    /// Whether this process holds the embedding. `is_output`: whether that is the output layer too.
    pub fn holds_embedding(&self, is_output: bool) -> bool {
        let is_first = self.stage.as_ref().is_none_or(|stage| stage.of_layer.first().is_none_or(|n| *n == stage.mine));
        !self.ends_where_used || is_first || (is_output && self.holds_output())
    }

    /// Whether this process holds the output layer.
    pub fn holds_output(&self) -> bool {
        !self.ends_where_used || self.stage.as_ref().is_none_or(|stage| stage.last() == stage.mine)
    }

    /// Which layers this process holds. `None`: all.
    pub fn stage(&self) -> Option<&Stage> {
        self.stage.as_ref()
    }

    /// The same with the slice of every layer that this process holds, where several hold each layer together:
    /// for models that are used and not trained.
    #[must_use]
    pub fn with_slice(self, slice: Option<Slice>) -> Placement {
        Placement { slice, ..self }
    }

    /// Which slice of every layer this process holds. `None`: all of it.
    pub fn slice(&self) -> Option<Slice> {
        self.slice
    }

    /// Whether the frozen matrices of layer `n` are held by this process for as long as the model is.
    pub(crate) fn holds(&self, n: usize) -> bool {
        !self.reads_layers && self.stage.as_ref().is_none_or(|stage| stage.holds(n))
    }

    /// How frozen matrices are packed while they are loaded.
    pub fn quantization(&self) -> Option<Scheme> {
        self.quantization
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether the device is the CPU.
    pub fn is_cpu(&self) -> bool {
        is_cpu(&self.device)
    }

    /// The number type that activations are computed in.
    pub fn compute(&self) -> FloatType {
        self.compute
    }

    /// The number type that a frozen matrix is held in, if the file has it `stored`.
    pub fn held(&self, stored: FloatType) -> FloatType {
        self.held.unwrap_or(stored)
    }
}
