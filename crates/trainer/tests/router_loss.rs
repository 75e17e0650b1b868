//! Runs with the auxiliary loss of routers: what they do not depend on, what they report, and what is refused.
//! That the loss is transformers' is shown by `curves.rs`.

mod common;

use std::path::Path;

use finetune_advice::Advice as _;
use finetune_recipe::Recipe;
use finetune_trainer::Resume;

use common::{Told, adapter, goldens, recipe, run};

/// A recipe on a mixture.
fn of_family(family: &str, output: &Path, sets: &[&str]) -> Recipe {
    let rows = goldens(family).join("rows.jsonl");
    let paths = [("model.path", goldens(family)), ("data.train", rows.clone()), ("data.eval", rows)];
    let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
    recipe(
        output,
        &paths.iter().map(String::as_str).chain(["model.device=cpu"]).chain(sets.iter().copied()).collect::<Vec<_>>(),
    )
}

fn told(family: &str, world: usize, output: &Path, sets: &[&str]) -> Told {
    let (told, outcomes) = run(world, None, &Resume::No, |_| of_family(family, output, sets), |_, _| 0);
    assert!(outcomes.iter().all(Result::is_ok), "{family}, {world} ranks, {sets:?}: {outcomes:?}");
    told
}

fn router_losses(told: &Told) -> Vec<Option<f64>> {
    told.steps.iter().map(|row| row.objective.get("router_aux_loss").copied()).collect()
}

/// The bits of one process on any number of them, whether layers are in memory or read from the disk, also where
/// several ranks hold the model together, or make steps alone.
#[test]
fn the_same_bits_on_any_number_of_processes() {
    let loss = "train.router_aux_loss_coef=0.1";
    let alone = "distributed.sync_every=2";
    for (family, more) in [("qwen3_moe", "lora.dropout=0.1"), ("gpt_oss", "seed=7"), ("gpt_oss_mxfp4", alone)] {
        let folder = tempfile::tempdir().expect("a directory");
        let of = |name: &str, world: usize, set: &str| {
            let output = folder.path().join(name);
            let told = told(family, world, &output, &[loss, more, "distributed.virtual_ranks=4", set]);
            (told.losses(), router_losses(&told), adapter(&output))
        };
        let expected = of("one", 1, "model.residency=memory");
        assert!(expected.1.iter().all(|loss| loss.is_some_and(|loss| loss > 1.0)), "{:?}", expected.1);
        for (name, world, set) in [
            ("again", 1, "train.gradient_checkpointing=true"),
            ("disk", 1, "model.residency=disk"),
            ("two", 2, "model.residency=memory"),
            ("four", 4, "model.residency=disk"),
            ("stages", 2, "parallel.stages=2"),
            ("stages of two models", 4, "parallel.stages=2"),
        ] {
            // No rank has a whole model to make steps alone with.
            if more == alone && set.starts_with("parallel") {
                continue;
            }
            assert!(of(name, world, set) == expected, "{family}, {name}: other bits");
        }
    }
}

/// The loss of a step and evaluations are those of tokens alone. Without a coefficient there is no number, and a
/// coefficient of 0 is none.
#[test]
fn the_loss_of_routers_is_reported_apart() {
    let folder = tempfile::tempdir().expect("a directory");
    let of = |name: &str, sets: &[&str]| told("qwen3_moe", 1, &folder.path().join(name), sets);
    let (without, off) = (of("without", &[]), of("off", &["train.router_aux_loss_coef=0"]));
    let with = of("with", &["train.router_aux_loss_coef=0.5"]);
    assert!(router_losses(&without).iter().chain(&router_losses(&off)).all(Option::is_none));
    assert!(router_losses(&with).iter().all(Option::is_some), "{:?}", with.steps);
    assert_eq!(without.losses(), off.losses());
    assert_eq!(adapter(&folder.path().join("without")), adapter(&folder.path().join("off")));
    assert_eq!(without.steps[0].loss, with.steps[0].loss);
    assert_ne!(without.steps[0].grad_norm, with.steps[0].grad_norm);
    assert_eq!(without.evaluations[0], with.evaluations[0]);
    assert_ne!(without.losses()[1..], with.losses()[1..], "another gradient makes other steps");
    let text = std::fs::read_to_string(folder.path().join("with/metrics.jsonl")).expect("metrics");
    assert!(text.contains("\"objective\":{\"router_aux_loss\":"), "{text}");
}

/// (family, a part of the message)
#[test]
fn models_without_such_a_loss_are_refused_by_name() {
    for (family, message) in [
        ("qwen3", "train.router_aux_loss_coef = 0.1: no layer of this Qwen3ForCausalLM has experts"),
        ("glm4_moe", "is the correction of their scores"),
    ] {
        let folder = tempfile::tempdir().expect("a directory");
        let sets = ["train.router_aux_loss_coef=0.1"];
        let (_, outcomes) = run(1, None, &Resume::No, |_| of_family(family, folder.path(), &sets), |_, _| 0);
        let error = outcomes.into_iter().next().expect("one rank").expect_err(family);
        assert!(error.to_string().contains(message), "{family}: {error}");
        assert!(error.hints()[0].contains("leave train.router_aux_loss_coef out"), "{family}: {:?}", error.hints());
    }
}
