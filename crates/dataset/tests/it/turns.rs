//! Conversations whose template writes a turn in another way once others follow: a sequence for
//! each answer.

use finetune_advice::Advice as _;
use finetune_dataset::{Dataset, DatasetError, Ends};
use finetune_recipe::{Data, Format, TrainOn};
use serde_json::{Value, json};

use crate::made_up::{CHATML, Model, VOCABULARY, data};
use crate::reaching::read_with;

fn read(template: &str, row: &Value) -> Vec<String> {
    read_with(&Model::new(Some(template)), row, TrainOn::Assistant)
}

fn chat(turns: &[(&str, &str)]) -> Value {
    let messages: Vec<Value> = turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    json!({"messages": messages})
}

/// The reasoning of all but the last answer is dropped.
const DROPPING: &str = "{% for m in messages %}{% if m.role == 'assistant' %}A:{% if '</think>' in m.content and not loop.last \
    %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %};{% else %}U:{{ m.content }};{% endif %}\
    {% endfor %}{% if add_generation_prompt %}A:{% endif %}";

/// The system text goes into the last message, if that is the user's.
const SYSTEM_LAST: &str = "{% set system = messages[0].content if messages[0].role == 'system' else '' %}\
    {% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[{% if loop.last and system %}{{ system }} {% endif %}\
    {{ m.content }}]{% else %}{{ m.content }}.{% endif %}{% endfor %}";

/// Cuts the reasoning off every answer, and lets the prompt ask the model to begin with it.
const PRIMING: &str = "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>\
    {{ m.content.split('</think>')[-1] }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}";

#[test]
fn each_answer_is_trained_on_where_the_model_writes_it() {
    let thinking =
        chat(&[("user", "1"), ("assistant", "<think>t</think>a"), ("user", "2"), ("assistant", "<think>v</think>b")]);
    assert_eq!(read(DROPPING, &thinking), ["U:1;A:⟦<think>t</think>a;⟧", "U:1;A:a;U:2;A:⟦<think>v</think>b;⟧"]);
    let model = Model::new(Some(DROPPING));
    assert_eq!(read_with(&model, &thinking, TrainOn::Last), ["U:1;A:a;U:2;A:⟦<think>v</think>b;⟧"]);
    let system = chat(&[("system", "S"), ("user", "1"), ("assistant", "a")]);
    assert_eq!(read(SYSTEM_LAST, &system), ["[S 1]⟦a.⟧"]);
    let twice = chat(&[("system", "S"), ("user", "1"), ("assistant", "a"), ("user", "1"), ("assistant", "a")]);
    assert_eq!(read(SYSTEM_LAST, &twice), ["[S 1]⟦a.⟧", "[1]a.[S 1]⟦a.⟧"]);
    let prompt = json!({"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "1"}],
        "completion": [{"role": "assistant", "content": "a"}]});
    assert_eq!(read(SYSTEM_LAST, &prompt), ["[S 1]⟦a.⟧"]);
    assert_eq!(
        read_with(&Model::new(Some(SYSTEM_LAST)), &system, TrainOn::All),
        ["refused: messages[0].content: the chat template leaves this system text out"]
    );
}

#[test]
fn reasoning_that_the_prompt_begins_is_kept() {
    let expected = ["<U>1<A><think>\n⟦so\n</think>\n\n4<end>⟧"];
    assert_eq!(read(PRIMING, &chat(&[("user", "1"), ("assistant", "<think>\nso\n</think>\n\n4")])), expected);
    let apart = json!({"messages": [{"role": "user", "content": "1"},
        {"role": "assistant", "content": "4", "reasoning_content": "so"}]});
    assert_eq!(read(PRIMING, &apart), expected);
    assert_eq!(
        read_with(&Model::new(Some(PRIMING)), &apart, TrainOn::All),
        ["refused: messages[1]: the chat template leaves the reasoning out"]
    );
}

