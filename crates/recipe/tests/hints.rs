//! Mistyped keys and other tools' names for them, each with the hint that the user gets.

mod common;

use common::{MINIMAL, parse_with, seen};
use finetune_recipe::keys::{ELSEWHERE, KEYS, TABLES};

/// The hint for `written`, "table.key" or "key".
fn hint(written: &str) -> String {
    let (table, name) = written.split_once('.').unwrap_or(("", written));
    let text = match table {
        "" => format!("{name} = 1\n{MINIMAL}"),
        "data" => format!("{MINIMAL}{name} = 1\n"),
        "model" => format!("[model]\n{name} = 1\npath = \"gpt2\"\n[data]\ntrain = \"a\"\n"),
        _ => format!("{MINIMAL}[{table}]\n{name} = 1\n"),
    };
    let seen = seen(parse_with(&text, &[]));
    let hint = seen.split_once(" | ").map_or("", |(_, hint)| hint);
    assert!(seen.contains("unknown"), "{written}: {seen}");
    hint.to_owned()
}

/// Checks (what is written, its hint).
#[track_caller]
fn check_hints(cases: &[(&str, &str)]) {
    let mut wrong = String::new();
    for (written, expected) in cases {
        let found = hint(written);
        if found != *expected {
            wrong += &format!("{written}\n  expected {expected}\n  found    {found}\n");
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn mistypings() {
    check_hints(&[
        ("lora.rnk", "did you mean `rank`?"),
        ("lora.rnak", "did you mean `rank`?"),
        ("lora.ranks_pattern", "did you mean `rank_pattern`?"),
        ("lora.Rank", "did you mean `rank`?"),
        ("lora.alhpa", "did you mean `alpha`?"),
        ("lora.apha", "did you mean `alpha`?"),
        ("lora.droput", "did you mean `dropout`?"),
        ("lora.target_module", "did you mean `target_modules`?"),
        ("lora.target-modules", "did you mean `target_modules`?"),
        ("lora.use_rslroa", "did you mean `use_rslora`?"),
        ("lora.use_dorra", "did you mean `use_dora`?"),
        ("lora.expert", "did you mean `experts`?"),
        ("lora.layer_to_transform", "did you mean `layers_to_transform`?"),
        ("lora.module_to_save", "did you mean `modules_to_save`?"),
        ("lora.lora_alhpa", "did you mean `alpha`?"),
        ("model.pth", "did you mean `path`?"),
        ("model.dvice", "did you mean `device`?"),
        ("model.dtpye", "did you mean `dtype`?"),
        ("model.quantisation", "did you mean `quantization`?"),
        ("data.trian", "did you mean `train`?"),
        ("data.evl", "did you mean `eval`?"),
        ("data.fromat", "did you mean `format`?"),
        ("data.max_seq_length", "ours is `max_seq_len`"),
        ("data.max_sequence_len", "did you mean `max_seq_len`?"),
        ("data.overlng", "did you mean `overlong`?"),
        ("data.pakcing", "did you mean `packing`?"),
        ("data.trainon", "did you mean `train_on`?"),
        ("data.shufle", "did you mean `shuffle`?"),
        ("data.chat_templte", "did you mean `chat_template`?"),
        ("train.epoch", "ours is `epochs`"),
        ("train.epohcs", "did you mean `epochs`?"),
        ("train.maxsteps", "did you mean `max_steps`?"),
        ("train.global_batchsize", "did you mean `global_batch_size`?"),
        ("train.microbatch_size", "did you mean `micro_batch_size`?"),
        ("train.max_gard_norm", "did you mean `max_grad_norm`?"),
        ("train.gradient_checkpoiting", "did you mean `gradient_checkpointing`?"),
        ("optimizer.learnig_rate", "did you mean `learning_rate`?"),
        ("optimizer.learning-rate", "did you mean `learning_rate`?"),
        ("optimizer.beta", "did you mean `betas`?"),
        ("optimizer.wieght_decay", "did you mean `weight_decay`?"),
        ("schedule.warmup_step", "did you mean `warmup_steps`?"),
        ("schedule.warm_up_ratio", "did you mean `warmup_ratio`?"),
        ("schedule.min_lr_rtio", "did you mean `min_lr_ratio`?"),
        ("eval.evrey", "did you mean `every`?"),
        ("eval.early_stoping_patience", "did you mean `early_stopping_patience`?"),
        ("eval.max_new_token", "did you mean `max_new_tokens`?"),
        ("checkpoint.keep_lst", "did you mean `keep_last`?"),
        ("log.promethus", "did you mean `prometheus`?"),
        ("distributed.bakend", "did you mean `backend`?"),
        ("distributed.timout", "did you mean `timeout`?"),
        ("distributed.virtual_rank", "did you mean `virtual_ranks`?"),
        ("sede", "did you mean `seed`?"),
        ("ouput_dir", "did you mean `output_dir`?"),
    ]);
}

#[test]
fn keys_in_the_wrong_table() {
    check_hints(&[
        ("lora.seed", "`seed` belongs at the top, before the first [table]"),
        ("train.output_dir", "`output_dir` belongs at the top, before the first [table]"),
        ("rank", "`rank` belongs in [lora]"),
        ("learning_rate", "`learning_rate` belongs in [optimizer]"),
        ("train.learning_rate", "`learning_rate` belongs in [optimizer]"),
        ("train.weight_decay", "`weight_decay` belongs in [optimizer]"),
        ("train.max_seq_len", "`max_seq_len` belongs in [data]"),
        ("train.every", "`every` belongs in [eval], in [checkpoint] or in [log]"),
        ("train.lerning_rate", "did you mean `learning_rate` in [optimizer]?"),
        ("train.lora", "[lora] is a table of its own, not inside [train]"),
        // If no key is near, the hint lists the keys of the table.
        ("log.colour", "the keys in [log] are `every`, `prometheus`, `tensorboard`, `on_end`"),
    ]);
}

#[test]
fn other_tools_names() {
    check_hints(&[
        ("lora.r", "ours is `rank`"),
        ("lora_r", "ours is `rank` in [lora]"),
        ("lora.lora_rank", "ours is `rank`"),
        ("lora.lora_alpha", "ours is `alpha`"),
        ("lora.lora_dropout", "ours is `dropout`"),
        ("lora.scale", "ours is `alpha`; alpha = scale × rank"),
        ("lora.targets", "ours is `target_modules`"),
        ("lora.target", "ours is `target_modules`"),
        ("lora.keys", "ours is `target_modules`; module names as in the model's files, such as \"q_proj\""),
        ("lora_target_linear", "ours is `target_modules` in [lora]; write target_modules = \"all-linear\""),
        (
            "num_layers",
            "ours is `layers_to_transform` in [lora]; it counts the last layers; ours lists them, counted from 0",
        ),
        ("sequence_len", "ours is `max_seq_len` in [data]"),
        ("cutoff_len", "ours is `max_seq_len` in [data]"),
        ("data.max_length", "ours is `max_seq_len`"),
        (
            "iters",
            "ours is `max_steps` in [train]; mlx-lm counts micro-batches, ours are optimizer steps: divide by its grad_accumulation_steps",
        ),
        ("train.num_train_epochs", "ours is `epochs`"),
        ("train.lr", "ours is `learning_rate` in [optimizer]"),
        (
            "train.batch_size",
            "ours is `micro_batch_size`; rows per forward on one rank; rows per optimizer step over all ranks are \
             `global_batch_size`, which is what mlx-lm's batch_size counts without accumulation",
        ),
        (
            "train.gradient_accumulation_steps",
            "ours is `global_batch_size`; global_batch_size = micro_batch_size × accumulation × ranks",
        ),
        ("lr_scheduler_type", "ours is `name` in [schedule]"),
        ("train.logging_steps", "ours is `every` in [log]"),
        ("train.save_steps", "ours is `every` in [checkpoint]"),
        ("train.eval_steps", "ours is `every` in [eval]"),
        ("base_model", "ours is `path` in [model]"),
        ("model.name", "ours is `path`"),
        ("adapter_path", "ours is `output_dir`; the final adapter is its folder `adapter`"),
        ("resume_from_checkpoint", "resuming is no key: finetune run RECIPE.toml --resume [CHECKPOINT]"),
        ("sample_packing", "ours is `packing` in [data]"),
        ("mask_prompt", "ours is `train_on` in [data]; true is train_on = \"assistant\", false is \"all\""),
        ("bf16", "ours is `dtype` in [model]; write dtype = \"bf16\""),
        ("load_in_4bit", "ours is `quantization` in [model]; write quantization = \"nf4\""),
        ("model.q_bits", "ours is `quantization`; 4 is \"mlx4\", 8 is \"mlx8\""),
        ("model.quantization_config", "ours is `quantization`; a base that is packed already is read as it is"),
        ("grad_checkpoint", "ours is `gradient_checkpointing` in [train]"),
    ]);
}

/// What other tools have for models that one machine has no room for.
#[test]
fn other_tools_names_for_large_models() {
    let of = |name: &str| ELSEWHERE.iter().find(|(theirs, _)| *theirs == name).expect("a name of another tool").1;
    let (whole, slices, beside) = (of("fsdp"), of("tp"), of("dp"));
    assert!(whole.contains("`stages` in [parallel]") && !whole.contains("holds the whole model"), "{whole}");
    assert!(slices.contains("finetune launch -n N --parallel tensor -- serve"), "{slices}");
    assert!(beside.contains("finetune launch -n N -- RECIPE.toml"), "{beside}");
    check_hints(&[
        ("parallel.stage", "ours is `stages`: how many ranks hold the layers of one model together"),
        ("stage", "leave it out: finetune does supervised fine-tuning"),
        ("train.stage", "leave it out: finetune does supervised fine-tuning"),
        ("parallel.pp", "ours is `stages`"),
        ("pipeline_parallel_degree", "ours is `stages` in [parallel]"),
        ("parallel.replicas", beside),
        ("parallel.copies", beside),
        ("checkpoint.replicas", "ours is `copies`"),
        ("data_parallel_size", beside),
        ("parallel.tensor", slices),
        ("distributed.tensor_parallel_size", slices),
        (
            "parallel.experts",
            "leave it out: experts are spread over ranks with their layers, by `stages` in [parallel]",
        ),
        ("context_parallel_size", "leave it out: ranks share out rows and layers, and no row is cut"),
        ("deepspeed", whole),
        ("train.fsdp_config", whole),
        ("model.offload", "ours is `residency`; true is residency = \"disk\""),
        ("cpu_offload", "ours is `residency` in [model]; write residency = \"disk\""),
    ]);
}

/// The names that users of other tools write most often all lead to a key.
#[test]
fn every_known_rival_is_answered() {
    let names = "lora_r r lora_rank lora_alpha lora_dropout targets lora_target lora_target_modules lora_target_linear keys num_layers \
        sequence_len cutoff_len max_length max_seq_length iters num_epochs num_train_epochs scale lr batch_size \
        per_device_train_batch_size gradient_accumulation_steps grad_accumulation_steps lr_scheduler lr_scheduler_type logging_steps \
        log_every_n_steps save_steps save_every eval_steps steps_per_eval steps_per_report base_model model_name_or_path adapter_path \
        resume_from_checkpoint resume_adapter_file clip_grad_norm sample_packing neat_packing train_on_inputs mask_prompt bf16 fp16 \
        load_in_4bit grad_checkpoint grad_checkpointing enable_activation_checkpointing lora_attn_modules apply_lora_to_mlp \
        peft_use_rslora peft_use_dora fine_tune_type roles_to_train train_on_prompt completion_only_loss assistant_only_loss \
        max_steps_per_epoch lr_schedule evals_per_epoch checkpoint_dir";
    for name in names.split_whitespace() {
        let hint = hint(name);
        assert!(hint.starts_with("ours is `") || hint.starts_with("resuming is no key"), "{name}: {hint}");
    }
}

/// A rival that is also our own key could never be suggested. One that is listed twice would be
/// answered by chance.
#[test]
fn rivals_are_told_apart() {
    let mut names: Vec<&str> = KEYS.iter().flat_map(|key| key.rivals.iter().map(|(theirs, _)| *theirs)).collect();
    names.extend(ELSEWHERE.iter().map(|(theirs, _)| *theirs));
    for name in &names {
        assert!(KEYS.iter().all(|key| key.path != *name && key.name() != *name), "{name} is ours");
        assert!(!TABLES.contains(name), "{name} is a table of ours");
        assert_eq!(names.iter().filter(|other| other == &name).count(), 1, "{name} is listed twice");
    }
}

#[test]
fn tables() {
    let cases = [
        ("[loar]", "did you mean [lora]?"),
        ("[training]", "ours is [train]"),
        ("[dataset]", "ours is [data]"),
        ("[lora_parameters]", "ours is [lora]"),
        ("[optimiser]", "did you mean [optimizer]?"),
        ("[pipeline]", "ours is [parallel]"),
        ("[parallelism]", "ours is [parallel]"),
        ("[fsdp]", ELSEWHERE.iter().find(|(theirs, _)| *theirs == "fsdp").expect("another tool's").1),
        ("[rank]", "`rank` is a key in [lora]"),
        (
            "[zebra]",
            "the tables are [model], [lora], [data], [train], [optimizer], [schedule], [eval], [checkpoint], [log], [distributed], [parallel]",
        ),
    ];
    for (header, expected) in cases {
        let found = seen(parse_with(&format!("{MINIMAL}{header}\nx = 1"), &[]));
        assert_eq!(found, format!("5:2 unknown table {header} | {expected}"));
    }
}
