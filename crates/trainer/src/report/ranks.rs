//! The part of the page about the ranks of a run.

use std::fmt::Write;

use super::chart::{Chart, Line};
use super::page::escape;
use crate::metrics::StepRow;

/// Colors of the style sheet. More lines than these could not be told apart.
pub(super) const CLASSES: [&str; 8] = ["r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7"];

/// Writes the chart of how long each rank took for its rows; nothing for one rank.
pub(super) fn seconds(page: &mut String, steps: &[&StepRow]) {
    let Some(last) = steps.last().filter(|row| row.ranks.len() > 1) else { return };
    let names: Vec<String> = (0..last.ranks.len()).map(|rank| format!("rank {rank}")).collect();
    let lines = names.iter().zip(CLASSES).enumerate().map(|(rank, (name, class))| {
        let point = |row: &&&StepRow| Some((row.step as f64, row.ranks.get(rank)?.seconds));
        Line::new(name, class, steps.iter().filter_map(|row| point(&row)).collect())
    });
    let (title, lines) = ("Seconds for the rows of a step", lines.collect());
    Chart { title, may_be_logarithmic: false, most_points: 400, lines }.write(page);
}

/// Writes the table of how long each rank waited for the others, and what it sent; nothing for one
/// rank.
pub(super) fn table(page: &mut String, steps: &[&StepRow], hosts: &[String]) {
    let Some(last) = steps.last().filter(|row| row.ranks.len() > 1) else { return };
    page.push_str("<h2>Ranks</h2><div class=\"wide\"><table><tr><th>rank</th><th>host</th><th>median seconds for its rows</th><th>waited most for</th><th>seconds</th><th>MiB sent</th><th>MiB received</th></tr>");
    for row in &last.ranks {
        let mut seconds: Vec<f64> = steps.iter().filter_map(|step| Some(step.ranks.get(row.rank)?.seconds)).collect();
        seconds.sort_by(f64::total_cmp);
        let median = seconds.get(seconds.len() / 2).copied().unwrap_or_default();
        let most = row.waited_for.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
        let (peer, most) = most.unwrap_or_default();
        let host = hosts.get(row.rank).map_or("", String::as_str);
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let _ = write!(
            page,
            "<tr><td>{}</td><td>{}</td><td>{median:.4}</td><td>rank {peer}</td><td>{most:.1}</td><td>{:.1}</td><td>{:.1}</td></tr>",
            row.rank,
            escape(host),
            mib(row.sent),
            mib(row.received)
        );
    }
    page.push_str("</table></div>");
}
