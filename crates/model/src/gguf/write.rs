//! The files: a model with or without an adapter merged in, and an adapter alone.

use std::path::Path;

use finetune_gguf::{Metadata, TensorInfo, TensorType, Value, header, padding};
use finetune_store::{Disk, Dtype, Operation, StoreError, TensorView};

use crate::adaptation::module_of;
use crate::adapter::mlx::{is_power_of_two, most_frequent};
use crate::adapter::{Adapter, IS_IN_MERGED};
use crate::config::ModelConfig;
use crate::error::{ModelError, list};
use crate::files::base_files::BaseFiles;
use crate::files::finite::{expect_finite, first_not_finite};
use crate::gguf::metadata::{general, rope_factors, sizes};
use crate::gguf::place::{Destination, destination, interleave, interleaved_heads, tensor_name};
use crate::lora::LoraTarget;
use crate::merge::{MergedTensor, Merging, beyond, branches};
use crate::tree::expected_tensors;

/// The name of the tensor with the factors of rotary frequencies.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// A model that is to be written.
#[derive(Debug)]
pub struct ModelFile<'a> {
    /// The directory of the model, or of the adapter's base.
    pub base: &'a Path,
    /// What is merged in.
    pub adapter: Option<&'a Adapter>,
    /// The number type of the matrices. Vectors stay in f32.
    pub kind: TensorType,
    /// `general.name`.
    pub name: &'a str,
    /// Tokenizer and templates.
    pub tokenizer: Metadata,
}

/// An adapter that is to be written.
#[derive(Debug)]
pub struct AdapterFile<'a> {
    /// The adapter.
    pub adapter: &'a Adapter,
    /// The config of its base.
    pub config: &'a ModelConfig,
    /// The number type of its matrices: no packed one.
    pub kind: TensorType,
    /// `general.name`.
    pub name: &'a str,
}

/// A file that is being written, tensor by tensor.
struct Output<'a> {
    disk: &'a dyn Disk,
    path: &'a Path,
    /// Bytes of the file, for the message when the disk is full.
    total: u64,
    /// Bytes of the tensor that is being written.
    done: u64,
}

impl<'a> Output<'a> {
    fn begin(
        disk: &'a dyn Disk,
        path: &'a Path,
        metadata: &Metadata,
        tensors: &[TensorInfo],
    ) -> Result<Output<'a>, ModelError> {
        let header = header(metadata, tensors)?;
        let sizes = tensors.iter().map(TensorInfo::bytes).collect::<Result<Vec<u64>, _>>()?;
        let total = header.len() as u64 + sizes.iter().sum::<u64>();
        let output = Output { disk, path, total, done: 0 };
        disk.write_file(path, &header).map_err(|source| output.failed(source))?;
        Ok(output)
    }

    fn failed(&self, source: std::io::Error) -> ModelError {
        StoreError::io(self.path, Operation::Write, self.total, source).into()
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        self.done += bytes.len() as u64;
        self.disk.append_file(self.path, bytes).map_err(|source| self.failed(source))
    }

    /// Fills the tensor up to where the next one begins.
    fn end_tensor(&mut self) -> Result<(), ModelError> {
        let zeros = vec![0; padding(self.done)];
        self.append(&zeros)?;
        self.done = 0;
        Ok(())
    }
}

