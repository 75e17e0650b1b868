//! A model directory, written tensor by tensor: a base with what an adapter adds, in plain numbers or
//! packed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use finetune_kernels::FloatType;
use finetune_packed::{Kept, Scheme, file_bytes, quantize};
use finetune_store::{Disk, Dtype, Staging, TensorSpec, write_shards};
use serde_json::Value;

use crate::adaptation::module_of;
use crate::adapter::Adapter;
use crate::config::family::ExpertLayout;
use crate::config::{ModelConfig, Wrapper};
use crate::error::ModelError;
use crate::files::base_files::BaseFiles;
use crate::files::companions::{amend_config, companion_files};
use crate::files::floats::{dtype_of, rounded};
use crate::files::load::part_names;
use crate::files::packing::{decoded, described, scheme_word, stored};
use crate::files::wrapper;
use crate::merge::loader::{Loader, is_mlx};
use crate::merge::pieces::{Piece, Written};
use crate::merge::{MergedTensor, Merging, beyond};
use crate::tree::expected_tensors;

/// Bytes of the largest weight file of an export, as in transformers.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// Text models, by their `model_type`, that transformers has inside of their multimodal ones alone.
const WITHOUT_CLASS: [&str; 1] = ["muse_glimmer_text"];

/// How the weights of a merged model are written.
#[derive(Clone, Copy, Debug)]
pub struct MergedForm {
    /// Bytes of a weight file at most.
    pub shard_bytes: u64,
    /// The number type of the model's tensors. `None`: each keeps the base's. Those that are packed in
    /// the base get the type that their values are meant for.
    pub dtype: Option<FloatType>,
    /// How matrices are packed once they are merged. `None`: they are not.
    pub quantize: Option<Scheme>,
}

impl MergedForm {
    /// The base's number types, in files of so many bytes at most.
    pub fn of_shards(shard_bytes: u64) -> MergedForm {
        MergedForm { shard_bytes, dtype: None, quantize: None }
    }
}

/// What a user should know about a merged model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Merged {
    /// Which base it was merged into, if that was packed.
    pub notice: Option<String>,
    /// The part of what the adapter changes that is left once the result is packed: 1 is all of it.
    /// `None`: the result is not packed, or nothing was changed.
    pub kept: Option<f64>,
    /// How many matrices the model has.
    pub matrices: usize,
    /// Those that were written in plain numbers, by their names in the model, and their columns.
    pub plain: Vec<(String, usize)>,
    /// The parts of a multimodal model that were left out, as mlx-lm has the text model alone.
    pub left_out: Vec<String>,
    /// What is said where a text model is written alone in plain numbers, as its base has no other parts in
    /// transformers' form.
    pub alone: Option<String>,
}

