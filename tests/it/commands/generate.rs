//! `finetune generate`: prompts in every form, repeatable answers, and where an answer ends.

use finetune_dataset::ChatTokenizer;
use serde_json::Value;

use super::{chat_model, json_of};
use crate::program::{BINARY, run};

#[test]
fn generate_is_repeatable() {
    let folder = chat_model();
    let generate = |more: &[&str]| {
        let arguments = ["generate", "run/model", "--prompt", "Hi", "--max-new-tokens", "24", "--json"];
        json_of(&folder, &[&arguments[..], more].concat())
    };
    let greedy = generate(&[]);
    assert_eq!(greedy, generate(&["--seed", "9"]), "greedy text does not depend on the seed");
    let drawn = |seed: &str| generate(&["--temperature", "1.5", "--top-p", "0.9", "--seed", seed]);
    assert_eq!(drawn("1"), drawn("1"), "the same seed gives the same text");
    assert_ne!(drawn("1"), drawn("2"));

    let tokenizer = ChatTokenizer::load(&folder.path("model"), None).expect("a tokenizer");
    for answer in [greedy, drawn("1"), generate(&["--raw"])] {
        let ids = |key: &str| -> Vec<u32> { serde_json::from_value(answer[key].clone()).expect("ids") };
        let tokens = ids("token_ids");
        assert!(!tokens.is_empty() && tokens.len() <= 24);
        assert_eq!(answer["text"], tokenizer.decode(&tokens, true).expect("text"));
        let ended = tokenizer.eos_ids().contains(tokens.last().expect("a token"));
        assert!(ended || tokens.len() == 24, "{answer} {:?}", tokenizer.eos_ids());
        assert_eq!(answer["finish_reason"], if ended { "stop" } else { "length" });
    }
    let prompt =
        |answer: Value| -> Vec<u32> { serde_json::from_value(answer["prompt_token_ids"].clone()).expect("ids") };
    let decoded = |ids: Vec<u32>| tokenizer.decode(&ids, false).expect("text");
    assert_eq!(decoded(prompt(generate(&[]))), "<|user|>\nHi<|end|><|assistant|>\n");
    assert_eq!(decoded(prompt(generate(&["--raw"]))), "Hi", "--raw leaves the template out");

    // Without --json the output is the text alone.
    let text = folder.finetune(&["generate", "run/model", "--prompt", "Hi", "--max-new-tokens", "24"]).expect(0);
    assert_eq!(text.stdout, format!("{}\n", generate(&[])["text"].as_str().expect("text")));
    assert_eq!(text.stderr, "");
}

#[test]
fn generate_takes_prompts_in_every_form() {
    let folder = chat_model();
    let prompt_of = |arguments: &[&str]| {
        let arguments = [&["generate", "run", "--max-new-tokens", "4", "--json"], arguments].concat();
        let answer = json_of(&folder, &arguments);
        let tokenizer = ChatTokenizer::load(&folder.path("model"), None).expect("a tokenizer");
        let ids: Vec<u32> = serde_json::from_value(answer["prompt_token_ids"].clone()).expect("ids");
        tokenizer.decode(&ids, false).expect("text")
    };
    let hi = "<|user|>\nHi<|end|><|assistant|>\n";
    assert_eq!(prompt_of(&["-p", "Hi"]), hi);
    folder.write("list.json", br#"[{"role": "user", "content": "Hi"}]"#);
    folder.write("row.json", br#"{"messages": [{"role": "user", "content": "Hi"}]}"#);
    assert_eq!(prompt_of(&["--messages", "list.json"]), hi);
    assert_eq!(prompt_of(&["--messages", "row.json"]), hi);
    // As a row with it is trained on.
    folder.write("parts.json", br#"[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]"#);
    assert_eq!(prompt_of(&["--messages", "parts.json"]), hi);
    folder.write("image.json", br#"[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]"#);
    let refused = folder.finetune(&["generate", "run", "--messages", "image.json"]).expect(2);
    refused.says("--messages image.json: messages[0].content[0] has the type \"image\"");
    let line = format!("printf 'Hi\\n' | {} generate run --prompt - --max-new-tokens 4 --json", BINARY);
    let mut shell = std::process::Command::new("bash");
    let ended = run(shell.args(["-c", &line]).current_dir(folder.path(""))).expect(0);
    assert_eq!(
        ended.json()["prompt_token_ids"],
        json_of(&folder, &["generate", "run", "-p", "Hi", "--max-new-tokens", "4", "--json"])["prompt_token_ids"]
    );
    // A template that the user names.
    folder.write("own.jinja", b"{% for message in messages %}[{{ message.content }}]{% endfor %}");
    assert_eq!(prompt_of(&["-p", "Hi", "--chat-template", "own.jinja"]), "[Hi]");
}

/// An answer ends before a stop text, and says that it was stopped.
#[test]
fn generate_stops_at_a_text() {
    let folder = chat_model();
    // The model is hardly trained, but some of its answers are long enough.
    let drawn = (0..50).map(|seed| {
        let seed = seed.to_string();
        let words =
            ["generate", "run", "-p", "Hi", "--max-new-tokens", "24", "--json", "--temperature", "1.5", "--seed"];
        let arguments: Vec<String> = words.into_iter().map(str::to_owned).chain([seed]).collect();
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let whole = json_of(&folder, &words)["text"].as_str().expect("text").to_owned();
        (arguments, whole)
    });
    let (arguments, whole) = drawn.into_iter().find(|(_, whole)| whole.chars().count() > 8).expect("a longer answer");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let middle = whole.char_indices().nth(whole.chars().count() / 2).expect("a character").0;
    let stop: String = whole[middle..].chars().take(2).collect();
    let cut = json_of(&folder, &[&arguments[..], &["--stop", &stop]].concat());
    assert_eq!(cut["text"], whole[..whole.find(&stop).expect("it is there")], "{stop:?}");
    assert_eq!(cut["finish_reason"], "stop");
}

#[test]
fn generate_answers_the_rows_of_a_file() {
    let folder = chat_model();
    let arguments = ["generate", "run", "--data", "train.jsonl", "--max-new-tokens", "8"];
    let ended = folder.finetune(&arguments).expect(0);
    for part in ["train.jsonl:1", "expected  Hello there.", "train.jsonl:2", "answered word for word: "] {
        assert!(ended.stdout.contains(part), "{part}: {}", ended.stdout);
    }
    let ended = folder.finetune(&[&arguments[..], &["--json"]].concat()).expect(0);
    let rows: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[1]["expected"], "See you.");
}

/// The tiny model was made for 512 positions.
#[test]
fn text_beyond_the_context_is_said() {
    let folder = chat_model();
    let words = "word ".repeat(400);
    let arguments = ["generate", "run", "--raw", "--prompt", words.as_str(), "--max-new-tokens", "2"];
    folder.finetune(&arguments).expect(0).says("beyond the 512 positions");
    folder.write("long.jsonl", format!("{{\"text\": \"{words}\"}}\n").as_bytes());
    let ended = folder.finetune(&["eval", "run", "--data", "long.jsonl", "--json"]).expect(0);
    assert_eq!(ended.json()["rows_beyond_context"], 1);
    ended.says("longer than the 512 positions");
}
