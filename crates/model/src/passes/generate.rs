//! Text from a model, one token at a time, with a cache of keys and values. Several rows at once
//! are in `generate_rows`.

use std::sync::Arc;

use burn::tensor::Tensor;
use finetune_kernels::RopeTable;

use crate::decoder::cache::{CachedKeys, KeyValueCache, LayerCache};
use crate::decoder::pass::Context;
use crate::decoder::row_branches::RowBranches;
use crate::decoder::{self, head};
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::lookup::Speculated;
use crate::passes::sampling::{Sampling, all_finite, choose};
use crate::readback::data;

/// Tokens of a prompt that [`Model::generate_cached`] reads at once. Between two such parts it can
/// be stopped.
pub(crate) const PROMPT_PART: usize = 512;

/// What was generated after a prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Generation {
    /// The new tokens. The end token is the last of them, if there is one.
    pub tokens: Vec<u32>,
    /// The end token that stopped it; `None` if the limit or the caller did.
    pub stopped_by: Option<u32>,
    /// Tokens of the prompt that went through the model. The others were in the cache.
    pub prompt_computed: usize,
    /// What was proposed, if the generation looked ahead.
    pub speculated: Speculated,
}

/// What a generation has just done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GenerationStep {
    /// So many tokens of the prompt are read.
    Prompt(usize),
    /// A new token, which is no end token.
    Token(u32),
}

/// What is asked of a generation.
struct Request<'a> {
    prompt: &'a [u32],
    max_new_tokens: usize,
    sampling: Sampling,
    end_ids: &'a [u32],
    /// Tokens of the prompt that are read at once.
    part: usize,
}

impl Model {
    /// Continues `prompt` by at most `max_new_tokens` tokens, until one of `end_ids` comes. `each`
    /// is called with every new token except that one.
    ///
    /// # Errors
    /// If a token of the prompt is not in the vocabulary, if logits are not finite, or if the
    /// device fails.
    pub fn generate(
        &self,
        prompt: &[u32],
        max_new_tokens: usize,
        sampling: Sampling,
        end_ids: &[u32],
        each: &mut dyn FnMut(u32),
    ) -> Result<Generation, ModelError> {
        let mut go_on = |token| {
            each(token);
            true
        };
        self.generate_while(prompt, max_new_tokens, sampling, end_ids, &mut go_on)
    }

    /// As [`Self::generate`], but ends as soon as `each` returns false.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn generate_while(
        &self,
        prompt: &[u32],
        max_new_tokens: usize,
        sampling: Sampling,
        end_ids: &[u32],
        each: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generation, ModelError> {
        let request = Request { prompt, max_new_tokens, sampling, end_ids, part: usize::MAX };
        let mut each_token = |step| match step {
            GenerationStep::Prompt(_) => true,
            GenerationStep::Token(token) => each(token),
        };
        self.carry_out(&request, &mut KeyValueCache::of_one_text(), &mut each_token)
    }

    /// As [`Self::generate_while`], but only those tokens of the prompt go through the model that
    /// differ from what `cache` holds, and what follows them. The cache holds prompt and answer
    /// afterwards. `each` also hears of every part of the prompt.
    ///
    /// The answer is that of a generation without the cache, up to the rounding of sums that were
    /// made in other parts.
    ///
    /// # Errors
    /// As [`Self::generate`].
    pub fn generate_cached(
        &self,
        prompt: &[u32],
        max_new_tokens: usize,
        sampling: Sampling,
        end_ids: &[u32],
        cache: &mut KeyValueCache,
        each: &mut dyn FnMut(GenerationStep) -> bool,
    ) -> Result<Generation, ModelError> {
        let request = Request { prompt, max_new_tokens, sampling, end_ids, part: PROMPT_PART };
        self.carry_out(&request, cache, each)
    }

    fn carry_out(
        &self,
        request: &Request<'_>,
        cache: &mut KeyValueCache,
        each: &mut dyn FnMut(GenerationStep) -> bool,
    ) -> Result<Generation, ModelError> {
        let Request { prompt, max_new_tokens, sampling, end_ids, part } = *request;
        self.check_tokens(prompt)?;
        let mut generation = Generation::default();
        if max_new_tokens == 0 {
            return Ok(generation);
        }
        let kept = cache.keep_beginning_of(prompt);
        let mut next = None;
        for tokens in prompt[kept..].chunks(part) {
            let is_last = kept + generation.prompt_computed + tokens.len() == prompt.len();
            next = self.next_behind(tokens, cache, is_last.then_some((sampling, 0)))?;
            generation.prompt_computed += tokens.len();
            if !each(GenerationStep::Prompt(kept + generation.prompt_computed)) {
                return Ok(generation);
            }
        }
        while let Some(token) = next {
            let goes_on = generation.take(token, end_ids, &mut |token| each(GenerationStep::Token(token)));
            if !goes_on || generation.tokens.len() >= max_new_tokens {
                break;
            }
            next = self.next_behind(&[token], cache, Some((sampling, generation.tokens.len())))?;
        }
        Ok(generation)
    }

    /// The token after these, which are added to the cache. `asked`: how it is chosen, and how many new ones there
    /// are before it; `None`: it is not asked for.
    pub(crate) fn next_behind(
        &self,
        tokens: &[u32],
        cache: &mut KeyValueCache,
        asked: Option<(Sampling, usize)>,
    ) -> Result<Option<u32>, ModelError> {
        let logits = self.begin_read(tokens, cache)?;
        let chosen = match asked {
            Some(row) => self.choose_rows(logits.as_deref(), &[row])?,
            None => self.choose(logits.as_deref(), vec![None], |_| Vec::new())?,
        };
        Ok(self.tokens_of(chosen)?.first().copied())
    }

