//! A conversation to one sequence for each answer, as the model will meet it at that turn.
//!
//! A sequence is the messages before the answer, rendered with the generation prompt, and then the
//! answer as the template writes it while nothing follows. Two kinds of templates need this: those
//! that write earlier turns in another way once later ones follow (Qwen3, gpt-oss, Mistral's with a
//! system message), and those that cut the reasoning off every answer (R1's).

use std::ops::Range;

use serde_json::Value;

use crate::chat_reader::{ChatReader, Sequence, Sequences, Turns, marked_rendering};
use crate::error::DatasetError;
use crate::failure::Failure;
use crate::mask::{self, Conversation};
use crate::problem::RowProblem;
use crate::template;
use crate::template_problem::{TemplateProblem, Unrendered};
use crate::texts::{self, Found, Marked, Text, TextKind};

/// The most bytes of text of all sequences of one conversation.
const LONGEST_SEQUENCES: usize = 256 << 20;

impl ChatReader<'_> {
    /// A sequence for each turn that is trained on.
    pub(crate) fn by_turn(&self, turns: &Turns) -> Result<Sequences, Failure> {
        let marked = Marked::new(&self.messages, self.chat.tools.as_ref());
        let marked_values = template::to_values(&marked.messages)?;
        let marked_tools = template::tools_value(marked.tools.as_ref())?;
        let with_marks = Conversation {
            template: self.template,
            messages: &marked_values,
            tools: &marked_tools,
            variables: &self.variables,
        };
        let mut list = Vec::with_capacity(turns.trained.len());
        let mut bytes = 0;
        for turn in &turns.trained {
            let (text, part) = self.turn(*turn, &marked, &with_marks)?;
            bytes += text.len();
            if bytes > LONGEST_SEQUENCES {
                let (answers, mebibytes) = (turns.trained.len(), LONGEST_SEQUENCES >> 20);
                return Err(RowProblem::LongSequences { answers, mebibytes }.into());
            }
            let answers = vec![part];
            let parts = Some(self.without_holes(&text, &answers, &[*turn])?);
            list.push(Sequence { text, parts, answers, answer: Some(*turn) });
        }
        Ok(Sequences { list, by_turn: true, without_reasoning: 0 })
    }

    /// The text of a sequence, and the byte range of the answer in it.
    fn turn(
        &self,
        turn: usize,
        marked: &Marked,
        with_marks: &Conversation<'_>,
    ) -> Result<(String, Range<usize>), Failure> {
        let conversation = self.conversation();
        let before = match conversation.prefix(turn, true) {
            Ok(rendered) => rendered.text,
            Err(DatasetError::Template(problem)) => return Err(self.no_prompt(turn, problem)),
            Err(other) => return Err(Failure::All(other)),
        };
        let with =
            conversation.prefix(turn + 1, false).map_err(|error| mask::within(turn, "the messages up to it", error))?;
        let with = with.text;
        let found_before = marked_rendering(with_marks, turn, true, &before)?;
        let found_with = marked_rendering(with_marks, turn + 1, false, &with)?;
        self.check_context(turn, marked, with_marks, &before, found_before.as_ref())?;

        let answer = match with.strip_prefix(before.as_str()) {
            Some(answer) => Some(answer),
            None => behind_context(turn, marked, &with, found_before.as_ref(), found_with.as_ref()),
        };
        let own = |text: &Text| text.message == Some(turn);
        let mut problem = None;
        if let Some(answer) = answer {
            let from = with.len() - answer.len();
            let marks = found_with.as_ref().map(|found| marks_from(found, from));
            match self.check(marked, answer, marks, turn..turn + 1, &own) {
                Ok(()) => return Ok(put_together(before, answer)),
                Err(Failure::Row(left_out)) => problem = Some(left_out),
                Err(other) => return Err(other),
            }
        }
        // Some templates cut the reasoning off every answer, also off the one that is trained on.
        // They are kept from recognizing it.
        for in_content in [false, true] {
            if let Some(answer) = self.with_hidden_reasoning(turn, &before, in_content)? {
                return Ok(put_together(before, &answer));
            }
        }
        Err(problem.unwrap_or_else(|| self.behind_another_prompt(turn, &before)).into())
    }

    /// The answer of a turn with reasoning that the template cannot recognize. The reasoning is
    /// within the content already, or with `in_content` it is put there from a key of its own.
    ///
    /// `None`: there is no such reasoning, or it does not come out whole behind the prompt.
    fn with_hidden_reasoning(&self, turn: usize, before: &str, in_content: bool) -> Result<Option<String>, Failure> {
        let message = &self.messages[turn];
        let Some(object) = message.as_object() else { return Ok(None) };
        let has_key = texts::reasoning(object).is_some();
        let has_tags = object.get("content").and_then(Value::as_str).is_some_and(texts::has_reasoning);
        // A key becomes part of the content only if the prompt asks the model to begin with
        // reasoning.
        let prompted = before.trim_end().ends_with("<think>");
        let applies = if in_content { has_key && !has_tags && prompted } else { has_tags };
        if !applies {
            return Ok(None);
        }
        let hidden = Marked::hidden(message, turn, in_content);
        let mut values = self.values[..turn].to_vec();
        values.extend(template::to_values(&hidden.messages)?);
        let conversation = Conversation { messages: &values, ..self.conversation() };
        let rendered = match conversation.prefix(turn + 1, false) {
            Ok(rendered) => rendered.text,
            Err(DatasetError::Template(_)) => return Ok(None),
            Err(other) => return Err(Failure::All(other)),
        };
        let found = texts::take_marks(&rendered);
        let Some(answer) = found.text.strip_prefix(before) else { return Ok(None) };
        let marks = marks_from(&found, before.len());
        let is_whole = hidden.left_out(answer, Some(marks), &|_| true).is_none();
        Ok(is_whole.then(|| answer.to_owned()))
    }

    /// Refuses the row if a text before a turn is not in what the model is given at that turn.
    ///
    /// Reasoning of earlier answers may be missing. So may what an assistant said beside a call, if
    /// it was there at its own turn (gpt-oss takes it for reasoning).
    fn check_context(
        &self,
        turn: usize,
        marked: &Marked,
        with_marks: &Conversation<'_>,
        before: &str,
        found_before: Option<&Found>,
    ) -> Result<(), Failure> {
        let marks = found_before.map(|found| &found.marks[..]);
        let beside_call = |text: &Text| {
            text.kind == TextKind::Content
                && text.message.is_some_and(|it| {
                    self.messages[it]["role"] == "assistant" && self.messages[it].get("tool_calls").is_some()
                })
        };
        let is_before = |text: &Text| text.message.is_none_or(|it| it < turn) && text.kind != TextKind::Reasoning;
        self.check(marked, before, marks, 0..turn, &|text: &Text| is_before(text) && !beside_call(text))?;
        if marked.left_out(before, marks, &|text: &Text| is_before(text) && beside_call(text)).is_none() {
            return Ok(());
        }
        for message in 0..turn {
            let own = |text: &Text| text.message == Some(message) && beside_call(text);
            if marked.left_out(before, marks, &own).is_some() {
                let with = with_marks.prefix(message + 1, false)?.text;
                let found = texts::take_marks(&with);
                self.check(marked, &found.text, Some(&found.marks[..]), message..message + 1, &own)?;
            }
        }
        Ok(())
    }

    /// The failure to render the messages before a turn.
    fn no_prompt(&self, turn: usize, problem: TemplateProblem) -> Failure {
        if self.begins(turn) {
            return RowProblem::BeginsWithAssistant(turn + 1).into();
        }
        mask::within(turn, "the messages before it", DatasetError::Template(problem))
    }

    /// Whether no message but system messages stands before a turn.
    fn begins(&self, turn: usize) -> bool {
        self.messages[..turn].iter().all(|message| message["role"] == "system" || message["role"] == "developer")
    }

    /// The problem of a turn that the template does not write behind the prompt that it makes for
    /// it.
    fn behind_another_prompt(&self, turn: usize, before: &str) -> RowProblem {
        if self.begins(turn) {
            return RowProblem::BeginsWithAssistant(turn + 1);
        }
        let end = before.trim_end();
        let opening = OPENING_TAGS.into_iter().find(|tag| end.ends_with(tag)).map(Unrendered::BehindReasoningPrompt);
        let closing = || {
            let (_, tag) = texts::REASONING.into_iter().find(|(_, tag)| end.ends_with(tag))?;
            self.has_reasoning(turn).then_some(Unrendered::BehindClosedReasoning(tag))
        };
        mask::not_rendered(turn, opening.or_else(closing).unwrap_or(Unrendered::BehindPrompt))
    }

    /// Whether a message has reasoning, under a key of its own or within its content.
    fn has_reasoning(&self, turn: usize) -> bool {
        let message = &self.messages[turn];
        message.as_object().is_some_and(|object| texts::reasoning(object).is_some())
            || message["content"].as_str().is_some_and(texts::has_reasoning)
    }
}

