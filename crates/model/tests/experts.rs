//! Experts that a file holds in stacks: they are read as single ones.

mod checkpoint;
mod made;

use std::collections::BTreeMap;
use std::path::Path;

use finetune_advice::Advice as _;
use finetune_model::adapter::{Adapter, BaseName};
use finetune_model::merge::{MergedForm, write_merged};
use finetune_model::{Adaptation, Model, ModelConfig, Placement};
use finetune_store::{Dtype, RealDisk, Staging};
use serde_json::{Value, json};

use crate::made::{Tensor, f32s, floats, golden, model, read_tensors};

const FAMILY: &str = "qwen3_moe";

fn logits(directory: &Path) -> Vec<u32> {
    let model = Model::load(directory, &Placement::cpu(None)).expect("the model loads");
    let logits = model.logits(&[5, 17, 42, 9, 33, 8, 61]).expect("tokens of the vocabulary");
    logits.into_iter().map(f32::to_bits).collect()
}

/// (layer, expert, part) of a tensor such as `model.layers.0.mlp.experts.3.up_proj.weight`.
fn place(name: &str) -> Option<(String, usize, String)> {
    let (layer, expert) = name.split_once(".experts.")?;
    let (number, part) = expert.split_once('.')?;
    Some((layer.to_owned(), number.parse().ok()?, part.strip_suffix(".weight")?.to_owned()))
}

/// Takes the tensors of single experts out: by layer and part, those of each expert in order.
fn take(tensors: &mut Vec<Tensor>) -> BTreeMap<(String, String), Vec<Tensor>> {
    let mut found: BTreeMap<(String, String), BTreeMap<usize, Tensor>> = BTreeMap::new();
    tensors.retain(|tensor| match place(&tensor.0) {
        None => true,
        Some((layer, expert, part)) => {
            found.entry((layer, part)).or_default().insert(expert, tensor.clone());
            false
        }
    });
    found.into_iter().map(|(place, experts)| (place, experts.into_values().collect())).collect()
}

fn bytes(tensors: &[Tensor]) -> Vec<u8> {
    tensors.iter().flat_map(|tensor| tensor.3.to_vec()).collect()
}

/// transformers 5: gate and up together.
fn as_transformers(tensors: &mut Vec<Tensor>) {
    let parts = take(tensors);
    for ((layer, part), experts) in &parts {
        let [rows, columns] = [experts[0].2[0], experts[0].2[1]];
        let name = |stack: &str| format!("{layer}.experts.{stack}");
        match part.as_str() {
            "down_proj" => {
                let shape = vec![experts.len(), rows, columns];
                tensors.push((name("down_proj"), Dtype::F32, shape, bytes(experts).into()));
            }
            "gate_proj" => {
                let ups = &parts[&(layer.clone(), "up_proj".to_owned())];
                let both = experts.iter().zip(ups).flat_map(|(gate, up)| [gate.3.to_vec(), up.3.to_vec()].concat());
                let shape = vec![experts.len(), 2 * rows, columns];
                tensors.push((name("gate_up_proj"), Dtype::F32, shape, both.collect::<Vec<u8>>().into()));
            }
            _ => {}
        }
    }
}

/// mlx-lm: a stack for each part.
fn as_mlx(tensors: &mut Vec<Tensor>) {
    for ((layer, part), experts) in take(tensors) {
        let shape = [&[experts.len()], experts[0].2.as_slice()].concat();
        tensors.push((format!("{layer}.switch_mlp.{part}.weight"), Dtype::F32, shape, bytes(&experts).into()));
    }
}

#[test]
fn stacks_are_read_as_single_experts() {
    let want = logits(&golden(FAMILY));
    for (name, stack) in [("transformers", as_transformers as fn(&mut Vec<Tensor>)), ("mlx-lm", as_mlx)] {
        let made = model(FAMILY, |_, tensors| stack(tensors));
        assert!(logits(made.path()) == want, "{name}");
    }
}

