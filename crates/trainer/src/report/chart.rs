//! Charts of lines over steps, as SVG.

use std::fmt::Write;

use super::page::escape;
use crate::numbers::thousands;

/// A line of a chart.
pub(super) struct Line<'a> {
    pub(super) name: &'a str,
    /// Its color, a class of the style sheet.
    pub(super) class: &'a str,
    /// Steps and values.
    pub(super) points: Vec<(f64, f64)>,
    /// Whether each point is marked, for lines with few points.
    pub(super) dots: bool,
    pub(super) dashed: bool,
}

impl<'a> Line<'a> {
    /// A plain line.
    pub(super) fn new(name: &'a str, class: &'a str, points: Vec<(f64, f64)>) -> Line<'a> {
        Line { name, class, points, dots: false, dashed: false }
    }
}

/// A chart of lines over steps.
pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    /// Whether small values mean as much as large ones, as with losses.
    pub(super) may_be_logarithmic: bool,
    /// The most points of a line that are written.
    pub(super) most_points: usize,
    pub(super) lines: Vec<Line<'a>>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 240.0;
const LEFT: f64 = 76.0;
const BOTTOM: f64 = 32.0;
const MARGIN: f64 = 12.0;

/// Values that differ by more than this factor are shown on a logarithmic axis. On a linear one the
/// small ones would lie on the zero line.
const LOGARITHMIC: f64 = 20.0;

/// The most points of a line that show their value under the mouse without the script, if they are
/// marked and if not.
const TITLES: (usize, usize) = (100, 24);

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
        // The axis starts at zero if that wastes less than half of the height, or for a constant.
        let low = if !logarithmic && low > 0.0 && (low < high / 2.0 || low >= high) { 0.0 } else { low };
        Axis { low, high: if high > low { high } else { low + 1.0 }, logarithmic }
    }

    /// What a height is proportional to.
    fn scaled(&self, value: f64) -> f64 {
        if self.logarithmic { value.max(f64::MIN_POSITIVE).log10() } else { value }
    }

    /// The place of a value: 0 at the bottom, 1 at the top.
    fn place(&self, value: f64) -> f64 {
        (self.scaled(value) - self.scaled(self.low)) / (self.scaled(self.high) - self.scaled(self.low))
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

/// The area of a chart in which lines are, and what it shows.
struct Area {
    first: f64,
    last: f64,
    axis: Axis,
}

impl Area {
    /// The area of all finite points; `None` if there are none.
    fn of(chart: &Chart<'_>) -> Option<Area> {
        let points = || chart.lines.iter().flat_map(|line| &line.points).filter(|point| point.1.is_finite());
        points().next()?;
        let range = |pick: fn(&(f64, f64)) -> f64| {
            let values = points().map(pick);
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
        };
        let (first, last) = range(|point| point.0);
        let (low, high) = range(|point| point.1);
        let last = if last > first { last } else { first + 1.0 };
        Some(Area { first, last, axis: Axis::new(low, high, chart.may_be_logarithmic) })
    }

    fn x(&self, step: f64) -> f64 {
        LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - MARGIN)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - self.axis.place(value) * (HEIGHT - BOTTOM - MARGIN)
    }

    /// The transformation of (step, scaled value) into places. With it a path holds the numbers
    /// themselves, and the script reads them from there.
    fn matrix(&self) -> String {
        let (low, high) = (self.axis.scaled(self.axis.low), self.axis.scaled(self.axis.high));
        let across = (WIDTH - LEFT - MARGIN) / (self.last - self.first);
        let down = -(HEIGHT - BOTTOM - MARGIN) / (high - low);
        format!("matrix({across} 0 0 {down} {} {})", LEFT - self.first * across, HEIGHT - BOTTOM - low * down)
    }
}

impl Chart<'_> {
    /// Writes it, with round numbers on both axes; nothing if there is no point.
    pub(super) fn write(&self, page: &mut String) {
        let Some(area) = Area::of(self) else { return };
        let title = self.title;
        let (mark, note) = if area.axis.logarithmic { (" data-log", "logarithmic") } else { ("", "") };
        let _ = write!(page, "<figure class=\"chart\"{mark}><figcaption>{title} <small>{note}</small>");
        if self.lines.len() > 1 {
            for line in &self.lines {
                let _ = write!(page, " <span class=\"{}\">{}</span>", line.class, escape(line.name));
            }
        }
        let _ = write!(page, "</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">");
        axes(page, &area);
        for line in &self.lines {
            self.line(page, &area, line);
        }
        page.push_str("</svg></figure>");
    }

    fn line(&self, page: &mut String, area: &Area, line: &Line<'_>) {
        let finite = line.points.iter().copied().filter(|point| point.1.is_finite());
        let points = thinned(finite.collect(), self.most_points);
        let Line { class, name, .. } = line;
        let place = |(step, value): &(f64, f64)| format!("{step} {}", short(area.axis.scaled(*value)));
        let path: Vec<String> = points.iter().map(place).collect();
        let marked = line.dots || points.len() == 1;
        let (dots, dashed) = (if marked { " data-dots" } else { "" }, if line.dashed { " dashed" } else { "" });
        let _ = write!(
            page,
            "<path class=\"line {class}{dashed}\" data-name=\"{}\"{dots} transform=\"{}\" d=\"M{}\"/>",
            escape(name),
            area.matrix(),
            path.join("L")
        );
        let (class, radius, most) = if marked { (*class, 3, TITLES.0) } else { ("value", 6, TITLES.1) };
        for (step, value) in points.iter().step_by(points.len().div_ceil(most).max(1)) {
            let (at, shown) = (thousands(*step as u64), shown(*value));
            let _ = write!(
                page,
                "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius}\"><title>step {at}: {shown}</title></circle>",
                area.x(*step),
                area.y(*value)
            );
        }
    }
}

