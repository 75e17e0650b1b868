//! A merged model beside its base with the adapter.

use std::path::Path;

use finetune_random::Stream;

use crate::adapter::Adapter;
use crate::error::ModelError;
use crate::model::Model;
use crate::placement::Placement;

/// The difference of logits between a merged model and its base with the adapter, over probe
/// tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// Largest absolute difference of two logits.
    pub largest: f32,
    /// Largest absolute logit, to judge the difference by.
    pub scale: f32,
    /// Probe positions at which both models find the same token most likely.
    pub agreeing: usize,
    /// Probe positions.
    pub positions: usize,
}

/// Runs both models on 32 random tokens, which are the same each time, and judges the difference. The
/// base is packed as it was when the adapter was trained.
///
/// # Errors
/// If a model cannot be loaded, or the device fails. [`ModelError::Merge`] if logits are not
/// finite, or are too far apart.
pub fn compare(base: &Path, adapter: &Adapter, merged: &Path, placement: &Placement) -> Result<Comparison, ModelError> {
    // One pass over each is all that is needed: two layers in memory instead of two models, and of experts those alone
    // that are multiplied.
    let placement = &placement.clone().with_layers_from_disk(true).with_experts_from_disk(true);
    let mut with_adapter = Model::load(base, &placement.clone().quantized(adapter.base.quantization))?;
    with_adapter.attach(adapter)?;
    let vocabulary = with_adapter.config.vocabulary;
    let probe: Vec<u32> =
        Stream::new(0, 0, 0, 0).uniform(32, 0.5).iter().map(|u| ((u + 0.5) * vocabulary as f32) as u32).collect();
    let expected = with_adapter.logits(&probe)?;
    drop(with_adapter);
    let found = Model::load(merged, placement)?.logits(&probe)?;
    judge(&expected, &found, vocabulary)
}

/// Rounding the sum to 16 bits moves logits by a few hundredths of the largest at most. Beyond this
/// part of the largest logit, half of the most likely tokens have to agree.
const FAR: f32 = 0.1;
/// Beyond this part of the largest logit the models do not compute the same.
const TOO_FAR: f32 = 0.5;

/// The difference of logits [positions, v], or why they cannot be those of one model.
fn judge(expected: &[f32], found: &[f32], vocabulary: usize) -> Result<Comparison, ModelError> {
    let failed = |what: String| Err(ModelError::Merge { what });
    for (logits, whose) in [(expected, "the base with the adapter"), (found, "the merged model")] {
        if let Some(place) = logits.iter().position(|logit| !logit.is_finite()) {
            let position = place / vocabulary;
            return failed(format!("logits of {whose} are not finite (at probe token {position})"));
        }
    }
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token);
    let rows = || expected.chunks(vocabulary).zip(found.chunks(vocabulary));
    // All are finite, so `max` drops none.
    let comparison = Comparison {
        largest: expected.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max),
        scale: expected.iter().fold(0.0, |max, logit| logit.abs().max(max)),
        agreeing: rows().filter(|(a, b)| best(a) == best(b)).count(),
        positions: rows().count(),
    };
    let Comparison { largest, scale, agreeing, positions } = comparison;
    if largest > TOO_FAR * scale || (largest > FAR * scale && 2 * agreeing < positions) {
        return failed(format!(
            "logits differ by up to {largest:.3e} where the largest is {scale:.1}, with the same best token at {agreeing} of {positions} probe tokens"
        ));
    }
    Ok(comparison)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (logits of the merged model, part of the error). The expected logits of the three positions
    /// are (4, 1), (1, 4) and (4, 1).
    #[test]
    fn a_comparison_is_judged() {
        let expected = [4.0, 1.0, 1.0, 4.0, 4.0, 1.0];
        let table: [(&[f32], Option<&str>); 7] = [
            (&expected, None),
            (&[4.1, 1.0, 1.0, 4.0, 4.0, 0.9], None),
            // The difference is below a tenth, so the most likely tokens need not agree.
            (&[4.3, 1.0, 1.0, 4.0, 3.8, 1.3], None),
            (&[4.0, 1.0, 1.0, f32::NAN, 4.0, 1.0], Some("the merged model are not finite (at probe token 1)")),
            (&[f32::NEG_INFINITY, 1.0, 1.0, 4.0, 4.0, 1.0], Some("are not finite (at probe token 0)")),
            (&[2.4, 2.6, 2.6, 2.4, 4.0, 1.0], Some("at 1 of 3 probe tokens")),
            (&[4.0, 1.0, 1.0, 4.0, 7.0, 1.0], Some("differ by up to 3.000e0")),
        ];
        for (found, want) in table {
            let judged = judge(&expected, found, 2);
            match (judged, want) {
                (Ok(comparison), None) => assert_eq!(comparison.positions, 3),
                (Err(error), Some(part)) => {
                    assert!(error.is_about_numbers() && error.to_string().contains(part), "{error}");
                }
                (judged, want) => panic!("{found:?}: {judged:?}, expected {want:?}"),
            }
        }
        let bad = judge(&[f32::NAN; 2], &[f32::NAN; 2], 2).expect_err("nothing to compare");
        assert!(bad.to_string().contains("the base with the adapter"), "{bad}");
    }
}
