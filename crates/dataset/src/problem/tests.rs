use serde_json::Value;

use super::*;

const LENGTH: &str = "raise data.max_seq_len, or set data.overlong to \"truncate\" or \"drop\"";
const TEMPLATE: &str = "name a template with {% generation %} blocks in data.chat_template";
const ONE_FORMAT: &str = "one dataset has one format: convert the rows, or name the format with data.format";
const VOCABULARY: &str = "the tokenizer has tokens that the model's embedding lacks: use the tokenizer of this model";

const COLUMNS: &str =
    "if other names mean the same, say so: data.columns = { prompt = \"question\", completion = \"answer\" }";

const ENCODING: &str = "if the text is in an older encoding: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW";

const BEHIND_REASONING: &str = "turn 2 (assistant): the chat template does not render it behind its own generation \
                                prompt: that ends with <think>, and the answer has no reasoning";

fn behind_reasoning(switch: Option<&'static str>) -> Unrendered {
    Unrendered::BehindReasoningPrompt { tag: "<think>", switch }
}

fn stopped() -> TemplateProblem {
    TemplateProblem::Stopped { origin: "a.jinja".to_owned(), line: 3, reason: "no".to_owned() }
}

fn text(text: &str) -> String {
    text.to_owned()
}

/// A problem, its text and its hint.
type Case = (RowProblem, &'static str, Option<&'static str>);

fn check(table: Vec<Case>) {
    for (problem, text, hint) in table {
        assert_eq!(problem.to_string(), text);
        assert_eq!(problem.hints(), hint.into_iter().collect::<Vec<_>>(), "{text}");
    }
}

fn path() -> String {
    text("messages[2]")
}

#[test]
fn problems_of_lines_and_tokens_have_their_texts_and_hints() {
    check(vec![
        (RowProblem::LongLine(16), "the row is longer than 16 MiB", None),
        (RowProblem::Utf16, "the file is UTF-16", None),
        (RowProblem::NotUtf8(11), "invalid UTF-8 at byte 11 of the line", Some(ENCODING)),
        (RowProblem::NulCharacter(11), "a NUL character at byte 11 of the line", None),
        (RowProblem::NotAnObject("a list"), "the line is a list", None),
        (
            RowProblem::NotJson { reason: text("trailing comma"), below: 0, column: 14, expected: None },
            "not JSON: trailing comma",
            None,
        ),
        (
            RowProblem::Preferences,
            "a row of preferences (chosen, rejected), for DPO and the like, which this program does not do",
            None,
        ),
        (
            RowProblem::UnknownFormat { keys: Vec::new(), more: false },
            "no key that tells the format; the object is empty",
            Some(COLUMNS),
        ),
        (
            RowProblem::UnknownFormat { keys: vec![text("a"), text("b")], more: true },
            "no key that tells the format; its keys are a, b, …",
            Some(COLUMNS),
        ),
        (
            RowProblem::OtherFormat { found: Format::Text, wanted: Format::Messages, first: text("a.jsonl:1") },
            "this is a row of format text, and the first row (a.jsonl:1) is messages",
            Some(ONE_FORMAT),
        ),
        (
            RowProblem::UnknownToken { index: 4, id: 900, name: Some(text("<x>")), vocab_size: 800 },
            "token 4 is 900 (\"<x>\"), not below the vocabulary of 800",
            Some(VOCABULARY),
        ),
        (
            RowProblem::UnknownToken { index: 4, id: 900, name: None, vocab_size: 800 },
            "token 4 is 900, not below the vocabulary of 800",
            Some(VOCABULARY),
        ),
        (RowProblem::NothingTrained(5), "nothing to train on: none of its 5 tokens is an answer's", None),
        (
            RowProblem::NothingLeft { tokens: 12, limit: 7, first: 8 },
            "nothing to train on once cut to data.max_seq_len = 7: of its 12 tokens the first trained one is number 8",
            Some(LENGTH),
        ),
        (
            RowProblem::TooLong { tokens: 12, limit: 11 },
            "the row has 12 tokens, more than data.max_seq_len = 11",
            Some(LENGTH),
        ),
    ]);
}

