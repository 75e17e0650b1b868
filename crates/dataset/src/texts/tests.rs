use serde_json::json;

use super::*;

#[test]
fn marks_stand_behind_the_first_word_and_before_the_last() {
    for (text, borders) in [
        ("", None),
        (" \n", None),
        ("4", Some((1, None))),
        (" é\n", Some((3, None))),
        ("a b", Some((1, Some(2)))),
        ("\nab  cd e ", Some((3, Some(8)))),
    ] {
        assert_eq!(word_borders(text), borders, "{text:?}");
    }
}

#[test]
fn marks_come_out_again() {
    let messages = [
        json!({"role": "user", "content": " Hi you "}),
        json!({"role": "assistant", "content": "<think>\nso it is\n</think>\n\n4", "tool_calls": [
            {"function": {"name": "f", "arguments": {"a": ["x y", 3], "b": {"c": ""}}}}]}),
    ];
    let marked = Marked::new(&messages, None);
    let kinds: Vec<TextKind> = marked.texts.iter().map(|text| text.kind).collect();
    assert_eq!(
        kinds,
        [TextKind::Content, TextKind::Content, TextKind::Reasoning, TextKind::Content, TextKind::Call(0)]
    );
    for (marked, plain) in marked.messages.iter().zip(&messages) {
        assert_eq!(take_marks(&marked.to_string()).text, plain.to_string());
    }
    let found = take_marks(&marked.messages[1].to_string());
    let text = found.text.clone();
    assert!(marked.left_out(&text, Some(&found.marks), &|text| text.message == Some(1)).is_none());
    let without_call: Vec<_> = found.marks.iter().copied().filter(|(_, id)| *id != 4).collect();
    let left_out = marked.left_out(&text, Some(&without_call), &|text| text.message == Some(1));
    assert_eq!(left_out.map(|text| text.kind), Some(TextKind::Call(0)));
    // Escaped, as a template that writes ASCII does; torn.
    let escaped = "\\ufdd8\\ufdda\\ufdd9x\u{FDD8}y";
    assert_eq!(take_marks(escaped), Found { text: "x\u{FDD8}y".to_owned(), marks: vec![(0, 0)] });
}

#[test]
fn reasoning_is_told_from_the_answer() {
    let parts = |text: &str| {
        sections(text, TextKind::Content, true)
            .into_iter()
            .map(|(kind, range)| (kind == TextKind::Reasoning, text[range].to_owned()))
            .collect::<Vec<_>>()
    };
    let part = |reasoning, text: &str| (reasoning, text.to_owned());
    assert_eq!(parts("a"), [part(false, "a")]);
    assert_eq!(parts("<think>\nb\n</think>c"), [part(false, ""), part(true, "\nb\n"), part(false, "c")]);
    assert_eq!(parts("b</think>c</think>d"), [part(true, "b"), part(false, "c</think>d")]);
    assert_eq!(sections("b</think>c", TextKind::Content, false).len(), 1);
    let hidden = Marked::hidden(&json!({"role": "assistant", "content": "<think>\nso\n</think>\n\n4"}), 1);
    let content = hidden.messages[0]["content"].as_str().expect("text");
    assert!(!content.contains("</think>") && !content.contains("<think>"));
    assert_eq!(take_marks(content).text, "<think>\nso\n</think>\n\n4");
}

#[test]
fn contents_in_order_need_no_marks() {
    let messages = [
        json!({"role": "system", "content": "Answer in Danish."}),
        json!({"role": "user", "content": " What is the capital? "}),
    ];
    assert!(plainly_there(&messages, None, "s: Answer in Danish.\nu: What is the capital?\n"));
    assert!(!plainly_there(&messages, None, "u: What is the capital?\n"));
    assert!(!plainly_there(&messages, None, "What is the capital? Answer in Danish."));
    assert!(!plainly_there(&[json!({"role": "user", "content": "4"})], None, "u: 4"));
}
