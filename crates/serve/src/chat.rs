//! `POST /v1/chat/completions`.

use std::borrow::Cow;
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Extension, State as Shared};
use axum::response::{IntoResponse, Response};
use finetune_dataset::ChatTokenizer;
use finetune_model::Logprobs;
use serde_json::{Value, json};

use crate::answering::{Finish, Piece};
use crate::asked::{Asked, MOST_LOGPROBS};
use crate::asking::{
    FINGERPRINT, Question, Usage, ask, check_text, finish_reason, new_call_id, new_id, on_texts, on_thread,
    read_grammar, refused_form, token_text, whole,
};
use crate::call_form::{Begins, CallForm};
use crate::catalog::{Served, now};
use crate::connection::Busy;
use crate::error::ApiError;
use crate::events::{self, Chunks};
use crate::fields::Fields;
use crate::forms::{Calls, Thought, ToolChoice, grammar, trial};
use crate::grammar::Grammar;
use crate::harmony_forms::Final;
use crate::messages::{Conversation, describe, left_out, name_thinking, with_texts_of_arguments};
use crate::parts::{PartReader, Parts};
use crate::server::State;
use crate::tool_calls::{ToolCall, Tools};
use crate::{form_bounds, free_forms, harmony_forms};

const NO_CALLS: &str = "the chat template of this model writes no calls of tools, or in a form that is not known";

pub(crate) async fn chat(
    Shared(state): Shared<Arc<State>>,
    busy: Option<Extension<Arc<Busy>>>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let fields = Fields::read(&body)?;
    let asked = Asked::read(&fields, logprobs(&fields)?)?;
    if asked.echo {
        return Err(ApiError::unsupported("echo", "`echo` is not supported: `/v1/completions` gives a text back"));
    }
    let conversation = Conversation::read(&fields)?;
    let served = state.ready()?.catalog.find(asked.model.as_deref())?;
    let (tools, choice, one_call) = (conversation.tools.clone(), conversation.choice.clone(), conversation.one_call);
    let (prompt, opened) = read_prompt(&state, &served, conversation).await?;
    let wanted = Wanted { schema: asked.schema.as_ref(), tools: tools.as_ref(), choice: &choice, one_call };
    let form = wanted.form(&state, &served, opened.as_deref()).await?;
    let begins = form.as_ref().and_then(|_| wanted.begins(&served));
    let has_unheld = form.is_none() && wanted.is_free();
    let marks = served.marking.shown(tools.is_some());
    let prompts = vec![prompt];
    let question = Question { served: Arc::clone(&served), prompts, param: "messages", marks, form };
    let tools = tools.map(|tools| if has_unheld { Tools::unheld(tools) } else { Tools::new(tools) });
    let reader = || question.served.marking.reader(opened.as_deref(), tools.as_ref(), begins);
    let pieces = ask(&state, &asked, &question)?;
    let answering = Naming { id: new_id("chatcmpl")?, created: now(), served };
    let usage = Usage { prompt: question.prompts.iter().map(Vec::len).sum(), ..Usage::default() };
    if asked.stream {
        let include_usage = asked.include_usage;
        let choices = (0..asked.choices).map(|_| (Some(reader()), 0)).collect();
        let chunks = ChatChunks { naming: answering, choices, usage, include_usage, one_call };
        return Ok(events::response(chunks, pieces, busy.map(|Extension(busy)| busy)));
    }
    let (answers, usage) = whole(pieces, asked.choices, usage.prompt).await?;
    let mut choices = Vec::new();
    for (choice, answer) in answers.iter().enumerate() {
        let (message, has_calls) = message(reader(), &answer.text, one_call)?;
        let finish = if has_calls { "tool_calls" } else { answer.finish };
        let tokenizer = &answering.served.tokenizer;
        let logprobs = (!answer.logprobs.is_empty()).then(|| of_tokens(tokenizer, &answer.logprobs));
        choices.push(json!({"index": choice, "message": message, "logprobs": logprobs, "finish_reason": finish}));
    }
    let mut object = answering.object("chat.completion", choices);
    object["usage"] = usage.object();
    Ok(Json(object).into_response())
}

