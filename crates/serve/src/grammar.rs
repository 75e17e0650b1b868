//! Grammars over the tokens of a model: which tokens may come next in an answer that has to have a form.
//!
//! The grammars are llguidance's, which go over the bytes that tokens stand for. A grammar is a text (`forms.rs`
//! writes it), so that other ranks make the same of it.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use finetune_dataset::{ChatTokenizer, REASONING_TAGS};
use finetune_model::Form;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};
use llguidance::{Matcher, ParserFactory};

/// Bytes of the longest token that has a place in the vocabulary.
const LONGEST_TOKEN: usize = 200;
/// The part of a tag that is a token, of a tag that is a token and a word.
const CHANNEL: &str = "<|channel>";
/// What llguidance may do for one token, at 14 units a microsecond: 7 ms, beside 3 ms for 50,000 items of the parser.
/// So sixteen answers of hostile forms hold up a step by less than 200 ms.
const STEP_FUEL: u64 = 100_000;
/// States of an answer's automaton, each of one or two KB.
const MOST_STATES: usize = 50_000;
/// Tokens that a form is tried with.
const TRIED: usize = 12;
/// Letters of an error that are shown.
const LONGEST_ERROR: usize = 400;

/// The tokens of a model by their bytes.
struct Vocabulary(TokTrie);

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// What makes grammars over the tokens of models.
pub(crate) struct Grammars {
    factory: ParserFactory,
    ends: Arc<[u32]>,
}

/// Those that are in use: a base and its adapters have one together, which takes a second and many MB to make.
static SHARED: Mutex<Vec<Weak<Grammars>>> = Mutex::new(Vec::new());

impl Grammars {
    /// Those of a model's tokens, which all models have together whose tokens are the same. `ends`: the tokens that end
    /// an answer. `marks`: those of calls that an answer may have to have. Other tokens that were added to a vocabulary
    /// are no text of answers with a form.
    ///
    /// # Errors
    /// A sentence that says why this model's answers cannot have a form.
    pub(crate) fn of(tokenizer: &ChatTokenizer, ends: &[u32], marks: &[&str]) -> Result<Arc<Grammars>, String> {
        let words = words(tokenizer, ends, marks)?;
        // Who needs the same at the same time waits for it.
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.retain(|grammars| grammars.strong_count() > 0);
        if let Some(known) = shared.iter().filter_map(Weak::upgrade).find(|grammars| grammars.is_of(&words, ends)) {
            return Ok(known);
        }
        let new = Arc::new(Grammars::over(&words, ends)?);
        shared.push(Arc::downgrade(&new));
        Ok(new)
    }

    fn over(words: &[Vec<u8>], ends: &[u32]) -> Result<Grammars, String> {
        let &first = ends.first().ok_or("the model has no token that ends an answer")?;
        let info = TokRxInfo::new(u32::try_from(words.len()).map_err(|error| error.to_string())?, first);
        let vocabulary: TokEnv = Arc::new(Vocabulary(TokTrie::from(&info, words)));
        let mut factory = ParserFactory::new_simple(&vocabulary).map_err(sentence)?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.verbose_errors = false;
        limits.step_lexer_fuel = STEP_FUEL;
        limits.max_lexer_states = MOST_STATES;
        Ok(Grammars { factory, ends: ends.into() })
    }

    fn is_of(&self, words: &[Vec<u8>], ends: &[u32]) -> bool {
        let known = self.factory.tok_env().tok_trie();
        let is_same = |(id, word): (u32, &Vec<u8>)| known.token(id) == word.as_slice();
        *self.ends == *ends && known.vocab_size() == words.len() && (0..).zip(words).all(is_same)
    }

    /// Reads the text of a grammar.
    ///
    /// # Errors
    /// A sentence that says what it has that is not known, or that it is too large.
    pub(crate) fn read(&self, text: &str) -> Result<Grammar, String> {
        let grammar: TopLevelGrammar = serde_json::from_str(text).map_err(|error| error.to_string())?;
        // A panic is caught, and becomes an error.
        let made =
            llguidance::panic_utils::catch_unwind(std::panic::AssertUnwindSafe(|| self.factory.create_parser(grammar)));
        let mut matcher = Matcher::new(Ok(made.map_err(sentence)?));
        match matcher.compute_mask() {
            Ok(_) => Ok(Grammar { matcher, ends: Arc::clone(&self.ends) }),
            Err(error) => Err(sentence(error)),
        }
    }
}

