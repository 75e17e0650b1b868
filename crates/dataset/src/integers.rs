//! Whole numbers of any length. JSON has them and Python reads them, while serde_json makes floats
//! of those beyond 64 bits, which would print another number. So they pass through it as marked
//! texts.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use minijinja::Value;
use minijinja::value::{Object, ObjectRepr};

/// A Unicode noncharacter, which no text needs.
const MARK: char = '\u{FDD2}';

/// A whole number of fewer digits always fits 64 bits.
const LONG: usize = 19;

/// JSON in which long whole numbers are marked texts. Everything up to the first such number keeps
/// its place, so that positions in errors are right there.
pub(crate) fn marked(json: &str) -> Cow<'_, str> {
    let bytes = json.as_bytes();
    let mut out = String::new();
    let (mut place, mut copied) = (0, 0);
    while place < bytes.len() {
        match bytes[place] {
            b'"' => place = string_end(bytes, place),
            b'-' | b'0'..=b'9' => {
                let end = place + bytes[place..].iter().take_while(|byte| is_of_number(**byte)).count();
                let number = &json[place..end];
                if is_long(number) {
                    out.push_str(&json[copied..place]);
                    out.extend(['"', MARK]);
                    out.push_str(number);
                    out.push('"');
                    copied = end;
                }
                place = end;
            }
            _ => place += 1,
        }
    }
    if copied == 0 {
        return Cow::Borrowed(json);
    }
    out.push_str(&json[copied..]);
    Cow::Owned(out)
}

fn is_of_number(byte: u8) -> bool {
    matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E' | b'0'..=b'9')
}

fn string_end(bytes: &[u8], place: usize) -> usize {
    let mut end = place + 1;
    while end < bytes.len() && bytes[end] != b'"' {
        end += if bytes[end] == b'\\' { 2 } else { 1 };
    }
    (end + 1).min(bytes.len())
}

/// Whether this is a whole number, as JSON writes it, that neither i64 nor u64 holds.
fn is_long(number: &str) -> bool {
    let digits = number.strip_prefix('-').unwrap_or(number);
    digits.len() >= LONG
        && !digits.starts_with('0')
        && digits.bytes().all(|byte| byte.is_ascii_digit())
        && number.parse::<i64>().is_err()
        && number.parse::<u64>().is_err()
}

/// The digits of a marked number. `None`: the text is no such number.
pub(crate) fn digits(text: &str) -> Option<&str> {
    text.strip_prefix(MARK).filter(|number| is_long(number))
}

/// A marked number as a template sees it.
pub(crate) fn value(digits: &str) -> Value {
    match (digits.parse::<i128>(), digits.parse::<u128>()) {
        (Ok(number), _) => Value::from(number),
        (_, Ok(number)) => Value::from(number),
        _ => Value::from_object(LongInteger(digits.to_owned())),
    }
}

/// A number beyond what minijinja calculates with. It can be printed.
#[derive(Debug)]
pub(crate) struct LongInteger(pub(crate) String);

impl Object for LongInteger {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_long_whole_numbers_are_marked() {
        for kept in [
            r#"{"a": 9223372036854775807, "b": -9223372036854775808, "c": 18446744073709551615, "d": 1.5e300}"#,
            r#"{"s": "18446744073709551616 \" 18446744073709551616", "f": 18446744073709551616.0, "z": 00018446744073709551616}"#,
            "",
            "-",
            "\"",
            "\"\\",
            "[1",
        ] {
            assert!(matches!(marked(kept), Cow::Borrowed(same) if same == kept), "{kept}");
        }
        let marks = marked(r#"[18446744073709551616, {"é": -9223372036854775809}]"#);
        assert_eq!(marks, "[\"\u{FDD2}18446744073709551616\", {\"é\": \"\u{FDD2}-9223372036854775809\"}]");
        for number in
            ["18446744073709551616", "-9223372036854775809", "9".repeat(39).as_str(), "9".repeat(500).as_str()]
        {
            let mark = format!("{MARK}{number}");
            assert_eq!(value(digits(&mark).expect("a number")).to_string(), number);
        }
        assert_eq!(digits("18446744073709551616"), None);
        assert_eq!(digits("\u{FDD2}x"), None);
    }
}
