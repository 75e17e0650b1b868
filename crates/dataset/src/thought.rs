//! Reasoning between tags: how a generation prompt ends with it, and how an answer goes on behind
//! that.

use serde_json::Value;

use crate::texts::{REASONING, REASONING_KEYS, first_closed, reasoning};

/// The tags around reasoning.
type Tags = (&'static str, &'static str);

/// Reasoning at the end of a generation prompt. The prompt opens it, and the model is to go on with
/// it. Or it is closed, and the model is to give the answer alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Prompted {
    /// The byte of the prompt where it begins.
    pub(crate) start: usize,
    pub(crate) tags: Tags,
    pub(crate) is_closed: bool,
}

impl Prompted {
    pub(crate) fn at_end(prompt: &str) -> Option<Self> {
        let end = prompt.trim_end();
        REASONING.into_iter().find_map(|tags| {
            let (open, close) = tags;
            if let Some(before) = end.strip_suffix(open) {
                return Some(Self { start: before.len(), tags, is_closed: false });
            }
            let before = end.strip_suffix(close)?;
            // GLM-4.7 closes what it has not opened.
            let start = before.trim_end().strip_suffix(open).map_or(before.len(), str::len);
            Some(Self { start, tags, is_closed: true })
        })
    }
}

/// A block of reasoning with nothing in it, or its closing tag alone, at the beginning of a text.
#[derive(Debug, Clone, Copy)]
struct Empty<'t> {
    tags: Tags,
    is_opened: bool,
    /// White space before the block, within it and behind it.
    lead: &'t str,
    inner: &'t str,
    space: &'t str,
    /// The text behind all that.
    rest: &'t str,
}

impl<'t> Empty<'t> {
    fn at_start(text: &'t str) -> Option<Self> {
        let block = text.trim_start();
        let lead = &text[..text.len() - block.len()];
        REASONING.into_iter().find_map(|tags| {
            let (open, close) = tags;
            let within = block.strip_prefix(open);
            let inner = within.unwrap_or(block);
            let end = inner.trim_start();
            let behind = end.strip_prefix(close)?;
            let rest = behind.trim_start();
            Some(Self {
                tags,
                is_opened: within.is_some(),
                lead,
                inner: &inner[..inner.len() - end.len()],
                space: &behind[..behind.len() - rest.len()],
                rest,
            })
        })
    }
}

/// The text behind the empty blocks of reasoning that it begins with.
pub(crate) fn without_empty(text: &str) -> &str {
    let mut rest = text;
    while let Some(empty) = Empty::at_start(rest) {
        rest = empty.rest;
    }
    rest
}

/// Whether the answer behind a prompt has reasoning behind reasoning that has ended: that of the
/// prompt, or an empty block that the template wrote.
pub(crate) fn is_twice(prompt: &str, answer: &str) -> bool {
    let rest = match Empty::at_start(answer) {
        _ if Prompted::at_end(prompt).is_some_and(|prompted| prompted.is_closed) => answer,
        Some(empty) => empty.rest,
        None => return false,
    };
    REASONING.iter().any(|(open, _)| rest.trim_start().starts_with(open))
}

/// Whether an answer begins with the end of the reasoning that its prompt opens.
pub(crate) fn ends_at_once(prompt: &str, answer: &str) -> bool {
    let opened = Prompted::at_end(prompt).filter(|prompted| !prompted.is_closed);
    let empty = Empty::at_start(answer).filter(|empty| !empty.is_opened);
    opened.is_some_and(|opened| empty.is_some_and(|empty| empty.tags == opened.tags))
}

/// An answer with its reasoning in the place where the model writes it.
///
/// `prompt` is the reasoning that the generation prompt ends with: its opening tag, or nothing.
/// `rest` is the rendered answer without its reasoning, from where that of the prompt begins. With
/// the answer comes the part of `rest` behind the reasoning. `None`: neither has tags.
pub(crate) fn filled<'r>(reasoning: &str, prompt: &str, rest: &'r str) -> Option<(String, &'r str)> {
    let opened = Prompted::at_end(prompt).filter(|prompted| !prompted.is_closed).map(|prompted| prompted.tags);
    let empty = Empty::at_start(rest).filter(|empty| opened.map_or(empty.is_opened, |tags| tags == empty.tags));
    let (open, close) = opened.or(empty.map(|empty| empty.tags))?;
    let prompted_space = if opened.is_some() { &prompt[prompt.trim_end().len()..] } else { "" };
    // Tags stand on lines of their own, or close to the text.
    let has_lines = prompted_space.contains('\n') || empty.is_some_and(|empty| empty.inner.contains('\n'));
    let line = if has_lines { "\n" } else { "" };
    let mut answer = String::new();
    if opened.is_none() {
        answer += empty.map_or("", |empty| empty.lead);
        answer += open;
    }
    if prompted_space.is_empty() {
        answer += line;
    }
    answer += reasoning.trim();
    answer += line;
    answer += close;
    answer += empty.map_or(if has_lines { "\n\n" } else { "" }, |empty| empty.space);
    let body = empty.map_or(rest, |empty| empty.rest);
    Some((answer + body, body))
}

/// Whether an assistant's message has reasoning, under a key or at the beginning of its content.
pub(crate) fn has_reasoning(message: &Value) -> bool {
    apart(message).is_some_and(|(reasoning, _)| !reasoning.trim().is_empty())
}

