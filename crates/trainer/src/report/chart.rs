//! Charts of lines over steps, as SVG.

use std::fmt::Write;

use crate::numbers::thousands;

/// A line of a chart.
pub(super) struct Line<'a> {
    pub(super) name: &'a str,
    pub(super) class: &'a str,
    pub(super) points: Vec<(f64, f64)>,
    /// Whether each point is marked, for lines with few points.
    pub(super) dots: bool,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 76.0;
const BOTTOM: f64 = 32.0;
const MARGIN: f64 = 12.0;

/// Values that differ by more than this factor are shown on a logarithmic axis. On a linear one the
/// small ones would lie on the zero line.
const LOGARITHMIC: f64 = 20.0;

/// The most points of a line that show their value under the mouse.
const TITLES: usize = 100;

/// The vertical axis.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Axis {
    low: f64,
    high: f64,
    logarithmic: bool,
}

impl Axis {
    /// For values from `low` to `high`. `may_be_logarithmic`: whether small values mean as much as
    /// large ones, as with losses.
    fn new(low: f64, high: f64, may_be_logarithmic: bool) -> Axis {
        let logarithmic = may_be_logarithmic && low > 0.0 && high > LOGARITHMIC * low;
        // The axis starts at zero if that wastes less than half of the height.
        let low = if !logarithmic && low > 0.0 && low < high / 2.0 { 0.0 } else { low };
        Axis { low, high: if high > low { high } else { low + 1.0 }, logarithmic }
    }

    /// The place of a value: 0 at the bottom, 1 at the top.
    fn place(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.logarithmic { value.max(f64::MIN_POSITIVE).ln() } else { value };
        (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
    }

    /// The numbers that are shown at the axis.
    fn ticks(&self) -> Vec<f64> {
        if !self.logarithmic {
            return ticks(self.low, self.high);
        }
        let powers = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        // Over many powers of ten only the powers are shown.
        let steps: &[f64] = if powers.clone().count() > 4 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
        all.filter(|tick| (self.low..=self.high).contains(tick)).collect()
    }
}

/// Writes a chart of lines over steps, with round numbers on both axes.
pub(super) fn chart(page: &mut String, title: &str, lines: &[Line<'_>], may_be_logarithmic: bool) {
    let points = || lines.iter().flat_map(|line| &line.points).filter(|point| point.1.is_finite());
    if points().count() == 0 {
        return;
    }
    let range = |pick: fn(&(f64, f64)) -> f64| {
        let values = points().map(pick);
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    };
    let (first, last) = range(|point| point.0);
    let last = if last > first { last } else { first + 1.0 };
    let (low, high) = range(|point| point.1);
    let axis = Axis::new(low, high, may_be_logarithmic);
    let x = |step: f64| LEFT + (step - first) / (last - first) * (WIDTH - LEFT - MARGIN);
    let y = |value: f64| HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - BOTTOM - MARGIN);
    let _ = write!(page, "<figure><figcaption>{title}");
    if axis.logarithmic {
        page.push_str(" <small>logarithmic</small>");
    }
    if lines.len() > 1 {
        for line in lines {
            let _ = write!(page, " <span class=\"{}\">{}</span>", line.class, line.name);
        }
    }
    let _ = write!(page, "</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">");
    for tick in axis.ticks() {
        let (at, label) = (y(tick), label(tick));
        let right = WIDTH - MARGIN;
        let _ = write!(
            page,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/><text x=\"{}\" y=\"{:.1}\" class=\"y\">{label}</text>",
            LEFT - 8.0,
            at + 4.0
        );
    }
    for tick in ticks(first, last).into_iter().filter(|tick| tick.fract() == 0.0) {
        let label = thousands(tick as u64);
        let _ = write!(page, "<text x=\"{:.1}\" y=\"{}\" class=\"x\">{label}</text>", x(tick), HEIGHT - 8.0);
    }
    for line in lines {
        let points = thin(&line.points);
        let place = |(n, (step, value)): (usize, &(f64, f64))| {
            format!("{}{:.1} {:.1}", if n == 0 { 'M' } else { 'L' }, x(*step), y(*value))
        };
        let path: String = points.iter().enumerate().map(place).collect();
        let _ = write!(page, "<path class=\"line {}\" d=\"{path}\"/>", line.class);
        let marked = line.dots || points.len() == 1;
        let (class, radius) = if marked { (line.class, 3) } else { ("value", 6) };
        for (step, value) in points.iter().step_by(points.len().div_ceil(TITLES).max(1)) {
            let (at, shown) = (thousands(*step as u64), shown(*value));
            let _ = write!(
                page,
                "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius}\"><title>step {at}: {shown}</title></circle>",
                x(*step),
                y(*value)
            );
        }
    }
    page.push_str("</svg></figure>");
}

/// At most 700 points, as many as the chart has columns. Each stretch keeps its lowest and highest
/// point, so spikes stay.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let points: Vec<_> = points.iter().copied().filter(|point| point.1.is_finite()).collect();
    if points.len() <= 700 {
        return points;
    }
    let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
    let mut kept = Vec::new();
    for stretch in points.chunks(points.len().div_ceil(350)) {
        let (low, high) = (stretch.iter().min_by(by_value), stretch.iter().max_by(by_value));
        let mut pair: Vec<(f64, f64)> = low.into_iter().chain(high).copied().collect();
        pair.sort_by(|a, b| a.0.total_cmp(&b.0));
        kept.extend(pair);
    }
    kept
}

/// Four to eight round numbers in the range.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|n| n * power).find(|&step| step >= rough).unwrap_or(power);
    let first = (low / step).ceil() as i64;
    (first..).map(|n| n as f64 * step).take_while(|&tick| tick <= high + step * 1e-9).take(20).collect()
}

