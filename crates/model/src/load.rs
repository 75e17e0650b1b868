//! Weights from a Hugging Face directory, or fresh ones.

use std::cell::Cell;
use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use finetune_kernels::FloatType;
use finetune_random::Stream;
use finetune_store::{Dtype, TensorSet, TensorView};
use rayon::prelude::*;

use crate::ModelError;
use crate::config::ModelConfig;
use crate::model::Purpose;
use crate::placement::Placement;
use crate::weights::{Layer, Linear, Weights, expected_tensors};

/// The text of a small file of a model directory; one of more than `limit` bytes is refused unread.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, ModelError> {
    let unreadable = |source| ModelError::Unreadable { path: path.to_owned(), source };
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > limit {
        return Err(ModelError::Malformed {
            path: path.to_owned(),
            what: format!("{size} bytes; at most {limit} are read"),
        });
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

/// The elements of a tensor in f32.
pub(crate) fn to_f32(view: &TensorView<'_>, path: &Path) -> Result<Vec<f32>, ModelError> {
    let pairs = || view.bytes.par_chunks_exact(2).map(|b| [b[0], b[1]]);
    Ok(match view.dtype {
        Dtype::F32 => view.bytes.par_chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F16 => pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
        other => {
            return Err(ModelError::Dtype {
                path: path.to_owned(),
                name: view.name.to_owned(),
                dtype: other.to_string(),
            });
        }
    })
}

/// Rounds f32 values to a file's number type, as bytes.
pub(crate) fn from_f32(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    }
}

/// Checks that the files hold every tensor of the config in its shape, and no other.
pub(crate) fn check(files: &TensorSet, config: &ModelConfig, directory: &Path) -> Result<(), ModelError> {
    let family = config.family.architecture();
    let path = directory.to_owned();
    let expected = expected_tensors(config);
    for (name, shape) in &expected {
        let Some(view) = files.get(name) else {
            return Err(ModelError::MissingTensor { path, name: name.clone(), family });
        };
        if view.shape != shape.as_slice() {
            let (found, expected) = (view.shape.to_vec(), shape.clone());
            return Err(ModelError::Shape { path, name: name.clone(), found, expected });
        }
        if !matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(ModelError::Dtype { path, name: name.clone(), dtype: view.dtype.to_string() });
        }
    }
    let known: std::collections::BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    let extra: Vec<&str> = files
        .names()
        .filter(|name| !known.contains(name))
        // Old exports carry the rotary frequencies; a tied output layer is sometimes stored a second time.
        .filter(|name| !name.ends_with(".rotary_emb.inv_freq"))
        .filter(|name| !(config.tied_embeddings && *name == "lm_head.weight"))
        .collect();
    match extra.as_slice() {
        [] => Ok(()),
        [first, rest @ ..] => {
            let more = if rest.is_empty() { String::new() } else { format!(" (and {} more)", rest.len()) };
            Err(ModelError::ExtraTensor { path, name: (*first).to_owned(), family, more })
        }
    }
}

/// Where the tensors of a model come from.
pub(crate) enum Source<'a> {
    Files {
        files: &'a TensorSet,
        directory: &'a Path,
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
            Source::Files { files, directory } => {
                let view = files.get(name).expect("checked when the files were opened");
                to_f32(&view, directory)?
            }
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
        if let Source::Files { files, .. } = self.source {
            files.release(name);
        }
        tensor
    }

    fn read_matrix(&self, name: &str) -> Result<Tensor<2>, ModelError> {
        let device = &self.placement.device;
        if let Source::Files { files, .. } = self.source {
            let view = files.get(name).expect("checked when the files were opened");
            let stored = float_type(view.dtype).filter(|&stored| self.placement.held(stored) == stored);
            if let Some(stored) = stored {
                // As it lies in the file: no conversion, and nothing in between but the bytes on their way.
                let data = TensorData::from_bytes_vec(
                    files.copy(name).expect("as above"),
                    [view.shape[0], view.shape[1]],
                    stored.dtype(),
                );
                return Ok(Tensor::from_data(data, (device, stored.dtype())));
            }
        }
        let (values, shape) = self.values(name)?;
        let held = match self.source {
            Source::Files { files, .. } => {
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
                Tensor::from_data(TensorData::new(values, shape), (device, held.dtype()))
            }
            FloatType::BF16 => {
                let values: Vec<half::bf16> = values.par_iter().map(|&value| half::bf16::from_f32(value)).collect();
                Tensor::from_data(TensorData::new(values, shape), (device, held.dtype()))
            }
        })
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