/// Writes the merged model into a directory that is being made: weights in the base's number types
/// or that of the form, config and tokenizer files. A packed base is decoded, as it was when the
/// adapter was trained. `text` takes the place of the base's files of the same names.
/// `progress` is called with the number of tensors done, and of all.
///
/// # Errors
/// If reading or writing fails, or if base and adapter do not fit. A number that is not finite, in
/// the base or once merged or rounded, is an error that names its tensor.
pub fn write_merged(
    disk: &dyn Disk,
    base: &Path,
    adapter: &Adapter,
    output: &mut Staging<'_>,
    form: MergedForm,
    text: &[(String, Vec<u8>)],
    progress: &dyn Fn(usize, usize),
) -> Result<Merged, ModelError> {
    let (mut config, files) = BaseFiles::open(base, adapter.base.quantization)?;
    let alone = text_alone(&config, &files, form)?;
    if alone.is_some() {
        config.wrapper = None;
    }
    expect_written_experts(&config, &files)?;
    let merging = Merging::new(&config, adapter);
    let loader = form.quantize.map(|scheme| Loader::of(&config, &files, scheme, merging.opens_stacks)).transpose()?;
    let mut writer = Writer::new(&merging, &config, &files, form, loader.as_ref())?;
    // Read before the long work, so that an error such as a link out of the directory comes early.
    let is_wrapped = config.wrapper.is_some();
    let merged = merging.config(&config);
    let mut companions = companion_files(base, writer.number_type(), text)?;
    amend_config(&mut companions, |config| {
        if let (Some(_), Some(text)) = (&alone, wrapper::text_alone(config, merged.family.architecture)) {
            *config = text;
            config["tie_word_embeddings"] = Value::Bool(merged.tied_embeddings);
        }
        if is_wrapped {
            merging.amend(&mut config["text_config"]);
            merging.amend_tie(config);
        } else {
            merging.amend(config);
        }
        if let Some(loader) = &loader {
            loader.amend(config, &merged);
        }
        for (key, value) in writer.config_entries(loader.as_ref()) {
            config[key] = value;
        }
    });
    let directory = output.directory().to_owned();
    let metadata = BTreeMap::from([("format".to_owned(), writer.framework().to_owned())]);
    let specs: Vec<TensorSpec> = writer.pieces.iter().map(|piece| piece.spec.clone()).collect();
    let count = writer.tensors.len();
    let written = write_shards(disk, &directory, &specs, &metadata, form.shard_bytes, |n| {
        progress(writer.pieces[n].tensors[0], count);
        writer.bytes(n)
    })?;
    progress(count, count);
    for name in written {
        output.record(&name)?;
    }
    for (name, bytes) in companions {
        output.write(&name, &bytes)?;
    }
    let matrices = writer.tensors.iter().filter(|tensor| writer.is_matrix(tensor)).count();
    let left_out = match files.safetensors() {
        Some(files) if is_wrapped && form.quantize.is_some_and(is_mlx) => {
            part_names(files.left_out().map(|view| view.name))
        }
        _ => Vec::new(),
    };
    let (notice, kept, plain) = (writer.notice(&files), writer.kept.share(), writer.plain());
    Ok(Merged { notice, kept, matrices, plain, left_out, alone })
}

/// What is said where the text model of a multimodal one is written alone in plain numbers: where mlx-lm or mlx-vlm
/// packed it. The former leaves out other parts, the latter has them in a form of its own. `None`: all is written.
///
/// # Errors
/// [`ModelError::NotExpressible`] if transformers has no class of the text model alone, or other parts are packed so
/// that they cannot be decoded.
fn text_alone(config: &ModelConfig, files: &BaseFiles, form: MergedForm) -> Result<Option<String>, ModelError> {
    let Some(Wrapper { class, .. }) = &config.wrapper else { return Ok(None) };
    if form.quantize.is_some_and(is_mlx) || !files.is_packed(config)? {
        return Ok(None);
    }
    let other = "name the 16-bit model, or --quantize mlx8 for mlx-lm, which has the text model in it alone";
    let refused = |what: String| Err(ModelError::NotExpressible { what, hint: other.to_owned() });
    if !files.is_of_mlx() {
        return match files.untold_codes()? {
            Some(name) => refused(format!("`{name}` of {class} is packed in a form that does not tell its shape")),
            None => Ok(None),
        };
    }
    let text = config.family;
    if WITHOUT_CLASS.contains(&text.model_type) {
        return refused(format!(
            "mlx-lm packed the text model of {class} alone, and transformers has no class with an output layer for that"
        ));
    }
    let parts = files.safetensors().map(|files| part_names(files.left_out().map(|view| view.name)));
    let without = parts
        .filter(|parts| !parts.is_empty())
        .map_or_else(String::new, |parts| format!(": MLX has {} in another form than transformers", parts.join(", ")));
    Ok(Some(format!("written as {}, the text model of {class} alone{without}", text.architecture)))
}

/// Refuses experts with gate and up in turns (gpt-oss): a GGUF file has not the stacks of its directory.
fn expect_written_experts(config: &ModelConfig, files: &BaseFiles) -> Result<(), ModelError> {
    let family = config.family;
    if !files.is_gguf() || config.experts.is_none() || family.expert_layout() != ExpertLayout::TakingTurns {
        return Ok(());
    }
    Err(ModelError::NotExpressible {
        what: format!(
            "the experts of a {} in a GGUF file are not written as a directory has them",
            family.architecture
        ),
        hint: "--format peft writes the adapter, which fits the Hugging Face model too".to_owned(),
    })
}

