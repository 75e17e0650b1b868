//! `finetune generate`: text out.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use finetune_dataset::{ChatTokenizer, Dataset};
use finetune_model::{Generation, Model, RowRequest, Sampling};
use serde_json::json;

use crate::cli::GenerateArguments;
use crate::commands::answering::{
    Writing, check_sampling, no_template, of_conversation, of_template, tokenizer, without_use,
};
use crate::commands::conversation::{Prompt, prompt};
use crate::commands::opening::{self, Purpose};
use crate::commands::rows_of_files::rows_of_files;
use crate::commands::together::{self, OneOf};
use crate::failure::Failure;
use crate::hub_files;
use crate::output::{self, printable};
use crate::progress::Verbosity;
use crate::signals::Signals;
use crate::source::{Source, data_file};

pub(crate) fn generate(arguments: GenerateArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    if !arguments.assigned {
        return answer_as(&arguments, verbosity, None);
    }
    let signals = Signals::listen()?;
    let one = OneOf::assigned(&signals, format!("{arguments:?}"), verbosity)?;
    let answered = answer_as(&arguments, one.verbosity(), Some(&one));
    answered.map_err(together::without_resume).inspect_err(|failure| {
        one.excuse(failure);
        together::tell_of(failure);
    })
}

/// `one`: this rank, if several hold the model together. All make every pass together, and the first one speaks.
fn answer_as(arguments: &GenerateArguments, verbosity: Verbosity, one: Option<&OneOf>) -> Result<ExitCode, Failure> {
    let GenerateArguments { temperature, top_p, seed, .. } = *arguments;
    let sampling = check_sampling(Sampling { temperature, top_p, seed }, &arguments.stop)?;
    let files = arguments.data.as_deref().map(hub_files::rows).transpose()?.unwrap_or_default();
    files.iter().try_for_each(|file| data_file("--data", file))?;
    let say = |line: &str| opening::say(verbosity, line);
    let asked = prompt(arguments, &say)?;
    let source = Source::open(&arguments.model)?;
    source.notices.iter().for_each(|notice| say(notice));
    let tokenizer = tokenizer(&source)?;
    if matches!(asked, Some(Prompt::Chat { .. })) && !tokenizer.has_template() {
        return Err(no_template(&source.model, "--raw leaves the template out"));
    }
    tokenizer.notices().iter().for_each(|notice| say(notice));
    let prompt = match &asked {
        None => Vec::new(),
        Some(asked) => tokens_of(asked, &tokenizer, arguments.messages.as_deref(), &say)?,
    };
    let join =
        |one: &OneOf| one.join(&source.model, source.adapter.as_deref(), &arguments.model, arguments.parallel, &say);
    let together = one.map(join).transpose()?.flatten();
    let model = opening::open(&source, &arguments.model, Purpose::Text, together.as_ref(), &say)?;
    let speaks = one.is_none_or(OneOf::is_first);
    let asking = Asking { model: &model, tokenizer: &tokenizer, arguments, sampling, speaks, say: &say };
    if !files.is_empty() {
        let vocabulary = model.config.vocabulary;
        let rows = rows_of_files(&files, &source, Some(&tokenizer), vocabulary, usize::MAX, &say)?;
        let exit = asking.answer_rows(&rows)?;
        together.map_or(Ok(()), |together| together.barrier())?;
        return Ok(exit);
    }
    let answer = asking.answer(&prompt, !arguments.json && speaks)?;
    // No rank leaves while another needs it.
    together.map_or(Ok(()), |together| together.barrier())?;
    if !speaks {
        return Ok(ExitCode::SUCCESS);
    }
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

/// `file`: where a conversation stands.
fn tokens_of(
    asked: &Prompt,
    tokenizer: &ChatTokenizer,
    file: Option<&Path>,
    say: &dyn Fn(&str),
) -> Result<Vec<u32>, Failure> {
    let tokens = match asked {
        Prompt::Raw(text) => tokenizer.encode_prompt(text)?,
        Prompt::Chat(object) => {
            let asked = tokenizer.read_asked(object.clone()).map_err(|error| match file {
                Some(file) => of_conversation(error, "--messages", file),
                None => of_template(error),
            })?;
            file.and_then(|file| without_use(&asked, file)).iter().for_each(|notice| say(notice));
            let rendered = tokenizer.render_with(&asked.messages, asked.tools.as_ref(), &asked.variables, true);
            tokenizer.encode_chat(&rendered.map_err(of_template)?.text)?
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
    /// Whether this rank prints.
    speaks: bool,
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
        let to_terminal = io::stdout().is_terminal();
        let mut show = |text: &str| match (printed, to_terminal) {
            (false, _) => Ok(()),
            (true, false) => output::print(text),
            (true, true) => output::print(&printable(text)),
        };
        let mut writing = Writing::new(self.tokenizer, &self.arguments.stop, &mut show);
        let mut length = prompt.len();
        self.look_at_length(0, length);
        let request = RowRequest {
            prompt,
            max_new_tokens: self.arguments.max_new_tokens,
            sampling: self.sampling,
            end_ids: self.tokenizer.eos_ids(),
        };
        let generation = self.model.generate_ahead(&request, self.arguments.speculate, &mut |token| {
            self.look_at_length(length, length + 1);
            length += 1;
            writing.push(token)
        })?;
        answer_of(writing, generation)
    }

    /// Each row's prompt, what the row expects, and what the model says. Several rows are answered at
    /// once.
    fn answer_rows(&self, rows: &Dataset) -> Result<ExitCode, Failure> {
        let requests: Vec<RowRequest<'_>> = rows
            .rows
            .iter()
            .map(|row| RowRequest {
                prompt: &row.tokens[..row.prompt_tokens],
                max_new_tokens: self.arguments.max_new_tokens,
                sampling: self.sampling,
                end_ids: self.tokenizer.eos_ids(),
            })
            .collect();
        let (mut begun, mut exact) = (0, 0);
        while begun < requests.len() {
            let now = &requests[begun..][..self.model.rows_at_once(&requests[begun..])];
            for (row, answer) in (begun..).zip(self.answer_at_once(now)?) {
                exact += usize::from(self.show_row(rows, row, &answer)?);
            }
            begun += now.len();
        }
        if !self.arguments.json && self.speaks {
            output::line(&format!("answered word for word: {exact} of {}", rows.rows.len()))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Generates what follows each of the prompts.
    fn answer_at_once(&self, requests: &[RowRequest<'_>]) -> Result<Vec<Answer>, Failure> {
        let mut unseen: Vec<_> = requests.iter().map(|_| |_: &str| -> io::Result<()> { Ok(()) }).collect();
        let mut writings: Vec<Writing<'_>> =
            unseen.iter_mut().map(|show| Writing::new(self.tokenizer, &self.arguments.stop, show)).collect();
        let mut lengths: Vec<usize> = requests.iter().map(|request| request.prompt.len()).collect();
        lengths.iter().for_each(|&length| self.look_at_length(0, length));
        let generations = self.model.generate_rows(requests, &mut |row, token| {
            self.look_at_length(lengths[row], lengths[row] + 1);
            lengths[row] += 1;
            writings[row].push(token)
        })?;
        writings.into_iter().zip(generations).map(|(writing, generation)| answer_of(writing, generation)).collect()
    }

    /// Shows a row and its answer. Returns whether that is what the row expects.
    fn show_row(&self, rows: &Dataset, n: usize, answer: &Answer) -> Result<bool, Failure> {
        let row = &rows.rows[n];
        let Answer { text, tokens, finish_reason } = answer;
        let same = *finish_reason == "stop" && text.trim() == row.answer_text.trim();
        if !self.speaks {
            return Ok(same);
        }
        if self.arguments.json {
            let object = json!({
                "row": rows.origin(n),
                "prompt": row.prompt_text,
                "expected": row.answer_text,
                "text": text,
                "token_ids": tokens,
                "finish_reason": finish_reason,
                "exact": same,
            });
            output::line(&object.to_string())?;
            return Ok(same);
        }
        let to_terminal = io::stdout().is_terminal();
        let shown = |text: &str| if to_terminal { indented(&printable(text)) } else { indented(text) };
        let mark = if same { "  (word for word)" } else { "" };
        output::line(&format!(
            "{}\n  prompt    {}\n  expected  {}\n  answer    {}{mark}\n",
            rows.origin(n),
            shown(&row.prompt_text),
            shown(&row.answer_text),
            shown(text)
        ))?;
        Ok(same)
    }

    /// Says so when a text of `before` tokens, which has `now`, goes beyond what the model was made
    /// for.
    fn look_at_length(&self, before: usize, now: usize) {
        let limit = self.model.config.max_position_embeddings;
        if before <= limit && now > limit {
            (self.say)(&format!(
                "the text goes beyond the {limit} positions that the model was made for: what follows may make no sense"
            ));
        }
    }
}

/// The text of a generation, and why it ended.
fn answer_of(writing: Writing<'_>, generation: Generation) -> Result<Answer, Failure> {
    let (text, stopped) = writing.finish()?;
    let finish_reason = if stopped || generation.stopped_by.is_some() { "stop" } else { "length" };
    Ok(Answer { text, tokens: generation.tokens, finish_reason })
}

/// Further lines under the first one.
fn indented(text: &str) -> String {
    text.trim().replace('\n', "\n            ")
}
