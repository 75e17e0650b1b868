//! Templates and tokenizers of strangers against the real program. Its allocator and its signal
//! handler keep them within bounds. They end with exit code 2 and the name of the file, never with
//! a signal, a hang or all of the memory.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::folder::Folder;
use crate::program::{finetune, run};

const RECIPE: &str = r#"output_dir = "run"
[model]
path = "model"
[data]
train = "train.jsonl"
[train]
method = "full"
max_steps = 1
"#;

fn folder() -> Folder {
    let folder = Folder::with_chat_model(RECIPE);
    let row = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]}"#;
    folder.write("train.jsonl", format!("{row}\n{row}\n").as_bytes());
    folder
}

/// `validate` in this folder must refuse the files within a short time, and say this.
#[track_caller]
fn refused(folder: &Folder, name: &str, told: &[&str]) {
    let begin = Instant::now();
    let ended = run(finetune(["validate", "recipe.toml"]).current_dir(folder.path(""))).expect(2);
    assert!(begin.elapsed() < Duration::from_secs(120), "{name} took {:?}", begin.elapsed());
    for text in told {
        assert!(ended.stderr.contains(text), "{name}: stderr lacks {text:?}:\n{}", ended.stderr);
    }
    assert!(!ended.stderr.contains("bug in finetune"), "{name}:\n{}", ended.stderr);
}

#[test]
fn templates_that_overflow_the_stack() {
    let folder = folder();
    let deeper = |step: &str, then: &str| {
        format!(
            "{{% set n = namespace(l=[1], m=[1]) %}}{{% for i in range(90) %}}{{% for j in range(9000) %}}{step}{{% endfor %}}\
             {{% endfor %}}{then}"
        )
    };
    let many = |part: &str, count: usize| part.repeat(count);
    for (name, template) in [
        ("a namespace in itself", "{% set n = namespace() %}{% set n.n = n %}{{ n }}".to_owned()),
        ("a namespace in itself, joined to text", "{% set n = namespace() %}{% set n.n = n %}{{ n ~ '' }}".to_owned()),
        ("lists in lists", deeper("{% set n.l = [n.l] %}", "{{ n.l }}")),
        ("lists in lists, dropped", deeper("{% set n.l = [n.l] %}", "x")),
        ("maps in maps", deeper("{% set n.l = {'a': n.l} %}", "{{ n.l ~ '' }}")),
        ("a chain of lazy lists", deeper("{% set n.l = n.l * 1 %}", "{% for x in n.l %}{% endfor %}")),
        ("a chain of slices", deeper("{% set n.l = n.l[0:] %}", "{{ n.l|length }}")),
        ("a macro in itself", "{% macro m(x) %}{{ m([x]) }}{% endmacro %}{{ m(1) }}".to_owned()),
        ("minus", format!("{{{{ {}1 }}}}", many("- ", 30000))),
        ("attributes", format!("{{{{ a{} }}}}", many(".a", 40000))),
        (
            "short chains in brackets",
            format!("{{{{ {}1{} }}}}", many(&format!("({}", many("-", 1900)), 90), many(")", 90)),
        ),
        ("elif", format!("{{% if 0 %}}{}{{% endif %}}", many("{% elif 0 %}", 9000))),
        ("if in if", format!("{}{}", many("{% if 1 %}", 20000), many("{% endif %}", 20000))),
    ] {
        folder.write("model/chat_template.jinja", template.as_bytes());
        refused(&folder, name, &["chat_template.jinja"]);
    }
}

#[test]
fn templates_that_take_time_and_memory() {
    let folder = folder();
    for (name, template) in [
        ("a search in each step", "{% set r = range(99999)|list %}{% for i in r %}{% set y = -1 in r %}{% endfor %}"),
        ("steps", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        ("doubling", "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"),
        ("format", "{{ '%1000000000s'|format('x')|length }}"),
        ("slice", "{{ [1]|slice(10000000000)|list|length }}"),
        ("indent", "{{ ('a\n' * 100000)|indent(1000000)|length }}"),
    ] {
        folder.write("model/chat_template.jinja", template.as_bytes());
        refused(&folder, name, &["chat_template.jinja"]);
    }
}

#[test]
fn tokenizers_that_panic() {
    let folder = folder();
    let text = std::fs::read_to_string(folder.path("model/tokenizer.json")).expect("a tokenizer");
    let tokenizer: Value = serde_json::from_str(&text).expect("JSON");
    for (name, key, value) in [
        ("charsmap null", "normalizer", json!({"type": "Precompiled", "precompiled_charsmap": null})),
        (
            "charsmap pointing outside",
            "normalizer",
            json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAP////94eXo="}),
        ),
        (
            "a token that is not there",
            "post_processor",
            json!({"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                   "single": [{"SpecialToken": {"id": "<zz>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}),
        ),
    ] {
        let mut changed = tokenizer.clone();
        changed[key] = value;
        folder.write("model/tokenizer.json", changed.to_string().as_bytes());
        refused(&folder, name, &["tokenizer.json"]);
    }
}
