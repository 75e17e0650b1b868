//! Why a key that no mapper took over has no counterpart, or is not needed.

use finetune_recipe::keys::ELSEWHERE;

use crate::Tool;
use crate::draft::Draft;
use crate::source::{Given, Source};
use crate::yaml::{Node, Value};

/// Beginnings of keys that change nothing here: the reason.
#[rustfmt::skip]
const IDLE: &[(&str, &str)] = &[
    ("wandb_", "metrics.jsonl and report.html are always written"),
    ("mlflow_", "metrics.jsonl and report.html are always written"),
    ("comet_", "metrics.jsonl and report.html are always written"),
    ("swanlab_", "metrics.jsonl and report.html are always written"),
    ("use_swanlab", "metrics.jsonl and report.html are always written"),
    ("use_wandb", "metrics.jsonl and report.html are always written"),
    ("use_tensorboard", "metrics.jsonl and report.html are always written"),
    ("use_otel_metrics", "`prometheus` in [log] serves metrics"),
    ("otel_", "`prometheus` in [log] serves metrics"),
    ("trackio_", "metrics.jsonl and report.html are always written"),
    ("gradio_", "there is no such page"),
    ("metric_logger", "metrics.jsonl and report.html are always written"),
    ("project_name", "metrics.jsonl and report.html are always written"),
    ("run_name", "a run is called as its directory"),
    ("plot_loss", "report.html has the curves"),
    ("log_", "metrics.jsonl and report.html are always written"),
    ("logging_", "metrics.jsonl and report.html are always written"),
    ("profiler", "there is none"),
    ("profiler_", "there is none"),
    ("flash_attn", "there is nothing to choose"),
    ("flash_attn_", "there is nothing to choose"),
    ("flash_optimum", "there is nothing to choose"),
    ("flex_attn", "there is nothing to choose"),
    ("flex_attn_", "there is nothing to choose"),
    ("sdp_attention", "there is nothing to choose"),
    ("xformers", "there is nothing to choose"),
    ("eager_attention", "there is nothing to choose"),
    ("use_cache", "there is nothing to choose"),
    ("liger_", "kernels are chosen by the program"),
    ("enable_liger_kernel", "kernels are chosen by the program"),
    ("use_kernels", "kernels are chosen by the program"),
    ("use_unsloth", "kernels are chosen by the program"),
    ("use_unsloth_", "kernels are chosen by the program"),
    ("gptq_", "a base in GPTQ's form is read as its files say"),
    ("cut_cross_entropy", "the loss never forms all logits"),
    ("chunked_cross_entropy", "the loss never forms all logits"),
    ("chunked_cross_entropy_", "the loss never forms all logits"),
    ("lora_mlp_kernel", "kernels are chosen by the program"),
    ("lora_qkv_kernel", "kernels are chosen by the program"),
    ("lora_o_kernel", "kernels are chosen by the program"),
    ("fused_attn_kernel", "kernels are chosen by the program"),
    ("torch_compile", "nothing is compiled ahead"),
    ("torch_compile_", "nothing is compiled ahead"),
    ("compile", "nothing is compiled ahead"),
    ("tf32", "products are f32, or the model's number type on a GPU"),
    ("deepspeed", "ranks share out rows and add up gradients; a model without room on one: `stages` in [parallel]"),
    ("fsdp", "ranks share out rows and add up gradients; a model without room on one: `stages` in [parallel]"),
    ("fsdp_", "ranks share out rows and add up gradients; a model without room on one: `stages` in [parallel]"),
    ("ddp_find_unused_parameters", "ranks add up the gradients of all that is trained"),
    ("ddp_timeout", "`timeout` in [distributed] is for one silence; its default is seconds"),
    ("dp_shard_", "ranks share out rows and add up gradients; a model without room on one: `stages` in [parallel]"),
    ("dp_replicate_", "the number of ranks is for `finetune launch -n`"),
    ("data_parallel_", "the number of ranks is for `finetune launch -n`"),
    ("world_size", "the number of ranks is for `finetune launch -n`"),
    ("local_rank", "the number of ranks is for `finetune launch -n`"),
    ("ray_", "see recipes/engines for Ray"),
    ("use_ray", "see recipes/engines for Ray"),
    ("dataset_prepared_path", "tokens of rows are cached by themselves"),
    ("dataset_processes", "rows are read on all cores"),
    ("dataset_num_proc", "rows are read on all cores"),
    ("dataset_keep_in_memory", "rows are read as they are"),
    ("preprocessing_num_workers", "rows are read on all cores"),
    ("dataloader_", "rows are read on all cores"),
    ("overwrite_cache", "tokens of rows are cached by themselves"),
    ("overwrite_output_dir", "a run directory is never written over; --resume goes on"),
    ("data_shared_file_system", "each rank reads the rows"),
    ("tokenized_path", "tokens of rows are cached by themselves"),
    ("pad_to_sequence_len", "rows are never padded"),
    ("sample_packing_", "rows are never padded"),
    ("eval_sample_packing", "rows are never padded"),
    ("sample_packing_eff_est", "rows are never padded"),
    ("total_num_tokens", "tokens are counted"),
    ("group_by_length", "rows are never padded, so length does not matter"),
    ("train_on_eos", "the end of each trained turn is trained on"),
    ("gradient_checkpointing_kwargs", "there is one way to recompute activations"),
    ("eval_batch_size", "evaluation uses micro_batch_size"),
    ("per_device_eval_batch_size", "evaluation uses micro_batch_size"),
    ("batch_size_val", "evaluation uses micro_batch_size"),
    ("save_only_model", "checkpoints hold all that a resume needs"),
    ("save_safetensors", "safetensors is what is written"),
    ("save_adapter_weights_only", "the adapter is written in PEFT's form"),
    ("trust_remote_code", "no code of a model is run"),
    ("remove_unused_columns", "other keys of a row are passed over"),
    ("skip_prepare_dataset", "rows are read as they are"),
    ("ignore_pad_token_for_loss", "rows are never padded"),
    ("tokenizer_use_fast", "there is one tokenizer"),
    ("tokenizer_legacy", "the tokenizer of the model is used as it is"),
    ("use_fast_tokenizer", "there is one tokenizer"),
    ("low_cpu_mem_usage", "weights are read as they are needed"),
    ("low_cpu_ram", "weights are read as they are needed"),
    ("device_map", "the program places layers"),
    ("custom_sharded_layers", "each rank holds the whole model"),
    ("memory_efficient_fsdp_wrap", "each rank holds the whole model"),
    ("use_reentrant_gc", "there is one way to recompute activations"),
    ("debug", "ours is --verbose"),
    ("test", "`finetune eval RUN --data FILE` measures after training"),
    ("test_batches", "`finetune eval RUN --data FILE` measures after training"),
    ("val_batches", "evaluation reads every held-back row"),
    ("clear_cache_threshold", "memory is kept by the program"),
    ("collate_fn", "rows are never padded"),
    ("push_dataset_to_hub", "nothing is uploaded"),
    ("secrets", "it is for the cloud that axolotl starts"),
    ("experimental_skip_move_to_device", "the program places layers"),
    ("torchdistx_path", "it is no longer read there"),
    ("gptq_groupsize", "it is no longer read there"),
    ("gptq_model_v1", "it is no longer read there"),
    ("special_tokens", "empty"),
];

