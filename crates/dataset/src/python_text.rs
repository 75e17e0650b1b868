//! Python's methods of strings.

use minijinja::value::{Kwargs, Rest, from_args};
use minijinja::{Error, ErrorKind, Value};

use crate::python::{self, given};

/// `str.isspace` of one character: Unicode's white space, and the four separators that Unicode
/// counts as control characters.
pub(crate) fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

/// A text without the given characters (or white space) at its start, its end or both.
pub(crate) fn strip<'a>(text: &'a str, characters: Option<&str>, start: bool, end: bool) -> &'a str {
    let falls = |character: char| match characters {
        Some(characters) => characters.contains(character),
        None => is_space(character),
    };
    let text = if start { text.trim_start_matches(falls) } else { text };
    if end { text.trim_end_matches(falls) } else { text }
}

/// `str.center`. If the fill characters cannot be divided equally, an odd width puts one more on
/// the left.
pub(crate) fn center(text: &str, width: usize, fill: char) -> String {
    let missing = width.saturating_sub(text.chars().count());
    let left = missing / 2 + (missing & width & 1);
    let fill = |count: usize| fill.to_string().repeat(count);
    format!("{}{text}{}", fill(left), fill(missing - left))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn one_string(arguments: &[Value]) -> Result<&str, Error> {
    from_args::<(&str,)>(arguments).map(|(argument,)| argument)
}

fn strings<'a>(texts: impl IntoIterator<Item = &'a str>) -> Value {
    texts.into_iter().map(Value::from).collect()
}

/// String methods that pycompat lacks, or in which it counts bytes instead of characters or takes
/// other characters for white space.
pub(crate) fn method(text: &str, name: &str, arguments: &[Value]) -> Option<Result<Value, Error>> {
    let characters = |bytes: usize| text[..bytes].chars().count() as i64;
    let one = || one_string(arguments);
    let none = || from_args::<()>(arguments);
    let all = |test: fn(char) -> bool| Value::from(!text.is_empty() && text.chars().all(test));
    Some(match name {
        "strip" | "lstrip" | "rstrip" => from_args::<(Option<&str>,)>(arguments)
            .map(|(characters,)| Value::from(strip(text, characters, name != "rstrip", name != "lstrip"))),
        "split" => split(text, arguments, false),
        "rsplit" => split(text, arguments, true),
        "splitlines" => split_lines(text, arguments),
        "find" => one().map(|part| Value::from(text.find(part).map_or(-1, characters))),
        "rfind" => one().map(|part| Value::from(text.rfind(part).map_or(-1, characters))),
        "index" => one().and_then(|part| {
            text.find(part).map(characters).map(Value::from).ok_or_else(|| invalid("str.index: substring not found"))
        }),
        "count" => one().map(|part| Value::from(text.matches(part).count())),
        "removeprefix" => one().map(|part| Value::from(text.strip_prefix(part).unwrap_or(text))),
        "removesuffix" => one().map(|part| Value::from(text.strip_suffix(part).unwrap_or(text))),
        "partition" => one().map(|part| match text.split_once(part) {
            Some((before, after)) => strings([before, part, after]),
            None => strings([text, "", ""]),
        }),
        "rpartition" => one().map(|part| match text.rsplit_once(part) {
            Some((before, after)) => strings([before, part, after]),
            None => strings(["", "", text]),
        }),
        "join" => from_args::<(&Value,)>(arguments).and_then(|(values,)| {
            let texts = values.try_iter()?.map(|value| python::text(&value)).collect::<Vec<_>>();
            Ok(Value::from(texts.join(text)))
        }),
        "title" => none().map(|()| Value::from(title(text))),
        "casefold" => none().map(|()| Value::from(text.to_lowercase())),
        "swapcase" => none().map(|()| Value::from(swap_case(text))),
        "zfill" => from_args::<(usize,)>(arguments).map(|(width,)| Value::from(zero_fill(text, width))),
        "ljust" | "rjust" | "center" => justify(text, name, arguments),
        "expandtabs" => {
            from_args::<(Option<usize>,)>(arguments).map(|(size,)| Value::from(expand_tabs(text, size.unwrap_or(8))))
        }
        "isspace" => none().map(|()| all(is_space)),
        "isalpha" => none().map(|()| all(char::is_alphabetic)),
        "isalnum" => none().map(|()| all(char::is_alphanumeric)),
        "isdigit" | "isnumeric" | "isdecimal" => none().map(|()| all(char::is_numeric)),
        "islower" => Ok(Value::from(text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase))),
        "isupper" => Ok(Value::from(text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase))),
        _ => return None,
    })
}

/// `str.title`: a letter behind a letter becomes lower case, any other upper case ("ß" becomes
/// "Ss").
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut within_word = false;
    for character in text.chars() {
        if within_word {
            out.extend(character.to_lowercase());
        } else {
            let mut upper = character.to_uppercase();
            out.extend(upper.next());
            out.extend(upper.flat_map(char::to_lowercase));
        }
        within_word = character.is_lowercase() || character.is_uppercase();
    }
    out
}

fn swap_case(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_uppercase() {
            out.extend(character.to_lowercase());
        } else {
            out.extend(character.to_uppercase());
        }
    }
    out
}

/// `str.zfill`: zeros go behind a sign.
fn zero_fill(text: &str, width: usize) -> String {
    let (sign, digits) = if text.starts_with(['+', '-']) { text.split_at(1) } else { ("", text) };
    format!("{sign}{}{digits}", "0".repeat(width.saturating_sub(text.chars().count())))
}

