//! Correct recipes: their values, `--set`, paths.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::{CONTRACT, MINIMAL, contract_with_optional_keys, parse, parse_with, seen};
use finetune_recipe::{
    BackendChoice, DtypeChoice, Length, Quantization, Recipe, ScheduleName, TargetModules, TrainOn, Warmup,
};

#[test]
fn the_contracts_example() {
    let recipe = parse(CONTRACT);
    assert_eq!(recipe.output_dir, Path::new("/home/ada/runs/support-bot"));
    assert_eq!(recipe.seed, 42);
    assert_eq!(recipe.model.path, "models/Qwen3-0.6B"); // no such directory here, so it is a hub id
    assert_eq!(recipe.data.train, [PathBuf::from("/home/ada/data/train.jsonl")]);
    assert_eq!(recipe.data.eval, [PathBuf::from("/home/ada/data/valid.jsonl")]);
    assert_eq!(recipe.lora.alpha, 32.0);
    assert_eq!(recipe.lora.target_modules, TargetModules::AllLinear);
    assert_eq!(recipe.data.train_on, TrainOn::Assistant);
    assert_eq!(recipe.train.length, Length::Epochs(1));
    assert_eq!(recipe.optimizer.learning_rate, 2e-4);
    assert_eq!(recipe.schedule.name, ScheduleName::Cosine);
    assert_eq!(recipe.schedule.warmup, Warmup::Steps(0));
    assert_eq!(recipe.distributed.timeout, Duration::from_secs(5));

    let recipe = parse(&contract_with_optional_keys());
    assert_eq!(recipe.model.quantization, Some(Quantization::Nf4));
    assert_eq!(recipe.lora.rank_pattern["model\\.layers\\.0\\..*"], 4);
    assert_eq!(recipe.lora.layers_to_transform, Some(vec![0, 1]));
    assert_eq!(recipe.data.chat_template.as_deref(), Some(Path::new("/home/ada/template.jinja")));
    assert_eq!(recipe.distributed.virtual_ranks, Some(4));
}

/// The example shows the defaults: with nothing but the required keys the recipe is the same.
#[test]
fn the_defaults_are_the_contracts() {
    let example = parse(CONTRACT);
    let mut bare = parse(&format!("{MINIMAL}eval = \"data/valid.jsonl\""));
    assert_eq!(bare.output_dir, Path::new("/home/ada/runs/support-bot"));
    bare.model.path = example.model.path.clone();
    bare.data.train = example.data.train.clone();
    assert_eq!(bare, example);
}

#[test]
fn integers_are_numbers() {
    let recipe = parse(&format!("{MINIMAL}[optimizer]\nbetas = [0, 0.5]\nweight_decay = 0\n[lora]\nalpha = 0x10\n"));
    assert_eq!((recipe.optimizer.betas, recipe.optimizer.weight_decay, recipe.lora.alpha), ([0.0, 0.5], 0.0, 16.0));
}

#[test]
fn targets() {
    let target = |text: &str| parse(&format!("{MINIMAL}[lora]\ntarget_modules = {text}")).lora.target_modules;
    assert_eq!(target("\"all-linear\""), TargetModules::AllLinear);
    assert_eq!(target("[\"q_proj\", \"v_proj\"]"), TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]));
    assert_eq!(target("'.*\\.(q|v)_proj'"), TargetModules::Regex(".*\\.(q|v)_proj".into()));
}

#[test]
fn durations() {
    let timeout = |text: &str| parse(&format!("{MINIMAL}[distributed]\ntimeout = \"{text}\"")).distributed.timeout;
    let times = [("5s", 5_000), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000), ("60 s", 60_000)];
    for (text, milliseconds) in times {
        assert_eq!(timeout(text), Duration::from_millis(milliseconds), "{text}");
    }
}

#[test]
fn paths_are_relative_to_the_recipe() {
    let cases = [
        ("rows.jsonl", "/home/ada/rows.jsonl"),
        ("./data/../rows.jsonl", "/home/ada/rows.jsonl"),
        ("../bob/rows.jsonl", "/home/bob/rows.jsonl"),
        ("/data/rows.jsonl", "/data/rows.jsonl"),
        ("../../../rows.jsonl", "/rows.jsonl"),
    ];
    for (written, expected) in cases {
        let recipe = parse(&format!("[model]\npath = \"gpt2\"\n[data]\ntrain = '{written}'"));
        assert_eq!(recipe.data.train, [PathBuf::from(expected)], "{written}");
    }
    let relative = Recipe::parse(MINIMAL, Path::new("jobs/a.toml"), &[], Some(Path::new("out/./x"))).unwrap();
    assert_eq!(relative.data.train, [PathBuf::from("jobs/rows.jsonl")]);
    assert_eq!(relative.output_dir, Path::new("out/x"), "--output-dir is relative to the current directory");
    let relative = Recipe::parse(MINIMAL, Path::new("a.toml"), &[], None).unwrap();
    assert_eq!((relative.data.train, relative.output_dir), (vec!["rows.jsonl".into()], "runs/a".into()));
}

