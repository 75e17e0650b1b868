//! How a row can differ from what its format asks for: the texts, and what should have been there.

use serde_json::Value;

use crate::json::kind;

/// How a row differs from its format. A path names a value within the row, such as
/// `messages[2].content`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatProblem {
    /// A key that is needed is missing: its path.
    #[error("the key {0} is missing")]
    Missing(String),
    /// A list or a text that must not be empty: its path.
    #[error("{0} is empty")]
    Empty(String),
    /// A value has another type, or is out of range.
    #[error("{path} is {found}")]
    Wrong {
        /// Where the value stands.
        path: String,
        /// Its type with the article, or the number itself.
        found: String,
        /// What should have been there.
        wanted: &'static str,
    },
    /// A string that should hold JSON does not.
    #[error("{path} is a string that is not JSON: {reason}")]
    NotJson {
        /// Where the string stands.
        path: String,
        /// What the JSON reader says.
        reason: String,
    },
    /// `chat_template_kwargs` sets a variable that the template gets from elsewhere: its name.
    #[error("chat_template_kwargs has the key {0}, which is not a template's own")]
    ReservedVariable(String),
    /// The row has documents under two keys, and not the same.
    #[error("documents and chat_template_kwargs.documents are not the same")]
    TwoDocuments,
    /// The row holds images, video or audio: the key.
    #[error("the row has {0}: only text can be trained on")]
    NotText(&'static str),
    /// The row has tools, and OpenAI's former `functions` beside them.
    #[error("functions is the old form of tools, and the row has both")]
    OldTools,
    /// The row has a `system` text and a system message of another text: the key of the messages.
    #[error("system and {0}[0] are two system messages")]
    TwoSystemMessages(&'static str),
    /// One of `prompt` and `completion` is a string and the other a list.
    #[error("of prompt and completion one is a string and one a list")]
    StringAndList,
    /// `system` or `tools` beside a prompt and completion that are strings: the key.
    #[error("{0} stands beside plain strings, which no chat template sees")]
    BesidePlainStrings(&'static str),
    /// The text of a turn that calls a function is no call: its path.
    #[error("{0} is no call of a function")]
    NoCall(String),
    /// A cell of a table holds a list as Python prints it: its column.
    #[error("{0} is a list as Python writes it, which is no JSON")]
    Python(String),
    /// A ShareGPT turn is from nobody that is known.
    #[error("{path}.from is {role:?}")]
    SharegptRole {
        /// Where the turn stands.
        path: String,
        /// Its first 40 characters.
        role: String,
    },
    /// A message has OpenAI's former `function_call` beside `tool_calls`, or it is no call: the path
    /// of the message.
    #[error("{0}.function_call is no object with a name, or stands beside tool_calls")]
    OldCall(String),
    /// A part of a message's content is no text.
    #[error("{path} has the type {kind:?}: only text can be trained on")]
    OtherPart {
        /// Where the part stands.
        path: String,
        /// The first 40 characters of its type.
        kind: String,
    },
    /// A part of a message's content has no type: its path.
    #[error("{0} has no type")]
    PartWithoutType(String),
    /// A flag asks for training with a weight between 0 and 1, or beyond.
    #[error("{path} is {number}: a message is trained on or not")]
    PartialWeight {
        /// Where the flag stands.
        path: String,
        /// The weight, as the row writes it.
        number: String,
    },
    /// A message has a `mask`. Some dumps train on what is marked so, others do not.
    #[error("{path}.mask is {found}, which has no one meaning")]
    Mask {
        /// Where the message stands.
        path: String,
        /// The type of the mask with its article.
        found: &'static str,
    },
    /// Ranges of characters are given for a content that is no string.
    #[error("{path} counts the characters of a string, and {content} is none")]
    UncountedCharacters {
        /// Where the ranges stand.
        path: String,
        /// The key of the content.
        content: &'static str,
    },
    /// An entry of `train_detail` is no range: its path.
    #[error("{0} is no range of characters")]
    NoRange(String),
    /// A mask does not have one number for each token.
    #[error("{tokens} input_ids but {numbers} of {key}")]
    MaskLength {
        /// Tokens of the row.
        tokens: usize,
        /// Numbers of the mask.
        numbers: usize,
        /// The key of the mask.
        key: &'static str,
    },
    /// There is not one label for each token.
    #[error("{tokens} input_ids but {labels} labels")]
    LabelCount {
        /// Tokens of the row.
        tokens: usize,
        /// Labels of the row.
        labels: usize,
    },
    /// There is not one position for each token.
    #[error("{tokens} input_ids but {positions} position_ids")]
    PositionCount {
        /// Tokens of the row, without padding.
        tokens: usize,
        /// Positions of the row.
        positions: usize,
    },
    /// The row is nothing but padding.
    #[error("attention_mask marks every token as padding")]
    AllPadding,
    /// Padding lies between tokens: the index of the first such token.
    #[error("attention_mask[{0}] is 0 between tokens that are attended to")]
    InnerPadding(usize),
    /// A label is neither its token nor -100.
    #[error("labels[{index}] is {label} where input_ids[{index}] is {id}: labels of one's own are not supported")]
    OwnLabel {
        /// Index of the token and of its label.
        index: usize,
        /// The label, or its type.
        label: String,
        /// The token.
        id: u32,
    },
    /// The lengths of the packed sequences are not those of the row.
    #[error("seq_lengths add up to {sum}, and there are {tokens} input_ids")]
    SequenceLengths {
        /// The sum of `seq_lengths`.
        sum: usize,
        /// Tokens of the row, without padding.
        tokens: usize,
    },
    /// Two keys disagree on where packed sequences begin.
    #[error("position_ids and seq_lengths cut the row at different places")]
    DifferentCuts,
}

impl FormatProblem {
    /// A value of another type than is wanted.
    pub(crate) fn wrong(path: &str, value: &Value, wanted: &'static str) -> Self {
        Self::Wrong { path: path.to_owned(), found: kind(value).to_owned(), wanted }
    }

    /// What should have been there. `None`: what the format asks of each row says it.
    pub fn expected(&self) -> Option<String> {
        let text = match self {
            Self::Missing(_)
            | Self::Empty(_)
            | Self::NotJson { .. }
            | Self::OtherPart { .. }
            | Self::UncountedCharacters { .. }
            | Self::AllPadding
            | Self::DifferentCuts => return None,
            Self::NotText(key) => return Some(format!("rows without {key}")),
            Self::BesidePlainStrings(key) => {
                return Some(format!("its text in the prompt, or {key} beside messages"));
            }
            Self::MaskLength { key, .. } => return Some(format!("one number of {key} for each token")),
            Self::Wrong { wanted, .. } => *wanted,
            Self::ReservedVariable(_) => "variables of the chat template, as enable_thinking",
            Self::OldTools => "\"tools\": [{\"type\": \"function\", \"function\": {...}}]",
            Self::TwoSystemMessages(_) | Self::TwoDocuments => "one of them",
            Self::StringAndList => "two strings, or two lists of messages",
            Self::NoCall(_) => "{\"name\", \"arguments\"} as JSON text, or a list of them",
            Self::Python(_) => "JSON, as json.dumps writes it, in the cell",
            Self::SharegptRole { .. } => "human, user, gpt, assistant, system, tool or observation",
            Self::OldCall(_) => "\"tool_calls\": [{\"type\": \"function\", \"function\": {\"name\", \"arguments\"}}]",
            Self::PartWithoutType(_) => PART,
            Self::PartialWeight { .. } => FLAG,
            Self::Mask { .. } => "\"weight\": 0 on a message that is not to be trained on",
            Self::NoRange(_) => RANGES,
            Self::LabelCount { .. } => "one label for each token, unshifted",
            Self::PositionCount { .. } => "one position for each token",
            Self::InnerPadding(_) => "zeros for padding only, before or behind the row",
            Self::OwnLabel { .. } => "the token itself (unshifted), or -100 for no loss",
            Self::SequenceLengths { .. } => "the lengths of the sequences that were packed into the row",
        };
        Some(text.to_owned())
    }
}

/// What a part of a content should be.
pub(crate) const PART: &str = "{\"type\": \"text\", \"text\": \"...\"}";

/// What a flag of a message should be.
pub(crate) const FLAG: &str = "0 or 1 (or false or true)";

/// What `train_detail` should be.
pub(crate) const RANGES: &str = "a list of {\"begin_offset\", \"end_offset\", \"train\"}";
