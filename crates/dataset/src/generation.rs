//! `{% generation %}` blocks, which transformers adds to jinja2 and minijinja has no way to add.
//!
//! The source is rewritten before it is compiled: the tag becomes a `{% call %}` block, which is what transformers' own
//! extension parses it into, so whitespace control and scopes stay as they are. The called function puts a mark before
//! and after the block's text; the marks are taken out of the rendered text and their places kept.

use std::ops::Range;

use minijinja::value::Kwargs;
use minijinja::{Error, State, Value};

/// The function that a generation block calls.
pub(crate) const FUNCTION: &str = "_generation_block";

/// Unicode noncharacters: they have no place in text that is exchanged, so no text needs them.
const START: char = '\u{FDD0}';
const END: char = '\u{FDD1}';

/// Whether text holds one of the marks, and so cannot be rendered.
pub(crate) fn has_mark(text: &str) -> bool {
    text.contains([START, END])
}

/// The source with its generation tags rewritten, and whether there were any.
pub(crate) fn rewrite(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len() + 64);
    let mut found = false;
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
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
                out.push_str(&tag.replacen("generation", &format!("call {FUNCTION}()"), 1));
                found = true;
            }
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endcall", 1)),
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
            quote @ (b'"' | b'\'') => {
                place += 1;
                while place < bytes.len() && bytes[place] != quote {
                    place += if bytes[place] == b'\\' { 2 } else { 1 };
                }
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        place += 1;
    }
    bytes.len()
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

/// What the rewritten tag calls: the block's text between marks.
pub(crate) fn function(state: &State<'_, '_>, options: Kwargs) -> Result<Value, Error> {
    let block: Value = options.get("caller")?;
    let text = block.call(state, &[])?;
    Ok(Value::from(format!("{START}{text}{END}")))
}

/// The text without its marks, and the byte ranges that they enclosed.
pub(crate) fn take_marks(marked: String) -> (String, Vec<Range<usize>>) {
    if !has_mark(&marked) {
        return (marked, Vec::new());
    }
    let mut text = String::with_capacity(marked.len());
    let (mut spans, mut open) = (Vec::new(), Vec::new());
    for piece in marked.split_inclusive([START, END]) {
        let end = piece.trim_end_matches([START, END]);
        text.push_str(end);
        match piece[end.len()..].chars().next() {
            Some(START) => open.push(text.len()),
            Some(_) => spans.extend(open.pop().map(|start: usize| start..text.len())),
            None => {}
        }
    }
    (text, spans)
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
        for odd in ["{", "{{", "{%", "{#", "{{ '\\", "{% raw %}", "{% raw %}{%", "é{% 'é"] {
            assert_eq!(rewrite(odd).0, odd);
        }
    }

    #[test]
    fn marks_become_byte_ranges() {
        let (text, spans) = take_marks("é\u{FDD0}ab\u{FDD1}c\u{FDD0}\u{FDD1}\u{FDD1}\u{FDD0}x".to_owned());
        assert_eq!((text.as_str(), spans), ("éabcx", vec![2..4, 5..5]));
    }
}