fn justify(text: &str, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (width, fill): (usize, Option<char>) = from_args(arguments)?;
    let fill = fill.unwrap_or(' ');
    let missing = fill.to_string().repeat(width.saturating_sub(text.chars().count()));
    Ok(Value::from(match name {
        "ljust" => format!("{text}{missing}"),
        "rjust" => format!("{missing}{text}"),
        _ => center(text, width, fill),
    }))
}

fn expand_tabs(text: &str, size: usize) -> String {
    let mut out = String::with_capacity(text.len());
    let mut column = 0;
    for character in text.chars() {
        match character {
            '\t' => {
                let missing = if size == 0 { 0 } else { size - column % size };
                out.push_str(&" ".repeat(missing));
                column += missing;
            }
            _ => {
                out.push(character);
                column = if matches!(character, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    out
}

/// `str.split` and `str.rsplit`: at a separator, or at white space, which is then removed from both
/// ends.
fn split(text: &str, arguments: &[Value], from_end: bool) -> Result<Value, Error> {
    let (positional, named): (Rest<Value>, Kwargs) = from_args(arguments)?;
    let options = given(&positional, &named, &["sep", "maxsplit"])?;
    let most = if options[1].is_undefined() { -1 } else { i64::try_from(options[1].clone())? };
    let pieces = usize::try_from(most).map_or(usize::MAX, |most| most.saturating_add(1));
    let separator = match &options[0] {
        none if none.is_none() || none.is_undefined() => None,
        text => Some(text.as_str().ok_or_else(|| invalid("must be str or None"))?),
    };
    let mut parts: Vec<&str> = match (separator, from_end) {
        (Some(""), _) => return Err(invalid("empty separator")),
        (Some(separator), false) => text.splitn(pieces, separator).collect(),
        (Some(separator), true) => text.rsplitn(pieces, separator).collect(),
        (None, false) => words(text, pieces),
        (None, true) => words_from_end(text, pieces),
    };
    if from_end {
        parts.reverse();
    }
    Ok(strings(parts))
}

fn words(text: &str, pieces: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = strip(text, None, true, false);
    while !rest.is_empty() {
        match rest.find(is_space) {
            Some(space) if parts.len() + 1 < pieces => {
                parts.push(&rest[..space]);
                rest = strip(&rest[space..], None, true, false);
            }
            // The last piece keeps its white space.
            _ => {
                parts.push(rest);
                break;
            }
        }
    }
    parts
}

fn words_from_end(text: &str, pieces: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = strip(text, None, false, true);
    while !rest.is_empty() {
        match rest.rfind(is_space) {
            Some(space) if parts.len() + 1 < pieces => {
                parts.push(strip(&rest[space..], None, true, false));
                rest = strip(&rest[..space], None, false, true);
            }
            _ => {
                parts.push(rest);
                break;
            }
        }
    }
    parts
}

/// `str.splitlines`: at every character that is a line break in Python. `\r\n` is one line break.
fn split_lines(text: &str, arguments: &[Value]) -> Result<Value, Error> {
    let (positional, named): (Rest<Value>, Kwargs) = from_args(arguments)?;
    let keep = given(&positional, &named, &["keepends"])?[0].is_true();
    let breaks = |it: char| {
        matches!(it, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let place = rest.find(breaks).unwrap_or(rest.len());
        let length =
            if rest[place..].starts_with("\r\n") { 2 } else { rest[place..].chars().next().map_or(0, char::len_utf8) };
        lines.push(&rest[..if keep { place + length } else { place }]);
        rest = &rest[place + length..];
    }
    Ok(strings(lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_python_s() {
        let made = |text: &str, name: &str, arguments: &[Value]| {
            let value = method(text, name, arguments).expect(name).unwrap_or_else(|error| panic!("{name}: {error}"));
            python::repr(&value)
        };
        let text = |text: &str| Value::from(text);
        let number = |number: i64| Value::from(number);
        // On the right what CPython 3.12 prints.
        for (value, name, arguments, printed) in [
            ("\u{1c}a\u{1f}", "strip", vec![], "'a'"),
            ("xaxx", "lstrip", vec![text("x")], "'axx'"),
            ("xaxx", "rstrip", vec![text("x")], "'xa'"),
            ("a\u{1c}b\u{1d} c", "split", vec![], "['a', 'b', 'c']"),
            (" a  b ", "split", vec![text(" ")], "['', 'a', '', 'b', '']"),
            (" a b  c ", "split", vec![Value::from(()), number(1)], "['a', 'b  c ']"),
            (" a b c ", "rsplit", vec![Value::from(()), number(1)], "[' a b', 'c']"),
            ("aXbXc", "split", vec![text("X"), number(1)], "['a', 'bXc']"),
            ("aXbXc", "rsplit", vec![text("X"), number(1)], "['aXb', 'c']"),
            ("a\u{1c}b\u{2028}c\u{85}d\re\r\nf\n", "splitlines", vec![], "['a', 'b', 'c', 'd', 'e', 'f']"),
            ("a\r\nb", "splitlines", vec![Value::from(true)], r"['a\r\n', 'b']"),
            ("aBc", "swapcase", vec![], "'AbC'"),
            ("-7", "zfill", vec![number(4)], "'-007'"),
            ("a", "ljust", vec![number(3), text(".")], "'a..'"),
            ("a", "rjust", vec![number(3)], "'  a'"),
            ("ab", "center", vec![number(5), text("*")], "'**ab*'"),
            ("abc", "center", vec![number(6), text("*")], "'*abc**'"),
            ("a\tb", "expandtabs", vec![number(4)], "'a   b'"),
            ("abcab", "count", vec![text("ab")], "2"),
            ("\u{1c}", "isspace", vec![], "True"),
        ] {
            assert_eq!(made(value, name, &arguments), printed, "{value:?}.{name}");
        }
        assert!(method("a", "split", &[text("")]).expect("a method").is_err());
    }
}
