//! Packed bases: packed while they are loaded, packed in their files, and decoded beforehand. All three
//! compute the same bits on the CPU.

use std::path::{Path, PathBuf};

use finetune_advice::Advice as _;
use finetune_model::adapter::Adapter;
use finetune_model::merge::{MergedForm, compare, write_merged};
use finetune_model::{
    Adaptation, Backward, BaseName, Batch, Coefficients, FloatType, LoraTarget, Model, ModelConfig, Placement, Scheme,
    linear_modules, quantize_model, scheme_word, stored_type,
};
use finetune_random::Stream;
use finetune_store::{Dtype, RealDisk, Staging, TensorSet};
use serde_json::json;
use tempfile::TempDir;

use crate::golden::{ANY, batch};
use crate::made::{Tensor, put, read_json, read_tensors, write, write_tensors};

mod checkpoint;
mod golden;
mod made;

const SCHEMES: [Scheme; 5] = [Scheme::Nf4, Scheme::Int8, Scheme::Mlx4, Scheme::Mlx8, Scheme::Mxfp4];

/// (DoRA, modules that are trained in full, gradient checkpointing)
const STEPS: [(bool, &[&str], bool); 4] =
    [(false, &[], false), (false, &[], true), (true, &[], false), (false, &["lm_head", "model.norm"], false)];

const TOKENS: [u32; 7] = [5, 17, 42, 9, 33, 8, 61];

/// A model of two layers with fresh weights in bf16.
fn dense(tied: bool) -> TempDir {
    let made = tempfile::tempdir().expect("a directory");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
        "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "initializer_range": 0.2, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
    });
    write(&made.path().join("config.json"), config.to_string());
    let mut model = Model::initialize(made.path(), 7, &Placement::cpu(None)).expect("a model");
    model.train_all();
    let values = model.parameters().expect("values");
    for (name, bytes) in checkpoint::files(&model, &values, &BaseName::default()) {
        write(&made.path().join(name), bytes);
    }
    let mut tensors = read_tensors(&made.path().join("model.safetensors"));
    for tensor in &mut tensors {
        let upper: Vec<u8> = tensor.3.chunks_exact(4).flat_map(|b| [b[2], b[3]]).collect();
        (tensor.1, tensor.3) = (Dtype::BF16, upper.into());
    }
    write_tensors(&made.path().join("model.safetensors"), &tensors);
    write(&made.path().join("config.json"), config.to_string());
    made
}

fn cpu() -> Placement {
    Placement::cpu(None)
}

/// The base with its matrices packed, at `parent/packed`.
fn packed(base: &Path, scheme: Scheme, parent: &Path) -> PathBuf {
    let mut staging = Staging::begin(&RealDisk, parent, "packed").expect("a new directory");
    quantize_model(&RealDisk, base, scheme, &mut staging, &|_, _| {}).expect("a packed model");
    staging.publish(&json!({"kind": "packed model"})).expect("published")
}

/// The base with what the adapter adds, in f32, at `parent/NAME`.
fn merged(base: &Path, adapter: Option<&Adapter>, parent: &Path, name: &str) -> PathBuf {
    let none = Adapter::none(&ModelConfig::load(base).expect("a config"));
    let mut staging = Staging::begin(&RealDisk, parent, name).expect("a new directory");
    let form = MergedForm { dtype: Some(FloatType::F32), ..MergedForm::of_shards(u64::MAX) };
    write_merged(&RealDisk, base, adapter.unwrap_or(&none), &mut staging, form, &[], &|_, _| {}).expect("a merge");
    staging.publish(&json!({"kind": "merged"})).expect("published")
}

fn bits(model: &Model) -> Vec<u32> {
    model.logits(&TOKENS).expect("logits").iter().map(|logit| logit.to_bits()).collect()
}

/// Branches on all linear layers, and on the output layer; with DoRA on the former if `dora`.
fn adaptation(model: &Model, dora: bool, saved: &[&str]) -> Adaptation {
    let target = |module: String, use_dora| LoraTarget { module, rank: 4, alpha: 8.0, use_rslora: false, use_dora };
    let mut targets: Vec<LoraTarget> =
        linear_modules(&model.config).into_iter().map(|module| target(module, dora)).collect();
    if saved.is_empty() {
        targets.push(target("lm_head".to_owned(), false));
    }
    let saved = saved.iter().map(|module| (*module).to_owned()).collect();
    Adaptation { targets, saved, dropout: 0.1 }
}