/// Beginnings of keys that cannot be carried over: the reason.
#[rustfmt::skip]
const LEFT: &[(&str, &str)] = &[
    ("rl", "another objective: finetune does supervised fine-tuning, so this is another job"),
    ("trl", "it belongs to another objective"),
    ("ebft", "it belongs to another objective"),
    ("vllm", "it belongs to another objective"),
    ("dpo_", "it belongs to another objective"),
    ("kto_", "it belongs to another objective"),
    ("orpo_", "it belongs to another objective"),
    ("simpo_", "it belongs to another objective"),
    ("pref_", "it belongs to another objective"),
    ("ppo_", "it belongs to another objective"),
    ("kd_", "it belongs to another objective"),
    ("teacher_", "it belongs to another objective"),
    ("reward_model", "another objective: finetune does supervised fine-tuning, so this is another job"),
    ("process_reward_model", "another objective: finetune does supervised fine-tuning, so this is another job"),
    ("neftune_noise_alpha", "no noise is added to embeddings"),
    ("loraplus_", "both matrices of the adapter learn at one rate"),
    ("peft_init_lora_weights", "a fresh adapter begins as PEFT's default does"),
    ("peft", "a fresh adapter begins as PEFT's default does"),
    ("pissa_", "a fresh adapter begins as PEFT's default does"),
    ("relora", "the adapter is not merged during training"),
    ("relora_", "the adapter is not merged during training"),
    ("jagged_restart_", "the learning rate does not start again"),
    ("lisa_", "layers are not chosen at random"),
    ("unfrozen_parameters", "the base stays as it is, or all weights are trained"),
    ("freeze_", "the base stays as it is, or all weights are trained"),
    ("lora_target_parameters", "lora.experts = true trains experts"),
    ("lora_fan_in_fan_out", "layers are linear, as in the model's files"),
    ("qat", "nothing is quantized while it trains"),
    ("qat_", "nothing is quantized while it trains"),
    ("quantizer", "nothing is quantized while it trains"),
    ("fp8", "products are not in 8 bits"),
    ("fp8_", "products are not in 8 bits"),
    ("gptq", "a packed base takes an adapter: its own weights are not trained"),
    ("bnb_config_kwargs", "the packed forms are fixed"),
    ("double_quantization", "the packed forms are fixed"),
    ("rope_scaling", "it is the model's config.json that says so"),
    ("model_config", "it is the model's config.json that says so"),
    ("overrides_of_model_config", "it is the model's config.json that says so"),
    ("tokens", "the tokenizer of the model is used as it is"),
    ("added_tokens_overrides", "the tokenizer of the model is used as it is"),
    ("special_tokens", "the tokenizer of the model is used as it is"),
    ("resize_", "the tokenizer of the model is used as it is"),
    ("new_special_tokens", "the tokenizer of the model is used as it is"),
    ("tokenizer_config", "the tokenizer lies beside the model"),
    ("tokenizer.", "the tokenizer lies beside the model"),
    ("checkpointer.", "config.json, tokenizer and weights are found in the model's directory"),
    ("optim_args", "it belongs to another optimizer, or has a key of its own in [optimizer]"),
    ("optim_target_modules", "it belongs to another optimizer"),
    ("lr_quadratic_warmup", "the learning rate climbs in a line"),
    ("cosine_constant_lr_ratio", "the cosine falls until the last step"),
    ("lr_groups", "one learning rate for all"),
    ("embedding_lr", "one learning rate for all"),
    ("loss_watchdog_", "a loss that is not finite ends the run, a high one does not"),
    ("context_parallel_", "a row is not split among ranks"),
    ("sequence_parallel_", "a row is not split among ranks"),
    ("tensor_parallel_", "a layer is not split among ranks"),
    ("expert_parallel_", "a layer is not split among ranks"),
    ("optimizer_in_bwd", "the optimizer works after the backward pass"),
    ("mix_strategy", "`data.weights` says how often the rows of each file come"),
    ("interleave_probs", "`data.weights` says how often the rows of each file come"),
    ("streaming", "rows are read whole before training"),
    ("resume_adapter_file", "`init_from` in [lora] names a directory in PEFT's form"),
    ("base_model_config", "config.json lies beside the model"),
    ("plugins", "there are no plug-ins"),
];

