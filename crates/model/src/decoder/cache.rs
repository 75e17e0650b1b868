//! Keys and values of earlier tokens, for generation: of one row, or of several that are continued
//! together. Of latent attention these are the short vectors that keys and values are made of.

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};

/// Keys and values of the tokens that a model has read, kept from one generation to the next. A
/// prompt that begins with the same tokens is read from the first other token on.
///
/// It belongs to the model that filled it, with the adapter that the model had then. A clone shares
/// the keys and values until one of the two goes on.
#[derive(Clone, Default)]
pub struct KeyValueCache {
    layers: Vec<LayerCache>,
    tokens: Vec<u32>,
    /// Whether its keys have the positions of long texts.
    pub(crate) is_long: bool,
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
        // A state cannot go back to an earlier token.
        if kept < self.tokens.len() && self.has_states() {
            *self = KeyValueCache::default();
            return 0;
        }
        self.tokens.truncate(kept);
        for layer in &mut self.layers {
            layer.truncate(kept);
        }
        kept
    }

    /// Forgets all but the first `length` tokens, of a cache without states.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.tokens.truncate(length);
        self.layers.iter_mut().for_each(|layer| layer.truncate(length));
    }

    /// Whether it holds states, which cannot go back to an earlier token.
    fn has_states(&self) -> bool {
        self.layers.iter().any(|layer| layer.recurrent.is_some())
    }

    /// Bytes of keys, values and states, with the room behind them.
    pub(crate) fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
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

/// Lets `pass` read these prompts into caches of their own, which have so many layers. Returns what it returns, and the
/// caches.
pub(crate) fn fill<R, E>(
    prompts: &[&[u32]],
    layers: usize,
    pass: impl FnOnce(&mut [Vec<LayerCache>]) -> Result<R, E>,
) -> Result<(R, Vec<KeyValueCache>), E> {
    let mut caches = vec![vec![LayerCache::default(); layers]; prompts.len()];
    let result = pass(&mut caches)?;
    let filled = caches.into_iter().zip(prompts);
    let filled = filled.map(|(layers, prompt)| KeyValueCache { layers, tokens: prompt.to_vec(), is_long: false });
    Ok((result, filled.collect()))
}

/// Lets `pass` add the keys and values of the next tokens of several rows, of which each stays in its own cache: so
/// many of each. If it fails, nothing is kept. None of them has states or short vectors.
pub(crate) fn read_apart<R, E>(
    rows: &mut [(&mut KeyValueCache, &[u32])],
    layers: usize,
    pass: impl FnOnce(&mut [LayerCache]) -> Result<R, E>,
) -> Result<R, E> {
    let mut taken: Vec<KeyValueCache> = rows.iter_mut().map(|(cache, _)| std::mem::take(*cache)).collect();
    let mut together: Vec<LayerCache> = vec![LayerCache::default(); layers];
    for (cache, (_, tokens)) in taken.iter_mut().zip(&*rows) {
        cache.layers.resize_with(layers, LayerCache::default);
        for (all, own) in together.iter_mut().zip(std::mem::take(&mut cache.layers)) {
            all.apart.push((own, tokens.len()));
        }
    }
    let result = pass(&mut together)?;
    for layer in together {
        for (cache, (own, _)) in taken.iter_mut().zip(layer.apart) {
            cache.layers.push(own);
        }
    }
    for (mut taken, (cache, tokens)) in taken.into_iter().zip(rows) {
        taken.tokens.extend_from_slice(tokens);
        **cache = taken;
    }
    Ok(result)
}

/// Keys and values of several rows that are continued together, one token of each at a time.
///
/// All rows end at the same place, so a shorter one begins later. The new keys of all rows are then
/// written at once, and attention reads each row where it lies: no token costs a copy of the
/// earlier ones, on the CPU or on a GPU.
pub(crate) struct RowsCache {
    layers: Vec<LayerCache>,
    /// Tokens of each row.
    lengths: Vec<usize>,
    /// The place behind the last token of every row.
    end: usize,
}

impl RowsCache {
    /// Puts the caches of rows together. All have read their prompts.
    pub(crate) fn join(rows: Vec<KeyValueCache>) -> RowsCache {
        let lengths: Vec<usize> = rows.iter().map(|row| row.tokens.len()).collect();
        let end = lengths.iter().copied().max().unwrap_or(0);
        // Layer by layer, so that no more than one is held twice.
        let mut rows: Vec<_> = rows.into_iter().map(|row| row.layers.into_iter()).collect();
        let mut layers = Vec::new();
        while let Some(of_rows) = rows.iter_mut().map(Iterator::next).collect::<Option<Vec<_>>>()
            && !of_rows.is_empty()
        {
            layers.push(LayerCache::join(of_rows, end));
        }
        RowsCache { layers, lengths, end }
    }

