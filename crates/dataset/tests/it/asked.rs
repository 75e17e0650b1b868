//! A conversation that is to be answered is asked as a row of it would be trained on, or refused by name.

use serde_json::{Value, json};

use crate::made_up::Model;

/// The prompt, or why there is none.
fn asked(template: &str, object: &Value) -> String {
    let tokenizer = Model::new(Some(template)).tokenizer();
    let object = object.as_object().cloned().expect("an object");
    let asked = match tokenizer.read_asked(object) {
        Ok(asked) => asked,
        Err(error) => return format!("refused: {error}"),
    };
    tokenizer.render_with(&asked.messages, asked.tools.as_ref(), &asked.variables, true).expect("a prompt").text
}

/// Takes texts and objects of arguments, of three roles.
const TEXTS: &str = "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}\
    {{ m.role }}:{{ m.content }}\
    {% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %};\
    {% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}{{ tone }}";

#[test]
fn conversations_have_the_form_that_the_template_takes() {
    let user = json!({"role": "user", "content": "a"});
    let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
    let call = json!({"type": "function", "function": {"name": "look", "arguments": "{\"x\": 1}"}});
    let calls = json!({"role": "assistant", "content": null, "tool_calls": [call]});
    for (object, want) in [
        (json!({"messages": [user]}), "user:a;assistant:"),
        (json!({"messages": [parts]}), "user:ab;assistant:"),
        (json!({"messages": [user, calls, user]}), "user:a;assistant:look{\"x\": 1};user:a;assistant:"),
        (json!({"messages": [user], "system": "s"}), "system:s;user:a;assistant:"),
        (json!({"messages": [user], "chat_template_kwargs": {"tone": "kind"}}), "user:a;assistant:kind"),
        (json!({"messages": [user], "tools": null}), "user:a;assistant:"),
    ] {
        assert_eq!(asked(TEXTS, &object), want, "{object}");
    }
}

#[test]
fn what_would_be_left_out_is_refused() {
    let user = json!({"role": "user", "content": "a"});
    let ghost = json!({"role": "ghost", "content": "b"});
    let image = json!({"role": "user", "content": [{"type": "image", "image": "x"}]});
    let tools = json!([{"type": "function", "function": {"name": "look"}}]);
    for (template, object, says) in [
        (
            TEXTS,
            json!({"messages": [ghost, user]}),
            "messages[0].content: the chat template leaves this ghost text out",
        ),
        (TEXTS, json!({"messages": [user, image]}), "messages[1].content[0]"),
        (TEXTS, json!({"messages": [{"role": "user", "content": null}]}), "messages[0].content"),
        (TEXTS, json!({"messages": [user], "tools": tools}), "tools: the chat template leaves them out"),
        ("A file that is no template", json!({"messages": [user]}), "leaves this user text out"),
    ] {
        let found = asked(template, &object);
        assert!(found.starts_with("refused: ") && found.contains(says), "{object}: {found}");
    }
    // What a model said itself a template may shorten.
    let answered = json!([user, {"role": "assistant", "content": "<think>hm</think>b"}, user]);
    let short = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}\
                 {{ m.content.split('</think>')[-1] }}{% endif %};{% endfor %}";
    assert_eq!(asked(short, &json!({"messages": answered})), "a;b;a;");
}

/// Takes texts in parts, each without the space around it.
const IN_PARTS: &str = "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}\
    {% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %};{% endfor %}\
    {% if add_generation_prompt %}assistant:{% endif %}";

/// A server that is asked hands the same prompt to the model as a row of the conversation does. (template, the prompt)
#[test]
fn texts_in_parts_are_those_of_rows() {
    let parts = json!([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]);
    let object = json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]});
    let messages = object["messages"].as_array().cloned().expect("a list");
    for (template, want) in [(TEXTS, "system:s;user:a b;assistant:"), (IN_PARTS, "system:s;user:ab;assistant:")] {
        let tokenizer = Model::new(Some(template)).tokenizer();
        let taken = tokenizer.with_parts_taken(messages.clone(), &[]).expect("messages");
        let prompt = tokenizer.render_with(&taken, None, &[], true).expect("a prompt").text;
        assert_eq!((prompt.as_str(), asked(template, &object).as_str()), (want, want));
    }
    // What a row would be refused for is the business of whoever asks.
    let ghost = json!({"role": "ghost", "content": parts});
    let tokenizer = Model::new(Some(TEXTS)).tokenizer();
    let taken = tokenizer.with_parts_taken(vec![ghost], &[]).expect("messages");
    assert_eq!(taken, [json!({"role": "ghost", "content": "a b"})]);
}
