//! How long the products of a step take on this CPU: how many operations they are, and the rates that are measured
//! for them.

use std::path::Path;

use finetune_dataset::Dataset;
use finetune_model::{FloatType, Placement, ProductRates, matmul_rate, product_rates};
use finetune_recipe::{Method, Recipe};

/// Operations of the products of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Operations {
    /// Forward, all times that it is computed.
    pub(crate) forward: f64,
    /// Of the gradients of activations.
    pub(crate) backward: f64,
    /// Of the gradients of weights.
    pub(crate) weights: f64,
}

impl Operations {
    pub(crate) fn total(&self) -> f64 {
        self.forward + self.backward + self.weights
    }
}

/// Operations of the products of so many rows, forward and backward. `parameters`: those that each token meets.
pub(crate) fn operations(
    method: Method,
    data: &Dataset,
    rows: usize,
    parameters: u64,
    computes_again: bool,
) -> Operations {
    // Two for each token and parameter.
    let pass = 2.0 * tokens_of_row(data) * rows as f64 * parameters as f64;
    Operations {
        forward: if computes_again { 2.0 * pass } else { pass },
        backward: pass,
        weights: if method == Method::Full { pass } else { 0.0 },
    }
}

fn tokens_of_row(data: &Dataset) -> f64 {
    data.counts.tokens as f64 / data.rows.len().max(1) as f64
}

/// Tokens of a micro-batch, of a rank that computes so many rows a step.
pub(crate) fn tokens_at_once(recipe: &Recipe, data: &Dataset, rows: usize) -> usize {
    let rows = recipe.train.micro_batch_size.min(rows);
    ((rows as f64 * tokens_of_row(data)).round() as usize).max(1)
}

/// Operations per second of the products of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rates {
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) weights: f64,
}

impl Rates {
    /// Measured with matrices of the base in `directory` and this many tokens at a time; with other matrices of
    /// f32 if none of the base can be read.
    pub(crate) fn measured(method: Method, directory: &Path, placement: &Placement, tokens: usize) -> Rates {
        let held = match method {
            Method::Lora => placement.clone(),
            // What is trained is f32.
            Method::Full => Placement::cpu(Some(FloatType::F32)),
        };
        match (product_rates(directory, &held, tokens), method) {
            // There are no gradients of weights.
            (Some(ProductRates { forward, backward }), Method::Lora) => Rates { forward, backward, weights: backward },
            (Some(ProductRates { forward, backward }), Method::Full) => {
                Rates { forward, backward, weights: matmul_rate() }
            }
            (None, _) => Rates::alike(matmul_rate()),
        }
    }

    /// The same for all products.
    fn alike(rate: f64) -> Rates {
        Rates { forward: rate, backward: rate, weights: rate }
    }

    /// Seconds of so many operations.
    pub(crate) fn seconds(&self, operations: &Operations) -> f64 {
        operations.forward / self.forward + operations.backward / self.backward + operations.weights / self.weights
    }

    /// Operations per second of all of these together.
    pub(crate) fn of_all(&self, operations: &Operations) -> f64 {
        operations.total() / self.seconds(operations)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::base_model::model_directory;
    use crate::device_plan::ThisHost;
    use crate::examine::{Examined, Extent, Ready, examine};

    fn golden(family: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(family)
    }

    fn ready(micro_batch_size: usize) -> (Recipe, Ready) {
        let text = format!(
            "output_dir = \"run\"\n[model]\npath = {:?}\ndevice = \"cpu\"\n[data]\ntrain = {:?}\n\
             [train]\nmicro_batch_size = {micro_batch_size}\n",
            golden("qwen3"),
            golden("qwen3").join("rows.jsonl"),
        );
        let recipe = Recipe::parse(&text, Path::new("r.toml"), &[], None).unwrap_or_else(|error| panic!("{error}"));
        let model = model_directory(&recipe);
        let found =
            examine(Examined::default(), &recipe, model, &ThisHost::default(), Extent::Run, None, &|_| {}).ready();
        (recipe, found.unwrap_or_else(|error| panic!("{error}")))
    }

    /// (method, whether layers are computed again, seconds): forward at 4 operations a second, backward at 2,
    /// weights at 1, and a pass has 8 operations.
    #[test]
    fn each_pass_takes_its_own_time() {
        let rates = Rates { forward: 4.0, backward: 2.0, weights: 1.0 };
        let (_, ready) = ready(1);
        let data = &ready.train;
        for (method, again, seconds) in [
            (Method::Lora, false, 2.0 + 4.0),
            (Method::Lora, true, 2.0 + 2.0 + 4.0),
            (Method::Full, false, 2.0 + 4.0 + 8.0),
            (Method::Full, true, 2.0 + 2.0 + 4.0 + 8.0),
        ] {
            // All rows, so that each token counts once.
            let all = operations(method, data, data.rows.len(), 1, again);
            let of_pass = 2.0 * data.counts.tokens as f64;
            let scaled = rates.seconds(&all) * 8.0 / of_pass;
            assert!((scaled - seconds).abs() < 1e-9, "{method:?} {again}: {scaled}");
            let together = rates.of_all(&all) * rates.seconds(&all);
            assert!((together / all.total() - 1.0).abs() < 1e-9, "{method:?} {again}");
            assert!((Rates::alike(2.0).seconds(&all) - all.total() / 2.0).abs() < 1e-6 * all.total());
        }
    }

    #[test]
    fn a_micro_batch_has_no_more_rows_than_its_rank() {
        let (recipe, ready) = ready(4);
        let data = &ready.train;
        let row = data.counts.tokens as f64 / data.rows.len() as f64;
        for (rows, counted) in [(1, 1.0), (3, 3.0), (4, 4.0), (64, 4.0)] {
            assert_eq!(tokens_at_once(&recipe, data, rows), (counted * row).round() as usize, "{rows}");
        }
        assert_eq!(tokens_at_once(&recipe, data, 0), 1);
    }

    /// With a base's matrices, trained or not, and without one.
    #[test]
    fn there_are_always_rates() {
        let none = tempfile::tempdir().expect("a directory");
        for directory in [golden("qwen3"), golden("qwen3_moe"), none.path().to_owned()] {
            for method in [Method::Lora, Method::Full] {
                let Rates { forward, backward, weights } =
                    Rates::measured(method, &directory, &Placement::cpu(None), 16);
                let are_rates = [forward, backward, weights].iter().all(|rate| rate.is_finite() && *rate > 0.0);
                assert!(are_rates, "{} {method:?}: {forward} {backward} {weights}", directory.display());
            }
        }
    }
}
