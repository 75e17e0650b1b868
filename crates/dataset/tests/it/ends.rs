//! The tokens that end answers and calls, as families of models write them.

use finetune_dataset::{ChatTokenizer, Dataset, Ends, TextSource};
use finetune_recipe::{Format, TrainOn};
use serde_json::{Value, json};

use crate::made_up::{CHATML, Model, VOCABULARY, data};
use crate::reaching::read_through;

/// How a family writes what an assistant says.
struct Family {
    name: &'static str,
    /// The template's part for a message `m` of the assistant.
    answer: &'static str,
    generation_prompt: &'static str,
    /// `eos_token_id` of generation_config.json.
    ends: &'static [&'static str],
    /// Those of them that the answers below end with.
    trained: &'static [&'static str],
}

const FAMILIES: [Family; 5] = [
    Family {
        name: "gpt-oss",
        answer: "{% if 'tool_calls' in m %}<|start|>assistant to=<|channel|>commentary json<|message|>\
                 {{ m.tool_calls[0].function.name }} \
                 {{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% elif loop.last %}\
                 <|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% else %}\
                 <|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}",
        generation_prompt: "<|start|>assistant",
        ends: &["<|return|>", "<|endoftext|>", "<|call|>"],
        trained: &["<|return|>", "<|call|>"],
    },
    Family {
        name: "Kimi",
        answer: "<|im_assistant|>assistant<|im_middle|>{{ m.content }}{% if 'tool_calls' in m %}<|tool_call_begin|>\
                 {{ m.tool_calls[0].function.name }} \
                 {{ m.tool_calls[0].function.arguments | tojson }}<|tool_call_end|>{% endif %}<|im_end|>",
        generation_prompt: "<|im_assistant|>assistant<|im_middle|>",
        ends: &["<|im_end|>"],
        trained: &["<|im_end|>"],
    },
    Family {
        name: "Gemma",
        answer: "{{ '<start_of_turn>model\n' + m.content }}{% if 'tool_calls' in m %}\
                 {{ m.tool_calls[0].function.name }} \
                 {{ m.tool_calls[0].function.arguments | tojson }}{% endif %}{{ '<end_of_turn>\n' }}",
        generation_prompt: "{{ '<start_of_turn>model\n' }}",
        ends: &["<eos>", "<end_of_turn>"],
        trained: &["<end_of_turn>"],
    },
    Family {
        name: "DeepSeek",
        answer: "<|Assistant|>{{ m.content }}{% if 'tool_calls' in m %}<|call_begin|>\
                 {{ m.tool_calls[0].function.name }} \
                 {{ m.tool_calls[0].function.arguments | tojson }}<|call_end|>{% endif %}<|end_of_sentence|>",
        generation_prompt: "<|Assistant|>",
        ends: &["<|end_of_sentence|>"],
        trained: &["<|end_of_sentence|>"],
    },
    // Its answers end where the next turn begins. Its template writes nothing there of its own.
    Family {
        name: "GLM",
        answer: "<|assistant|>{{ m.content }}{% if 'tool_calls' in m %}\
                 {{ m.tool_calls[0].function.name }} \
                 {{ m.tool_calls[0].function.arguments | tojson }}{% endif %}",
        generation_prompt: "<|assistant|>",
        ends: &["<|endoftext|>", "<|user|>", "<|observation|>"],
        trained: &["<|user|>", "<|observation|>"],
    },
];

/// Every `<token>` of a family.
fn special_tokens(template: &str, family: &Family) -> Vec<String> {
    let pieces = template.split('<').skip(1).filter_map(|piece| piece.split_once('>'));
    let tokens = pieces.map(|(name, _)| format!("<{name}>")).filter(|token| !token.contains([' ', '{']));
    tokens.chain(family.ends.iter().map(|end| (*end).to_owned())).collect()
}

fn template(family: &Family) -> String {
    let mut template = "{% for m in messages %}{% if m.role == 'assistant' %}".to_owned();
    template += family.answer;
    template += "{% elif m.role == 'tool' %}<|observation|>{{ m.content }}{% else %}<|user|>{{ m.content }}{% endif %}";
    template += "{% endfor %}{% if add_generation_prompt %}";
    template + family.generation_prompt + "{% endif %}"
}

