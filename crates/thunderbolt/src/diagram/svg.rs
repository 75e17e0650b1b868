//! A drawing that any browser shows: hosts on a circle in rank order, cables as lines between them.

use std::f64::consts::TAU;
use std::fmt::Write;

use super::{label, missing, title};
use crate::discover::Discovery;

/// Pixels.
const BOX: (f64, f64) = (150.0, 46.0);
const MARGIN: f64 = 30.0;
/// Between several cables of one pair.
const GAP: f64 = 16.0;

/// A page of its own (`<svg …>`), light and dark. Names of hosts are escaped.
pub fn svg(discovery: &Discovery) -> String {
    let hosts = discovery.hosts.len();
    // Neighbours on the circle keep a box's width between them.
    let radius = match hosts {
        0 | 1 => 0.0,
        2 => 190.0,
        _ => (hosts as f64 * (BOX.0 + 60.0) / TAU).max(190.0),
    };
    let (width, height) = (2.0 * (radius + BOX.0 / 2.0 + MARGIN), 2.0 * (radius + BOX.1 / 2.0 + MARGIN));
    // The order of the ring, so that its cables do not cross.
    let place = |host: usize| {
        let step = discovery.shape.ring.order.iter().position(|&other| other == host).unwrap_or(host);
        let angle = TAU * (step as f64 / hosts.max(1) as f64 - 0.25);
        // Two hosts stand side by side.
        let angle = if hosts == 2 { angle - TAU / 4.0 } else { angle };
        (width / 2.0 + radius * angle.cos(), height / 2.0 + radius * angle.sin())
    };
    let mut drawing = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" height=\"{height:.0}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"13\" text-anchor=\"middle\">\n<style>\n\
         svg {{ --ground: #fff; background: var(--ground); color: #222 }}\n\
         @media (prefers-color-scheme: dark) {{ svg {{ --ground: #1b1b1f; color: #ddd }} }}\n\
         text {{ fill: currentColor; stroke: var(--ground); stroke-width: 4; paint-order: stroke }}\n\
         .cable {{ stroke: currentColor; stroke-width: 2 }} .ground {{ fill: var(--ground) }}\n\
         .missing {{ stroke: #d33; stroke-width: 2; stroke-dasharray: 6 5 }} .small {{ font-size: 11px }}\n\
         .host {{ fill: #8882; stroke: currentColor }}\n</style>\n"
    );
    let cables = &discovery.cabling.cables;
    for (index, cable) in cables.iter().enumerate() {
        let hosts = cable.ends.map(|end| end.host);
        let same_pair = |other: &&crate::cabling::Cable| other.ends.map(|end| end.host) == hosts;
        let (before, all) = (cables[..index].iter().filter(same_pair).count(), cables.iter().filter(same_pair).count());
        let offset = (before as f64 - (all as f64 - 1.0) / 2.0) * GAP;
        line(&mut drawing, "cable", place(hosts[0]), place(hosts[1]), offset, &label(cable));
    }
    for (i, j) in missing(discovery) {
        line(&mut drawing, "missing", place(i), place(j), 0.0, "missing");
    }
    for host in 0..hosts {
        let (x, y) = place(host);
        let (left, top) = (x - BOX.0 / 2.0, y - BOX.1 / 2.0);
        let _ = writeln!(
            drawing,
            "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{}\" height=\"{}\" rx=\"8\" class=\"ground\"/>\
             <rect class=\"host\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{}\" height=\"{}\" rx=\"8\"/>",
            BOX.0, BOX.1, BOX.0, BOX.1
        );
        let lines = title(discovery, host);
        let name: String = lines[0].chars().take(20).collect();
        let first = if lines.len() > 1 { y - 3.0 } else { y + 4.0 };
        let _ = writeln!(drawing, "<text x=\"{x:.1}\" y=\"{first:.1}\">{}</text>", escaped(&name));
        if let Some(what) = lines.get(1) {
            let _ =
                writeln!(drawing, "<text class=\"small\" x=\"{x:.1}\" y=\"{:.1}\">{}</text>", y + 14.0, escaped(what));
        }
    }
    drawing.push_str("</svg>\n");
    drawing
}

/// A line with its label in the middle, moved sideways by `offset` pixels.
fn line(drawing: &mut String, class: &str, from: (f64, f64), to: (f64, f64), offset: f64, label: &str) {
    let (across, down) = (to.0 - from.0, to.1 - from.1);
    let length = across.hypot(down).max(1.0);
    let (aside_x, aside_y) = (-down / length * offset, across / length * offset);
    let (x1, y1, x2, y2) = (from.0 + aside_x, from.1 + aside_y, to.0 + aside_x, to.1 + aside_y);
    let _ = writeln!(drawing, "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>");
    // At two fifths of the way: in the middle the diagonals of a mesh cross.
    let (x, y) = (x1 + (x2 - x1) * 0.4, y1 + (y2 - y1) * 0.4 - 4.0);
    let _ = writeln!(drawing, "<text class=\"small\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>", escaped(label));
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
