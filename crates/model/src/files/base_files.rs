//! The files of a base: the one thing that opens them. It says of each tensor whether the files have
//! all of its elements or a few bits of each, and packs matrices while they are read if it is asked to.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use finetune_kernels::FloatType;
use finetune_packed::files::{PackedConfig, PackedTensor, find};
use finetune_packed::{PackedMatrix, Scheme, applies, quantize};
use finetune_store::{Dtype, TensorSet, TensorView};
use serde_json::{Map, Value};

use crate::adaptation::{is_of_vocabulary, module_of};
use crate::branch::OUTPUT;
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::files::config_json;
use crate::files::finite::expect_finite;
use crate::files::floats::{float_type, to_finite_f32};
use crate::files::load;
use crate::files::packing;
use crate::files::text::read_text;
use crate::tree::expected_tensors;

/// The opened files of a base.
pub(crate) struct BaseFiles {
    path: PathBuf,
    origin: Origin,
    /// How matrices are packed while they are read. `None`: they stay as they are.
    quantization: Option<Scheme>,
}

/// Where the tensors of a base are.
enum Origin {
    /// In a Hugging Face directory.
    Directory { files: TensorSet, packing: PackedConfig },
}

/// A tensor of a base. Nothing of it has been read.
pub(crate) struct BaseTensor<'a> {
    pub(crate) name: String,
    /// As the model has it, packed or not.
    pub(crate) shape: Vec<usize>,
    /// The base, for messages about a tensor that several tensors of its files make.
    base: &'a Path,
    stored: Stored<'a>,
    /// How it is packed while it is read. `None`: it stays as it is.
    quantization: Option<Scheme>,
}

