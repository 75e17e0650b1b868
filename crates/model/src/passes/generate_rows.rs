//! Text after several prompts at once: a token of each row goes through the model in one pass, so
//! that weights are read once for all of them. Prompts are read one after the other, or layer by layer where layers come
//! from the disk (`prompts.rs`).
//!
//! On the CPU an answer has the bits that it would have alone: no sum goes over more than one row,
//! and products of up to [`FEW_ROWS`] rows have one order of sums.

use std::collections::VecDeque;

use finetune_kernels::FEW_ROWS;

use crate::config::{LayerConfig, MixerKind};
use crate::decoder::cache::{KeyValueCache, RowsCache};
use crate::decoder::row_branches::RowBranches;
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::choices::Chosen;
use crate::passes::generate::{Generation, next_token};
use crate::passes::sampling::Sampling;
use crate::tree::expected_tensors;

/// Most rows of a pass where a GPU has a part of it: its kernel for packed weights takes no more.
const ROWS_ON_GPU: usize = 8;
/// Bytes of keys and values that several rows may take in any model.
const CACHE_BYTES: usize = 192 << 20;
/// In a large one they may take a byte for so many parameters: 0.5 GB in a model of 8 billion.
const PARAMETERS_OF_A_BYTE: usize = 16;

/// A prompt, and how it is continued.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowRequest<'a> {
    /// The tokens that are continued.
    pub prompt: &'a [u32],
    /// The most tokens of the answer.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// The tokens that end the answer.
    pub end_ids: &'a [u32],
}

/// Most tokens that are proposed at a time: with the one that is known they are the rows of a pass on any device.
pub const MOST_AHEAD: usize = ROWS_ON_GPU - 1;

/// A row that is continued: its number among the requests, and its next token.
type Running = (usize, u32);