/// What mlx-lm's sanitizers make of files of the hub: other names of gate, up and down, a convolution that is
/// turned, and Gemma 4's stacks with gate and up apart.
fn as_mlx_of_family(tensors: &mut Vec<Tensor>) {
    for ((layer, part), experts) in take(tensors) {
        let part = match part.as_str() {
            "w1" => "gate_proj",
            "w2" => "down_proj",
            "w3" => "up_proj",
            part => part,
        };
        let shape = [&[experts.len()], experts[0].2.as_slice()].concat();
        tensors.push((format!("{layer}.switch_mlp.{part}.weight"), Dtype::F32, shape, bytes(&experts).into()));
    }
    for (name, _, shape, _) in tensors.iter_mut() {
        for (old, new) in
            [("w1.weight", "gate_proj.weight"), ("w2.weight", "down_proj.weight"), ("w3.weight", "up_proj.weight")]
        {
            *name = name.replace(old, new);
        }
        if let [_, before, behind] = shape.as_mut_slice()
            && name.ends_with(".conv.conv.weight")
        {
            std::mem::swap(before, behind);
        }
    }
    let stacks: Vec<Tensor> = tensors.iter().filter(|tensor| tensor.0.contains(".experts.")).cloned().collect();
    tensors.retain(|tensor| !tensor.0.contains(".experts."));
    for (name, dtype, shape, values) in stacks {
        let (layer, part) = name.split_once(".experts.").expect("a stack");
        let mut push = |part: &str, shape: Vec<usize>, values: Vec<u8>| {
            tensors.push((format!("{layer}.experts.switch_glu.{part}.weight"), dtype, shape, values.into()));
        };
        if part == "down_proj" {
            push(part, shape, values.to_vec());
            continue;
        }
        let [experts, rows, columns] = [shape[0], shape[1], shape[2]];
        let half = rows / 2 * columns * 4;
        for (part, which) in [("gate_proj", 0), ("up_proj", 1)] {
            let of_experts: Vec<u8> = values.chunks(half).skip(which).step_by(2).flatten().copied().collect();
            push(part, vec![experts, rows / 2, columns], of_experts);
        }
    }
}

/// The files of mlx-lm are the same models, and a merged one is in transformers' names and shapes where mlx-lm
/// reads those too.
#[test]
fn files_of_mlx_lm_are_read() {
    for family in ["lfm2_moe", "gemma4_moe"] {
        let made = model(family, |_, tensors| as_mlx_of_family(tensors));
        let names: Vec<String> =
            read_tensors(&made.path().join("model.safetensors")).into_iter().map(|t| t.0).collect();
        let stack =
            if family == "lfm2_moe" { "feed_forward.switch_mlp.gate_proj" } else { "experts.switch_glu.up_proj" };
        assert!(names.iter().any(|name| name.contains(stack)), "{names:?}");
        assert!(!names.iter().any(|name| name.ends_with(".w1.weight") || name.ends_with(".gate_up_proj")), "{names:?}");
        assert!(logits(made.path()) == logits(&golden(family)), "{family}");
    }
    let merged = |base: &Path, adapter: &Adapter| -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
        let parent = tempfile::tempdir().expect("a directory");
        let mut staging = Staging::begin(&RealDisk, parent.path(), "merged").expect("a new directory");
        let form = MergedForm::of_shards(u64::MAX);
        write_merged(&RealDisk, base, adapter, &mut staging, form, &[], &|_, _| {}).expect("a merge");
        let merged = staging.publish(&json!({"kind": "merged"})).expect("published");
        let tensors = read_tensors(&merged.join("model.safetensors"));
        tensors.into_iter().map(|(name, _, shape, bytes)| (name, (shape, bytes.to_vec()))).collect()
    };
    for family in ["lfm2_moe", "gemma4_moe"] {
        let made = model(family, |_, tensors| as_mlx_of_family(tensors));
        let config = ModelConfig::load(made.path()).expect("a config");
        let adapter = Adapter::read(&golden(family).join("adapter"), &config).expect("an adapter");
        assert!(merged(made.path(), &adapter) == merged(&golden(family), &adapter), "{family}");
    }
}

