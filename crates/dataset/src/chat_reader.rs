//! A conversation with what is needed to render it, and the checks of its renderings. The texts of
//! the row must be in them. Characters that a flag mutes are left out of training.

use std::borrow::Cow;
use std::ops::Range;

use finetune_recipe::TrainOn;
use minijinja::Value as TemplateValue;
use serde_json::Value;

use crate::error::DatasetError;
use crate::failure::Failure;
use crate::generation;
use crate::mask::{self, Conversation};
use crate::problem::RowProblem;
use crate::row::Chat;
use crate::template::{self, ChatTemplate, Rendered};
use crate::texts::{self, Found, Marked, Text, TextKind};
use crate::variants;

/// A text to tokenize, and what of it is trained on.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) text: String,
    /// Byte ranges of `text` that are trained on. `None`: everything but the first token.
    pub(crate) parts: Option<Vec<Range<usize>>>,
    /// Byte ranges of the answers in `text`. Characters that flags mute are part of them.
    pub(crate) answers: Vec<Range<usize>>,
    /// Index of the first message that is trained on.
    pub(crate) answer: Option<usize>,
    /// Index of the last message in it.
    pub(crate) last: usize,
}

/// What a conversation became.
#[derive(Debug)]
pub(crate) struct Sequences {
    pub(crate) list: Vec<Sequence>,
    /// Each sequence is of one turn, since the whole conversation could not be one sequence.
    pub(crate) by_turn: bool,
    /// Earlier answers whose reasoning the template leaves out of its generation blocks.
    pub(crate) without_reasoning: usize,
    /// Answers of rows without reasoning that begin with the end of what the prompt opens.
    pub(crate) closed_at_once: usize,
}

/// Which messages are answers. All are indices of messages, ascending.
pub(crate) struct Turns {
    /// The assistant's messages.
    pub(crate) assistant: Vec<usize>,
    /// Those that are trained on.
    pub(crate) trained: Vec<usize>,
    /// Messages that their flags exclude from training.
    pub(crate) muted: Vec<usize>,
}

impl Turns {
    pub(crate) fn choose(chat: &Chat, train_on: TrainOn) -> Result<Self, Failure> {
        if train_on != TrainOn::All
            && let Some((index, key)) =
                chat.training.iter().enumerate().find_map(|(index, it)| it.asked.map(|key| (index, key)))
        {
            return Err(RowProblem::AsksForTraining(format!("{}.{key}", chat.path(index))).into());
        }
        let is_assistant = |index: &usize| chat.messages[*index]["role"].as_str() == Some("assistant");
        let assistant: Vec<usize> = (0..chat.messages.len()).filter(is_assistant).collect();
        let mut trained: Vec<usize> = assistant.iter().copied().filter(|turn| *turn >= chat.trained_from).collect();
        if train_on != TrainOn::Assistant {
            trained.drain(..trained.len().saturating_sub(1));
        }
        let is_muted = |turn: &usize| chat.training[*turn].muted;
        let muted = (0..chat.messages.len()).filter(is_muted).collect();
        if train_on != TrainOn::All {
            let before = trained.len();
            trained.retain(|turn| !is_muted(turn));
            if trained.is_empty() {
                return Err(Failure::ZeroLabel(if before > 0 {
                    RowProblem::AllMuted
                } else {
                    let roles = chat.messages.iter().filter_map(|message| message["role"].as_str()).take(8);
                    RowProblem::NoAssistant(roles.map(str::to_owned).collect())
                }));
            }
        }
        Ok(Self { assistant, trained, muted })
    }
}

/// A conversation with what is needed to render it.
pub(crate) struct ChatReader<'a> {
    pub(crate) template: &'a ChatTemplate,
    pub(crate) chat: &'a Chat,
    pub(crate) messages: Cow<'a, [Value]>,
    pub(crate) values: Vec<TemplateValue>,
    tools: TemplateValue,
    pub(crate) variables: Vec<(String, TemplateValue)>,
}

impl<'a> ChatReader<'a> {
    pub(crate) fn new(template: &'a ChatTemplate, chat: &'a Chat, messages: Cow<'a, [Value]>) -> Result<Self, Failure> {
        let mut variables = Vec::with_capacity(chat.variables.len());
        for (name, value) in &chat.variables {
            if generation::has_mark(name) {
                return Err(RowProblem::VariableName.into());
            }
            variables.push((name.clone(), template::tools_value(Some(value))?));
        }
        let values = template::to_values(&messages)?;
        let tools = template::tools_value(chat.tools.as_ref())?;
        Ok(Self { template, chat, messages, values, tools, variables })
    }