/// What a request says of the form of its answer.
struct Wanted<'a> {
    schema: Option<&'a Value>,
    tools: Option<&'a Value>,
    choice: &'a ToolChoice,
    /// Whether there is one call at most.
    one_call: bool,
}

impl Wanted<'_> {
    /// Whether the model may call a tool that asks for arguments of its form, or say anything else.
    fn is_free(&self) -> bool {
        let mut tools = self.tools.and_then(Value::as_array).into_iter().flatten();
        self.schema.is_none() && !self.choice.is_forced() && tools.any(free_forms::is_strict)
    }

    /// What begins calls in an answer with a form. gpt-oss's have a channel.
    fn begins(&self, served: &Served) -> Option<Begins> {
        let tagged = self.tools.filter(|_| !served.marking.is_harmony());
        tagged.and_then(|_| served.call_form()).map(|form| form.begins(served.marking.formats()))
    }

    /// The tools that an answer may call. Where it may say anything else, those without `strict` take any object.
    fn meant(&self, served: &Served) -> Vec<Cow<'_, Value>> {
        let is_meant = |tool: &&Value| match self.choice {
            ToolChoice::Named(name) => tool["function"]["name"] == **name,
            _ => true,
        };
        let is_loose = |tool: &Value| {
            let as_json = served.marking.is_harmony() || served.call_form().is_some_and(CallForm::is_json);
            self.is_free() && as_json && !free_forms::is_strict(tool)
        };
        let all = self.tools.and_then(Value::as_array).into_iter().flatten().filter(is_meant);
        all.map(|tool| if is_loose(tool) { Cow::Owned(free_forms::loosened(tool)) } else { Cow::Borrowed(tool) })
            .collect()
    }

    /// The grammar, if answers have to have a form. `opened`: what the template has put in front of them.
    async fn form(
        &self,
        state: &State,
        served: &Arc<Served>,
        opened: Option<&str>,
    ) -> Result<Option<(Grammar, Arc<str>)>, ApiError> {
        let (is_forced, is_free) = (self.choice.is_forced(), self.is_free());
        if self.schema.is_none() && !is_forced && !is_free {
            return Ok(None);
        }
        let param = if is_forced {
            "tool_choice"
        } else if is_free {
            "tools"
        } else {
            "response_format"
        };
        // To find out how the template writes calls takes time.
        let form = match self.tools {
            Some(_) if !served.marking.is_harmony() => match call_form(state, served).await? {
                None if is_free => {
                    // Some clients always send `strict`. No call of such a tool is given, so none breaks its promise.
                    let (say, id) = (&state.ready()?.say, &served.id);
                    let line = || say(&format!("{id}: {NO_CALLS}: calls of tools with `strict` stay text"));
                    served.says_unheld.call_once(line);
                    return Ok(None);
                }
                None => {
                    let message = format!("`{param}` cannot be kept with these `tools`: {NO_CALLS}");
                    return Err(ApiError::unsupported(param, message));
                }
                form => form,
            },
            _ => None,
        };
        let meant = self.meant(served);
        let meant: Vec<&Value> = meant.iter().map(AsRef::as_ref).collect();
        // A forced call leaves no room for JSON beside it.
        let schema = self.schema.filter(|_| !is_forced);
        let parameters = meant.iter().map(|tool| &tool["function"]["parameters"]);
        form_bounds::check(schema.into_iter().chain(parameters)).map_err(|what| refused_form(param, &what))?;
        let field = if is_free { "`strict` of `tools`".to_owned() } else { format!("`{param}`") };
        let unkept = |what: String| ApiError::unsupported(param, format!("{field} cannot be kept: {what}"));
        let trial = trial(schema, form.as_ref(), &meant).map_err(unkept)?;
        let text = self.grammar(served, opened, form.as_ref(), schema, meant).map_err(unkept)?;
        read_grammar(state, served, text, trial, param).await.map(Some)
    }

    /// The text of the grammar.
    fn grammar(
        &self,
        served: &Served,
        opened: Option<&str>,
        form: Option<&CallForm>,
        schema: Option<&Value>,
        tools: Vec<&Value>,
    ) -> Result<String, String> {
        if served.marking.is_harmony() {
            let free = if self.is_free() { Final::Free } else { Final::Not };
            return harmony_forms::grammar(&served.tokenizer, opened, &schema.map_or(free, Final::Json), &tools);
        }
        let thought = Thought::of(&served.tokenizer, opened);
        if let Some(form) = form.filter(|_| self.is_free()) {
            let begins = form.begins(served.marking.formats());
            return free_forms::grammar(form, begins, &tools, self.one_call, thought);
        }
        let one = matches!(self.choice, ToolChoice::Named(_) | ToolChoice::Any { one: true });
        let calls = form.map(|form| Calls { form, tools, one });
        grammar(schema, calls.as_ref(), thought)
    }
}