#[test]
fn problems_of_messages_have_their_texts_and_hints() {
    check(vec![
        (
            RowProblem::NoAssistant(vec![text("user"), text("bot")]),
            "no assistant message to train on; the roles are user, bot",
            Some(
                "if turns say it in other words: data.columns = { role = \"from\", content = \"value\", user_tag = \"Customer\", assistant_tag = \"Agent\" }",
            ),
        ),
        (RowProblem::AllMuted, "no assistant message to train on: its flags (weight, train) leave none", None),
        (RowProblem::NoMessages, "the row has no messages", None),
        (
            RowProblem::AsksForTraining(text("messages[0].train")),
            "messages[0].train asks for training on a message that is not the assistant's",
            None,
        ),
        (RowProblem::VariableName, "the name of a template's variable holds a noncharacter", None),
        (RowProblem::MutedContext(path()), "messages[2] is not to be trained on, and is not the assistant's", None),
        (RowProblem::MutedPart(path()), "messages[2] is not to be trained on, and its part cannot be told", None),
        (
            RowProblem::AnswersInParts { answers: 3, parts: 2 },
            "3 answers in 2 parts: train_detail needs one for each",
            None,
        ),
        (
            RowProblem::ChangedCharacters(path()),
            "messages[2].train_detail counts characters that the chat template changes",
            None,
        ),
        (
            RowProblem::TextLeftOut { path: path(), role: text("system") },
            "messages[2].content: the chat template leaves this system text out",
            None,
        ),
        (
            RowProblem::PartsLeftOut(path()),
            "messages[2].content is no string, and the chat template leaves its text out",
            None,
        ),
        (RowProblem::ReasoningLeftOut(path()), "messages[2]: the chat template leaves the reasoning out", None),
        (
            RowProblem::CallLeftOut { path: path(), call: 1 },
            "messages[2].tool_calls[1]: the chat template leaves the call out",
            None,
        ),
        (RowProblem::ToolsLeftOut, "tools: the chat template leaves them out", None),
        (
            RowProblem::WrittenAsCode(path()),
            "messages[2].content is no string, and the chat template writes it as code",
            None,
        ),
        (
            RowProblem::QuotedArguments { path: path(), call: 1 },
            "messages[2].tool_calls[1]: the arguments are a string, and the chat template quotes it",
            None,
        ),
    ]);
}

/// The hint is the line to write, if a variable of the template asks for an answer alone.
#[test]
fn an_answer_without_reasoning_behind_a_prompt_that_opens_it_has_its_line() {
    check(vec![
        (RowProblem::NotRendered { turn: 2, what: behind_reasoning(None) }, BEHIND_REASONING, Some(TEMPLATE)),
        (
            RowProblem::NotRendered { turn: 2, what: behind_reasoning(Some("enable_thinking")) },
            BEHIND_REASONING,
            Some(
                "if the rows are meant without reasoning, write data.chat_template_kwargs = { enable_thinking = false }",
            ),
        ),
        (
            RowProblem::NotRendered { turn: 2, what: behind_reasoning(Some("thinking")) },
            BEHIND_REASONING,
            Some("if the rows are meant without reasoning, write data.chat_template_kwargs = { thinking = false }"),
        ),
    ]);
}

#[test]
fn problems_of_templates_have_their_texts_and_hints() {
    check(vec![
        (
            RowProblem::BlockCount { blocks: 2, turns: 3 },
            "the chat template wrote 2 generation blocks for 3 assistant turns",
            None,
        ),
        (
            RowProblem::ManyAnswers(50),
            "its 50 answers cannot be told apart without rendering the conversation as often",
            None,
        ),
        (
            RowProblem::LongSequences { answers: 50, mebibytes: 256 },
            "the chat template writes earlier turns anew, and a sequence for each of its 50 answers takes more than \
             256 MiB of text",
            None,
        ),
        (
            RowProblem::BeginsWithAssistant(1),
            "turn 1: the conversation begins with the assistant, so there is nothing that it answers",
            None,
        ),
        (
            RowProblem::NotRendered { turn: 2, what: Unrendered::BehindPrompt },
            "turn 2 (assistant): the chat template does not render it behind its own generation prompt",
            Some(TEMPLATE),
        ),
        (
            RowProblem::NotRendered { turn: 2, what: Unrendered::BehindClosedReasoning("</think>") },
            "turn 2 (assistant): the chat template does not render it behind its own generation prompt: that ends \
             with </think>, and the answer has reasoning",
            Some(TEMPLATE),
        ),
        (
            RowProblem::NotRendered { turn: 2, what: Unrendered::SameLater },
            "turn 2 (assistant): the chat template does not render it the same once later messages follow",
            Some(TEMPLATE),
        ),
        (
            RowProblem::NotRendered {
                turn: 2,
                what: Unrendered::Part { part: "the messages before it", problem: stopped() },
            },
            "turn 2 (assistant): the chat template does not render the messages before it: the chat template \
             (a.jinja, line 3) stopped: no",
            Some(TEMPLATE),
        ),
        (
            RowProblem::Template(TemplateProblem::NoDefault(text("rag, tool_use"))),
            "of the model's chat templates (rag, tool_use) none is the default",
            None,
        ),
        (RowProblem::Template(stopped()), "the chat template (a.jinja, line 3) stopped: no", None),
        (RowProblem::Template(TemplateProblem::HalfCharacter), "the chat template wrote half a character", None),
        (
            RowProblem::Template(TemplateProblem::Noncharacter),
            "the text holds U+FDD0 or U+FDD1, Unicode noncharacters that this program marks spans with",
            None,
        ),
        (RowProblem::Tokenizer(text("no such token")), "no such token", None),
    ]);
}

