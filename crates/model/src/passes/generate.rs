//! Text from a model, one token at a time, with a cache of keys and values.

use finetune_kernels::Segments;
use finetune_random::{Stream, unit};

use crate::decoder::cache::{KeyValueCache, LayerCache};
use crate::decoder::pass::Context;
use crate::decoder::{self, head};
use crate::error::ModelError;
use crate::model::Model;
use crate::random_stream::RandomStream;
use crate::readback::data;

/// Tokens of a prompt that [`Model::generate_cached`] reads at once. Between two such parts it can
/// be stopped.
const PROMPT_PART: usize = 512;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0: the most likely token is taken. Otherwise logits are divided by it.
    pub temperature: f64,
    /// Tokens are drawn from the smallest set whose probability reaches this (Holtzman et al. 2020,
    /// "nucleus sampling").
    pub top_p: f64,
    /// Keys the random numbers.
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
}

/// What was generated after a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// The new tokens. The end token is the last of them, if there is one.
    pub tokens: Vec<u32>,
    /// The end token that stopped it; `None` if the limit or the caller did.
    pub stopped_by: Option<u32>,
    /// Tokens of the prompt that went through the model. The others were in the cache.
    pub prompt_computed: usize,
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
        self.carry_out(&request, &mut KeyValueCache::default(), &mut each_token)
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
        let mut generation = Generation { tokens: Vec::new(), stopped_by: None, prompt_computed: 0 };
        if max_new_tokens == 0 {
            return Ok(generation);
        }
        let kept = cache.keep_beginning_of(prompt);
        let mut logits = Vec::new();
        for tokens in prompt[kept..].chunks(part) {
            logits = self.read(tokens, cache)?;
            generation.prompt_computed += tokens.len();
            if !each(GenerationStep::Prompt(kept + generation.prompt_computed)) {
                return Ok(generation);
            }
        }
        while !logits.is_empty() {
            if !logits.iter().all(|logit| logit.is_finite()) {
                return Err(ModelError::NotANumber { generated: generation.tokens.len() });
            }
            let token = choose(&logits, sampling, generation.tokens.len() as u64);
            generation.tokens.push(token);
            if end_ids.contains(&token) {
                generation.stopped_by = Some(token);
                break;
            }
            if !each(GenerationStep::Token(token)) || generation.tokens.len() >= max_new_tokens {
                break;
            }
            logits = self.read(&[token], cache)?;
        }
        Ok(generation)
    }

    /// Logits [v] of the token after these, which are added to the cache.
    fn read(&self, tokens: &[u32], cache: &mut KeyValueCache) -> Result<Vec<f32>, ModelError> {
        cache.read(tokens, self.weights.layers.len(), |past, layers| self.next_logits(tokens, past, layers))
    }

    /// Logits [v] of the token after these. The caches hold `past` earlier tokens.
    fn next_logits(&self, tokens: &[u32], past: usize, caches: &mut [LayerCache]) -> Result<Vec<f32>, ModelError> {
        let positions: Vec<u32> = (past..past + tokens.len()).map(|p| p as u32).collect();
        let context = Context {
            ropes: self.rope_tables(&positions),
            segments: Segments::cached(tokens.len(), past + tokens.len()),
            compute: self.placement().compute(),
            training: false,
            dropout: None,
        };
        let x = decoder::embed(&self.weights, tokens, &context);
        let x = decoder::layers(&self.weights, x, &context, Some(caches), &mut |_, _| {});
        let last = x.narrow(0, tokens.len() - 1, 1);
        data(head::logits(&self.weights, last, &context))
    }
}

/// The next token. Draws are a function of (seed, position), so a seed always gives the same text.
fn choose(logits: &[f32], sampling: Sampling, position: u64) -> u32 {
    let best = |a: &(usize, f32), b: &(usize, f32)| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0));
    let all = || logits.iter().copied().enumerate();
    if sampling.temperature <= 0.0 {
        return all().max_by(best).expect("a vocabulary").0 as u32;
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights: Vec<(usize, f64)> =
        all().map(|(token, logit)| (token, (f64::from(logit - max) / sampling.temperature).exp())).collect();
    weights.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let mut kept = 0.0;
    let count = weights
        .iter()
        .position(|(_, weight)| {
            kept += weight;
            kept >= sampling.top_p * total
        })
        .map_or(weights.len(), |last| last + 1);
    weights.truncate(count);
    let kept: f64 = weights.iter().map(|(_, weight)| weight).sum();
    let word = Stream::new(sampling.seed, RandomStream::Sampling as u32, position, 0).block([0; 4])[0];
    let mut left = f64::from(unit(word)) * kept;
    for (token, weight) in &weights {
        left -= weight;
        if left < 0.0 {
            return *token as u32;
        }
    }
    weights.last().expect("at least one token is kept").0 as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_probabilities() {
        // p = 0.5, 0.25, 0.25
        let logits = [2f32.ln(), 0.0, 0.0];
        let mut counts = [0; 3];
        for seed in 0..4000 {
            counts[choose(&logits, Sampling { temperature: 1.0, top_p: 1.0, seed }, 0) as usize] += 1;
        }
        assert!((1850..2150).contains(&counts[0]) && (900..1100).contains(&counts[1]), "{counts:?}");
    }

    #[test]
    fn top_p_keeps_the_most_likely_and_greedy_takes_the_first_of_equals() {
        let logits = [0.0, 2f32.ln(), 0.0];
        for seed in 0..200 {
            assert_eq!(choose(&logits, Sampling { temperature: 1.0, top_p: 0.4, seed }, 3), 1);
        }
        assert_eq!(choose(&[1.0, 3.0, 3.0], Sampling::GREEDY, 0), 1);
    }
}
