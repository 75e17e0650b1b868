//! Bytes of the weights of published models, dense and packed while they are loaded: what the estimate says of files
//! with their shapes, against the formula. The files have holes where numbers are, so that they take no room.

use std::fs::OpenOptions;
use std::path::Path;

use finetune_model::{Adaptation, FloatType, Model, ModelConfig, expected_tensors, scheme_named};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::tests::ONE_SHARE;
use super::{Precision, estimate};

/// A model, by the file of its config in `tests/goldens/configs`.
struct Published {
    config: &'static str,
    parameters: u64,
    /// Elements of the linear layers, without routers and the output layer, and how many of these layers there are.
    linear: (u64, u64),
    /// Elements of the embedding and, unless it is the same matrix, the output layer.
    vocabulary: u64,
}

const MODELS: [Published; 4] = [
    Published {
        config: "smollm2-135m",
        parameters: 134_515_008,
        linear: (106_168_320, 7 * 30),
        vocabulary: 28_311_552,
    },
    Published {
        config: "llama-3.2-1b",
        parameters: 1_235_814_400,
        linear: (973_078_528, 7 * 16),
        vocabulary: 262_668_288,
    },
    Published {
        config: "qwen3-8b",
        parameters: 8_190_735_360,
        linear: (6_945_767_424, 7 * 36),
        vocabulary: 1_244_659_712,
    },
    Published {
        config: "qwen3-30b-a3b",
        parameters: 30_532_122_624,
        linear: (29_896_998_912, (4 + 3 * 128) * 48),
        vocabulary: 622_329_856,
    },
];

/// How the weights are held: their number type, and what matrices are packed in, if in anything.
const FORMS: [(FloatType, Option<&str>); 4] =
    [(FloatType::F32, None), (FloatType::BF16, None), (FloatType::BF16, Some("nf4")), (FloatType::BF16, Some("mlx4"))];

/// The formula.
fn bytes(model: &Published, held: FloatType, packed: Option<&str>) -> u64 {
    let (linear, layers) = model.linear;
    let dense = |elements: u64| elements * if held == FloatType::F32 { 4 } else { 2 };
    match packed {
        // Half a byte each, a scale in f32 for 64 of a layer, and 16 values in f32 for each layer.
        Some("nf4") => dense(model.parameters - linear) + linear / 2 + linear / 64 * 4 + layers * 16 * 4,
        // Half a byte each, a scale and a bias in bf16 for 64. Embedding and output layer are packed too.
        Some("mlx4") => {
            let packed = linear + model.vocabulary;
            dense(model.parameters - packed) + packed / 2 + packed / 64 * (2 + 2)
        }
        _ => dense(model.parameters),
    }
}

/// A directory with the model's config, and a file in bf16 of all its tensors.
#[expect(clippy::disallowed_methods, reason = "a file of the test")]
fn with_holes(name: &str) -> (TempDir, ModelConfig) {
    let directory = tempfile::tempdir().expect("a directory");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../tests/goldens/configs/{name}.json"));
    std::fs::copy(source, directory.path().join("config.json")).expect("a copy of the config");
    let config = ModelConfig::load(directory.path()).unwrap_or_else(|error| panic!("{error}"));
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in expected_tensors(&config) {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}));
    }
    let header = Value::Object(header).to_string();
    let path = directory.path().join("model.safetensors");
    let length = header.len() as u64;
    std::fs::write(&path, [&length.to_le_bytes(), header.as_bytes()].concat()).expect("written");
    let file = OpenOptions::new().write(true).open(&path).expect("the file");
    file.set_len(8 + length + end as u64).expect("a hole");
    (directory, config)
}

#[test]
fn weights_of_published_models_are_those_of_the_formula() {
    for model in &MODELS {
        let (directory, config) = with_holes(model.config);
        for (held, packed) in FORMS {
            let form = Model::form(directory.path(), packed.and_then(scheme_named));
            let form = form.unwrap_or_else(|error| panic!("{error}"));
            let precision = Precision {
                cpu: true,
                compute: FloatType::F32,
                held,
                packed: form.packed,
                loading: form.loading,
                by_row: form.by_row,
                on_disk: 0,
                threads: 2,
            };
            let estimated = estimate(&config, Some(&Adaptation::default()), &ONE_SHARE, precision).weights;
            assert_eq!(estimated, bytes(model, held, packed), "{} in {held:?}, packed: {packed:?}", model.config);
        }
    }
}
