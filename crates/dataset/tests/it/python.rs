//! Expressions of templates as jinja2 evaluates them.

use serde_json::{Value, json};

use crate::made_up::Model;

fn rendered(template: &str, message: Value) -> Result<String, String> {
    let model = Model::new(Some(template));
    model.tokenizer().render(&[message], None, false).map(|rendered| rendered.text).map_err(|error| error.to_string())
}

/// Left: a template. Right: what jinja2 3.1.6 prints, set up as transformers does.
#[test]
fn expressions_print_what_jinja2_prints() {
    for (template, printed) in [
        ("{{ '%s: ' % m.role }}|{{ '%s/%s' % (m.role, 1) }}|{{ '%(a)s' % {'a': none} }}", "user: |user/1|None"),
        ("{% set f = '%5.2f%%' %}{{ f % m.pi }}", " 3.25%"),
        ("{{ 7 % 3 }}{{ m.n % 2 == 1 }}{{ (1 + 6) % 4 }}", "1True3"),
        ("{{ nothing|length }}{{ m.images|length > 0 }}", "0False"),
        ("{{ '\x1c a \x1f'|trim }}{{ '\x1ca\x1f'.strip() }}{{ 'a\x1cb'.split() }}", "aa['a', 'b']"),
        ("{{ 'a\x1cb\u{2028}c\u{85}d'.splitlines() }}", "['a', 'b', 'c', 'd']"),
        ("{{ \"it's a-b (c) <d\"|title }}", "It's A-B (C) <D"),
        (
            "{{ 2.5|round }} {{ 3.5|round }} {{ 2.567|round(2) }} {{ 2.1|round(0, 'ceil') }} {{ 42|round }}",
            "2.0 4.0 2.57 3.0 42",
        ),
        ("{{ true is number }}{{ 1 is number }}{{ 'x' is number }}", "TrueTrueFalse"),
        ("{{ '<\\'\"&>'|e }}", "&lt;&#39;&#34;&amp;&gt;"),
        ("{{ 'aaa'|replace('a', 'b', 2) }}{{ 'a b  c'|wordcount }}{{ 'ab'|center(7) }}|", "bba3   ab  |"),
        (
            "{{ 'foo bar baz qux'|truncate(9) }}|{{ 'foo bar baz qux'|truncate(9, true) }}|{{ 'foo bar baz qux'|truncate(11) }}",
            "foo...|foo ba...|foo bar baz qux",
        ),
        ("{{ 'a/b c&ü'|urlencode }} {{ {'a': 1, 'b c': 'x'}|urlencode }}", "a/b%20c%26%C3%BC a=1&b+c=x"),
        ("{{ '<p>a  <b>b</b>\\n</p>'|striptags }}", "a b"),
        (
            "{{ '0x1f'|int(0, 16) }} {{ 'x'|int(7) }} {{ '3.9'|int }} {{ 3.9|int }} {{ ' 42 '|int }} {{ none|int }} {{ 'z'|float(1.5) }}",
            "31 7 3 3 42 0 1.5",
        ),
        ("{{ [{'a': 1}, {'a': 2}]|sum(attribute='a') }} {{ [1, 2]|sum(start=5) }} {{ [0.5, 1]|sum }}", "3 8 1.5"),
        ("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}", "abab"),
        ("{% set j = joiner('|') %}{{ j() }}x{{ j() }}y", "x|y"),
        ("{{ 'aBc'.swapcase() }}{{ '7'.zfill(3) }}{{ 'a'.ljust(3, '.') }}{{ 'ab'.center(5, '*') }}", "AbC007a..**ab*"),
        (
            "{{ 'a b c'.split(none, 1) }}{{ 'a b c'.split(maxsplit=1) }}{{ 'a,b'.split(sep=',') }}",
            "['a', 'b c']['a', 'b c']['a', 'b']",
        ),
        ("a\n  {% raw %}\n x {% endraw %}\nb", "a\n\n x b"),
        ("{{ '%s and %s'|format('a', none) }}", "a and None"),
    ] {
        let template = format!("{{% set m = messages[0] %}}{template}");
        let message = json!({"role": "user", "content": "x", "pi": 3.25, "n": 3});
        assert_eq!(rendered(&template, message), Ok(printed.to_owned()), "{template}");
    }
}

/// Left: a template. Right: what jinja2 3.1.6 prints. Gemma 4's template writes the types of a
/// parameter in capitals, and Nemotron's puts parts behind its tags.
#[test]
fn what_becomes_text_becomes_python_s() {
    let message = json!({
        "role": "user", "type": ["string", "null"], "parts": [{"type": "text", "text": "it's"}],
        "number": 1e21, "small": 1e-7, "flag": true, "nothing": null, "object": {"a": [1.0, null]},
    });
    for (template, printed) in [
        ("{{ m.type|upper }}", "['STRING', 'NULL']"),
        (
            "{{ m.type|lower }} {{ m.object|capitalize }} {{ m.object|safe }}",
            "['string', 'null'] {'a': [1.0, none]} {'a': [1.0, None]}",
        ),
        ("{{ 'éa B'|capitalize }}{{ ''|capitalize }}{{ m.missing|upper }}", "Éa b"),
        ("{{ '<' ~ m.parts ~ '>' }}", "<[{'type': 'text', 'text': \"it's\"}]>"),
        ("{{ m.number ~ ' ' ~ m.small ~ m.flag ~ m.nothing ~ m.missing ~ 1 ~ 2.50 }}", "1e+21 1e-07TrueNone12.5"),
        ("{{ [m.flag, 'a'] ~ (m.object ~ 'x')|upper }}", "[True, 'a']{'A': [1.0, NONE]}X"),
        ("{{ 2 ~ 3 }}{{ 'a' ~ 2 * 3 }}{{ 'a' ~ m.missing is defined }}{{ 'a' if 'b' ~ 1 == 'b1' }}", "23a6aFalsea"),
        (
            "{% set ns = namespace(t='') %}{% for p in m.type %}{% set ns.t = ns.t ~ loop.index ~ p %}{% endfor %}{{ ns.t }}",
            "1string2null",
        ),
    ] {
        let template = format!("{{% set m = messages[0] %}}{template}");
        assert_eq!(rendered(&template, message.clone()), Ok(printed.to_owned()), "{template}");
    }
}

