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

/// What is shown, as keys have chosen it.
#[derive(Debug)]
pub(super) struct View {
    pub(super) quantity: Quantity,
    pub(super) logarithmic: bool,
    pub(super) smoothing: usize,
    /// The number of newest steps that are shown; `None`: all.
    pub(super) window: Option<u64>,
    /// The run that more is told of.
    pub(super) selected: usize,
}

impl Default for View {
    fn default() -> View {
        View { quantity: Quantity::Loss, logarithmic: false, smoothing: 0, window: None, selected: 0 }
    }
}

impl View {
    pub(super) fn smoothing(&self) -> f64 {
        SMOOTHING[self.smoothing]
    }

    /// Carries out a key. Returns false if it ends the program. `last`: the last step of all runs.
    fn press(&mut self, key: KeyEvent, last: u64, runs: usize) -> bool {
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c' | 'd') if is_control => return false,
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('l') => self.logarithmic = !self.logarithmic,
            KeyCode::Char('s') => self.smoothing = (self.smoothing + 1) % SMOOTHING.len(),
            KeyCode::Tab => self.quantity = self.quantity.next(),
            KeyCode::Char('+' | '=') => {
                self.window = Some((self.window.unwrap_or(last) / 2).max(LEAST_WINDOW));
            }
            KeyCode::Char('-') => self.window = self.window.map(|window| window * 2).filter(|&window| window < last),
            KeyCode::Up => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down => self.selected = (self.selected + 1).min(runs.saturating_sub(1)),
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
        let last = runs.iter().map(|run| run.record().step()).max().unwrap_or(0);
        match event::read()? {
            Event::Key(key) if key.kind == KeyEventKind::Press && !view.press(key, last, runs.len()) => return Ok(()),
            // Every other event, such as another size, is answered by drawing anew.
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_choose_what_is_shown() {
        let mut view = View::default();
        let mut press = |key: KeyCode| {
            assert!(view.press(KeyEvent::from(key), 100, 2));
            (view.quantity, view.logarithmic, view.smoothing(), view.window, view.selected)
        };
        let loss = Quantity::Loss;
        for (key, want) in [
            (KeyCode::Char('l'), (loss, true, 0.0, None, 0)),
            (KeyCode::Char('l'), (loss, false, 0.0, None, 0)),
            (KeyCode::Char('s'), (loss, false, 0.6, None, 0)),
            (KeyCode::Char('+'), (loss, false, 0.6, Some(50), 0)),
            (KeyCode::Char('='), (loss, false, 0.6, Some(25), 0)),
            (KeyCode::Char('+'), (loss, false, 0.6, Some(12), 0)),
            (KeyCode::Char('+'), (loss, false, 0.6, Some(10), 0)),
            (KeyCode::Char('-'), (loss, false, 0.6, Some(20), 0)),
            (KeyCode::Down, (loss, false, 0.6, Some(20), 1)),
            (KeyCode::Down, (loss, false, 0.6, Some(20), 1)),
            (KeyCode::Tab, (Quantity::LearningRate, false, 0.6, Some(20), 1)),
            (KeyCode::Up, (Quantity::LearningRate, false, 0.6, Some(20), 0)),
        ] {
            assert_eq!(press(key), want, "{key:?}");
        }
        for key in [KeyEvent::from(KeyCode::Char('q')), KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)] {
            assert!(!View::default().press(key, 1, 1), "{key:?}");
        }
        let mut zoomed = View { window: Some(60), ..View::default() };
        assert!(zoomed.press(KeyEvent::from(KeyCode::Char('-')), 100, 1));
        assert_eq!(zoomed.window, None, "all steps again");
    }
}
