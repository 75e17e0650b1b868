//! Progress of long work on stderr: bars in a terminal, otherwise plain lines.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

pub(crate) use finetune_trainer::numbers::{bytes, duration, thousands};
use finetune_trainer::numbers::{counted, rate, seconds};
use finetune_trainer::{Answers, EvalRow, Event, StepRow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::{Deserialize, Serialize};

use crate::output::printable;

/// How much is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verbosity {
    Quiet,
    Normal,
    Verbose,
}

/// What a rank tells its launcher, which shows it. It is one line of standard output that begins
/// with [`MARK`].
#[derive(Debug, Serialize, Deserialize)]
enum Narrated {
    Begin { from: u64, to: u64, alone: u64, trained_parameters: usize },
    Step { row: Box<StepRow>, steps: u64 },
}

/// No line of text begins with it.
const MARK: char = '\u{1}';

/// The line that tells an event to a launcher. `None` for events that the rank says itself.
pub(crate) fn narrate(event: &Event<'_>) -> Option<String> {
    let narrated = match event {
        Event::Begin { from, to, alone, trained_parameters } if from < to => {
            Narrated::Begin { from: *from, to: *to, alone: *alone, trained_parameters: *trained_parameters }
        }
        Event::Step { row, steps } => Narrated::Step { row: Box::new((*row).clone()), steps: *steps },
        _ => return None,
    };
    Some(format!("{MARK}{}", serde_json::to_string(&narrated).expect("plain data")))
}

/// Seconds between plain lines while nothing else is said.
const PLAIN_EVERY: Duration = Duration::from_secs(2);

/// The same for reading rows, evaluating and answering. Most of it is done before the first such
/// line.
const PLAIN_WORK_EVERY: Duration = Duration::from_secs(5);

/// Work under way, without a terminal.
#[derive(Debug)]
struct PlainWork {
    what: String,
    /// The number of things to do; 0 if it is not known.
    len: u64,
    last_line: Instant,
}

impl PlainWork {
    fn new(what: &str, len: u64) -> PlainWork {
        PlainWork { what: what.to_owned(), len, last_line: Instant::now() }
    }

    /// A line that says how far the work is, every few seconds.
    fn line(&mut self, done: u64) -> Option<String> {
        if self.last_line.elapsed() < PLAIN_WORK_EVERY {
            return None;
        }
        self.last_line = Instant::now();
        let of = if self.len > 0 { format!(" of {}", thousands(self.len)) } else { String::new() };
        Some(format!("{}: {}{of}", self.what, thousands(done)))
    }
}

