//! One forward pass: the five likeliest next tokens after a text, by the quickstart's model.
//!
//! `cargo run --release --example forward -- 'Dear Rita, thank you for'`

use std::path::Path;

use finetune_dataset::ChatTokenizer;
use finetune_model::{Model, Placement};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let text = std::env::args().nth(1).unwrap_or_else(|| "Dear Rita, thank you for".to_owned());
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/quickstart/base");
    let tokenizer = ChatTokenizer::load(&directory, None)?;
    let model = Model::load(&directory, &Placement::cpu(None))?;

    let tokens = tokenizer.encode(&text, true)?;
    if tokens.is_empty() {
        return Err("a text of no tokens".into());
    }
    let logits = model.logits(&tokens)?; // [tokens, vocabulary]
    let last = &logits[logits.len() / tokens.len() * (tokens.len() - 1)..];

    let largest = last.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f32 = last.iter().map(|logit| (logit - largest).exp()).sum();
    let mut order: Vec<usize> = (0..last.len()).collect();
    order.sort_by(|&a, &b| last[b].total_cmp(&last[a]));
    for token in order.into_iter().take(5) {
        let percent = 100.0 * (last[token] - largest).exp() / sum;
        println!("{percent:6.2} %  {:?}", tokenizer.decode(&[token as u32], false)?);
    }
    Ok(())
}
