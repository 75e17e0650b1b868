//! Hostile templates and tokenizers: each is refused soon, and the error names it.

use std::time::{Duration, Instant};

use finetune_advice::Advice as _;
use finetune_dataset::{ChatTokenizer, Dataset, DatasetError};
use finetune_recipe::Format;
use serde_json::{Value, json};

use crate::made_up::{CHATML, Model, VOCABULARY, data, tokenizer_json};

fn rendered(template: &str) -> Result<String, DatasetError> {
    let model = Model::new(Some(template));
    let tokenizer = ChatTokenizer::load(model.path(), None)?;
    tokenizer.render(&[json!({"role": "user", "content": "x"})], None, false).map(|rendered| rendered.text)
}

#[test]
fn templates_run_out() {
    let many = |part: &str, count: usize| part.repeat(count);
    let in_a_loop =
        |step: &str| format!("{{% set n = namespace(x=\"a\", l=[1]) %}}{{% for i in range(60) %}}{step}{{% endfor %}}");
    let cases: Vec<(&str, String, &str)> = vec![
        ("steps", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".into(), "line 1: it takes too many steps"),
        ("steps in a macro", "{% macro m() %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endmacro %}\n{{ m() }}".into(), "too many steps"),
        ("text", "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}".into(), "64 MiB of text"),
        ("a search in each step", "{% set r = range(99999)|list %}{% for i in r %}{% set y = -1 in r %}{% endfor %}".into(), "does not end"),
        ("comparisons", "{% set r = range(99999)|list %}{% for i in r %}{% if r == range(99999)|list %}{% endif %}{% endfor %}".into(), "does not end"),
        ("doubling by ~", in_a_loop("{% set n.x = n.x ~ n.x %}"), "memory"),
        ("doubling by +", in_a_loop("{% set n.x = n.x + n.x %}"), "memory"),
        ("doubling by join", in_a_loop("{% set n.x = [n.x, n.x]|join %}"), "memory"),
        ("doubling a list", in_a_loop("{% set n.l = (n.l + n.l)|list %}"), "memory"),
        ("replace", "{{ ('a' * 1000000)|replace('a', 'b' * 1000000)|length }}".into(), "memory"),
        ("replace, the method", "{{ ('a' * 1000000).replace('a', 'b' * 1000000)|length }}".into(), "memory"),
        ("join", "{{ range(100000)|join('b' * 1000000)|length }}".into(), "memory"),
        ("join, the method", "{{ ('b' * 1000000).join(range(100000)|map('string'))|length }}".into(), "memory"),
        ("indent", "{{ ('a\n' * 100000)|indent(1000000)|length }}".into(), "memory"),
        ("slice", "{{ [1]|slice(10000000000)|list|length }}".into(), "memory"),
        ("batch", "{{ [1]|batch(10000000000, 'x')|list|length }}".into(), "memory"),
        ("a multiplied list", "{{ ([1] * 100000 * 100000)|list|length }}".into(), "memory"),
        ("center", "{{ 'x'|center(1000000000)|length }}".into(), "memory"),
        ("center, the method", "{{ 'x'.center(1000000000)|length }}".into(), "memory"),
        ("zfill", "{{ 'x'.zfill(1000000000)|length }}".into(), "memory"),
        ("expandtabs", "{{ '\t'.expandtabs(1000000000)|length }}".into(), "memory"),
        ("a list in lists, printed", "{% set n = namespace(l=[]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}\n{{ n.l }}".into(), ""),
        ("minus", format!("{{{{ {}1 }}}}", many("- ", 30000)), "line 1: an expression of more than"),
        ("not", format!("\n{{{{ {}1 }}}}", many("not ", 30000)), "line 2: an expression of more than"),
        ("plus", format!("{{{{ 1{} }}}}", many("+1", 30000)), "expression"),
        ("attributes", format!("{{{{ a{} }}}}", many(".a", 40000)), "expression"),
        ("filters", format!("{{{{ 1{} }}}}", many("|int", 40000)), "expression"),
        ("brackets", format!("{{{{ {}{} }}}}", many("[", 20000), many("]", 20000)), "brackets"),
        ("elif", format!("{{% if 0 %}}{}{{% endif %}}", many("{% elif 0 %}", 9000)), "elif"),
    ];
    for (name, template, told) in cases {
        let begin = Instant::now();
        let error = rendered(&template).expect_err(name);
        assert!(matches!(error, DatasetError::TemplateBounds { .. }), "{name}: {error:?}");
        let text = error.to_string();
        // On a busy machine the time may be over first.
        let is_told = text.contains(told) || text.contains("it does not end within");
        assert!(is_told && text.contains("chat_template.jinja"), "{name}: {text}");
        assert!(!error.hints().is_empty());
        assert!(begin.elapsed() < Duration::from_secs(30), "{name} took {:?}", begin.elapsed());
    }
}

/// An error of a template with one conversation is a problem of that row, and names the line.
#[test]
fn templates_stop() {
    for (template, told) in [
        ("\n{% set n = namespace() %}{% set n.n = n %}{{ n }}", "line 2) stopped: a value nests deeper"),
        (
            "{% set n = namespace(l=[]) %}{% for i in range(20000) %}{% set n.l = [n.l] %}{% endfor %}{{ n.l }}",
            "nests deeper",
        ),
        (
            "{% set n = namespace(l=[]) %}{% for i in range(20000) %}{% set n.l = [n.l] %}{% endfor %}{{ n.l|tojson }}",
            "nested too deeply",
        ),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion limit"),
        ("{{ 'x' * 1000000000 }}", "too large"),
        ("{{ '%9999999s' % 'x' }}", "wider than"),
        ("{{ [1][::0] }}", "cannot be zero"),
    ] {
        let error = rendered(template).expect_err(template);
        assert!(matches!(error, DatasetError::Template { .. }), "{error:?}");
        assert!(error.to_string().contains(told), "{template}: {error}");
    }
    // Deep values that the template does not use do no harm.
    let dropped = "{% set n = namespace(l=[]) %}{% for i in range(50000) %}{% set n.l = [n.l] %}{% endfor %}x";
    assert_eq!(rendered(dropped).expect("text"), "x");
}

/// The first row that runs out ends the reading: the others would cost as much.
#[test]
fn one_row_that_runs_out_is_enough() {
    let endless = "{% if messages|length > 1 %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}";
    let model = Model::new(Some(endless));
    let row = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
        .to_string()
        + "\n";
    let rows = model.write("rows.jsonl", row.repeat(2000));
    let begin = Instant::now();
    let error =
        Dataset::load(&[rows], &data(Format::Auto), &model.tokenizer(), VOCABULARY, 0, &|_| {}).expect_err("no rows");
    assert!(matches!(error, DatasetError::TemplateBounds { line: Some(1), .. }), "{error:?}");
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
}

fn template_post_processor(single: Value, pair: Value) -> Value {
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {}})
}

