//! Keys and values of earlier tokens, for generation.

use burn::tensor::Tensor;

/// Keys and values of one layer, [room, k, d] each, of which the first `length` are filled. The
/// room doubles when it is full, so most tokens cost no copy of the earlier ones.
#[derive(Default)]
pub(crate) struct LayerCache {
    keys: Option<Tensor<3>>,
    values: Option<Tensor<3>>,
    length: usize,
}

impl LayerCache {
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
