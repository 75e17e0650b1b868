//! Answers that are free until they call a tool, and then have the form of its calls: for tools with `strict` that the
//! model may call or not.

use serde_json::{Value, json};

use crate::call_form::{Begins, CallForm};
use crate::call_grammar::{self, Rules};
use crate::forms::{Thought, with_main};
use crate::text_grammar::escaped;

/// Whether a tool asks for arguments that fit its `parameters`.
pub(crate) fn is_strict(tool: &Value) -> bool {
    tool["function"]["strict"] == true
}

/// A tool whose arguments may be any object.
pub(crate) fn loosened(tool: &Value) -> Value {
    let name = &tool["function"]["name"];
    json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
}

/// The text of a grammar: text as the model likes, which a call may follow. `one`: of calls there is one only.
///
/// Text has nothing that reads as the beginning of a call, so no call is there that has another form.
///
/// # Errors
/// A sentence that says what of the tools cannot be kept in the form of this model's calls.
pub(crate) fn grammar(
    form: &CallForm,
    begins: Begins,
    tools: &[&Value],
    one: bool,
    thought: Thought,
) -> Result<String, String> {
    let mark = if let Begins::Mark(mark) = begins { mark } else { "" };
    let Rules { text: of_calls, grammars } = call_grammar::calls(form, tools, one, mark)?;
    let mut rules = match thought {
        Thought::Not => "start: free\n".to_owned(),
        Thought::May(open, close) => {
            format!("start: free | OPENED thinking free\nOPENED: /\\s{{0,8}}{}/\n{}", escaped(open), until(close))
        }
        Thought::Opened(close) => format!("start: thinking free\n{}", until(close)),
    };
    // What begins with a tag of reasoning is reasoning.
    let not_thought = match thought {
        Thought::May(open, _) => format!(" & ~/\\s*{}(?s:.*)/", escaped(open)),
        Thought::Not | Thought::Opened(_) => String::new(),
    };
    let of_call = match begins {
        Begins::Mark(mark) => format!("(?s:.*){}", escaped(mark)),
        Begins::Json => "\\s*\\{".to_owned(),
        Begins::List => {
            let names = tools.iter().filter_map(|tool| tool["function"]["name"].as_str()).map(escaped);
            format!("\\s*\\[\\s*({})\\s*\\(", names.collect::<Vec<_>>().join("|"))
        }
    };
    rules += &format!("TEXT: /(?s:.+)/ & ~/{of_call}(?s:.*)/{not_thought}\n");
    rules += &match begins {
        Begins::Mark(mark) => format!(
            "free: TEXT? | before calls\nbefore[lazy]: BEFORE\nBEFORE: /(?s:.*){}/{not_thought}\n",
            escaped(mark)
        ),
        Begins::Json | Begins::List => "free: TEXT? | calls\n".to_owned(),
    };
    Ok(with_main(rules + &of_calls, grammars))
}

/// The rule of reasoning up to the tag that closes it.
fn until(close: &str) -> String {
    format!("thinking[lazy]: /(?s:.*){}/\n", escaped(close))
}
