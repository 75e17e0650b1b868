//! The architecture of a model, as far as the forward pass depends on it.

pub(crate) mod family;

use self::family::Family;

/// Rotary position embedding (Su et al. 2021) of the first `width` elements of a head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies (`rope_theta`).
    pub theta: f64,
    /// How the frequencies are stretched.
    pub scaling: RopeScaling,
    /// Elements of a head that are turned.
    pub width: usize,
    /// How turned queries grow with their position; `None`: they keep their length.
    pub growth: Option<Growth>,
}

/// Turned queries are multiplied by `1 + beta · ln(1 + ⌊position / original⌋)` (Llama 4, Ministral 3).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Growth {
    /// `llama_4_scaling_beta`
    pub beta: f64,
    /// The context, in tokens, in which they keep their length.
    pub original: f64,
}

/// How rotary frequencies are stretched for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// They are not stretched.
    None,
    /// All wavelengths are stretched by `factor` (Chen et al. 2023, "Extending context window of
    /// large language models via positional interpolation").
    Linear {
        /// Above 1 for longer contexts.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between
    /// interpolated.
    Llama3 {
        /// How far long wavelengths are stretched.
        factor: f64,
        /// Wavelengths above the original context / this are long.
        low_freq_factor: f64,
        /// Wavelengths below the original context / this are short.
        high_freq_factor: f64,
        /// The context, in tokens, that the model had before.
        original_max_position_embeddings: f64,
    },
    /// The first pairs turn as they would in a head that turns whole, the others do not (Gemma 4).
    Proportional {
        /// Pairs that turn.
        pairs: usize,
        /// All wavelengths are stretched by it.
        factor: f64,
    },
    /// LongRoPE (Ding et al. 2024): the wavelength of each pair is stretched by its own factor, one in rows of
    /// up to `original` tokens and another in longer ones.
    Long {
        /// [width / 2], of short rows.
        short: Vec<f64>,
        /// [width / 2], of long rows.
        long: Vec<f64>,
        /// Tokens of the longest short row.
        original: usize,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
    },
    /// YaRN (Peng et al. 2023): wavelengths of few turns in the original context are stretched by `factor`,
    /// those of many kept, those between interpolated.
    Yarn {
        /// How far long wavelengths are stretched.
        factor: f64,
        /// The number of the first pair that is stretched at all, and of the first that is stretched in
        /// full.
        range: [f64; 2],
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
        /// What these were made of.
        stated: YarnKeys,
    },
}

/// What config.json says of YaRN beside the factor. Files of other programs have it as it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct YarnKeys {
    /// The context, in tokens, that the model had before (`original_max_position_embeddings`).
    pub original: f64,
    /// Wavelengths of more turns in it than this are kept.
    pub beta_fast: f64,
    /// Those of fewer turns than this are stretched in full.
    pub beta_slow: f64,
    /// `attention_factor`, if it is there.
    pub attention_factor: Option<f64>,
    /// `mscale_all_dim`, if it is there and not 0.
    pub scale_of_all: Option<f64>,
}

/// What a gated feed-forward part applies to its gate.
pub use finetune_kernels::Activation;
use finetune_kernels::ExpertWeights;

/// A multimodal model, of which the text model alone is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrapper {
    /// Its class in transformers.
    pub class: String,
    /// Whether transformers' `AutoModelForCausalLM` loads the whole, so that an adapter names modules of
    /// that. Otherwise it loads the text model.
    pub is_loaded_whole: bool,
    /// Whether mlx-lm has the text model alone, under the names of that.
    pub is_text_in_mlx: bool,
}

/// What makes a layer different from the others of its model.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// How many keys a query sees; `None`: all.
    pub window: Option<usize>,
    /// Which of [`ModelConfig::ropes`] turns its queries and keys; `None`: they have no positions.
    pub rope: Option<usize>,
    /// Whether its feed-forward part is a mixture of experts.
    pub has_experts: bool,
    /// What it mixes tokens with.
    pub mixer: MixerKind,
    /// Key/value heads of its attention.
    pub key_value_heads: usize,
    /// Elements of a head of its attention.
    pub head_dim: usize,
    /// Where its attention's values come from.
    pub values: Values,
    /// Elements of a token inside its feed-forward part, if that is dense.
    pub intermediate_size: usize,
}

/// Where the values of a layer's attention come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// A projection of its own.
    Own,
    /// They are its keys, before their norm and positions.
    Keys,
    /// Keys and values are those of an earlier layer, of this number.
    OfLayer(usize),
}

/// Inputs that each layer has of its own, made of the tokens (Gemma 3n, Gemma 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PerLayerConfig {
    /// Elements of a token's input of a layer.
    pub width: usize,
    /// Rows of their embedding. Other tokens have that of token 0.
    pub vocabulary: usize,
}

