//! What can be wrong with one row: the texts, what should have been there, and what to do about it.

use finetune_advice::Advice;
use finetune_recipe::Format;

use crate::format_problem::FormatProblem;
use crate::messages::is_usual;
use crate::template_problem::{TemplateProblem, Unrendered};

/// Why a row cannot be used. A path names a value within the row, such as `messages[2].content`.
/// Turns are counted from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowProblem {
    /// The row is longer than is read: the limit in MiB.
    #[error("the row is longer than {0} MiB")]
    LongLine(usize),
    /// An item of the list that a JSON file is, is no object: its type with the article.
    #[error("the item is {0}")]
    NotAnObjectInList(&'static str),
    /// The list that a JSON file is, is not written right: what is wrong.
    #[error("{0}")]
    List(&'static str),
    /// A quote of a table is opened, and the file ends before it is closed.
    #[error("a quote is opened and not closed")]
    OpenQuote,
    /// The cells of a row cannot be told apart: what the reader of tables says.
    #[error("{0}")]
    Cells(String),
    /// A row of a table has more or fewer cells than its header.
    #[error("{found} cells, and the header has {wanted}")]
    CellCount {
        /// Cells of the row.
        found: usize,
        /// Cells of the header.
        wanted: usize,
    },
    /// `data.columns` names a column that the row has not.
    #[error("there is no column {column}, which data.columns names for {key}; {}", keys_of(keys, *more))]
    NoColumn {
        /// Our key.
        key: String,
        /// The name that the recipe has for it.
        column: String,
        /// The first keys of the row, cut to 40 characters each.
        keys: Vec<String>,
        /// Whether the row has more keys.
        more: bool,
    },
    /// The line begins with a byte order mark of UTF-16.
    #[error("the file is UTF-16")]
    Utf16,
    /// A byte of the line is no UTF-8: its index.
    #[error("invalid UTF-8 at byte {0} of the line")]
    NotUtf8(usize),
    /// The line holds a NUL character: the index of its byte.
    #[error("a NUL character at byte {0} of the line")]
    NulCharacter(usize),
    /// The line is JSON and no object: its type with the article.
    #[error("the line is {0}")]
    NotAnObject(&'static str),
    /// The line is no JSON.
    #[error("not JSON: {reason}")]
    NotJson {
        /// What the JSON reader says.
        reason: String,
        /// Lines below the first of the row.
        below: usize,
        /// From 1, in bytes.
        column: usize,
        /// What to put on a line, if the line shows what was put there instead.
        expected: Option<&'static str>,
    },
    /// A row for DPO and the like.
    #[error("a row of preferences (chosen, rejected), for DPO and the like, which this program does not do")]
    Preferences,
    /// An answer with a label, good or bad (KTO).
    #[error("an answer with a label, true or false, for KTO and the like, which this program does not do")]
    Labelled,
    /// No key of the row tells its format.
    #[error("no key that tells the format; {}", keys_of(keys, *more))]
    UnknownFormat {
        /// The first keys of the row, cut to 40 characters each.
        keys: Vec<String>,
        /// Whether the row has more keys.
        more: bool,
    },
    /// The row is not as its format asks.
    #[error("{problem}")]
    Format {
        /// The difference.
        problem: FormatProblem,
        /// What should have been there.
        expected: String,
    },
    /// The row has another format than the rows before it.
    #[error("this is a row of format {}, and the first row ({first}) is {}", found.as_str(), wanted.as_str())]
    OtherFormat {
        /// The format of this row.
        found: Format,
        /// The format of the first row, or of the recipe.
        wanted: Format,
        /// Where the first row stands, as `file:line`, or "the recipe".
        first: String,
    },
    /// A token has no row in the model's embedding.
    #[error("token {index} is {id}{}, not below the vocabulary of {vocab_size}", named(name.as_deref()))]
    UnknownToken {
        /// Index of the token in its sequence.
        index: usize,
        /// The token.
        id: u32,
        /// Its text in the vocabulary of the tokenizer.
        name: Option<String>,
        /// Rows of the model's embedding.
        vocab_size: usize,
    },
    /// No token of the row is a target: the number of its tokens.
    #[error("nothing to train on: none of its {0} tokens is an answer's")]
    NothingTrained(usize),
    /// No token of the row is a target once the row is cut.
    #[error(
        "nothing to train on once cut to data.max_seq_len = {limit}: of its {tokens} tokens the first trained one is \
         number {first}"
    )]
    NothingLeft {
        /// Tokens of the row.
        tokens: usize,
        /// Tokens that a row may have.
        limit: usize,
        /// The number of the first target, from 1.
        first: usize,
    },
    /// The row has more tokens than a row may have.
    #[error("the row has {tokens} tokens, more than data.max_seq_len = {limit}")]
    TooLong {
        /// Tokens of the row.
        tokens: usize,
        /// Tokens that a row may have.
        limit: usize,
    },
    /// No message is the assistant's: the first roles of the conversation.
    #[error("no assistant message to train on; the roles are {}", .0.join(", "))]
    NoAssistant(Vec<String>),
    /// The flags of the assistant's messages leave none to train on.
    #[error("no assistant message to train on: its flags (weight, train) leave none")]
    AllMuted,
    /// The conversation is empty.
    #[error("the row has no messages")]
    NoMessages,
    /// A flag asks for training on a message of another role: the path of the flag.
    #[error("{0} asks for training on a message that is not the assistant's")]
    AsksForTraining(String),
    /// A variable of the template has a name that cannot be rendered.
    #[error("the name of a template's variable holds a noncharacter")]
    VariableName,
    /// A message of another role is to be left out of training on everything: its path.
    #[error("{0} is not to be trained on, and is not the assistant's")]
    MutedContext(String),
    /// A message is to be left out of training, and its part of the text is not known: its path.
    #[error("{0} is not to be trained on, and its part cannot be told")]
    MutedPart(String),
    /// `train_detail` is given, and the answers and their parts of the text do not pair up.
    #[error("{answers} answers in {parts} parts: train_detail needs one for each")]
    AnswersInParts {
        /// Answers that are trained on.
        answers: usize,
        /// Parts of the text.
        parts: usize,
    },
    /// `train_detail` counts characters of a content that is not in the text as it is: the path of
    /// the message.
    #[error("{0}.train_detail counts characters that the chat template changes")]
    ChangedCharacters(String),
    /// The text of a message is not in the rendered conversation.
    #[error("{path}.content: the chat template leaves this {role} text out")]
    TextLeftOut {
        /// Where the message stands.
        path: String,
        /// Its role.
        role: String,
    },
    /// The text parts of a message are not in the rendered conversation: the path of the message.
    #[error("{0}.content is no string, and the chat template leaves its text out")]
    PartsLeftOut(String),
    /// The reasoning of a message is not in the rendered conversation: the path of the message.
    #[error("{0}: the chat template leaves the reasoning out")]
    ReasoningLeftOut(String),
    /// A call of a tool is not in the rendered conversation.
    #[error("{path}.tool_calls[{call}]: the chat template leaves the call out")]
    CallLeftOut {
        /// Where the message stands.
        path: String,
        /// Index of the call.
        call: usize,
    },
    /// The tools of the row are not in the rendered conversation.
    #[error("tools: the chat template leaves them out")]
    ToolsLeftOut,
    /// The template reads documents, and leaves one out: its index.
    #[error("documents[{0}]: the chat template leaves it out")]
    DocumentLeftOut(usize),
    /// The template prints the text parts of a message as Python or JSON: the path of the message.
    #[error("{0}.content is no string, and the chat template writes it as code")]
    WrittenAsCode(String),
    /// The template puts the arguments of a call, which are JSON text, into quotes.
    #[error("{path}.tool_calls[{call}]: the arguments are a string, and the chat template quotes it")]
    QuotedArguments {
        /// Where the message stands.
        path: String,
        /// Index of the call.
        call: usize,
    },
    /// The `{% generation %}` blocks and the assistant's turns do not pair up.
    #[error("the chat template wrote {blocks} generation blocks for {turns} assistant turns")]
    BlockCount {
        /// Blocks of the rendered conversation.
        blocks: usize,
        /// Turns of the assistant.
        turns: usize,
    },
    /// The conversation has more answers than can be rendered one by one: their number.
    #[error("its {0} answers cannot be told apart without rendering the conversation as often")]
    ManyAnswers(usize),
    /// The sequences of a conversation take too much memory.
    #[error(
        "the chat template writes earlier turns anew, and a sequence for each of its {answers} answers takes more \
         than {mebibytes} MiB of text"
    )]
    LongSequences {
        /// Answers that are trained on.
        answers: usize,
        /// The limit in MiB.
        mebibytes: usize,
    },
    /// The assistant speaks before anybody else: the turn.
    #[error("turn {0}: the conversation begins with the assistant, so there is nothing that it answers")]
    BeginsWithAssistant(usize),
    /// A turn of the assistant cannot be told from the rest of the rendered conversation.
    #[error("turn {turn} (assistant): the chat template does not render {what}")]
    NotRendered {
        /// The turn.
        turn: usize,
        /// What is missing.
        what: Unrendered,
    },
    /// The template gives no text for the conversation.
    #[error("{0}")]
    Template(TemplateProblem),
    /// The tokenizer fails on the text of the row: what it says.
    #[error("{0}")]
    Tokenizer(String),
}

