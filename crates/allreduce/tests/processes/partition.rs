//! Networks that come apart: each rank in a network namespace of its own, joined by a bridge. Needs
//! root and Linux; skipped, and said so, where that is not to be had.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::alone;
use crate::children::{Cluster, LONG, Rank, spec};
use crate::rank::{Act, Event, Spec, say, sum};
use crate::system::milliseconds;
use crate::timing::{Times, at_once, in_time};

/// Runs a command; what it said if it failed.
fn run(command: &str) -> Result<(), String> {
    let mut words = command.split_whitespace();
    let program = words.next().expect("a command");
    let output = Command::new(program).args(words).output().map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{command}: {}", said.trim())) }
}

/// Namespaces that go away with this value.
struct Network {
    name: String,
    hosts: usize,
}

impl Network {
    fn make(hosts: usize) -> Result<Network, String> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let network = Network { name: format!("fta{}n{number}", std::process::id()), hosts };
        let hub = network.hub();
        run(&format!("ip netns add {hub}"))?;
        run(&format!("ip -n {hub} link add bridge type bridge"))?;
        run(&format!("ip -n {hub} link set bridge up"))?;
        for host in 0..hosts {
            let name = network.host(host);
            run(&format!("ip netns add {name}"))?;
            run(&format!("ip -n {hub} link add port{host} type veth peer name net netns {name}"))?;
            run(&format!("ip -n {hub} link set port{host} master bridge up"))?;
            run(&format!("ip -n {name} addr add {}/24 dev net", Network::address(host)))?;
            run(&format!("ip -n {name} link set net up"))?;
            run(&format!("ip -n {name} link set lo up"))?;
        }
        Ok(network)
    }

    fn hub(&self) -> String {
        format!("{}hub", self.name)
    }

    fn host(&self, host: usize) -> String {
        format!("{}h{host}", self.name)
    }

    fn address(host: usize) -> String {
        format!("10.77.0.{}", host + 1)
    }

    /// Starts all ranks and waits until they have joined.
    fn cluster(&self, timeout: Duration, acts: &[Act]) -> Cluster {
        let rendezvous = format!("{}:29500", Network::address(0));
        let start = |rank| {
            let script = [&[say("here")], acts].concat();
            let spec = Spec { timeout, ..spec(rank, self.hosts, &rendezvous, script) };
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &self.host(rank)]).arg(std::env::current_exe().expect("a path"));
            Rank::start_with(command, &spec)
        };
        let ranks = (0..self.hosts).map(start).collect();
        let cluster = Cluster { ranks, rendezvous };
        cluster.said("here");
        std::thread::sleep(Duration::from_millis(150));
        cluster
    }

    /// Does something to the bridge's port of a host.
    fn port(&self, host: usize, what: &str) {
        let hub = self.hub();
        run(&format!("ip -n {hub} link set port{host} {what}")).expect("the port of a host changes");
    }

    /// Hosts that are apart do not hear each other; all others hear all.
    fn apart(&self, hosts: [usize; 2], apart: bool) {
        for host in hosts {
            self.port(host, &format!("type bridge_slave isolated {}", if apart { "on" } else { "off" }));
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            let _ = run(&format!("ip netns del {}", self.host(host)));
        }
        let _ = run(&format!("ip netns del {}", self.hub()));
    }
}

/// None where this machine does not allow it.
fn network(hosts: usize) -> Option<Network> {
    Network::make(hosts).map_err(|why| println!("SKIPPED: no network namespaces here: {why}")).ok()
}

