//! Calls as published templates write them, whole and letter by letter.

use serde_json::{Value, json};

use super::formats;
use crate::tool_calls::{CallReader, ToolCall, Tools};

/// A text, a number, a switch, and a list, each of which has its own way in the notations.
fn tools() -> Tools {
    let text = json!({"type": "string"});
    let properties = json!({
        "city": text,
        "days": {"type": "integer"},
        "short": {"type": "boolean"},
        "parts": {"type": "array", "items": text},
        "note": {"anyOf": [text, {"type": "null"}]},
    });
    let weather = json!({"name": "weather", "parameters": {"type": "object", "properties": properties}});
    Tools::new(json!([
        {"type": "function", "function": weather},
        {"type": "function", "function": {"name": "now"}},
    ]))
}

/// The text and the calls of an answer that comes in these pieces. `sign`: what the template has.
fn read<'a>(sign: &str, pieces: impl Iterator<Item = &'a str>) -> (String, Vec<ToolCall>) {
    let mut reader = CallReader::new(formats(|text| text.is_empty() || sign.contains(text)), tools());
    let mut text: String = pieces.map(|piece| reader.push(piece)).collect();
    let (rest, calls) = reader.finish();
    text += &rest;
    (text, calls)
}

/// Whole, letter by letter, and cut at each place the answer reads the same.
fn expect(sign: &str, answer: &str, text: &str, want: &[(&str, Value)]) {
    let check = |(got_text, calls): (String, Vec<ToolCall>), how: &str| {
        let calls: Vec<(&str, Value)> = calls
            .iter()
            .map(|call| (call.name.as_str(), serde_json::from_str(&call.arguments).expect("JSON")))
            .collect();
        assert_eq!((got_text.as_str(), calls.as_slice()), (text, want), "{how}: {answer}");
    };
    check(read(sign, [answer].into_iter()), "whole");
    let letters: Vec<String> = answer.chars().map(String::from).collect();
    check(read(sign, letters.iter().map(String::as_str)), "letter by letter");
    for (place, _) in answer.char_indices() {
        let (first, second) = answer.split_at(place);
        check(read(sign, [first, second].into_iter()), &format!("cut at {place}"));
    }
}

#[test]
fn calls_as_json() {
    let paris = || ("weather", json!({"city": "Paris"}));
    let rome = || ("weather", json!({"city": "Rome; Italy"}));
    let qwen = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>";
    let two = format!("{qwen}\n{}", qwen.replace("Paris", "Rome; Italy"));
    let llama = "{\"name\": \"weather\", \"parameters\": {\"city\": \"Paris\"}}";
    let now = || ("now", json!({}));
    for (answer, text, want) in [
        (qwen.to_owned(), "", vec![paris()]),
        (format!("Let me see.\n{qwen}"), "Let me see.\n", vec![paris()]),
        // Marks in a text of the arguments.
        (
            qwen.replace("Paris", "<tool_call></tool_call>"),
            "",
            vec![("weather", json!({"city": "<tool_call></tool_call>"}))],
        ),
        (two, "", vec![paris(), rome()]),
        (llama.to_owned(), "", vec![paris()]),
        (format!("<|python_tag|>{llama}"), "", vec![paris()]),
        (format!("{llama}; {}", llama.replace("Paris", "Rome; Italy")), "", vec![paris(), rome()]),
        ("[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]".to_owned(), "", vec![paris()]),
        ("[{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\"}}]".to_owned(), "", vec![paris()]),
        ("[TOOL_CALLS]weather[ARGS]{\"city\": \"Paris\"}".to_owned(), "", vec![paris()]),
        ("[TOOL_CALLS]now[CALL_ID]abc[ARGS]{}".to_owned(), "", vec![now()]),
        ("<|tool_call|>[{\"name\": \"now\", \"arguments\": {}}]<|/tool_call|>".to_owned(), "", vec![now()]),
        ("<tool_call>{\"name\": \"now\"}".to_owned(), "", vec![now()]),
        ("<tool_call>{\"name\": \"now\", \"arguments\": \"{}\"}</tool_call>".to_owned(), "", vec![now()]),
    ] {
        expect("", &answer, text, &want);
    }
}

