//! The pattern that a text is split by before tiktoken looks for tokens, as a model's Python module
//! states it: `pat_str = r"..."`, or literals in `"|".join([...])`. No line of the module runs.
//! Anything but literals is refused.
//!
//! tiktoken reads a pattern with Rust's `fancy_regex`, and a tokenizer.json with Oniguruma.
//! [`check`] lets through only what means the same in both.

/// Brackets around literals nest at most so deep.
const DEEPEST: usize = 8;

/// Scripts that both engines know by this name, beside general categories such as `Lu`.
const SCRIPTS: [&str; 12] = [
    "Han",
    "Hiragana",
    "Katakana",
    "Hangul",
    "Latin",
    "Greek",
    "Cyrillic",
    "Arabic",
    "Hebrew",
    "Devanagari",
    "Thai",
    "Bopomofo",
];
/// General categories.
const CATEGORIES: &str =
    "L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp C Cc Cf Co";
/// Beginnings of groups.
const GROUPS: [&str; 5] = ["(?i:", "(?:", "(?=", "(?!", "(?>"];
/// What a group without case may consist of: English contractions. Oniguruma also takes one letter
/// for two there, such as ß for ss.
const CONTRACTIONS: &str = "'’|[]sdmtlvre";
/// What Oniguruma reads otherwise: a possessive or optional count (there it is a count of counts),
/// a count from 0, differences of classes, and names and brackets in classes.
const OTHERWISE: [&str; 9] = ["}+", "}?", "}*", "{,", "--", "~~", "[:", "[]", "[^]"];

/// The pattern of a module. `None`: it has no `pat_str`.
///
/// # Errors
/// The line, from 1, and why the pattern there cannot be read.
pub(super) fn in_module(source: &str) -> Result<Option<String>, (usize, String)> {
    let (mut found, mut used) = (None::<String>, None);
    let mut end = 0;
    for (index, line) in source.split_inclusive('\n').enumerate() {
        end += line.len();
        let Some(value) = assigned(line) else { continue };
        let value = &source[end - value.len()..];
        match (Literals { rest: value }).expression() {
            Some(text) if found.as_ref().is_none_or(|known| *known == text) => found = Some(text),
            Some(_) => return Err((index + 1, "`pat_str` is another pattern than above".to_owned())),
            None if is_name(value) => used = used.or(Some(index + 1)),
            None => return Err((index + 1, "`pat_str` is made of more than string literals".to_owned())),
        }
    }
    match (found, used) {
        (None, Some(line)) => Err((line, "`pat_str` is no string literal".to_owned())),
        (found, _) => Ok(found),
    }
}

/// What stands behind `pat_str =` in a line, for an assignment or an argument.
fn assigned(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let name = line.get(..7).filter(|name| name.eq_ignore_ascii_case("pat_str"))?;
    let rest = line[name.len()..].trim_start();
    if rest.starts_with("+=") {
        return Some(rest);
    }
    let annotated = rest.strip_prefix(':').and_then(|rest| rest.trim_start().strip_prefix("str"));
    let value = annotated.unwrap_or(rest).trim_start().strip_prefix('=')?;
    (!value.starts_with('=')).then_some(value)
}

/// Whether a value is a name alone, such as `self.pat_str` in an argument.
fn is_name(value: &str) -> bool {
    let value = value.trim_start_matches([' ', '\t']);
    let rest = value.trim_start_matches(|letter: char| letter.is_alphanumeric() || letter == '_' || letter == '.');
    rest.len() < value.len() && ends(rest)
}

/// Whether a statement or an argument ends here.
fn ends(rest: &str) -> bool {
    let rest = rest.trim_start_matches([' ', '\t']);
    rest.is_empty() || rest.starts_with(['\r', '\n', '#', ',', ')'])
}

/// Python text that should be string literals.
struct Literals<'a> {
    rest: &'a str,
}

