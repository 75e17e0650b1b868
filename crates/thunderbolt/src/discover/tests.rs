//! What is said of clusters, and the hostfiles that they get.

use expect_test::{Expect, expect};
use finetune_allreduce::Shape;
use finetune_launch::Transcript;

use super::*;
use crate::example_cluster::ExampleCluster;

fn check(discovery: &Discovery, expected: &Expect) {
    let proposal = discovery.proposal().unwrap();
    let notes: String = proposal.notes.iter().map(|note| format!("note: {note}\n")).collect();
    expected.assert_eq(&format!("{}\n{notes}{}", discovery.sentences().join("\n"), proposal.hostfile.to_json()));
    finetune_rendezvous::Hostfile::parse(&proposal.hostfile.to_json()).unwrap().devices().unwrap();
}

#[test]
fn mesh_of_four() {
    check(
        &ExampleCluster::mesh_of_four().discovery(),
        &expect![[r#"
        The 4 hosts form a mesh: every two of them have a cable.
        {
          "backend": "jaccl",
          "envs": [],
          "hosts": [
            {"ssh":"mini-1","ips":["192.168.1.11"],"rdma":[null,"rdma_en2","rdma_en3","rdma_en4"]},
            {"ssh":"mini-2","ips":["192.168.1.12"],"rdma":["rdma_en2",null,"rdma_en3","rdma_en4"]},
            {"ssh":"mini-3","ips":["192.168.1.13"],"rdma":["rdma_en2","rdma_en3",null,"rdma_en4"]},
            {"ssh":"mini-4","ips":["192.168.1.14"],"rdma":["rdma_en2","rdma_en3","rdma_en4",null]}
          ]
        }
    "#]],
    );
}

#[test]
fn a_mesh_with_a_missing_cable_is_a_ring_in_rank_order() {
    let mut cluster = ExampleCluster::mesh_of_four();
    cluster.cables.retain(|cable| *cable != [(0, 0), (1, 0)]);
    let discovery = cluster.discovery();
    check(
        &discovery,
        &expect![[r#"
        The 4 hosts form a ring: mini-1 – mini-3 – mini-2 – mini-4 – mini-1.
        For a mesh a cable between mini-1 and mini-2 is missing.
        note: cables that are not part of the ring, or more than its thinnest place has, are not used
        {
          "backend": "jaccl-ring",
          "envs": [],
          "hosts": [
            {"ssh":"mini-1","ips":["192.168.1.11"],"rdma":[null,"rdma_en3",null,"rdma_en4"]},
            {"ssh":"mini-3","ips":["192.168.1.13"],"rdma":["rdma_en2",null,"rdma_en3",null]},
            {"ssh":"mini-2","ips":["192.168.1.12"],"rdma":[null,"rdma_en3",null,"rdma_en4"]},
            {"ssh":"mini-4","ips":["192.168.1.14"],"rdma":["rdma_en2",null,"rdma_en3",null]}
          ]
        }
    "#]],
    );
    let hostfile = discovery.proposal().unwrap().hostfile;
    assert_eq!(hostfile.devices().unwrap().unwrap().shape(), Shape::Ring);
}

#[test]
fn apples_ring_of_five() {
    let discovery = ExampleCluster::ring_of_five().discovery();
    check(
        &discovery,
        &expect![[r#"
            The 5 hosts form a ring: mini-1 – mini-2 – mini-4 – mini-5 – mini-3 – mini-1.
            A mesh of 5 hosts is out of reach: it takes 4 Thunderbolt ports at each, mini-1 has 3.
            {
              "backend": "jaccl-ring",
              "envs": [],
              "hosts": [
                {"ssh":"mini-1","ips":["192.168.1.11"],"rdma":[null,"rdma_en2",null,null,"rdma_en4"]},
                {"ssh":"mini-2","ips":["192.168.1.12"],"rdma":["rdma_en2",null,"rdma_en4",null,null]},
                {"ssh":"mini-4","ips":["192.168.1.14"],"rdma":[null,"rdma_en2",null,"rdma_en4",null]},
                {"ssh":"mini-5","ips":["192.168.1.15"],"rdma":[null,null,"rdma_en4",null,"rdma_en2"]},
                {"ssh":"mini-3","ips":["192.168.1.13"],"rdma":["rdma_en2",null,null,"rdma_en4",null]}
              ]
            }
        "#]],
    );
}

#[test]
fn a_line() {
    let mut cluster = ExampleCluster::ring_of_five();
    cluster.cables.pop();
    let discovery = cluster.discovery();
    check(
        &discovery,
        &expect![[r#"
            The 5 hosts form a line: mini-3 – mini-1 – mini-2 – mini-4 – mini-5.
            For a ring (mini-1 – mini-2 – mini-4 – mini-5 – mini-3) a cable between mini-3 and mini-5 is missing.
            A mesh of 5 hosts is out of reach: it takes 4 Thunderbolt ports at each, mini-1 has 3.
            note: the cables form a chain: sums over all hosts go over TCP, and layers that are spread over hosts (parallel.stages) have hops between neighbours only; rank 0 is mini-3, at an end of it
            {
              "backend": "ring",
              "envs": [],
              "hosts": [
                {"ssh":"mini-3","ips":["192.168.1.13"],"rdma":[null,"rdma_en2",null,null,null]},
                {"ssh":"mini-1","ips":["192.168.1.11"],"rdma":["rdma_en4",null,"rdma_en2",null,null]},
                {"ssh":"mini-2","ips":["192.168.1.12"],"rdma":[null,"rdma_en2",null,"rdma_en4",null]},
                {"ssh":"mini-4","ips":["192.168.1.14"],"rdma":[null,null,"rdma_en2",null,"rdma_en4"]},
                {"ssh":"mini-5","ips":["192.168.1.15"],"rdma":[null,null,null,"rdma_en4",null]}
              ]
            }
        "#]],
    );
    let hostfile = discovery.proposal().unwrap().hostfile;
    assert!(hostfile.devices().unwrap().unwrap().is_chain(5));
}

#[test]
fn two_parts() {
    let cables = [[(0, 0), (1, 0)], [(1, 1), (2, 0)], [(2, 1), (0, 1)], [(3, 0), (4, 0)]];
    check(
        &ExampleCluster::new(6, &cables).discovery(),
        &expect![[r#"
            The 6 hosts are in 3 parts: a mesh of mini-1, mini-2, mini-3; the pair mini-4 – mini-5; mini-6 alone.
            For a ring (mini-1 – mini-2 – mini-3 – mini-4 – mini-5 – mini-6) cables are missing between mini-3 and mini-4; mini-5 and mini-6; mini-1 and mini-6.
            A mesh of 6 hosts is out of reach: it takes 5 Thunderbolt ports at each, mini-1 has 3.
            note: without RDMA between all hosts the ranks talk over TCP
            {
              "backend": "ring",
              "envs": [],
              "hosts": [
                {"ssh":"mini-1","ips":["192.168.1.11"],"rdma":[]},
                {"ssh":"mini-2","ips":["192.168.1.12"],"rdma":[]},
                {"ssh":"mini-3","ips":["192.168.1.13"],"rdma":[]},
                {"ssh":"mini-4","ips":["192.168.1.14"],"rdma":[]},
                {"ssh":"mini-5","ips":["192.168.1.15"],"rdma":[]},
                {"ssh":"mini-6","ips":["192.168.1.16"],"rdma":[]}
              ]
            }
        "#]],
    );
}

#[test]
fn several_cables_keep_their_order() {
    // Crossed: the first port of one leads to the second of the other (exo-explore/exo issue 2160).
    let cluster = ExampleCluster::new(2, &[[(0, 0), (1, 1)], [(0, 1), (1, 0)]]);
    let hostfile = cluster.discovery().proposal().unwrap().hostfile;
    let devices = hostfile.devices().unwrap().unwrap();
    assert_eq!(devices.wires(0, 1), ["rdma_en2", "rdma_en3"]);
    assert_eq!(devices.wires(1, 0), ["rdma_en3", "rdma_en2"]);
}

#[test]
fn a_ring_uses_as_many_cables_as_its_thinnest_place() {
    let mut cluster = ExampleCluster::new(
        4,
        &[[(0, 0), (1, 0)], [(0, 1), (1, 1)], [(1, 2), (2, 0)], [(2, 1), (3, 0)], [(3, 1), (0, 2)]],
    );
    let discovery = cluster.discovery();
    let proposal = discovery.proposal().unwrap();
    assert_eq!(proposal.hostfile.devices().unwrap().unwrap().shape(), Shape::Ring);
    assert!(proposal.notes.iter().any(|note| note.contains("not used")), "{:?}", proposal.notes);
    cluster.cables.remove(1);
    assert!(!cluster.discovery().proposal().unwrap().notes.iter().any(|note| note.contains("not used")));
}

#[test]
fn thunderbolt_4_and_missing_rdma() {
    let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
    cluster.gigabits = 40;
    check(
        &cluster.discovery(),
        &expect![[r#"
        The cable between mini-1 and mini-2 is all that two hosts need.
        note: no RDMA over a cable between mini-1 and mini-2: it runs at 40 Gb/s, as Thunderbolt 4 does; RDMA needs Thunderbolt 5 all the way
        note: without RDMA between all hosts the ranks talk over TCP
        {
          "backend": "ring",
          "envs": [],
          "hosts": [
            {"ssh":"mini-1","ips":["192.168.1.11"],"rdma":[]},
            {"ssh":"mini-2","ips":["192.168.1.12"],"rdma":[]}
          ]
        }
    "#]],
    );
    cluster.gigabits = 80;
    cluster.rdma[1] = false;
    cluster.addresses.insert((0, 0), ("192.168.0.1".parse().unwrap(), 30));
    cluster.addresses.insert((1, 0), ("192.168.0.2".parse().unwrap(), 30));
    check(
        &cluster.discovery(),
        &expect![[r#"
        The cable between mini-1 and mini-2 is all that two hosts need.
        note: no RDMA over a cable between mini-1 and mini-2: mini-2 has no RDMA device rdma_en2
        note: without RDMA between all hosts the ranks talk over TCP
        {
          "backend": "ring",
          "envs": [],
          "hosts": [
            {"ssh":"mini-1","ips":["192.168.0.1"],"rdma":[]},
            {"ssh":"mini-2","ips":["192.168.0.2"],"rdma":[]}
          ]
        }
    "#]],
    );
}

#[test]
fn unreachable_hosts_are_left_out() {
    let facts = ExampleCluster::new(1, &[[(0, 0), (1, 0)]]);
    let mut answers: Vec<_> = facts_of_two(&facts).into_iter().map(Ok).collect();
    answers[1] =
        Err(GatherError::Unreachable { host: "mini-2".into(), words: "Permission denied (publickey).".into() });
    check(
        &Discovery::new(answers),
        &expect![[r#"
        One host: mini-1.
        Thunderbolt 1 (en2) of mini-1 is cabled to a Mac mini that is not in the list (or did not answer).
        note: mini-2 did not answer and is left out
        {
          "backend": "ring",
          "envs": [],
          "hosts": [
            {"ssh":"mini-1","ips":["192.168.1.11"],"rdma":[]}
          ]
        }
    "#]],
    );
    assert!(Discovery::new(vec![]).proposal().is_none());
}

fn facts_of_two(one: &ExampleCluster) -> Vec<Facts> {
    ExampleCluster { hosts: 2, bridge: vec![true; 2], rdma: vec![true; 2], ..one.clone() }.facts()
}

fn linux(name: &str, last: u8, rdma: bool) -> Facts {
    let interfaces = format!(
        "1: lo    inet 127.0.0.1/8 scope host lo\n2: eno1    inet 10.0.0.{last}/24 scope global eno1\n3: ens1    inet 10.9.0.{last}/24 scope global ens1\n\
         4: docker0    inet 172.17.0.1/16 scope global docker0\n"
    );
    let device = format!(
        "device mlx5_0\ninterface ens1\nstate 4: ACTIVE\nrate 100 Gb/sec (4X EDR)\ngid 1 ::ffff:10.9.0.{last}\n"
    );
    let sections = [
        ("system", "Linux 6.12.0 x86_64\n"),
        ("release", "PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\n"),
        (
            "links",
            "eno1 state=up speed=1000 wireless=no\nens1 state=up speed=100000 wireless=no\ndocker0 state=down speed=-1 wireless=no\n",
        ),
        ("interfaces", &interfaces),
        ("infiniband", if rdma { device.as_str() } else { "" }),
        ("library", "libibverbs.so.1\n"),
    ];
    Facts::from_transcript(name, &Transcript::of(&sections), 0.0)
}

#[test]
fn linux_boxes() {
    let discovery = |rdma: bool| {
        Discovery::new(vec![Ok(linux("box-1", 1, true)), Ok(linux("box-2", 2, true)), Ok(linux("box-3", 3, rdma))])
    };
    check(
        &discovery(true),
        &expect![[r#"
        No Thunderbolt cable joins these hosts.
        {
          "backend": "",
          "envs": [],
          "hosts": [
            {"ssh":"box-1","ips":["10.9.0.1"],"rdma":[null,"mlx5_0","mlx5_0"]},
            {"ssh":"box-2","ips":["10.9.0.2"],"rdma":["mlx5_0",null,"mlx5_0"]},
            {"ssh":"box-3","ips":["10.9.0.3"],"rdma":["mlx5_0","mlx5_0",null]}
          ]
        }
    "#]],
    );
    check(
        &discovery(false),
        &expect![[r#"
        No Thunderbolt cable joins these hosts.
        note: no RDMA: no active device of box-1 has an IPv4 address in a network of one of box-3
        note: without RDMA between all hosts the ranks talk over TCP
        {
          "backend": "ring",
          "envs": [],
          "hosts": [
            {"ssh":"box-1","ips":["10.9.0.1"],"rdma":[]},
            {"ssh":"box-2","ips":["10.9.0.2"],"rdma":[]},
            {"ssh":"box-3","ips":["10.9.0.3"],"rdma":[]}
          ]
        }
    "#]],
    );
}

#[test]
fn hosts_without_a_common_network() {
    let mut other = linux("box-2", 2, false);
    other.interfaces.retain(|interface| interface.name == "lo");
    other.way_in = Some("203.0.113.5".parse().unwrap());
    check(
        &Discovery::new(vec![Ok(linux("box-1", 1, false)), Ok(other)]),
        &expect![[r#"
        No Thunderbolt cable joins these hosts.
        note: without RDMA between all hosts the ranks talk over TCP
        note: the hosts share no network: check that each reaches the others' addresses in the hostfile
        {
          "backend": "ring",
          "envs": [],
          "hosts": [
            {"ssh":"box-1","ips":["10.9.0.1"],"rdma":[]},
            {"ssh":"box-2","ips":["203.0.113.5"],"rdma":[]}
          ]
        }
    "#]],
    );
}

#[test]
fn a_mac_and_a_linux_box() {
    let mut answers: Vec<_> = ExampleCluster::new(1, &[]).facts().into_iter().map(Ok).collect();
    answers.push(Ok(linux("box-1", 1, true)));
    check(
        &Discovery::new(answers),
        &expect![[r#"
            No Thunderbolt cable joins these hosts.
            note: without RDMA between all hosts the ranks talk over TCP
            note: the hosts share no network: check that each reaches the others' addresses in the hostfile
            {
              "backend": "ring",
              "envs": [],
              "hosts": [
                {"ssh":"mini-1","ips":["192.168.1.11"],"rdma":[]},
                {"ssh":"box-1","ips":["10.9.0.1"],"rdma":[]}
              ]
            }
        "#]],
    );
}

#[test]
fn a_machine_under_two_names_is_written_down_once() {
    let mut facts = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]).facts();
    let mut again = facts[0].clone();
    again.host = "mini-1.local".to_owned();
    facts.insert(1, again);
    let discovery = Discovery::new(facts.into_iter().map(Ok).collect());
    assert_eq!(discovery.same_machine, [("mini-1".to_owned(), "mini-1.local".to_owned())]);
    assert!(
        discovery
            .sentences()
            .contains(&"mini-1 and mini-1.local are the same machine: mini-1.local is left out.".to_owned())
    );
    let hosts: Vec<String> = discovery.proposal().unwrap().hostfile.hosts.into_iter().map(|host| host.ssh).collect();
    assert_eq!(hosts, ["mini-1", "mini-2"]);

    // Boxes say so of themselves; two that say something else are two.
    let named = |name: &str, identity: &str| {
        let mut facts = linux(name, 1, false);
        facts.identity = finetune_rendezvous::identity::plain(identity);
        Ok(facts)
    };
    let boot = "0b5c8a4e-1111-4222-8333-444455556666";
    let boxes = vec![named("a", boot), named("me@a", boot), named("b", &format!("{boot} net:[7]"))];
    let discovery = Discovery::new(boxes);
    assert_eq!(discovery.same_machine, [("a".to_owned(), "me@a".to_owned())]);
    assert_eq!(discovery.hosts.len(), 2);
}

#[test]
fn a_switch_that_is_off_is_no_rdma() {
    let mut facts = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]).facts();
    facts[1].rdma_enabled = Some(false);
    let proposal = Discovery::new(facts.into_iter().map(Ok).collect()).proposal().unwrap();
    assert!(proposal.hostfile.devices().unwrap().is_none());
    assert!(proposal.notes[0].contains("switched off at mini-2"), "{:?}", proposal.notes);
}

#[test]
fn a_mac_that_did_not_tell_its_ports_was_asked() {
    let mut facts = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]).facts();
    facts[1].ports = None;
    let discovery = Discovery::new(facts.into_iter().map(Ok).collect());
    let told = discovery.sentences().join("\n") + &crate::diagram::text(&discovery);
    assert!(told.contains("perhaps mini-2, which did not tell") && !told.contains("that was not asked"), "{told}");
}