/// The reasoning of an assistant's message and the message without it. It is empty if the content
/// begins with an empty block. `None`: the message has neither.
pub(crate) fn apart(message: &Value) -> Option<(String, Value)> {
    let object = message.as_object()?;
    let mut without = object.clone();
    without.retain(|key, _| !REASONING_KEYS.contains(&key.as_str()));
    if let Some(reasoning) = reasoning(object) {
        return Some((reasoning.to_owned(), Value::Object(without)));
    }
    let (reasoning, answer) = leading(object.get("content")?.as_str()?)?;
    without.insert("content".to_owned(), answer.trim_start().into());
    Some((reasoning.to_owned(), Value::Object(without)))
}

/// The reasoning that a content begins with, and what stands behind it. The opening tag may be
/// missing, since some prompts end with it.
fn leading(content: &str) -> Option<(&str, &str)> {
    let (end, open, close) = first_closed(content)?;
    let (before, behind) = (&content[..end], &content[end + close.len()..]);
    match before.split_once(open) {
        Some((first, reasoning)) => first.trim().is_empty().then_some((reasoning, behind)),
        None => Some((before, behind)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// (prompt, where its reasoning begins, whether that is closed)
    #[test]
    fn reasoning_at_the_end_of_a_prompt() {
        for (prompt, want) in [
            ("<A>", None),
            ("<A><think>\n", Some(("<A>", false))),
            ("<A><think>\n\n</think>\n\n", Some(("<A>", true))),
            ("<A></think>", Some(("<A>", true))),
            ("<A><seed:think>no budget</seed:think>", Some(("<A><seed:think>no budget", true))),
            ("<|turn>model\n<|channel>thought\n<channel|>", Some(("<|turn>model\n", true))),
            ("<A>[THINK]", Some(("<A>", false))),
        ] {
            let found = Prompted::at_end(prompt);
            assert_eq!(found.map(|it| (&prompt[..it.start], it.is_closed)), want, "{prompt}");
        }
    }

    /// (prompt, answer, whether reasoning comes twice, the answer without empty blocks)
    #[test]
    fn reasoning_behind_reasoning_that_has_ended() {
        for (prompt, answer, twice, without) in [
            ("<A>", "<think>so</think>4", false, "<think>so</think>4"),
            ("<A>", "<think></think>4", false, "4"),
            ("<A>", "<think></think><think>so</think>4", true, "<think>so</think>4"),
            ("<A><think>\n", "\n</think>\n\n<think>so</think>4", true, "<think>so</think>4"),
            ("<A><think>\n", "so</think>4", false, "so</think>4"),
            ("<A></think>", "4", false, "4"),
            ("<A></think>", " <think>\n</think>\n4", true, "4"),
            ("<A></think>", "  4", false, "  4"),
        ] {
            assert_eq!(is_twice(prompt, answer), twice, "{prompt}{answer}");
            assert_eq!(without_empty(answer), without, "{prompt}{answer}");
        }
    }

    #[test]
    fn answers_that_end_reasoning_at_once() {
        for (prompt, answer, want) in [
            ("<A><think>\n", "\n</think>\n\n4", true),
            ("<A><think>", "</think>4", true),
            ("<A><think>", "so</think>4", false),
            ("<A><think>", "<think></think>4", false),
            ("<A><think></think>", "4", false),
            ("<A>", "</think>4", false),
            ("<A>[THINK]", "</think>4", false),
        ] {
            assert_eq!(ends_at_once(prompt, answer), want, "{prompt}{answer}");
        }
    }

    /// (reasoning of the prompt, rendered answer without reasoning, answer with it)
    #[test]
    fn reasoning_stands_where_the_model_writes_it() {
        for (prompt, rest, want) in [
            // R1 cuts it off; DeepSeek-V3.1 writes an empty one, with or without its opening tag.
            ("<think>\n", "4;", Some("so\n</think>\n\n4;")),
            ("<think>", "<think></think>4;", Some("so</think>4;")),
            ("<think>", "</think>4;", Some("so</think>4;")),
            ("<think>\n", "<think>\n\n</think>\n\n4;", Some("so\n</think>\n\n4;")),
            // Kimi, and GLM, whose prompts say nothing of it.
            ("", "<think></think>4;", Some("<think>so</think>4;")),
            ("", "\n<think></think>\n4;", Some("\n<think>so</think>\n4;")),
            ("", "<think>\n\n</think>\n\n4;", Some("<think>\nso\n</think>\n\n4;")),
            ("", "</think>4;", None),
            ("", "4;", None),
        ] {
            let found = filled(" so\n", prompt, rest);
            assert_eq!(found.as_ref().map(|(answer, _)| answer.as_str()), want, "{prompt:?} {rest:?}");
            assert!(found.is_none_or(|(_, body)| body == "4;"));
        }
    }

    #[test]
    fn reasoning_is_taken_out_of_a_message() {
        for (message, want) in [
            (json!({"content": "4"}), None),
            (json!({"content": "4", "reasoning": "so"}), Some(("so", json!({"content": "4"})))),
            (json!({"content": "<think>\nso\n</think>\n\n4"}), Some(("\nso\n", json!({"content": "4"})))),
            (json!({"content": "so</think>4"}), Some(("so", json!({"content": "4"})))),
            (json!({"content": "<think>\n\n</think>\n\n4"}), Some(("\n\n", json!({"content": "4"})))),
            (json!({"content": "Write <think>so</think>."}), None),
        ] {
            let has_any = want.as_ref().is_some_and(|(reasoning, _)| !reasoning.trim().is_empty());
            assert_eq!(has_reasoning(&message), has_any, "{message}");
            let want = want.map(|(reasoning, message)| (reasoning.to_owned(), message));
            assert_eq!(apart(&message), want, "{message}");
        }
    }
}
