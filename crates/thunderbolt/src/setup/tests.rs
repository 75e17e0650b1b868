//! Plans, that they are run once only, and what is said when one fails.

use std::cell::RefCell;

use expect_test::expect;

use super::*;
use crate::example_cluster::ExampleCluster;

#[test]
fn two_minis_from_the_box() {
    let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 1)]]);
    cluster.rdma[1] = false;
    expect![[r#"
        mini-1
          # a bridge over cables in a loop sends frames in circles
          sudo ifconfig bridge0 down
          # an address on the cable to mini-2: RDMA needs one, and TCP can use it
          sudo ifconfig en2 inet 192.168.200.1 netmask 255.255.255.252
          # what is for 192.168.200.2 goes through this cable
          sudo route -n change 192.168.200.2 -interface en2 || sudo route -n add -host 192.168.200.2 -interface en2

        mini-2
          # a bridge over cables in a loop sends frames in circles
          sudo ifconfig bridge0 down
          # an address on the cable to mini-1: RDMA needs one, and TCP can use it
          sudo ifconfig en3 inet 192.168.200.2 netmask 255.255.255.252
          # what is for 192.168.200.1 goes through this cable
          sudo route -n change 192.168.200.1 -interface en3 || sudo route -n add -host 192.168.200.1 -interface en3

        mini-2: RDMA is switched off. Shut down, hold the power button until the startup options appear, choose Options, then Utilities, Terminal, type `rdma_ctl enable` and restart (newer macOS: System Settings, search for RDMA)

        these settings last until a Mac restarts; then run this again
    "#]].assert_eq(&text(&plan(&cluster.discovery()).unwrap()));
}

#[test]
fn a_second_run_changes_nothing() {
    for cluster in [
        ExampleCluster::mesh_of_four(),
        ExampleCluster::ring_of_five(),
        ExampleCluster::new(2, &[[(0, 0), (1, 1)], [(0, 1), (1, 0)]]),
    ] {
        let first = plan(&cluster.discovery()).unwrap();
        let cables = cluster.cables.len();
        assert_eq!(first.steps.len(), cluster.hosts + 4 * cables);
        let cluster = RefCell::new(cluster);
        let done = apply(&first, &mut |host, command| Ok(cluster.borrow_mut().run(host, command))).unwrap();
        assert_eq!(done, first.steps.len());
        let cluster = cluster.into_inner();
        let second = plan(&cluster.discovery()).unwrap();
        assert_eq!(second.steps, []);
        assert_eq!(text(&second), "Nothing is left to do by commands.\n");
        // Both ends of a cable are in one network, and every cable has its own.
        let mut networks: Vec<_> =
            cluster.addresses.values().map(|&(address, prefix)| crate::facts::network(address, prefix)).collect();
        networks.sort_unstable();
        networks.dedup();
        assert_eq!(networks.len(), cables);
    }
}

#[test]
fn a_new_cable_leaves_the_old_ones_alone() {
    let mut cluster = ExampleCluster::new(3, &[[(0, 0), (1, 0)], [(1, 1), (2, 0)]]);
    let first = plan(&cluster.discovery()).unwrap();
    apply(&first, &mut |host, command| Ok(cluster.run(host, command))).unwrap();
    let before = cluster.addresses.clone();
    cluster.cables.insert(0, [(2, 1), (0, 1)]);
    let second = plan(&cluster.discovery()).unwrap();
    assert_eq!(second.steps.len(), 4, "{:#?}", second.steps);
    apply(&second, &mut |host, command| Ok(cluster.run(host, command))).unwrap();
    assert!(before.iter().all(|(socket, address)| cluster.addresses[socket] == *address));
    assert_eq!(cluster.addresses.len(), 6);
}

#[test]
fn addresses_keep_clear_of_other_networks() {
    let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
    let first_address = |cluster: &ExampleCluster| plan(&cluster.discovery()).unwrap().steps[1].command.clone();
    assert!(first_address(&cluster).contains("inet 192.168.200.1 "), "{}", first_address(&cluster));
    // The second host has that range on a port without a cable.
    cluster.addresses.insert((1, 2), ("192.168.200.9".parse().unwrap(), 20));
    assert!(first_address(&cluster).contains("inet 192.168.208.1 "), "{}", first_address(&cluster));
    cluster.addresses.insert((1, 1), ("192.168.0.9".parse().unwrap(), 16));
    assert!(first_address(&cluster).contains("inet 10.213.0.1 "), "{}", first_address(&cluster));
}

#[test]
fn self_assigned_and_shared_networks_are_replaced() {
    let cluster = |addresses: [(&str, u8); 2]| {
        let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
        cluster.bridge = vec![false; 2];
        for (host, (address, prefix)) in addresses.into_iter().enumerate() {
            cluster.addresses.insert((host, 0), (address.parse().unwrap(), prefix));
        }
        cluster
    };
    let steps = |addresses| plan(&cluster(addresses).discovery()).unwrap().steps.len();
    assert_eq!(steps([("10.5.0.1", 24), ("10.5.0.2", 24)]), 0);
    assert_eq!(steps([("169.254.3.1", 16), ("169.254.9.2", 16)]), 4);
    assert_eq!(steps([("10.5.0.1", 24), ("10.5.0.1", 24)]), 4);
    assert_eq!(steps([("10.5.0.1", 24), ("10.6.0.2", 24)]), 4);
    // The network of the Ethernet ports.
    assert_eq!(steps([("192.168.1.201", 24), ("192.168.1.202", 24)]), 4);
}

#[test]
fn our_own_way_in_is_not_cut() {
    let cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
    let mut facts = cluster.facts();
    let bridge = facts[1].interfaces.iter_mut().find(|interface| interface.name == "bridge0").unwrap();
    bridge.addresses.push(("192.168.2.1".parse().unwrap(), 24));
    facts[1].way_in = Some("192.168.2.1".parse().unwrap());
    let error = plan(&Discovery::new(facts.into_iter().map(Ok).collect())).unwrap_err();
    assert_eq!(
        error.to_string(),
        "ssh reaches mini-2 at 192.168.2.1, which is on bridge0: setting it up would cut that connection"
    );
    assert_eq!(error.hints().len(), 1);
}

#[test]
fn a_failure_says_what_was_done() {
    let cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
    let plan = plan(&cluster.discovery()).unwrap();
    let mut count = 0;
    let error = apply(&plan, &mut |_, _| {
        count += 1;
        Ok(match count {
            1 | 2 => Output { succeeded: true, words: String::new() },
            _ => Output { succeeded: false, words: "sudo: a password is required".into() },
        })
    })
    .unwrap_err();
    assert_eq!((error.done.len(), error.left.len(), count), (2, 3, 3));
    expect![[r#"
        mini-1: `sudo -n route -n change 192.168.200.2 -interface en2 || sudo -n route -n add -host 192.168.200.2 -interface en2` failed: sudo: a password is required
        sudo asks for a password at mini-1: run the commands there by hand, or allow them without one (visudo)
        done before that: mini-1: sudo -n ifconfig bridge0 down; mini-1: sudo -n ifconfig en2 inet 192.168.200.1 netmask 255.255.255.252
        not done: mini-2: sudo -n ifconfig bridge0 down; mini-2: sudo -n ifconfig en2 inet 192.168.200.2 netmask 255.255.255.252; mini-2: sudo -n route -n change 192.168.200.1 -interface en2 || sudo -n route -n add -host 192.168.200.1 -interface en2
        once that is mended, the same command does what is left and nothing twice"#]].assert_eq(&format!("{error}\n{}", error.hints().join("\n")));
    let unreachable = |host: &str| GatherError::Unreachable { host: host.into(), words: "no route".into() };
    let error = apply(&plan, &mut |host, _| Err(unreachable(host))).unwrap_err();
    assert!(error.words.contains("no route") && error.done.is_empty());
}

#[test]
fn nothing_for_linux_and_strangers() {
    let facts = ExampleCluster::new(1, &[]).facts();
    assert_eq!(plan(&Discovery::new(facts.into_iter().map(Ok).collect())).unwrap().steps, []);
    assert_eq!(plan(&Discovery::new(vec![])).unwrap_err(), SetupError::NoHosts);
    let twice = [ExampleCluster::new(1, &[]).facts(), ExampleCluster::new(1, &[]).facts()].concat();
    assert!(matches!(plan(&Discovery::new(twice.into_iter().map(Ok).collect())), Err(SetupError::SameMachine(..))));
}

#[test]
fn a_run_that_stopped_goes_on_with_the_same_addresses() {
    let cluster = ExampleCluster::mesh_of_four();
    let first = plan(&cluster.discovery()).unwrap();
    for stop in 0..first.steps.len() {
        let mut half = cluster.clone();
        let mut left = stop;
        let refused = Output { succeeded: false, words: "no".into() };
        let error = apply(&first, &mut |host, command| {
            left = left.checked_sub(1).unwrap_or(usize::MAX);
            Ok(if left == usize::MAX { refused.clone() } else { half.run(host, command) })
        });
        assert_eq!(error.unwrap_err().done.len(), stop);
        let second = plan(&half.discovery()).unwrap();
        apply(&second, &mut |host, command| Ok(half.run(host, command))).unwrap();
        assert!(second.steps.len() <= first.steps.len() && plan(&half.discovery()).unwrap().steps.is_empty());
        let mut whole = cluster.clone();
        apply(&first, &mut |host, command| Ok(whole.run(host, command))).unwrap();
        assert_eq!(half.addresses, whole.addresses, "stopped before step {stop}");
    }
}

/// The form of `netstat -rn -f inet` of macOS.
#[test]
fn a_route_through_another_interface_is_changed() {
    let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
    let first = plan(&cluster.discovery()).unwrap();
    apply(&first, &mut |host, command| Ok(cluster.run(host, command))).unwrap();
    let mut facts = cluster.facts();
    let mut steps = |through: &str| {
        let table = format!(
            "Routing tables\n\nInternet:\nDestination        Gateway            Flags               Netif Expire\n\
             default            192.0.2.1          UGScg                 en1       \n\
             192.168.1          link#25            UCS                   en1      !\n\
             192.168.200.2/32   link#11            UCS                   {through}      !\n"
        );
        let mut sections = cluster.sections(0);
        sections.push(("routes", table));
        let sections: Vec<(&str, &str)> = sections.iter().map(|(name, text)| (*name, text.as_str())).collect();
        facts[0] = Facts::from_transcript("mini-1", &finetune_launch::Transcript::of(&sections), 0.0);
        plan(&Discovery::new(facts.clone().into_iter().map(Ok).collect())).unwrap().steps
    };
    assert_eq!(steps("en2"), []);
    let changed = steps("en0");
    assert_eq!(changed.len(), 1);
    assert!(changed[0].command.contains("change 192.168.200.2 -interface en2"), "{changed:?}");
}

/// Switching RDMA on in Recovery does nothing for Thunderbolt 4: no user is sent there (jundot/omlx
/// issue 3037).
#[test]
fn thunderbolt_4_is_not_sent_to_recovery() {
    let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
    (cluster.rdma, cluster.gigabits) = (vec![false; 2], 40);
    assert!(!text(&plan(&cluster.discovery()).unwrap()).contains("rdma_ctl"));
    cluster.gigabits = 80;
    assert_eq!(text(&plan(&cluster.discovery()).unwrap()).matches("rdma_ctl").count(), 2);
}
