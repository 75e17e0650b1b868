//! A file of training rows in any format, on the quickstart's tokenizer and template: rows come
//! out, or an error.
#![no_main]

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use finetune_dataset::{ChatTokenizer, Dataset};
use finetune_recipe::{Data, Recipe};
use libfuzzer_sys::fuzz_target;

static TOKENIZER: LazyLock<ChatTokenizer> = LazyLock::new(|| {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../datasets/quickstart/base");
    ChatTokenizer::load(&base, None).expect("the quickstart's tokenizer")
});

static DATA: LazyLock<Data> = LazyLock::new(|| {
    let text = "[model]\npath = \"gpt2\"\n[data]\ntrain = \"rows.jsonl\"\nmax_seq_len = 4096\n";
    Recipe::parse(text, Path::new("/recipe.toml"), &[], None).expect("a recipe").data
});

static FILE: LazyLock<PathBuf> =
    LazyLock::new(|| std::env::temp_dir().join(format!("finetune-fuzz-{}.jsonl", std::process::id())));

fuzz_target!(|rows: &[u8]| {
    std::fs::write(&*FILE, rows).expect("a temporary file");
    let vocabulary = TOKENIZER.vocab_size();
    if let Ok(data) = Dataset::load(&[FILE.clone()], &DATA, &*TOKENIZER, vocabulary, 1, &|_| {}) {
        for row in &data.rows {
            assert_eq!(row.tokens.len(), row.trained.len());
            assert!(row.tokens.len() <= DATA.max_seq_len && row.trained.iter().any(|&trained| trained));
            assert!(!row.trained[0] && row.tokens.iter().all(|&token| (token as usize) < vocabulary));
        }
    }
});
