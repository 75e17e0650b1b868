//! What the tests against golden files share: where the files are, how they are read, where the
//! models are placed, and how far results may be from the reference.
#![allow(dead_code, reason = "each test file takes what it needs")]

pub(crate) mod families;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use finetune_model::{Batch, BatchRow, FloatType, FoundDevice, Model, Placement, Randomness, Sampling, gpus};
use finetune_store::TensorFile;
use serde_json::Value;

/// Largest difference of logits: ten times the reference's own f32 noise.
pub(crate) const LOGITS: f32 = 3e-5;
/// Largest difference of gradients, of their norm.
pub(crate) const GRADIENTS: f64 = 2e-5;
/// For passes without dropout.
pub(crate) const ANY: Randomness = Randomness { seed: 0, step: 0 };

/// The tokens of each row, and which of them are trained on.
pub(crate) type Rows = Vec<(Vec<u32>, Vec<bool>)>;

/// The folder of all golden files.
pub(crate) fn goldens() -> PathBuf {
    // The variable is read at run time, because the tests also travel to machines with a GPU.
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned());
    Path::new(&here).join("../../tests/goldens")
}

/// A golden model.
pub(crate) fn directory(family: &str) -> PathBuf {
    goldens().join("models").join(family)
}

pub(crate) fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).expect("a golden file")).expect("JSON")
}

/// The rows that a golden.json was made with.
pub(crate) fn rows(golden: &Value) -> Rows {
    let numbers = |value: &Value| {
        value.as_array().expect("a list").iter().map(|n| n.as_i64().expect("a number")).collect::<Vec<_>>()
    };
    let rows = golden["rows"].as_array().expect("rows").iter().map(|row| {
        let tokens = numbers(&row["input_ids"]).iter().map(|&id| id as u32).collect();
        let trained = numbers(&row["labels"]).iter().map(|&label| label != -100).collect();
        (tokens, trained)
    });
    rows.collect()
}

pub(crate) fn floats(file: &TensorFile, name: &str) -> Vec<f32> {
    let view = file.get(name).unwrap_or_else(|| panic!("{name} in the golden file"));
    let bytes = view.bytes().expect("the file is whole");
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

pub(crate) fn batch(rows: &[(Vec<u32>, Vec<bool>)]) -> Batch<'_> {
    let rows = rows.iter().enumerate();
    Batch { rows: rows.map(|(id, (tokens, trained))| BatchRow { id: id as u32, tokens, trained }).collect() }
}

/// The CPU. With `FINETUNE_TEST_DEVICE=gpu` it is the first GPU in f32, or a software renderer if
/// there is no GPU.
pub(crate) fn placement() -> Placement {
    gpu().map_or_else(|| Placement::cpu(None), |gpu| Placement::gpu(gpu.device, FloatType::F32))
}

pub(crate) fn gpu() -> Option<FoundDevice> {
    static GPU: OnceLock<Option<FoundDevice>> = OnceLock::new();
    let asked = || std::env::var("FINETUNE_TEST_DEVICE").as_deref() == Ok("gpu");
    GPU.get_or_init(|| asked().then(|| gpus(true).into_iter().next().expect("a GPU, or a software renderer"))).clone()
}

pub(crate) const PROMPT: [u32; 7] = [5, 17, 42, 9, 33, 8, 61];

/// Greedy tokens after [`PROMPT`]. With a cache, each step must see what one pass over the whole row sees.
pub(crate) fn greedy_as_in_whole_passes(name: &str, model: &Model, tokens: usize) -> Vec<u32> {
    let got = model.generate(&PROMPT, tokens, Sampling::GREEDY, &[], &mut |_| {}).expect("a generation").tokens;
    let mut row = PROMPT.to_vec();
    for (n, &token) in got.iter().enumerate() {
        let logits = model.logits(&row).expect("logits");
        let last = &logits[logits.len() - model.config.vocabulary..];
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).expect("a vocabulary") as u32;
        assert_eq!(token, best, "{name}: token {n} of {got:?}");
        row.push(token);
    }
    got
}

pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "lengths");
    // `f32::max` would drop NaN.
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |max, difference| if max.is_nan() || difference <= max { max } else { difference })
}

pub(crate) fn relative_norm(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "lengths");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(a - b))) / norm(&mut want.iter().map(|&v| f64::from(v)))
}
