//! Which tokens are trained on: rows shown as text, the trained part in brackets.

use finetune_dataset::{Dataset, DatasetError, Row};
use finetune_recipe::{Data, Format, TrainOn};
use serde_json::{Value, json};

use crate::made_up::{CHATML, Model, VOCABULARY, data};

fn load(model: &Model, row: &Value, data: &Data) -> Result<Row, DatasetError> {
    let file = model.write("rows.jsonl", format!("{row}\n"));
    let mut dataset = Dataset::load(&[file], data, &model.tokenizer(), VOCABULARY, usize::MAX, &|_| {})?;
    Ok(dataset.rows.remove(0))
}

/// The row's text, each run of trained tokens between ⟦ and ⟧.
fn shown(model: &Model, row: &Row) -> String {
    let tokenizer = model.tokenizer();
    let mut text = String::new();
    let mut place = 0;
    while place < row.tokens.len() {
        let end =
            (place..row.tokens.len()).find(|at| row.trained[*at] != row.trained[place]).unwrap_or(row.tokens.len());
        let part = tokenizer.decode(&row.tokens[place..end], false).expect("text");
        text += &if row.trained[place] { format!("⟦{part}⟧") } else { part };
        place = end;
    }
    text
}

fn chat(turns: &[(&str, &str)]) -> Value {
    json!({"messages": turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect::<Vec<_>>()})
}

fn mask(template: &str, row: &Value, train_on: TrainOn) -> String {
    let model = Model::new(Some(template));
    match load(&model, row, &Data { train_on, ..data(Format::Auto) }) {
        Ok(row) => {
            assert_eq!(row.trained.len(), row.tokens.len());
            let first_trained = row.trained.iter().position(|trained| *trained).expect("a trained token");
            // The prompt ends where the answer begins, even if the prompt is trained on as well.
            match train_on {
                TrainOn::All => assert!(row.prompt_tokens >= first_trained),
                TrainOn::Assistant | TrainOn::Last => assert_eq!(row.prompt_tokens, first_trained),
            }
            shown(&model, &row)
        }
        Err(DatasetError::BadRows(rows)) => format!("refused: {}", rows.first[0].problem),
        Err(error) => panic!("{error}"),
    }
}

const TURNS: [(&str, &str); 5] =
    [("system", "S"), ("user", "1 é"), ("assistant", "\nHi 🦀 "), ("user", "2"), ("assistant", "Hé")];

#[test]
fn chatml_by_prefixes() {
    let masked = |train_on| mask(CHATML, &chat(&TURNS), train_on);
    let head = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n1 é<|im_end|>\n<|im_start|>assistant\n";
    let middle = "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(masked(TrainOn::Assistant), format!("{head}⟦\nHi 🦀 <|im_end|>\n⟧{middle}⟦Hé<|im_end|>\n⟧"));
    assert_eq!(masked(TrainOn::Last), format!("{head}\nHi 🦀 <|im_end|>\n{middle}⟦Hé<|im_end|>\n⟧"));
    let model = Model::new(Some(CHATML));
    let all = load(&model, &chat(&TURNS), &Data { train_on: TrainOn::All, ..data(Format::Auto) }).expect("a row");
    let prompt = model.tokenizer().decode(&all.tokens[..all.prompt_tokens], false).expect("text");
    assert_eq!(prompt, format!("{head}\nHi 🦀 <|im_end|>\n{middle}"), "generation starts from the whole conversation");
    let whole = format!("{head}\nHi 🦀 <|im_end|>\n{middle}Hé<|im_end|>\n");
    assert_eq!(masked(TrainOn::All), format!("<|im_start|>⟦{}⟧", whole.trim_start_matches("<|im_start|>")));
}

