//! Real pairs of reports, and cables that only one end sees.

use finetune_launch::Transcript;

use super::*;
use crate::example_cluster::{ExampleCluster, data};

fn mac(name: &str, ports: &str, thunderbolt: &str) -> Facts {
    let sections = [("system", "Darwin 25.5.0 arm64\n"), ("ports", ports), ("thunderbolt", thunderbolt)];
    Facts::from_transcript(name, &Transcript::of(&sections), 0.0)
}

#[test]
fn a_real_pair() {
    // The owner published no list of the MacBook's interfaces; that of an M4 Max stands in.
    let macbook = mac("macbook", data!("macbook-m4-max.ports.txt"), data!("macbook-m5-max.thunderbolt.json"));
    let studio = mac("studio", data!("studio-m3-ultra.ports.txt"), data!("studio-m3-ultra.thunderbolt.json"));
    let cabling = Cabling::new(&[macbook, studio]);
    assert_eq!(cabling.cables.len(), 1);
    let cable = &cabling.cables[0];
    assert_eq!(cable.interfaces, [Some("en1".to_owned()), Some("en3".to_owned())]);
    assert_eq!((cable.gigabits, cable.one_sided, cable.through.len()), (Some(80), false, 0));
    assert_eq!((cabling.strangers.len(), cabling.same_machine.len(), cabling.loops.len()), (0, 0, 0));
}

#[test]
fn a_real_pair_with_a_dock_between() {
    let studio = mac("studio", data!("studio-m3-ultra.ports.txt"), data!("dock-studio.thunderbolt.json"));
    let macbook = mac("macbook", data!("macbook-m4-max.ports.txt"), data!("dock-macbook.thunderbolt.json"));
    let cabling = Cabling::new(&[studio.clone(), macbook]);
    let seen: Vec<_> = cabling
        .between(0, 1)
        .map(|cable| (cable.interface(0), cable.interface(1), cable.gigabits, cable.through.join(" ")))
        .collect();
    assert_eq!(
        seen,
        [
            (Some("en4"), Some("en3"), Some(40), "ThunderBay Flex 8".to_owned()),
            (Some("en7"), Some("en2"), Some(80), String::new()),
        ]
    );
    assert_eq!(cabling.counts(2), [[0, 2], [2, 0]]);
    // Without the MacBook both cables lead to a stranger.
    assert_eq!(Cabling::new(&[studio]).strangers.len(), 2);
}

#[test]
fn one_end_is_enough() {
    let mut hosts = ExampleCluster::new(2, &[[(0, 0), (1, 2)]]).facts();
    hosts[1].ports.as_mut().unwrap()[2].far.clear();
    let cabling = Cabling::new(&hosts);
    assert!(cabling.cables[0].one_sided);
    assert_eq!(cabling.cables[0].interfaces, [Some("en2".to_owned()), Some("en4".to_owned())]);
}

#[test]
fn mistakes() {
    let cluster = ExampleCluster::new(1, &[[(0, 0), (0, 1)]]);
    assert_eq!(Cabling::new(&cluster.facts()).loops, [(End { host: 0, port: 0 }, End { host: 0, port: 1 })]);
    let twice = [cluster.facts(), cluster.facts()].concat();
    assert_eq!(Cabling::new(&twice).same_machine, [(0, 1)]);
}
