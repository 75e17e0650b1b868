//! The recipe written back, and the digest of what fixes a run's numbers.

mod common;

use std::path::Path;

use common::{CONTRACT, MINIMAL, contract_with_optional_keys, parse, parse_with};
use finetune_recipe::keys::{KEYS, TABLES};
use finetune_recipe::{Method, Recipe};

#[test]
fn written_back_it_is_the_same_recipe() {
    let full = format!("{MINIMAL}[train]\nmethod = \"full\"\nmax_steps = 7\n[schedule]\nwarmup_ratio = 0.03\n");
    let odd = format!(
        "{MINIMAL}[lora]\nalpha = 0.1\ntarget_modules = \"a\\\"\\\\\\t\\u0007é\"\n\
        [optimizer]\nlearning_rate = 1e-300\neps = 5e-324\nweight_decay = 123456789012345678.0\n[distributed]\ntimeout = \"1500ms\"\n"
    );
    let rank = format!("{MINIMAL}[lora]\ntarget_modules = ['q \" p']\nrank_pattern = {{ '' = 3, 'a\\b' = 4 }}\n");
    for text in [MINIMAL, CONTRACT, &contract_with_optional_keys(), &full, &odd, &rank] {
        let recipe = parse(text);
        let written = recipe.to_toml();
        let elsewhere = Recipe::parse(&written, Path::new("/mnt/run/recipe.toml"), &[], None);
        let elsewhere = elsewhere.unwrap_or_else(|error| panic!("{error}\n{written}"));
        assert_eq!(elsewhere, recipe, "{written}");
        assert_eq!(elsewhere.to_toml(), written);
        assert_eq!(elsewhere.digest(), recipe.digest());
    }
}

#[test]
fn every_key_is_written() {
    let written = parse(&contract_with_optional_keys()).to_toml();
    let other = parse_with(CONTRACT, &["train.max_steps=1", "schedule.warmup_ratio=0.5", "data.eval_share=0.5"])
        .unwrap()
        .to_toml();
    for key in KEYS {
        let line = format!("\n{} = ", key.name());
        assert!(written.contains(&line) || other.contains(&line), "{} is missing", key.path);
    }
    for table in TABLES {
        assert!(written.contains(&format!("\n[{table}]\n")));
    }
}

#[test]
fn the_resolved_recipe_as_a_user_sees_it() {
    expect_test::expect_file!["resolved.toml"].assert_eq(&parse(CONTRACT).to_toml());
}

#[test]
fn the_digest_follows_the_numbers_only() {
    let digest = |sets: &[&str]| parse_with(CONTRACT, sets).unwrap().digest();
    let base = digest(&[]);
    assert_eq!(base.len(), 64);
    let same = [
        "output_dir=elsewhere",
        "log.every=7",
        "log.prometheus=localhost:1",
        "log.tensorboard=true",
        "log.tensorboard=events",
        "log.on_end=echo done",
        "checkpoint.every=9",
        "checkpoint.keep_last=1",
        "distributed.backend=tcp",
        "distributed.timeout=9s",
        "distributed.min_ranks=1",
        "train.epochs=9",
        "train.max_steps=3",
        "eval.every=5",
        "eval.samples=3",
        "model.path=gpt2",
        "data.train=b",
        "data.eval=c",
        // What they do to the rows is compared by content.
        "data.eval_share=0.2",
        "data.max_rows=7",
        "data.columns.prompt=question",
        "data.weights=[2.0]",
        "lora.alpha=32.0", // as written by default: 32
    ];
    for set in same {
        assert_eq!(digest(&[set]), base, "{set}");
    }
    let other = [
        "seed=1",
        "lora.rank=8",
        "lora.alpha=16",
        "data.max_seq_len=9",
        "data.shuffle=false",
        "train.global_batch_size=8",
        "optimizer.betas=[0.9, 0.95]",
        "schedule.warmup_steps=1",
        "schedule.warmup_ratio=0.0",
        "distributed.virtual_ranks=2",
        "eval.early_stopping_patience=2",
        "model.dtype=f32",
        "model.quantization=nf4",
        "lora.target_modules=[\"q_proj\"]",
        "data.chat_template=x.jinja",
        "data.chat_template_kwargs.enable_thinking=true",
        "train.micro_batch_size=2",
    ];
    for set in other {
        assert_ne!(digest(&[set]), base, "{set}");
    }
    let meaning = parse(CONTRACT).meaning();
    assert!(meaning.contains(&("lora.rank", "16".to_owned())), "{meaning:?}");
    assert!(meaning.contains(&("model.quantization", "none".to_owned())));
    // Another folder, another current directory and another host make the same run.
    let moved = Recipe::parse(CONTRACT, Path::new("/elsewhere/x.toml"), &["data.chat_template=a/x.jinja".into()], None)
        .unwrap();
    assert_eq!(moved.digest(), digest(&["data.chat_template=x.jinja"]));
}

#[test]
fn full_fine_tuning_has_no_adapter_keys() {
    let recipe = parse(&format!("{MINIMAL}[train]\nmethod = \"full\""));
    assert_eq!(recipe.train.method, Method::Full);
    assert!(!recipe.to_toml().contains("[lora]"));
}

/// (the value of `log.tensorboard`, the folder of the files)
#[test]
fn event_files_of_each_run_have_a_folder_of_their_own() {
    for (value, want) in [
        ("false", None),
        ("true", Some("/home/ada/runs/support-bot/tensorboard")),
        ("\"events\"", Some("/home/ada/events/support-bot")),
        ("\"/srv/tb\"", Some("/srv/tb/support-bot")),
    ] {
        let recipe = parse_with(MINIMAL, &[&format!("log.tensorboard={value}")]).unwrap();
        assert_eq!(recipe.event_folder().as_deref(), want.map(Path::new), "{value}");
    }
    assert_eq!(parse(MINIMAL).event_folder(), None);
}

#[test]
fn entries_have_every_key() {
    let entries = parse(MINIMAL).entries();
    assert_eq!(entries.len(), KEYS.len());
    for entry in [("lora.rank", "16"), ("log.on_end", "none"), ("train.epochs", "1")] {
        assert!(entries.contains(&(entry.0, entry.1.to_owned())), "{entry:?}: {entries:?}");
    }
}