/// Writes a base with its matrices packed into a directory that is being made, one tensor at a time.
/// `progress` is called with the number of tensors done, and of all.
///
/// # Errors
/// As [`write_merged`]. [`ModelError::NotExpressible`] if the base is packed already.
pub fn quantize_model(
    disk: &dyn Disk,
    base: &Path,
    scheme: Scheme,
    output: &mut Staging<'_>,
    progress: &dyn Fn(usize, usize),
) -> Result<Merged, ModelError> {
    let (config, files) = BaseFiles::open(base, None)?;
    if let Some(words) = described(files.tensors(&config)?.iter()) {
        return Err(ModelError::NotExpressible {
            what: format!("{} is packed already: {words}", base.display()),
            hint: "quantize the 16-bit model that it was made from".to_owned(),
        });
    }
    let form = MergedForm { quantize: Some(scheme), ..MergedForm::of_shards(SHARD_BYTES) };
    write_merged(disk, base, &Adapter::none(&config), output, form, &[], progress)
}

/// Makes the bytes of each tensor of the files, in their order.
struct Writer<'a> {
    merging: &'a Merging<'a>,
    form: MergedForm,
    tensors: Vec<MergedTensor<'a>>,
    /// The number type that each of `tensors` is rounded to.
    dtypes: Vec<Dtype>,
    /// Names of the tensors that the base computes with.
    used: BTreeSet<String>,
    pieces: Vec<Piece>,
    /// The parts of the matrix that is being written.
    parts: Vec<Vec<u8>>,
    kept: Kept,
}

