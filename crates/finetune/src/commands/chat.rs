//! `finetune chat`: a conversation in the terminal.
//!
//! Start reading at [`chat`]. `input.rs` and `command.rs` tell what a line means, `editor.rs` and
//! `lines.rs` where it comes from, `dialogue.rs` what was said, `session.rs` how it is answered.

mod command;
mod dialogue;
mod editor;
mod files;
mod input;
mod interrupts;
mod lines;
mod screen;
mod session;
mod trained;

pub(super) use trained::recommended;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use finetune_dataset::ChatTokenizer;
use finetune_model::{KeyValueCache, Sampling};
use finetune_trainer::numbers::{counted, thousands};
use serde_json::{Map, Value};

use self::command::{Command, Said, Setting};
use self::dialogue::Dialogue;
use self::editor::{Editor, Next};
use self::interrupts::{Doing, Interrupts};
use self::lines::Lines;
use self::screen::Screen;
use self::session::{Session, Settings};
use crate::cli::ChatArguments;
use crate::commands::answering::{check_sampling, no_template, of_conversation, of_template, tokenizer, without_use};
use crate::commands::opening::{self, Purpose};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{self, printable};
use crate::progress::Verbosity;
use crate::source::Source;
use crate::stderr::complain;

/// Letters of a system prompt that the first lines show.
const SHOWN: usize = 50;

pub(crate) fn chat(arguments: ChatArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    check(&arguments)?;
    let say = |line: &str| opening::say(verbosity, line);
    let begun = arguments.messages.as_deref().map(|file| files::load("--messages", file)).transpose()?;
    let source = Source::open(&arguments.model)?;
    source.notices.iter().for_each(|notice| say(notice));
    let tokenizer = tokenizer(&source)?;
    if !tokenizer.has_template() {
        return Err(no_template(&source.model, "`finetune generate MODEL_DIR --raw --prompt TEXT`"));
    }
    tokenizer.notices().iter().for_each(|notice| say(notice));
    let settings = settings(&arguments, &source);
    let (dialogue, system_of) = match (begun, &arguments.messages) {
        (Some((object, _)), Some(file)) => (dialogue_of(object, &tokenizer, "--messages", file, &say)?, None),
        _ => opening_dialogue(&arguments, &source, &tokenizer, &say)?,
    };
    let model = opening::open(&source, &arguments.model, Purpose::Text, None, &say)?;

    let by_hand = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let interrupts = Interrupts::listen(by_hand)?;
    let mut ends = tokenizer.eos_ids().to_vec();
    // A template that is put on a base model has an end that the model's files do not know.
    ends.extend(tokenizer.template_end().filter(|end| !ends.contains(end)));
    let session = Session {
        model: &model,
        tokenizer: &tokenizer,
        ends,
        stop: &arguments.stop,
        settings,
        dialogue,
        cache: KeyValueCache::default(),
        interrupts: Arc::clone(&interrupts),
        screen: Screen::of(arguments.json),
        last: None,
    };
    let input = if by_hand {
        panel(&arguments, &source, &session, system_of.as_deref()).iter().for_each(|line| say(line));
        let history = if arguments.no_history { None } else { editor::history_file() };
        Input::Editor(Box::new(Editor::open(history, &say)?))
    } else {
        Input::Lines(Lines::default())
    };
    Talk { session, input, interrupts, json: arguments.json, verbosity }.run()
}

/// Refuses arguments before anything is read.
fn check(arguments: &ChatArguments) -> Result<(), Failure> {
    let sampling = Sampling {
        temperature: arguments.temperature.unwrap_or(0.0),
        top_p: arguments.top_p.unwrap_or(1.0),
        seed: arguments.seed,
    };
    check_sampling(sampling, &arguments.stop)?;
    if arguments.max_new_tokens == 0 {
        return Err(Failure::arguments("--max-new-tokens must be 1 or more", "an answer has at least one token"));
    }
    if arguments.messages.as_deref() == Some(Path::new("-")) {
        return Err(Failure::arguments(
            "--messages - would read the conversation from where its next messages come from",
            "name a file; messages are typed, or piped in",
        ));
    }
    Ok(())
}

