//! torchtune. Meanings are those of its recipes `lora_finetune_*` and `full_finetune_*`, and of its
//! builders of models and datasets (bd2a0fc7c). References `${…}` are resolved before.

use crate::draft::Draft;
use crate::places::{self, Rows};
use crate::source::{Given, Source};
use crate::text::{list, number, quoted};
use crate::yaml::{Node, Value};

pub(crate) fn map(source: &Source<'_>, draft: &mut Draft) {
    model(source, draft);
    if let Some(given) = source.get("output_dir") {
        places::output(draft, &given, "");
    }
    if !draft.integer(source, "seed", "seed") {
        draft.left_out("seed is not given: another one each time there, 42 here");
    }
    device(source, draft);
    data(source, draft);
    length(source, draft);
    batch(source, draft);
    draft.switch(source, "enable_activation_checkpointing", "train.gradient_checkpointing");
    match source.get("clip_grad_norm") {
        Some(given) if given.is("inf") => draft.other("train.max_grad_norm", "0.0", &[&given], "not cut"),
        Some(given) => match (given.node.number(), given.node.text()) {
            (Some(norm), Some(written)) => draft.carry("train.max_grad_norm", number(norm, written), &given),
            _ => draft.left(&given, "not understood: a number is meant"),
        },
        None => draft.theirs("train.max_grad_norm", "0.0", "gradients are not cut"),
    }
    optimizer(source, draft);
    schedule(source, draft);
    draft.integer(source, "run_val_every_n_steps", "eval.every");
    draft.integer(source, "save_every_n_steps", "checkpoint.every");
    draft.integer(source, "keep_last_n_checkpoints", "checkpoint.keep_last");
    draft.integer(source, "log_every_n_steps", "log.every");
    loss(source, draft);
}

/// The last name of a `_component_`.
fn component<'a>(source: &Source<'a>, table: &str) -> Option<(Given<'a>, &'a str)> {
    let given = source.get(&format!("{table}._component_"))?;
    let name = given.node.text()?.rsplit('.').next()?;
    Some((given, name))
}

fn model(source: &Source<'_>, draft: &mut Draft) {
    checkpoint(source, draft);
    let Some((given, name)) = component(source, "model") else { return };
    let packed = name.starts_with("qlora_");
    if !packed && !name.starts_with("lora_") && source.peek("model.lora_rank").is_none() {
        draft.other("train.method", quoted("full"), &[&given], "a model without an adapter: all weights are trained");
        return;
    }
    draft.other("train.method", quoted("lora"), &[&given], "the model with an adapter");
    if !draft.integer(source, "model.lora_rank", "lora.rank") {
        draft.theirs("lora.rank", "8", "8");
    }
    if !draft.number(source, "model.lora_alpha", "lora.alpha") {
        draft.theirs("lora.alpha", "16", "16");
    }
    draft.number(source, "model.lora_dropout", "lora.dropout");
    draft.switch(source, "model.use_dora", "lora.use_dora");
    targets(source, draft, name);
    match source.get("model.quantize_base") {
        Some(given) if given.node.bool() == Some(true) => {
            draft.other("model.quantization", quoted("nf4"), &[&given], "NF4 of torchao there");
        }
        Some(given) => draft.unset(&given),
        None if packed => draft.other("model.quantization", quoted("nf4"), &[&given], "NF4 of torchao there"),
        None => {}
    }
}

/// The directory of the model.
fn checkpoint(source: &Source<'_>, draft: &mut Draft) {
    let Some(given) = source.get("checkpointer.checkpoint_dir") else { return };
    let Some(path) = given.node.text() else { return draft.left(&given, "not understood: a path is meant") };
    let meta = component(source, "checkpointer").is_some_and(|(_, name)| name.contains("Meta"));
    let path = path.trim_end_matches('/');
    let parent = path.strip_suffix("/original").filter(|_| meta);
    match (meta, parent) {
        (true, Some(parent)) => {
            let why = "Meta's files lie in `original`; the folder around it has Hugging Face's, which are read here";
            draft.other("model.path", quoted(parent), &[&given], why);
        }
        (true, None) => {
            let why = format!("{}; files in Meta's form there, a directory in Hugging Face's form here", given.named());
            draft.fill_in("model.path", quoted(path), &why);
        }
        (false, _) => draft.carry("model.path", quoted(path), &given),
    }
    if let Some(given) = source.get("checkpointer.adapter_checkpoint") {
        draft.left(&given, "`init_from` in [lora] names a directory in PEFT's form");
    }
}

