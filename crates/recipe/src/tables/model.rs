//! `[model]`: what to train.

use crate::kind::{ModelPath, word};
use crate::{DeviceChoice, DtypeChoice, Quantization, ResidencyChoice, path};

table! {
    [model]
    /// The base model. `path` is a directory, or a hub id as written: [`Model::hub_id`] tells.
    pub struct Model {
        /// a Hugging Face model directory, packed ones too (MLX, bitsandbytes, FP8, GPTQ, AWQ, MXFP4),
        /// a GGUF file, or a hub id such as `Qwen/Qwen3-0.6B`
        path: String = ModelPath, required(r#"path = "Qwen/Qwen3-0.6B""#), Local, [
            "base_model", "model_name_or_path", "model_id", "model_name",
            "pretrained_model_name_or_path", "checkpoint_dir", "model_path", "model.name",
            "model.id", "model.model", "model.repo",
            "tokenizer_name_or_path" => "the tokenizer lies beside the model",
        ];
        /// where to compute; `auto`: a GPU if there is one
        device: DeviceChoice = word::<DeviceChoice>(), default(DeviceChoice::Auto), Digest, [
            "use_cpu" => r#"write device = "cpu""#, "no_cuda" => r#"write device = "cpu""#,
            "accelerator", "device_type",
        ];
        /// number type of the frozen base and of the compute; `auto`: that of the model's file, and
        /// f32 for the compute of a CPU; `bf16` on a CPU: products in bf16 with f32 sums if the
        /// processor is faster at them; adapter and optimizer state stay f32
        dtype: DtypeChoice = word::<DtypeChoice>(), default(DtypeChoice::Auto), Digest, [
            "bf16" => r#"write dtype = "bf16""#, "fp16" => r#"write dtype = "f16""#,
            "float16" => r#"write dtype = "f16""#, "bfloat16" => r#"write dtype = "bf16""#,
            "fp32" => r#"write dtype = "f32""#, "tf32", "torch_dtype", "precision",
            "mixed_precision", "pure_bf16" => r#"write dtype = "bf16""#,
        ];
        /// packs a 16-bit frozen base while it is loaded: `nf4` and `int8` as bitsandbytes does,
        /// `mlx4` and `mlx8` as mlx-lm does, `mxfp4`; a base that is packed already is used as it is
        quantization: Option<Quantization> = word::<Quantization>(),
            unset("the base stays as its files have it"), Digest, [
            "load_in_4bit" => r#"write quantization = "nf4""#,
            "load_in_8bit" => r#"write quantization = "int8""#,
            "quantization_bit" => r#"4 is "nf4", 8 is "int8""#, "quantize", "q_bits" => r#"4 is "mlx4", 8 is "mlx8""#,
            "load_in_16bit" => "leave it out: a 16-bit base stays as it is",
            "quantize_base" => r#"write quantization = "nf4""#, "bnb_4bit_quant_type",
            "bnb_4bit_compute_dtype" => "the compute type is `dtype` in [model]",
            "bnb_4bit_use_double_quant" => "nf4 keeps its scales in f32; a base that has them packed is read as it is",
            "q_group_size" => "the groups of each form are fixed", "q_mode",
            "quantization_config" => "a base that is packed already is read as it is", "quantization_method",
        ];
        /// where the frozen matrices of the layers are: `memory`, or `disk`, from where each layer is read
        /// whenever a step comes to it, with the same bits in the memory of two layers; `auto`: memory if
        /// they fit there
        residency: ResidencyChoice = word::<ResidencyChoice>(), default(ResidencyChoice::Auto), Local, [
            "cpu_offload" => r#"write residency = "disk""#, "offload_folder" => r#"write residency = "disk""#,
            "offload_to_disk" => r#"write residency = "disk""#, "fsdp_offload_params" => r#"write residency = "disk""#,
            "fsdp_cpu_ram_efficient_loading" => "layers are read one after the other anyway", "low_cpu_mem_usage",
            "layer_offloading" => r#"write residency = "disk""#, "model.offload" => r#"true is residency = "disk""#,
            "offload_layers" => r#"write residency = "disk""#, "offload_params" => r#"write residency = "disk""#,
            "device_map" => r#""auto" is our default; "cpu" is device = "cpu", "disk" is residency = "disk""#,
        ];
    }
}

impl Model {
    /// The hub id (`owner/name` or `name`) if `path` is not a directory's.
    ///
    /// A directory that could be mistaken for a hub id is written with a leading `./`.
    pub fn hub_id(&self) -> Option<&str> {
        path::is_hub_id(&self.path).then_some(self.path.as_str())
    }
}