/// R1's prompt opens reasoning whatever its variables are, so the model has to end it first.
#[test]
fn an_answer_alone_ends_the_reasoning_that_its_prompt_opens() {
    let row = chat(&[("user", "1"), ("assistant", "4"), ("user", "2"), ("assistant", "5")]);
    let sequences = ["<U>1<A><think>\n⟦\n</think>\n\n4<end>⟧", "<U>1<A>4<end><U>2<A><think>\n⟦\n</think>\n\n5<end>⟧"];
    assert_eq!(read(PRIMING, &row), sequences);
    let said = |row: &Value| {
        let dataset = load(&Model::new(Some(PRIMING)), std::slice::from_ref(row), &data(Format::Auto)).expect("rows");
        dataset.notices.into_iter().filter(|it| it.contains("learns not to reason")).collect::<Vec<_>>()
    };
    assert_eq!(
        said(&row),
        [
            "2 answers are without reasoning behind a prompt that opens it: each begins with its end, so the model learns \
          not to reason"
        ]
    );
    // Who writes the empty block knows it.
    let empty = chat(&[("user", "1"), ("assistant", "<think>\n\n</think>\n\n4")]);
    assert_eq!(read(PRIMING, &empty), &sequences[..1]);
    assert_eq!(said(&empty), [""; 0]);
}

#[test]
fn the_variable_that_asks_for_an_answer_alone_is_named() {
    for (variable, key) in [("enable_thinking", "{ enable_thinking = false }"), ("thinking", "{ thinking = false }")] {
        let template = PRIMING.replace(
            "<A><think>\n{% endif %}",
            &format!("<A>{{{{ '</think>' if {variable} is defined and not {variable} else '<think>' }}}}{{% endif %}}"),
        );
        let model = Model::new(Some(&template));
        let error = load(&model, &[chat(&[("user", "1"), ("assistant", "4")])], &data(Format::Auto)).expect_err(key);
        let told = format!("{error} {:?}", error.hints());
        assert!(told.contains(&format!("data.chat_template_kwargs = {key}")), "{told}");
    }
}

#[test]
fn reasoning_behind_a_prompt_that_closes_it_is_refused() {
    let template = "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}\
        <A><think>{{ m.reasoning_content }}</think>{{ m.content }}<end>{% endif %}{% endfor %}\
        {% if add_generation_prompt %}<A>{{ '' if enable_thinking else '<think></think>' }}{% endif %}";
    let row = |reasoning: &str, variables: Value| {
        json!({"messages": [{"role": "user", "content": "1"},
            {"role": "assistant", "content": "4", "reasoning_content": reasoning}], "chat_template_kwargs": variables})
    };
    assert_eq!(read(template, &row("", json!({}))), ["<U>1<A><think></think>⟦4<end>⟧"]);
    assert_eq!(read(template, &row("so", json!({"enable_thinking": true}))), ["<U>1<A>⟦<think>so</think>4<end>⟧"]);
    let told = read(template, &row("so", json!({})));
    assert!(told[0].ends_with("that ends with </think>, and the answer has reasoning"), "{told:?}");
}

/// How a family writes reasoning.
struct Reasoning {
    name: &'static str,
    /// The template's part for the content of a message `m` of the assistant.
    answer: &'static str,
    /// What the generation prompt ends with.
    prompt: &'static str,
    /// (the assistant's message, whether it is to think, the row or the end of what is told)
    cases: &'static [(&'static str, bool, &'static str)],
}

const PLAIN: &str = r#"{"content": "4"}"#;
const KEY: &str = r#"{"content": "4", "reasoning_content": "so"}"#;
const WITHIN: &str = r#"{"content": "<think>\nso\n</think>\n\n4"}"#;
const EMPTY: &str = r#"{"content": "<think>\n\n</think>\n\n4"}"#;

const OPENED: &str = "that ends with <think>, and the answer has no reasoning";
const CLOSED: &str = "that ends with </think>, and the answer has reasoning";

