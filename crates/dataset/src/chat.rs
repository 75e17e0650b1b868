//! A conversation to the sequences that it is trained on. It is one sequence, unless the template
//! writes earlier turns in another way once later ones follow: then each answer is a sequence
//! (`by_turn.rs`).

use std::borrow::Cow;
use std::cell::OnceCell;
use std::ops::Range;

use finetune_recipe::TrainOn;
use serde_json::Value;

use crate::chat_reader::{ChatReader, Sequence, Sequences, Turns, marked_rendering};
use crate::failure::Failure;
use crate::mask::{self, Conversation};
use crate::problem::RowProblem;
use crate::row::{Chat, DOCUMENTS};
use crate::template::{self, ChatTemplate, Rendered};
use crate::template_problem::Unrendered;
use crate::texts::{self, Found, Marked, Text, TextKind};
use crate::thought::{self, Prompted};
use crate::variants;

/// The sequences of a conversation, with its documents in them.
pub(crate) fn sequences(template: &ChatTemplate, chat: &Chat, train_on: TrainOn) -> Result<Sequences, Failure> {
    let turns = Turns::choose(chat, train_on)?;
    let sequences = in_some_form(template, chat, &|reader| reader.read(&turns, train_on))?;
    let is_there = |text: &str| sequences.list.iter().any(|sequence| texts::occurs(&sequence.text, text));
    match document_left_out(template, chat, &is_there) {
        Some(document) => Err(RowProblem::DocumentLeftOut(document).into()),
        None => Ok(sequences),
    }
}

/// The messages of a conversation that is to be answered, in the form in which the template leaves nothing out that was
/// said to the model.
pub(crate) fn taken_form(template: &ChatTemplate, chat: &Chat) -> Result<Vec<Value>, Failure> {
    in_some_form(template, chat, &|reader| {
        let full = reader.conversation().render()?;
        reader.check_asked(&full)?;
        match document_left_out(template, chat, &|text| texts::occurs(&full.text, text)) {
            Some(document) => Err(RowProblem::DocumentLeftOut(document).into()),
            None => Ok(reader.messages.to_vec()),
        }
    })
}

/// The first document of whose texts none is there, if the template reads documents.
fn document_left_out(template: &ChatTemplate, chat: &Chat, is_there: &dyn Fn(&str) -> bool) -> Option<usize> {
    let documents = chat.documents()?.as_array()?;
    if !template.mentions(DOCUMENTS) {
        return None;
    }
    // A shorter text, such as a number, may stand there by chance.
    const LONG: usize = 12;
    documents.iter().position(|document| {
        let texts = document.as_object().into_iter().flat_map(|document| document.values()).chain([document]);
        let texts: Vec<&str> = texts.filter_map(Value::as_str).map(str::trim).filter(|text| !text.is_empty()).collect();
        let has_long = texts.iter().any(|text| text.len() >= LONG);
        let mut looked_for = texts.iter().filter(|text| !has_long || text.len() >= LONG);
        !texts.is_empty() && !looked_for.any(|text| is_there(text))
    })
}

