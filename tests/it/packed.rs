//! Packed bases that do not add up: `validate` ends with 2, and names the tensor. Those that look odd
//! and are right: it ends with 0. The bases are those of `scripts/make_packed_goldens.py`.

use std::borrow::Cow;
use std::path::PathBuf;

use finetune_store::{Dtype, TensorFile, encode_tensors};
use serde_json::{Value, json};

use crate::folder::{Folder, repository};
use crate::program::Ended;

const RECIPE: &str = r#"output_dir = "run"
[model]
path = "model"
device = "cpu"
[data]
train = "train.jsonl"
format = "tokens"
[train]
max_steps = 1
global_batch_size = 4
"#;

const QUERY: &str = "model.layers.0.self_attn.q_proj";

type Tensor = (String, Dtype, Vec<usize>, Cow<'static, [u8]>);

/// A packed base, taken apart to be changed.
struct Base {
    config: Value,
    tensors: Vec<Tensor>,
}

fn case(name: &str) -> PathBuf {
    repository().join("tests/goldens/packed").join(name)
}

impl Base {
    fn of(name: &str) -> Base {
        let text = std::fs::read_to_string(case(name).join("config.json")).expect("a golden config");
        let file = TensorFile::open(&case(name).join("model.safetensors")).expect("golden weights");
        let tensor = |name: &str| -> Tensor {
            let view = file.get(name).expect("a tensor of the file");
            (name.to_owned(), view.dtype, view.shape.to_vec(), view.bytes().expect("its bytes").into())
        };
        Base { config: serde_json::from_str(&text).expect("JSON"), tensors: file.names().map(tensor).collect() }
    }

    /// A tensor of the first layer's query projection.
    fn part(&mut self, end: &str) -> &mut Tensor {
        let name = format!("{QUERY}{end}");
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap_or_else(|| panic!("{name}"))
    }

    fn without(&mut self, end: &str) {
        let name = format!("{QUERY}{end}");
        self.tensors.retain(|tensor| tensor.0 != name);
    }

    fn with(&mut self, end: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.tensors.push((format!("{QUERY}{end}"), dtype, shape.to_vec(), bytes.into()));
        self.tensors.sort_by(|a, b| a.0.cmp(&b.0));
    }

    /// Puts bytes at the begin of a tensor.
    fn put(&mut self, end: &str, bytes: &[u8]) {
        self.part(end).3.to_mut()[..bytes.len()].copy_from_slice(bytes);
    }

    /// One row more, a copy of the first.
    fn longer(&mut self, end: &str) {
        let (_, _, shape, bytes) = self.part(end);
        let row = bytes.len() / shape[0];
        let first = bytes[..row].to_vec();
        bytes.to_mut().extend(first);
        shape[0] += 1;
    }

    /// One row less.
    fn shorter(&mut self, end: &str) {
        let (_, _, shape, bytes) = self.part(end);
        let row = bytes.len() / shape[0];
        let left = bytes.len() - row;
        bytes.to_mut().truncate(left);
        shape[0] -= 1;
    }

    /// `finetune validate` of a recipe over it.
    fn validate(&self, name: &str) -> Ended {
        let folder = Folder::empty();
        std::fs::create_dir(folder.path("model")).expect("a new directory");
        folder.write("model/config.json", self.config.to_string().as_bytes());
        let weights = encode_tensors(&self.tensors, &Default::default()).expect("tensors");
        folder.write("model/model.safetensors", &weights);
        let golden: Value =
            serde_json::from_str(&std::fs::read_to_string(case(name).join("golden.json")).expect("a golden file"))
                .expect("JSON");
        let base = golden["base"].as_str().expect("a base");
        let rows = std::fs::read(case("bases").join(base).join("rows.jsonl")).expect("rows");
        folder.write("train.jsonl", &rows);
        folder.write("recipe.toml", RECIPE.as_bytes());
        folder.finetune(&["validate", "recipe.toml"])
    }
}

/// What is changed, of which base, how, and which words are said beside the name of the projection.
type Refused = (&'static str, &'static str, fn(&mut Base), &'static [&'static str]);

const NAN: [u8; 4] = f32::NAN.to_le_bytes();
const INFINITY: [u8; 4] = f32::INFINITY.to_le_bytes();

