//! Latent attention behind a cache: against transformers (`scripts/make_goldens.py` made the files), against
//! whole passes, and with the same bits whatever it is computed with.

use std::path::{Path, PathBuf};

use burn::tensor::{DType, Device, Tensor, TensorData};
use finetune_kernels::{PackedWeight, Segment, Weight};
use finetune_packed::{Scheme, Stored, quantize};
use finetune_random::Stream;
use finetune_store::TensorFile;

use super::{LatentAttention, expanded};
use crate::adaptation::Adaptation;
use crate::adapter::Adapter;
use crate::batch::{Batch, BatchRow};
use crate::decoder::cache::{KeyValueCache, RowsCache};
use crate::decoder::{self, head};
use crate::lora::LoraTarget;
use crate::model::Model;
use crate::placement::Placement;
use crate::readback::data;
use crate::tree::{Linear, Mixer};

/// With compressed queries and a mixture in groups, without, and with a dense layer. Kimi K2 is the first.
const FAMILIES: [&str; 3] = ["deepseek_v3", "deepseek_v3_plain", "glm4_moe_lite"];

/// Largest difference of logits: ten times the reference's own f32 noise.
const LOGITS: f32 = 3e-5;

/// How a row is read: so many tokens, and then so many at a time.
const PARTS: [(usize, usize); 6] = [(1, 1), (4, 1), (6, 3), (3, 20), (8, 5), (23, 1)];

/// Tokens of rows that are continued together. The room of a row is 64 places, then 128.
const ROWS: [usize; 5] = [1, 5, 63, 64, 20];

fn directory(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(family)
}

fn base(family: &str) -> Model {
    Model::load(&directory(family), &Placement::cpu(None)).expect("the model loads")
}

fn with_adapter(family: &str, mut model: Model) -> Model {
    let adapter = Adapter::read(&directory(family).join("adapter"), &model.config).expect("the adapter loads");
    model.attach(&adapter).expect("attached");
    model
}

fn latent(model: &Model, layer: usize) -> &LatentAttention {
    match &model.weights.layers[layer].mixer {
        Mixer::Latent(latent) => latent,
        _ => panic!("another kind of attention"),
    }
}

/// The layers that make keys and values of short vectors.
fn ups(model: &mut Model) -> Vec<&mut Linear> {
    let layers = model.weights.layers.iter_mut();
    let of_layer = layers.filter_map(|layer| match &mut layer.mixer {
        Mixer::Latent(latent) => Some(&mut latent.up),
        _ => None,
    });
    of_layer.collect()
}

/// The model with `kv_b_proj` held in another way, and with the same values in f32.
fn held(mut model: Model, change: impl Fn(&[f32], [usize; 2]) -> Weight) -> [Model; 2] {
    let mut decoded = model.clone();
    let device = Device::flex();
    for (up, decoded) in ups(&mut model).into_iter().zip(ups(&mut decoded)) {
        let values = data(up.weight.in_f32(&device).expect("a matrix")).expect("values");
        up.weight.set_weight(change(&values, up.weight.shape));
        let values =
            TensorData::new(data(up.weight.in_f32(&device).expect("a matrix")).expect("values"), up.weight.shape);
        decoded.weight.set(Tensor::from_data(values, &device));
    }
    [model, decoded]
}

fn packed(scheme: Scheme) -> impl Fn(&[f32], [usize; 2]) -> Weight {
    move |values, shape| {
        let matrix = quantize(scheme, values, shape, Stored::F32).expect("a packed matrix");
        Weight::Packed(PackedWeight::new(matrix, &Device::flex()))
    }
}

fn in_type(dtype: DType) -> impl Fn(&[f32], [usize; 2]) -> Weight {
    move |values, shape| {
        Weight::Dense(Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), &Device::flex()).cast(dtype))
    }
}

