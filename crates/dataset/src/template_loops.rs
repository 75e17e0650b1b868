//! What a loop of a template goes over: `for a in x` becomes `for a in _each((x))`.
//!
//! minijinja goes over none as over an empty list. Python refuses it, so a template that takes a message
//! without content for a list of parts stops in transformers. It has to stop here too, or a row would be
//! trained that no one can ask for.

use crate::python_methods::EACH;
use crate::template_tags::{string_end, tag_words};

/// A tag, as it is read by the engine. Only `for` is changed.
pub(crate) fn rewrite(tag: &str) -> String {
    let words = tag_words(tag);
    let behind = words.strip_prefix("for").filter(|rest| !rest.starts_with(is_word));
    let Some((start, end)) = behind.and_then(iterated) else { return tag.to_owned() };
    let behind = behind.unwrap_or_default();
    // `words` is a part of the tag.
    let first = words.as_ptr() as usize - tag.as_ptr() as usize + words.len() - behind.len();
    let (start, end) = (first + start, first + end);
    format!("{}{EACH}(({})){}", &tag[..start], &tag[start..end], &tag[end..])
}

fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Where the expression lies that ` a in x if y recursive` goes over: behind `in`, and before the words that
/// may follow it. None of them is looked for in brackets or strings.
fn iterated(behind: &str) -> Option<(usize, usize)> {
    let bytes = behind.as_bytes();
    let (mut place, mut depth, mut start) = (0, 0_usize, None);
    let mut end = behind.len();
    while place < bytes.len() {
        match bytes[place] {
            b'"' | b'\'' => {
                place = string_end(bytes, place);
                continue;
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            first if first.is_ascii_alphanumeric() || first == b'_' || first >= 0x80 => {
                let is_inside = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte >= 0x80;
                let length = bytes[place..].iter().take_while(|byte| is_inside(byte)).count();
                match (&bytes[place..place + length], start) {
                    (b"in", None) if depth == 0 => start = Some(place + length),
                    (b"if" | b"recursive", Some(_)) if depth == 0 => {
                        end = place;
                        break;
                    }
                    _ => {}
                }
                place += length;
                continue;
            }
            _ => {}
        }
        place += 1;
    }
    let start = start?;
    let expression = behind.get(start..end)?;
    let trimmed = expression.trim();
    let start = start + expression.len() - expression.trim_start().len();
    (!trimmed.is_empty()).then_some((start, start + trimmed.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_loop_goes_over_is_checked() {
        for (tag, rewritten) in [
            ("{% for m in messages %}", "{% for m in _each((messages)) %}"),
            ("{%- for a, b in x.items() -%}", "{%- for a, b in _each((x.items())) -%}"),
            ("{%for m in x if m.role == 'in' %}", "{%for m in _each((x)) if m.role == 'in' %}"),
            (
                "{% for m in x[f(1 if y else 2)]|list recursive %}",
                "{% for m in _each((x[f(1 if y else 2)]|list)) recursive %}",
            ),
            ("{% for inner in 'é if'+index %}", "{% for inner in _each(('é if'+index)) %}"),
            ("{% for m in\n  x\n%}", "{% for m in\n  _each((x))\n%}"),
            ("{% for (a, b) in 1, 2 %}", "{% for (a, b) in _each((1, 2)) %}"),
        ] {
            assert_eq!(rewrite(tag), rewritten);
        }
        for kept in [
            "{% if a in b %}",
            "{{ for a in b }}",
            "{% for %}",
            "{% for a in %}",
            "{% for a in if b %}",
            "{% forall a in b %}",
            "{% for a in b",
            "{% for a in 'é",
            "{% set x = 1 %}",
        ] {
            assert_eq!(rewrite(kept), kept);
        }
    }
}