    /// Logits [v] of the token after these, which are added to the cache.
    #[cfg(test)]
    pub(crate) fn read(&self, tokens: &[u32], cache: &mut KeyValueCache) -> Result<Vec<f32>, ModelError> {
        Ok(self.begin_read(tokens, cache)?.expect("this process has all layers"))
    }

    /// Logits [v] of the token after these, which are added to the cache. `None`: another process has them.
    ///
    /// Where the text becomes so long that its positions are others, all of it is read again.
    pub(crate) fn begin_read(&self, tokens: &[u32], cache: &mut KeyValueCache) -> Result<Option<Vec<f32>>, ModelError> {
        let is_long = self.config.is_long(cache.tokens().len() + tokens.len());
        if is_long != cache.is_long && !cache.tokens().is_empty() {
            let all = [cache.tokens(), tokens].concat();
            cache.clear();
            return self.begin_read(&all, cache);
        }
        let logits = cache.read(tokens, &self.cache_windows(), |past, keys, layers| {
            self.next_logits(tokens, self.ropes_behind(past, tokens.len()), keys, layers, &[tokens.len() - 1], None)
        })?;
        cache.is_long = is_long;
        Ok(logits)
    }

    /// Logits [wanted, v] behind those of these tokens whose numbers, which ascend, are `wanted`; `None`: another
    /// process has them. The caches hold what was before the tokens. `branches`: those of each token, in the place of this model's.
    pub(crate) fn next_logits(
        &self,
        tokens: &[u32],
        ropes: Vec<RopeTable>,
        keys: CachedKeys,
        caches: &mut [LayerCache],
        wanted: &[usize],
        branches: Option<RowBranches>,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let of_wanted = branches.as_ref().map(|branches| Arc::new(branches.of_rows(wanted)));
        let context = self.reading(ropes, keys, branches);
        self.in_pool(|| {
            let x = self.last_layer(tokens, &context, caches)?;
            self.logits_behind(x, wanted, &Context { branches: of_wanted, ..context.clone() })
        })
    }

    /// The positions of so many tokens of one text behind those that were read.
    pub(crate) fn ropes_behind(&self, past: usize, count: usize) -> Vec<RopeTable> {
        let all = past + count;
        let positions: Vec<u32> = (past..all).map(|p| p as u32).collect();
        self.rope_tables(&positions, std::iter::once((count, all)))
    }

    /// What all layers have to know of a pass that only reads.
    pub(crate) fn reading(&self, ropes: Vec<RopeTable>, keys: CachedKeys, branches: Option<RowBranches>) -> Context {
        Context {
            ropes,
            segments: keys.all,
            windowed: keys.by_window,
            compute: self.placement().compute(),
            training: false,
            dropout: None,
            expert_use: None,
            balance: None,
            sliced: self.weights.sliced.clone(),
            branches: branches.map(Arc::new),
        }
    }

    /// The hidden states [t, hidden] behind the last layer of this process.
    pub(crate) fn last_layer(
        &self,
        tokens: &[u32],
        context: &Context,
        caches: &mut [LayerCache],
    ) -> Result<Tensor<2>, ModelError> {
        let (x, mut between) = decoder::begin(&self.weights, tokens, context)?;
        decoder::layers(&self.weights, x, context, &mut between, Some(caches))
    }

    /// Logits [wanted, v] behind these hidden states; `None`: another process has the output layer. `context`: with the
    /// branches of the wanted rows.
    pub(crate) fn logits_behind(
        &self,
        x: Tensor<2>,
        wanted: &[usize],
        context: &Context,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        if !self.weights.holds_head() {
            return Ok(None);
        }
        let logits = data(head::logits(&self.weights, rows(x, wanted), context))?;
        if let Some(sliced) = &self.weights.sliced {
            sliced.check_alike(&logits)?;
        }
        Ok(Some(logits))
    }

    /// Carries out a pass where it goes fastest.
    pub(crate) fn in_pool<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R {
        if self.placement().is_cpu() {
            // A token goes through hundreds of products of a few microseconds. From a thread outside
            // of rayon's pool, each would wake the pool and wait for it: 700 to 2,600 changes of
            // threads for a token of SmolLM2-135M, a fifth of its time on one thread. From a thread
            // of the pool there are none.
            rayon::scope(|_| pass())
        } else {
            pass()
        }
    }
}

/// These rows, whose numbers ascend: x [t, hidden] -> [rows, hidden].
fn rows(x: Tensor<2>, wanted: &[usize]) -> Tensor<2> {
    let first = wanted.first().copied().unwrap_or(0);
    let follow_each_other = wanted.iter().enumerate().all(|(n, row)| first + n == *row);
    match follow_each_other {
        true => x.narrow(0, first, wanted.len()),
        false => Tensor::cat(wanted.iter().map(|&row| x.clone().narrow(0, row, 1)).collect(), 0),
    }
}

impl Generation {
    /// Adds a token. Returns whether it is no end token, and `each` wants more.
    pub(crate) fn take(&mut self, token: u32, end_ids: &[u32], each: &mut dyn FnMut(u32) -> bool) -> bool {
        self.tokens.push(token);
        self.stopped_by = end_ids.contains(&token).then_some(token);
        self.stopped_by.is_none() && each(token)
    }
}

/// The token after `generated` new ones.
pub(crate) fn next_token(logits: &[f32], sampling: Sampling, generated: usize) -> Result<u32, ModelError> {
    if !all_finite(logits) {
        return Err(ModelError::NotANumber { generated });
    }
    Ok(choose(logits, sampling, generated as u64))
}
