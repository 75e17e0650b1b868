//! Pictures of a discovery: for Graphviz, as SVG, and as text for a terminal.

use std::fmt::Write;

use crate::discover::Discovery;
use crate::facts::System;

mod svg;
mod text;

#[cfg(test)]
mod tests;

pub use svg::svg;
pub(crate) use text::columns;
pub use text::text;

/// The graph in Graphviz's language: a box per host, a line per cable with its interfaces
/// ("en3/en5", as `mlx.distributed_config --dot` labels them). Missing cables of the nearest form
/// are dashed.
pub fn dot(discovery: &Discovery) -> String {
    let mut graph = String::from("graph cluster {\n  node [shape=rectangle];\n");
    for host in 0..discovery.hosts.len() {
        let _ = writeln!(graph, "  h{host} [label={}];", dot_text(&title(discovery, host).join("\n")));
    }
    for cable in &discovery.cabling.cables {
        let [a, b] = cable.ends.map(|end| end.host);
        let _ = writeln!(graph, "  h{a} -- h{b} [label={}];", dot_text(&label(cable)));
    }
    for (i, j) in missing(discovery) {
        let _ = writeln!(graph, "  h{i} -- h{j} [style=dashed, color=red, label=\"missing\"];");
    }
    graph.push_str("}\n");
    graph
}

/// Lines for the box of a host: its name, then what it is.
fn title(discovery: &Discovery, host: usize) -> Vec<String> {
    let facts = &discovery.hosts[host];
    let mut lines = vec![facts.host.clone()];
    let what = facts.chip.clone().or_else(|| facts.model.clone());
    lines.extend(what.or_else(|| (facts.system == System::Linux).then(|| format!("Linux, {}", facts.architecture))));
    lines
}

/// "en3/en5, 80 Gb/s".
fn label(cable: &crate::cabling::Cable) -> String {
    let end = |side: usize| cable.interfaces[side].as_deref().unwrap_or("?");
    let speed = cable.gigabits.map_or(String::new(), |gigabits| format!(", {gigabits} Gb/s"));
    format!("{}/{}{speed}", end(0), end(1))
}

/// The missing cables that a picture shows: for a mesh where the ports allow one and it is near,
/// else for a ring.
fn missing(discovery: &Discovery) -> Vec<(usize, usize)> {
    let (mesh, ring) = (&discovery.shape.missing_for_mesh, &discovery.shape.ring.missing);
    if !discovery.is_cabled() {
        return Vec::new();
    }
    match ring.is_empty() {
        // A ring works; what a mesh lacks is shown if it is a cable or two.
        true if mesh.len() <= 2 => mesh.clone(),
        true => Vec::new(),
        false => ring.clone(),
    }
}

fn dot_text(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}
