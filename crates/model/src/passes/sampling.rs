//! The choice of the next token from its logits.
//!
//! A draw is defined by [`from_all`], which sorts the vocabulary. [`from_likely`] gives the same
//! token from the few that can be drawn, or says that it cannot tell.

use finetune_random::{Stream, unit};

use crate::random_stream::RandomStream;

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

/// Temperatures at which [`from_likely`] computes. Beyond them f32 has no room for its masses.
const TEMPERATURES: std::ops::RangeInclusive<f64> = 1e-3..=1e3;
/// Classes of logits by their distance from the largest.
const CLASSES: usize = 256;
/// Classes in a factor of e of the probability.
const CLASSES_PER_E: f32 = 8.0;
/// Relative error of a total that was summed from f32 masses: at most 4e-6 with a million tokens.
const F32_ERROR: f64 = 1e-5;
/// Relative error of a total of f64 weights in any order: at most 2e-10 with a million tokens.
const F64_ERROR: f64 = 1e-9;

/// The next token. Draws are a function of (seed, position), so a seed always gives the same text.
pub(crate) fn choose(logits: &[f32], sampling: Sampling, position: u64) -> u32 {
    if sampling.temperature <= 0.0 {
        return most_likely(logits);
    }
    let drawn = drawn(sampling.seed, position);
    from_likely(logits, sampling, drawn).unwrap_or_else(|| from_all(logits, sampling, drawn))
}

/// The random number in [0, 1) that decides the token at a position.
pub(super) fn drawn(seed: u64, position: u64) -> f64 {
    f64::from(unit(Stream::new(seed, RandomStream::Sampling as u32, position, 0).block([0; 4])[0]))
}

/// Whether all logits are finite. It looks at every one, which is faster than to stop at the first
/// that is not.
pub(crate) fn all_finite(logits: &[f32]) -> bool {
    logits.iter().fold(true, |all, logit| all & logit.is_finite())
}

/// The token with the largest logit, the first of equals. 0 is above -0.
fn most_likely(logits: &[f32]) -> u32 {
    let max = maximum(logits);
    let zero = if max == 0.0 { logits.iter().position(|logit| logit.to_bits() == 0) } else { None };
    zero.or_else(|| logits.iter().position(|&logit| logit == max)).unwrap_or(0) as u32
}

/// The largest of the values; -inf if there are none.
pub(super) fn maximum(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let chunks = values.chunks_exact(lanes.len());
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if value > *lane { value } else { *lane };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The weight of a logit: its probability over that of the largest logit.
pub(super) fn weight(logit: f32, max: f32, temperature: f64) -> f64 {
    (f64::from(logit - max) / temperature).exp()
}

/// The order in which tokens are drawn: by weight, and by number if weights are equal.
pub(super) fn sort(weights: &mut [(u32, f64)]) {
    weights.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
}

/// Draws with `drawn`, in [0, 1), from all tokens in their order: the definition of a draw.
///
/// Tokens are kept until their weights reach `top_p` of the total. The kept weights are then taken
/// from `drawn` of their sum until nothing is left.
fn from_all(logits: &[f32], sampling: Sampling, drawn: f64) -> u32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weighted = |(token, &logit): (usize, &f32)| (token as u32, weight(logit, max, sampling.temperature));
    let mut weights: Vec<(u32, f64)> = logits.iter().enumerate().map(weighted).collect();
    sort(&mut weights);
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
    draw(&weights, drawn * kept)
}

/// The token at which `left` falls below 0 when the weights are taken from it in their order.
pub(super) fn draw(weights: &[(u32, f64)], mut left: f64) -> u32 {
    for (token, weight) in weights {
        left -= weight;
        if left < 0.0 {
            return *token;
        }
    }
    weights.last().map_or(0, |(token, _)| *token)
}