fn settings(arguments: &ChatArguments, source: &Source) -> Settings {
    let (temperature, top_p) = trained::recommended(source);
    Settings {
        temperature: arguments.temperature.unwrap_or(temperature),
        top_p: arguments.top_p.unwrap_or(top_p),
        max_new_tokens: arguments.max_new_tokens,
        seed: arguments.seed,
    }
}

/// The conversation before the first question, and where its system prompt is from if the user did
/// not give it.
fn opening_dialogue(
    arguments: &ChatArguments,
    source: &Source,
    tokenizer: &ChatTokenizer,
    say: &dyn Fn(&str),
) -> Result<(Dialogue, Option<String>), Failure> {
    if let Some(system) = &arguments.system {
        check_system(tokenizer, system)?;
        return Ok((Dialogue::new(Some(system)), None));
    }
    let Some(common) = trained::common_system(source) else { return Ok((Dialogue::new(None), None)) };
    match check_system(tokenizer, &common.text) {
        Ok(()) => Ok((Dialogue::new(Some(&common.text)), Some(common.file))),
        Err(failure) => {
            say(&format!("the system prompt of the training rows is left out: {}", failure.fact()));
            Ok((Dialogue::new(None), None))
        }
    }
}

/// Some templates take no system prompt.
fn check_system(tokenizer: &ChatTokenizer, system: &str) -> Result<(), Failure> {
    let mut dialogue = Dialogue::new(Some(system));
    dialogue.ask("Hi".to_owned());
    tokenizer.render(&dialogue.messages(), None, true).map_err(of_template)?;
    Ok(())
}

/// What the first lines say: who answers, and how.
fn panel(arguments: &ChatArguments, source: &Source, session: &Session<'_>, system_of: Option<&str>) -> Vec<String> {
    let step = trained::step(source).map_or(String::new(), |step| format!(", step {}", thousands(step)));
    let model = match &source.adapter {
        Some(adapter) => format!("{} with the adapter {}{step}", source.model.display(), adapter.display()),
        None => format!("{}{step}", source.model.display()),
    };
    let template = session.tokenizer.template_file().unwrap_or(Path::new("several")).display();
    let Settings { temperature, top_p, .. } = session.settings;
    let how = if temperature == 0.0 {
        "temperature 0: the likeliest token each time".to_owned()
    } else {
        format!("temperature {temperature}, top_p {top_p}")
    };
    let mut lines = vec![
        format!("model     {model}"),
        format!("template  {template}"),
        format!("context   {} tokens; {how}", thousands(session.context() as u64)),
    ];
    if let Some(system) = session.dialogue.system() {
        let from = match system_of {
            Some(file) => format!(" (of {file}; --system \"\" for none)"),
            None => String::new(),
        };
        lines.push(format!("system    {}{from}", shortened(system)));
    }
    if arguments.messages.is_some() {
        lines.push(format!("goes on   after {}", counted(session.dialogue.exchanges() as u64, "exchange")));
    }
    lines.push("/help lists commands; Ctrl-C stops an answer, Ctrl-D leaves\n".to_owned());
    lines
}

