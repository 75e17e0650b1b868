//! The tensors of a decoder, by the names they have in Hugging Face files.

use burn::tensor::Tensor;

use crate::config::ModelConfig;

/// A linear layer, `x Wᵀ + bias`, perhaps with a LoRA branch.
#[derive(Clone, Debug)]
pub(crate) struct Linear {
    /// The module's name, such as `model.layers.0.self_attn.q_proj`.
    pub(crate) name: String,
    /// [o, i]
    pub(crate) weight: Tensor<2>,
    /// [o]
    pub(crate) bias: Option<Tensor<1>>,
    pub(crate) lora: Option<LoraBranch>,
}

/// `scale · drop(x) Aᵀ Bᵀ`
#[derive(Clone, Debug)]
pub(crate) struct LoraBranch {
    /// [r, i]
    pub(crate) a: Tensor<2>,
    /// [o, r]
    pub(crate) b: Tensor<2>,
    /// alpha / r, or alpha / sqrt(r) with rsLoRA.
    pub(crate) scale: f32,
    /// The module's place among all linear layers of the model, which keys its random numbers.
    pub(crate) module: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) input_norm: Tensor<1>,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) q_norm: Option<Tensor<1>>,
    pub(crate) k_norm: Option<Tensor<1>>,
    pub(crate) o: Linear,
    pub(crate) post_norm: Tensor<1>,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    /// How many keys a query sees, all where `None`.
    pub(crate) window: Option<usize>,
}

impl Layer {
    pub(crate) fn linears(&self) -> [&Linear; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }
}

/// All weights. `head` is `None` where the output layer is the embedding.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    /// [v, hidden]
    pub(crate) embedding: Tensor<2>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Tensor<1>,
    /// [v, hidden]
    pub(crate) head: Option<Tensor<2>>,
}

impl Weights {
    /// The output layer's matrix.
    pub(crate) fn output(&self) -> &Tensor<2> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Every base tensor in model order.
    pub(crate) fn visit_mut(&mut self, visitor: &mut dyn FnMut(&str, Slot<'_>)) {
        visitor("model.embed_tokens.weight", Slot::Matrix(&mut self.embedding));
        for (n, layer) in self.layers.iter_mut().enumerate() {
            let prefix = format!("model.layers.{n}");
            visitor(&format!("{prefix}.input_layernorm.weight"), Slot::Vector(&mut layer.input_norm));
            for (norm, name) in [(&mut layer.q_norm, "q_norm"), (&mut layer.k_norm, "k_norm")] {
                if let Some(norm) = norm {
                    visitor(&format!("{prefix}.self_attn.{name}.weight"), Slot::Vector(norm));
                }
            }
            visitor(&format!("{prefix}.post_attention_layernorm.weight"), Slot::Vector(&mut layer.post_norm));
            for linear in layer.linears_mut() {
                visitor(&format!("{}.weight", linear.name), Slot::Matrix(&mut linear.weight));
                if let Some(bias) = &mut linear.bias {
                    visitor(&format!("{}.bias", linear.name), Slot::Vector(bias));
                }
            }
        }
        visitor("model.norm.weight", Slot::Vector(&mut self.norm));
        if let Some(head) = &mut self.head {
            visitor("lm_head.weight", Slot::Matrix(head));
        }
    }
}

/// A tensor of the model that can be put in place.
pub(crate) enum Slot<'a> {
    Vector(&'a mut Tensor<1>),
    Matrix(&'a mut Tensor<2>),
}

/// Name and shape of each tensor that a model of this config has, in model order.
pub fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (query, key) = (config.heads * config.head_dim, config.key_value_heads * config.head_dim);
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![config.vocabulary, hidden])];
    for n in 0..config.layers {
        let mut add = |name: &str, shape: Vec<usize>| tensors.push((format!("model.layers.{n}.{name}"), shape));
        add("input_layernorm.weight", vec![hidden]);
        for (name, rows, columns, bias) in [
            ("q_proj", query, hidden, config.qkv_bias),
            ("k_proj", key, hidden, config.qkv_bias),
            ("v_proj", key, hidden, config.qkv_bias),
            ("o_proj", hidden, query, config.output_bias),
        ] {
            add(&format!("self_attn.{name}.weight"), vec![rows, columns]);
            if bias {
                add(&format!("self_attn.{name}.bias"), vec![rows]);
            }
        }
        if config.query_key_norm {
            add("self_attn.q_norm.weight", vec![config.head_dim]);
            add("self_attn.k_norm.weight", vec![config.head_dim]);
        }
        add("post_attention_layernorm.weight", vec![hidden]);
        add("mlp.gate_proj.weight", vec![inner, hidden]);
        add("mlp.up_proj.weight", vec![inner, hidden]);
        add("mlp.down_proj.weight", vec![hidden, inner]);
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    if !config.tied_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![config.vocabulary, hidden]));
    }
    tensors
}