/// How the model's template writes calls, if that is a form that can be kept.
async fn call_form(state: &State, served: &Arc<Served>) -> Result<Option<CallForm>, ApiError> {
    let asked = Arc::clone(served);
    on_thread(state, move || asked.call_form().cloned()).await
}

/// The most likely tokens that are wanted beside the chosen one.
fn logprobs(fields: &Fields) -> Result<Option<usize>, ApiError> {
    let is_wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.whole("top_logprobs", 0..=MOST_LOGPROBS)?;
    if top.is_some_and(|top| top > 0) && !is_wanted {
        return Err(ApiError::field("top_logprobs", "`top_logprobs` needs `logprobs`: true"));
    }
    Ok(is_wanted.then(|| top.and_then(|top| usize::try_from(top).ok()).unwrap_or(0)))
}

/// The tokens of a conversation, and what its template has put in front of the answer that has to be known to read it.
async fn read_prompt(
    state: &State,
    served: &Served,
    mut conversation: Conversation,
) -> Result<(Vec<u32>, Option<String>), ApiError> {
    let tokenizer = served.tokenizer.clone();
    if !tokenizer.has_template() {
        let message = "the model has no chat template; `/v1/completions` continues a text";
        return Err(ApiError::field("messages", message));
    }
    // A call that is forced has its form whatever the template shows.
    let may_call = conversation.tools.is_some() && !conversation.choice.is_forced();
    if may_call && !tokenizer.template_has("tool") {
        let message = "the chat template of this model has no place for `tools`, so it would not know of them: leave them \
                       out, send `tool_choice`: \"none\", or start the server with --chat-template";
        return Err(ApiError::unsupported("tools", message));
    }
    if served.marking.is_harmony() {
        name_thinking(&mut conversation.messages);
        conversation.tools.iter_mut().for_each(describe);
    }
    let text = on_texts(state, "messages", move || {
        let Conversation { messages, tools, variables, .. } = conversation;
        let messages = tokenizer.with_parts_taken(messages, &variables)?;
        let render = |messages: &[Value]| tokenizer.render_with(messages, tools.as_ref(), &variables, true);
        let rendered = render(&messages).or_else(|error| {
            // DeepSeek's template puts arguments beside texts.
            let messages = with_texts_of_arguments(&messages).ok_or(error)?;
            render(&messages)
        });
        let text = rendered?.text;
        let left_out = left_out(&messages, &text);
        Ok((text, left_out))
    });
    let (text, left_out) = text.await?;
    if let Some((n, role)) = left_out {
        let message = format!(
            "the chat template leaves messages of the role `{role}` out: use a role that it knows, such as `user`"
        );
        return Err(ApiError::field(format!("messages[{n}].role"), message));
    }
    check_text(served, &text, "messages")?;
    let opened = served.marking.opened_by(&text).map(str::to_owned);
    let tokenizer = served.tokenizer.clone();
    let tokens = on_texts(state, "messages", move || tokenizer.encode_chat(&text)).await?;
    Ok((tokens, opened))
}

