//! Text as tokens come in. All parts together are the text of all tokens at once, which no decoding of single tokens is: a
//! character may need several tokens, and with byte fallback one wrong byte changes the bytes before it.

use crate::error::DatasetError;
use crate::tokenizer::ChatTokenizer;

/// Tokens before the open ones that are decoded with them, so that a decoder that treats a text's start differently (it takes
/// a space off, or puts one there) is not at the start.
const CONTEXT: usize = 4;

/// Decodes tokens one at a time, special ones left out.
pub struct TextStream<'a> {
    tokenizer: &'a ChatTokenizer,
    ids: Vec<u32>,
    /// Tokens whose text has been given out in full.
    settled: usize,
    /// Where decoding starts, and the text of the settled ones from there.
    from: usize,
    before: String,
    /// Bytes of the open tokens' text that have been given out.
    given: usize,
    /// All of it.
    text: String,
}

impl ChatTokenizer {
    /// A decoder of tokens that come in one at a time.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }
}

impl<'a> TextStream<'a> {
    fn new(tokenizer: &'a ChatTokenizer) -> Self {
        let (before, text) = (String::new(), String::new());
        Self { tokenizer, ids: Vec::new(), settled: 0, from: 0, before, given: 0, text }
    }

    /// The text that this token completes; often none, and that of several tokens at the end of a character.
    pub fn push(&mut self, id: u32) -> Result<String, DatasetError> {
        self.ids.push(id);
        // The bytes of a run become characters together, or none of them does; a token without a text does not end a run.
        if self.is_open(id) {
            return Ok(String::new());
        }
        let window = self.tokenizer.decode(&self.ids[self.from..], true)?;
        let Some(open) = window.strip_prefix(self.before.as_str()) else { return Ok(String::new()) };
        // A last character that is not complete yet looks like one that is wrong.
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

    /// What is left when no more tokens come.
    pub fn finish(self) -> Result<String, DatasetError> {
        let all = self.tokenizer.decode(&self.ids, true)?;
        if let Some(rest) = all.strip_prefix(self.text.as_str()) {
            return Ok(rest.to_owned());
        }
        // A decoder that rewrites its beginning by its end: what was given out stays, and what follows it comes.
        Ok(all.get(self.text.len()..).unwrap_or_default().to_owned())
    }

    /// All that was given out so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it is too early to tell what this token and those before it make.
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

    /// From now on the open tokens begin behind the last one.
    fn settle(&mut self) -> Result<(), DatasetError> {
        self.settled = self.ids.len();
        self.given = 0;
        let mut context = CONTEXT;
        loop {
            self.from = self.settled.saturating_sub(context);
            self.before = self.tokenizer.decode(&self.ids[self.from..self.settled], true)?;
            // Special tokens and stripped spaces are no context.
            if self.from == 0 || !self.before.is_empty() {
                return Ok(());
            }
            context *= 2;
        }
    }
}
