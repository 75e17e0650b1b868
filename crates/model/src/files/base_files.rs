//! The files of a base: the one thing that opens them. It says of each tensor whether the files have
//! all of its elements or a few bits of each, and packs matrices while they are read if it is asked to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use finetune_kernels::FloatType;
use finetune_packed::files::{PackedConfig, PackedTensor, find};
use finetune_packed::{Scheme, applies};
use finetune_store::{FileReader, OpenedFile, TensorSet, TensorView};
use serde_json::{Map, Value};

use crate::adaptation::{is_of_vocabulary, is_router, module_of};
use crate::branch::{EMBEDDING, OUTPUT};
use crate::config::ModelConfig;
use crate::config::family::{ExpertLayout, FAMILIES, Family};
use crate::error::ModelError;
use crate::files::by_row::PER_LAYER_TABLE;
use crate::files::config_json;
use crate::files::floats::float_type;
use crate::files::load;
use crate::files::packing;
use crate::files::stacked;
use crate::files::taking_turns::{OfStack, Slices};
use crate::files::text::read_text;
use crate::files::wrapper;
use crate::gguf::read::{GgufBase, GgufStored};
use crate::layer_source::DiskProgress;
use crate::slice::Cut;
use crate::tree::expected_tensors;

mod names;
mod of_heads;
mod of_rows;
mod other_parts;
mod tensor;

pub(crate) use self::names::Names;
use self::of_heads::OfHeads;
use self::of_rows::OfRows;

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
    Directory {
        files: Box<TensorSet>,
        /// The same with the names that all tensors have in the files, if parts beside the text model may be packed.
        as_named: Option<Box<TensorSet>>,
        packing: Box<PackedConfig>,
        family: &'static Family,
        slices: Slices,
        /// Whether 1 was added to the weights of the norms that add it.
        has_one_in_norms: bool,
    },
    /// In a GGUF file.
    Gguf(Box<GgufBase>),
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
    /// The part of a matrix that is read. `None`: all of it.
    cut: Option<Cut>,
}