/// Shows a run.
pub(crate) struct Progress {
    verbosity: Verbosity,
    terminal: bool,
    /// One step in this many gets a plain line (`log.every`).
    every: u64,
    bar: Option<ProgressBar>,
    /// Behind a lock, since any thread that reads rows counts them. The bar has its own.
    work: Mutex<Option<PlainWork>>,
    /// The bar belongs to an evaluation outside of the steps.
    evaluates: bool,
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
            work: Mutex::new(None),
            evaluates: false,
            started: Instant::now(),
            first_step: None,
            last_line: None,
        }
    }

    /// Prints a line above the bar, unless only errors and results are wanted.
    pub(crate) fn say(&self, line: &str) {
        if self.verbosity == Verbosity::Quiet {
            return;
        }
        let line = printable(line);
        match &self.bar {
            Some(bar) => bar.suspend(|| crate::stderr::complain!("{line}")),
            None => crate::stderr::complain!("{line}"),
        }
    }

    /// Prints a line of another process above the bar. That process has chosen itself what to say.
    pub(crate) fn repeat(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| crate::stderr::complain!("{line}")),
            None => crate::stderr::complain!("{line}"),
        }
    }

    /// Starts a bar over `len` things, or a spinner if `len` is 0. Plain output gets one line.
    pub(crate) fn start(&mut self, what: &str, len: u64) {
        self.finish();
        if self.verbosity == Verbosity::Quiet {
            return;
        }
        if !self.terminal {
            crate::stderr::complain!("{what}");
            self.set_work(Some(PlainWork::new(what, len)));
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
            return;
        }
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let line = work.as_mut().and_then(|work| work.line(done));
        drop(work);
        line.iter().for_each(|line| self.say(line));
    }

    fn set_work(&self, work: Option<PlainWork>) {
        *self.work.lock().unwrap_or_else(PoisonError::into_inner) = work;
    }

    pub(crate) fn finish(&mut self) {
        self.set_work(None);
        self.evaluates = false;
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    /// Shows the event that [`narrate`] has made a line of. Returns false if it is another line.
    pub(crate) fn show_narrated(&mut self, line: &str) -> bool {
        let Some(narrated) = line.strip_prefix(MARK).and_then(|text| serde_json::from_str(text).ok()) else {
            return false;
        };
        match narrated {
            Narrated::Begin { from, to, alone, trained_parameters } => {
                self.show(Event::Begin { from, to, alone, trained_parameters })
            }
            Narrated::Step { row, steps } => self.show(Event::Step { row: &row, steps }),
        }
        true
    }

    /// Shows what a run tells.
    pub(crate) fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Begin { from, to, .. } if from >= to => self.say(&format!("step {from} was the last: all is done")),
            Event::Begin { from, to, trained_parameters, .. } => self.begin_steps(from, to, trained_parameters),
            Event::CurveChanged { step, was, now } => self.say(&format!(
                "the learning rate goes on along another curve: step {step} had {}, by this recipe it would have had {}",
                rate(was),
                rate(now)
            )),
            Event::Step { row, steps } => self.show_step(row, steps),
            Event::Evaluating { rows } => self.begin_evaluation(rows),
            Event::EvaluatedRows { done, rows } => match &self.bar {
                Some(bar) if !self.evaluates => bar.set_message(format!("evaluating row {}/{rows}", done + 1)),
                _ => self.position(done as u64),
            },
            Event::Evaluated { row, best } => self.end_evaluation(row, best),
            Event::Answering { done: 0, rows } => {
                self.start(&format!("answering {}", counted(rows as u64, "held-back row")), rows as u64);
            }
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
            // Those who know the hosts and the signals say these.
            Event::Straggler { .. } | Event::SharesAssigned { .. } | Event::Working { .. } | Event::Stopping { .. } => {}
            Event::LossScale { step, scale } => {
                self.say(&format!("step {step}  f16 overflowed: computed again with loss scale {scale}"));
            }
            Event::StoppingEarly { step, evaluations } => {
                let times = counted(evaluations, "time");
                self.say(&format!("step {step}  no better evaluation {times} in a row: stopping early"));
            }
        }
    }

    fn begin_steps(&mut self, from: u64, to: u64, trained_parameters: usize) {
        let steps = if from + 1 == to { format!("step {to}") } else { format!("steps {} to {to}", from + 1) };
        self.say(&format!("training {steps}, {}", counted(trained_parameters as u64, "parameter")));
        self.steps_bar(from, to);
    }

    fn show_step(&mut self, row: &StepRow, steps: u64) {
        let first = *self.first_step.get_or_insert(row.step - 1);
        let done = row.step - first;
        let left = self.started.elapsed().as_secs_f64() / done as f64 * (steps - row.step) as f64;
        let numbers = format!("loss {:.4}  {:.0} tokens/s", row.loss, row.tokens_per_second);
        if let Some(bar) = &self.bar {
            bar.set_position(row.step);
            bar.set_message(format!("{numbers}  {} left", duration(left)));
        } else if self.plain_line_due(row.step, steps) {
            self.say(&format!(
                "step {}/{steps}  {numbers}  lr {}  grad norm {:.3}  {} left",
                row.step,
                rate(row.learning_rate),
                row.grad_norm,
                duration(left)
            ));
        }
    }

    fn end_evaluation(&mut self, row: &EvalRow, best: bool) {
        if self.evaluates || !self.terminal {
            self.finish();
        }
        let best = if best { "  (best so far)" } else { "" };
        self.say(&match row.step {
            0 => format!("before training  evaluation loss {:.4}", row.eval_loss),
            step => format!("step {step}  evaluation loss {:.4}{best}", row.eval_loss),
        });
    }

    /// An evaluation between steps shares their bar. One before them has its own. Without a
    /// terminal, nothing is said of a short one.
    fn begin_evaluation(&mut self, rows: usize) {
        let what = format!("evaluating {}", counted(rows as u64, "held-back row"));
        if self.terminal && self.bar.is_none() {
            self.start(&what, rows as u64);
            self.evaluates = true;
        } else if self.verbosity == Verbosity::Verbose {
            self.say(&what);
        }
        if !self.terminal && self.verbosity > Verbosity::Quiet {
            self.set_work(Some(PlainWork::new("evaluating held-back rows", rows as u64)));
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

/// An estimate of a time: "less than a second", "about 2m45s".
pub(crate) fn about(seconds: f64) -> String {
    if seconds < 1.0 { took(seconds) } else { format!("about {}", duration(seconds)) }
}

/// How long something took: "less than a second", "2m45s".
pub(crate) fn took(seconds: f64) -> String {
    if seconds < 1.0 { "less than a second".to_owned() } else { duration(seconds) }
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

/// The text on one line: at most 160 characters, line breaks and control characters shown. Rows may
/// be foreign, and a terminal obeys what it gets.
fn one_line(text: &str) -> String {
    let text = printable(text.trim()).replace('\n', "⏎");
    match text.char_indices().nth(160) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The line about a rank that the others wait for, and what it costs. `name` is its rank and host.
pub(crate) fn straggler(name: &str, factor: f64, steps: u64, step: f64, without: Option<f64>) -> String {
    let took = format!("{name} took {factor:.1} times as long as the others in the last {}", counted(steps, "step"));
    match without {
        Some(without) => {
            let (step, without) = (seconds(step), seconds(without));
            format!("{took}: without it a step would take about {without} instead of {step}")
        }
        None => took,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_without_a_terminal_says_how_far_it_is_now_and_then() {
        let mut work = PlainWork::new("reading rows", 0);
        assert_eq!(work.line(10), None, "a short work says nothing");
        let long_ago = Instant::now().checked_sub(PLAIN_WORK_EVERY).expect("a machine that has been on for a while");
        work.last_line = long_ago;
        assert_eq!(work.line(120_000).as_deref(), Some("reading rows: 120,000"));
        assert_eq!(work.line(120_001), None, "not again at once");
        (work.last_line, work.len) = (long_ago, 240_000);
        assert_eq!(work.line(120_000).as_deref(), Some("reading rows: 120,000 of 240,000"));
    }

    #[test]
    fn a_row_gives_the_terminal_no_orders() {
        for (text, want) in [
            (" a\nb\r\n", "a⏎b"),
            ("\u{1b}]0;title\u{7}\u{1b}[2J", "\\u{1b}]0;title\\u{7}\\u{1b}[2J"),
            ("👩\u{200d}👧", "👩\u{200d}👧"),
        ] {
            assert_eq!(one_line(text), want);
        }
    }

    #[test]
    fn a_straggler_is_named_with_what_it_costs() {
        let cases = [
            (
                straggler("rank 1 (box-2)", 8.26, 6, 0.3688, Some(0.0661)),
                "rank 1 (box-2) took 8.3 times as long as the others in the last 6 steps: without it a step would take about 0.0661 s instead of 0.37 s",
            ),
            (
                straggler("rank 0 (a)", 1.5, 40, 20.0, None),
                "rank 0 (a) took 1.5 times as long as the others in the last 40 steps",
            ),
        ];
        for (got, want) in cases {
            assert_eq!(got, want);
        }
    }
}