/// The prompt ends as the model is asked for an answer alone, or for reasoning first; the rendered
/// answer often has something else there.
const REASONING: [Reasoning; 6] = [
    Reasoning {
        name: "Gemma 4",
        answer: "{{ m.content }}",
        prompt: "{{ '' if enable_thinking else '<|channel>thought\n<channel|>' }}",
        cases: &[
            (PLAIN, false, "<U>1<A><|channel>thought\n<channel|>⟦4;⟧"),
            (PLAIN, true, "<U>1<A>⟦4;⟧"),
            (EMPTY, false, "<U>1<A><|channel>thought\n<channel|>⟦4;⟧"),
            (KEY, true, "<U>1<A>⟦<|channel>thought\nso\n<channel|>4;⟧"),
            (KEY, false, "that ends with <channel|>, and the answer has reasoning"),
            (WITHIN, false, "that ends with <channel|>, and the answer has reasoning"),
        ],
    },
    Reasoning {
        name: "SmolLM3",
        answer: "{{ '' if thinks else '<think>\n\n</think>\n' }}{{ m.content }}",
        prompt: "{{ '' if thinks else '<think>\n\n</think>\n' }}",
        cases: &[
            (PLAIN, false, "<U>1<A><think>\n\n</think>\n⟦4;⟧"),
            (PLAIN, true, "<U>1<A>⟦4;⟧"),
            (EMPTY, false, "<U>1<A><think>\n\n</think>\n⟦4;⟧"),
            (WITHIN, false, CLOSED),
            (WITHIN, true, "<U>1<A>⟦<think>\nso\n</think>\n\n4;⟧"),
        ],
    },
    Reasoning {
        name: "GLM-4.7",
        answer: "{{ '<think>' + m.reasoning_content if m.reasoning_content else '' }}</think>{{ m.content }}",
        prompt: "{{ '<think>' if enable_thinking else '</think>' }}",
        cases: &[
            (PLAIN, false, "<U>1<A></think>⟦4;⟧"),
            (PLAIN, true, OPENED),
            (KEY, true, "<U>1<A><think>⟦so</think>4;⟧"),
            (KEY, false, CLOSED),
            (WITHIN, false, CLOSED),
        ],
    },
    Reasoning {
        name: "DeepSeek-V3.1",
        answer: "</think>{{ m.content.split('</think>')[-1] }}",
        prompt: "{{ '<think>' if thinking else '</think>' }}",
        cases: &[
            (PLAIN, false, "<U>1<A></think>⟦4;⟧"),
            (PLAIN, true, OPENED),
            (KEY, true, "<U>1<A><think>⟦so</think>4;⟧"),
            (WITHIN, true, "<U>1<A><think>⟦so</think>4;⟧"),
            (EMPTY, true, "<U>1<A><think>⟦</think>4;⟧"),
            (KEY, false, CLOSED),
            (WITHIN, false, CLOSED),
        ],
    },
    Reasoning {
        name: "an empty block in each answer",
        answer: "<think></think>{{ m.content.split('</think>')[-1] }}",
        prompt: "{{ '<think>' if thinks else '<think></think>' }}",
        cases: &[
            (PLAIN, false, "<U>1<A><think></think>⟦4;⟧"),
            (PLAIN, true, "<U>1<A><think>⟦</think>4;⟧"),
            (KEY, true, "<U>1<A><think>⟦so</think>4;⟧"),
            (WITHIN, true, "<U>1<A><think>⟦so</think>4;⟧"),
            (WITHIN, false, CLOSED),
        ],
    },
    Reasoning {
        name: "Kimi-K2-Thinking",
        answer: "<think></think>{{ m.content }}",
        prompt: "",
        cases: &[
            (PLAIN, true, "<U>1<A>⟦<think></think>4;⟧"),
            (KEY, true, "<U>1<A>⟦<think>so</think>4;⟧"),
            (WITHIN, true, "<U>1<A>⟦<think>so</think>4;⟧"),
            (EMPTY, true, "<U>1<A>⟦<think></think>4;⟧"),
        ],
    },
];

fn template_of(family: &Reasoning) -> String {
    let Reasoning { answer, prompt, .. } = family;
    format!(
        "{{% for m in messages %}}{{% if m.role == 'user' %}}<U>{{{{ m.content }}}}{{% else %}}<A>{answer};{{% endif %}}\
         {{% endfor %}}{{% if add_generation_prompt %}}<A>{prompt}{{% endif %}}"
    )
}

