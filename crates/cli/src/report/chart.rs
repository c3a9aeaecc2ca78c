//! Charts as SVG figures. Colours are the page's variables; a series has a shape as well, so that
//! colour alone tells nothing apart, and a mark's title says what it is.

use super::escape;
use std::fmt::Write;

/// Series that can be told apart.
pub const COLOURS: usize = 8;

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 44.0;

/// How values become places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// In proportion.
    Linear,
    /// By their logarithm.
    Logarithmic,
}

/// A mark of a scatter chart.
pub struct Point {
    /// Along the bottom.
    pub x: f64,
    /// Upwards.
    pub y: f64,
    /// What it is.
    pub title: String,
}

/// Marks of one colour and shape.
pub struct Series {
    /// In the legend.
    pub name: String,
    /// Marks.
    pub points: Vec<Point>,
}

/// One bar.
pub struct Bar {
    /// Beside or below it.
    pub label: String,
    /// Its length.
    pub value: f64,
    /// Its value, written out.
    pub text: String,
}

/// The range of an axis, with ticks at its ends.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64>, scale: Scale) -> Option<Self> {
        let value = |v: f64| if scale == Scale::Logarithmic { v.log10() } else { v };
        let (low, high) = values
            .map(value)
            .filter(|v| v.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            return None;
        }
        let (low, high) = if high - low < 1e-9 { (low - 0.5, high + 0.5) } else { (low, high) };
        let step = match scale {
            Scale::Linear => step((high - low) / 5.0),
            // Whole decades, or parts of one that read as 1, 3 and 10.
            Scale::Logarithmic if high - low > 1.2 => 1.0,
            Scale::Logarithmic => 0.5,
        };
        let first = (low / step + 1e-9).floor();
        let last = (high / step - 1e-9).ceil();
        let ticks: Vec<f64> =
            (0..=((last - first) as usize).min(40)).map(|i| (first + i as f64) * step).collect();
        Some(Self { scale, low: first * step, high: last * step, ticks })
    }

    /// Share of the axis below `value`.
    fn place(&self, value: f64) -> f64 {
        let value = if self.scale == Scale::Logarithmic { value.log10() } else { value };
        (value - self.low) / (self.high - self.low)
    }

    /// Places and texts of the ticks.
    fn labels(&self) -> impl Iterator<Item = (f64, String)> {
        self.ticks.iter().map(|&tick| {
            let place = (tick - self.low) / (self.high - self.low);
            (place, number(if self.scale == Scale::Logarithmic { 10f64.powf(tick) } else { tick }))
        })
    }
}

/// The least of 1, 2, 5 times a power of ten that is not below `least`.
fn step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|f| f * power >= least * 0.999);
    factor.unwrap_or(10.0) * power
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v < 1e-3 => format!("{value:.0e}"),
        v if v < 9.95 => {
            let text = format!("{value:.*}", if v < 0.095 { 3 } else { 2 });
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
        _ => format!("{value:.0}"),
    }
}

fn x_of(share: f64) -> f64 {
    LEFT + share * (WIDTH - LEFT - RIGHT)
}

/// As [`x_of`], with room for marks at both ends.
fn inset(share: f64) -> f64 {
    x_of(0.02 + 0.96 * share)
}

fn y_of(share: f64) -> f64 {
    HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
}

fn open(title: &str, height: f64) -> String {
    let title = escape(title);
    format!(
        "<figure>\n<figcaption>{title}</figcaption>\n\
         <svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">\n"
    )
}

fn frame(svg: &mut String, names: (&str, &str), y: &Axis) {
    for (place, label) in y.labels() {
        let at = y_of(place);
        let (right, text) = (WIDTH - RIGHT, LEFT - 6.0);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\"/>\
             <text x=\"{text}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            at + 4.0
        );
    }
    let (x, y) = (x_of(0.5), HEIGHT - 6.0);
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>",
        escape(names.0)
    );
    let middle = y_of(0.5);
    let _ = writeln!(
        svg,
        "<text transform=\"translate(10 {middle:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        escape(names.1)
    );
}

fn bottom_label(svg: &mut String, x: f64, label: &str) {
    let y = HEIGHT - BOTTOM + 16.0;
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>",
        escape(label)
    );
}

/// Marks with a legend; empty without any.
pub fn scatter(title: &str, names: (&str, &str), scale: Scale, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|s| &s.points);
    let axes =
        (Axis::new(points().map(|p| p.x), Scale::Linear), Axis::new(points().map(|p| p.y), scale));
    let (Some(x), Some(y)) = axes else { return String::new() };
    let mut svg = open(title, HEIGHT);
    frame(&mut svg, names, &y);
    for (place, label) in x.labels() {
        bottom_label(&mut svg, inset(place), &label);
    }
    for (index, series) in series.iter().enumerate() {
        for point in series.points.iter().filter(|p| p.x.is_finite() && p.y.is_finite()) {
            let (x, y) = (inset(x.place(point.x)), y_of(y.place(point.y)));
            svg.push_str(&mark(index, x, y, &point.title));
        }
    }
    svg.push_str("</svg>\n<ul class=\"legend\">\n");
    for (index, series) in series.iter().enumerate() {
        let mark = mark(index, 6.0, 6.0, "");
        let _ = writeln!(
            svg,
            "<li><svg viewBox=\"0 0 12 12\" aria-hidden=\"true\">{mark}</svg>{}</li>",
            escape(&series.name)
        );
    }
    svg.push_str("</ul>\n</figure>\n");
    svg
}