/// Keys that say what the file is or which class reads it, and nothing about the training.
const NAMES: [(&str, &str); 12] = [
    ("model_type", "the model's config.json says it"),
    ("tokenizer_type", "the tokenizer lies beside the model"),
    ("processor_type", "only the text part of a model is trained"),
    ("is_llama_derived_model", "the model's config.json says it"),
    ("is_mistral_derived_model", "the model's config.json says it"),
    ("is_falcon_derived_model", "the model's config.json says it"),
    ("strict", "an unknown key is always an error"),
    ("train", "`finetune run` trains"),
    ("tokenizer._component_", "the tokenizer lies beside the model"),
    ("tokenizer.path", "the tokenizer lies beside the model"),
    ("tokenizer.merges_file", "the tokenizer lies beside the model"),
    ("optimizer.fused", "kernels are chosen by the program"),
];

/// Names every key that is left, with the reason.
pub(crate) fn leftovers(tool: Tool, source: &Source<'_>, draft: &mut Draft) {
    for given in source.doubles() {
        draft.left(&given, "the key stands again further down, and the last one counts");
    }
    for given in source.rest() {
        if given.node.is_null() || is_off(given.node) {
            draft.unset(&given);
        } else if let Some(why) = not_needed(tool, &given) {
            draft.idle(&given, &why);
        } else {
            draft.left(&given, &why(&given));
        }
    }
}

