//! One of a few words, and true or false.

use std::marker::PhantomData;

use toml::de::DeValue;

use super::{Kind, Written};
use crate::canonical::{list, quoted};
use crate::choices::Choice;
use crate::hint;
use crate::problem::Problem;

/// One of the words of a [`Choice`].
pub(crate) struct Word<T>(PhantomData<T>);

pub(crate) fn word<T: Choice>() -> Word<T> {
    Word(PhantomData)
}

/// The words in quotes, separated by commas.
fn quoted_words<T: Choice>() -> String {
    T::WORDS.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ")
}

impl<T: Choice> Kind for Word<T> {
    type Value = T;

    fn read(&self, written: &Written<'_, '_>) -> Result<T, Problem> {
        let one_of = if T::WORDS.len() == 1 { "" } else { "one of " };
        let words = quoted_words::<T>();
        let DeValue::String(text) = written.value else {
            return Err(written.wrong_type(&format!("{one_of}{words}")));
        };
        T::parse(text).ok_or_else(|| {
            let message = format!("`{}` must be {one_of}{words}, found \"{}\"", written.key, hint::shown(text));
            let hints = hint::wrong_word(text, T::WORDS, T::RIVALS);
            hints.into_iter().fold(written.problem(message), Problem::hint)
        })
    }

    fn write(&self, value: &T) -> String {
        quoted(value.word())
    }

    fn words(&self) -> String {
        T::WORDS.iter().map(|word| format!("`\"{word}\"`")).collect::<Vec<_>>().join(", ")
    }

    fn schema(&self) -> String {
        format!(r#""type": "string", "enum": {}"#, list(T::WORDS, |word| quoted(word)))
    }
}

/// `true` or `false`.
pub(crate) struct Switch;

impl Kind for Switch {
    type Value = bool;

    fn read(&self, written: &Written<'_, '_>) -> Result<bool, Problem> {
        match written.value {
            DeValue::Boolean(boolean) => Ok(*boolean),
            _ => Err(written.wrong_type("true or false")),
        }
    }

    fn write(&self, value: &bool) -> String {
        value.to_string()
    }

    fn words(&self) -> String {
        "`true`, `false`".to_owned()
    }

    fn schema(&self) -> String {
        r#""type": "boolean""#.to_owned()
    }
}
