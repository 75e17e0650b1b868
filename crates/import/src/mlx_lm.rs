//! mlx-lm: the YAML of `mlx_lm.lora --config`. Meanings are those of `mlx_lm/lora.py` and
//! `mlx_lm/tuner` (d78bf58e).

use crate::draft::Draft;
use crate::places::{self, Rows};
use crate::source::{Given, Source};
use crate::text::{list, number, quoted};

/// Names of modules in the files of MLX and of Hugging Face are the same.
pub(crate) fn map(source: &Source<'_>, draft: &mut Draft) {
    if let Some(given) = source.get("model") {
        places::model(draft, &given, None);
    }
    match source.get("adapter_path").or_else(|| source.get("adapter_file")) {
        Some(given) => places::output(draft, &given, "the run; the final adapter is its folder `adapter`"),
        None => draft.theirs("output_dir", quoted("adapters"), "the run is written there"),
    }
    if !draft.integer(source, "seed", "seed") {
        draft.theirs("seed", "0", "0");
    }
    data(source, draft);
    let full = method(source, draft);
    if !full {
        adapter(source, draft);
    }
    layers(source, draft);
    let accumulation = batch(source, draft);
    optimizer(source, draft);
    schedule(source, draft, accumulation);
    for (theirs, ours) in [("steps_per_eval", "eval.every"), ("save_every", "checkpoint.every")] {
        steps(source, draft, theirs, ours, accumulation);
    }
    if source.peek("steps_per_eval").is_none() {
        draft.theirs("eval.every", (200 / accumulation).max(1).to_string(), "200 micro-batches");
    }
    draft.integer(source, "steps_per_report", "log.every");
    draft.switch(source, "grad_checkpoint", "train.gradient_checkpointing");
    draft.theirs("train.max_grad_norm", "0.0", "gradients are not cut");
}

fn data(source: &Source<'_>, draft: &mut Draft) {
    let named = source.get("data");
    if let Some(given) = &named {
        match given.node.text() {
            Some(path) if !places::is_path(path) && !places::is_hub_id(path) => {
                draft.other("data.train", quoted(path), &[given], places::RELATIVE);
            }
            Some(path) => {
                if places::is_hub_id(path) {
                    draft.left_out(
                        "the split `valid` of the data set is evaluated on there; `eval` in [data] names rows",
                    );
                }
                let mut rows = Rows::default();
                rows.add(path, None);
                rows.write(draft, "data.train", &[given]);
            }
            None => draft.left(given, "not understood: a folder is meant"),
        }
    }
    if named.is_none() && source.peek("hf_dataset").is_none() {
        draft.fill_in("data.train", quoted("data/train.jsonl"), "the file names no rows");
    }
    if let Some(given) = source.get("hf_dataset") {
        draft.left(&given, "a data set of the hub with features; `train` in [data] names files");
        if named.is_none() {
            draft.fill_in("data.train", quoted("data/train.jsonl"), &format!("rows of {}", given.place()));
        }
    }
    // Without it the default is 2048, as here.
    draft.integer(source, "max_seq_length", "data.max_seq_len");
    draft.theirs("data.overlong", quoted("truncate"), "longer rows are cut");
    match source.get("mask_prompt") {
        Some(given) if given.node.bool() == Some(true) => {
            let why = "the last message, or the completion";
            draft.other("data.train_on", quoted("last"), &[&given], why);
        }
        Some(given) if given.node.bool() == Some(false) => {
            draft.other("data.train_on", quoted("all"), &[&given], "every token is trained on");
        }
        Some(given) => draft.left(&given, "not understood: true or false is meant"),
        None => draft.theirs("data.train_on", quoted("all"), "every token is trained on"),
    }
}

/// Whether all weights are trained.
fn method(source: &Source<'_>, draft: &mut Draft) -> bool {
    let Some(given) = source.get("fine_tune_type") else { return false };
    match given.node.text().unwrap_or_default() {
        "lora" => draft.carry("train.method", quoted("lora"), &given),
        "dora" => draft.other("lora.use_dora", "true", &[&given], "LoRA with magnitudes"),
        "full" => {
            draft.carry("train.method", quoted("full"), &given);
            return true;
        }
        _ => draft.left(&given, "not understood: lora, dora or full is meant"),
    }
    false
}