/// If the template does not take the messages as they are written, the other forms of the same
/// messages are tried (`variants.rs`).
fn in_some_form<T>(
    template: &ChatTemplate,
    chat: &Chat,
    read: &dyn Fn(&ChatReader<'_>) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut problem = None;
    for messages in variants::of(&chat.messages) {
        match read(&ChatReader::new(template, chat, messages)?) {
            Ok(result) => return Ok(result),
            Err(Failure::All(error)) => return Err(Failure::All(error)),
            // The problem of the row as it is written is told, unless it is only one of its form.
            Err(found) => {
                problem = match problem {
                    Some(first) if !may_be_of_form(&first) => Some(first),
                    _ => Some(found),
                }
            }
        }
    }
    if let Some(messages) = variants::as_openai(&chat.messages) {
        match read(&ChatReader::new(template, chat, Cow::Owned(messages))?) {
            Ok(result) => return Ok(result),
            Err(Failure::All(error)) => return Err(Failure::All(error)),
            // A problem of this form is not told: the row is not in it.
            Err(found) if problem.as_ref().is_some_and(may_be_of_form) && !may_be_of_form(&found) => {
                problem = Some(found);
            }
            Err(_) => {}
        }
    }
    Err(problem.unwrap_or_else(|| RowProblem::NoMessages.into()))
}

fn may_be_of_form(failure: &Failure) -> bool {
    matches!(failure, Failure::Row(problem) if problem.may_be_of_form())
}

impl<'a> ChatReader<'a> {
    fn read(&self, turns: &Turns, train_on: TrainOn) -> Result<Sequences, Failure> {
        let problem = match self.whole(turns, train_on) {
            Ok(sequences) => return Ok(sequences),
            Err(Failure::Row(problem)) => problem,
            Err(other) => return Err(other),
        };
        if train_on == TrainOn::All || self.template.has_generation {
            return Err(problem.into());
        }
        self.by_turn(turns)
    }

    /// Refuses a conversation whose rendering lacks what was said to the model. Of its own answers templates write what
    /// they see fit: mostly without reasoning, some without the text beside a call.
    fn check_asked(&self, full: &Rendered) -> Result<(), Failure> {
        if texts::plainly_there(&self.messages, self.chat.tools.as_ref(), &full.text) {
            return Ok(());
        }
        let is_answer = |text: &Text| text.message.is_some_and(|it| self.messages[it]["role"] == "assistant");
        let wanted = |text: &Text| match text.kind {
            TextKind::Reasoning => false,
            TextKind::Content => !is_answer(text),
            _ => true,
        };
        let marks = LazyMarks::new(self);
        let (marked, found) = marks.get(full)?;
        let marks = found.as_ref().map(|found| &found.marks[..]);
        self.check(marked, &full.text, marks, 0..self.messages.len(), &wanted)
    }

    /// One sequence of the whole conversation.
    fn whole(&self, turns: &Turns, train_on: TrainOn) -> Result<Sequences, Failure> {
        let full = self.conversation().render()?;
        let marked = LazyMarks::new(self);
        let places = || marked.places(&full, &turns.trained);
        let spans = |wanted: &[usize]| self.conversation().trained_spans(&full, &turns.assistant, wanted, &places);
        let (parts, answers) = if train_on == TrainOn::All {
            // Training on everything does not need the turns told apart.
            let answers = spans(&turns.trained).or_else(none_of_row)?;
            (self.all_but_muted(&full, turns)?, answers)
        } else {
            let spans = spans(&turns.trained)?;
            refuse_twice(&full.text, &spans, &turns.trained)?;
            (Some(self.without_holes(&full.text, &spans, &turns.trained)?), spans)
        };
        let by_blocks = self.template.has_generation;
        let without_reasoning = self.check_whole(&full, &marked, turns, by_blocks || train_on == TrainOn::All)?;
        let answer = turns.trained.first().copied();
        let last = self.messages.len().saturating_sub(1);
        let list = vec![Sequence { text: full.text, parts, answers, answer, last }];
        Ok(Sequences { list, by_turn: false, without_reasoning, closed_at_once: 0 })
    }

    /// With `train_on = "all"`: the byte ranges that are trained on if flags exclude some. `None`:
    /// nothing is excluded.
    fn all_but_muted(&self, full: &Rendered, turns: &Turns) -> Result<Option<Vec<Range<usize>>>, Failure> {
        let detailed: Vec<usize> =
            (0..self.messages.len()).filter(|index| !self.chat.training[*index].untrained.is_empty()).collect();
        let left_out: Vec<usize> = turns.muted.iter().chain(&detailed).copied().collect();
        let Some(first) = left_out.first() else { return Ok(None) };
        if let Some(other) = left_out.iter().find(|turn| turns.assistant.binary_search(turn).is_err()) {
            return Err(RowProblem::MutedContext(self.chat.path(*other)).into());
        }
        let whole = 0..full.text.len();
        let none = || Vec::new();
        let spans = |wanted: &[usize]| self.conversation().trained_spans(full, &turns.assistant, wanted, &none);
        let problem = |failure: Failure| match failure {
            Failure::All(error) => Failure::All(error),
            _ => Failure::from(RowProblem::MutedPart(self.chat.path(*first))),
        };
        let muted = if turns.muted.is_empty() { Vec::new() } else { spans(&turns.muted).map_err(problem)? };
        let kept = mask::without(std::slice::from_ref(&whole), &muted);
        if detailed.is_empty() {
            return Ok(Some(kept));
        }
        let spans = spans(&detailed).map_err(problem)?;
        let left = self.without_holes(&full.text, &spans, &detailed)?;
        let holes: Vec<Range<usize>> = mask::without(&spans, &left);
        Ok(Some(mask::without(&kept, &holes)))
    }

    /// Refuses the row if one of its texts is not in the rendering of the whole conversation. The
    /// reasoning of turns that are not trained on may be missing.
    ///
    /// `only_last`: of the reasoning only that of the last answer has to be there. Returned is how
    /// many trained answers lack theirs.
    fn check_whole(
        &self,
        full: &Rendered,
        marked: &LazyMarks<'_, 'a>,
        turns: &Turns,
        only_last: bool,
    ) -> Result<usize, Failure> {
        if texts::plainly_there(&self.messages, self.chat.tools.as_ref(), &full.text) {
            return Ok(0);
        }
        let (marked, found) = marked.get(full)?;
        let marks = found.as_ref().map(|found| &found.marks[..]);
        let is_trained = |text: &Text| text.message.is_some_and(|it| turns.trained.binary_search(&it).is_ok());
        let last = turns.trained.last().copied();
        let wanted = |text: &Text| match text.kind {
            TextKind::Reasoning if only_last => text.message == last,
            TextKind::Reasoning => is_trained(text),
            _ => true,
        };
        self.check(marked, &full.text, marks, 0..self.messages.len(), &wanted)?;
        if !only_last {
            return Ok(0);
        }
        let lost = |turn: &&usize| {
            let reasoning = |text: &Text| text.kind == TextKind::Reasoning && text.message == Some(**turn);
            marked.left_out(&full.text, marks, &reasoning).is_some()
        };
        Ok(turns.trained.iter().filter(lost).count())
    }
}

/// Refuses answers whose reasoning stands behind reasoning that has ended: that of the generation
/// prompt, or an empty block.
fn refuse_twice(text: &str, spans: &[Range<usize>], turns: &[usize]) -> Result<(), RowProblem> {
    let twice = |span: &Range<usize>| thought::is_twice(&text[..span.start], &text[span.clone()]);
    let Some(index) = spans.iter().position(twice) else { return Ok(()) };
    let closed = Prompted::at_end(&text[..spans[index].start]).filter(|prompted| prompted.is_closed);
    let what = closed.map_or(Unrendered::ReasoningTwice, |it| Unrendered::BehindClosedReasoning(it.tags.1));
    // Generation blocks may be more than the turns.
    let turn = turns.get(index).or(turns.last()).copied().unwrap_or(0);
    Err(mask::not_rendered(turn, what))
}

/// No parts, if the failure is one of the row.
fn none_of_row(failure: Failure) -> Result<Vec<Range<usize>>, Failure> {
    match failure {
        Failure::Row(_) | Failure::ZeroLabel(_) => Ok(Vec::new()),
        Failure::All(error) => Err(Failure::All(error)),
    }
}

/// The marked rendering of a whole conversation, made at the first call of [`LazyMarks::get`].
struct LazyMarks<'r, 'a> {
    reader: &'r ChatReader<'a>,
    made: OnceCell<(Marked, Option<Found>)>,
}

impl<'r, 'a> LazyMarks<'r, 'a> {
    fn new(reader: &'r ChatReader<'a>) -> Self {
        Self { reader, made: OnceCell::new() }
    }

    /// The marked conversation, and what was found in its rendering if its marks can be relied on.
    fn get(&self, full: &Rendered) -> Result<(&Marked, &Option<Found>), Failure> {
        if self.made.get().is_none() {
            let marked = Marked::new(&self.reader.messages, self.reader.chat.tools.as_ref());
            let values = template::to_values(&marked.messages)?;
            let tools = template::tools_value(marked.tools.as_ref())?;
            let conversation = Conversation { messages: &values, tools: &tools, ..self.reader.conversation() };
            let found = marked_rendering(&conversation, values.len(), false, &full.text)?;
            // It was empty above, and only this function sets it.
            let _ = self.made.set((marked, found));
        }
        let (marked, found) = self.made.get().expect("it was made above");
        Ok((marked, found))
    }

    /// The byte ranges of the contents of turns in the whole conversation. Empty if they are not
    /// known.
    fn places(&self, full: &Rendered, turns: &[usize]) -> Vec<Option<Range<usize>>> {
        let Ok((marked, Some(found))) = self.get(full) else { return Vec::new() };
        let places = marked.content_places(&self.reader.messages, found);
        turns.iter().map(|turn| places.get(*turn).cloned().flatten()).collect()
    }
}
