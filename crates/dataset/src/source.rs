//! Rewrites a template's source before it is compiled, for the two things that minijinja has no other place to hook into:
//! `{% generation %}` blocks, and slices with a step.
//!
//! A generation tag becomes a `{% call %}` block, which is what transformers' own extension parses it into, so white space
//! control and scopes stay as they are. `x[a:b:c]` becomes a method call: minijinja 2.24 panics on `[][::-1]`, which
//! Qwen3's template comes to when it is given no messages, and takes `x[2:0:-1]` for `x[2::-1]`.

use crate::{generation, python_methods};

/// The rewritten source, and whether it has generation blocks.
pub(crate) fn rewrite(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len() + 64);
    let mut found = false;
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let code = matches!(rest.as_bytes().get(1), Some(b'{' | b'%'));
        let end = match rest.as_bytes().get(1) {
            Some(b'#') => rest.find("#}").map_or(rest.len(), |end| end + 2),
            Some(b'{') => tag_end(rest, b"}}"),
            Some(b'%') => tag_end(rest, b"%}"),
            _ => 1,
        };
        let (tag, after) = rest.split_at(end);
        let word = tag_word(tag);
        match word {
            "generation" => {
                out.push_str(&tag.replacen("generation", &format!("call {}()", generation::FUNCTION), 1));
                found = true;
            }
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endcall", 1)),
            _ if code => out.push_str(&rewrite_slices(tag)),
            _ => out.push_str(tag),
        }
        rest = after;
        if word == "raw" {
            let end = raw_end(rest);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        }
    }
    out.push_str(rest);
    (out, found)
}

/// Where the tag that `text` starts with ends. Strings and brackets within it may hold the closing characters.
fn tag_end(text: &str, close: &[u8; 2]) -> usize {
    let bytes = text.as_bytes();
    let (mut place, mut depth) = (2, 0usize);
    while place < bytes.len() {
        if depth == 0 && bytes[place..].starts_with(close) {
            return place + 2;
        }
        match bytes[place] {
            b'"' | b'\'' => place = string_end(bytes, place) - 1,
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        place += 1;
    }
    bytes.len()
}

/// The place behind the string literal that starts at `place`; at most the end.
fn string_end(bytes: &[u8], place: usize) -> usize {
    let mut end = place + 1;
    while end < bytes.len() && bytes[end] != bytes[place] {
        end += if bytes[end] == b'\\' { 2 } else { 1 };
    }
    (end + 1).min(bytes.len())
}

/// What a block tag holds, without its signs: `generation` of `{%- generation -%}`.
fn tag_word(tag: &str) -> &str {
    let Some(inner) = tag.strip_prefix("{%").and_then(|inner| inner.strip_suffix("%}")) else { return "" };
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    inner.strip_suffix(['-', '+']).unwrap_or(inner).trim()
}

fn raw_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(place) = text[from..].find("{%") {
        let start = from + place;
        if let Some(length) = text[start..].find("%}")
            && tag_word(&text[start..start + length + 2]) == "endraw"
        {
            return start;
        }
        from = start + 2;
    }
    text.len()
}

/// An open bracket in the text written so far, and the colons directly within it.
struct Bracket {
    square: bool,
    start: usize,
    colons: Vec<usize>,
}

fn rewrite_slices(tag: &str) -> String {
    let mut out = String::with_capacity(tag.len());
    let mut brackets: Vec<Bracket> = Vec::new();
    let mut rest = tag;
    while let Some(character) = rest.chars().next() {
        let length = match character {
            // A backslash may have skipped into the middle of a character that an unclosed string ends with.
            '"' | '\'' => rest.ceil_char_boundary(string_end(rest.as_bytes(), 0)),
            _ => character.len_utf8(),
        };
        match character {
            '(' | '[' | '{' => {
                brackets.push(Bracket { square: character == '[', start: out.len(), colons: Vec::new() });
            }
            ':' => brackets.iter_mut().next_back().into_iter().for_each(|bracket| bracket.colons.push(out.len())),
            ')' | ']' | '}' => {
                if let Some(Bracket { square: true, start, colons }) = brackets.pop()
                    && let [first, second] = colons[..]
                {
                    let parts = [&out[start + 1..first], &out[first + 1..second], &out[second + 1..]];
                    let parts = parts.map(|part| if part.trim().is_empty() { "none" } else { part }).join(",");
                    out.truncate(start);
                    out.push_str(&format!(".{}({parts})", python_methods::SLICE));
                    rest = &rest[length..];
                    continue;
                }
            }
            _ => {}
        }
        out.push_str(&rest[..length]);
        rest = &rest[length..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tags_are_rewritten() {
        let kept = "{# {% generation %} #}{{ '{% generation %}' }}{% raw %}{% generation %}{% endraw %}{ generation }";
        assert_eq!(rewrite(kept), (kept.to_owned(), false));
        let (source, found) = rewrite("a{%- generation -%}{{ {'a': {}} }}{%+ endgeneration %}{% unclosed");
        assert_eq!(source, "a{%- call _generation_block() -%}{{ {'a': {}} }}{%+ endcall %}{% unclosed");
        assert!(found);
        for odd in
            ["{", "{{", "{%", "{#", "{{ '\\", "{% raw %}", "{% raw %}{%", "é{% 'é", "{{ '\\é", "{{ ]:[ }}", "{{ [ }}"]
        {
            assert_eq!(rewrite(odd).0, odd);
        }
    }

    #[test]
    fn slices_with_a_step_become_calls() {
        for (source, rewritten) in [
            ("{{ x[::-1] }}", "{{ x._slice(none,none,-1) }}"),
            (
                "{% for a in x[y[::2][0] : f([1, 2]) : 3] %}",
                "{% for a in x._slice(y._slice(none,none,2)[0] , f([1, 2]) , 3) %}",
            ),
            (
                "{{ x[1:] }}{{ x['::'] }}{{ [{1: 2}, {3: 4}] }}x[::2]",
                "{{ x[1:] }}{{ x['::'] }}{{ [{1: 2}, {3: 4}] }}x[::2]",
            ),
        ] {
            assert_eq!(rewrite(source), (rewritten.to_owned(), false));
        }
    }
}
