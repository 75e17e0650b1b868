//! The screen of `watch`, drawn from what is known of the runs.

use finetune_launch::complaint::shown;
use finetune_trainer::numbers::thousands;
use finetune_trainer::{Answers, RunRecord};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Chart, Dataset, GraphType, Paragraph};

use super::once;
use super::screen::View;
use super::series::{Look, Series};
use super::source::Watched;
use crate::output::printable;
use crate::text_table::{shortened, widths};

/// A color for each run; they begin again after the last.
const COLORS: [Color; 8] = [
    Color::Cyan,
    Color::Yellow,
    Color::Magenta,
    Color::Green,
    Color::LightRed,
    Color::LightBlue,
    Color::White,
    Color::LightGreen,
];

/// The most lines about one run below the table.
const DETAILS: usize = 4;

/// Fewer lines of a chart say nothing.
const LEAST_CHART: u16 = 6;

/// Draws everything.
pub(super) fn draw(frame: &mut Frame<'_>, runs: &[Watched], view: &View) {
    let area = frame.area();
    let rows = (runs.len() as u16 + 1).min(area.height.saturating_sub(LEAST_CHART + 2).max(2));
    let details = details(runs, view, area.width);
    let free = area.height.saturating_sub(rows + LEAST_CHART + 1);
    let parts = [
        Constraint::Min(0),
        Constraint::Length(rows),
        Constraint::Length((details.len() as u16).min(free)),
        Constraint::Length(1),
    ];
    let [chart, table, below, keys] = Layout::vertical(parts).areas(area);
    draw_chart(frame, chart, runs, view);
    frame.render_widget(Paragraph::new(table_lines(runs, view, area.width)), table);
    frame.render_widget(Paragraph::new(details), below);
    frame.render_widget(Paragraph::new(key_line(runs, view)).style(dim()), keys);
}

fn dim() -> Style {
    Style::new().add_modifier(Modifier::DIM)
}

fn color(n: usize) -> Color {
    COLORS[n % COLORS.len()]
}

fn draw_chart(frame: &mut Frame<'_>, area: Rect, runs: &[Watched], view: &View) {
    let last = runs.iter().map(|run| run.record().step()).max().unwrap_or(0);
    let from = view.window.map_or(0, |window| last.saturating_sub(window));
    // A braille character has two columns of dots.
    let most = usize::from(area.width) * 4;
    let logarithmic = view.is_logarithmic(runs);
    let look = Look { quantity: view.quantity, logarithmic, smoothing: view.smoothing(), from, most };
    let all: Vec<Series> = runs.iter().map(|run| Series::new(run.record(), look)).collect();
    let title = format!("{}{}", view.quantity.name(), if logarithmic { ", logarithmic" } else { "" });
    let Some(bounds) = Bounds::of(&all, logarithmic) else {
        let waiting = format!("{title}: nothing to show yet");
        frame.render_widget(Paragraph::new(waiting).style(dim()), area);
        return;
    };
    let mut sets = Vec::new();
    for (n, series) in all.iter().enumerate() {
        let style = Style::new().fg(color(n));
        let is_smooth = !series.smooth.is_empty();
        sets.push(line(&series.raw, if is_smooth { style.add_modifier(Modifier::DIM) } else { style }));
        if is_smooth {
            sets.push(line(&series.smooth, style.add_modifier(Modifier::BOLD)));
        }
    }
    for (n, series) in all.iter().enumerate() {
        let style = Style::new().fg(color(n)).add_modifier(Modifier::BOLD);
        let dots = Dataset::default().marker(Marker::Dot).graph_type(GraphType::Scatter).data(&series.evals);
        sets.push(dots.style(style));
    }
    let x = Axis::default().style(dim()).bounds([bounds.first, bounds.last]).labels(bounds.steps());
    let y = Axis::default().style(dim()).title(Span::from(title)).bounds([bounds.low, bounds.high]);
    let y = y.labels(bounds.values(area.height, logarithmic));
    frame.render_widget(Chart::new(sets).x_axis(x).y_axis(y).legend_position(None), area);
}

fn line(points: &[(f64, f64)], style: Style) -> Dataset<'_> {
    Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line).data(points).style(style)
}

/// What the axes go over.
struct Bounds {
    first: f64,
    last: f64,
    low: f64,
    high: f64,
}

impl Bounds {
    fn of(all: &[Series], logarithmic: bool) -> Option<Bounds> {
        let points = || all.iter().flat_map(Series::points);
        points().next()?;
        let range = |pick: fn(&(f64, f64)) -> f64| {
            let values = points().map(pick);
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
        };
        let ((first, last), (low, high)) = (range(|point| point.0), range(|point| point.1));
        // An axis from zero, if that wastes less than half of the height.
        let low = if !logarithmic && low > 0.0 && low < high / 2.0 { 0.0 } else { low };
        let high = if high > low { high } else { low + low.abs().max(1e-9) };
        Some(Bounds { first, last: last.max(first + 1.0), low, high })
    }

    fn steps(&self) -> Vec<String> {
        let middle = f64::midpoint(self.first, self.last);
        [self.first, middle, self.last].map(|step| thousands(step.round() as u64)).to_vec()
    }

    fn values(&self, height: u16, logarithmic: bool) -> Vec<String> {
        let count = if height >= 16 { 5 } else { 3 };
        let place = |n: usize| self.low + (self.high - self.low) * n as f64 / (count - 1) as f64;
        let value = |n: usize| if logarithmic { 10f64.powf(place(n)) } else { place(n) };
        (0..count).map(|n| label(value(n))).collect()
    }
}

/// A number beside an axis.
fn label(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size < 1e-3 => format!("{value:.1e}"),
        size if size < 1.0 => format!("{value:.4}"),
        size if size < 100.0 => format!("{value:.2}"),
        size => thousands(size.round() as u64),
    }
}

