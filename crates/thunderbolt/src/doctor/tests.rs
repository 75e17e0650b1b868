//! Tables: what is changed in a healthy cluster, and which checks say so.

use expect_test::expect;
use finetune_launch::Transcript;
use finetune_launch::gather::GatherError;

use super::*;
use crate::example_cluster::ExampleCluster;
use crate::facts::{Clock, Facts, Firewall, PortState, Power};

/// Four Macs after a set-up that worked.
fn healthy() -> ExampleCluster {
    let mut cluster = ExampleCluster::mesh_of_four();
    let plan = crate::setup::plan(&cluster.discovery()).unwrap();
    crate::setup::apply(&plan, &mut |host, command| Ok(cluster.run(host, command))).unwrap();
    cluster
}

fn discovered(facts: Vec<Facts>) -> Discovery {
    Discovery::new(facts.into_iter().map(Ok).collect())
}

/// The checks that are not in order, as "verdict subject name: found".
fn complaints(facts: Vec<Facts>, expected: &Expected) -> Vec<String> {
    let checks = examine(&discovered(facts), expected);
    let bad = checks.iter().filter(|check| check.verdict != Verdict::Ok);
    bad.map(|check| format!("{:?} {} {}: {}", check.verdict, check.subject, check.name, check.found)).collect()
}

#[test]
fn a_healthy_cluster() {
    let checks = examine(&healthy().discovery(), &Expected { ports: vec![32323], rdma: true, ..Expected::default() });
    assert_eq!(worst(&checks), Verdict::Ok, "{}", text(&checks, false));
    assert!(checks.iter().all(|check| check.next.is_none() && !check.found.is_empty()));
    let of = |name: &str| checks.iter().filter(|check| check.name == name).count();
    assert_eq!(
        (of("RDMA port"), of("RDMA address"), of("cable addresses"), of("macOS"), of("clocks")),
        (12, 12, 6, 4, 1)
    );
}

