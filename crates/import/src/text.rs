//! Texts of values, as TOML and in comments.

/// A text on one line, without control characters: those of a file must not end a comment.
pub(crate) fn line(text: &str) -> String {
    let line: String = text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A text on one line, cut to a number of characters.
pub(crate) fn short(text: &str, most: usize) -> String {
    let line = line(text);
    if line.chars().count() <= most {
        return line;
    }
    line.chars().take(most).collect::<String>() + "…"
}

/// A number as TOML: an integer if it has no fraction and was written without one.
pub(crate) fn number(value: f64, written: &str) -> String {
    let whole = value.fract() == 0.0 && value.abs() < 9e15 && !written.contains(['.', 'e', 'E']);
    if whole { format!("{}", value as i64) } else { format!("{value:?}") }
}

/// A TOML string.
pub(crate) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// A TOML list of strings.
pub(crate) fn list<T: AsRef<str>>(items: &[T]) -> String {
    let items: Vec<String> = items.iter().map(|item| quoted(item.as_ref())).collect();
    format!("[{}]", items.join(", "))
}

/// A comment in lines of at most `width` columns, each beginning with `# `.
pub(crate) fn comment(text: &str, width: usize) -> String {
    let mut lines = vec![String::new()];
    for word in line(text).split(' ') {
        let last = lines.last_mut().expect("there is a line");
        if !last.is_empty() && last.chars().count() + 1 + word.chars().count() > width - 2 {
            lines.push(word.to_owned());
        } else {
            if !last.is_empty() {
                last.push(' ');
            }
            last.push_str(word);
        }
    }
    lines.iter().map(|line| format!("# {line}\n")).collect()
}

/// A count with its noun.
pub(crate) fn counted(count: usize, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::{comment, number, quoted};

    #[test]
    fn values_of_a_file_stay_inside_their_comment_and_string() {
        assert_eq!(comment("a\n[lora]\r\u{0}b", 100), "# a [lora] b\n");
        assert_eq!(quoted("a\"\n\u{7f}"), r#""a\"\n\u007f""#);
        for (value, written, toml) in [(16.0, "16", "16"), (16.0, "16.0", "16.0"), (1e-5, "0.00001", "1e-5")] {
            assert_eq!(number(value, written), toml);
        }
    }
}
