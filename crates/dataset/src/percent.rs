//! What Python's `%` does: with a string on its left it formats, which minijinja's operator
//! refuses. `operators.rs` turns the operator into a call of [`FUNCTION`].

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use crate::python;

/// The name of the function that `a % b` becomes a call of.
pub(crate) const FUNCTION: &str = "_percent";

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// What the operator does: it formats if the left side is a string, and otherwise gives the
/// remainder of a division.
pub(crate) fn function(left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(text) = left.as_str() {
        return match right.kind() {
            ValueKind::Map => format(text, &[], Some(right)),
            // Python formats the items of a tuple, and a list as one value. minijinja has one kind
            // for both.
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

/// jinja2's filter `format`.
pub(crate) fn filter(_: &State<'_, '_>, text: &Value, values: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let text = python::text(text);
    let names: Vec<&str> = named.args().collect();
    if names.is_empty() {
        return format(&text, &values, None);
    }
    let entries = names.iter().map(|name| Ok((*name, named.get::<Value>(name)?))).collect::<Result<Vec<_>, Error>>()?;
    format(&text, &[], Some(&entries.into_iter().collect::<Value>()))
}

/// The widest field, in characters. Python has no bound, and templates need no more.
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

    /// Writes a field of the width. `zeros`: the flag `0` may put zeros between sign and text.
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

/// Writes Rust's exponent as C does: with a sign and at least two digits.
fn exponent(text: &str) -> String {
    let Some((digits, power)) = text.split_once('e') else { return text.to_owned() };
    let (sign, power) = power.strip_prefix('-').map_or(('+', power), |power| ('-', power));
    format!("{digits}e{sign}{power:0>2}")
}

#[cfg(test)]
mod tests {
    use super::*;

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
