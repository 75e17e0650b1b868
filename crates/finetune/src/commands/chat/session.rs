//! A model in a conversation: what it is asked, what it answers, and what it still knows of both.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use finetune_dataset::{ChatTokenizer, opened_by};
use finetune_model::{GenerationStep, KeyValueCache, Model, Sampling};
use finetune_trainer::numbers::{counted, seconds, thousands};
use serde_json::{Value, json};

use super::dialogue::Dialogue;
use super::interrupts::{Doing, Interrupts};
use super::screen::{Screen, Shown};
use crate::commands::answering::{Writing, of_template};
use crate::failure::Failure;

/// How answers are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Settings {
    pub(super) temperature: f64,
    pub(super) top_p: f64,
    pub(super) max_new_tokens: usize,
    /// Of the next answer. Each answer has its own, so that no two draw the same numbers.
    pub(super) seed: u64,
}

pub(super) struct Session<'a> {
    pub(super) model: &'a Model,
    pub(super) tokenizer: &'a ChatTokenizer,
    /// Tokens that end an answer.
    pub(super) ends: Vec<u32>,
    /// Texts that end an answer.
    pub(super) stop: &'a [String],
    pub(super) settings: Settings,
    pub(super) dialogue: Dialogue,
    pub(super) cache: KeyValueCache,
    pub(super) interrupts: Arc<Interrupts>,
    pub(super) screen: Screen,
    pub(super) last: Option<Measured>,
}

/// A conversation as the model reads it, ready to be answered.
pub(super) struct Prompt {
    tokens: Vec<u32>,
    /// What the template has put in front of the answer, if it opens reasoning.
    opened: Option<String>,
    /// Questions that had to be left out.
    pub(super) dropped: u64,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Stop,
    /// So many tokens were allowed.
    Length,
    /// The model was made for no more tokens.
    Context,
    Interrupted,
}

/// What an answer took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Measured {
    prompt: usize,
    /// Tokens of the prompt that were kept from before.
    kept: usize,
    new: usize,
    /// Until the first token was there, and from then on.
    first: Duration,
    rest: Duration,
}

pub(super) struct Answer {
    text: String,
    tokens: Vec<u32>,
    pub(super) ending: Ending,
    measured: Measured,
}

impl Session<'_> {
    /// Tokens that the model was made for.
    pub(super) fn context(&self) -> usize {
        self.model.config.max_position_embeddings
    }

    /// The conversation through the template: what to answer. If it is too long, its oldest
    /// questions are left out.
    ///
    /// # Errors
    /// If the template does not take it, or if the last question alone is too long. The
    /// conversation is then as it was.
    pub(super) fn prompt(&mut self) -> Result<Prompt, Failure> {
        let before = self.dialogue.clone();
        let prompt = self.fitting_prompt();
        if prompt.is_err() {
            self.dialogue = before;
        }
        prompt
    }

    fn fitting_prompt(&mut self) -> Result<Prompt, Failure> {
        let limit = self.context();
        let mut dropped = 0;
        loop {
            let prompt = self.render(dropped)?;
            let length = prompt.tokens.len();
            // Once something has to go, more room is made than is needed: the next question should
            // not have to be read from its beginning again.
            let room = self.settings.max_new_tokens.min(limit / if dropped == 0 { 8 } else { 4 }).max(1);
            if length.saturating_add(room) <= limit {
                return Ok(prompt);
            }
            if !self.dialogue.drop_oldest() {
                return if length < limit { Ok(prompt) } else { Err(too_long(length, limit)) };
            }
            dropped += 1;
        }
    }

    fn render(&self, dropped: u64) -> Result<Prompt, Failure> {
        let dialogue = &self.dialogue;
        let rendered = self.tokenizer.render_with(&dialogue.messages(), dialogue.tools(), dialogue.variables(), true);
        let text = rendered.map_err(of_template)?.text;
        let tokens = self.tokenizer.encode_chat(&text)?;
        if tokens.is_empty() {
            return Err(Failure::arguments(
                "the chat template makes no text of this conversation",
                "--chat-template FILE uses another template",
            ));
        }
        Ok(Prompt { tokens, opened: opened_by(&text).map(str::to_owned), dropped })
    }

    /// Answers a prompt, shows the answer as it comes, and adds it to the conversation. A question
    /// whose answer was stopped before its first letter is taken back.
    ///
    /// # Errors
    /// If the model fails, or the answer cannot be written.
    pub(super) fn answer(&mut self, prompt: &Prompt) -> Result<Answer, Failure> {
        let interrupts = Arc::clone(&self.interrupts);
        let answer = interrupts.during(Doing::Answering, || self.generate(prompt))?;
        self.settings.seed = self.settings.seed.wrapping_add(1);
        if answer.ending == Ending::Interrupted && answer.text.is_empty() {
            self.dialogue.take_back();
        } else {
            // A prompt that was stopped on the way has no figures that hold.
            self.last = Some(answer.measured);
            let content = prompt.opened.clone().unwrap_or_default() + &answer.text;
            self.dialogue.answer(content, answer.ending != Ending::Stop);
        }
        Ok(answer)
    }

    fn generate(&mut self, prompt: &Prompt) -> Result<Answer, Failure> {
        let Settings { temperature, top_p, max_new_tokens, seed } = self.settings;
        let room = self.context().saturating_sub(prompt.tokens.len()).max(1);
        let length = prompt.tokens.len();
        let shown = RefCell::new(Shown::new(self.screen, prompt.opened.as_deref()));
        let mut show = |text: &str| shown.borrow_mut().text(text);
        let mut writing = Writing::new(self.tokenizer, self.stop, &mut show);
        let (begun, mut read) = (Instant::now(), Duration::ZERO);
        let generation = self.model.generate_cached(
            &prompt.tokens,
            max_new_tokens.min(room),
            Sampling { temperature, top_p, seed },
            &self.ends,
            &mut self.cache,
            &mut |step| {
                let goes_on = match step {
                    GenerationStep::Prompt(done) => {
                        read = begun.elapsed();
                        shown.borrow_mut().reading(done, length);
                        true
                    }
                    GenerationStep::Token(token) => writing.push(token),
                };
                goes_on && !self.interrupts.is_stopping()
            },
        )?;
        let rest = begun.elapsed().saturating_sub(read);
        let (text, at_stop) = writing.finish()?;
        shown.into_inner().end()?;
        let new = generation.tokens.len();
        let ending = match () {
            () if at_stop || generation.stopped_by.is_some() => Ending::Stop,
            () if self.interrupts.is_stopping() => Ending::Interrupted,
            () if room < max_new_tokens => Ending::Context,
            () => Ending::Length,
        };
        // An answer that was stopped before its first token has not read the whole prompt.
        let read_of_prompt = if new == 0 { self.cache.tokens().len() } else { length };
        let kept = read_of_prompt.saturating_sub(generation.prompt_computed);
        let measured = Measured { prompt: length, kept, new, first: read, rest };
        Ok(Answer { text, tokens: generation.tokens, ending, measured })
    }

    /// Speed, and how much of the context is used.
    pub(super) fn stats(&self) -> String {
        let context = thousands(self.context() as u64);
        let Some(last) = &self.last else {
            return format!("nothing was answered yet; the context has {context} tokens");
        };
        let used = thousands((last.prompt + last.new) as u64);
        format!(
            "{}\ncontext: {used} of {context} tokens, {}",
            last.line(),
            counted(self.dialogue.exchanges() as u64, "exchange")
        )
    }
}