/// How a tensor lies in the files.
enum Stored<'a> {
    /// All elements.
    Dense(TensorView<'a>),
    /// All elements of a norm, to which 1 was added.
    WithOne(TensorView<'a>),
    /// A few bits of each element.
    Packed(PackedTensor<'a>),
    /// Either of them, in a stack of all experts that is written as it is read.
    OfStack(OfStack<'a>),
    /// What such a stack has of one expert, if the stack is written anew.
    OfExpert(OfExpert<'a>),
    /// Either of them, in mlx-lm's matrices of heads.
    OfHeads(OfHeads<'a>),
    /// Either of them, in mlx-lm's parts of a matrix.
    OfRows(OfRows<'a>),
    /// Either of them, in a GGUF file.
    Gguf(&'a GgufBase, GgufStored),
}

/// What a stack has of one expert, of the model's matrices that it is made of.
struct OfExpert<'a> {
    /// The stack without the endings of packed parts, such as `model.layers.0.mlp.experts.down_proj`.
    stack: String,
    /// Experts of the stack.
    experts: usize,
    parts: Vec<BaseTensor<'a>>,
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
        if let Some(base) = GgufBase::open(path)? {
            return Ok(BaseFiles { path: path.to_owned(), origin: Origin::Gguf(Box::new(base)), quantization: None });
        }
        let config = path.join("config.json");
        let object = config_object(path)?;
        let text = wrapper::text_config(&object).map(|(_, text)| text);
        let packing = Box::new(packing_of(&object, text.as_ref(), &config)?);
        let model_type = text.as_ref().unwrap_or(&object).get("model_type").and_then(Value::as_str);
        // A model that is of no known family has been refused, or will be.
        let family = Family::of_model(model_type).unwrap_or(&FAMILIES[0]);
        let files = TensorSet::open_model(path)?;
        let has_one_in_norms = stacked::has_one_in_norms(&files, family);
        let files = Box::new(files.split_by(|view| stacked::read_as(view, text.is_some(), family)));
        let as_named = other_parts::as_named(path, &files)?;
        let slices = Slices::default();
        let origin = Origin::Directory { files, as_named, packing, family, slices, has_one_in_norms };
        Ok(BaseFiles { path: path.to_owned(), origin, quantization: None })
    }

    /// The path of the base, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads large tensors past the system's cache from now on, if the files take more than half of `memory` bytes.
    /// Such a cache keeps nothing of them until they are read again. What is smaller stays in it: memory is faster
    /// than any disk.
    pub(crate) fn pass_cache_of(&mut self, memory: u64) {
        if self.length() <= memory / 2 {
            return;
        }
        match &mut self.origin {
            Origin::Directory { files, .. } => files.pass_cache(),
            Origin::Gguf(base) => base.pass_cache(),
        }
    }

    /// Bytes of all files, with those of which only the header is here.
    pub(crate) fn length(&self) -> u64 {
        match &self.origin {
            Origin::Directory { files, .. } => files.length(),
            Origin::Gguf(base) => base.length(),
        }
    }

    /// The files that are here, as they were when they were opened.
    pub(crate) fn opened(&self) -> Vec<OpenedFile> {
        match &self.origin {
            Origin::Directory { files, .. } => files.opened().cloned().collect(),
            Origin::Gguf(base) => base.opened().cloned().collect(),
        }
    }

    /// What its files say of their reads.
    pub(crate) fn reading(&self) -> DiskProgress {
        let mut reading = DiskProgress::default();
        let mut look = |reader: &FileReader| {
            reading.bytes += reader.bytes_read();
            if reader.is_reading() {
                reading.files.insert(reader.opened().path().to_owned());
            }
        };
        match &self.origin {
            Origin::Directory { files, .. } => files.readers().for_each(&mut look),
            Origin::Gguf(base) => base.readers().for_each(&mut look),
        }
        reading
    }

    /// The safetensors files, if the base has such.
    pub(crate) fn safetensors(&self) -> Option<&TensorSet> {
        match &self.origin {
            Origin::Directory { files, .. } => Some(files),
            Origin::Gguf(_) => None,
        }
    }

    /// The tensor of this name. `None`: the files have none.
    ///
    /// # Errors
    /// If it has another shape, a number type that weights are not held in, or parts that do not make
    /// a packed matrix.
    pub(crate) fn get(&self, name: &str, shape: &[usize]) -> Result<Option<BaseTensor<'_>>, ModelError> {
        let Some(stored) = self.stored(name, shape)? else { return Ok(None) };
        let quantization = self.quantization.filter(|_| !stored.is_packed());
        let quantization = quantization.filter(|scheme| packs_while_read(*scheme, name, shape));
        let (name, shape) = (name.to_owned(), shape.to_vec());
        Ok(Some(BaseTensor { name, shape, base: &self.path, stored, quantization, cut: None }))
    }

    /// How the tensor of this name lies in the files.
    fn stored(&self, name: &str, shape: &[usize]) -> Result<Option<Stored<'_>>, ModelError> {
        let wrong_shape = |found: &[usize]| {
            let (path, name) = (self.path.clone(), name.to_owned());
            Err(ModelError::Shape { path, name, found: found.to_vec(), expected: shape.to_vec() })
        };
        let (files, packing, family, slices, has_one_in_norms) = match &self.origin {
            Origin::Directory { files, packing, family, slices, has_one_in_norms, .. } => {
                (files, packing, family, slices, *has_one_in_norms)
            }
            Origin::Gguf(base) => {
                let Some(stored) = base.stored(name) else { return Ok(None) };
                let found = match &stored {
                    GgufStored::Dense(_, found) => found.clone(),
                    GgufStored::Packed { shape: found, .. } => found.to_vec(),
                };
                return if found == shape { Ok(Some(Stored::Gguf(base, stored))) } else { wrong_shape(&found) };
            }
        };
        if family.expert_layout() == ExpertLayout::TakingTurns
            && let Some(of_stack) = OfStack::find(files, slices, name, shape)?
        {
            return Ok(Some(Stored::OfStack(of_stack)));
        }
        if let [rows, columns] = *shape
            && let Some(packed) = find(files, packing, name, [rows, columns])?
        {
            return Ok(Some(Stored::Packed(packed)));
        }
        let Some(view) = files.get(name) else {
            let of_heads = OfHeads::find(self, name, shape)?.map(Stored::OfHeads);
            return of_heads
                .map_or_else(|| Ok(OfRows::find(self, name, shape)?.map(Stored::OfRows)), |made| Ok(Some(made)));
        };
        if view.shape != shape {
            return wrong_shape(view.shape);
        }
        if float_type(view.dtype).is_none() {
            let (path, name) = (self.path.clone(), name.to_owned());
            return Err(ModelError::Dtype { path, name, dtype: view.dtype.to_string() });
        }
        let is_with_one = has_one_in_norms && family.adds_one_to(name);
        Ok(Some(if is_with_one { Stored::WithOne(view) } else { Stored::Dense(view) }))
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

    /// Whether a matrix of the model is packed in the files.
    ///
    /// # Errors
    /// As [`BaseFiles::tensor`].
    pub(crate) fn is_packed(&self, config: &ModelConfig) -> Result<bool, ModelError> {
        Ok(self.tensors(config)?.iter().any(BaseTensor::is_packed_in_file))
    }

    /// Every tensor of the model, and those of the files that no part of it uses, in the order of the
    /// files. Of a packed base there are the former, stacks of experts and the other parts of a multimodal model
    /// only: others may be parts of packed matrices.
    ///
    /// Stacks of experts that are written as they are read count as tensors that no part of the model uses.
    /// `opens_stacks`: of their matrices there is a tensor [i, o] for each expert instead.
    pub(crate) fn tensors_of_files(
        &self,
        config: &ModelConfig,
        opens_stacks: bool,
    ) -> Result<Vec<BaseTensor<'_>>, ModelError> {
        let (mut of_stacks, mut tensors): (Vec<_>, Vec<_>) =
            self.tensors(config)?.into_iter().partition(BaseTensor::is_of_stack);
        let is_packed = tensors.iter().any(BaseTensor::is_packed_in_file);
        let all_of_stacks: BTreeSet<String> = of_stacks.iter().flat_map(BaseTensor::parts).collect();
        of_stacks.retain(|tensor| opens_stacks && tensor.shape.len() == 2);
        let opened: BTreeSet<String> = of_stacks.iter().flat_map(BaseTensor::parts).collect();
        tensors.extend(of_experts(of_stacks));
        let Some(files) = self.safetensors() else { return Ok(tensors) };
        let names = |tensor: &BaseTensor<'_>| std::iter::once(tensor.name.clone()).chain(tensor.parts());
        let known: BTreeSet<String> = tensors.iter().flat_map(names).collect();
        // Of a base with packed matrices, what is not computed with may be a part of one: only stacks stay.
        let stays = |name: &str| !is_packed || all_of_stacks.contains(name);
        let is_other = |name: &&str| !known.contains(*name) && !opened.contains(*name) && stays(name);
        let others = files.names().filter(is_other).filter_map(|name| files.get(name));
        let others = others.chain(files.left_out().filter(|_| !is_packed));
        tensors.extend(others.map(|view| BaseTensor {
            name: view.name.to_owned(),
            shape: view.shape.to_vec(),
            base: &self.path,
            stored: Stored::Dense(view),
            quantization: None,
            cut: None,
        }));
        if is_packed {
            if config.wrapper.is_some() {
                tensors.extend(self.other_parts()?);
            }
            return Ok(tensors);
        }
        let place: BTreeMap<&str, usize> = files.names().zip(0..).collect();
        tensors.sort_by_key(|tensor| place.get(tensor.name_in_file()).copied());
        Ok(tensors)
    }

    /// Whether config.json says that mlx-lm or mlx-vlm packed it.
    pub(crate) fn is_of_mlx(&self) -> bool {
        matches!(&self.origin, Origin::Directory { packing, .. } if packing.is_mlx())
    }

    /// Whether it is a GGUF file.
    pub(crate) fn is_gguf(&self) -> bool {
        matches!(self.origin, Origin::Gguf(_))
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
        let Some(files) = self.safetensors() else { return self.number_type_of_gguf() };
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

    /// As [`BaseFiles::number_type`]. What a packed GGUF file was made from is not in it, and bf16 is
    /// what most models are trained in.
    fn number_type_of_gguf(&self) -> FloatType {
        let Origin::Gguf(base) = &self.origin else { return FloatType::F32 };
        let embedding = format!("{EMBEDDING}.weight");
        // Small matrices stay in f32 in packed files.
        let is_small = |name: &str| is_router(module_of(name)) || name.contains(".linear_attn.in_proj_");
        let names = base.names().into_iter().filter(|name| *name != embedding && !is_small(name));
        let mut stored = names.map(|name| base.stored(&name));
        let matrix = stored.find_map(|stored| match stored? {
            GgufStored::Dense(kind, shape) => (shape.len() == 2).then_some(kind),
            GgufStored::Packed { .. } => Some(FloatType::BF16),
        });
        matrix.unwrap_or(FloatType::F32)
    }
}

/// What stacks have of each expert, stack by stack, of the model's matrices that are read from them.
fn of_experts<'a>(of_stacks: Vec<BaseTensor<'a>>) -> Vec<BaseTensor<'a>> {
    let mut parts: BTreeMap<(String, usize), Vec<BaseTensor<'a>>> = BTreeMap::new();
    for tensor in of_stacks {
        if let Stored::OfStack(of_stack) = &tensor.stored {
            parts.entry((of_stack.matrix().to_owned(), of_stack.expert())).or_default().push(tensor);
        }
    }
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    parts.keys().for_each(|(stack, _)| *counts.entry(stack.clone()).or_default() += 1);
    let of_expert = |((stack, expert), parts): ((String, usize), Vec<BaseTensor<'a>>)| {
        let first = parts.first()?;
        let (base, inputs, outputs) = (first.base, first.shape[1], parts.iter().map(|part| part.shape[0]).sum());
        let (experts, part) = stack.rsplit_once('.')?;
        let (name, experts) = (format!("{experts}.{expert}.{part}.weight"), counts[&stack]);
        let stored = Stored::OfExpert(OfExpert { stack, experts, parts });
        Some(BaseTensor { name, shape: vec![inputs, outputs], base, stored, quantization: None, cut: None })
    };
    parts.into_iter().filter_map(of_expert).collect()
}

/// The number type that the numbers of a base are in. Of packed matrices it is that which their values
/// are meant for. f32 if the base has no weights yet.
pub fn stored_type(base: &Path) -> FloatType {
    BaseFiles::read(base).map_or(FloatType::F32, |files| files.number_type())
}

/// Whether a tensor that is dense in its file is packed while it is read in this form.
pub(crate) fn packs_while_read(scheme: Scheme, name: &str, shape: &[usize]) -> bool {
    // Routers are small, and which experts they choose is sensitive.
    let stays = chooses_experts(name)
        // It is read by row.
        || name == PER_LAYER_TABLE;
    match *shape {
        [rows, columns] => !stays && applies(scheme, [rows, columns], is_linear(name)),
        _ => false,
    }
}

/// Whether a matrix chooses among experts, Gemma 4's too.
pub(crate) fn chooses_experts(name: &str) -> bool {
    is_router(module_of(name)) || name.ends_with(".router.proj.weight")
}

/// Whether a tensor is the weight of a linear layer inside the decoder: a matrix that is neither
/// embedding nor output layer.
pub(crate) fn is_linear(name: &str) -> bool {
    !is_of_vocabulary(module_of(name))
}

/// config.json of a directory as an object.
pub(crate) fn config_object(directory: &Path) -> Result<Map<String, Value>, ModelError> {
    let path = directory.join("config.json");
    let text = read_text(&path, config_json::LIMIT)?;
    serde_json::from_str(&text).map_err(|error| ModelError::Malformed { path, what: error.to_string() })
}

/// What config.json says of packed weights. `text`: the part that is of the text model in a multimodal one.
pub(crate) fn packing_of(
    whole: &Map<String, Value>,
    text: Option<&Map<String, Value>>,
    path: &Path,
) -> Result<PackedConfig, ModelError> {
    // Either the whole or the text model in it says it.
    let packing = PackedConfig::parse(whole, path)?;
    Ok(match text {
        Some(text) if !packing.is_packed() => PackedConfig::parse(text, path)?,
        _ => packing,
    })
}

/// The number type that config.json says a model is meant for.
pub fn stated_type(directory: &Path) -> Option<FloatType> {
    let config = config_object(directory).ok()?;
    let of = |object: &Map<String, Value>| object.get("torch_dtype").or(object.get("dtype")).cloned();
    let text = || config.get("text_config").and_then(Value::as_object);
    match of(&config).or_else(|| of(text()?))?.as_str()? {
        "float32" => Some(FloatType::F32),
        "float16" => Some(FloatType::F16),
        "bfloat16" => Some(FloatType::BF16),
        _ => None,
    }
}
