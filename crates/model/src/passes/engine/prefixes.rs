//! Keys and values of earlier prompts, for those that begin in the same way.
//!
//! A prompt is read in parts that begin at multiples of 512 tokens, and whole parts are used again. So an
//! answer has the same bits whether or not its beginning was known.
//!
//! **Pieces of a part** are used again, in multiples of 64 tokens, if the rest of the part has the same bits with
//! and without them. That is so on the CPU in models in which a token's row depends on no other row but through
//! attention:
//!
//! - Attention goes over blocks of 64 queries. A part that begins at a multiple of 64 has the same blocks.
//! - A product of more than 64 rows has one order of sums, whatever the number of rows, if it has at least four
//!   columns (`matmul` of the kernels). So more than 64 tokens have to be left, and only what was read with more
//!   than 64 is kept. Products with few columns are those with an adapter's A; its rank has to be 8 or more.
//! - An expert's product has as many rows as tokens choose it. Models with experts have whole parts only.
//!
//! **Layers with a window** have forgotten what lies far in front of a prompt's end. Where a prompt would go on from a
//! place whose keys are gone, all of it is read again: that is exact, and needs no second copy of a window.

use std::sync::{Arc, Weak};

use finetune_kernels::footprint::ATTENTION_BLOCK;

use super::is_read_again;
use crate::decoder::cache::{KeyValueCache, in_common};
use crate::model::{Model, Trained};
use crate::passes::generate::PROMPT_PART;
use crate::passes::sharing::FEW;

/// Least rank of an adapter's product that has one order of sums.
const RANK: usize = 8;

struct Prefix {
    model: Weak<Model>,
    cache: KeyValueCache,
    /// What counts for [`Prefixes::most_bytes`].
    bytes: usize,
}

impl Prefix {
    fn is_of(&self, model: &Arc<Model>) -> bool {
        std::ptr::eq(self.model.as_ptr(), Arc::as_ptr(model))
    }
}

/// The prompts that were read last, the latest at the end.
pub(super) struct Prefixes {
    most_bytes: usize,
    kept: Vec<Prefix>,
}