/// How a tensor lies in the files.
enum Stored<'a> {
    /// All elements.
    Dense(TensorView<'a>),
    /// A few bits of each element.
    Packed(PackedTensor<'a>),
}

impl BaseFiles {
    /// Opens a base with its config, each checked against the other. `quantization`: how its matrices
    /// are packed while they are read. A base that is packed already stays as it is, and a notice of
    /// the config says so.
    pub(crate) fn open(path: &Path, quantization: Option<Scheme>) -> Result<(ModelConfig, BaseFiles), ModelError> {
        let mut config = ModelConfig::load(path)?;
        let mut files = BaseFiles::read(path)?;
        let notices = load::check(&files, &config)?;
        config.notices.extend(notices);
        if let Some(scheme) = quantization {
            let form = packing::described(files.tensors(&config)?.iter());
            match form {
                None => files.quantization = Some(scheme),
                Some(words) => config.notices.push(format!(
                    "{}: model.quantization = {} changes nothing, as this base is packed already: {words}",
                    path.display(),
                    packing::scheme_word(scheme)
                )),
            }
        }
        Ok((config, files))
    }

    /// The files alone, without a look at their tensors.
    pub(crate) fn read(path: &Path) -> Result<BaseFiles, ModelError> {
        let config = path.join("config.json");
        let packing = PackedConfig::parse(&config_object(path)?, &config)?;
        let origin = Origin::Directory { files: TensorSet::open_model(path)?, packing };
        Ok(BaseFiles { path: path.to_owned(), origin, quantization: None })
    }

    /// The path of the base, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The safetensors files, if the base has such.
    pub(crate) fn safetensors(&self) -> Option<&TensorSet> {
        let Origin::Directory { files, .. } = &self.origin;
        Some(files)
    }

    /// The tensor of this name. `None`: the files have none.
    ///
    /// # Errors
    /// If it has another shape, a number type that weights are not held in, or parts that do not make
    /// a packed matrix.
    pub(crate) fn get(&self, name: &str, shape: &[usize]) -> Result<Option<BaseTensor<'_>>, ModelError> {
        let Origin::Directory { files, packing } = &self.origin;
        let tensor = |stored, quantization| {
            let (name, shape) = (name.to_owned(), shape.to_vec());
            Some(BaseTensor { name, shape, base: &self.path, stored, quantization })
        };
        let matrix = <[usize; 2]>::try_from(shape).ok();
        if let Some(matrix) = matrix
            && let Some(packed) = find(files, packing, name, matrix)?
        {
            return Ok(tensor(Stored::Packed(packed), None));
        }
        let Some(view) = files.get(name) else { return Ok(None) };
        if view.shape != shape {
            let (path, name) = (self.path.clone(), name.to_owned());
            return Err(ModelError::Shape { path, name, found: view.shape.to_vec(), expected: shape.to_vec() });
        }
        if float_type(view.dtype).is_none() {
            let (path, name) = (self.path.clone(), name.to_owned());
            return Err(ModelError::Dtype { path, name, dtype: view.dtype.to_string() });
        }
        let fits = |scheme: &Scheme| matrix.is_some_and(|matrix| applies(*scheme, matrix, is_linear(name)));
        Ok(tensor(Stored::Dense(view), self.quantization.filter(fits)))
    }

    /// A tensor that a model of this config has.
    ///
    /// # Errors
    /// As [`BaseFiles::get`], and [`ModelError::MissingTensor`].
    pub(crate) fn tensor(
        &self,
        config: &ModelConfig,
        name: &str,
        shape: &[usize],
    ) -> Result<BaseTensor<'_>, ModelError> {
        self.get(name, shape)?.ok_or_else(|| ModelError::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
            family: config.family.architecture,
        })
    }

    /// All tensors of a model of this config, in model order.
    ///
    /// # Errors
    /// As [`BaseFiles::tensor`].
    pub(crate) fn tensors(&self, config: &ModelConfig) -> Result<Vec<BaseTensor<'_>>, ModelError> {
        expected_tensors(config).iter().map(|(name, shape)| self.tensor(config, name, shape)).collect()
    }

    /// Every tensor of the model, and those of the files that no part of it uses, in the order of the
    /// files. A packed base has the former only: the others may be parts of packed matrices.
    pub(crate) fn tensors_of_files(&self, config: &ModelConfig) -> Result<Vec<BaseTensor<'_>>, ModelError> {
        let mut tensors = self.tensors(config)?;
        let Some(files) = self.safetensors().filter(|_| !tensors.iter().any(|tensor| tensor.is_packed_in_file()))
        else {
            return Ok(tensors);
        };
        let known: BTreeSet<String> = tensors.iter().map(|tensor| tensor.name.clone()).collect();
        let others = files.names().filter(|name| !known.contains(*name)).filter_map(|name| files.get(name));
        tensors.extend(others.map(|view| BaseTensor {
            name: view.name.to_owned(),
            shape: view.shape.to_vec(),
            base: &self.path,
            stored: Stored::Dense(view),
            quantization: None,
        }));
        let place: std::collections::BTreeMap<&str, usize> = files.names().zip(0..).collect();
        tensors.sort_by_key(|tensor| place.get(tensor.name.as_str()).copied());
        Ok(tensors)
    }

    /// Names of the tensors that are parts of packed matrices. One that is stored a second time for a
    /// tied output layer counts.
    pub(crate) fn parts(&self, config: &ModelConfig) -> Result<BTreeSet<String>, ModelError> {
        let mut tensors = self.tensors(config)?;
        if config.tied_embeddings {
            tensors.extend(self.get(&format!("{OUTPUT}.weight"), &[config.vocabulary, config.hidden_size])?);
        }
        Ok(tensors.iter().flat_map(BaseTensor::parts).collect())
    }

    /// The number type that the base's numbers are in: of packed matrices, that which their values are
    /// meant for.
    pub(crate) fn number_type(&self) -> FloatType {
        let Origin::Directory { files, packing: _ } = &self.origin;
        let views = || files.names().filter_map(|name| files.get(name)).filter(|view| view.shape.len() == 2);
        let Some(largest) = views().max_by_key(TensorView::size) else { return FloatType::F32 };
        // Of a packed base the largest tensor has codes. Then config.json says it, or the largest
        // tensor of numbers: an embedding that is not packed, or the scales of one.
        let of_numbers = || views().filter(|view| float_type(view.dtype).is_some()).max_by_key(TensorView::size);
        float_type(largest.dtype)
            .or_else(|| stated_type(&self.path))
            .or_else(|| of_numbers().and_then(|view| float_type(view.dtype)))
            .unwrap_or(FloatType::BF16)
    }
}