impl Model {
    /// Continues each of the prompts, as [`Model::generate_while`] does alone. `each` is called
    /// with the number of a row and its new token, and says whether that row goes on. A request
    /// with an empty prompt gets no tokens.
    ///
    /// Sixteen rows are held at once, or eight on a GPU: [`Model::rows_at_once`] says how many fit.
    ///
    /// # Errors
    /// If a token of a prompt is not in the vocabulary, if logits are not finite, or if the device
    /// fails.
    pub fn generate_rows(
        &self,
        requests: &[RowRequest<'_>],
        each: &mut dyn FnMut(usize, u32) -> bool,
    ) -> Result<Vec<Generation>, ModelError> {
        requests.iter().try_for_each(|request| self.check_tokens(request.prompt))?;
        let mut generations = Vec::with_capacity(requests.len());
        // A row that becomes long is read again, alone.
        if self.config.is_long(usize::MAX) {
            for (row, request) in requests.iter().enumerate().map(|(row, request)| (row, *request)) {
                let RowRequest { prompt, max_new_tokens, sampling, end_ids } = request;
                let mut each = |token| each(row, token);
                generations.push(self.generate_while(prompt, max_new_tokens, sampling, end_ids, &mut each)?);
            }
            return Ok(generations);
        }
        for requests in requests.chunks(self.most_rows()) {
            let first = generations.len();
            generations.extend(self.generate_together(requests, &mut |row, token| each(first + row, token))?);
        }
        Ok(generations)
    }

    /// As [`Self::generate_rows`], of at most [`Model::most_rows`] rows whose tokens are in the vocabulary.
    fn generate_together(
        &self,
        requests: &[RowRequest<'_>],
        each: &mut dyn FnMut(usize, u32) -> bool,
    ) -> Result<Vec<Generation>, ModelError> {
        let generations = vec![Generation::default(); requests.len()];
        let mut answers = Answers { model: self, requests, each, generations };
        let (running, caches) = answers.read_prompts()?;
        let mut under_way = VecDeque::new();
        let result = answers.begin(running, caches, &mut under_way);
        if let Err(error) = result.and_then(|()| answers.go_on(&mut under_way)) {
            // What others have sent or will send is taken, so that nobody's line is left full.
            under_way.into_iter().for_each(|group| drop(self.taken(group.chosen)));
            return Err(error);
        }
        Ok(answers.generations)
    }

    /// Most rows of a pass: sixteen, or eight if a GPU has a part of it.
    pub fn most_rows(&self) -> usize {
        if self.all_on_cpu() { FEW_ROWS } else { ROWS_ON_GPU }
    }

    /// How many of the first requests are well carried out together: at most sixteen (on a GPU eight), and no more
    /// than have room for their keys and values in 192 MiB or, in a model of more than 3 billion
    /// parameters, in a byte for 16 of them. At least one, if there is one.
    pub fn rows_at_once(&self, requests: &[RowRequest<'_>]) -> usize {
        let most = self.rows_bytes();
        let mut longest = 0;
        let fits = |(n, request): (usize, &RowRequest<'_>)| {
            // All rows get the room of the longest.
            longest = longest.max(request.prompt.len().saturating_add(request.max_new_tokens).min(most));
            self.row_bytes(longest).saturating_mul(n + 1) <= most
        };
        let fitting = requests.iter().take(self.most_rows()).enumerate().map(fits).take_while(|fits| *fits).count();
        fitting.max(1).min(requests.len())
    }

    /// Bytes that the keys and values of rows that are carried out together may take.
    pub fn rows_bytes(&self) -> usize {
        let tensors = expected_tensors(&self.config);
        let parameters: usize = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        CACHE_BYTES.max(parameters / PARAMETERS_OF_A_BYTE)
    }

    /// Logits [rows, v] after the next token of each row, which is added to the cache.
    #[cfg(test)]
    pub(crate) fn read_rows(&self, tokens: &[u32], cache: &mut RowsCache) -> Result<Vec<f32>, ModelError> {
        Ok(self.begin_rows(tokens, cache, None)?.expect("this process has all layers"))
    }

    /// Logits [rows, v] after the next token of each row, which is added to the cache; `None`: another process has
    /// them. `branches`: those of each row, in the place of this
    /// model's.
    pub(crate) fn begin_rows(
        &self,
        tokens: &[u32],
        cache: &mut RowsCache,
        branches: Option<RowBranches>,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let positions: Vec<u32> = cache.lengths().iter().map(|&length| length as u32).collect();
        let ropes = self.rope_tables(&positions, cache.lengths().iter().map(|&length| (1, length + 1)));
        let keys = cache.next_keys(1);
        let wanted: Vec<usize> = (0..tokens.len()).collect();
        cache.read(1, |layers| self.next_logits(tokens, ropes, keys, layers, &wanted, branches))
    }

    /// Whether tokens may be proposed and taken back: a state cannot go back, and a text that is read again when
    /// it becomes long (LongRoPE) is continued alone, a token at a time.
    pub(crate) fn takes_back(&self) -> bool {
        !self.config.is_long(usize::MAX) && !self.has_states()
    }

    /// Whether some of its layers have states, which cannot go back to an earlier token. This process may have none
    /// of those layers.
    pub(crate) fn has_states(&self) -> bool {
        let has_state = |layer: &LayerConfig| matches!(layer.mixer, MixerKind::Delta | MixerKind::Convolution);
        self.config.layers.iter().any(has_state)
    }

    /// Logits [t, v] after each of t tokens that follow the only row of the cache, to which they are added. There
    /// are at most [`FEW_ROWS`], and on the CPU the logits have the bits of t passes of one token: products have one
    /// order of sums, and attention goes over each query's own keys as if it were a row. `None`: another process has
    /// them.
    pub(crate) fn begin_ahead(&self, tokens: &[u32], cache: &mut RowsCache) -> Result<Option<Vec<f32>>, ModelError> {
        let past = cache.lengths()[0];
        let positions: Vec<u32> = (past..past + tokens.len()).map(|position| position as u32).collect();
        let ropes = self.rope_tables(&positions, (1..=tokens.len()).map(|own| (1, past + own)));
        let keys = cache.next_keys(tokens.len());
        let wanted: Vec<usize> = (0..tokens.len()).collect();
        cache.read(tokens.len(), |layers| self.next_logits(tokens, ropes, keys, layers, &wanted, None))
    }
}

/// The requests of which an answer is wanted, and their numbers.
fn asked<'a>(requests: &'a [RowRequest<'a>]) -> impl Iterator<Item = (usize, &'a RowRequest<'a>)> {
    let is_asked = |request: &RowRequest<'_>| request.max_new_tokens > 0 && !request.prompt.is_empty();
    requests.iter().enumerate().filter(move |(_, request)| is_asked(request))
}

/// Rows that go through the model together, and the pass that is under way.
struct Group {
    running: Vec<Running>,
    cache: RowsCache,
    chosen: Chosen,
}

/// Rows that are answered. Where several processes hold the layers, as many passes are under way as there are
/// processes, one behind the other: prompts first, then groups of rows. Otherwise there is one pass, of all rows.
struct Answers<'a> {
    model: &'a Model,
    requests: &'a [RowRequest<'a>],
    each: &'a mut dyn FnMut(usize, u32) -> bool,
    generations: Vec<Generation>,
}

impl Answers<'_> {
    /// Adds a token to its row, and returns whether the row goes on.
    fn take(&mut self, (row, token): Running) -> bool {
        let (request, generation, each) = (&self.requests[row], &mut self.generations[row], &mut self.each);
        let goes_on = generation.take(token, request.end_ids, &mut |token| each(row, token));
        goes_on && generation.tokens.len() < request.max_new_tokens
    }

