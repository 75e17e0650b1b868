//! A conversation to the sequences that it is trained on: one for all of it, or, where the template writes earlier turns in
//! another way once later ones follow, one for each answer (`by_turn.rs`).

use std::borrow::Cow;
use std::ops::Range;

use finetune_recipe::TrainOn;
use minijinja::Value as TemplateValue;
use serde_json::Value;

use crate::by_turn::found;
use crate::failure::Failure;
use crate::generation;
use crate::jsonl::RowProblem;
use crate::mask::{self, Conversation};
use crate::row::Chat;
use crate::template::{self, ChatTemplate, Rendered};
use crate::texts::{self, Found, Kind, Marked, Text};
use crate::variants;

/// A text to tokenize, and what of it is trained on.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) text: String,
    /// Byte ranges that are trained on; `None`: all but the first token.
    pub(crate) parts: Option<Vec<Range<usize>>>,
    /// Byte ranges of the answers, holes in them included.
    pub(crate) answers: Vec<Range<usize>>,
    /// The first message that is trained on.
    pub(crate) answer: Option<usize>,
}

/// What a conversation became.
#[derive(Debug)]
pub(crate) struct Sequences {
    pub(crate) list: Vec<Sequence>,
    /// Each is of one turn, since the whole could not be one.
    pub(crate) by_turn: bool,
    /// Earlier answers whose reasoning the template's own blocks leave out of what is trained on.
    pub(crate) without_reasoning: usize,
}

pub(crate) fn sequences(template: &ChatTemplate, chat: &Chat, train_on: TrainOn) -> Result<Sequences, Failure> {
    let turns = Turns::choose(chat, train_on)?;
    let mut problem = None;
    for messages in variants::of(&chat.messages) {
        match Reader::new(template, chat, messages)?.read(&turns, train_on) {
            Ok(sequences) => return Ok(sequences),
            Err(Failure::All(error)) => return Err(Failure::All(error)),
            // What is wrong with the row as it is written comes first, unless that is only its form.
            Err(found) => {
                problem = match problem {
                    Some(first) if !is_of_form(&first) => Some(first),
                    _ => Some(found),
                }
            }
        }
    }
    Err(problem.unwrap_or_else(|| RowProblem::new("the row has no messages").into()))
}

/// Whether another form of the messages may have nothing of what a template does not take here.
fn is_of_form(failure: &Failure) -> bool {
    match failure {
        Failure::Row(problem) => {
            ["writes it as code", "quotes it", "stopped: "].iter().any(|words| problem.reason.contains(words))
        }
        _ => false,
    }
}

/// Which messages are answers.
pub(crate) struct Turns {
    assistant: Vec<usize>,
    /// Those that are trained on.
    pub(crate) trained: Vec<usize>,
    /// Those that are not, by their flags.
    muted: Vec<usize>,
}

impl Turns {
    fn choose(chat: &Chat, train_on: TrainOn) -> Result<Self, Failure> {
        if train_on != TrainOn::All
            && let Some((index, key)) =
                chat.training.iter().enumerate().find_map(|(index, it)| it.asked.map(|key| (index, key)))
        {
            return Err(RowProblem::new(format!(
                "{}.{key} asks for training on a message that is not the assistant's",
                chat.path(index)
            ))
            .expected("data.train_on = \"all\", or rows in which only the assistant's messages are trained on")
            .into());
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
                return Err(Failure::ZeroLabel(RowProblem::new(if before > 0 {
                    "no assistant message to train on: its flags (weight, train) leave none".to_owned()
                } else {
                    let roles = chat.messages.iter().filter_map(|message| message["role"].as_str()).take(8);
                    format!("no assistant message to train on; the roles are {}", roles.collect::<Vec<_>>().join(", "))
                })));
            }
        }
        Ok(Self { assistant, trained, muted })
    }
}