/// Two answers, the second empty; a call and an answer.
fn rows() -> String {
    let user = json!({"role": "user", "content": "1"});
    let answer = |content: &str| json!({"role": "assistant", "content": content});
    let call = json!({"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]});
    let result = json!({"role": "tool", "content": "t"});
    let row = |messages: Value| format!("{}\n", json!({ "messages": messages }));
    row(json!([user, answer("a"), user, answer("")])) + &row(json!([user, call, result, answer("b")]))
}

/// A model of a family, and its tokenizer, which knows all tokens of the template.
fn model(family: &Family) -> (Model, ChatTokenizer) {
    let template = template(family);
    let model = Model::with_tokens(Some(&template), json!({}));
    let tokens = special_tokens(&template, family);
    let source = TextSource::of(model.path(), None);
    let open = || ChatTokenizer::open_with(&source, &tokens).expect("files").expect("a tokenizer");
    let ids = ids(&open(), family.ends);
    model.write("generation_config.json", json!({"eos_token_id": ids}).to_string());
    let tokenizer = open();
    (model, tokenizer)
}

fn ids(tokenizer: &ChatTokenizer, tokens: &[&str]) -> Vec<u32> {
    tokens.iter().map(|token| tokenizer.encode_chat(token).expect("a token")[0]).collect()
}

#[test]
fn the_ends_of_families_are_recognized() {
    for family in &FAMILIES {
        let name = family.name;
        let (model, tokenizer) = model(family);
        let ends = ids(&tokenizer, family.ends);
        assert_eq!(tokenizer.eos_ids(), ends, "{name}");

        let file = model.write("rows.jsonl", rows());
        let read = Dataset::load(&[file], &data(Format::Auto), &tokenizer, 512, usize::MAX, &|_| {}).expect("rows");
        let mut trained = ids(&tokenizer, family.trained);
        trained.sort_unstable();
        assert_eq!(read.ends, Ends { tokens: trained, without: 0, parts: 4 }, "{name}");
        let is_told = |text: &str| read.notices.iter().any(|notice| notice.contains(text));
        assert!(!is_told("end in no special token") && !is_told("answers end with"), "{name}: {:?}", read.notices);
        let end = tokenizer.template_end();
        assert_eq!(end.is_some_and(|end| ends.contains(&end)), name != "GLM", "{name}");
    }
}

/// What a GLM stops at is the next turn's. So that is trained on, and put behind the last answer.
#[test]
fn the_token_of_the_next_turn_is_learned_if_answers_end_with_it() {
    let glm = FAMILIES.iter().find(|family| family.name == "GLM").expect("it is in the table");
    let (model, tokenizer) = model(glm);
    let user = json!({"role": "user", "content": "1"});
    let answer = |content: &str, weight: u32| json!({"role": "assistant", "content": content, "weight": weight});
    let call = json!({"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]});
    let result = json!({"role": "tool", "content": "t"});
    for (messages, train_on, want) in [
        (
            json!([user, answer("a", 1), user, answer("b", 1)]),
            TrainOn::Assistant,
            "<|user|>1<|assistant|>⟦a<|user|>⟧1<|assistant|>⟦b<|user|>⟧",
        ),
        (
            json!([user, answer("a", 1), user, answer("b", 1)]),
            TrainOn::Last,
            "<|user|>1<|assistant|>a<|user|>1<|assistant|>⟦b<|user|>⟧",
        ),
        (
            json!([user, answer("a", 0), user, answer("b", 1)]),
            TrainOn::Assistant,
            "<|user|>1<|assistant|>a<|user|>1<|assistant|>⟦b<|user|>⟧",
        ),
        (
            json!([user, call, result, answer("", 1)]),
            TrainOn::Assistant,
            "<|user|>1<|assistant|>⟦f {\"x\": 1}<|observation|>⟧t<|assistant|>⟦<|user|>⟧",
        ),
        (json!([user, call]), TrainOn::Assistant, "<|user|>1<|assistant|>⟦f {\"x\": 1}<|observation|>⟧"),
        (json!([user, answer("a", 1), user]), TrainOn::All, "<|user|>⟦1<|assistant|>a<|user|>1⟧"),
        (json!([user, answer("a", 1)]), TrainOn::All, "<|user|>⟦1<|assistant|>a<|user|>⟧"),
    ] {
        assert_eq!(read_through(&model, &tokenizer, &json!({"messages": messages}), train_on), [want], "{messages}");
    }
}

/// An empty answer may be meant (a model that is to stay silent), so it is told and trained on.
#[test]
fn answers_that_say_nothing_are_told_with_their_first_row() {
    let told = |template: &str, rows: &[Value]| {
        let model = Model::new(Some(template));
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let file = model.write("rows.jsonl", lines);
        Dataset::load(&[file], &data(Format::Auto), &model.tokenizer(), VOCABULARY, usize::MAX, &|_| {})
            .unwrap_or_else(|error| panic!("{error}"))
            .notices
    };
    let chat = |answer: Value| json!({"messages": [{"role": "user", "content": "a"}, answer]});
    let says = |content: &str| chat(json!({"role": "assistant", "content": content}));
    let notices = told(CHATML, &[says("b"), says(" \n"), says("")]);
    let said = |it: &String| it.starts_with("2 trained answers are empty (the first: ") && it.contains("rows.jsonl:2)");
    assert!(notices.iter().any(said), "{notices:?}");
    let muted = chat(json!({"role": "assistant", "content": "", "weight": 0}));
    let then = json!([muted["messages"][0], muted["messages"][1], {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]);
    let notices = told(CHATML, &[says("b"), json!({"messages": then})]);
    assert!(!notices.iter().any(|it| it.contains("empty")), "{notices:?}");
    let plain = json!({"prompt": "a", "completion": ""});
    let notices = told(CHATML, &[json!({"prompt": "a", "completion": "b"}), plain]);
    assert!(notices.iter().any(|it| it.contains("1 trained answer is empty")), "{notices:?}");

    // Arguments that a model wrote and broke. The template writes text as it is.
    let writes_calls = "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content }}{% for c in m.tool_calls %}\
                        {{ c.function.name + c.function.arguments }}{% endfor %};{% else %}U:{{ m.content }};{% endif %}\
                        {% endfor %}{% if add_generation_prompt %}A:{% endif %}";
    let calls = |arguments: &str| {
        chat(
            json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}),
        )
    };
    let notices = told(writes_calls, &[calls("{\"a\": 1}"), calls("{a: 1}")]);
    let said = |it: &String| it.starts_with("the arguments of 1 call are text that holds no JSON object (the first: ");
    assert!(notices.iter().any(|it| said(it) && it.contains("rows.jsonl:2)")), "{notices:?}");
    assert!(!notices.iter().any(|it| it.contains("empty")), "{notices:?}");
}