    /// Tokens of each row: the positions of the next ones.
    pub(crate) fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// The places of each row's keys, its next one with them, in what [`LayerCache::extend`]
    /// returns.
    pub(crate) fn next_keys(&self) -> Vec<Range<usize>> {
        let end = self.end + 1;
        let with_keys = self.layers.iter().find(|layer| layer.keys.is_some());
        let room = with_keys.map_or(0, |layer| layer.room_for(end));
        let rows = self.lengths.iter().enumerate();
        rows.map(|(row, length)| row * room + self.end - length..row * room + end).collect()
    }

    /// The places of the keys of the only row that each of its next `count` tokens sees, its own with them.
    pub(crate) fn keys_ahead(&self, count: usize) -> impl Iterator<Item = Range<usize>> {
        let (length, end) = (self.lengths[0], self.end);
        (1..=count).map(move |own| end - length..end + own)
    }

    /// Lets `pass` add the keys and values of so many tokens for each row.
    pub(crate) fn read<R>(&mut self, tokens: usize, pass: impl FnOnce(&mut [LayerCache]) -> R) -> R {
        let result = pass(&mut self.layers);
        self.lengths.iter_mut().for_each(|length| *length += tokens);
        self.end += tokens;
        result
    }

    /// Forgets the last tokens of each row, of a cache without states.
    pub(crate) fn forget_last(&mut self, tokens: usize) {
        self.lengths.iter_mut().for_each(|length| *length -= tokens);
        self.end -= tokens;
        self.layers.iter_mut().for_each(|layer| layer.truncate(self.end));
    }

    /// Adds a row that has read its prompt, as number `at`. Its keys and values are copied.
    pub(crate) fn insert(&mut self, row: KeyValueCache, at: usize) {
        let (count, length) = (self.lengths.len(), row.tokens.len());
        let end = self.end.max(length);
        let before = std::mem::take(&mut self.layers);
        self.layers = before.into_iter().zip(row.layers).map(|(all, row)| all.with(row, [at, count], end)).collect();
        self.lengths.insert(at, length);
        self.end = end;
    }

    /// Some of the rows, which are copied.
    pub(crate) fn part(&self, rows: &[usize]) -> RowsCache {
        let RowsCache { layers, lengths, end } = self;
        let mut part = RowsCache { layers: layers.clone(), lengths: lengths.clone(), end: *end };
        part.keep_and_shrink(rows);
        part
    }

    /// As [`Self::keep`]. The places that no row needs any more are given back, too: rows come and
    /// go, and the room is never more than that of the longest.
    pub(crate) fn keep_and_shrink(&mut self, rows: &[usize]) {
        self.keep(rows);
        let end = self.lengths.iter().copied().max().unwrap_or(0);
        if end < self.end {
            self.layers.iter_mut().for_each(|layer| layer.shrink(end));
            self.end = end;
        }
    }

    /// Forgets all rows but these.
    pub(crate) fn keep(&mut self, rows: &[usize]) {
        let of = self.lengths.len();
        self.lengths = rows.iter().map(|&row| self.lengths[row]).collect();
        self.layers.iter_mut().for_each(|layer| layer.keep(rows, of));
    }
}

/// Keys and values of one layer, [rows, room, k, d] each. Every row ends before place `length`. The
/// room grows by a third or a half when it is full, so most tokens cost no copy of the earlier ones. Latent attention has
/// keys alone, one head of them, which hold its short vectors.
#[derive(Clone, Default)]
pub(crate) struct LayerCache {
    keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
    length: usize,
    /// Of a gated delta net: the last inputs of the convolution and the states, each of all rows.
    recurrent: Option<[Tensor<2>; 2]>,
    /// In the place of all that: the caches of single rows, and how many tokens of each are read next.
    apart: Vec<(LayerCache, usize)>,
}

