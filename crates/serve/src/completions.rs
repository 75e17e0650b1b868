//! `POST /v1/completions`: a text is continued as it is, without a chat template.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Extension, State as Shared};
use axum::response::{IntoResponse, Response};
use finetune_model::Logprobs;
use serde_json::{Map, Value, json};

use crate::answering::{Finish, Piece};
use crate::asked::{Asked, MOST_LOGPROBS};
use crate::asking::{
    Answer, FINGERPRINT, Question, Usage, answers, ask, check_text, finish_reason, new_id, on_texts, read_grammar,
    refused_form, token_text, whole,
};
use crate::catalog::{Served, now};
use crate::connection::Busy;
use crate::error::ApiError;
use crate::events::{self, Chunks};
use crate::fields::{Fields, wrong};
use crate::form_bounds;
use crate::forms::{Thought, grammar, trial};
use crate::server::State;

/// What is continued.
#[derive(Clone, Debug, PartialEq)]
enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

pub(crate) async fn completions(
    Shared(state): Shared<Arc<State>>,
    busy: Option<Extension<Arc<Busy>>>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let fields = Fields::read(&body)?;
    let logprobs = fields.whole("logprobs", 0..=MOST_LOGPROBS)?.and_then(|top| usize::try_from(top).ok());
    let asked = Asked::read(&fields, logprobs)?;
    let prompts = read_prompts(&fields)?;
    let served = state.ready()?.catalog.find(asked.model.as_deref())?;
    let choices = answers(&state, &asked, prompts.len(), "prompt")?;
    let given = asked.echo.then(|| prompts.clone());
    let prompts = tokens_of(&state, &served, prompts).await?;
    let echo = match given {
        None => None,
        Some(given) => {
            let texts = texts_of(&state, &served, given).await?;
            let (each, is_scored, told) = (asked.choices, asked.has_logprobs(), vec![0; choices]);
            Some(Echo { prompts: texts.into_iter().zip(prompts.clone()).collect(), each, is_scored, told })
        }
    };
    let form = match &asked.schema {
        None => None,
        Some(schema) => {
            form_bounds::check([schema]).map_err(|what| refused_form("response_format", &what))?;
            let refused = |what: String| refused_form("response_format", &what);
            let text = grammar(Some(schema), None, Thought::Not).map_err(refused)?;
            let trial = trial(Some(schema), None, &[]).map_err(refused)?;
            Some(read_grammar(&state, &served, text, trial, "response_format").await?)
        }
    };
    let question = Question { served: Arc::clone(&served), prompts, param: "prompt", marks: Vec::new(), form };
    let pieces = ask(&state, &asked, &question)?;
    let usage = Usage { prompt: question.prompts.iter().map(Vec::len).sum(), ..Usage::default() };
    let (include_usage, offsets) = (asked.include_usage, vec![0; choices]);
    let mut texts = Texts { id: new_id("cmpl")?, created: now(), served, usage, include_usage, offsets, echo };
    if asked.stream {
        return Ok(events::response(texts, pieces, busy.map(|Extension(busy)| busy)));
    }
    let (all, usage) = whole(pieces, choices, usage.prompt).await?;
    let mut choices = Vec::new();
    for (choice, Answer { prompt, text, logprobs, finish }) in all.iter().enumerate() {
        let own = logprobs.iter().map(|(token, logprobs)| (*token, Some(logprobs)));
        let tokens: Vec<_> = texts.tokens_of_prompt(choice, prompt).into_iter().chain(own).collect();
        let logprobs = (!tokens.is_empty()).then(|| texts.of_tokens(choice, &tokens));
        let text = [texts.prompt(choice), text.as_str()].concat();
        choices.push(choice_object(choice, &text, logprobs, Some(finish)));
    }
    let mut object = texts.around(choices);
    object["usage"] = usage.object();
    Ok(Json(object).into_response())
}

