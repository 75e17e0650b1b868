//! Keys and values of earlier tokens, for generation: of one row, or of several that are continued
//! together. Of latent attention these are the short vectors that keys and values are made of.
//!
//! Layers with a window forget what no later token sees (`reach`). What is left lies where it lay among all tokens, so
//! attention goes over the same keys in the same order, and the bits are those of a layer that keeps everything.

mod layer;
pub(crate) mod reach;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use finetune_kernels::{Segment, Segments};

pub(crate) use self::layer::LayerCache;
use self::reach::{KeptFor, Reach, goes_back};

/// Keys and values of the tokens that a model has read, kept from one generation to the next. A
/// prompt that begins with the same tokens is read from the first other token on.
///
/// It belongs to the model that filled it, with the adapter that the model had then. A clone shares
/// the keys and values until one of the two goes on.
#[derive(Clone, Default)]
pub struct KeyValueCache {
    layers: Vec<LayerCache>,
    tokens: Vec<u32>,
    /// The most tokens that it had. What layers with a window have forgotten follows from that.
    longest: usize,
    kept_for: KeptFor,
    /// Whether its keys have the positions of long texts.
    pub(crate) is_long: bool,
}

impl KeyValueCache {
    /// Of a text that only goes on: no later prompt begins as a part of it.
    pub(crate) fn of_one_text() -> KeyValueCache {
        KeyValueCache { kept_for: KeptFor::GoingOn, ..KeyValueCache::default() }
    }

    /// The tokens whose keys and values are kept, in layers with a window of the last ones alone.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Forgets what is not common with `prompt`, and returns how many tokens are kept.
    pub(crate) fn keep_beginning_of(&mut self, prompt: &[u32]) -> usize {
        let kept = in_common(&self.tokens, prompt);
        // A state cannot go back to an earlier token, and a layer with a window not by many tokens.
        if kept < self.tokens.len() && (self.has_states() || !self.goes_back_to(kept)) {
            self.clear();
            return 0;
        }
        self.truncate(kept);
        kept
    }

    /// Whether all layers still have what the tokens behind the first `length` ones see, of a cache without states. If
    /// not, the text is read again from its beginning.
    pub(crate) fn goes_back_to(&self, length: usize) -> bool {
        goes_back(self.layers.iter().map(|layer| layer.reach.window), self.longest, length)
    }

    /// Forgets all but the first `length` tokens, of a cache that goes back to them.
    pub(crate) fn truncate(&mut self, length: usize) {
        if length == 0 {
            self.clear();
            return;
        }
        self.tokens.truncate(length);
        self.layers.iter_mut().for_each(|layer| layer.truncate(length));
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = KeyValueCache { kept_for: self.kept_for, ..KeyValueCache::default() };
    }

    /// Whether it holds states, which cannot go back to an earlier token.
    fn has_states(&self) -> bool {
        self.layers.iter().any(|layer| layer.recurrent().is_some())
    }

    /// Bytes of keys, values and states, with the room behind them.
    pub(crate) fn bytes(&self) -> usize {
        self.layers.iter().map(LayerCache::bytes).sum()
    }

    /// Lets `pass` add the keys and values of `tokens`: it gets the number of tokens before them, and
    /// the keys that they attend to. `windows`: those of all layers. If it fails, nothing is kept:
    /// some layers may have more tokens than others.
    pub(crate) fn read<R, E>(
        &mut self,
        tokens: &[u32],
        windows: &[Option<usize>],
        pass: impl FnOnce(usize, CachedKeys, &mut [LayerCache]) -> Result<R, E>,
    ) -> Result<R, E> {
        let mut taken = std::mem::take(self);
        taken.have_layers(windows);
        let keys = CachedKeys::behind(&[(&taken, tokens.len())]);
        let result = pass(taken.tokens.len(), keys, &mut taken.layers)?;
        taken.have_read(tokens);
        *self = taken;
        Ok(result)
    }

    fn have_layers(&mut self, windows: &[Option<usize>]) {
        if self.layers.is_empty() {
            let layer = |window: &Option<usize>| LayerCache::new(Reach::new(*window, self.kept_for));
            self.layers = windows.iter().map(layer).collect();
        }
    }

    fn have_read(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        self.longest = self.longest.max(self.tokens.len());
    }
}

/// How many tokens these and a prompt begin with in common. The last token of the prompt is never one of them: its
/// logits choose the next one.
pub(crate) fn in_common(tokens: &[u32], prompt: &[u32]) -> usize {
    let common = tokens.iter().zip(prompt).take_while(|(known, token)| known == token).count();
    common.min(prompt.len().saturating_sub(1))
}

/// Lets `pass` read these prompts into caches of their own, of texts that only go on. `windows`: those of all layers.
/// Returns what it returns, and the caches.
pub(crate) fn fill<R, E>(
    prompts: &[&[u32]],
    windows: &[Option<usize>],
    pass: impl FnOnce(&mut [Vec<LayerCache>]) -> Result<R, E>,
) -> Result<(R, Vec<KeyValueCache>), E> {
    let mut filled = vec![KeyValueCache::of_one_text(); prompts.len()];
    filled.iter_mut().for_each(|cache| cache.have_layers(windows));
    let mut layers: Vec<_> = filled.iter_mut().map(|cache| std::mem::take(&mut cache.layers)).collect();
    let result = pass(&mut layers)?;
    for ((cache, layers), prompt) in filled.iter_mut().zip(layers).zip(prompts) {
        cache.layers = layers;
        cache.have_read(prompt);
    }
    Ok((result, filled))
}

