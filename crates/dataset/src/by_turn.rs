//! A conversation to one sequence for each answer, as the model will meet it at that turn.
//!
//! A sequence is the messages before the answer, rendered with the generation prompt, and then the
//! answer as the template writes it while nothing follows. Three kinds of templates need this: those
//! that write earlier turns in another way once later ones follow (Qwen3, gpt-oss, Mistral's with a
//! system message), those that cut the reasoning off every answer (R1's), and those whose prompt
//! ends with an empty block of reasoning that no answer has (Gemma 4's).

use std::ops::Range;

use minijinja::Value as TemplateValue;
use serde_json::Value;

use crate::chat_reader::{ChatReader, Sequence, Sequences, Turns, marked_rendering};
use crate::error::DatasetError;
use crate::failure::Failure;
use crate::mask::{self, Conversation};
use crate::problem::RowProblem;
use crate::template;
use crate::template_problem::{TemplateProblem, Unrendered};
use crate::texts::{self, Found, Marked, Text, TextKind};
use crate::thought::{self, Prompted};

/// Variables of templates that ask the model for an answer alone if they are false. The second is DeepSeek's.
const SWITCHES: [&str; 2] = ["enable_thinking", "thinking"];
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
        let (mut bytes, mut closed_at_once) = (0, 0);
        for turn in &turns.trained {
            let (text, part) = self.turn(*turn, &marked, &with_marks)?;
            bytes += text.len();
            if bytes > LONGEST_SEQUENCES {
                let (answers, mebibytes) = (turns.trained.len(), LONGEST_SEQUENCES >> 20);
                return Err(RowProblem::LongSequences { answers, mebibytes }.into());
            }
            let is_plain = thought::apart(&self.messages[*turn]).is_none();
            closed_at_once += usize::from(is_plain && thought::ends_at_once(&text[..part.start], &text[part.clone()]));
            let answers = vec![part];
            let parts = Some(self.without_holes(&text, &answers, &[*turn])?);
            list.push(Sequence { text, parts, answers, answer: Some(*turn), last: *turn });
        }
        Ok(Sequences { list, by_turn: true, without_reasoning: 0, closed_at_once })
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

        let prompted = Prompted::at_end(&before);
        let closed = prompted.filter(|prompted| prompted.is_closed);
        if let Some(closed) = closed
            && thought::has_reasoning(&self.messages[turn])
        {
            return Err(mask::not_rendered(turn, Unrendered::BehindClosedReasoning(closed.tags.1)).into());
        }
        let answer = match with.strip_prefix(before.as_str()) {
            // The row may bring an empty block of its own.
            Some(answer) if closed.is_some() => Some(thought::without_empty(answer)),
            Some(answer) => Some(answer),
            None => closed
                .and_then(|closed| behind_closed(&before, &with, closed))
                .or_else(|| behind_context(turn, marked, &with, found_before.as_ref(), found_with.as_ref())),
        };
        let own = |text: &Text| text.message == Some(turn);
        let mut problem = None;
        if let Some(answer) = answer {
            let from = with.len() - answer.len();
            let marks = found_with.as_ref().map(|found| marks_from(found, from));
            match self.check(marked, answer, marks, turn..turn + 1, &own) {
                Ok(()) if thought::is_twice(&before, answer) => {
                    problem = Some(mask::not_rendered(turn, Unrendered::ReasoningTwice));
                }
                Ok(()) => return Ok(put_together(before, answer)),
                Err(Failure::Row(left_out)) => problem = Some(left_out),
                Err(other) => return Err(other),
            }
        }
        if closed.is_none()
            && let Some(answer) = self.with_reasoning(turn, &before, prompted)?
        {
            return Ok(put_together(before, &answer));
        }
        match problem {
            Some(problem) => Err(problem.into()),
            None => Err(self.behind_another_prompt(turn, &before)?.into()),
        }
    }

    /// The answer of a turn with reasoning that the template would cut off, or would write behind an
    /// empty block. Without reasoning it is empty, if no variable asks the model for the answer alone:
    /// it has to end then what the prompt opens.
    ///
    /// `None`: there is no such reasoning, or it does not come out whole behind the prompt.
    fn with_reasoning(&self, turn: usize, before: &str, prompted: Option<Prompted>) -> Result<Option<String>, Failure> {
        let message = &self.messages[turn];
        // The reasoning as the row writes it, if the template is kept from recognizing it.
        if message["content"].as_str().is_some_and(texts::has_reasoning)
            && let Some((hidden, found)) = self.with_hidden_tags(turn, message)?
            && let Some(answer) = found.text.strip_prefix(before)
            && hidden.left_out(answer, Some(marks_from(&found, before.len())), &|_| true).is_none()
            && !thought::is_twice(before, answer)
        {
            return Ok(Some(answer.to_owned()));
        }
        // Else in the place where the template has an empty block, or the prompt opens one.
        let (reasoning, without) = match thought::apart(message) {
            Some(apart) => apart,
            None if prompted.is_some() && self.switch(turn)?.is_none() => (String::new(), message.clone()),
            None => return Ok(None),
        };
        let Some((hidden, found)) = self.with_hidden_tags(turn, &without)? else { return Ok(None) };
        let start = prompted.map_or(before.len(), |prompted| prompted.start);
        let Some(rest) = found.text.strip_prefix(&before[..start]) else { return Ok(None) };
        let with_block;
        let filled = match thought::filled(&reasoning, &before[start..], rest) {
            None if !reasoning.trim().is_empty() => {
                with_block = self.closed_block(turn, &SWITCHES)?.unwrap_or_default() + rest;
                thought::filled(&reasoning, "", &with_block)
            }
            filled => filled,
        };
        let Some((answer, body)) = filled else { return Ok(None) };
        let marks = marks_from(&found, found.text.len() - body.len());
        let is_whole = hidden.left_out(body, Some(marks), &|_| true).is_none();
        Ok(is_whole.then_some(answer))
    }

    /// The empty block with which the prompt of a turn closes reasoning once that is switched off by
    /// these variables. It shows how a model writes reasoning whose template leaves it out (Gemma 4).
    fn closed_block(&self, turn: usize, switches: &[&str]) -> Result<Option<String>, Failure> {
        let off = switches.iter().map(|name| ((*name).to_owned(), TemplateValue::from(false)));
        let variables: Vec<_> = self.variables.iter().cloned().chain(off).collect();
        match (Conversation { variables: &variables, ..self.conversation() }).prefix(turn, true) {
            Ok(rendered) => {
                let closed = Prompted::at_end(&rendered.text).filter(|prompted| prompted.is_closed);
                Ok(closed.map(|closed| rendered.text[closed.start..].to_owned()))
            }
            Err(DatasetError::Template(_)) => Ok(None),
            Err(other) => Err(Failure::All(other)),
        }
    }

    /// The variable with which the prompt of a turn closes reasoning if it is false.
    fn switch(&self, turn: usize) -> Result<Option<&'static str>, Failure> {
        for name in SWITCHES {
            if self.closed_block(turn, &[name])?.is_some() {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// What the template writes up to a turn if this message stands there, with tags of reasoning
    /// that it does not recognize. `None`: it does not take it.
    fn with_hidden_tags(&self, turn: usize, message: &Value) -> Result<Option<(Marked, Found)>, Failure> {
        let hidden = Marked::hidden(message, turn);
        let mut values = self.values[..turn].to_vec();
        values.extend(template::to_values(&hidden.messages)?);
        let conversation = Conversation { messages: &values, ..self.conversation() };
        match conversation.prefix(turn + 1, false) {
            Ok(rendered) => Ok(Some((hidden, texts::take_marks(&rendered.text)))),
            Err(DatasetError::Template(_)) => Ok(None),
            Err(other) => Err(Failure::All(other)),
        }
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
    fn behind_another_prompt(&self, turn: usize, before: &str) -> Result<RowProblem, Failure> {
        if self.begins(turn) {
            return Ok(RowProblem::BeginsWithAssistant(turn + 1));
        }
        let what = match Prompted::at_end(before).filter(|prompted| !prompted.is_closed) {
            Some(opened) => Unrendered::BehindReasoningPrompt { tag: opened.tags.0, switch: self.switch(turn)? },
            None => Unrendered::BehindPrompt,
        };
        Ok(mask::not_rendered(turn, what))
    }
}

/// The marks that stand at a byte of the text or behind it.
fn marks_from(found: &Found, place: usize) -> &[(usize, usize)] {
    let first = found.marks.partition_point(|(at, _)| *at < place);
    &found.marks[first..]
}

/// The answer of a turn in `with`, the rendering up to it, if the rendered turn does not have the
/// closed reasoning that the prompt ends with: none at all, or an empty block of another form.
fn behind_closed<'w>(before: &str, with: &'w str, closed: Prompted) -> Option<&'w str> {
    with.strip_prefix(&before[..closed.start]).map(thought::without_empty)
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
