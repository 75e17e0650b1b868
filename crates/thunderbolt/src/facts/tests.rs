//! Real outputs (see tests/data/README.md) and texts in their form.

use std::net::Ipv4Addr;

use super::*;
use crate::example_cluster::{ExampleCluster, data};

fn mac(sections: &[(&str, &str)]) -> Facts {
    let mut all = vec![("system", "Darwin 25.5.0 arm64\n")];
    all.extend_from_slice(sections);
    Facts::from_transcript("mac", &Transcript::of(&all), 0.0)
}

#[test]
fn a_real_mac_studio() {
    let facts = mac(&[
        ("ports", data!("studio-m3-ultra.ports.txt")),
        ("thunderbolt", data!("studio-m3-ultra.thunderbolt.json")),
    ]);
    let ports = facts.ports.as_ref().unwrap();
    let seen: Vec<_> =
        ports.iter().map(|port| (port.receptacle.unwrap(), port.interface.as_deref().unwrap(), port.in_use)).collect();
    assert_eq!(
        seen,
        [
            (1, "en2", false),
            (2, "en3", true),
            (3, "en4", false),
            (4, "en5", true),
            (5, "en6", false),
            (6, "en7", false)
        ]
    );
    assert_eq!(ports[1].far[0].domain, "817DCFA4-B481-4100-80FC-91C7AA969F0B");
    assert_eq!((ports[1].far[0].name.as_str(), ports[1].far[0].announces_rdma), ("MacBook Pro", Some(true)));
    assert_eq!((ports[3].far.len(), ports[3].others.clone()), (0, vec!["Envoy Ultra".to_owned()]));
    assert_eq!(ports[0].speed, Some(Speed { gigabits: 120, is_limit: true }));
    assert_eq!(ports[1].speed, Some(Speed { gigabits: 80, is_limit: false }));
    assert_eq!(facts.has_thunderbolt_5(), Some(true));
}

#[test]
fn a_real_mac_behind_a_dock() {
    let facts =
        mac(&[("ports", data!("studio-m3-ultra.ports.txt")), ("thunderbolt", data!("dock-studio.thunderbolt.json"))]);
    let port = &facts.ports.as_ref().unwrap()[2];
    assert_eq!(port.far[0].through, ["ThunderBay Flex 8"]);
    assert_eq!((port.interface.as_deref(), port.speed.unwrap().gigabits), (Some("en4"), 40));
    // The trimmed report names no protocols: nothing is known of RDMA.
    assert_eq!(port.far[0].announces_rdma, Some(false));
}

#[test]
fn apples_devices() {
    let facts = mac(&[
        ("devices", data!("apple-tn3205.ibv_devices.txt")),
        ("device_details", data!("apple-tn3205.ibv_devinfo.txt")),
        ("rdma", "enabled\n"),
        ("interfaces", data!("apple-tn3205.ifconfig.txt")),
        ("power", data!("pmset.txt")),
    ]);
    let devices = facts.devices.as_ref().unwrap();
    assert_eq!(
        devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>(),
        ["rdma_en2", "rdma_en3", "rdma_en4"]
    );
    assert_eq!((devices[0].state, devices[0].gids.len()), (PortState::Active, 3));
    assert_eq!(devices[0].ipv4().collect::<Vec<_>>(), [Ipv4Addr::new(169, 254, 205, 255)]);
    assert_eq!(devices[1].state, PortState::Unknown);
    assert_eq!(facts.device_of("en3").unwrap().name, "rdma_en3");
    assert_eq!(facts.rdma_enabled, Some(true));
    let bridge = facts.interface("bridge0").unwrap();
    assert_eq!((bridge.medium, bridge.up, bridge.members.join(" ")), (Medium::Bridge, true, "en2 en3 en4".into()));
    assert_eq!(facts.interface("en2").unwrap().addresses, [(Ipv4Addr::new(169, 254, 205, 255), 16)]);
    assert_eq!(facts.power, Some(Power { sleep_minutes: 1, restarts: Some(false) }));
}