/// What the objects of an answer have in common.
struct Naming {
    id: String,
    created: u64,
    served: Arc<Served>,
}

impl Naming {
    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.id,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        })
    }
}

/// The message of an answer as a whole, and whether it calls tools. `one_call`: of several calls the first counts.
fn message(mut reader: PartReader, text: &str, one_call: bool) -> Result<(Value, bool), ApiError> {
    let Parts { mut reasoning, mut text, mut calls } = reader.push(text);
    let last = reader.finish();
    reasoning += &last.reasoning;
    text += &last.text;
    calls.extend(last.calls);
    calls.truncate(if one_call { 1 } else { usize::MAX });
    let content = if text.trim().is_empty() && !calls.is_empty() { Value::Null } else { text.into() };
    let mut message = json!({"role": "assistant", "content": content});
    if !reasoning.is_empty() {
        message["reasoning_content"] = reasoning.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.iter().map(call_object).collect::<Result<_, _>>()?;
    }
    Ok((message, !calls.is_empty()))
}

fn call_object(call: &ToolCall) -> Result<Value, ApiError> {
    let ToolCall { id, name, arguments } = call;
    let id = id.clone().map_or_else(new_call_id, Ok)?;
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}))
}

fn of_tokens(tokenizer: &ChatTokenizer, tokens: &[(u32, Logprobs)]) -> Value {
    let one = |token: u32, logprob: f32| {
        let (text, bytes) = token_text(tokenizer, token);
        json!({"token": text, "logprob": logprob, "bytes": bytes})
    };
    let content: Vec<Value> = tokens
        .iter()
        .map(|(token, logprobs)| {
            let mut object = one(*token, logprobs.chosen);
            object["top_logprobs"] = logprobs.top.iter().map(|(token, logprob)| one(*token, *logprob)).collect();
            object
        })
        .collect();
    json!({"content": content})
}

/// Answers as a stream.
struct ChatChunks {
    naming: Naming,
    /// Of each answer what takes it apart, until it ends, and how many calls of tools it has so far.
    choices: Vec<(Option<PartReader>, usize)>,
    usage: Usage,
    include_usage: bool,
    /// Of several calls the first counts.
    one_call: bool,
}

