//! What `generate` and `chat` have in common: settings that are refused, the text of an answer as
//! its tokens come, and templates that give no text.

use std::io;
use std::path::Path;

use finetune_dataset::{Asked, ChatTokenizer, DatasetError, Stops, TextStream};
use finetune_model::Sampling;

use crate::failure::Failure;
use crate::source::Source;

/// Refuses settings with which no answer can be made.
pub(super) fn check_sampling(sampling: Sampling, stop: &[String]) -> Result<Sampling, Failure> {
    if !(sampling.temperature >= 0.0 && sampling.temperature.is_finite()) {
        return Err(Failure::arguments("--temperature must be 0 or more", "0 takes the most likely token each time"));
    }
    if !(sampling.top_p > 0.0 && sampling.top_p <= 1.0) {
        return Err(Failure::arguments("--top-p must be above 0 and at most 1", "1 draws from all tokens"));
    }
    if stop.iter().any(String::is_empty) {
        return Err(Failure::arguments("--stop is empty", "give at least one character"));
    }
    Ok(sampling)
}

/// The tokenizer of a source, which must have one.
pub(super) fn tokenizer(source: &Source) -> Result<ChatTokenizer, Failure> {
    source.tokenizer()?.ok_or_else(|| {
        Failure::arguments(
            format!("{} has no tokenizer.json, without which there is no text", source.model.display()),
            "copy the tokenizer files of the model there, or name another model directory",
        )
    })
}

/// The error for a model without a chat template. `raw`: what does without one.
pub(super) fn no_template(model: &Path, raw: &str) -> Failure {
    Failure::bad_input(
        format!("{} has no chat template, which says how a conversation is written", model.display()),
        vec![
            format!("a base model continues a text: {raw}"),
            "--chat-template FILE names a template, such as that of the model's chat version".to_owned(),
        ],
    )
}

const OTHER_TEMPLATE: &str = "--chat-template FILE uses another template";

/// An error of a template. Its own hints are for recipes.
pub(super) fn of_template(error: DatasetError) -> Failure {
    match error {
        DatasetError::Template(_) | DatasetError::TemplateSyntax { .. } | DatasetError::Conversation(_) => {
            Failure::arguments(error.to_string(), OTHER_TEMPLATE)
        }
        error => error.into(),
    }
}

/// As [`of_template`], with the option and the file that the conversation is from.
pub(super) fn of_conversation(error: DatasetError, option: &str, file: &Path) -> Failure {
    match error {
        DatasetError::Conversation(_) => {
            Failure::arguments(format!("{option} {}: {error}", file.display()), OTHER_TEMPLATE)
        }
        error => of_template(error),
    }
}

/// What stands in the file of a conversation in vain.
pub(super) fn without_use(asked: &Asked, file: &Path) -> Option<String> {
    let keys = asked.unused.join(", ");
    (!keys.is_empty()).then(|| format!("{}: keys that a conversation has no use for: {keys}", file.display()))
}

/// Text as tokens come: through the tokenizer's own decoder, up to a stop text.
pub(super) struct Writing<'a> {
    /// `None` once it has ended.
    stream: Option<TextStream<'a>>,
    stops: Stops<'a>,
    text: String,
    show: &'a mut dyn FnMut(&str) -> io::Result<()>,
    error: Option<Failure>,
}

impl<'a> Writing<'a> {
    /// `show` gets each piece of text, which is never empty. None of the stop texts is empty.
    pub(super) fn new(
        tokenizer: &'a ChatTokenizer,
        stop: &'a [String],
        show: &'a mut dyn FnMut(&str) -> io::Result<()>,
    ) -> Writing<'a> {
        let stream = Some(tokenizer.stream());
        Writing { stream, stops: Stops::new(stop), text: String::new(), show, error: None }
    }

    /// Whether to go on.
    pub(super) fn push(&mut self, token: u32) -> bool {
        let Some(stream) = &mut self.stream else { return false };
        match stream.push(token) {
            Ok(new) => {
                let shown = self.stops.push(&new);
                self.show(&shown);
            }
            Err(error) => self.error = Some(error.into()),
        }
        self.error.is_none() && !self.stops.is_hit()
    }

    fn show(&mut self, new: &str) {
        self.text += new;
        if !new.is_empty() {
            // A reader that has gone away is no error; any other is reported at the end.
            if let Err(error) = (self.show)(new) {
                self.error.get_or_insert(error.into());
            }
        }
    }

    /// Shows what was held back. Returns the text, and whether a stop text ended it.
    pub(super) fn finish(mut self) -> Result<(String, bool), Failure> {
        if !self.stops.is_hit()
            && self.error.is_none()
            && let Some(stream) = self.stream.take()
        {
            let last = stream.finish()?;
            let shown = self.stops.push(&last);
            self.show(&shown);
            let held = self.stops.finish();
            self.show(&held);
        }
        match self.error.take() {
            Some(error) => Err(error),
            None => Ok((self.text, self.stops.is_hit())),
        }
    }
}
