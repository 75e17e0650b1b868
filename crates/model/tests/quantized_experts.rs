//! Models with experts, and multimodal ones, that are packed on the disk, against what mlx-lm, and transformers with
//! bitsandbytes, write of them (`scripts/make_expert_goldens.py`). The bases have drawn numbers, so a golden has shapes
//! and hashes only.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use finetune_advice::Advice as _;
use finetune_model::adapter::Adapter;
use finetune_model::merge::{MergedForm, write_merged};
use finetune_model::{
    FloatType, Model, ModelConfig, ModelError, Placement, Scheme, quantize_model, scheme_named, scheme_word,
};
use finetune_store::{Dtype, RealDisk, Staging, TensorSet};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::golden::{directory, goldens};
use crate::made::{Tensor, floats, read_json, read_tensors, write, write_tensors};

mod golden;
mod made;

const TOKENS: [u32; 7] = [5, 17, 42, 9, 33, 8, 61];

fn golden_of(family: &str) -> Value {
    read_json(&goldens().join("experts").join(format!("{family}.json")))
}

/// FNV-1a of 64 bits.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |value, byte| (value ^ u64::from(*byte)).wrapping_mul(0x100_0000_01B3))
}

/// `drawn` of the script: other numbers for each name, all of them exact in bf16.
fn drawn(name: &str, count: usize) -> Vec<f32> {
    let seed = fnv(name.as_bytes()) as u32;
    let number = |n: usize| {
        let mut bits = seed.wrapping_add(n as u32);
        for (shift, factor) in [(16, 0x85EB_CA6B_u32), (13, 0xC2B2_AE35)] {
            bits = (bits ^ (bits >> shift)).wrapping_mul(factor);
        }
        bits ^= bits >> 16;
        let power = (n / 64 + seed as usize % 8) % 5;
        ((bits >> 24) as f32 - 128.0) / (256 << power) as f32
    };
    (0..count).map(number).collect()
}

fn lengths(about: &Value) -> Vec<usize> {
    about.as_array().expect("a shape").iter().map(|length| length.as_u64().expect("a length") as usize).collect()
}