/// Names of modules as in the files of Hugging Face.
fn targets(source: &Source<'_>, draft: &mut Draft, name: &str) {
    let fused = name.contains("phi3") || name.contains("phi4");
    let (attention, mlp) = (source.get("model.lora_attn_modules"), source.get("model.apply_lora_to_mlp"));
    let Some(attention) = attention else {
        draft.fill_in("lora.target_modules", quoted("all-linear"), "lora_attn_modules is not given");
        return;
    };
    let Value::List(items) = &attention.node.value else {
        return draft.left(&attention, "not understood: a list of names is meant");
    };
    let mut names: Vec<&str> = Vec::new();
    for item in items {
        let ours = match item.text().unwrap_or_default() {
            "q_proj" | "k_proj" | "v_proj" if fused => "qkv_proj",
            "q_proj" => "q_proj",
            "k_proj" => "k_proj",
            "v_proj" => "v_proj",
            "output_proj" => "o_proj",
            other => {
                draft.left(&attention, &format!("{other} is not known"));
                continue;
            }
        };
        if !names.contains(&ours) {
            names.push(ours);
        }
    }
    let feed_forward = mlp.as_ref().is_some_and(|given| given.node.bool() == Some(true));
    if feed_forward {
        names.extend(if fused { vec!["gate_up_proj", "down_proj"] } else { vec!["gate_proj", "up_proj", "down_proj"] });
    }
    let given: Vec<&Given<'_>> = [&attention].into_iter().chain(&mlp).collect();
    let why = match fused {
        false => "names as in the model's files",
        true => "names as in the model's files, where queries, keys and values (gate and up) are one matrix",
    };
    draft.other("lora.target_modules", list(&names), &given, why);
    if let Some(given) = source.get("model.apply_lora_to_output") {
        match given.node.bool() {
            Some(true) => draft.left(&given, "the head gets no adapter here"),
            _ => draft.unset(&given),
        }
    }
}

fn device(source: &Source<'_>, draft: &mut Draft) {
    if let Some(given) = source.get("device") {
        match given.node.text().unwrap_or_default() {
            "cpu" => draft.carry("model.device", quoted("cpu"), &given),
            text if text.starts_with("cuda") || text == "mps" || text == "xpu" => {
                draft.idle(&given, "`device` is \"auto\" here: a GPU if there is one");
            }
            _ => draft.left(&given, "auto, cpu and gpu are known here"),
        }
    }
    let Some(given) = source.get("dtype") else { return };
    let why = "the base and, on a GPU, the compute; adapter and optimizer stay f32";
    match given.node.text().unwrap_or_default() {
        "bf16" => draft.other("model.dtype", quoted("bf16"), &[&given], why),
        "fp16" => draft.other("model.dtype", quoted("f16"), &[&given], why),
        "fp32" => draft.other("model.dtype", quoted("f32"), &[&given], why),
        _ => draft.left(&given, "f32, bf16 and f16 are known here"),
    }
}

/// A dataset of torchtune: (its builder, the data set of the hub, our format, whether the prompt is
/// trained on).
const DATASETS: [(&str, &str, &str, bool); 9] = [
    ("alpaca_dataset", "tatsu-lab/alpaca", "alpaca", true),
    ("alpaca_cleaned_dataset", "yahma/alpaca-cleaned", "alpaca", true),
    ("chat_dataset", "", "", false),
    ("instruct_dataset", "", "alpaca", false),
    ("text_completion_dataset", "", "text", true),
    ("slimorca_dataset", "Open-Orca/SlimOrca-Dedup", "sharegpt", false),
    ("grammar_dataset", "liweili/c4_200m", "", false),
    ("samsum_dataset", "Samsung/samsum", "", false),
    ("wikitext_dataset", "EleutherAI/wikitext_document_level", "", true),
];

