//! What a row says reaches its text, or the row is refused by name.

use finetune_dataset::{ChatTokenizer, Dataset, DatasetError};
use finetune_recipe::{Data, Format, TrainOn};
use serde_json::{Value, json};

use crate::made_up::{CHATML, Model, VOCABULARY, data};

/// The rows that a line becomes, as text with the trained part between ⟦ and ⟧, or why it cannot be
/// used.
pub(crate) fn read_with(model: &Model, row: &Value, train_on: TrainOn) -> Vec<String> {
    read_through(model, &model.tokenizer(), row, train_on)
}

/// As [`read_with`], with a tokenizer of the model that was opened before.
pub(crate) fn read_through(model: &Model, tokenizer: &ChatTokenizer, row: &Value, train_on: TrainOn) -> Vec<String> {
    let file = model.write("rows.jsonl", format!("{row}\n"));
    let data = Data { train_on, max_seq_len: 1 << 16, ..data(Format::Auto) };
    match Dataset::load(&[file], &data, tokenizer, tokenizer.vocab_size(), usize::MAX, &|_| {}) {
        Ok(dataset) => dataset.rows.iter().map(|row| shown(tokenizer, row)).collect(),
        Err(DatasetError::BadRows(rows)) => vec![format!("refused: {}", rows.first[0].problem)],
        Err(error) => panic!("{error}"),
    }
}

fn shown(tokenizer: &ChatTokenizer, row: &finetune_dataset::Row) -> String {
    let mut text = String::new();
    for part in (0..row.tokens.len()).collect::<Vec<_>>().chunk_by(|a, b| row.trained[*a] == row.trained[*b]) {
        let ids: Vec<u32> = part.iter().map(|index| row.tokens[*index]).collect();
        let decoded = tokenizer.decode(&ids, false).expect("text");
        text += &if row.trained[part[0]] { format!("⟦{decoded}⟧") } else { decoded };
    }
    text
}

fn read(template: &str, row: &Value) -> Vec<String> {
    read_with(&Model::new(Some(template)), row, TrainOn::Assistant)
}

fn chat(messages: Value) -> Value {
    json!({"messages": messages})
}

/// A small template that renders everything that a row can say.
const ALL: &str = "{% for t in tools or [] %}T:{{ t.function.name }};{% endfor %}\
    {% for m in messages %}{% if m.role == 'assistant' %}A:\
    {% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\
    {% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>{% endfor %}.\
    {% else %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}";