/// A delta net's convolution in mlx-lm's shape comes with norms to which 1 was added: the same model, but for rounding.
#[test]
fn norms_of_mlx_lm_beside_turned_convolutions_have_one_more() {
    const NORMS: [&str; 5] = ["input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "model.norm"];
    let has_one = |name: &str| NORMS.iter().any(|norm| name.ends_with(&format!("{norm}.weight")));
    let logits = |directory: &Path| logits(directory).into_iter().map(f32::from_bits).collect::<Vec<f32>>();
    let largest = |values: &[f32]| values.iter().fold(0.0, |max, value| value.abs().max(max));
    for family in ["qwen3_next", "qwen3_5"] {
        let wanted = logits(&golden(family));
        for (one, is_same) in [(1.0, true), (0.0, false)] {
            let made = model(family, |_, tensors| {
                for (name, _, shape, bytes) in tensors {
                    if name.ends_with(".conv1d.weight") {
                        shape.swap(1, 2);
                    } else if has_one(name) {
                        *bytes = f32s(&floats(bytes).into_iter().map(|value| value + one).collect::<Vec<f32>>());
                    }
                }
            });
            let found = logits(made.path());
            let apart: Vec<f32> = found.iter().zip(&wanted).map(|(a, b)| a - b).collect();
            let far = largest(&apart) / largest(&wanted);
            assert!(if is_same { far < 1e-4 } else { far > 1e-2 }, "{family}, with {one} more: {far}");
        }
    }
}

/// mlx-lm's stacks of two matrices for each head, in the place of `kv_b_proj` [h (p + y), r].
fn in_heads(config: &Value, tensors: &mut Vec<Tensor>) {
    let size = |key: &str| config[key].as_u64().expect("a size") as usize;
    let (heads, rank) = (size("num_attention_heads"), size("kv_lora_rank"));
    let (keys, values) = (size("qk_nope_head_dim"), size("v_head_dim"));
    let (of_layers, others): (Vec<Tensor>, _) =
        std::mem::take(tensors).into_iter().partition(|tensor| tensor.0.ends_with(".kv_b_proj.weight"));
    *tensors = others;
    for (name, dtype, _, bytes) in of_layers {
        let rows: Vec<Vec<f32>> = floats(&bytes).chunks(rank).map(<[f32]>::to_vec).collect();
        let (mut embed, mut unembed) = (Vec::new(), Vec::new());
        for head in rows.chunks(keys + values) {
            embed.extend((0..rank).flat_map(|column| head[..keys].iter().map(move |row| row[column])));
            unembed.extend(head[keys..].iter().flatten());
        }
        for (stack, shape, values) in
            [("embed_q", vec![heads, rank, keys], embed), ("unembed_out", vec![heads, values, rank], unembed)]
        {
            tensors.push((name.replace("kv_b_proj", stack), dtype, shape, f32s(&values)));
        }
    }
}

/// They are read as one, and merged as the hub has it.
#[test]
fn matrices_of_heads_are_one() {
    for family in ["deepseek_v3", "glm4_moe_lite"] {
        let made = model(family, |config, tensors| in_heads(config, tensors));
        assert!(logits(made.path()) == logits(&golden(family)), "{family}");
        let config = Model::check(made.path()).expect("a model");
        assert!(!config.notices.iter().any(|notice| notice.contains("passed over")), "{:?}", config.notices);
        let parent = tempfile::tempdir().expect("a directory");
        let mut staging = Staging::begin(&RealDisk, parent.path(), "merged").expect("a new directory");
        let form = MergedForm::of_shards(u64::MAX);
        write_merged(&RealDisk, made.path(), &Adapter::none(&config), &mut staging, form, &[], &|_, _| {})
            .expect("a merge");
        let merged = staging.publish(&json!({"kind": "merged"})).expect("published");
        let tensors = |directory: &Path| -> BTreeMap<String, Vec<u8>> {
            let tensors = read_tensors(&directory.join("model.safetensors"));
            tensors.into_iter().map(|(name, _, _, bytes)| (name, bytes.to_vec())).collect()
        };
        assert!(tensors(&merged) == tensors(&golden(family)), "{family}");
    }
}

/// Heads that make another matrix, and one that lacks a half.
#[test]
fn matrices_of_heads_that_do_not_fit_are_refused() {
    type Change = fn(&mut Tensor);
    let cases: [(&str, Change, &str); 3] = [
        ("unembed_out", |tensor| tensor.2 = vec![tensor.2[0], tensor.2[1] * tensor.2[2], 1], "kv_b_proj"),
        ("embed_q", |tensor| tensor.2.swap(1, 2), "embed_q.0"),
        ("embed_q", |tensor| tensor.0 = tensor.0.replace("embed_q", "embed_k"), "kv_b_proj"),
    ];
    for (stack, change, says) in cases {
        let made = model("deepseek_v3", |config, tensors| {
            in_heads(config, tensors);
            tensors.iter_mut().filter(|tensor| tensor.0.contains(stack)).for_each(change);
        });
        let error = Model::check(made.path()).expect_err(stack).to_string();
        assert!(error.contains(says), "{stack}: {error}");
    }
}

/// (a change of a stack, a part of the message)
#[test]
fn stacks_that_do_not_fit_are_refused() {
    type Change = fn(&mut Tensor);
    let cases: [(&str, Change, &str); 3] = [
        ("down_proj", |stack| stack.2 = vec![5, 32, 24], "model.layers.0.mlp.experts.5.down_proj.weight"),
        ("gate_up_proj", |stack| stack.2 = vec![6, 24, 64], "model.layers.0.mlp.experts.0.gate_proj.weight"),
        ("gate_up_proj", |stack| stack.2 = vec![6, 48 * 32], "model.layers.0.mlp.experts.0.gate_proj.weight"),
    ];
    for (name, change, part) in cases {
        let made = model(FAMILY, |_, tensors| {
            as_transformers(tensors);
            let stack = tensors.iter_mut().find(|tensor| tensor.0.ends_with(name)).expect("a stack");
            change(stack);
            let length = 4 * stack.2.iter().product::<usize>();
            stack.3 = stack.3[..length].to_vec().into();
        });
        let error = Model::check(made.path()).expect_err(name).to_string();
        assert!(error.contains(part), "{name}: {error}");
    }
}

/// Settings of experts that no layer can have.
#[test]
fn settings_that_do_not_fit_are_refused() {
    for (key, value, part) in [
        ("num_experts_per_tok", json!(7), "7 of 6 experts for each token"),
        ("num_local_experts", json!(100_000), "2 of 100000 experts"),
        ("mlp_only_layers", json!("1"), "`mlp_only_layers` should be a list of layer numbers"),
        ("moe_intermediate_size", json!(0), "moe_intermediate_size"),
    ] {
        let made = model(FAMILY, |config, _| config[key] = value);
        let error = Model::check(made.path()).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
}

/// Branches of single experts are put together as PEFT has them: in its own file, bit by bit.
#[test]
fn branches_are_put_together_as_peft_has_them() {
    let directory = golden("qwen3_moe_experts");
    let config = ModelConfig::load(&directory).expect("a config");
    let adapter = Adapter::read(&directory.join("adapter"), &config).expect("an adapter");
    let written = tempfile::tempdir().expect("a directory");
    for (name, bytes) in adapter.peft_files(0.0, &config).expect("files") {
        made::write(&written.path().join(name), bytes);
    }
    let read = |directory: &Path| -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
        let tensors = read_tensors(&directory.join("adapter_model.safetensors"));
        tensors.into_iter().map(|(name, _, shape, bytes)| (name, (shape, bytes.to_vec()))).collect()
    };
    assert!(read(written.path()) == read(&directory.join("adapter_stacked")));
    let again = Adapter::read(written.path(), &config).expect("an adapter");
    assert_eq!(again.targets, adapter.targets);
}

/// The adapter in mlx-lm's files, in a directory.
fn written_for_mlx(adapter: &Adapter, config: &ModelConfig) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    let (files, notices) = adapter.mlx_files(0.0, config).expect("files");
    assert!(notices.is_empty(), "{notices:?}");
    for (name, bytes) in files {
        made::write(&directory.path().join(name), bytes);
    }
    directory
}