/// Loss and gradients of one step as bits, and the logits after a change of all trained values.
fn step(mut model: Model, dora: bool, saved: &[&str], checkpointing: bool) -> (u64, Vec<u32>, Vec<u32>) {
    let adaptation = adaptation(&model, dora, saved);
    model.add_adapter(adaptation, 3).expect("an adapter");
    let mut values = model.parameters().expect("values");
    let noise = Stream::new(5, 0, 0, 0).normal(values.len(), 0.02);
    values.iter_mut().zip(noise).for_each(|(value, noise)| *value += noise);
    model.set_parameters(&values);
    let rows = [(TOKENS.to_vec(), vec![true; 7]), (vec![3, 4, 5, 95], vec![false, true, true, true])];
    let batch: Batch<'_> = batch(&rows);
    let mut gradients = vec![0.0; values.len()];
    let backward = Backward { randomness: ANY, checkpointing, loss_scale: 1.0, coefficients: Coefficients::Ones };
    let sums = model.loss_and_gradients(&batch, backward, &mut gradients).expect("a step");
    let gradients = gradients.iter().map(|gradient| gradient.to_bits()).collect();
    (sums.loss.to_bits(), gradients, bits(&model))
}

#[test]
fn a_packed_base_has_the_bits_of_itself_decoded() {
    for tied in [true, false] {
        let base = dense(tied);
        for scheme in SCHEMES {
            let word = scheme_word(scheme);
            let folder = tempfile::tempdir().expect("a directory");
            let file = packed(base.path(), scheme, folder.path());
            let decoded = merged(&file, None, folder.path(), "decoded");
            let form = Model::form(&file, None).expect("a base");
            // 176 columns are no multiple of 32, and bitsandbytes leaves embedding and output layer out.
            let of = if tied { "of 15" } else { "14 of 16" };
            assert!(form.words.as_ref().is_some_and(|words| words.contains(of)), "{word}: {form:?}");
            assert!(form.is_packed_in_files && form.packed.bytes > 0, "{word}: {form:?}");
            let loaded = |directory: &Path| Model::load(directory, &cpu()).expect("the model");
            let on_load = || Model::load(base.path(), &cpu().quantized(Some(scheme))).expect("the model");
            let want = bits(&loaded(&decoded));
            assert!(want != bits(&loaded(base.path())), "{word}: nothing was packed");
            assert!(bits(&loaded(&file)) == want, "{word} in the file");
            assert!(bits(&on_load()) == want, "{word} while it is loaded");
            for (dora, saved, checkpointing) in STEPS {
                let want = step(loaded(&decoded), dora, saved, checkpointing);
                let what = format!("{word}, tied {tied}, DoRA {dora}, {saved:?}, checkpointing {checkpointing}");
                assert!(step(loaded(&file), dora, saved, checkpointing) == want, "{what}");
                assert!(step(on_load(), dora, saved, checkpointing) == want, "{what}, while it is loaded");
            }
        }
    }
}

/// The sizes that an estimate of memory goes by are those of the matrices that are made.
#[test]
fn sizes_while_it_is_loaded_are_those_of_the_file() {
    let base = dense(false);
    for scheme in SCHEMES {
        let folder = tempfile::tempdir().expect("a directory");
        let file = packed(base.path(), scheme, folder.path());
        let (on_load, in_file) = (Model::form(base.path(), Some(scheme)), Model::form(&file, None));
        let (on_load, in_file) = (on_load.expect("a base"), in_file.expect("a base"));
        assert_eq!(on_load.packed, in_file.packed, "{}", scheme_word(scheme));
        assert_eq!(on_load.vocabulary, in_file.vocabulary, "{}", scheme_word(scheme));
        assert!(!on_load.is_packed_in_files, "{on_load:?}");
        assert_eq!(stored_type(&file), FloatType::BF16, "{}", scheme_word(scheme));
    }
}

#[test]
fn new_rows_leave_the_others_as_they_were() {
    for tied in [true, false] {
        let (base, folder) = (dense(tied), tempfile::tempdir().expect("a directory"));
        let file = packed(base.path(), Scheme::Mlx4, folder.path());
        let mut model = Model::load(&file, &cpu()).expect("the model");
        let before = model.logits(&TOKENS).expect("logits");
        model.resize_vocabulary(99).expect("new rows");
        let after = model.logits(&TOKENS).expect("logits");
        for (before, after) in before.chunks(96).zip(after.chunks(99)) {
            assert_eq!(before, &after[..96], "tied {tied}");
        }
        // A token that has a row only now.
        model.logits(&[98]).expect("logits");
    }
}

