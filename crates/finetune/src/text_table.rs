//! Tables and small curves for a terminal.

/// The bars of a small curve, from low to high.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Columns in a terminal, if stdout is one.
pub(crate) fn terminal_width() -> Option<usize> {
    use std::io::IsTerminal;
    if !std::io::stdout().is_terminal() {
        return None;
    }
    ratatui::crossterm::terminal::size().ok().map(|(columns, _)| usize::from(columns)).filter(|&columns| columns > 0)
}

/// Rows with columns that are as wide as their widest entry, two spaces apart.
pub(crate) fn columns(rows: &[Vec<String>]) -> String {
    let widths = widths(rows);
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// The width of each column.
pub(crate) fn widths(rows: &[Vec<String>]) -> Vec<usize> {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    (0..count).map(|column| width(column).unwrap_or(0)).collect()
}

/// The text cut to a width, with a mark where it was cut: at the end, or of a path in its middle.
pub(crate) fn shortened(text: &str, width: usize) -> String {
    let letters: Vec<char> = text.chars().collect();
    if letters.len() <= width || width == 0 {
        return text.to_owned();
    }
    // The end of a path says more than its beginning.
    let tail = if text.contains('/') { (width - 1) * 2 / 3 } else { 0 };
    let head = width - 1 - tail;
    letters[..head].iter().chain(['…'].iter()).chain(&letters[letters.len() - tail..]).collect()
}

/// A curve of one line: bars from `low` to `high`, `width` of them at most. Each stands for the
/// mean of its stretch.
pub(crate) fn curve(values: &[f64], low: f64, high: f64, width: usize) -> String {
    let values: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    if values.is_empty() || width == 0 {
        return String::new();
    }
    let count = values.len().min(width);
    let bar = |n: usize| {
        let stretch = &values[n * values.len() / count..(n + 1) * values.len() / count];
        let mean = stretch.iter().sum::<f64>() / stretch.len() as f64;
        let share = if high > low { (mean - low) / (high - low) } else { 0.5 };
        BARS[((share * 8.0) as usize).min(7)]
    };
    (0..count).map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [vec!["run".to_owned(), "loss".to_owned()], vec!["a long name".to_owned(), "é".to_owned()]];
        assert_eq!(columns(&rows), "run          loss\na long name  é\n");
        assert_eq!(columns(&[]), "");
    }

    #[test]
    fn long_texts_are_cut_where_it_hurts_least() {
        for (text, width, want) in [
            ("short", 5, "short"),
            ("a long name", 6, "a lon…"),
            ("/home/me/data/train.jsonl", 14, "/home…in.jsonl"),
            ("x", 0, "x"),
        ] {
            assert_eq!(shortened(text, width), want);
        }
    }

    #[test]
    fn a_curve_of_one_line() {
        let falling: Vec<f64> = (0..8).rev().map(f64::from).collect();
        assert_eq!(curve(&falling, 0.0, 7.0, 40), "█▇▆▅▄▃▂▁");
        assert_eq!(curve(&falling, 0.0, 7.0, 4), "█▆▃▁");
        assert_eq!(curve(&[1.0, 1.0], 1.0, 1.0, 9), "▅▅");
        assert_eq!(curve(&[f64::NAN], 0.0, 1.0, 9), "");
    }
}
