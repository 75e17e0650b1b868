//! Packed bases against the programs that packed them (`scripts/make_packed_goldens.py` made the
//! files), and against the same bases decoded beforehand. Bounds are those of `goldens.rs`. Single
//! values are compared in `finetune-packed`.
//!
//! The reference decoded the weights to f32 and computed in f32. That is what the CPU does. Bits are
//! compared on the CPU only: a GPU decodes to the type that it computes in.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use finetune_model::adapter::Adapter;
use finetune_model::{Backward, Batch, Coefficients, Model, ModelConfig, Placement, Scheme, expected_tensors};
use finetune_packed::files::{PackedConfig, find, told_shape};
use finetune_packed::{PackedMatrix, Stored, quantize};
use finetune_store::{Dtype, TensorFile, TensorSet, TensorView};
use half::{bf16, f16};
use serde_json::Value;

mod golden;
mod made;

use golden::{
    ANY, GRADIENTS, LOGITS, Rows, batch, floats, goldens, gpu, greedy_as_in_whole_passes, json, largest_difference,
    placement, relative_norm, rows,
};

/// Makes one test of a check for each case, `CHECK::CASE`. The second form names the cases.
macro_rules! of_each_case {
    ($check:ident) => {
        of_each_case!($check: nf4 nf4_double fp4 int8 mlx4 mlx8 mlx3 mlx_mixed mlx_experts mxfp4 fp8_blocks fp8_channels
            fp8_deepseek_v3 compressed_int4 int4_kimi_k2 mlx_lfm2_moe mlx_gemma4_moe gptq gptq_act_order awq gguf_q4_1
            gguf_k);
    };
    ($check:ident: $($case:ident)+) => {
        mod $check {
            $(
                #[test]
                fn $case() {
                    super::$check(stringify!($case));
                }
            )+
        }
    };
}

struct Case {
    name: &'static str,
    directory: PathBuf,
    base: PathBuf,
    golden: Value,
    tensors: TensorFile,
    rows: Rows,
}

impl Case {
    fn load(name: &'static str) -> Case {
        let packed = goldens().join("packed");
        let directory = packed.join(name);
        let golden = json(&directory.join("golden.json"));
        let base = packed.join("bases").join(golden["base"].as_str().expect("a base"));
        let tensors = TensorFile::open(&directory.join("golden.safetensors")).expect("golden.safetensors");
        let rows = rows(&json(&base.join("rows.json")));
        Case { name, directory, base, golden, tensors, rows }
    }

    /// What `model.path` of a recipe says.
    fn path(&self) -> PathBuf {
        if self.name.starts_with("gguf") { self.directory.join("model.gguf") } else { self.directory.clone() }
    }

    fn batch(&self) -> Batch<'_> {
        batch(&self.rows)
    }

    /// The golden adapter over the packed base, or over another form of it.
    fn with_adapter(&self, path: &Path, placement: &Placement) -> Model {
        let mut model = Model::load(path, placement).unwrap_or_else(|error| panic!("{}: {error}", self.name));
        let adapter = Adapter::read(&self.base.join("adapter"), &model.config).expect("the adapter loads");
        model.attach(&adapter).expect("attached");
        model
    }

    /// The packed matrices that the golden names, read from the directory.
    fn matrices(&self) -> Vec<(String, PackedMatrix)> {
        let files = Files::open(&self.directory);
        let named = self.golden["packed"].as_object().expect("matrices");
        let read = |(name, about): (&String, &Value)| {
            let shape = [0, 1].map(|n| about["shape"][n].as_u64().expect("a length") as usize);
            (name.clone(), files.packed(name, shape).unwrap_or_else(|| panic!("{}: {name} is packed", self.name)))
        };
        named.iter().map(read).collect()
    }
}

/// The opened files of a directory, as the model opens them.
struct Files {
    set: TensorSet,
    config: PackedConfig,
}

impl Files {
    fn open(directory: &Path) -> Files {
        let config = directory.join("config.json");
        let object = json(&config).as_object().expect("an object").clone();
        let config = PackedConfig::parse(&object, &config).expect("a config of packed weights");
        Files { set: TensorSet::open_model(directory).expect("safetensors"), config }
    }

    /// `None`: the matrix is not packed.
    fn packed(&self, name: &str, shape: [usize; 2]) -> Option<PackedMatrix> {
        let found = find(&self.set, &self.config, name, shape).unwrap_or_else(|error| panic!("{error}"))?;
        Some(found.read().unwrap_or_else(|error| panic!("{error}")))
    }
}

/// All values by their definition.
fn values(matrix: &PackedMatrix) -> Vec<f32> {
    let [rows, columns] = matrix.shape;
    (0..rows * columns).map(|n| matrix.value(n / columns, n % columns)).collect()
}

/// The numbers of a tensor that is not packed.
fn plain(view: &TensorView) -> Vec<f32> {
    let bytes = view.bytes().expect("its bytes");
    match view.dtype {
        Dtype::F32 => made::floats(&bytes),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        other => panic!("{}: {other:?}", view.name),
    }
}