/// Tags by which a generation prompt opens the reasoning of an answer.
const OPENING_TAGS: [&str; 4] = ["<think>", "<thinking>", "[THINK]", "<|START_THINKING|>"];

/// The marks that stand at a byte of the text or behind it.
fn marks_from(found: &Found, place: usize) -> &[(usize, usize)] {
    let first = found.marks.partition_point(|(at, _)| *at < place);
    &found.marks[first..]
}

/// The answer of a turn in `with`, the rendering up to it, if `with` does not begin with what the
/// model is given at the turn. Mistral's template writes the system message into the last user
/// message as long as nothing follows.
///
/// Both renderings must go on in the same way behind the last text that they share, up to the end
/// of the prompt.
fn behind_context<'w>(
    turn: usize,
    marked: &Marked,
    with: &'w str,
    found_before: Option<&Found>,
    found_with: Option<&Found>,
) -> Option<&'w str> {
    let (before, found_with) = (found_before?, found_with?);
    let (place, id) = *before.marks.last()?;
    marked.texts.get(id)?.message.filter(|message| *message < turn)?;
    let (place_with, _) = *found_with.marks.iter().rev().find(|(_, other)| *other == id)?;
    let is_last = |(at, other): &(usize, usize)| {
        *at <= place_with || marked.texts.get(*other).is_some_and(|text| text.message == Some(turn))
    };
    if !found_with.marks.iter().all(is_last) {
        return None;
    }
    with[place_with..].strip_prefix(&before.text[place..])
}

fn put_together(before: String, answer: &str) -> (String, Range<usize>) {
    let start = before.len();
    let text = before + answer;
    let part = start..text.len();
    (text, part)
}
