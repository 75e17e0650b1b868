//! Rows of plain text, which no template sees, to tokens.

use crate::error::DatasetError;
use crate::tokenizer::ChatTokenizer;

/// The special tokens that the tokenizer puts before and behind a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Affixes {
    before: Vec<u32>,
    behind: Vec<u32>,
}

impl Affixes {
    pub(crate) fn of(tokenizer: &ChatTokenizer) -> Result<Self, DatasetError> {
        const TEXT: &str = "a";
        let (inner, outer) = (tokenizer.encode(TEXT, false)?, tokenizer.encode(TEXT, true)?);
        if inner.is_empty() || outer.len() < inner.len() {
            return Ok(Self::default());
        }
        let place = outer.windows(inner.len()).position(|window| window == inner);
        Ok(place.map_or_else(Self::default, |place| Self {
            before: outer[..place].to_vec(),
            behind: outer[place + inner.len()..].to_vec(),
        }))
    }

    /// The tokens to put in front of a text: none if the text has them already, as one that has
    /// been through a template.
    fn before(&self, ids: &[u32]) -> &[u32] {
        if ids.starts_with(&self.before) { &[] } else { &self.before }
    }

    /// A text's tokens with those before and behind them. What is there already is not put twice.
    pub(crate) fn put(&self, ids: &[u32]) -> Vec<u32> {
        let mut tokens = self.before(ids).to_vec();
        tokens.extend_from_slice(ids);
        if !ids.ends_with(&self.behind) {
            tokens.extend_from_slice(&self.behind);
        }
        tokens
    }
}

impl ChatTokenizer {
    /// Token ids of a text that a model goes on from, as a row of plain text begins: with what the
    /// tokenizer puts before a text, unless it is there, and without what it puts behind one.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, DatasetError> {
        let ids = self.encode(text, false)?;
        Ok([Affixes::of(self)?.before(&ids), &ids[..]].concat())
    }
}

/// The tokens of a prompt with its completion, and the index of the completion's first token.
///
/// Both are tokenized as one text if that begins with the tokens of the prompt alone. Otherwise
/// they are tokenized apart: a model that is given the prompt goes on from the prompt's tokens.
pub(crate) fn prompt_completion(
    tokenizer: &ChatTokenizer,
    affixes: &Affixes,
    prompt: &str,
    completion: &str,
) -> Result<(Vec<u32>, usize), DatasetError> {
    let prompt_ids = tokenizer.encode(prompt, false)?;
    let whole = tokenizer.encode(&format!("{prompt}{completion}"), false)?;
    let (ids, start) = if whole.starts_with(&prompt_ids) {
        (whole, prompt_ids.len())
    } else {
        apart(tokenizer, prompt_ids, whole, completion)?
    };
    let start = start + affixes.before(&ids).len();
    Ok((affixes.put(&ids), start))
}

/// A prompt's tokens, and behind them those of a completion that merges with it, so that both
/// together decode to the text of the whole. If no such tokens are found, the tokens of the whole
/// are taken, and the completion begins where they differ from the prompt's.
fn apart(
    tokenizer: &ChatTokenizer,
    prompt: Vec<u32>,
    whole: Vec<u32>,
    completion: &str,
) -> Result<(Vec<u32>, usize), DatasetError> {
    let text = tokenizer.decode(&whole, false)?;
    let start = prompt.len();
    for completion in [Some(tokenizer.encode(completion, false)?), within(tokenizer, completion)?].into_iter().flatten()
    {
        let mut ids = prompt.clone();
        ids.extend(completion);
        if tokenizer.decode(&ids, false)? == text {
            return Ok((ids, start));
        }
    }
    let common = whole.iter().zip(&prompt).take_while(|(a, b)| a == b).count();
    Ok((whole, common))
}

/// The tokens of a text in the middle of another: without the space that SentencePiece tokenizers
/// put in front of a text (Llama 2, Mistral).
fn within(tokenizer: &ChatTokenizer, text: &str) -> Result<Option<Vec<u32>>, DatasetError> {
    // Nothing merges with a line break in such a vocabulary.
    const MARK: &str = "\n";
    let mark = tokenizer.encode(MARK, false)?;
    let marked = tokenizer.encode(&format!("{MARK}{text}"), false)?;
    Ok(marked.strip_prefix(&mark[..]).map(<[u32]>::to_vec))
}
