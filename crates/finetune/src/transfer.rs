//! Files on their way from or to the hub: one bar per file and one for all in a terminal, otherwise
//! plain lines.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use finetune_hub::News;
use finetune_trainer::numbers::counted;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::progress::{bytes, duration, took};
use crate::stderr::complain;

/// Seconds between plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Bytes below which a speed says nothing.
const ENOUGH: u64 = 256 << 10;

/// Whether only errors and results are said.
static QUIET: AtomicBool = AtomicBool::new(false);

/// From now on transfers are silent.
pub(crate) fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Shows the news of a transfer.
#[derive(Default)]
pub(crate) struct Transfer {
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// What is transferred, for lines.
    id: String,
    files: usize,
    /// Bytes of all files, and those that were there at the start.
    size: u64,
    present: u64,
    /// Bytes of each file that are there.
    done: HashMap<String, u64>,
    started: Option<Instant>,
    last_line: Option<Instant>,
    bars: Option<Bars>,
}

struct Bars {
    together: MultiProgress,
    all: ProgressBar,
    files: HashMap<String, ProgressBar>,
}

impl Transfer {
    /// Hears one piece of news.
    pub(crate) fn hear(&self, news: News<'_>) {
        if QUIET.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.state.borrow_mut();
        match news {
            News::Begin { id, files, bytes, present } => state.begin(id, files, bytes, present),
            News::File { name, done, size } => state.file(name, done, size),
            News::Done { name } => {
                let bar = state.bars.as_mut().and_then(|bars| bars.files.remove(name));
                bar.iter().for_each(ProgressBar::finish_and_clear);
            }
            News::Again { name, why, pause } => {
                state.say(&format!("{name}: {why}; again in {}", took(pause.as_secs_f64())));
            }
            News::Waiting { id } => state.say(&format!("waiting for another process that fetches {id}")),
            News::Committing => state.say("all bytes are there; the hub makes a commit of them"),
            News::Note(note) => state.say(note),
            News::End => state.end(),
        }
    }
}

impl State {
    fn begin(&mut self, id: &str, files: usize, size: u64, present: u64) {
        *self = State { id: id.to_owned(), files, size, present, started: Some(Instant::now()), ..State::default() };
        self.last_line = self.started;
        let there = if present > 0 { format!(", {} of them here already", bytes(present)) } else { String::new() };
        complain!("{id}: {}, {}{there}", counted(files as u64, "file"), bytes(size));
        if std::io::stderr().is_terminal() {
            let together = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
            let all = together.add(bar(size, id));
            all.enable_steady_tick(Duration::from_millis(200));
            self.bars = Some(Bars { together, all, files: HashMap::new() });
        }
    }

    fn file(&mut self, name: &str, done: u64, size: u64) {
        match self.done.get_mut(name) {
            Some(known) => *known = done,
            None => drop(self.done.insert(name.to_owned(), done)),
        }
        let all: u64 = self.done.values().sum();
        if let Some(bars) = &mut self.bars {
            let of_file = bars.files.entry(name.to_owned()).or_insert_with(|| bars.together.add(bar(size, name)));
            of_file.set_position(done);
            bars.all.set_position(all.max(self.present));
        } else if self.last_line.is_some_and(|last| last.elapsed() >= PLAIN_EVERY) {
            self.last_line = Some(Instant::now());
            complain!("{}", self.line(all));
        }
    }

    /// How far the transfer is.
    fn line(&self, all: u64) -> String {
        let seconds = self.started.map_or(0.0, |started| started.elapsed().as_secs_f64());
        let came = all.saturating_sub(self.present);
        if came < ENOUGH {
            return format!("{}: {} of {}", self.id, bytes(all), bytes(self.size));
        }
        let speed = came as f64 / seconds.max(1e-3);
        let left = self.size.saturating_sub(all) as f64 / speed.max(1.0);
        format!(
            "{}: {} of {}, {} a second, {} left",
            self.id,
            bytes(all),
            bytes(self.size),
            bytes(speed as u64),
            duration(left)
        )
    }

    fn say(&self, line: &str) {
        match &self.bars {
            Some(bars) => bars.together.suspend(|| complain!("{line}")),
            None => complain!("{line}"),
        }
    }

    fn end(&mut self) {
        if let Some(bars) = self.bars.take() {
            bars.files.values().for_each(ProgressBar::finish_and_clear);
            bars.all.finish_and_clear();
        }
        let seconds = self.started.map_or(0.0, |started| started.elapsed().as_secs_f64());
        complain!("{}: {} done in {}", self.id, counted(self.files as u64, "file"), took(seconds));
    }
}

fn bar(size: u64, what: &str) -> ProgressBar {
    let template =
        "{msg:28!} {wide_bar:.cyan/dim} {binary_bytes:>10}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
    let bar = ProgressBar::with_draw_target(Some(size), ProgressDrawTarget::hidden());
    bar.set_style(ProgressStyle::with_template(template).expect("a template of ours").progress_chars("━╸─"));
    bar.set_message(what.to_owned());
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_far_and_how_long() {
        let started = Instant::now().checked_sub(Duration::from_secs(10)).expect("a machine that has been on");
        let state = State {
            id: "acme/tiny".to_owned(),
            size: 3 << 20,
            present: 1 << 20,
            started: Some(started),
            ..State::default()
        };
        assert_eq!(state.line(1 << 20), "acme/tiny: 1.0 MiB of 3.0 MiB");
        let line = state.line(2 << 20);
        assert!(line.starts_with("acme/tiny: 2.0 MiB of 3.0 MiB, 10"), "{line}");
        assert!(line.ends_with("s left"), "{line}");
    }
}