impl ChatChunks {
    fn chunk(&self, choice: usize, delta: &Value, logprobs: Option<Value>, finish: Option<&str>) -> Value {
        let choice = json!({"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish});
        let mut object = self.naming.object("chat.completion.chunk", vec![choice]);
        if self.include_usage {
            object["usage"] = Value::Null;
        }
        object
    }

    fn of_parts(&mut self, choice: usize, parts: Parts, mut logprobs: Option<Value>) -> Vec<Value> {
        let Parts { reasoning, text, calls } = parts;
        let mut chunks = Vec::new();
        if !reasoning.is_empty() {
            chunks.push(self.chunk(choice, &json!({"reasoning_content": reasoning}), logprobs.take(), None));
        }
        // Tokens without a text of their own have logarithms, too.
        if !text.is_empty() || logprobs.is_some() {
            chunks.push(self.chunk(choice, &json!({"content": text}), logprobs.take(), None));
        }
        let most = if self.one_call { 1 } else { usize::MAX };
        for call in calls.into_iter().take(most.saturating_sub(self.choices[choice].1)) {
            // Without random numbers the call has the answer's name.
            let mut object = call_object(&call).unwrap_or_else(|_| json!({"id": self.naming.id}));
            object["index"] = self.choices[choice].1.into();
            self.choices[choice].1 += 1;
            chunks.push(self.chunk(choice, &json!({"tool_calls": [object]}), None, None));
        }
        chunks
    }
}

impl Chunks for ChatChunks {
    fn choices(&self) -> usize {
        self.choices.len()
    }

    fn begin(&mut self) -> Vec<Value> {
        let begun = json!({"role": "assistant", "content": ""});
        (0..self.choices.len()).map(|choice| self.chunk(choice, &begun, None, None)).collect()
    }

    fn piece(&mut self, choice: usize, piece: Piece) -> Vec<Value> {
        self.usage.count(&piece);
        let (text, logprobs) = match piece {
            Piece::Token { token, text, logprobs } => (text, logprobs.map(|logprobs| (token, logprobs))),
            Piece::Rest(text) => (text, None),
            Piece::Begun { .. } | Piece::Prompt(_) | Piece::Ended(_) => return Vec::new(),
        };
        let logprobs = logprobs.map(|one| of_tokens(&self.naming.served.tokenizer, &[one]));
        let reader = self.choices[choice].0.as_mut();
        let parts = reader.map(|reader| reader.push(&text)).unwrap_or_default();
        self.of_parts(choice, parts, logprobs)
    }

    fn end(&mut self, choice: usize, finish: Finish) -> Result<Vec<Value>, ApiError> {
        let reason = finish_reason(&finish)?;
        let parts = self.choices[choice].0.take().map(PartReader::finish).unwrap_or_default();
        let mut chunks = self.of_parts(choice, parts, None);
        let reason = if self.choices[choice].1 > 0 { "tool_calls" } else { reason };
        chunks.push(self.chunk(choice, &json!({}), None, Some(reason)));
        Ok(chunks)
    }

    fn last(&mut self) -> Vec<Value> {
        if !self.include_usage {
            return Vec::new();
        }
        let mut last = self.naming.object("chat.completion.chunk", Vec::new());
        last["usage"] = self.usage.object();
        vec![last]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call_formats::formats;
    use crate::parts::TaggedReader;
    use crate::tool_calls::CallReader;

    #[test]
    fn the_message_of_an_answer() {
        let reader = || {
            let calls = CallReader::new(formats(str::is_empty), Tools::new(json!([])));
            PartReader::Tagged(TaggedReader::new(None, Some(calls)))
        };
        let of = |answer: &str| message(reader(), answer, false).expect("a message");
        assert_eq!(of("Hello"), (json!({"role": "assistant", "content": "Hello"}), false));
        let call = "<tool_call>{\"name\": \"now\", \"arguments\": {\"zone\": 1}}</tool_call>";
        let (message, has_calls) = of(&format!("<think>hm</think>\n\n{call}{call}"));
        assert!(has_calls);
        assert_eq!((&message["content"], &message["reasoning_content"]), (&Value::Null, &json!("hm")));
        let calls = message["tool_calls"].as_array().expect("a list");
        assert_eq!(calls.len(), 2);
        assert_eq!(calls[0]["type"], "function");
        assert_eq!(calls[0]["function"], json!({"name": "now", "arguments": "{\"zone\":1}"}));
        let ids: Vec<&str> = calls.iter().filter_map(|call| call["id"].as_str()).collect();
        assert!(ids[0] != ids[1] && ids.iter().all(|id| id.len() == 9), "{ids:?}");
        let (one, _) = super::message(reader(), &call.repeat(2), true).expect("a message");
        assert_eq!(one["tool_calls"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn the_likeliest_tokens_are_asked_for() {
        let read = |fields: Value| logprobs(&Fields::read(fields.to_string().as_bytes())?);
        assert_eq!(read(json!({})), Ok(None));
        assert_eq!(read(json!({"logprobs": false, "top_logprobs": null})), Ok(None));
        assert_eq!(read(json!({"logprobs": false, "top_logprobs": 0})), Ok(None), "some clients always send it");
        assert_eq!(read(json!({"logprobs": true})), Ok(Some(0)));
        assert_eq!(read(json!({"logprobs": true, "top_logprobs": 5})), Ok(Some(5)));
        for wrong in [json!({"top_logprobs": 5}), json!({"logprobs": true, "top_logprobs": 21}), json!({"logprobs": 1})]
        {
            assert!(read(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