/// Rank, scale, dropout and keys.
fn adapter(source: &Source<'_>, draft: &mut Draft) {
    if source.peek("lora_parameters").is_none() {
        draft.theirs("lora.rank", "8", "8");
        draft.theirs("lora.alpha", "160.0", "scale 20.0 × rank 8");
        return;
    }
    let rank = source.get("lora_parameters.rank");
    match &rank {
        Some(given) => match given.node.integer() {
            Some(value) => draft.carry("lora.rank", value.to_string(), given),
            None => draft.left(given, "not understood: a whole number is meant"),
        },
        None => draft.fill_in("lora.rank", "8", "lora_parameters has no rank, which mlx-lm asks for"),
    }
    let value = rank.as_ref().and_then(|given| given.node.number()).unwrap_or(8.0);
    let (scale, alpha) = (source.get("lora_parameters.scale"), source.get("lora_parameters.alpha"));
    match (&scale, &alpha) {
        (Some(given), _) => {
            match given.node.number() {
                Some(scale) => {
                    let both: Vec<&Given<'_>> = [given].into_iter().chain(&rank).collect();
                    draft.other("lora.alpha", format!("{:?}", scale * value), &both, "alpha = scale × rank");
                }
                None => draft.left(given, "not understood: a number is meant"),
            }
            if let Some(alpha) = &alpha {
                draft.idle(alpha, "mlx-lm reads scale alone, since June 2024");
            }
        }
        (None, Some(given)) => match (given.node.number(), given.node.text()) {
            (Some(alpha), Some(written)) => {
                let why =
                    format!("{}; mlx-lm reads `scale`, which is not there: taken for PEFT's alpha", given.named());
                draft.fill_in("lora.alpha", number(alpha, written), &why);
            }
            _ => draft.left(given, "not understood: a number is meant"),
        },
        (None, None) => {
            draft.fill_in(
                "lora.alpha",
                format!("{:?}", 20.0 * value),
                "mlx-lm asks for a scale: 20.0 × rank is its default",
            );
        }
    }
    draft.number(source, "lora_parameters.dropout", "lora.dropout");
    if let Some(given) = source.get("lora_parameters.keys") {
        match names(&given) {
            Some(names) => draft.carry("lora.target_modules", list(&names), &given),
            None => draft.left(&given, "not understood: a list of names is meant"),
        }
    }
}

fn names(given: &Given<'_>) -> Option<Vec<String>> {
    match &given.node.value {
        crate::yaml::Value::List(items) => items.iter().map(|item| item.text().map(str::to_owned)).collect(),
        crate::yaml::Value::Scalar { .. } | crate::yaml::Value::Map(_) => None,
    }
}

/// The last layers, which can only be numbered if their count is known.
fn layers(source: &Source<'_>, draft: &mut Draft) {
    let given = source.get("num_layers").or_else(|| source.get("lora_layers"));
    match given.as_ref().map(|given| (given, given.node.integer())) {
        Some((given, Some(count))) if count > 0 => draft.left(
            given,
            &format!(
                "the last {count} layers there, all layers here; layers_to_transform in [lora] lists layers by number: of a \
                 model with N layers, N-{count} to N-1"
            ),
        ),
        Some((given, Some(_))) => draft.idle(given, "all layers, as here"),
        Some((given, None)) => draft.left(given, "not understood: a whole number is meant"),
        None => draft.left_out(
            "num_layers is not given: 16, the last 16 layers, is the default there; all layers here; \
             layers_to_transform in [lora] lists layers by number",
        ),
    }
}