/// mlx-lm has A [e, r, i] and B [e, o, r] of a stack (`LoRASwitchLinear`). Read back, it is the same
/// adapter.
#[test]
fn branches_are_stacked_as_mlx_lm_has_them() {
    let directory = golden("qwen3_moe_experts");
    let config = ModelConfig::load(&directory).expect("a config");
    let adapter = Adapter::read(&directory.join("adapter"), &config).expect("an adapter");
    let written = written_for_mlx(&adapter, &config);

    let settings = made::read_json(&written.path().join("adapter_config.json"));
    let keys = ["mlp.switch_mlp.down_proj", "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj", "self_attn.q_proj"];
    assert_eq!(settings["lora_parameters"]["keys"], json!(keys));
    assert_eq!(settings["num_layers"], json!(2));
    let of_single = read_tensors(&directory.join("adapter/adapter_model.safetensors"));
    let tensors = read_tensors(&written.path().join("adapters.safetensors"));
    for (part, half, stacked) in [
        ("gate_proj", "A", vec![5, 4, 32]),
        ("gate_proj", "B", vec![5, 24, 4]),
        ("down_proj", "A", vec![5, 4, 24]),
        ("down_proj", "B", vec![5, 32, 4]),
    ] {
        let name = format!("model.layers.1.mlp.switch_mlp.{part}.lora_{}", half.to_lowercase());
        let tensor = tensors.iter().find(|tensor| tensor.0 == name).expect("a stack");
        assert_eq!(tensor.2, stacked, "{name}");
        let of_expert = |expert: usize| {
            let name = format!("base_model.model.model.layers.1.mlp.experts.{expert}.{part}.lora_{half}.weight");
            of_single.iter().find(|tensor| tensor.0 == name).expect("an expert's").3.to_vec()
        };
        assert!(tensor.3.to_vec() == (0..5).flat_map(of_expert).collect::<Vec<u8>>(), "{name}");
    }
    let again = Adapter::read(written.path(), &config).expect("an adapter");
    assert_eq!(again.targets, adapter.targets);
    assert!(again.values == adapter.values);
    assert!(again.notices.is_empty(), "{:?}", again.notices);
}

