//! Calls as published templates write them: the form that is found, what fits its grammar, and what is read of it.

use serde_json::{Value, json};

use super::*;
use crate::call_formats::formats;
use crate::forms::tests::{fits, tokenizer};
use crate::forms::{Calls, Thought, grammar};
use crate::free_forms;
use crate::grammar::Grammars;

/// A template's formats by a text that it has.
fn formats_of(sign: &str) -> Vec<&'static CallFormat> {
    formats(|text| text.is_empty() || sign.contains(text))
}

fn form_in(sign: &str, text: &str) -> Option<CallForm> {
    let is_special =
        |mark: &str| ["<|im_end|>", "<|eot_id|>", "</s>", "<turn|>", "<｜end▁of▁sentence｜>"].contains(&mark);
    CallForm::in_text(text, &formats_of(sign), &is_special)
}

/// Two calls of the samples with their arguments, in the way of each family: (what tells its template, the calls as the
/// template writes them).
fn published() -> [(&'static str, String); 13] {
    let json = "{\"first_key\": \"sample_value\", \"second_key\": 7}";
    let hermes = |name: &str| format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {json}}}\n</tool_call>");
    let coder = |name: &str| {
        format!(
            "<tool_call>\n<function={name}>\n<parameter=first_key>\nsample_value\n</parameter>\n\
             <parameter=second_key>\n7\n</parameter>\n</function>\n</tool_call>"
        )
    };
    let glm = |name: &str| {
        format!(
            "<tool_call>{name}\n<arg_key>first_key</arg_key>\n<arg_value>sample_value</arg_value>\n\
             <arg_key>second_key</arg_key>\n<arg_value>7</arg_value>\n</tool_call>"
        )
    };
    let mistral = |name: &str, id: &str| format!("{{\"name\": \"{name}\", \"arguments\": {json}, \"id\": \"{id}\"}}");
    let v3 = |name: &str| {
        format!("<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{json}\n```<｜tool▁call▁end｜>")
    };
    let v31 = |name: &str| format!("<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json}<｜tool▁call▁end｜>");
    let kimi = |name: &str, n: usize| {
        format!("<|tool_call_begin|>functions.{name}:{n}<|tool_call_argument_begin|>{json}<|tool_call_end|>")
    };
    let gemma =
        |name: &str| format!("<|tool_call>call:{name}{{first_key:<|\"|>sample_value<|\"|>,second_key:7}}<tool_call|>");
    let python = |name: &str, quote: char| format!("{name}(first_key={quote}sample_value{quote}, second_key=7)");
    let [one, other] = SAMPLES;
    // Templates show the form, and list the tools.
    let shown = "sample_name first_key <tool_call>{function-name}</tool_call><|im_end|>";
    [
        ("", format!("{shown}{}\n{}<|im_end|>\n", hermes(one), hermes(other))),
        ("<function=", format!("{shown}{}\n{}<|im_end|>\n", coder(one), coder(other))),
        ("<arg_key>", format!("{shown}\n{}\n{}\n", glm(one), glm(other))),
        ("", format!("[TOOL_CALLS][{}, {}]</s>", mistral(one, IDS[0][0]), mistral(other, IDS[0][1]))),
        ("", format!("<|header|>{{\"name\": \"{one}\", \"parameters\": {json}}}<|eot_id|>")),
        (
            "<｜tool▁calls▁begin｜>",
            format!("<｜tool▁calls▁begin｜>{}\n{}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>", v3(one), v3(other)),
        ),
        (
            "<｜tool▁calls▁begin｜>",
            format!("<｜tool▁calls▁begin｜>{}{}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>", v31(one), v31(other)),
        ),
        (
            "<|tool_calls_section_begin|>",
            format!(
                "<|tool_calls_section_begin|>{}{}<|tool_calls_section_end|><|im_end|>",
                kimi(one, 0),
                kimi(other, 1)
            ),
        ),
        ("<|tool_call>call:", format!("{}{}<turn|>\n", gemma(one), gemma(other))),
        ("", format!("<|tool_call_start|>[{}, {}]<|tool_call_end|><|im_end|>", python(one, '\''), python(other, '\''))),
        (
            "<function_calls>",
            format!("<function_calls>\n{}\n{}\n</function_calls><|im_end|>", python(one, '"'), python(other, '"')),
        ),
        // Llama 3.2's other template, which leaves out the quotes of texts, and Llama 4's, which has them around all.
        (
            "",
            format!("<|header|>[{}, {}]<|eot_id|>", python(one, ' '), python(other, ' '))
                .replace(" sample_value ", TEXT),
        ),
        ("", format!("<|header|>[{}, {}]<|eot|>", python(one, '"'), python(other, '"')).replace('7', "\"7\"")),
    ]
}