/// The tokens of each prompt.
async fn tokens_of(state: &State, served: &Arc<Served>, prompts: Vec<Prompt>) -> Result<Vec<Vec<u32>>, ApiError> {
    for prompt in &prompts {
        if let Prompt::Text(text) = prompt {
            check_text(served, text, "prompt")?;
        }
    }
    let tokenizer = served.tokenizer.clone();
    let tokens = move |prompt| match prompt {
        Prompt::Tokens(tokens) => Ok(tokens),
        Prompt::Text(text) => tokenizer.encode_prompt(&text),
    };
    on_texts(state, "prompt", move || prompts.into_iter().map(tokens).collect()).await
}

/// The text of each prompt.
async fn texts_of(state: &State, served: &Arc<Served>, prompts: Vec<Prompt>) -> Result<Vec<String>, ApiError> {
    let tokenizer = served.tokenizer.clone();
    let text = move |prompt| match prompt {
        Prompt::Text(text) => Ok(text),
        Prompt::Tokens(tokens) => tokenizer.decode(&tokens, false),
    };
    on_texts(state, "prompt", move || prompts.into_iter().map(text).collect()).await
}

/// The prompts of a request: one, or a list of them.
fn read_prompts(fields: &Fields) -> Result<Vec<Prompt>, ApiError> {
    let wanted = "a string, a list of numbers of tokens, or a list of those";
    let one = |prompt: &Value| match prompt {
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(items) => {
            let token = |item: &Value| item.as_u64().and_then(|token| u32::try_from(token).ok());
            let token = |item: &Value| token(item).ok_or_else(|| wrong("prompt", item, wanted));
            items.iter().map(token).collect::<Result<_, _>>().map(Prompt::Tokens)
        }
        other => Err(wrong("prompt", other, wanted)),
    };
    match fields.get("prompt") {
        Some(Value::Array(items)) if items.first().is_some_and(|item| item.is_string() || item.is_array()) => {
            items.iter().map(one).collect()
        }
        Some(prompt) => Ok(vec![one(prompt)?]),
        None => Err(ApiError::field("prompt", format!("`prompt` is missing: {wanted}"))),
    }
}

/// Prompts that answers begin with.
struct Echo {
    /// Their texts and tokens.
    prompts: Vec<(String, Vec<u32>)>,
    /// Answers to each of them.
    each: usize,
    /// Whether the logarithms of their tokens are given.
    is_scored: bool,
    /// Of each answer, how many tokens of the prompt behind the first one it has given.
    told: Vec<usize>,
}

/// The objects of an answer.
struct Texts {
    id: String,
    created: u64,
    served: Arc<Served>,
    usage: Usage,
    include_usage: bool,
    /// Of each answer the letters of the tokens so far whose logarithms were given.
    offsets: Vec<usize>,
    echo: Option<Echo>,
}