    /// The rows that go on behind their prompts, with their first tokens and their caches.
    fn read_prompts(&mut self) -> Result<(Vec<Running>, Vec<KeyValueCache>), ModelError> {
        if self.model.reads_prompts_by_layer() {
            return self.read_prompts_by_layer();
        }
        let (mut running, mut caches, mut under_way) = (Vec::new(), Vec::new(), VecDeque::new());
        let mut asked = asked(self.requests);
        loop {
            while under_way.len() < self.model.passes_at_once()
                && let Some((row, request)) = asked.next()
            {
                // Prompts are long enough to use the processor well alone.
                let mut cache = KeyValueCache::of_one_text();
                let logits = self.model.begin_read(request.prompt, &mut cache)?;
                let chosen = self.model.choose_rows(logits.as_deref(), &[(request.sampling, 0)])?;
                under_way.push_back((row, cache, chosen));
            }
            let Some((row, cache, chosen)) = under_way.pop_front() else { return Ok((running, caches)) };
            let request = &self.requests[row];
            let next = match self.model.tokens_of(chosen) {
                Ok(tokens) => tokens.first().map(|&token| (row, token)),
                Err(error) => {
                    under_way.into_iter().for_each(|(.., chosen)| drop(self.model.taken(chosen)));
                    return Err(error);
                }
            };
            self.generations[row].prompt_computed = request.prompt.len();
            if let Some(next) = next.filter(|&next| self.take(next)) {
                running.push(next);
                caches.push(cache);
            }
        }
    }

    /// As [`Self::read_prompts`], with one pass for all.
    fn read_prompts_by_layer(&mut self) -> Result<(Vec<Running>, Vec<KeyValueCache>), ModelError> {
        let (rows, prompts): (Vec<usize>, Vec<&[u32]>) =
            asked(self.requests).map(|(row, request)| (row, request.prompt)).unzip();
        if rows.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let (mut running, mut caches) = (Vec::new(), Vec::new());
        let (logits, read) = self.model.read_by_layer(&prompts)?;
        for ((row, logits), cache) in rows.into_iter().zip(logits).zip(read) {
            let token = next_token(&logits, self.requests[row].sampling, 0)?;
            self.generations[row].prompt_computed = cache.tokens().len();
            if self.take((row, token)) {
                running.push((row, token));
                caches.push(cache);
            }
        }
        Ok((running, caches))
    }

    /// Begins the passes of the rows, which are put into as many groups as passes may be under way.
    fn begin(
        &self,
        mut running: Vec<Running>,
        mut caches: Vec<KeyValueCache>,
        under_way: &mut VecDeque<Group>,
    ) -> Result<(), ModelError> {
        let groups = self.model.passes_at_once().min(running.len());
        for left in (1..=groups).rev() {
            let rows = running.len().div_ceil(left);
            let (others, others_caches) = (running.split_off(rows), caches.split_off(rows));
            let mut cache = RowsCache::join(std::mem::replace(&mut caches, others_caches));
            let running = std::mem::replace(&mut running, others);
            let chosen = self.chosen(&running, &mut cache)?;
            under_way.push_back(Group { running, cache, chosen });
        }
        Ok(())
    }

    /// Takes the tokens of the oldest pass and begins the next one of its rows, until none goes on.
    fn go_on(&mut self, under_way: &mut VecDeque<Group>) -> Result<(), ModelError> {
        while let Some(Group { running, mut cache, chosen }) = under_way.pop_front() {
            let tokens = self.model.tokens_of(chosen)?;
            let next: Vec<Running> = running.iter().zip(tokens).map(|(&(row, _), token)| (row, token)).collect();
            let going: Vec<usize> = (0..next.len()).filter(|&n| self.take(next[n])).collect();
            if going.is_empty() {
                continue;
            }
            if going.len() < running.len() {
                cache.keep(&going);
            }
            let running: Vec<Running> = going.into_iter().map(|n| next[n]).collect();
            let chosen = self.chosen(&running, &mut cache)?;
            under_way.push_back(Group { running, cache, chosen });
        }
        Ok(())
    }

    /// Begins a pass of rows, whose next tokens are chosen at its end.
    fn chosen(&self, running: &[Running], cache: &mut RowsCache) -> Result<Chosen, ModelError> {
        let (requests, generations) = (self.requests, &self.generations);
        let tokens: Vec<u32> = running.iter().map(|&(_, token)| token).collect();
        let logits = self.model.begin_rows(&tokens, cache, None)?;
        let of_row = |&(row, _): &Running| (requests[row].sampling, generations[row].tokens.len());
        self.model.choose_rows(logits.as_deref(), &running.iter().map(of_row).collect::<Vec<_>>())
    }
}