fn data(source: &Source<'_>, draft: &mut Draft) {
    rows(source, draft, "dataset", "data.train");
    if source.peek("dataset_val").is_some() && source.peek("run_val_every_n_steps").is_some() {
        rows(source, draft, "dataset_val", "data.eval");
    } else if let Some(given) = source.get("dataset_val") {
        draft.idle(&given, "it is used with run_val_every_n_steps only");
    }
    if !draft.integer(source, "tokenizer.max_seq_len", "data.max_seq_len") {
        draft.left_out(
            "tokenizer.max_seq_len is not given: rows of any length are trained on there; here a row of more than \
             data.max_seq_len (2048) tokens is an error",
        );
    } else {
        draft.theirs("data.overlong", quoted("truncate"), "longer rows are cut");
    }
    if let Some(given) = source.get("tokenizer.prompt_template") {
        draft.left(&given, "the model's chat template is used; `chat_template` in [data] names a Jinja file");
    }
    draft.switch(source, "dataset.packed", "data.packing");
    draft.switch(source, "shuffle", "data.shuffle");
    if source.peek("shuffle").is_none() {
        draft.theirs("data.shuffle", "false", "file order");
    }
    let known = source.text("dataset._component_").and_then(of);
    match source.get("dataset.train_on_input") {
        Some(given) => match given.node.bool() {
            Some(true) => draft.other("data.train_on", quoted("all"), &[&given], "every token"),
            Some(false) => draft.other("data.train_on", quoted("assistant"), &[&given], "the answers"),
            None => draft.left(&given, "not understood: true or false is meant"),
        },
        None if known.is_some_and(|known| known.3) => {
            draft.theirs("data.train_on", quoted("all"), "this dataset trains on the prompt as well");
        }
        None => {}
    }
    columns(source, draft);
}

/// The names that the rows have for our keys.
fn columns(source: &Source<'_>, draft: &mut Draft) {
    let conversation = match source.text("dataset.conversation_style") {
        Some("sharegpt") => "conversations",
        _ => "messages",
    };
    for (theirs, ours) in [("column", "text"), ("conversation_column", conversation)] {
        if let Some(given) = source.get(&format!("dataset.{theirs}")) {
            places::columns(draft, &[(ours, given.node.text().unwrap_or_default().to_owned())], &[&given]);
        }
    }
    let Some(component) = source.get("dataset._component_") else { return };
    if component.node.text().is_some_and(|name| name.ends_with("instruct_dataset")) {
        let named = ["input", "output"].map(|name| source.get(&format!("dataset.column_map.{name}")));
        let [input, output] = named.each_ref().map(|given| given.as_ref().and_then(|given| given.node.text()));
        let pairs =
            [("instruction", input.unwrap_or("input").to_owned()), ("output", output.unwrap_or("output").to_owned())];
        let given: Vec<&Given<'_>> = named.iter().flatten().chain([&component]).collect();
        places::columns(draft, &pairs, &given);
    }
}

fn of(component: &str) -> Option<(&'static str, &'static str, &'static str, bool)> {
    let name = component.rsplit('.').next()?;
    DATASETS.into_iter().find(|(known, ..)| *known == name)
}

fn rows(source: &Source<'_>, draft: &mut Draft, table: &str, key: &'static str) {
    let Some(given) = source.get(&format!("{table}._component_")) else {
        if let Some(given) = source.get(table) {
            draft.left(&given, "several datasets are a list of files here");
            draft.fill_in(key, quoted("data/train.jsonl"), &format!("the rows of {}", given.place()));
        }
        return;
    };
    let known = given.node.text().and_then(of);
    let at = |name: &str| source.get(&format!("{table}.{name}"));
    let (own, files, split) = (at("source"), at("data_files"), at("split"));
    let mut rows = Rows::default();
    let text = |given: &Option<Given<'_>>| given.as_ref().and_then(|given| given.node.text()).map(str::to_owned);
    match (&files, text(&own), known) {
        (Some(files), ..) => match &files.node.value {
            Value::List(items) => items.iter().filter_map(Node::text).for_each(|file| rows.add(file, None)),
            _ => rows.add(files.node.text().unwrap_or_default(), None),
        },
        (None, Some(own), _) => rows.add(&own, text(&split).as_deref()),
        (None, None, Some((_, hub, ..))) if !hub.is_empty() => rows.add(hub, text(&split).as_deref()),
        _ => rows.add(given.node.text().unwrap_or_default().rsplit('.').next().unwrap_or_default(), None),
    }
    let all: Vec<&Given<'_>> = files.iter().chain(&own).chain([&given]).collect();
    rows.write(draft, key, &all[..1]);
    if let Some(split) = split.as_ref().filter(|split| split.node.text().is_some_and(|text| text.contains('['))) {
        draft.left(split, "a part of a split; `data.max_rows` takes the first rows, `data.eval_share` holds rows back");
    }
    if key == "data.eval" {
        return;
    }
    match known {
        Some((_, _, format, _)) if !format.is_empty() => {
            draft.other("data.format", quoted(format), &[&given], "through the model's chat template here");
        }
        Some(_) if at("conversation_style").is_some() => {}
        Some(_) => draft.left(&given, "the form of its rows is told by `auto` here, or has to be written anew"),
        None => draft.left(&given, "this dataset is not known here"),
    }
    if let Some(style) = at("conversation_style") {
        match style.node.text().unwrap_or_default() {
            "sharegpt" => draft.carry("data.format", quoted("sharegpt"), &style),
            "openai" => draft.other("data.format", quoted("messages"), &[&style], "the same form"),
            _ => draft.left(&style, "sharegpt and openai (messages) are known here"),
        }
    }
}