#[test]
fn published_calls_show_their_form() {
    let found: Vec<CallForm> = published()
        .iter()
        .map(|(sign, text)| form_in(sign, text).unwrap_or_else(|| panic!("no form in {text}")))
        .collect();
    let around = |form: &CallForm| (form.open.clone(), form.next.clone(), form.close.clone());
    let parts = |open: &str, next: &str, close: &str| (open.to_owned(), Some(next.to_owned()), close.to_owned());
    let hermes = "<tool_call>\n{\"name\": \"";
    let end = "}\n</tool_call>";
    assert_eq!(around(&found[0]), parts(hermes, &format!("{end}\n{hermes}"), end));
    let (coder, end) = ("<tool_call>\n<function=", "</function>\n</tool_call>");
    assert_eq!(around(&found[1]), parts(coder, &format!("{end}\n{coder}"), end));
    assert_eq!(around(&found[2]), parts("<tool_call>", "</tool_call>\n<tool_call>", "</tool_call>"));
    // Without the names that the template gives calls.
    assert_eq!(around(&found[3]), parts("[TOOL_CALLS][{\"name\": \"", "}, {\"name\": \"", "}]"));
    assert_eq!((found[4].open.as_str(), &found[4].next, found[4].close.as_str()), ("{\"name\": \"", &None, "}"));
    assert_eq!(
        found[7].arguments,
        Arguments::Json { between: "<|tool_call_argument_begin|>".to_owned(), counted: true }
    );
    assert_eq!(around(&found[8]), parts("<|tool_call>call:", "<tool_call|><|tool_call>call:", "<tool_call|>"));
    assert_eq!(around(&found[9]), parts("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"));
    assert_eq!([around(&found[11]), around(&found[12])], [parts("[", ", ", "]"), parts("[", ", ", "]")]);
    assert_eq!([&found[11].arguments, &found[12].arguments], [&Arguments::Python; 2]);
    for other in
        ["", "no call", "sample_value", "<tool_call>\n{\"name\": \"sample_name\", \"arguments\": \"sample_value\"}"]
    {
        assert_eq!(form_in("", other), None, "{other}");
    }
    assert_eq!(CallForm::of(&tokenizer(), &formats_of("")), None, "its template knows no tools");
}

/// A tool with a text, a number, a choice, a list and an object.
fn weather() -> Value {
    let parameters = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 1},
            "days": {"type": "integer", "minimum": 1},
            "unit": {"$ref": "#/$defs/unit"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
            "where": {"type": "object", "properties": {"north": {"type": "boolean"}}, "additionalProperties": false},
        },
        "required": ["city"],
        "$defs": {"unit": {"enum": ["C", "F"]}},
    });
    json!({"type": "function", "function": {"name": "weather", "parameters": parameters}})
}

