//! `{% generation %}` blocks, which transformers adds to jinja2 and minijinja has no way to add.
//!
//! `template_rewrite.rs` puts a mark into the template before and after the text of such a block.
//! The marks are taken out of the rendered text, and their places are kept.

use std::ops::Range;

/// Begins a block. Unicode noncharacters are not for text that is exchanged, so no text needs them.
pub(crate) const START: char = '\u{FDD0}';
/// Ends a block.
pub(crate) const END: char = '\u{FDD1}';

/// Whether a text holds one of the marks, so that it cannot be rendered.
pub(crate) fn has_mark(text: &str) -> bool {
    text.contains([START, END])
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
    fn marks_become_byte_ranges() {
        let (text, spans) = take_marks("é\u{FDD0}ab\u{FDD1}c\u{FDD0}\u{FDD1}\u{FDD1}\u{FDD0}x".to_owned());
        assert_eq!((text.as_str(), spans), ("éabcx", vec![2..4, 5..5]));
    }
}