/// Qwen3-Coder and Qwen3.5, GLM-4.5 and 4.7: texts as they are, other values as JSON or Python, by the tool's parameters.
#[test]
fn calls_as_tags() {
    let qwen = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n\
                </function>\n</tool_call>";
    let call = || ("weather", json!({"city": "Paris", "days": 3}));
    let now = || ("now", json!({}));
    let of_qwen = |key: &str, value: &str| {
        format!("<tool_call>\n<function=weather>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>")
    };
    for (answer, text, want) in [
        (qwen.to_owned(), "", vec![call()]),
        (format!("Let me see.\n\n{qwen}\n{qwen}"), "Let me see.\n\n", vec![call(), call()]),
        // Without the mark around it, as Qwen3-Coder often has it.
        (qwen.replacen("<tool_call>\n", "", 1), "", vec![call()]),
        ("<tool_call>\n<function=now>\n</function>\n</tool_call>".to_owned(), "", vec![now()]),
        (of_qwen("city", "12"), "", vec![("weather", json!({"city": "12"}))]),
        (of_qwen("city", "a\n<b>\n\nc "), "", vec![("weather", json!({"city": "a\n<b>\n\nc "}))]),
        (of_qwen("short", "True"), "", vec![("weather", json!({"short": true}))]),
        (of_qwen("parts", "[\"sun\", \"wind\"]"), "", vec![("weather", json!({"parts": ["sun", "wind"]}))]),
        // The mark that ends a value, in a text of a list.
        (of_qwen("parts", "[\"a</parameter>\"]"), "", vec![("weather", json!({"parts": ["a</parameter>"]}))]),
        (of_qwen("note", "None"), "", vec![("weather", json!({"note": null}))]),
        (of_qwen("note", "7"), "", vec![("weather", json!({"note": "7"}))]),
        (of_qwen("unknown", "7"), "", vec![("weather", json!({"unknown": 7}))]),
        // Cut off: nobody knows what was to come.
        (qwen[..qwen.len() - 25].to_owned(), &qwen[..qwen.len() - 25], vec![]),
    ] {
        expect("<tool_call>\n<function=", &answer, text, &want);
    }
    let glm = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n\
               <arg_value>3</arg_value>\n</tool_call>";
    for (answer, text, want) in [
        (glm.to_owned(), "", vec![call()]),
        (glm.replace('\n', ""), "", vec![call()]),
        (format!("Let me see.\n{glm}\n{glm}"), "Let me see.\n", vec![call(), call()]),
        ("<tool_call>now</tool_call>".to_owned(), "", vec![now()]),
        ("<tool_call>weather<arg_key>city</arg_key>".to_owned(), "<tool_call>weather<arg_key>city</arg_key>", vec![]),
    ] {
        expect("<tool_call>{function-name}\n<arg_key>", &answer, text, &want);
    }
}

