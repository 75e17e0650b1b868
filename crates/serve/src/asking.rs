//! A request on its way to the thread that computes, and its answer as a whole. Both kinds of
//! requests take this way.

use std::sync::Arc;
use std::time::Duration;

use finetune_dataset::{ChatTokenizer, DatasetError};
use finetune_model::{EngineRequest, Logprobs, Model};
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::{AcquireError, OwnedSemaphorePermit};
use tokio::time::{Instant, timeout, timeout_at};

use crate::answering::{Answering, Finish, Piece, Pieces};
use crate::asked::Asked;
use crate::catalog::Served;
use crate::computing::Submitted;
use crate::elsewhere::Became;
use crate::error::ApiError;
use crate::grammar::Grammar;
use crate::server::State;

/// More bytes than the tokens of any text have on average, where four are usual.
const BYTES_OF_A_TOKEN: usize = 64;
/// Bytes of a text that is always read.
const SHORT_TEXT: usize = 64 << 10;

/// How long a form may wait for its thread, and how long it may be read. The first one of a model takes a second.
const LONGEST_FORM: Duration = Duration::from_secs(20);

/// What tells an answer of one version of the program from that of another.
pub(crate) const FINGERPRINT: &str = concat!("finetune-", env!("CARGO_PKG_VERSION"));

/// What is asked of a model.
pub(crate) struct Question {
    pub(crate) served: Arc<Served>,
    /// The prompts. All answers to one come behind those to the one before.
    pub(crate) prompts: Vec<Vec<u32>>,
    /// The field of the request that they are from.
    pub(crate) param: &'static str,
    /// Special tokens whose text belongs to answers.
    pub(crate) marks: Vec<&'static str>,
    /// The form that answers have to have, and its text.
    pub(crate) form: Option<(Grammar, Arc<str>)>,
}

/// Tokens of a request and of its answers. Each prompt is counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) prompt: usize,
    pub(crate) cached: usize,
    pub(crate) answer: usize,
}

impl Usage {
    pub(crate) fn object(self) -> Value {
        let Usage { prompt, cached, answer } = self;
        json!({
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
        })
    }

    /// Counts a piece of an answer.
    pub(crate) fn count(&mut self, piece: &Piece) {
        match piece {
            Piece::Begun { cached } => self.cached += cached,
            Piece::Token { .. } => self.answer += 1,
            Piece::Prompt(_) | Piece::Rest(_) | Piece::Ended(_) => {}
        }
    }
}

/// The pieces of all answers to a request. If it is dropped, the request ends.
pub(crate) struct Incoming {
    pieces: UnboundedReceiver<(usize, Piece)>,
    /// When the first piece has to be there, and how long that was from the beginning.
    turn: Option<(Instant, Duration)>,
}

impl Incoming {
    /// The first piece has to come within `turn`.
    pub(crate) fn new(pieces: UnboundedReceiver<(usize, Piece)>, turn: Duration) -> Incoming {
        // A time that no clock reaches is no bound.
        let turn = Instant::now().checked_add(turn).map(|until| (until, turn));
        Incoming { pieces, turn }
    }

    /// The next piece, and which answer it is of. `None`: the thread that computes has dropped the request.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, Piece)>, ApiError> {
        let next = self.pieces.recv();
        let piece = match self.turn {
            None => next.await,
            Some((until, turn)) => timeout_at(until, next).await.map_err(|_| ApiError::waited(turn.as_secs()))?,
        };
        self.turn = None;
        Ok(piece)
    }
}

/// How many answers there are to so many prompts.
///
/// # Errors
/// They are more than there may be at a time. `param`: the field of the prompts.
pub(crate) fn answers(state: &State, asked: &Asked, prompts: usize, param: &str) -> Result<usize, ApiError> {
    let settings = state.ready()?.computing.settings();
    let (most, all) = (settings.slots + settings.queue, asked.choices.saturating_mul(prompts));
    if all <= most {
        return Ok(all);
    }
    let (what, param) = match prompts {
        1 => (format!("`n` is {all}"), "n"),
        _ => (format!("{prompts} prompts have {all} answers"), param),
    };
    Err(ApiError::field(param, format!("{what}, and this server takes {most} answers at a time")))
}

