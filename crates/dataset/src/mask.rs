//! Which part of a rendered conversation is trained on, and which tokens that makes.
//!
//! A turn's part is found by rendering prefixes: the messages before it with the generation prompt, then the messages up to
//! it. What the second adds to the first is the turn as a model would have to write it. That holds only if each is a
//! prefix of the next; where it is not (Qwen3 drops the reasoning of earlier turns), the template's `{% generation %}`
//! blocks are taken, and where it has none the row is refused: a guess here would train on the wrong tokens, silently.

use std::ops::Range;

use minijinja::Value;

use crate::error::DatasetError;
use crate::jsonl::RowProblem;
use crate::template::{ChatTemplate, Rendered};

/// A conversation as the template sees it.
pub(crate) struct Conversation<'a> {
    pub(crate) template: &'a ChatTemplate,
    pub(crate) messages: &'a [Value],
    pub(crate) tools: &'a Value,
}

impl Conversation<'_> {
    pub(crate) fn render(&self) -> Result<Rendered, RowProblem> {
        self.prefix(self.messages.len(), false).map_err(RowProblem::new)
    }

    fn prefix(&self, messages: usize, add_generation_prompt: bool) -> Result<Rendered, String> {
        self.template.render(&self.messages[..messages], self.tools, &[], add_generation_prompt).map_err(|error| {
            match error {
                DatasetError::Template { reason } => reason,
                other => other.to_string(),
            }
        })
    }

    /// The byte ranges of `turns` in `full`, the rendered conversation. `assistant_turns` are all of its assistant
    /// messages, `turns` those of them that are wanted, both as indices in order.
    pub(crate) fn trained_spans(
        &self,
        full: &Rendered,
        assistant_turns: &[usize],
        turns: &[usize],
    ) -> Result<Vec<Range<usize>>, RowProblem> {
        let problem = match self.spans_by_prefix(full, turns) {
            Ok(spans) => return Ok(spans),
            Err(problem) => problem,
        };
        if !self.template.has_generation {
            return Err(problem);
        }
        let mut blocks = full.generation_spans.clone();
        blocks.sort_by_key(|span| (span.start, span.end));
        if turns == assistant_turns {
            return Ok(blocks);
        }
        if blocks.len() != assistant_turns.len() {
            return Err(RowProblem::new(format!(
                "the chat template wrote {} generation blocks for {} assistant turns",
                blocks.len(),
                assistant_turns.len()
            )));
        }
        let wanted = assistant_turns.iter().zip(blocks).filter(|(turn, _)| turns.contains(turn));
        Ok(wanted.map(|(_, block)| block).collect())
    }

    fn spans_by_prefix(&self, full: &Rendered, turns: &[usize]) -> Result<Vec<Range<usize>>, RowProblem> {
        let mut spans: Vec<Range<usize>> = Vec::with_capacity(turns.len());
        for turn in turns {
            let refuse = |what: String| {
                RowProblem::new(format!("turn {} (assistant): the chat template does not render {what}", turn + 1))
                    .expected(
                        "a template that adds each turn to what it wrote before, or marks it with {% generation %}",
                    )
            };
            let before = self.prefix(*turn, true).map_err(|why| refuse(format!("the messages before it: {why}")))?.text;
            let with = if turn + 1 == self.messages.len() {
                full.text.clone()
            } else {
                self.prefix(turn + 1, false).map_err(|why| refuse(format!("the messages up to it: {why}")))?.text
            };
            if !with.starts_with(&before) {
                return Err(refuse("it behind its own generation prompt".to_owned()));
            }
            if !full.text.starts_with(&with) || spans.last().is_some_and(|span| span.end > before.len()) {
                return Err(refuse("it the same once later messages follow".to_owned()));
            }
            spans.push(before.len()..with.len());
        }
        Ok(spans)
    }
}

/// Which tokens lie in the trained parts of the text: those that start in one. A token that begins before a part and
/// reaches into it is the prompt's: generation would start behind it. One that begins in a part and reaches out of it is
/// trained, or the end of the turn would never be learned. The first token has nothing to be predicted from.
pub(crate) fn trained_tokens(tokens: &[Range<usize>], parts: &[Range<usize>]) -> Vec<bool> {
    let inside = |start: usize| parts.iter().any(|part| part.contains(&start));
    tokens.iter().enumerate().map(|(index, token)| index > 0 && inside(token.start)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "a list of parts that has one part")]
    fn a_token_belongs_to_the_part_that_it_starts_in() {
        let tokens = [0..2, 2..5, 5..5, 5..7, 7..10, 10..10, 10..12];
        assert_eq!(trained_tokens(&tokens, &[3..9]), [false, false, true, true, true, false, false]);
        assert_eq!(trained_tokens(&tokens, &[0..2, 10..12]), [false, false, false, false, false, true, true]);
        assert_eq!(trained_tokens(&tokens, &[]), [false; 7]);
    }
}
