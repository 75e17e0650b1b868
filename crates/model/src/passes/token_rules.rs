//! What may be asked of the choice of a token beside temperature and top_p: penalties, a bias,
//! fewer candidates, and what the model thought of the token.

use std::collections::{HashMap, HashSet};

use crate::error::ModelError;
use crate::passes::form::{Form, allows};
use crate::passes::sampling::{Sampling, all_finite, choose, draw, drawn, maximum, sort, weight};

/// How the tokens of an answer are chosen.
///
/// Logits change in this order: bias, repetition, frequency and presence penalty, which is vLLM's
/// (`v1/sample/sampler.py`). Then come temperature, `top_k`, `top_p` and `min_p`, in the order of
/// transformers (`GenerationMixin._get_logits_processor`). With a [`Sampling`] alone the tokens are
/// those of [`crate::Model::generate`].
#[derive(Clone, Debug, PartialEq)]
pub struct TokenRules {
    /// Temperature, `top_p` and seed.
    pub sampling: Sampling,
    /// Only so many of the most likely tokens are drawn from. 0: all.
    pub top_k: usize,
    /// Only tokens that are at least so likely, as a share of the most likely one, are drawn from.
    /// 0: all.
    pub min_p: f64,
    /// Divides the logits above 0 of all tokens of prompt and answer, and multiplies those below
    /// (Keskar et al. 2019). 1: nothing changes.
    pub repetition_penalty: f64,
    /// Is taken from the logit of each token of the answer.
    pub presence_penalty: f64,
    /// Is taken from the logit of a token of the answer as often as it is there.
    pub frequency_penalty: f64,
    /// Is added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Whether the logarithms of probabilities are wanted, and of how many of the likeliest tokens.
    pub logprobs: Option<usize>,
    /// Whether they are wanted of the tokens of the prompt, too. Then all of it is read, whatever is known of it.
    pub of_prompt: bool,
    /// These do not come before so many other tokens: what would end an answer that has a least length.
    pub not_before: (Vec<u32>, usize),
}

impl From<Sampling> for TokenRules {
    fn from(sampling: Sampling) -> TokenRules {
        TokenRules {
            sampling,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            logprobs: None,
            of_prompt: false,
            not_before: (Vec::new(), 0),
        }
    }
}

/// A token, and what the model thought of it.
#[derive(Clone, Debug, PartialEq)]
pub struct ChosenToken {
    /// Its number in the vocabulary.
    pub token: u32,
    /// If it was asked for.
    pub logprobs: Option<Logprobs>,
}

impl From<u32> for ChosenToken {
    fn from(token: u32) -> ChosenToken {
        ChosenToken { token, logprobs: None }
    }
}

/// Natural logarithms of probabilities, of the model's own logits, which nothing has changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The likeliest tokens with theirs, the likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the tokens of one answer.
pub(crate) struct Chooser {
    rules: TokenRules,
    /// Different tokens of the prompt, if they have a penalty.
    prompt: HashSet<u32>,
    /// How often each token is in the answer.
    counts: HashMap<u32, u32>,
    chosen: usize,
    form: Option<Box<dyn Form>>,
}

impl Chooser {
    pub(crate) fn new(rules: TokenRules, prompt: &[u32]) -> Chooser {
        let has_penalty = rules.repetition_penalty != 1.0;
        let prompt = if has_penalty { prompt.iter().copied().collect() } else { HashSet::new() };
        Chooser { rules, prompt, counts: HashMap::new(), chosen: 0, form: None }
    }

    /// As this, of an answer that has to have a form.
    pub(crate) fn with_form(self, form: Option<Box<dyn Form>>) -> Chooser {
        Chooser { form, ..self }
    }

    /// How many of the likeliest tokens are wanted with their logarithms of probabilities, if these are.
    pub(crate) fn logprobs(&self) -> Option<usize> {
        self.rules.logprobs
    }

    /// The same of the tokens of the prompt.
    pub(crate) fn of_prompt(&self) -> Option<usize> {
        self.rules.logprobs.filter(|_| self.rules.of_prompt)
    }

    /// The next token of the answer.
    pub(crate) fn next(&mut self, logits: &[f32]) -> Result<ChosenToken, ModelError> {
        if !all_finite(logits) {
            return Err(ModelError::NotANumber { generated: self.chosen });
        }
        let token = match self.form.take() {
            None => self.choose(logits, None),
            Some(mut form) => {
                let token = self.choose_formed(logits, form.as_mut())?;
                self.form = Some(form);
                token
            }
        };
        let logprobs = self.rules.logprobs.map(|top| logprobs(logits, token, top));
        *self.counts.entry(token).or_default() += 1;
        self.chosen += 1;
        Ok(ChosenToken { token, logprobs })
    }