#[test]
fn calls_between_marks() {
    let call = || ("weather", json!({"city": "Paris", "days": 3}));
    let now = || ("now", json!({}));
    let json = "{\"city\": \"Paris\", \"days\": 3}";
    let v3 = format!(
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{json}\n```<｜tool▁call▁end｜>\n\
         <｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    );
    let v31 = format!(
        "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{json}<｜tool▁call▁end｜>\
         <｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    );
    let kimi = format!(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{json}\
         <|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>\
         <|tool_calls_section_end|>"
    );
    let gemma = "<|tool_call>call:weather{city:<|\"|>Paris<|\"|>,days:3}<tool_call|><|tool_call>call:now{}<tool_call|>";
    let lfm = "<|tool_call_start|>[weather(city=\"Paris\", days=3), now()]<|tool_call_end|>";
    let olmo = "<function_calls>\nweather(city='Paris', days=3)\nnow()\n</function_calls>";
    for (sign, answer, text) in [
        ("<｜tool▁calls▁begin｜>", v3.as_str(), ""),
        ("<｜tool▁calls▁begin｜>", &v31, "Sure."),
        ("<|tool_calls_section_begin|>", &kimi, ""),
        ("<|tool_call>call:", gemma, ""),
        ("", lfm, ""),
        ("<function_calls>", olmo, ""),
    ] {
        expect(sign, answer, text, &[call(), now()]);
    }
    // The template writes the name of a call in front of its result.
    let ids: Vec<Option<String>> =
        read("<|tool_calls_section_begin|>", [kimi.as_str()].into_iter()).1.into_iter().map(|call| call.id).collect();
    assert_eq!(ids, ["functions.weather:0", "functions.now:1"].map(|id| Some(id.to_owned())));
    for (sign, answer) in [
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\""),
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"),
        ("<|tool_call>call:", "<|tool_call>call:weather{city:<|\"|>Par"),
        ("", "<|tool_call_start|>[weather(city=\"Par"),
        // A template that does not have them: text.
        ("", "<function=now></function>"),
        ("", "<function_calls>now()"),
    ] {
        expect(sign, answer, answer, &[]);
    }
}

/// Llama 3.2 and 4: a list in Python as the whole answer, with marks around it or without.
#[test]
fn calls_as_a_list_in_python() {
    let call = || ("weather", json!({"city": "Paris", "days": 3}));
    let now = || ("now", json!({}));
    let two = "[weather(city=\"Paris\", days=3), now()]";
    let json = "{\"name\": \"now\", \"parameters\": {}}";
    for (answer, want) in [
        (two.to_owned(), vec![call(), now()]),
        (format!("\n {} \n", two.replace('"', "'").replace(", ", " ,\n")), vec![call(), now()]),
        ("[now()]".to_owned(), vec![now()]),
        // As a template writes it that has quotes around everything.
        (two.replace('3', "\"3\""), vec![call(), now()]),
        ("[weather(city=\"1\", note=\"2\")]".to_owned(), vec![("weather", json!({"city": "1", "note": "2"}))]),
        (
            "[weather(city=\"a, b)]\", parts=[\"[now()]\"])]".to_owned(),
            vec![("weather", json!({"city": "a, b)]", "parts": ["[now()]"]}))],
        ),
        (format!("<|python_start|>{two}<|python_end|>"), vec![call(), now()]),
        (format!("<|python_start|>{two}"), vec![call(), now()]),
        (format!("<|python_start|><|python_end|>{json}"), vec![now()]),
        (format!("<|python_tag|>{two}"), vec![call(), now()]),
        ("<|python_tag|>weather.call(city=\"Paris\")".to_owned(), vec![("weather", json!({"city": "Paris"}))]),
    ] {
        expect("", &answer, "", &want);
    }
    for answer in [
        // No tool has this name.
        "[later()]",
        "[weather(city=\"Paris\"), later()]",
        "[weather]",
        "[weather](https://example.com)",
        "[weathering(the storm)]",
        "[now() is the name of a function]",
        "[now()] is how it is called",
        "[weather(\"Paris\")]",
        "[weather(city=Paris)]",
        "weather(city=\"Paris\")",
        "Like so: [now()]",
        "<|python_tag|>print(7)",
        // Cut off.
        "[weather(city=\"Paris\"",
        "[weather(city=\"Paris\")",
    ] {
        expect("", answer, answer, &[]);
    }
}

/// What cannot become a call is shown as it comes.
#[test]
fn a_list_of_something_else_is_not_held_back() {
    let mut reader = CallReader::new(formats(str::is_empty), tools());
    for (piece, shown) in [("[", ""), ("we", ""), ("b", "[web"), (" pages", " pages"), ("]", "]")] {
        assert_eq!(reader.push(piece), shown, "{piece}");
    }
}