impl Prefixes {
    pub(super) fn new(most_bytes: usize) -> Prefixes {
        Prefixes { most_bytes, kept: Vec::new() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.kept.iter().map(|prefix| prefix.bytes).sum()
    }

    /// Forgets prompts of models that are not there any more.
    pub(super) fn leave_unloaded(&mut self) {
        self.kept.retain(|prefix| prefix.model.strong_count() > 0);
    }

    /// Forgets all prompts of a model.
    pub(super) fn forget(&mut self, model: &Arc<Model>) {
        self.kept.retain(|prefix| !prefix.is_of(model));
    }

    /// How many tokens [`Prefixes::take`] gives of a prompt.
    pub(super) fn known(&self, model: &Arc<Model>, prompt: &[u32]) -> usize {
        self.find(model, prompt).map_or(0, |(length, _)| length)
    }

    /// The longest known beginning of a prompt that changes no bit, without the prompt's last token: the logits
    /// behind that one choose the next.
    pub(super) fn take(&mut self, model: &Arc<Model>, prompt: &[u32]) -> KeyValueCache {
        let Some((length, n)) = self.find(model, prompt) else { return fresh(model) };
        let found = self.kept.remove(n);
        // It comes back with more tokens. From there its keys are still known to prompts that begin so, but a state does
        // not go back: it stays beside what comes, if there is room for both.
        let has_room = || self.bytes() + found.bytes + model.prompt_bytes(prompt.len()) <= self.most_bytes;
        let may_stay = if model.has_states() { has_room() } else { !model.goes_back(prompt.len(), length) };
        if found.cache.tokens().len() == length && !may_stay {
            return found.cache;
        }
        let mut cache = found.cache.clone();
        self.kept.push(found);
        cache.truncate(length);
        cache
    }

    /// The length of that beginning, and the number of the prompt that has it.
    fn find(&self, model: &Arc<Model>, prompt: &[u32]) -> Option<(usize, usize)> {
        let has_pieces = has_pieces(model);
        let known = |prefix: &Prefix| {
            if !prefix.is_of(model) {
                return 0;
            }
            let tokens = prefix.cache.tokens();
            let length = usable(in_common(tokens, prompt), prompt.len(), has_pieces);
            let goes_back = length == tokens.len() || !model.has_states() && prefix.cache.goes_back_to(length);
            if goes_back { length } else { 0 }
        };
        let longest = self.kept.iter().enumerate().map(|(n, prefix)| (known(prefix), n)).max();
        longest.filter(|(length, _)| *length > 0)
    }

    /// Keeps what can be used again of a prompt. What was used longest ago goes, if there is no room.
    pub(super) fn put(&mut self, model: &Arc<Model>, mut cache: KeyValueCache) {
        if is_read_again(model) {
            return;
        }
        let length = kept(cache.tokens().len(), has_pieces(model));
        let goes_back = |cache: &KeyValueCache, to: usize| !model.has_states() && cache.goes_back_to(to);
        if length == 0 || length < cache.tokens().len() && !goes_back(&cache, length) {
            return;
        }
        cache.truncate(length);
        // Processes that hold some of the layers each have other bytes of it. All keep the same prompts, so they
        // count those of the process with most.
        let has_some = model.placement().stage().is_some();
        let bytes = if has_some { model.prompt_bytes(length) } else { cache.bytes() };
        // One that begins another is of no use beside it, if that goes back to it.
        self.kept.retain(|prefix| {
            let own = prefix.cache.tokens();
            let is_in_it = || own.len() == cache.tokens().len() || goes_back(&cache, own.len());
            !(prefix.is_of(model) && cache.tokens().starts_with(own) && is_in_it())
        });
        let model = Arc::downgrade(model);
        self.kept.push(Prefix { model, cache, bytes });
        while self.bytes() > self.most_bytes {
            self.kept.remove(0);
        }
    }
}

/// The empty cache of a prompt of which nothing is known.
pub(super) fn fresh(model: &Model) -> KeyValueCache {
    if is_read_again(model) { KeyValueCache::of_one_text() } else { KeyValueCache::default() }
}

/// Whether pieces of a part can be used again.
fn has_pieces(model: &Model) -> bool {
    let is_wide = match &model.trained {
        Trained::Adapter(adaptation) => adaptation.targets.iter().all(|target| target.rank >= RANK),
        Trained::Nothing | Trained::All => true,
    };
    is_wide && model.has_rows_of_their_own()
}

/// How many tokens of a prompt are known once another one of the same model is read.
pub(super) fn known_behind(model: &Model, other: &[u32], prompt: &[u32]) -> usize {
    let has_pieces = has_pieces(model);
    let kept = &other[..kept(other.len(), has_pieces)];
    let length = usable(in_common(kept, prompt), prompt.len(), has_pieces);
    if model.goes_back(other.len(), length) { length } else { 0 }
}

/// The tokens that are kept of a prompt of so many.
fn kept(tokens: usize, has_pieces: bool) -> usize {
    let whole = tokens - tokens % PROMPT_PART;
    // The last part was read with its own rows, or with more than a few of them.
    if has_pieces && tokens - whole > FEW { tokens - tokens % ATTENTION_BLOCK } else { whole }
}

/// The tokens that are not read again of a prompt of `length` tokens whose first `common` ones are known.
fn usable(common: usize, length: usize, has_pieces: bool) -> usize {
    let whole = common - common % PROMPT_PART;
    let end = length.min(whole + PROMPT_PART);
    let last = common.min(end.saturating_sub(FEW + 1));
    if has_pieces { whole.max(last - last % ATTENTION_BLOCK) } else { whole }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_leave_more_than_a_few_rows() {
        for (common, length, whole, want) in [
            (1299, 1300, 1024, 1216),
            (1099, 1100, 1024, 1024),
            (1100, 1300, 1024, 1088),
            (1023, 1024, 512, 896),
            (1024, 1025, 1024, 1024),
            (500, 800, 0, 384),
            (100, 129, 0, 64),
            (100, 128, 0, 0),
            (63, 600, 0, 0),
            (64, 600, 0, 64),
            (0, 1, 0, 0),
        ] {
            assert_eq!(
                (usable(common, length, false), usable(common, length, true)),
                (whole, want),
                "{common} {length}"
            );
        }
        for (tokens, whole, want) in
            [(64, 0, 0), (65, 0, 64), (512, 512, 512), (576, 512, 512), (577, 512, 576), (1100, 1024, 1088)]
        {
            assert_eq!((kept(tokens, false), kept(tokens, true)), (whole, want), "{tokens}");
        }
    }
}
