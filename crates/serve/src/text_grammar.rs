//! Texts that stand in an answer without JSON's quotes, as regular expressions of a grammar.

use serde_json::Value;

/// What llguidance knows of formats of texts inside of JSON, for texts outside of it.
const FORMATS: [(&str, &str); 5] = [
    ("date", DATE),
    ("time", r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"),
    (
        "date-time",
        r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])",
    ),
    ("uuid", r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"),
    ("email", r"[a-zA-Z0-9_+\-]+(?:\.[a-zA-Z0-9_+\-]+)*@[a-zA-Z0-9]+(?:[.\-][a-zA-Z0-9]+)*\.[a-zA-Z]{2,20}"),
];
/// The days that each month has in each year, and those that some months have beside them.
const DATE: &str =
    r"[0-9]{4}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)";

/// The regular expressions that a text has to fit, each between slashes, joined by `&`. `mark`: what it may not have.
///
/// # Errors
/// A sentence that says which keyword of the schema cannot be kept.
pub(crate) fn text(schema: &Value, mark: &str) -> Result<String, String> {
    let number = |key: &str| schema.get(key).and_then(Value::as_u64);
    let length = match (number("minLength"), number("maxLength")) {
        (None, None) => "*".to_owned(),
        (least, None) => format!("{{{},}}", least.unwrap_or(0)),
        (least, Some(most)) => format!("{{{},{most}}}", least.unwrap_or(0)),
    };
    let mut all = vec![format!("/(?s:.{length})/"), format!("~/(?s:.*){}(?s:.*)/", escaped(mark))];
    if let Some(pattern) = schema.get("pattern").and_then(Value::as_str).filter(|pattern| !pattern.is_empty()) {
        all.push(format!("/{}/", whole_pattern(pattern)?));
    }
    if let Some(format) = schema.get("format").and_then(Value::as_str) {
        let known = FORMATS.iter().find(|(name, _)| *name == format);
        let (_, pattern) = known.ok_or_else(|| format!("the `format` {format:?} of a text"))?;
        all.push(format!("/{}/", slashes_escaped(pattern)));
    }
    Ok(all.join(" & "))
}

/// A pattern, which may stand anywhere in a text, as one of the whole text.
fn whole_pattern(pattern: &str) -> Result<String, String> {
    let refused = || format!("the `pattern` {pattern:?} of a text, which has `^` or `$` within");
    let (begins, ends) = (pattern.starts_with('^'), pattern.ends_with('$') && !is_escaped(pattern, pattern.len() - 1));
    let within =
        &pattern[usize::from(begins)..pattern.len() - usize::from(ends && pattern.len() > usize::from(begins))];
    let (mut depth, mut in_class) = (0usize, false);
    for (_, letter) in within.char_indices().filter(|(place, _)| !is_escaped(within, *place)) {
        match letter {
            '[' if !in_class => in_class = true,
            ']' if in_class => in_class = false,
            _ if in_class => {}
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            '^' | '$' => return Err(refused()),
            // `^a|b$`: either is anchored on one side.
            '|' if depth == 0 && (begins || ends) => return Err(refused()),
            _ => {}
        }
    }
    let any = |is_anchored: bool| if is_anchored { "" } else { "(?s:.*)" };
    Ok(format!("{}(?:{}){}", any(begins), slashes_escaped(within), any(ends)))
}

/// Whether an odd number of backslashes stands in front of this place.
fn is_escaped(text: &str, place: usize) -> bool {
    text.as_bytes()[..place].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1
}

/// A regular expression that may stand between slashes.
fn slashes_escaped(pattern: &str) -> String {
    let mut text = String::with_capacity(pattern.len());
    for (place, letter) in pattern.char_indices() {
        match letter {
            '/' if !is_escaped(pattern, place) => text += "\\/",
            '\n' => text += "\\n",
            '\r' => text += "\\r",
            letter => text.push(letter),
        }
    }
    text
}

/// A text as a regular expression between slashes.
pub(crate) fn escaped(text: &str) -> String {
    let letter = |letter: char| match letter.is_ascii_alphanumeric() {
        true => letter.to_string(),
        false => format!("\\x{{{:X}}}", u32::from(letter)),
    };
    text.chars().map(letter).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn patterns_of_whole_texts() {
        for (pattern, want) in [
            ("ab", Some("(?s:.*)(?:ab)(?s:.*)")),
            ("^ab", Some("(?:ab)(?s:.*)")),
            ("^a/b$", Some("(?:a\\/b)")),
            ("a\\$", Some("(?s:.*)(?:a\\$)(?s:.*)")),
            ("^[^$|]+$", Some("(?:[^$|]+)")),
            ("a|b", Some("(?s:.*)(?:a|b)(?s:.*)")),
            ("^(a|b)$", Some("(?:(a|b))")),
            ("^", Some("(?:)(?s:.*)")),
            ("^a|b$", None),
            ("(^a)", None),
        ] {
            assert_eq!(whole_pattern(pattern).ok().as_deref(), want, "{pattern}");
        }
    }

    #[test]
    fn what_a_schema_says_of_a_text() {
        for (schema, words) in [
            (json!({"type": "string"}), Ok("/(?s:.*)/")),
            (json!({"minLength": 2}), Ok("/(?s:.{2,})/")),
            (json!({"minLength": 2, "maxLength": 5}), Ok("/(?s:.{2,5})/")),
            (json!({"pattern": "^a$"}), Ok("& /(?:a)/")),
            (json!({"format": "uuid"}), Ok("[0-9a-fA-F]{8}-")),
            (json!({"format": "iri"}), Err("`format` \"iri\"")),
        ] {
            let got = text(&schema, "</x>");
            let fits = match (&got, words) {
                (Ok(got), Ok(words)) => got.contains(words) && got.contains(r"& ~/(?s:.*)\x{3C}\x{2F}x\x{3E}(?s:.*)/"),
                (Err(got), Err(words)) => got.contains(words),
                _ => false,
            };
            assert!(fits, "{schema}: {got:?}");
        }
    }
}