/// The sizes of batches, and how many micro-batches make a step.
fn batch(source: &Source<'_>, draft: &mut Draft) -> i64 {
    let (size, accumulation) = (source.get("batch_size"), source.get("grad_accumulation_steps"));
    let of = |given: &Option<Given<'_>>, default: i64| {
        given.as_ref().map_or(Some(default), |given| given.node.integer().filter(|count| *count > 0))
    };
    let (rows, steps) = (of(&size, 4), of(&accumulation, 1));
    for (given, value) in [(&size, rows), (&accumulation, steps)] {
        if let (Some(given), None) = (given, value) {
            draft.left(given, "not understood: a whole number above 0 is meant");
        }
    }
    let (rows, steps) = (rows.unwrap_or(4), steps.unwrap_or(1));
    let given: Vec<&Given<'_>> = size.iter().chain(&accumulation).collect();
    let global = rows.saturating_mul(steps).to_string();
    if given.is_empty() {
        draft.theirs("train.global_batch_size", global, "rows of a step");
    } else {
        draft.other("train.global_batch_size", global, &given, "rows of a step over all ranks");
    }
    if let Some(given) = &size {
        draft.other(
            "train.micro_batch_size",
            rows.to_string(),
            &[given],
            "rows at once on one rank here, on all there",
        );
    }
    match source.get("iters") {
        Some(given) => match given.node.integer().filter(|iterations| *iterations > 0) {
            Some(iterations) if steps == 1 => draft.carry("train.max_steps", iterations.to_string(), &given),
            Some(iterations) => {
                let both: Vec<&Given<'_>> = [&given].into_iter().chain(&accumulation).collect();
                let steps = (iterations / steps).max(1).to_string();
                draft.other("train.max_steps", steps, &both, "micro-batches there, optimizer steps here");
            }
            None => draft.left(&given, "not understood: a whole number above 0 is meant"),
        },
        None => draft.theirs("train.max_steps", (1000 / steps).max(1).to_string(), "1000 micro-batches"),
    }
    steps
}

/// A number of micro-batches as one of optimizer steps.
fn steps(source: &Source<'_>, draft: &mut Draft, theirs: &str, ours: &'static str, accumulation: i64) {
    let Some(given) = source.get(theirs) else { return };
    match given.node.integer().filter(|count| *count > 0) {
        Some(count) if accumulation == 1 => draft.carry(ours, count.to_string(), &given),
        Some(count) => {
            let steps = (count / accumulation).max(1).to_string();
            draft.other(ours, steps, &[&given], "micro-batches there, optimizer steps here");
        }
        None => draft.left(&given, "not understood: a whole number above 0 is meant"),
    }
}

/// Adam and AdamW, without a correction of the bias there.
fn optimizer(source: &Source<'_>, draft: &mut Draft) {
    let name = source.get("optimizer");
    let word = name.as_ref().and_then(|given| given.node.text()).unwrap_or("adam").to_ascii_lowercase();
    let why = "ours corrects the bias of the moments, mlx-lm by default does not: its first steps are larger";
    match (word.as_str(), &name) {
        ("adam" | "adamw", Some(given)) => draft.other("optimizer.name", quoted("adamw"), &[given], why),
        ("adam", None) => draft.theirs("optimizer.name", quoted("adamw"), &format!("adam; {why}")),
        (_, Some(given)) => {
            draft.fill_in("optimizer.name", quoted("adamw"), &format!("{}; AdamW is the only one here", given.named()));
        }
        (_, None) => {}
    }
    let settings = format!("optimizer_config.{word}");
    let at = |key: &str| format!("{settings}.{key}");
    if word == "adam" {
        draft.theirs("optimizer.weight_decay", "0.0", "adam has none");
    } else {
        draft.number(source, &at("weight_decay"), "optimizer.weight_decay");
    }
    draft.number(source, &at("eps"), "optimizer.eps");
    if let Some(given) = source.get(&at("betas")) {
        let pair = match &given.node.value {
            crate::yaml::Value::List(items) => {
                items.iter().map(crate::yaml::Node::number).collect::<Option<Vec<f64>>>()
            }
            _ => None,
        };
        match pair.as_deref() {
            Some([first, second]) => draft.carry("optimizer.betas", format!("[{first:?}, {second:?}]"), &given),
            _ => draft.left(&given, "not understood: two numbers are meant"),
        }
    }
    if let Some(given) = source.get(&at("bias_correction")) {
        match given.node.bool() {
            Some(true) => draft.idle(&given, "the bias is always corrected here"),
            _ => draft.left(&given, "the bias is always corrected here"),
        }
    }
}

