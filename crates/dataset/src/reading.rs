//! One row of a file, here called a line, to rows of tokens with their masks. It is one row, unless a conversation
//! takes a sequence for each answer or several sequences were packed into the line.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use finetune_recipe::{Data, Format, Overlong, TrainOn};

use crate::chat;
use crate::chat_reader::{Sequence, Turns};
use crate::columns::Columns;
use crate::ends::NextTurn;
use crate::error::DatasetError;
use crate::failure::Failure;
use crate::mask;
use crate::messages;
use crate::notes::Notes;
use crate::plain_text::{self, Affixes};
use crate::problem::RowProblem;
use crate::record::Record;
use crate::row::{self, Chat, Example, Parsed};
use crate::row_of_tokens::Tokens;
use crate::shares::Part;
use crate::token_row::{Origin, Row};
use crate::tokenizer::{ChatTokenizer, Encoded};
use crate::variants;

/// What became of a line.
pub(crate) struct Outcome {
    /// Known unless the line is no JSON object or no format fits.
    pub(crate) format: Option<Format>,
    pub(crate) notes: Notes,
    pub(crate) result: LineResult,
}

pub(crate) enum LineResult {
    /// In order; at least one.
    Rows(Vec<Fitted>),
    /// It belongs to the other part of the rows (`data.eval_share`).
    OtherPart,
    /// There is nothing in the line to train on.
    ZeroLabel(RowProblem),
    Bad(RowProblem),
}

/// What became of a sequence.
pub(crate) enum Fitted {
    Kept { row: Row, truncated: bool },
    Dropped,
}

/// The settings and tools that every line is read with.
pub(crate) struct Reading {
    data: Data,
    columns: Columns,
    part: Part,
    /// `None`: only rows of tokens can be read.
    tokenizer: Option<ChatTokenizer>,
    affixes: Affixes,
    /// Looked for at the first answer that ends with none of the model's ends.
    next_turn: OnceLock<Option<NextTurn>>,
    /// Rows of the model's embedding.
    vocab_size: usize,
    /// Whether rows keep the texts that people read.
    keeps_text: AtomicBool,
    /// Set by the first line after which no other can be read.
    stopped: AtomicBool,
}

/// A sequence before its length is looked at.
struct Masked {
    tokens: Vec<u32>,
    trained: Vec<bool>,
    /// The token that the answer begins with, if training begins elsewhere (`train_on = "all"`).
    answer_start: Option<usize>,
    prompt_text: String,
    answer_text: String,
}

impl Reading {
    pub(crate) fn new(
        data: Data,
        part: Part,
        tokenizer: Option<ChatTokenizer>,
        vocab_size: usize,
    ) -> Result<Self, DatasetError> {
        let affixes = tokenizer.as_ref().map(Affixes::of).transpose()?.unwrap_or_default();
        let (keeps_text, stopped) = (AtomicBool::new(true), AtomicBool::new(false));
        let columns = Columns::new(&data.columns);
        let next_turn = OnceLock::new();
        Ok(Self { data, columns, part, tokenizer, affixes, next_turn, vocab_size, keeps_text, stopped })
    }

    /// Sets whether the next rows keep the texts that people read.
    pub(crate) fn keep_text(&self, keep: bool) {
        self.keeps_text.store(keep, Ordering::Relaxed);
    }

    fn keeps_text(&self) -> bool {
        self.keeps_text.load(Ordering::Relaxed)
    }

    fn tokenizer(&self) -> Result<&ChatTokenizer, DatasetError> {
        self.tokenizer.as_ref().ok_or(DatasetError::NoTokenizer)
    }

    /// Reads a line. `None`: another line has stopped the reading.
    pub(crate) fn line(&self, line: &Record) -> Option<Result<Outcome, DatasetError>> {
        if self.stopped.load(Ordering::Relaxed) {
            return None;
        }
        let (mut format, mut notes) = (None, Notes::default());
        let result = match self.read(line, &mut format, &mut notes) {
            Ok(Some(rows)) => LineResult::Rows(rows),
            Ok(None) => LineResult::OtherPart,
            // Nobody knows the part of a row that cannot be read. The other part tells of it.
            Err(Failure::Row(_)) if format.is_none() && self.part == Part::HeldBack => LineResult::OtherPart,
            Err(Failure::Row(problem)) => LineResult::Bad(problem),
            Err(Failure::ZeroLabel(problem)) => LineResult::ZeroLabel(problem),
            Err(Failure::All(error)) => {
                self.stopped.store(true, Ordering::Relaxed);
                return Some(Err(error));
            }
        };
        Some(Ok(Outcome { format, notes, result }))
    }