/// A conversation with what is needed to render it.
pub(crate) struct Reader<'a> {
    pub(crate) template: &'a ChatTemplate,
    pub(crate) chat: &'a Chat,
    pub(crate) messages: Cow<'a, [Value]>,
    pub(crate) values: Vec<TemplateValue>,
    tools: TemplateValue,
    pub(crate) variables: Vec<(String, TemplateValue)>,
}

impl<'a> Reader<'a> {
    fn new(template: &'a ChatTemplate, chat: &'a Chat, messages: Cow<'a, [Value]>) -> Result<Self, Failure> {
        let mut variables = Vec::with_capacity(chat.variables.len());
        for (name, value) in &chat.variables {
            if generation::has_mark(name) {
                return Err(RowProblem::new("the name of a template's variable holds a noncharacter").into());
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

    /// One sequence of the whole conversation.
    fn whole(&self, turns: &Turns, train_on: TrainOn) -> Result<Sequences, Failure> {
        let full = self.conversation().render()?;
        let marked = Lazy::new(self);
        let places = || marked.places(&full, &turns.trained);
        let spans = |wanted: &[usize]| self.conversation().trained_spans(&full, &turns.assistant, wanted, &places);
        let (parts, answers) = if train_on == TrainOn::All {
            // A template whose turns cannot be told apart is no obstacle to training on all of them.
            let answers = spans(&turns.trained).or_else(none_of_row)?;
            (self.all_but_muted(&full, turns)?, answers)
        } else {
            let spans = spans(&turns.trained)?;
            (Some(self.without_holes(&full.text, &spans, &turns.trained)?), spans)
        };
        let by_blocks = self.template.has_generation;
        let without_reasoning = self.check_whole(&full, &marked, turns, by_blocks || train_on == TrainOn::All)?;
        let answer = turns.trained.first().copied();
        let list = vec![Sequence { text: full.text, parts, answers, answer }];
        Ok(Sequences { list, by_turn: false, without_reasoning })
    }

    /// With `train_on = "all"`: the parts that are trained on where flags leave some out; `None` where nothing is left out.
    fn all_but_muted(&self, full: &Rendered, turns: &Turns) -> Result<Option<Vec<Range<usize>>>, Failure> {
        let detailed: Vec<usize> =
            (0..self.messages.len()).filter(|index| !self.chat.training[*index].untrained.is_empty()).collect();
        let left_out: Vec<usize> = turns.muted.iter().chain(&detailed).copied().collect();
        let Some(first) = left_out.first() else { return Ok(None) };
        if let Some(other) = left_out.iter().find(|turn| turns.assistant.binary_search(turn).is_err()) {
            let what = format!("{} is not to be trained on, and is not the assistant's", self.chat.path(*other));
            return Err(RowProblem::new(what).expected("data.train_on = \"assistant\"").into());
        }
        let whole = 0..full.text.len();
        let none = || Vec::new();
        let spans = |wanted: &[usize]| self.conversation().trained_spans(full, &turns.assistant, wanted, &none);
        let problem = |failure: Failure| match failure {
            Failure::All(error) => Failure::All(error),
            _ => {
                let what = format!("{} is not to be trained on, and its part cannot be told", self.chat.path(*first));
                Failure::from(RowProblem::new(what).expected("data.train_on = \"assistant\""))
            }
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

    /// The parts of turns without the characters that their flags leave out.
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
            let what = format!("{} answers in {} parts: train_detail needs one for each", turns.len(), spans.len());
            return Err(RowProblem::new(what).into());
        }
        let mut parts = Vec::new();
        for (turn, span) in turns.iter().zip(spans) {
            let holes = self.holes(text, span, *turn)?;
            parts.extend(mask::without(std::slice::from_ref(span), &holes));
        }
        Ok(parts)
    }

    /// The byte ranges in a rendering of the characters of a turn that are not to be trained on.
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
            let what =
                format!("{}.train_detail counts characters that the chat template changes", self.chat.path(turn));
            return Err(RowProblem::new(what).expected("a template that writes the content as it is").into());
        };
        let byte_of = |character: usize| {
            let byte = content.char_indices().nth(character).map_or(content.len(), |(byte, _)| byte);
            start + byte.saturating_sub(skipped).min(trimmed.len())
        };
        Ok(untrained.iter().map(|range| byte_of(range.start)..byte_of(range.end)).collect())
    }

    /// That every text is in the rendering of the whole conversation. The reasoning of turns that are not trained on may be
    /// missing. `only_last`: that of all but the last answer may; returned is of how many trained ones it is.
    fn check_whole(
        &self,
        full: &Rendered,
        marked: &Lazy<'_, 'a>,
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
            Kind::Reasoning if only_last => text.message == last,
            Kind::Reasoning => is_trained(text),
            _ => true,
        };
        self.check(marked, &full.text, marks, 0..self.messages.len(), &wanted)?;
        if !only_last {
            return Ok(0);
        }
        let lost = |turn: &&usize| {
            let reasoning = |text: &Text| text.kind == Kind::Reasoning && text.message == Some(**turn);
            marked.left_out(&full.text, marks, &reasoning).is_some()
        };
        Ok(turns.trained.iter().filter(lost).count())
    }

