//! What axolotl and LLaMA-Factory share, since both train with Hugging Face's `Trainer`.
//! Defaults are those of `TrainingArguments` (transformers 5).

use crate::draft::Draft;
use crate::source::{Given, Source};
use crate::text::{number, quoted};

/// AdamW as it is.
const ADAMW: [&str; 8] = [
    "adamw",
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_hf",
    "adamw_apex_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "optimi_adamw",
];
/// AdamW with its state in fewer bits, or in memory of the host.
const SMALL_ADAMW: [&str; 13] = [
    "adamw_8bit",
    "adamw_bnb_8bit",
    "adamw_torch_8bit",
    "adamw_torch_4bit",
    "adamw_anyprecision",
    "ao_adamw_8bit",
    "ao_adamw_4bit",
    "ao_adamw_fp8",
    "flash_adamw",
    "paged_adamw",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adamw_4bit",
];

/// `optimizer.name`, from the name of an optimizer of transformers.
pub(crate) fn optimizer(draft: &mut Draft, given: &Given<'_>) {
    let name = given.node.text().unwrap_or_default().to_ascii_lowercase();
    let ours = quoted("adamw");
    if ADAMW.contains(&name.as_str()) {
        draft.other("optimizer.name", ours, &[given], "the same optimizer");
    } else if SMALL_ADAMW.contains(&name.as_str()) {
        draft.other("optimizer.name", ours, &[given], "the same optimizer; its state stays f32 here");
    } else {
        draft.fill_in("optimizer.name", ours, &format!("{}; AdamW is the only one here", given.named()));
    }
}

/// Betas, epsilon, weight decay and the norm that gradients are cut to.
pub(crate) fn adam(source: &Source<'_>, draft: &mut Draft, epsilon: &str) {
    let (beta1, beta2) = (source.get("adam_beta1"), source.get("adam_beta2"));
    let of = |given: &Option<Given<'_>>, default: f64| match given {
        Some(given) => given.node.number(),
        None => Some(default),
    };
    let given: Vec<&Given<'_>> = beta1.iter().chain(&beta2).collect();
    if !given.is_empty() {
        match (of(&beta1, 0.9), of(&beta2, 0.999)) {
            (Some(first), Some(second)) => {
                draft.other("optimizer.betas", format!("[{first:?}, {second:?}]"), &given, "one list here");
            }
            _ => given.iter().for_each(|given| draft.left(given, "not understood: a number is meant")),
        }
    }
    draft.number(source, epsilon, "optimizer.eps");
    if !draft.number(source, "weight_decay", "optimizer.weight_decay") {
        draft.theirs("optimizer.weight_decay", "0.0", "none");
    }
    draft.number(source, "max_grad_norm", "train.max_grad_norm");
}

/// How the learning rate climbs.
pub(crate) struct Warmup<'a> {
    pub(crate) steps: Option<Given<'a>>,
    pub(crate) ratio: Option<Given<'a>>,
}

/// `schedule.name`. False if warm-up has no effect with it.
pub(crate) fn schedule(
    source: &Source<'_>,
    draft: &mut Draft,
    given: Option<&Given<'_>>,
    default: &str,
    rate: Option<f64>,
) -> bool {
    let Some(given) = given else {
        if default != "cosine" {
            draft.theirs("schedule.name", quoted(default), default);
        }
        return true;
    };
    let name = given.node.text().unwrap_or_default().to_ascii_lowercase();
    match name.as_str() {
        "cosine" | "linear" => draft.carry("schedule.name", quoted(&name), given),
        "constant" => {
            draft.carry("schedule.name", quoted("constant"), given);
            return false;
        }
        "constant_with_warmup" => {
            draft.other("schedule.name", quoted("constant"), &[given], "ours climbs by warmup_steps or warmup_ratio");
        }
        "cosine_with_min_lr" | "cosine_warmup_with_min_lr" => {
            draft.other("schedule.name", quoted("cosine"), &[given], "with min_lr_ratio");
            least_rate(source, draft, rate);
        }
        _ => {
            let why = format!("{}; there are constant, linear and cosine here", given.named());
            draft.fill_in("schedule.name", quoted("cosine"), &why);
        }
    }
    true
}

