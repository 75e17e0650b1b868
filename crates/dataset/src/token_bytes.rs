//! The bytes that tokens stand for, for what has to know before a token is chosen what it would say.

use serde_json::Value;

use crate::tokenizer::ChatTokenizer;

/// How the vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// A letter for each byte, as GPT-2 has it.
    Letters,
    /// Text with `▁` for spaces, and `<0x0A>` for single bytes.
    Text,
}

impl ChatTokenizer {
    /// The bytes of each token, by id, without those that a decoder takes off at the beginning of a text. `None`: it
    /// stands for no text, or is a token that was added to the vocabulary and is neither white space nor one of `plain`.
    ///
    /// # Errors
    /// A sentence, if the decoder of tokenizer.json is none of those that spell bytes.
    pub fn token_bytes(&self, plain: &[&str]) -> Result<Vec<Option<Vec<u8>>>, String> {
        let backend = self.backend();
        let decoder = serde_json::to_value(backend.get_decoder()).map_err(|error| error.to_string())?;
        let spelling =
            spelling(&decoder).ok_or("the decoder of tokenizer.json does not say which bytes a token has")?;
        let added = backend.get_added_vocabulary().get_added_tokens_decoder();
        let bytes = |id: u32| match added.get(&id) {
            Some(token) if plain.contains(&token.content.as_str()) => Some(token.content.clone().into_bytes()),
            Some(token) => spelling.space(&token.content).filter(|_| !token.special),
            None => backend.id_to_token(id).and_then(|token| spelling.bytes(&token)),
        };
        Ok((0..self.vocab_size() as u32).map(bytes).collect())
    }

    /// The bytes that a token has within a text. `None`: it is a special token, or the decoder of tokenizer.json is none
    /// of those that spell bytes.
    pub fn bytes_of(&self, token: u32) -> Option<Vec<u8>> {
        let backend = self.backend();
        if let Some(added) = backend.get_added_vocabulary().get_added_tokens_decoder().get(&token) {
            return (!added.special).then(|| added.content.clone().into_bytes());
        }
        let decoder = serde_json::to_value(backend.get_decoder()).ok()?;
        spelling(&decoder)?.bytes(&backend.id_to_token(token)?)
    }
}

/// The spelling that a decoder reads; a sequence has that of its first one that has any.
fn spelling(decoder: &Value) -> Option<Spelling> {
    match decoder["type"].as_str()? {
        "ByteLevel" => Some(Spelling::Letters),
        "ByteFallback" | "Metaspace" => Some(Spelling::Text),
        "Replace" if decoder["content"] == " " && decoder["pattern"]["String"] == "\u{2581}" => Some(Spelling::Text),
        "Sequence" => decoder["decoders"].as_array()?.iter().find_map(spelling),
        _ => None,
    }
}

impl Spelling {
    /// The bytes of a token that is nothing but white space, as Gemma has added them.
    fn space(self, token: &str) -> Option<Vec<u8>> {
        let text = if self == Spelling::Text { token.replace('\u{2581}', " ") } else { token.to_owned() };
        (!text.is_empty() && text.trim().is_empty()).then(|| text.into_bytes())
    }

    fn bytes(self, token: &str) -> Option<Vec<u8>> {
        match self {
            Spelling::Letters => token.chars().map(byte_of_letter).collect(),
            Spelling::Text => Some(match byte_of_name(token) {
                Some(byte) => vec![byte],
                None => token.replace('\u{2581}', " ").into_bytes(),
            }),
        }
    }
}

/// The byte of `<0x0A>`.
fn byte_of_name(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

/// Whether GPT-2's vocabulary writes a byte as the letter of the same number.
fn is_letter(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff)
}

/// The byte of a letter of GPT-2's vocabulary: letters that can be seen stand for themselves, and the other bytes are
/// the letters from U+0100 on, in their order.
fn byte_of_letter(letter: char) -> Option<u8> {
    let number = u32::from(letter);
    match u8::try_from(number) {
        Ok(byte) => is_letter(byte).then_some(byte),
        Err(_) => (0..=u8::MAX).filter(|byte| !is_letter(*byte)).nth(number.checked_sub(0x100)? as usize),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    #[test]
    fn letters_of_bytes() {
        for (token, want) in [
            ("Hi", Some(b"Hi".to_vec())),
            ("\u{120}Hi", Some(b" Hi".to_vec())),
            ("\u{10a}\u{10a}", Some(b"\n\n".to_vec())),
            ("\u{c3}\u{a9}", Some("é".as_bytes().to_vec())),
            ("\u{143}", Some(vec![0xad])),
            ("\u{144}", None),
            ("a b", None),
            ("世", None),
        ] {
            assert_eq!(Spelling::Letters.bytes(token), want, "{token}");
        }
        for (token, want) in [
            ("\u{2581}Hi", b" Hi".to_vec()),
            ("<0x0A>", b"\n".to_vec()),
            ("<0x0>", b"<0x0>".to_vec()),
            ("é", "é".into()),
        ] {
            assert_eq!(Spelling::Text.bytes(token), Some(want), "{token}");
        }
    }

    #[test]
    fn added_tokens_that_are_white_space_are_text() {
        assert_eq!(Spelling::Text.space("\u{2581}\u{2581}"), Some(b"  ".to_vec()));
        assert_eq!(Spelling::Letters.space("\n\n"), Some(b"\n\n".to_vec()));
        for token in ["", "<table>", "\u{2581}a"] {
            assert_eq!(Spelling::Text.space(token), None, "{token}");
        }
    }

    #[test]
    fn spellings_of_decoders() {
        let replace = json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "});
        for (decoder, want) in [
            (json!({"type": "ByteLevel", "add_prefix_space": false}), Some(Spelling::Letters)),
            (json!({"type": "Metaspace", "replacement": "\u{2581}"}), Some(Spelling::Text)),
            (replace.clone(), Some(Spelling::Text)),
            (json!({"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}]}), Some(Spelling::Text)),
            (
                json!({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteLevel"}]}),
                Some(Spelling::Letters),
            ),
            (json!({"type": "WordPiece"}), None),
            (json!({"type": "Replace", "pattern": {"String": "x"}, "content": " "}), None),
            (Value::Null, None),
        ] {
            assert_eq!(spelling(&decoder), want, "{decoder}");
        }
    }

    /// All tokens of a real vocabulary: their bytes are their text.
    #[test]
    fn bytes_are_what_is_decoded() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/quickstart/base");
        let tokenizer = ChatTokenizer::load(&directory, None).expect("a tokenizer");
        let bytes = tokenizer.token_bytes(&["<|user|>"]).expect("a decoder of bytes");
        assert_eq!(bytes.len(), tokenizer.vocab_size());
        assert_eq!((bytes[0].clone(), bytes[1].clone()), (None, Some(b"<|user|>".to_vec())));
        assert_eq!(tokenizer.bytes_of(0), None, "a special token");
        assert_eq!(tokenizer.bytes_of(bytes.len() as u32), None, "no token");
        for (id, bytes) in (4..).zip(&bytes[4..]) {
            assert_eq!(tokenizer.bytes_of(id), *bytes, "{id}");
        }
        let mut single = 0;
        for (id, bytes) in (4..).zip(&bytes[4..]) {
            let bytes = bytes.clone().expect("a token of text");
            let text = tokenizer.decode(&[id], false).expect("a text");
            assert_eq!(String::from_utf8_lossy(&bytes), text, "token {id}");
            single += usize::from(bytes.len() == 1);
        }
        assert_eq!(single, 256, "each byte has a token");
    }
}