/// The part of a layer in which tokens see each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MixerKind {
    /// Grouped-query attention.
    Attention,
    /// Attention over compressed keys and values.
    Latent,
    /// A gated delta net.
    Delta,
    /// A short convolution.
    Convolution,
}

/// The short convolutions of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvolutionConfig {
    /// Tokens that one sees, the own one with them.
    pub taps: usize,
    /// Whether it and its projections have biases.
    pub bias: bool,
}

/// Attention whose keys and values are made of a short vector of each token (DeepSeek-AI 2024,
/// "DeepSeek-V2": multi-head latent attention).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentConfig {
    /// Elements of the vector that queries are made of; `None`: they are made of the token itself.
    pub query_rank: Option<usize>,
    /// Elements of the vector that keys and values are made of.
    pub rank: usize,
    /// Elements of a head's queries and keys that do not turn.
    pub plain: usize,
    /// Elements that turn; those of keys are the same for all heads.
    pub turned: usize,
    /// Elements of a head's values.
    pub value: usize,
}

/// The gated delta nets of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeltaConfig {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values, a multiple of those of keys.
    pub value_heads: usize,
    /// Elements of a key head.
    pub key_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// Tokens that the convolution in front sees, the own one with them.
    pub taps: usize,
}

/// More experts than any layer has.
pub(crate) const MOST_EXPERTS: usize = 4096;

/// The experts of a layer that has such.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertsConfig {
    /// How many there are.
    pub count: usize,
    /// How many a token goes through.
    pub choices: usize,
    /// Elements of a token inside an expert.
    pub intermediate_size: usize,
    /// How the router's logits become the weights of the experts' outputs.
    pub weights: ExpertWeights,
    /// How many groups they are in, and how many of those a token chooses its experts from; `None`: they are
    /// in none.
    pub groups: Option<[usize; 2]>,
    /// Elements of a token inside the expert that every token goes through; `None`: there is none.
    pub shared: Option<usize>,
    /// The coefficient of the routers' auxiliary loss that config.json asks for in training; 0: none.
    pub router_loss: f64,
}

/// The architecture, as far as the forward pass depends on it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family, with the defaults of its classes in transformers.
    pub family: &'static Family,
    /// The multimodal model that this is the text model of. `None`: it is a model of its own.
    pub wrapper: Option<Wrapper>,
    /// Elements of a token between layers.
    pub hidden_size: usize,
    /// Elements of a token inside the feed-forward part.
    pub intermediate_size: usize,
    /// The experts, in families with such.
    pub experts: Option<ExpertsConfig>,
    /// The gated delta nets, in families with such.
    pub delta: Option<DeltaConfig>,
    /// The short convolutions, in families with such.
    pub convolution: Option<ConvolutionConfig>,
    /// The latent attention, in families with such.
    pub latent: Option<LatentConfig>,
    /// Inputs that each layer has of its own, in families with such.
    pub per_layer: Option<PerLayerConfig>,
    /// The layers, from the embedding up.
    pub layers: Vec<LayerConfig>,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads, a divisor of the query heads.
    pub key_value_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens of the vocabulary: rows of the embedding.
    pub vocabulary: usize,
    /// What RMS norms add to the mean square.
    pub rms_norm_eps: f64,
    /// The same of norms of what a layer's parts add, where it is another number.
    pub post_norm_eps: Option<f64>,
    /// The rotary embeddings that layers refer to.
    pub ropes: Vec<Rope>,
    /// Whether the output layer is the embedding.
    pub tied_embeddings: bool,
    /// Biases of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub output_bias: bool,
    /// RMS norm of each head's queries and keys (Qwen3, Gemma 3).
    pub query_key_norm: bool,
    /// The factor of attention's scores; 1 / √head_dim in most families.
    pub score_scale: f32,
    /// What embeddings are multiplied by.
    pub embedding_scale: Option<f32>,
    /// What each part adds to the residual stream is multiplied by.
    pub residual_scale: Option<f32>,
    /// What logits are divided by.
    pub logits_divisor: Option<f32>,
    /// What attention's scores are bounded to, by `cap · tanh(score / cap)`.
    pub score_cap: Option<f32>,
    /// The same of logits.
    pub logits_cap: Option<f32>,
    /// Layers behind the last one that predict further tokens, and take no part.
    pub idle_layers: usize,
    /// What the feed-forward part applies to its gate.
    pub activation: Activation,
    /// Tokens of the longest text that the model was made for.
    pub max_position_embeddings: usize,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    /// What a user should know about how config.json and the weights were read.
    pub notices: Vec<String>,
}

