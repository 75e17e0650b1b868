//! A GGUF file as the base of a run: its config, and its tensors under their Hugging Face names and
//! with their rows in transformers' order.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use finetune_gguf::{FileSet, TensorType};
use finetune_kernels::FloatType;
use finetune_packed::PackedMatrix;
use finetune_packed::gguf::{BlockType, from_blocks};
use finetune_store::{Dtype, FileDigest, FileReader, OpenedFile, content_hash_of, hash_of, hex};
use serde_json::Value as Json;

use crate::config::{ModelConfig, Values};
use crate::error::{ModelError, list};
use crate::files::finite::first_not_finite;
use crate::files::packing::decoded;
use crate::gguf::architecture::{Architecture, Kind};
use crate::gguf::making::{Change, Making, Makings, Rows, columns_in_order, gathered, is_convolution, joined, rows_of};
use crate::gguf::read_config::{Described, Keys, OTHER_COPY, with_class};
use crate::tree::expected_tensors;

/// The names of tensors with factors of rotary frequencies: of all rows, and of LongRoPE's long and short
/// ones. Whether a model has them is checked with its keys.
pub(super) const ROPE_FACTORS: [&str; 3] =
    ["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"];

/// A model in one GGUF file or a split one.
#[derive(Debug)]
pub(crate) struct GgufBase {
    /// What the user named: the file, or its directory.
    path: PathBuf,
    files: FileSet,
    config: ModelConfig,
    config_json: Json,
    /// How each tensor of the model is made, by its Hugging Face name.
    makings: BTreeMap<String, Making>,
    /// The shapes of convolutions in a Hugging Face directory, where those are other ones.
    convolutions: BTreeMap<String, Vec<usize>>,
}

/// How a tensor lies in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum GgufStored {
    /// All elements, and the shape.
    Dense(FloatType, Vec<usize>),
    /// A few bits of each element.
    Packed {
        /// ggml's name of the type, such as `q4_k`.
        name: &'static str,
        /// Bytes in memory once it is read.
        bytes: usize,
        /// [o, i], or [v, hidden].
        shape: [usize; 2],
    },
}

/// What was read of the tensors that one of the model is made of.
struct Read {
    /// Bytes, and how many a row has.
    sources: Vec<(Vec<u8>, usize)>,
    /// The rows in the order of the model, as (tensor, row). `None`: as they lie.
    order: Option<Vec<(usize, usize)>>,
}

/// The GGUF file that a path means: itself, or the one that its directory holds. `None`: neither. A
/// directory with safetensors files is a model of its own.
///
/// # Errors
/// [`ModelError::GgufBase`] for a directory with several models.
pub fn gguf_file(path: &Path) -> Result<Option<PathBuf>, ModelError> {
    if path.is_file() {
        let mut magic = [0; 4];
        let is_gguf = File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"GGUF";
        return Ok(is_gguf.then(|| path.to_owned()));
    }
    let has = |name: &str| path.join(name).is_file();
    if !path.is_dir() || has("model.safetensors") || has("model.safetensors.index.json") {
        return Ok(None);
    }
    match FileSet::in_directory(path)?.as_slice() {
        [] => Ok(None),
        [only] => Ok(Some(only.clone())),
        several => {
            let names = several.iter().filter_map(|file| file.file_name());
            let names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
            Err(ModelError::GgufBase {
                path: path.to_owned(),
                what: format!("it holds {} GGUF models: {}", names.len(), list(&names)),
                hint: format!("name one of them: {}", path.join(&names[0]).display()),
            })
        }
    }
}