/// Experts without a branch have zeros in a stack, which change nothing.
#[test]
fn a_stack_of_some_experts_has_zeros_for_the_others() {
    let config = ModelConfig::load(&golden("qwen3_moe_experts")).expect("a config");
    let is_left = |name: &str| !name.contains(".experts.") || name.contains(".experts.3.");
    let some = made::adapter("qwen3_moe_experts", |_, tensors| tensors.retain(|tensor| is_left(&tensor.0)));
    let adapter = Adapter::read(some.path(), &config).expect("an adapter");
    let again = Adapter::read(written_for_mlx(&adapter, &config).path(), &config).expect("an adapter");
    let values = |adapter: &Adapter, module: &str| -> Option<Vec<f32>> {
        let mut first = 0;
        for (target, (outputs, inputs)) in adapter.targets.iter().zip(&adapter.shapes) {
            let count = target.rank * (outputs + inputs);
            if target.module == module {
                return Some(adapter.values[first..first + count].to_vec());
            }
            first += count;
        }
        None
    };
    let module = |expert: usize| format!("model.layers.0.mlp.experts.{expert}.up_proj");
    assert_eq!(values(&adapter, &module(2)), None);
    assert!(values(&again, &module(2)).expect("a branch").iter().all(|value| *value == 0.0));
    assert_eq!(values(&again, &module(3)), values(&adapter, &module(3)));
}

/// By name, the shape and the bytes of each tensor of an adapter's file.
fn tensors_of(file: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    read_tensors(file).into_iter().map(|(name, _, shape, bytes)| (name, (shape, bytes.to_vec()))).collect()
}

/// PEFT has one branch for all experts of a layer of gpt-oss. Checkpoints and exports have its tensors, bit by
/// bit, and both are read again.
#[test]
fn branches_of_gpt_oss_are_written_as_peft_has_them() {
    for family in ["gpt_oss_experts", "gpt_oss_mxfp4_experts"] {
        let directory = golden(family).join("adapter");
        let mut model = Model::load(&golden(family), &Placement::cpu(None)).expect("the model loads");
        let adapter = Adapter::read(&directory, &model.config).expect("an adapter");
        // Two layers: one query projection, and two parts of four experts.
        assert_eq!(adapter.targets.len(), 2 * (1 + 2 * 4));
        assert!(adapter.notices.is_empty(), "{:?}", adapter.notices);
        model.attach(&adapter).expect("an adapter of this model");
        let values = model.parameters().expect("values");
        let exported = adapter.peft_files(0.0, &model.config).expect("files");
        let checkpoint = checkpoint::files(&model, &values, &BaseName::default());
        for files in [exported, checkpoint] {
            let written = tempfile::tempdir().expect("a directory");
            for (name, bytes) in files {
                made::write(&written.path().join(name), bytes);
            }
            let file = "adapter_model.safetensors";
            assert!(tensors_of(&written.path().join(file)) == tensors_of(&directory.join(file)), "{family}");
            let settings = made::read_json(&written.path().join("adapter_config.json"));
            let parameters = [0, 1].into_iter().flat_map(|layer| {
                ["gate_up_proj", "down_proj"].map(|part| format!("model.layers.{layer}.mlp.experts.{part}"))
            });
            assert_eq!(settings["target_parameters"], json!(parameters.collect::<Vec<_>>()));
            assert_eq!(settings["target_modules"], json!(["q_proj"]));
            assert_eq!((&settings["r"], &settings["rank_pattern"]), (&json!(4), &json!({})));
            assert_eq!(checkpoint::values(&model, written.path()), values);
            let again = Adapter::read(written.path(), &model.config).expect("an adapter");
            assert_eq!((again.targets, again.values), (adapter.targets.clone(), adapter.values.clone()));
        }
        let error = adapter.expect_adaptation(&Adaptation::default(), &directory).expect_err("other branches");
        let line = r#"target_modules = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]"#;
        assert!(error.hints().iter().any(|hint| hint.contains(line)), "{:?}", error.hints());
    }
}