/// (problem of the format, its text, what should have been there)
#[test]
fn format_problems_have_their_texts() {
    let wanted = "\"text\": a string";
    let table: Vec<(FormatProblem, &str, &str)> = vec![
        (FormatProblem::Missing(text("text")), "the key text is missing", wanted),
        (FormatProblem::Empty(text("messages")), "messages is empty", wanted),
        (FormatProblem::wrong("text", &Value::Null, "a string"), "text is null", "a string"),
        (
            FormatProblem::NotJson { path: text("tools"), reason: text("EOF") },
            "tools is a string that is not JSON: EOF",
            wanted,
        ),
        (
            FormatProblem::ReservedVariable(text("tools")),
            "chat_template_kwargs has the key tools, which is not a template's own",
            "variables of the chat template, as enable_thinking",
        ),
        (FormatProblem::NotText("image"), "the row has image: only text can be trained on", "rows without image"),
        (
            FormatProblem::OldTools,
            "functions is the old form of tools, and the row has both",
            "\"tools\": [{\"type\": \"function\", \"function\": {...}}]",
        ),
        (FormatProblem::TwoSystemMessages("messages"), "system and messages[0] are two system messages", "one of them"),
        (
            FormatProblem::StringAndList,
            "of prompt and completion one is a string and one a list",
            "two strings, or two lists of messages",
        ),
        (
            FormatProblem::BesidePlainStrings("tools"),
            "tools stands beside plain strings, which no chat template sees",
            "its text in the prompt, or tools beside messages",
        ),
        (
            FormatProblem::SharegptRole { path: path(), role: text("bot") },
            "messages[2].from is \"bot\"",
            "human, user, gpt, assistant, system, tool or observation",
        ),
        (
            FormatProblem::OtherPart { path: path(), kind: text("image") },
            "messages[2] has the type \"image\": only text can be trained on",
            wanted,
        ),
        (
            FormatProblem::PartialWeight { path: path(), number: text("0.5") },
            "messages[2] is 0.5: a message is trained on or not",
            "0 or 1 (or false or true)",
        ),
        (
            FormatProblem::MaskLength { tokens: 4, numbers: 2, key: "loss_mask" },
            "4 input_ids but 2 of loss_mask",
            "one number of loss_mask for each token",
        ),
        (FormatProblem::AllPadding, "attention_mask marks every token as padding", wanted),
        (
            FormatProblem::OwnLabel { index: 1, label: text("7"), id: 6 },
            "labels[1] is 7 where input_ids[1] is 6: labels of one's own are not supported",
            "the token itself (unshifted), or -100 for no loss",
        ),
    ];
    for (problem, text, expected) in table {
        assert_eq!(problem.to_string(), text);
        assert_eq!(problem.expected().unwrap_or_else(|| wanted.to_owned()), expected, "{text}");
        let of_row = RowProblem::Format { problem, expected: expected.to_owned() };
        assert_eq!((of_row.to_string().as_str(), of_row.expected().as_deref()), (text, Some(expected)));
        let names_a_key = text.starts_with("the key ");
        assert_eq!(!of_row.hints().is_empty(), names_a_key, "{text}");
    }
}

#[test]
fn only_problems_of_form_are_worth_another_form() {
    let part = |problem| RowProblem::NotRendered { turn: 1, what: Unrendered::Part { part: "it", problem } };
    for (problem, may_be) in [
        (RowProblem::WrittenAsCode(String::new()), true),
        (RowProblem::QuotedArguments { path: String::new(), call: 0 }, true),
        (RowProblem::Template(stopped()), true),
        (part(stopped()), true),
        (part(TemplateProblem::Noncharacter), false),
        (RowProblem::Template(TemplateProblem::HalfCharacter), false),
        (RowProblem::ToolsLeftOut, false),
    ] {
        assert_eq!(problem.may_be_of_form(), may_be, "{problem}");
    }
}