/// Writes a model with its adapter merged in to the new file `path`, one tensor at a time. Returns
/// what the user should know.
///
/// # Errors
/// [`ModelError::NotExpressible`] if llama.cpp cannot compute the model. As
/// [`crate::merge::write_merged`] otherwise.
pub fn write_model(
    disk: &dyn Disk,
    file: &ModelFile<'_>,
    path: &Path,
    progress: &dyn Fn(usize, usize),
) -> Result<Vec<String>, ModelError> {
    let quantization = file.adapter.and_then(|adapter| adapter.base.quantization);
    let (of_base, files) = BaseFiles::open(file.base, quantization)?;
    let nothing = Adapter::none(&of_base);
    let merging = Merging::new(&of_base, file.adapter.unwrap_or(&nothing));
    let config = merging.config(&of_base);
    let destination = destination(&config)?;
    let tensors = merging.tensors(&files, &of_base)?;
    let factors = config.ropes.first().and_then(rope_factors);
    let mut notices = Vec::new();
    let mut infos = Vec::new();
    if let Some(factors) = &factors {
        let shape = vec![factors.len()];
        infos.push(TensorInfo { name: ROPE_FACTORS.to_owned(), shape, kind: TensorType::F32 });
    }
    let expected = expected_tensors(&config);
    let mut uneven = Vec::new();
    for (name, shape) in &expected {
        let theirs = tensor_name(name).ok_or_else(|| no_place(name))?;
        let kind = kind_of(file.kind, shape);
        if kind != file.kind && shape.len() > 1 {
            uneven.push(name.clone());
        }
        infos.push(TensorInfo { name: theirs, shape: shape.clone(), kind });
    }
    if !uneven.is_empty() {
        let kind = file.kind.name();
        notices.push(format!("in f16, since their rows are no whole blocks of {kind}: {}", list(&uneven)));
    }
    let context = context_length(&config, destination, &mut notices);
    let mut metadata = general(destination, "model", file.name, file.kind);
    metadata.extend(sizes(&config, destination, context));
    metadata.extend(file.tokenizer.iter().cloned());
    let mut output = Output::begin(disk, path, &metadata, &infos)?;
    if let Some(factors) = factors {
        output.append(&TensorType::F32.encode(&factors)?)?;
        output.end_tensor()?;
    }
    let kinds = infos[infos.len() - expected.len()..].iter().map(|info| info.kind);
    for (n, ((name, _), kind)) in expected.iter().zip(kinds).enumerate() {
        progress(n, expected.len());
        let tensor = tensors.iter().find(|tensor| tensor.name == *name).ok_or_else(|| no_place(name))?;
        let values = merging.values(tensor)?;
        let heads = interleaved_heads(module_of(name), destination, &config);
        match tensor.base.view().filter(|_| values.is_none() && heads.is_none()) {
            Some(view) => in_pieces(tensor, view, kind, &mut output)?,
            None => whole(tensor, values, heads, kind, &mut output)?,
        }
        output.end_tensor()?;
    }
    progress(expected.len(), expected.len());
    Ok(notices)
}

/// Vectors are in f32. Rows that are no whole blocks are in f16, as with llama.cpp's converter.
fn kind_of(kind: TensorType, shape: &[usize]) -> TensorType {
    match kind {
        _ if shape.len() < 2 => TensorType::F32,
        TensorType::Q8_0 if kind.bytes(shape).is_none() => TensorType::F16,
        kind => kind,
    }
}

/// Tokens of the longest text that llama.cpp computes as the model does.
fn context_length(config: &ModelConfig, destination: Destination, notices: &mut Vec<String>) -> usize {
    let longest = config.max_position_embeddings;
    let window = config.layers.iter().filter_map(|layer| layer.window).min();
    match window.filter(|&window| window < longest) {
        None => longest,
        Some(window) => {
            notices.push(format!(
                "llama.cpp's `{}` has no window of attention: its context is set to the window's {window} tokens, up to which it computes the same",
                destination.architecture
            ));
            window
        }
    }
}

/// Writes a tensor as it is, in another type. Only a piece of it is in memory.
fn in_pieces(
    tensor: &MergedTensor<'_>,
    view: &TensorView<'_>,
    kind: TensorType,
    output: &mut Output<'_>,
) -> Result<(), ModelError> {
    let stored = match view.dtype {
        Dtype::F16 => TensorType::F16,
        Dtype::BF16 => TensorType::BF16,
        _ => TensorType::F32,
    };
    let mut start = 0;
    view.pieces(|piece| -> Result<(), ModelError> {
        expect_finite(view, piece, start)?;
        // A piece has a multiple of 32 numbers, and so has a row of a packed tensor.
        let values = stored.decode(piece)?;
        let bytes = encode(&values, kind).map_err(|problem| match problem {
            Problem::NotFinite(element) => beyond(tensor, start + element, true, false, kind.name()),
            Problem::Other(error) => error,
        })?;
        start += values.len();
        output.append(&bytes)
    })
}

/// Writes a tensor with its rows in llama.cpp's order. `values`: those of the merged model, if they
/// are not the base's.
fn whole(
    tensor: &MergedTensor<'_>,
    values: Option<Vec<f32>>,
    heads: Option<usize>,
    kind: TensorType,
    output: &mut Output<'_>,
) -> Result<(), ModelError> {
    let is_merged = values.is_some();
    let mut values = match values {
        Some(values) => values,
        None => tensor.base.values()?,
    };
    if let Some(heads) = heads {
        let columns = tensor.base.shape.get(1).copied().unwrap_or(1);
        values = interleave(&values, heads, columns);
    }
    let bytes = encode(&values, kind).map_err(|problem| match problem {
        Problem::NotFinite(element) => beyond(tensor, element, values[element].is_finite(), is_merged, kind.name()),
        Problem::Other(error) => error,
    })?;
    output.append(&bytes)
}

/// Why numbers cannot be written.
enum Problem {
    /// The number at this place is not finite in the type.
    NotFinite(usize),
    Other(ModelError),
}