impl LayerCache {
    /// Forgets all but the first `length` tokens. The room stays.
    fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        if length == 0 {
            *self = LayerCache::default();
        }
    }

    /// Puts the caches of single rows together. All end before place `end`, which is at least the
    /// length of each.
    fn join(rows: Vec<LayerCache>, end: usize) -> LayerCache {
        let count = rows.len();
        let mut joined = LayerCache { length: end, ..LayerCache::default() };
        let recurrent: Vec<[Tensor<2>; 2]> = rows.iter().filter_map(|row| row.recurrent.clone()).collect();
        if !recurrent.is_empty() {
            let all = |n: usize| Tensor::cat(recurrent.iter().map(|row| row[n].clone()).collect(), 0);
            joined.recurrent = Some([all(0), all(1)]);
        }
        for (n, LayerCache { keys, values, length, .. }) in rows.into_iter().enumerate() {
            let put = |all: Option<Tensor<4>>, of_row: Option<Tensor<4>>| {
                let of_row = of_row?.narrow(1, 0, length);
                let [_, _, heads, width] = of_row.dims();
                // The next token has a place, too.
                let all = all.unwrap_or_else(|| empty([count, room(end + 1), heads, width], &of_row));
                Some(all.slice_assign([n..n + 1, end - length..end], of_row))
            };
            joined.keys = put(joined.keys.take(), keys);
            joined.values = put(joined.values.take(), values);
        }
        joined
    }

    /// Forgets all rows but these.
    fn keep(&mut self, rows: &[usize], of: usize) {
        let numbers: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        let pick = |all: Tensor<4>| {
            let numbers = TensorData::new(numbers.clone(), [rows.len()]);
            let numbers = Tensor::<1, Int>::from_data(numbers, &all.device());
            all.select(0, numbers)
        };
        self.keys = self.keys.take().map(pick);
        self.values = self.values.take().map(pick);
        let pick = |all: Tensor<2>| {
            let [count, width] = all.dims();
            let each = count / of;
            Tensor::cat(rows.iter().map(|row| all.clone().narrow(0, row * each, each)).collect(), 0)
                .reshape([rows.len() * each, width])
        };
        self.recurrent = self.recurrent.take().map(|both| both.map(pick));
    }

    /// These rows, of which there are `count`, and one more as number `at`. All end before `end`, which
    /// is at least the length of each.
    fn with(self, row: LayerCache, [at, count]: [usize; 2], end: usize) -> LayerCache {
        let put = |all: Option<Tensor<4>>, one: Option<Tensor<4>>| {
            let (all, one) = (all?.narrow(1, 0, self.length), one?.narrow(1, 0, row.length));
            let [_, _, heads, width] = one.dims();
            // The next token has a place, too.
            let mut place = empty([count + 1, room(end + 1), heads, width], &one);
            for (rows, first) in [(0..at, 0), (at..count, at + 1)] {
                if !rows.is_empty() {
                    let some = all.clone().narrow(0, rows.start, rows.len());
                    place = place.slice_assign([first..first + rows.len(), end - self.length..end], some);
                }
            }
            Some(place.slice_assign([at..at + 1, end - row.length..end], one))
        };
        let among = |all: Tensor<2>, one: Tensor<2>| {
            // Each row has as many rows of the matrix as the new one.
            let (each, all_rows) = (one.dims()[0], count * one.dims()[0]);
            let part = |rows: Range<usize>| (!rows.is_empty()).then(|| all.clone().narrow(0, rows.start, rows.len()));
            let parts = [part(0..at * each), Some(one), part(at * each..all_rows)];
            Tensor::cat(parts.into_iter().flatten().collect(), 0)
        };
        LayerCache {
            keys: put(self.keys, row.keys),
            values: put(self.values, row.values),
            length: end,
            recurrent: self.recurrent.zip(row.recurrent).map(|([inputs, states], [new_inputs, new_states])| {
                [among(inputs, new_inputs), among(states, new_states)]
            }),
            apart: Vec::new(),
        }
    }

    /// Moves all rows, so that they end before place `end`. None is longer.
    fn shrink(&mut self, end: usize) {
        let move_all = |all: Tensor<4>| {
            let [rows, _, heads, width] = all.dims();
            let kept = all.narrow(1, self.length - end, end);
            empty([rows, room(end + 1), heads, width], &kept).slice_assign([0..rows, 0..end], kept)
        };
        self.keys = self.keys.take().map(move_all);
        self.values = self.values.take().map(move_all);
        self.length = end;
    }

    /// Bytes of its tensors.
    fn bytes(&self) -> usize {
        let of = |tensor: &Tensor<4>| tensor.dims().iter().product::<usize>() * tensor.dtype().size();
        let of_state = |tensor: &Tensor<2>| tensor.dims().iter().product::<usize>() * tensor.dtype().size();
        let kept: usize = self.keys.iter().chain(&self.values).map(of).sum();
        kept + self.recurrent.iter().flatten().map(of_state).sum::<usize>()
    }

    /// The last inputs of the convolution and the states of a gated delta net.
    pub(crate) fn recurrent(&self) -> Option<&[Tensor<2>; 2]> {
        self.recurrent.as_ref()
    }

    /// As [`LayerCache::recurrent`], behind more tokens.
    pub(crate) fn set_recurrent(&mut self, both: [Tensor<2>; 2]) {
        self.recurrent = Some(both);
    }

    /// The room of each row once it has so many tokens.
    fn room_for(&self, tokens: usize) -> usize {
        let now = self.keys.as_ref().map_or(0, |keys| keys.dims()[1]);
        if tokens <= now { now } else { room(tokens) }
    }

    /// Adds keys and values [rows · t, k, d] of t new tokens for each row; the row is the only one
    /// as long as the cache is empty. Returns all, [rows · room, k, d], with the unused room of a
    /// row behind its tokens.
    ///
    /// Rows that are apart have any number of tokens each. Theirs come back one row behind the other, without room.
    pub(crate) fn extend(&mut self, keys: Tensor<3>, values: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        if !self.apart.is_empty() {
            return self.extend_apart(&keys, &values);
        }
        let (start, end) = (self.length, self.length + keys.dims()[0] / self.rows());
        let room = self.room_for(end);
        let values = put(self.values.take(), values, [start, end], room);
        self.values = Some(values.clone());
        (self.extend_shared(keys), flat(values))
    }

    fn extend_apart(&mut self, keys: &Tensor<3>, values: &Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let (mut start, mut all) = (0, (Vec::new(), Vec::new()));
        for (row, count) in &mut self.apart {
            let own = |all: &Tensor<3>| all.clone().narrow(0, start, *count);
            let (keys, values) = row.extend(own(keys), own(values));
            all.0.push(keys.narrow(0, 0, row.length));
            all.1.push(values.narrow(0, 0, row.length));
            start += *count;
        }
        (Tensor::cat(all.0, 0), Tensor::cat(all.1, 0))
    }

    /// As [`LayerCache::extend`], of what is keys and values in one: the short vectors of latent attention.
    pub(crate) fn extend_shared(&mut self, keys: Tensor<3>) -> Tensor<3> {
        let (start, end) = (self.length, self.length + keys.dims()[0] / self.rows());
        let room = self.room_for(end);
        let keys = put(self.keys.take(), keys, [start, end], room);
        self.keys = Some(keys.clone());
        self.length = end;
        flat(keys)
    }

    fn rows(&self) -> usize {
        self.keys.as_ref().map_or(1, |keys| keys.dims()[0])
    }
}