/// `min_lr` or `min_lr_rate` of `lr_scheduler_kwargs`.
fn least_rate(source: &Source<'_>, draft: &mut Draft, rate: Option<f64>) {
    if draft.number(source, "lr_scheduler_kwargs.min_lr_rate", "schedule.min_lr_ratio") {
        return;
    }
    let Some(given) = source.get("lr_scheduler_kwargs.min_lr") else { return };
    match (given.node.number(), rate) {
        (Some(least), Some(rate)) if rate > 0.0 => {
            let why = "divided by the learning rate";
            draft.other("schedule.min_lr_ratio", format!("{:?}", least / rate), &[&given], why);
        }
        _ => draft.left(&given, "it is min_lr_ratio × learning_rate here"),
    }
}

/// `schedule.warmup_steps` or `warmup_ratio`. `steps` count if they are given (or are not 0, as
/// `zero_counts` says), else the ratio.
pub(crate) fn warmup(draft: &mut Draft, warmup: &Warmup<'_>, counts: bool, zero_counts: bool) {
    let Warmup { steps, ratio } = warmup;
    let both: Vec<&Given<'_>> = steps.iter().chain(ratio).collect();
    if !counts {
        both.iter().for_each(|given| draft.idle(given, "a constant learning rate has no warm-up there"));
        return;
    }
    let steps = steps.as_ref().filter(|steps| zero_counts || steps.node.number() != Some(0.0) || ratio.is_none());
    let chosen = steps.or(ratio.as_ref());
    let Some(given) = chosen else { return };
    for ignored in both.iter().filter(|other| other.path != given.path) {
        draft.idle(ignored, "the other key for the warm-up counts there");
    }
    let written = given.node.text().unwrap_or_default();
    match given.node.number() {
        // transformers 5 takes a share in the place of steps.
        Some(share) if share > 0.0 && share < 1.0 => {
            draft.carry("schedule.warmup_ratio", number(share, written), given);
        }
        Some(share) if given.path == "warmup_ratio" => {
            draft.carry("schedule.warmup_ratio", number(share, written), given);
        }
        Some(_) => match given.node.integer() {
            Some(steps) => draft.carry("schedule.warmup_steps", steps.to_string(), given),
            None => draft.left(given, "not understood: whole steps are meant"),
        },
        None => draft.left(given, "not understood: a number is meant"),
    }
}

/// `train.max_steps` if it is above 0, else `train.epochs`.
pub(crate) fn length(source: &Source<'_>, draft: &mut Draft, epochs: &str, default: u64) {
    let (steps, epochs) = (source.get("max_steps"), source.get(epochs));
    if let Some(given) = steps {
        match given.node.integer() {
            Some(count) if count > 0 => {
                draft.carry("train.max_steps", count.to_string(), &given);
                if let Some(epochs) = &epochs {
                    draft.idle(epochs, "max_steps counts there too");
                }
                return;
            }
            Some(_) => draft.idle(&given, "off there"),
            None => draft.left(&given, "not understood: a whole number is meant"),
        }
    }
    match epochs {
        None if default != 1 => draft.theirs("train.epochs", default.to_string(), &counted(default)),
        None => {}
        Some(given) => match given.node.integer() {
            Some(count) if count > 0 => draft.carry("train.epochs", count.to_string(), &given),
            _ => {
                let why = format!("{}; ours are whole epochs, or max_steps for a part of one", given.named());
                draft.fill_in("train.epochs", "1", &why);
            }
        },
    }
}

fn counted(epochs: u64) -> String {
    crate::text::counted(usize::try_from(epochs).unwrap_or_default(), "epoch")
}

/// Micro-batch and global batch. `micro` and `accumulation`: the keys and their defaults.
pub(crate) fn batch(source: &Source<'_>, draft: &mut Draft, micro: (&str, i64), packed: bool) {
    let (rows, steps) = (source.get(micro.0), source.get("gradient_accumulation_steps"));
    let of = |given: &Option<Given<'_>>, default: i64| match given {
        Some(given) => given.node.integer().filter(|count| *count > 0),
        None => Some(default),
    };
    let given: Vec<&Given<'_>> = rows.iter().chain(&steps).collect();
    let (Some(count), Some(accumulation)) = (of(&rows, micro.1), of(&steps, 1)) else {
        given.iter().for_each(|given| draft.left(given, "not understood: a whole number above 0 is meant"));
        return;
    };
    let global = count.saturating_mul(accumulation).to_string();
    let why = match packed {
        false => "rows of a step over all ranks here; times the number of processes there",
        true => {
            "there they are packed sequences, each of several rows, on each process; rows of a step over all ranks \
             here: multiply by the rows in a sequence and the number of processes"
        }
    };
    match (given.is_empty(), packed) {
        (true, _) => draft.theirs("train.global_batch_size", global, "rows of a step, on one process there"),
        (false, false) => draft.other("train.global_batch_size", global, &given, why),
        (false, true) => {
            let names: Vec<String> = given.iter().map(|given| given.named()).collect();
            draft.fill_in("train.global_batch_size", global, &format!("{}: {why}", names.join(", ")));
        }
    }
    match (&rows, packed) {
        (Some(rows), false) => draft.carry("train.micro_batch_size", count.to_string(), rows),
        (Some(rows), true) => {
            draft.other("train.micro_batch_size", count.to_string(), &[rows], "packed sequences there, rows here");
        }
        (None, _) => draft.theirs("train.micro_batch_size", count.to_string(), "rows at once"),
    }
}

