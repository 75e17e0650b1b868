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
    pub(crate) stream: bool,
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
const UNSUPPORTED: [(&str, &str); 12] = [
    ("functions", "send `tools`"),
    ("function_call", "send `tool_choice`"),
    ("suffix", "text is only continued"),
    ("audio", "there is only text"),
    ("prompt_logprobs", "there are `logprobs` of the answer"),
    ("web_search_options", "there is nothing to search with"),
    ("continue_final_message", "send `/v1/completions` the text to continue"),
    // vLLM's. Without them an answer would have any form.
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
        let rules = TokenRules {
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
            stream: fields.flag("stream")?.unwrap_or(false),
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
        match self.rules.logit_bias.iter().find(|(token, _)| *token as usize >= vocabulary) {
            None => Ok(()),
            Some((token, _)) => {
                let message = format!("`logit_bias` has the token {token}, and the model has {vocabulary} tokens");
                Err(ApiError::field("logit_bias", message))
            }
        }
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
            TokenRules { sampling, ..self.rules.clone() }
        };
        Ok((0..).take(self.choices).map(of_choice).collect())
    }
}

fn refuse_unsupported(fields: &Fields, choices: i64) -> Result<(), ApiError> {
    for (name, instead) in UNSUPPORTED {
        if fields.get(name).is_some_and(|value| *value != false && *value != "") {
            return Err(ApiError::unsupported(name, format!("`{name}` is not supported: {instead}")));
        }
    }
    if fields.list("modalities")?.is_some_and(|all| all.iter().any(|one| *one != "text")) {
        return Err(ApiError::unsupported("modalities", "`modalities` may be [\"text\"]: there is only text"));
    }
    if fields.whole("best_of", 1..=i64::MAX)?.is_some_and(|number| number > choices) {
        let message = "`best_of` above `n` is not supported: ask for `n` answers with `logprobs`";
        return Err(ApiError::unsupported("best_of", message));
    }
    if fields.flag("echo")? == Some(true) {
        return Err(ApiError::unsupported("echo", "`echo` is not supported: the prompt is known"));
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
            (json!({"echo": true}), "echo"),
            (json!({"functions": []}), "functions"),
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
