//! Whether hosts reach each other: a second question, which needs the addresses that the first one
//! found.
//!
//! Every host sends a packet to every other one, at the address of the hostfile and over each
//! cable. A firewall may drop what `ping` sends and let TCP through, so silence over the common
//! network is a warning.

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use finetune_launch::Transcript;
use finetune_launch::gather::{GatherError, ask};
use finetune_launch::shell::quoted;

use super::{Check, Verdict};
use crate::discover::{Discovery, meeting_point};
use crate::facts::network;

/// Above this the hosts would be busy with greetings; the first ones stand for all.
const MAX_ADDRESSES: usize = 64;

/// What a host is asked to reach.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    /// Index of the host that it belongs to.
    peer: usize,
    address: Ipv4Addr,
    /// The interface of the cable; none for the common network.
    cable: Option<String>,
}

/// Asks all hosts at the same time to reach all others.
pub fn reach(discovery: &Discovery, deadline: Duration) -> Vec<Check> {
    let targets: Vec<Vec<Target>> = (0..discovery.hosts.len()).map(|host| targets(discovery, host)).collect();
    let answers: Vec<Result<Transcript, GatherError>> = thread::scope(|scope| {
        let asked: Vec<_> = targets
            .iter()
            .enumerate()
            .map(|(host, targets)| {
                let script = move |mark: &str| script(mark, targets);
                scope.spawn(move || ask(discovery.name(host), &script, deadline).map(|(transcript, _)| transcript))
            })
            .collect();
        asked.into_iter().map(|asked| asked.join().expect("asking does not panic")).collect()
    });
    let each = targets.iter().zip(&answers).enumerate();
    each.flat_map(|(host, (targets, answer))| checks(discovery, host, targets, answer)).collect()
}

fn targets(discovery: &Discovery, host: usize) -> Vec<Target> {
    let mut targets = Vec::new();
    let meeting = meeting_point(&discovery.hosts).of_hosts;
    for (peer, address) in meeting.iter().enumerate().filter(|(peer, _)| *peer != host) {
        if let Some(Ok(address)) = address.as_ref().map(|address| address.parse()) {
            targets.push(Target { peer, address, cable: None });
        }
    }
    for cable in discovery.cabling.cables.iter().filter(|cable| cable.ends.iter().any(|end| end.host == host)) {
        let side = cable.side(host);
        let peer = cable.ends[1 - side].host;
        let interface =
            |side: usize| discovery.hosts[cable.ends[side].host].interface(cable.interfaces[side].as_deref()?);
        let (Some(own), Some(far)) = (interface(side), interface(1 - side)) else { continue };
        let together = |(address, _): &&(Ipv4Addr, u8)| {
            let same =
                |&(own, prefix): &(Ipv4Addr, u8)| own != *address && network(own, prefix) == network(*address, prefix);
            own.addresses.iter().any(same)
        };
        // What the Macs gave themselves is in one network everywhere: no packet would tell which
        // cable it took.
        if let Some(&(address, _)) = far.addresses.iter().filter(|(address, _)| !address.is_link_local()).find(together)
        {
            targets.push(Target { peer, address, cable: Some(own.name.clone()) });
        }
    }
    targets.truncate(MAX_ADDRESSES);
    targets
}

/// Two packets each, because the first may be lost while addresses are looked up; all at once, at
/// most three seconds.
fn script(mark: &str, targets: &[Target]) -> String {
    let addresses: Vec<String> = targets.iter().map(|target| target.address.to_string()).collect();
    format!(
        "mark={}\n{}",
        quoted(mark),
        "reach() {\n    PATH=\"$PATH:/usr/bin:/bin:/usr/sbin:/sbin\"\n    case \"$(uname -s)\" in Darwin) limit=-t ;; *) limit=-w ;; esac\n    \
         printf '%s begin reach\\n' \"$mark\"\n    for address in ADDRESSES; do\n        \
         { ping -c 2 $limit 3 \"$address\" </dev/null >/dev/null 2>&1; printf '%s %s\\n' \"$address\" \"$?\"; } &\n    done\n    wait\n    \
         printf '\\n%s end reach 0\\n%s done\\n' \"$mark\" \"$mark\"\n}\nreach\n"
            .replace("ADDRESSES", &addresses.join(" "))
    )
}

