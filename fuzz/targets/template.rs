//! A chat template of a stranger: it renders a conversation, or ends with an error inside of its
//! bounds.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use finetune_dataset::ChatTokenizer;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

static BASE: LazyLock<PathBuf> =
    LazyLock::new(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../datasets/quickstart/base"));

static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("finetune-fuzz-{}.jinja", std::process::id())));

static MESSAGES: LazyLock<Vec<Value>> = LazyLock::new(|| {
    vec![
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "Hi"}),
        json!({"role": "assistant", "content": "Hello there."}),
    ]
});

fuzz_target!(|template: &str| {
    std::fs::write(&*FILE, template).expect("a temporary file");
    if let Ok(tokenizer) = ChatTokenizer::load(&BASE, Some(&*FILE)) {
        let _ = tokenizer.render(&MESSAGES, None, false);
        let _ = tokenizer.render(&MESSAGES[..2], None, true);
    }
});