/// Tests run in the crate's folder, where `src` and `src/kind` exist.
#[test]
fn a_model_is_a_directory_or_a_hub_id() {
    let here = |path: &str| {
        let text = format!("[model]\npath = '{path}'\n[data]\ntrain = 'a'");
        Recipe::parse(&text, Path::new("recipe.toml"), &[], None).unwrap().model
    };
    let cases = [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", true),
        ("gpt2", "gpt2", true),
        ("src", "./src", false),
        ("src/kind", "./src/kind", false),
        ("./Qwen/Qwen3-0.6B", "./Qwen/Qwen3-0.6B", false),
        ("../models/x", "../models/x", false),
        ("/models/x", "/models/x", false),
        ("models/qwen/0.6B", "models/qwen/0.6B", false),
    ];
    for (written, path, is_hub_id) in cases {
        let model = here(written);
        assert_eq!((model.path.as_str(), model.hub_id().is_some()), (path, is_hub_id), "{written}");
    }
}

#[test]
fn set_overrides_the_file() {
    let sets = [
        "lora.rank=8",
        "data.train=other.jsonl",
        "model.dtype=\"bf16\"",
        "train.max_steps=5",
        "distributed.backend = tcp",
    ];
    let recipe = parse_with(CONTRACT, &sets).unwrap();
    assert_eq!(recipe.lora.rank, 8);
    assert_eq!(recipe.data.train, [PathBuf::from("/home/ada/other.jsonl")]);
    assert_eq!(recipe.model.dtype, DtypeChoice::Bf16);
    assert_eq!(recipe.train.length, Length::Steps(5), "epochs of the file give way");
    assert_eq!(recipe.distributed.backend, BackendChoice::Tcp);

    let recipe =
        parse_with(CONTRACT, &["schedule.warmup_ratio=0.1", "schedule.warmup_steps=3", "seed=1", "seed=2"]).unwrap();
    assert_eq!((recipe.schedule.warmup, recipe.seed), (Warmup::Steps(3), 2), "the last one holds");

    let repaired = parse_with(&format!("{MINIMAL}[lora]\nrank = \"x\""), &["lora.rank=4"]).unwrap();
    assert_eq!(repaired.lora.rank, 4, "a wrong value that is replaced does no harm");

    let lists = parse_with(MINIMAL, &["data.eval=[\"a\", \"b\"]", "lora.rank_pattern={ q_proj = 2 }"]).unwrap();
    assert_eq!((lists.data.eval.len(), lists.lora.rank_pattern["q_proj"]), (2, 2));

    // A shell has taken the quotes away. Other brackets are a pattern's.
    let bare = |modules: &str| parse_with(MINIMAL, &["data.eval=[a,b]", modules]).unwrap();
    let recipe = bare("lora.target_modules=[q_proj, v_proj]");
    assert_eq!(recipe.lora.target_modules, TargetModules::Names(vec!["q_proj".to_owned(), "v_proj".to_owned()]));
    assert_eq!(recipe.data.eval, [PathBuf::from("/home/ada/a"), PathBuf::from("/home/ada/b")]);
    let recipe = bare("lora.target_modules=[qv]_proj");
    assert_eq!(recipe.lora.target_modules, TargetModules::Regex("[qv]_proj".to_owned()));
    // Quotes that the shell has left do not belong to the pattern.
    for text in [r"layers\.0\..*", r#""layers\.0\..*""#, r"'layers\.0\..*'"] {
        let pattern = parse_with(MINIMAL, &[&format!("lora.target_modules={text}")]).unwrap();
        assert_eq!(pattern.lora.target_modules, TargetModules::Regex(r"layers\.0\..*".into()), "{text}");
    }

    let file_less = parse_with("", &["model.path=gpt2", "data.train=a.jsonl"]).unwrap();
    assert_eq!(file_less.model.path, "gpt2");
}