impl GgufBase {
    /// Opens a GGUF file, or the one that a directory holds. Nothing but its header is read. `None`:
    /// the path is neither.
    ///
    /// # Errors
    /// [`ModelError::Gguf`] for a damaged file. [`ModelError::GgufBase`] for an architecture, a key, a
    /// tensor or a number type that this program does not have. As [`ModelConfig::parse`] otherwise.
    pub(crate) fn open(path: &Path) -> Result<Option<GgufBase>, ModelError> {
        let Some(file) = gguf_file(path)? else { return Ok(None) };
        let files = FileSet::open(&file)?;
        let Described { architecture, config: described } = Keys::of(&files, &file)?.describe()?;
        let config = ModelConfig::parse(&described.to_string(), &file)?;
        let config_json = with_class(described, config.family.architecture);
        let makings = makings_of(&files, &config, architecture, &file)?;
        let kernels = makings.iter().filter(|(name, _)| is_convolution(name));
        let shape = |making: &Making| making.sources[0].1.clone();
        let convolutions = kernels
            .map(|(name, making)| (name.clone(), [&shape(making)[..1], &[1], &shape(making)[1..]].concat()))
            .collect();
        Ok(Some(GgufBase { path: path.to_owned(), files, config, config_json, makings, convolutions }))
    }

    /// From now on large tensors are read past the system's cache.
    pub(crate) fn pass_cache(&mut self) {
        self.files.pass_cache();
    }

    /// The files as they were when they were opened.
    pub(crate) fn opened(&self) -> impl Iterator<Item = &OpenedFile> {
        self.files.opened()
    }

    /// What reads them.
    pub(crate) fn readers(&self) -> impl Iterator<Item = &FileReader> {
        self.files.readers()
    }

    /// Bytes of all files.
    pub(crate) fn length(&self) -> u64 {
        self.files.length()
    }

    /// The config of the model.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// config.json of the same model.
    pub(crate) fn config_json(&self) -> Json {
        self.config_json.clone()
    }