fn call(arguments: Value) -> Value {
    json!({"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "look", "arguments": arguments}}]})
}

/// A template that takes data gets it. One that would print it as Python, or that takes strings
/// only, gets it as JSON text.
#[test]
fn data_that_a_tool_answers_is_written_as_json() {
    let data = json!({"degrees": 3.5, "sky": "grey"});
    let row = |content: Value| {
        chat(json!([
            {"role": "user", "content": "Hi"},
            {"role": "tool", "content": content},
            {"role": "assistant", "content": "Grey."},
        ]))
    };
    let frame = "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content }};{% elif m.role == 'tool' %}<CONTENT>\
                 {% else %}{{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}";
    let template = |content: &str| frame.replace("CONTENT", content);
    let json = r#"Hi;<{"degrees": 3.5, "sky": "grey"}>A:⟦Grey.;⟧"#;
    for (content, text) in [
        ("{{ m.content|tojson }}", json),
        ("{{ m.content }}", json),
        ("{{ m.content if m.content is string else '' }}", json),
        ("{{ '' + m.content }}", json),
        (
            "{% for key in m.content %}{{ key }}={{ m.content[key] }},{% endfor %}",
            "Hi;<degrees=3.5,sky=grey,>A:⟦Grey.;⟧",
        ),
        ("", "refused: messages[1].content is no string, and the chat template leaves its text out"),
    ] {
        assert_eq!(read(&template(content), &row(data.clone())), [text], "{content}");
    }
    let list = row(json!([{"sky": "grey"}, {"sky": "blue"}]));
    let printed = r#"Hi;<[{"sky": "grey"}, {"sky": "blue"}]>A:⟦Grey.;⟧"#;
    assert_eq!(read(&template("{{ m.content }}"), &list), [printed]);
    let of_user = chat(json!([{"role": "user", "content": data}, {"role": "assistant", "content": "Grey."}]));
    assert!(read(CHATML, &of_user)[0].starts_with("refused: messages[0].content is an object"));
}

#[test]
fn null_keys_of_a_message_are_dropped() {
    // As Arrow fills them in.
    let template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% elif 'tool_calls' in m %}calls{% else \
                    %}<{{ m.content }}>{% endif %}{% endfor %}{% if add_generation_prompt %}<{% endif %}";
    for calls in [json!(null), json!([]), json!("")] {
        let row = chat(json!([
            {"role": "user", "content": "hm", "tool_calls": null, "name": null},
            {"role": "assistant", "content": "yes", "tool_calls": calls, "reasoning_content": null, "weight": null}]));
        assert_eq!(read(template, &row), ["hm<⟦yes>⟧"]);
    }
    // Null within the arguments of a call is data.
    let row = chat(json!([{"role": "user", "content": "hm"}, call(json!({"unit": null}))]));
    assert_eq!(read(ALL, &row), ["user:hm;A:⟦<call>look{\"unit\": null}</call>.⟧"]);
}

#[test]
fn what_a_template_leaves_out_is_refused_by_name() {
    let user = json!({"role": "user", "content": "a"});
    let answer = json!({"role": "assistant", "content": "b"});
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": {}}}]);
    let knows_three = "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}<{{ m.role }}>{{ m.content }}\
                       {% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let cases = [
        (knows_three, json!({"messages": [user, answer]}), ""),
        (
            knows_three,
            json!({"messages": [user, call(json!({"x": 1})), answer]}),
            "messages[1].tool_calls[0]: the chat template leaves the call out",
        ),
        (knows_three, json!({"messages": [user, answer], "tools": tools}), "tools: the chat template leaves them out"),
        (
            knows_three,
            json!({"messages": [user, answer], "tools": tools.to_string()}),
            "tools: the chat template leaves them out",
        ),
        // Letters that stand in the rendering anyway.
        (
            knows_three,
            json!({"messages": [{"role": "developer", "content": "s"}, user, answer]}),
            "messages[0].content: the chat template leaves this developer text out",
        ),
        (
            knows_three,
            json!({"messages": [user, {"role": "tool", "content": "a"}, answer]}),
            "messages[1].content: the chat template leaves this tool text out",
        ),
        (
            knows_three,
            json!({"messages": [user, {"role": "assistant", "content": "b", "reasoning_content": "t"}]}),
            "messages[1]: the chat template leaves the reasoning out",
        ),
        (
            knows_three,
            json!({"messages": [user, {"role": "assistant", "content": "b", "thinking": "user"}]}),
            "messages[1]: the chat template leaves the reasoning out",
        ),
        (
            knows_three,
            json!({"prompt": [user, {"role": "ghost", "content": "u"}], "completion": [answer]}),
            "prompt[1].content: the chat template leaves this ghost text out",
        ),
        (
            knows_three,
            json!({"messages": [user, {"role": "assistant", "content": "b", "function_call": {"name": "f"}}]}),
            "messages[1].tool_calls[0]: the chat template leaves the call out",
        ),
        (
            knows_three,
            json!({"messages": [user, answer], "functions": [{"name": "f"}]}),
            "tools: the chat template leaves them out",
        ),
        (
            knows_three,
            json!({"messages": [user, answer], "images": ["a.png"]}),
            "the row has images: only text can be trained on",
        ),
        (knows_three, json!({"messages": [user, answer], "images": [], "functions": null}), ""),
    ];
    for (template, row, expected) in cases {
        let told = read(template, &row);
        match expected {
            "" => assert!(!told[0].starts_with("refused"), "{told:?}"),
            _ => assert_eq!(told, [format!("refused: {expected}")], "{row}"),
        }
    }
}