/// Writes the lines and numbers of both axes.
fn axes(page: &mut String, area: &Area) {
    for tick in area.axis.ticks() {
        let (at, label) = (area.y(tick), label(tick));
        let right = WIDTH - MARGIN;
        let _ = write!(
            page,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/><text x=\"{}\" y=\"{:.1}\" class=\"y\">{label}</text>",
            LEFT - 8.0,
            at + 4.0
        );
    }
    for tick in ticks(area.first, area.last).into_iter().filter(|tick| tick.fract() == 0.0) {
        let (at, label) = (area.x(tick), thousands(tick as u64));
        let _ = write!(page, "<text x=\"{at:.1}\" y=\"{}\" class=\"x\">{label}</text>", HEIGHT - 8.0);
    }
}

/// A number with six digits.
fn short(number: f64) -> String {
    format!("{number:.5e}").parse::<f64>().unwrap_or(number).to_string()
}

/// At most `most` points of a curve, all of them if that is below 2. Each stretch keeps its lowest and highest point, so
/// spikes stay.
pub fn thinned(points: Vec<(f64, f64)>, most: usize) -> Vec<(f64, f64)> {
    if points.len() <= most || most < 2 {
        return points;
    }
    let by_value = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
    let mut kept = Vec::new();
    for stretch in points.chunks(points.len().div_ceil(most / 2)) {
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
        // As few digits as tell it apart, at most three.
        let rounded = format!("{value:.2e}").parse::<f64>().unwrap_or(value);
        format!("{rounded:e}")
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

    /// Learning rates that fall, and a constant one.
    #[test]
    fn no_two_ticks_have_the_same_label() {
        for low in [5e-5, 2e-4] {
            let labels: Vec<String> = Axis::new(low, 2e-4, false).ticks().into_iter().map(label).collect();
            assert_eq!(labels, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"], "{low}");
        }
    }

    fn written(lines: Vec<Line<'_>>) -> String {
        let mut page = String::new();
        Chart { title: "Loss", may_be_logarithmic: true, most_points: 700, lines }.write(&mut page);
        page
    }

    #[test]
    fn points_say_their_step_and_value() {
        let points = vec![(0.0, 3.5), (1000.0, 0.001234)];
        let page = written(vec![Line { dots: true, ..Line::new("evaluation", "b", points) }]);
        assert!(page.contains("<title>step 0: 3.5000</title>"), "{page}");
        assert!(page.contains("<title>step 1,000: 1.234e-3</title>"), "{page}");
        assert!(page.contains(">1,000</text>") || page.contains(">800</text>"), "{page}");
        assert_eq!(written(vec![Line::new("nothing", "a", vec![(1.0, f64::NAN)])]), "");
    }

    /// The script reads the numbers of a line from its path: steps, and values or their logarithms.
    #[test]
    fn paths_hold_the_numbers() {
        let linear = written(vec![Line::new("x</script>", "a", vec![(1.0, 1.5), (3.0, 2.123_456_7)])]);
        assert!(linear.contains("d=\"M1 1.5L3 2.12346\""), "{linear}");
        assert!(linear.contains("data-name=\"x&lt;/script&gt;\"") && !linear.contains("data-log"), "{linear}");
        let logarithmic = written(vec![Line::new("x", "a", vec![(1.0, 10.0), (2.0, 0.001)])]);
        assert!(logarithmic.contains("data-log") && logarithmic.contains("d=\"M1 1L2 -3\""), "{logarithmic}");
        // (step, scaled value) of the corners of the area are at its corners.
        let area = Area { first: 1.0, last: 3.0, axis: Axis::new(0.001, 10.0, true) };
        let matrix = area.matrix();
        let numbers: Vec<f64> = matrix
            .trim_matches(|letter: char| !letter.is_ascii_digit())
            .split(' ')
            .map(|part| part.parse().expect("a number"))
            .collect();
        let place = |step: f64, scaled: f64| (numbers[0] * step + numbers[4], numbers[3] * scaled + numbers[5]);
        for (step, value) in [(1.0, 10.0), (3.0, 0.001), (2.0, 0.1f64)] {
            let (x, y) = place(step, value.log10());
            assert!((x - area.x(step)).abs() < 1e-9 && (y - area.y(value)).abs() < 1e-9, "{step} {value}: {matrix}");
        }
    }

    #[test]
    fn thinning_keeps_spikes() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|n| (f64::from(n), 1.0)).collect();
        points[5_003].1 = 50.0;
        let kept = thinned(points, 700);
        assert!(kept.len() <= 700 && kept.contains(&(5_003.0, 50.0)));
    }
}