    /// Hugging Face's names of all tensors, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        self.makings.keys().cloned().collect()
    }

    /// The shape of a tensor in a Hugging Face directory, where that is another one than in the model.
    pub(crate) fn shape_in_directory(&self, name: &str) -> Option<&[usize]> {
        self.convolutions.get(name).map(Vec::as_slice)
    }

    /// The shape in the model of a tensor of this Hugging Face name.
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let making = self.makings.get(name)?;
        let (_, shape) = making.sources.first()?;
        Some(match (making.rows, making.change) {
            (_, Change::KeysAndValues(sizes)) => vec![self.config.heads * (sizes.plain + sizes.value), sizes.rank],
            (Rows::Part { .. }, _) if shape.len() == 2 => vec![shape[1]],
            (Rows::Part { count, .. }, _) => vec![count, shape[2]],
            _ if making.sources.len() > 1 => vec![making.sources.iter().map(|(_, shape)| shape[0]).sum(), shape[1]],
            _ if is_convolution(name) => vec![shape.iter().product()],
            _ => shape.clone(),
        })
    }

    /// How the tensor of this Hugging Face name lies in the file. `None`: there is no such tensor.
    pub(crate) fn stored(&self, name: &str) -> Option<GgufStored> {
        let shape = self.shape(name)?;
        let kind = self.makings.get(name)?.kind(&self.files, elements_of_block);
        match (kind.and_then(block_type), kind.and_then(float_of), shape.as_slice()) {
            (Some(block), _, &[rows, columns]) => {
                let (shape, name) = ([rows, columns], kind.map_or("", TensorType::name));
                Some(GgufStored::Packed { name, bytes: block.packed_bytes(shape), shape })
            }
            (_, Some(float), _) => Some(GgufStored::Dense(float, shape)),
            // What is made of several types, or of their numbers, is in f32.
            _ => Some(GgufStored::Dense(FloatType::F32, shape)),
        }
    }

    /// The name in the file of the first tensor that it is made of.
    fn source<'a>(&'a self, name: &'a str) -> &'a str {
        let making = self.makings.get(name);
        making.and_then(|making| making.sources.first()).map_or(name, |(theirs, _)| theirs.as_str())
    }

    /// The file that a tensor is in.
    pub(crate) fn path_of(&self, name: &str) -> &Path {
        self.files.path_of(self.source(name))
    }

    fn making(&self, name: &str) -> Result<&Making, ModelError> {
        self.makings.get(name).ok_or_else(|| {
            let family = self.config.family.architecture;
            ModelError::MissingTensor { path: self.path.clone(), name: name.to_owned(), family }
        })
    }

    /// The bytes of the rows that are needed of each tensor of the file, and where these rows lie in them.
    /// Of a stack of experts no others are read.
    fn rows(&self, making: &Making) -> Result<Read, ModelError> {
        let mut sources = Vec::new();
        for (theirs, shape) in &making.sources {
            let kind = self.files.kind(theirs).unwrap_or(TensorType::F32);
            let width = kind.bytes(shape).unwrap_or(0) as usize / rows_of(shape).max(1);
            let bytes = match making.rows {
                Rows::Part { first, count } => {
                    self.files.part(theirs, (first * width) as u64..((first + count) * width) as u64)?
                }
                _ => self.files.bytes(theirs)?,
            };
            sources.push((bytes, width));
        }
        let counts: Vec<usize> = making.sources.iter().map(|(_, shape)| rows_of(shape)).collect();
        let order = match making.rows {
            Rows::Part { .. } => None,
            rows => rows.order(&counts),
        };
        Ok(Read { sources, order })
    }

    /// The bytes of a tensor that stays in the type of the file.
    fn bytes(&self, making: &Making) -> Result<Vec<u8>, ModelError> {
        let Read { sources, order } = self.rows(making)?;
        let width = sources.first().map_or(0, |(_, width)| *width);
        let bytes = gathered(&sources, order.as_deref());
        Ok(match making.change {
            Change::Columns(tiles) => columns_in_order(&bytes, width, tiles),
            _ => bytes,
        })
    }

    /// The numbers of a tensor in f32.
    fn values(&self, name: &str, making: &Making) -> Result<Vec<f32>, ModelError> {
        let Read { sources, order } = self.rows(making)?;
        let mut numbers = Vec::new();
        for ((theirs, shape), (bytes, width)) in making.sources.iter().zip(sources) {
            let kind = self.files.kind(theirs).unwrap_or(TensorType::F32);
            // A row of a vector is one number.
            let columns = if shape.len() == 1 { 1 } else { shape.last().copied().unwrap_or(1) };
            let rows = bytes.len() / width.max(1);
            let values = match block_type(kind) {
                Some(block) => decoded(&self.matrix(name, block, [rows, columns], &bytes)?),
                None => kind.decode(&bytes)?,
            };
            numbers.push((values, columns));
        }
        let (width, rows) = (numbers.first().map_or(0, |(_, width)| *width), gathered(&numbers, order.as_deref()));
        Ok(match making.change {
            Change::None => rows,
            Change::MinusOne => rows.into_iter().map(|value| value - 1.0).collect(),
            Change::LogOfNegative => rows.into_iter().map(|value| (-value).ln()).collect(),
            Change::Columns(tiles) => columns_in_order(&rows, width, tiles),
            Change::KeysAndValues(sizes) => {
                let values = numbers.get(1).map_or(&[][..], |(values, _)| values);
                joined(&numbers[0].0, values, sizes)
            }
        })
    }

    fn matrix(
        &self,
        name: &str,
        block: BlockType,
        shape: [usize; 2],
        bytes: &[u8],
    ) -> Result<PackedMatrix, ModelError> {
        let named = |error: finetune_packed::PackedError| error.of(self.source(name), Some(self.path_of(name)));
        Ok(from_blocks(block, shape, bytes).map_err(named)?)
    }

    /// The bytes of a tensor that is not packed, in the number type that [`GgufBase::stored`] says.
    ///
    /// # Errors
    /// If the file cannot be read. [`ModelError::NotFinite`]. [`ModelError::Dtype`] for a packed one.
    pub(crate) fn dense_bytes(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        let making = self.making(name)?;
        let (bytes, dtype) = match (self.stored(name), making.kind(&self.files, elements_of_block)) {
            (Some(GgufStored::Packed { name: kind, .. }), _) => {
                return Err(ModelError::Dtype {
                    path: self.path_of(name).to_owned(),
                    name: name.to_owned(),
                    dtype: kind.to_owned(),
                });
            }
            (_, Some(kind)) if float_of(kind).is_some() => (self.bytes(making)?, dtype_of(kind).unwrap_or(Dtype::F32)),
            _ => (TensorType::F32.encode(&self.values(name, making)?)?, Dtype::F32),
        };
        match first_not_finite(&bytes, dtype) {
            None => Ok(bytes),
            Some(element) => Err(ModelError::NotFinite {
                path: self.path_of(name).to_owned(),
                name: name.to_owned(),
                element,
                after: String::new(),
            }),
        }
    }

    /// All elements of a tensor in f32, row-major.
    ///
    /// # Errors
    /// If the file cannot be read, or holds a number that is not finite.
    pub(crate) fn dense_f32(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        match self.stored(name) {
            Some(GgufStored::Packed { .. }) => Ok(decoded(&self.packed(name)?)),
            Some(GgufStored::Dense(float, _)) => Ok(type_of(float).decode(&self.dense_bytes(name)?)?),
            None => self.dense_bytes(name).map(|_| Vec::new()),
        }
    }

    /// A packed matrix.
    ///
    /// # Errors
    /// If the file cannot be read, or a scale is not finite. [`ModelError::Dtype`] if it is not packed.
    pub(crate) fn packed(&self, name: &str) -> Result<PackedMatrix, ModelError> {
        let making = self.making(name)?;
        let block = making.kind(&self.files, elements_of_block).and_then(block_type);
        match (block, self.stored(name)) {
            (Some(block), Some(GgufStored::Packed { shape, .. })) => {
                self.matrix(name, block, shape, &self.bytes(making)?)
            }
            _ => Err(ModelError::Dtype {
                path: self.path_of(name).to_owned(),
                name: name.to_owned(),
                dtype: self.files.kind(self.source(name)).map_or("", TensorType::name).to_owned(),
            }),
        }
    }

    /// Hash over all bytes of the files and the lengths of each: 64 hexadecimal digits.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) fn digest(&self) -> Result<String, ModelError> {
        let files = self.file_digests(&|_| true)?;
        Ok(digest_of(&files).expect("the content of each file"))
    }

    /// What identifies each file: its number, since its name counts for nothing. Reads those that `wanted` accepts.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) fn file_digests(&self, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<FileDigest>, ModelError> {
        let count = self.files.paths().count();
        let digest = |(n, file): (usize, &OpenedFile)| {
            let name = format!("GGUF file {} of {count}", n + 1);
            let content = wanted(&name).then(|| content_hash_of(file.path(), &mut |_| ())).transpose()?;
            let content = content.map(|hash| hex(&hash));
            Ok(FileDigest { name, length: file.length(), header: "gguf".to_owned(), content })
        };
        self.opened().enumerate().map(digest).collect()
    }
}