#[test]
fn what_a_template_renders_is_not_refused() {
    let tools = json!([{"type": "function", "function": {"name": "look", "parameters": {}}}]);
    let messages = json!([
        {"role": "system", "content": " S\n"},
        {"role": "user", "content": "\"quoted\" \\ é\n\n"},
        {"role": "assistant", "content": "b", "reasoning_content": "why \"so\""},
        {"role": "user", "content": "again"},
        call(json!({"a b": ["\"x\" y", 3, {"z": 0.5}], "empty": {}})),
        {"role": "tool", "content": "{\"sky\": \"grey\"}"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}]);
    let row = json!({"messages": messages, "tools": tools});
    let trimming = ALL.replace("{{ m.content }}", "{{ m.content | trim }}");
    let quoting = ALL.replace("{{ m.role }}:{{ m.content }}", "{{ m.role }}:{{ m.content | tojson }}");
    let comparing = ALL.replace("{{ m.role }}:", "{{ m.role }}{{ '!' if m == messages[3] }}:");
    for template in [ALL, &trimming, &quoting, &comparing] {
        let told = read(template, &row);
        assert!(told.len() == 1 && !told[0].starts_with("refused"), "{template}\n{told:?}");
    }
}

#[test]
fn arguments_as_text_are_parsed_where_the_template_wants_an_object() {
    let row = |arguments: &str| chat(json!([{"role": "user", "content": "hm"}, call(json!(arguments))]));
    let as_object = "user:hm;A:⟦<call>look{\"city\": \"Oslo\"}</call>.⟧";
    assert_eq!(read(ALL, &row("{\"city\": \"Oslo\"}")), [as_object]);
    assert_eq!(read(ALL, &row("")), ["user:hm;A:⟦<call>look{}</call>.⟧"]);
    assert_eq!(read(ALL, &row("{}")), ["user:hm;A:⟦<call>look{}</call>.⟧"]);
    // A template that takes text gets the text as it is.
    let text = ALL.replace("c.function.arguments | tojson", "c.function.arguments + ''");
    assert_eq!(read(&text, &row("{\"city\":\"Oslo\"}")), ["user:hm;A:⟦<call>look{\"city\":\"Oslo\"}</call>.⟧"]);
    let items = ALL.replace(
        "{{ c.function.arguments | tojson }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
    );
    assert_eq!(read(&items, &row("{\"city\": \"Oslo\"}")), ["user:hm;A:⟦<call>lookcity=Oslo</call>.⟧"]);
    assert_eq!(
        read(ALL, &row("{\"city\": ")),
        ["refused: messages[1].tool_calls[0]: the arguments are a string, and the chat template quotes it"]
    );
}

/// Some data sets have a call's name and arguments at its own level, or leave out arguments that are
/// empty. A template that reads them in `function` gets them there.
#[test]
fn calls_in_short_form_are_written_as_the_template_reads_them() {
    let row = |call: Value| {
        chat(json!([{"role": "user", "content": "hm"}, {"role": "assistant", "content": "", "tool_calls": [call]}]))
    };
    let expected = ["user:hm;A:⟦<call>look{\"city\": \"Oslo\"}</call>.⟧"];
    assert_eq!(read(ALL, &row(json!({"name": "look", "arguments": {"city": "Oslo"}}))), expected);
    assert_eq!(read(ALL, &row(json!({"name": "look", "arguments": "{\"city\": \"Oslo\"}", "id": "c1"}))), expected);
    assert_eq!(read(ALL, &row(json!({"function": {"name": "look"}}))), ["user:hm;A:⟦<call>look{}</call>.⟧"]);
    // A template that takes the short form gets it.
    let short = ALL.replace("c.function.", "c.");
    assert_eq!(read(&short, &row(json!({"name": "look", "arguments": {"city": "Oslo"}}))), expected);
}

