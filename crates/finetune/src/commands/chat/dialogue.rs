//! The messages of a conversation: what is asked, answered, taken back and left out.

use finetune_dataset::Asked;
use serde_json::{Value, json};

/// A message, and whether it is an answer that did not come to its end.
#[derive(Clone, Debug, PartialEq)]
struct Message {
    value: Value,
    unfinished: bool,
}

impl Message {
    fn role(&self) -> &str {
        self.value["role"].as_str().unwrap_or_default()
    }

    fn is_from_user(&self) -> bool {
        self.role() == "user"
    }
}

/// A conversation.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Dialogue {
    messages: Vec<Message>,
    tools: Option<Value>,
    /// Further variables of the template.
    variables: Vec<(String, Value)>,
}

impl Dialogue {
    /// One that has only a system prompt. There is none if it is empty.
    pub(super) fn new(system: Option<&str>) -> Dialogue {
        let system = system.filter(|text| !text.is_empty());
        let messages = system.map(|text| json!({"role": "system", "content": text})).into_iter().collect();
        Dialogue::of(Asked { messages, ..Asked::default() })
    }

    /// One that has begun already. A weight of 0 marks an unfinished answer.
    pub(super) fn of(asked: Asked) -> Dialogue {
        let messages = asked.messages.into_iter().map(|mut value| {
            let weight = value.as_object_mut().and_then(|object| object.shift_remove("weight"));
            Message { unfinished: weight.is_some_and(|weight| weight.as_f64() == Some(0.0)), value }
        });
        Dialogue { messages: messages.collect(), tools: asked.tools, variables: asked.variables }
    }

    /// The messages, as the chat template takes them.
    pub(super) fn messages(&self) -> Vec<Value> {
        self.messages.iter().map(|message| message.value.clone()).collect()
    }

    pub(super) fn tools(&self) -> Option<&Value> {
        self.tools.as_ref()
    }

    pub(super) fn variables(&self) -> &[(String, Value)] {
        &self.variables
    }

    /// The text of the system prompt.
    pub(super) fn system(&self) -> Option<&str> {
        let first = self.messages.first().filter(|message| message.role() == "system")?;
        first.value["content"].as_str()
    }

    /// Messages in front of the first question: system prompts.
    fn head(&self) -> usize {
        let is_system = |message: &&Message| matches!(message.role(), "system" | "developer");
        self.messages.iter().take_while(is_system).count()
    }

    /// Forgets all but the system prompt.
    pub(super) fn reset(&mut self) {
        self.messages.truncate(self.head());
    }

    pub(super) fn ask(&mut self, text: String) {
        self.messages.push(Message { value: json!({"role": "user", "content": text}), unfinished: false });
    }

    pub(super) fn answer(&mut self, text: String, unfinished: bool) {
        self.messages.push(Message { value: json!({"role": "assistant", "content": text}), unfinished });
    }

    /// Whether the last message waits for an answer.
    pub(super) fn is_open(&self) -> bool {
        self.messages.len() > self.head() && self.messages.last().is_some_and(|message| message.role() != "assistant")
    }

    /// Takes the last question and all behind it back. Returns its text; `None`: nothing was asked.
    pub(super) fn take_back(&mut self) -> Option<String> {
        let last = self.messages.iter().rposition(Message::is_from_user)?;
        let question = self.messages[last].value["content"].as_str().unwrap_or_default().to_owned();
        self.messages.truncate(last);
        Some(question)
    }

    /// Takes the last answer back, so that its question waits for another one. False: there is
    /// none.
    pub(super) fn reopen(&mut self) -> bool {
        let Some(last) = self.messages.iter().rposition(Message::is_from_user) else { return false };
        // Results of tools belong to the question.
        let rest = self.messages[last..].iter().rposition(|message| message.role() != "assistant").unwrap_or(0);
        self.messages.truncate(last + rest + 1);
        true
    }

    /// Leaves the oldest question with its answer out. False: only the last question is left.
    pub(super) fn drop_oldest(&mut self) -> bool {
        let head = self.head();
        let mut questions = (head..self.messages.len()).filter(|at| self.messages[*at].is_from_user());
        // What stands before the first question goes with it.
        let Some(next) = questions.find(|at| *at > head) else { return false };
        self.messages.drain(head..next);
        true
    }

    /// Questions with an answer.
    pub(super) fn exchanges(&self) -> usize {
        let answered = |pair: &[Message]| pair[0].role() != "assistant" && pair[1].role() == "assistant";
        self.messages.windows(2).filter(|pair| answered(pair)).count()
    }

