//! Branches of stacked experts against PEFT's own (`scripts/make_expert_gradient_goldens.py`): logits, and the
//! gradient of every matrix.
//!
//! PEFT's branch of `gate_up_proj` has one A for gates and values. Here each of the two has its own, so the gradient of
//! PEFT's is the sum of both.

use std::collections::BTreeMap;

use finetune_model::adapter::Adapter;
use finetune_model::{Backward, Coefficients, Model};
use finetune_store::TensorFile;

#[macro_use]
#[path = "golden/each_family.rs"]
mod each_family;
mod golden;

use golden::{
    ANY, GRADIENTS, LOGITS, batch, directory, families, floats, goldens, json, largest_difference, placement,
    relative_norm, rows,
};

/// The rank of each branch.
const RANK: usize = 2;

/// Gradients by the names of PEFT's file, made of those of single experts.
struct Stacks<'a> {
    experts: usize,
    golden: &'a TensorFile,
    found: BTreeMap<String, Vec<f32>>,
}

impl Stacks<'_> {
    /// Puts the gradient of a parameter where PEFT has it: A [e · r, i] by expert, B [o, r · e] by rank.
    fn add(&mut self, name: &str, values: Vec<f32>) {
        let Some((module, rest)) = name.split_once(".experts.") else {
            self.found.insert(name.to_owned(), values);
            return;
        };
        let [expert, part, half, _] = rest.split('.').collect::<Vec<_>>()[..] else { panic!("{name}") };
        let expert: usize = expert.parse().expect("the number of an expert");
        let wrapped = match part {
            "down_proj" | "w2" => "",
            _ => ".base_layer",
        };
        let name = format!("{module}.experts{wrapped}.{half}.weight");
        let length = floats(self.golden, &format!("grad.{name}")).len();
        let stack = self.found.entry(name).or_insert_with(|| vec![0.0; length]);
        if half == "lora_A" {
            let place = expert * values.len();
            stack[place..place + values.len()].iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            return;
        }
        // Outputs of `up` lie behind those of `gate`.
        let first = if matches!(part, "up_proj" | "w3") { values.len() / RANK } else { 0 };
        for (place, value) in values.into_iter().enumerate() {
            let (output, column) = (first + place / RANK, place % RANK);
            stack[(output * RANK + column) * self.experts + expert] = value;
        }
    }
}

fn logits_and_gradients_are_those_of_peft(family: &'static str) {
    let folder = goldens().join("expert_gradients").join(family);
    let golden = TensorFile::open(&folder.join("golden.safetensors")).expect("golden.safetensors");
    let rows = rows(&json(&directory(family).join("golden.json")));
    let mut model = Model::load(&directory(family), &placement()).expect("the model loads");
    let adapter = Adapter::read(&folder, &model.config).expect("an adapter");
    assert!(adapter.notices.is_empty(), "{:?}", adapter.notices);
    model.attach(&adapter).expect("an adapter of this model");
    for (n, (tokens, _)) in rows.iter().enumerate() {
        let got = model.logits(tokens).expect("tokens of the vocabulary");
        let difference = largest_difference(&got, &floats(&golden, &format!("logits.{n}")));
        assert!(difference < LOGITS, "{family} {n}: {difference:e}");
    }

    let mut gradients = vec![0.0; model.layout().len()];
    let backward =
        Backward { randomness: ANY, checkpointing: false, loss_scale: 1.0, coefficients: Coefficients::Ones };
    let sums = model.loss_and_gradients(&batch(&rows), backward, &mut gradients).expect("a device that works");
    let experts = model.config.experts.as_ref().expect("a mixture").count;
    let mut stacks = Stacks { experts, golden: &golden, found: BTreeMap::new() };
    for parameter in model.layout().iter() {
        // The reference differentiates the mean.
        let of_mean = gradients[parameter.range.clone()].iter().map(|g| g / sums.trained_tokens as f32);
        stacks.add(&parameter.name, of_mean.collect());
    }
    for (name, got) in &stacks.found {
        let difference = relative_norm(got, &floats(&golden, &format!("grad.{name}")));
        assert!(difference < GRADIENTS, "{family} {name}: {difference:e}");
    }
    let expected = golden.names().filter(|name| name.starts_with("grad.")).count();
    assert_eq!(stacks.found.len(), expected, "{family}: as many gradients as in the reference");
}

of_each_family!(logits_and_gradients_are_those_of_peft: deepseek_v3 gemma4_moe glm4_moe glm4_moe_lite lfm2_moe
    qwen3_5_moe qwen3_next);

#[test]
fn every_golden_adapter_has_its_test() {
    let listed = ["deepseek_v3", "gemma4_moe", "glm4_moe", "glm4_moe_lite", "lfm2_moe", "qwen3_5_moe", "qwen3_next"];
    assert_eq!(families::folders_with(&goldens().join("expert_gradients"), "golden.safetensors"), listed);
}