/// The bytes of each token of a model. Those that no text has stand for tokens that are none.
fn words(tokenizer: &ChatTokenizer, ends: &[u32], marks: &[&str]) -> Result<Vec<Vec<u8>>, String> {
    let tags = REASONING_TAGS.iter().flat_map(|(open, close)| [*open, *close]).chain([CHANNEL]);
    let mut words = tokenizer.token_bytes(&tags.chain(marks.iter().copied()).collect::<Vec<_>>())?;
    for &end in ends {
        let word = words.get_mut(end as usize).ok_or("an end token is not in the vocabulary")?;
        *word = None;
    }
    let special = |id: usize| [&[TokTrie::SPECIAL_TOKEN_MARKER], format!("[{id}]").as_bytes()].concat();
    let word = |(id, word): (usize, Option<Vec<u8>>)| {
        word.filter(|word| word.len() <= LONGEST_TOKEN).unwrap_or_else(|| special(id))
    };
    Ok(words.into_iter().enumerate().map(word).collect())
}

impl Grammar {
    /// Follows the form for some tokens, always the first that may come, and then always the last: forms that no answer
    /// could be made in are refused before one begins.
    ///
    /// # Errors
    /// A sentence that says why no token can come.
    pub(crate) fn rehearse(&self) -> Result<(), String> {
        for takes_last in [false, true] {
            let mut form = self.begin();
            for _ in 0..TRIED {
                let words = form.allowed()?;
                let is_next =
                    |token: &u32| words[*token as usize / 32] >> (token % 32) & 1 == 1 && !self.ends.contains(token);
                let mut tokens = (0..words.len() as u32 * 32).filter(is_next);
                let Some(token) = (if takes_last { tokens.next_back() } else { tokens.next() }) else { break };
                form.take(token)?;
            }
        }
        Ok(())
    }
}

/// An error in one line, without what describes the state of the crate.
fn sentence(error: impl std::fmt::Display) -> String {
    let text = error.to_string();
    let ends = ["<backtrace>", "<state>"].iter().filter_map(|mark| text.find(mark));
    let text = &text[..ends.min().unwrap_or(text.len())];
    text.trim().chars().take(LONGEST_ERROR).collect::<String>().replace('\n', " ")
}

/// A form of answers.
pub(crate) struct Grammar {
    matcher: Matcher,
    ends: Arc<[u32]>,
}

impl Grammar {
    /// The form of one answer. Nothing is shared with another's, so its bounds are its own.
    pub(crate) fn begin(&self) -> Box<dyn Form> {
        Box::new(Following { matcher: self.matcher.deep_clone(), ends: Arc::clone(&self.ends), words: Vec::new() })
    }
}

/// An answer on its way through a grammar.
struct Following {
    matcher: Matcher,
    ends: Arc<[u32]>,
    words: Vec<u32>,
}

impl Form for Following {
    fn allowed(&mut self) -> Result<&[u32], String> {
        self.words.clear();
        // Nothing but the end can come behind a form that is complete.
        let is_over = self.matcher.is_stopped();
        if is_over && !self.matcher.stop_reason().is_ok() {
            return Err(self.matcher.get_error().map_or_else(|| self.matcher.stop_reason().to_string(), sentence));
        }
        if !is_over {
            self.words.extend_from_slice(self.matcher.compute_mask().map_err(sentence)?.as_slice());
        }
        let may_end = is_over || self.matcher.is_accepting().map_err(sentence)?;
        for &end in &*self.ends {
            let (word, bit) = (end as usize / 32, 1 << (end % 32));
            if self.words.len() <= word {
                self.words.resize(word + 1, 0);
            }
            if may_end {
                self.words[word] |= bit;
            } else {
                self.words[word] &= !bit;
            }
        }
        Ok(&self.words)
    }

    fn take(&mut self, token: u32) -> Result<(), String> {
        if self.ends.contains(&token) {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(sentence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forms::tests::tokenizer;

    /// A base and its adapters have one, as long as one of them is there. Other ends or marks make others.
    #[test]
    fn models_of_the_same_tokens_share_their_grammars() {
        let mark = "<|user|>";
        let of = |ends: &[u32], marks: &[&str]| Grammars::of(&tokenizer(), ends, marks).expect("a vocabulary of bytes");
        let base = of(&[0, 5], &[]);
        assert!(Arc::ptr_eq(&base, &of(&[0, 5], &[])), "another tokenizer of the same files");
        assert!(!Arc::ptr_eq(&base, &of(&[0], &[])) && !Arc::ptr_eq(&base, &of(&[5, 0], &[])), "other ends");
        assert!(tokenizer().token_to_id(mark).is_some_and(|id| tokenizer().is_special(id)), "a token of its own");
        assert!(!Arc::ptr_eq(&base, &of(&[0, 5], &[mark])), "another mark");
        let gone = Arc::downgrade(&base);
        drop(base);
        assert!(gone.upgrade().is_none(), "nobody keeps what no model needs");
    }
}
