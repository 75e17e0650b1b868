//! Text after one prompt, several tokens in a pass: those that followed the last ones before are proposed
//! (`lookup`), and go through the model together with the next one.

use crate::decoder::cache::{KeyValueCache, RowsCache};
use crate::error::ModelError;
use crate::model::Model;
use crate::passes::choices::Choice;
use crate::passes::generate::{Generation, next_token};
use crate::passes::generate_rows::{MOST_AHEAD, RowRequest};
use crate::passes::lookup::Lookup;
use crate::passes::token_rules::ChosenToken;

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
        let mut cache = KeyValueCache::of_one_text();
        let mut generation = Generation { prompt_computed: prompt.len(), ..Generation::default() };
        let Some(mut token) = self.next_behind(prompt, &mut cache, Some((sampling, 0)))? else {
            return Ok(generation);
        };
        let mut take = |token: u32, generation: &mut Generation| {
            generation.take(token, end_ids, each) && generation.tokens.len() < max_new_tokens
        };
        let mut goes_on = take(token, &mut generation);
        let mut cache = RowsCache::join(vec![cache]);
        let mut lookup = Lookup::new(prompt, ahead.min(MOST_AHEAD));
        lookup.push(token);
        while goes_on {
            let proposed = lookup.propose(max_new_tokens - generation.tokens.len() - 1);
            let tokens = [&[token], proposed.as_slice()].concat();
            let logits = self.begin_ahead(&tokens, &mut cache)?;
            let generated = generation.tokens.len();
            let chosen = self.choose(logits.as_deref(), vec![None; tokens.len()], |logits| {
                chosen_ahead(&proposed, logits, |n, logits| {
                    next_token(logits, sampling, generated + n).map(ChosenToken::from)
                })
            })?;
            let mut accepted = 0;
            for chosen in self.taken(chosen)?.into_iter().flatten() {
                token = chosen?.token;
                goes_on = take(token, &mut generation);
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

/// What is chosen behind the next token and behind each of the proposed ones, as long as these are what is chosen.
/// `choose`: from the logits behind so many of the proposed ones.
pub(crate) fn chosen_ahead(
    proposed: &[u32],
    logits: &[f32],
    mut choose: impl FnMut(usize, &[f32]) -> Result<ChosenToken, ModelError>,
) -> Vec<Choice> {
    let mut choices = Vec::with_capacity(1 + proposed.len());
    for (n, logits) in logits.chunks(logits.len() / (1 + proposed.len())).enumerate() {
        let chosen = choose(n, logits);
        let goes_on = chosen.as_ref().is_ok_and(|chosen| proposed.get(n) == Some(&chosen.token));
        choices.push(Some(chosen));
        if !goes_on {
            break;
        }
    }
    choices
}
