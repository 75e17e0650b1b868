//! `finetune chat`: messages of a pipe, commands, what is kept from turn to turn, and a terminal.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{CHAT_RECIPE, chat_model, json_of};
use crate::folder::Folder;
use crate::program::{BINARY, DEADLINE, Ended, finetune, run};

/// `finetune chat ARGUMENTS` with this text on standard input.
fn chat(folder: &Folder, arguments: &[&str], input: &str) -> Ended {
    folder.write("input.txt", input.as_bytes());
    let words = ["-c", "exec \"$0\" chat \"$@\" < input.txt", BINARY];
    run(Command::new("bash").args(words).args(arguments).env("NO_COLOR", "1").current_dir(folder.path("")))
}

/// The answers that it gives as JSON.
fn answers(folder: &Folder, arguments: &[&str], input: &str) -> Vec<Value> {
    let ended = chat(folder, &[arguments, &["--json", "--quiet"]].concat(), input).expect(0);
    ended.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn number(answer: &Value, key: &str) -> u64 {
    answer[key].as_u64().unwrap_or_else(|| panic!("{key}: {answer}"))
}

/// A system prompt and the conversation up to a question, answered by `generate`.
fn generated(folder: &Folder, messages: &[Value]) -> Value {
    folder.write("asked.json", json!(messages).to_string().as_bytes());
    json_of(folder, &["generate", "run", "--messages", "asked.json", "--max-new-tokens", "8", "--json"])
}

/// Each question sees what was said before. What the model has read is not read again, and changes
/// no token.
#[test]
fn lines_are_answered_in_turn() {
    let folder = chat_model();
    let arguments = ["run", "--max-new-tokens", "8"];
    let got = answers(&folder, &arguments, "Hi\n\nBye\n\"\"\"\nHi\n/there\n\"\"\"\n");
    assert_eq!(got.len(), 3);
    let (mut said, mut before) = (Vec::new(), 0);
    for (question, answer) in ["Hi", "Bye", "Hi\n/there"].into_iter().zip(&got) {
        said.push(json!({"role": "user", "content": question}));
        let want = generated(&folder, &said);
        for key in ["text", "token_ids", "finish_reason"] {
            assert_eq!(answer[key], want[key], "{question}: {key}");
        }
        let prompt = number(answer, "prompt_tokens");
        assert_eq!(prompt as usize, want["prompt_token_ids"].as_array().expect("ids").len());
        let cached = number(answer, "cached_tokens");
        assert!(cached >= before && cached < prompt, "{question}: {cached} of {prompt} were kept, {before} at least");
        said.push(json!({"role": "assistant", "content": answer["text"]}));
        before = prompt;
    }
    assert_eq!(number(&got[0], "cached_tokens"), 0);

    // Without --json the answers alone are printed.
    let plain = chat(&folder, &[&arguments[..], &["--quiet"]].concat(), "Hi\nBye\n").expect(0);
    let texts = got[..2].iter().map(|answer| format!("{}\n", answer["text"].as_str().expect("text")));
    assert_eq!((plain.stdout, plain.stderr.as_str()), (texts.collect::<String>(), ""));
}

#[test]
fn commands_work_in_a_pipe_too() {
    let folder = chat_model();
    let script = "/system Be brief.\nHi\n/undo\n/set seed 4\n/set temperature 1.5\nBye\n//slash\n/retry\n/stats\n\
                  /save own.jsonl\n/reset\nHi\n/save own.jsonl\n/exit\nnever\n";
    let ended = chat(&folder, &["run", "--max-new-tokens", "4", "--json"], script).expect(0);
    let got: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(got.len(), 5, "{}", ended.stdout);
    for part in ["taken back: Hi", "next seed 4", "known from before", "of 512 tokens, 2 exchanges", "to own.jsonl"] {
        assert!(ended.stderr.contains(part), "{part}:\n{}", ended.stderr);
    }
    let rows = std::fs::read_to_string(folder.path("own.jsonl")).expect("rows");
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(rows.len(), 2);
    let contents = |row: &Value| -> Vec<String> {
        let messages = row["messages"].as_array().expect("messages").iter();
        messages.map(|message| message["content"].as_str().expect("text").to_owned()).collect()
    };
    let text = |n: usize| got[n]["text"].as_str().expect("text").to_owned();
    assert_eq!(contents(&rows[0]), ["Be brief.", "Bye", &text(1), "/slash", &text(3)], "the second try is kept");
    assert_eq!(contents(&rows[1]), ["Be brief.", "Hi", &text(4)]);
    // The last row is gone on with.
    let goes_on = answers(&folder, &["run", "--max-new-tokens", "4", "--messages", "own.jsonl"], "Bye\n");
    assert_eq!(goes_on.len(), 1);
    assert!(number(&goes_on[0], "prompt_tokens") > number(&got[4], "prompt_tokens"));
}

#[test]
fn a_script_hears_of_mistakes_by_the_exit_code() {
    let folder = chat_model();
    let long = format!("{}\n", "word ".repeat(600));
    let plain = ["run", "--max-new-tokens", "2"];
    for (arguments, input, says) in [
        (&plain[..], "Hi\n/rest\n", "did you mean /reset?"),
        (&plain, "Hi\n/rest\n", "at line 2"),
        (&plain, "/retry\n", "nothing was asked yet"),
        (&plain, "/save recipe.toml\n", "nothing was asked yet"),
        (&plain, "Hi\n/save recipe.toml\n", "not rows of messages"),
        (&plain, "Hi\n/load nothing.json\n", "cannot be read"),
        (&plain, "\"\"\"\nHi\n", "does not end"),
        (&plain, &long, "the model was made for 512"),
        (&["run", "--temperature", "-1"], "", "0 or more"),
        (&["run", "--top-p", "0"], "", "above 0"),
        (&["run", "--max-new-tokens", "0"], "", "1 or more"),
        (&["run", "--messages", "-"], "", "name a file"),
        (&["run", "--messages", "train.jsonl", "--system", "x"], "", "cannot be used with"),
        (&["nothing"], "", "nothing"),
    ] {
        chat(&folder, arguments, input).expect(2).says(says);
    }
    let recipe = std::fs::read_to_string(folder.path("recipe.toml")).expect("a recipe");
    assert_eq!(recipe, CHAT_RECIPE, "nothing is written over");
}

/// The tiny model was made for 512 positions.
#[test]
fn a_conversation_beyond_the_context_loses_its_oldest_part() {
    let folder = chat_model();
    let input = format!("{}\n", "word ".repeat(50)).repeat(8);
    let ended = chat(&folder, &["run", "--max-new-tokens", "4", "--json"], &input).expect(0);
    let ended = ended.says("grown beyond the context of 512 tokens: ").says("left out");
    let got: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(got.len(), 8);
    assert!(got.iter().all(|answer| number(answer, "prompt_tokens") <= 508), "{}", ended.stdout);
}

/// The system prompt that all training rows have is used without being asked for.
#[test]
fn the_system_prompt_of_the_training_rows_is_used() {
    let folder = Folder::with_chat_model(CHAT_RECIPE);
    let row = |question: &str| {
        let message = |role: &str, content: &str| json!({"role": role, "content": content});
        json!({"messages": [message("system", "Be brief."), message("user", question), message("assistant", "Yes.")]})
    };
    folder.write("train.jsonl", format!("{}\n{}\n", row("Hi"), row("Bye")).as_bytes());
    folder.run("run", &[]).expect(0);
    let tokens = |arguments: &[&str]| number(&answers(&folder, arguments, "Hi\n")[0], "prompt_tokens");
    let (with, without) = (tokens(&["run", "--system", "Be brief."]), tokens(&["run", "--system", ""]));
    assert!(with > without);
    assert_eq!(tokens(&["run"]), with);
    std::fs::remove_file(folder.path("train.jsonl")).expect("a file");
    assert_eq!(tokens(&["run"]), without, "the rows are not there any more");
}

#[test]
fn a_model_without_a_template_says_what_to_do() {
    let folder = chat_model();
    for name in ["model", "run/model"] {
        let _ = std::fs::remove_file(folder.path(name).join("chat_template.jinja"));
        let config = folder.path(name).join("tokenizer_config.json");
        let text = std::fs::read_to_string(&config).expect("a config");
        let mut config: Value = serde_json::from_str(&text).expect("JSON");
        config.as_object_mut().expect("an object").remove("chat_template");
        folder.write(&format!("{name}/tokenizer_config.json"), config.to_string().as_bytes());
    }
    chat(&folder, &["run"], "Hi\n").expect(2).says("has no chat template").says("generate MODEL_DIR --raw");
    let generate = ["generate", "run", "--prompt", "Hi", "--max-new-tokens", "2"];
    folder.finetune(&generate).expect(2).says("has no chat template").says("--raw").says("--chat-template FILE");
    folder.finetune(&[&generate[..], &["--raw"]].concat()).expect(0);
    // A template of the user's, with an end that the model's files do not name.
    folder.write("own.jinja", b"{% for message in messages %}{{ message.content }}<|end|>{% endfor %}");
    assert_eq!(answers(&folder, &["run", "--chat-template", "own.jinja", "--max-new-tokens", "2"], "Hi\n").len(), 1);
}

/// Waits until what a program has written so far holds a text, so many times.
#[track_caller]
fn wait_for(path: &Path, text: &str, times: usize) -> String {
    let start = Instant::now();
    loop {
        let written = String::from_utf8_lossy(&std::fs::read(path).expect("an output file")).into_owned();
        if written.matches(text).count() >= times {
            return written;
        }
        assert!(start.elapsed() < DEADLINE, "{text:?} is not in:\n{written}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A started program with its input open, and the file of its output.
fn started(folder: &Folder, command: &mut Command) -> (Child, PathBuf) {
    let output = folder.path("output.txt");
    let file = std::fs::File::options().create(true).write(true).truncate(true).open(&output).expect("a file");
    command.stdin(Stdio::piped()).stdout(file).stderr(Stdio::null()).current_dir(folder.path(""));
    (command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")), output)
}

/// The exit code of a program that ends by itself.
#[track_caller]
fn ended(mut child: Child) -> Option<i32> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child of ours") {
            return status.code();
        }
        if start.elapsed() > DEADLINE {
            let _ = child.kill();
            let _ = child.wait();
            panic!("still running after {DEADLINE:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_signal_ends_the_waiting_for_a_line() {
    let folder = chat_model();
    for (signal, code) in [("TERM", 143), ("INT", 130)] {
        let mut command = finetune(["chat", "run", "--json", "--max-new-tokens", "2"]);
        let (mut child, output) = started(&folder, &mut command);
        let mut input = child.stdin.take().expect("a pipe");
        input.write_all(b"Hi\n").expect("written");
        wait_for(&output, "finish_reason", 1);
        let sent = Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status();
        assert!(sent.expect("the kill command").success());
        assert_eq!(ended(child), Some(code), "{signal}");
    }
}

/// A terminal made by util-linux's `script`: prompt, answer, Ctrl-C, history, a pasted text, Ctrl-D.
#[test]
fn a_person_at_a_terminal() {
    let version = Command::new("script").arg("--version").output();
    if !version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("util-linux")) {
        eprintln!("SKIPPED: util-linux's script, which makes a terminal, is not here");
        return;
    }
    let folder = chat_model();
    let line = format!("'{BINARY}' chat run --max-new-tokens 8 --system 'Be brief.'");
    let mut command = Command::new("script");
    command.args(["-qefc", &line, "/dev/null"]).env("TERM", "xterm").env("SHELL", "/bin/sh");
    command.env("XDG_STATE_HOME", folder.path("state"));
    let (mut child, output) = started(&folder, &mut command);
    let mut keys = child.stdin.take().expect("a pipe");
    let mut press = |bytes: &[u8]| keys.write_all(bytes).expect("written");

    // The editor says so to the terminal each time it waits for a line.
    const WAITS: &str = "\x1b[?2004h";
    let panel = wait_for(&output, WAITS, 1);
    for part in ["run/model", "chat_template.jinja", "512 tokens; temperature 0", "Be brief.", "/help lists commands"] {
        assert!(panel.contains(part), "{part}:\n{panel}");
    }
    // A pasted text stays in one piece, and a mistake ends nothing.
    for (n, (pressed, says)) in [
        (&b"\x03"[..], "Ctrl-D or /exit leaves"),
        (b"/undo\r", "nothing was asked yet"),
        (b"\x1b[200~one\ntwo\x1b[201~\r", "two"),
        (b"/sats\r", "did you mean /stats?"),
        (b"/stats\r", "1 exchange"),
    ]
    .into_iter()
    .enumerate()
    {
        press(pressed);
        wait_for(&output, says, 1);
        wait_for(&output, WAITS, n + 2);
    }
    // Leaves by Ctrl-D at an empty line.
    press(b"\x04");
    assert_eq!(ended(child), Some(0));
    let written = wait_for(&output, "/stats", 1);
    assert!(written.trim_end().ends_with("\x1b[?2004l"), "the terminal is set right at the end: {written:?}");

    let history = std::fs::read_to_string(folder.path("state/finetune/chat_history")).expect("a history");
    assert!(history.contains("one\\ntwo\n") && history.contains("/stats\n"), "{history}");
    let mode = std::fs::metadata(folder.path("state/finetune/chat_history")).expect("a file").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "others cannot read it");
}