impl ModelConfig {
    /// Why the model has no auxiliary loss of its routers, if it has none.
    pub fn no_router_loss(&self) -> Option<String> {
        let name = self.family.architecture;
        let Some(mixture) = self.family.mixture.filter(|_| self.layers.iter().any(|layer| layer.has_experts)) else {
            return Some(format!("no layer of this {name} has experts"));
        };
        match (mixture.has_router_loss, mixture.correction) {
            (true, _) => None,
            (false, Some(_)) => Some(format!(
                "{name} has no such loss in transformers: what balances its routers is the correction of their scores"
            )),
            (false, None) => Some(format!("{name} has no such loss in transformers")),
        }
    }

    /// Whether an adapter names modules inside a multimodal model.
    pub(crate) fn is_named_inside(&self) -> bool {
        self.wrapper.as_ref().is_some_and(|wrapper| wrapper.is_loaded_whole)
    }

    /// Elements of the experts that a token does not go through.
    pub fn idle_parameters(&self) -> u64 {
        let Some(experts) = &self.experts else { return 0 };
        let layers = self.layers.iter().filter(|layer| layer.has_experts).count();
        let of_expert = 3 * self.hidden_size * experts.intermediate_size;
        (layers * (experts.count - experts.choices) * of_expert) as u64
    }

    /// Elements of the table that layers have inputs of their own from: each token takes a row of it.
    pub fn input_table_parameters(&self) -> u64 {
        self.per_layer.as_ref().map_or(0, |inputs| (self.layers.len() * inputs.width * inputs.vocabulary) as u64)
    }

    /// Whether a row of so many tokens has other positions than shorter ones.
    pub fn is_long(&self, tokens: usize) -> bool {
        self.ropes.iter().any(|rope| rope.is_long(tokens))
    }

    /// What to say of a text of this many tokens, if the model was made for shorter ones.
    pub fn length_notice(&self, tokens: usize) -> Option<String> {
        let limit = self.max_position_embeddings;
        (tokens > limit)
            .then(|| format!("{tokens} tokens are more than the {limit} positions that the model was made for"))
    }
}

impl Rope {
    /// Frequencies [width / 2]: `theta^(-2i/width)`, stretched as the scaling says, as short rows have them.
    pub fn frequencies(&self) -> Vec<f32> {
        self.frequencies_of(false)
    }

    /// The same, as rows of a length have them, where that makes a difference.
    pub(crate) fn frequencies_of(&self, is_long: bool) -> Vec<f32> {
        (0..self.width / 2)
            .map(|i| {
                // The exponent and the power are rounded to f32 at the same places as in torch.
                let exponent = (2 * i) as f32 / self.width as f32;
                let power = self.theta.powf(f64::from(exponent)) as f32;
                self.scaling.stretch(i, power, is_long)
            })
            .collect()
    }

    /// Whether a row of so many tokens has the frequencies of long rows.
    pub(crate) fn is_long(&self, tokens: usize) -> bool {
        matches!(self.scaling, RopeScaling::Long { original, .. } if tokens > original)
    }

    /// What cosines and sines of a position are multiplied by.
    pub fn factor(&self, position: u32) -> f32 {
        let scale = match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Long { attention_factor, .. } => {
                attention_factor as f32
            }
            _ => 1.0,
        };
        match self.growth {
            None => scale,
            Some(Growth { beta, original }) => {
                scale * (1.0 + beta as f32 * (1.0 + (position as f32 / original as f32).floor()).ln())
            }
        }
    }
}

impl RopeScaling {
    /// The frequency of pair `pair`, in radians per token, stretched. `power`: what it is the reciprocal of.
    fn stretch(&self, pair: usize, power: f32, is_long: bool) -> f32 {
        let frequency = 1.0 / power;
        match *self {
            RopeScaling::Proportional { pairs, factor } => {
                if pair < pairs {
                    frequency / factor as f32
                } else {
                    0.0
                }
            }
            RopeScaling::Long { ref short, ref long, .. } => {
                1.0 / (if is_long { long } else { short }[pair] as f32 * power)
            }
            RopeScaling::Yarn { factor, range: [low, high], .. } => {
                let ramp = ((pair as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let (stretched, kept) = (1.0 / (factor as f32 * power), 1.0 - ramp);
                stretched * (1.0 - kept) + frequency * kept
            }
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor as f32,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let wavelength = std::f32::consts::TAU / frequency;
                let original = original_max_position_embeddings as f32;
                let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
                if wavelength > original / low {
                    frequency / factor as f32
                } else if wavelength < original / high {
                    frequency
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            }
        }
    }
}
