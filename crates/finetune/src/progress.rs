//! Progress of long work on stderr: bars where it is a terminal, plain lines where it is not.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use finetune_trainer::{Answers, Event, StepRow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};

/// How much is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verbosity {
    Quiet,
    Normal,
    Verbose,
}

/// What a rank tells its launcher, which shows it: one line of standard output that begins with [`MARK`].
#[derive(Debug, Serialize, Deserialize)]
enum Narrated {
    Begin { from: u64, to: u64, trained_parameters: usize },
    Step { row: Box<StepRow>, steps: u64 },
}

/// No line of text begins with it.
const MARK: char = '\u{1}';

/// The line that tells an event to a launcher; none for events that the rank says itself.
pub(crate) fn narrate(event: &Event<'_>) -> Option<String> {
    let narrated = match event {
        Event::Begin { from, to, trained_parameters } if from < to => {
            Narrated::Begin { from: *from, to: *to, trained_parameters: *trained_parameters }
        }
        Event::Step { row, steps } => Narrated::Step { row: Box::new((*row).clone()), steps: *steps },
        _ => return None,
    };
    Some(format!("{MARK}{}", serde_json::to_string(&narrated).expect("plain data")))
}

/// Seconds between plain lines while nothing else is said.
const PLAIN_EVERY: Duration = Duration::from_secs(2);

/// Shows a run.
pub(crate) struct Progress {
    verbosity: Verbosity,
    terminal: bool,
    /// A step in so many is worth a plain line (`log.every`).
    every: u64,
    bar: Option<ProgressBar>,
    started: Instant,
    first_step: Option<u64>,
    last_line: Option<Instant>,
}

impl Progress {
    pub(crate) fn new(verbosity: Verbosity, every: u64) -> Progress {
        Progress {
            verbosity,
            terminal: std::io::stderr().is_terminal(),
            every,
            bar: None,
            started: Instant::now(),
            first_step: None,
            last_line: None,
        }
    }

    /// A line above the bar.
    pub(crate) fn say(&self, line: &str) {
        if self.verbosity == Verbosity::Quiet {
            return;
        }
        match &self.bar {
            Some(bar) => bar.suspend(|| anstream::eprintln!("{line}")),
            None => anstream::eprintln!("{line}"),
        }
    }

