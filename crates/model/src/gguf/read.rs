//! A GGUF file as the base of a run: its config, and its tensors under their Hugging Face names and
//! with their rows in transformers' order.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use finetune_gguf::{FileSet, TensorInfo, TensorType};
use finetune_kernels::FloatType;
use finetune_packed::PackedMatrix;
use finetune_packed::gguf::{BlockType, from_blocks};
use finetune_store::{Dtype, content_hash_of, hash_of, hex};
use rayon::prelude::*;
use serde_json::Value as Json;

use crate::adaptation::module_of;
use crate::config::ModelConfig;
use crate::error::{ModelError, list};
use crate::files::finite::first_not_finite;
use crate::gguf::place::{Destination, in_order_of_halves, interleaved_heads, name_of_tensor, tensor_name};
use crate::gguf::read_config::{Described, Keys, OTHER_COPY, with_class};
use crate::tree::expected_tensors;

/// The name of the tensor with the factors of rotary frequencies.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// A model in one GGUF file or a split one.
#[derive(Debug)]
pub(crate) struct GgufBase {
    /// What the user named: the file, or its directory.
    path: PathBuf,
    files: FileSet,
    config: ModelConfig,
    config_json: Json,
    destination: Destination,
    /// Hugging Face's name to llama.cpp's, of every tensor of the model.
    names: BTreeMap<String, String>,
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
        let Described { destination, config: described } = Keys::of(&files, &file)?.describe()?;
        let config = ModelConfig::parse(&described.to_string(), &file)?;
        let config_json = with_class(described, config.family.architecture);
        let names = names_of(&files, &config, &file)?;
        Ok(Some(GgufBase { path: path.to_owned(), files, config, config_json, destination, names }))
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
        self.names.keys().cloned().collect()
    }

    fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.files.tensor(self.names.get(name)?)
    }

    /// How the tensor of this Hugging Face name lies in the file. `None`: there is no such tensor.
    pub(crate) fn stored(&self, name: &str) -> Option<GgufStored> {
        let TensorInfo { shape, kind, .. } = self.tensor(name)?;
        match (float_of(*kind), block_type(*kind), shape.as_slice()) {
            (Some(float), ..) => Some(GgufStored::Dense(float, shape.clone())),
            (None, Some(block), &[rows, columns]) => {
                let shape = [rows, columns];
                Some(GgufStored::Packed { name: kind.name(), bytes: block.packed_bytes(shape), shape })
            }
            // `names_of` has let no other through.
            _ => None,
        }
    }

    /// The file that a tensor is in.
    pub(crate) fn path_of(&self, name: &str) -> &Path {
        self.files.path_of(self.names.get(name).map_or(name, String::as_str))
    }

    /// The bytes of a tensor, with its rows in transformers' order.
    fn bytes(&self, name: &str) -> Result<(TensorInfo, Vec<u8>), ModelError> {
        let known = self.names.get(name).zip(self.tensor(name));
        let Some((theirs, info)) = known else {
            let family = self.config.family.architecture;
            return Err(ModelError::MissingTensor { path: self.path.clone(), name: name.to_owned(), family });
        };
        let bytes = self.files.bytes(theirs)?;
        let Some(heads) = interleaved_heads(module_of(name), self.destination, &self.config) else {
            return Ok((info.clone(), bytes));
        };
        // Rows are whole numbers, of a vector and of blocks too.
        let rows = info.shape.first().copied().unwrap_or(1).max(1);
        Ok((info.clone(), in_order_of_halves(&bytes, heads, bytes.len() / rows)))
    }

    /// The bytes of a tensor that is not packed, in the number type of the file.
    ///
    /// # Errors
    /// If the file cannot be read. [`ModelError::NotFinite`]. [`ModelError::Dtype`] for a packed one.
    pub(crate) fn dense_bytes(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        let (info, bytes) = self.bytes(name)?;
        let Some(dtype) = dtype_of(info.kind) else {
            return Err(ModelError::Dtype {
                path: self.path_of(name).to_owned(),
                name: name.to_owned(),
                dtype: info.kind.name().to_owned(),
            });
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
        match self.tensor(name).map(|info| (info.kind, block_type(info.kind))) {
            Some((_, Some(_))) => {
                let matrix = self.packed(name)?;
                let [_, columns] = matrix.shape;
                let mut values = vec![0.0; matrix.shape.iter().product()];
                values.par_chunks_mut(columns).enumerate().for_each(|(row, out)| {
                    out.iter_mut().enumerate().for_each(|(column, value)| *value = matrix.value(row, column));
                });
                Ok(values)
            }
            Some((kind, None)) => Ok(kind.decode(&self.dense_bytes(name)?)?),
            None => self.dense_bytes(name).map(|_| Vec::new()),
        }
    }

    /// A packed matrix.
    ///
    /// # Errors
    /// If the file cannot be read, or a scale is not finite. [`ModelError::Dtype`] if it is not packed.
    pub(crate) fn packed(&self, name: &str) -> Result<PackedMatrix, ModelError> {
        let (info, bytes) = self.bytes(name)?;
        let path = self.path_of(name);
        match (block_type(info.kind), info.shape.as_slice()) {
            (Some(block), &[rows, columns]) => from_blocks(block, [rows, columns], &bytes)
                .map_err(|error| error.of(self.names.get(name).map_or(name, String::as_str), Some(path)).into()),
            _ => Err(ModelError::Dtype {
                path: path.to_owned(),
                name: name.to_owned(),
                dtype: info.kind.name().to_owned(),
            }),
        }
    }

    /// Hash over all bytes of the files and the lengths of each: 64 hexadecimal digits.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) fn digest(&self) -> Result<String, ModelError> {
        let mut all = Vec::new();
        for path in self.files.paths() {
            let mut length = 0;
            let hash = content_hash_of(path, &mut |bytes| length += bytes)?;
            all.extend(length.to_le_bytes());
            all.extend(hash);
        }
        Ok(hex(&hash_of(&all)))
    }
}