/// The arguments of `weather` as each notation writes them: one of each kind of value, one that is the least, and some
/// that do not fit.
fn written(arguments: &Arguments) -> (Vec<String>, Vec<String>) {
    let strings = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    match arguments {
        Arguments::Json { .. } => (
            strings(&[
                "{\"city\": \"</tool_call> a\", \"days\": 3, \"unit\": \"C\", \"tags\": [\"x\"], \"where\": {\"north\": true}}",
                "{\"city\": \"Paris\"}",
            ]),
            strings(&["{}", "{\"city\": \"Paris\", \"days\": 0}", "{\"city\": \"Paris\", \"unit\": \"K\"}"]),
        ),
        Arguments::Tagged(Tags { key, value, end, .. }) => {
            let of =
                |all: &[(&str, &str)]| all.iter().map(|(k, v)| format!("{key}{k}{value}{v}{end}")).collect::<String>();
            let city = ("city", "Paris");
            (
                vec![
                    of(&[
                        ("city", "</tool_call> a"),
                        ("days", "3"),
                        ("unit", "C"),
                        ("tags", "[\"x\"]"),
                        ("where", "{\"north\": true}"),
                    ]),
                    of(&[city]),
                ],
                vec![of(&[]), of(&[city, ("days", "0")]), of(&[city, ("unit", "K")]), of(&[city, ("tags", "x")])],
            )
        }
        Arguments::Gemma => (
            strings(&[
                "city:<|\"|></tool_call> a<|\"|>,days:3,unit:<|\"|>C<|\"|>,tags:[<|\"|>x<|\"|>],where:{north:true}}",
                "city:<|\"|>Paris<|\"|>}",
            ]),
            strings(&[
                "}",
                "city:Paris}",
                "city:<|\"|>Paris<|\"|>,days:0}",
                "city:<|\"|>Paris<|\"|>,unit:<|\"|>K<|\"|>}",
            ]),
        ),
        Arguments::Python => (
            strings(&[
                "city='</tool_call> a', days=3, unit=\"C\", tags=['x'], where={\"north\": True})",
                "city=\"Paris\")",
            ]),
            strings(&[")", "city=Paris)", "city='Paris', days=0)", "city='Paris', unit='K')"]),
        ),
    }
}

/// A call of a tool, from its name to the end of its arguments.
fn call(arguments: &Arguments, name: &str, written: &str) -> String {
    match arguments {
        Arguments::Json { between, counted } => {
            let number = if *counted { ":0" } else { "" };
            format!("{name}{number}{between}{written}")
        }
        Arguments::Tagged(Tags { begin, .. }) => format!("{name}{begin}{written}"),
        Arguments::Gemma => format!("{name}{{{written}"),
        Arguments::Python => format!("{name}({written}"),
    }
}