/// `lr_schedule`, which replaces `learning_rate`.
fn schedule(source: &Source<'_>, draft: &mut Draft, accumulation: i64) {
    let rate = source.get("learning_rate");
    if source.peek("lr_schedule").is_none() {
        match &rate {
            Some(given) => match (given.node.number(), given.node.text()) {
                (Some(value), Some(written)) => draft.carry("optimizer.learning_rate", number(value, written), given),
                _ => draft.left(given, "not understood: a number is meant"),
            },
            None => draft.theirs("optimizer.learning_rate", "1e-5", "1e-5"),
        }
        draft.theirs("schedule.name", quoted("constant"), "no schedule");
        return;
    }
    if let Some(given) = &rate {
        draft.idle(given, "the first of lr_schedule.arguments counts there");
    }
    let (name, arguments) = (source.get("lr_schedule.name"), source.get("lr_schedule.arguments"));
    let numbers = arguments.as_ref().and_then(|given| match &given.node.value {
        crate::yaml::Value::List(items) => items.iter().map(crate::yaml::Node::number).collect::<Option<Vec<f64>>>(),
        _ => None,
    });
    let (Some(name), Some(arguments), Some(numbers)) = (&name, &arguments, &numbers) else {
        [&name, &arguments].into_iter().flatten().for_each(|given| draft.left(given, "not understood"));
        return;
    };
    let Some(first) = numbers.first().copied() else { return draft.left(arguments, "not understood: it is empty") };
    draft.other("optimizer.learning_rate", format!("{first:?}"), &[arguments], "the first of them");
    let (word, last, length) = match (name.node.text().unwrap_or_default(), numbers.as_slice()) {
        ("cosine_decay", [_, length]) => ("cosine", 0.0, *length),
        ("cosine_decay", [_, length, last]) => ("cosine", *last, *length),
        ("linear_schedule", [_, last, length]) => ("linear", *last, *length),
        _ => {
            let why = format!("{}; there are constant, linear and cosine here", name.named());
            draft.fill_in("schedule.name", quoted("cosine"), &why);
            return warmup(source, draft);
        }
    };
    if last > first || first <= 0.0 {
        draft.left(arguments, "the learning rate rises, and ours falls after the warm-up");
        draft.fill_in("schedule.name", quoted("constant"), &format!("{}; it rises there", name.named()));
        return warmup(source, draft);
    }
    draft.other("schedule.name", quoted(word), &[name], "the same curve");
    draft.other(
        "schedule.min_lr_ratio",
        format!("{:?}", last / first),
        &[arguments],
        "the last learning rate over the first",
    );
    ends_with(source, draft, arguments, length, accumulation);
    warmup(source, draft);
}

/// Says so if the learning rate does not reach its end with the last step.
fn ends_with(source: &Source<'_>, draft: &mut Draft, arguments: &Given<'_>, length: f64, accumulation: i64) {
    let iterations = source.peek("iters").and_then(crate::yaml::Node::number).unwrap_or(1000.0);
    let warmup = source.peek("lr_schedule.warmup").and_then(crate::yaml::Node::number).unwrap_or(0.0);
    let steps = (iterations / accumulation as f64).floor();
    // Over one step in a hundred is told.
    if (length + warmup - steps).abs() > steps / 100.0 + 1.0 {
        let why = format!("the learning rate falls for {length} steps there; here it always falls until the last step");
        draft.left(arguments, &why);
    }
}

fn warmup(source: &Source<'_>, draft: &mut Draft) {
    draft.integer(source, "lr_schedule.warmup", "schedule.warmup_steps");
    if let Some(given) = source.get("lr_schedule.warmup_init") {
        match given.node.number() {
            Some(0.0) => draft.idle(&given, "it climbs from 0 here too"),
            _ => draft.left(&given, "the learning rate climbs from 0 here"),
        }
    }
}
