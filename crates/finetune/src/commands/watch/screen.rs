//! The screen of `watch`: the terminal while it is ours, keys, and the loop.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::draw::draw;
use super::series::Quantity;
use super::source::Watched;
use crate::exit::Exit;
use crate::failure::Failure;

/// Time between two looks at the runs.
const LOOK: Duration = Duration::from_millis(250);

/// Shares of the mean so far, as `s` takes them in turn.
const SMOOTHING: [f64; 4] = [0.0, 0.6, 0.9, 0.98];

/// The fewest steps that are shown.
const LEAST_WINDOW: u64 = 10;

/// Losses and gradients that differ by more than this factor have a logarithmic axis, unless a key
/// has chosen. On a linear one the small ones would lie on the zero line.
const LOGARITHMIC: f64 = 20.0;

/// What is shown, as keys have chosen it.
#[derive(Debug)]
pub(super) struct View {
    pub(super) quantity: Quantity,
    pub(super) logarithmic: Option<bool>,
    pub(super) smoothing: usize,
    /// The number of newest steps that are shown; `None`: all.
    pub(super) window: Option<u64>,
    /// The run that more is told of.
    pub(super) selected: usize,
}

impl Default for View {
    fn default() -> View {
        View { quantity: Quantity::Loss, logarithmic: None, smoothing: 0, window: None, selected: 0 }
    }
}

impl View {
    pub(super) fn smoothing(&self) -> f64 {
        SMOOTHING[self.smoothing]
    }

    /// Whether the axis is logarithmic.
    pub(super) fn is_logarithmic(&self, runs: &[Watched]) -> bool {
        let by_values = || {
            let small_counts = matches!(self.quantity, Quantity::Loss | Quantity::GradNorm);
            let (low, high) = self.quantity.range(runs.iter().map(Watched::record));
            small_counts && low > 0.0 && high > LOGARITHMIC * low
        };
        self.logarithmic.unwrap_or_else(by_values)
    }

    /// Carries out a key. Returns false if it ends the program.
    fn press(&mut self, key: KeyEvent, runs: &[Watched]) -> bool {
        let last = runs.iter().map(|run| run.record().step()).max().unwrap_or(0);
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c' | 'd') if is_control => return false,
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('l') => self.logarithmic = Some(!self.is_logarithmic(runs)),
            KeyCode::Char('s') => self.smoothing = (self.smoothing + 1) % SMOOTHING.len(),
            KeyCode::Tab => self.quantity = self.quantity.next(),
            KeyCode::Char('+' | '=') => {
                self.window = Some((self.window.unwrap_or(last) / 2).max(LEAST_WINDOW));
            }
            KeyCode::Char('-') => self.window = self.window.map(|window| window * 2).filter(|&window| window < last),
            KeyCode::Up => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down => self.selected = (self.selected + 1).min(runs.len().saturating_sub(1)),
            _ => {}
        }
        true
    }
}

/// Shows the runs until a key or a signal ends it.
pub(super) fn show(runs: &mut [Watched]) -> Result<ExitCode, Failure> {
    let signal = Arc::new(AtomicUsize::new(0));
    // The terminal would stay as it is now, if a signal ended the program at once.
    for number in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize)?;
    }
    // This also gives the terminal back if the program panics.
    let mut terminal = ratatui::try_init()?;
    let shown = repeat(&mut terminal, runs, &signal);
    let restored = ratatui::try_restore();
    shown?;
    restored?;
    Ok(match signal.load(Ordering::SeqCst) {
        0 => ExitCode::SUCCESS,
        number => Exit::Stopped(number as i32).into(),
    })
}

fn repeat(terminal: &mut DefaultTerminal, runs: &mut [Watched], signal: &AtomicUsize) -> Result<(), Failure> {
    let mut view = View::default();
    while signal.load(Ordering::SeqCst) == 0 {
        for run in &mut *runs {
            run.look()?;
        }
        terminal.draw(|frame| draw(frame, runs, &view))?;
        if !event::poll(LOOK)? {
            continue;
        }
        match event::read()? {
            Event::Key(key) if key.kind == KeyEventKind::Press && !view.press(key, runs) => return Ok(()),
            // Every other event, such as another size, is answered by drawing anew.
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::once::tests::record;
    use super::*;

    #[test]
    fn keys_choose_what_is_shown() {
        let runs = [Watched::of("a", record(100)), Watched::of("b", record(7))];
        let mut view = View::default();
        let mut press = |key: KeyCode| {
            assert!(view.press(KeyEvent::from(key), &runs));
            (view.quantity, view.is_logarithmic(&runs), view.smoothing(), view.window, view.selected)
        };
        let loss = Quantity::Loss;
        // The loss falls to a thousandth.
        for (key, want) in [
            (KeyCode::Char('l'), (loss, false, 0.0, None, 0)),
            (KeyCode::Char('l'), (loss, true, 0.0, None, 0)),
            (KeyCode::Char('s'), (loss, true, 0.6, None, 0)),
            (KeyCode::Char('+'), (loss, true, 0.6, Some(50), 0)),
            (KeyCode::Char('='), (loss, true, 0.6, Some(25), 0)),
            (KeyCode::Char('+'), (loss, true, 0.6, Some(12), 0)),
            (KeyCode::Char('+'), (loss, true, 0.6, Some(10), 0)),
            (KeyCode::Char('-'), (loss, true, 0.6, Some(20), 0)),
            (KeyCode::Down, (loss, true, 0.6, Some(20), 1)),
            (KeyCode::Down, (loss, true, 0.6, Some(20), 1)),
            (KeyCode::Tab, (Quantity::LearningRate, true, 0.6, Some(20), 1)),
            (KeyCode::Up, (Quantity::LearningRate, true, 0.6, Some(20), 0)),
        ] {
            assert_eq!(press(key), want, "{key:?}");
        }
        for key in [KeyEvent::from(KeyCode::Char('q')), KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)] {
            assert!(!View::default().press(key, &runs), "{key:?}");
        }
        let mut zoomed = View { window: Some(60), ..View::default() };
        assert!(zoomed.press(KeyEvent::from(KeyCode::Char('-')), &runs));
        assert_eq!(zoomed.window, None, "all steps again");
    }

    #[test]
    fn the_axis_follows_the_values_until_a_key_chooses() {
        let (short, long) = ([Watched::of("a", record(7))], [Watched::of("a", record(100))]);
        assert!(!View::default().is_logarithmic(&short) && View::default().is_logarithmic(&long));
        let rate = View { quantity: Quantity::LearningRate, ..View::default() };
        assert!(!rate.is_logarithmic(&long));
        assert!(!View { logarithmic: Some(false), ..View::default() }.is_logarithmic(&long));
        assert!(!View::default().is_logarithmic(&[]));
    }
}
