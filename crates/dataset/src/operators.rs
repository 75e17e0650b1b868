//! Operators in the code of a template that minijinja has in another form than Python. They become
//! calls of functions: `%` (`percent.rs`) if its left side may be a string, which minijinja's
//! operator refuses, and `~` ([`python::joined`]), since minijinja's writes lists and objects as
//! JSON, and floats with all their digits.
//!
//! [`python::joined`]: crate::python::joined

use crate::template_tags::string_end;
use crate::{percent, python};

/// The most operators of one tag that are rewritten. No published template has two.
const MOST: usize = 64;

/// A piece of a tag that is no white space: a string, a word or number, or a sign of one or two
/// characters.
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

    fn is_number(&self) -> bool {
        self.text.starts_with(|character: char| character.is_ascii_digit())
    }

    /// A name or a number, as opposed to a word of the language.
    fn is_name(&self) -> bool {
        const KEYWORDS: [&str; 8] = ["and", "or", "not", "in", "is", "if", "else", "recursive"];
        self.is_word() && !KEYWORDS.contains(&self.text)
    }
}

/// A tag with `left % right` and `left ~ right` written as calls. An operator whose operands are
/// hard to tell (with a sign before them, in a product) stays as it is: for numbers and strings it
/// works.
pub(crate) fn rewrite(tag: &str) -> String {
    concatenations(formats(tag.to_owned()))
}

/// `left % right` becomes a call if `left` is a string, or if it is a name that may be a string and
/// `right` is no number.
fn formats(mut tag: String) -> String {
    let is_number =
        |pieces: &[Piece<'_>], operator: usize, last: usize| last == operator + 1 && pieces[last].is_number();
    for _ in 0..MOST {
        let found = find(&tag, "%", |pieces, operator, last| {
            !is_number(pieces, operator, last) || pieces[operator - 1].is_string()
        });
        let Some((start, operator, end)) = found else { break };
        let (left, right) = (tag[start..operator].trim(), tag[operator + 1..end].trim());
        tag = format!("{}{}({left}, {right}){}", &tag[..start], percent::FUNCTION, &tag[end..]);
    }
    tag
}

/// `a ~ b ~ c` becomes one call. Two strings side by side stay.
fn concatenations(mut tag: String) -> String {
    for _ in 0..MOST {
        let found = find(&tag, "~", |pieces, operator, last| {
            // A product or a test on the right binds more tightly.
            let behind = pieces.get(last + 1).map_or("", |piece| piece.text);
            let strings = pieces[operator - 1].is_string() && pieces[last].is_string();
            !strings && !["*", "/", "//", "%", "is"].contains(&behind)
        });
        let Some((start, operator, end)) = found else { break };
        let (left, right) = (tag[start..operator].trim(), tag[operator + 1..end].trim());
        // The call that the operator before it became takes one more argument.
        let call = left.strip_prefix(python::JOINED).and_then(|call| call.strip_suffix(')'));
        tag = match call {
            Some(call) => format!("{}{}{call}, {right}){}", &tag[..start], python::JOINED, &tag[end..]),
            None => format!("{}{}({left}, {right}){}", &tag[..start], python::JOINED, &tag[end..]),
        };
    }
    tag
}

/// The first operator to rewrite: the start of its left side, its own place and the end of its
/// right side, in bytes. `is_wanted` is given the pieces, the index of the operator and that of the
/// last piece of its right side.
fn find(
    tag: &str,
    sign: &str,
    is_wanted: impl Fn(&[Piece<'_>], usize, usize) -> bool,
) -> Option<(usize, usize, usize)> {
    // The tag's own signs are no operators.
    if !tag.get(2..tag.len().saturating_sub(2))?.contains(sign) {
        return None;
    }
    let pieces = pieces(tag);
    (1..pieces.len().saturating_sub(1)).filter(|index| pieces[*index].text == sign).find_map(|index| {
        let first = left_side(&pieces, index)?;
        let last = right_side(&pieces, index)?;
        is_wanted(&pieces, index, last).then(|| (pieces[first].start, pieces[index].start, pieces[last].end()))
    })
}

fn pieces(tag: &str) -> Vec<Piece<'_>> {
    let bytes = tag.as_bytes();
    // Without the tag's signs and those of white space control.
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

/// The index of the piece that the left side starts with. `None`: it is hard to tell.
fn left_side(pieces: &[Piece<'_>], operator: usize) -> Option<usize> {
    let mut at = operator.checked_sub(1)?;
    loop {
        let piece = pieces[at];
        if matches!(piece.text, ")" | "]" | "}") {
            at = opening(pieces, at)?;
            // A call or an index belongs to what stands before it.
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

/// The index of the piece that the right side ends with. `None`: it is hard to tell.
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

/// The index of the bracket that the one at `at` closes.
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

/// The index of the bracket that closes the one at `at`.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operators_become_calls() {
        for (tag, rewritten) in [
            ("{{ '%s' % x }}", "{{ _percent('%s', x) }}"),
            (
                "{{ '%s: %s' % (m.role, m['a'](b)[0]) ~ 'x' }}",
                "{{ _joined(_percent('%s: %s', (m.role, m['a'](b)[0])), 'x') }}",
            ),
            ("{% set a = f.g % h|upper + 1 %}", "{% set a = _percent(f.g, h|upper) + 1 %}"),
            ("{{ 'a' '%s' % 'b' 'c' }}", "{{ _percent('a' '%s', 'b' 'c') }}"),
            ("{{ ('a' ~ b)|trim % {'x': 1} }}", "{{ _percent((_joined('a', b))|trim, {'x': 1}) }}"),
            ("{{ '%d' % 5 }}", "{{ _percent('%d', 5) }}"),
            ("{%- if '%s' % a % b == c -%}", "{%- if _percent(_percent('%s', a), b) == c -%}"),
            ("{{ [1 if x else '%s' % y] }}", "{{ [1 if x else _percent('%s', y)] }}"),
            ("{{ '<' ~ m.role ~ '>' ~ (m.text|trim) }}", "{{ _joined('<', m.role, '>', (m.text|trim)) }}"),
            ("{{- a ~ b|upper + c ~ 'd' -}}", "{{- _joined(a, b|upper) + _joined(c, 'd') -}}"),
            ("{% set a = (b ~ c).strip() ~ d %}", "{% set a = _joined((_joined(b, c)).strip(), d) %}"),
            (
                "{{ a ~ b[c ~ d] if e ~ f == g else h }}",
                "{{ _joined(a, b[_joined(c, d)]) if _joined(e, f) == g else h }}",
            ),
            ("{{ 'a' ~ '~' ~ b }}", "{{ _joined('a', _joined('~', b)) }}"),
            // Numbers, strings, and what cannot be told at a glance, stay.
            (
                "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}",
                "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}",
            ),
            ("{{ -a % b }}", "{{ -a % b }}"),
            ("{{ 2 * a % b }}", "{{ 2 * a % b }}"),
            ("{{ a % -b }}", "{{ a % -b }}"),
            ("{{ 'a' ~ 'b' }}", "{{ 'a' ~ 'b' }}"),
            ("{{ 2 * a ~ b }}", "{{ 2 * a ~ b }}"),
            ("{{ a ~ b * 2 }}", "{{ a ~ b * 2 }}"),
            ("{{ a ~ b is defined }}", "{{ a ~ b is defined }}"),
            ("{{ a ~ -b }}", "{{ a ~ -b }}"),
            ("{{ a ~ }}", "{{ a ~ }}"),
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
}