impl RowProblem {
    /// The place in the line, from 1, in bytes, if it is known.
    pub fn column(&self) -> Option<usize> {
        match self {
            Self::Utf16 => Some(1),
            Self::NotUtf8(byte) | Self::NulCharacter(byte) => Some(byte + 1),
            Self::NotJson { column, .. } => Some(*column),
            _ => None,
        }
    }

    /// Lines below the first of the row that the problem lies.
    pub(crate) fn below(&self) -> usize {
        match self {
            Self::NotJson { below, .. } => *below,
            _ => 0,
        }
    }

    /// The key and type, or the setting, that should have been there.
    pub fn expected(&self) -> Option<String> {
        let text = match self {
            Self::Format { expected, .. } => expected.as_str(),
            Self::OtherFormat { wanted, .. } => return Some(format!("format {} in every row", wanted.as_str())),
            Self::NotRendered { what, .. } => return Some(rendered(what)),
            Self::NotJson { expected, .. } => (*expected)?,
            Self::Utf16 | Self::NotUtf8(_) => "UTF-8 text",
            Self::NotAnObject(_) => "one JSON object on each line",
            Self::NotAnObjectInList(_) => "a list of JSON objects",
            Self::OpenQuote => "a quote at the end of the cell, and two quotes for one within it",
            Self::CellCount { .. } => "one cell for each column, with quotes around cells that hold separators",
            Self::Labelled => {
                "rows of good answers without it; or data.format = \"prompt_completion\", which trains on all of them"
            }
            Self::Preferences => "rows with one answer, such as messages, or prompt and completion",
            Self::UnknownFormat { keys, more } => format_of(keys, *more),
            Self::UnknownToken { .. } => "tokens that the model's embedding has",
            Self::AsksForTraining(_) => {
                "data.train_on = \"all\", or rows in which only the assistant's messages are trained on"
            }
            Self::MutedContext(_) | Self::MutedPart(_) => "data.train_on = \"assistant\"",
            Self::ChangedCharacters(_) => "a template that writes the content as it is",
            Self::TextLeftOut { .. } => {
                "a template that renders it (data.chat_template), or its text in a message that is rendered"
            }
            Self::PartsLeftOut(_) | Self::WrittenAsCode(_) => "a string",
            Self::ReasoningLeftOut(_) => {
                "a template that renders reasoning (data.chat_template), the reasoning within the content, or none"
            }
            Self::CallLeftOut { .. } => "a template that renders calls (data.chat_template), or rows without them",
            Self::ToolsLeftOut => {
                "a template that renders tools (data.chat_template), tools in chat_template_kwargs under the name \
                 that it reads, or rows without them"
            }
            Self::DocumentLeftOut(_) => {
                "documents with the keys that the template reads, mostly title and text; or rows without them"
            }
            Self::QuotedArguments { .. } => "an object, or the text of one",
            Self::ManyAnswers(_) | Self::LongSequences { .. } => "shorter conversations, or data.train_on = \"last\"",
            Self::BeginsWithAssistant(_) => {
                "a message of the user first; or \"weight\": 0 on this message, which makes it context; or \
                 data.train_on = \"last\""
            }
            Self::LongLine(_)
            | Self::List(_)
            | Self::Cells(_)
            | Self::NoColumn { .. }
            | Self::NulCharacter(_)
            | Self::NothingTrained(_)
            | Self::NothingLeft { .. }
            | Self::TooLong { .. }
            | Self::NoAssistant(_)
            | Self::AllMuted
            | Self::NoMessages
            | Self::VariableName
            | Self::AnswersInParts { .. }
            | Self::BlockCount { .. }
            | Self::Template(_)
            | Self::Tokenizer(_) => return None,
        };
        Some(text.to_owned())
    }
}