#[test]
fn a_base_is_packed_once() {
    let (base, folder) = (dense(false), tempfile::tempdir().expect("a directory"));
    let file = packed(base.path(), Scheme::Nf4, folder.path());
    let again = Model::load(&file, &cpu().quantized(Some(Scheme::Mlx4))).expect("the model");
    assert!(bits(&again) == bits(&Model::load(&file, &cpu()).expect("the model")));
    assert!(again.notices().iter().any(|notice| notice.contains("packed already")), "{:?}", again.notices());
    let mut staging = Staging::begin(&RealDisk, folder.path(), "twice").expect("a new directory");
    let error = quantize_model(&RealDisk, &file, Scheme::Mlx4, &mut staging, &|_, _| {}).expect_err("packed already");
    assert!(error.to_string().contains("packed already") && error.hints()[0].contains("16-bit"), "{error}");
}

/// An adapter of the model, with trained values, that says how its base was packed.
fn trained(model: &mut Model, base: &Path, scheme: Option<Scheme>, parent: &Path) -> Adapter {
    let chosen = adaptation(model, false, &[]);
    model.add_adapter(Adaptation { dropout: 0.0, ..chosen }, 3).expect("an adapter");
    let mut values = model.parameters().expect("values");
    let noise = Stream::new(5, 0, 0, 0).normal(values.len(), 0.05);
    values.iter_mut().zip(noise).for_each(|(value, noise)| *value += noise);
    model.set_parameters(&values);
    let mut staging = Staging::begin(&RealDisk, parent, "adapter").expect("a new directory");
    for (name, bytes) in checkpoint::files(model, &values, &BaseName::default()) {
        staging.write(&name, &bytes).expect("written");
    }
    let mut about = json!({"kind": "adapter", "base_digest": finetune_model::base_digest(base).expect("a digest")});
    if let Some(scheme) = scheme {
        about["quantization"] = scheme_word(scheme).into();
    }
    let path = staging.publish(&about).expect("published");
    Adapter::read(&path, &ModelConfig::load(base).expect("a config")).expect("the adapter")
}

/// Merged into what it was trained over, whether that is a packed file or one that is packed while it
/// is loaded; never into few bits.
#[test]
fn a_merge_decodes_the_base_that_was_trained_on() {
    let base = dense(false);
    for scheme in SCHEMES {
        let folder = tempfile::tempdir().expect("a directory");
        let file = packed(base.path(), scheme, folder.path());
        for (base, quantization, name) in [(file.as_path(), None, "of_file"), (base.path(), Some(scheme), "on_load")] {
            let parent = folder.path().join(name);
            std::fs::create_dir(&parent).expect("a directory");
            let mut model = Model::load(base, &cpu().quantized(quantization)).expect("the model");
            let adapter = trained(&mut model, base, quantization, &parent);
            assert_eq!(adapter.base.quantization, quantization);
            assert_eq!(adapter.quantization_notice(quantization), None);
            assert_eq!(adapter.quantization_notice(None).is_some(), quantization.is_some());
            let out = merged(base, Some(&adapter), &parent, "merged");
            let comparison = compare(base, &adapter, &out, &cpu()).expect("they agree");
            assert!(comparison.largest < 1e-4 * comparison.scale, "{name} {}: {comparison:?}", scheme_word(scheme));
            let config = read_json(&out.join("config.json"));
            assert!(config.get("quantization").is_none() && config.get("quantization_config").is_none(), "{config}");
            assert_eq!(Model::form(&out, None).expect("a base").words, None);
        }
    }
}

/// Packed again, the result keeps a part of what was learned: in 8 bits most of it.
#[test]
fn a_merge_that_is_packed_says_what_is_left() {
    let (base, folder) = (dense(false), tempfile::tempdir().expect("a directory"));
    let file = packed(base.path(), Scheme::Mlx8, folder.path());
    let mut model = Model::load(&file, &cpu()).expect("the model");
    let adapter = trained(&mut model, &file, None, folder.path());
    for (quantize, least, most) in
        [(None, f64::NAN, f64::NAN), (Some(Scheme::Mlx8), 0.9, 1.1), (Some(Scheme::Mlx4), 0.0, 1.1)]
    {
        let name = quantize.map_or("plain", scheme_word);
        let mut staging = Staging::begin(&RealDisk, folder.path(), name).expect("a new directory");
        let form = MergedForm { quantize, ..MergedForm::of_shards(u64::MAX) };
        let result = write_merged(&RealDisk, &file, &adapter, &mut staging, form, &[], &|_, _| {}).expect("a merge");
        assert!(result.notice.as_ref().is_some_and(|notice| notice.contains("MLX 8-bit")), "{result:?}");
        let out = staging.publish(&json!({"kind": "merged"})).expect("published");
        match result.kept {
            Some(kept) => assert!((least..most).contains(&kept), "{name}: {kept}"),
            None => assert_eq!(quantize, None),
        }
        assert_eq!(Model::form(&out, None).expect("a base").words.is_some(), quantize.is_some());
        let files = TensorSet::open_model(&out).expect("files");
        let is_float = |name: &str| files.get(name).is_some_and(|view| view.dtype == Dtype::BF16);
        assert_eq!(is_float("model.layers.0.self_attn.q_proj.weight"), quantize.is_none(), "{name}");
        Model::load(&out, &cpu()).expect("the model").logits(&TOKENS).expect("logits");
    }
}

