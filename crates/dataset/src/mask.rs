//! Which part of a rendered conversation is trained on, and which tokens that makes.
//!
//! A turn's part is found by rendering prefixes: the messages before it with the generation prompt,
//! then the messages up to it. What the second adds to the first is the turn as a model would have
//! to write it. That holds for a whole conversation only if each rendering is a prefix of the next.
//!
//! If it is not (Qwen3 drops the reasoning of earlier turns), the template's `{% generation %}`
//! blocks are taken. If the template has none, each turn becomes a sequence of its own (`chat.rs`).
//! A guess would silently train on the wrong tokens.

use std::ops::Range;

use minijinja::Value;

use crate::error::DatasetError;
use crate::failure::Failure;
use crate::problem::RowProblem;
use crate::template::{ChatTemplate, Rendered};
use crate::template_problem::Unrendered;

/// The most turns of a conversation whose prefixes are all rendered. Of longer conversations a
/// sample is rendered, since the time for all would grow with the square of their number.
const EXACT_TURNS: usize = 48;

/// Turns at each end of a long conversation that are rendered.
const SAMPLED_ENDS: usize = 6;
/// About so many turns between the ends are rendered.
const SAMPLED_BETWEEN: usize = 16;
/// The most turns of a long conversation that have more than a text. All of them are rendered.
const ODD_TURNS: usize = 64;

/// The most bytes of prefixes that are rendered for one conversation.
pub(crate) const MOST_RENDERED: u64 = 2 << 30;

/// A conversation as the template sees it.
pub(crate) struct Conversation<'a> {
    pub(crate) template: &'a ChatTemplate,
    pub(crate) messages: &'a [Value],
    pub(crate) tools: &'a Value,
    /// Further variables of the template: (name, value).
    pub(crate) variables: &'a [(String, Value)],
}