/// The token of [`from_all`], without the order of those that are not drawn. `None` if the tokens
/// that it sorts do not tell.
///
/// The order of a sum decides its last bits, so a total in another order is known within bounds. If
/// a comparison is closer than these, it is not decided here.
fn from_likely(logits: &[f32], sampling: Sampling, drawn: f64) -> Option<u32> {
    let Sampling { temperature, top_p, .. } = sampling;
    let max = maximum(logits);
    if !max.is_finite() || !TEMPERATURES.contains(&temperature) {
        return None;
    }
    // How far below the largest logit a token is, in factors of e.
    let inverse = (1.0 / temperature) as f32;
    let below = |logit: f32| (max - logit) * inverse;
    let mut masses = [0f64; CLASSES];
    for &logit in logits {
        let below = below(logit);
        masses[((below * CLASSES_PER_E) as usize).min(CLASSES - 1)] += f64::from((-below).exp());
    }
    let total: f64 = masses.iter().sum();
    // With top_p = 1 all tokens are kept, and only those up to the drawn one matter.
    let needed = if top_p < 1.0 { top_p } else { drawn } * total * (1.0 + 2.0 * F32_ERROR);
    let mut reached = 0.0;
    let last = masses[..CLASSES - 2].iter().position(|mass| {
        reached += mass;
        reached >= needed
    })?;
    // One class more is sorted. All that is not sorted is then clearly less likely than what is
    // drawn from.
    let from = (last + 2) as f32 / CLASSES_PER_E;
    let least = (-(last as f64 + 1.5) / f64::from(CLASSES_PER_E)).exp();
    let mut weights: Vec<(u32, f64)> = (0..)
        .zip(logits)
        .filter(|&(_, &logit)| below(logit) < from)
        .map(|(token, &logit)| (token, weight(logit, max, temperature)))
        .collect();
    sort(&mut weights);
    weights.truncate(weights.partition_point(|(_, weight)| *weight >= least));
    let decide = |total: f64, error: f64| {
        if top_p < 1.0 {
            from_kept(&weights, top_p * total, top_p * total * error, drawn)
        } else {
            from_beginning(&weights, drawn * total, total * error)
        }
    };
    decide(total, F32_ERROR)
        .or_else(|| decide(logits.iter().map(|&logit| weight(logit, max, temperature)).sum(), F64_ERROR))
}

/// Draws from the first tokens whose weights reach `wanted`, which is known within `error`.
fn from_kept(weights: &[(u32, f64)], wanted: f64, error: f64, drawn: f64) -> Option<u32> {
    let mut kept = 0.0;
    let last = weights.iter().position(|(_, weight)| {
        kept += weight;
        kept >= wanted - error
    })?;
    (kept >= wanted + error).then(|| draw(&weights[..=last], drawn * kept))
}