fn mark(series: usize, x: f64, y: f64, title: &str) -> String {
    let colour = series % COLOURS;
    let shape = match series % 4 {
        0 => format!("M{:.1} {y:.1}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z", x - 4.0),
        1 => format!("M{:.1} {:.1}h7v7h-7z", x - 3.5, y - 3.5),
        2 => format!("M{x:.1} {:.1}l4.6 8h-9.2z", y - 4.8),
        _ => format!("M{x:.1} {:.1}l5 5l-5 5l-5 -5z", y - 5.0),
    };
    let title = match title {
        "" => String::new(),
        title => format!("<title>{}</title>", escape(title)),
    };
    format!("<path class=\"mark\" style=\"fill:var(--c{colour})\" d=\"{shape}\">{title}</path>\n")
}

/// Upright bars from zero, labelled below as far as there is room.
pub fn columns(title: &str, names: (&str, &str), bars: &[Bar]) -> String {
    let values = bars.iter().map(|bar| bar.value).chain([0.0]);
    let Some(y) = Axis::new(values, Scale::Linear).filter(|_| !bars.is_empty()) else {
        return String::new();
    };
    let mut svg = open(title, HEIGHT);
    frame(&mut svg, names, &y);
    let every = bars.len().div_ceil(14);
    // A few bars would be as wide as doors.
    let share = 1.0 / bars.len().max(6) as f64;
    for (i, bar) in bars.iter().enumerate() {
        let (left, right) = (x_of(share * (i as f64 + 0.12)), x_of(share * (i as f64 + 0.88)));
        let (top, bottom) = (y_of(y.place(bar.value)), y_of(y.place(0.0)));
        let _ = writeln!(
            svg,
            "<rect class=\"bar\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{}</title></rect>",
            right - left,
            (bottom - top).max(0.0),
            escape(&bar.text)
        );
        if i % every == 0 {
            bottom_label(&mut svg, (left + right) / 2.0, &bar.label);
        }
    }
    svg.push_str("</svg>\n</figure>\n");
    svg
}

/// Lying bars with name and value above each; empty without any.
pub fn rows(title: &str, bars: &[Bar]) -> String {
    const ROW: f64 = 38.0;
    let most = bars.iter().map(|bar| bar.value).filter(|v| v.is_finite()).fold(0.0, f64::max);
    if bars.is_empty() || most <= 0.0 {
        return String::new();
    }
    let mut svg = open(title, ROW * bars.len() as f64 + 4.0);
    for (i, bar) in bars.iter().enumerate() {
        let top = ROW * i as f64;
        let width = if bar.value.is_finite() { WIDTH * bar.value / most } else { 0.0 };
        let _ = writeln!(
            svg,
            "<text x=\"0\" y=\"{:.1}\">{}</text>\
             <text class=\"value\" x=\"{WIDTH}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect class=\"bar\" x=\"0\" y=\"{:.1}\" width=\"{width:.1}\" height=\"12\"/>",
            top + 14.0,
            escape(&shortened(&bar.label)),
            top + 14.0,
            escape(&bar.text),
            top + 20.0
        );
    }
    svg.push_str("</svg>\n</figure>\n");
    svg
}

/// The end of a long name, where names of models differ.
fn shortened(name: &str) -> String {
    const LONGEST: usize = 52;
    let length = name.chars().count();
    match length > LONGEST {
        true => format!("…{}", name.chars().skip(length - LONGEST + 1).collect::<String>()),
        false => name.to_owned(),
    }
}

/// One cell per count, the darker the more; framed where there is none.
pub fn strip(counts: &[u64], most: u64) -> String {
    const CELL: usize = 10;
    let width = CELL * counts.len();
    let zero = counts.iter().filter(|n| **n == 0).count();
    let mut svg = format!(
        "<svg viewBox=\"0 0 {width} 14\" width=\"{width}\" height=\"14\" role=\"img\" \
         aria-label=\"{} experts, {zero} without tokens\">",
        counts.len()
    );
    for (i, &count) in counts.iter().enumerate() {
        let (x, title) = (CELL * i, format!("<title>expert {i}: {count} tokens</title>"));
        let _ = match count {
            0 => write!(
                svg,
                "<rect class=\"none\" x=\"{}\" y=\"2\" width=\"7\" height=\"10\">{title}</rect>",
                x + 1
            ),
            _ => write!(
                svg,
                "<rect class=\"cell\" fill-opacity=\"{:.2}\" x=\"{x}\" y=\"1\" width=\"9\" height=\"12\">{title}</rect>",
                0.12 + 0.88 * count as f64 / most.max(1) as f64
            ),
        };
    }
    svg.push_str("</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_hold_their_values_and_have_round_ticks() {
        for (values, scale, ticks) in [
            (vec![0.0, 47.0], Scale::Linear, vec!["0", "10", "20", "30", "40", "50"]),
            (vec![3.0, 3.0], Scale::Linear, vec!["2.4", "2.6", "2.8", "3", "3.2", "3.4", "3.6"]),
            (vec![2.0, 6.0], Scale::Linear, vec!["2", "3", "4", "5", "6"]),
            (vec![0.002, 0.4], Scale::Logarithmic, vec!["0.001", "0.01", "0.1", "1"]),
            (vec![0.011, 0.09], Scale::Logarithmic, vec!["0.01", "0.032", "0.1"]),
        ] {
            let axis = Axis::new(values.iter().copied(), scale).unwrap();
            assert!(values.iter().all(|&v| (-1e-9..=1.0 + 1e-9).contains(&axis.place(v))));
            assert_eq!(axis.labels().map(|(_, label)| label).collect::<Vec<_>>(), ticks);
        }
        assert!(Axis::new([f64::NAN].into_iter(), Scale::Linear).is_none());
    }
}