/// Lets `pass` add the keys and values of the next tokens of several rows, of which each stays in its own cache: so
/// many of each. If it fails, nothing is kept. None of them has states or short vectors.
pub(crate) fn read_apart<R, E>(
    rows: &mut [(&mut KeyValueCache, &[u32])],
    windows: &[Option<usize>],
    pass: impl FnOnce(CachedKeys, &mut [LayerCache]) -> Result<R, E>,
) -> Result<R, E> {
    let mut taken: Vec<KeyValueCache> = rows.iter_mut().map(|(cache, _)| std::mem::take(*cache)).collect();
    taken.iter_mut().for_each(|cache| cache.have_layers(windows));
    let counts = rows.iter().map(|(_, tokens)| tokens.len());
    let keys = CachedKeys::behind(&taken.iter().zip(counts).collect::<Vec<_>>());
    let mut together: Vec<LayerCache> = vec![LayerCache::default(); windows.len()];
    for (cache, (_, tokens)) in taken.iter_mut().zip(&*rows) {
        for (all, own) in together.iter_mut().zip(std::mem::take(&mut cache.layers)) {
            all.apart.push((own, tokens.len()));
        }
    }
    let result = pass(keys, &mut together)?;
    for layer in together {
        for (cache, (own, _)) in taken.iter_mut().zip(layer.apart) {
            cache.layers.push(own);
        }
    }
    for (mut taken, (cache, tokens)) in taken.into_iter().zip(rows) {
        taken.have_read(tokens);
        **cache = taken;
    }
    Ok(result)
}

/// The keys that the tokens of a pass attend to: where they lie in what [`LayerCache::extend`] returns.
#[derive(Clone)]
pub(crate) struct CachedKeys {
    /// In layers that keep all.
    pub(crate) all: Segments,
    /// In layers with a window, which may have forgotten some, by that.
    pub(crate) by_window: BTreeMap<usize, Segments>,
}

impl From<Segments> for CachedKeys {
    /// Nothing is forgotten.
    fn from(all: Segments) -> CachedKeys {
        CachedKeys { all, by_window: BTreeMap::new() }
    }
}

impl CachedKeys {
    /// Of so many next tokens of each of these rows, one behind the other and without room.
    fn behind(rows: &[(&KeyValueCache, usize)]) -> CachedKeys {
        let of = |window: Option<usize>| {
            let (mut query_start, mut key_start) = (0, 0);
            let segment = |&(cache, queries): &(&KeyValueCache, usize)| {
                let forgotten = cache.layers.iter().filter(|layer| layer.reach.window == window);
                let forgotten = forgotten.map(|layer| layer.start).max().unwrap_or(0);
                let segment =
                    Segment { query_start, queries, key_start, keys: cache.tokens.len() + queries - forgotten };
                query_start += queries;
                key_start += segment.keys;
                segment
            };
            Segments::from(rows.iter().map(segment).collect::<Vec<_>>())
        };
        let layers = rows.iter().flat_map(|(cache, _)| &cache.layers);
        CachedKeys { all: of(None), by_window: windows(layers).map(|window| (window, of(Some(window)))).collect() }
    }
}

/// The windows that these layers have, each once.
fn windows<'a>(layers: impl Iterator<Item = &'a LayerCache>) -> impl Iterator<Item = usize> {
    layers.filter_map(|layer| layer.reach.window).collect::<BTreeSet<_>>().into_iter()
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

    /// The keys that the next `tokens` of each row attend to, their own with them. Several tokens are those of the only
    /// row; each is as a row of its own.
    pub(crate) fn next_keys(&self, tokens: usize) -> CachedKeys {
        let with_keys = || self.layers.iter().filter(|layer| layer.keys.is_some());
        let of = |window: Option<usize>| {
            let layer = with_keys().find(|layer| layer.reach.window == window);
            let (start, room) = layer.map_or((0, 0), |layer| (layer.start, layer.room_for(layer.held() + tokens)));
            let of_row = |(row, length): (usize, &usize)| {
                let (first, end) = (row * room + (self.end - length).max(start) - start, row * room + self.end - start);
                (1..=tokens).map(move |own| first..end + own)
            };
            Segments::next_tokens(self.lengths.iter().enumerate().flat_map(of_row))
        };
        CachedKeys { all: of(None), by_window: windows(with_keys()).map(|window| (window, of(Some(window)))).collect() }
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

/// Places that are held for so many tokens of a row: powers of two, and one and a half times those. With powers of two
/// alone a quarter of the places would be empty on average, and of 273 tokens nearly half.
pub(crate) fn room(tokens: usize) -> usize {
    let power = tokens.next_power_of_two().max(64);
    let between = power / 4 * 3;
    if power > 64 && tokens <= between { between } else { power }
}