/// Other releases of macOS, or other programs in the way, write the same otherwise.
#[test]
fn reports_in_other_forms() {
    let ports = "Hardware Port: Thunderbolt 2\nDevice: en3\n";
    let domain = "00000001-0000-4000-8000-000000000002";
    let found = |thunderbolt: &str| {
        let facts = mac(&[("ports", ports), ("thunderbolt", thunderbolt)]);
        let port = facts.ports.as_ref()?.first()?.clone();
        Some((port.receptacle, port.interface))
    };
    let report =
        |socket: &str| format!(r#"{{"SPThunderboltDataType": [{{"domain_uuid_key": "{domain}", {socket}}}]}}"#);
    let known = Some((Some(2), Some("en3".to_owned())));
    for socket in [
        r#""receptacle_1_tag": {"receptacle_id_key": "2"}"#,
        r#""receptacle_1_tag": {"receptacle_id_key": 2}"#,
        r#""receptacle_2_tag": {"receptacle_id_key": 2}"#,
        r#""receptacle_2_tag": {"current_speed_key": "80 Gb/s"}"#,
    ] {
        assert_eq!(found(&report(socket)), known, "{socket}");
        let noisy = format!("2026-01-01 10:00:00.000 system_profiler[312:9001] nothing\n{}", report(socket));
        assert_eq!(found(&noisy), known, "{noisy}");
    }
    assert_eq!(found(&report(r#""receptacle_1_tag": {"receptacle_id_key": true}"#)), Some((None, None)));
    let switch = |text: &str| mac(&[("rdma", text)]).rdma_enabled;
    for (text, on) in [
        ("enabled\n", Some(true)),
        ("RDMA is enabled.\n", Some(true)),
        ("RDMA over Thunderbolt: on\n", Some(true)),
        ("disabled\n", Some(false)),
        ("RDMA is not enabled\n", Some(false)),
        ("RDMA over Thunderbolt: off\n", Some(false)),
        ("enabled or disabled?\n", None),
        ("usage: rdma_ctl [enable | disable | status]\n", None),
    ] {
        assert_eq!(switch(text), on, "{text}");
    }
}

/// The state of a Thunderbolt 4 Mac after `rdma_ctl enable` (jundot/omlx issue 3037): a table
/// without rows.
#[test]
fn no_devices_is_known() {
    let facts = mac(&[("devices", "device              node GUID\n------          ----------------\n")]);
    assert_eq!(facts.devices, Some(vec![]));
    assert_eq!(mac(&[("devices", "No IB devices found\n")]).devices, Some(vec![]));
    let facts = mac(&[("devices", "dyld: Library not loaded\n")]);
    assert_eq!(facts.devices, None);
    assert_eq!(facts.why("devices"), "its output does not tell: \"dyld: Library not loaded\"");
    assert_eq!(mac(&[]).why("devices"), "its host did not get to it in time, or does not know it");
}

#[test]
fn reasons() {
    let answer = "\nm begin system\nDarwin 25 arm64\n\nm end system 0\n\nm begin rdma\nsh: rdma_ctl: command not found\n\nm end rdma 127\n\
                  \nm begin power\nboom\n\nm end power 1\n\nm begin thunderbolt\n{\"SPTh";
    let facts = Facts::from_transcript("mac", &Transcript::parse(answer.as_bytes(), "m"), 0.0);
    assert!(!facts.complete);
    assert_eq!(facts.why("rdma"), "there is no such command");
    assert_eq!(facts.why("power"), "the command failed with status 1: \"boom\"");
    assert_eq!(facts.why("thunderbolt"), "the command did not end in time");
}

#[test]
fn a_linux_box() {
    let facts = Facts::from_transcript("box", &Transcript::of(LINUX), 1.8e9);
    assert_eq!(facts.release.as_deref(), Some("Debian GNU/Linux 13 (trixie)"));
    let cards: Vec<_> = facts.interfaces.iter().map(|i| (i.name.as_str(), i.medium, i.megabits)).collect();
    assert_eq!(
        cards,
        [
            ("lo", Medium::Loopback, None),
            ("enp3s0", Medium::Wired, Some(10_000)),
            ("wlan0", Medium::Wireless, None),
            ("docker0", Medium::Bridge, None),
        ]
    );
    let device = &facts.devices.as_ref().unwrap()[0];
    assert_eq!(
        (device.name.as_str(), device.interface.as_deref(), device.state),
        ("mlx5_0", Some("enp3s0"), PortState::Active)
    );
    assert_eq!((device.ipv4().next(), device.gigabits), (Some(Ipv4Addr::new(10, 0, 0, 7)), Some(100)));
    assert_eq!((facts.lockable_bytes, facts.verbs_library), (Some(8 << 20), Some(true)));
    assert_eq!(facts.firewall, Some(Firewall::On("ufw".into())));
    assert_eq!(facts.listening, Some(vec![22, 8080]));
    assert_eq!(facts.refused_device_files, ["/dev/infiniband/uverbs0"]);
    assert_eq!((facts.memory_bytes, facts.disk_free_bytes), (Some(32_780_932 << 10), Some(123_456 << 10)));
    assert_eq!(facts.way_in, Some("10.0.0.7".parse().unwrap()));
    let clock = facts.clock.unwrap();
    assert!((clock.ahead - 2.25).abs() < 1e-6 && clock.error < 0.5, "{clock:?}");
}

/// Derived, in the form of a Debian box with a RoCE card.
pub(super) const LINUX: &[(&str, &str)] = &[
    ("system", "Linux 6.12.0 x86_64\n"),
    ("clock", "1800000002.250000000\n"),
    ("login", "10.0.0.2 50022 10.0.0.7 22\n"),
    ("disk", "Filesystem     1024-blocks      Used Available Capacity Mounted on\n/dev/sd a1 1 1 123456 1% /\n"),
    ("files", "1048576\n"),
    ("release", "PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\n"),
    ("memory", "MemTotal:       32780932 kB\n"),
    (
        "links",
        "enp3s0 state=up speed=10000 wireless=no\nwlan0 state=up speed= wireless=yes\ndocker0 state=down speed=-1 wireless=no\n",
    ),
    (
        "interfaces",
        "1: lo    inet 127.0.0.1/8 scope host lo\\ valid_lft forever\n2: enp3s0    inet 10.0.0.7/24 brd 10.0.0.255 scope global enp3s0\n\
         3: wlan0    inet 192.168.1.40/24 brd 192.168.1.255 scope global dynamic wlan0\n4: docker0    inet 172.17.0.1/16 scope global docker0\n",
    ),
    (
        "infiniband",
        "device mlx5_0\ninterface enp3s0\nstate 4: ACTIVE\nlayer Ethernet\nrate 100 Gb/sec (4X EDR)\n\
         gid 0 fe80:0000:0000:0000:1234:56ff:fe78:9abc\ngid 1 0000:0000:0000:0000:0000:ffff:0a00:0007\n\
         gid 2 0000:0000:0000:0000:0000:0000:0000:0000\ninterface enp3s0\n",
    ),
    ("library", "\tlibibverbs.so.1 (libc6,x86-64) => /lib/x86_64-linux-gnu/libibverbs.so.1\n"),
    ("character_devices", "refused /dev/infiniband/uverbs0\n"),
    ("locked", "8192\n"),
    ("firewall", "firewalld inactive\nufw active\nnftables inactive\niptables unknown\n"),
    (
        "listening",
        "LISTEN 0      128          0.0.0.0:22        0.0.0.0:*\nLISTEN 0 128 [::]:22 [::]:*\nLISTEN 0 5 127.0.0.1:8080 0.0.0.0:*\n",
    ),
];

#[test]
fn clocks_without_fractions() {
    let facts = Facts::from_transcript("mini", &ExampleCluster::new(1, &[]).transcript(0), 1_800_000_000.5);
    assert_eq!(facts.clock, Some(Clock { ahead: 0.0, error: 0.7 }));
    assert_eq!(
        (facts.finetune.unwrap().version.as_str(), facts.release.as_deref()),
        ("finetune 0.1.0", Some("26.5.1"))
    );
    assert_eq!((facts.system_build.as_deref(), facts.chip.as_deref()), (Some("25F80"), Some("Apple M4 Pro")));
    assert_eq!((facts.open_files, facts.firewall, facts.root), (Some(256), Some(Firewall::Off), Some(true)));
}

#[test]
fn networks() {
    let network = |text: &str, prefix| interfaces::network(text.parse().unwrap(), prefix).to_string();
    assert_eq!(network("192.168.0.6", 30), "192.168.0.4");
    assert_eq!((network("10.1.2.3", 0), network("10.1.2.3", 32)), ("0.0.0.0".into(), "10.1.2.3".into()));
}