impl Conversation<'_> {
    pub(crate) fn render(&self) -> Result<Rendered, Failure> {
        Ok(self.prefix(self.messages.len(), false)?)
    }

    /// Renders the first `messages` messages.
    pub(crate) fn prefix(&self, messages: usize, add_generation_prompt: bool) -> Result<Rendered, DatasetError> {
        self.template.render(&self.messages[..messages], self.tools, self.variables, add_generation_prompt)
    }

    /// The byte ranges of `turns` in `full`, the rendered conversation.
    ///
    /// `assistant_turns` are all assistant messages, `turns` those of them that are wanted, both as
    /// indices in order. `places` gives the byte ranges of the turns' contents in `full`, in the
    /// order of `turns`, if they are known.
    pub(crate) fn trained_spans(
        &self,
        full: &Rendered,
        assistant_turns: &[usize],
        turns: &[usize],
        places: &dyn Fn() -> Vec<Option<Range<usize>>>,
    ) -> Result<Vec<Range<usize>>, Failure> {
        let problem = match self.spans_by_prefix(full, turns, places) {
            Ok(spans) => return Ok(spans),
            Err(problem) => problem,
        };
        if !self.template.has_generation || matches!(problem, Failure::All(_)) {
            return Err(problem);
        }
        let mut blocks = full.generation_spans.clone();
        blocks.sort_by_key(|span| (span.start, span.end));
        if turns == assistant_turns {
            return Ok(blocks);
        }
        if blocks.len() != assistant_turns.len() {
            return Err(RowProblem::BlockCount { blocks: blocks.len(), turns: assistant_turns.len() }.into());
        }
        let wanted = assistant_turns.iter().zip(blocks).filter(|(turn, _)| turns.binary_search(turn).is_ok());
        Ok(wanted.map(|(_, block)| block).collect())
    }

    fn spans_by_prefix(
        &self,
        full: &Rendered,
        turns: &[usize],
        places: &dyn Fn() -> Vec<Option<Range<usize>>>,
    ) -> Result<Vec<Range<usize>>, Failure> {
        if turns.len() > EXACT_TURNS {
            if let Some(spans) = self.spans_by_sample(full, turns, &places())? {
                return Ok(spans);
            }
            if turns.len() as u64 * full.text.len() as u64 > MOST_RENDERED {
                return Err(RowProblem::ManyAnswers(turns.len()).into());
            }
        }
        let mut spans: Vec<Range<usize>> = Vec::with_capacity(turns.len());
        for turn in turns {
            let span = self.span(full, *turn)?;
            if spans.last().is_some_and(|last| last.end > span.start) {
                return Err(changes(*turn).into());
            }
            spans.push(span);
        }
        Ok(spans)
    }

    /// The byte range of a turn in `full`, by rendering the messages before it and up to it.
    fn span(&self, full: &Rendered, turn: usize) -> Result<Range<usize>, Failure> {
        let before = self.prefix(turn, true).map_err(|error| within(turn, "the messages before it", error))?.text;
        if turn + 1 == self.messages.len() {
            if !full.text.starts_with(&before) {
                return Err(not_behind_its_prompt(turn).into());
            }
            return Ok(before.len()..full.text.len());
        }
        let with = self.prefix(turn + 1, false).map_err(|error| within(turn, "the messages up to it", error))?.text;
        if !with.starts_with(&before) {
            return Err(not_behind_its_prompt(turn).into());
        }
        if !full.text.starts_with(&with) {
            return Err(changes(turn).into());
        }
        Ok(before.len()..with.len())
    }

    /// The byte ranges of many turns from those of a few. The few must all have the same text
    /// between the generation prompt and the content, and behind the content; so must every other
    /// turn. `None`: one has not. Turns with more than a text are among the few, since templates
    /// treat them in different ways.
    fn spans_by_sample(
        &self,
        full: &Rendered,
        turns: &[usize],
        places: &[Option<Range<usize>>],
    ) -> Result<Option<Vec<Range<usize>>>, Failure> {
        if places.len() != turns.len() || places.iter().filter(|place| place.is_none()).count() > ODD_TURNS {
            return Ok(None);
        }
        let stride = turns.len().div_ceil(SAMPLED_BETWEEN);
        let is_sampled = |index: usize| {
            index < SAMPLED_ENDS
                || index + SAMPLED_ENDS >= turns.len()
                || index.is_multiple_of(stride)
                || places[index].is_none()
        };
        let mut spans: Vec<Option<Range<usize>>> = vec![None; turns.len()];
        let mut frame: Option<TurnFrame<'_>> = None;
        for index in (0..turns.len()).filter(|index| is_sampled(*index)) {
            let span = self.span(full, turns[index])?;
            // The last turn of a conversation may end in another way than a turn within it.
            let is_last = turns[index] + 1 == self.messages.len();
            if let Some(place) = places[index].as_ref().filter(|_| !is_last) {
                let Some(found) = TurnFrame::around(&full.text, &span, place) else { return Ok(None) };
                frame = match frame {
                    None => Some(found),
                    Some(known) => match known.shared(&found) {
                        Some(shared) => Some(shared),
                        None => return Ok(None),
                    },
                };
            }
            spans[index] = Some(span);
        }
        let Some(frame) = frame else { return Ok(None) };
        let mut found: Vec<Range<usize>> = Vec::with_capacity(turns.len());
        for (span, place) in spans.into_iter().zip(places) {
            let span = match (span, place) {
                (Some(span), _) => span,
                (None, Some(place)) => match frame.span(&full.text, place) {
                    Some(span) => span,
                    None => return Ok(None),
                },
                (None, None) => return Ok(None),
            };
            if found.last().is_some_and(|last| last.end > span.start) {
                return Ok(None);
            }
            found.push(span);
        }
        Ok(Some(found))
    }
}

/// The text before and behind the contents of turns.
#[derive(Clone, Copy)]
struct TurnFrame<'a> {
    /// The end of the generation prompt.
    prompt: &'a str,
    /// The text from the prompt to the content.
    start: &'a str,
    /// The text from the content to the end of the turn.
    end: &'a str,
}

impl<'a> TurnFrame<'a> {
    /// The most bytes of a generation prompt that are compared.
    const LOOKED_AT: usize = 48;

    fn around(text: &'a str, span: &Range<usize>, place: &Range<usize>) -> Option<Self> {
        let from = text.floor_char_boundary(span.start.saturating_sub(Self::LOOKED_AT));
        Some(Self {
            prompt: text.get(from..span.start)?,
            start: text.get(span.start..place.start)?,
            end: text.get(place.end..span.end)?,
        })
    }

    /// The frame that two turns share: the same text before and behind the content, and the part
    /// that the ends of their prompts have in common.
    fn shared(self, other: &Self) -> Option<Self> {
        if self.start != other.start || self.end != other.end {
            return None;
        }
        let pairs = self.prompt.chars().rev().zip(other.prompt.chars().rev());
        let common: usize = pairs.take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        // Prompts with nothing in common leave nothing to compare.
        (common > 0).then(|| Self { prompt: &self.prompt[self.prompt.len() - common..], ..self })
    }