impl BaseTensor<'_> {
    /// The file that it is in, or the base if several tensors make it.
    pub(crate) fn path(&self) -> &Path {
        match &self.stored {
            Stored::Dense(view) => view.path(),
            Stored::Packed(_) => self.base,
        }
    }

    /// Whether its file has a few bits of each element.
    pub(crate) fn is_packed_in_file(&self) -> bool {
        matches!(self.stored, Stored::Packed(_))
    }

    /// The number type of its elements in the file; `None` if it is packed there.
    pub(crate) fn dtype(&self) -> Option<Dtype> {
        match &self.stored {
            Stored::Dense(view) => Some(view.dtype),
            Stored::Packed(_) => None,
        }
    }

    /// The tensor as it lies in a safetensors file, if that has all elements and they stay as they are.
    pub(crate) fn view(&self) -> Option<&TensorView<'_>> {
        match &self.stored {
            Stored::Dense(view) if self.quantization.is_none() => Some(view),
            _ => None,
        }
    }

    /// The bytes of all elements in this number type, if the file has them so and they stay as they are.
    ///
    /// # Errors
    /// If the file cannot be read. A number that is not finite is an error if `must_be_finite`.
    pub(crate) fn bytes_in(&self, dtype: Dtype, must_be_finite: bool) -> Result<Option<Vec<u8>>, ModelError> {
        let Some(view) = self.view().filter(|view| view.dtype == dtype) else { return Ok(None) };
        let bytes = view.bytes()?;
        if must_be_finite {
            expect_finite(view, &bytes, 0)?;
        }
        Ok(Some(bytes))
    }

    /// What a packed matrix is packed as, in words.
    pub(crate) fn format(&self) -> Option<String> {
        match (&self.stored, self.quantization) {
            (Stored::Packed(packed), _) => Some(packed.format().to_string()),
            (_, Some(scheme)) => Some(format!("{} while it is loaded", packing::scheme_word(scheme))),
            (Stored::Dense(_), None) => None,
        }
    }

    /// Bytes of a packed matrix in memory; `None` of a dense one.
    pub(crate) fn packed_bytes(&self) -> Option<u64> {
        match (&self.stored, self.quantization) {
            (Stored::Packed(packed), _) => Some(packed.memory()),
            (Stored::Dense(view), Some(scheme)) => Some(packing::quantized_bytes(scheme, view)),
            (Stored::Dense(_), None) => None,
        }
    }

    /// Names of the tensors that make it; none of a dense one.
    pub(crate) fn parts(&self) -> Vec<String> {
        match &self.stored {
            Stored::Packed(packed) => packed.parts().into_iter().map(str::to_owned).collect(),
            Stored::Dense(_) => Vec::new(),
        }
    }

    /// The packed matrix, read or made. `None`: it is dense.
    ///
    /// # Errors
    /// If the file cannot be read, or a number is not finite.
    pub(crate) fn packed(&self) -> Result<Option<PackedMatrix>, ModelError> {
        if let Stored::Packed(packed) = &self.stored {
            return Ok(Some(packed.read()?));
        }
        let (Some(scheme), Some(dtype), &[rows, columns]) = (self.quantization, self.dtype(), self.shape.as_slice())
        else {
            return Ok(None);
        };
        let made = quantize(scheme, &self.stored_values()?, [rows, columns], packing::stored(dtype));
        Ok(Some(made.map_err(|error| error.of(&self.name, Some(self.path())))?))
    }

    /// All elements in f32, decoded if they are packed.
    ///
    /// # Errors
    /// If the file cannot be read, or a number is not finite.
    pub(crate) fn values(&self) -> Result<Vec<f32>, ModelError> {
        match self.packed()? {
            Some(matrix) => Ok(packing::decoded(&matrix)),
            None => self.stored_values(),
        }
    }

    /// All elements in f32 as the file has them.
    fn stored_values(&self) -> Result<Vec<f32>, ModelError> {
        match &self.stored {
            Stored::Dense(view) => to_finite_f32(view),
            Stored::Packed(packed) => Ok(packing::decoded(&packed.read()?)),
        }
    }
}

/// The number type that the numbers of a base are in. Of packed matrices it is that which their values
/// are meant for. f32 if the base has no weights yet.
pub fn stored_type(base: &Path) -> FloatType {
    BaseFiles::read(base).map_or(FloatType::F32, |files| files.number_type())
}

/// Whether a tensor is the weight of a linear layer inside the decoder: a matrix that is neither
/// embedding nor output layer.
pub(crate) fn is_linear(name: &str) -> bool {
    !is_of_vocabulary(module_of(name))
}

/// config.json of a directory as an object.
fn config_object(directory: &Path) -> Result<Map<String, Value>, ModelError> {
    let path = directory.join("config.json");
    let text = read_text(&path, config_json::LIMIT)?;
    serde_json::from_str(&text).map_err(|error| ModelError::Malformed { path, what: error.to_string() })
}

/// The number type that config.json says a model is meant for.
fn stated_type(directory: &Path) -> Option<FloatType> {
    let config = config_object(directory).ok()?;
    match config.get("torch_dtype").or(config.get("dtype"))?.as_str()? {
        "float32" => Some(FloatType::F32),
        "float16" => Some(FloatType::F16),
        "bfloat16" => Some(FloatType::BF16),
        _ => None,
    }
}
