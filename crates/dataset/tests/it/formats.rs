//! Rows as other programs write them, each as the text that is trained on, the trained part in
//! brackets.

use finetune_dataset::{Dataset, DatasetError};
use finetune_recipe::{Data, Format};
use serde_json::{Value, json};

use crate::made_up::{Model, VOCABULARY, data};

/// Writes tools and calls as JSON.
const TEMPLATE: &str = "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content or '' }}\
                        {% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '\n' }}{% endfor %}\
                        {% if add_generation_prompt %}assistant: {% endif %}";

fn shown(row: &Value, columns: &[(&str, &str)]) -> String {
    let model = Model::new(Some(TEMPLATE));
    let file = model.write("rows.jsonl", format!("{row}\n"));
    let columns = columns.iter().map(|(key, name)| ((*key).to_owned(), (*name).to_owned())).collect();
    let data = Data { columns, ..data(Format::Auto) };
    let dataset = match Dataset::load(&[file], &data, &model.tokenizer(), VOCABULARY, usize::MAX, &|_| {}) {
        Ok(dataset) => dataset,
        Err(DatasetError::BadRows(rows)) => return format!("refused: {}", rows.first[0].problem),
        Err(error) => panic!("{error}"),
    };
    let row = &dataset.rows[0];
    let (mut text, mut inside) = (String::new(), false);
    for (token, trained) in row.tokens.iter().zip(&row.trained) {
        if *trained != inside {
            text.push(if *trained { '⟦' } else { '⟧' });
            inside = *trained;
        }
        text += &model.tokenizer().decode(&[*token], false).expect("text");
    }
    text + if inside { "⟧" } else { "" }
}

const WRAPPED: &str = r#"[{"type": "function", "function": {"name": "look", "parameters": {}}}]"#;

#[test]
fn sharegpt_calls_tools() {
    let row = |tools: Value, call: &str| {
        json!({"tools": tools, "conversations": [
            {"from": "human", "value": "Sky?"}, {"from": "function_call", "value": call},
            {"from": "observation", "value": "grey"}, {"from": "gpt", "value": "Grey."}]})
    };
    let tool = json!({"name": "look", "parameters": {}});
    let call = r#"{"name": "look", "arguments": {"at": "sky"}}"#;
    let expected = format!(
        "{WRAPPED}\nuser: Sky?\nassistant: ⟦{{\"name\": \"look\", \"arguments\": {{\"at\": \"sky\"}}}}\n⟧\
         tool: grey\nassistant: ⟦Grey.\n⟧"
    );
    // Bare functions, as LLaMA-Factory writes them: text, or a list. Wrapped ones stay as they are.
    for tools in [json!(json!([tool]).to_string()), json!([tool]), serde_json::from_str(WRAPPED).expect("tools")] {
        assert_eq!(shown(&row(tools, call), &[]), expected);
    }
    let two = shown(&row(json!(null), &format!("[{call}, {call}]")), &[]);
    assert_eq!(two.matches("\"arguments\"").count(), 2, "{two}");
    let thought = shown(&row(json!(""), &format!("<think>why</think>\n{call}")), &[]);
    assert!(thought.contains("⟦<think>why</think>{\"name\""), "{thought}");
    assert_eq!(shown(&row(json!(null), "look"), &[]), "refused: conversations[1].value is no call of a function");
}

#[test]
fn openais_former_calls_are_those_of_today() {
    let row = json!({
        "functions": [{"name": "look", "parameters": {}}], "parallel_tool_calls": false,
        "messages": [{"role": "user", "content": "Sky?"},
            {"role": "assistant", "content": null, "function_call": {"name": "look", "arguments": "{}"}},
            {"role": "function", "name": "look", "content": "grey"}, {"role": "assistant", "content": "Grey."}]});
    let text = shown(&row, &[]);
    assert!(text.starts_with(&format!("{WRAPPED}\nuser: Sky?\nassistant: ⟦{{\"name\": \"look\"")), "{text}");
    assert!(text.ends_with("⟧tool: grey\nassistant: ⟦Grey.\n⟧"), "{text}");
    let both = json!({"functions": [{"name": "f"}], "tools": serde_json::from_str::<Value>(WRAPPED).expect("tools"),
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    assert_eq!(shown(&both, &[]), "refused: functions is the old form of tools, and the row has both");
}

#[test]
fn weights_of_answers_and_lists_of_messages() {
    let weighted = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]});
    assert_eq!(shown(&weighted, &[]), "user: a\nassistant: b\nuser: c\nassistant: ⟦d\n⟧");
    let lists =
        json!({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]});
    assert_eq!(shown(&lists, &[]), "user: a\nassistant: ⟦b\n⟧");
}

#[test]
fn columns_of_other_names() {
    let answer = "user: a\nassistant: ⟦b\n⟧";
    for (row, columns, expected) in [
        (
            json!({"dialog": [{"speaker": "human", "said": "a"}, {"speaker": "model", "said": "b"}]}),
            &[("messages", "dialog"), ("role", "speaker"), ("content", "said")][..],
            answer,
        ),
        (
            json!({"conversations": [{"from": "Kunde", "value": "a"}, {"from": "Wir", "value": "b"}]}),
            &[("user_tag", "Kunde"), ("assistant_tag", "Wir")],
            answer,
        ),
        (json!({"task": "a", "answer": "b"}), &[("instruction", "task"), ("output", "answer")], answer),
        (json!({"question": "a", "answer": "b"}), &[("prompt", "question"), ("completion", "answer")], "<s>a⟦b</s>⟧"),
        (
            json!({"question": "a"}),
            &[("prompt", "question"), ("completion", "answer")],
            "refused: there is no column answer, which data.columns names for completion; its keys are question",
        ),
    ] {
        assert_eq!(shown(&row, columns), expected, "{row}");
    }
}

#[test]
fn preferences_are_refused_in_a_sentence() {
    let answer = json!([{"role": "assistant", "content": "b"}]);
    for row in [
        json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
        json!({"input": {"messages": []}, "preferred_output": answer, "non_preferred_output": answer}),
    ] {
        assert!(shown(&row, &[]).starts_with("refused: a row of preferences (chosen, rejected), for DPO"), "{row}");
    }
    let row = json!({"prompt": "a", "completion": "b", "label": false});
    assert!(shown(&row, &[]).starts_with("refused: an answer with a label, true or false, for KTO"), "{row}");
}