/// Hands a question over, once for each answer.
pub(crate) fn ask(state: &State, asked: &Asked, question: &Question) -> Result<Incoming, ApiError> {
    let Question { served, prompts, param, marks, form } = question;
    if state.is_stopping() {
        return Err(ApiError::stopping());
    }
    let computing = &state.ready()?.computing;
    let settings = computing.settings();
    let model = &served.model;
    asked.check_tokens(model.config.vocabulary)?;
    if asked.ignores_ends && form.is_some() {
        let message = "`ignore_eos` cannot be kept: an answer of a form ends once it is complete";
        return Err(ApiError::field("ignore_eos", message));
    }
    if asked.echo && asked.has_logprobs() {
        check_scored(model, prompts)?;
    }
    let answers = answers(state, asked, prompts.len(), param)?;
    let (sender, receiver) = unbounded_channel();
    let mut all = Vec::with_capacity(answers);
    for prompt in prompts {
        // An answer without a limit of its own gets what there is room for.
        let longest = settings.longest_answer(model, prompt.len()).max(1);
        let max_new_tokens = asked.max_tokens.unwrap_or(state.settings.max_tokens.min(longest));
        settings.check(model, prompt, max_new_tokens).map_err(|refusal| ApiError::of_refusal(&refusal, param))?;
        for (n, rules) in asked.rules(served)?.into_iter().enumerate() {
            let place = computing.place()?;
            let pieces = Pieces { sender: sender.clone(), choice: all.len(), is_first: n == 0 };
            let metrics = Arc::clone(&state.metrics);
            let listener = Answering::new(&served.tokenizer, asked.stop.clone(), marks.clone(), pieces, metrics, place);
            let request = EngineRequest {
                model: Arc::clone(model),
                prompt: prompt.clone(),
                max_new_tokens,
                rules,
                end_ids: asked.ends(served),
                form: form.as_ref().map(|(grammar, _)| grammar.begin()),
            };
            let grammar = form.as_ref().map(|(_, text)| Arc::clone(text));
            all.push(Submitted { request, listener: Box::new(listener), grammar });
        }
    }
    prompts.iter().for_each(|prompt| state.metrics.prompt(prompt.len()));
    computing.submit(all);
    Ok(Incoming::new(receiver, state.settings.bounds.turn))
}

/// Refuses prompts of which cannot be said what the model thinks of them.
fn check_scored(model: &Model, prompts: &[Vec<u32>]) -> Result<(), ApiError> {
    if !prompts.iter().any(|prompt| model.config.is_long(prompt.len())) {
        return Ok(());
    }
    let what = "this model reads so long a text in another way than its beginning";
    Err(ApiError::unsupported("echo", format!("`echo` with `logprobs` cannot be had: {what}")))
}

/// A form that cannot be kept. `param`: the field that asks for it.
pub(crate) fn refused_form(param: &str, what: &str) -> ApiError {
    ApiError::field(param, format!("this form cannot be kept: {what}"))
}

/// The grammar of a text, on a thread for it: never on the one that computes. `trial`: the text of the grammar that it is
/// tried with. `param`: the field that asks for the form.
pub(crate) async fn read_grammar(
    state: &State,
    served: &Arc<Served>,
    text: String,
    trial: String,
    param: &'static str,
) -> Result<(Grammar, Arc<str>), ApiError> {
    let (text, model) = (Arc::<str>::from(text), Arc::clone(&served.model));
    let (served, own) = (Arc::clone(served), Arc::clone(&text));
    // Reading cannot be stopped, and goes on with its place.
    let place = timeout(LONGEST_FORM, Arc::clone(&state.forms).acquire_owned()).await.map_err(|_| ApiError::busy())?;
    let elsewhere = state.ready()?.computing.announce(&model, &text);
    let work = move || {
        let grammars = served.grammars()?;
        grammars.read(&trial)?.rehearse()?;
        let grammar = grammars.read(&own)?;
        Ok::<_, String>((grammar, own))
    };
    let done = timeout(LONGEST_FORM, on_thread_with(place, work)).await;
    let late = |_| refused_form(param, &format!("it is not read within {} seconds", LONGEST_FORM.as_secs()));
    let read = done.map_err(late)??.map_err(|what: String| refused_form(param, &what))?;
    if let Some(elsewhere) = elsewhere {
        // The others hear of it between two steps, and these may be long.
        let turn = state.settings.bounds.turn;
        if let Became::Late(_) = elsewhere.wait(turn).await.map_err(|what| ApiError::lost(&what))? {
            return Err(ApiError::waited(turn.as_secs()));
        }
    }
    Ok(read)
}

/// An answer as a whole.
#[derive(Default)]
pub(crate) struct Answer {
    /// What the model thought of the prompt, from the second token on, if it was asked for.
    pub(crate) prompt: Vec<Logprobs>,
    pub(crate) text: String,
    /// Tokens with what the model thought of them, if it was asked for.
    pub(crate) logprobs: Vec<(u32, Logprobs)>,
    pub(crate) finish: &'static str,
}