fn checks(
    discovery: &Discovery,
    host: usize,
    targets: &[Target],
    answer: &Result<Transcript, GatherError>,
) -> Vec<Check> {
    let section = answer.as_ref().ok().and_then(|transcript| transcript.section("reach"));
    let status = |address: Ipv4Addr| -> Option<i32> {
        let line = section?
            .text
            .lines()
            .find_map(|line| line.split_once(' ').filter(|(own, _)| own.parse() == Ok(address)))?;
        line.1.trim().parse().ok()
    };
    let check = |target: &Target| {
        let subject = format!("{} → {}", discovery.name(host), discovery.name(target.peer));
        let over = target.cable.as_ref().map_or(String::new(), |cable| format!(" over {cable}"));
        let (found, verdict, next) = match (status(target.address), answer, &target.cable) {
            (Some(0), _, _) => (format!("{} answers{over}", target.address), Verdict::Ok, None),
            (Some(126 | 127), _, _) => ("there is no ping".to_owned(), Verdict::CannotTell, None),
            (Some(_), _, Some(_)) => {
                let next =
                    "is the address on the same cable at both ends? `finetune cluster setup`, then `ifconfig` of both";
                (format!("{} does not answer{over}", target.address), Verdict::Warn, Some(next))
            }
            (Some(_), _, None) => {
                let next = "a firewall, Wi-Fi that keeps its guests apart, or a network that is not common after all";
                (format!("{} does not answer", target.address), Verdict::Warn, Some(next))
            }
            (None, Err(error), _) => (error.to_string(), Verdict::CannotTell, None),
            (None, Ok(_), _) => ("the host did not tell".to_owned(), Verdict::CannotTell, None),
        };
        Check { subject, name: "reach", found, verdict, next: next.map(str::to_owned) }
    };
    targets.iter().map(check).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example_cluster::ExampleCluster;

    fn set_up() -> Discovery {
        let mut cluster = ExampleCluster::new(3, &[[(0, 0), (1, 0)], [(1, 1), (2, 0)]]);
        let plan = crate::setup::plan(&cluster.discovery()).unwrap();
        crate::setup::apply(&plan, &mut |host, command| Ok(cluster.run(host, command))).unwrap();
        cluster.discovery()
    }

    #[test]
    fn everybody_and_every_cable() {
        let discovery = set_up();
        let shown = |host| {
            let targets = targets(&discovery, host);
            targets.iter().map(|target| format!("{} {:?}", target.address, target.cable.as_deref())).collect::<Vec<_>>()
        };
        assert_eq!(shown(0), ["192.168.1.12 None", "192.168.1.13 None", "192.168.200.2 Some(\"en2\")"]);
        assert_eq!(shown(1).len(), 4);
    }

    #[test]
    fn answers() {
        let discovery = set_up();
        let targets = targets(&discovery, 0);
        let answer = Ok(Transcript::of(&[("reach", "192.168.1.13 1\n192.168.1.12 0\n192.168.200.2 2\n")]));
        let found = |answer| {
            let checks = checks(&discovery, 0, &targets, answer);
            checks
                .iter()
                .map(|check| format!("{:?} {}: {}", check.verdict, check.subject, check.found))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            found(&answer),
            [
                "Ok mini-1 → mini-2: 192.168.1.12 answers",
                "Warn mini-1 → mini-3: 192.168.1.13 does not answer",
                "Warn mini-1 → mini-2: 192.168.200.2 does not answer over en2",
            ]
        );
        let nothing = Ok(Transcript::default());
        assert!(found(&nothing)[0].ends_with("the host did not tell"));
        let error = Err(GatherError::TooMany { hosts: 999 });
        assert!(found(&error).iter().all(|line| line.starts_with("CannotTell")));
    }

    /// The script runs in the shell at hand; whether there is a ping, and who answers, is the
    /// machine's business.
    #[test]
    fn the_script_answers() {
        let local = Target { peer: 0, address: Ipv4Addr::LOCALHOST, cable: None };
        let asked = ask("localhost", &|mark| script(mark, std::slice::from_ref(&local)), Duration::from_secs(20));
        let (transcript, _) = asked.unwrap();
        assert!(
            transcript.complete && transcript.section("reach").unwrap().text.starts_with("127.0.0.1 "),
            "{transcript:?}"
        );
    }
}