/// What is expected of a row, or of its template, that does not write a turn as the model meets it.
fn rendered(what: &Unrendered) -> String {
    let text = match what {
        Unrendered::BehindReasoningPrompt { tag, switch } => return reasoning_behind(tag, *switch),
        Unrendered::BehindClosedReasoning(_) => {
            "data.chat_template_kwargs = { enable_thinking = true } (DeepSeek: thinking), or the same in \
             chat_template_kwargs of the row, if the template reads that; or an answer without reasoning"
        }
        Unrendered::ReasoningTwice => "the reasoning as reasoning_content, or another template (data.chat_template)",
        _ => "a template that adds each turn to what it wrote before, or marks it with {% generation %}",
    };
    text.to_owned()
}

/// What is expected of a row with these keys, and others if there are `more`.
fn format_of(keys: &[String], more: bool) -> &'static str {
    let has = |key: &str| keys.iter().any(|it| it == key);
    match keys {
        _ if has("role") && has("content") => {
            "all messages of a conversation in one row: {\"messages\": [{\"role\", \"content\"}, ...]}"
        }
        [key] if !more && ["data", "rows", "examples", "train"].contains(&key.as_str()) => {
            "the rows themselves, one on each line or in a list, without an object around them"
        }
        _ => "one of the keys messages, prompt, text, instruction, conversations, input_ids",
    }
}