/// Left: a template. Right: what it prints, or what jinja2 3.1.6 stops with. LFM2.5's template takes a content that
/// is no string for a list of parts.
#[test]
fn none_is_not_gone_over() {
    let stops = Err("'NoneType' object is not iterable");
    let parts = "{% if m.content is string %}text{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}";
    let message = |content: Value| json!({"role": "user", "content": content});
    for (template, content, want) in [
        (parts, json!(null), stops),
        (parts, json!([{"text": "a"}, {"text": "b"}]), Ok("ab")),
        (parts, json!("x"), Ok("text")),
        ("{% for c in m.content if c != 'b' %}{{ loop.index }}{{ c }}{% endfor %}", json!("abc"), Ok("1a2c")),
        ("{% for p in m.nothing %}x{% else %}empty{% endfor %}", json!(null), Ok("empty")),
        ("{% for p in m.content or [] %}x{% else %}empty{% endfor %}", json!(null), Ok("empty")),
        ("{% for k, v in m.items() %}{{ k }},{% endfor %}", json!(null), Ok("role,content,")),
        ("{{ m.content|list }}", json!(null), stops),
        ("{{ m.content|list }}", json!("ab"), Ok("['a', 'b']")),
        ("{{ m.content|join }}", json!(null), stops),
        ("{{ m.nothing|list }}{{ m.nothing|join }}", json!(null), Ok("[]")),
        ("{% macro f(x) %}{% for p in x %}{{ p }}{% endfor %}{% endmacro %}{{ f(m.content) }}", json!(null), stops),
    ] {
        let found = rendered(&format!("{{% set m = messages[0] %}}{template}"), message(content.clone()));
        match (&found, want) {
            (Ok(text), Ok(want)) => assert_eq!(text, want, "{template} {content}"),
            (Err(told), Err(part)) => assert!(told.contains(part), "{template} {content}: {told}"),
            _ => panic!("{template} {content}: {found:?}, expected {want:?}"),
        }
    }
}

/// jinja2 reads the line breaks of a template as \n; those of a row stay.
#[test]
fn line_breaks_of_a_template_are_line_feeds() {
    let template = "{%- for m in messages %}\r\n<{{ m.role }}\r\n'>' + {{ '\r\n' ~ m.content }}\r{% endfor %}\r\n";
    for place in ["chat_template.jinja", "tokenizer_config.json", "chosen"] {
        let model = Model::new(None);
        let chosen = match place {
            "tokenizer_config.json" => {
                model.write(place, json!({"chat_template": template}).to_string());
                None
            }
            "chosen" => Some(model.write("chosen.jinja", template)),
            file => {
                model.write(file, template);
                None
            }
        };
        let tokenizer = finetune_dataset::ChatTokenizer::load(model.path(), chosen.as_deref()).expect("a tokenizer");
        let messages = [json!({"role": "user", "content": "a\r\nb"})];
        let text = tokenizer.render(&messages, None, false).expect("text").text;
        assert_eq!(text, "<user\n'>' + \na\r\nb\n", "{place}");
    }
}

#[test]
fn long_integers_are_printed_as_they_are() {
    // As a row reads them: see `jsonl.rs`; here those of 64 bits, which JSON itself holds.
    let message =
        json!({"role": "user", "content": "", "a": u64::MAX, "b": i64::MIN, "c": 1e20, "d": [0.5, true, null]});
    let template = "{{ messages[0].a }} {{ messages[0].b|tojson }} {{ messages[0].c }} {{ messages[0].d }}";
    assert_eq!(
        rendered(template, message).expect("text"),
        "18446744073709551615 -9223372036854775808 1e+20 [0.5, True, None]"
    );
}

/// What a block sets in a namespace holds behind it, what it sets otherwise does not; loop
/// variables are seen in it.
#[test]
fn generation_blocks_keep_their_scope() {
    let template = "{% set ns = namespace(n=0, last='') %}{% set x = 'out' %}{% for m in messages %}\n\
                    {% if m.role == 'assistant' %}\n  {% generation %}\n{% set ns.n = ns.n + 1 %}{% set ns.last = m.content %}\
                    {% set x = 'in' %}{{ loop.index }}{{ m.content }}{{ x }}\n  {%- endgeneration %}\n{% else %}{{ m.content }}\
                    {% endif %}{% endfor %}{{ ns.n }}{{ ns.last }}{{ x }}";
    let model = Model::new(Some(template));
    let turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
    let messages = turns.map(|(role, content)| json!({"role": role, "content": content}));
    let rendered = model.tokenizer().render(&messages, None, false).expect("text");
    let blocks: Vec<&str> = rendered.generation_spans.iter().map(|span| &rendered.text[span.clone()]).collect();
    assert_eq!(blocks, ["2bin", "4din"]);
    assert_eq!(rendered.text, "a2binc4din2dout");
}