    fn span(&self, text: &str, place: &Range<usize>) -> Option<Range<usize>> {
        let before = text[..place.start].strip_suffix(self.start)?;
        let is_framed = before.ends_with(self.prompt) && text[place.end..].starts_with(self.end);
        is_framed.then(|| before.len()..place.end + self.end.len())
    }
}

/// A turn, counted from 0, that cannot be told from the rest of its conversation.
pub(crate) fn not_rendered(turn: usize, what: Unrendered) -> RowProblem {
    RowProblem::NotRendered { turn: turn + 1, what }
}

fn not_behind_its_prompt(turn: usize) -> RowProblem {
    not_rendered(turn, Unrendered::BehindPrompt)
}

fn changes(turn: usize) -> RowProblem {
    not_rendered(turn, Unrendered::SameLater)
}

/// The failure to render a part of a conversation, told as a problem of a turn.
pub(crate) fn within(turn: usize, part: &'static str, error: DatasetError) -> Failure {
    match error {
        DatasetError::Template(problem) => not_rendered(turn, Unrendered::Part { part, problem }).into(),
        other => Failure::All(other),
    }
}

/// Which tokens lie in the trained parts of the text: those that start in one. One entry for each
/// token.
///
/// A token that begins before a part and reaches into it belongs to the prompt, since generation
/// would start behind it. A token that begins in a part and reaches out of it is trained, since
/// otherwise the end of the turn would never be learned. The first token has nothing to be
/// predicted from.
pub(crate) fn trained_tokens(tokens: &[Range<usize>], parts: &[Range<usize>]) -> Vec<bool> {
    let parts = merged(parts);
    let inside = |start: usize| {
        // Only the last part that begins at it or before can hold it.
        let behind = parts.partition_point(|part| part.start <= start);
        behind > 0 && parts[behind - 1].contains(&start)
    };
    tokens.iter().enumerate().map(|(index, token)| index > 0 && inside(token.start)).collect()
}

/// Parts in order. Those that overlap become one.
fn merged(parts: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut sorted = parts.to_vec();
    sorted.sort_by_key(|part| (part.start, part.end));
    let mut merged: Vec<Range<usize>> = Vec::with_capacity(sorted.len());
    for part in sorted {
        match merged.last_mut() {
            Some(last) if part.start < last.end => last.end = last.end.max(part.end),
            _ => merged.push(part),
        }
    }
    merged.retain(|part| !part.is_empty());
    merged
}

/// `parts` without what lies in `holes`. Both are in order.
pub(crate) fn without(parts: &[Range<usize>], holes: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut left = Vec::new();
    for part in parts {
        let mut start = part.start;
        for hole in holes.iter().filter(|hole| hole.start < part.end && hole.end > part.start) {
            if hole.start > start {
                left.push(start..hole.start);
            }
            start = start.max(hole.end);
        }
        if start < part.end {
            left.push(start..part.end);
        }
    }
    left
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
        assert_eq!(trained_tokens(&tokens, &[4..8, 2..6, 9..9]), [false, true, true, true, true, false, false]);
        assert_eq!(trained_tokens(&tokens, &[]), [false; 7]);
    }

    #[test]
    #[expect(clippy::single_range_in_vec_init, reason = "a list of parts that has one part")]
    fn holes_are_left_out_of_parts() {
        assert_eq!(without(&[2..10, 12..20], &[0..3, 5..6, 9..13]), [3..5, 6..9, 13..20]);
        assert!(without(&[2..4], &[2..4]).is_empty());
        assert_eq!(without(&[2..4], &[]), [2..4]);
    }

    #[test]
    fn turns_have_the_frame_of_the_sampled_ones() {
        let text = "<u>1<a>one;<u>2<a>two;<u>3<b>six;";
        let place = |word: &str| text.find(word).map(|start| start..start + word.len()).expect("a word");
        let frame = |word: &str| {
            let place = place(word);
            TurnFrame::around(text, &(place.start..place.end + 1), &place).expect("a frame")
        };
        let shared = frame("one").shared(&frame("two")).expect("a frame of both");
        assert_eq!((shared.prompt, shared.start, shared.end), ("<a>", "", ";"));
        assert_eq!(shared.span(text, &place("two")), Some(18..22));
        assert_eq!(shared.span(text, &place("six")), None);
    }
}