    /// The next token among those that the form allows.
    fn choose_formed(&self, logits: &[f32], form: &mut dyn Form) -> Result<u32, ModelError> {
        let failed = |what: String| ModelError::Form { what };
        let allowed = form.allowed().map_err(failed)?;
        let mut token = self.choose(logits, Some(allowed));
        if !allows(allowed, token as usize) {
            // A draw at the very end of the probabilities may meet a token without any.
            let of_allowed = logits.iter().enumerate().filter(|(token, _)| allows(allowed, *token));
            let likeliest = of_allowed.max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
            token = likeliest.ok_or_else(|| failed("no token of the model fits".to_owned()))?.0 as u32;
        }
        form.take(token).map_err(failed)?;
        Ok(token)
    }

    fn choose(&self, logits: &[f32], allowed: Option<&[u32]>) -> u32 {
        let TokenRules { sampling, top_k, min_p, .. } = self.rules;
        let position = self.chosen as u64;
        let is_drawn = sampling.temperature > 0.0;
        let (few, likely) = (is_drawn && top_k > 0 && top_k < logits.len(), is_drawn && min_p > 0.0);
        if allowed.is_none() && !few && !likely && !self.changes_logits() {
            return choose(logits, sampling, position);
        }
        let mut logits = logits.to_vec();
        self.change(&mut logits);
        if let Some(allowed) = allowed {
            let others = logits.iter_mut().enumerate().filter(|(token, _)| !allows(allowed, *token));
            others.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
        }
        if few {
            keep_largest(&mut logits, top_k);
        }
        match likely {
            true => among_likely(&logits, sampling, min_p, drawn(sampling.seed, position)),
            false => choose(&logits, sampling, position),
        }
    }

    fn changes_logits(&self) -> bool {
        let TokenRules { repetition_penalty, presence_penalty, frequency_penalty, logit_bias, .. } = &self.rules;
        !logit_bias.is_empty()
            || *repetition_penalty != 1.0
            || !self.counts.is_empty() && (*presence_penalty != 0.0 || *frequency_penalty != 0.0)
            || !self.held_back().is_empty()
    }

    /// The tokens that may not come yet.
    fn held_back(&self) -> &[u32] {
        let (tokens, least) = &self.rules.not_before;
        if self.chosen < *least { tokens } else { &[] }
    }

    /// Adds the bias and applies the penalties. All logits stay finite.
    fn change(&self, logits: &mut [f32]) {
        let rules = &self.rules;
        let mut change = |token: u32, to: &dyn Fn(f64) -> f64| {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = (to(f64::from(*logit)) as f32).clamp(f32::MIN, f32::MAX);
            }
        };
        for &(token, bias) in &rules.logit_bias {
            change(token, &|logit| logit + f64::from(bias));
        }
        let penalty = rules.repetition_penalty;
        if penalty != 1.0 {
            let repeated = |logit: f64| if logit > 0.0 { logit / penalty } else { logit * penalty };
            self.prompt.iter().for_each(|&token| change(token, &repeated));
            let only_answered = self.counts.keys().filter(|token| !self.prompt.contains(token));
            only_answered.for_each(|&token| change(token, &repeated));
        }
        let (presence, frequency) = (rules.presence_penalty, rules.frequency_penalty);
        if presence != 0.0 || frequency != 0.0 {
            for (&token, &count) in &self.counts {
                change(token, &|logit| logit - frequency * f64::from(count) - presence);
            }
        }
        for &token in self.held_back() {
            change(token, &|_| f64::from(f32::MIN));
        }
    }
}

/// Makes all logits but the `count` largest -inf. Of equal ones the first tokens stay.
fn keep_largest(logits: &mut [f32], count: usize) {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_size = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    order.select_nth_unstable_by(count - 1, by_size);
    order[count..].iter().for_each(|&token| logits[token as usize] = f32::NEG_INFINITY);
}

/// Draws from the tokens that `top_p` keeps and that are at least `min_p` times as likely as the
/// likeliest. Only the latter are sorted.
fn among_likely(logits: &[f32], sampling: Sampling, min_p: f64, drawn: f64) -> u32 {
    let max = maximum(logits);
    let (mut total, mut likely) = (0.0, Vec::new());
    for (token, &logit) in (0..).zip(logits) {
        let weight = weight(logit, max, sampling.temperature);
        total += weight;
        if weight >= min_p {
            likely.push((token, weight));
        }
    }
    sort(&mut likely);
    let mut kept = 0.0;
    let last = likely.iter().position(|(_, weight)| {
        kept += weight;
        kept >= sampling.top_p * total
    });
    likely.truncate(last.map_or(likely.len(), |last| last + 1));
    draw(&likely, drawn * kept)
}