    pub(crate) fn conversation(&self) -> Conversation<'_> {
        Conversation { template: self.template, messages: &self.values, tools: &self.tools, variables: &self.variables }
    }

    /// The parts of turns without the characters that their flags exclude from training.
    pub(crate) fn without_holes(
        &self,
        text: &str,
        spans: &[Range<usize>],
        turns: &[usize],
    ) -> Result<Vec<Range<usize>>, Failure> {
        if turns.iter().all(|turn| self.chat.training[*turn].untrained.is_empty()) {
            return Ok(spans.to_vec());
        }
        if spans.len() != turns.len() {
            return Err(RowProblem::AnswersInParts { answers: turns.len(), parts: spans.len() }.into());
        }
        let mut parts = Vec::new();
        for (turn, span) in turns.iter().zip(spans) {
            let holes = self.holes(text, span, *turn)?;
            parts.extend(mask::without(std::slice::from_ref(span), &holes));
        }
        Ok(parts)
    }

    /// The byte ranges in a rendering of the characters of a turn that are not trained on.
    fn holes(&self, text: &str, span: &Range<usize>, turn: usize) -> Result<Vec<Range<usize>>, Failure> {
        let untrained = &self.chat.training[turn].untrained;
        if untrained.is_empty() {
            return Ok(Vec::new());
        }
        let content = self.messages[turn]["content"].as_str().unwrap_or_default();
        let trimmed = content.trim();
        let skipped = content.len() - content.trim_start().len();
        let mut found = text[span.clone()].match_indices(trimmed).map(|(place, _)| span.start + place);
        let (Some(start), None) = (found.next(), found.next()) else {
            return Err(RowProblem::ChangedCharacters(self.chat.path(turn)).into());
        };
        let byte_of = |character: usize| {
            let byte = content.char_indices().nth(character).map_or(content.len(), |(byte, _)| byte);
            start + byte.saturating_sub(skipped).min(trimmed.len())
        };
        Ok(untrained.iter().map(|range| byte_of(range.start)..byte_of(range.end)).collect())
    }

    /// Refuses the row for the first wanted text that is not in `plain`, a rendering of the
    /// messages in `scope`.
    pub(crate) fn check(
        &self,
        marked: &Marked,
        plain: &str,
        marks: Option<&[(usize, usize)]>,
        scope: Range<usize>,
        wanted: &dyn Fn(&Text) -> bool,
    ) -> Result<(), Failure> {
        if let Some(text) = marked.left_out(plain, marks, wanted) {
            return Err(self.left_out(text).into());
        }
        variants::check_written(&self.messages, scope, plain, &|message| self.chat.path(message))?;
        Ok(())
    }

    fn left_out(&self, text: &Text) -> RowProblem {
        let path = text.message.map(|message| self.chat.path(message)).unwrap_or_default();
        let role = text.message.and_then(|message| self.messages[message]["role"].as_str()).unwrap_or_default();
        match text.kind {
            TextKind::Content => RowProblem::TextLeftOut { path, role: role.to_owned() },
            TextKind::Part => RowProblem::PartsLeftOut(path),
            TextKind::Reasoning => RowProblem::ReasoningLeftOut(path),
            TextKind::Call(call) => RowProblem::CallLeftOut { path, call },
            TextKind::Tool => RowProblem::ToolsLeftOut,
        }
    }
}

/// The rendering of the marked conversation. `None`: the marks change what the template writes, so
/// they cannot be relied on. `plain` is the same rendering without marks.
pub(crate) fn marked_rendering(
    with_marks: &Conversation<'_>,
    messages: usize,
    add_generation_prompt: bool,
    plain: &str,
) -> Result<Option<Found>, Failure> {
    match with_marks.prefix(messages, add_generation_prompt) {
        Ok(rendered) => Ok(relied_on(&rendered, plain)),
        Err(DatasetError::Template(_)) => Ok(None),
        Err(other) => Err(Failure::All(other)),
    }
}

fn relied_on(rendered: &Rendered, plain: &str) -> Option<Found> {
    if texts::has_mark(plain) {
        return None;
    }
    Some(texts::take_marks(&rendered.text)).filter(|found| found.text == plain)
}