fn length(source: &Source<'_>, draft: &mut Draft) {
    let (epochs, most) = (source.get("epochs"), source.get("max_steps_per_epoch"));
    let count = epochs.as_ref().map_or(Some(1), |given| given.node.integer().filter(|count| *count > 0));
    let Some(count) = count else {
        return epochs.iter().for_each(|given| draft.left(given, "not understood: a whole number is meant"));
    };
    if let Some(most) = most {
        match most.node.integer().filter(|steps| *steps > 0) {
            Some(steps) => {
                let both: Vec<&Given<'_>> = [&most].into_iter().chain(&epochs).collect();
                let why = "epochs × steps of an epoch at most; if the rows make fewer steps, give epochs instead";
                draft.other("train.max_steps", steps.saturating_mul(count).to_string(), &both, why);
            }
            None => draft.left(&most, "not understood: a whole number is meant"),
        }
        return;
    }
    if let Some(epochs) = &epochs {
        draft.carry("train.epochs", count.to_string(), epochs);
    }
}

fn batch(source: &Source<'_>, draft: &mut Draft) {
    crate::hugging_face::batch(source, draft, ("batch_size", 1), source.is_on("dataset.packed"));
}

fn optimizer(source: &Source<'_>, draft: &mut Draft) {
    let Some((given, name)) = component(source, "optimizer") else { return };
    let ours = quoted("adamw");
    match name {
        "AdamW" => draft.other("optimizer.name", ours, &[&given], "the same optimizer"),
        "PagedAdamW" | "PagedAdamW8bit" | "AdamW8bit" | "PagedAdamW32bit" | "AdamW4bit" | "AdamWFp8" => {
            draft.other("optimizer.name", ours, &[&given], "the same optimizer; its state stays f32 here");
        }
        "CPUOffloadOptimizer" => {
            draft.other(
                "optimizer.name",
                ours,
                &[&given],
                "AdamW unless told otherwise; its state is always on the host here",
            );
        }
        _ => draft.fill_in("optimizer.name", ours, &format!("{}; AdamW is the only one here", given.named())),
    }
    if !draft.number(source, "optimizer.lr", "optimizer.learning_rate") {
        draft.theirs("optimizer.learning_rate", "1e-3", "1e-3");
    }
    // PyTorch's and bitsandbytes' default is 0.01, as here.
    draft.number(source, "optimizer.weight_decay", "optimizer.weight_decay");
    draft.number(source, "optimizer.eps", "optimizer.eps");
    if let Some(given) = source.get("optimizer.betas") {
        let pair = match &given.node.value {
            Value::List(items) => items.iter().map(Node::number).collect::<Option<Vec<f64>>>(),
            _ => None,
        };
        match pair.as_deref() {
            Some([first, second]) => draft.carry("optimizer.betas", format!("[{first:?}, {second:?}]"), &given),
            _ => draft.left(&given, "not understood: two numbers are meant"),
        }
    }
}

fn schedule(source: &Source<'_>, draft: &mut Draft) {
    let Some((given, name)) = component(source, "lr_scheduler") else {
        draft.theirs("schedule.name", quoted("constant"), "no schedule");
        return;
    };
    match name {
        "get_cosine_schedule_with_warmup" => {
            draft.other("schedule.name", quoted("cosine"), &[&given], "the same curve");
            draft.integer(source, "lr_scheduler.num_warmup_steps", "schedule.warmup_steps");
        }
        _ => draft.fill_in(
            "schedule.name",
            quoted("cosine"),
            &format!("{}; there are constant, linear and cosine here", given.named()),
        ),
    }
}

/// The loss says what is trained for.
fn loss(source: &Source<'_>, draft: &mut Draft) {
    let Some((given, name)) = component(source, "loss") else { return };
    if name.contains("CrossEntropy") || name.contains("CEWithChunked") {
        draft.idle(&given, "the cross-entropy of trained tokens, in pieces, is the loss here too");
    } else {
        draft.left(&given, "another objective: finetune does supervised fine-tuning, so this is another job");
    }
}
