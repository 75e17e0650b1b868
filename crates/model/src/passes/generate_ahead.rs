//! Text after one prompt, several tokens in a pass: those that followed the last ones before are proposed
//! (`lookup`), and go through the model together with the next one.

use crate::decoder::cache::{KeyValueCache, RowsCache};
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::generate::{Generation, next_token};
use crate::passes::generate_rows::{MOST_AHEAD, RowRequest};
use crate::passes::lookup::Lookup;

impl Model {
    /// As [`Model::generate_while`], with at most `ahead` tokens proposed at a time, and never more than
    /// [`MOST_AHEAD`]. On the CPU the tokens are the same: each is chosen from the logits, and with the random
    /// number, that it has without proposals. Models with states and texts that are read again when they become
    /// long look at no token ahead.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn generate_ahead(
        &self,
        request: &RowRequest<'_>,
        ahead: usize,
        each: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generation, ModelError> {
        let RowRequest { prompt, max_new_tokens, sampling, end_ids } = *request;
        if ahead == 0 || max_new_tokens == 0 || prompt.is_empty() || !self.takes_back() {
            return self.generate_while(prompt, max_new_tokens, sampling, end_ids, each);
        }
        self.check_tokens(prompt)?;
        let mut cache = KeyValueCache::default();
        let logits = self.read(prompt, &mut cache)?;
        let mut generation = Generation { prompt_computed: prompt.len(), ..Generation::default() };
        let mut take = |logits: &[f32], generation: &mut Generation| {
            let token = next_token(logits, sampling, generation.tokens.len())?;
            let goes_on = generation.take(token, end_ids, each) && generation.tokens.len() < max_new_tokens;
            Ok::<_, ModelError>((token, goes_on))
        };
        let (mut token, mut goes_on) = take(&logits, &mut generation)?;
        let mut cache = RowsCache::join(vec![cache]);
        let mut lookup = Lookup::new(prompt, ahead.min(MOST_AHEAD));
        lookup.push(token);
        while goes_on {
            let proposed = lookup.propose(max_new_tokens - generation.tokens.len() - 1);
            let tokens = [&[token], proposed.as_slice()].concat();
            let logits = self.read_ahead(&tokens, &mut cache)?;
            let mut accepted = 0;
            for logits in logits.chunks(logits.len() / tokens.len()) {
                (token, goes_on) = take(logits, &mut generation)?;
                lookup.push(token);
                if !goes_on || proposed.get(accepted) != Some(&token) {
                    break;
                }
                accepted += 1;
            }
            cache.forget_last(proposed.len() - accepted);
            lookup.judge(proposed.len(), accepted);
            generation.speculated.proposed += proposed.len() as u64;
            generation.speculated.accepted += accepted as u64;
        }
        Ok(generation)
    }
}
