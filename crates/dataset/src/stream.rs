//! Text as tokens come in. All parts together are the text of all tokens decoded at once. Decoding
//! tokens one by one would not give that: a character may need several tokens, and with byte
//! fallback one wrong byte changes the bytes before it.

use std::borrow::Cow;

use crate::error::DatasetError;
use crate::tokenizer::ChatTokenizer;

/// How many tokens before the open ones are decoded with them. Some decoders treat the start of a
/// text differently: they take a space off, or put one there.
const CONTEXT: usize = 4;

/// Decodes tokens one at a time. Special tokens give no text. A token is open until its text is
/// known.
pub struct TextStream<'a> {
    tokenizer: Cow<'a, ChatTokenizer>,
    ids: Vec<u32>,
    /// The number of tokens whose text has been given out in full.
    settled: usize,
    /// The token that decoding starts with.
    from: usize,
    /// The text of the settled tokens from there.
    before: String,
    /// Bytes of the open tokens' text that have been given out.
    given: usize,
    /// All text that has been given out.
    text: String,
}

impl ChatTokenizer {
    /// A decoder of tokens that come in one at a time.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(Cow::Borrowed(self))
    }

    /// As [`Self::stream`], of a handle that the decoder keeps.
    pub fn into_stream(self) -> TextStream<'static> {
        TextStream::new(Cow::Owned(self))
    }
}

impl<'a> TextStream<'a> {
    fn new(tokenizer: Cow<'a, ChatTokenizer>) -> Self {
        let (before, text) = (String::new(), String::new());
        Self { tokenizer, ids: Vec::new(), settled: 0, from: 0, before, given: 0, text }
    }

    /// Takes a token and returns the text that it completes. That is often none, and at the end of
    /// a character the text of several tokens.
    ///
    /// # Errors
    /// As [`ChatTokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, DatasetError> {
        self.ids.push(id);
        // The bytes of a run become characters together, or none of them does. A token without a
        // text does not end a run.
        if self.is_open(id) {
            return Ok(String::new());
        }
        let window = self.tokenizer.decode(&self.ids[self.from..], true)?;
        let Some(open) = window.strip_prefix(self.before.as_str()) else { return Ok(String::new()) };
        // A last character that is not complete yet looks like a wrong one.
        let sure = open.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let part = sure.get(self.given..).unwrap_or_default().to_owned();
        self.given = self.given.max(sure.len());
        let is_settled = sure.len() == open.len();
        self.text.push_str(&part);
        if is_settled {
            self.settle()?;
        }
        Ok(part)
    }

    /// The text that is left when no more tokens come.
    ///
    /// # Errors
    /// As [`ChatTokenizer::decode`].
    pub fn finish(self) -> Result<String, DatasetError> {
        let all = self.tokenizer.decode(&self.ids, true)?;
        if let Some(rest) = all.strip_prefix(self.text.as_str()) {
            return Ok(rest.to_owned());
        }
        // The decoder has rewritten the beginning because of the end. The text that was given out
        // cannot be changed, so what stands behind its length follows.
        Ok(all.get(self.text.len()..).unwrap_or_default().to_owned())
    }

    /// All text that was given out so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the text of this token may depend on the next ones.
    fn is_open(&self, id: u32) -> bool {
        let Some(token) = self.tokenizer.id_to_token(id) else { return true };
        if self.tokenizer.is_special(id) {
            return true;
        }
        token
            .strip_prefix("<0x")
            .and_then(|rest| rest.strip_suffix('>'))
            .is_some_and(|hex| hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit()))
    }

    /// Makes all tokens so far settled.
    fn settle(&mut self) -> Result<(), DatasetError> {
        self.settled = self.ids.len();
        self.given = 0;
        let mut context = CONTEXT;
        loop {
            self.from = self.settled.saturating_sub(context);
            self.before = self.tokenizer.decode(&self.ids[self.from..self.settled], true)?;
            // Special tokens and stripped spaces give no text, and so no context.
            if self.from == 0 || !self.before.is_empty() {
                return Ok(());
            }
            context *= 2;
        }
    }
}
