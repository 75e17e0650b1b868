//! A conversation to one sequence for each answer, as the model will meet it at that turn: what the template makes of the
//! messages before it with the generation prompt, and behind that the answer as the template writes it while nothing
//! follows. For templates that write earlier turns in another way once later ones follow (Qwen3, gpt-oss, Mistral's with a
//! system message), and for those that cut the reasoning off every answer (R1's).

use std::ops::Range;

use serde_json::Value;

use crate::chat::{Reader, Sequence, Sequences, Turns};
use crate::error::DatasetError;
use crate::failure::Failure;
use crate::jsonl::RowProblem;
use crate::mask::{self, Conversation};
use crate::template::{self, Rendered};
use crate::texts::{self, Found, Kind, Marked, Text};

/// Bytes of all sequences of one conversation.
const LONGEST_SEQUENCES: usize = 256 << 20;

impl Reader<'_> {
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
                let what = format!(
                    "the chat template writes earlier turns anew, and a sequence for each of its {} answers takes more \
                     than {} MiB of text",
                    turns.trained.len(),
                    LONGEST_SEQUENCES >> 20
                );
                return Err(RowProblem::new(what)
                    .expected("shorter conversations, or data.train_on = \"last\"")
                    .into());
            }
            let answers = vec![part];
            let parts = Some(self.without_holes(&text, &answers, &[*turn])?);
            list.push(Sequence { text, parts, answers, answer: Some(*turn) });
        }
        Ok(Sequences { list, by_turn: true, without_reasoning: 0 })
    }

    /// What the model is given at a turn and has to write there, and the byte range of the latter.
    fn turn(
        &self,
        turn: usize,
        marked: &Marked,
        with_marks: &Conversation<'_>,
    ) -> Result<(String, Range<usize>), Failure> {
        let conversation = self.conversation();
        let before = match conversation.prefix(turn, true) {
            Ok(rendered) => rendered.text,
            Err(DatasetError::Template { reason }) => return Err(self.no_prompt(turn, reason)),
            Err(other) => return Err(Failure::All(other)),
        };
        let with =
            conversation.prefix(turn + 1, false).map_err(|error| mask::within(turn, "the messages up to it", error))?;
        let with = with.text;
        let found_before = found(with_marks, turn, true, &before)?;
        let found_with = found(with_marks, turn + 1, false, &with)?;
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
        // A template that cuts the reasoning off every answer, also off the one that is trained on, is kept from knowing it.
        for in_content in [false, true] {
            if let Some(answer) = self.with_hidden_reasoning(turn, &before, in_content)? {
                return Ok(put_together(before, &answer));
            }
        }
        Err(problem.unwrap_or_else(|| self.behind_another_prompt(turn, &before)).into())
    }

    /// The answer of a turn with the reasoning that is within its content, or with that of a key put there; `None` where
    /// there is none, or where it does not come out whole behind the prompt.
    fn with_hidden_reasoning(&self, turn: usize, before: &str, in_content: bool) -> Result<Option<String>, Failure> {
        let message = &self.messages[turn];
        let Some(object) = message.as_object() else { return Ok(None) };
        let has_key = texts::reasoning(object).is_some();
        let has_tags = object.get("content").and_then(Value::as_str).is_some_and(texts::has_reasoning);
        // A key becomes a part of the content only where the model is to begin with its reasoning.
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
            Err(DatasetError::Template { .. }) => return Ok(None),
            Err(other) => return Err(Failure::All(other)),
        };
        let found = texts::take_marks(&rendered);
        let Some(answer) = found.text.strip_prefix(before) else { return Ok(None) };
        let marks = marks_from(&found, before.len());
        let is_whole = hidden.left_out(answer, Some(marks), &|_| true).is_none();
        Ok(is_whole.then(|| answer.to_owned()))
    }

    /// That the texts before a turn are in what the model is given there. Reasoning of earlier answers may be missing, and
    /// what an assistant said beside a call if it was there at its own turn (gpt-oss takes it for reasoning).
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
            text.kind == Kind::Content
                && text.message.is_some_and(|it| {
                    self.messages[it]["role"] == "assistant" && self.messages[it].get("tool_calls").is_some()
                })
        };
        let is_before = |text: &Text| text.message.is_none_or(|it| it < turn) && text.kind != Kind::Reasoning;
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

    /// The messages before a turn cannot be rendered.
    fn no_prompt(&self, turn: usize, reason: String) -> Failure {
        if self.begins(turn) {
            return begins_with_assistant(turn).into();
        }
        mask::within(turn, "the messages before it", DatasetError::Template { reason })
    }

    /// Whether nobody has said anything before a turn.
    fn begins(&self, turn: usize) -> bool {
        self.messages[..turn].iter().all(|message| message["role"] == "system" || message["role"] == "developer")
    }

    /// A turn that the template does not write behind the prompt that it makes for it.
    fn behind_another_prompt(&self, turn: usize, before: &str) -> RowProblem {
        if self.begins(turn) {
            return begins_with_assistant(turn);
        }
        let end = before.trim_end();
        let Some(tag) =
            ["<think>", "<thinking>", "[THINK]", "<|START_THINKING|>"].iter().find(|tag| end.ends_with(*tag))
        else {
            return mask::not_behind_its_prompt(turn);
        };
        let mut problem = mask::not_behind_its_prompt(turn);
        problem.reason = format!("{}: that ends with {tag}, and the answer has no reasoning", problem.reason);
        problem.expected(format!(
            "reasoning in front of the answer, in its content behind {tag} or as reasoning_content; or a template that \
             does not ask for it (data.chat_template)"
        ))
    }
}

fn begins_with_assistant(turn: usize) -> RowProblem {
    RowProblem::new(format!(
        "turn {}: the conversation begins with the assistant, so there is nothing that it answers",
        turn + 1
    ))
    .expected("a message of the user first; or \"weight\": 0 on this message, which makes it context; or data.train_on = \"last\"")
}

/// The same rendering with marks; `None` where they change what the template writes.
pub(crate) fn found(
    with_marks: &Conversation<'_>,
    messages: usize,
    add_generation_prompt: bool,
    plain: &str,
) -> Result<Option<Found>, Failure> {
    match with_marks.prefix(messages, add_generation_prompt) {
        Ok(rendered) => Ok(relied_on(&rendered, plain)),
        Err(DatasetError::Template { .. }) => Ok(None),
        Err(other) => Err(Failure::All(other)),
    }
}

fn relied_on(rendered: &Rendered, plain: &str) -> Option<Found> {
    if texts::has_mark(plain) {
        return None;
    }
    Some(texts::take_marks(&rendered.text)).filter(|found| found.text == plain)
}

/// The marks from a place on.
fn marks_from(found: &Found, place: usize) -> &[(usize, usize)] {
    let first = found.marks.partition_point(|(at, _)| *at < place);
    &found.marks[first..]
}

/// What follows the messages before a turn in `with`, the rendering up to it, where that is not what the model is given at the
/// turn: Mistral's template writes the system message into the last user message, as long as nothing follows. Both must
/// go on in the same way behind the last text that they share, up to the end of the prompt.
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