fn choice_object(choice: usize, text: &str, logprobs: Option<Value>, finish: Option<&str>) -> Value {
    json!({"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish})
}

impl Texts {
    fn around(&self, choices: Vec<Value>) -> Value {
        let Texts { id, created, served, .. } = self;
        json!({
            "id": id,
            "object": "text_completion",
            "created": created,
            "model": served.id,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        })
    }

    /// A piece of a stream.
    fn chunk(&self, choice: Value) -> Value {
        let mut object = self.around(vec![choice]);
        if self.include_usage {
            object["usage"] = Value::Null;
        }
        object
    }

    /// The text that an answer begins with.
    fn prompt(&self, choice: usize) -> &str {
        self.echo.as_ref().map_or("", |echo| &echo.prompts[choice / echo.each].0)
    }

    /// The next tokens of the prompt that an answer begins with. Nothing is thought of the first one.
    fn tokens_of_prompt<'a>(&mut self, choice: usize, scores: &'a [Logprobs]) -> Vec<(u32, Option<&'a Logprobs>)> {
        let Some(echo) = self.echo.as_mut().filter(|echo| echo.is_scored) else { return Vec::new() };
        let (tokens, told) = (&echo.prompts[choice / echo.each].1, &mut echo.told[choice]);
        let first = tokens.first().filter(|_| *told == 0).map(|first| (*first, None));
        let next = tokens.iter().skip(1 + *told).zip(scores).map(|(token, score)| (*token, Some(score)));
        let all = first.into_iter().chain(next).collect();
        *told += scores.len();
        all
    }

    fn of_tokens(&mut self, choice: usize, tokens: &[(u32, Option<&Logprobs>)]) -> Value {
        let (mut texts, mut logarithms, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (token, logprobs) in tokens {
            let text = token_text(&self.served.tokenizer, *token).0;
            offsets.push(self.offsets[choice]);
            self.offsets[choice] += text.chars().count();
            tops.push(logprobs.map(|logprobs| {
                let top = logprobs.top.iter().copied().chain([(*token, logprobs.chosen)]);
                let named = top.map(|(token, logprob)| (token_text(&self.served.tokenizer, token).0, logprob.into()));
                named.collect::<Map<String, Value>>()
            }));
            logarithms.push(logprobs.map(|logprobs| logprobs.chosen));
            texts.push(text);
        }
        json!({"tokens": texts, "token_logprobs": logarithms, "top_logprobs": tops, "text_offset": offsets})
    }
}

impl Chunks for Texts {
    fn choices(&self) -> usize {
        self.offsets.len()
    }

    fn begin(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn piece(&mut self, choice: usize, piece: Piece) -> Vec<Value> {
        self.usage.count(&piece);
        let (text, logprobs) = match &piece {
            Piece::Begun { .. } => (self.prompt(choice), None),
            Piece::Prompt(scores) => ("", Some(self.tokens_of_prompt(choice, scores))),
            Piece::Token { token, text, logprobs } => {
                (text.as_str(), logprobs.as_ref().map(|logprobs| vec![(*token, Some(logprobs))]))
            }
            Piece::Rest(text) => (text.as_str(), None),
            Piece::Ended(_) => return Vec::new(),
        };
        if text.is_empty() && logprobs.is_none() {
            return Vec::new();
        }
        let text = text.to_owned();
        let logprobs = logprobs.map(|tokens| self.of_tokens(choice, &tokens));
        vec![self.chunk(choice_object(choice, &text, logprobs, None))]
    }

    fn end(&mut self, choice: usize, finish: Finish) -> Result<Vec<Value>, ApiError> {
        Ok(vec![self.chunk(choice_object(choice, "", None, Some(finish_reason(&finish)?)))])
    }

    fn last(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut last = self.around(Vec::new());
        last["usage"] = self.usage.object();
        vec![last]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_of_texts_and_tokens() {
        let read = |prompt: Value| read_prompts(&Fields::read(json!({"prompt": prompt}).to_string().as_bytes())?);
        let (text, tokens) = (|| Prompt::Text("Hi".to_owned()), || Prompt::Tokens(vec![1, 2]));
        assert_eq!(read("Hi".into()), Ok(vec![text()]));
        assert_eq!(read(json!(["Hi"])), Ok(vec![text()]));
        assert_eq!(read(json!([1, 2])), Ok(vec![tokens()]));
        assert_eq!(read(json!([[1, 2]])), Ok(vec![tokens()]));
        assert_eq!(read(json!(["Hi", "Hi"])), Ok(vec![text(), text()]));
        assert_eq!(read(json!([[1, 2], "Hi"])), Ok(vec![tokens(), text()]));
        assert_eq!(read(json!([])), Ok(vec![Prompt::Tokens(Vec::new())]), "it has no tokens, which is said later");
        for wrong in
            [json!(null), json!(3), json!(["a", 1]), json!([1, "a"]), json!([-1]), json!([[[1]]]), json!([[1], null])]
        {
            assert!(read(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
