//! Chat templates against transformers: goldens of our own templates, and the published ones where
//! they are at hand.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use finetune_advice::Advice as _;
use finetune_dataset::{ChatTokenizer, TextSource};
use finetune_recipe::{TrainOn, Variable};
use serde_json::{Value, json};

use crate::made_up::Model;
use crate::reaching::read_through;

/// A golden's tokenizer, which is told the golden's date.
fn tokenizer(golden: &Value, model: &Model) -> Result<ChatTokenizer, finetune_dataset::DatasetError> {
    let source = TextSource { date: golden["date"].as_str(), ..TextSource::of(model.path(), None) };
    Ok(ChatTokenizer::open(&source)?.expect("a tokenizer.json"))
}

/// Renders every case of a golden; says where the text, the blocks or an error differ from
/// transformers'.
fn differences(golden: &Value) -> Vec<String> {
    let name = golden["name"].as_str().expect("a name");
    let model = Model::with_tokens(golden["template"].as_str(), golden["special_tokens"].clone());
    let tokenizer = match tokenizer(golden, &model) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return vec![format!("{name}: {error}")],
    };
    let mut found = Vec::new();
    for case in golden["cases"].as_array().expect("cases") {
        let conversation = case["conversation"].as_str().expect("a conversation's name");
        let prompt = case["add_generation_prompt"].as_bool().expect("a flag");
        let tools = Some(&golden["tools"]).filter(|_| case["tools"] == json!(true));
        let messages = golden["conversations"][conversation].as_array().expect("messages");
        let variables: Vec<(String, Value)> =
            case["variables"].as_object().cloned().unwrap_or_default().into_iter().collect();
        let place = format!("{name}, {conversation:?}, tools {}, prompt {prompt} {variables:?}", tools.is_some());
        match (tokenizer.render_with(messages, tools, &variables, prompt), case["text"].as_str()) {
            (Ok(ours), Some(theirs)) if ours.text != theirs => {
                found.push(format!("{place}:\n  ours   {:?}\n  theirs {theirs:?}", ours.text));
            }
            (Ok(ours), Some(_)) => {
                let spans: Vec<[usize; 2]> = ours.generation_spans.iter().map(|span| [span.start, span.end]).collect();
                if json!(spans) != case["generation_spans"] {
                    found.push(format!("{place}: blocks {spans:?}, theirs {}", case["generation_spans"]));
                }
            }
            (Ok(ours), None) => {
                found.push(format!("{place}: ours {:?}, theirs the error {}", ours.text, case["error"]));
            }
            (Err(error), Some(theirs)) => found.push(format!("{place}: {error}\n  theirs {theirs:?}")),
            (Err(error), None) => {
                // What a template raises on purpose has to be told word for word.
                let theirs = case["error"].as_str().unwrap_or_default();
                if let Some(raised) = theirs.strip_prefix("TemplateError: ")
                    && !error.to_string().contains(raised)
                {
                    found.push(format!("{place}: raised {error}, theirs {raised}"));
                }
            }
        }
    }
    found
}

fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn goldens() {
    let directory = workspace().join("tests/goldens/templates");
    let mut found = Vec::new();
    let mut goldens = 0;
    for entry in std::fs::read_dir(&directory).expect("tests/goldens/templates") {
        let text = std::fs::read_to_string(entry.expect("an entry").path()).expect("a golden");
        found.extend(differences(&serde_json::from_str(&text).expect("JSON")));
        goldens += 1;
    }
    assert!(goldens >= 7, "scripts/make_template_goldens.py writes seven");
    assert!(found.is_empty(), "{} differences\n{}", found.len(), found.join("\n"));
}