/// Changes the tensors of a packed model.
fn change(file: &Path, change: impl FnOnce(&mut Vec<Tensor>)) {
    let path = file.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    change(&mut tensors);
    write_tensors(&path, &tensors);
}

/// A tied model may carry the embedding a second time, as the parts of an output layer. Parts with
/// other elements are an output layer of its own.
#[test]
fn parts_of_a_tied_output_layer() {
    let (base, folder) = (dense(true), tempfile::tempdir().expect("a directory"));
    let file = packed(base.path(), Scheme::Mlx4, folder.path());
    let before = bits(&Model::load(&file, &cpu()).expect("the model"));
    change(&file, |tensors| {
        let parts: Vec<Tensor> =
            tensors.iter().filter(|tensor| tensor.0.starts_with("model.embed_tokens.")).cloned().collect();
        let renamed = |name: &str| name.replace("model.embed_tokens", "lm_head");
        tensors.extend(parts.into_iter().map(|(name, dtype, shape, bytes)| (renamed(&name), dtype, shape, bytes)));
    });
    let same = Model::load(&file, &cpu()).expect("the model");
    assert!(same.config.tied_embeddings && same.notices().is_empty(), "{:?}", same.notices());
    assert!(bits(&same) == before);
    change(&file, |tensors| {
        let codes = tensors.iter_mut().find(|tensor| tensor.0 == "lm_head.weight").expect("its codes");
        codes.3.to_mut().iter_mut().for_each(|byte| *byte ^= 0x11);
    });
    let other = Model::load(&file, &cpu()).expect("the model");
    assert!(!other.config.tied_embeddings && bits(&other) != before, "{:?}", other.notices());
}

/// (what is done to a packed model, a part of the error): each is found before training, by name.
#[test]
fn packed_tensors_that_do_not_add_up() {
    type Change = fn(&mut Vec<Tensor>);
    let cases: [(&str, Change); 4] = [
        ("model.layers.1.mlp.up_proj", |tensors| {
            tensors.retain(|tensor| tensor.0 != "model.layers.1.mlp.up_proj.scales")
        }),
        ("model.layers.1.mlp.up_proj", |tensors| {
            let scales = tensors.iter_mut().find(|tensor| tensor.0 == "model.layers.1.mlp.up_proj.scales");
            scales.expect("scales").3.to_mut()[..2].copy_from_slice(&[0xc0, 0x7f]);
        }),
        ("model.layers.0.self_attn.k_proj", |tensors| {
            tensors.retain(|tensor| !tensor.0.starts_with("model.layers.0.self_attn.k_proj."));
        }),
        ("model.norm.weight", |tensors| {
            let norm = tensors.iter_mut().find(|tensor| tensor.0 == "model.norm.weight").expect("the norm");
            (norm.1, norm.3) = (Dtype::F32, made::f32s(&[f32::NAN; 64]));
        }),
    ];
    let base = dense(false);
    for (part, spoil) in cases {
        let folder = tempfile::tempdir().expect("a directory");
        let file = packed(base.path(), Scheme::Mlx4, folder.path());
        change(&file, spoil);
        for error in [Model::load(&file, &cpu()).map(|_| ()), Model::check(&file).map(|_| ())] {
            let error = error.expect_err(part);
            assert!(error.to_string().contains(part), "{part}: {error}");
            assert!(!error.hints().is_empty(), "{error}");
        }
    }
    // A number that is none cannot be packed either.
    let made = dense(false);
    change(made.path(), |tensors| {
        for tensor in tensors.iter_mut() {
            let wide: Vec<f32> = tensor
                .3
                .chunks_exact(2)
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16))
                .collect();
            (tensor.1, tensor.3) = (Dtype::F32, made::f32s(&wide));
        }
        put(tensors, "model.layers.0.mlp.down_proj.weight", 11, f32::INFINITY);
    });
    let error = Model::load(made.path(), &cpu().quantized(Some(Scheme::Nf4))).map(|_| ()).expect_err("infinite");
    assert!(error.to_string().contains("down_proj") && error.is_about_numbers(), "{error}");
}

/// The word of every form is known, and no other.
#[test]
fn forms_have_the_names_of_recipes() {
    for scheme in SCHEMES {
        assert_eq!(finetune_model::scheme_named(scheme_word(scheme)), Some(scheme));
    }
    assert_eq!(finetune_model::scheme_named("int4"), None);
}