#[test]
fn reasoning_stands_once_and_behind_the_prompt_of_its_turn() {
    for family in &REASONING {
        for (message, thinks, want) in family.cases {
            let mut message: Value = serde_json::from_str(message).expect("a message");
            message["role"] = json!("assistant");
            let row = json!({"messages": [{"role": "user", "content": "1"}, message],
                "chat_template_kwargs": {"thinks": thinks, "enable_thinking": thinks, "thinking": thinks}});
            let rows = read(&template_of(family), &row);
            let is_told = rows[0].starts_with("refused: ") && rows[0].ends_with(want);
            assert!(rows == [*want] || is_told, "{}, {message}, thinks {thinks}: {rows:?}", family.name);
        }
    }
}

#[test]
fn each_turn_has_the_empty_reasoning_of_its_own_prompt() {
    let row = chat(&[("user", "1"), ("assistant", "a"), ("user", "2"), ("assistant", "b")]);
    let gemma = template_of(&REASONING[0]);
    assert_eq!(
        read(&gemma, &row),
        ["<U>1<A><|channel>thought\n<channel|>⟦a;⟧", "<U>1<A>a;<U>2<A><|channel>thought\n<channel|>⟦b;⟧"]
    );
    let model = Model::new(Some(&gemma));
    assert_eq!(read_with(&model, &row, TrainOn::Last), ["<U>1<A>a;<U>2<A><|channel>thought\n<channel|>⟦b;⟧"]);
    // The whole conversation is what the template writes.
    assert_eq!(read_with(&model, &row, TrainOn::All), ["<⟦U>1<A>a;<U>2<A>b;⟧"]);
}

/// Blocks say what is trained, so there is no other way to write the answer.
#[test]
fn reasoning_behind_an_empty_block_is_refused_where_blocks_decide() {
    let template = "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>{% generation %}\
        <think></think>{{ m.content }};{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}";
    let told = read(template, &chat(&[("user", "1"), ("assistant", "<think>so</think>4")]));
    assert!(told[0].ends_with("its reasoning alone: an empty block of reasoning comes first"), "{told:?}");
    assert_eq!(read(template, &chat(&[("user", "1"), ("assistant", "4")])), ["<U>1<A>⟦<think></think>4;⟧"]);
}

fn load(model: &Model, rows: &[Value], data: &Data) -> Result<Dataset, DatasetError> {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let file = model.write("rows.jsonl", lines);
    Dataset::load(&[file], data, &model.tokenizer(), VOCABULARY, usize::MAX, &|_| {})
}

#[test]
fn sequences_are_counted_and_said() {
    let model = Model::new(Some(DROPPING));
    let row =
        chat(&[("user", "1"), ("assistant", "<think>t</think>a"), ("user", "2"), ("assistant", "<think>v</think>b")]);
    let dataset = load(&model, &[row.clone(), row], &data(Format::Auto)).expect("rows");
    assert_eq!((dataset.counts.rows, dataset.rows.len()), (2, 4));
    assert_eq!([dataset.rows[1].origin.line, dataset.rows[2].origin.line], [1, 2]);
    assert_eq!([&dataset.rows[1].prompt_text[..], &dataset.rows[1].answer_text[..]], ["2", "<think>v</think>b"]);
    assert!(dataset.notices[0].starts_with("2 conversations became 4 sequences"), "{:?}", dataset.notices);
}

#[test]
fn a_conversation_that_the_assistant_begins_is_named_with_the_ways_out() {
    let template = "{% for m in messages %}{% if loop.first %}first;{% endif %}{{ m.role | first }}:{{ m.content }};{% endfor %}\
                    {% if add_generation_prompt %}a:{% endif %}";
    let row = chat(&[("assistant", "Welcome"), ("user", "1"), ("assistant", "a")]);
    let told = "refused: turn 1: the conversation begins with the assistant, so there is nothing that it answers";
    assert_eq!(read(template, &row), [told]);
    let mut context = row.clone();
    context["messages"][0]["weight"] = json!(0);
    assert_eq!(read(template, &context), ["first;a:Welcome;u:1;a:⟦a;⟧"]);
    assert_eq!(read_with(&Model::new(Some(template)), &row, TrainOn::Last), ["first;a:Welcome;u:1;a:⟦a;⟧"]);
}

