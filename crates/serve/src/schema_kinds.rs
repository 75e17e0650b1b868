//! What a schema of JSON says of a value at its top: behind its references, and which types there may be.

use serde_json::Value;

/// References that follow each other.
const LONGEST_CHAIN: usize = 16;

/// The schema that a value has, behind references within `root` and lists of one alternative. `None`: a reference leads
/// nowhere, or in a circle.
pub(crate) fn resolved<'a>(schema: &'a Value, root: &'a Value) -> Option<&'a Value> {
    chain(schema, root)?.pop()
}

/// A schema and those that it leads to, one behind the other: the last is [`resolved`].
pub(crate) fn chain<'a>(schema: &'a Value, root: &'a Value) -> Option<Vec<&'a Value>> {
    let (mut schema, mut chain) = (schema, Vec::new());
    for _ in 0..LONGEST_CHAIN {
        chain.push(schema);
        let only = |key: &str| match schema.get(key).and_then(Value::as_array).map(Vec::as_slice) {
            Some([only]) => Some(only),
            _ => None,
        };
        schema = if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            root.pointer(reference.strip_prefix('#')?)?
        } else if let Some(only) = ["allOf", "anyOf", "oneOf"].into_iter().find_map(only) {
            only
        } else {
            return Some(chain);
        };
    }
    None
}

/// The types of JSON that a schema allows, as far as it says so. None: it does not say.
pub(crate) fn kinds<'a>(schema: &'a Value, root: &'a Value) -> Vec<&'a str> {
    let Some(schema) = resolved(schema, root) else { return Vec::new() };
    match schema.get("type") {
        Some(Value::String(kind)) => return vec![kind],
        Some(Value::Array(kinds)) => return kinds.iter().filter_map(Value::as_str).collect(),
        _ => {}
    }
    let is_text = match (schema.get("const"), schema.get("enum").and_then(Value::as_array)) {
        (Some(only), _) => only.is_string(),
        (None, Some(values)) => !values.is_empty() && values.iter().all(Value::is_string),
        (None, None) => false,
    };
    if is_text {
        return vec!["string"];
    }
    let branches = ["anyOf", "oneOf"].iter().find_map(|key| schema.get(key)?.as_array());
    // Where one branch does not say, nothing is known.
    let of_branch = |branch: &'a Value| {
        let kind = resolved(branch, root)?.get("type").and_then(Value::as_str);
        kind.or_else(|| only_text(branch, root))
    };
    branches.and_then(|branches| branches.iter().map(of_branch).collect()).unwrap_or_default()
}

fn only_text<'a>(branch: &'a Value, root: &'a Value) -> Option<&'a str> {
    let branch = resolved(branch, root)?;
    let values = branch.get("enum").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let all = branch.get("const").into_iter().chain(values);
    let is_text = all.clone().next().is_some() && all.clone().all(Value::is_string);
    is_text.then_some("string")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn types_behind_references_and_alternatives() {
        let root = json!({
            "$defs": {
                "colour": {"enum": ["red", "green"]},
                "again": {"$ref": "#/$defs/colour"},
                "circle": {"$ref": "#/$defs/circle"},
                "count": {"type": "integer"},
            },
        });
        for (schema, want) in [
            (json!({"type": "string"}), vec!["string"]),
            (json!({"type": ["string", "null"]}), vec!["string", "null"]),
            (json!({"$ref": "#/$defs/again"}), vec!["string"]),
            (json!({"allOf": [{"$ref": "#/$defs/count"}], "default": 1}), vec!["integer"]),
            (json!({"anyOf": [{"$ref": "#/$defs/colour"}, {"type": "null"}]}), vec!["string", "null"]),
            (json!({"const": "7"}), vec!["string"]),
            (json!({"enum": ["a", 1]}), vec![]),
            (json!({"anyOf": [{"type": "string"}, {}]}), vec![]),
            (json!({"$ref": "#/$defs/circle"}), vec![]),
            (json!({"$ref": "#/$defs/nowhere"}), vec![]),
            (json!({"$ref": "elsewhere.json"}), vec![]),
            (json!({}), vec![]),
        ] {
            assert_eq!(kinds(&schema, &root), want, "{schema}");
        }
    }
}