impl Literals<'_> {
    fn expression(&mut self) -> Option<String> {
        let text = self.value(0)?;
        ends(self.rest).then_some(text)
    }

    /// Literals beside each other, with or without brackets, or one that joins a list of them.
    fn value(&mut self, depth: usize) -> Option<String> {
        if depth > DEEPEST {
            return None;
        }
        self.skip(depth);
        let text = if self.eat("(") {
            let text = self.value(depth + 1)?;
            self.skip(depth + 1);
            self.eat(")").then_some(text)?
        } else {
            self.literals(depth)?
        };
        if !self.eat(".join(") {
            return Some(text);
        }
        self.skip(depth + 1);
        let close = if self.eat("[") {
            "]"
        } else if self.eat("(") {
            ")"
        } else {
            return None;
        };
        let mut parts = Vec::new();
        loop {
            self.skip(depth + 1);
            if self.eat(close) {
                break;
            }
            parts.push(self.value(depth + 1)?);
            self.skip(depth + 1);
            if !self.eat(",") && !self.rest.starts_with(close) {
                return None;
            }
        }
        self.skip(depth + 1);
        self.eat(",");
        self.skip(depth + 1);
        self.eat(")").then(|| parts.join(&text))
    }

    fn literals(&mut self, depth: usize) -> Option<String> {
        let mut text = self.literal()?;
        loop {
            let before = self.rest;
            self.skip(depth);
            match self.literal() {
                Some(more) => text.push_str(&more),
                None => {
                    self.rest = before;
                    return Some(text);
                }
            }
        }
    }

    /// One literal. `None`: there is none, or one that is more than a text (f, b, \x, \u, \N).
    fn literal(&mut self) -> Option<String> {
        let prefix = self.rest.len() - self.rest.trim_start_matches(['r', 'R', 'u', 'U']).len();
        let is_raw = match &self.rest[..prefix] {
            "" | "u" | "U" => false,
            "r" | "R" => true,
            _ => return None,
        };
        let body = &self.rest[prefix..];
        let quote = ["\"\"\"", "'''", "\"", "'"].into_iter().find(|quote| body.starts_with(quote))?;
        let body = &body[quote.len()..];
        let mut text = String::new();
        let mut letters = body.char_indices();
        loop {
            let (place, letter) = letters.next()?;
            if body[place..].starts_with(quote) {
                self.rest = &body[place + quote.len()..];
                return Some(text);
            }
            match letter {
                '\n' | '\r' if quote.len() == 1 => return None,
                '\\' => match (is_raw, letters.next()?.1) {
                    (false, 'n') => text.push('\n'),
                    (false, 'r') => text.push('\r'),
                    (false, 't') => text.push('\t'),
                    (false, same @ ('\\' | '\'' | '"')) => text.push(same),
                    (false, '\n') => {}
                    (false, 'a' | 'b' | 'f' | 'v' | 'x' | 'u' | 'U' | 'N' | '0'..='7') => return None,
                    (_, other) => text.extend(['\\', other]),
                },
                other => text.push(other),
            }
        }
    }

    /// Passes over blanks, and in brackets over line breaks and comments.
    fn skip(&mut self, depth: usize) {
        self.rest = self.rest.trim_start_matches([' ', '\t']);
        while depth > 0 && self.rest.starts_with(['#', ' ', '\t', '\r', '\n']) {
            if self.rest.starts_with('#') {
                self.rest = self.rest.find('\n').map_or("", |place| &self.rest[place..]);
            }
            self.rest = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        }
    }

    fn eat(&mut self, text: &str) -> bool {
        let rest = self.rest.strip_prefix(text);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }
}

/// Whether a pattern splits a text in Oniguruma as it does for tiktoken.
///
/// # Errors
/// The part that may split otherwise.
pub(super) fn check(pattern: &str) -> Result<(), String> {
    let refused = |part: &str| Err(format!("the pattern has `{part}`, which tokenizers may read otherwise"));
    let (mut rest, mut depth) = (pattern, 0usize);
    while let Some(letter) = rest.chars().next() {
        if let Some(part) = OTHERWISE.iter().find(|part| rest.starts_with(**part)) {
            return refused(part);
        }
        let length = match letter {
            '\\' => match escape(rest) {
                Some(length) => length,
                None => return refused(&rest.chars().take(8).collect::<String>()),
            },
            '[' => {
                depth += 1;
                if rest.starts_with("[^") { 2 } else { 1 }
            }
            ']' => {
                depth = depth.saturating_sub(1);
                1
            }
            '^' | '$' if depth == 0 => return refused(&letter.to_string()),
            '(' if depth == 0 && rest.starts_with("(?") => {
                let Some(group) = GROUPS.iter().find(|group| rest.starts_with(**group)) else {
                    return refused(&rest.chars().take(4).collect::<String>());
                };
                let inside = rest[group.len()..].split(')').next().unwrap_or_default();
                let is_plain = inside.chars().all(|letter| CONTRACTIONS.contains(letter));
                let folds = ["ss", "st"].iter().any(|letters| inside.contains(letters));
                if *group == "(?i:" && (folds || !is_plain) {
                    return refused(&format!("(?i:{inside})"));
                }
                group.len()
            }
            other => other.len_utf8(),
        };
        rest = &rest[length..];
    }
    Ok(())
}

