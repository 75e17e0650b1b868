//! The keys of config.json that only Gemma 4 has: heads of layers that see all keys, keys and values that
//! layers share, inputs of each layer.

use serde_json::Value;

use super::Reader;
use crate::config::family::Family;
use crate::config::{LayerConfig, PerLayerConfig, Values};
use crate::error::ModelError;

impl Reader<'_> {
    /// Elements of a head of layers that see all keys, where they have heads of their own.
    pub(super) fn wide_head(&self, family: &Family) -> Result<Option<usize>, ModelError> {
        let Some(default) = family.wide_heads else { return Ok(None) };
        let of_layers = self.of_layers("head_dim")?;
        let stated = self.optional_size("global_head_dim")?.or(of_layers.first().map(|(_, size)| *size));
        let width = stated.unwrap_or(default);
        if of_layers.iter().any(|(_, size)| *size != width) {
            return Err(self.malformed("`per_layer_config` has heads of several widths"));
        }
        if width > 4096 || !width.is_multiple_of(2) {
            return Err(self.malformed(&format!("`global_head_dim` = {width} is odd or beyond 4096")));
        }
        Ok(Some(width))
    }

    /// What `per_layer_config` says of a key, layer by layer: (layer, value). transformers 5 writes it, with
    /// numbers of layers as texts, filled up with zeros.
    fn of_layers(&self, key: &str) -> Result<Vec<(usize, usize)>, ModelError> {
        let Some(layers) = self.nested("per_layer_config")? else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for (number, object) in layers {
            let wrong = || self.malformed("`per_layer_config` should have an object for each number of a layer");
            let number: usize = number.parse().map_err(|_| wrong())?;
            let object = object.as_object().ok_or_else(wrong)?;
            found.extend(Reader { object, path: self.path }.optional_size(key)?.map(|size| (number, size)));
        }
        Ok(found)
    }

    /// Gives layers the heads, values and widths that they have of their own. The last layer always sees all
    /// keys.
    pub(super) fn widen(&self, family: &Family, layers: &mut [LayerConfig]) -> Result<(), ModelError> {
        let count = layers.len();
        if let Some(last) = layers.last_mut() {
            (last.window, last.rope) = (None, Some(0));
        }
        let width = self.wide_head(family)?.expect("a family with wide heads");
        let keys_are_values = self.flag("attention_k_eq_v")?.unwrap_or(false);
        let key_heads = self.optional_size("num_global_key_value_heads")?;
        let of_layers = self.of_layers("num_key_value_heads")?;
        let heads = self.size("num_attention_heads")?;
        for (n, layer) in layers.iter_mut().enumerate().filter(|(_, layer)| layer.window.is_none()) {
            layer.head_dim = width;
            let own = of_layers.iter().find(|(number, _)| *number == n).map(|(_, heads)| *heads);
            if let Some(own) = own.or(key_heads.filter(|_| keys_are_values)) {
                layer.key_value_heads = own;
            }
            if !heads.is_multiple_of(layer.key_value_heads) {
                return Err(self.malformed("num_attention_heads is no multiple of num_global_key_value_heads"));
            }
            if keys_are_values {
                layer.values = Values::Keys;
            }
        }
        let shared = match self.get("num_kv_shared_layers").map(Value::as_u64) {
            None => 0,
            Some(Some(shared)) if (shared as usize) < count => shared as usize,
            Some(_) => return Err(self.malformed("`num_kv_shared_layers` should be a number below that of layers")),
        };
        let is_doubled = self.flag("use_double_wide_mlp")?.unwrap_or(false);
        for n in count - shared..count {
            let has_window = layers[n].window.is_some();
            let source = (0..count - shared).rev().find(|&earlier| layers[earlier].window.is_some() == has_window);
            let source = source.ok_or_else(|| self.malformed("a layer has no earlier one to share keys with"))?;
            layers[n].values = Values::OfLayer(source);
            if is_doubled {
                layers[n].intermediate_size *= 2;
            }
        }
        Ok(())
    }

    /// The inputs of each layer. A width of 0 means none.
    pub(super) fn per_layer(&self, family: &Family) -> Result<Option<PerLayerConfig>, ModelError> {
        let Some(default) = family.per_layer_inputs else { return Ok(None) };
        let key = "hidden_size_per_layer_input";
        if self.get(key).and_then(Value::as_u64) == Some(0) || self.object.get(key) == Some(&Value::Null) {
            return Ok(None);
        }
        let width = self.optional_size(key)?.unwrap_or(default);
        let vocabulary = self.optional_size("vocab_size_per_layer_input")?;
        Ok(Some(PerLayerConfig { width, vocabulary: vocabulary.or(family.vocabulary).unwrap_or(1) }))
    }
}