/// [`GgufBase::digest`] of a base with these files. `None`: the content of one is not known.
pub(crate) fn digest_of(files: &[FileDigest]) -> Option<String> {
    let mut all = Vec::new();
    for file in files {
        all.extend(file.length.to_le_bytes());
        all.extend(file.content_hash()?);
    }
    Some(hex(&hash_of(&all)))
}

/// How all tensors of the config are made. Each tensor of the file that one needs has to be there in its
/// shape and in a type that is read, and no other.
fn makings_of(
    files: &FileSet,
    config: &ModelConfig,
    architecture: &Architecture,
    path: &Path,
) -> Result<BTreeMap<String, Making>, ModelError> {
    let refused =
        |what: String, hint: &str| ModelError::GgufBase { path: path.to_owned(), what, hint: hint.to_owned() };
    let class = config.family.architecture;
    let has = |name: &str| files.tensor(name).is_some();
    let of = Makings { has: &has, config, architecture };
    let mut makings = BTreeMap::new();
    let mut known = BTreeSet::new();
    for (ours, shape) in expected_tensors(config) {
        let Some(making) = of.of(&ours, &shape) else {
            let what = format!("a {class} with these keys needs `{ours}`, which llama.cpp has no place for");
            return Err(refused(what, OTHER_COPY));
        };
        for (theirs, shape) in &making.sources {
            if known.contains(theirs) {
                continue;
            }
            let Some(tensor) = files.tensor(theirs) else {
                let what = format!("it has no tensor `{theirs}` (`{ours}`), which a {class} with these keys needs");
                return Err(refused(what, "the file is damaged or not complete: fetch it again"));
            };
            // A matrix of one row may be a vector.
            if tensor.shape != *shape && !(shape.len() == 2 && shape[0] == 1 && tensor.shape == shape[1..]) {
                let what = format!("the tensor `{theirs}` has the shape {:?}, expected {shape:?}", tensor.shape);
                return Err(refused(what, "the file is damaged: fetch it again"));
            }
            if float_of(tensor.kind).is_none() && (block_type(tensor.kind).is_none() || shape.len() < 2) {
                let kind = match tensor.kind {
                    TensorType::Other(code) => format!("{} (ggml's type {code})", tensor.kind.name()),
                    known => known.name().to_owned(),
                };
                let what = format!("the tensor `{theirs}` is in the type {kind}, which is not read here");
                return Err(refused(what, "take a copy in q8_0, q4_0, q4_1, q5_0, q5_1 or a K type such as q4_k_m"));
            }
            known.insert(theirs.clone());
        }
        makings.insert(ours, making);
    }
    let factors = if architecture.keys == Kind::Phi3 { &ROPE_FACTORS[1..] } else { &ROPE_FACTORS[..1] };
    let is_known = |name: &str| known.contains(name) || factors.contains(&name) || is_idle(name, config);
    let others: Vec<String> =
        files.tensors().map(|tensor| tensor.name.clone()).filter(|name| !is_known(name)).collect();
    match others.is_empty() {
        true => Ok(makings),
        false => Err(refused(format!("no part of a {class} with these keys uses {}", list(&others)), OTHER_COPY)),
    }
}

