//! Damaged outputs: every reader ends, quickly, without a panic, whatever a host prints.
//!
//! The seed of a failing case is printed; `FINETUNE_FUZZ_SEED=seed` runs it alone,
//! `FINETUNE_FUZZ_CASES=n` runs more.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use finetune_launch::gather::GatherError;

use super::*;
use crate::discover::Discovery;
use crate::example_cluster::{ExampleCluster, data};

/// Far more than any takes; a machine under load must not fail the test.
const LONGEST: Duration = Duration::from_secs(20);

/// A small generator (splitmix64): what matters is that a seed gives the same case everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// The answers that are damaged: whole transcripts of two Macs and a Linux box.
fn answers() -> Vec<Vec<u8>> {
    let framed = |sections: &[(&str, &str)]| {
        let mut answer = String::new();
        for (name, text) in sections {
            answer.push_str(&format!("\nm begin {name}\n{text}\nm end {name} 0\n"));
        }
        answer.push_str("\nm done\n");
        answer.into_bytes()
    };
    let real = [
        ("system", "Darwin 25.5.0 arm64\n"),
        ("ports", data!("studio-m3-ultra.ports.txt")),
        ("interfaces", data!("apple-tn3205.ifconfig.txt")),
        ("devices", data!("apple-tn3205.ibv_devices.txt")),
        ("device_details", data!("apple-tn3205.ibv_devinfo.txt")),
        ("power", data!("pmset.txt")),
        ("thunderbolt", data!("dock-studio.thunderbolt.json")),
    ];
    let mini = ExampleCluster::mesh_of_four().sections(1);
    let mini: Vec<(&str, &str)> = mini.iter().map(|(name, text)| (*name, text.as_str())).collect();
    vec![framed(&real), framed(&mini), framed(super::tests::LINUX)]
}

fn damage(answer: &mut Vec<u8>, random: &mut Random) {
    const PIECES: &[&str] = &[
        "\n",
        "\nm begin thunderbolt\n",
        "\nm end thunderbolt 0\n",
        "99999999999999999999",
        "-1",
        "\"",
        "{",
        "}",
        "[[[[",
        ":",
        "\u{0}",
        "\u{fffd}",
        "::ffff:1.2.3.4",
        "0xffffffff",
        "/33",
        "\"_items\" : [ {",
        "\"domain_uuid_key\" : \"\"",
        "Thunderbolt 4294967296",
        " ",
        "en5\u{1b}[2J",
    ];
    let at = random.below(answer.len());
    match random.below(9) {
        0 => answer[at] ^= 1 << random.below(8),
        1 => answer.truncate(at),
        2 => answer[at] = random.next() as u8,
        3 => {
            // A line, or a key with its value, twice.
            let end = (at + random.below(200)).min(answer.len());
            let piece = answer[at..end].to_vec();
            answer.splice(at..at, piece);
        }
        4 => {
            let end = (at + random.below(100)).min(answer.len());
            answer.drain(at..end);
        }
        5 => {
            let piece = PIECES[random.below(PIECES.len())];
            answer.splice(at..at, piece.bytes());
        }
        6 => {
            // Deep nesting, in the middle of the report.
            let depth = 1 + random.below(20_000);
            answer.splice(at..at, b"[".repeat(depth));
        }
        7 => {
            let item = br#""_items" : [ { "_name" : "dock", "#;
            answer.splice(at..at, item.repeat(1 + random.below(300)));
        }
        _ => {
            let count = 1 + random.below(3000);
            answer.splice(
                at..at,
                b"\nhca_id:\trdma_en9\n\tstate: PORT_ACTIVE (4)\nen9: flags=1<UP> mtu 1\n".repeat(count),
            );
        }
    }
}

/// Everything that is done with facts, so that what a reader lets through is tried too.
fn use_all(hosts: Vec<Facts>) {
    let discovery = Discovery::new(hosts.into_iter().map(Ok::<_, GatherError>).collect());
    let _ = (
        discovery.sentences(),
        crate::diagram::dot(&discovery),
        crate::diagram::svg(&discovery),
        crate::diagram::text(&discovery),
    );
    let checks = crate::doctor::examine(&discovery, &crate::doctor::Expected::default());
    let _ = crate::doctor::text(&checks, true);
    let _ = crate::setup::plan(&discovery).map(|plan| crate::setup::text(&plan));
    if let Some(proposal) = discovery.proposal() {
        let text = proposal.hostfile.to_json();
        finetune_rendezvous::Hostfile::parse(&text).expect("a hostfile of ours").devices().expect("devices of ours");
    }
}

fn case(seed: u64, answers: &[Vec<u8>]) {
    let mut random = Random(seed);
    let mut answer = answers[random.below(answers.len())].clone();
    for _ in 0..=random.below(6) {
        if !answer.is_empty() {
            damage(&mut answer, &mut random);
        }
    }
    let damaged = Facts::from_transcript("mini-2", &Transcript::parse(&answer, "m"), 0.0);
    let mut hosts = ExampleCluster::mesh_of_four().facts();
    hosts[1] = damaged;
    use_all(hosts);
}

#[test]
fn damaged_answers() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let answers = answers();
    let seeds = match number("FINETUNE_FUZZ_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("FINETUNE_FUZZ_CASES").unwrap_or(1500),
    };
    for seed in seeds {
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| case(seed, &answers)));
        assert!(outcome.is_ok(), "FINETUNE_FUZZ_SEED={seed} panics");
        assert!(began.elapsed() < LONGEST, "FINETUNE_FUZZ_SEED={seed} takes {:?}", began.elapsed());
    }
}

#[test]
fn bytes_that_are_nothing() {
    let mut random = Random(1);
    for length in [0, 1, 2, 1000, 100_000] {
        let bytes: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
        use_all(vec![Facts::from_transcript("a", &Transcript::parse(&bytes, "m"), 0.0)]);
    }
}