/// What fits the grammar of a form is read as arguments of the schema's types, and what does not fit its schema cannot
/// be said.
#[test]
fn calls_that_fit_are_read_as_what_they_are() {
    let (tokenizer, tool) = (tokenizer(), weather());
    let quit = json!({"type": "function", "function": {"name": "quit"}});
    let all = json!({"city": "</tool_call> a", "days": 3, "unit": "C", "tags": ["x"], "where": {"north": true}});
    let least = json!({"city": "Paris"});
    for (sign, text) in published() {
        let form = form_in(sign, &text).expect("a form");
        let grammars = Grammars::of(&tokenizer, &[0], &form.marks(&formats_of(sign))).expect("a vocabulary of bytes");
        let calls = Calls { form: &form, tools: vec![&tool, &quit], one: false };
        let rules = grammar(None, Some(&calls), Thought::Not).expect("a grammar");
        let read = |answer: &str| -> Vec<(String, Value)> {
            let mut reader = CallReader::new(formats_of(sign), Tools::new(json!([tool, quit])));
            let shown = reader.push(answer);
            let (rest, calls) = reader.finish();
            assert_eq!((shown.trim(), rest.as_str()), ("", ""), "{answer}");
            calls.into_iter().map(|call| (call.name, serde_json::from_str(&call.arguments).expect("JSON"))).collect()
        };
        let around = |calls: &[String]| {
            let next = form.next.as_deref().unwrap_or_default();
            format!("{}{}{}", form.open, calls.join(next), form.close)
        };
        let (fitting, others) = written(&form.arguments);
        let of = |written: &String| call(&form.arguments, "weather", written);
        for (arguments, want) in fitting.iter().zip([&all, &least]) {
            let answer = around(&[of(arguments)]);
            assert!(fits(&grammars, &tokenizer, &rules, &answer, 0), "{answer}");
            assert_eq!(read(&answer), [("weather".to_owned(), want.clone())], "{answer}");
        }
        for arguments in &others {
            let answer = around(&[of(arguments)]);
            assert!(!fits(&grammars, &tokenizer, &rules, &answer, 0), "{answer}");
        }
        if form.next.is_some() {
            let none = match &form.arguments {
                Arguments::Json { .. } => "{}",
                Arguments::Tagged(_) => "",
                Arguments::Gemma => "}",
                Arguments::Python => ")",
            };
            let answer = around(&[of(&fitting[1]), call(&form.arguments, "quit", none)]);
            assert!(fits(&grammars, &tokenizer, &rules, &answer, 0), "{answer}");
            assert_eq!(
                read(&answer),
                [("weather".to_owned(), least.clone()), ("quit".to_owned(), json!({}))],
                "{answer}"
            );
            let more =
                answer.replacen(&call(&form.arguments, "quit", none), &call(&form.arguments, "quit", &fitting[1]), 1);
            let is_json = matches!(form.arguments, Arguments::Json { .. });
            assert_eq!(fits(&grammars, &tokenizer, &rules, &more, 0), is_json, "arguments that nobody names: {more}");
            let one = Calls { form: &form, tools: vec![&tool, &quit], one: true };
            let rules = grammar(None, Some(&one), Thought::Not).expect("a grammar");
            assert!(!fits(&grammars, &tokenizer, &rules, &answer, 0), "one call only: {answer}");
        }
        for answer in ["", "Hello", "{}"] {
            assert!(!fits(&grammars, &tokenizer, &rules, answer, 0), "{answer:?} {sign}");
        }
    }
}

/// Text is free. A call in it has its form, and nothing else is read as one.
#[test]
fn free_answers_have_calls_of_their_form() {
    let (tokenizer, tool) = (tokenizer(), weather());
    for (sign, text) in published() {
        let form = form_in(sign, &text).expect("a form");
        let begins = form.begins(&formats_of(sign));
        let grammars = Grammars::of(&tokenizer, &[0], &form.marks(&formats_of(sign))).expect("a vocabulary of bytes");
        let rules = free_forms::grammar(&form, begins, &[&tool], false, Thought::Not).expect("a grammar");
        let may_come = |answer: &str| fits(&grammars, &tokenizer, &rules, answer, 0);
        let read = |answer: &str| {
            let reader = CallReader::new(formats_of(sign), Tools::new(json!([tool])));
            let mut reader = reader.of_form(begins);
            let shown = reader.push(answer);
            let (rest, calls) = reader.finish();
            (shown + &rest, calls.len())
        };
        let whole =
            |written: &String| format!("{}{}{}", form.open, call(&form.arguments, "weather", written), form.close);
        let (fitting, others) = written(&form.arguments);
        for answer in fitting.iter().map(whole) {
            assert!(may_come(&answer), "{answer}");
            assert_eq!(read(&answer), (String::new(), 1), "{answer}");
            let behind = format!("So, é: {answer}");
            assert!(may_come(&behind), "{behind}");
            // Without a mark only an answer as a whole is a call.
            let has_mark = matches!(begins, Begins::Mark(_));
            let want = if has_mark { ("So, é: ".to_owned(), 1) } else { (behind.clone(), 0) };
            assert_eq!(read(&behind), want, "{behind}");
        }
        for answer in others.iter().map(whole) {
            assert!(!may_come(&answer), "{answer}");
        }
        // A list of what is no tool is text.
        let unknown = whole(&fitting[1]).replace("weather", "whether");
        assert_eq!(may_come(&unknown), begins == Begins::List, "{unknown}");
        let other = "<|python_tag|>{\"name\": \"weather\", \"parameters\": {}}";
        for text in ["", "Hello", "1 < 2, [a](b) {c}", "\n\n[1]", other] {
            assert!(may_come(text), "{text:?} {sign}");
            assert_eq!(read(text), (text.to_owned(), 0), "{text:?} {sign}");
        }
    }
}