/// `false`, or a map of nothing but nulls.
fn is_off(node: &Node) -> bool {
    match &node.value {
        Value::Scalar { .. } => node.bool() == Some(false) || node.text() == Some("none"),
        Value::Map(entries) => entries.iter().all(|entry| entry.node.is_null()),
        Value::List(_) => false,
    }
}

/// Whether a key is `name` or below it. A name that ends with `_` or `.` is the beginning of many.
fn begins(path: &str, name: &str) -> bool {
    let open = name.ends_with(['_', '.']);
    path.strip_prefix(name).is_some_and(|rest| open || rest.is_empty() || rest.starts_with('.'))
}

fn not_needed(tool: Tool, given: &Given<'_>) -> Option<String> {
    let path = given.path.as_str();
    if let Some((_, why)) = NAMES.iter().find(|(name, _)| *name == path) {
        return Some((*why).to_owned());
    }
    if path == "plugins"
        && given
            .node
            .shown()
            .split(',')
            .all(|plugin| ["CutCrossEntropy", "Liger"].iter().any(|known| plugin.contains(known)))
    {
        return Some("kernels are chosen by the program".to_owned());
    }
    if tool == Tool::Torchtune
        && ["checkpointer.", "enable_activation_offloading"].iter().any(|name| path.starts_with(name))
    {
        let own = ["output_dir", "checkpoint_files", "model_type", "recipe_checkpoint", "safe_serialization"];
        if own.iter().any(|name| path.ends_with(name)) {
            return Some("the model's directory says it, and a run has its own".to_owned());
        }
        if path.starts_with("enable") {
            return Some("activations stay in memory, or are recomputed".to_owned());
        }
    }
    // Longer names first: `test_datasets` is no `test`.
    let known = LEFT.iter().filter(|(name, _)| begins(path, name)).map(|(name, _)| name.len()).max().unwrap_or(0);
    let found = IDLE.iter().filter(|(name, _)| begins(path, name)).max_by_key(|(name, _)| name.len());
    match found {
        Some((name, why)) if name.len() >= known => Some((*why).to_owned()),
        _ if known > 0 => None,
        _ => ELSEWHERE
            .iter()
            .find(|(theirs, _)| *theirs == path)
            .map(|(_, instead)| instead.trim_start_matches("leave it out: ").to_owned())
            .filter(|instead| instead != "leave it out"),
    }
}

fn why(given: &Given<'_>) -> String {
    let path = given.path.as_str();
    let found = LEFT.iter().filter(|(name, _)| begins(path, name)).max_by_key(|(name, _)| name.len());
    found.map_or("no counterpart is known".to_owned(), |(_, why)| (*why).to_owned())
}