impl<'a> Writer<'a> {
    fn new(
        merging: &'a Merging<'a>,
        config: &ModelConfig,
        files: &'a BaseFiles,
        form: MergedForm,
        loader: Option<&Loader<'_>>,
    ) -> Result<Writer<'a>, ModelError> {
        let tensors = merging.tensors(files, config)?;
        let of_stacks = tensors.iter().filter(|tensor| tensor.base.stack().is_some()).map(|tensor| tensor.name.clone());
        let used: BTreeSet<String> =
            expected_tensors(config).into_iter().map(|(name, _)| name).chain(of_stacks).collect();
        let decoded = dtype_of(files.number_type());
        let written_as = |tensor: &MergedTensor<'_>| match (form.dtype, tensor.base.dtype()) {
            (Some(dtype), _) if used.contains(&tensor.base.name) => dtype_of(dtype),
            (_, Some(dtype)) => dtype,
            (_, None) => decoded,
        };
        let for_loader = |tensor: &MergedTensor<'_>| match (loader, form.dtype) {
            (Some(loader), None) => loader.dtype(&tensor.base.name, written_as(tensor), decoded),
            _ => written_as(tensor),
        };
        let dtypes: Vec<Dtype> = tensors.iter().map(for_loader).collect();
        let written = Written { merging, config, files, tensors: &tensors, dtypes: &dtypes, used: &used };
        let pieces = written.pieces(loader);
        Ok(Writer { merging, form, tensors, dtypes, used, pieces, parts: Vec::new(), kept: Kept::default() })
    }

    /// The number type of the first matrix: what config.json says.
    fn number_type(&self) -> Dtype {
        let matrix = self.tensors.iter().zip(&self.dtypes).find(|(tensor, _)| self.is_matrix(tensor));
        matrix.map_or(Dtype::F32, |(_, dtype)| *dtype)
    }

    fn is_matrix(&self, tensor: &MergedTensor<'_>) -> bool {
        tensor.base.shape.len() == 2 && self.used.contains(&tensor.base.name)
    }

    /// The `format` of the files' metadata: who they are for.
    fn framework(&self) -> &'static str {
        if self.form.quantize.is_some_and(is_mlx) { "mlx" } else { "pt" }
    }

    /// What config.json says of packed matrices.
    fn config_entries(&self, loader: Option<&Loader<'_>>) -> Vec<(&'static str, Value)> {
        let Some(loader) = loader else { return Vec::new() };
        let first = self.pieces.iter().filter(|piece| matches!(piece.packed, Some((_, 0))));
        let modules = first.map(|piece| module_of(&piece.spec.name));
        loader.config_entry(modules.filter(|module| loader.has_own_bits(module)))
    }

    /// The matrices that are in plain numbers, and their columns.
    fn plain(&self) -> Vec<(String, usize)> {
        let of_packed = self.pieces.iter().filter(|piece| piece.packed.is_some()).flat_map(|piece| &piece.tensors);
        let packed: BTreeSet<usize> = of_packed.copied().collect();
        let matrices = self.tensors.iter().enumerate().filter(|(_, tensor)| self.is_matrix(tensor));
        let plain = matrices.filter(|(number, _)| !packed.contains(number));
        plain.map(|(_, tensor)| (tensor.name.clone(), tensor.base.shape[1])).collect()
    }

    /// The bytes of piece `n`. Packed matrices are made with their first part, and kept up to their last.
    fn bytes(&mut self, n: usize) -> Result<Vec<u8>, ModelError> {
        let Piece { packed, half, .. } = self.pieces[n];
        let tensors = self.pieces[n].tensors.clone();
        let dtype = self.dtypes[tensors[0]];
        if let Some((scheme, part)) = packed {
            if part == 0 && half != Some(1) {
                self.parts.clear();
                for tensor in tensors {
                    for (place, bytes) in self.packed(scheme, tensor, dtype)?.into_iter().enumerate() {
                        match self.parts.get_mut(place) {
                            Some(parts) => parts.extend(bytes),
                            None => self.parts.push(bytes),
                        }
                    }
                }
            }
            let mut bytes = std::mem::take(&mut self.parts[part]);
            if half == Some(0) {
                // The other half waits for its own piece.
                self.parts[part] = bytes.split_off(bytes.len() / 2);
            }
            return Ok(bytes);
        }
        if let Some(half) = half {
            let bytes = self.merging.bytes(&self.tensors[tensors[0]], dtype, true)?;
            return Ok(bytes.chunks(bytes.len() / 2).nth(half).unwrap_or_default().to_vec());
        }
        if self.pieces[n].adds_one {
            return self.merging.bytes_with_one(&self.tensors[tensors[0]], dtype);
        }
        let mut bytes = Vec::new();
        for tensor in tensors.iter().map(|&number| &self.tensors[number]) {
            let own = self.merging.bytes(tensor, dtype, self.used.contains(&tensor.base.name))?;
            if tensors.len() == 1 {
                return Ok(own);
            }
            bytes.extend(own);
        }
        Ok(bytes)
    }

    /// The parts of a packed matrix. It is packed from numbers in the type that it would have dense, as
    /// the reference programs do.
    fn packed(&mut self, scheme: Scheme, tensor: usize, dtype: Dtype) -> Result<Vec<Vec<u8>>, ModelError> {
        let tensor = &self.tensors[tensor];
        let shape = self.merging.shape(tensor);
        let merged = self.merging.values(tensor)?;
        let is_merged = merged.is_some();
        let base = if is_merged && tensor.base.shape == shape { Some(tensor.base.values()?) } else { None };
        let exact = merged.map_or_else(|| tensor.base.values(), Ok)?;
        let values = rounded(&exact, dtype);
        if let Some(element) = values.iter().position(|value| !value.is_finite()) {
            return Err(beyond(tensor, element, exact[element].is_finite(), is_merged, &dtype.to_string()));
        }
        let matrix = quantize(scheme, &values, [shape[0], shape[1]], stored(dtype))
            .map_err(|error| error.of(&tensor.name, Some(tensor.base.path())))?;
        if let Some(base) = base {
            self.kept.add(&base, &exact, &decoded(&matrix));
        }
        Ok(file_bytes(scheme, &matrix))
    }

    /// Which packed base it was merged into.
    fn notice(&self, files: &BaseFiles) -> Option<String> {
        let bases = self.tensors.iter().map(|tensor| &tensor.base).filter(|base| self.used.contains(&base.name));
        let words = described(bases)?;
        let rounded = match self.form.quantize {
            Some(scheme) => format!("packed again as {}", scheme_word(scheme)),
            None => format!("rounded once to {}", self.number_type().name().to_lowercase()),
        };
        Some(format!("merged into the packed weights of {} ({words}), decoded and {rounded}", files.path().display()))
    }
}
