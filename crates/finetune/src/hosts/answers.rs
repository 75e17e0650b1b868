//! The hosts' answers before a launch, and whether the launch can work.

use finetune_launch::complaint::{Trouble, shown};
use finetune_launch::{Unanswered, reach};
use finetune_rendezvous::is_loopback;

use super::{Hosts, Machine, is_same, unreachable_at};
use crate::commands::preflight::Report;
use crate::failure::Failure;
use crate::progress::Verbosity;

impl Hosts {
    /// Keeps the answers, or returns what keeps hosts from taking part. `needs`: what they all need.
    pub(super) fn judge(
        &mut self,
        answers: Vec<Result<reach::Answer, Unanswered>>,
        ours: &Report,
        needs: &str,
        verbosity: Verbosity,
    ) -> Result<(), Failure> {
        let (mut problems, mut hints, mut absent, mut unready) = (Vec::new(), Vec::new(), true, false);
        let mut answers = answers.into_iter();
        for machine in &mut self.machines {
            let Some(remote) = &machine.remote else {
                machine.report = ours.clone();
                continue;
            };
            let host = &remote.host;
            match answers.next() {
                None => {}
                Some(Ok(answer)) => match Report::parse(&answer) {
                    Ok(report) => {
                        let found = report.problems(ours);
                        (absent, unready) = (absent && found.is_empty(), unready || !found.is_empty());
                        problems.extend(found.iter().map(|problem| format!("{host}: {}", shown(problem))));
                        for warning in report.warnings().iter().filter(|_| verbosity > Verbosity::Quiet) {
                            crate::stderr::complain!("{host}: {warning}");
                        }
                        machine.report = report;
                    }
                    Err(why) => {
                        (absent, unready) = (false, true);
                        problems.push(format!("{host}: {why}"));
                    }
                },
                Some(Err(error)) => {
                    absent &= error.trouble() == Trouble::Absent;
                    problems.push(format!("{host}: {error}"));
                    match error.hint(host) {
                        Some(hint) => hints.push(hint),
                        None => unready = true,
                    }
                }
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        if unready {
            hints.push(needs.to_owned());
            hints.push("--program and --directory say where they lie on the hosts, if elsewhere than here".into());
        }
        hints.dedup();
        let message = format!("not every host is ready:\n  {}", problems.join("\n  "));
        Err(if absent { Failure::lost(message, hints) } else { Failure::bad_input(message, hints) })
    }

    /// Makes sure that every host finds rank 0 at the first host, and not at itself.
    pub(super) fn find_rank_0(&mut self, name: &str) -> Result<(), Failure> {
        let Some((first, others)) = self.machines.split_first() else { return Ok(()) };
        let elsewhere: Vec<&Machine> = others.iter().filter(|machine| !is_same(machine, first)).collect();
        let leads_back = |machine: &Machine| {
            !machine.report.resolved.is_empty() && machine.report.resolved.iter().all(|address| is_loopback(address))
        };
        // An address with a zone means something else on every host.
        if elsewhere.is_empty() || name.contains('%') {
            return Ok(());
        }
        if is_loopback(name) {
            return Err(unreachable_at(name));
        }
        let mut problems = Vec::new();
        for machine in elsewhere.iter().filter(|machine| machine.report.resolved.is_empty()) {
            problems.push(format!("{}: there is no address for the name {name}", machine.name));
        }
        for machine in elsewhere.iter().filter(|machine| leads_back(machine)) {
            let address = machine.report.resolved.join(" ");
            problems.push(format!("{}: {name} is {address} there, which is that host itself", machine.name));
        }
        // Debian gives a host's own name the address 127.0.1.1. The other hosts know a better
        // address.
        let known = |address: &&String| {
            !is_loopback(address) && elsewhere.iter().all(|machine| machine.report.resolved.contains(address))
        };
        if problems.is_empty() && leads_back(first) {
            let better = elsewhere[0].report.resolved.iter().find(known).cloned();
            if better.is_none() {
                let own = first.report.resolved.join(" ");
                problems.push(format!("{}: {name} is {own} there, where the others do not reach it", first.name));
            }
            self.address = better;
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Failure::arguments(
            format!("the hosts would not find rank 0:\n  {}", problems.join("\n  ")),
            "give the first host of the hostfile the address at which the others reach it: {\"ssh\": …, \"ips\": [\"10.0.0.1\"]}",
        ))
    }
}
