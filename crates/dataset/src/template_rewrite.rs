//! Checks a template's source and rewrites it before it is compiled. This is for what minijinja has
//! no other place to hook into: line breaks, `{% generation %}` blocks, the line break behind
//! `{% raw %}`, slices with a step, `%` behind a string, `~`, and loops over none.
//!
//! A generation block keeps its scope, as in the call block that transformers' extension parses it
//! into: assignments to a namespace and loop variables within it work as outside, and other
//! assignments end with it.
//!
//! `x[a:b:c]` becomes a method call. minijinja 2.24 panics on `[][::-1]`, which Qwen3's template
//! evaluates when it is given no messages, and takes `x[2:0:-1]` for `x[2::-1]`.

use std::borrow::Cow;

use crate::generation::{END, START};
use crate::template_tags::{Tags, is_code, string_end, tag_words};
use crate::{operators, python_methods, template_loops};

/// Makes every line break of a template `\n`, also within string literals, as jinja2 does.
pub(crate) fn with_line_feeds(source: &str) -> Cow<'_, str> {
    if source.contains('\r') {
        Cow::Owned(source.replace("\r\n", "\n").replace('\r', "\n"))
    } else {
        Cow::Borrowed(source)
    }
}

/// The deepest nesting of brackets in one tag. The parser is recursive.
const DEEPEST: usize = 100;

/// The most words and signs in a row without a comma or bracket between them. Such an expression is
/// a chain that the parser follows recursively. The longest of a published template has 38.
const LONGEST_CHAIN: usize = 2000;

/// The most `elif` tags of a template. Each is nested in the one before it. No published template
/// has more than 17.
const MOST_ELIFS: usize = 500;

/// Refuses a source that would take the parser's whole stack.
///
/// # Errors
/// The line, from 1, and what is there.
pub(crate) fn check(source: &str) -> Result<(), (usize, String)> {
    if let Some(place) = source.find([START, END]) {
        let line = line_at(source, place);
        return Err((
            line,
            "U+FDD0 and U+FDD1 are Unicode noncharacters that this program marks spans with".to_owned(),
        ));
    }
    let mut elifs = 0;
    for (start, tag) in Tags::of(source).filter(|(_, tag)| is_code(tag)) {
        check_tag(tag).map_err(|(place, what)| (line_at(source, start + place), what))?;
        elifs += usize::from(tag_words(tag).split_whitespace().next() == Some("elif"));
        if elifs > MOST_ELIFS {
            return Err((line_at(source, start), format!("more than {MOST_ELIFS} elif tags")));
        }
    }
    Ok(())
}

fn check_tag(tag: &str) -> Result<(), (usize, String)> {
    let bytes = tag.as_bytes();
    // For each open bracket the length of the chain that leads to it, and the length of that chain
    // with what follows within the bracket. The parser is as deep in its stack.
    let mut chains = vec![(0usize, 0usize)];
    let mut place = 0;
    while place < bytes.len() {
        let start = place;
        place += 1;
        let (base, length) = chains.last().copied().unwrap_or_default();
        match bytes[start] {
            b'"' | b'\'' => place = string_end(bytes, start),
            b'(' | b'[' | b'{' => chains.push((length, length)),
            b')' | b']' | b'}' => {
                // The outermost stays.
                chains.truncate(chains.len().saturating_sub(1).max(1));
            }
            b',' => {
                chains.pop();
                chains.push((base, base));
            }
            byte if byte.is_ascii_whitespace() => continue,
            byte if is_word(byte) => {
                place += bytes[place..].iter().take_while(|byte| is_word(**byte)).count();
            }
            _ => {}
        }
        if let Some((_, length)) = chains.last_mut() {
            *length += 1;
            if *length > LONGEST_CHAIN {
                return Err((start, format!("an expression of more than {LONGEST_CHAIN} parts")));
            }
        }
        if chains.len() > DEEPEST {
            return Err((start, format!("brackets nested deeper than {DEEPEST}")));
        }
    }
    Ok(())
}