const REFUSED: [Refused; 20] = [
    // Sizes.
    ("codes cut short", "nf4", |base| base.shorter(".weight"), &["q_proj.weight"]),
    ("codes cut short", "mlx4", |base| base.shorter(".weight"), &["q_proj.weight"]),
    ("codes cut short", "gptq", |base| base.shorter(".qweight"), &["q_proj.qweight"]),
    ("scales of another matrix", "mlx8", |base| base.longer(".scales"), &["q_proj.scales"]),
    ("scales of another matrix", "nf4", |base| base.longer(".weight.absmax"), &["q_proj.weight.absmax"]),
    ("scales of another matrix", "fp8_blocks", |base| base.longer(".weight_scale_inv"), &["q_proj.weight_scale_inv"]),
    ("zero points of another matrix", "awq", |base| base.shorter(".qzeros"), &["q_proj.qzeros"]),
    ("a group for each column but one", "gptq_act_order", |base| base.shorter(".g_idx"), &["q_proj.g_idx"]),
    // Parts.
    ("no scales", "nf4", |base| base.without(".weight.absmax"), &["q_proj.weight.absmax", "missing"]),
    ("no biases", "mlx4", |base| base.without(".biases"), &["q_proj.biases", "missing"]),
    ("no scales", "int8", |base| base.without(".SCB"), &["q_proj"]),
    ("no shape", "compressed_int4", |base| base.without(".weight_shape"), &["q_proj"]),
    (
        "scales of two formats",
        "nf4",
        |base| base.with(".biases", Dtype::F32, &[64, 1], vec![0; 256]),
        &["q_proj", "two formats"],
    ),
    (
        "packed and in floats",
        "gptq",
        |base| base.with(".weight", Dtype::F16, &[64, 64], vec![0; 8192]),
        &["q_proj", "twice"],
    ),
    // Numbers.
    ("a scale that is no number", "nf4", |base| base.put(".weight.absmax", &NAN), &["q_proj.weight.absmax"]),
    ("an infinite scale", "int8", |base| base.put(".SCB", &INFINITY), &["q_proj.SCB"]),
    ("a bias that is no number", "mlx4", |base| base.put(".biases", &NAN[2..]), &["q_proj.biases"]),
    ("a code that is no number", "fp8_channels", |base| base.put(".weight", &[0x7f]), &["q_proj.weight"]),
    ("a group that is not there", "gptq_act_order", |base| base.put(".g_idx", &[9, 0, 0, 0]), &["q_proj.g_idx"]),
    // config.json against the tensors.
    (
        "another group size",
        "mlx_mixed",
        |base| base.config["quantization"][QUERY] = json!({"group_size": 64, "bits": 4}),
        &["q_proj", "config.json says"],
    ),
];

#[test]
fn packed_bases_that_do_not_add_up() {
    for (what, name, change, told) in REFUSED {
        let mut base = Base::of(name);
        change(&mut base);
        let ended = base.validate(name);
        assert_eq!(ended.code, Some(2), "{what} of {name}: {ended:?}");
        for words in told {
            assert!(ended.stderr.contains(words), "{what} of {name}: stderr lacks {words:?}:\n{}", ended.stderr);
        }
        assert!(!ended.stderr.contains("bug in finetune"), "{what} of {name}:\n{}", ended.stderr);
    }
}

#[test]
fn packed_bases_as_they_are_and_with_odd_numbers() {
    let whole = [
        "nf4",
        "nf4_double",
        "fp4",
        "int8",
        "mlx4",
        "mlx8",
        "mlx3",
        "mlx_mixed",
        "mlx_experts",
        "mxfp4",
        "mlx_lfm2_moe",
        "mlx_gemma4_moe",
        "fp8_deepseek_v3",
        "int4_kimi_k2",
    ];
    let more = ["fp8_blocks", "fp8_channels", "compressed_int4", "gptq", "gptq_act_order", "awq"];
    for name in whole.iter().chain(&more) {
        Base::of(name).validate(name).expect(0);
    }
    // A group of zeros has scale 0; MLX's scales are negative as often as not.
    let odd: [Refused; 4] = [
        ("a scale of 0", "nf4", |base| base.put(".weight.absmax", &[0; 4]), &[]),
        ("a row of zeros", "int8", |base| base.put(".SCB", &[0; 4]), &[]),
        ("a scale of 0", "mlx4", |base| base.put(".scales", &[0; 2]), &[]),
        ("a negative scale", "mlx4", |base| base.put(".scales", &[0x00, 0xbf]), &[]),
    ];
    for (what, name, change, _) in odd {
        let mut base = Base::of(name);
        change(&mut base);
        let ended = base.validate(name);
        assert_eq!(ended.code, Some(0), "{what} of {name}: {ended:?}");
    }
}

/// A GGUF file that ends early, and one whose tensor has a type that nobody knows.
#[test]
fn damaged_gguf_bases() {
    let whole = std::fs::read(case("gguf_q4_1").join("model.gguf")).expect("a golden file");
    let folder = Folder::empty();
    folder.write("train.jsonl", &std::fs::read(case("bases/llama").join("rows.jsonl")).expect("rows"));
    folder.write("recipe.toml", RECIPE.replace("\"model\"", "\"model.gguf\"").as_bytes());
    folder.write("model.gguf", &whole);
    folder.finetune(&["validate", "recipe.toml"]).expect(0);
    for length in [3, 20, 400, whole.len() / 2, whole.len() - 1] {
        folder.write("model.gguf", &whole[..length]);
        folder.finetune(&["validate", "recipe.toml"]).expect(2).says("model.gguf");
    }
    let name = b"blk.0.attn_q.weight";
    let place = whole.windows(name.len()).position(|bytes| bytes == name).expect("the tensor's name");
    // Behind the name: the number of dimensions (4 bytes), two lengths (8 each), the type (4).
    let kind = place + name.len() + 4 + 2 * 8;
    let mut damaged = whole;
    damaged[kind..kind + 4].copy_from_slice(&[99, 0, 0, 0]);
    folder.write("model.gguf", &damaged);
    folder.finetune(&["validate", "recipe.toml"]).expect(2).says("blk.0.attn_q.weight");
}
