//! LLaMA-Factory. Meanings are those of `src/llamafactory/hparams` and `data/parser.py` (ff6d4d12e).

mod datasets;

use std::path::Path;

use crate::draft::Draft;
use crate::hugging_face::{self as trainer, Warmup};
use crate::places;
use crate::source::Source;
use crate::text::quoted;
use crate::yaml::Node;

pub(crate) fn map(source: &Source<'_>, draft: &mut Draft, file: &Path) {
    if let Some(given) = source.get("model_name_or_path") {
        let revision = source.get("model_revision").filter(|revision| !revision.is("main"));
        places::model(draft, &given, revision.as_ref());
    }
    if let Some(given) = source.get("output_dir") {
        places::output(draft, &given, "");
    }
    draft.integer(source, "seed", "seed");
    trainer::dtype(source, draft, &[("bf16", "bf16"), ("pure_bf16", "bf16"), ("fp16", "f16")]);
    stage(source, draft);
    if !full(source, draft) {
        adapter(source, draft);
        quantization(source, draft);
    }
    datasets::map(source, draft, file);
    // Text for pre-training is packed unless the file says otherwise.
    let text = source.text("stage") == Some("pt");
    let packed = source.is_on("packing") || source.is_on("neat_packing") || text && source.peek("packing").is_none();
    trainer::length(source, draft, "num_train_epochs", 3);
    trainer::batch(source, draft, ("per_device_train_batch_size", 8), packed);
    checkpointing(source, draft);
    optimizer(source, draft);
    trainer::every(source, draft, "eval_steps", "eval.every");
    if !draft.has("checkpoint.every") && source.peek("save_steps").is_none() {
        draft.theirs("checkpoint.every", "500", "500 steps");
    }
    trainer::every(source, draft, "save_steps", "checkpoint.every");
    for (theirs, ours) in [("eval_strategy", "eval.every"), ("save_strategy", "checkpoint.every")] {
        match source.peek(theirs).and_then(Node::text) {
            Some("steps") => {
                if let Some(given) = source.get(theirs) {
                    draft.idle(&given, &format!("`{ours}` always counts steps here"));
                }
            }
            _ => trainer::by_epoch(source, draft, theirs, ours),
        }
    }
    draft.integer(source, "early_stopping_steps", "eval.early_stopping_patience");
    draft.integer(source, "logging_steps", "log.every");
    trainer::checkpoints(source, draft);
}

/// What is trained for.
fn stage(source: &Source<'_>, draft: &mut Draft) {
    let Some(given) = source.get("stage") else { return };
    match given.node.text().unwrap_or_default() {
        "sft" => draft.idle(&given, "supervised fine-tuning is what finetune does"),
        "pt" => draft.idle(&given, "rows of the format `text` are trained on as a whole"),
        _ => draft.left(&given, "another objective: finetune does supervised fine-tuning, so this is another job"),
    }
}

/// Whether all weights are trained.
fn full(source: &Source<'_>, draft: &mut Draft) -> bool {
    let Some(given) = source.get("finetuning_type") else { return false };
    match given.node.text().unwrap_or_default() {
        "lora" => draft.carry("train.method", quoted("lora"), &given),
        "full" => {
            draft.carry("train.method", quoted("full"), &given);
            for key in ["lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora", "use_dora"] {
                if let Some(unused) = source.get(key) {
                    draft.idle(&unused, "without an adapter it has no effect there");
                }
            }
            return true;
        }
        _ => {
            draft.fill_in("train.method", quoted("lora"), &format!("{}; there are lora and full here", given.named()));
        }
    }
    false
}