/// Hugging Face's names of the tensors, with llama.cpp's. Every tensor of the config has to be there
/// in its shape and in a type that is read, and no other.
fn names_of(files: &FileSet, config: &ModelConfig, path: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    let refused =
        |what: String, hint: &str| ModelError::GgufBase { path: path.to_owned(), what, hint: hint.to_owned() };
    let class = config.family.architecture;
    let mut names = BTreeMap::new();
    for (ours, shape) in expected_tensors(config) {
        let theirs = tensor_name(&ours).unwrap_or_default();
        let Some(tensor) = files.tensor(&theirs) else {
            let what = format!("it has no tensor `{theirs}` (`{ours}`), which a {class} with these keys needs");
            return Err(refused(what, "the file is damaged or not complete: fetch it again"));
        };
        if tensor.shape != shape {
            let what = format!("the tensor `{theirs}` has the shape {:?}, expected {shape:?}", tensor.shape);
            return Err(refused(what, "the file is damaged: fetch it again"));
        }
        let is_read = float_of(tensor.kind).is_some() || (block_type(tensor.kind).is_some() && shape.len() == 2);
        if !is_read {
            let kind = match tensor.kind {
                TensorType::Other(code) => format!("{} (ggml's type {code})", tensor.kind.name()),
                known => known.name().to_owned(),
            };
            let what = format!("the tensor `{theirs}` is in the type {kind}, which is not read here");
            return Err(refused(what, "take a copy in q8_0, q4_0, q4_1, q5_0, q5_1 or a K type such as q4_k_m"));
        }
        names.insert(ours, theirs);
    }
    let known = |name: &str| name == ROPE_FACTORS || name_of_tensor(name).is_some_and(|ours| names.contains_key(&ours));
    let others: Vec<String> = files.tensors().map(|tensor| tensor.name.clone()).filter(|name| !known(name)).collect();
    match others.is_empty() {
        true => Ok(names),
        false => Err(refused(format!("no part of a {class} with these keys uses {}", list(&others)), OTHER_COPY)),
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
        TensorType::F32 | TensorType::F16 | TensorType::BF16 | TensorType::Other(_) => return None,
    })
}