#[test]
fn the_end_of_sequence_of_a_bracket_template_is_trained() {
    let template = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} \
                    {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}";
    let row = chat(&[("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]);
    let expected = "<s>[INST] 1 [/INST]⟦ 2</s>⟧[INST] 3 [/INST]⟦ 4</s>⟧";
    assert_eq!(mask(template, &row, TrainOn::Assistant), expected);
    // There is one BOS, which the template writes.
    assert_eq!(expected.matches("<s>").count(), 1);
}

#[test]
fn a_token_across_the_border_belongs_to_the_prompt() {
    // "H" of the generation prompt and "i" of the answer are one token.
    let template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}H{{ m.content }}{% endif %}\
                    {% endfor %}{% if add_generation_prompt %}H{% endif %}";
    assert_eq!(mask(template, &chat(&[("user", "a"), ("assistant", "i!")]), TrainOn::Assistant), "aHi⟦!⟧");
}

/// Drops the reasoning of earlier answers, as Qwen3 does.
const SHIFTING: &str = "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content if loop.last else \
                        m.content.split('=')[-1] }};{% else %}U:{{ m.content }};{% endif %}{% endfor %}\
                        {% if add_generation_prompt %}A:{% endif %}";

#[test]
fn a_template_that_makes_another_prompt_is_refused_by_turn() {
    let row = chat(&[("user", "1"), ("assistant", "t=a")]);
    assert_eq!(mask(SHIFTING, &row, TrainOn::Assistant), "U:1;A:⟦t=a;⟧");
    let told = "refused: turn 2 (assistant): the chat template does not render it behind its own generation prompt";
    let template = SHIFTING.replace("%}A:{% endif", "%}B:{% endif");
    assert_eq!(mask(&template, &row, TrainOn::Assistant), told);
    let row = chat(&[("user", "1"), ("assistant", "t=a"), ("user", "2"), ("assistant", "t=b")]);
    assert_eq!(mask(SHIFTING, &row, TrainOn::Last), "U:1;A:a;U:2;A:⟦t=b;⟧");
    // A conversation in which the assistant answers nothing is refused with the ways out.
    let template = "{% if not messages %}{{ raise_exception('none') }}{% endif %}{{ messages[-1].content }}";
    assert_eq!(
        mask(template, &chat(&[("assistant", "a")]), TrainOn::Assistant),
        "refused: turn 1: the conversation begins with the assistant, so there is nothing that it answers"
    );
}

#[test]
fn generation_blocks_where_prefixes_fail() {
    let template =
        SHIFTING.replace("A:{{", "A:{% generation %}{{").replace("}};{% else", "}};{% endgeneration %}{% else");
    let row = chat(&[("user", "1"), ("assistant", "t=a"), ("user", "2"), ("assistant", "t=b")]);
    assert_eq!(mask(&template, &row, TrainOn::Assistant), "U:1;A:⟦a;⟧U:2;A:⟦t=b;⟧");
    assert_eq!(mask(&template, &row, TrainOn::Last), "U:1;A:a;U:2;A:⟦t=b;⟧");
    // A late user turn leaves the last answer in the middle.
    let row = chat(&[("user", "1"), ("assistant", "t=a"), ("user", "2"), ("assistant", "t=b"), ("user", "3")]);
    assert_eq!(mask(&template, &row, TrainOn::Last), "U:1;A:a;U:2;A:⟦b;⟧U:3;");
}

#[test]
fn texts_of_a_row_for_people() {
    let model = Model::new(Some(CHATML));
    let texts = |row: &Value, train_on| {
        let row = load(&model, row, &Data { train_on, ..data(Format::Auto) }).expect("a row");
        (row.prompt_text, row.answer_text)
    };
    let pair = |prompt: &str, answer: &str| (prompt.to_owned(), answer.to_owned());
    assert_eq!(texts(&chat(&TURNS), TrainOn::Assistant), pair("1 é", "\nHi 🦀 "));
    assert_eq!(texts(&chat(&TURNS), TrainOn::Last), pair("2", "Hé"));
    assert_eq!(texts(&json!({"prompt": "a", "completion": "b"}), TrainOn::Assistant), pair("a", "b"));
    assert_eq!(texts(&json!({"text": "a"}), TrainOn::Assistant), pair("", "a"));
    assert_eq!(
        texts(&json!({"input_ids": [97, 98, 99], "labels": [-100, -100, 99]}), TrainOn::Assistant),
        pair("ab", "c")
    );
}

#[test]
fn plain_rows_end_where_the_tokenizer_says() {
    let plain = |row: Value, train_on| mask(CHATML, &row, train_on);
    assert_eq!(plain(json!({"prompt": "a ", "completion": "b"}), TrainOn::Assistant), "<s>a ⟦b</s>⟧");
    assert_eq!(plain(json!({"prompt": "a ", "completion": "b</s>"}), TrainOn::Last), "<s>a ⟦b</s>⟧");
    assert_eq!(plain(json!({"prompt": "a", "completion": "b"}), TrainOn::All), "<s>⟦ab</s>⟧");
    // "H" and "i" would become one token, so they are tokenized apart.
    assert_eq!(plain(json!({"prompt": "H", "completion": "i"}), TrainOn::Assistant), "<s>H⟦i</s>⟧");
    assert_eq!(plain(json!({"prompt": "", "completion": "b"}), TrainOn::Assistant), "<s>⟦b</s>⟧");
    assert_eq!(plain(json!({"text": "ab"}), TrainOn::Assistant), "<s>⟦ab</s>⟧");
    assert_eq!(plain(json!({"text": "ab</s>"}), TrainOn::All), "<s>⟦ab</s>⟧");
    let unended = Model::with_tokens(None, json!({}));
    let row = load(&unended, &json!({"text": "ab"}), &data(Format::Auto)).expect("a row");
    assert_eq!(shown(&unended, &row), "<s>⟦ab⟧");
}

#[test]
fn message_lists_of_prompt_and_completion() {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let row = json!({
        "prompt": [turn("user", "1"), turn("assistant", "2"), turn("user", "3")],
        "completion": [turn("assistant", "4"), turn("tool", "5"), turn("assistant", "6")],
    });
    let head = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n3<|im_end|>\n";
    let tail =
        "<|im_start|>assistant\n⟦4<|im_end|>\n⟧<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n⟦6<|im_end|>\n⟧";
    assert_eq!(mask(CHATML, &row, TrainOn::Assistant), format!("{head}{tail}"));
}