#[test]
fn tokenizers_that_fail_within_are_named() {
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let unknown = json!({"SpecialToken": {"id": "<zz>", "type_id": 0}});
    let cases = [
        ("charsmap null", "/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": null})),
        ("charsmap empty", "/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": ""})),
        (
            "charsmap pointing outside",
            "/normalizer",
            json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAP////94eXo="}),
        ),
        ("an empty pattern", "/normalizer", json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"})),
        (
            "a regex that never ends",
            "/pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": false}),
        ),
        ("pieces of no length", "/pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
        (
            "a token that is not there",
            "/post_processor",
            template_post_processor(json!([unknown, sequence("A")]), json!([])),
        ),
        (
            "the second of one",
            "/post_processor",
            template_post_processor(json!([sequence("B")]), json!([sequence("A")])),
        ),
        ("a prefix longer than the tokens", "/model/continuing_subword_prefix", json!("x".repeat(100_000))),
    ];
    for (name, place, value) in cases {
        let model = Model::new(Some(CHATML));
        let mut tokenizer = tokenizer_json();
        *tokenizer.pointer_mut(place).expect("a key") = value;
        model.write("tokenizer.json", tokenizer.to_string());
        let begin = Instant::now();
        let text = format!("{} hello", "a".repeat(300));
        // Some are refused when they are loaded, some at a text, and a few do no harm here.
        let outcome = ChatTokenizer::load(model.path(), None).and_then(|tokenizer| tokenizer.encode(&text, true));
        if let Err(error) = outcome {
            let told = error.to_string();
            let named = told.contains("tokenizer.json") || matches!(error, DatasetError::Tokenizer { .. });
            assert!(named, "{name}: {told}");
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "{name} took {:?}", begin.elapsed());
    }
}

#[test]
fn chance_is_switched_off() {
    let model = Model::new(Some(CHATML));
    let plain = model.tokenizer();
    let text = "Hi He Hi He ".repeat(20);
    let mut tokenizer = tokenizer_json();
    tokenizer["model"]["dropout"] = json!(0.5);
    model.write("tokenizer.json", tokenizer.to_string());
    let with_dropout = model.tokenizer();
    for _ in 0..3 {
        assert_eq!(with_dropout.encode(&text, true).expect("ids"), plain.encode(&text, true).expect("ids"));
    }
    let [notice] = with_dropout.notices() else { panic!("{:?}", with_dropout.notices()) };
    assert!(notice.contains("tokenizer.json") && notice.contains("at random"), "{notice}");
    assert!(plain.notices().is_empty());
    let files = with_dropout.files(&[]).expect("files");
    let (_, written) = files.iter().find(|(name, _)| name == "tokenizer.json").expect("a tokenizer");
    let written: Value = serde_json::from_slice(written).expect("JSON");
    assert_eq!(written["model"]["dropout"], Value::Null);
}