/// As [`draw`], of a `left` that is known within `error`.
fn from_beginning(weights: &[(u32, f64)], mut left: f64, error: f64) -> Option<u32> {
    for (token, weight) in weights {
        left -= weight;
        if left < error {
            return (left < -error).then_some(*token);
        }
    }
    None
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
        let cases: [(&[f32], u32); 6] = [
            (&[1.0, 3.0, 3.0], 1),
            (&[-0.0, -1.0, 0.0, 0.0], 2),
            (&[-2.0, -0.0, -0.0], 1),
            (&[f32::NEG_INFINITY; 3], 0),
            (&[f32::NEG_INFINITY, -1e30, f32::MIN], 1),
            (&[5.0], 0),
        ];
        for (logits, want) in cases {
            assert_eq!(choose(logits, Sampling::GREEDY, 0), want, "{logits:?}");
        }
    }

    /// Logits of a vocabulary of `n` tokens: what a model says, and what it hardly ever says.
    fn kinds(n: usize, seed: u64) -> Vec<(&'static str, Vec<f32>)> {
        let normal = |deviation| Stream::new(seed, 77, 0, 0).normal(n, deviation);
        let mut peaked = normal(2.0);
        peaked[n / 2] = 25.0;
        let mut masked = normal(3.0);
        masked.iter_mut().skip(1).step_by(3).for_each(|logit| *logit = f32::NEG_INFINITY);
        let mut few = vec![-40.0; n];
        few.iter_mut().step_by(97).zip(normal(1.0)).for_each(|(logit, value)| *logit = value);
        vec![
            ("normal", normal(3.0)),
            ("flat", vec![0.25; n]),
            ("nearly flat", normal(1e-6)),
            ("peaked", peaked),
            ("ties", normal(2.0).iter().map(|logit| logit.round()).collect()),
            ("wide", normal(60.0)),
            ("masked", masked),
            ("few", few),
            ("tiny", normal(1e-30)),
            ("zero and -0", normal(1.0).iter().map(|logit| logit * 0.0).collect()),
        ]
    }

    /// Every draw is that of the sorted vocabulary, and most are decided without sorting it.
    #[test]
    fn a_draw_is_that_of_the_sorted_vocabulary() {
        let (mut draws, mut undecided) = (0, 0);
        for n in [1, 2, 17, 1000, 5000] {
            for (kind, logits) in kinds(n, n as u64) {
                for temperature in [1e-6, 0.1, 0.7, 1.0, 1.5, 40.0, 1e9] {
                    for top_p in [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0] {
                        let draw = Stream::new(n as u64, 78, draws, 0).uniform(4, 0.5);
                        for drawn in draw.iter().map(|value| f64::from(value + 0.5)).chain([0.0, 0.999_999_94]) {
                            let sampling = Sampling { temperature, top_p, seed: 0 };
                            let want = from_all(&logits, sampling, drawn);
                            let got = from_likely(&logits, sampling, drawn);
                            let words = format!("{kind}, {n} tokens, {sampling:?}, drawn {drawn}");
                            assert_eq!(got.unwrap_or(want), want, "{words}");
                            draws += 1;
                            let is_usual = TEMPERATURES.contains(&temperature) && (0.001..0.999).contains(&drawn);
                            undecided += u64::from(is_usual && got.is_none());
                        }
                    }
                }
            }
        }
        assert!(draws > 10_000 && undecided * 20 < draws, "{undecided} of {draws} draws had to sort");
    }

    /// The bounds of a total are needed: without them, a draw that ends at a bound goes wrong.
    #[test]
    fn a_total_that_is_not_known_well_enough_decides_nothing() {
        let weights = [(4, 1.0), (2, 0.5), (9, 0.25)];
        assert_eq!(from_kept(&weights, 1.4, 1e-5, 0.9), Some(2));
        assert_eq!(from_kept(&weights, 1.5, 1e-5, 0.9), None);
        assert_eq!(from_kept(&weights, 2.0, 1e-5, 0.9), None, "more than all weights");
        assert_eq!(from_beginning(&weights, 1.4, 1e-5), Some(2));
        assert_eq!(from_beginning(&weights, 1.5, 1e-5), None);
        assert_eq!(from_beginning(&weights, 2.0, 1e-5), None);
    }

    /// `cargo test --release -p finetune-model choosing -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn time_of_choosing() {
        for n in [49_152, 151_936] {
            let logits = Stream::new(1, 77, 0, 0).normal(n, 3.0);
            for (temperature, top_p) in [(0.0, 1.0), (0.7, 0.9), (1.0, 0.95), (1.0, 1.0)] {
                let time = |pick: &dyn Fn(u64) -> u32| {
                    let start = std::time::Instant::now();
                    let sum: u64 = (0..50).map(|position| u64::from(pick(position))).sum();
                    (start.elapsed().as_secs_f64() / 50.0 * 1e6, sum)
                };
                let sampling = Sampling { temperature, top_p, seed: 3 };
                let (now, _) = time(&|position| choose(&logits, sampling, position));
                // What a draw took before. At temperature 0 nothing is sorted.
                let drawn = Sampling { temperature: temperature.max(0.7), ..sampling };
                let (sorted, _) = time(&|position| from_all(&logits, drawn, position as f64 / 50.0));
                println!("{n} tokens, {temperature} {top_p}: {now:.0} µs, sorted {sorted:.0} µs");
            }
        }
    }
}