    /// `None`: the line belongs to the other part of the rows.
    fn read(
        &self,
        line: &Record,
        format: &mut Option<Format>,
        notes: &mut Notes,
    ) -> Result<Option<Vec<Fitted>>, Failure> {
        let object = self.columns.apply(line.object()?, line.has_columns())?;
        let read_as = match self.data.format {
            Format::Auto => row::detect(&object)?,
            chosen => chosen,
        };
        *format = Some(read_as);
        if self.data.eval_share.is_some_and(|share| Part::of(&object, read_as, share) != self.part) {
            return Ok(None);
        }
        let Parsed { example, unused } = row::read(object, read_as)?;
        notes.unused(unused);
        let rows = match example {
            Example::Chat(chat) => self.chat(&chat, notes),
            Example::PromptCompletion { prompt, completion } => {
                self.fit([self.prompt_completion(prompt, completion, notes)])
            }
            Example::Text(text) => self.fit([self.text(text, notes)]),
            Example::Tokens(sequences) => self.fit(sequences.into_iter().map(|sequence| self.tokens(sequence))),
        };
        rows.map(Some)
    }

    fn chat(&self, chat: &Chat, notes: &mut Notes) -> Result<Vec<Fitted>, Failure> {
        let tokenizer = self.tokenizer()?;
        let sequences = chat::sequences(tokenizer.template()?, chat, self.data.train_on)?;
        if chat.documents().is_some() && !tokenizer.template_has(row::DOCUMENTS) {
            notes.unused(vec![row::DOCUMENTS.to_owned()]);
        }
        let roles = chat.messages.iter().filter_map(|message| message["role"].as_str());
        let is_strange = |role: &&str| !messages::is_usual(role) && !tokenizer.template_has(role);
        roles.filter(is_strange).for_each(|role| notes.strange_role(role));
        if sequences.by_turn {
            notes.by_turn += 1;
            notes.sequences += sequences.list.len();
        }
        notes.without_reasoning += sequences.without_reasoning;
        notes.closed_at_once += sequences.closed_at_once;
        let trained = Turns::choose(chat, self.data.train_on)?.trained;
        notes.empty.times += trained.iter().filter(|turn| row::says_nothing(&chat.messages[**turn])).count();
        notes.no_arguments.times += trained.iter().map(|turn| variants::unread(&chat.messages[*turn])).sum::<usize>();
        notes.muted += chat.training.iter().filter(|training| training.muted).count();
        self.fit(sequences.list.into_iter().map(|sequence| self.sequence(chat, sequence, notes)))
    }

