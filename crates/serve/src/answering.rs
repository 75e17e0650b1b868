//! Tokens to text, on the thread that computes: through the tokenizer's decoder, up to a stop text.

use std::sync::Arc;
use std::time::Instant;

use finetune_dataset::{ChatTokenizer, Stops, TextStream};
use finetune_model::{ChosenToken, EngineEnd, EngineEvent, Listener, Logprobs};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::metrics::Metrics;

/// A piece of an answer.
#[derive(Debug, PartialEq)]
pub(crate) enum Piece {
    /// Its turn has come. So many tokens of the prompt were known from before, if they are counted with this answer.
    Begun { cached: usize },
    /// A token, with the text that it completes, which is often none.
    Token { token: u32, text: String, logprobs: Option<Logprobs> },
    /// The text that was held back.
    Rest(String),
    /// Nothing more comes.
    Ended(Finish),
}

/// Where the pieces of one answer go: all answers to a request share a channel.
pub(crate) struct Pieces {
    pub(crate) sender: UnboundedSender<(usize, Piece)>,
    /// Which of the answers it is.
    pub(crate) choice: usize,
    /// Whether it is the first one to its prompt, which is counted once.
    pub(crate) is_first: bool,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Finish {
    Stop,
    Length,
    /// The model failed, for this reason.
    Failed(String),
}

/// Turns the tokens of one answer into pieces.
pub(crate) struct Answering {
    tokenizer: ChatTokenizer,
    stream: Option<TextStream<'static>>,
    stops: Stops<'static>,
    /// Special tokens whose text belongs to the answer.
    marks: Vec<&'static str>,
    pieces: Pieces,
    metrics: Arc<Metrics>,
    /// When it was asked for. `None` once the first token is there.
    asked: Option<Instant>,
    _place: OwnedSemaphorePermit,
}

impl Answering {
    pub(crate) fn new(
        tokenizer: &ChatTokenizer,
        stops: Vec<String>,
        marks: Vec<&'static str>,
        pieces: Pieces,
        metrics: Arc<Metrics>,
        place: OwnedSemaphorePermit,
    ) -> Answering {
        Answering {
            tokenizer: tokenizer.clone(),
            stream: Some(tokenizer.clone().into_stream()),
            stops: Stops::new(stops),
            marks,
            pieces,
            metrics,
            asked: Some(Instant::now()),
            _place: place,
        }
    }

    fn send(&self, piece: Piece) -> bool {
        self.pieces.sender.send((self.pieces.choice, piece)).is_ok()
    }

    fn token(&mut self, ChosenToken { token, logprobs }: ChosenToken) -> bool {
        if let Some(asked) = self.asked.take() {
            self.metrics.first_token(asked.elapsed());
        }
        self.metrics.token();
        let Some(stream) = &mut self.stream else { return false };
        let mut new = match stream.push(token) {
            Ok(new) => new,
            Err(error) => {
                self.send(Piece::Ended(Finish::Failed(error.to_string())));
                return false;
            }
        };
        if !self.marks.is_empty() && self.tokenizer.is_special(token) {
            let name = self.tokenizer.id_to_token(token).unwrap_or_default();
            new += self.marks.iter().find(|mark| **mark == name).copied().unwrap_or_default();
        }
        let text = self.stops.push(&new);
        let is_wanted = self.send(Piece::Token { token, text, logprobs });
        if self.stops.is_hit() {
            self.send(Piece::Ended(Finish::Stop));
            return false;
        }
        is_wanted
    }

    fn end(&mut self, finish: Finish) {
        let rest = self.stream.take().map(TextStream::finish).transpose();
        let (text, finish) = match rest {
            Ok(rest) => {
                let text = self.stops.push(&rest.unwrap_or_default());
                // The rest may complete a stop text.
                let finish = if self.stops.is_hit() { Finish::Stop } else { finish };
                (text + &self.stops.finish(), finish)
            }
            Err(error) => (String::new(), Finish::Failed(error.to_string())),
        };
        if !text.is_empty() {
            self.send(Piece::Rest(text));
        }
        self.send(Piece::Ended(finish));
    }
}

impl Listener for Answering {
    fn hear(&mut self, event: EngineEvent) -> bool {
        match event {
            EngineEvent::Begun { cached } => {
                let cached = if self.pieces.is_first { cached } else { 0 };
                self.metrics.cached(cached);
                self.send(Piece::Begun { cached })
            }
            EngineEvent::Token(chosen) => self.token(chosen),
            EngineEvent::Ended(end) => {
                self.end(match end {
                    EngineEnd::EndToken(_) => Finish::Stop,
                    EngineEnd::Length => Finish::Length,
                    EngineEnd::Failed(reason) => Finish::Failed(reason),
                });
                false
            }
        }
    }

    fn is_gone(&self) -> bool {
        self.pieces.sender.is_closed()
    }
}
