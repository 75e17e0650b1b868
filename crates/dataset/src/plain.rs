//! Rows of plain text, which no template sees, to tokens.

use crate::error::DatasetError;
use crate::tokenizer::ChatTokenizer;

/// What the tokenizer puts around a text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Around {
    before: Vec<u32>,
    behind: Vec<u32>,
}

impl Around {
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

    /// How many tokens go in front of a text: none where it has been through a template and brings them.
    fn before(&self, ids: &[u32]) -> &[u32] {
        if ids.starts_with(&self.before) { &[] } else { &self.before }
    }

    /// A text's tokens with what goes around them, each of it once.
    pub(crate) fn put(&self, ids: &[u32]) -> Vec<u32> {
        let mut tokens = self.before(ids).to_vec();
        tokens.extend_from_slice(ids);
        if !ids.ends_with(&self.behind) {
            tokens.extend_from_slice(&self.behind);
        }
        tokens
    }
}

/// The tokens of a prompt and its completion, and where the completion begins. The whole is tokenized at once where the
/// prompt's tokens are its beginning, and the two apart where not, as a model that is given the prompt goes on from its tokens.
pub(crate) fn prompt_completion(
    tokenizer: &ChatTokenizer,
    around: &Around,
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
    let start = start + around.before(&ids).len();
    Ok((around.put(&ids), start))
}

/// A prompt's tokens, and behind them those of a completion that merges with it: such that both together are the text of the
/// whole, and where that cannot be, the tokens of the whole, cut where they part from the prompt's.
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

/// The tokens of a text in the middle of another: without the space that SentencePiece tokenizers put in front of one that
/// begins (Llama 2, Mistral).
fn within(tokenizer: &ChatTokenizer, text: &str) -> Result<Option<Vec<u32>>, DatasetError> {
    // Nothing merges with a line break in such a vocabulary.
    const MARK: &str = "\n";
    let mark = tokenizer.encode(MARK, false)?;
    let marked = tokenizer.encode(&format!("{MARK}{text}"), false)?;
    Ok(marked.strip_prefix(&mark[..]).map(<[u32]>::to_vec))
}
