//! Forms of gpt-oss's answers: reasoning in a channel of its own, then JSON in the final one, or a call.

use finetune_dataset::ChatTokenizer;
use serde_json::{Value, json};

use crate::forms::{arguments, quoted, with_space};
use crate::harmony::{CHANNEL, CONSTRAIN, END, FUNCTIONS, MESSAGE, START};

/// The tokens of the marks, as a grammar names them. They are special tokens, which no text has.
struct Marks {
    start: String,
    channel: String,
    constrain: String,
    message: String,
    end: String,
}

impl Marks {
    fn of(tokenizer: &ChatTokenizer) -> Option<Marks> {
        let token = |mark: &str| Some(format!("<[{}]>", tokenizer.token_to_id(mark)?));
        Some(Marks {
            start: token(START)?,
            channel: token(CHANNEL)?,
            constrain: token(CONSTRAIN)?,
            message: token(MESSAGE)?,
            end: token(END)?,
        })
    }
}

/// What an answer may be beside a call.
pub(crate) enum Final<'a> {
    /// Nothing.
    Not,
    /// JSON of this schema.
    Json(&'a Value),
    /// As the model likes.
    Free,
}

/// The text of a grammar: what may stand in the final channel, or a call of one of the tools, or what the model likes
/// of both. `opened`: the header that the prompt has put in front of the answer.
///
/// # Errors
/// A sentence that says why this model's answers cannot have a form.
pub(crate) fn grammar(
    tokenizer: &ChatTokenizer,
    opened: Option<&str>,
    answer: &Final<'_>,
    tools: &[&Value],
) -> Result<String, String> {
    let Marks { start, channel, constrain, message, end } =
        Marks::of(tokenizer).ok_or("the tokenizer lacks marks of the model's channels")?;
    if opened != Some("assistant") {
        return Err("the chat template opens the answer in another way than with `<|start|>assistant`".to_owned());
    }
    let body = match (answer, tools.is_empty()) {
        (Final::Not, _) => "call",
        (_, true) => "final",
        (_, false) => "final | call",
    };
    // What a model says before it calls is as free as its answer.
    let before = if matches!(answer, Final::Free) { "(\"analysis\" | \"commentary\")" } else { "\"analysis\"" };
    let mut rules = format!(
        "start: thought* body\n\
         thought: {channel} {before} {message} TEXT? {end} {start} \"assistant\"\n\
         TEXT: /(?s:.+)/\n\
         body: {body}\n"
    );
    let mut others = Vec::new();
    let within = match answer {
        Final::Not => None,
        Final::Json(schema) => {
            others.push(json!({"name": "answer", "json_schema": with_space(schema)}));
            Some("@answer")
        }
        Final::Free => Some("TEXT?"),
    };
    if let Some(within) = within {
        rules += &format!("final: {channel} \"final\" (\" \" {constrain} \"json\")? {message} {within}\n");
    }
    let mut alternatives = Vec::new();
    for (n, tool) in tools.iter().enumerate() {
        let receiver = format!("to={FUNCTIONS}{}", tool["function"]["name"].as_str().unwrap_or_default());
        // As the models write it, and as their template does.
        let model = format!("{channel} {} {constrain} \"json\" {message}", quoted(&format!("commentary {receiver} ")));
        let template = format!("{} {channel} \"commentary json\" {message}", quoted(&format!(" {receiver}")));
        rules += &format!("header{n}: {model} | {template}\n");
        alternatives.push(format!("header{n} @tool{n}"));
        others.push(json!({"name": format!("tool{n}"), "json_schema": arguments(tool)}));
    }
    if !alternatives.is_empty() {
        rules += &format!("call: {}\n", alternatives.join(" | "));
    }
    others.insert(0, json!({"name": "main", "lark_grammar": rules}));
    Ok(json!({"grammars": others}).to_string())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::forms::tests::fits;
    use crate::grammar::Grammars;

    /// The tokenizer of the quickstart with the marks as special tokens.
    #[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
    fn tokenizer() -> ChatTokenizer {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/quickstart/base");
        let folder = tempfile::tempdir().expect("a directory");
        for entry in std::fs::read_dir(&base).expect("a directory") {
            let file = entry.expect("a file").path();
            if file.extension().is_some_and(|extension| extension == "json") {
                let name = file.file_name().expect("a name");
                std::fs::copy(&file, folder.path().join(name)).expect("copied");
            }
        }
        let file = folder.path().join("tokenizer.json");
        let text = std::fs::read_to_string(&file).expect("a text");
        let mut tokenizer: Value = serde_json::from_str(&text).expect("JSON");
        let first = ChatTokenizer::load(&base, None).expect("a tokenizer").vocab_size();
        let added = tokenizer["added_tokens"].as_array_mut().expect("a list");
        let there: Vec<String> = added.iter().filter_map(|token| Some(token["content"].as_str()?.to_owned())).collect();
        let new = crate::harmony::MARKS.into_iter().filter(|mark| !there.iter().any(|token| token == mark));
        for (n, mark) in new.enumerate() {
            added.push(json!({
                "id": first + n, "content": mark, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }));
        }
        std::fs::write(&file, tokenizer.to_string()).expect("written");
        ChatTokenizer::load(folder.path(), None).expect("a tokenizer")
    }

    #[test]
    fn forms_stand_in_their_channels() {
        let tokenizer = tokenizer();
        let ends = [
            tokenizer.token_to_id("<|return|>").expect("a token"),
            tokenizer.token_to_id("<|call|>").expect("a token"),
        ];
        let grammars = Grammars::of(&tokenizer, &ends, &[]).expect("a vocabulary of bytes");
        let object = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": false});
        let zone = json!({"type": "object", "properties": {"zone": {"type": "integer"}}, "required": ["zone"]});
        let now = json!({"type": "function", "function": {"name": "now", "parameters": zone}});
        let json = "<|channel|>final<|message|>{\"a\": 1}";
        let thought = "<|channel|>analysis<|message|>hm, {\"a\"<|end|><|start|>assistant";
        let call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{\"zone\": 1}";
        let of_template = " to=functions.now<|channel|>commentary json<|message|>{\"zone\": 1}";
        let (json_only, none) = (Final::Json(&object), Final::Not);
        let answers = |schema| if schema { &json_only } else { &none };
        for (schema, tools, text, want) in [
            (true, vec![], json.to_owned(), true),
            (true, vec![], format!("{thought}{json}"), true),
            (true, vec![], format!("{thought}{thought}{json}"), true),
            (true, vec![], json.replace("final", "final <|constrain|>json"), true),
            (true, vec![], "{\"a\": 1}".to_owned(), false),
            (true, vec![], json.replace("final", "commentary"), false),
            (true, vec![], json.replace("1", "true"), false),
            (true, vec![], json.replace("}", ""), false),
            (true, vec![], thought.to_owned(), false),
            (true, vec![], call.to_owned(), false),
            (false, vec![&now], call.to_owned(), true),
            (false, vec![&now], format!("{thought}{call}"), true),
            (false, vec![&now], of_template.to_owned(), true),
            (false, vec![&now], call.replace("now", "later"), false),
            (false, vec![&now], call.replace("1", "\"x\""), false),
            (false, vec![&now], json.to_owned(), false),
            (true, vec![&now], json.to_owned(), true),
            (true, vec![&now], format!("{thought}{call}"), true),
        ] {
            let grammar = grammar(&tokenizer, Some("assistant"), answers(schema), &tools).expect("a grammar");
            assert_eq!(fits(&grammars, &tokenizer, &grammar, &text, ends[0]), want, "{text}");
        }
        for opened in [None, Some("assistant<|channel|>final<|message|>")] {
            assert!(grammar(&tokenizer, opened, &json_only, &[]).is_err_and(|error| error.contains("template")));
        }
        let plain = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/quickstart/base");
        let plain = ChatTokenizer::load(&plain, None).expect("a tokenizer");
        let refused = grammar(&plain, Some("assistant"), &json_only, &[]);
        assert!(refused.is_err_and(|error| error.contains("channels")));

        // A tool that may be called or not: the answer and what is said before a call are free, and a call is not.
        let free = grammar(&tokenizer, Some("assistant"), &Final::Free, &[&now]).expect("a grammar");
        let said = "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant";
        for (text, want) in [
            ("<|channel|>final<|message|>Hello {\"a\"".to_owned(), true),
            ("<|channel|>final<|message|>".to_owned(), true),
            (format!("{thought}<|channel|>final<|message|>Hello"), true),
            (format!("{thought}{said}{call}"), true),
            (format!("{thought}{of_template}"), true),
            (call.replace("1", "\"x\""), false),
            (call.replace("now", "later"), false),
            (call.replace("commentary", "analysis"), false),
        ] {
            assert_eq!(fits(&grammars, &tokenizer, &free, &text, ends[0]), want, "{text}");
        }
    }
}
