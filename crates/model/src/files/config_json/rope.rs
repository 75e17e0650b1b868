//! The rotary embeddings of config.json.

use serde_json::{Map, Value};

use super::Reader;
use crate::config::family::Family;
use crate::config::{Rope, RopeScaling};
use crate::error::ModelError;

impl Reader<'_> {
    /// The rotary embedding of layers that see all keys, then that of layers with a window where they
    /// have their own: from `rope_parameters` (transformers 5), or from `rope_theta`, `rope_scaling` and
    /// `rope_local_base_freq` (hub).
    pub(super) fn ropes(&self, family: &Family, width: usize) -> Result<Vec<Rope>, ModelError> {
        let empty = Map::new();
        // If a file has both, transformers takes the older one.
        let parameters = self.nested("rope_scaling")?.or(self.nested("rope_parameters")?).unwrap_or(&empty);
        let parameters = Reader { object: parameters, path: self.path };
        let Some(window_theta) = family.window_rope_theta else {
            return Ok(vec![self.rope(parameters.object, family.rope_theta, width)?]);
        };
        // With two of them, each kind of layer has its own parameters.
        let of_all = parameters.nested("full_attention")?.unwrap_or(parameters.object);
        let window = parameters.nested("sliding_attention")?;
        let window_theta = self.number_within("rope_local_base_freq", 1.0, 1e15)?.unwrap_or(window_theta);
        let of_window = match window {
            Some(window) => Reader { object: &empty, path: self.path }.rope(window, window_theta, width)?,
            None => Rope { theta: window_theta, scaling: RopeScaling::None, width },
        };
        Ok(vec![self.rope(of_all, family.rope_theta, width)?, of_window])
    }

    /// Theta and scaling, from an object with the scaling.
    fn rope(&self, scaling: &Map<String, Value>, default_theta: f64, width: usize) -> Result<Rope, ModelError> {
        let inner = Reader { object: scaling, path: self.path };
        let theta = |reader: &Reader<'_>| reader.number_within("rope_theta", 1.0, 1e15);
        let theta = theta(&inner)?.or(theta(self)?).unwrap_or(default_theta);
        let partial = inner.number("partial_rotary_factor")?.or(self.number("partial_rotary_factor")?);
        if let Some(partial) = partial.filter(|&factor| factor != 1.0) {
            return Err(self.unsupported("partial_rotary_factor", &partial.to_string()));
        }
        let kind = inner.text("rope_type")?.or(inner.text("type")?).unwrap_or("default");
        let needed = |key: &'static str| -> Result<f64, ModelError> {
            let value = inner.number_within(key, 1e-3, 1e9)?;
            value.ok_or_else(|| self.malformed(&format!("rope scaling of type `{kind}` needs `{key}`")))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
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
            other => return Err(self.unsupported("rope_type", other)),
        };
        Ok(Rope { theta, scaling, width })
    }
}
