//! Weights from a Hugging Face directory, or fresh ones.

use std::cell::Cell;
use std::io::Read;
use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use finetune_kernels::FloatType;
use finetune_random::Stream;
use finetune_store::{Dtype, START_BYTES, StandIn, StoreError, TensorSet, TensorView};
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::error::list;
use crate::finite::expect_finite;
use crate::model::Purpose;
use crate::placement::Placement;
use crate::weights::{Layer, Linear, Weights, expected_tensors};
use crate::{ModelError, extra};

/// The text of a small file of a model directory; one of more than `limit` bytes is refused unread.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let bytes = read_bounded(path, limit)?;
    if let Some(what) = StandIn::of(&bytes[..bytes.len().min(START_BYTES as usize)]) {
        return Err(StoreError::InItsPlace { path: path.to_owned(), what }.into());
    }
    String::from_utf8(bytes)
        .map_err(|_| ModelError::Malformed { path: path.to_owned(), what: "it is not UTF-8".to_owned() })
}

/// The bytes of a file of at most `limit` of them.
pub(crate) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    let unreadable = |source| ModelError::Unreadable { path: path.to_owned(), source };
    let malformed = |what: String| ModelError::Malformed { path: path.to_owned(), what };
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if metadata.is_dir() {
        return Err(malformed("it is a directory".to_owned()));
    }
    if metadata.len() > limit {
        return Err(malformed(format!("{} bytes; at most {limit} are read", metadata.len())));
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    // A file without a length, such as a device, is not read for ever.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > limit {
        return Err(malformed(format!("more than {limit} bytes")));
    }
    Ok(bytes)
}

/// The elements of a tensor in f32, whatever they are.
pub(crate) fn to_f32(view: &TensorView<'_>) -> Result<Vec<f32>, ModelError> {
    read_f32(view, |_, _| Ok(()))
}

/// The elements of a tensor in f32; one that is not finite is an error.
pub(crate) fn to_finite_f32(view: &TensorView<'_>) -> Result<Vec<f32>, ModelError> {
    read_f32(view, |bytes, start| expect_finite(view, bytes, start))
}

