//! The file of a model, with or without an adapter merged in. An adapter alone is in `write/adapter.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use finetune_gguf::{Metadata, TensorInfo, TensorType};
use finetune_packed::gguf::to_mxfp4_blocks;
use finetune_store::{Disk, Dtype, TensorView};

mod adapter;
mod output;

pub use self::adapter::{AdapterFile, write_adapter};
use self::output::{Output, Problem, encode};
use crate::adapter::Adapter;
use crate::config::{ModelConfig, Rope, RopeScaling};
use crate::error::{ModelError, list};
use crate::files::base_files::BaseFiles;
use crate::files::finite::expect_finite;
use crate::files::packing::described;
use crate::files::taking_turns::{matrix_of_stack, outputs_of};
use crate::gguf::agreement::{Planned, expect_agreement};
use crate::gguf::architecture::Architecture;
use crate::gguf::making::{Making, Makings};
use crate::gguf::metadata::{description, factors, general};
use crate::gguf::place::{INNER_EPS, architecture_for, refused};
use crate::merge::{MergedTensor, Merging, beyond};
use crate::tree::expected_tensors;

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

/// A tensor of the file, made of one or several of the model: a stack of all experts of a layer is made of one
/// of each.
struct Planning {
    info: TensorInfo,
    parts: Vec<Part>,
}

/// What a tensor of the model is of one of the file's.
struct Part {
    /// The tensor's number in the model.
    number: usize,
    making: Making,
    /// Which of the making's tensors.
    source: usize,
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
    write_as(disk, file, path, progress, architecture_for)
}

/// As [`write_model`], as the architecture that `of` says.
fn write_as(
    disk: &dyn Disk,
    file: &ModelFile<'_>,
    path: &Path,
    progress: &dyn Fn(usize, usize),
    of: fn(&ModelConfig) -> Result<&'static Architecture, ModelError>,
) -> Result<Vec<String>, ModelError> {
    let quantization = file.adapter.and_then(|adapter| adapter.base.quantization);
    let (of_base, files) = BaseFiles::open(file.base, quantization)?;
    let nothing = Adapter::none(&of_base);
    let merging = Merging::new(&of_base, file.adapter.unwrap_or(&nothing));
    let config = merging.config(&of_base);
    let architecture = of(&config)?;
    if merging.opens_stacks() && files.is_gguf() {
        return Err(ModelError::NotExpressible {
            what: format!(
                "branches on the experts of a {} are not merged into a GGUF file",
                of_base.family.architecture
            ),
            hint: "name the Hugging Face model that the GGUF file was made of as the base".to_owned(),
        });
    }
    let expected = expected_tensors(&config);
    let tensors = Tensors::new(&merging, &files, &of_base, &expected)?;
    let mut plannings = plan(&config, architecture, &expected, file.kind)?;
    let keeps_experts = tensors.keep_experts(&mut plannings)?;
    let kind = file.kind.name();
    let mut notices = tensors.packing(&plannings, file)?;
    let uneven: Vec<String> = plannings.iter().filter(|planning| is_uneven(planning, file.kind)).map(name_of).collect();
    if !uneven.is_empty() {
        notices.push(format!("in f16, since their rows are no whole blocks of {kind}: {}", list(&uneven)));
    }
    let context = context_length(&config, architecture, &mut notices);
    notices.extend(config.ropes.first().and_then(|rope| rope_notice(rope, architecture)));
    notices.extend(norm_notice(&config, architecture));
    let of_file = if keeps_experts { TensorType::Mxfp4 } else { file.kind };
    let mut metadata = general(architecture, "model", file.name, of_file);
    metadata.extend(description(&config, architecture, context));
    let factors = factors(&config, architecture.keys);
    let infos = infos(&factors, &plannings);
    let is_llama3 = |rope: &Rope| matches!(rope.scaling, RopeScaling::Llama3 { .. });
    let first = if config.ropes.iter().any(is_llama3) { factors.len() } else { 0 };
    let planned = Planned { metadata: &metadata, tensors: &infos[first..], factors: &factors };
    expect_agreement(&config, &planned, context, path)?;
    metadata.extend(file.tokenizer.iter().cloned());

    let mut output = Output::begin(disk, path, &metadata, &infos)?;
    for (_, numbers) in &factors {
        output.append(&TensorType::F32.encode(numbers)?)?;
        output.end_tensor()?;
    }
    for (n, planning) in plannings.iter().enumerate() {
        progress(n, plannings.len());
        for part in &planning.parts {
            tensors.write(part, planning.info.kind, &mut output)?;
        }
        output.end_tensor()?;
    }
    progress(plannings.len(), plannings.len());
    Ok(notices)
}

