//! Pictures of a small cluster.

use expect_test::expect;

use super::*;
use crate::example_cluster::ExampleCluster;

fn ring_with_a_missing_cable() -> Discovery {
    let mut cluster = ExampleCluster::new(3, &[[(0, 0), (1, 0)], [(1, 1), (2, 0)], [(1, 2), (2, 1)]]);
    cluster.rdma[2] = false;
    cluster.discovery()
}

#[test]
fn graphviz() {
    expect![[r#"
        graph cluster {
          node [shape=rectangle];
          h0 [label="mini-1\nApple M4 Pro"];
          h1 [label="mini-2\nApple M4 Pro"];
          h2 [label="mini-3\nApple M4 Pro"];
          h0 -- h1 [label="en2/en2, 80 Gb/s"];
          h1 -- h2 [label="en3/en2, 80 Gb/s"];
          h1 -- h2 [label="en4/en3, 80 Gb/s"];
          h2 -- h0 [style=dashed, color=red, label="missing"];
        }
    "#]]
    .assert_eq(&dot(&ring_with_a_missing_cable()));
}

#[test]
fn terminal() {
    expect![[r#"
        mini-1: Mac16,11, Apple M4 Pro, macOS 26.5.1 (25F80)
          Thunderbolt 1  en2  ══ 80 Gb/s ══ mini-2 en2
          Thunderbolt 2  en3  free
          Thunderbolt 3  en4  free
        mini-2: Mac16,11, Apple M4 Pro, macOS 26.5.1 (25F80)
          Thunderbolt 1  en2  ══ 80 Gb/s ══ mini-1 en2
          Thunderbolt 2  en3  ══ 80 Gb/s ══ mini-3 en2
          Thunderbolt 3  en4  ══ 80 Gb/s ══ mini-3 en3
        mini-3: Mac16,11, Apple M4 Pro, macOS 26.5.1 (25F80)
          Thunderbolt 1  en2  ══ 80 Gb/s ══ mini-2 en3
          Thunderbolt 2  en3  ══ 80 Gb/s ══ mini-2 en4
          Thunderbolt 3  en4  free

                mini-1  mini-2   mini-3
        mini-1  ·       en2      -
        mini-2  en2     ·        en3,en4
        mini-3  -       en2,en3  ·
    "#]]
    .assert_eq(&text(&ring_with_a_missing_cable()));
    expect![[r#"
        mini-1: Mac16,11, Apple M4 Pro, macOS 26.5.1 (25F80)
          Thunderbolt 1  en2  ══ 80 Gb/s ══ mini-2 en2
          Thunderbolt 2  en3  ══ 80 Gb/s ══ mini-3 en2
          Thunderbolt 3  en4  ══ 80 Gb/s ══ mini-4 en2
        mini-2: Mac16,11, Apple M4 Pro, macOS 26.5.1 (25F80)
          Thunderbolt 1  en2  ══ 80 Gb/s ══ mini-1 en2
          Thunderbolt 2  en3  ══ 80 Gb/s ══ mini-3 en3
          Thunderbolt 3  en4  ══ 80 Gb/s ══ mini-4 en3
        mini-3: Mac16,11, Apple M4 Pro, macOS 26.5.1 (25F80)
          Thunderbolt 1  en2  ══ 80 Gb/s ══ mini-1 en3
          Thunderbolt 2  en3  ══ 80 Gb/s ══ mini-2 en3
          Thunderbolt 3  en4  ══ 80 Gb/s ══ mini-4 en4
        mini-4: Mac16,11, Apple M4 Pro, macOS 26.5.1 (25F80)
          Thunderbolt 1  en2  ══ 80 Gb/s ══ mini-1 en4
          Thunderbolt 2  en3  ══ 80 Gb/s ══ mini-2 en4
          Thunderbolt 3  en4  ══ 80 Gb/s ══ mini-3 en4

                mini-1  mini-2  mini-3  mini-4
        mini-1  ·       en2     en3     en4
        mini-2  en2     ·       en3     en4
        mini-3  en2     en3     ·       en4
        mini-4  en2     en3     en4     ·
    "#]]
    .assert_eq(&text(&ExampleCluster::mesh_of_four().discovery()));
}

#[test]
fn drawing() {
    let drawing = svg(&ring_with_a_missing_cable());
    assert!(drawing.starts_with("<svg xmlns=") && drawing.ends_with("</svg>\n"));
    assert_eq!(drawing.matches("class=\"cable\"").count(), 3);
    assert_eq!(drawing.matches("class=\"missing\"").count(), 1);
    assert!(drawing.contains("en3/en2, 80 Gb/s") && drawing.contains("mini-3"));
}

/// The name of a host comes from the user, that of a chip from the host: neither breaks out of a
/// picture.
#[test]
fn names_are_escaped() {
    let mut discovery = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]).discovery();
    discovery.hosts[0].host = "a\"<b>&".into();
    discovery.hosts[1].chip = Some("x\\\"; evil".into());
    assert!(svg(&discovery).contains("a&quot;&lt;b&gt;&amp;"));
    let graph = dot(&discovery);
    assert!(graph.contains(r#"a\"<b>&"#) && graph.contains(r#"x\\\"; evil"#), "{graph}");
}
