//! `[model]`: what to train.

use crate::kind::{ModelPath, word};
use crate::{DeviceChoice, DtypeChoice, Quantization, path};

table! {
    [model]
    /// The base model. `path` is a directory, or a hub id as written: [`Model::hub_id`] tells.
    pub struct Model {
        /// a Hugging Face model directory, or a hub id such as `Qwen/Qwen3-0.6B`
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
        /// number type of the frozen base and, on a GPU, of the compute; `auto`: that of the
        /// model's file; adapter and optimizer state stay f32
        dtype: DtypeChoice = word::<DtypeChoice>(), default(DtypeChoice::Auto), Digest, [
            "bf16" => r#"write dtype = "bf16""#, "fp16" => r#"write dtype = "f16""#,
            "float16" => r#"write dtype = "f16""#, "bfloat16" => r#"write dtype = "bf16""#,
            "fp32" => r#"write dtype = "f32""#, "tf32", "torch_dtype", "precision",
            "mixed_precision", "pure_bf16" => r#"write dtype = "bf16""#,
        ];
        /// quantizes the frozen base: 4-bit NormalFloat or 8-bit integers
        quantization: Option<Quantization> = word::<Quantization>(),
            unset("not quantized"), Digest, [
            "load_in_4bit" => r#"write quantization = "nf4""#,
            "load_in_8bit" => r#"write quantization = "int8""#,
            "quantization_bit" => r#"4 is "nf4", 8 is "int8""#, "quantize",
            "quantize_base" => r#"write quantization = "nf4""#, "bnb_4bit_quant_type",
            "bnb_4bit_compute_dtype" => "the compute type is `dtype` in [model]",
            "quantization_config", "quantization_method",
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