/// Branches on `kv_b_proj` alone, with values that are not those of a fresh one.
fn with_branches(mut model: Model, use_dora: bool) -> Model {
    let modules: Vec<String> = ups(&mut model).iter().map(|up| up.module.clone()).collect();
    let target = |module| LoraTarget { module, rank: 3, alpha: 6.0, use_rslora: false, use_dora };
    let targets = modules.into_iter().map(target).collect();
    model.add_adapter(Adaptation { targets, saved: Vec::new(), dropout: 0.1 }, 3).expect("an adapter");
    let mut values = model.parameters().expect("values");
    let noise = Stream::new(5, 0, 0, 0).normal(values.len(), 0.1);
    values.iter_mut().zip(noise).for_each(|(value, noise)| *value += noise);
    model.set_parameters(&values);
    model
}

/// A model of each kind of `kv_b_proj`.
fn kinds(family: &str) -> Vec<(String, Model)> {
    let named = |name: &str, model| (format!("{family}, {name}"), model);
    let [nf4, _] = held(with_adapter(family, base(family)), packed(Scheme::Nf4));
    let [int8, _] = held(base(family), packed(Scheme::Int8));
    let [bf16, _] = held(with_branches(base(family), true), in_type(DType::BF16));
    vec![
        named("base", base(family)),
        named("LoRA", with_adapter(family, base(family))),
        named("LoRA on it alone", with_branches(base(family), false)),
        named("DoRA", with_branches(base(family), true)),
        named("NF4 with LoRA", nf4),
        named("int8", int8),
        // The norms of DoRA are those of the matrix in f32, in a pass with a cache and without.
        named("bf16 with DoRA", bf16),
    ]
}

/// Tokens that say nothing: 3, 10, 17, ...
fn text(length: usize, first: u32) -> Vec<u32> {
    (0..length as u32).map(|n| (first + 7 * n) % 96).collect()
}

