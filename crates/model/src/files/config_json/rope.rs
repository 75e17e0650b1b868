//! The rotary embeddings of config.json.

use serde_json::{Map, Value};

use super::Reader;
use crate::config::family::{Family, PartialRotary};
use crate::config::{Growth, Rope, RopeScaling, YarnKeys};
use crate::error::ModelError;

impl Reader<'_> {
    /// The rotary embedding of layers that see all keys, then that of layers with a window where they
    /// have their own: from `rope_parameters` (transformers 5), or from `rope_theta`, `rope_scaling` and
    /// `rope_local_base_freq` (hub).
    /// `width`: elements that turn of a head of layers with a window, `wide`: of a head of the others.
    pub(super) fn ropes(&self, family: &Family, width: usize, wide: usize) -> Result<Vec<Rope>, ModelError> {
        let empty = Map::new();
        // If a file has both, transformers takes the older one.
        let parameters = self.nested("rope_scaling")?.or(self.nested("rope_parameters")?).unwrap_or(&empty);
        let parameters = Reader { object: parameters, path: self.path };
        let of_class: Map<String, Value> = match family.rope_of_class.filter(|_| parameters.object.is_empty()) {
            Some(text) => serde_json::from_str(text).expect("the table of families has an object"),
            None => Map::new(),
        };
        let parameters = match of_class.is_empty() {
            true => parameters,
            false => Reader { object: &of_class, path: self.path },
        };
        let Some(window_theta) = family.window_rope_theta else {
            let rope = self.rope(parameters.object, family.rope_theta, width)?;
            let Some([beta, original]) = family.growth else { return Ok(vec![rope]) };
            let growth = Growth {
                beta: parameters.number_within("llama_4_scaling_beta", 0.0, 1e9)?.unwrap_or(beta),
                original: parameters.number_within("original_max_position_embeddings", 1.0, 1e9)?.unwrap_or(original),
            };
            let of_queries = Rope { growth: Some(growth), ..rope.clone() };
            return Ok(vec![rope, of_queries]);
        };
        // With two of them, each kind of layer has its own parameters.
        let of_all = parameters.nested("full_attention")?.unwrap_or(parameters.object);
        let window = parameters.nested("sliding_attention")?;
        let window_theta = self.number_within("rope_local_base_freq", 1.0, 1e15)?.unwrap_or(window_theta);
        let of_window = match window {
            Some(window) => Reader { object: &empty, path: self.path }.rope(window, window_theta, width)?,
            None => Rope { theta: window_theta, scaling: RopeScaling::None, width, growth: None },
        };
        Ok(vec![self.rope(of_all, family.rope_theta, wide)?, of_window])
    }

    /// How many elements of a head are turned. Families whose class knows no share of them turn all.
    pub(super) fn turned(&self, family: &Family, head_dim: usize) -> Result<usize, ModelError> {
        let key = "partial_rotary_factor";
        let mut stated = self.number(key)?;
        for parameters in ["rope_scaling", "rope_parameters"] {
            if let Some(object) = self.nested(parameters)? {
                stated = Reader { object, path: self.path }.number(key)?.or(stated);
            }
        }
        let default = match family.partial_rotary {
            PartialRotary::All => 1.0,
            PartialRotary::Share(share) => share,
        };
        let partial = stated.unwrap_or(default);
        let turned = (head_dim as f64 * partial) as usize;
        let is_possible = turned >= 2 && turned.is_multiple_of(2) && turned <= head_dim;
        if !is_possible || (family.partial_rotary == PartialRotary::All && partial != 1.0) {
            return Err(self.unsupported(key, &partial.to_string()));
        }
        Ok(turned)
    }

    /// Theta and scaling, from an object with the scaling.
    fn rope(&self, scaling: &Map<String, Value>, default_theta: f64, width: usize) -> Result<Rope, ModelError> {
        let inner = Reader { object: scaling, path: self.path };
        let theta = |reader: &Reader<'_>| reader.number_within("rope_theta", 1.0, 1e15);
        let theta = theta(&inner)?.or(theta(self)?).unwrap_or(default_theta);
        let kind = inner.text("rope_type")?.or(inner.text("type")?).unwrap_or("default");
        let needed = |key: &'static str| -> Result<f64, ModelError> {
            let value = inner.number_within(key, 1e-3, 1e9)?;
            value.ok_or_else(|| self.malformed(&format!("rope scaling of type `{kind}` needs `{key}`")))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "proportional" => {
                let share = inner.number_within("partial_rotary_factor", 0.0, 1.0)?.unwrap_or(1.0);
                let factor = inner.number_within("factor", 1e-3, 1e9)?.unwrap_or(1.0);
                RopeScaling::Proportional { pairs: (share * width as f64 / 2.0).floor() as usize, factor }
            }
            "linear" => RopeScaling::Linear { factor: needed("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor: needed("low_freq_factor")?,
                high_freq_factor: {
                    let (low, high) = (needed("low_freq_factor")?, needed("high_freq_factor")?);
                    if high <= low {
                        return Err(self.malformed("`high_freq_factor` has to be larger than `low_freq_factor`"));
                    }
                    high
                },
                original_max_position_embeddings: {
                    let key = "original_max_position_embeddings";
                    let stated = |reader: &Reader<'_>, key| reader.number_within(key, 1.0, 1e9);
                    let found = stated(self, key)?.or(stated(&inner, key)?);
                    found.or(stated(self, "max_position_embeddings")?).map_or_else(|| needed(key), Ok)?
                },
            },
            // Older files of Phi-3 mean LongRoPE by the other two.
            "longrope" | "su" => self.long(&inner, width)?,
            "yarn" if inner.get("long_factor").is_some() => self.long(&inner, width)?,
            "yarn" => self.yarn(&inner, theta, width, &needed)?,
            other => return Err(self.unsupported("rope_type", other)),
        };
        Ok(Rope { theta, scaling, width, growth: None })
    }

    /// LongRoPE's factors.
    fn long(&self, inner: &Reader<'_>, width: usize) -> Result<RopeScaling, ModelError> {
        let factors = |key: &'static str| -> Result<Vec<f64>, ModelError> {
            let list = inner.get(key).and_then(Value::as_array);
            let numbers = list.and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>());
            let fits = |numbers: &Vec<f64>| {
                numbers.len() == width / 2 && numbers.iter().all(|number| (1e-3..=1e9).contains(number))
            };
            numbers.filter(fits).ok_or_else(|| self.wrong_type(key, &format!("a list of {} factors", width / 2)))
        };
        const ORIGINAL: &str = "original_max_position_embeddings";
        let most = self.optional_size("max_position_embeddings")?;
        // transformers takes the key outside of the scaling first.
        let original = self.optional_size(ORIGINAL)?.or(inner.optional_size(ORIGINAL)?).or(most);
        let original = original.ok_or_else(|| self.malformed(&format!("LongRoPE needs `{ORIGINAL}`")))?;
        let factor = match inner.number_within("factor", 1e-3, 1e9)? {
            Some(factor) => factor,
            None => most.unwrap_or(original) as f64 / original as f64,
        };
        let attention_factor = match inner.number_within("attention_factor", 1e-3, 1e9)? {
            Some(stated) => stated,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        if !attention_factor.is_finite() {
            return Err(self.malformed(&format!("`{ORIGINAL}` = {original} makes no factor of attention")));
        }
        Ok(RopeScaling::Long {
            short: factors("short_factor")?,
            long: factors("long_factor")?,
            original,
            attention_factor,
        })
    }

    /// YaRN's range and factor, as transformers computes them.
    fn yarn(
        &self,
        inner: &Reader<'_>,
        theta: f64,
        width: usize,
        needed: &dyn Fn(&'static str) -> Result<f64, ModelError>,
    ) -> Result<RopeScaling, ModelError> {
        const ORIGINAL: &str = "original_max_position_embeddings";
        let own = inner.number_within(ORIGINAL, 1.0, 1e9)?.or(self.number_within(ORIGINAL, 1.0, 1e9)?);
        let most = self.number_within("max_position_embeddings", 1.0, 1e9)?;
        let original = own.or(most).map_or_else(|| needed(ORIGINAL), Ok)?;
        let factor = match (inner.number_within("factor", 1e-3, 1e9)?, most) {
            (Some(factor), _) => factor,
            (None, Some(most)) => most / original,
            (None, None) => needed("factor")?,
        };
        let number = |key| inner.number_within(key, 0.0, 1e9);
        let given = |value: Option<f64>| value.filter(|&value| value != 0.0);
        let scale = |factor: f64, m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let attention_factor =
            match (number("attention_factor")?, given(number("mscale")?), given(number("mscale_all_dim")?)) {
                (Some(stated), ..) => stated,
                (None, Some(one), Some(all)) => scale(factor, one) / scale(factor, all),
                _ => scale(factor, 1.0),
            };
        // The pair that turns so many times in the original context.
        let pair = |turns: f64| width as f64 * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
        let stated = YarnKeys {
            original,
            beta_fast: given(number("beta_fast")?).unwrap_or(32.0),
            beta_slow: given(number("beta_slow")?).unwrap_or(1.0),
            attention_factor: number("attention_factor")?,
            scale_of_all: given(number("mscale_all_dim")?),
        };
        let (low, high) = (pair(stated.beta_fast), pair(stated.beta_slow));
        let is_whole = inner.flag("truncate")?.unwrap_or(true);
        let (low, high) = if is_whole { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(width as f64 - 1.0));
        let high = if low == high { high + 0.001 } else { high };
        if !(low.is_finite() && high.is_finite()) {
            return Err(self.malformed("`rope_theta` and the rope scaling make no range of wavelengths"));
        }
        Ok(RopeScaling::Yarn { factor, range: [low, high], attention_factor, stated })
    }
}