/// The bytes of an escape that means the same in both engines.
fn escape(rest: &str) -> Option<usize> {
    match rest[1..].chars().next()? {
        's' | 'S' | 'd' | 'D' | 'r' | 'n' | 't' => Some(2),
        'p' | 'P' => {
            let name = rest[2..].strip_prefix('{')?.split_once('}')?.0;
            let is_known = CATEGORIES.split(' ').chain(SCRIPTS).any(|known| known == name);
            is_known.then_some(name.len() + 4)
        }
        mark if r"\.+*?()|[]{}^$#&-~/'".contains(mark) => Some(2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (a module, its pattern, or the line and a part of the refusal)
    #[test]
    fn literals_are_read_and_nothing_runs() {
        for (source, want) in [
            ("PAT_STR = r\"\"\"a|\\s+\"\"\"\nENC = f(\n    pat_str=PAT_STR,\n)\n", Ok(Some("a|\\s+"))),
            (
                "class T:\n    pat_str = \"|\".join(\n        [\n            r\"\"\"[a]+\"\"\",  # b\n            r'\\r',\n        ]\n    )\n",
                Ok(Some("[a]+|\\r")),
            ),
            ("pat_str: str = '\\\\s|\\'\\p{L}'", Ok(Some("\\s|'\\p{L}"))),
            ("pat_str = (\n    r'a'  # one\n    r\"b\" 'c'\n)\n", Ok(Some("abc"))),
            ("pat_str = '|'.join(('a', 'b'),)  # all", Ok(Some("a|b"))),
            ("pat_str=r'a',\r\n", Ok(Some("a"))),
            ("x = 1\n# pat_str = 'a'\npat_string = 'b'\npat_str == 'c'\n", Ok(None)),
            ("", Ok(None)),
            ("\n    pat_str=cl100k._pat_str,\n", Err((2, "no string literal"))),
            ("pat_str = 'a'\npat_str = 'b'\n", Err((2, "another pattern"))),
            ("pat_str = 'a'\npat_str += 'b'\n", Err((2, "more than string literals"))),
            ("pat_str = 'a' + 'b'\n", Err((1, "more than string literals"))),
            ("pat_str = f'a'\n", Err((1, "more than string literals"))),
            ("pat_str = '\\x41'\n", Err((1, "more than string literals"))),
            ("pat_str = build()\n", Err((1, "more than string literals"))),
            ("pat_str = 'a'.replace('a', 'b')\n", Err((1, "more than string literals"))),
            ("pat_str = '|'.join(parts)\n", Err((1, "more than string literals"))),
            ("pat_str = '|'.join(['a' 'b', c])\n", Err((1, "more than string literals"))),
            ("pat_str = r'''a\n", Err((1, "more than string literals"))),
            (&format!("pat_str = {}", "(".repeat(100_000)), Err((1, "more than string literals"))),
        ] {
            match (in_module(source), want) {
                (Ok(found), Ok(want)) => assert_eq!(found.as_deref(), want, "{source}"),
                (Err((line, reason)), Err((at, part))) => {
                    assert!(line == at && reason.contains(part), "{source}: {line}: {reason}");
                }
                (found, want) => panic!("{source}: {found:?}, expected {want:?}"),
            }
        }
    }

    #[test]
    fn patterns_that_mean_something_else_are_refused() {
        for pattern in [super::super::KIMI, super::super::QWEN, r"\p{N}+|[^\s\p{L}]++|a*+|(?>b)|(c)|\s+(?!\S)|x{1,3}"] {
            assert_eq!(check(pattern), Ok(()), "{pattern}");
        }
        for (pattern, part) in [
            (r"\p{N}{1,3}+", "`}+`"),
            (r"a{2}?", "`}?`"),
            (r"\s++$", "`$`"),
            (r"^a", "`^`"),
            (r"[a--b]", "`--`"),
            (r"[[:alpha:]]", "`[:`"),
            (r"\w+", r"`\w+`"),
            (r"\pL", r"`\pL`"),
            (r"\p{Alphabetic}", r"`\p{Alpha`"),
            (r"(?m)a", "`(?m)`"),
            (r"(?i:straße)", "`(?i:straße)`"),
            (r"(?i:ss)", "`(?i:ss)`"),
            ("a\\", "`\\`"),
        ] {
            let reason = check(pattern).expect_err(pattern);
            assert!(reason.contains(part), "{pattern}: {reason}");
        }
    }
}
