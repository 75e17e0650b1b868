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
    Answer, Question, Usage, ask, check_text, finish_reason, new_id, on_texts, read_grammar, refused_form, token_text,
    whole,
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
#[derive(Debug, PartialEq)]
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
    let prompt = read_prompt(&fields)?;
    let served = state.ready()?.catalog.find(asked.model.as_deref())?;
    let prompt = match prompt {
        Prompt::Tokens(tokens) => tokens,
        Prompt::Text(text) => {
            check_text(&served, &text, "prompt")?;
            let tokenizer = served.tokenizer.clone();
            on_texts(&state, "prompt", move || tokenizer.encode(&text, true)).await?
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
    let question = Question { served: Arc::clone(&served), prompt, param: "prompt", marks: Vec::new(), form };
    let pieces = ask(&state, &asked, &question)?;
    let usage = Usage { prompt: question.prompt.len(), ..Usage::default() };
    let (include_usage, offsets) = (asked.include_usage, vec![0; asked.choices]);
    let mut texts = Texts { id: new_id("cmpl")?, created: now(), served, usage, include_usage, offsets };
    if asked.stream {
        return Ok(events::response(texts, pieces, busy.map(|Extension(busy)| busy)));
    }
    let (answers, usage) = whole(pieces, asked.choices, usage.prompt).await?;
    let mut choices = Vec::new();
    for (choice, Answer { text, logprobs, finish }) in answers.iter().enumerate() {
        let logprobs = (!logprobs.is_empty()).then(|| texts.of_tokens(choice, logprobs));
        choices.push(choice_object(choice, text, logprobs, Some(finish)));
    }
    let mut object = texts.around(choices);
    object["usage"] = usage.object();
    Ok(Json(object).into_response())
}

fn read_prompt(fields: &Fields) -> Result<Prompt, ApiError> {
    let wanted = "a string, or a list of numbers of tokens";
    let several = || ApiError::unsupported("prompt", "several prompts are not supported: ask several times");
    match fields.get("prompt") {
        Some(Value::String(text)) => Ok(Prompt::Text(text.clone())),
        Some(Value::Array(items)) => match items.as_slice() {
            [Value::String(text)] => Ok(Prompt::Text(text.clone())),
            [Value::String(_) | Value::Array(_), ..] => Err(several()),
            items => {
                let token = |item: &Value| item.as_u64().and_then(|token| u32::try_from(token).ok());
                let token = |item: &Value| token(item).ok_or_else(|| wrong("prompt", item, wanted));
                items.iter().map(token).collect::<Result<_, _>>().map(Prompt::Tokens)
            }
        },
        Some(other) => Err(wrong("prompt", other, wanted)),
        None => Err(ApiError::field("prompt", format!("`prompt` is missing: {wanted}"))),
    }
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
}

fn choice_object(choice: usize, text: &str, logprobs: Option<Value>, finish: Option<&str>) -> Value {
    json!({"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish})
}

impl Texts {
    fn around(&self, choices: Vec<Value>) -> Value {
        let Texts { id, created, served, .. } = self;
        json!({"id": id, "object": "text_completion", "created": created, "model": served.id, "choices": choices})
    }

    fn of_tokens(&mut self, choice: usize, tokens: &[(u32, Logprobs)]) -> Value {
        let (mut texts, mut logarithms, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (token, logprobs) in tokens {
            let text = token_text(&self.served.tokenizer, *token);
            offsets.push(self.offsets[choice]);
            self.offsets[choice] += text.chars().count();
            let top = logprobs.top.iter().copied().chain([(*token, logprobs.chosen)]);
            let top: Map<String, Value> =
                top.map(|(token, logprob)| (token_text(&self.served.tokenizer, token), logprob.into())).collect();
            tops.push(top);
            logarithms.push(logprobs.chosen);
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
        self.usage.count(choice, &piece);
        let (text, logprobs) = match piece {
            Piece::Token { token, text, logprobs } => (text, logprobs.map(|logprobs| [(token, logprobs)])),
            Piece::Rest(text) => (text, None),
            Piece::Begun { .. } | Piece::Ended(_) => return Vec::new(),
        };
        if text.is_empty() && logprobs.is_none() {
            return Vec::new();
        }
        let logprobs = logprobs.map(|one| self.of_tokens(choice, &one));
        vec![self.around(vec![choice_object(choice, &text, logprobs, None)])]
    }

    fn end(&mut self, choice: usize, finish: Finish) -> Result<Vec<Value>, ApiError> {
        Ok(vec![self.around(vec![choice_object(choice, "", None, Some(finish_reason(&finish)?))])])
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
        let read = |prompt: Value| read_prompt(&Fields::read(json!({"prompt": prompt}).to_string().as_bytes())?);
        assert_eq!(read("Hi".into()), Ok(Prompt::Text("Hi".to_owned())));
        assert_eq!(read(json!(["Hi"])), Ok(Prompt::Text("Hi".to_owned())));
        assert_eq!(read(json!([1, 2])), Ok(Prompt::Tokens(vec![1, 2])));
        for wrong in [json!(null), json!(3), json!(["a", "b"]), json!([[1], [2]]), json!([1, "a"]), json!([-1])] {
            assert!(read(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