/// mlx-lm holds gate and up of gpt-oss apart: the rows of B that take turns are those of two branches with one
/// A. Read back, it is the same adapter.
#[test]
fn branches_of_gpt_oss_are_two_in_mlx_lm() {
    let directory = golden("gpt_oss_experts");
    let config = ModelConfig::load(&directory).expect("a config");
    let adapter = Adapter::read(&directory.join("adapter"), &config).expect("an adapter");
    let written = written_for_mlx(&adapter, &config);
    let settings = made::read_json(&written.path().join("adapter_config.json"));
    let keys = ["mlp.experts.down_proj", "mlp.experts.gate_proj", "mlp.experts.up_proj", "self_attn.q_proj"];
    assert_eq!(settings["lora_parameters"]["keys"], json!(keys));
    let theirs = tensors_of(&written.path().join("adapters.safetensors"));
    let ours = tensors_of(&directory.join("adapter/adapter_model.safetensors"));
    let of = |part: &str, half: &str| &theirs[&format!("model.layers.1.mlp.experts.{part}.lora_{half}")];
    let of_peft =
        |half: &str| &ours[&format!("base_model.model.model.layers.1.mlp.experts.base_layer.lora_{half}.weight")];
    // A [4 · 4, 32] by expert, B [48, 4 · 4] by rank.
    for (half, part) in ["gate_proj", "up_proj"].into_iter().enumerate() {
        assert_eq!(of(part, "a").0, [4, 4, 32]);
        assert!(of(part, "a").1 == of_peft("A").1, "{part}");
        assert_eq!(of(part, "b").0, [4, 24, 4]);
        let (b, stacked) = (made::floats(&of(part, "b").1), made::floats(&of_peft("B").1));
        for (place, value) in b.iter().enumerate() {
            let (expert, output, column) = (place / 96, place / 4 % 24, place % 4);
            assert_eq!(*value, stacked[((2 * output + half) * 4 + column) * 4 + expert], "{part} {place}");
        }
    }
    let again = Adapter::read(written.path(), &config).expect("an adapter");
    assert_eq!((again.targets, again.values), (adapter.targets, adapter.values));
    assert!(again.notices.is_empty(), "{:?}", again.notices);
}

/// With branches of experts, merged stacks are plain numbers, and config.json does not call them packed.
/// Without, they stay as they are.
#[test]
fn merged_stacks_of_gpt_oss_are_plain_numbers() {
    for (family, is_opened) in [("gpt_oss_mxfp4_experts", true), ("gpt_oss_mxfp4", false)] {
        let directory = golden(family);
        let config = ModelConfig::load(&directory).expect("a config");
        let adapter = Adapter::read(&directory.join("adapter"), &config).expect("an adapter");
        let parent = tempfile::tempdir().expect("a directory");
        let mut staging = Staging::begin(&RealDisk, parent.path(), "merged").expect("a new directory");
        let form = MergedForm::of_shards(u64::MAX);
        let merged = write_merged(&RealDisk, &directory, &adapter, &mut staging, form, &[], &|_, _| {});
        let notice = merged.expect("a merge").notice.unwrap_or_default();
        assert_eq!(notice.contains("MXFP4"), is_opened, "{notice}");
        let merged = staging.publish(&json!({"kind": "merged"})).expect("published");
        let settings = made::read_json(&merged.join("config.json"));
        assert_eq!(settings.get("quantization_config").is_none(), is_opened);
        let tensors = tensors_of(&merged.join("model.safetensors"));
        let stack = "model.layers.1.mlp.experts.gate_up_proj";
        assert_eq!(tensors.contains_key(&format!("{stack}_blocks")), !is_opened);
        assert_eq!(tensors.contains_key(&format!("{stack}_scales")), !is_opened);
        assert!(tensors.contains_key(&format!("{stack}_bias")));
        assert_eq!(tensors.get(stack).map(|(shape, _)| shape.as_slice()), is_opened.then_some(&[4, 32, 64][..]));
    }
}
