//! One line of a file to one row of tokens with its mask.

use finetune_recipe::{Data, Format, Overlong, TrainOn};

use crate::error::DatasetError;
use crate::jsonl::{self, Line, RowProblem};
use crate::load::{Origin, Row};
use crate::mask::{self, Conversation};
use crate::row::{self, Example};
use crate::template;
use crate::tokenizer::ChatTokenizer;

/// What became of a line.
pub(crate) struct Outcome {
    /// Known unless the line is no JSON object or no format fits.
    pub(crate) format: Option<Format>,
    pub(crate) end: End,
}

pub(crate) enum End {
    Kept { row: Row, truncated: bool },
    Dropped,
    ZeroLabel(RowProblem),
    Bad(RowProblem),
}

/// Why a row cannot be used, or why none can.
enum Failure {
    Row(RowProblem),
    ZeroLabel(RowProblem),
    All(DatasetError),
}

impl From<RowProblem> for Failure {
    fn from(problem: RowProblem) -> Self {
        Self::Row(problem)
    }
}

impl From<DatasetError> for Failure {
    fn from(error: DatasetError) -> Self {
        match error {
            DatasetError::Template { reason } | DatasetError::Tokenizer { reason } => {
                Self::Row(RowProblem::new(reason))
            }
            other => Self::All(other),
        }
    }
}

/// What every line is read with.
pub(crate) struct Reading {
    pub(crate) data: Data,
    /// None: only rows of tokens can be read.
    pub(crate) tokenizer: Option<ChatTokenizer>,
    /// Rows of the model's embedding.
    pub(crate) vocab_size: usize,
}

/// A row before its length is looked at.
struct Masked {
    tokens: Vec<u32>,
    trained: Vec<bool>,
    /// Where the answer begins, if that is not where training does (`train_on = "all"`).
    answer_start: Option<usize>,
    prompt_text: String,
    answer_text: String,
}

impl Reading {
    fn tokenizer(&self) -> Result<&ChatTokenizer, DatasetError> {
        self.tokenizer.as_ref().ok_or(DatasetError::NoTokenizer)
    }

    pub(crate) fn line(&self, line: &Line) -> Result<Outcome, DatasetError> {
        let mut format = None;
        let end = match self.read(line, &mut format) {
            Ok(end) => end,
            Err(Failure::Row(problem)) => End::Bad(problem),
            Err(Failure::ZeroLabel(problem)) => End::ZeroLabel(problem),
            Err(Failure::All(error)) => return Err(error),
        };
        Ok(Outcome { format, end })
    }

    fn read(&self, line: &Line, format: &mut Option<Format>) -> Result<End, Failure> {
        let object = jsonl::object(&line.bytes)?;
        let read_as = match self.data.format {
            Format::Auto => row::detect(&object)?,
            chosen => chosen,
        };
        *format = Some(read_as);
        let masked = match row::read(object, read_as)? {
            Example::Chat { messages, tools, trained_from } => self.chat(&messages, tools.as_ref(), trained_from)?,
            Example::PromptCompletion { prompt, completion } => self.prompt_completion(prompt, completion)?,
            Example::Text(text) => self.text(text)?,
            Example::Tokens { ids, trained } => self.tokens(ids, trained)?,
        };
        self.fit(masked)
    }

    fn chat(
        &self,
        messages: &[serde_json::Value],
        tools: Option<&serde_json::Value>,
        trained_from: usize,
    ) -> Result<Masked, Failure> {
        let conversation = Conversation {
            template: self.tokenizer()?.template()?,
            messages: &template::to_values(messages)?,
            tools: &template::tools_value(tools)?,
        };
        let is = |index: &usize, role: &str| messages[*index]["role"].as_str() == Some(role);
        let assistant_turns: Vec<usize> = (0..messages.len()).filter(|index| is(index, "assistant")).collect();
        let mut turns: Vec<usize> = assistant_turns.iter().copied().filter(|turn| *turn >= trained_from).collect();
        if self.data.train_on != TrainOn::Assistant {
            turns.drain(..turns.len().saturating_sub(1));
        }
        let full = conversation.render()?;
        check_parts_rendered(messages, &full.text)?;
        let encoded = self.tokenizer()?.encode_with_spans(&full.text)?;
        let mut answer_start = None;
        let trained = match self.data.train_on {
            TrainOn::All => {
                // A template whose turns cannot be told apart is no obstacle to training on all of them.
                let spans = conversation.trained_spans(&full, &assistant_turns, &turns).unwrap_or_default();
                answer_start = mask::trained_tokens(&encoded.spans, &spans).iter().position(|trained| *trained);
                all_but_first(encoded.ids.len())
            }
            TrainOn::Assistant | TrainOn::Last if turns.is_empty() => {
                let roles: Vec<&str> = messages.iter().filter_map(|message| message["role"].as_str()).take(8).collect();
                let what = format!("no assistant message to train on; the roles are {}", roles.join(", "));
                return Err(Failure::ZeroLabel(RowProblem::new(what)));
            }
            TrainOn::Assistant | TrainOn::Last => {
                mask::trained_tokens(&encoded.spans, &conversation.trained_spans(&full, &assistant_turns, &turns)?)
            }
        };
        let answered = turns.first().copied().unwrap_or(messages.len());
        let asked = (0..answered).rev().find(|index| is(index, "user"));
        Ok(Masked {
            tokens: encoded.ids,
            trained,
            answer_start,
            prompt_text: asked.map(|index| row::content_text(&messages[index])).unwrap_or_default(),
            answer_text: messages.get(answered).map(row::content_text).unwrap_or_default(),
        })
    }

