//! `finetune generate`: text out.

use std::io::IsTerminal;
use std::process::ExitCode;

use finetune_dataset::{ChatTokenizer, Dataset};
use finetune_model::{Model, Sampling};
use serde_json::{Value, json};

use crate::cli::GenerateArguments;
use crate::commands::answering::{Writing, check_sampling, no_template, of_template, tokenizer};
use crate::commands::conversation::{Prompt, prompt};
use crate::commands::opening;
use crate::commands::rows_of_files::rows_of_files;
use crate::failure::Failure;
use crate::hub_files;
use crate::output::{self, printable};
use crate::progress::Verbosity;
use crate::source::{Source, data_file};

pub(crate) fn generate(arguments: GenerateArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let GenerateArguments { temperature, top_p, seed, .. } = arguments;
    let sampling = check_sampling(Sampling { temperature, top_p, seed }, &arguments.stop)?;
    let files = arguments.data.as_deref().map(hub_files::rows).transpose()?.unwrap_or_default();
    files.iter().try_for_each(|file| data_file("--data", file))?;
    let say = |line: &str| opening::say(verbosity, line);
    let asked = prompt(&arguments, &say)?;
    let source = Source::open(&arguments.model)?;
    source.notices.iter().for_each(|notice| say(notice));
    let tokenizer = tokenizer(&source)?;
    if matches!(asked, Some(Prompt::Chat { .. })) && !tokenizer.has_template() {
        return Err(no_template(&source.model, "--raw leaves the template out"));
    }
    tokenizer.notices().iter().for_each(|notice| say(notice));
    let prompt = match &asked {
        None => Vec::new(),
        Some(asked) => tokens_of(asked, &tokenizer)?,
    };
    let model = opening::open(&source, &arguments.model, &say)?;
    let asking = Asking { model: &model, tokenizer: &tokenizer, arguments: &arguments, sampling, say: &say };
    if !files.is_empty() {
        let vocabulary = model.config.vocabulary;
        let rows = rows_of_files(&files, &source, Some(&tokenizer), vocabulary, usize::MAX, &say)?;
        return asking.answer_rows(&rows);
    }
    let answer = asking.answer(&prompt, !arguments.json)?;
    if arguments.json {
        output::line(
            &json!({
                "text": answer.text,
                "token_ids": answer.tokens,
                "prompt_token_ids": prompt,
                "finish_reason": answer.finish_reason,
            })
            .to_string(),
        )?;
    } else {
        output::line("")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn tokens_of(asked: &Prompt, tokenizer: &ChatTokenizer) -> Result<Vec<u32>, Failure> {
    let tokens = match asked {
        Prompt::Raw(text) => tokenizer.encode(text, true)?,
        Prompt::Chat { messages, tools } => {
            let rendered = tokenizer.render(messages, tools.as_ref(), true).map_err(of_template)?;
            tokenizer.encode_chat(&rendered.text)?
        }
    };
    if tokens.is_empty() {
        return Err(Failure::arguments("--prompt is empty", "give at least one character, or leave --raw out"));
    }
    Ok(tokens)
}

/// A model and how it is asked.
struct Asking<'a> {
    model: &'a Model,
    tokenizer: &'a ChatTokenizer,
    arguments: &'a GenerateArguments,
    sampling: Sampling,
    say: &'a dyn Fn(&str),
}

struct Answer {
    text: String,
    /// All tokens, with those of a stop text and of the end.
    tokens: Vec<u32>,
    finish_reason: &'static str,
}

impl Asking<'_> {
    /// Generates what follows a prompt. If `printed`, prints it as it comes.
    fn answer(&self, prompt: &[u32], printed: bool) -> Result<Answer, Failure> {
        let to_terminal = std::io::stdout().is_terminal();
        let mut show = |text: &str| match (printed, to_terminal) {
            (false, _) => Ok(()),
            (true, false) => output::print(text),
            (true, true) => output::print(&printable(text)),
        };
        let mut writing = Writing::new(self.tokenizer, &self.arguments.stop, &mut show);
        let limit = self.model.config.max_position_embeddings;
        let beyond = || {
            (self.say)(&format!(
                "the text goes beyond the {limit} positions that the model was made for: what follows may make no sense"
            ));
        };
        if prompt.len() > limit {
            beyond();
        }
        let mut length = prompt.len();
        let generation = self.model.generate_while(
            prompt,
            self.arguments.max_new_tokens,
            self.sampling,
            self.tokenizer.eos_ids(),
            &mut |token| {
                length += 1;
                if length > limit && length - 1 == limit {
                    beyond();
                }
                writing.push(token)
            },
        )?;
        let (text, stopped) = writing.finish()?;
        let finish_reason = if stopped || generation.stopped_by.is_some() { "stop" } else { "length" };
        Ok(Answer { text, tokens: generation.tokens, finish_reason })
    }

    /// Each row's prompt, what the row expects, and what the model says.
    fn answer_rows(&self, rows: &Dataset) -> Result<ExitCode, Failure> {
        let to_terminal = std::io::stdout().is_terminal();
        let mut exact = 0;
        for (n, row) in rows.rows.iter().enumerate() {
            let prompt = &row.tokens[..row.prompt_tokens];
            let answer = if prompt.is_empty() { None } else { Some(self.answer(prompt, false)?) };
            let (text, reason) = match &answer {
                Some(answer) => (answer.text.as_str(), answer.finish_reason),
                None => ("", "length"),
            };
            let same = reason == "stop" && text.trim() == row.answer_text.trim();
            exact += usize::from(same);
            if self.arguments.json {
                let object = json!({
                    "row": rows.origin(n),
                    "prompt": row.prompt_text,
                    "expected": row.answer_text,
                    "text": text,
                    "token_ids": answer.as_ref().map_or(Value::from(Vec::<u32>::new()), |answer| Value::from(answer.tokens.clone())),
                    "finish_reason": reason,
                    "exact": same,
                });
                output::line(&object.to_string())?;
                continue;
            }
            let shown = |text: &str| if to_terminal { indented(&printable(text)) } else { indented(text) };
            let mark = if same { "  (word for word)" } else { "" };
            output::line(&format!(
                "{}\n  prompt    {}\n  expected  {}\n  answer    {}{mark}\n",
                rows.origin(n),
                shown(&row.prompt_text),
                shown(&row.answer_text),
                shown(text)
            ))?;
        }
        if !self.arguments.json {
            output::line(&format!("answered word for word: {exact} of {}", rows.rows.len()))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Further lines under the first one.
fn indented(text: &str) -> String {
    text.trim().replace('\n', "\n            ")
}
