//! Values of arguments that are not written as JSON: literals of Python (LFM2, OLMo 3) and Gemma 4's, whose strings
//! stand between `<|"|>` and whose keys have no quotes.

use serde_json::{Map, Number, Value};

/// Lists and objects within each other that are read.
const DEEPEST: usize = 64;
/// The mark around Gemma 4's strings.
pub(crate) const QUOTE: &str = "<|\"|>";

/// Reads values one behind the other.
pub(crate) struct Literals<'a> {
    rest: &'a str,
    depth: usize,
}

impl<'a> Literals<'a> {
    pub(crate) fn new(text: &'a str) -> Literals<'a> {
        Literals { rest: text, depth: 0 }
    }

    /// What was not read.
    pub(crate) fn rest(&self) -> &'a str {
        self.rest
    }

    /// Whether this comes next, perhaps behind white space. It is passed over.
    pub(crate) fn takes(&mut self, text: &str) -> bool {
        let rest = self.rest.trim_start().strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    /// A name, up to this letter, which is passed over.
    pub(crate) fn name(&mut self, end: char) -> Option<&'a str> {
        let (name, rest) = self.rest.split_once(end)?;
        let name = name.trim();
        if !is_name(name) {
            return None;
        }
        self.rest = rest;
        Some(name)
    }

    /// The value that comes next. `None`: there is none.
    pub(crate) fn value(&mut self) -> Option<Value> {
        self.rest = self.rest.trim_start();
        if self.depth == DEEPEST {
            return None;
        }
        self.depth += 1;
        let value = if self.takes("{") {
            self.object("}", ":").map(Value::Object)
        } else if self.takes("[") {
            self.list()
        } else {
            match self.string() {
                Some(text) => Some(text.into()),
                None => self.word(),
            }
        };
        self.depth -= 1;
        value
    }

    /// Keys with their values up to `end`, which is passed over. `between`: what stands between a key and its value.
    pub(crate) fn object(&mut self, end: &str, between: &str) -> Option<Map<String, Value>> {
        let mut object = Map::new();
        while !self.takes(end) {
            self.rest = self.rest.trim_start();
            let key = match self.string() {
                Some(key) => self.takes(between).then_some(key)?,
                None => self.name(between.chars().next()?)?.to_owned(),
            };
            object.insert(key, self.value()?);
            if !self.takes(",") {
                return self.takes(end).then_some(object);
            }
        }
        Some(object)
    }

    fn list(&mut self) -> Option<Value> {
        let mut list = Vec::new();
        while !self.takes("]") {
            list.push(self.value()?);
            if !self.takes(",") {
                return self.takes("]").then_some(list.into());
            }
        }
        Some(list.into())
    }

    /// A string in quotes of any kind.
    fn string(&mut self) -> Option<String> {
        if let Some(rest) = self.rest.strip_prefix(QUOTE) {
            let (text, rest) = rest.split_once(QUOTE)?;
            self.rest = rest;
            return Some(text.to_owned());
        }
        let quote = self.rest.chars().next().filter(|letter| matches!(letter, '"' | '\''))?;
        let mut text = String::new();
        let mut letters = self.rest[1..].char_indices();
        while let Some((place, letter)) = letters.next() {
            match letter {
                '\\' => text.push(unescaped(&mut letters)?),
                letter if letter == quote => {
                    self.rest = &self.rest[1 + place + 1..];
                    return Some(text);
                }
                letter => text.push(letter),
            }
        }
        None
    }

    /// A number, or one of the words of Python and JSON.
    fn word(&mut self) -> Option<Value> {
        let end = self.rest.find([',', '}', ']', ')']).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        let value = word_value(word.trim())?;
        self.rest = rest;
        Some(value)
    }
}

/// Whether a name may stand without quotes, in front of `(`, `=` or `:`.
pub(crate) fn is_name(name: &str) -> bool {
    let is_letter = |letter: char| letter.is_alphanumeric() || matches!(letter, '_' | '-' | '.');
    !name.is_empty() && name.chars().all(is_letter)
}

/// The value of a word: a number, or one of the words of Python and JSON.
pub(crate) fn word_value(word: &str) -> Option<Value> {
    match word {
        "true" | "True" => Some(true.into()),
        "false" | "False" => Some(false.into()),
        "null" | "None" => Some(Value::Null),
        number => number.parse::<Number>().ok().map(Value::Number),
    }
}

/// The letter that stands behind a backslash.
fn unescaped(letters: &mut std::str::CharIndices<'_>) -> Option<char> {
    let (_, letter) = letters.next()?;
    let mut number = |digits: usize| {
        let digits: String = letters.by_ref().take(digits).map(|(_, letter)| letter).collect();
        u32::from_str_radix(&digits, 16).ok()
    };
    Some(match letter {
        'n' => '\n',
        't' => '\t',
        'r' => '\r',
        // Half of a pair is no character.
        'u' => char::from_u32(number(4)?).unwrap_or(char::REPLACEMENT_CHARACTER),
        'x' => char::from_u32(number(2)?)?,
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_in_the_notations_of_templates() {
        for (text, want) in [
            ("1", Some(json!(1))),
            (" -1.5e3 ", Some(json!(-1500.0))),
            ("True", Some(json!(true))),
            ("None", Some(Value::Null)),
            ("'it\\'s'", Some(json!("it's"))),
            ("\"a\\nb \\u00e9\"", Some(json!("a\nb é"))),
            ("<|\"|>say \"hi\", {<|\"|>", Some(json!("say \"hi\", {"))),
            ("[1, 'a', [True,],]", Some(json!([1, "a", [true]]))),
            ("{a:<|\"|>x<|\"|>,b:{c:[1,2]}}", Some(json!({"a": "x", "b": {"c": [1, 2]}}))),
            ("{'a': 1, \"b\": None}", Some(json!({"a": 1, "b": null}))),
            ("{}", Some(json!({}))),
            ("", None),
            ("hello", None),
            ("[1", None),
            ("{a 1}", None),
            ("'never closed", None),
            ("'\\", None),
            ("'\\ué", None),
        ] {
            assert_eq!(Literals::new(text).value(), want, "{text}");
        }
        assert_eq!(Literals::new(&"[".repeat(100_000)).value(), None, "it ends before the stack does");
    }
}