    fn sequence(&self, chat: &Chat, sequence: Sequence, notes: &mut Notes) -> Result<Masked, Failure> {
        let tokenizer = self.tokenizer()?;
        let Sequence { text, parts, answers, answer, last } = sequence;
        let mut encoded = tokenizer.encode_with_spans(&text)?;
        let mut trained = match &parts {
            Some(parts) => mask::trained_tokens(&encoded.spans, parts),
            None => all_but_first(encoded.ids.len()),
        };
        let ends_with_call = chat.messages.get(last).is_some_and(|message| message.get("tool_calls").is_some());
        for answer in &answers {
            let tokens = tokens_of(&encoded.spans, answer);
            let mut end = tokenizer.end_of(&encoded.ids[tokens.clone()])?;
            if end.is_none_or(|end| !tokenizer.eos_ids().contains(&end))
                && let Some(id) = self.next_turn_end(answer, tokens.end, ends_with_call, &encoded)?
            {
                if tokens.end == encoded.ids.len() {
                    encoded.ids.push(id);
                    encoded.spans.push(answer.end..answer.end);
                    trained.push(false);
                }
                // Not if a flag keeps the end of the answer from being trained on.
                let ends_there = |part: &Range<usize>| part.end == answer.end;
                let is_trained = parts.as_ref().is_none_or(|parts| parts.iter().any(ends_there));
                trained[tokens.end] |= is_trained && tokens.end > 0;
                end = Some(id);
            }
            notes.ends.add(&encoded.ids[tokens], end, tokenizer)?;
        }
        let answer_start = match self.data.train_on {
            TrainOn::All => mask::trained_tokens(&encoded.spans, &answers).iter().position(|trained| *trained),
            TrainOn::Assistant | TrainOn::Last => None,
        };
        let answered = answer.unwrap_or(chat.messages.len());
        let asked = (0..answered).rev().find(|index| chat.messages[*index]["role"].as_str() == Some("user"));
        let text_of = |index: Option<usize>| {
            let message = index.filter(|_| self.keeps_text()).and_then(|index| chat.messages.get(index));
            message.map(row::content_text).unwrap_or_default()
        };
        Ok(Masked {
            tokens: encoded.ids,
            trained,
            answer_start,
            prompt_text: text_of(asked),
            answer_text: text_of(Some(answered)),
        })
    }

    /// The token of the next turn that an answer ends with, if the template writes no end. It stands
    /// at `place`, behind the answer, or has to be added at the end of the sequence.
    fn next_turn_end(
        &self,
        answer: &Range<usize>,
        place: usize,
        ends_with_call: bool,
        encoded: &Encoded,
    ) -> Result<Option<u32>, DatasetError> {
        let tokenizer = self.tokenizer()?;
        let Some(next) = self.next_turn.get_or_init(|| tokenizer.next_turn()) else { return Ok(None) };
        Ok(match encoded.ids.get(place) {
            Some(id) => {
                let follows = encoded.spans[place].start == answer.end && tokenizer.is_special(*id);
                Some(*id).filter(|id| follows && tokenizer.eos_ids().contains(id))
            }
            None if ends_with_call => next.behind_call,
            None => Some(next.behind_answer),
        })
    }

    fn prompt_completion(&self, prompt: String, completion: String, notes: &mut Notes) -> Result<Masked, Failure> {
        let (mut tokens, start) =
            plain_text::prompt_completion(self.tokenizer()?, &self.affixes, &prompt, &completion)?;
        self.end(&mut tokens, &completion, notes)?;
        notes.empty.times += usize::from(completion.trim().is_empty());
        let answer_start = start.max(1);
        let first = if self.data.train_on == TrainOn::All { 1 } else { answer_start };
        let trained = (0..tokens.len()).map(|index| index >= first).collect();
        Ok(Masked {
            tokens,
            trained,
            answer_start: Some(answer_start),
            prompt_text: self.kept(prompt),
            answer_text: self.kept(completion),
        })
    }

    fn text(&self, text: String, notes: &mut Notes) -> Result<Masked, Failure> {
        let mut tokens = self.affixes.put(&self.tokenizer()?.encode(&text, false)?);
        self.end(&mut tokens, &text, notes)?;
        let trained = all_but_first(tokens.len());
        Ok(Masked { trained, tokens, answer_start: None, prompt_text: String::new(), answer_text: self.kept(text) })
    }

    fn kept(&self, text: String) -> String {
        if self.keeps_text() { text } else { String::new() }
    }

    fn tokens(&self, sequence: Tokens) -> Result<Masked, Failure> {
        let Tokens { ids, mut trained } = sequence;
        self.check_ids(&ids)?;
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        let start = trained.iter().position(|trained| *trained).unwrap_or(ids.len());
        let answer = trained[start..].iter().take_while(|trained| **trained).count();
        let text = |ids: &[u32], skip_special_tokens| match self.tokenizer.as_ref().filter(|_| self.keeps_text()) {
            Some(tokenizer) => tokenizer.decode(ids, skip_special_tokens),
            None => Ok(String::new()),
        };
        let prompt_text = text(&ids[..start], false)?;
        // Without the token that ends it, as a generated answer is shown.
        let answer_text = text(&ids[start..start + answer], true)?;
        Ok(Masked { tokens: ids, trained, answer_start: None, prompt_text, answer_text })
    }