#[test]
fn data_sets_of_the_hub_and_patterns_stay_as_they_are_written() {
    let hub = ["hf://acme/rows/train", "hf://acme/rows@v2", "hf://datasets/acme/rows/data/train.parquet"];
    for text in hub {
        let recipe = parse_with(MINIMAL, &[&format!("data.train={text}")]).unwrap();
        assert_eq!(recipe.data.train, [PathBuf::from(text)]);
        assert!(finetune_recipe::is_hub_rows(&recipe.data.train[0]));
        assert!(recipe.to_toml().contains(&format!("train = [\"{text}\"]")), "{}", recipe.to_toml());
    }
    let recipe = parse_with(MINIMAL, &["data.train=[\"data/*.jsonl\", \"hf://acme/rows\"]"]).unwrap();
    assert_eq!(recipe.data.train, [PathBuf::from("/home/ada/data/*.jsonl"), PathBuf::from("hf://acme/rows")]);
}

#[test]
fn columns_are_set_one_by_one_or_all_at_once() {
    let inline = parse(&format!("{MINIMAL}columns = {{ prompt = \"question\", completion = \"answer\" }}\n"));
    let header = parse(&format!("{MINIMAL}[data.columns]\nprompt = \"question\"\ncompletion = \"answer\"\n"));
    let set = parse_with(MINIMAL, &["data.columns.prompt=question", "data.columns.completion=\"answer\""]).unwrap();
    assert_eq!(inline, header);
    assert_eq!(inline, set);
    let changed = parse_with(
        &format!("{MINIMAL}[data.columns]\nprompt = \"question\"\ncompletion = \"answer\"\n"),
        &["data.columns.completion=reply", "lora.rank_pattern.q_proj=2"],
    );
    let changed = changed.unwrap();
    assert_eq!(
        (changed.data.columns["prompt"].as_str(), changed.data.columns["completion"].as_str()),
        ("question", "reply")
    );
    assert_eq!(changed.lora.rank_pattern["q_proj"], 2);
}

#[test]
fn variables_of_the_template_are_set_one_by_one_or_all_at_once() {
    let inline = parse(&format!("{MINIMAL}chat_template_kwargs = {{ enable_thinking = false, effort = \"low\" }}\n"));
    let header = parse(&format!("{MINIMAL}[data.chat_template_kwargs]\nenable_thinking = false\neffort = \"low\"\n"));
    let sets = ["data.chat_template_kwargs.enable_thinking=false", "data.chat_template_kwargs.effort=low"];
    assert_eq!(inline, header);
    assert_eq!(inline, parse_with(MINIMAL, &sets).unwrap());
    let more =
        "chat_template_kwargs = { n = -3, x = 0.5, day = 2026-11-27, list = [1, [\"a\"]], in = { \"é\" = true } }";
    let recipe = parse(&format!("{MINIMAL}{more}\n"));
    let again = parse(&recipe.to_toml());
    assert_eq!(again.data.chat_template_kwargs, recipe.data.chat_template_kwargs);
    let day = &recipe.data.chat_template_kwargs["day"];
    assert_eq!(day, &finetune_recipe::Variable::Text("2026-11-27".to_owned()));
}

#[test]
fn a_share_takes_the_place_of_held_back_files() {
    let recipe = parse_with(CONTRACT, &["data.eval_share=0.1"]).unwrap();
    assert_eq!((recipe.data.eval.len(), recipe.data.eval_share), (0, Some(0.1)));
    let recipe = parse_with(&format!("{MINIMAL}eval_share = 0.1\n"), &["data.eval=rows.jsonl"]).unwrap();
    assert_eq!((recipe.data.eval.len(), recipe.data.eval_share), (1, None));
}

