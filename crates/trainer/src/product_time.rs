//! How long the products of a step take on this CPU: how many operations they are, and the rates that are measured
//! for them.

use std::path::Path;

use finetune_dataset::Dataset;
use finetune_model::{FloatType, ModelConfig, Placement, ProductRates, matmul_rate, product_rates};
use finetune_recipe::{Method, Recipe};

/// Parameters of a model whose products are computed. Of tables of embeddings a token only takes a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Multiplied {
    /// Of the layers, those that each token goes through.
    pub(crate) layers: u64,
    /// Of the output layer, which those tokens go through that are trained on.
    pub(crate) output: u64,
}

impl Multiplied {
    /// `parameters`: all of the model.
    pub(crate) fn of(config: &ModelConfig, parameters: u64) -> Multiplied {
        let output = (config.vocabulary * config.hidden_size) as u64;
        let ends = if config.tied_embeddings { output } else { 2 * output };
        Multiplied {
            layers: parameters.saturating_sub(config.idle_parameters() + ends + config.input_table_parameters()),
            output,
        }
    }
}

/// Operations of the products of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct StepOperations {
    /// Of the layers, on all ranks that hold the model.
    pub(crate) layers: Operations,
    /// Of the output layer with the loss, on the rank of the last layer.
    pub(crate) output: Operations,
}

/// Operations of products.
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

/// Operations of the products of so many rows, forward and backward.
pub(crate) fn operations(
    method: Method,
    data: &Dataset,
    rows: usize,
    multiplied: Multiplied,
    computes_again: bool,
) -> StepOperations {
    // Two for each token and parameter.
    let pass = |tokens: f64, parameters: u64| 2.0 * tokens * rows as f64 * parameters as f64;
    let both_ways = |pass: f64, forward: f64| Operations {
        forward: forward * pass,
        backward: pass,
        weights: if method == Method::Full { pass } else { 0.0 },
    };
    let trained = data.counts.trained_tokens as f64 / data.rows.len().max(1) as f64;
    StepOperations {
        layers: both_ways(pass(tokens_of_row(data), multiplied.layers), if computes_again { 2.0 } else { 1.0 }),
        // Each piece of logits becomes its gradient at once.
        output: both_ways(pass(trained, multiplied.output), 1.0),
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

    /// Seconds of a step on one rank.
    pub(crate) fn seconds_of_step(&self, step: &StepOperations) -> f64 {
        self.seconds(&step.layers) + self.seconds(&step.output)
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

    /// (method, whether layers are computed again, seconds of the layers, of the output layer): forward at 4 operations
    /// a second, backward at 2, weights at 1, and a pass has 8 operations.
    #[test]
    fn each_pass_takes_its_own_time() {
        let rates = Rates { forward: 4.0, backward: 2.0, weights: 1.0 };
        let (_, ready) = ready(1);
        let data = &ready.train;
        for (method, again, layers, output) in [
            (Method::Lora, false, 2.0 + 4.0, 2.0 + 4.0),
            // The output layer is computed once.
            (Method::Lora, true, 2.0 + 2.0 + 4.0, 2.0 + 4.0),
            (Method::Full, false, 2.0 + 4.0 + 8.0, 2.0 + 4.0 + 8.0),
            (Method::Full, true, 2.0 + 2.0 + 4.0 + 8.0, 2.0 + 4.0 + 8.0),
        ] {
            // All rows, so that each token counts once.
            let all = operations(method, data, data.rows.len(), Multiplied { layers: 1, output: 3 }, again);
            let seconds = |part: &Operations, tokens: u64, parameters: f64| {
                rates.seconds(part) * 8.0 / (2.0 * tokens as f64 * parameters)
            };
            let found = seconds(&all.layers, data.counts.tokens, 1.0);
            assert!((found - layers).abs() < 1e-9, "{method:?} {again}: {found}");
            let found = seconds(&all.output, data.counts.trained_tokens, 3.0);
            assert!((found - output).abs() < 1e-9, "{method:?} {again}: {found} of the output layer");
            let both = rates.seconds(&all.layers) + rates.seconds(&all.output);
            assert!((rates.seconds_of_step(&all) / both - 1.0).abs() < 1e-9, "{method:?} {again}");
            let together = rates.of_all(&all.layers) * rates.seconds(&all.layers);
            assert!((together / all.layers.total() - 1.0).abs() < 1e-9, "{method:?} {again}");
        }
        assert!(data.counts.trained_tokens < data.counts.tokens, "prompts are not trained on");
    }

    /// What is left of all parameters is that of the layers, the last norm, and what makes inputs of layers. Of models
    /// whose output layer is the embedding, or not, with experts, and with inputs of their own for layers.
    #[test]
    fn tables_of_embeddings_are_not_multiplied() {
        for family in ["llama", "qwen3", "qwen3_moe", "gemma4"] {
            let config = ModelConfig::load(&golden(family)).unwrap_or_else(|error| panic!("{error}"));
            let tensors = finetune_model::expected_tensors(&config);
            let of = |wanted: &dyn Fn(&str) -> bool| -> u64 {
                let found = tensors.iter().filter(|(name, _)| wanted(name));
                found.map(|(_, shape)| shape.iter().product::<usize>() as u64).sum()
            };
            let found = Multiplied::of(&config, of(&|_| true));
            assert_eq!(found.output, (config.vocabulary * config.hidden_size) as u64, "{family}");
            let made = |name: &str| name.ends_with("norm.weight") || name.contains("per_layer_model_projection");
            let wanted = of(&|name| name.contains(".layers.") || made(name)) - config.idle_parameters();
            assert_eq!(found.layers, wanted, "{family}");
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