    /// An error for the first wanted text that is not in `plain`, a rendering of the messages in `scope`.
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
            Kind::Content => RowProblem::new(format!("{path}.content: the chat template leaves this {role} text out"))
                .expected("a template that renders it (data.chat_template), or its text in a message that is rendered"),
            Kind::Part => {
                RowProblem::new(format!("{path}.content is a list, and the chat template leaves its text out"))
                    .expected("a string")
            }
            Kind::Reasoning => RowProblem::new(format!("{path}: the chat template leaves the reasoning out")).expected(
                "a template that renders reasoning (data.chat_template), the reasoning within the content, or none",
            ),
            Kind::Call(number) => {
                RowProblem::new(format!("{path}.tool_calls[{number}]: the chat template leaves the call out"))
                    .expected("a template that renders calls (data.chat_template), or rows without them")
            }
            Kind::Tool => RowProblem::new("tools: the chat template leaves them out").expected(
                "a template that renders tools (data.chat_template), tools in chat_template_kwargs under the name that \
                 it reads, or rows without them",
            ),
        }
    }
}

/// No parts, where a row is what is wrong.
fn none_of_row(failure: Failure) -> Result<Vec<Range<usize>>, Failure> {
    match failure {
        Failure::Row(_) | Failure::ZeroLabel(_) => Ok(Vec::new()),
        Failure::All(error) => Err(Failure::All(error)),
    }
}

/// The marked rendering of a whole conversation, made when something first asks for it.
struct Lazy<'r, 'a> {
    reader: &'r Reader<'a>,
    made: std::cell::OnceCell<(Marked, Option<Found>)>,
}

impl<'r, 'a> Lazy<'r, 'a> {
    fn new(reader: &'r Reader<'a>) -> Self {
        Self { reader, made: std::cell::OnceCell::new() }
    }

    /// The marked conversation, and what was found in its rendering if its marks can be relied on.
    fn get(&self, full: &Rendered) -> Result<(&Marked, &Option<Found>), Failure> {
        if self.made.get().is_none() {
            let marked = Marked::new(&self.reader.messages, self.reader.chat.tools.as_ref());
            let values = template::to_values(&marked.messages)?;
            let tools = template::tools_value(marked.tools.as_ref())?;
            let conversation = Conversation { messages: &values, tools: &tools, ..self.reader.conversation() };
            let found = found(&conversation, values.len(), false, &full.text)?;
            // Nobody else sets it.
            let _ = self.made.set((marked, found));
        }
        let (marked, found) = self.made.get().expect("it was made above");
        Ok((marked, found))
    }

    /// Where the contents of turns stand in the whole conversation; nothing where that is not known.
    fn places(&self, full: &Rendered, turns: &[usize]) -> Vec<Option<Range<usize>>> {
        let Ok((marked, Some(found))) = self.get(full) else { return Vec::new() };
        let places = marked.content_places(&self.reader.messages, found);
        turns.iter().map(|turn| places.get(*turn).cloned().flatten()).collect()
    }
}
