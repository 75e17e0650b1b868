//! Text as tokens come in, against the text of all of them.

use finetune_dataset::ChatTokenizer;
use serde_json::json;

use crate::made_up::Model;

fn streamed(tokenizer: &ChatTokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let mut text: String = ids.iter().map(|id| stream.push(*id).expect("text")).collect();
    assert_eq!(text, stream.text());
    text.push_str(&stream.finish().expect("text"));
    text
}

/// Llama 2's kind: words with a mark for the space, bytes as tokens, a decoder that takes the first
/// space off.
fn with_byte_fallback() -> Model {
    let model = Model::new(None);
    let mut vocab = serde_json::Map::new();
    vocab.insert("<unk>".to_owned(), json!(0));
    for byte in 0..256 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(1 + byte));
    }
    for (index, word) in ["▁", "▁Hello", "▁world", "a", "é", "."].into_iter().enumerate() {
        vocab.insert(word.to_owned(), json!(257 + index));
    }
    let special = |id: u32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(263, "<s>"), special(264, "</s>")], "normalizer": null, "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    });
    model.write("tokenizer.json", tokenizer.to_string());
    model.write(
        "tokenizer_config.json",
        json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}).to_string(),
    );
    model
}

#[test]
fn all_parts_together_are_the_whole() {
    let fallback = with_byte_fallback().tokenizer();
    let byte = |byte: u32| 1 + byte;
    let (space, hello, world, letter) = (257, 258, 259, 260);
    let cases: Vec<Vec<u32>> = vec![
        vec![hello, world, byte(10), world],
        vec![hello, byte(0xE6), byte(0x97), byte(0xA5), world],
        // One wrong byte makes all of its run wrong, those before it too.
        vec![hello, byte(10), byte(0xE6), byte(0x97), world, byte(10), letter],
        vec![hello, byte(0xF0), byte(0x9F), byte(0xA6), byte(0x80), byte(0xFF), letter],
        vec![263, hello, 264, world, 264, world, space, space, letter],
        vec![space, space, space, letter],
        vec![hello, byte(0x61), 264, byte(0xFF), letter],
        vec![byte(0xFF)],
        vec![byte(0xE6), byte(0x97), byte(0xA5)],
        vec![],
    ];
    for ids in &cases {
        assert_eq!(streamed(&fallback, ids), fallback.decode(ids, true).expect("text"), "{ids:?}");
    }
    let bytes = Model::new(None).tokenizer();
    for ids in
        [vec![256, 0xE6, 0x97, 0xA5, 32, 0xFF, 72, 0xF0, 0x9F], vec![0xE6, 256, 0x97, 258, 0xA5, 0xE6, 0x97, 0xA5]]
    {
        assert_eq!(streamed(&bytes, &ids), bytes.decode(&ids, true).expect("text"), "{ids:?}");
    }
}

/// Sequences without meaning, any of which a model may generate.
#[test]
fn sequences_at_random() {
    let tokenizers = [(with_byte_fallback().tokenizer(), 265u64), (Model::new(None).tokenizer(), 266)];
    for (tokenizer, tokens) in &tokenizers {
        let mut state = 7u64;
        for _ in 0..60 {
            let ids: Vec<u32> = (0..24)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    // Half of them from the last ones, which are words: else all is bytes.
                    let number = state >> 33;
                    let id =
                        if number.is_multiple_of(2) { tokens - 1 - (number / 2) % 8 } else { (number / 2) % tokens };
                    id as u32
                })
                .collect();
            assert_eq!(streamed(tokenizer, &ids), tokenizer.decode(&ids, true).expect("text"), "{ids:?}");
        }
    }
}

#[test]
fn text_comes_as_soon_as_it_is_sure() {
    let bytes = Model::new(None).tokenizer();
    let mut stream = bytes.stream();
    let parts: Vec<String> = [256, 0xE6, 0x97, 0xA5, 33].iter().map(|id| stream.push(*id).expect("text")).collect();
    assert_eq!(parts, ["Hi", "", "", "日", "!"]);
    assert_eq!(stream.finish().expect("text"), "");
}