/// The same base in f32, every packed matrix decoded by the definition of its values.
fn decoded(directory: &Path) -> tempfile::TempDir {
    let files = Files::open(directory);
    let config = ModelConfig::load(directory).expect("a config");
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let packed = <[usize; 2]>::try_from(shape.as_slice()).ok().and_then(|shape| files.packed(&name, shape));
        let numbers = match packed {
            Some(matrix) => values(&matrix),
            None => plain(&files.set.get(&name).unwrap_or_else(|| panic!("{name} in the files"))),
        };
        (name, Dtype::F32, shape, made::f32s(&numbers))
    };
    let tensors: Vec<made::Tensor> = expected_tensors(&config).into_iter().map(tensor).collect();
    let mut config = json(&directory.join("config.json"));
    for key in ["quantization", "quantization_config", "dtype", "torch_dtype"] {
        config.as_object_mut().expect("an object").remove(key);
    }
    let output = tempfile::tempdir().expect("a directory");
    made::write(&output.path().join("config.json"), config.to_string());
    made::write_tensors(&output.path().join("model.safetensors"), &tensors);
    output
}

fn gradients(model: &mut Model, batch: &Batch, checkpointing: bool) -> (f64, Vec<f32>) {
    let mut gradients = vec![0.0; model.layout().len()];
    let backward = Backward { randomness: ANY, checkpointing, loss_scale: 1.0, coefficients: Coefficients::Ones };
    let sums = model.loss_and_gradients(batch, backward, &mut gradients).expect("a device that works");
    (sums.loss, gradients)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn logits_loss_and_every_gradient(name: &'static str) {
    let case = Case::load(name);
    let mut model = case.with_adapter(&case.path(), &placement());
    for (n, (tokens, _)) in case.rows.iter().enumerate() {
        let got = model.logits(tokens).expect("tokens of the vocabulary");
        let difference = largest_difference(&got, &floats(&case.tensors, &format!("logits.{n}")));
        assert!(difference < LOGITS, "{name} logits.{n}: {difference:e}");
    }
    let want = &case.golden["micro_batch"];
    let loss = want["loss_sum"].as_f64().expect("a loss");
    let tokens = want["trained_tokens"].as_u64().expect("a count") as f32;
    let (got_loss, got) = gradients(&mut model, &case.batch(), false);
    assert!((got_loss - loss).abs() < 1e-6 * loss, "{name}: loss {got_loss} against {loss}");
    let evaluated = model.loss(&case.batch()).expect("sums").loss;
    assert!((evaluated - loss).abs() < 1e-6 * loss, "{name}: evaluation {evaluated} against {loss}");
    let mut found = BTreeSet::new();
    for parameter in model.layout().iter() {
        // The reference differentiates the mean.
        let got: Vec<f32> = got[parameter.range.clone()].iter().map(|g| g / tokens).collect();
        let name_of_golden = format!("grad.{}", parameter.name);
        let difference = relative_norm(&got, &floats(&case.tensors, &name_of_golden));
        assert!(difference < GRADIENTS, "{name} {}: {difference:e}", parameter.name);
        found.insert(name_of_golden);
    }
    let expected: BTreeSet<String> =
        case.tensors.names().filter(|name| name.starts_with("grad.")).map(str::to_owned).collect();
    assert_eq!(found, expected, "{name}");
}

of_each_case!(logits_loss_and_every_gradient);

/// Five steps of plain descent, whose losses and last values show any other bit on the way.
fn five_steps(model: &mut Model, batch: &Batch) -> (Vec<f64>, Vec<f32>) {
    let mut values = model.parameters().expect("values");
    let mut losses = Vec::new();
    for _ in 0..5 {
        let (loss, gradients) = gradients(model, batch, false);
        losses.push(loss);
        values.iter_mut().zip(&gradients).for_each(|(value, gradient)| *value -= 1e-3 * gradient);
        model.set_parameters(&values);
    }
    (losses, values)
}

/// The same losses, gradients and adapters as over the base that was decoded to f32 beforehand.
fn packed_equals_decoded(name: &'static str) {
    if gpu().is_some() {
        return;
    }
    let case = Case::load(name);
    let plain = decoded(&case.directory);
    let mut packed = case.with_adapter(&case.path(), &placement());
    let mut dense = case.with_adapter(plain.path(), &placement());
    for (n, (tokens, _)) in case.rows.iter().enumerate() {
        let [a, b] = [&packed, &dense].map(|model| model.logits(tokens).expect("logits"));
        assert!(bits(&a) == bits(&b), "{name} logits of row {n}: {:e}", largest_difference(&a, &b));
    }
    let (a, b) = (gradients(&mut packed, &case.batch(), false), gradients(&mut dense, &case.batch(), false));
    assert_eq!(a.0.to_bits(), b.0.to_bits(), "{name}: loss {} against {}", a.0, b.0);
    assert!(bits(&a.1) == bits(&b.1), "{name}: gradients {:e}", relative_norm(&a.1, &b.1));
    let [a, b] = [&mut packed, &mut dense].map(|model| five_steps(model, &case.batch()));
    assert_eq!(a.0, b.0, "{name}: losses of five steps");
    assert!(a.0[4] < a.0[0], "{name}: nothing was learned: {:?}", a.0);
    assert!(bits(&a.1) == bits(&b.1), "{name}: the adapter after five steps");
}

of_each_case!(packed_equals_decoded: nf4 nf4_double fp4 int8 mlx4 mlx8 mlx3 mlx_mixed mxfp4 fp8_blocks fp8_channels
    fp8_deepseek_v3 compressed_int4 int4_kimi_k2 gptq gptq_act_order awq);

fn checkpointing_changes_no_bit(name: &'static str) {
    let case = Case::load(name);
    let mut model = case.with_adapter(&case.path(), &placement());
    let plain = gradients(&mut model, &case.batch(), false);
    let again = gradients(&mut model, &case.batch(), true);
    assert_eq!(plain.0, again.0, "{name}");
    assert!(bits(&plain.1) == bits(&again.1), "{name}: {}", relative_norm(&again.1, &plain.1));
}

of_each_case!(checkpointing_changes_no_bit);

/// Codes and scales of a matrix that is quantized here, those of the reference's file, and the bits of
/// what is computed with them.
fn quantized_while_loading(name: &'static str) {
    let scheme = match name {
        "nf4" => Scheme::Nf4,
        "int8" => Scheme::Int8,
        "mlx4" => Scheme::Mlx4,
        "mlx8" => Scheme::Mlx8,
        _ => Scheme::Mxfp4,
    };
    let case = Case::load(name);
    let original = TensorSet::open_model(&case.base).expect("the 16-bit base");
    for (matrix_name, want) in case.matrices() {
        let view = original.get(&matrix_name).expect("the matrix in 16 bits");
        let got = quantize(scheme, &plain(&view), want.shape, Stored::BF16).expect("quantized");
        let [rows, columns] = want.shape;
        let codes = |matrix: &PackedMatrix| -> Vec<u32> {
            (0..rows * columns).map(|n| matrix.codes.code(n / columns, n % columns)).collect()
        };
        assert!(codes(&got) == codes(&want), "{name} {matrix_name}: codes");
        let scales = |matrix: &PackedMatrix| -> Vec<f32> {
            (0..matrix.groups.count(matrix.shape)).map(|n| matrix.scales.get(n)).collect()
        };
        assert!(bits(&scales(&got)) == bits(&scales(&want)), "{name} {matrix_name}: scales");
        assert!(bits(&values(&got)) == bits(&values(&want)), "{name} {matrix_name}: values");
    }
    let mut theirs = case.with_adapter(&case.directory, &placement());
    let mut ours = case.with_adapter(&case.base, &placement().quantized(Some(scheme)));
    let (a, b) = (gradients(&mut ours, &case.batch(), false), gradients(&mut theirs, &case.batch(), false));
    assert_eq!(a.0.to_bits(), b.0.to_bits(), "{name}: loss {} against {}", a.0, b.0);
    assert!(bits(&a.1) == bits(&b.1), "{name}: gradients {:e}", relative_norm(&a.1, &b.1));
}

of_each_case!(quantized_while_loading: nf4 int8 mlx4 mlx8 mxfp4);

fn greedy_generation_equals_whole_passes(name: &'static str) {
    let case = Case::load(name);
    greedy_as_in_whole_passes(name, &case.with_adapter(&case.path(), &placement()), 8);
}

of_each_case!(greedy_generation_equals_whole_passes: nf4 int8 mlx4 mlx3 mxfp4 fp8_blocks fp8_deepseek_v3
    int4_kimi_k2 mlx_lfm2_moe mlx_gemma4_moe gptq_act_order gguf_k);

/// Which shapes the tensors of a packed matrix tell by themselves: those of bitsandbytes, compressed-tensors and FP8
/// those of all, those of the others none.
fn shapes_that_tensors_tell(case: &'static str) {
    let case = Case::load(case);
    let files = Files::open(&case.directory).set;
    let views = files.names().filter_map(|name| files.get(name));
    let told: BTreeSet<(String, [usize; 2])> = views.filter_map(|view| told_shape(&view).expect("a shape")).collect();
    let tells = ["nf4", "fp4", "int8", "fp8", "int4", "compressed"].iter().any(|form| case.name.starts_with(form));
    let all: BTreeSet<(String, [usize; 2])> =
        case.matrices().into_iter().map(|(name, matrix)| (name, matrix.shape)).filter(|_| tells).collect();
    assert_eq!(told, all, "{}", case.name);
    assert_eq!(tells, !told.is_empty(), "{}", case.name);
}

of_each_case!(shapes_that_tensors_tell: nf4 nf4_double fp4 int8 mlx4 mxfp4 fp8_blocks fp8_channels
    fp8_deepseek_v3 compressed_int4 int4_kimi_k2 gptq awq);