/// New tokens [rows · t, k, d] at places from `start` to before `end`, behind the old ones [rows, room, k, d].
/// If those have too little room, they move to one of `room` places.
fn put(old: Option<Tensor<4>>, new: Tensor<3>, [start, end]: [usize; 2], room: usize) -> Tensor<4> {
    let [all, heads, width] = new.dims();
    let rows = all / (end - start);
    let new = new.reshape([rows, end - start, heads, width]);
    let place = match old {
        Some(old) if end <= old.dims()[1] => old,
        old => {
            let place = empty([rows, room, heads, width], &new);
            match old {
                Some(old) => place.slice_assign([0..rows, 0..start], old.narrow(1, 0, start)),
                None => place,
            }
        }
    };
    place.slice_assign([0..rows, start..end], new)
}

fn flat(all: Tensor<4>) -> Tensor<3> {
    let [rows, room, heads, width] = all.dims();
    all.reshape([rows * room, heads, width])
}

/// Places that are held for so many tokens of a row: powers of two, and one and a half times those. With powers of two
/// alone a quarter of the places would be empty on average, and of 273 tokens nearly half.
pub(crate) fn room(tokens: usize) -> usize {
    let power = tokens.next_power_of_two().max(64);
    let between = power / 4 * 3;
    if power > 64 && tokens <= between { between } else { power }
}

/// Zeros of the number type of `like`, on its device.
fn empty(shape: [usize; 4], like: &Tensor<4>) -> Tensor<4> {
    Tensor::zeros(shape, (&like.device(), like.dtype()))
}
