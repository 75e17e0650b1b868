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
use crate::asking::{Question, Usage, ask, check_text, finish_reason, new_id, on_texts, token_text, whole};
use crate::catalog::{Served, now};
use crate::connection::Busy;
use crate::error::ApiError;
use crate::events::{self, Chunks};
use crate::fields::{Fields, wrong};
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
    let question = Question { served: Arc::clone(&served), prompt, param: "prompt", shows_marks: false };
    let pieces = ask(&state, &asked, &question)?;
    let usage = Usage { prompt: question.prompt.len(), ..Usage::default() };
    let include_usage = asked.include_usage;
    let mut texts = Texts { id: new_id("cmpl")?, created: now(), served, usage, include_usage, offset: 0 };
    if asked.stream {
        return Ok(events::response(texts, pieces, busy.map(|Extension(busy)| busy)));
    }
    let answer = whole(pieces, usage.prompt).await?;
    let logprobs = (!answer.logprobs.is_empty()).then(|| texts.of_tokens(&answer.logprobs));
    let mut object = texts.object(&answer.text, logprobs, Some(answer.finish));
    object["usage"] = answer.usage.object();
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
    /// Letters of the tokens so far whose logarithms were given.
    offset: usize,
}

impl Texts {
    fn object(&self, text: &str, logprobs: Option<Value>, finish: Option<&str>) -> Value {
        let choice = json!({"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish});
        self.around(vec![choice])
    }

    fn around(&self, choices: Vec<Value>) -> Value {
        let Texts { id, created, served, .. } = self;
        json!({"id": id, "object": "text_completion", "created": created, "model": served.id, "choices": choices})
    }

    fn of_tokens(&mut self, tokens: &[(u32, Logprobs)]) -> Value {
        let (mut texts, mut logarithms, mut tops, mut offsets) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (token, logprobs) in tokens {
            let text = token_text(&self.served.tokenizer, *token);
            offsets.push(self.offset);
            self.offset += text.chars().count();
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
    fn begin(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn piece(&mut self, piece: Piece) -> Vec<Value> {
        self.usage.count(&piece);
        let (text, logprobs) = match piece {
            Piece::Token { token, text, logprobs } => (text, logprobs.map(|logprobs| [(token, logprobs)])),
            Piece::Rest(text) => (text, None),
            Piece::Begun { .. } | Piece::Ended(_) => return Vec::new(),
        };
        if text.is_empty() && logprobs.is_none() {
            return Vec::new();
        }
        let logprobs = logprobs.map(|one| self.of_tokens(&one));
        vec![self.object(&text, logprobs, None)]
    }

    fn end(&mut self, finish: Finish) -> Result<Vec<Value>, ApiError> {
        let mut chunks = vec![self.object("", None, Some(finish_reason(&finish)?))];
        if self.include_usage {
            let mut last = self.around(Vec::new());
            last["usage"] = self.usage.object();
            chunks.push(last);
        }
        Ok(chunks)
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
