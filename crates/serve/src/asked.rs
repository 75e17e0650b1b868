//! What a request asks beside its text: the model, how tokens are chosen, when to stop, the form of
//! the answer. Fields that nobody knows are left out, as OpenAI's servers do.

use finetune_model::{Sampling, TokenRules};
use serde_json::Value;

use crate::catalog::Served;
use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::forms;

/// The most texts that end an answer, and the most bytes of one.
const MOST_STOPS: usize = 4;
const LONGEST_STOP: usize = 1024;
/// The most likely tokens whose logarithms of probabilities are given.
pub(crate) const MOST_LOGPROBS: i64 = 20;
/// The most tokens that end an answer, beside those of the model.
const MOST_STOP_TOKENS: usize = 64;
/// The most answers to one request.
const MOST_CHOICES: i64 = 128;
/// The most tokens that a bias changes.
const MOST_BIASES: usize = 1024;

/// What requests of both kinds ask.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Asked {
    /// `None`: the first one.
    pub(crate) model: Option<String>,
    pub(crate) max_tokens: Option<usize>,
    pub(crate) stop: Vec<String>,
    /// Tokens that end an answer, beside those of the model.
    stop_tokens: Vec<u32>,
    /// Whether those of the model do not end it.
    pub(crate) ignores_ends: bool,
    /// So many tokens come before one that ends it.
    min_tokens: usize,
    pub(crate) stream: bool,
    /// Whether the answer begins with the prompt.
    pub(crate) echo: bool,
    /// A stream ends with the numbers of tokens.
    pub(crate) include_usage: bool,
    /// How many answers there are to be.
    pub(crate) choices: usize,
    /// The schema of what the answer has to be.
    pub(crate) schema: Option<Value>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    seed: Option<u64>,
    /// Without temperature, top_p and seed.
    rules: TokenRules,
}

/// What OpenAI's interface has and this server has not, with what is said about it.
const UNSUPPORTED: [(&str, &str); 22] = [
    ("functions", "send `tools`"),
    ("function_call", "send `tool_choice`"),
    ("suffix", "text is only continued"),
    ("audio", "there is only text"),
    ("prompt_logprobs", "there are `logprobs` of the answer"),
    ("web_search_options", "there is nothing to search with"),
    ("continue_final_message", "send `/v1/completions` the text to continue"),
    // Other servers'. Without them an answer would be of another model, of another prompt, or have any form.
    ("adapters", "an adapter is a `model`"),
    ("lora", "an adapter is a `model`"),
    ("chat_template", "start the server with --chat-template"),
    ("prompt_embeds", "there is only text"),
    ("bad_words", "send `logit_bias`"),
    ("allowed_token_ids", "send `logit_bias`"),
    ("use_beam_search", "ask for `n` answers"),
    ("include_stop_str_in_output", "an answer ends in front of a text of `stop`"),
    ("grammar", "forms are those of `response_format`"),
    ("json_schema", "send `response_format`"),
    ("guided_json", "send `response_format`"),
    ("guided_choice", "send `response_format` with an `enum`"),
    ("guided_regex", "forms are those of `response_format`"),
    ("guided_grammar", "forms are those of `response_format`"),
    ("structured_outputs", "send `response_format`"),
];

