//! A model directory whose tokenizer knows every byte and a few special tokens: small, and exact on
//! any text.

use std::path::Path;

use finetune_dataset::ChatTokenizer;
use finetune_recipe::{Data, Format, Overlong, TrainOn};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const SPECIAL: [&str; 8] =
    ["<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"];

pub(crate) const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + \
                          '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// GPT-2's table of a printable character for each byte.
fn byte_characters() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256;
    (0..256u32)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("a character")
        })
        .collect()
}

/// A byte-level BPE tokenizer.json: token `n` is byte `n`, then "Hi" (H + i) and "He", then
/// `SPECIAL`. Its post-processor puts `<s>` in front and, as Llama 3's does, trims white space off
/// offsets.
pub(crate) fn tokenizer_json() -> Value {
    let mut vocab = serde_json::Map::new();
    for (id, character) in byte_characters().into_iter().enumerate() {
        vocab.insert(character.to_string(), json!(id));
    }
    vocab.insert("Hi".to_owned(), json!(256));
    vocab.insert("He".to_owned(), json!(257));
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(index, text)| {
            json!({"id": 258 + index, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {"<s>": {"id": "<s>", "ids": [258], "tokens": ["<s>"]}}}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": [["H", "i"], ["H", "e"]]},
    })
}

pub(crate) struct Model {
    pub(crate) directory: TempDir,
}

impl Model {
    pub(crate) fn new(template: Option<&str>) -> Self {
        let tokens = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"});
        Self::with_tokens(template, tokens)
    }

    pub(crate) fn with_tokens(template: Option<&str>, special_tokens: Value) -> Self {
        let model = Self { directory: TempDir::new().expect("a directory") };
        model.write("tokenizer.json", tokenizer_json().to_string());
        model.write("tokenizer_config.json", special_tokens.to_string());
        if let Some(template) = template {
            model.write("chat_template.jinja", template);
        }
        model
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> std::path::PathBuf {
        let path = self.path().join(name);
        #[allow(clippy::disallowed_methods, reason = "a test's own file, which need not survive a crash")]
        std::fs::write(&path, content).expect("a written file");
        path
    }

    pub(crate) fn tokenizer(&self) -> ChatTokenizer {
        ChatTokenizer::load(self.path(), None).unwrap_or_else(|error| panic!("{error}"))
    }
}

pub(crate) const VOCABULARY: usize = 258 + SPECIAL.len();

pub(crate) fn data(format: Format) -> Data {
    Data {
        train: Vec::new(),
        eval: Vec::new(),
        eval_share: None,
        columns: std::collections::BTreeMap::new(),
        weights: Vec::new(),
        max_rows: None,
        format,
        max_seq_len: 2048,
        overlong: Overlong::Error,
        packing: false,
        train_on: TrainOn::Assistant,
        shuffle: true,
        chat_template: None,
        chat_template_kwargs: std::collections::BTreeMap::new(),
        add_tokens: Vec::new(),
        date: None,
    }
}
