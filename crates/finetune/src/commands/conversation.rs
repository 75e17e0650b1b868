//! What the command line asks a model: a text, a question with a system message, or a conversation.

use std::io::Read;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::cli::GenerateArguments;
use crate::failure::Failure;

/// Longest prompt or conversation that is read, in bytes: as a row of a dataset.
const LONGEST: u64 = 16 << 20;

/// What the model continues.
#[derive(Debug, PartialEq)]
pub(super) enum Prompt {
    /// As it is.
    Raw(String),
    /// Through the chat template: an object as a row of `messages` is.
    Chat(Map<String, Value>),
}

/// What the arguments ask. `None` if the rows of a file ask.
pub(super) fn prompt(arguments: &GenerateArguments, say: &dyn Fn(&str)) -> Result<Option<Prompt>, Failure> {
    if let Some(file) = &arguments.messages {
        let text = read("--messages", file)?;
        return conversation(&text, file, say).map(Some);
    }
    let Some(prompt) = &arguments.prompt else { return Ok(None) };
    let prompt = if prompt == "-" {
        let mut text = read("--prompt", Path::new("-"))?;
        // A shell or an editor adds a line break that is not part of the prompt.
        if text.ends_with('\n') {
            text.truncate(text.len() - 1);
        }
        text
    } else {
        prompt.clone()
    };
    if arguments.raw {
        return Ok(Some(Prompt::Raw(prompt)));
    }
    let system = arguments.system.iter().map(|text| json!({"role": "system", "content": text}));
    let messages: Vec<Value> = system.chain([json!({"role": "user", "content": prompt})]).collect();
    Ok(Some(Prompt::Chat(Map::from_iter([("messages".to_owned(), messages.into())]))))
}

/// A file's text, or with `-` that of standard input.
pub(super) fn read(option: &str, file: &Path) -> Result<String, Failure> {
    let from_input = file == Path::new("-");
    let name = if from_input { "standard input".to_owned() } else { file.display().to_string() };
    let mut bytes = Vec::new();
    let read = if from_input {
        std::io::stdin().lock().take(LONGEST + 1).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(LONGEST + 1).read_to_end(&mut bytes))
    };
    let refuse = |what: String, hint: &str| Failure::arguments(format!("{option}: {name} {what}"), hint);
    if let Err(error) = read {
        return Err(refuse(format!("cannot be read: {error}"), "the path is relative to the current directory"));
    }
    if bytes.len() as u64 > LONGEST {
        return Err(refuse(format!("has more than {LONGEST} bytes"), "is this the text you meant?"));
    }
    String::from_utf8(bytes).map_err(|_| refuse("is not UTF-8 text".to_owned(), "save it as UTF-8"))
}

/// A conversation to continue. An answer at its end is what is asked for.
fn conversation(text: &str, file: &Path, say: &dyn Fn(&str)) -> Result<Prompt, Failure> {
    let mut object = object("--messages", text, file)?;
    let messages = object.get_mut("messages").and_then(Value::as_array_mut);
    let left_out = messages.and_then(|messages| messages.pop_if(|message| message["role"] == "assistant"));
    if left_out.is_some() {
        say("the assistant's last message is left out: it is what is asked for");
    }
    if object["messages"] == json!([]) {
        return Err(Failure::arguments(format!("--messages {} has no message to answer", file.display()), WANTED));
    }
    Ok(Prompt::Chat(object))
}

const WANTED: &str = "a list is meant, [{\"role\": \"user\", \"content\": \"Hello\"}], or {\"messages\": [...]}";

/// An object that has `[{"role", "content"}, ...]` in `messages`, or such a list as one. Each message has a role.
/// `option`: what names the file.
pub(super) fn object(option: &str, text: &str, file: &Path) -> Result<Map<String, Value>, Failure> {
    let shown = file.display();
    let value: Value = serde_json::from_str(text.trim_start_matches('\u{feff}')).map_err(|error| {
        let rows = text.lines().filter(|line| line.trim_start().starts_with('{')).count() > 1;
        let hint = if rows { "a file of rows is given to `finetune generate` with --data" } else { WANTED };
        Failure::arguments(format!("{option} {shown} is no JSON: {error}"), hint)
    })?;
    let object = match value {
        Value::Object(object) => object,
        other => Map::from_iter([("messages".to_owned(), other)]),
    };
    let Some(Value::Array(messages)) = object.get("messages") else {
        return Err(Failure::arguments(format!("{option} {shown} holds no list of messages"), WANTED));
    };
    if let Some(place) = messages.iter().position(|message| message.get("role").and_then(Value::as_str).is_none()) {
        return Err(Failure::arguments(format!("{option} {shown}: message {} has no role", place + 1), WANTED));
    }
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (text, messages that are asked, or part of what is said)
    #[test]
    fn conversations_in_their_forms() {
        let user = json!({"role": "user", "content": "Hi"});
        let list = format!("[{user}]");
        let object = format!("{{\"messages\": [{user}], \"tools\": null}}");
        let answered = format!("[{user}, {{\"role\": \"assistant\", \"content\": \"Hello\"}}]");
        for text in [list.as_str(), object.as_str(), answered.as_str()] {
            match conversation(text, Path::new("m.json"), &|_| {}).expect("a conversation") {
                Prompt::Chat(object) => assert_eq!(object["messages"], json!([user]), "{text}"),
                Prompt::Raw(raw) => panic!("{text}: {raw}"),
            }
        }
        for (text, says) in [
            ("{\"text\": 1}", "no list"),
            ("[]", "no message"),
            ("[\"Hi\"]", "message 1 has no role"),
            ("Hi", "no JSON"),
            ("{\"messages\": []}\n{\"messages\": []}", "no JSON"),
        ] {
            match conversation(text, Path::new("m.json"), &|_| {}) {
                Err(failure) => assert!(failure.fact().contains(says), "{text}: {}", failure.fact()),
                Ok(found) => panic!("{text}: {found:?}"),
            }
        }
    }
}