#[test]
fn set_is_checked_like_the_file() {
    let cases = [
        ("lora.rank", "expected key.path=value | for example --set lora.rank=8"),
        ("lora.rank=zero", "expected an integer, found a string"),
        ("lora.rank=0", "`lora.rank` must be at least 1, found 0"),
        ("lora.rnk=8", "unknown key `rnk` in [lora] | did you mean `rank`?"),
        ("rank=8", "unknown key `rank` at the top of the recipe | `rank` belongs in [lora]"),
        ("loar.rank=8", "unknown table [loar] | did you mean [lora]?"),
        ("lora={ rank = 8 }", "[lora] is a table: set its keys one by one | for example --set lora.rank=…"),
        ("data.train=", "`data.train` must not be empty"),
        (
            "data.train=hf://acme",
            "`data.train` names no data set of the hub: an owner and a name are needed | for example \"hf://owner/name\", or \"hf://owner/name/split\"",
        ),
        (
            "data.train=https://huggingface.co/datasets/acme/rows",
            "`data.train` is an address: a path, or a data set of the hub, is meant | write \"hf://acme/rows\"",
        ),
        ("data.eval_share=1", "`data.eval_share` must be above 0 and below 1, found 1"),
        (
            "data.weights=[1.0, 2.0]",
            "`data.weights` has 2, and `data.train` names 1 | one weight for each entry of `train`, in order",
        ),
        ("data.weights=[0]", "`data.weights` must be above 0, found 0"),
        (
            "data.weights=1e3",
            "`data.weights` has 1000, and a row is taken at most 100 times an epoch | weights count: 2.0 takes each row twice an epoch",
        ),
        ("parallel.layers=[]", "`parallel.layers` must have a number"),
        ("parallel.layers=[3, 0]", "`parallel.layers` must be at least 1, found 0"),
        ("parallel.layers=3", "expected a list of integers, found an integer"),
        (
            "parallel.layers=[3, 1]",
            "`parallel.layers` has the layers of 2 ranks, and `parallel.stages` is not 2 | write stages = 2, or one number for each of the stages",
        ),
        ("data.max_rows=0", "`data.max_rows` must be at least 1, found 0"),
        (
            "data.columns=question",
            "expected a table of keys and the names of columns, found a string | for example { prompt = \"question\", completion = \"answer\" }",
        ),
        ("data.columns.promt=question", "`data.columns` has no key `promt` | did you mean `prompt`?"),
        ("data.columns.question=prompt", "`data.columns` has no key `question` | write it as prompt = \"question\""),
        ("data.columns.response=b", "`data.columns` has no key `response` | ours is `completion`"),
        ("data.columns.prompt=1", "expected a string, found an integer | write it in quotes"),
        (
            "schedule.name=cosin",
            "`schedule.name` must be one of \"constant\", \"linear\", \"cosine\", found \"cosin\" | did you mean \"cosine\"?",
        ),
        ("train.lr=1", "unknown key `lr` in [train] | ours is `learning_rate` in [optimizer]"),
    ];
    for (set, expected) in cases {
        assert_eq!(seen(parse_with(MINIMAL, &[set])), format!("--set {set} {expected}"));
    }
}

#[test]
fn variables_of_a_template_are_checked_like_the_file() {
    let cases: &[(&str, &str)] = &[
        (
            "data.chat_template_kwargs=false",
            "expected a table of variables, found a boolean | for example { enable_thinking = false }",
        ),
        (
            "data.chat_template_kwargs.messages=[]",
            "`data.chat_template_kwargs` has the key `messages`, which is not a template's own | the variables that a template reads by itself, such as enable_thinking",
        ),
        (
            "data.chat_template_kwargs.enable_thinking=False",
            "`data.chat_template_kwargs` has the text \"False\" | write it without quotes: false",
        ),
        ("data.chat_template_kwargs.x=nan", "`data.chat_template_kwargs` has a number that is not finite"),
        (
            "data.enable_thinking=false",
            "unknown key `enable_thinking` in [data] | ours is `chat_template_kwargs`; chat_template_kwargs = { enable_thinking = … }",
        ),
    ];
    for (set, expected) in cases {
        assert_eq!(seen(parse_with(MINIMAL, &[set])), format!("--set {set} {expected}"));
    }
}

#[test]
fn dates_and_ports_in_either_form() {
    let recipe = |sets: &[&str]| parse_with(MINIMAL, sets).expect("a recipe");
    for text in ["data.date=2026-11-27", "data.date=\"2026-11-27\""] {
        assert_eq!(recipe(&[text]).data.date.as_deref(), Some("2026-11-27"), "{text}");
    }
    for text in ["data.date=2026-11-31", "data.date=today", "data.date=2026-11-27T10:00:00"] {
        assert!(parse_with(MINIMAL, &[text]).is_err(), "{text}");
    }
    for (text, ports) in [("29500", (29500, 29500)), ("29500-29599", (29500, 29599)), ("\"1-65535\"", (1, 65535))] {
        assert_eq!(recipe(&[&format!("distributed.ports={text}")]).distributed.ports, Some(ports), "{text}");
    }
}
