//! Keys and values of earlier tokens, for generation.

use burn::tensor::Tensor;

/// Keys and values of the tokens that a model has read, kept from one generation to the next. A
/// prompt that begins with the same tokens is read from the first other token on.
///
/// It belongs to the model that filled it, with the adapter that the model had then.
#[derive(Default)]
pub struct KeyValueCache {
    layers: Vec<LayerCache>,
    tokens: Vec<u32>,
}

impl KeyValueCache {
    /// The tokens whose keys and values are kept.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Forgets what is not common with `prompt`, and returns how many tokens are kept. The last
    /// token of the prompt is never kept: its logits choose the next one.
    pub(crate) fn keep_beginning_of(&mut self, prompt: &[u32]) -> usize {
        let common = self.tokens.iter().zip(prompt).take_while(|(kept, token)| kept == token).count();
        let kept = common.min(prompt.len().saturating_sub(1));
        self.tokens.truncate(kept);
        for layer in &mut self.layers {
            layer.truncate(kept);
        }
        kept
    }

    /// Lets `pass` add the keys and values of `tokens`. If it fails, nothing is kept: some layers
    /// may have more tokens than others.
    pub(crate) fn read<R, E>(
        &mut self,
        tokens: &[u32],
        layers: usize,
        pass: impl FnOnce(usize, &mut [LayerCache]) -> Result<R, E>,
    ) -> Result<R, E> {
        let mut taken = std::mem::take(self);
        taken.layers.resize_with(layers, LayerCache::default);
        let result = pass(taken.tokens.len(), &mut taken.layers)?;
        taken.tokens.extend_from_slice(tokens);
        *self = taken;
        Ok(result)
    }
}

/// Keys and values of one layer, [room, k, d] each, of which the first `length` are filled. The
/// room doubles when it is full, so most tokens cost no copy of the earlier ones.
#[derive(Default)]
pub(crate) struct LayerCache {
    keys: Option<Tensor<3>>,
    values: Option<Tensor<3>>,
    length: usize,
}

impl LayerCache {
    /// Forgets all but the first `length` tokens. The room stays.
    fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        if self.length == 0 {
            *self = LayerCache::default();
        }
    }

    /// Adds keys and values [t, k, d] of new tokens. Returns all, with the unused room behind them.
    pub(crate) fn extend(&mut self, keys: Tensor<3>, values: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let start = self.length;
        self.length += keys.dims()[0];
        let length = self.length;
        let put = |old: Option<Tensor<3>>, new: Tensor<3>| {
            let [tokens, heads, width] = new.dims();
            let room = old.as_ref().map_or(0, |old| old.dims()[0]);
            let options = (&new.device(), new.dtype());
            let place = match old {
                Some(old) if length <= room => old,
                old => {
                    let place = Tensor::zeros([length.next_power_of_two().max(64), heads, width], options);
                    match old {
                        Some(old) => place.slice_assign(0..start, old.narrow(0, 0, start)),
                        None => place,
                    }
                }
            };
            place.slice_assign(start..start + tokens, new)
        };
        let keys = put(self.keys.take(), keys);
        let values = put(self.values.take(), values);
        self.keys = Some(keys.clone());
        self.values = Some(values.clone());
        (keys, values)
    }
}
