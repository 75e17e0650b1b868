//! Keys and values of earlier prompts, for those that begin in the same way.
//!
//! A prompt is read in parts that begin at multiples of 512 tokens, and only whole parts are used
//! again. So an answer has the same bits whether or not its beginning was known.

use std::sync::{Arc, Weak};

use crate::decoder::cache::KeyValueCache;
use crate::model::Model;
use crate::passes::generate::PROMPT_PART;

struct Prefix {
    model: Weak<Model>,
    cache: KeyValueCache,
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
        self.kept.iter().map(|prefix| prefix.cache.bytes()).sum()
    }

    /// Forgets prompts of models that are not there any more.
    pub(super) fn leave_unloaded(&mut self) {
        self.kept.retain(|prefix| prefix.model.strong_count() > 0);
    }

    /// The longest known beginning of a prompt, in whole parts, without its last token: the logits
    /// behind that one choose the next.
    pub(super) fn take(&mut self, model: &Arc<Model>, prompt: &[u32]) -> KeyValueCache {
        let usable = |prefix: &Prefix| {
            if !std::ptr::eq(prefix.model.as_ptr(), Arc::as_ptr(model)) {
                return 0;
            }
            let known = prefix.cache.tokens();
            let common = known.iter().zip(prompt).take_while(|(known, token)| known == token).count();
            let length = whole_parts(common.min(prompt.len().saturating_sub(1)));
            // A state cannot go back.
            if prefix.cache.has_states() && length < known.len() { 0 } else { length }
        };
        let longest = self.kept.iter().enumerate().map(|(n, prefix)| (usable(prefix), n)).max();
        let Some((length, n)) = longest.filter(|(length, _)| *length > 0) else { return KeyValueCache::default() };
        let found = self.kept.remove(n);
        if found.cache.tokens().len() == length {
            // It comes back with more tokens.
            return found.cache;
        }
        let mut cache = found.cache.clone();
        self.kept.push(found);
        cache.truncate(length);
        cache
    }

    /// Keeps the whole parts of a prompt. What was used longest ago goes, if there is no room.
    pub(super) fn put(&mut self, model: &Arc<Model>, mut cache: KeyValueCache) {
        let length = whole_parts(cache.tokens().len());
        if length == 0 || cache.has_states() && length < cache.tokens().len() {
            return;
        }
        cache.truncate(length);
        let model = Arc::downgrade(model);
        // One that begins another is of no use beside it, unless it has states.
        self.kept.retain(|prefix| {
            let is_beginning = cache.tokens().starts_with(prefix.cache.tokens());
            let is_same = prefix.cache.tokens().len() == cache.tokens().len();
            !(prefix.model.ptr_eq(&model) && is_beginning && (is_same || !cache.has_states()))
        });
        self.kept.push(Prefix { model, cache });
        while self.bytes() > self.most_bytes {
            self.kept.remove(0);
        }
    }
}

/// The tokens of the whole parts among so many.
fn whole_parts(tokens: usize) -> usize {
    tokens - tokens % PROMPT_PART
}