fn too_long(length: usize, limit: usize) -> Failure {
    Failure::arguments(
        format!(
            "this takes {} tokens with what stands before it, and the model was made for {}",
            thousands(length as u64),
            thousands(limit as u64)
        ),
        "ask something shorter, or take a shorter system prompt",
    )
}

impl Measured {
    /// New tokens a second, without the first: that one waits for the prompt. `None` if there are
    /// no others.
    fn tokens_per_second(&self) -> Option<f64> {
        let others = self.new.checked_sub(1).filter(|others| *others > 0)?;
        Some(others as f64 / self.rest.as_secs_f64()).filter(|speed| speed.is_finite())
    }

    pub(super) fn line(&self) -> String {
        let speed = self.tokens_per_second().map_or(String::new(), |speed| format!(", {speed:.1} tokens/s"));
        format!(
            "{}{speed}; the first after {}: {} read, {} known from before",
            counted(self.new as u64, "token"),
            seconds(self.first.as_secs_f64()),
            thousands((self.prompt - self.kept) as u64),
            thousands(self.kept as u64)
        )
    }
}

impl Answer {
    /// The answer for programs.
    pub(super) fn object(&self) -> Value {
        let Measured { prompt, kept, first, .. } = self.measured;
        json!({
            "text": self.text,
            "token_ids": self.tokens,
            "tokens_per_second": self.measured.tokens_per_second(),
            "seconds_to_first_token": first.as_secs_f64(),
            "prompt_tokens": prompt,
            "cached_tokens": kept,
            "finish_reason": match self.ending {
                Ending::Stop => "stop",
                Ending::Length | Ending::Context => "length",
                Ending::Interrupted => "interrupted",
            },
        })
    }

    /// What a person should know about how it ended.
    pub(super) fn remark(&self, settings: Settings, context: usize) -> Option<String> {
        let nothing = self.text.trim().is_empty();
        Some(match self.ending {
            Ending::Interrupted if self.text.is_empty() => "stopped; the question is taken back".to_owned(),
            Ending::Interrupted => "stopped; /retry answers again, /undo takes the question back".to_owned(),
            Ending::Length => {
                let limit = settings.max_new_tokens;
                let more = limit.saturating_mul(2);
                format!("stopped after {}: /set max_new_tokens {more} allows more", counted(limit as u64, "token"))
            }
            Ending::Context => format!("stopped: the context of {} tokens is full", thousands(context as u64)),
            Ending::Stop if nothing => "the model ended its answer at once".to_owned(),
            Ending::Stop => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speed_leaves_the_first_token_out() {
        let measured = |new| Measured {
            prompt: 1200,
            kept: 1100,
            new,
            first: Duration::from_millis(400),
            rest: Duration::from_secs(2),
        };
        assert_eq!(
            measured(21).line(),
            "21 tokens, 10.0 tokens/s; the first after 0.40 s: 100 read, 1,100 known from before"
        );
        assert_eq!(measured(1).line(), "1 token; the first after 0.40 s: 100 read, 1,100 known from before");
        assert_eq!(measured(0).tokens_per_second(), None);
    }
}
