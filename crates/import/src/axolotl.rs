//! axolotl. Meanings are those of `src/axolotl/utils/schemas`, `core/builders` and
//! `loaders/adapter.py` (067b021c8).

mod datasets;

use crate::draft::Draft;
use crate::hugging_face::{self as trainer, Warmup};
use crate::places;
use crate::source::Source;
use crate::text::{number, quoted};
use crate::yaml::{Node, Value};

pub(crate) fn map(source: &Source<'_>, draft: &mut Draft) {
    if let Some(given) = source.get("base_model") {
        let revision = source.get("revision_of_model").or_else(|| source.get("model_revision"));
        places::model(draft, &given, revision.as_ref());
    }
    if let Some(given) = source.get("output_dir") {
        places::output(draft, &given, "");
    }
    draft.integer(source, "seed", "seed");
    trainer::dtype(source, draft, &[("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "f16"), ("float16", "f16")]);
    if adapter_is_given(source, draft) {
        adapter(source, draft);
    }
    datasets::map(source, draft);
    let packed = source.is_on("sample_packing");
    lengths(source, draft);
    trainer::length(source, draft, "num_epochs", 1);
    batch(source, draft, packed);
    checkpointing(source, draft);
    optimizer(source, draft);
    schedule(source, draft);
    trainer::every(source, draft, "eval_steps", "eval.every");
    trainer::every(source, draft, "save_steps", "checkpoint.every");
    for (theirs, ours) in [
        ("evals_per_epoch", "eval.every"),
        ("saves_per_epoch", "checkpoint.every"),
        ("eval_strategy", "eval.every"),
        ("evaluation_strategy", "eval.every"),
        ("save_strategy", "checkpoint.every"),
    ] {
        trainer::by_epoch(source, draft, theirs, ours);
    }
    draft.integer(source, "early_stopping_patience", "eval.early_stopping_patience");
    draft.integer(source, "logging_steps", "log.every");
    trainer::checkpoints(source, draft);
}

/// Whether an adapter is trained. Without the key all weights are.
fn adapter_is_given(source: &Source<'_>, draft: &mut Draft) -> bool {
    let Some(given) = source.get("adapter") else {
        draft.theirs("train.method", quoted("full"), "without `adapter` all weights are trained");
        for unused in ["lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules"] {
            if let Some(unused) = source.get(unused) {
                draft.idle(&unused, "without `adapter` it has no effect there");
            }
        }
        return false;
    };
    match given.node.text().unwrap_or_default() {
        "lora" => draft.carry("train.method", quoted("lora"), &given),
        "qlora" => draft.other("train.method", quoted("lora"), &[&given], "LoRA on a base that is packed in 4 bits"),
        _ => {
            draft.fill_in("train.method", quoted("lora"), &format!("{}; there are lora and full here", given.named()));
        }
    }
    quantization(source, draft);
    true
}

fn quantization(source: &Source<'_>, draft: &mut Draft) {
    for (theirs, ours, why) in [
        ("load_in_4bit", "nf4", "bitsandbytes' NF4, twice quantized there"),
        ("load_in_8bit", "int8", "bitsandbytes' LLM.int8() there"),
    ] {
        let Some(given) = source.get(theirs) else { continue };
        match given.node.bool() {
            Some(true) if source.text("base_model").is_some_and(places::is_packed) => {
                draft.idle(&given, places::PACKED_ALREADY);
            }
            Some(true) => draft.other("model.quantization", quoted(ours), &[&given], why),
            Some(false) => draft.unset(&given),
            None => draft.left(&given, "not understood: true or false is meant"),
        }
    }
    if let Some(given) = source.get("gptq").filter(|given| given.node.bool() == Some(true)) {
        draft.idle(&given, "a base in GPTQ's form is read as it is");
    }
}

fn adapter(source: &Source<'_>, draft: &mut Draft) {
    for (theirs, ours, ours_alone) in [("lora_r", "lora.rank", "16"), ("lora_alpha", "lora.alpha", "32")] {
        if !draft.number(source, theirs, ours) {
            draft.fill_in(ours, ours_alone, &format!("`{theirs}` is not given, and axolotl has no default"));
        }
    }
    draft.number(source, "lora_dropout", "lora.dropout");
    draft.switch(source, "peft_use_rslora", "lora.use_rslora");
    draft.switch(source, "peft_use_dora", "lora.use_dora");
    targets(source, draft);
    for (theirs, ours) in [("lora_rank_pattern", "lora.rank_pattern"), ("lora_alpha_pattern", "lora.alpha_pattern")] {
        let Some(given) = source.get(theirs) else { continue };
        match by_name(given.node) {
            Some(value) => draft.carry(ours, value, &given),
            None => draft.left(&given, "not understood: names and numbers are meant"),
        }
    }
    if let Some(given) = source.get("lora_modules_to_save") {
        match datasets::texts(given.node) {
            Some(names) => draft.carry("lora.modules_to_save", crate::text::list(&names), &given),
            None => draft.left(&given, "not understood: a list of names is meant"),
        }
    }
    if let Some(given) = source.get("peft_layers_to_transform") {
        let layers = match &given.node.value {
            Value::List(items) => items.iter().map(Node::integer).collect::<Option<Vec<i64>>>(),
            _ => given.node.integer().map(|layer| vec![layer]),
        };
        match layers {
            Some(layers) => draft.carry("lora.layers_to_transform", format!("{layers:?}"), &given),
            None => draft.left(&given, "not understood: a list of layers is meant"),
        }
    }
    if let Some(given) = source.get("lora_model_dir") {
        let path = given.node.text().unwrap_or_default();
        draft.other("lora.init_from", quoted(path), &[&given], places::RELATIVE);
    }
}

/// Named modules, a regular expression, or all linear layers; axolotl joins them.
fn targets(source: &Source<'_>, draft: &mut Draft) {
    let (linear, named) = (source.get("lora_target_linear"), source.get("lora_target_modules"));
    let all = linear.as_ref().is_some_and(|given| given.node.bool() == Some(true));
    match (&linear, &named) {
        (Some(linear), named) if all => {
            draft.other("lora.target_modules", quoted("all-linear"), &[linear], "every linear layer but the head");
            if let Some(named) = named {
                draft.idle(named, "all linear layers are adapted already");
            }
        }
        (_, Some(named)) => match (&named.node.value, datasets::texts(named.node)) {
            (Value::Scalar { text, .. }, _) if text == "all-linear" => {
                draft.carry("lora.target_modules", quoted(text), named);
            }
            (Value::Scalar { text, .. }, _) => {
                draft.other("lora.target_modules", quoted(text), &[named], "a regular expression on full names");
            }
            (_, Some(names)) => trainer::targets(draft, &names, &[named]),
            _ => draft.left(named, "not understood: a list of names is meant"),
        },
        _ => draft.fill_in(
            "lora.target_modules",
            quoted("all-linear"),
            "no target is given: PEFT's own choice for the model there, such as q_proj and v_proj",
        ),
    }
    if let Some(linear) = linear.as_ref().filter(|_| !all) {
        draft.unset(linear);
    }
}

/// An inline table of names and numbers.
fn by_name(node: &Node) -> Option<String> {
    let Value::Map(entries) = &node.value else { return None };
    let entry = |entry: &crate::yaml::Entry| {
        let value = number(entry.node.number()?, entry.node.text()?);
        Some(format!("{} = {value}", quoted(&entry.key)))
    };
    let entries = entries.iter().map(entry).collect::<Option<Vec<String>>>()?;
    Some(format!("{{ {} }}", entries.join(", ")))
}

fn lengths(source: &Source<'_>, draft: &mut Draft) {
    if !draft.integer(source, "sequence_len", "data.max_seq_len") {
        draft.theirs("data.max_seq_len", "512", "512");
    }
    match source.get("excess_length_strategy") {
        Some(given) if given.is("drop") => draft.carry("data.overlong", quoted("drop"), &given),
        Some(given) if given.is("truncate") => draft.carry("data.overlong", quoted("truncate"), &given),
        Some(given) if given.is("raise") => {
            draft.other("data.overlong", quoted("error"), &[&given], "a longer row ends the run");
        }
        Some(given) => draft.left(&given, "not understood: drop, truncate or raise is meant"),
        None => draft.theirs("data.overlong", quoted("drop"), "longer rows are left out"),
    }
    draft.switch(source, "sample_packing", "data.packing");
    if let Some(given) = source.get("shuffle_merged_datasets") {
        match given.node.bool() {
            Some(value) => draft.other("data.shuffle", value.to_string(), &[&given], "a new order each epoch"),
            None => draft.left(&given, "not understood: true or false is meant"),
        }
    }
}

/// `batch_size`, which is discouraged there, counts if the accumulation is not given.
fn batch(source: &Source<'_>, draft: &mut Draft, packed: bool) {
    let whole = source.get("batch_size");
    let Some(given) = whole.filter(|_| source.peek("gradient_accumulation_steps").is_none()) else {
        if let Some(given) = source.get("batch_size") {
            draft.idle(&given, "gradient_accumulation_steps counts there");
        }
        return trainer::batch(source, draft, ("micro_batch_size", 1), packed);
    };
    let micro = source.get("micro_batch_size");
    let rows = micro.as_ref().map_or(Some(1), |given| given.node.integer()).filter(|rows| *rows > 0);
    let (Some(rows), Some(all)) = (rows, given.node.integer()) else {
        micro.iter().chain([&given]).for_each(|given| draft.left(given, "not understood: a whole number is meant"));
        return;
    };
    let global = (all / rows).max(1).saturating_mul(rows);
    let why = "rows of a step over all ranks here; times the number of processes there";
    let both: Vec<_> = [&given].into_iter().chain(&micro).collect();
    draft.other("train.global_batch_size", global.to_string(), &both, why);
    match &micro {
        Some(micro) => draft.carry("train.micro_batch_size", rows.to_string(), micro),
        None => draft.theirs("train.micro_batch_size", "1", "1"),
    }
}

fn checkpointing(source: &Source<'_>, draft: &mut Draft) {
    let Some(given) = source.get("gradient_checkpointing") else { return };
    match given.node.bool() {
        Some(value) => draft.carry("train.gradient_checkpointing", value.to_string(), &given),
        None if given.is("offload") || given.is("offload_disk") || given.is("unsloth") => {
            let why = "activations are recomputed; they are not kept elsewhere";
            draft.other("train.gradient_checkpointing", "true", &[&given], why);
        }
        None => draft.left(&given, "not understood: true or false is meant"),
    }
}

fn optimizer(source: &Source<'_>, draft: &mut Draft) {
    if let Some(given) = source.get("optimizer") {
        trainer::optimizer(draft, &given);
    }
    if !draft.number(source, "learning_rate", "optimizer.learning_rate") {
        draft.fill_in("optimizer.learning_rate", "2e-4", "`learning_rate` is not given, and axolotl has no default");
    }
    // `adam_eps` is not a key of axolotl: only `adam_epsilon` is read.
    trainer::adam(source, draft, "adam_epsilon");
}

fn schedule(source: &Source<'_>, draft: &mut Draft) {
    let rate = source.peek("learning_rate").and_then(Node::number);
    let name = source.get("lr_scheduler");
    let counts = trainer::schedule(source, draft, name.as_ref(), "cosine", rate);
    let cosine = name.as_ref().is_none_or(|name| name.is("cosine"));
    if let Some(given) = source.get("cosine_min_lr_ratio") {
        match (given.node.number(), cosine) {
            // 0 is false in Python: the plain cosine, which falls to 0 as well.
            (Some(value), true) => {
                draft.carry("schedule.min_lr_ratio", number(value, given.node.text().unwrap_or_default()), &given);
            }
            (Some(_), false) => draft.idle(&given, "it counts with the cosine only"),
            (None, _) => draft.left(&given, "not understood: a number is meant"),
        }
    }
    let warmup = Warmup { steps: source.get("warmup_steps"), ratio: source.get("warmup_ratio") };
    if warmup.steps.is_none() && warmup.ratio.is_none() {
        if counts {
            draft.theirs("schedule.warmup_ratio", "0.03", "3 steps in 100, at most 100");
        }
        return;
    }
    if let Some(given) = warmup.steps.as_ref().filter(|given| counts && given.node.integer() == Some(1)) {
        draft.other("schedule.warmup_steps", "2", &[given], "axolotl makes 2 of 1");
        if let Some(ratio) = &warmup.ratio {
            draft.idle(ratio, "warmup_steps counts there");
        }
        return;
    }
    trainer::warmup(draft, &warmup, counts, true);
}