/// `eval.every` and `checkpoint.every` from steps: a whole number is steps, a share is one of the
/// run.
pub(crate) fn every(source: &Source<'_>, draft: &mut Draft, theirs: &str, ours: &'static str) {
    let Some(given) = source.get(theirs) else { return };
    match (given.node.integer(), given.node.number()) {
        (Some(steps), _) if steps > 0 => draft.carry(ours, steps.to_string(), &given),
        (_, Some(share)) if share > 0.0 && share < 1.0 => {
            draft.left(&given, &format!("a share of the run there; `{ours}` counts optimizer steps"));
        }
        _ => draft.left(&given, "not understood: a number of steps is meant"),
    }
}

/// A key that counts by epochs, or names when something happens.
pub(crate) fn by_epoch(source: &Source<'_>, draft: &mut Draft, theirs: &str, ours: &str) {
    if let Some(given) = source.get(theirs) {
        draft.left(&given, &format!("`{ours}` counts optimizer steps"));
    }
}

/// What becomes of the best checkpoint, and how many stay.
pub(crate) fn checkpoints(source: &Source<'_>, draft: &mut Draft) {
    draft.integer(source, "save_total_limit", "checkpoint.keep_last");
    if let Some(given) = source.get("load_best_model_at_end") {
        match given.node.bool() {
            Some(true) => draft.other("checkpoint.result", quoted("best"), &[&given], "the checkpoint that counts"),
            Some(false) => draft.idle(&given, "the last checkpoint is the result here too"),
            None => draft.left(&given, "not understood: true or false is meant"),
        }
    }
    if let Some(given) = source.get("metric_for_best_model") {
        match given.is("loss") || given.is("eval_loss") {
            true => draft.idle(&given, "the evaluation loss decides here too"),
            false => draft.left(&given, "the evaluation loss decides here"),
        }
    }
}

/// `model.dtype`, from the switches of mixed precision.
pub(crate) fn dtype(source: &Source<'_>, draft: &mut Draft, names: &[(&str, &str)]) {
    for (theirs, ours) in names {
        let Some(given) = source.get(theirs) else { continue };
        match given.node.bool() {
            Some(true) if !draft.has("model.dtype") => {
                let why = "the base and, on a GPU, the compute; adapter and optimizer stay f32";
                draft.other("model.dtype", quoted(ours), &[&given], why);
            }
            Some(true) => draft.left(&given, "another number type is given too"),
            Some(false) => draft.unset(&given),
            None if given.is("auto") => draft.idle(&given, "`auto` is the number type of the model's file here"),
            None if given.is("full") => draft.other("model.dtype", quoted(ours), &[&given], "for evaluation too"),
            None => draft.left(&given, "not understood: true or false is meant"),
        }
    }
}

/// `lora.target_modules` from a list of names. The head and the embeddings get no adapter here.
pub(crate) fn targets(draft: &mut Draft, names: &[String], given: &[&Given<'_>]) {
    let refused: Vec<&str> = names.iter().filter(|name| is_outside(name)).map(String::as_str).collect();
    let taken: Vec<&String> = names.iter().filter(|name| !is_outside(name)).collect();
    if !refused.is_empty() {
        let why = format!("{}: head and embeddings get no adapter here", refused.join(", "));
        given.iter().for_each(|given| draft.left(given, &why));
    }
    if taken.is_empty() {
        return;
    }
    match given {
        [one] if refused.is_empty() => draft.carry("lora.target_modules", crate::text::list(&taken), one),
        _ => draft.other("lora.target_modules", crate::text::list(&taken), given, "one list here"),
    }
}

fn is_outside(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    matches!(last, "lm_head" | "embed_tokens" | "wte" | "wpe" | "embed_out")
}
