//! How the chat template of a model writes calls of tools, so that a grammar can ask for the same: found out by letting
//! it write two of them.

use finetune_dataset::ChatTokenizer;
use serde_json::{Deserializer, Value, json};

use crate::call_formats::{CallFormat, Notation};
use crate::literals::{Literals, QUOTE};
use crate::messages::with_texts_of_arguments;
use crate::tool_calls::{CallReader, ToolCall, Tools};

/// Two tools that show how a template writes calls.
const SAMPLES: [&str; 2] = ["sample_name", "sample_other"];
/// Their arguments: of keys in the order of the alphabet, as some templates sort them.
const KEYS: [&str; 2] = ["first_key", "second_key"];
const TEXT: &str = "sample_value";
const NUMBER: &str = "7";
/// Bytes of the longest mark that is looked for: a template may write any number of `<`.
const LONGEST_MARK: usize = 200;
/// Names of calls that templates take: Mistral's takes nine letters, and Kimi's has the tool in it.
const IDS: [[&str; 2]; 2] = [["callabcde", "callfghij"], ["functions.sample_name:0", "functions.sample_other:1"]];

/// What a template writes around the parts of calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallForm {
    /// In front of the name of the first call.
    pub(crate) open: String,
    /// Between the arguments of a call and the name of the next one. `None`: the template writes only one call.
    pub(crate) next: Option<String>,
    /// Behind the arguments of the last call.
    pub(crate) close: String,
    pub(crate) arguments: Arguments,
}

/// What tells calls from text in an answer that may have both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begins {
    /// This mark, wherever it stands.
    Mark(&'static str),
    /// An answer that begins with an object of JSON.
    Json,
    /// An answer that begins with a list in Python of calls.
    List,
}

/// How the arguments of a call are written, from its name on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Arguments {
    /// A JSON object behind this text. `counted`: the number of the call stands in front of that.
    Json { between: String, counted: bool },
    /// Each between marks: a text as it is, others as JSON.
    Tagged(Tags),
    /// `{KEY:VALUE,...}` with Gemma 4's marks around texts.
    Gemma,
    /// `(KEY=VALUE, ...)` with literals of Python.
    Python,
}

/// The marks of arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tags {
    /// Behind the name of the tool.
    pub(crate) begin: String,
    /// In front of a key, between it and its value, and behind the value.
    pub(crate) key: String,
    pub(crate) value: String,
    pub(crate) end: String,
}