/// The published templates as `scripts/check_templates.py` renders them. `None`: a part of it is not
/// at hand, which is said under the name of the test.
fn published(test: &str) -> Option<Vec<Value>> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let python = variable("FINETUNE_PYTHON").or_else(|| Some(workspace().join(".venv/bin/python")));
    let (Some(python), Some(templates)) = (python.filter(|python| python.exists()), variable("CHAT_TEMPLATES")) else {
        eprintln!(
            "SKIPPED: {test} needs directories of templates (CHAT_TEMPLATES, with : between them) and a Python with \
             transformers (FINETUNE_PYTHON)"
        );
        return None;
    };
    let script = workspace().join("scripts/check_templates.py");
    let directories = std::env::split_paths(&templates);
    let output = Command::new(&python).arg(script).args(directories).output().expect("a started Python");
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(told.contains("ModuleNotFoundError"), "scripts/check_templates.py failed:\n{told}");
        eprintln!("SKIPPED: {test}: {} has no transformers", python.display());
        return None;
    }
    let goldens: Vec<Value> = serde_json::from_slice(&output.stdout).expect("JSON");
    assert!(!goldens.is_empty(), "no templates in {}", templates.display());
    Some(goldens)
}

#[test]
fn published_templates() {
    let Some(goldens) = published("published_templates") else { return };
    let cases: usize = goldens.iter().filter_map(|golden| golden["cases"].as_array()).map(Vec::len).sum();
    let found: Vec<String> = goldens.iter().flat_map(differences).collect();
    eprintln!("{} sets of conversations, {cases} renderings, {} differences", goldens.len(), found.len());
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// The rows that conversations of a golden become, and which of their tokens are trained on. A row
/// may be refused for a text that the template leaves out; then nothing is compared.
#[test]
fn published_masks() {
    let Some(goldens) = published("published_masks") else { return };
    let (mut equal, mut refused, mut more, mut found) = (0, 0, 0, Vec::new());
    for golden in &goldens {
        let model = Model::with_tokens(golden["template"].as_str(), golden["special_tokens"].clone());
        let tokenizer = tokenizer(golden, &model).expect("a tokenizer");
        for case in golden["masks"].as_array().expect("masks") {
            let conversation = case["conversation"].as_str().expect("a conversation's name");
            let train_on = if case["train_on"] == "last" { TrainOn::Last } else { TrainOn::Assistant };
            let tools = if case["tools"] == json!(true) { golden["tools"].clone() } else { Value::Null };
            let row = json!({"messages": golden["conversations"][conversation], "tools": tools});
            let ours = read_through(&model, &tokenizer, &row, train_on);
            let is_refused = ours.iter().any(|text| text.starts_with("refused: "));
            let place = format!("{}, {conversation:?}, tools {}, {}", golden["name"], case["tools"], case["train_on"]);
            match case["rows"].as_array() {
                _ if is_refused => refused += 1,
                None => more += 1,
                Some(theirs) if json!(ours) == json!(theirs) => equal += 1,
                Some(theirs) => found.push(format!("{place}:\n  ours   {ours:?}\n  theirs {theirs:?}")),
            }
        }
    }
    eprintln!("{equal} conversations equal, {refused} refused, {more} by other ways, {} differences", found.len());
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_template_s_own_errors_are_told() {
    for (template, told) in
        [("{% if %}", "line 1"), ("a\n{{ raise_exception('no ' ~ messages[0].role) }}", "line 2) stopped: no user")]
    {
        let model = Model::new(Some(template));
        let error = match finetune_dataset::ChatTokenizer::load(model.path(), None) {
            Err(error) => error,
            Ok(tokenizer) => {
                tokenizer.render(&[json!({"role": "user"})], None, false).expect_err("a template that stops")
            }
        };
        assert!(error.to_string().contains(told), "{error}");
        assert!(!error.hints().is_empty());
    }
}

#[test]
fn marks_in_the_text_are_refused() {
    let model =
        Model::new(Some("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"));
    let error = model.tokenizer().render(&[json!({"role": "user", "content": "a\u{FDD0}"})], None, false);
    assert!(error.expect_err("a noncharacter").to_string().contains("U+FDD0"));
}

/// As transformers' `chat_template_kwargs`. They never take the place of the conversation.
#[test]
fn variables_of_a_request_reach_the_template() {
    let template = "{{ messages[0].content }}{% if thinks is defined %}, {{ thinks }}{% endif %}";
    let model = Model::with_tokens(Some(template), json!({}));
    let tokenizer = finetune_dataset::ChatTokenizer::load(model.path(), None).expect("a tokenizer");
    let messages = [json!({"role": "user", "content": "Hi"})];
    let variable = |name: &str, value: Value| (name.to_owned(), value);
    for (variables, want) in [
        (vec![], "Hi"),
        (vec![variable("thinks", json!("well"))], "Hi, well"),
        (vec![variable("messages", json!([]))], "Hi"),
    ] {
        let text = tokenizer.render_with(&messages, None, &variables, false).expect("a text").text;
        assert_eq!(text, want, "{variables:?}");
    }
}

/// Programs that know nothing of the recipe render as it does, and what they give comes first.
#[test]
fn variables_of_a_recipe_are_defaults_of_exported_templates() {
    let body = "\n  {% if not thinks %}{{ at.x }}{% endif %}\n{%- macro m() %} {{ effort }}{% endmacro %}{{ m() }}";
    let text = Variable::Text("a \"b\" %} {{ é".to_owned());
    let variables = BTreeMap::from([
        ("effort".to_owned(), text),
        ("thinks".to_owned(), Variable::Switch(false)),
        ("at".to_owned(), Variable::Table(BTreeMap::from([("x".to_owned(), Variable::Number(-0.5))]))),
        ("unused".to_owned(), Variable::Integer(1)),
        ("if".to_owned(), Variable::Integer(1)),
    ]);
    let with_tools =
        json!({"chat_template": [{"name": "default", "template": body}, {"name": "tool_use", "template": body}]});
    for model in [Model::with_tokens(Some(body), json!({})), Model::with_tokens(None, with_tools)] {
        let source = TextSource { variables: Some(&variables), ..TextSource::of(model.path(), None) };
        let trained = ChatTokenizer::open(&source).expect("files").expect("a tokenizer");
        let files = trained.files(&[]).expect("files");
        let exported = Model::with_tokens(None, json!({}));
        files.iter().for_each(|(name, bytes)| drop(exported.write(name, bytes)));
        let alone = exported.tokenizer();
        for given in [vec![], vec![("thinks".to_owned(), json!(true)), ("effort".to_owned(), Value::Null)]] {
            let [want, found] =
                [&trained, &alone].map(|it| it.render_with(&[], None, &given, false).expect("a text").text);
            assert_eq!(found, want, "{given:?}");
        }
        assert_eq!(alone.render(&[], None, false).expect("a text").text, "\n-0.5 a \"b\" %} {{ é");
        // They are written once, and only those that the template has.
        let source = TextSource { variables: Some(&variables), ..TextSource::of(exported.path(), None) };
        let again = ChatTokenizer::open(&source).expect("files").expect("a tokenizer");
        assert_eq!(again.files(&[]).expect("files"), files);
        assert!(!files.iter().any(|(_, bytes)| String::from_utf8_lossy(bytes).contains("set unused")));
    }
}

/// Those of a recipe are there in every rendering, and those of a row or request come first.
#[test]
fn variables_of_a_recipe_reach_the_template() {
    let template = "{{ effort }}, {{ thinks }}, {{ names | join('+') }}, {{ at.x }}";
    let model = Model::with_tokens(Some(template), json!({}));
    let names = Variable::List(vec![Variable::Text("a".to_owned()), Variable::Integer(2)]);
    let at = Variable::Table(BTreeMap::from([("x".to_owned(), Variable::Number(0.5))]));
    let variables = BTreeMap::from([
        ("effort".to_owned(), Variable::Text("low".to_owned())),
        ("thinks".to_owned(), Variable::Switch(false)),
        ("names".to_owned(), names),
        ("at".to_owned(), at),
    ]);
    let source = TextSource { variables: Some(&variables), ..TextSource::of(model.path(), None) };
    let tokenizer = ChatTokenizer::open(&source).expect("files").expect("a tokenizer");
    let messages = [json!({"role": "user", "content": "Hi"})];
    for (given, want) in [
        (vec![], "low, False, a+2, 0.5"),
        (vec![("effort".to_owned(), json!("high")), ("thinks".to_owned(), json!(true))], "high, True, a+2, 0.5"),
    ] {
        let text = tokenizer.render_with(&messages, None, &given, false).expect("a text").text;
        assert_eq!(text, want, "{given:?}");
    }
}