/// A change to the facts of a healthy cluster, and the complaints that must come of it (no others
/// may).
type Case = (&'static str, fn(&mut Vec<Facts>), &'static [&'static str]);

const CASES: &[Case] = &[
    ("old macOS", |hosts| hosts[0].release = Some("26.1".into()), &["Warn mini-1 macOS: macOS 26.1"]),
    ("unknown macOS", |hosts| hosts[0].release = None, &["CannotTell mini-1 macOS: it was not asked"]),
    (
        "another build",
        |hosts| hosts[2].system_build = Some("25E250".into()),
        &["Warn all macOS builds: 25E250: mini-3; 25F80: mini-1, mini-2, mini-4"],
    ),
    ("RDMA switched off", |hosts| hosts[1].rdma_enabled = Some(false), &["Warn mini-2 RDMA switch: disabled"]),
    (
        "no devices",
        |hosts| hosts[1].devices = Some(vec![]),
        &["Warn mini-2 RDMA devices: none, though RDMA is enabled"],
    ),
    (
        "sleeps",
        |hosts| hosts[3].power = Some(Power { sleep_minutes: 10, restarts: Some(true) }),
        &["Warn mini-4 idle sleep: after 10 minutes"],
    ),
    (
        "stays off",
        |hosts| hosts[3].power = Some(Power { sleep_minutes: 0, restarts: Some(false) }),
        &["Warn mini-4 restart after power failure: no"],
    ),
    (
        "little room",
        |hosts| hosts[0].disk_free_bytes = Some(5_000_000_000),
        &["Warn mini-1 disk space: 5.0 GB free, 10.7 GB wanted"],
    ),
    ("few files", |hosts| hosts[0].open_files = Some(64), &["Warn mini-1 open files: at most 64"]),
    ("firewall", |hosts| hosts[0].firewall = Some(Firewall::On("it".into())), &["Warn mini-1 firewall: it is on"]),
    (
        "firewall blocks",
        |hosts| hosts[0].firewall = Some(Firewall::BlocksAll),
        &["Fail mini-1 firewall: it lets no connection in"],
    ),
    ("port in use", |hosts| hosts[0].listening = Some(vec![22, 32323]), &["Fail mini-1 ports: port 32323 is in use"]),
    ("ports unknown", |hosts| hosts[0].listening = None, &["CannotTell mini-1 ports: it was not asked"]),
    (
        "another version",
        |hosts| hosts[0].finetune.as_mut().unwrap().version = "finetune 0.0.9".into(),
        &["Fail mini-1 finetune: \"finetune 0.0.9\" there, \"finetune 0.1.0\" here"],
    ),
    ("no program", |hosts| hosts[0].finetune = None, &["Fail mini-1 finetune: not found: it was not asked"]),
    (
        "another build of the program",
        |hosts| hosts[0].finetune.as_mut().unwrap().checksum = Some((7, 8)),
        &["Warn all same program: 00000007 (8 bytes): mini-1; f0b62f50 (41943040 bytes): mini-2, mini-3, mini-4"],
    ),
    (
        "a clock behind",
        |hosts| {
            let clock = |ahead| Some(Clock { ahead, error: 0.25 });
            hosts.iter_mut().for_each(|facts| facts.clock = clock(0.0));
            hosts[2].clock = clock(-60.0);
        },
        &["Warn all clocks: mini-4 is 60.0 s ahead of mini-3 (± 0.5 s)"],
    ),
    (
        "Thunderbolt 4 at one cable",
        |hosts| hosts[0].ports.as_mut().unwrap()[0].speed.as_mut().unwrap().gigabits = 40,
        &["Warn mini-1 – mini-2 cable speed: en2/en2: 40 Gb/s"],
    ),
    (
        "a dock",
        |hosts| hosts[0].ports.as_mut().unwrap()[0].far[0].through = vec!["Dock".into()],
        &["Warn mini-1 – mini-2 direct cable: en2/en2: it goes through Dock"],
    ),
    (
        "one end does not see the other",
        |hosts| hosts[0].ports.as_mut().unwrap()[0].far.clear(),
        &["Warn mini-1 – mini-2 both ends see it: en2/en2: only one end reports the other"],
    ),
    (
        "port down",
        |hosts| hosts[0].devices.as_mut().unwrap()[0].state = PortState::Down,
        &["Warn mini-1 – mini-2 RDMA port: rdma_en2 of mini-1: the port is down"],
    ),
    (
        "port unknown",
        |hosts| hosts[0].devices.as_mut().unwrap()[0].state = PortState::Unknown,
        &[
            "CannotTell mini-1 – mini-2 RDMA port: rdma_en2 of mini-1: ibv_devinfo does not tell the state of its port: it was not asked",
        ],
    ),
    (
        "no usable GID",
        |hosts| hosts[0].devices.as_mut().unwrap()[0].gids.truncate(1),
        &["Warn mini-1 – mini-2 RDMA address: rdma_en2 of mini-1: its GIDs have no IPv4 address of the interface"],
    ),
    (
        "no device for a cable",
        |hosts| drop(hosts[0].devices.as_mut().unwrap().remove(0)),
        &["Warn mini-1 – mini-2 RDMA port: mini-1 has no device for en2"],
    ),
    (
        "the bridge is back",
        |hosts| {
            let bridge = hosts[0].interfaces.iter_mut().find(|interface| interface.name == "bridge0");
            bridge.unwrap().up = true;
        },
        &["Fail mini-1 Thunderbolt Bridge: bridge0 is up and joins 3 of the cables"],
    ),
    (
        "the answer was cut off",
        |hosts| hosts[0].complete = false,
        &["Warn mini-1 answer: the host did not answer everything in time; what is missing below was not asked"],
    ),
    ("Intel", |hosts| hosts[0].architecture = "x86_64".into(), &["Warn mini-1 processor: x86_64, not Apple silicon"]),
];

#[test]
fn one_thing_wrong() {
    let expected = Expected { ports: vec![32323], ..Expected::default() };
    for (title, change, complaint) in CASES {
        let mut hosts = healthy().facts();
        change(&mut hosts);
        assert_eq!(complaints(hosts.clone(), &expected), *complaint, "{title}");
        for check in examine(&discovered(hosts), &expected) {
            let is_bad = matches!(check.verdict, Verdict::Warn | Verdict::Fail);
            assert_eq!(check.next.is_some(), is_bad, "{title}: {check:?}");
        }
    }
}

#[test]
fn what_rdma_needs_fails_where_rdma_is_wanted() {
    let mut hosts = healthy().facts();
    hosts[1].rdma_enabled = Some(false);
    assert_eq!(
        complaints(hosts, &Expected { rdma: true, ..Expected::default() }),
        ["Fail mini-2 RDMA switch: disabled"]
    );
}

#[test]
fn addresses_of_a_cable() {
    let found = |ends: [(&str, u8); 2]| {
        let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
        cluster.bridge = vec![false; 2];
        for (host, (address, prefix)) in ends.into_iter().enumerate().filter(|(_, (address, _))| !address.is_empty()) {
            cluster.addresses.insert((host, 0), (address.parse().unwrap(), prefix));
        }
        let checks = examine(&cluster.discovery(), &Expected::default());
        let check = checks.into_iter().find(|check| check.name == "cable addresses").unwrap();
        format!("{:?} {}", check.verdict, check.found)
    };
    assert_eq!(found([("10.5.0.1", 30), ("10.5.0.2", 30)]), "Ok en2/en2: 10.5.0.1 and 10.5.0.2");
    assert_eq!(found([("10.5.0.1", 30), ("", 0)]), "Warn en2/en2: en2 of mini-2 has no IPv4 address");
    assert_eq!(found([("10.5.0.1", 30), ("10.6.0.2", 30)]), "Warn en2/en2: the ends are in different networks");
    assert_eq!(
        found([("169.254.7.1", 16), ("169.254.9.2", 16)]),
        "Warn en2/en2: 169.254.7.1 and 169.254.9.2, which the Macs gave themselves"
    );
    assert_eq!(
        found([("192.168.1.201", 24), ("192.168.1.202", 24)]),
        "Warn en2/en2: 192.168.1.201 and 192.168.1.202, but en0 of mini-1 is in the same network"
    );
}

/// Users with Thunderbolt 4 are not sent to Recovery (jundot/omlx issue 3037).
#[test]
fn thunderbolt_4() {
    let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
    (cluster.gigabits, cluster.rdma, cluster.bridge) = (40, vec![false; 2], vec![false; 2]);
    let mut facts = cluster.facts();
    facts[0].rdma_enabled = Some(true);
    let checks = examine(&discovered(facts), &Expected::default());
    let words = text(&checks, true);
    assert!(words.contains("Thunderbolt 4 or older") && !words.contains("Recovery"), "{words}");
}

/// The peer of a real MacBook announced no RDMA: that is what the advice names.
#[test]
fn the_other_end_is_named() {
    let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
    cluster.rdma[1] = false;
    let checks = examine(&cluster.discovery(), &Expected::default());
    let port = checks.iter().find(|check| check.name == "RDMA port").unwrap();
    assert_eq!(port.next.as_deref(), Some("the other end does not offer RDMA: switch it on at mini-2"));
}

#[test]
fn unreachable_hosts_fail() {
    let mut answers: Vec<_> = healthy().facts().into_iter().map(Ok).collect();
    answers[3] =
        Err(GatherError::Unreachable { host: "mini-4".into(), words: "Permission denied (publickey).".into() });
    let checks = examine(&Discovery::new(answers), &Expected::default());
    expect![[r#"Check { subject: "mini-4", name: "ssh", found: "mini-4 is not reachable: Permission denied (publickey).", verdict: Fail, next: Some("ssh must work without a password: `ssh-copy-id mini-4`, then `ssh -o BatchMode=yes mini-4 true`") }"#]]
        .assert_eq(&format!("{:?}", checks[0]));
}

fn linux(name: &str, change: &[(&'static str, &'static str)]) -> Facts {
    let mut sections = vec![
        ("system", "Linux 6.12.0 x86_64\n"),
        ("clock", "1800000000.000000000\n"),
        ("version", "finetune 0.1.0\n"),
        ("binary", "7 8 finetune\n"),
        ("disk", "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/a 1 1 123456789 1% /\n"),
        ("files", "1024\n"),
        ("links", "ens1 state=up speed=100000 wireless=no\n"),
        ("infiniband", "device mlx5_0\ninterface ens1\nstate 4: ACTIVE\nrate 100 Gb/sec\ngid 1 ::ffff:10.9.0.1\n"),
        ("library", "libibverbs.so.1\n"),
        ("character_devices", "usable /dev/infiniband/uverbs0\n"),
        ("locked", "unlimited\n"),
        ("firewall", "ufw inactive\n"),
        ("listening", ""),
    ];
    let interface = if name.ends_with('1') { "2: ens1    inet 10.9.0.1/24\n" } else { "2: ens1    inet 10.9.0.2/24\n" };
    sections.push(("interfaces", interface));
    for (section, text) in change {
        sections.retain(|(name, _)| name != section);
        sections.push((section, text));
    }
    Facts::from_transcript(name, &Transcript::of(&sections), 1.8e9)
}

#[test]
fn linux_boxes() {
    type Case = (&'static [(&'static str, &'static str)], &'static [&'static str]);
    let cases: &[Case] = &[
        (&[], &[]),
        (&[("infiniband", "")], &["Fail box-1 RDMA devices: none"]),
        (
            &[("infiniband", "device mlx5_0\ninterface ens1\nstate 1: DOWN\n")],
            &["Fail box-1 RDMA port: mlx5_0: the port is down"],
        ),
        (
            &[("infiniband", "device mlx5_0\ninterface ens1\nstate 4: ACTIVE\ngid 0 fe80::1\n")],
            &["Fail box-1 RDMA address: mlx5_0: no IPv4 address among its GIDs"],
        ),
        (
            &[("character_devices", "refused /dev/infiniband/uverbs0\n")],
            &["Fail box-1 device files: /dev/infiniband/uverbs0 may not be opened by this user"],
        ),
        (&[("locked", "8192\n")], &["Fail box-1 locked memory: at most 8 MiB"]),
        (&[("locked", "much\n")], &["CannotTell box-1 locked memory: its output cannot be understood: \"much\""]),
        (&[("firewall", "ufw active\n")], &["Warn box-1 firewall: ufw is on"]),
        (&[("clock", "1800000600.000000000\n")], &["Warn all clocks: box-1 is 600.0 s ahead of box-2 (± 0.4 s)"]),
        (
            &[("system", "FreeBSD 15 amd64\n")],
            &[
                "Warn all network: the hosts share no network: check that each reaches the others' addresses in the hostfile; no address of box-1 is known; its name in ssh is used",
                "Fail box-1 system: FreeBSD is neither macOS nor Linux",
                "CannotTell box-1 firewall: it was not asked",
                "CannotTell box-1 ports: it was not asked",
            ],
        ),
    ];
    let expected = Expected { rdma: true, ports: vec![32323], ..Expected::default() };
    for (change, wanted) in cases {
        assert_eq!(complaints(vec![linux("box-1", change), linux("box-2", &[])], &expected), *wanted, "{change:?}");
    }
}

#[test]
fn a_mac_and_a_linux_box() {
    let hosts = vec![ExampleCluster::new(1, &[]).facts().remove(0), linux("box-1", &[])];
    let found = complaints(hosts, &Expected::default());
    assert!(found.contains(&"Warn all systems: Macs and others".to_owned()), "{found:?}");
}

#[test]
fn this_machine_can_be_examined() {
    let hosts = ["localhost".to_owned()];
    let facts = crate::gather::gather(&hosts, &crate::Questions::default(), crate::gather::DEADLINE);
    let checks = examine(&Discovery::new(facts), &Expected::default());
    assert!(
        checks.iter().any(|check| check.name == "disk space" && check.verdict != Verdict::CannotTell),
        "{checks:#?}"
    );
}

#[test]
fn the_table() {
    let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
    cluster.rdma[1] = false;
    expect![[r#"
        warn  mini-1           Thunderbolt Bridge  bridge0 is up and joins 1 of the cables
              → `finetune cluster setup` takes it down; or System Settings, Network, Thunderbolt Bridge, Make Inactive
        warn  mini-2           RDMA switch         disabled
              → in Recovery: Options, Utilities, Terminal, `rdma_ctl enable`, restart; newer macOS: System Settings, search for RDMA
        warn  mini-2           RDMA devices        none
              → switch RDMA on first
        warn  mini-2           Thunderbolt Bridge  bridge0 is up and joins 1 of the cables
              → `finetune cluster setup` takes it down; or System Settings, Network, Thunderbolt Bridge, Make Inactive
        warn  mini-1 – mini-2  cable addresses     en2/en2: en2 of mini-1 has no IPv4 address
              → `finetune cluster setup` gives each cable a network of its own
        warn  mini-1 – mini-2  RDMA port           rdma_en2 of mini-1: the port is down
              → the other end does not offer RDMA: switch it on at mini-2
        28 ok, 6 warnings, 0 failed, 0 could not be told
    "#]].assert_eq(&text(&examine(&cluster.discovery(), &Expected::default()), false));
}