/// Whether a tensor takes no part: it is of a layer that predicts further tokens, or makes keys and values of
/// a layer that has those of an earlier one.
fn is_idle(name: &str, config: &ModelConfig) -> bool {
    let Some((layer, part)) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) else { return false };
    let Ok(layer) = layer.parse::<usize>() else { return false };
    match config.layers.get(layer) {
        None => layer < config.layers.len() + config.idle_layers,
        Some(layer) => {
            let is_of_keys = ["attn_k.weight", "attn_v.weight", "attn_k_norm.weight"].contains(&part);
            is_of_keys && matches!(layer.values, Values::OfLayer(_))
        }
    }
}

/// Elements of a block; 1 of floats.
fn elements_of_block(kind: TensorType) -> usize {
    block_type(kind).map_or(1, BlockType::elements)
}

fn type_of(kind: FloatType) -> TensorType {
    match kind {
        FloatType::F32 => TensorType::F32,
        FloatType::F16 => TensorType::F16,
        FloatType::BF16 => TensorType::BF16,
    }
}

fn float_of(kind: TensorType) -> Option<FloatType> {
    match kind {
        TensorType::F32 => Some(FloatType::F32),
        TensorType::F16 => Some(FloatType::F16),
        TensorType::BF16 => Some(FloatType::BF16),
        _ => None,
    }
}

fn dtype_of(kind: TensorType) -> Option<Dtype> {
    match kind {
        TensorType::F32 => Some(Dtype::F32),
        TensorType::F16 => Some(Dtype::F16),
        TensorType::BF16 => Some(Dtype::BF16),
        _ => None,
    }
}

fn block_type(kind: TensorType) -> Option<BlockType> {
    Some(match kind {
        TensorType::Q4_0 => BlockType::Q4_0,
        TensorType::Q4_1 => BlockType::Q4_1,
        TensorType::Q5_0 => BlockType::Q5_0,
        TensorType::Q5_1 => BlockType::Q5_1,
        TensorType::Q8_0 => BlockType::Q8_0,
        TensorType::Q2K => BlockType::Q2K,
        TensorType::Q3K => BlockType::Q3K,
        TensorType::Q4K => BlockType::Q4K,
        TensorType::Q5K => BlockType::Q5K,
        TensorType::Q6K => BlockType::Q6K,
        TensorType::Mxfp4 => BlockType::Mxfp4,
        TensorType::F32 | TensorType::F16 | TensorType::BF16 | TensorType::Other(_) => return None,
    })
}

#[cfg(test)]
mod tests;