    /// As TRL: the whole is tokenized at once where the prompt's tokens are its beginning, and the two apart where not.
    fn prompt_completion(&self, prompt: String, completion: String) -> Result<Masked, Failure> {
        let prompt_ids = self.tokenizer()?.encode(&prompt, true)?;
        let mut tokens = self.tokenizer()?.encode(&format!("{prompt}{completion}"), true)?;
        if !tokens.starts_with(&prompt_ids) {
            tokens = prompt_ids.clone();
            tokens.extend(self.tokenizer()?.encode(&completion, false)?);
        }
        self.end(&mut tokens);
        let answer_start = prompt_ids.len().max(1);
        let first = if self.data.train_on == TrainOn::All { 1 } else { answer_start };
        let trained = (0..tokens.len()).map(|index| index >= first).collect();
        let answer_start = Some(answer_start);
        Ok(Masked { tokens, trained, answer_start, prompt_text: prompt, answer_text: completion })
    }

    fn text(&self, text: String) -> Result<Masked, Failure> {
        let mut tokens = self.tokenizer()?.encode(&text, true)?;
        self.end(&mut tokens);
        let trained = all_but_first(tokens.len());
        Ok(Masked { trained, tokens, answer_start: None, prompt_text: String::new(), answer_text: text })
    }

    fn tokens(&self, ids: Vec<u32>, mut trained: Vec<bool>) -> Result<Masked, Failure> {
        self.check_ids(&ids)?;
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        let start = trained.iter().position(|trained| *trained).unwrap_or(ids.len());
        let answer = trained[start..].iter().take_while(|trained| **trained).count();
        let text = |ids: &[u32], skip_special_tokens| match &self.tokenizer {
            Some(tokenizer) => tokenizer.decode(ids, skip_special_tokens),
            None => Ok(String::new()),
        };
        let prompt_text = text(&ids[..start], false)?;
        // As a generated answer is shown: without the token that ends it.
        let answer_text = text(&ids[start..start + answer], true)?;
        Ok(Masked { tokens: ids, trained, answer_start: None, prompt_text, answer_text })
    }

    /// Appends the end of sequence, unless the text brought its own.
    fn end(&self, tokens: &mut Vec<u32>) {
        if let Some(end) = self.tokenizer.as_ref().and_then(ChatTokenizer::end)
            && tokens.last() != Some(&end)
        {
            tokens.push(end);
        }
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), RowProblem> {
        match ids.iter().position(|id| *id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(place) => {
                let id = ids[place];
                let name = self
                    .tokenizer
                    .as_ref()
                    .and_then(|tokenizer| tokenizer.id_to_token(id))
                    .map(|text| format!(" ({text:?})"))
                    .unwrap_or_default();
                let what = format!("token {place} is {id}{name}, not below the vocabulary of {}", self.vocab_size);
                Err(RowProblem::new(what).expected("tokens that the model's embedding has"))
            }
        }
    }

    fn fit(&self, mut masked: Masked) -> Result<End, Failure> {
        self.check_ids(&masked.tokens)?;
        let (length, limit) = (masked.tokens.len(), self.data.max_seq_len);
        let first_trained = masked.trained.iter().position(|trained| *trained);
        let Some(first_trained) = first_trained else {
            let what = format!("nothing to train on: none of its {length} tokens is an answer's");
            return Err(Failure::ZeroLabel(RowProblem::new(what)));
        };
        let truncated = length > limit;
        if truncated {
            match self.data.overlong {
                Overlong::Error => {
                    let what = format!("the row has {length} tokens, more than data.max_seq_len = {limit}");
                    return Err(Failure::Row(RowProblem::new(what)));
                }
                Overlong::Drop => return Ok(End::Dropped),
                Overlong::Truncate if first_trained >= limit => {
                    let what = format!(
                        "nothing to train on once cut to data.max_seq_len = {limit}: of its {length} tokens the first \
                         trained one is number {}",
                        first_trained + 1
                    );
                    return Err(Failure::ZeroLabel(RowProblem::new(what)));
                }
                Overlong::Truncate => {
                    masked.tokens.truncate(limit);
                    masked.trained.truncate(limit);
                }
            }
        }
        let Masked { tokens, trained, answer_start, prompt_text, answer_text } = masked;
        let prompt_tokens = answer_start.unwrap_or(first_trained).min(tokens.len());
        let origin = Origin { file: 0, line: 0 };
        Ok(End::Kept { row: Row { tokens, trained, origin, prompt_tokens, prompt_text, answer_text }, truncated })
    }
}

fn all_but_first(tokens: usize) -> Vec<bool> {
    (0..tokens).map(|index| index > 0).collect()
}

/// Many templates write nothing for content that is a list (Qwen3's, for one): then the answer would be missing from the
/// text, and the row would train on an empty one.
fn check_parts_rendered(messages: &[serde_json::Value], text: &str) -> Result<(), RowProblem> {
    for (index, message) in messages.iter().enumerate() {
        for part in message["content"].as_array().into_iter().flatten() {
            if !text.contains(part["text"].as_str().unwrap_or_default().trim()) {
                let what = format!("messages[{index}].content is a list, and the chat template leaves its text out");
                return Err(RowProblem::new(what).expected("a string"));
            }
        }
    }
    Ok(())
}
