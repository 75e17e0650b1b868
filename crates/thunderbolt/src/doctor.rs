//! Everything that is known to go wrong between machines, looked for before a run does: each check
//! is a pure function of the gathered facts, and says what was found, what that means, and what to
//! do.
//!
//! The list is made of what users of Apple's RDMA reported (docs/rdma.md), and of what our own
//! ranks need of each other.

use serde::Serialize;

use crate::diagram::columns;
use crate::discover::Discovery;
use crate::facts::System;

mod cables;
mod cluster;
mod linux;
mod mac;
mod machine;
mod reach;

#[cfg(test)]
mod tests;

pub use reach::reach;

/// How good a finding is, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Nothing is to be done.
    Ok,
    /// The fact is missing; the reason is in what was found.
    CannotTell,
    /// It works, but slower, or not for long.
    Warn,
    /// A run will fail.
    Fail,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// A host, two hosts with a cable ("mini-1 – mini-2"), or "all".
    pub subject: String,
    /// What was looked at: the same words for the same check, always.
    pub name: &'static str,
    /// What was found.
    pub found: String,
    /// How good that is.
    pub verdict: Verdict,
    /// What to do next; `None` if nothing is to be done.
    pub next: Option<String>,
}

/// What a run will need.
#[derive(Debug, Clone)]
pub struct Expected {
    /// The version that all hosts should have: what `finetune --version` prints here.
    pub version: String,
    /// TCP ports that must be free.
    pub ports: Vec<u16>,
    /// Free disk space for checkpoints.
    pub disk_bytes: u64,
    /// Whether a run without RDMA counts as failed. If not, what stands in the way of RDMA is a
    /// warning.
    pub rdma: bool,
}

impl Default for Expected {
    /// 10 GiB of disk space, no ports, RDMA where it is to be had.
    fn default() -> Self {
        let version = format!("finetune {}", env!("CARGO_PKG_VERSION"));
        Self { version, ports: Vec::new(), disk_bytes: 10 << 30, rdma: false }
    }
}

/// All checks: of the cluster, then of each host, then of each cable.
pub fn examine(discovery: &Discovery, expected: &Expected) -> Vec<Check> {
    let mut findings = Findings { checks: Vec::new(), expected };
    cluster::examine(discovery, &mut findings);
    for host in 0..discovery.hosts.len() {
        machine::examine(&discovery.hosts[host], &mut findings);
        match discovery.hosts[host].system {
            System::Mac => mac::examine(discovery, host, &mut findings),
            System::Linux => linux::examine(&discovery.hosts[host], &mut findings),
            System::Other(_) => {}
        }
    }
    for cable in &discovery.cabling.cables {
        cables::examine(discovery, cable, &mut findings);
    }
    findings.checks
}

/// The worst verdict: `Fail` means that a run would not work. `Ok` if there are no checks.
pub fn worst(checks: &[Check]) -> Verdict {
    checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Ok)
}

/// The checks as a table; with `all` false those that are in order are only counted.
pub fn text(checks: &[Check], all: bool) -> String {
    let word = |verdict| match verdict {
        Verdict::Ok => "ok",
        Verdict::CannotTell => "?",
        Verdict::Warn => "warn",
        Verdict::Fail => "FAIL",
    };
    let shown = checks.iter().filter(|check| all || check.verdict != Verdict::Ok);
    let row = |check: &Check| {
        vec![word(check.verdict).to_owned(), check.subject.clone(), check.name.to_owned(), check.found.clone()]
    };
    let (shown, rows): (Vec<&Check>, Vec<Vec<String>>) = shown.map(|check| (check, row(check))).unzip();
    let mut text = String::new();
    for (line, check) in columns(&rows).lines().zip(shown) {
        text.push_str(line);
        text.push('\n');
        if let Some(next) = &check.next {
            text.push_str(&format!("      → {next}\n"));
        }
    }
    let count = |verdict| checks.iter().filter(|check| check.verdict == verdict).count();
    let (failed, warned) = (count(Verdict::Fail), count(Verdict::Warn));
    let (unknown, fine) = (count(Verdict::CannotTell), count(Verdict::Ok));
    text.push_str(&format!("{fine} ok, {warned} warnings, {failed} failed, {unknown} could not be told\n"));
    text
}

/// Collects checks.
struct Findings<'a> {
    checks: Vec<Check>,
    expected: &'a Expected,
}

impl Findings<'_> {
    fn add(&mut self, subject: &str, name: &'static str, verdict: Verdict, found: impl Into<String>, next: &str) {
        let next = (!next.is_empty()).then(|| next.to_owned());
        self.checks.push(Check { subject: subject.to_owned(), name, found: found.into(), verdict, next });
    }

    fn ok(&mut self, subject: &str, name: &'static str, found: impl Into<String>) {
        self.add(subject, name, Verdict::Ok, found, "");
    }

    fn warn(&mut self, subject: &str, name: &'static str, found: impl Into<String>, next: &str) {
        self.add(subject, name, Verdict::Warn, found, next);
    }

    fn fail(&mut self, subject: &str, name: &'static str, found: impl Into<String>, next: &str) {
        self.add(subject, name, Verdict::Fail, found, next);
    }

    /// What keeps RDMA from working: ranks then talk over TCP, unless RDMA is asked for.
    fn no_rdma(&mut self, subject: &str, name: &'static str, found: impl Into<String>, next: &str) {
        let verdict = if self.expected.rdma { Verdict::Fail } else { Verdict::Warn };
        self.add(subject, name, verdict, found, next);
    }

    fn cannot_tell(&mut self, subject: &str, name: &'static str, why: &str) {
        self.add(subject, name, Verdict::CannotTell, why, "");
    }
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}