fn occupations() -> [(&'static str, Vec<Act>); 2] {
    [("idle", vec![Act::Idle]), ("stream", vec![Act::Forever(vec![sum(1 << 18)])])]
}

#[test]
fn a_rank_that_is_cut_off_is_named_and_knows_it() {
    let _alone = alone();
    let cases: Vec<_> =
        [2, 3].into_iter().flat_map(|hosts| occupations().map(|(name, acts)| (hosts, name, acts))).collect();
    let times = at_once(4, &cases, |(hosts, occupation, acts)| {
        let hosts = *hosts;
        let network = network(hosts)?;
        let cut_off =
            |victim| cut_off(&network, &format!("{occupation}, rank {victim} of {hosts} cut off"), acts, victim);
        Some((0..hosts).flat_map(cut_off).collect::<Times>())
    });
    let times: Times = times.into_iter().flatten().flatten().collect();
    println!("cut off, timeout 2 s, the one cut off and all others: {times}");
}

fn cut_off(network: &Network, what: &str, acts: &[Act], victim: usize) -> Times {
    in_time(what, 2500.0, || {
        let cluster = network.cluster(Duration::from_secs(2), acts);
        let at = milliseconds();
        network.port(victim, "down");
        let failed: Vec<_> = cluster.without(victim).map(Rank::error).collect();
        let own = cluster.ranks[victim].error();
        network.port(victim, "up");
        for error in &failed {
            assert_eq!(error.lost, [victim], "{what}: {}", error.text);
            assert!(error.root_cause.contains("it fell silent"), "{what}: {}", error.text);
            assert_eq!(error.root_cause, failed[0].root_cause, "{what}: survivors differ");
        }
        if network.hosts == 2 {
            // Of two, each can only say that the other one is gone.
            assert_eq!(own.lost, [1 - victim], "{what}: {}", own.text);
        } else {
            let expected = format!("rank {victim} (");
            assert!(own.root_cause.starts_with(&expected), "{what}: {}", own.text);
            assert!(own.root_cause.ends_with("hears no other rank: its network is gone"), "{what}: {}", own.text);
        }
        failed.iter().chain([&own]).map(|error| error.at - at).collect()
    })
}

#[test]
fn two_ranks_that_do_not_hear_each_other_are_both_named() {
    let _alone = alone();
    let pairs = [[0, 1], [1, 3], [2, 3]];
    let cases: Vec<_> =
        pairs.into_iter().flat_map(|pair| occupations().map(|(name, acts)| (pair, name, acts))).collect();
    let times = at_once(3, &cases, |(pair, occupation, acts)| {
        let network = network(4)?;
        let what = format!("{occupation}, ranks {pair:?} apart");
        Some(in_time(&what, 2500.0, || {
            let cluster = network.cluster(Duration::from_secs(2), acts);
            let at = milliseconds();
            network.apart(*pair, true);
            let failed: Vec<_> = cluster.ranks.iter().map(Rank::error).collect();
            network.apart(*pair, false);
            for error in &failed {
                let (cause, text) = (&error.root_cause, &error.text);
                assert!(cause.contains("do not hear each other, though both are alive"), "{what}: {text}");
                assert!(pair.iter().all(|rank| cause.contains(&format!("rank {rank} ("))), "{what}: {text}");
                assert_eq!(*cause, failed[0].root_cause, "{what}: ranks differ");
            }
            failed.iter().map(|error| error.at - at).collect()
        }))
    });
    let times: Times = times.into_iter().flatten().flatten().collect();
    println!("two of four apart, timeout 2 s: {times}");
}

#[test]
fn a_cable_that_is_out_for_a_second_harms_nobody() {
    let _alone = alone();
    let acts = [vec![Act::Sleep { milliseconds: 3 }], vec![sum(100_000)]];
    let cases: Vec<_> = acts.into_iter().flat_map(|acts| [(0, acts.clone()), (2, acts)]).collect();
    at_once(4, &cases, |(victim, acts)| {
        let network = network(3)?;
        let mut cluster = network.cluster(Duration::from_secs(5), &[Act::UntilTold(acts.clone())]);
        network.port(*victim, "down");
        std::thread::sleep(Duration::from_secs(1));
        network.port(*victim, "up");
        std::thread::sleep(Duration::from_secs(2));
        cluster.ranks[1].tell();
        for rank in &mut cluster.ranks {
            rank.wait("that it is done", LONG, |event| match event {
                Event::Error { text, .. } => panic!("a second without rank {victim}'s cable: {text}"),
                Event::Done { .. } => Some(()),
                _ => None,
            });
            assert_eq!(rank.exit_code(), Some(0));
        }
        Some(())
    });
}