fn line_at(source: &str, place: usize) -> usize {
    source.as_bytes()[..place.min(source.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

/// The rewritten source, and whether it has generation blocks.
pub(crate) fn rewrite(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len() + 64);
    let mut found = false;
    let mut was_raw = false;
    for (_, piece) in Tags::of(source) {
        let words = tag_words(piece);
        match words {
            _ if was_raw => out.push_str(piece),
            // The scope of `with` ends what the block sets. The outer tags keep the white space
            // control of the tag.
            "generation" => {
                out.push_str(&piece.replacen("generation", "with", 1).replace("-%}", "%}").replace("+%}", "%}"));
                out.push(START);
                out.push_str(&format!("{{% if true {}", closing(piece)));
                found = true;
            }
            "endgeneration" => {
                out.push_str(&piece.replacen("endgeneration", "endif", 1).replace("-%}", "%}").replace("+%}", "%}"));
                out.push(END);
                out.push_str(&format!("{{% endwith {}", closing(piece)));
            }
            // jinja2 keeps a line break behind this tag, though it drops those behind all others.
            "raw" if closing(piece) == "%}" => out.push_str(&format!("{}+%}}", &piece[..piece.len() - 2])),
            _ if is_code(piece) => {
                out.push_str(&operators::rewrite(&rewrite_slices(&template_loops::rewrite(piece))));
            }
            _ => out.push_str(piece),
        }
        was_raw = words == "raw" && !was_raw;
    }
    (out, found)
}

/// A block tag's end with its sign: `-%}`, `+%}` or `%}`.
fn closing(tag: &str) -> &'static str {
    match tag.as_bytes() {
        [.., b'-', b'%', b'}'] => "-%}",
        [.., b'+', b'%', b'}'] => "+%}",
        _ => "%}",
    }
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
            // A backslash may have skipped into the middle of a character that an unclosed string
            // ends with.
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
        let kept = "{# {% generation %} #}{{ '{% generation %}' }}{% raw -%}{% generation %}{% endraw %}{ generation }";
        assert_eq!(rewrite(kept), (kept.to_owned(), false));
        let (source, found) = rewrite("a{%- generation -%}{{ {'a': {}} }}{%+ endgeneration %}{% unclosed");
        assert_eq!(
            source,
            "a{%- with %}\u{FDD0}{% if true -%}{{ {'a': {}} }}{%+ endif %}\u{FDD1}{% endwith %}{% unclosed"
        );
        assert!(found);
        for odd in
            ["{", "{{", "{%", "{#", "{{ '\\", "{% raw +%}", "{% raw -%}{%", "é{% 'é", "{{ '\\é", "{{ ]:[ }}", "{{ [ }}"]
        {
            assert_eq!(rewrite(odd).0, odd);
            assert_eq!(check(odd), Ok(()));
        }
        assert_eq!(rewrite("{% raw %}\n{{ x[::2] }}{% endraw %}").0, "{% raw +%}\n{{ x[::2] }}{% endraw %}");
        assert_eq!(rewrite("{% raw %}{% endraw %}{{ x[::2] }}").0, "{% raw +%}{% endraw %}{{ x._slice(none,none,2) }}");
    }

    #[test]
    fn slices_with_a_step_become_calls() {
        for (source, rewritten) in [
            ("{{ x[::-1] }}", "{{ x._slice(none,none,-1) }}"),
            (
                "{% for a in x[y[::2][0] : f([1, 2]) : 3] %}",
                "{% for a in _each((x._slice(y._slice(none,none,2)[0] , f([1, 2]) , 3))) %}",
            ),
            (
                "{{ x[1:] }}{{ x['::'] }}{{ [{1: 2}, {3: 4}] }}x[::2]",
                "{{ x[1:] }}{{ x['::'] }}{{ [{1: 2}, {3: 4}] }}x[::2]",
            ),
        ] {
            assert_eq!(rewrite(source), (rewritten.to_owned(), false));
        }
    }

    #[test]
    fn line_breaks_are_line_feeds() {
        assert_eq!(with_line_feeds("a\r\nb\rc\n\r\n"), "a\nb\nc\n\n");
        assert!(matches!(with_line_feeds("a\n"), Cow::Borrowed("a\n")));
    }

    #[test]
    fn what_would_take_the_stack_is_refused() {
        let many = |part: &str, count: usize| part.repeat(count);
        for (source, line, what) in [
            (format!("\n{{{{ {}1 }}}}", many("- ", 9000)), 2, "more than 2000 parts"),
            (format!("{{{{ {}1 }}}}", many("not ", 9000)), 1, "more than 2000 parts"),
            (format!("{{{{ a{} }}}}", many(".b", 9000)), 1, "more than 2000 parts"),
            (format!("{{{{ a{} }}}}", many("|int", 9000)), 1, "more than 2000 parts"),
            (format!("{{% set x = 1{} %}}", many("~'\n'", 9000)), 998, "more than 2000 parts"),
            (format!("{{{{ {}1{} }}}}", many("[", 9000), many("]", 9000)), 1, "nested deeper"),
            (
                format!("{{{{ {}1{} }}}}", many(&format!("({}", many("-", 90)), 90), many(")", 90)),
                1,
                "more than 2000 parts",
            ),
            (format!("{{% if 0 %}}{}{{% endif %}}", many("{% elif 0 %}\n", 9000)), 501, "elif"),
            ("a\n\u{FDD0}".to_owned(), 2, "noncharacters"),
        ] {
            let (at, told) = check(&source).expect_err(what);
            assert!(told.contains(what), "{told}");
            assert_eq!(at, line, "{what}");
        }
        let list = format!("{{{{ [{}] }}}}", many("1, {'a': (2)},\n", 9000));
        assert_eq!(check(&list), Ok(()));
        assert_eq!(check(&format!("{{% raw %}}{}{{% endraw %}}", many("[", 9000))), Ok(()));
    }
}