/// Piece by piece, so that the file's bytes and the numbers are never there both as a whole. `check` sees each piece, and
/// the number of its first element.
fn read_f32(
    view: &TensorView<'_>,
    check: impl Fn(&[u8], usize) -> Result<(), ModelError>,
) -> Result<Vec<f32>, ModelError> {
    let Some(kind) = float_type(view.dtype) else {
        return Err(ModelError::Dtype {
            path: view.path().to_owned(),
            name: view.name.to_owned(),
            dtype: view.dtype.to_string(),
        });
    };
    let mut values: Vec<f32> = Vec::with_capacity(view.size() / view.dtype.size());
    view.pieces(|piece| -> Result<(), ModelError> {
        check(piece, values.len())?;
        let pairs = || piece.par_chunks_exact(2).map(|b| [b[0], b[1]]);
        match kind {
            FloatType::F32 => {
                values.par_extend(piece.par_chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            }
            FloatType::BF16 => values.par_extend(pairs().map(|b| half::bf16::from_le_bytes(b).to_f32())),
            FloatType::F16 => values.par_extend(pairs().map(|b| half::f16::from_le_bytes(b).to_f32())),
        }
        Ok(())
    })?;
    Ok(values)
}

/// Rounds f32 values to a file's number type, as bytes.
pub(crate) fn from_f32(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// Checks that the files hold every tensor of the config in its shape, and none that would be missed. Returns what a user should
/// know about the others.
pub(crate) fn check(files: &TensorSet, config: &ModelConfig, directory: &Path) -> Result<Vec<String>, ModelError> {
    let family = config.family.architecture();
    let path = directory.to_owned();
    for (name, shape) in expected_tensors(config) {
        let Some(view) = files.get(&name) else {
            return Err(ModelError::MissingTensor { path, name, family });
        };
        if view.shape != shape.as_slice() {
            return Err(ModelError::Shape { path, name, found: view.shape.to_vec(), expected: shape });
        }
        if float_type(view.dtype).is_none() {
            return Err(ModelError::Dtype { path, name, dtype: view.dtype.to_string() });
        }
    }
    let mut notices = Vec::new();
    let unused = extra::passed_over(files, config, directory)?;
    if !unused.is_empty() {
        let names = list(&unused);
        notices.push(format!("{}: passed over, as no part of {family} uses them: {names}", path.display()));
    }
    if !files.unlisted().is_empty() {
        let names = list(files.unlisted());
        notices.push(format!("{}: the index of the weights leaves out {names}; the shards have them", path.display()));
    }
    Ok(notices)
}

/// Whether the files have an output layer of their own beside the embedding, with other values: then transformers ties the
/// two no more, whatever config.json says (since 5.8).
pub(crate) fn has_other_head(directory: &Path) -> Result<bool, ModelError> {
    // What is wrong with the files is said where they are loaded; there may be none yet.
    let Ok(files) = TensorSet::open_model(directory) else { return Ok(false) };
    let (head, embedding) = (files.get("lm_head.weight"), files.get("model.embed_tokens.weight"));
    let (Some(head), Some(embedding)) = (head, embedding) else { return Ok(false) };
    Ok(head.shape != embedding.shape || !same_values(&head, &embedding)?)
}

fn same_values(a: &TensorView<'_>, b: &TensorView<'_>) -> Result<bool, ModelError> {
    if a.dtype == b.dtype && hash(a)? == hash(b)? {
        return Ok(true);
    }
    if float_type(a.dtype).is_none() || float_type(b.dtype).is_none() {
        return Ok(false);
    }
    // Rarely reached: the same numbers in two types, or zeros of two signs.
    Ok(to_f32(a)? == to_f32(b)?)
}

fn hash(view: &TensorView<'_>) -> Result<blake3::Hash, ModelError> {
    let mut hasher = blake3::Hasher::new();
    view.pieces(|piece| -> Result<(), ModelError> {
        hasher.update_rayon(piece);
        Ok(())
    })?;
    Ok(hasher.finalize())
}

/// Where the tensors of a model come from.
pub(crate) enum Source<'a> {
    Files {
        files: &'a TensorSet,
    },
    /// transformers' initialization: normal weights of the config's `initializer_range`, norms 1, biases 0.
    Fresh {
        seed: u64,
    },
}

/// All weights on the device: vectors in f32, matrices as the placement says. A tensor at a time is read from its file and
/// handed over, so there is never a second copy of more than one.
pub(crate) fn weights(config: &ModelConfig, source: &Source<'_>, placement: &Placement) -> Result<Weights, ModelError> {
    let loader = Loader { config, source, placement, order: expected_tensors(config), on_the_way: Cell::new(0) };
    let layers = (0..config.layers).map(|n| loader.layer(n)).collect::<Result<_, _>>()?;
    Ok(Weights {
        embedding: loader.matrix("model.embed_tokens.weight")?,
        layers,
        norm: loader.vector("model.norm.weight")?,
        head: if config.tied_embeddings { None } else { Some(loader.matrix("lm_head.weight")?) },
    })
}

struct Loader<'a> {
    config: &'a ModelConfig,
    source: &'a Source<'a>,
    placement: &'a Placement,
    order: Vec<(String, Vec<usize>)>,
    /// Elements handed to the device since it was last waited for.
    on_the_way: Cell<usize>,
}

const MOST_ON_THE_WAY: usize = 128 << 20;