fn table_lines(runs: &[Watched], view: &View, width: u16) -> Vec<Line<'static>> {
    let mut rows = once::table(runs);
    for row in rows.iter_mut().skip(1) {
        row[0] = shortened(&row[0], usize::from(width / 3).max(8));
    }
    // Two columns for the mark of the run that is chosen.
    once::fit(&mut rows, usize::from(width).saturating_sub(2));
    let widths = widths(&rows);
    let line = |(n, row): (usize, &Vec<String>)| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let (Some(run), rest) = (n.checked_sub(1), cells[1..].join("  ")) else {
            return Line::from(format!("  {}", cells.join("  "))).style(dim());
        };
        let mark = if run == view.selected && runs.len() > 1 { "> " } else { "  " };
        Line::from(vec![
            Span::from(mark),
            Span::from(cells[0].clone()).style(Style::new().fg(color(run)).add_modifier(Modifier::BOLD)),
            Span::from(format!("  {rest}")),
        ])
    };
    rows.iter().enumerate().map(line).collect()
}

/// Lines about the chosen run: what is wrong, and a held-back row with its answer.
fn details(runs: &[Watched], view: &View, width: u16) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    for run in runs {
        let error = once::error(run.record()).map(|error| format!("{}: {error}", run.name));
        lines.extend(error.into_iter().chain(run.trouble().map(shown)));
    }
    let bad = Style::new().fg(Color::Red);
    let cut = |line: String| shortened(&line, usize::from(width));
    let mut lines: Vec<Line<'static>> = lines.into_iter().map(|line| Line::from(cut(line)).style(bad)).collect();
    if let Some(run) = runs.get(view.selected) {
        lines.extend(sample(run.record()).into_iter().map(|line| Line::from(cut(line))));
    }
    lines.truncate(DETAILS);
    lines
}

/// The first held-back row that was answered.
fn sample(record: &RunRecord) -> Vec<String> {
    let (before, after) = record.answers();
    let (answers, when) = match (before, after) {
        (_, Some(after)) => (after, "after training"),
        (Some(before), None) => (before, "before training"),
        (None, None) => return Vec::new(),
    };
    let Answers { samples, .. } = answers;
    // A zero width joiner makes one sign of several, and belongs to the text.
    let one_line = |text: &str| printable(text.trim()).replace('\n', "⏎");
    let Some(sample) = samples.first() else { return Vec::new() };
    vec![
        format!("prompt    {}", one_line(&sample.prompt)),
        format!("expected  {}", one_line(&sample.expected)),
        format!("answer    {}  ({when})", one_line(&sample.answer)),
    ]
}

fn key_line(runs: &[Watched], view: &View) -> String {
    let window = view.window.map_or("all steps".to_owned(), |window| format!("last {} steps", thousands(window)));
    format!(
        "q quit  tab {}  l {}  s smoothing {}  +/- {window}  ↑↓ run",
        view.quantity.next().name(),
        if view.is_logarithmic(runs) { "linear" } else { "logarithmic" },
        view.smoothing(),
    )
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::once::tests::record;
    use super::*;

    /// The screen as text.
    fn drawn(width: u16, height: u16, runs: &[Watched], view: &View) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a screen");
        terminal.draw(|frame| draw(frame, runs, view)).expect("drawn");
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol().to_owned()).collect::<String>().trim_end().to_owned();
        (0..height).map(line).collect()
    }

    #[test]
    fn curves_table_and_keys_fit_any_terminal() {
        let runs = [Watched::of("support-bot", record(60)), Watched::of("another", record(30))];
        for (width, height) in [(80, 24), (50, 20), (200, 60), (20, 8), (5, 3), (1, 1)] {
            for logarithmic in [Some(false), Some(true), None] {
                let view = View { logarithmic, ..View::default() };
                let lines = drawn(width, height, &runs, &view);
                if width < 50 {
                    continue;
                }
                let text = lines.join("\n");
                let braille = |letter: char| ('\u{2801}'..='\u{28ff}').contains(&letter);
                assert!(text.chars().filter(|&letter| braille(letter)).count() > 20, "{text}");
                for part in ["support-bot  running  60/100", "another      running  30/100", "q quit", "loss"] {
                    assert!(text.contains(part), "{width}x{height} lacks {part:?}:\n{text}");
                }
                assert!(text.contains('•'), "evaluations are dots:\n{text}");
            }
        }
    }

    #[test]
    fn a_run_without_rows_says_so() {
        let runs = [Watched::of("new", RunRecord::default())];
        let text = drawn(60, 12, &runs, &View::default()).join("\n");
        assert!(text.contains("loss: nothing to show yet") && text.contains("new  waiting  0"), "{text}");
    }

    #[test]
    fn what_a_run_says_is_no_escape_sequence() {
        let mut bad = record(3);
        bad.is_held = false;
        let facts = bad.facts.as_mut().expect("facts");
        (facts.status, facts.error) = (finetune_trainer::RunStatus::Failed, Some("\u{1b}[2Jgone\nmore".to_owned()));
        bad.take_answers(
            br#"{"before": {"samples": [{"row": "a:1", "prompt": "one\ntwo", "expected": "\u001b[31m", "answer": "no"}], "exact": null}, "after": null}"#,
        );
        let text = drawn(80, 24, &[Watched::of("a", bad)], &View::default()).join("\n");
        for part in [
            "failed",
            "a: \\u{1b}[2Jgone",
            "prompt    one⏎two",
            "expected  \\u{1b}[31m",
            "answer    no  (before training)",
        ] {
            assert!(text.contains(part), "lacks {part:?}:\n{text}");
        }
        assert!(!text.contains('\u{1b}'));
    }
}
