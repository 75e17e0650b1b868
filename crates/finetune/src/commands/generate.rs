//! `finetune generate`: text out.

use std::process::ExitCode;

use finetune_dataset::ChatTokenizer;
use finetune_model::{Generation, Sampling};

use crate::cli::GenerateArguments;
use crate::failure::Failure;
use crate::output;

pub(crate) fn generate(arguments: GenerateArguments) -> Result<ExitCode, Failure> {
    if !(arguments.temperature >= 0.0 && arguments.temperature.is_finite()) {
        return Err(Failure::arguments("--temperature must be 0 or more", "0 takes the most likely token each time"));
    }
    if !(arguments.top_p > 0.0 && arguments.top_p <= 1.0) {
        return Err(Failure::arguments("--top-p must be above 0 and at most 1", "1 draws from all tokens"));
    }
    let Some(tokenizer) = ChatTokenizer::load_if_present(&arguments.model.directory, None)? else {
        return Err(Failure::arguments(
            format!("{} has no tokenizer.json, without which there is no text", arguments.model.directory.display()),
            "copy the tokenizer files of the model there, or name another model directory",
        ));
    };
    let prompt = if arguments.raw {
        tokenizer.encode(&arguments.prompt, true)?
    } else {
        let message = serde_json::json!({"role": "user", "content": arguments.prompt});
        tokenizer.encode_chat(&tokenizer.render(&[message], None, true)?.text)?
    };
    if prompt.is_empty() {
        return Err(Failure::arguments("--prompt is empty", "give at least one character, or leave --raw out"));
    }
    let model = super::eval::open(&arguments.model)?;
    let sampling = Sampling { temperature: arguments.temperature, top_p: arguments.top_p, seed: arguments.seed };
    let mut stream = Stream { tokenizer: &tokenizer, tokens: Vec::new(), printed: 0, on: !arguments.json };
    let generation =
        model.generate(&prompt, arguments.max_new_tokens, sampling, tokenizer.eos_ids(), &mut |token| {
            stream.push(token);
        })?;
    let text = tokenizer.decode(&generation.tokens, true)?;
    if arguments.json {
        let Generation { tokens, stopped_by } = generation;
        let finish_reason = if stopped_by.is_some() { "stop" } else { "length" };
        let object = serde_json::json!({
            "text": text,
            "token_ids": tokens,
            "prompt_token_ids": prompt,
            "finish_reason": finish_reason,
        });
        output::line(&object.to_string())?;
    } else {
        // A decoder may write earlier text anew once it sees more; what was printed stays.
        output::line(text.get(stream.printed..).unwrap_or_default())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints text as tokens come, holding back characters whose bytes are not complete yet.
struct Stream<'a> {
    tokenizer: &'a ChatTokenizer,
    tokens: Vec<u32>,
    printed: usize,
    on: bool,
}

impl Stream<'_> {
    fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if !self.on {
            return;
        }
        let Ok(text) = self.tokenizer.decode(&self.tokens, true) else { return };
        let complete = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len();
        if complete > self.printed && text.is_char_boundary(self.printed) {
            // What cannot be written here cannot be written at the end either, which reports it.
            let _ = output::print(&text[self.printed..complete]);
            self.printed = complete;
        }
    }
}