/// A number beside an axis.
fn label(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        "0".to_owned()
    } else if size < 1e-3 {
        format!("{value:.0e}")
    } else if size >= 100.0 {
        let sign = if value < 0.0 { "-" } else { "" };
        format!("{sign}{}", thousands(size.round() as u64))
    } else {
        let text = format!("{value:.4}");
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    }
}

/// A number under the mouse.
fn shown(value: f64) -> String {
    if value != 0.0 && value.abs() < 1e-2 { format!("{value:.3e}") } else { format!("{value:.4}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let cases = [
            (0.0, 1.0, vec![0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]),
            (3.0, 47.0, vec![10.0, 20.0, 30.0, 40.0]),
            (-1.0, 1.0, vec![-1.0, -0.5, 0.0, 0.5, 1.0]),
        ];
        for (low, high, want) in cases {
            assert_eq!(ticks(low, high), want, "{low} to {high}");
        }
    }

    /// The quickstart's loss falls from 7.56 to 0.0008. On an axis from 0 the second half of the
    /// run would be a flat line.
    #[test]
    fn small_losses_can_be_read() {
        let axis = Axis::new(0.0008, 7.56, true);
        assert!(axis.logarithmic);
        assert!(axis.place(0.01) > 0.25 && axis.place(0.01) < 0.3, "{}", axis.place(0.01));
        let labels: Vec<String> = axis.ticks().into_iter().map(label).collect();
        assert_eq!(labels, ["0.001", "0.01", "0.1", "1"]);
        for (low, high, may) in [(0.0008, 7.56, false), (0.0, 7.56, true), (1.2, 3.0, true), (-1.0, 3.0, true)] {
            assert!(!Axis::new(low, high, may).logarithmic, "{low} to {high}");
        }
        let narrow = Axis::new(0.05, 1.5, true);
        assert_eq!(narrow.ticks().into_iter().map(label).collect::<Vec<_>>(), ["0.05", "0.1", "0.2", "0.5", "1"]);
    }

    #[test]
    fn points_say_their_step_and_value() {
        let mut page = String::new();
        let points = vec![(0.0, 3.5), (1000.0, 0.001234)];
        chart(&mut page, "Loss", &[Line { name: "evaluation", class: "b", points, dots: true }], true);
        assert!(page.contains("<title>step 0: 3.5000</title>"), "{page}");
        assert!(page.contains("<title>step 1,000: 1.234e-3</title>"), "{page}");
        assert!(page.contains(">1,000</text>") || page.contains(">800</text>"), "{page}");
    }

    #[test]
    fn thinning_keeps_spikes() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|n| (f64::from(n), 1.0)).collect();
        points[5_003].1 = 50.0;
        let kept = thin(&points);
        assert!(kept.len() <= 700 && kept.contains(&(5_003.0, 50.0)));
    }
}