/// What is expected behind a prompt that opens reasoning with this tag, if this variable keeps it from that.
fn reasoning_behind(tag: &str, switch: Option<&str>) -> String {
    let reasoning = format!("reasoning in front of the answer, in its content behind {tag} or as reasoning_content");
    match switch {
        Some(name) => format!(
            "{reasoning}; or data.chat_template_kwargs = {{ {name} = false }}, with which this template asks for the \
             answer alone"
        ),
        None => format!("{reasoning}; or another template (data.chat_template)"),
    }
}

impl Advice for RowProblem {
    fn hints(&self) -> Vec<String> {
        self.remedy().map(|remedy| remedy.text().to_owned()).into_iter().collect()
    }
}

impl RowProblem {
    pub(crate) fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::TooLong { .. } | Self::NothingLeft { .. } => Some(Remedy::Length),
            Self::NotRendered { what: Unrendered::BehindReasoningPrompt { switch: Some(name), .. }, .. } => {
                Some(if *name == "thinking" { Remedy::Thinking } else { Remedy::EnableThinking })
            }
            Self::NotRendered { .. } => Some(Remedy::Template),
            Self::OtherFormat { .. } => Some(Remedy::OneFormat),
            Self::UnknownFormat { .. } => Some(Remedy::Columns),
            Self::NoAssistant(roles) if !roles.iter().all(|role| is_usual(role)) => Some(Remedy::Turns),
            Self::Format { problem: FormatProblem::Missing(path), .. } if path.ends_with("].role") => {
                Some(Remedy::Turns)
            }
            Self::Format { problem: FormatProblem::Missing(key), .. } if !key.contains('[') => Some(Remedy::Columns),
            Self::NotUtf8(_) => Some(Remedy::Encoding),
            Self::UnknownToken { .. } => Some(Remedy::Vocabulary),
            _ => None,
        }
    }

    /// Whether another form of the same messages may do. That is so if the template may only
    /// dislike how they are written: arguments as JSON text, content as a list of parts.
    pub(crate) fn may_be_of_form(&self) -> bool {
        match self {
            Self::WrittenAsCode(_) | Self::QuotedArguments { .. } => true,
            Self::Template(problem) | Self::NotRendered { what: Unrendered::Part { problem, .. }, .. } => {
                matches!(problem, TemplateProblem::Stopped { .. })
            }
            _ => false,
        }
    }
}

/// What to do about bad rows, in the order in which it is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Remedy {
    Length,
    EnableThinking,
    Thinking,
    Template,
    OneFormat,
    Vocabulary,
    Columns,
    Turns,
    Encoding,
}

impl Remedy {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Length => "raise data.max_seq_len, or set data.overlong to \"truncate\" or \"drop\"",
            Self::EnableThinking => {
                "if the rows are meant without reasoning, write data.chat_template_kwargs = { enable_thinking = false }"
            }
            Self::Thinking => {
                "if the rows are meant without reasoning, write data.chat_template_kwargs = { thinking = false }"
            }
            Self::Template => "name a template with {% generation %} blocks in data.chat_template",
            Self::OneFormat => "one dataset has one format: convert the rows, or name the format with data.format",
            Self::Columns => {
                "if other names mean the same, say so: data.columns = { prompt = \"question\", completion = \"answer\" }"
            }
            Self::Turns => {
                "if turns say it in other words: data.columns = { role = \"from\", content = \"value\", user_tag = \
                 \"Customer\", assistant_tag = \"Agent\" }"
            }
            Self::Encoding => "if the text is in an older encoding: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
            Self::Vocabulary => {
                "the tokenizer has tokens that the model's embedding lacks: use the tokenizer of this model"
            }
        }
    }
}

fn keys_of(keys: &[String], more: bool) -> String {
    match keys {
        [] => "the object is empty".to_owned(),
        _ => format!("its keys are {}{}", keys.join(", "), if more { ", …" } else { "" }),
    }
}

fn named(name: Option<&str>) -> String {
    name.map(|text| format!(" ({text:?})")).unwrap_or_default()
}

#[cfg(test)]
mod tests;