    /// The conversation as a training row, up to its last answer. Unfinished answers are not
    /// trained on: they have the weight 0. `None`: nothing was answered.
    pub(super) fn row(&self) -> Option<(Value, usize)> {
        let end = self.messages.iter().rposition(|message| message.role() == "assistant")? + 1;
        let mut unfinished = 0;
        let messages = self.messages[..end].iter().map(|message| {
            let mut value = message.value.clone();
            if message.unfinished {
                value["weight"] = json!(0);
                unfinished += 1;
            }
            value
        });
        let mut row = json!({"messages": messages.collect::<Vec<Value>>()});
        if let Some(tools) = &self.tools {
            row["tools"] = tools.clone();
        }
        for (name, value) in &self.variables {
            match name.as_str() {
                "documents" => row["documents"] = value.clone(),
                _ => row["chat_template_kwargs"][name] = value.clone(),
            }
        }
        Some((row, unfinished))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `s` system, `u` user, `a` assistant, `A` an answer that was stopped, `t` tool; each with the
    /// number of its place.
    fn dialogue(roles: &str) -> Dialogue {
        let messages = roles.chars().enumerate().map(|(n, role)| {
            let name = match role {
                's' => "system",
                'u' => "user",
                't' => "tool",
                _ => "assistant",
            };
            let value = json!({"role": name, "content": n.to_string()});
            Message { value, unfinished: role == 'A' }
        });
        Dialogue { messages: messages.collect(), ..Dialogue::default() }
    }

    /// The places of the messages that are left.
    fn left(dialogue: &Dialogue) -> String {
        dialogue.messages.iter().filter_map(|message| message.value["content"].as_str()).collect()
    }

    #[test]
    fn the_last_question_is_taken_back_or_asked_again() {
        for (roles, taken, undone, reopened) in [
            ("", None, "", false),
            ("s", None, "0", false),
            ("sua", Some("1"), "0", true),
            ("uaua", Some("2"), "01", true),
            ("uau", Some("2"), "01", true),
            ("uatA", Some("0"), "", true),
            ("uata", Some("0"), "", true),
        ] {
            let mut talk = dialogue(roles);
            assert_eq!((talk.take_back().as_deref(), left(&talk).as_str()), (taken, undone), "{roles}");
            let mut talk = dialogue(roles);
            assert_eq!(talk.reopen(), reopened, "{roles}");
            assert!(!reopened || talk.is_open(), "{roles}: {}", left(&talk));
        }
        let mut talk = dialogue("uata");
        talk.reopen();
        assert_eq!(left(&talk), "012", "the result of a tool stays");
    }

    #[test]
    fn the_oldest_goes_first_and_the_last_question_stays() {
        for (roles, steps) in [
            ("suauau", vec!["0345", "05"]),
            ("uau", vec!["2"]),
            ("su", vec![]),
            ("s", vec![]),
            ("au", vec!["1"]),
            ("uatau", vec!["4"]),
        ] {
            let mut talk = dialogue(roles);
            let mut got = Vec::new();
            while talk.drop_oldest() {
                got.push(left(&talk));
            }
            assert_eq!(got, steps, "{roles}");
        }
    }

    #[test]
    fn a_row_has_what_was_answered() {
        assert_eq!(dialogue("su").row(), None);
        let (row, unfinished) = dialogue("suAuau").row().expect("a row");
        assert_eq!((row["messages"].as_array().map(Vec::len), unfinished), (Some(5), 1));
        assert_eq!(row["messages"][2]["weight"], 0);
        assert!(row["messages"][4].get("weight").is_none());
        let messages = row["messages"].as_array().expect("messages").clone();
        let again = Dialogue::of(Asked { messages, ..Asked::default() });
        assert_eq!(again, dialogue("suAua"), "what is saved is what is loaded");
    }

    #[test]
    fn a_row_has_its_variables() {
        let mut talk = dialogue("ua");
        let documents = json!([{"text": "Rome"}]);
        talk.variables = vec![("documents".to_owned(), documents.clone()), ("tone".to_owned(), json!("kind"))];
        let (row, _) = talk.row().expect("a row");
        assert_eq!((&row["documents"], &row["chat_template_kwargs"]), (&documents, &json!({"tone": "kind"})));
    }

    #[test]
    fn a_system_prompt_outlives_a_reset() {
        let mut talk = Dialogue::new(Some("Be brief."));
        talk.ask("Hi".to_owned());
        assert!(talk.is_open());
        talk.answer("Hello.".to_owned(), false);
        assert!(!talk.is_open());
        assert_eq!((talk.exchanges(), talk.system()), (1, Some("Be brief.")));
        talk.reset();
        assert_eq!((talk.exchanges(), talk.system()), (0, Some("Be brief.")));
        assert!(!talk.is_open(), "a system prompt asks nothing");
        assert_eq!(Dialogue::new(Some("")).system(), None);
    }
}