#[test]
fn reasoning_stands_before_free_answers() {
    let (tokenizer, tool) = (tokenizer(), weather());
    let (sign, text) = &published()[0];
    let form = form_in(sign, text).expect("a form");
    let grammars = Grammars::of(&tokenizer, &[0], &form.marks(&formats_of(sign))).expect("a vocabulary of bytes");
    let of = |city: &str| {
        let arguments = call(&form.arguments, "weather", &format!("{{\"city\": {city}}}"));
        format!("{}{arguments}{}", form.open, form.close)
    };
    let may = Thought::May("<think>", "</think>");
    let opened = Thought::Opened("</think>");
    for (thought, answer, want) in [
        (may, "Hello".to_owned(), true),
        (may, "Hello <think> hm".to_owned(), true),
        (may, "<think>a <tool_call> b</think>\n\nHello".to_owned(), true),
        (may, "<think>hm".to_owned(), false),
        (may, format!("\n<think>hm</think>\n{}", of("\"Paris\"")), true),
        (may, format!("<think>hm</think>{}", of("7")), false),
        (opened, "hm</think>Hello".to_owned(), true),
        (opened, format!("hm</think>So: {}", of("\"Paris\"")), true),
        (opened, format!("hm</think>So: {}", of("7")), false),
        (opened, "Hello".to_owned(), false),
    ] {
        let begins = form.begins(&formats_of(sign));
        let rules = free_forms::grammar(&form, begins, &[&tool], false, thought).expect("a grammar");
        assert_eq!(fits(&grammars, &tokenizer, &rules, &answer, 0), want, "{thought:?}: {answer}");
    }
}

/// (a schema of a property, what is said of it where values are not JSON)
#[test]
fn parameters_that_a_notation_cannot_keep_are_refused() {
    let tagged = form_in("<function=", &published()[1].1).expect("a form");
    let python = form_in("", &published()[9].1).expect("a form");
    let gemma = form_in("<|tool_call>call:", &published()[8].1).expect("a form");
    let text = json!({"type": "string"});
    for (form, schema, words) in [
        (&tagged, json!({"type": ["string", "integer"]}), Some("texts have no quotes")),
        (&tagged, json!({"enum": ["1", 1]}), Some("read in another way")),
        (&tagged, json!({"type": "string", "pattern": "a|b$"}), Some("`pattern`")),
        (&tagged, json!({"type": "string", "format": "iri"}), Some("`format`")),
        (&tagged, json!({"type": "string", "pattern": "^[a-z]+$", "format": "uuid"}), None),
        (&tagged, json!({"anyOf": [text, {"type": "null"}], "default": null}), None),
        (&tagged, json!({"type": "object", "not": {}}), Some("`not`")),
        (&tagged, json!({"$ref": "#/nowhere"}), Some("leads nowhere")),
        (&tagged, json!({"anyOf": [{"type": "integer"}], "minimum": 5}), Some("`minimum` beside `anyOf`")),
        (&tagged, json!({"allOf": [{"type": "integer"}], "type": "integer", "default": 5}), None),
        (&python, json!({"type": "string", "pattern": "a"}), Some("`pattern`")),
        (&python, json!({"oneOf": [text, {"type": "null"}]}), Some("`oneOf`")),
        (&python, json!({"allOf": [text, {"minLength": 1}]}), Some("`allOf`")),
        (&python, json!({"type": "array", "uniqueItems": true}), Some("`uniqueItems`")),
        (&python, json!({"type": "array", "items": {"$ref": "#", "enum": [1]}}), Some("`enum` beside `$ref`")),
        (&python, json!({"enum": ["<|\"|>"]}), None),
        (&gemma, json!({"enum": ["<|\"|>"]}), Some("read in another way")),
        (&gemma, json!({"enum": ["say \"hi\""]}), None),
        (&python, json!({"anyOf": [text, {"type": "null"}], "description": "x"}), None),
        (&python, json!({}), None),
        (&python, json!({"type": "object", "additionalProperties": {"type": "integer"}}), None),
        // Within itself.
        (&python, json!({"allOf": [{"$ref": "#"}]}), None),
        (&python, json!({"type": "array", "items": {"$ref": "#/properties/a"}}), None),
    ] {
        let parameters = json!({"type": "object", "properties": {"a": schema}});
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
        let calls = Calls { form, tools: vec![&tool], one: true };
        let got = grammar(None, Some(&calls), Thought::Not);
        let is_as_wanted = match (&got, words) {
            (Ok(text), None) => {
                let grammars = Grammars::of(&tokenizer(), &[0], &[]).expect("a vocabulary of bytes");
                grammars.read(text).map(drop) == Ok(())
            }
            (Err(what), Some(words)) => what.contains(words) && what.contains("`f`"),
            _ => false,
        };
        assert!(is_as_wanted, "{schema}: {got:?}");
    }
    let named = |name: &str| json!({"type": "function", "function": {"name": name}});
    let tool = named("no name");
    let calls = |form| Calls { form, tools: vec![&tool], one: true };
    assert!(grammar(None, Some(&calls(&python)), Thought::Not).is_err_and(|what| what.contains("\"no name\"")));
    let required = json!({"function": {"name": "f", "parameters": {"type": "object", "required": ["b"]}}});
    let calls = Calls { form: &tagged, tools: vec![&required], one: true };
    assert!(grammar(None, Some(&calls), Thought::Not).is_err_and(|what| what.contains("`required` has \"b\"")));
}