    /// Appends the end-of-sequence token, unless the text brought its own. `text` is the text that
    /// the tokens end with.
    fn end(&self, tokens: &mut Vec<u32>, text: &str, notes: &mut Notes) -> Result<(), DatasetError> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(()) };
        let Some(end) = tokenizer.end() else { return Ok(()) };
        if tokens.last() != Some(&end) {
            if text.ends_with(char::is_whitespace) && ends_behind_space(tokens, end, tokenizer)? {
                notes.ended_twice += 1;
            }
            tokens.push(end);
        }
        Ok(())
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), RowProblem> {
        match ids.iter().position(|id| *id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(index) => {
                let id = ids[index];
                let name = self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.id_to_token(id));
                Err(RowProblem::UnknownToken { index, id, name, vocab_size: self.vocab_size })
            }
        }
    }

    /// The sequences of a row, each held against the length that a row may have. Of several, those
    /// with nothing to train on are left out. If none has anything, the row has nothing.
    fn fit(&self, sequences: impl IntoIterator<Item = Result<Masked, Failure>>) -> Result<Vec<Fitted>, Failure> {
        let mut fitted = Vec::new();
        let mut nothing = None;
        for masked in sequences {
            match self.fit_one(masked?) {
                Ok(one) => fitted.push(one),
                Err(Failure::ZeroLabel(problem)) => nothing = nothing.or(Some(problem)),
                Err(other) => return Err(other),
            }
        }
        match nothing {
            Some(problem) if fitted.is_empty() => Err(Failure::ZeroLabel(problem)),
            _ => Ok(fitted),
        }
    }

    fn fit_one(&self, mut masked: Masked) -> Result<Fitted, Failure> {
        self.check_ids(&masked.tokens)?;
        let (length, limit) = (masked.tokens.len(), self.data.max_seq_len);
        let first_trained = masked.trained.iter().position(|trained| *trained);
        let Some(first_trained) = first_trained else {
            return Err(Failure::ZeroLabel(RowProblem::NothingTrained(length)));
        };
        let truncated = length > limit;
        if truncated {
            match self.data.overlong {
                Overlong::Error => return Err(RowProblem::TooLong { tokens: length, limit }.into()),
                Overlong::Drop => return Ok(Fitted::Dropped),
                Overlong::Truncate if first_trained >= limit => {
                    let first = first_trained + 1;
                    return Err(Failure::ZeroLabel(RowProblem::NothingLeft { tokens: length, limit, first }));
                }
                Overlong::Truncate => {
                    masked.tokens.truncate(limit);
                    masked.trained.truncate(limit);
                }
            }
        }
        let Masked { mut tokens, mut trained, answer_start, prompt_text, answer_text } = masked;
        // Rows stay in memory to the end of the run.
        tokens.shrink_to_fit();
        trained.shrink_to_fit();
        let prompt_tokens = answer_start.unwrap_or(first_trained).min(tokens.len());
        let origin = Origin { file: 0, line: 0, row: 0 };
        Ok(Fitted::Kept { row: Row { tokens, trained, origin, prompt_tokens, prompt_text, answer_text }, truncated })
    }
}

fn all_but_first(tokens: usize) -> Vec<bool> {
    (0..tokens).map(|index| index > 0).collect()
}

/// The tokens that start in a part of the text.
fn tokens_of(spans: &[Range<usize>], part: &Range<usize>) -> Range<usize> {
    let first = spans.partition_point(|span| span.start < part.start);
    let behind = spans.partition_point(|span| span.start < part.end);
    first..behind.max(first)
}

/// Whether tokens end with the end-of-sequence token and white space behind it.
fn ends_behind_space(tokens: &[u32], end: u32, tokenizer: &ChatTokenizer) -> Result<bool, DatasetError> {
    /// The most tokens of white space that are looked at.
    const LOOKED_AT: usize = 8;
    for id in tokens.iter().rev().take(LOOKED_AT) {
        if *id == end {
            return Ok(true);
        }
        if !tokenizer.decode(&[*id], false)?.trim().is_empty() {
            break;
        }
    }
    Ok(false)
}