/// The file's tensors, and what of the model makes each.
fn plan(
    config: &ModelConfig,
    architecture: &'static Architecture,
    expected: &[(String, Vec<usize>)],
    kind: TensorType,
) -> Result<Vec<Planning>, ModelError> {
    let writes = |name: &str| architecture.writes(name);
    let makings = Makings { has: &writes, config, architecture };
    let mut plannings: Vec<Planning> = Vec::new();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for (number, (name, shape)) in expected.iter().enumerate() {
        let making = makings.of(name, shape).ok_or_else(|| refused(&format!("it has no place for `{name}`")))?;
        for (source, (theirs, shape)) in making.sources.iter().enumerate() {
            let part = Part { number, making: making.clone(), source };
            if let Some(&place) = places.get(theirs) {
                plannings[place].parts.push(part);
                continue;
            }
            places.insert(theirs.clone(), plannings.len());
            let info = TensorInfo { name: theirs.clone(), shape: shape.clone(), kind: kind_of(theirs, kind, shape) };
            plannings.push(Planning { info, parts: vec![part] });
        }
    }
    for planning in &mut plannings {
        planning.parts.sort_by_key(|part| part.making.first_row());
    }
    Ok(plannings)
}

/// The header's tensors: factors of rotary frequencies, then those of the model.
fn infos(factors: &[(&'static str, Vec<f32>)], plannings: &[Planning]) -> Vec<TensorInfo> {
    let of_factors = factors.iter().map(|(name, numbers)| TensorInfo {
        name: (*name).to_owned(),
        shape: vec![numbers.len()],
        kind: TensorType::F32,
    });
    of_factors.chain(plannings.iter().map(|planning| planning.info.clone())).collect()
}

/// Routers and convolutions are in f32, as is all that is no weight, and no matrix. Rows that are no whole blocks
/// are in f16. All as with llama.cpp's converter.
fn kind_of(name: &str, kind: TensorType, shape: &[usize]) -> TensorType {
    let is_of = |part: &str| name.ends_with(&format!(".{part}.weight"));
    let is_small = ["ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d", "shortconv.conv"].into_iter().any(is_of);
    match kind {
        _ if shape.len() < 2 || is_small || !name.ends_with(".weight") || name.ends_with("_norm.weight") => {
            TensorType::F32
        }
        TensorType::Q8_0 if kind.bytes(shape).is_none() => TensorType::F16,
        kind => kind,
    }
}

/// Whether a tensor is in f16 because its rows are no whole blocks.
fn is_uneven(planning: &Planning, kind: TensorType) -> bool {
    kind == TensorType::Q8_0 && planning.info.kind == TensorType::F16
}

fn name_of(planning: &Planning) -> String {
    planning.info.name.clone()
}

/// Tokens of the longest text that llama.cpp computes as the model does.
fn context_length(config: &ModelConfig, architecture: &Architecture, notices: &mut Vec<String>) -> usize {
    let longest = config.max_position_embeddings;
    let window = config.layers.iter().filter_map(|layer| layer.window).min();
    match window.filter(|&window| window < longest && !architecture.keys.has_windows()) {
        None => longest,
        Some(window) => {
            notices.push(format!(
                "llama.cpp's `{}` has no window of attention: its context is set to the window's {window} tokens, up to which it computes the same",
                architecture.name
            ));
            window
        }
    }
}

/// What llama.cpp makes of a scaling otherwise, in every file of such a model.
fn rope_notice(rope: &Rope, architecture: &Architecture) -> Option<String> {
    let name = architecture.name;
    match rope.scaling {
        RopeScaling::Yarn { range: [low, high], .. } if low.fract() != 0.0 => Some(format!(
            "llama.cpp's `{name}` stretches rotary pairs {} to {}, the model {low:.2} to {high:.2}: logits differ by a little",
            low.floor(),
            high.ceil()
        )),
        RopeScaling::Long { original, .. } => Some(format!(
            "llama.cpp's `{name}` has the factors of long texts where its context (-c) is longer than {original} tokens, the model where the text is"
        )),
        _ => None,
    }
}

/// What llama.cpp makes of norms inside of latent attention otherwise, in every file of such a model.
fn norm_notice(config: &ModelConfig, architecture: &Architecture) -> Option<String> {
    let (name, eps) = (architecture.name, config.rms_norm_eps as f32);
    (config.latent.is_some() && eps != INNER_EPS).then(|| {
        format!("llama.cpp's `{name}` has rms_norm_eps = {eps} inside of attention, too, the model {INNER_EPS}: logits differ by a little")
    })
}

/// The model's tensors while they are written.
struct Tensors<'a> {
    merging: &'a Merging<'a>,
    files: &'a BaseFiles,
    /// The config of the base.
    config: &'a ModelConfig,
    /// Names and shapes by number.
    expected: &'a [(String, Vec<usize>)],
    /// Matrices of stacks of experts that the adapter changes.
    stacks: Vec<MergedTensor<'a>>,
}

impl<'a> Tensors<'a> {
    fn new(
        merging: &'a Merging<'a>,
        files: &'a BaseFiles,
        config: &'a ModelConfig,
        expected: &'a [(String, Vec<usize>)],
    ) -> Result<Tensors<'a>, ModelError> {
        let mut stacks = Vec::new();
        if merging.opens_stacks() {
            let tensors = merging.tensors(files, config)?;
            stacks.extend(tensors.into_iter().filter(|tensor| tensor.base.stack().is_some()));
        }
        Ok(Tensors { merging, files, config, expected, stacks })
    }

    /// Leaves stacks of experts in MXFP4 that the base has so, as llama.cpp's converter does. Returns whether there are
    /// any.
    fn keep_experts(&self, plannings: &mut [Planning]) -> Result<bool, ModelError> {
        // If an adapter changes some, all are written in plain numbers.
        if !self.config.family.has_expert_parameters() || self.merging.opens_stacks() {
            return Ok(false);
        }
        let mut keeps_any = false;
        for planning in plannings.iter_mut().filter(|planning| planning.info.name.ends_with("_exps.weight")) {
            let has_whole_blocks = TensorType::Mxfp4.bytes(&planning.info.shape).is_some();
            if has_whole_blocks && self.are_in_mxfp4(&planning.parts)? {
                planning.info.kind = TensorType::Mxfp4;
                keeps_any = true;
            }
        }
        Ok(keeps_any)
    }

    fn are_in_mxfp4(&self, parts: &[Part]) -> Result<bool, ModelError> {
        for part in parts {
            let (name, shape) = &self.expected[part.number];
            let tensor = self.merging.tensor(self.files, self.config, name, shape)?;
            if !part.making.is_as_it_is() || !tensor.base.is_mxfp4_in_file() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What becomes of the base's packed matrices, in words.
    fn packing(&self, plannings: &[Planning], file: &ModelFile<'_>) -> Result<Vec<String>, ModelError> {
        let stay = plannings.iter().filter(|planning| planning.info.kind == TensorType::Mxfp4);
        let parts = stay.flat_map(|planning| &planning.parts);
        let kept: BTreeSet<&str> = parts.map(|part| self.expected[part.number].0.as_str()).collect();
        let tensors = self.files.tensors(self.config)?;
        let others = tensors.iter().filter(|tensor| !kept.contains(tensor.name.as_str()));
        let (base, kind) = (file.base.display(), file.kind.name());
        let stay = (!kept.is_empty()).then(|| format!("the experts of {base} stay in MXFP4"));
        let decoded = described(others)
            .map(|words| format!("the packed weights of {base} ({words}) are decoded, and rounded once to {kind}"));
        Ok(stay.into_iter().chain(decoded).collect())
    }

    /// Writes what a tensor of the model is of one of the file's.
    fn write(&self, part: &Part, kind: TensorType, output: &mut Output<'_>) -> Result<(), ModelError> {
        let (name, shape) = &self.expected[part.number];
        let tensor = self.merging.tensor(self.files, self.config, name, shape)?;
        if kind == TensorType::Mxfp4 {
            return in_blocks(&tensor, output);
        }
        let merged = match self.of_stack(name)? {
            Some(values) => Some(values),
            None => self.merging.values(&tensor)?,
        };
        match tensor.base.view().filter(|_| merged.is_none() && part.making.is_as_it_is()) {
            Some(view) => in_pieces(&tensor, view, kind, output),
            None => whole(&tensor, merged, part, kind, output),
        }
    }

    /// The values of an expert's matrix, if the adapter changes the stack that it is in.
    fn of_stack(&self, name: &str) -> Result<Option<Vec<f32>>, ModelError> {
        let Some((matrix, first, step)) = matrix_of_stack(name).filter(|_| !self.stacks.is_empty()) else {
            return Ok(None);
        };
        let Some(tensor) = self.stacks.iter().find(|tensor| tensor.name == matrix) else { return Ok(None) };
        let values = self.merging.values(tensor)?;
        Ok(values.map(|values| outputs_of(&values, tensor.base.shape[0], first, step)))
    }
}

/// Writes a matrix in MXFP4 as it is.
fn in_blocks(tensor: &MergedTensor<'_>, output: &mut Output<'_>) -> Result<(), ModelError> {
    match tensor.base.packed()?.as_ref().and_then(to_mxfp4_blocks) {
        Some(blocks) => output.append(&blocks),
        None => Err(ModelError::Dtype {
            path: tensor.base.path().to_owned(),
            name: tensor.name.clone(),
            dtype: tensor.base.format().unwrap_or_else(|| "plain numbers".to_owned()),
        }),
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

/// Writes what a tensor is of one of the file's. `values`: those of the merged model, if they are not the
/// base's.
fn whole(
    tensor: &MergedTensor<'_>,
    values: Option<Vec<f32>>,
    part: &Part,
    kind: TensorType,
    output: &mut Output<'_>,
) -> Result<(), ModelError> {
    let is_merged = values.is_some();
    let values = match values {
        Some(values) => values,
        None => tensor.base.values()?,
    };
    let values = part.making.numbers_of(part.source, values);
    let bytes = encode(&values, kind).map_err(|problem| match problem {
        Problem::NotFinite(element) => beyond(tensor, element, values[element].is_finite(), is_merged, kind.name()),
        Problem::Other(error) => error,
    })?;
    output.append(&bytes)
}

#[cfg(test)]
mod tests;
