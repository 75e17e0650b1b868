//! Python's `%`: a string on its left is a format, which minijinja's operator refuses. `source.rs` turns the operator into a call
//! where its left side may be a string; what it does with one is here too.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use crate::python;
use crate::source::string_end;

/// The function that `a % b` becomes a call of.
pub(crate) const FUNCTION: &str = "_percent";

/// Operators of one tag that are looked at. No published template has two.
const MOST: usize = 64;

/// A piece of a tag that is no white space: a string, a word or number, or a sign of one or two characters.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Piece<'a> {
    text: &'a str,
    start: usize,
}

impl Piece<'_> {
    fn end(&self) -> usize {
        self.start + self.text.len()
    }

    fn is_string(&self) -> bool {
        self.text.starts_with(['"', '\''])
    }

    fn is_word(&self) -> bool {
        self.text.starts_with(|character: char| character.is_alphanumeric() || character == '_')
    }

    /// A name or a number, as opposed to a word of the language.
    fn is_name(&self) -> bool {
        const KEYWORDS: [&str; 8] = ["and", "or", "not", "in", "is", "if", "else", "recursive"];
        self.is_word() && !KEYWORDS.contains(&self.text)
    }
}

/// `tag` with `left % right` written as a call where `left` is a string, or a name that may be one and `right` is no number.
/// An operand that is hard to tell (a sign before it, a product) leaves the operator as it is: with numbers it works.
pub(crate) fn rewrite(tag: &str) -> String {
    let mut tag = tag.to_owned();
    for _ in 0..MOST {
        let Some((start, operator, end)) = find(&tag) else { break };
        let (left, right) = (tag[start..operator].trim(), tag[operator + 1..end].trim());
        tag = format!("{}{FUNCTION}({left}, {right}){}", &tag[..start], &tag[end..]);
    }
    tag
}

/// The first operator to rewrite: where its left side starts, its own place, where its right side ends.
fn find(tag: &str) -> Option<(usize, usize, usize)> {
    // The tag's own signs are no operators.
    if !tag.get(2..tag.len().saturating_sub(2))?.contains('%') {
        return None;
    }
    let pieces = pieces(tag);
    (1..pieces.len().saturating_sub(1)).filter(|index| pieces[*index].text == "%").find_map(|index| {
        let first = left_side(&pieces, index)?;
        let last = right_side(&pieces, index)?;
        let number = last == index + 1 && pieces[last].text.starts_with(|first: char| first.is_ascii_digit());
        if number && !pieces[index - 1].is_string() {
            return None;
        }
        Some((pieces[first].start, pieces[index].start, pieces[last].end()))
    })
}

fn pieces(tag: &str) -> Vec<Piece<'_>> {
    let bytes = tag.as_bytes();
    // Neither the tag's signs nor those of white space control.
    let inner = if matches!(bytes.get(2), Some(b'-' | b'+')) { 3 } else { 2 }..tag.len() - 2;
    let mut pieces = Vec::new();
    let mut place = inner.start;
    while place < inner.end {
        let start = place;
        let rest = &tag[start..];
        let Some(character) = rest.chars().next() else { break };
        place += match character {
            '"' | '\'' => rest.ceil_char_boundary(string_end(bytes, start) - start),
            _ if character.is_alphanumeric() || character == '_' => {
                rest.find(|it: char| !it.is_alphanumeric() && it != '_').unwrap_or(rest.len())
            }
            _ if ["**", "//", "==", "!=", "<=", ">="].iter().any(|sign| rest.starts_with(sign)) => 2,
            _ => character.len_utf8(),
        };
        if !character.is_whitespace() {
            pieces.push(Piece { text: &tag[start..place], start });
        }
    }
    pieces
}