/// Numbers in a type. One that is not finite in it is an error.
fn encode(values: &[f32], kind: TensorType) -> Result<Vec<u8>, Problem> {
    let bytes = kind.encode(values).map_err(|error| Problem::Other(error.into()))?;
    let bad = match kind {
        TensorType::F16 => first_not_finite(&bytes, Dtype::F16),
        TensorType::BF16 => first_not_finite(&bytes, Dtype::BF16),
        // The largest number of f16 times 127.
        TensorType::Q8_0 => values.iter().position(|value| value.is_nan() || value.abs() >= 65_504.0 * 127.0),
        _ => first_not_finite(&bytes, Dtype::F32),
    };
    match bad {
        None => Ok(bytes),
        Some(element) => Err(Problem::NotFinite(element)),
    }
}

fn no_place(name: &str) -> ModelError {
    ModelError::NotExpressible {
        what: format!("llama.cpp has no place for the tensor `{name}`"),
        hint: "--format merged writes it for transformers and mlx-lm".to_owned(),
    }
}

/// alpha of plain LoRA (scale = alpha / rank) that gives a branch's scale.
fn plain_alpha(target: &LoraTarget) -> f64 {
    if target.use_rslora { target.alpha * (target.rank as f64).sqrt() } else { target.alpha }
}

/// Writes an adapter to the new file `path`. llama.cpp has one alpha for all branches: a branch of
/// another one has the ratio in its B. Returns what the user should know.
///
/// # Errors
/// [`ModelError::NotExpressible`] for a branch that llama.cpp has no place for. Otherwise as
/// [`write_model`].
pub fn write_adapter(disk: &dyn Disk, file: &AdapterFile<'_>, path: &Path) -> Result<Vec<String>, ModelError> {
    let destination = destination(file.config)?;
    file.adapter.expect_branches_only("llama.cpp has no place for the whole adapter", IS_IN_MERGED)?;
    let alphas: Vec<f64> = file.adapter.targets.iter().map(plain_alpha).filter(|alpha| *alpha != 0.0).collect();
    let alpha = most_frequent(&alphas).unwrap_or(1.0);
    let mut metadata = general(destination, "adapter", file.name, file.kind);
    metadata.push(("adapter.type".to_owned(), Value::String("lora".to_owned())));
    metadata.push(("adapter.lora.alpha".to_owned(), Value::F32(alpha as f32)));
    let branches = branches(file.adapter);
    let mut infos = Vec::new();
    for (branch, &(outputs, inputs)) in branches.iter().zip(&file.adapter.shapes) {
        let name = branch_name(branch.module, file.config)?;
        for (half, shape) in [("lora_a", [branch.rank, inputs]), ("lora_b", [outputs, branch.rank])] {
            infos.push(TensorInfo { name: format!("{name}.{half}"), shape: shape.to_vec(), kind: file.kind });
        }
    }
    let mut output = Output::begin(disk, path, &metadata, &infos)?;
    let mut rounded = Vec::new();
    for (branch, target) in branches.iter().zip(&file.adapter.targets) {
        let factor = plain_alpha(target) / alpha;
        if factor != 0.0 && !is_power_of_two(factor) {
            rounded.push(target.module.clone());
        }
        let scaled: Vec<f32> = branch.b.iter().map(|value| (f64::from(*value) * factor) as f32).collect();
        let b = match interleaved_heads(branch.module, destination, file.config) {
            Some(heads) => interleave(&scaled, heads, branch.rank),
            None => scaled,
        };
        for values in [branch.a, &b] {
            let bytes = encode(values, file.kind).map_err(|problem| match problem {
                Problem::Other(error) => error,
                Problem::NotFinite(element) => ModelError::NotFinite {
                    path: path.to_owned(),
                    name: branch.module.to_owned(),
                    element,
                    after: format!(" once rounded to {}", file.kind.name()),
                },
            })?;
            output.append(&bytes)?;
            output.end_tensor()?;
        }
    }
    Ok(match rounded.is_empty() {
        true => Vec::new(),
        false => vec![format!(
            "llama.cpp has one alpha for all branches, {alpha}: B of {} is multiplied by the ratio and rounded to f32 (relative error at most 6e-8)",
            list(&rounded)
        )],
    })
}

/// The name of the tensor that a branch belongs to.
fn branch_name(module: &str, config: &ModelConfig) -> Result<String, ModelError> {
    let name = tensor_name(&format!("{module}.weight"));
    // llama.cpp computes a tied output layer from token_embd, which has a branch of its own kind.
    let has_place = module.starts_with("model.layers.") || (module == "lm_head" && !config.tied_embeddings);
    name.filter(|_| has_place).ok_or_else(|| ModelError::NotExpressible {
        what: format!("llama.cpp has no place for the branch on `{module}` in an adapter"),
        hint: "without --adapter-only it is merged into the model".to_owned(),
    })
}