/// Names of tools are letters of JSON, whatever they end with.
#[test]
fn a_name_that_ends_with_a_quote() {
    let (sign, text) = &published()[0];
    let form = form_in(sign, text).expect("a form");
    let tool = json!({"type": "function", "function": {"name": "say \"hi\""}});
    let calls = Calls { form: &form, tools: vec![&tool], one: true };
    let rules = grammar(None, Some(&calls), Thought::Not).expect("a grammar");
    let grammars = Grammars::of(&tokenizer(), &[0], &form.marks(&formats_of(sign))).expect("a vocabulary of bytes");
    let answer = format!("{}say \\\"hi\\\"\", \"arguments\": {{}}{}", form.open, form.close);
    assert!(fits(&grammars, &tokenizer(), &rules, &answer, 0), "{answer}");
}

/// What templates write by themselves. (a file, the marks or the JSON of its arguments)
#[test]
fn published_templates_write_calls_in_a_form() {
    let Some(templates) = std::env::var_os("CHAT_TEMPLATES") else {
        eprintln!("SKIPPED: published_templates needs a directory of templates (CHAT_TEMPLATES)");
        return;
    };
    let base = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../datasets/quickstart/base");
    for (file, key, between) in [
        ("qwen2_5.jinja", None, "\", \"arguments\": "),
        ("qwen3.jinja", None, "\", \"arguments\": "),
        ("deepseekv3.jinja", None, "\n```json\n"),
        ("glm4moe.jinja", Some("<arg_key>"), ""),
    ] {
        let path = std::path::Path::new(&templates).join(file);
        let tokenizer = ChatTokenizer::load(&base, Some(&path)).expect("a tokenizer");
        let formats = formats(|sign| sign.is_empty() || tokenizer.template_has(sign));
        let form = CallForm::of(&tokenizer, &formats).unwrap_or_else(|| panic!("no form of {file}"));
        assert!(form.next.is_some(), "{file}: {form:?}");
        match (&form.arguments, key) {
            (Arguments::Json { between: got, .. }, None) => assert_eq!(got, between, "{file}"),
            (Arguments::Tagged(tags), Some(key)) => assert_eq!(tags.key, key, "{file}"),
            (other, _) => panic!("{file}: {other:?}"),
        }
    }
}