#[test]
fn arguments_are_written_as_text_where_the_template_adds_them_to_text() {
    // As DeepSeek-V3's and R1's do.
    let template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% elif 'tool_calls' in m %}\
                    {% for c in m.tool_calls %}\
                    {{ 'A:' + m.content + '<' + c.function.name + c.function.arguments + '>' }}{% endfor %}\
                    {% else %}{{ 'A:' + m.content + '.' }}{% endif %}{% endfor %}\
                    {% if add_generation_prompt %}A:{% endif %}";
    let arguments = json!({"city": "Zürich", "days": 2, "factor": 1.0});
    let mut asked = call(arguments);
    let row = chat(json!([{"role": "user", "content": "hm"}, asked]));
    let expected = ["hmA:⟦<look{\"city\": \"Zürich\", \"days\": 2, \"factor\": 1.0}>⟧"];
    assert_eq!(read(template, &row), expected);
    asked["content"] = Value::Null;
    assert_eq!(read(template, &chat(json!([{"role": "user", "content": "hm"}, asked]))), expected);
}

#[test]
fn parts_are_text_never_code() {
    let part = |text: &str| json!({"type": "text", "text": text});
    let row = chat(json!([
        {"role": "user", "content": [part("What's"), part(" up?")]}, {"role": "assistant", "content": [part("Four\n")]}]));
    // Parts that are written as Python code, left out or not taken at all are joined.
    let printed = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    let left_out = printed.replace("m.content", "m.content if m.content is string else ''");
    let added = printed.replace("m.content", "'' + m.content");
    for template in [printed, &left_out, &added] {
        assert_eq!(read(template, &row), ["user:What's up?;assistant:⟦Four\n;⟧"], "{template}");
    }
    // A template that reads parts gets them.
    let reading = printed.replace("{{ m.content }}", "{% for p in m.content %}[{{ p.text | trim }}]{% endfor %}");
    assert_eq!(read(&reading, &row), ["user:[What's][up?];assistant:⟦[Four];⟧"]);
    let gone = printed.replace("m.content", "''");
    assert_eq!(
        read(&gone, &row),
        ["refused: messages[0].content is no string, and the chat template leaves its text out"]
    );
}

#[test]
fn flags_of_messages_say_what_is_trained() {
    let turns = |first: Value, second: Value| {
        let with = |content: &str, flags: Value| {
            let mut message = json!({"role": "assistant", "content": content});
            message.as_object_mut().expect("an object").extend(flags.as_object().expect("flags").clone());
            message
        };
        chat(
            json!([{"role": "user", "content": "1"}, with("no", first), {"role": "user", "content": "2"}, with("yes", second)]),
        )
    };
    let template = "{% for m in messages %}{{ m.role | first }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}";
    let only_second = ["u:1;a:no;u:2;a:⟦yes;⟧"];
    for flags in [
        json!({"weight": 0}),
        json!({"weight": 0.0}),
        json!({"train": false}),
        json!({"training": false}),
        json!({"loss": false}),
        json!({"loss_mask": 0}),
    ] {
        assert_eq!(read(template, &turns(flags.clone(), json!({"weight": 1}))), only_second, "{flags}");
    }
    let both = ["u:1;a:⟦no;⟧u:2;a:⟦yes;⟧"];
    assert_eq!(read(template, &turns(json!({"weight": 1, "train": null}), json!({"train": true}))), both);
    let all = read_with(&Model::new(Some(template)), &turns(json!({"weight": 0}), json!({})), TrainOn::All);
    assert_eq!(all, ["u⟦:1;a:⟧no;⟦u:2;a:yes;⟧"]);
    let detail = json!({"train_detail": [
        {"begin_offset": 0, "end_offset": 0, "train": true}, {"begin_offset": 1, "end_offset": 2, "train": false}]});
    assert_eq!(read(template, &turns(json!({"train": false}), detail)), ["u:1;a:no;u:2;a:⟦y⟧es⟦;⟧"]);
    for (flags, told) in [
        (json!({"weight": 0.5}), "messages[1].weight is 0.5: a message is trained on or not"),
        (json!({"weight": "0"}), "messages[1].weight is a string"),
        (json!({"mask": true}), "messages[1].mask is a boolean, which has no one meaning"),
        (json!({"train_detail": [1]}), "messages[1].train_detail[0] is no range of characters"),
    ] {
        assert_eq!(read(template, &turns(flags, json!({}))), [format!("refused: {told}")]);
    }
    let none = turns(json!({"weight": 0}), json!({"weight": 0}));
    assert_eq!(
        read(template, &none),
        ["refused: no assistant message to train on: its flags (weight, train) leave none"]
    );
    let asked = chat(json!([{"role": "user", "content": "1", "train": true}, {"role": "assistant", "content": "a"}]));
    assert_eq!(
        read(template, &asked),
        ["refused: messages[0].train asks for training on a message that is not the assistant's"]
    );
    let sharegpt = json!({"conversations": [
        {"from": "human", "value": "1"}, {"from": "gpt", "value": "no", "weight": 0},
        {"from": "human", "value": "2"}, {"from": "gpt", "value": "yes", "weight": 1}]});
    assert_eq!(read(template, &sharegpt), only_second);
    let named_otherwise = json!({"conversations": [
        {"role": "user", "content": "1"}, {"role": "assistant", "content": "no", "train": false},
        {"role": "user", "content": "2"}, {"role": "assistant", "content": "yes"}]});
    assert_eq!(read(template, &named_otherwise), only_second);
}