impl Loader<'_> {
    fn layer(&self, n: usize) -> Result<Layer, ModelError> {
        let name = |part: &str| format!("model.layers.{n}.{part}");
        let norm = |part: &str| self.vector(&name(&format!("{part}.weight")));
        let linear = |part: &str, bias: bool| -> Result<Linear, ModelError> {
            let name = name(part);
            Ok(Linear {
                weight: self.matrix(&format!("{name}.weight"))?,
                bias: if bias { Some(self.vector(&format!("{name}.bias"))?) } else { None },
                name,
                lora: None,
            })
        };
        let head_norm = |part: &str| if self.config.query_key_norm { norm(part).map(Some) } else { Ok(None) };
        let qkv_bias = self.config.qkv_bias;
        Ok(Layer {
            input_norm: norm("input_layernorm")?,
            q: linear("self_attn.q_proj", qkv_bias)?,
            k: linear("self_attn.k_proj", qkv_bias)?,
            v: linear("self_attn.v_proj", qkv_bias)?,
            q_norm: head_norm("self_attn.q_norm")?,
            k_norm: head_norm("self_attn.k_norm")?,
            o: linear("self_attn.o_proj", self.config.output_bias)?,
            post_norm: norm("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj", false)?,
            up: linear("mlp.up_proj", false)?,
            down: linear("mlp.down_proj", false)?,
            window: self.config.windows[n],
        })
    }

    /// The tensor in f32, and its shape.
    fn values(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>), ModelError> {
        let index = self.order.iter().position(|(known, _)| known == name).expect("a tensor of the config");
        let shape = self.order[index].1.clone();
        let values = match self.source {
            Source::Files { files } => to_finite_f32(&files.get(name).expect("checked when the files were opened"))?,
            Source::Fresh { seed } => {
                let len = shape.iter().product();
                match (shape.len(), name.ends_with(".bias")) {
                    (1, true) => vec![0.0; len],
                    (1, false) => vec![1.0; len],
                    _ => Stream::new(*seed, Purpose::Weights as u32, 0, index as u32)
                        .normal(len, self.config.initializer_range as f32),
                }
            }
        };
        Ok((values, shape))
    }

    fn matrix(&self, name: &str) -> Result<Tensor<2>, ModelError> {
        let tensor = self.read_matrix(name);
        if let Ok(tensor) = &tensor {
            // What is on its way to a GPU lies in buffers of its own until it is there.
            self.on_the_way.set(self.on_the_way.get() + tensor.dims().iter().product::<usize>());
            if self.on_the_way.get() > MOST_ON_THE_WAY {
                self.on_the_way.set(0);
                let _ = self.placement.device.sync();
            }
        }
        tensor
    }

    fn read_matrix(&self, name: &str) -> Result<Tensor<2>, ModelError> {
        let device = &self.placement.device;
        if let Source::Files { files } = self.source {
            let view = files.get(name).expect("checked when the files were opened");
            let stored = float_type(view.dtype).filter(|&stored| self.placement.held(stored) == stored);
            if let Some(stored) = stored {
                // As it lies in the file: no conversion, and nothing in between but the bytes on their way.
                let bytes = view.bytes()?;
                expect_finite(&view, &bytes, 0)?;
                let data = TensorData::from_bytes_vec(bytes, [view.shape[0], view.shape[1]], stored.dtype());
                return Ok(Tensor::from_data(data, (device, stored.dtype())));
            }
        }
        let (values, shape) = self.values(name)?;
        let held = match self.source {
            Source::Files { files } => {
                let stored = files.get(name).and_then(|view| float_type(view.dtype)).unwrap_or(FloatType::F32);
                self.placement.held(stored)
            }
            // Fresh weights are trained, and what is trained is f32.
            Source::Fresh { .. } => FloatType::F32,
        };
        let shape = [shape[0], shape[1]];
        Ok(match held {
            FloatType::F32 => Tensor::from_data(TensorData::new(values, shape), device),
            FloatType::F16 => {
                let values: Vec<half::f16> = values.par_iter().map(|&value| half::f16::from_f32(value)).collect();
                self.expect_in_range(name, "f16", values.par_iter().position_first(|value| !value.is_finite()))?;
                Tensor::from_data(TensorData::new(values, shape), (device, held.dtype()))
            }
            FloatType::BF16 => {
                let values: Vec<half::bf16> = values.par_iter().map(|&value| half::bf16::from_f32(value)).collect();
                self.expect_in_range(name, "bf16", values.par_iter().position_first(|value| !value.is_finite()))?;
                Tensor::from_data(TensorData::new(values, shape), (device, held.dtype()))
            }
        })
    }

    /// An error where a finite number became infinite when it was rounded.
    fn expect_in_range(&self, name: &str, kind: &str, element: Option<usize>) -> Result<(), ModelError> {
        let (Some(element), Source::Files { files }) = (element, self.source) else { return Ok(()) };
        let path = files.get(name).map(|view| view.path().to_owned()).unwrap_or_default();
        Err(ModelError::NotFinite { path, name: name.to_owned(), element, after: format!(" once rounded to {kind}") })
    }

    fn vector(&self, name: &str) -> Result<Tensor<1>, ModelError> {
        let (values, shape) = self.values(name)?;
        Ok(Tensor::from_data(TensorData::new(values, [shape[0]]), &self.placement.device))
    }
}

/// The number type of a file's tensor; `None` where weights are never held in it.
pub fn float_type(dtype: Dtype) -> Option<FloatType> {
    match dtype {
        Dtype::F32 => Some(FloatType::F32),
        Dtype::F16 => Some(FloatType::F16),
        Dtype::BF16 => Some(FloatType::BF16),
        _ => None,
    }
}