/// The piece that the left side starts with.
fn left_side(pieces: &[Piece<'_>], operator: usize) -> Option<usize> {
    let mut at = operator.checked_sub(1)?;
    loop {
        let piece = pieces[at];
        if matches!(piece.text, ")" | "]" | "}") {
            at = opening(pieces, at)?;
            // A call or an index is of what stands before it.
            if at > 0
                && pieces[at].text != "{"
                && (pieces[at - 1].is_name() || matches!(pieces[at - 1].text, ")" | "]"))
            {
                at -= 1;
                continue;
            }
        } else if !piece.is_string() && !piece.is_name() {
            return None;
        }
        let here = at;
        let word = |back: usize| here.checked_sub(back).map_or("", |place| pieces[place].text);
        match word(1) {
            "." | "|" => at = at.checked_sub(2)?,
            "*" | "/" | "//" | "**" | "-" | "%" | "is" => return None,
            // The argument of a test.
            _ if word(2) == "is" || (word(2) == "not" && word(3) == "is") => return None,
            before if before.starts_with(['"', '\'']) => at -= 1,
            _ => return Some(at),
        }
    }
}

/// The piece that the right side ends with.
fn right_side(pieces: &[Piece<'_>], operator: usize) -> Option<usize> {
    let mut at = operator + 1;
    let first = pieces.get(at)?;
    if matches!(first.text, "(" | "[" | "{") {
        at = closing(pieces, at)?;
    } else if !first.is_string() && !first.is_name() {
        return None;
    }
    while let Some(next) = pieces.get(at + 1) {
        match next.text {
            "." | "|" if pieces.get(at + 2).is_some_and(Piece::is_name) => at += 2,
            "(" | "[" => at = closing(pieces, at + 1)?,
            "**" => return None,
            _ if next.is_string() && pieces[at].is_string() => at += 1,
            _ => break,
        }
    }
    Some(at)
}

/// The bracket that the one at `at` closes.
fn opening(pieces: &[Piece<'_>], at: usize) -> Option<usize> {
    let mut depth = 0usize;
    (0..=at).rev().find(|index| {
        match pieces[*index].text {
            ")" | "]" | "}" => depth += 1,
            "(" | "[" | "{" => depth -= 1,
            _ => {}
        }
        depth == 0
    })
}

fn closing(pieces: &[Piece<'_>], at: usize) -> Option<usize> {
    let mut depth = 0usize;
    (at..pieces.len()).find(|index| {
        match pieces[*index].text {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth -= 1,
            _ => {}
        }
        depth == 0
    })
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// What the operator does: a format where the left is a string, the rest of a division otherwise.
pub(crate) fn function(left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        return match right.kind() {
            ValueKind::Map => format(text, &[], Some(right)),
            // A tuple in Python. A list would be one value there; minijinja has one kind for both.
            ValueKind::Seq => format(text, &right.try_iter()?.collect::<Vec<_>>(), None),
            _ => format(text, std::slice::from_ref(right), None),
        }
        .map(Value::from);
    }
    let whole = left.is_integer() && right.is_integer();
    if let (true, Ok(left), Ok(right)) = (whole, i64::try_from(left.clone()), i64::try_from(right.clone())) {
        // Python's has the sign of the divisor.
        let rest = left.checked_rem(right).ok_or_else(|| invalid("integer modulo by zero"))?;
        return Ok(Value::from(if rest != 0 && (rest < 0) != (right < 0) { rest + right } else { rest }));
    }
    match (f64::try_from(left.clone()), f64::try_from(right.clone())) {
        (Ok(left), Ok(right)) if right != 0.0 => Ok(Value::from(left - right * (left / right).floor())),
        (Ok(_), Ok(_)) => Err(invalid("float modulo by zero")),
        _ => Err(invalid(format!("tried to use % operator on unsupported types {} and {}", left.kind(), right.kind()))),
    }
}

/// The filter of the same purpose.
pub(crate) fn filter(_: &State<'_, '_>, text: &Value, values: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let text = python::text(text);
    let names: Vec<&str> = named.args().collect();
    if names.is_empty() {
        return format(&text, &values, None);
    }
    let entries = names.iter().map(|name| Ok((*name, named.get::<Value>(name)?))).collect::<Result<Vec<_>, Error>>()?;
    format(&text, &[], Some(&entries.into_iter().collect::<Value>()))
}

/// The widest field. Python has no bound, and no use for more.
const WIDEST: usize = 10_000;

/// A conversion: what stands between `%` and its letter.
#[derive(Default)]
struct Field {
    left: bool,
    sign: Option<char>,
    zero: bool,
    alternative: bool,
    width: usize,
    precision: Option<usize>,
}

fn format(text: &str, values: &[Value], named: Option<&Value>) -> Result<String, Error> {
    let mut out = String::with_capacity(text.len());
    let (mut values, mut rest) = (values.iter(), text);
    while let Some(place) = rest.find('%') {
        out.push_str(&rest[..place]);
        let mut letters = rest[place + 1..].chars().peekable();
        let mut value = None;
        if let (Some('('), Some(map)) = (letters.peek(), named) {
            let name: String = letters.by_ref().skip(1).take_while(|letter| *letter != ')').collect();
            value = Some(map.get_item(&Value::from(name))?);
        }
        let mut field = Field::default();
        while let Some(flag) = letters.next_if(|letter| "-+ 0#".contains(*letter)) {
            match flag {
                '-' => field.left = true,
                '0' => field.zero = true,
                '#' => field.alternative = true,
                sign => field.sign = if field.sign == Some('+') { field.sign } else { Some(sign) },
            }
        }
        field.width = number(&mut letters, &mut values)?.unwrap_or(0);
        if letters.next_if_eq(&'.').is_some() {
            field.precision = Some(number(&mut letters, &mut values)?.unwrap_or(0));
        }
        while letters.next_if(|letter| "hlL".contains(*letter)).is_some() {}
        let letter = letters.next().ok_or_else(|| invalid("incomplete format"))?;
        if letter == '%' {
            out.push('%');
        } else {
            let next = || values.next().cloned().ok_or_else(|| invalid("not enough arguments for format string"));
            field.write(&mut out, letter, &value.map_or_else(next, Ok)?)?;
        }
        rest = &rest[rest.len() - letters.map(char::len_utf8).sum::<usize>()..];
    }
    if values.next().is_some() && named.is_none() {
        return Err(invalid("not all arguments converted during string formatting"));
    }
    out.push_str(rest);
    Ok(out)
}

fn number<'a>(
    letters: &mut std::iter::Peekable<std::str::Chars<'_>>,
    values: &mut impl Iterator<Item = &'a Value>,
) -> Result<Option<usize>, Error> {
    if letters.next_if_eq(&'*').is_some() {
        let value = values.next().ok_or_else(|| invalid("not enough arguments for format string"))?;
        let width = usize::try_from(value.clone())?;
        return if width <= WIDEST { Ok(Some(width)) } else { Err(invalid("a format wider than 10000")) };
    }
    let mut width = None;
    while let Some(digit) = letters.next_if(char::is_ascii_digit) {
        let next = width.unwrap_or(0) * 10 + digit.to_digit(10).unwrap_or(0) as usize;
        if next > WIDEST {
            return Err(invalid("a format wider than 10000"));
        }
        width = Some(next);
    }
    Ok(width)
}

impl Field {
    fn write(&self, out: &mut String, letter: char, value: &Value) -> Result<(), Error> {
        let cut = |text: String| match self.precision {
            Some(most) => text.chars().take(most).collect(),
            None => text,
        };
        match letter {
            's' => self.pad(out, "", &cut(python::text(value)), false),
            'r' | 'a' => self.pad(out, "", &cut(python::repr(value)), false),
            'c' => match (value.as_str(), u32::try_from(value.clone()).ok().and_then(char::from_u32)) {
                (Some(text), _) if text.chars().count() == 1 => self.pad(out, "", text, false),
                (None, Some(character)) => self.pad(out, "", &character.to_string(), false),
                _ => return Err(invalid("%c requires an int or a unicode character")),
            },
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
                let number = match (i128::try_from(value.clone()), f64::try_from(value.clone())) {
                    (Ok(number), _) => number,
                    (_, Ok(float)) if "diu".contains(letter) && float.abs() < 1e30 => float.trunc() as i128,
                    _ => return Err(invalid(format!("%{letter} format: a number is required, not {}", value.kind()))),
                };
                let size = number.unsigned_abs();
                let (prefix, digits) = match letter {
                    'x' => ("0x", format!("{size:x}")),
                    'X' => ("0X", format!("{size:X}")),
                    'o' => ("0o", format!("{size:o}")),
                    _ => ("", size.to_string()),
                };
                let digits =
                    format!("{}{digits}", "0".repeat(self.precision.unwrap_or(0).saturating_sub(digits.len())));
                let prefix = if self.alternative { prefix } else { "" };
                self.pad(out, &format!("{}{prefix}", self.sign_of(number < 0)), &digits, true);
            }
            'f' | 'F' | 'e' | 'E' | 'g' | 'G' => {
                let float = f64::try_from(value.clone())
                    .map_err(|_| invalid(format!("must be real number, not {}", value.kind())))?;
                let text = float_text(letter, float.abs(), self.precision.unwrap_or(6), self.alternative);
                let text = if letter.is_uppercase() { text.to_uppercase() } else { text };
                self.pad(out, &self.sign_of(float.is_sign_negative() && !float.is_nan()), &text, float.is_finite());
            }
            _ => return Err(invalid(format!("unsupported format character '{letter}'"))),
        }
        Ok(())
    }

    fn sign_of(&self, negative: bool) -> String {
        if negative { "-".to_owned() } else { self.sign.map(String::from).unwrap_or_default() }
    }

    /// `zeros`: those of the flag may stand between sign and text.
    fn pad(&self, out: &mut String, sign: &str, text: &str, zeros: bool) {
        let missing = self.width.saturating_sub(sign.chars().count() + text.chars().count());
        let (before, between, after) = match (self.left, self.zero && zeros) {
            (true, _) => (0, 0, missing),
            (false, true) => (0, missing, 0),
            (false, false) => (missing, 0, 0),
        };
        out.push_str(&" ".repeat(before));
        out.push_str(sign);
        out.push_str(&"0".repeat(between));
        out.push_str(text);
        out.push_str(&" ".repeat(after));
    }
}

fn float_text(letter: char, float: f64, precision: usize, alternative: bool) -> String {
    if !float.is_finite() {
        return if float.is_nan() { "nan" } else { "inf" }.to_owned();
    }
    match letter.to_ascii_lowercase() {
        'f' => format!("{float:.precision$}"),
        'e' => exponent(&format!("{float:.precision$e}")),
        _ => {
            let digits = precision.max(1);
            let scientific = format!("{float:.*e}", digits - 1);
            let power: i64 = scientific.split_once('e').and_then(|(_, power)| power.parse().ok()).unwrap_or(0);
            let (text, tail) = if (-4..digits as i64).contains(&power) {
                (format!("{float:.*}", (digits as i64 - 1 - power).max(0) as usize), String::new())
            } else {
                let (digits, power) = scientific.split_once('e').unwrap_or((&scientific, "0"));
                (digits.to_owned(), exponent(&format!("e{power}")))
            };
            let text = if alternative || !text.contains('.') {
                text.as_str()
            } else {
                text.trim_end_matches('0').trim_end_matches('.')
            };
            format!("{text}{tail}")
        }
    }
}

/// Rust's exponent as C writes it: with a sign and two digits at least.
fn exponent(text: &str) -> String {
    let Some((digits, power)) = text.split_once('e') else { return text.to_owned() };
    let (sign, power) = power.strip_prefix('-').map_or(('+', power), |power| ('-', power));
    format!("{digits}e{sign}{power:0>2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_with_a_string_become_calls() {
        for (tag, rewritten) in [
            ("{{ '%s' % x }}", "{{ _percent('%s', x) }}"),
            ("{{ '%s: %s' % (m.role, m['a'](b)[0]) ~ 'x' }}", "{{ _percent('%s: %s', (m.role, m['a'](b)[0])) ~ 'x' }}"),
            ("{% set a = f.g % h|upper + 1 %}", "{% set a = _percent(f.g, h|upper) + 1 %}"),
            ("{{ 'a' '%s' % 'b' 'c' }}", "{{ _percent('a' '%s', 'b' 'c') }}"),
            ("{{ ('a' ~ b)|trim % {'x': 1} }}", "{{ _percent(('a' ~ b)|trim, {'x': 1}) }}"),
            ("{{ '%d' % 5 }}", "{{ _percent('%d', 5) }}"),
            ("{%- if '%s' % a % b == c -%}", "{%- if _percent(_percent('%s', a), b) == c -%}"),
            ("{{ [1 if x else '%s' % y] }}", "{{ [1 if x else _percent('%s', y)] }}"),
            // Numbers, and what cannot be told at a glance, stay.
            (
                "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}",
                "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}",
            ),
            ("{{ -a % b }}", "{{ -a % b }}"),
            ("{{ 2 * a % b }}", "{{ 2 * a % b }}"),
            ("{{ a % -b }}", "{{ a % -b }}"),
            ("{{ x is y % b }}", "{{ x is y % b }}"),
            ("{{ '%' }}{%%}", "{{ '%' }}{%%}"),
            ("{{ a % }}", "{{ a % }}"),
            ("{{ % a }}", "{{ % a }}"),
            ("{{ a) % b }}", "{{ a) % b }}"),
            ("{{ a % (b }}", "{{ a % (b }}"),
            ("{{", "{{"),
            ("{%", "{%"),
            ("{{ 'é % 'é", "{{ 'é % 'é"),
        ] {
            assert_eq!(rewrite(tag), rewritten);
        }
    }

    #[test]
    fn formats_are_python_s() {
        let value = |json: &str| Value::from_serialize(serde_json::from_str::<serde_json::Value>(json).expect("JSON"));
        // Left: format and values. Right: what CPython 3.12 makes of them.
        for (text, values, made) in [
            ("%5.2f|%-5s|%05d|%x|%r|%%", r#"[3.14159, "ab", 42, 255, "q"]"#, " 3.14|ab   |00042|ff|'q'|%"),
            ("%s %s", "[null, true]", "None True"),
            ("%(a)s%(b)03d", r#"{"a": [1, "x"], "b": 7}"#, "[1, 'x']007"),
            ("%d %i", "[3.7, true]", "3 1"),
            ("%e %g %g %g", "[12345.678, 0.0001, 1e20, 100000]", "1.234568e+04 0.0001 1e+20 100000"),
            ("%+d % d %#x %c %.3s", r#"[3, 4, 255, "x", "abcdef"]"#, "+3  4 0xff x abc"),
            ("%*d", "[4, 7]", "   7"),
            ("%-6dx%06.1f", "[-5, -2.25]", "-5    x-002.2"),
            ("%s", r#""é""#, "é"),
        ] {
            assert_eq!(function(&Value::from(text), &value(values)).expect(text), Value::from(made), "{text}");
        }
        for (text, values) in
            [("%s %s", r#"["a"]"#), ("%s", r#"["a", "b"]"#), ("%d", r#"["a"]"#), ("%", "[1]"), ("%9999999d", "[1]")]
        {
            assert!(function(&Value::from(text), &value(values)).is_err(), "{text}");
        }
        for (left, right, rest) in [(7, -3, -2), (-7, 3, 2), (7, 3, 1), (-6, 3, 0)] {
            assert_eq!(function(&Value::from(left), &Value::from(right)).expect("a number"), Value::from(rest));
        }
        assert!(function(&Value::from(1), &Value::from(0)).is_err());
        assert!(function(&Value::from(i64::MIN), &Value::from(-1)).is_err());
    }
}
