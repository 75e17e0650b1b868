//! A training loop without the trainer: loss and gradients of a batch, their mean, one AdamW step.
//!
//! `cargo run --release --example train_loop`

use std::path::Path;

use finetune_dataset::{ChatTokenizer, Dataset};
use finetune_model::{Backward, Batch, BatchRow, Coefficients, Model, Placement, Randomness, choose};
use finetune_recipe::Recipe;
use finetune_trainer::AdamW;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let recipe = Recipe::load(&root.join("recipes/quickstart.toml"), &[], None)?;
    let base = root.join("datasets/quickstart/base");
    let tokenizer = ChatTokenizer::load(&base, None)?;
    let mut model = Model::load(&base, &Placement::cpu(None))?;
    let data = Dataset::load(&recipe.data.train, &recipe.data, &tokenizer, model.config.vocabulary, 0, &|_| {})?;

    let adaptation = choose(&recipe.lora, &model.config)?;
    model.add_adapter(adaptation, recipe.seed)?;
    let mut parameters = model.parameters()?;
    let mut optimizer = AdamW::new(parameters.len());

    for (step, rows) in (1..=20).zip(data.rows.chunks(recipe.train.global_batch_size)) {
        let rows = rows.iter().zip(0..);
        let rows = rows.map(|(row, id)| BatchRow { id, tokens: &row.tokens, trained: &row.trained }).collect();
        let randomness = Randomness { seed: recipe.seed, step };
        let backward = Backward { randomness, checkpointing: false, loss_scale: 1.0, coefficients: Coefficients::Ones };
        let mut gradients = vec![0.0; parameters.len()];
        let sum = model.loss_and_gradients(&Batch { rows }, backward, &mut gradients)?;

        // The model gives sums. The mean is formed once, over the trained tokens of the whole step.
        let trained_tokens = sum.trained_tokens as f64;
        gradients.iter_mut().for_each(|gradient| *gradient /= trained_tokens as f32);
        optimizer.update(&mut parameters, &gradients, recipe.optimizer.learning_rate, &recipe.optimizer);
        model.set_parameters(&parameters);
        println!("step {step}  loss {:.4}", sum.loss / trained_tokens);
    }
    Ok(())
}