#[test]
fn keys_beside_the_messages_reach_the_template() {
    let template = "{{ date | default('never') }}{% for m in messages %}{{ m.role | first }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}";
    let messages = json!([{"role": "user", "content": "1"}, {"role": "assistant", "content": "a"}]);
    let row = |key: &str, value: Value| json!({"messages": messages, key: value});
    for (key, value, expected) in [
        ("chat_template_kwargs", json!({"date": "today"}), "todayu:1;a:⟦a;⟧"),
        ("chat_template_kwargs", json!("{\"date\": \"today\"}"), "todayu:1;a:⟦a;⟧"),
        ("chat_template_kwargs", json!({"date": null}), "neveru:1;a:⟦a;⟧"),
        ("chat_template_kwargs", json!(null), "neveru:1;a:⟦a;⟧"),
        ("chat_template_kwargs", json!([]), "refused: chat_template_kwargs is a list"),
        (
            "chat_template_kwargs",
            json!({"tools": []}),
            "refused: chat_template_kwargs has the key tools, which is not a template's own",
        ),
        ("system", json!("S"), "nevers:S;u:1;a:⟦a;⟧"),
        ("system", json!(""), "neveru:1;a:⟦a;⟧"),
    ] {
        assert_eq!(read(template, &row(key, value)), [expected]);
    }
    let system = |beside: &str| {
        json!({"system": beside, "messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "1"}, {"role": "assistant", "content": "a"}]})
    };
    assert_eq!(read(template, &system("S")), ["nevers:S;u:1;a:⟦a;⟧"]);
    assert_eq!(read(template, &system("other")), ["refused: system and messages[0] are two system messages"]);
    assert_eq!(
        read(template, &json!({"system": "S", "prompt": "a", "completion": "b"})),
        ["refused: system stands beside plain strings, which no chat template sees"]
    );
}

#[test]
fn documents_reach_the_template() {
    let template = "{% for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}{% for m in messages %}\
        {{ m.role | first }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}";
    let messages = json!([{"role": "user", "content": "1"}, {"role": "assistant", "content": "a"}]);
    let documents = json!([{"title": "T", "text": "The tower has 7 floors."}]);
    let others = json!([{"title": "T", "text": "Nothing is known of it."}]);
    let with = "[T: The tower has 7 floors.]u:1;a:⟦a;⟧";
    for (keys, expected) in [
        (json!({"documents": documents}), with),
        (json!({"documents": documents.to_string()}), with),
        (json!({"chat_template_kwargs": {"documents": documents}}), with),
        (json!({"documents": documents, "chat_template_kwargs": {"documents": documents}}), with),
        (
            json!({"documents": others, "chat_template_kwargs": {"documents": documents}}),
            "refused: documents and chat_template_kwargs.documents are not the same",
        ),
        (json!({"documents": []}), "u:1;a:⟦a;⟧"),
        (json!({"documents": null}), "u:1;a:⟦a;⟧"),
        // No list: it is not meant for a template.
        (json!({"documents": "tower.txt"}), "u:1;a:⟦a;⟧"),
        (
            json!({"documents": [documents[0], {"body": "The bridge is old and grey."}]}),
            "refused: documents[1]: the chat template leaves it out",
        ),
    ] {
        let mut row = keys.clone();
        row["messages"] = messages.clone();
        assert_eq!(read(template, &row), [expected], "{keys}");
    }
    // A template that reads none, and rows that no template sees.
    let model = Model::new(Some(CHATML));
    for row in [
        json!({"messages": messages, "documents": documents}),
        json!({"prompt": "1", "completion": "a", "documents": documents}),
    ] {
        let file = model.write("rows.jsonl", format!("{row}\n"));
        let tokenizer = model.tokenizer();
        let data = data(Format::Auto);
        let dataset = Dataset::load(&[file], &data, &tokenizer, VOCABULARY, usize::MAX, &|_| {}).expect("a row");
        let is_told = dataset.notices.iter().any(|notice| notice.ends_with("no use for: documents (1 row)"));
        assert!(is_told, "{:?}", dataset.notices);
    }
}

/// A typing error in a role is trained on as it stands, if the template writes whatever is there.
#[test]
fn roles_that_the_template_does_not_name_are_said() {
    for (template, role, told) in [
        (CHATML.to_owned(), "user", false),
        (CHATML.to_owned(), "usr", true),
        (format!("{CHATML}{{# usr #}}"), "usr", false),
    ] {
        let model = Model::new(Some(&template));
        let row = chat(json!([{"role": role, "content": "1"}, {"role": "assistant", "content": "a"}]));
        let file = model.write("rows.jsonl", format!("{row}\n{row}\n"));
        let data = data(Format::Auto);
        let dataset = Dataset::load(&[file], &data, &model.tokenizer(), VOCABULARY, usize::MAX, &|_| {}).expect("rows");
        let notice = "roles that the chat template does not name: usr (2 messages)";
        assert_eq!(dataset.notices.iter().any(|it| it == notice), told, "{role}: {:?}", dataset.notices);
    }
}

#[test]
fn one_begin_and_one_end() {
    let plain = |row: Value| read(CHATML, &row);
    assert_eq!(plain(json!({"text": "<s>ab"})), ["<s>⟦ab</s>⟧"]);
    assert_eq!(plain(json!({"prompt": "<s>a", "completion": "b"})), ["<s>a⟦b</s>⟧"]);
    assert_eq!(plain(json!({"prompt": "", "completion": "<s>b"})), ["<s>⟦b</s>⟧"]);
    // A tokenizer that puts an end behind every text: not between prompt and completion, and once.
    let model = Model::new(None);
    let mut tokenizer = crate::made_up::tokenizer_json();
    let template = &mut tokenizer["post_processor"]["processors"][1];
    template["single"].as_array_mut().expect("a list").push(json!({"SpecialToken": {"id": "</s>", "type_id": 0}}));
    template["special_tokens"]["</s>"] = json!({"id": "</s>", "ids": [259], "tokens": ["</s>"]});
    model.write("tokenizer.json", tokenizer.to_string());
    for (row, expected) in [
        (json!({"prompt": "a", "completion": "b"}), "<s>a⟦b</s>⟧"),
        (json!({"prompt": "a", "completion": "b</s>"}), "<s>a⟦b</s>⟧"),
        (json!({"text": "ab"}), "<s>⟦ab</s>⟧"),
        (json!({"text": "<s>ab</s>"}), "<s>⟦ab</s>⟧"),
    ] {
        assert_eq!(read_with(&model, &row, TrainOn::Assistant), [expected]);
    }
    // What a model goes on from begins as such a row, and has no end.
    for prompt in ["ab", "<s>ab"] {
        let tokens = model.tokenizer().encode_prompt(prompt).expect("tokens");
        assert_eq!(model.tokenizer().decode(&tokens, false).expect("text"), "<s>ab", "{prompt}");
    }
}
