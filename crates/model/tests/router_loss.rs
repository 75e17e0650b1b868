//! The auxiliary loss of routers, against transformers where there is a reference (`scripts/make_goldens.py` made
//! it), and what it must not depend on.

mod golden;

use finetune_model::adapter::Adapter;
use finetune_model::{Backward, Batch, Coefficients, LossSum, Model};
use finetune_store::TensorFile;

use golden::{ANY, GRADIENTS, Rows, batch, directory, floats, json, placement, relative_norm, rows};

/// Every kind of mixture with this loss: layers without experts between, biases, a shared expert, weights that do not
/// add up to one, branches of experts, packed ones.
const FAMILIES: [&str; 7] =
    ["qwen3_moe", "gpt_oss", "qwen3_5_moe", "qwen3_next", "qwen3_moe_experts", "gpt_oss_experts", "gpt_oss_mxfp4"];

/// A golden model with its adapter, and with `coefficient` times the loss of its routers.
fn with_adapter(family: &str, coefficient: f64) -> Model {
    let mut model = Model::load(&directory(family), &placement()).expect("the model loads");
    let adapter = Adapter::read(&directory(family).join("adapter"), &model.config).expect("the adapter loads");
    model.attach(&adapter).expect("an adapter of this model");
    model.add_router_loss(coefficient);
    model
}

fn golden_rows(family: &str) -> Rows {
    rows(&json(&directory(family).join("golden.json")))
}

const PLAIN: Backward<'static> =
    Backward { randomness: ANY, checkpointing: false, loss_scale: 1.0, coefficients: Coefficients::Ones };

fn gradients(model: &mut Model, batch: &Batch<'_>, backward: Backward<'_>) -> (LossSum, Vec<f32>) {
    let mut gradients = vec![0.0; model.layout().len()];
    let sums = model.loss_and_gradients(batch, backward, &mut gradients).expect("a device that works");
    (sums, gradients)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The mean of rows as transformers computes each alone, weighted by their trained tokens.
#[test]
fn loss_and_every_lora_gradient_are_those_of_transformers() {
    for family in ["qwen3_moe", "gpt_oss"] {
        let reference = json(&directory(family).join("router_loss.json"));
        let tensors = TensorFile::open(&directory(family).join("router_loss.safetensors")).expect("gradients");
        let number = |key: &str| reference["micro_batch"][key].as_f64().expect("a number");
        let rows = golden_rows(family);
        let mut model = with_adapter(family, reference["coefficient"].as_f64().expect("a number"));
        let (sums, got) = gradients(&mut model, &batch(&rows), PLAIN);
        let (loss, mean) = (number("loss_sum"), sums.router_loss / sums.trained_tokens as f64);
        assert!((sums.loss - loss).abs() < 1e-6 * loss, "{family}: loss {} against {loss}", sums.loss);
        let want = number("router_aux_loss");
        assert!((mean - want).abs() < 1e-6 * want, "{family}: loss of routers {mean} against {want}");
        for parameter in model.layout().iter() {
            // The reference differentiates the mean.
            let got: Vec<f32> = got[parameter.range.clone()].iter().map(|g| g / sums.trained_tokens as f32).collect();
            let difference = relative_norm(&got, &floats(&tensors, &format!("grad.{}", parameter.name)));
            assert!(difference < GRADIENTS, "{family} {}: {difference:e}", parameter.name);
        }
        assert_eq!(model.layout().iter().len(), tensors.names().count(), "{family}: as many as in the reference");
    }
}

#[test]
fn rows_that_lie_together_count_as_they_do_alone() {
    for family in FAMILIES {
        let (rows, mut model) = (golden_rows(family), with_adapter(family, 0.1));
        let (whole, want) = gradients(&mut model, &batch(&rows), PLAIN);
        let (mut sum, mut got) = (0.0, vec![0.0; want.len()]);
        for row in rows.chunks(1) {
            sum += model.loss_and_gradients(&batch(row), PLAIN, &mut got).expect("sums").router_loss;
        }
        assert!((whole.router_loss - sum).abs() < 1e-6 * sum, "{family}: {} against {sum}", whole.router_loss);
        assert!(relative_norm(&got, &want) < 2e-6, "{family}: {:e}", relative_norm(&got, &want));
    }
}

#[test]
fn computing_layers_again_changes_no_bit() {
    for family in FAMILIES {
        let (rows, mut model) = (golden_rows(family), with_adapter(family, 0.1));
        let (plain, want) = gradients(&mut model, &batch(&rows), PLAIN);
        let (again, got) = gradients(&mut model, &batch(&rows), Backward { checkpointing: true, ..PLAIN });
        assert_eq!(plain, again, "{family}");
        assert!(bits(&got) == bits(&want), "{family}: {:e}", relative_norm(&got, &want));
        model.add_router_loss(0.0);
        let (without, other) = gradients(&mut model, &batch(&rows), PLAIN);
        assert_eq!((without.loss, without.router_loss), (plain.loss, 0.0), "{family}");
        assert!(relative_norm(&other, &want) > 1e-4, "{family}: the loss has a gradient");
        let never = gradients(&mut with_adapter(family, 0.0), &batch(&rows), PLAIN);
        assert!(never.0 == without && bits(&never.1) == bits(&other), "{family}: 0 is as if it had never been");
    }
}

/// The loss scale, which gradients in f16 need, is divided out again.
#[test]
fn the_loss_scale_changes_nothing() {
    let (rows, mut model) = (golden_rows("qwen3_moe"), with_adapter("qwen3_moe", 0.1));
    let (_, want) = gradients(&mut model, &batch(&rows), PLAIN);
    for checkpointing in [false, true] {
        let (_, got) = gradients(&mut model, &batch(&rows), Backward { loss_scale: 64.0, checkpointing, ..PLAIN });
        assert!(relative_norm(&got, &want) < 1e-6, "{:e}", relative_norm(&got, &want));
    }
}

/// A row without a target counts nothing, alone or beside others.
#[test]
fn rows_without_targets_count_nothing() {
    let (rows, mut model) = (golden_rows("qwen3_moe"), with_adapter("qwen3_moe", 0.1));
    let untrained = (rows[1].0.clone(), vec![false; rows[1].0.len()]);
    let (alone, want) = gradients(&mut model, &batch(&rows[..1]), PLAIN);
    let (beside, got) = gradients(&mut model, &batch(&[rows[0].clone(), untrained.clone()]), PLAIN);
    assert!((alone.router_loss - beside.router_loss).abs() < 1e-6 * alone.router_loss);
    assert!(relative_norm(&got, &want) < 2e-6, "{:e}", relative_norm(&got, &want));
    let (nothing, zeros) = gradients(&mut model, &batch(&[untrained]), PLAIN);
    assert!(nothing.router_loss == 0.0 && zeros.iter().all(|gradient| *gradient == 0.0));
}