/// The tensors of a base, experts one by one.
fn tensors_of(golden: &Value) -> Vec<Tensor> {
    let made = golden["tensors"].as_object().expect("tensors").iter().map(|(name, about)| {
        let shape = lengths(&about[1]);
        let values = drawn(name, shape.iter().product());
        let (dtype, bytes): (Dtype, Vec<u8>) = match about[0].as_str() {
            Some("F32") => (Dtype::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
            // The upper half of an f32 is the bf16.
            Some("BF16") => (
                Dtype::BF16,
                values.iter().flat_map(|value| (value.to_bits() >> 16).to_le_bytes()[..2].to_vec()).collect(),
            ),
            other => panic!("{name}: {other:?}"),
        };
        (name.clone(), dtype, shape, bytes.into())
    });
    made.collect()
}

/// The same with the experts of a layer in transformers' stacks. `parts`: its names of gate, up and down.
fn stacked(tensors: Vec<Tensor>, parts: [&str; 3]) -> Vec<Tensor> {
    let place = |name: &str| {
        let (experts, rest) = name.split_once(".experts.")?;
        let (expert, part) = rest.strip_suffix(".weight")?.split_once('.')?;
        let part = parts.iter().position(|known| *known == part)?;
        Some((format!("{experts}.experts"), expert.parse::<usize>().ok()?, part))
    };
    let (experts, mut others): (Vec<_>, Vec<_>) = tensors.into_iter().partition(|tensor| place(&tensor.0).is_some());
    let mut layers: BTreeMap<String, BTreeMap<(usize, usize), Tensor>> = BTreeMap::new();
    for tensor in experts {
        let (layer, expert, part) = place(&tensor.0).expect("an expert");
        layers.entry(layer).or_default().insert((expert, part), tensor);
    }
    for (layer, of_layer) in layers {
        for (name, is_down, halves) in [("gate_up_proj", false, 2), ("down_proj", true, 1)] {
            let own: Vec<&Tensor> =
                of_layer.iter().filter(|((_, part), _)| (*part == 2) == is_down).map(|(_, tensor)| tensor).collect();
            let shape = vec![own.len() / halves, own[0].2[0] * halves, own[0].2[1]];
            let bytes: Vec<u8> = own.iter().flat_map(|tensor| tensor.3.iter().copied()).collect();
            others.push((format!("{layer}.{name}"), own[0].1, shape, bytes.into()));
        }
    }
    others
}

fn base_of(golden: &Value, tensors: &[Tensor]) -> TempDir {
    let made = tempfile::tempdir().expect("a directory");
    write(&made.path().join("config.json"), golden["config"].to_string());
    write_tensors(&made.path().join("model.safetensors"), tensors);
    made
}

/// `finetune quantize`.
fn quantized(base: &Path, scheme: Scheme, parent: &Path) -> Result<PathBuf, ModelError> {
    let mut staging = Staging::begin(&RealDisk, parent, scheme_word(scheme)).expect("a new directory");
    quantize_model(&RealDisk, base, scheme, &mut staging, &|_, _| {})?;
    Ok(staging.publish(&json!({"kind": "packed model"})).expect("published"))
}

/// A merge with an adapter or without, in plain f32 or packed.
fn merged(
    base: &Path,
    adapter: Option<&Adapter>,
    quantize: Option<Scheme>,
    parent: &Path,
) -> Result<PathBuf, ModelError> {
    let name = format!("merged-{}", quantize.map_or("plain", scheme_word));
    let mut staging = Staging::begin(&RealDisk, parent, &name).expect("a new directory");
    let none = Adapter::none(&ModelConfig::load(base).expect("a config"));
    let form = MergedForm { dtype: Some(FloatType::F32), quantize, ..MergedForm::of_shards(u64::MAX) };
    write_merged(&RealDisk, base, adapter.unwrap_or(&none), &mut staging, form, &[], &|_, _| {})?;
    Ok(staging.publish(&json!({"kind": "merged"})).expect("published"))
}

/// Type, shape and hash of each tensor of a directory.
fn found_in(directory: &Path) -> BTreeMap<String, (String, Vec<usize>, String)> {
    let files = TensorSet::open_model(directory).expect("files");
    let about = |name: &str| {
        let view = files.get(name).expect("a tensor of the file");
        let hash = format!("{:016x}", fnv(&view.bytes().expect("its bytes")));
        (name.to_owned(), (view.dtype.to_string(), view.shape.to_vec(), hash))
    };
    files.names().map(about).collect()
}

/// Asserts that a directory has the tensors that the other program wrote. mlx-lm makes two matrices of a head's
/// `kv_b_proj`; they are made of ours when it loads it.
fn expect_tensors(found: &Path, wanted: &Value, what: &str) {
    let is_latent = |name: &str| ["kv_b_proj", "embed_q", "unembed_out"].iter().any(|part| name.contains(part));
    let is_mlx = !what.ends_with("nf4") && !what.ends_with("int8");
    let mut found = found_in(found);
    for (name, about) in wanted.as_object().expect("tensors") {
        if is_mlx && is_latent(name) {
            continue;
        }
        let (dtype, shape, hash) = found.remove(name).unwrap_or_else(|| panic!("{what}: {name} is not written"));
        assert_eq!(Some(dtype.as_str()), about[0].as_str(), "{what}: {name}");
        // Of JSON text spaces count for nothing.
        if let Some(wanted) = about[2].as_str() {
            assert_eq!((shape, hash.as_str()), (lengths(&about[1]), wanted), "{what}: {name}");
        }
    }
    found.retain(|name, _| !(is_mlx && is_latent(name)));
    assert!(found.is_empty(), "{what}: too much: {:?}", found.keys());
}

/// From the base as the hub has it, and from one with experts in transformers' stacks where the hub has them single.
fn tensors_are_those_of_the_program_that_loads_them(family: &str) {
    let golden = golden_of(family);
    let single = tensors_of(&golden);
    let parts = if family == "lfm2_moe" { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
    let is_single = |tensor: &Tensor| tensor.0.contains(".experts.0.");
    let in_stacks = single.iter().any(is_single).then(|| stacked(single.clone(), parts));
    for tensors in std::iter::once(single).chain(in_stacks) {
        let base = base_of(&golden, &tensors);
        let is_stacked = !tensors.iter().any(is_single);
        for (form, wanted) in golden["written"].as_object().expect("forms") {
            let what = format!("{family} {form}");
            let is_mlx = golden["quantization"][form].get("mode").is_some();
            // For bitsandbytes a multimodal model has the experts that its base has, single or in stacks.
            if family == "kimi_k25" && is_stacked && !is_mlx {
                continue;
            }
            let folder = tempfile::tempdir().expect("a directory");
            let scheme = scheme_named(form).expect("a form");
            let out = quantized(base.path(), scheme, folder.path()).unwrap_or_else(|error| panic!("{what}: {error}"));
            expect_tensors(&out, wanted, &what);
            let config = read_json(&out.join("config.json"));
            assert_eq!(config["quantization_config"], golden["quantization"][form], "{what}");
            assert_eq!(config.get("quantization"), is_mlx.then_some(&config["quantization_config"]), "{what}");
            // Without the other parts mlx-lm would look for their weights.
            assert!(!is_mlx || config.get("vision_config").is_none(), "{what}");
        }
    }
}

/// Makes one test of a check for each family, `CHECK::FAMILY`.
macro_rules! of_each_family {
    ($check:ident: $($family:ident)+) => {
        mod $check {
            $(
                #[test]
                fn $family() {
                    super::$check(stringify!($family));
                }
            )+
        }
    };
}

of_each_family!(tensors_are_those_of_the_program_that_loads_them: qwen3_moe glm4_moe deepseek_v3 lfm2_moe gemma4_moe
    gpt_oss granitemoehybrid qwen3_next qwen3_5 qwen3_5_moe gemma3 gemma4 mistral3 kimi_k25 muse_glimmer);

/// The text model that mlx-lm's directory of a multimodal one has, as a directory of that alone. Others stay.
fn text_alone(directory: &Path, parent: &Path) -> PathBuf {
    const INSIDE: &str = "language_model.";
    let config = read_json(&directory.join("config.json"));
    let Some(mut text) = config.get("text_config").cloned() else { return directory.to_owned() };
    let own = |name: &String| name.strip_prefix(INSIDE).unwrap_or(name).to_owned();
    let settings = config["quantization"].as_object().expect("settings");
    let settings = settings.iter().map(|(name, value)| (own(name), value.clone())).collect::<serde_json::Map<_, _>>();
    text["quantization"] = settings.into();
    text["torch_dtype"] = config["torch_dtype"].clone();
    let mut tensors = read_tensors(&directory.join("model.safetensors"));
    tensors.iter_mut().for_each(|tensor| tensor.0 = own(&tensor.0));
    let made = parent.join("text");
    std::fs::create_dir(&made).expect("a new directory");
    write(&made.join("config.json"), text.to_string());
    write_tensors(&made.join("model.safetensors"), &tensors);
    made
}

/// What is written is read, and has the bits of itself decoded.
fn packed_models_have_the_bits_of_themselves_decoded(family: &str) {
    let golden = golden_of(family);
    let base = base_of(&golden, &tensors_of(&golden));
    for form in ["mlx4", "mxfp4", "nf4"].into_iter().filter(|form| golden["written"].get(form).is_some()) {
        let folder = tempfile::tempdir().expect("a directory");
        let out = quantized(base.path(), scheme_named(form).expect("a form"), folder.path()).expect("written");
        let packed = if form == "nf4" { out.clone() } else { text_alone(&out, folder.path()) };
        let decoded = merged(&packed, None, None, folder.path()).expect("decoded");
        let bits = |path: &Path| {
            let model = Model::load(path, &Placement::cpu(None)).expect("the model");
            model.logits(&TOKENS).expect("logits").iter().map(|logit| logit.to_bits()).collect::<Vec<u32>>()
        };
        assert!(Model::form(&out, None).expect("a base").words.is_some(), "{family} {form}");
        assert!(bits(&out) == bits(&decoded), "{family} {form}");
    }
}

of_each_family!(packed_models_have_the_bits_of_themselves_decoded: qwen3_moe glm4_moe deepseek_v3 lfm2_moe gemma4_moe
    gpt_oss granitemoehybrid qwen3_next qwen3_5 qwen3_5_moe gemma3 gemma4 mistral3 kimi_k25 muse_glimmer);

/// mlx-lm has 1 + w in the norms of models with delta nets, rounded to bf16. As a base they are w again.
#[test]
fn norms_of_delta_nets_are_read_without_the_one() {
    for family in ["qwen3_next", "qwen3_5", "qwen3_5_moe"] {
        let golden = golden_of(family);
        let base = base_of(&golden, &tensors_of(&golden));
        let folder = tempfile::tempdir().expect("a directory");
        let out = quantized(base.path(), Scheme::Mlx4, folder.path()).expect("written");
        let decoded = merged(&text_alone(&out, folder.path()), None, None, folder.path()).expect("decoded");
        let found: BTreeMap<String, Vec<f32>> = read_tensors(&decoded.join("model.safetensors"))
            .into_iter()
            .map(|(name, _, _, bytes)| (name, floats(&bytes)))
            .collect();
        let mut norms = 0;
        for (name, _, shape, _) in tensors_of(&golden).iter().filter(|tensor| tensor.0.ends_with("norm.weight")) {
            let in_text = name.replacen("model.language_model.", "model.", 1);
            // The sum of at most 1.5 has eight bits.
            let adds_one = !name.ends_with(".linear_attn.norm.weight");
            let bound = if adds_one { 1.0 / 256.0 } else { 0.0 };
            let written = &found[&in_text];
            let drawn = drawn(name, shape.iter().product());
            let far = written.iter().zip(&drawn).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far <= bound, "{family} {name}: {far}");
            norms += usize::from(adds_one);
        }
        // Two of each layer, those of queries and keys of the one with attention, and the last.
        assert_eq!(norms, 7, "{family}");
    }
}

/// What mlx-lm wrote of a multimodal model lacks the other parts: in plain numbers it is the text model alone, and
/// packed again it is mlx-lm's.
#[test]
fn a_text_model_alone_is_written_as_that() {
    for family in ["qwen3_5", "qwen3_5_moe", "gemma3", "gemma4", "mistral3", "kimi_k25"] {
        let golden = golden_of(family);
        let base = base_of(&golden, &tensors_of(&golden));
        let [folder, other] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
        let out = quantized(base.path(), Scheme::Mlx4, folder.path()).expect("written");
        let written = merged(&out, None, None, folder.path()).expect("in plain numbers");
        let wanted = merged(&text_alone(&out, other.path()), None, None, other.path()).expect("in plain numbers");
        assert_eq!(found_in(&written), found_in(&wanted), "{family}");
        let config = read_json(&written.join("config.json"));
        let class = config["architectures"][0].as_str().expect("a class");
        assert!(class.ends_with("ForCausalLM"), "{family}: {class}");
        for key in ["text_config", "quantization", "quantization_config"] {
            assert_eq!(config.get(key), None, "{family}: {key}");
        }
        if family != "kimi_k25" {
            let load = |path: &Path| ModelConfig::load(path).expect("a config");
            assert_eq!(load(&written), load(&wanted), "{family}");
        }
        let again = merged(&out, None, Some(Scheme::Mlx8), folder.path()).expect("packed again");
        assert!(Model::check(&again).is_ok(), "{family}");
    }
}

/// transformers has the text model of Muse Glimmer inside of the multimodal one alone.
#[test]
fn a_text_model_without_a_class_is_not_written() {
    let golden = golden_of("muse_glimmer");
    let base = base_of(&golden, &tensors_of(&golden));
    let folder = tempfile::tempdir().expect("a directory");
    let out = quantized(base.path(), Scheme::Mlx4, folder.path()).expect("written");
    let error = merged(&out, None, None, folder.path()).expect_err("no class").to_string();
    assert!(error.contains("MuseGlimmerForConditionalGeneration") && error.contains("no class"), "{error}");
}

/// A merge that is packed has the bytes of the merged model, packed.
#[test]
fn branches_on_experts_are_merged_before_they_are_packed() {
    let base = directory("qwen3_moe_experts");
    let config = ModelConfig::load(&base).expect("a config");
    let adapter = Adapter::read(&base.join("adapter"), &config).expect("the adapter");
    for scheme in [Scheme::Mxfp4, Scheme::Nf4] {
        let folder = tempfile::tempdir().expect("a directory");
        let plain = merged(&base, Some(&adapter), None, folder.path()).expect("merged");
        let then_packed = quantized(&plain, scheme, folder.path()).expect("packed");
        let at_once = merged(&base, Some(&adapter), Some(scheme), folder.path()).expect("merged and packed");
        assert_eq!(found_in(&at_once), found_in(&then_packed), "{}", scheme_word(scheme));
        let other = tempfile::tempdir().expect("a directory");
        let unchanged = merged(&base, None, Some(scheme), other.path()).expect("packed");
        assert_ne!(found_in(&at_once), found_in(&unchanged), "{}", scheme_word(scheme));
    }
}

/// (model, form, what is said)
#[test]
fn what_no_program_would_load_is_refused() {
    for (model, scheme, says) in [
        ("gpt_oss", Scheme::Mlx4, "the one form that it reads, MXFP4"),
        ("qwen3_5", Scheme::Mxfp4, "it has `qwen3_5_text` inside of a multimodal model alone"),
        ("qwen3_5_moe", Scheme::Mlx8, "it has `qwen3_5_moe_text` inside of a multimodal model alone"),
        ("gpt_oss_mxfp4", Scheme::Nf4, "transformers loads no second form"),
    ] {
        let folder = tempfile::tempdir().expect("a directory");
        let error = merged(&directory(model), None, Some(scheme), folder.path()).expect_err(model);
        assert!(error.to_string().contains(says) && !error.hints().is_empty(), "{model}: {error}");
    }
}

/// mlx-lm has gate and up of Granite 4 apart, under other names. They are read and merged as one, in plain numbers, or
/// with other bits each.
#[test]
fn granite_4_as_mlx_lm_has_it() {
    let base = directory("granitemoehybrid");
    let bits = |path: &Path| {
        let model = Model::load(path, &Placement::cpu(None)).expect("the model");
        model.logits(&TOKENS).expect("logits").iter().map(|logit| logit.to_bits()).collect::<Vec<u32>>()
    };
    let mut apart = Vec::new();
    for (name, dtype, mut shape, bytes) in read_tensors(&base.join("model.safetensors")) {
        if let Some(layer) = name.strip_suffix(".shared_mlp.input_linear.weight") {
            shape[0] /= 2;
            for (half, part) in bytes.chunks(bytes.len() / 2).zip(["gate_proj", "up_proj"]) {
                apart.push((format!("{layer}.mlp.{part}.weight"), dtype, shape.clone(), half.to_vec().into()));
            }
        } else {
            apart.push((name.replace(".shared_mlp.output_linear.", ".mlp.down_proj."), dtype, shape, bytes));
        }
    }
    let plain = tempfile::tempdir().expect("a directory");
    write(&plain.path().join("config.json"), read_json(&base.join("config.json")).to_string());
    write_tensors(&plain.path().join("model.safetensors"), &apart);
    assert!(bits(plain.path()) == bits(&base));
    let [folder, other] = [(); 2].map(|()| tempfile::tempdir().expect("a directory"));
    let together = merged(plain.path(), None, None, folder.path()).expect("merged");
    assert_eq!(found_in(&together), found_in(&base));

    // The gate in 4 bits, all else in 8.
    let golden = golden_of("granitemoehybrid");
    let base = base_of(&golden, &tensors_of(&golden));
    let [four, eight] =
        [Scheme::Mlx4, Scheme::Mlx8].map(|scheme| quantized(base.path(), scheme, other.path()).expect("packed"));
    let is_gate = |tensor: &Tensor| tensor.0.contains(".mlp.gate_proj.");
    let mut mixed = read_tensors(&eight.join("model.safetensors"));
    mixed.retain(|tensor| !is_gate(tensor));
    mixed.extend(read_tensors(&four.join("model.safetensors")).into_iter().filter(is_gate));
    let made = tempfile::tempdir().expect("a directory");
    let mut config = read_json(&eight.join("config.json"));
    for n in 0..2 {
        config["quantization"][format!("model.layers.{n}.mlp.gate_proj")] = json!({"bits": 4, "group_size": 64});
    }
    write(&made.path().join("config.json"), config.to_string());
    write_tensors(&made.path().join("model.safetensors"), &mixed);
    let decoded = merged(made.path(), None, None, other.path()).expect("decoded");
    assert!(bits(made.path()) == bits(&decoded));
    assert!(bits(made.path()) != bits(&eight) && bits(made.path()) != bits(&four));
}