impl CallForm {
    /// Of the template of a model that is read by these formats. `None`: it writes no calls, or in a way that none of
    /// them reads.
    pub(crate) fn of(tokenizer: &ChatTokenizer, formats: &[&'static CallFormat]) -> Option<CallForm> {
        let is_other = |mark: &str| tokenizer.token_to_id(mark).is_some_and(|id| tokenizer.is_special(id));
        let written = IDS.iter().find_map(|ids| {
            let texts = [2, 1].map(|count| rendered(tokenizer, ids, count));
            texts.iter().flatten().find_map(|text| CallForm::in_text(text, formats, &is_other))
        });
        // The first template of LFM2 leaves calls to whoever writes the message.
        written.or_else(|| {
            let is_known = tokenizer.token_to_id("<|tool_call_start|>").is_some();
            is_known.then(|| CallForm {
                open: "<|tool_call_start|>[".to_owned(),
                next: Some(", ".to_owned()),
                close: "]<|tool_call_end|>".to_owned(),
                arguments: Arguments::Python,
            })
        })
    }

    /// What a text that has one or two calls of the samples shows. `is_special`: whether this is a token that has no
    /// text of its own.
    fn in_text(text: &str, formats: &[&'static CallFormat], is_special: &dyn Fn(&str) -> bool) -> Option<CallForm> {
        // Names and keys are also where the tools are described.
        let value = text.find(TEXT)?;
        let name = text[..value].rfind(SAMPLES[0])?;
        let begins = |format: &CallFormat| format.begins.iter().filter_map(|mark| text[..name].rfind(mark)).min();
        let of_formats = formats.iter().filter_map(|format| {
            let is_end = |mark: &str| is_special(mark) && !format.marks.contains(&mark);
            CallForm::parse(&text[begins(format)?..], format.notation, &is_end)
        });
        // Llama's calls are JSON and nothing else.
        let as_json = text[..name].rfind('{').and_then(|begin| {
            let is_json = |form: &CallForm| matches!(form.arguments, Arguments::Json { .. });
            CallForm::parse(&text[begin..], Notation::Json, is_special).filter(is_json)
        });
        let mut of_all = of_formats.chain(as_json).chain(CallForm::of_python_list(text, name));
        of_all.find(|form| form.is_read_by(formats))
    }

    /// Llama's other form: `[NAME(KEY=VALUE), ...]` and nothing else. `name`: where the name of the first call stands.
    /// How the template writes values does not matter: some leave out the quotes of texts, and others have them around
    /// numbers, too.
    fn of_python_list(text: &str, name: usize) -> Option<CallForm> {
        let behind = text[name..].strip_prefix(SAMPLES[0])?;
        if !text[..name].ends_with('[') || !behind.starts_with(&format!("({}=", KEYS[0])) {
            return None;
        }
        let is_next = |next: &&str| behind.contains(&format!("){next}{}(", SAMPLES[1]));
        let next = [", ", ","].into_iter().find(is_next).map(str::to_owned);
        Some(CallForm { open: "[".to_owned(), next, close: "]".to_owned(), arguments: Arguments::Python })
    }

    /// `text`: from the first mark of the calls on. `is_end`: whether this is a token behind them.
    fn parse(text: &str, notation: Notation, is_end: &dyn Fn(&str) -> bool) -> Option<CallForm> {
        let (open, behind_name) = text.split_once(SAMPLES[0])?;
        let (arguments, behind) = Arguments::parse(behind_name, notation)?;
        let (next, behind) = match behind.split_once(SAMPLES[1]) {
            None => (None, behind),
            Some((next, behind_name)) => (Some(without_id(next)), Arguments::parse(behind_name, notation)?.1),
        };
        let close = without_id(&behind[..end_of_calls(behind, is_end)]);
        Some(CallForm { open: open.to_owned(), next, close: close.trim_end().to_owned(), arguments })
    }

    /// Whether a call that is written so is read as what it is.
    fn is_read_by(&self, formats: &[&'static CallFormat]) -> bool {
        let text = Value::from(TEXT);
        let (arguments, [first, second]) = (json!({KEYS[0]: text, KEYS[1]: 7}), KEYS);
        let written = match &self.arguments {
            Arguments::Json { between, counted } => {
                let number = if *counted { ":0" } else { "" };
                format!("{number}{between}{arguments}")
            }
            Arguments::Tagged(Tags { begin, key, value, end }) => {
                format!("{begin}{key}{first}{value}{TEXT}{end}{key}{second}{value}{NUMBER}{end}")
            }
            Arguments::Gemma => format!("{{{first}:{QUOTE}{TEXT}{QUOTE},{second}:{NUMBER}}}"),
            Arguments::Python => format!("({first}={text}, {second}={NUMBER})"),
        };
        let properties = json!({KEYS[0]: {"type": "string"}, KEYS[1]: {"type": "integer"}});
        let tool = json!({"function": {"name": SAMPLES[0], "parameters": {"properties": properties}}});
        let mut reader = CallReader::new(formats.to_vec(), Tools::new(json!([tool])));
        let shown = reader.push(&format!("{}{}{written}{}", self.open, SAMPLES[0], self.close));
        let (rest, calls) = reader.finish();
        let is_meant = |call: &ToolCall| {
            call.name == SAMPLES[0] && serde_json::from_str::<Value>(&call.arguments).is_ok_and(|got| got == arguments)
        };
        shown.trim().is_empty() && rest.is_empty() && calls.len() == 1 && calls.iter().all(is_meant)
    }

    /// Whether arguments are a JSON object.
    pub(crate) fn is_json(&self) -> bool {
        matches!(self.arguments, Arguments::Json { .. })
    }

    /// What begins calls of this form, which one of the formats reads.
    pub(crate) fn begins(&self, formats: &[&'static CallFormat]) -> Begins {
        let marks = formats.iter().flat_map(|format| format.begins).copied();
        match marks.filter(|mark| self.open.starts_with(mark)).max_by_key(|mark| mark.len()) {
            Some(mark) => Begins::Mark(mark),
            None if self.open.starts_with('{') => Begins::Json,
            None => Begins::List,
        }
    }

    /// The marks of formats that calls have: their tokens are text of these answers.
    pub(crate) fn marks(&self, formats: &[&'static CallFormat]) -> Vec<&'static str> {
        let of_arguments = match &self.arguments {
            Arguments::Json { between, .. } => between.clone(),
            Arguments::Tagged(Tags { begin, key, value, end }) => [begin, key, value, end].map(String::as_str).concat(),
            Arguments::Gemma => QUOTE.to_owned(),
            Arguments::Python => String::new(),
        };
        let text = [&self.open, self.next.as_ref().unwrap_or(&self.close), &self.close, &of_arguments];
        let has = |mark: &&str| text.iter().any(|text| text.contains(mark));
        formats.iter().flat_map(|format| format.marks).copied().filter(has).collect()
    }
}

impl Arguments {
    /// The arguments of a sample that a text begins with, and what is behind them.
    fn parse(text: &str, notation: Notation) -> Option<(Arguments, &str)> {
        let want = json!({KEYS[0]: TEXT, KEYS[1]: 7});
        match notation {
            Notation::Json => {
                let (between, rest) = text.split_at(text.find('{')?);
                let mut values = Deserializer::from_str(rest).into_iter::<Value>();
                if values.next()?.ok()? != want {
                    return None;
                }
                let number = [":0", ":1"].iter().find_map(|number| between.strip_prefix(number));
                let (between, counted) = (number.unwrap_or(between).to_owned(), number.is_some());
                Some((Arguments::Json { between, counted }, rest.get(values.byte_offset()..)?))
            }
            Notation::Tagged(mark) => {
                let (before, rest) = text.split_once(KEYS[0])?;
                let (begin, key) = before.split_at(before.rfind(mark)?);
                let (value, rest) = rest.split_once(TEXT)?;
                let (between, rest) = rest.split_once(KEYS[1])?;
                let end = between.strip_suffix(key)?;
                let rest = rest.strip_prefix(value)?.strip_prefix(NUMBER)?.strip_prefix(end)?;
                let [begin, key, value, end] = [begin, key, value, end].map(str::to_owned);
                Some((Arguments::Tagged(Tags { begin, key, value, end }), rest))
            }
            Notation::Gemma => {
                let mut literals = Literals::new(text.strip_prefix('{')?);
                let read = literals.object("}", ":")?;
                (Value::Object(read) == want).then(|| (Arguments::Gemma, literals.rest()))
            }
            Notation::Python => {
                let mut literals = Literals::new(text.strip_prefix('(')?);
                let read = literals.object(")", "=")?;
                (Value::Object(read) == want).then(|| (Arguments::Python, literals.rest()))
            }
        }
    }
}

/// A conversation with so many calls, as the template writes it.
fn rendered(tokenizer: &ChatTokenizer, ids: &[&str; 2], count: usize) -> Option<String> {
    let arguments = json!({KEYS[0]: TEXT, KEYS[1]: 7});
    let call =
        |n: usize| json!({"id": ids[n], "type": "function", "function": {"name": SAMPLES[n], "arguments": arguments}});
    let schema = json!({
        "type": "object",
        "properties": {KEYS[0]: {"type": "string", "description": ""}, KEYS[1]: {"type": "integer", "description": ""}},
    });
    let tool = |n: usize| {
        let function = json!({"name": SAMPLES[n], "description": "", "parameters": schema});
        json!({"type": "function", "function": function})
    };
    let calls: Vec<Value> = (0..count).map(call).collect();
    let messages =
        [json!({"role": "user", "content": "x"}), json!({"role": "assistant", "content": "", "tool_calls": calls})];
    let tools = json!([tool(0), tool(1)]);
    let render = |messages: &[Value]| tokenizer.render(messages, Some(&tools), false).ok();
    // DeepSeek's template puts arguments beside texts.
    let rendered = render(&messages).or_else(|| render(&with_texts_of_arguments(&messages)?))?;
    Some(rendered.text)
}

/// Where the first token is that is no part of calls.
fn end_of_calls(text: &str, is_end: &dyn Fn(&str) -> bool) -> usize {
    let mark = |begin: usize| {
        let close = if text[begin..].starts_with('<') { b'>' } else { b']' };
        let length = text.bytes().skip(begin).take(LONGEST_MARK).position(|byte| byte == close)?;
        text.get(begin..=begin + length)
    };
    let mut begins = text.match_indices(['<', '[']).map(|(begin, _)| begin);
    begins.find(|&begin| mark(begin).is_some_and(is_end)).unwrap_or(text.len())
}

/// Mistral's templates write the name of a call behind its arguments. Models need not: this server gives calls names.
fn without_id(text: &str) -> String {
    let ids = IDS[0].iter().map(|id| format!(", \"id\": \"{id}\""));
    ids.fold(text.to_owned(), |text, id| text.replacen(&id, "", 1))
}

#[cfg(test)]
mod tests;