    /// Another process's line above the bar, which has passed that one's own choice of what to say.
    pub(crate) fn repeat(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| anstream::eprintln!("{line}")),
            None => anstream::eprintln!("{line}"),
        }
    }

    /// A bar over `len` things, or a spinner where that is 0; plain output gets one line.
    pub(crate) fn start(&mut self, what: &str, len: u64) {
        self.finish();
        if self.verbosity == Verbosity::Quiet {
            return;
        }
        if !self.terminal {
            anstream::eprintln!("{what}");
            return;
        }
        let bar = ProgressBar::with_draw_target(Some(len), ProgressDrawTarget::stderr());
        let template =
            if len == 0 { "{spinner} {msg} {human_pos}" } else { "{msg} {wide_bar:.cyan/dim} {human_pos}/{human_len}" };
        bar.set_style(ProgressStyle::with_template(template).expect("a template of ours").progress_chars("━╸─"));
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        self.bar = Some(bar);
    }

    pub(crate) fn position(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Shows what [`narrate`] has made a line of; false if it is another line.
    pub(crate) fn show_narrated(&mut self, line: &str) -> bool {
        let Some(narrated) = line.strip_prefix(MARK).and_then(|text| serde_json::from_str(text).ok()) else {
            return false;
        };
        match narrated {
            Narrated::Begin { from, to, trained_parameters } => {
                self.show(Event::Begin { from, to, trained_parameters })
            }
            Narrated::Step { row, steps } => self.show(Event::Step { row: &row, steps }),
        }
        true
    }

    /// Shows what a run tells.
    pub(crate) fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Begin { from, to, .. } if from >= to => self.say(&format!("step {from} was the last: all is done")),
            Event::Begin { from, to, trained_parameters } => {
                self.say(&format!(
                    "training steps {} to {to}, {} parameters",
                    from + 1,
                    thousands(trained_parameters as u64)
                ));
                self.steps_bar(from, to);
            }
            Event::Step { row, steps } => {
                let first = *self.first_step.get_or_insert(row.step - 1);
                let done = row.step - first;
                let left = self.started.elapsed().as_secs_f64() / done as f64 * (steps - row.step) as f64;
                let numbers = format!("loss {:.4}  {:.0} tokens/s", row.loss, row.tokens_per_second);
                if let Some(bar) = &self.bar {
                    bar.set_position(row.step);
                    bar.set_message(format!("{numbers}  {} left", duration(left)));
                } else if self.plain_line_due(row.step, steps) {
                    let line = format!(
                        "step {}/{steps}  {numbers}  lr {:.3e}  grad norm {:.3}  {} left",
                        row.step,
                        row.learning_rate,
                        row.grad_norm,
                        duration(left)
                    );
                    self.say(&line);
                }
            }
            Event::Evaluating { rows } => {
                if self.verbosity == Verbosity::Verbose {
                    self.say(&format!("evaluating {rows} rows"));
                }
            }
            Event::Evaluated { row, best } => {
                let best = if best { "  (best so far)" } else { "" };
                self.say(&format!("step {}  evaluation loss {:.4}{best}", row.step, row.eval_loss));
            }
            Event::Answering { done: 0, rows } => self.start(&format!("answering {rows} held-back rows"), rows as u64),
            Event::Answering { done, .. } => self.position(done as u64),
            Event::Answered { .. } => self.finish(),
            Event::Saved { step, path } => {
                if self.verbosity == Verbosity::Verbose || !self.terminal {
                    self.say(&format!("step {step}  saved {}", path.display()));
                }
            }
            Event::Copied { step, host, failed: None } => {
                if self.verbosity == Verbosity::Verbose {
                    self.say(&format!("step {step}  kept on {host} too"));
                }
            }
            Event::Copied { step, host, failed: Some(why) } => {
                self.say(&format!("step {step}  cannot be kept on {host} too: {why}"));
            }
            // Who knows the hosts says it.
            Event::Straggler { .. } => {}
            Event::LossScale { step, scale } => {
                self.say(&format!("step {step}  f16 overflowed: computed again with loss scale {scale}"));
            }
            Event::StoppingEarly { step, evaluations } => {
                self.say(&format!("step {step}  no better evaluation {evaluations} times in a row: stopping early"));
            }
        }
    }

    fn steps_bar(&mut self, from: u64, to: u64) {
        self.finish();
        self.started = Instant::now();
        if self.terminal && self.verbosity > Verbosity::Quiet {
            let bar = ProgressBar::with_draw_target(Some(to), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("step {pos}/{len} {wide_bar:.cyan/dim} {msg}");
            bar.set_style(style.expect("a template of ours").progress_chars("━╸─"));
            bar.set_position(from);
            self.bar = Some(bar);
        }
    }

    fn plain_line_due(&mut self, step: u64, steps: u64) -> bool {
        let due = self.last_line.is_none_or(|last| last.elapsed() >= PLAIN_EVERY) || step == steps;
        let due = due && (step.is_multiple_of(self.every) || step == steps);
        if due {
            self.last_line = Some(Instant::now());
        }
        due
    }
}

/// The answers before and after training, side by side, for the end of a run.
pub(crate) fn answers(before: Option<&Answers>, after: Option<&Answers>) -> String {
    let Some(after) = after else { return String::new() };
    let mut text = String::new();
    for (n, sample) in after.samples.iter().enumerate() {
        let earlier = before.and_then(|before| before.samples.get(n)).map(|sample| sample.answer.as_str());
        text += &format!("\n{}\n", sample.row);
        text += &format!("  prompt    {}\n", one_line(&sample.prompt));
        text += &format!("  expected  {}\n", one_line(&sample.expected));
        if let Some(earlier) = earlier {
            text += &format!("  before    {}\n", one_line(earlier));
        }
        text += &format!("  after     {}\n", one_line(&sample.answer));
    }
    if let Some((right, of)) = after.exact {
        let earlier = before.and_then(|before| before.exact);
        let earlier = earlier.map_or(String::new(), |(right, of)| format!("before {right} of {of}, "));
        text += &format!("\nheld-back rows answered word for word: {earlier}after {right} of {of}\n");
    }
    text
}

/// At most 160 characters, line breaks shown.
fn one_line(text: &str) -> String {
    let text = text.trim().replace('\n', "⏎");
    match text.char_indices().nth(160) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

pub(crate) fn bytes(number: u64) -> String {
    const UNITS: [(&str, f64); 3] = [("GiB", 1073741824.0), ("MiB", 1048576.0), ("KiB", 1024.0)];
    let found = UNITS.iter().find(|(_, size)| number as f64 >= *size);
    found.map_or(format!("{number} bytes"), |(unit, size)| format!("{:.1} {unit}", number as f64 / size))
}

pub(crate) fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}
