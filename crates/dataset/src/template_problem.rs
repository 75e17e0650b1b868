//! Why a chat template gives no text for a conversation, or not the part that is looked for.

/// Why a template gives no text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateProblem {
    /// The model has several templates and none is the default: their names.
    #[error("of the model's chat templates ({0}) none is the default")]
    NoDefault(String),
    /// The template ended with an error, its own (`raise_exception`) or the engine's.
    #[error("the chat template ({origin}, line {line}) stopped: {reason}")]
    Stopped {
        /// The file of the template.
        origin: String,
        /// The line of the template, from 1.
        line: usize,
        /// What the template or the engine says.
        reason: String,
    },
    /// What the template wrote is no UTF-8.
    #[error("the chat template wrote half a character")]
    HalfCharacter,
    /// A text holds one of the marks of `generation.rs`.
    #[error("the text holds U+FDD0 or U+FDD1, Unicode noncharacters that this program marks spans with")]
    Noncharacter,
}

/// What a template does not render of an assistant's turn. Each text goes on a sentence that ends
/// with "the chat template does not render".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unrendered {
    /// The turn does not follow its generation prompt.
    #[error("it behind its own generation prompt")]
    BehindPrompt,
    /// The generation prompt opens the reasoning, and the answer has none.
    #[error("it behind its own generation prompt: that ends with {tag}, and the answer has no reasoning")]
    BehindReasoningPrompt {
        /// What opens it.
        tag: &'static str,
        /// The variable that, if it is false, has the prompt ask for the answer alone.
        switch: Option<&'static str>,
    },
    /// The generation prompt closes the reasoning with this tag, and the answer has some.
    #[error("it behind its own generation prompt: that ends with {0}, and the answer has reasoning")]
    BehindClosedReasoning(&'static str),
    /// The reasoning of the answer stands behind an empty block of reasoning.
    #[error("its reasoning alone: an empty block of reasoning comes first")]
    ReasoningTwice,
    /// The turn is written in another way once later messages follow.
    #[error("it the same once later messages follow")]
    SameLater,
    /// The messages before the turn, or up to it, give no text.
    #[error("{part}: {problem}")]
    Part {
        /// Which messages.
        part: &'static str,
        /// Why they give none.
        problem: TemplateProblem,
    },
}