impl Asked {
    /// `logprobs`: how many of the most likely tokens are wanted beside the chosen one.
    pub(crate) fn read(fields: &Fields, logprobs: Option<usize>) -> Result<Asked, ApiError> {
        let choices = fields.whole("n", 1..=MOST_CHOICES)?.unwrap_or(1);
        refuse_unsupported(fields, choices)?;
        let max_tokens = match fields.count("max_completion_tokens", 1)? {
            Some(count) => Some(count),
            None => fields.count("max_tokens", 0)?,
        };
        let min_tokens = fields.count("min_tokens", 0)?.unwrap_or(0);
        if max_tokens.is_some_and(|most| min_tokens > most) {
            let message = format!("`min_tokens` is {min_tokens}, which is more than the answer may have");
            return Err(ApiError::field("min_tokens", message));
        }
        let echo = fields.flag("echo")?.unwrap_or(false);
        let rules = TokenRules {
            of_prompt: echo,
            top_k: top_k(fields)?,
            min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
            repetition_penalty: fields.number("repetition_penalty", 0.01..=10.0)?.unwrap_or(1.0),
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            logit_bias: logit_bias(fields)?,
            logprobs,
            ..TokenRules::from(Sampling::GREEDY)
        };
        // Of 0 the likeliest token is left, as of a number next to it.
        let top_p = fields.number("top_p", 0.0..=1.0)?.map(|top_p| top_p.max(f64::MIN_POSITIVE));
        let usage = fields.object("stream_options")?.cloned().map(Fields::of);
        Ok(Asked {
            model: fields.text("model")?.map(str::to_owned),
            max_tokens,
            stop: stop(fields)?,
            stop_tokens: stop_tokens(fields)?,
            ignores_ends: fields.flag("ignore_eos")?.unwrap_or(false),
            min_tokens,
            stream: fields.flag("stream")?.unwrap_or(false),
            echo,
            include_usage: usage.map(|usage| usage.flag("include_usage")).transpose()?.flatten().unwrap_or(false),
            choices: usize::try_from(choices).unwrap_or(1),
            schema: forms::response_format(fields)?,
            temperature: fields.number("temperature", 0.0..=100.0)?,
            top_p,
            // Negative numbers are seeds as well.
            seed: fields.whole("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
            rules,
        })
    }

    /// Refuses what names tokens that a model does not have.
    pub(crate) fn check_tokens(&self, vocabulary: usize) -> Result<(), ApiError> {
        let of_bias = self.rules.logit_bias.iter().map(|(token, _)| ("logit_bias", *token));
        let of_stop = self.stop_tokens.iter().map(|token| ("stop_token_ids", *token));
        match of_bias.chain(of_stop).find(|(_, token)| *token as usize >= vocabulary) {
            None => Ok(()),
            Some((field, token)) => {
                let message = format!("`{field}` has the token {token}, and the model has {vocabulary} tokens");
                Err(ApiError::field(field, message))
            }
        }
    }

    /// Whether logarithms of probabilities are wanted.
    pub(crate) fn has_logprobs(&self) -> bool {
        self.rules.logprobs.is_some()
    }

    /// The tokens that end an answer.
    pub(crate) fn ends(&self, served: &Served) -> Vec<u32> {
        let own: &[u32] = if self.ignores_ends { &[] } else { &served.ends };
        let others = self.stop_tokens.iter().filter(|token| !own.contains(token));
        own.iter().chain(others).copied().collect()
    }

    /// How tokens of each answer are chosen. What the request does not say is the model's default, and the seed is
    /// drawn. Each answer has the seed behind that of the one before.
    pub(crate) fn rules(&self, served: &Served) -> Result<Vec<TokenRules>, ApiError> {
        let seed = match self.seed {
            Some(seed) => seed,
            None => getrandom::u64().map_err(|error| ApiError::failed(format!("no random numbers: {error}")))?,
        };
        let of_choice = |choice: u64| {
            let sampling = Sampling {
                temperature: self.temperature.unwrap_or(served.temperature),
                top_p: self.top_p.unwrap_or(served.top_p),
                seed: seed.wrapping_add(choice),
            };
            let not_before = (self.ends(served), self.min_tokens);
            TokenRules { sampling, not_before, ..self.rules.clone() }
        };
        Ok((0..).take(self.choices).map(of_choice).collect())
    }
}

fn refuse_unsupported(fields: &Fields, choices: i64) -> Result<(), ApiError> {
    for (name, instead) in UNSUPPORTED {
        let asks_nothing = |value: &Value| *value == false || *value == "" || *value == Value::Array(Vec::new());
        if fields.get(name).is_some_and(|value| !asks_nothing(value)) {
            return Err(ApiError::unsupported(name, format!("`{name}` is not supported: {instead}")));
        }
    }
    if fields.flag("add_generation_prompt")? == Some(false) {
        let message = "`add_generation_prompt` may be true: send `/v1/completions` the text to continue";
        return Err(ApiError::unsupported("add_generation_prompt", message));
    }
    if fields.list("modalities")?.is_some_and(|all| all.iter().any(|one| *one != "text")) {
        return Err(ApiError::unsupported("modalities", "`modalities` may be [\"text\"]: there is only text"));
    }
    if fields.whole("best_of", 1..=i64::MAX)?.is_some_and(|number| number > choices) {
        let message = "`best_of` above `n` is not supported: ask for `n` answers with `logprobs`";
        return Err(ApiError::unsupported("best_of", message));
    }
    Ok(())
}

/// 0 and -1 mean all tokens, as vLLM has it.
fn top_k(fields: &Fields) -> Result<usize, ApiError> {
    let top_k = fields.whole("top_k", -1..=i64::MAX)?.unwrap_or(0);
    Ok(usize::try_from(top_k).unwrap_or(0))
}

fn stop(fields: &Fields) -> Result<Vec<String>, ApiError> {
    let Some(value) = fields.get("stop") else { return Ok(Vec::new()) };
    let wanted = "a string, or a list of at most 4 strings";
    let texts: Vec<&Value> = match value {
        Value::Array(texts) => texts.iter().collect(),
        text => vec![text],
    };
    if texts.len() > MOST_STOPS {
        return Err(wrong("stop", value, wanted));
    }
    let text = |text: &Value| match text.as_str() {
        Some(text) if text.len() > LONGEST_STOP => {
            Err(ApiError::field("stop", format!("a text of `stop` has more than {LONGEST_STOP} bytes")))
        }
        Some(text) => Ok(text.to_owned()),
        None => Err(wrong("stop", text, wanted)),
    };
    let texts = texts.into_iter().map(text).collect::<Result<Vec<String>, ApiError>>()?;
    Ok(texts.into_iter().filter(|text| !text.is_empty()).collect())
}

fn stop_tokens(fields: &Fields) -> Result<Vec<u32>, ApiError> {
    let Some(tokens) = fields.list("stop_token_ids")? else { return Ok(Vec::new()) };
    if tokens.len() > MOST_STOP_TOKENS {
        let message = format!("`stop_token_ids` has more than {MOST_STOP_TOKENS} tokens");
        return Err(ApiError::field("stop_token_ids", message));
    }
    let number = |token: &Value| token.as_u64().and_then(|token| u32::try_from(token).ok());
    let wanted = "a list of numbers of tokens";
    tokens.iter().map(|token| number(token).ok_or_else(|| wrong("stop_token_ids", token, wanted))).collect()
}

fn logit_bias(fields: &Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(biases) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    if biases.len() > MOST_BIASES {
        return Err(ApiError::field("logit_bias", format!("`logit_bias` has more than {MOST_BIASES} tokens")));
    }
    let bias = |(token, bias): (&String, &Value)| {
        let number = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        match (token.parse::<u32>(), number) {
            (Ok(token), Some(bias)) => Ok((token, bias as f32)),
            _ => {
                let message = "`logit_bias` maps numbers of tokens to numbers from -100 to 100";
                Err(ApiError::field("logit_bias", format!("{message}, and has {token:?}: {bias}")))
            }
        }
    };
    biases.iter().map(bias).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Result<Asked, ApiError> {
        Asked::read(&Fields::read(value.to_string().as_bytes())?, None)
    }

    #[test]
    fn settings_of_requests() {
        let none = read(&json!({})).expect("nothing is needed");
        assert_eq!((none.model, none.max_tokens, none.stream, none.include_usage), (None, None, false, false));
        let all = json!({
            "model": "m", "max_tokens": 5, "stop": ["a", ""], "stream": true, "stream_options": {"include_usage": true},
            "temperature": 1, "top_p": 0.5, "seed": -1, "top_k": -1, "min_p": null, "logit_bias": {"7": -100},
            "n": 1, "response_format": {"type": "text"}, "user": "somebody", "store": false,
        });
        let all = read(&all).expect("a request");
        assert_eq!((all.max_tokens, all.stop, all.stream), (Some(5), vec!["a".to_owned()], true));
        assert_eq!((all.seed, all.include_usage, all.top_p), (Some(u64::MAX), true, Some(0.5)));
        assert_eq!((all.rules.top_k, all.rules.logit_bias), (0, vec![(7, -100.0)]));
        assert_eq!((all.choices, all.schema), (1, None));
        let object = read(&json!({"n": 3, "response_format": {"type": "json_object"}})).expect("a request");
        assert_eq!((object.choices, object.schema), (3, Some(json!({"type": "object"}))));
        let schema = json!({"enum": [1]});
        let format = json!({"type": "json_schema", "json_schema": {"name": "one", "strict": true, "schema": schema}});
        assert_eq!(read(&json!({"response_format": format})).expect("a request").schema, Some(schema));
        let both = read(&json!({"max_tokens": 5, "max_completion_tokens": 9})).expect("a request");
        assert_eq!(both.max_tokens, Some(9));
        let same = json!({
            "n": 2, "best_of": 2, "suffix": "", "modalities": ["text"], "continue_final_message": false, "top_p": 0,
            "functions": [], "bad_words": [], "use_beam_search": false, "add_generation_prompt": true,
            "service_tier": "auto", "metadata": {"a": "b"}, "prediction": {"type": "content", "content": "x"},
        });
        let same = read(&same).expect("what changes no answer");
        assert!(same.choices == 2 && same.top_p.is_some_and(|top_p| top_p > 0.0));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (value, param) in [
            (json!({"temperature": "hot"}), "temperature"),
            (json!({"temperature": -1}), "temperature"),
            (json!({"top_p": -0.5}), "top_p"),
            (json!({"top_p": 1.5}), "top_p"),
            (json!({"max_tokens": -1}), "max_tokens"),
            (json!({"max_tokens": 1.5}), "max_tokens"),
            (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
            (json!({"model": 3}), "model"),
            (json!({"stop": 3}), "stop"),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
            (json!({"stop": "x".repeat(5000)}), "stop"),
            (json!({"stream": "yes"}), "stream"),
            (json!({"stream_options": {"include_usage": 1}}), "include_usage"),
            (json!({"seed": 0.5}), "seed"),
            (json!({"min_tokens": -1}), "min_tokens"),
            (json!({"min_tokens": 6, "max_tokens": 5}), "min_tokens"),
            (json!({"ignore_eos": 1}), "ignore_eos"),
            (json!({"stop_token_ids": 3}), "stop_token_ids"),
            (json!({"stop_token_ids": [-3]}), "stop_token_ids"),
            (json!({"stop_token_ids": vec![3; 65]}), "stop_token_ids"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"min_p": 2}), "min_p"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"presence_penalty": 3}), "presence_penalty"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias"),
            (json!({"n": 0}), "n"),
            (json!({"n": 129}), "n"),
            (json!({"best_of": 2}), "best_of"),
            (json!({"best_of": 3, "n": 2}), "best_of"),
            (json!({"suffix": "x"}), "suffix"),
            (json!({"modalities": ["text", "audio"]}), "modalities"),
            (json!({"guided_json": {"type": "object"}}), "guided_json"),
            (json!({"continue_final_message": true}), "continue_final_message"),
            (json!({"web_search_options": {}}), "web_search_options"),
            (json!({"echo": 1}), "echo"),
            (json!({"functions": [{"name": "now"}]}), "functions"),
            (json!({"adapters": "runs/support"}), "adapters"),
            (json!({"lora": [{"id": 0, "scale": 1}]}), "lora"),
            (json!({"chat_template": "{{ messages }}"}), "chat_template"),
            (json!({"allowed_token_ids": [5]}), "allowed_token_ids"),
            (json!({"grammar": "root ::= \"x\""}), "grammar"),
            (json!({"add_generation_prompt": false}), "add_generation_prompt"),
            (json!({"response_format": {"type": "grammar"}}), "response_format"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}),
                "response_format.json_schema.schema",
            ),
            (json!([]), "body"),
        ] {
            let error = read(&value).expect_err("refused").object();
            assert_eq!(error["error"]["param"], param, "{value}");
            assert_eq!(error["error"]["type"], "invalid_request_error", "{value}");
        }
        let not_json = Fields::read(b"{\"a\": }").err().expect("refused").object();
        assert!(not_json["error"]["message"].as_str().is_some_and(|text| text.contains("not JSON")), "{not_json}");
    }
}
