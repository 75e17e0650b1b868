//! The figures in the recipes of real models are those of the estimate. The shapes are those of the
//! models' config.json on the hub, kept in `tests/goldens/configs`.

use std::path::{Path, PathBuf};

use finetune_model::{FloatType, ModelConfig, PackedSizes, choose};
use finetune_recipe::Recipe;

use super::{Precision, Sizes, StepShape, estimate, sizes};
use crate::limits;

/// Hub id, the file of its config, and the parameters that the hub counts.
const MODELS: [(&str, &str, u64); 14] = [
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m", 134_515_008),
    ("HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2-360m", 361_821_120),
    ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "smollm2-1.7b", 1_711_376_384),
    ("HuggingFaceTB/SmolLM3-3B", "smollm3-3b", 3_075_098_624),
    ("google/gemma-3-270m-it", "gemma-3-270m", 268_098_176),
    ("google/gemma-3-1b-it", "gemma-3-1b", 999_885_952),
    ("Qwen/Qwen3-0.6B", "qwen3-0.6b", 596_049_920),
    ("Qwen/Qwen3-1.7B", "qwen3-1.7b", 1_720_574_976),
    ("Qwen/Qwen3-4B", "qwen3-4b", 4_022_468_096),
    ("Qwen/Qwen3-8B", "qwen3-8b", 8_190_735_360),
    ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b", 30_532_122_624),
    ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b", 1_235_814_400),
    ("meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b", 3_212_749_824),
    ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b", 7_248_023_552),
];

/// Operations per second of two cores. On a server's Xeon `matmul_rate` measured 58 to 305 billion,
/// by the load of the machine.
const RATE: f64 = 100e9;

/// How far a figure may be from the estimate.
const TOLERANCE: f64 = 0.02;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn config(name: &str) -> ModelConfig {
    let path = repository().join(format!("tests/goldens/configs/{name}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    ModelConfig::parse(&text, &path).unwrap_or_else(|error| panic!("{error}"))
}

/// GiB on a GPU in bf16, GiB on the CPU, hours for a million tokens: a full micro-batch of the
/// longest rows, in which every token is trained on.
fn figures(recipe: &Recipe) -> [f64; 3] {
    let hub_id = recipe.model.hub_id().expect("a hub id");
    let (_, name, _) = MODELS.iter().find(|(id, ..)| *id == hub_id).unwrap_or_else(|| panic!("no config of {hub_id}"));
    let config = config(name);
    let adaptation = choose(&recipe.lora, &config).unwrap_or_else(|error| panic!("{error}"));
    let targets = &adaptation.targets;
    limits::check(recipe).and_then(|()| limits::check_targets(targets)).unwrap_or_else(|error| panic!("{error}"));
    let longest = recipe.data.max_seq_len as u64;
    let tokens = longest * recipe.train.micro_batch_size as u64;
    let checkpointing = recipe.train.gradient_checkpointing;
    let step = StepShape {
        tokens,
        longest,
        trained_tokens: tokens,
        at_once: 1,
        held_layers: None,
        checkpointing,
        full: false,
        shares: 1,
        alone: false,
        rows: 0,
        answers: false,
    };
    let gibibytes = |cpu, compute| {
        let packed = PackedSizes::default();
        let precision =
            Precision { cpu, compute, held: FloatType::BF16, packed, loading: 0, by_row: 0, on_disk: 0, threads: 2 };
        estimate(&config, Some(&adaptation), &step, precision).total as f64 / f64::from(1 << 30)
    };
    let Sizes { parameters, .. } = sizes(&config, None);
    let active = parameters - config.idle_parameters();
    let hours = 1e6 * active as f64 * 4.0 / RATE / 3600.0;
    [gibibytes(false, FloatType::BF16), gibibytes(true, FloatType::F32), hours]
}

/// A figure as the recipes write it.
fn written(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { format!("{value:.1}") }
}

/// What a recipe's comment says of memory and time, and the words of it.
fn lines([gpu, cpu, hours]: [String; 3], recipe: &Recipe) -> String {
    let rows = recipe.train.micro_batch_size;
    let plural = if rows == 1 { "" } else { "s" };
    format!(
        "# memory: {gpu} GiB on a GPU, {cpu} GiB on the CPU, for {rows} row{plural} of 2,048 tokens at once\n\
         # time: {hours} h on two CPU cores for a million tokens\n"
    )
}

/// The numbers of the two lines, as they are written.
fn parse(text: &str) -> Option<[String; 3]> {
    let after = |start: &str| text.lines().find_map(|line| line.strip_prefix(start));
    let mut memory = after("# memory: ")?.split(", ").map(|part| part.split(' ').next().unwrap_or_default().to_owned());
    Some([memory.next()?, memory.next()?, after("# time: ")?.split(' ').next()?.to_owned()])
}

#[test]
fn configs_have_the_parameters_that_the_hub_counts() {
    for (hub_id, name, parameters) in MODELS {
        assert_eq!(sizes(&config(name), None).parameters, parameters, "{hub_id}");
    }
}

/// Prints what each recipe and the table of README.md should say if one says something else.
#[test]
fn recipes_of_real_models_say_what_is_estimated() {
    let folder = repository().join("recipes/models");
    let page = std::fs::read_to_string(folder.join("README.md")).expect("recipes/models/README.md");
    let entries = std::fs::read_dir(&folder).expect("recipes");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    let mut wrong = String::new();
    for path in &files {
        let recipe = Recipe::load(path, &[], None).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(recipe.data.max_seq_len, 2048, "{}: the comment says so", path.display());
        let figures = figures(&recipe);
        let text = std::fs::read_to_string(path).expect("a recipe");
        let said = parse(&text).unwrap_or_default();
        let close = |(said, value): (&String, f64)| {
            said.parse::<f64>().is_ok_and(|said| (said - value).abs() <= value * TOLERANCE)
        };
        let name = path.file_name().expect("a name").to_string_lossy();
        let row = |[gpu, cpu, hours]: &[String; 3]| {
            let (recipe, id) = (format!("[{name}]({name})"), recipe.model.path.as_str());
            format!("| {recipe} | {id} | {gpu} | {cpu} | {hours} |")
        };
        let right = text.contains(&lines(said.clone(), &recipe)) && page.contains(&row(&said));
        if !right || !said.iter().zip(figures).all(close) {
            let figures = figures.map(written);
            wrong += &format!("{name}\n{}{}\n", lines(figures.clone(), &recipe), row(&figures));
        }
    }
    assert!(wrong.is_empty(), "what recipes and README.md should say:\n{wrong}");
    assert!(files.len() > MODELS.len(), "one recipe for each model, and one for two Macs");
}