#[test]
fn ends_of_answers_are_counted() {
    let row = chat(&[("user", "1"), ("assistant", "a"), ("user", "2"), ("assistant", "b")]);
    let ends = |template: &str| {
        load(&Model::new(Some(template)), std::slice::from_ref(&row), &data(Format::Auto)).expect("rows")
    };
    let dataset = ends(CHATML);
    assert_eq!(dataset.ends, Ends { tokens: vec![263], without: 0, parts: 2 });
    assert!(
        dataset.notices.iter().any(|it| it.contains("answers end with <|im_end|>, which the files")),
        "{:?}",
        dataset.notices
    );
    let dataset = ends(&CHATML.replace("<|im_end|>", "<|fin|>"));
    assert_eq!(dataset.ends, Ends { tokens: vec![], without: 2, parts: 2 });
    assert!(dataset.notices[0].starts_with("2 of 2 answers end in no special token"), "{:?}", dataset.notices);
    let dataset = ends(&CHATML.replace("<|im_end|>\n", "</s>"));
    assert_eq!((dataset.ends, dataset.notices.len()), (Ends { tokens: vec![259], without: 0, parts: 2 }, 0));
}

#[test]
fn many_turns_are_masked_as_few_are() {
    // More than are looked at one by one; of different lengths, with texts that repeat, one of them
    // in parts.
    let turns = |count: usize| -> Vec<(String, String)> {
        let word = |turn: usize| ["yes", " so it is\n", "a\nb", "0", ""][turn % 5].to_owned();
        (0..count).map(|turn| (format!("q{}", turn % 3), word(turn))).collect()
    };
    let trimmed = CHATML.replace("message.content", "message.content | trim");
    for template in [CHATML, &trimmed] {
        let count = 300;
        let mut expected = String::new();
        let mut messages = Vec::new();
        for (question, answer) in turns(count) {
            let written = if template == CHATML { answer.clone() } else { answer.trim().to_owned() };
            expected +=
                &format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n⟦{written}<|im_end|>\n⟧");
            messages.extend([
                json!({"role": "user", "content": question}),
                json!({"role": "assistant", "content": answer}),
            ]);
        }
        let model = Model::new(Some(template));
        let file = model.write("rows.jsonl", format!("{}\n", json!({"messages": messages})));
        let long = Data { max_seq_len: 1 << 20, ..data(Format::Auto) };
        let tokenizer = model.tokenizer();
        let dataset = Dataset::load(&[file], &long, &tokenizer, VOCABULARY, 0, &|_| {}).expect("a row");
        let [row] = &dataset.rows[..] else { panic!("one row") };
        let mut text = String::new();
        for (index, id) in row.tokens.iter().enumerate() {
            let trained = row.trained[index];
            if trained && !row.trained[index - 1] {
                text.push('⟦');
            }
            if !trained && index > 0 && row.trained[index - 1] {
                text.push('⟧');
            }
            text += &tokenizer.id_to_token(*id).expect("a token");
        }
        text.push('⟧');
        // Bytes of the vocabulary are printable characters of their own.
        assert_eq!(text.replace('Ċ', "\n").replace('Ġ', " "), expected);
    }
}

#[test]
fn many_turns_take_no_more_time_each() {
    let seconds = |turns: usize| {
        let model = Model::new(Some(CHATML));
        let pair = |turn: usize| {
            [
                json!({"role": "user", "content": format!("question {turn}")}),
                json!({"role": "assistant", "content": format!("answer {turn}")}),
            ]
        };
        let messages: Vec<Value> = (0..turns).flat_map(pair).collect();
        let file = model.write("rows.jsonl", format!("{}\n", json!({"messages": messages})));
        let long = Data { max_seq_len: 1 << 24, ..data(Format::Auto) };
        let tokenizer = model.tokenizer();
        let start = std::time::Instant::now();
        Dataset::load(&[file], &long, &tokenizer, VOCABULARY, 0, &|_| {}).expect("a row");
        start.elapsed().as_secs_f64()
    };
    // Eight times as many turns; with the square of their number it would be sixty-four times the
    // time. A busy machine may hold up one try, and not each.
    let tries: Vec<(f64, f64)> = (0..5).map(|_| (seconds(400).max(0.005), seconds(3200))).collect();
    assert!(tries.iter().any(|(few, many)| *many < 30.0 * few), "seconds for 400 and for 3200 turns: {tries:?}");
}