/// What is thought of a token, and of so many of the likeliest.
pub(crate) fn logprobs(logits: &[f32], token: u32, top: usize) -> Logprobs {
    let max = f64::from(maximum(logits));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    let of = |token: u32| (f64::from(logits[token as usize]) - max - sum.ln()) as f32;
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_size = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if top > 0 && top < order.len() {
        order.select_nth_unstable_by(top - 1, by_size);
    }
    order.truncate(top);
    order.sort_unstable_by(by_size);
    Logprobs { chosen: of(token), top: order.into_iter().map(|token| (token, of(token))).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DRAWN: Sampling = Sampling { temperature: 1.0, top_p: 1.0, seed: 0 };

    /// The tokens that 300 seeds draw.
    fn drawn_tokens(logits: &[f32], rules: &TokenRules) -> Vec<u32> {
        let draw = |seed| {
            let rules = TokenRules { sampling: Sampling { seed, ..rules.sampling }, ..rules.clone() };
            Chooser::new(rules, &[]).next(logits).expect("finite logits").token
        };
        let mut tokens: Vec<u32> = (0..300).map(draw).collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    #[test]
    fn fewer_candidates_are_drawn_from() {
        // Weights 1, 0.5, 0.5, 0.25.
        let logits = [0.25f32.ln(), 0.0, 0.5f32.ln(), 0.5f32.ln()];
        let all = TokenRules::from(DRAWN);
        let half = Sampling { top_p: 0.6, ..DRAWN };
        for (rules, want) in [
            (all.clone(), &[0, 1, 2, 3][..]),
            (TokenRules { top_k: 1, ..all.clone() }, &[1]),
            (TokenRules { top_k: 2, ..all.clone() }, &[1, 2]),
            (TokenRules { top_k: 9, ..all.clone() }, &[0, 1, 2, 3]),
            (TokenRules { min_p: 0.4, ..all.clone() }, &[1, 2, 3]),
            (TokenRules { min_p: 0.6, ..all.clone() }, &[1]),
            (TokenRules { min_p: 1e-9, ..TokenRules::from(half) }, &[1, 2]),
            (TokenRules { top_k: 3, min_p: 0.1, ..TokenRules::from(half) }, &[1, 2]),
            (TokenRules { top_k: 2, ..TokenRules::from(half) }, &[1]),
        ] {
            assert_eq!(drawn_tokens(&logits, &rules), want, "{rules:?}");
        }
    }

    /// A `min_p` that leaves nothing out draws what is drawn without it.
    #[test]
    fn a_share_of_nothing_changes_no_draw() {
        let logits: Vec<f32> = (0..500).map(|n| ((n * 37) % 101) as f32 / 20.0).collect();
        for seed in 0..200 {
            let sampling = Sampling { temperature: 0.8, top_p: 0.9, seed };
            let rules = TokenRules { min_p: 1e-12, ..TokenRules::from(sampling) };
            let got = Chooser::new(rules, &[]).next(&logits).expect("finite logits").token;
            assert_eq!(got, choose(&logits, sampling, 0), "{seed}");
        }
    }

    #[test]
    fn penalties_and_bias_change_logits() {
        let greedy = TokenRules::from(Sampling::GREEDY);
        let logits = [2.0, 1.9, -1.0];
        for (rules, want) in [
            (greedy.clone(), [0, 0, 0]),
            (TokenRules { presence_penalty: 0.2, ..greedy.clone() }, [0, 1, 0]),
            (TokenRules { frequency_penalty: 0.06, ..greedy.clone() }, [0, 0, 1]),
            (TokenRules { repetition_penalty: 1.1, ..greedy.clone() }, [0, 1, 0]),
            (TokenRules { logit_bias: vec![(2, 10.0), (99, 5.0)], ..greedy.clone() }, [2, 2, 2]),
            (TokenRules { logit_bias: vec![(0, -100.0)], ..greedy.clone() }, [1, 1, 1]),
        ] {
            let mut chooser = Chooser::new(rules.clone(), &[]);
            let got: Vec<u32> = (0..3).map(|_| chooser.next(&logits).expect("finite logits").token).collect();
            assert_eq!(got, want, "{rules:?}");
        }
        let rules = TokenRules { repetition_penalty: 2.0, ..greedy };
        let of_prompt = Chooser::new(rules.clone(), &[0, 0, 1]).next(&[2.0, 1.9, 1.5]).expect("finite logits");
        assert_eq!(of_prompt.token, 2, "tokens of the prompt have it, once each");
        let mut huge = Chooser::new(TokenRules { repetition_penalty: 10.0, ..rules }, &[0]);
        assert_eq!(huge.next(&[f32::MIN, f32::MIN]).expect("finite logits").token, 0, "nothing becomes infinite");
    }

    /// Whatever speaks for it, a token that is held back comes after the others only.
    #[test]
    fn a_token_that_is_held_back_waits() {
        let greedy = TokenRules::from(Sampling::GREEDY);
        let drawn = TokenRules { logit_bias: vec![(0, 100.0)], min_p: 0.1, ..TokenRules::from(DRAWN) };
        for rules in [greedy, drawn] {
            let rules = TokenRules { not_before: (vec![0, 99], 2), ..rules };
            let mut chooser = Chooser::new(rules, &[]);
            let got = [(); 3].map(|()| chooser.next(&[9.0, 2.0, -70.0]).expect("finite logits").token);
            assert_eq!(got, [1, 1, 0]);
        }
    }

    #[test]
    fn logprobs_are_the_models_own() {
        let rules = TokenRules {
            logprobs: Some(2),
            logit_bias: vec![(0, 9.0)],
            ..TokenRules::from(Sampling { temperature: 0.1, ..DRAWN })
        };
        let chosen = Chooser::new(rules, &[]).next(&[0.0, 2f32.ln(), 0.0]).expect("finite logits");
        let logprobs = chosen.logprobs.expect("asked for");
        let near = |got: f32, want: f32| assert!((got - want.ln()).abs() < 1e-6, "{got} {want}");
        assert_eq!(chosen.token, 0);
        near(logprobs.chosen, 0.25);
        assert_eq!(logprobs.top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [1, 0]);
        near(logprobs.top[0].1, 0.5);
    }

    /// Allows what is not yet taken of some tokens.
    struct OnceEach(Vec<u32>);

    impl Form for OnceEach {
        fn allowed(&mut self) -> Result<&[u32], String> {
            if self.0.iter().all(|word| *word == 0) { Err("nothing is left".to_owned()) } else { Ok(&self.0) }
        }

        fn take(&mut self, token: u32) -> Result<(), String> {
            self.0[token as usize / 32] &= !(1 << (token % 32));
            Ok(())
        }
    }

    /// Whatever the rules, only tokens that are allowed come.
    #[test]
    fn a_form_leaves_its_tokens_only() {
        let logits: Vec<f32> = (0..40).map(|n| 40.0 - n as f32).collect();
        let greedy = TokenRules::from(Sampling::GREEDY);
        let drawn = TokenRules::from(DRAWN);
        for rules in [
            greedy.clone(),
            drawn.clone(),
            TokenRules { top_k: 1, ..drawn.clone() },
            TokenRules { top_k: 30, ..drawn.clone() },
            TokenRules { min_p: 0.5, ..drawn.clone() },
            TokenRules { logit_bias: vec![(0, 100.0)], ..drawn },
        ] {
            // Tokens 3, 9 and 35: the last one is behind 32.
            let form: Box<dyn Form> = Box::new(OnceEach(vec![1 << 3 | 1 << 9, 1 << 3]));
            let mut chooser = Chooser::new(rules.clone(), &[]).with_form(Some(form));
            let mut got: Vec<u32> = (0..3).map(|_| chooser.next(&logits).expect("one is left").token).collect();
            if rules == greedy {
                assert_eq!(got, [3, 9, 35]);
            }
            got.sort_unstable();
            assert_eq!(got, [3, 9, 35], "{rules:?}");
            let error = chooser.next(&logits).expect_err("nothing is left");
            assert!(matches!(&error, ModelError::Form { what } if what == "nothing is left"), "{error}");
        }
        let form: Box<dyn Form> = Box::new(OnceEach(vec![0, 1 << 8]));
        let error = Chooser::new(greedy, &[]).with_form(Some(form)).next(&logits).expect_err("the model has 40 tokens");
        assert!(matches!(error, ModelError::Form { .. }), "{error}");
    }

    #[test]
    fn logits_that_are_not_finite_are_refused() {
        let mut chooser = Chooser::new(TokenRules::from(Sampling::GREEDY), &[]);
        assert!(matches!(chooser.next(&[0.0, f32::NAN]), Err(ModelError::NotANumber { generated: 0 })));
    }
}
