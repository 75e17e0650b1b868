//! What a schema may have before it is made into a grammar. To read a larger one takes the time of other requests, and
//! answers of its form that of other answers.

use serde_json::Value;

/// Lists and objects within each other.
const DEEPEST: usize = 64;
/// Bytes of names and texts.
const MOST_BYTES: usize = 256 << 10;
/// Values of any kind, of which each property, alternative and value of an `enum` is at least one.
const MOST_VALUES: usize = 20_000;
/// Properties of one object. After each, any of those behind it may come.
const MOST_PROPERTIES: usize = 400;
/// Alternatives in one place, which an answer may all be at once.
const MOST_BRANCHES: usize = 500;
/// Bytes of a regular expression.
const LONGEST_PATTERN: usize = 1000;

/// What has been seen of a schema.
#[derive(Default)]
struct Seen {
    bytes: usize,
    values: usize,
}

/// Checks the schemas of a form: that of the answer, and those of the tools that it may call.
///
/// # Errors
/// A sentence that says which bound they do not keep.
pub(crate) fn check<'a>(schemas: impl IntoIterator<Item = &'a Value>) -> Result<(), String> {
    let mut seen = Seen::default();
    for (n, schema) in schemas.into_iter().enumerate() {
        if n > MOST_BRANCHES {
            return Err(format!("there are more than {MOST_BRANCHES} tools"));
        }
        walk(schema, 1, &mut seen)?;
    }
    Ok(())
}

fn walk(value: &Value, depth: usize, seen: &mut Seen) -> Result<(), String> {
    seen.values += 1;
    if seen.values > MOST_VALUES {
        return Err(format!("the schema has more than {MOST_VALUES} values (properties, alternatives, enum)"));
    }
    if depth > DEEPEST {
        return Err(format!("the schema has more than {DEEPEST} lists and objects within each other"));
    }
    match value {
        Value::String(text) => count_bytes(text, seen),
        Value::Array(items) => items.iter().try_for_each(|item| walk(item, depth + 1, seen)),
        Value::Object(fields) => {
            for (key, value) in fields {
                check_field(key, value)?;
                count_bytes(key, seen)?;
                walk(value, depth + 1, seen)?;
            }
            Ok(())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
    }
}

fn count_bytes(text: &str, seen: &mut Seen) -> Result<(), String> {
    seen.bytes += text.len();
    match seen.bytes > MOST_BYTES {
        true => Err(format!("the names and texts of the schema have more than {MOST_BYTES} bytes")),
        false => Ok(()),
    }
}

/// The bounds of single keywords.
fn check_field(key: &str, value: &Value) -> Result<(), String> {
    let is_long = |pattern: &str| pattern.len() > LONGEST_PATTERN;
    match (key, value) {
        ("properties", Value::Object(fields)) if fields.len() > MOST_PROPERTIES => {
            Err(format!("`properties` has {} properties, and at most {MOST_PROPERTIES} are taken", fields.len()))
        }
        ("anyOf" | "oneOf" | "allOf", Value::Array(branches)) if branches.len() > MOST_BRANCHES => {
            Err(format!("`{key}` has {} alternatives, and at most {MOST_BRANCHES} are taken", branches.len()))
        }
        ("pattern", Value::String(pattern)) if is_long(pattern) => {
            Err(format!("`pattern` has {} bytes, and at most {LONGEST_PATTERN} are taken", pattern.len()))
        }
        ("patternProperties", Value::Object(fields)) if fields.keys().any(|pattern| is_long(pattern)) => {
            Err(format!("a pattern of `patternProperties` has more than {LONGEST_PATTERN} bytes"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    fn nested(depth: usize) -> Value {
        (0..depth).fold(json!({"type": "string"}), |within, _| json!({"type": "array", "items": within}))
    }

    fn properties(count: usize) -> Value {
        let all: Map<String, Value> = (0..count).map(|n| (format!("p{n}"), json!({"type": "string"}))).collect();
        json!({"type": "object", "properties": all})
    }

    #[test]
    fn schemas_beyond_a_bound_are_refused_by_its_name() {
        let numbers = |count: usize| json!({"enum": (0..count).collect::<Vec<_>>()});
        let branches = |count: usize| json!({"anyOf": vec![json!({"type": "null"}); count]});
        let letters = |count: usize| "x".repeat(count);
        for (schema, words) in [
            (nested(62), None),
            (nested(100), Some("64 lists and objects")),
            (numbers(10_000), None),
            (numbers(50_000), Some("20000 values")),
            (properties(400), None),
            (properties(401), Some("401 properties")),
            (branches(500), None),
            (json!({"items": branches(501)}), Some("`anyOf` has 501 alternatives")),
            (json!({"pattern": letters(1000)}), None),
            (json!({"pattern": letters(1001)}), Some("`pattern` has 1001 bytes")),
            (json!({"patternProperties": {letters(1001): {}}}), Some("patternProperties")),
            (json!({"enum": [letters(300 << 10)]}), Some("262144 bytes")),
            // Bounds of numbers cost nothing.
            (json!({"type": "string", "minLength": 1_000_000_000}), None),
        ] {
            let got = check([&schema]).err();
            let fits = match words {
                None => got.is_none(),
                Some(words) => got.as_ref().is_some_and(|got| got.contains(words)),
            };
            let shown: String = schema.to_string().chars().take(100).collect();
            assert!(fits, "{shown}: {got:?}, not {words:?}");
        }
        // All tools together keep the bounds.
        let tools = vec![numbers(9000); 3];
        assert_eq!(check(&tools[..2]), Ok(()));
        assert!(check(&tools).is_err_and(|error| error.contains("20000 values")));
        assert!(check(&vec![Value::Null; 502]).is_err_and(|error| error.contains("500 tools")));
    }
}
