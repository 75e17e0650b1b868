//! A GGUF file: it is refused, or every tensor can be read and the header written again. Its
//! tokenizer is refused, or it encodes a text.
#![no_main]

use finetune_dataset::ChatTokenizer;
use finetune_gguf::{File, TensorType, header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // The reader takes a path: a file can be larger than memory.
    let path = std::env::temp_dir().join(format!("finetune-fuzz-{}.gguf", std::process::id()));
    std::fs::write(&path, bytes).expect("a temporary file");
    let Ok(file) = File::open(&path) else { return };
    for tensor in file.tensors() {
        let known = !matches!(tensor.kind, TensorType::Other(_));
        assert_eq!(file.bytes(&tensor.name).is_ok(), known, "{tensor:?}");
        let _ = file.values(&tensor.name);
    }
    let _ = header(file.metadata(), file.tensors());
    if let Ok(Some(tokenizer)) = ChatTokenizer::load_if_present(&path, None) {
        let _ = tokenizer.encode("Hello, 1 é", true);
    }
});