/// Waits for the end of `choices` answers to prompts of so many tokens in all.
pub(crate) async fn whole(
    mut pieces: Incoming,
    choices: usize,
    prompt: usize,
) -> Result<(Vec<Answer>, Usage), ApiError> {
    let mut answers: Vec<Answer> = (0..choices).map(|_| Answer::default()).collect();
    let (mut usage, mut ended) = (Usage { prompt, ..Usage::default() }, 0);
    while let Some((choice, piece)) = pieces.next().await? {
        usage.count(&piece);
        let answer = &mut answers[choice];
        match piece {
            Piece::Begun { .. } => {}
            Piece::Prompt(logprobs) => answer.prompt.extend(logprobs),
            Piece::Token { token, text, logprobs } => {
                answer.text += &text;
                answer.logprobs.extend(logprobs.map(|logprobs| (token, logprobs)));
            }
            Piece::Rest(text) => answer.text += &text,
            Piece::Ended(finish) => {
                answer.finish = finish_reason(&finish)?;
                ended += 1;
                if ended == choices {
                    return Ok((answers, usage));
                }
            }
        }
    }
    // The thread that computes has dropped the request.
    Err(ApiError::stopping())
}

/// OpenAI's word for the end of an answer.
pub(crate) fn finish_reason(finish: &Finish) -> Result<&'static str, ApiError> {
    match finish {
        Finish::Stop => Ok("stop"),
        Finish::Length => Ok("length"),
        Finish::Failed(reason) => Err(ApiError::failed(reason.clone())),
    }
}

/// Work on texts, which may take long, on a thread for it.
pub(crate) async fn on_texts<R: Send + 'static>(
    state: &State,
    param: &'static str,
    work: impl FnOnce() -> Result<R, DatasetError> + Send + 'static,
) -> Result<R, ApiError> {
    on_thread(state, work).await?.map_err(|error| ApiError::of_text(&error, param))
}

/// Work that may take long, on a thread for it.
pub(crate) async fn on_thread<R: Send + 'static>(
    state: &State,
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, ApiError> {
    on_thread_with(Arc::clone(&state.texts).acquire_owned().await, work).await
}

/// Work that holds a place until it is done.
async fn on_thread_with<R: Send + 'static>(
    place: Result<OwnedSemaphorePermit, AcquireError>,
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R, ApiError> {
    let done = tokio::task::spawn_blocking(move || {
        let _place = place;
        work()
    });
    done.await.map_err(|_| ApiError::failed("the text could not be read, which is a bug"))
}

/// Refuses a text that has far more bytes than its model has room for. To read it would take 200
/// times its memory.
pub(crate) fn check_text(served: &Served, text: &str, param: &str) -> Result<(), ApiError> {
    let positions = served.model.config.max_position_embeddings;
    let most = positions.saturating_mul(BYTES_OF_A_TOKEN).saturating_add(SHORT_TEXT);
    if text.len() <= most {
        return Ok(());
    }
    let message = format!("a text of {} bytes is too long for the model's {positions} positions", text.len());
    Err(ApiError::field(param, message).with_code("context_length_exceeded"))
}

/// The text of one token, with U+FFFD for parts of characters, and its bytes.
pub(crate) fn token_text(tokenizer: &ChatTokenizer, token: u32) -> (String, Vec<u8>) {
    // A decoder takes off the space in front of a text, and one token is a text to it.
    let bytes = tokenizer.bytes_of(token).unwrap_or_else(|| {
        let special = tokenizer.decode(&[token], false).unwrap_or_default();
        special.into_bytes()
    });
    (String::from_utf8_lossy(&bytes).into_owned(), bytes)
}

/// A name for an answer, which no other has.
pub(crate) fn new_id(prefix: &str) -> Result<String, ApiError> {
    Ok(format!("{prefix}-{:016x}", random()?))
}

/// A name for a call: nine letters and digits. Mistral's template takes no other, and others take
/// any.
pub(crate) fn new_call_id() -> Result<String, ApiError> {
    const LETTERS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut number = random()?;
    let letter = |_| {
        let letter = LETTERS[(number % 36) as usize];
        number /= 36;
        char::from(letter)
    };
    Ok((0..9).map(letter).collect())
}

fn random() -> Result<u64, ApiError> {
    getrandom::u64().map_err(|error| ApiError::failed(format!("no random numbers: {error}")))
}