fn adapter(source: &Source<'_>, draft: &mut Draft) {
    if !draft.integer(source, "lora_rank", "lora.rank") {
        draft.theirs("lora.rank", "8", "8");
    }
    if !draft.number(source, "lora_alpha", "lora.alpha") {
        let rank = source.peek("lora_rank").and_then(Node::integer).unwrap_or(8);
        draft.theirs("lora.alpha", rank.saturating_mul(2).to_string(), "2 × lora_rank");
    }
    draft.number(source, "lora_dropout", "lora.dropout");
    draft.switch(source, "use_rslora", "lora.use_rslora");
    draft.switch(source, "use_dora", "lora.use_dora");
    if let Some(given) = source.get("lora_target") {
        let names = datasets::names(given.node);
        match names.as_slice() {
            [all] if all == "all" => {
                draft.other("lora.target_modules", quoted("all-linear"), &[&given], "every linear layer but the head");
            }
            [] => draft.left(&given, "not understood: names are meant"),
            names => trainer::targets(draft, names, &[&given]),
        }
    }
    if let Some(given) = source.get("additional_target") {
        let names = datasets::names(given.node);
        draft.other("lora.modules_to_save", crate::text::list(&names), &[&given], "trained in full beside the adapter");
    }
    if let Some(given) = source.get("adapter_name_or_path") {
        let paths = datasets::names(given.node);
        match paths.as_slice() {
            [path] => draft.other("lora.init_from", quoted(path), &[&given], places::RELATIVE),
            _ => draft.left(&given, "one adapter to start from; several are merged before"),
        }
    }
}

fn quantization(source: &Source<'_>, draft: &mut Draft) {
    let Some(given) = source.get("quantization_bit") else { return };
    let method = source.get("quantization_method");
    if source.text("model_name_or_path").is_some_and(places::is_packed) {
        [Some(&given), method.as_ref()].into_iter().flatten().for_each(|key| draft.idle(key, places::PACKED_ALREADY));
        return;
    }
    if let Some(method) = method.as_ref().filter(|method| !method.is("bnb") && !method.is("bitsandbytes")) {
        let why = "`quantization` in [model] has bitsandbytes' forms (nf4, int8), mlx-lm's (mlx4, mlx8) and mxfp4";
        draft.left(method, why);
        draft.left(&given, why);
        return;
    }
    if let Some(method) = &method {
        draft.idle(method, "bitsandbytes' forms are ours");
    }
    let kind = source.get("quantization_type");
    match (given.node.integer(), &kind) {
        (Some(4), Some(kind)) if kind.is("fp4") => draft.left(kind, "ours is nf4"),
        (Some(4), kind) => {
            let both: Vec<_> = [&given].into_iter().chain(kind).collect();
            draft.other("model.quantization", quoted("nf4"), &both, "bitsandbytes' NF4");
        }
        (Some(8), _) => draft.other("model.quantization", quoted("int8"), &[&given], "bitsandbytes' LLM.int8() there"),
        _ => draft.left(&given, "ours have 4 bits (nf4, mlx4, mxfp4) or 8 (int8, mlx8)"),
    }
}

/// Activations are recomputed unless the file says no.
fn checkpointing(source: &Source<'_>, draft: &mut Draft) {
    if let Some(given) = source.get("disable_gradient_checkpointing") {
        match given.node.bool() {
            Some(off) => {
                draft.other("train.gradient_checkpointing", (!off).to_string(), &[&given], "the other way round");
            }
            None => draft.left(&given, "not understood: true or false is meant"),
        }
        return;
    }
    if let Some(given) = source.get("gradient_checkpointing") {
        draft.idle(&given, "LLaMA-Factory always recomputes activations, but for disable_gradient_checkpointing");
    }
    draft.theirs("train.gradient_checkpointing", "true", "activations are recomputed");
}

fn optimizer(source: &Source<'_>, draft: &mut Draft) {
    if let Some(given) = source.get("optim") {
        trainer::optimizer(draft, &given);
    }
    if !draft.number(source, "learning_rate", "optimizer.learning_rate") {
        draft.theirs("optimizer.learning_rate", "5e-5", "5e-5");
    }
    trainer::adam(source, draft, "adam_epsilon");
    let rate = source.peek("learning_rate").and_then(Node::number);
    let name = source.get("lr_scheduler_type");
    let counts = trainer::schedule(source, draft, name.as_ref(), "linear", rate);
    let warmup = Warmup { steps: source.get("warmup_steps"), ratio: source.get("warmup_ratio") };
    trainer::warmup(draft, &warmup, counts, false);
}