/// The beginning of a text, on one line.
fn shortened(text: &str) -> String {
    let line = printable(text.trim()).replace('\n', " ");
    match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// Where messages come from.
enum Input {
    Editor(Box<Editor>),
    Lines(Lines),
}

/// Why something was not done.
enum Trouble {
    /// The conversation is as it was, and can go on.
    Refused(Failure),
    Fatal(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Trouble {
        Trouble::Refused(failure)
    }
}

/// Whether the conversation goes on.
#[derive(PartialEq)]
enum Flow {
    On,
    End,
}

struct Talk<'a> {
    session: Session<'a>,
    input: Input,
    interrupts: Arc<Interrupts>,
    json: bool,
    verbosity: Verbosity,
}

impl Talk<'_> {
    fn run(mut self) -> Result<ExitCode, Failure> {
        let begun = if self.session.dialogue.is_open() { self.reply() } else { Ok(()) };
        let mut flow = self.judge(begun.map(|()| Flow::On))?;
        while flow == Flow::On && self.interrupts.ended().is_none() {
            let next = self.next()?;
            let done = match next {
                Next::Entered(entered) => {
                    command::read(entered).map_err(Trouble::from).and_then(|said| self.take(said))
                }
                Next::Interrupted { empty: true } if self.interrupts.ended().is_none() => {
                    complain!("Ctrl-D or /exit leaves");
                    Ok(Flow::On)
                }
                Next::Interrupted { .. } => Ok(Flow::On),
                Next::End => Ok(Flow::End),
            };
            flow = self.judge(done)?;
        }
        Ok(self.interrupts.ended().map_or(Exit::Done, Exit::Stopped).into())
    }

    fn next(&mut self) -> Result<Next, Failure> {
        let interrupts = Arc::clone(&self.interrupts);
        // A signal may have come just before.
        let waits = || interrupts.ended().is_none();
        match &mut self.input {
            Input::Editor(editor) => {
                interrupts.during(Doing::Editing, || if waits() { editor.next() } else { Ok(Next::End) })
            }
            Input::Lines(lines) => {
                interrupts.during(Doing::Reading, || if waits() { lines.next() } else { Ok(Next::End) })
            }
        }
    }

    /// At a terminal what was refused is said, and the conversation goes on. A script hears of it
    /// by the exit code.
    fn judge(&self, done: Result<Flow, Trouble>) -> Result<Flow, Failure> {
        match (done, &self.input) {
            (Ok(flow), _) => Ok(flow),
            (Err(Trouble::Refused(failure)), Input::Editor(_)) => {
                failure.print();
                complain!();
                Ok(Flow::On)
            }
            (Err(Trouble::Refused(failure)), Input::Lines(lines)) => {
                if lines.line() > 0 {
                    complain!("at line {} of standard input:", lines.line());
                }
                Err(failure)
            }
            (Err(Trouble::Fatal(failure)), _) => Err(failure),
        }
    }

    fn take(&mut self, said: Said) -> Result<Flow, Trouble> {
        match said {
            Said::Nothing => Ok(Flow::On),
            Said::Message(text) => {
                self.session.dialogue.ask(text);
                let replied = self.reply();
                if matches!(replied, Err(Trouble::Refused(_))) {
                    self.session.dialogue.take_back();
                }
                replied.map(|()| Flow::On)
            }
            Said::Command(command) => self.carry_out(command),
        }
    }

    /// Answers the last question.
    fn reply(&mut self) -> Result<(), Trouble> {
        let prompt = self.session.prompt()?;
        if prompt.dropped > 0 {
            let context = thousands(self.session.context() as u64);
            let dropped = counted(prompt.dropped, "oldest exchange");
            self.say(&format!("the conversation has grown beyond the context of {context} tokens: {dropped} left out"));
        }
        let answer = self.session.answer(&prompt).map_err(Trouble::Fatal)?;
        if self.json {
            output::line(&answer.object().to_string()).map_err(|error| Trouble::Fatal(error.into()))?;
        }
        if let Some(remark) = answer.remark(self.session.settings, self.session.context()) {
            self.say(&remark);
        }
        if self.verbosity == Verbosity::Verbose {
            self.say(&self.session.stats());
        }
        Ok(())
    }

    fn carry_out(&mut self, command: Command) -> Result<Flow, Trouble> {
        match command {
            Command::Help => complain!("{}\n", command::help()),
            Command::Exit => return Ok(Flow::End),
            Command::Stats => complain!("{}\n", self.session.stats()),
            Command::System(system) => self.system(system)?,
            Command::Reset => {
                self.session.dialogue.reset();
                complain!("begun anew\n");
            }
            Command::Undo => match self.session.dialogue.take_back() {
                Some(question) => complain!("taken back: {}\n", shortened(&question)),
                None => return Err(nothing_asked().into()),
            },
            Command::Retry => self.retry()?,
            Command::Set(setting) => self.set(setting),
            Command::Save(path) => {
                let Some((row, unfinished)) = self.session.dialogue.row() else { return Err(nothing_asked().into()) };
                files::save(&path, &row)?;
                let weight = match unfinished {
                    0 => String::new(),
                    some => format!(", {} with the weight 0", counted(some as u64, "unfinished answer")),
                };
                complain!("added to {} as a training row{weight}\n", path.display());
            }
            Command::Load(path) => self.load(&path)?,
        }
        Ok(Flow::On)
    }

    fn system(&mut self, system: Option<String>) -> Result<(), Trouble> {
        match system {
            None => match self.session.dialogue.system() {
                Some(text) => complain!("{}\n", printable(text)),
                None => complain!("there is no system prompt\n"),
            },
            Some(text) => {
                check_system(self.session.tokenizer, &text)?;
                self.session.dialogue = Dialogue::new(Some(&text));
                complain!("begun anew {} a system prompt\n", if text.is_empty() { "without" } else { "with" });
            }
        }
        Ok(())
    }

    fn retry(&mut self) -> Result<(), Trouble> {
        let before = self.session.dialogue.clone();
        if !self.session.dialogue.reopen() {
            return Err(nothing_asked().into());
        }
        if self.session.settings.temperature == 0.0 {
            self.say("at temperature 0 the answer stays the same: /set temperature 0.7 makes others");
        }
        let replied = self.reply();
        if matches!(replied, Err(Trouble::Refused(_))) {
            self.session.dialogue = before;
        }
        replied
    }

    fn set(&mut self, setting: Option<Setting>) {
        let settings = &mut self.session.settings;
        match setting {
            Some(Setting::Temperature(value)) => settings.temperature = value,
            Some(Setting::TopP(value)) => settings.top_p = value,
            Some(Setting::MaxNewTokens(value)) => settings.max_new_tokens = value,
            Some(Setting::Seed(value)) => settings.seed = value,
            None => {}
        }
        let Settings { temperature, top_p, max_new_tokens, seed } = *settings;
        complain!("temperature {temperature}, top_p {top_p}, max_new_tokens {max_new_tokens}, next seed {seed}\n");
    }

    fn load(&mut self, path: &Path) -> Result<(), Trouble> {
        let (object, number) = files::load("/load", path)?;
        let dialogue = dialogue_of(object, self.session.tokenizer, "/load", path, &|line| self.say(line))?;
        let before = std::mem::replace(&mut self.session.dialogue, dialogue);
        let of = number.map_or(String::new(), |number| format!("row {number} of "));
        let exchanges = counted(self.session.dialogue.exchanges() as u64, "exchange");
        complain!("goes on with {of}{}: {exchanges}\n", path.display());
        if !self.session.dialogue.is_open() {
            return Ok(());
        }
        let replied = self.reply();
        if matches!(replied, Err(Trouble::Refused(_))) {
            self.session.dialogue = before;
        }
        replied
    }

    fn say(&self, line: &str) {
        if self.verbosity > Verbosity::Quiet {
            let end = if matches!(self.input, Input::Editor(_)) { "\n" } else { "" };
            complain!("\x1b[2m{line}\x1b[22m{end}");
        }
    }
}

/// The conversation of a file, in the form that the template takes.
fn dialogue_of(
    object: Map<String, Value>,
    tokenizer: &ChatTokenizer,
    option: &str,
    file: &Path,
    say: &dyn Fn(&str),
) -> Result<Dialogue, Failure> {
    let asked = tokenizer.read_asked(object).map_err(|error| of_conversation(error, option, file))?;
    without_use(&asked, file).iter().for_each(|notice| say(notice));
    Ok(Dialogue::of(asked))
}

fn nothing_asked() -> Failure {
    Failure::arguments("nothing was asked yet", "type a message")
}

#[cfg(test)]
mod tests {
    use super::shortened;

    #[test]
    fn long_texts_are_shown_by_their_beginning() {
        assert_eq!(shortened(" You are\nbrief.\u{1b} "), "You are brief.\\u{1b}");
        assert_eq!(shortened(&"é".repeat(51)), format!("{}…", "é".repeat(50)));
    }
}