/// Calls `each` with the place of the last token of each part and the logits behind it.
fn read(model: &Model, tokens: &[u32], (first, then): (usize, usize), each: &mut dyn FnMut(usize, Vec<f32>)) {
    let mut cache = KeyValueCache::default();
    let mut end = first.min(tokens.len());
    let mut begin = 0;
    while begin < tokens.len() {
        each(end - 1, model.read(&tokens[begin..end], &mut cache).expect("logits"));
        (begin, end) = (end, tokens.len().min(end + then));
    }
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn greedy(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).expect("a logit")
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn logits_behind_a_cache_are_those_of_transformers() {
    for family in FAMILIES {
        let golden = TensorFile::open(&directory(family).join("golden.safetensors")).expect("golden.safetensors");
        let rows = std::fs::read_to_string(directory(family).join("golden.json")).expect("golden.json");
        let rows: serde_json::Value = serde_json::from_str(&rows).expect("JSON");
        for (name, model) in [("base_logits", base(family)), ("logits", with_adapter(family, base(family)))] {
            for (n, row) in rows["rows"].as_array().expect("rows").iter().enumerate() {
                let ids = row["input_ids"].as_array().expect("tokens").iter();
                let tokens: Vec<u32> = ids.map(|id| id.as_u64().expect("a token") as u32).collect();
                let want = golden.get(&format!("{name}.{n}")).expect("logits").bytes().expect("bytes");
                let want: Vec<f32> = want.as_chunks::<4>().0.iter().map(|four| f32::from_le_bytes(*four)).collect();
                let width = want.len() / tokens.len();
                for parts in PARTS {
                    read(&model, &tokens, parts, &mut |place, got| {
                        let want = &want[place * width..][..width];
                        let difference = largest_difference(&got, want);
                        let words = format!("{family} {name}.{n}, place {place} in parts of {parts:?}");
                        assert!(difference < LOGITS, "{words}: {difference:e}");
                        assert_eq!(greedy(&got), greedy(want), "{words}");
                    });
                }
            }
        }
    }
}

#[test]
fn logits_behind_a_cache_are_those_of_a_whole_pass() {
    for (name, model) in FAMILIES.into_iter().flat_map(kinds) {
        let tokens = text(40, 5);
        let want = model.logits(&tokens).expect("logits");
        let width = want.len() / tokens.len();
        for parts in PARTS {
            read(&model, &tokens, parts, &mut |place, got| {
                let difference = largest_difference(&got, &want[place * width..][..width]);
                assert!(difference < LOGITS, "{name}, place {place} in parts of {parts:?}: {difference:e}");
            });
        }
    }
}

/// (tokens that are read, those and the cached ones, whether they are read from the short vectors)
const WAYS: [(usize, usize, bool); 8] = [
    (1, 1, true),
    (1, 5000, true),
    (2, 2, false),
    (23, 23, false),
    (3, 9, true),
    (20, 23, false),
    (12, 1036, true),
    (512, 1024, false),
];

/// Both ways are taken by the parts of the other tests.
#[test]
fn tokens_and_those_before_them_decide_how_they_are_read() {
    let model = base("deepseek_v3");
    for (queries, keys, want) in WAYS {
        let row = Segment { query_start: 0, queries, key_start: 0, keys };
        assert_eq!(latent(&model, 0).absorbs(&row), want, "{queries} of {keys} tokens");
    }
}

/// A beginning has the bits of a pass without a cache, which is what training computes.
#[test]
fn a_prompt_that_is_read_at_once_has_the_bits_of_a_whole_pass() {
    for (name, model) in FAMILIES.into_iter().flat_map(kinds) {
        let (tokens, trained) = (text(40, 5), [false; 40]);
        let batch = Batch { rows: vec![BatchRow { id: 0, tokens: &tokens, trained: &trained }] };
        let context = model.context(&batch, None);
        let hidden = decoder::hidden(&model.weights, &tokens, &context).expect("hidden states");
        // One row of logits, as behind a prompt: more rows are summed in another order.
        let want = data(head::logits(&model.weights, hidden.narrow(0, 39, 1), &context)).expect("logits");
        let got = model.read(&tokens, &mut KeyValueCache::default()).expect("logits");
        assert!(bits(&got) == bits(&want), "{name}");
    }
}

/// Rows of different lengths, one that joins later, and one that leaves.
#[test]
fn rows_that_are_continued_together_have_the_bits_that_they_have_alone() {
    for (name, model) in FAMILIES.into_iter().flat_map(kinds) {
        let prompt = |row: usize| text(ROWS[row], row as u32);
        let next = |row: usize, step: usize| (17 * row + 5 * step) as u32 % 96;
        let steps = 8;
        let alone = |row: usize| -> Vec<Vec<u32>> {
            let mut cache = KeyValueCache::default();
            model.read(&prompt(row), &mut cache).expect("logits");
            let step = |step| bits(&model.read(&[next(row, step)], &mut cache).expect("logits"));
            (0..steps).map(step).collect()
        };
        let want: Vec<Vec<Vec<u32>>> = (0..ROWS.len()).map(alone).collect();
        let of_row = |row: usize| {
            let mut cache = KeyValueCache::default();
            model.read(&prompt(row), &mut cache).expect("logits");
            cache
        };
        let mut rows: Vec<(usize, usize)> = (0..4).map(|row| (row, 0)).collect();
        let mut cache = RowsCache::join((0..4).map(of_row).collect());
        for round in 0..steps + 3 {
            if round == 3 {
                cache.insert(of_row(4), 4);
                rows.push((4, 0));
            }
            let stay: Vec<usize> = (0..rows.len()).filter(|&n| rows[n].1 < steps).collect();
            if stay.len() < rows.len() {
                cache.keep_and_shrink(&stay);
                rows = stay.into_iter().map(|n| rows[n]).collect();
            }
            let tokens: Vec<u32> = rows.iter().map(|&(row, step)| next(row, step)).collect();
            let got = model.read_rows(&tokens, &mut cache).expect("logits");
            for ((row, step), got) in rows.iter_mut().zip(got.chunks(got.len() / tokens.len())) {
                assert!(bits(got) == want[*row][*step], "{name}: row {row}, step {step}");
                *step += 1;
            }
        }
        assert_eq!(rows, [(4, steps)], "{name}: all steps of all rows");
    }
}

#[test]
fn a_matrix_in_few_bits_has_the_bits_of_itself_in_f32() {
    for family in FAMILIES {
        let forms = [
            ("NF4", held(with_adapter(family, base(family)), packed(Scheme::Nf4))),
            ("int8", held(with_adapter(family, base(family)), packed(Scheme::Int8))),
            ("bf16", held(with_adapter(family, base(family)), in_type(DType::BF16))),
            ("f16", held(base(family), in_type(DType::F16))),
        ];
        for (name, [held, decoded]) in forms {
            let tokens = text(40, 5);
            for parts in PARTS {
                let [mut got, mut want] = [Vec::new(), Vec::new()];
                read(&held, &tokens, parts, &mut |_, logits| got.push(bits(&logits)));
                read(&decoded, &tokens, parts, &mut |_, logits| want.push(bits(&logits)));
                assert!(got == want, "{family}, {name}, in parts of {parts:?}");
            }
        }
    }
}

/// The short vector and what turns of the keys, of each token and layer; nothing of single heads.
#[test]
fn a_cache_holds_nothing_of_single_heads() {
    for (name, model) in FAMILIES.into_iter().flat_map(kinds) {
        let sizes = model.config.latent.expect("latent attention");
        let of_token = model.config.layers.len() * (sizes.rank + sizes.turned) * 4;
        let of_heads = model.config.layers.len() * model.config.heads * (sizes.plain + sizes.turned + sizes.value) * 4;
        assert!(4 * of_token < of_heads, "{name}: {of_token} bytes against {of_heads}");
        let mut cache = KeyValueCache::default();
        for (more, places) in [(20, 64), (43, 64), (1, 64), (1, 96)] {
            model.read(&text(more, 3), &mut cache).expect("logits");
            assert_eq!(cache.bytes(), places * of_token, "{name}: {} tokens", cache.tokens().len());
            assert_eq!(model.row_bytes(cache.tokens().len()), cache.bytes(), "{name}");
        }
    }
}

/// Where keys and values of all heads at once would take too much memory.
#[test]
fn some_heads_at_a_time_are_as_all_together() {
    for (name, model) in FAMILIES.into_iter().flat_map(kinds) {
        let (tokens, trained) = (text(9, 5), [false; 9]);
        let batch = Batch { rows: vec![BatchRow { id: 0, tokens: &tokens, trained: &trained }] };
        let context = model.context(&batch, None);
        let latent = latent(&model, 1);
        let (heads, sizes) = (latent.heads, latent.sizes);
        let normal = |seed, count| Stream::new(seed, 9, 0, 0).normal(count, 1.0);
        let matrix =
            |seed, width| Tensor::<2>::from_data(TensorData::new(normal(seed, 9 * width), [9, width]), &Device::flex());
        let q = matrix(1, heads * (sizes.plain + sizes.turned)).reshape([9, heads, sizes.plain + sizes.turned]);
        let short = [matrix(2, sizes.rank), matrix(3, sizes.turned)];
        let of = |some: std::ops::Range<usize>| {
            expanded(latent, some.clone(), q.clone().narrow(1, some.start, some.len()), short.clone(), &context)
        };
        let all = data(of(0..heads)).expect("values");
        let parts = data(Tensor::cat(vec![of(0..1), of(1..3), of(3..heads)], 1)).expect("values");
        let difference = largest_difference(&all, &parts);
        assert!(all.iter().any(|value| value.abs() > 0.1) && difference < 1e-5, "{name}: {difference:e}");
    }
}
