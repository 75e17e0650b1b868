//! The examples of docs/cluster.md are what the program prints.

use crate::doctor::{Expected, examine};
use crate::example_cluster::ExampleCluster;

/// Whether the page has a text as a block of its own.
fn shown(text: &str) {
    let page = include_str!("../../../../docs/cluster.md");
    assert!(page.contains(&format!("\n{}\n```\n", text.trim_end())), "docs/cluster.md lacks this, as it is:\n{text}");
}

#[test]
fn examples() {
    let mut cluster = ExampleCluster::mesh_of_four();
    cluster.cables.retain(|cable| *cable != [(0, 0), (1, 0)]);
    let discovery = cluster.discovery();
    shown(&crate::diagram::text(&discovery));
    shown(&discovery.sentences().join("\n"));
    shown(&discovery.proposal().unwrap().hostfile.to_json());

    let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 1)]]);
    cluster.rdma[1] = false;
    shown(&crate::setup::text(&crate::setup::plan(&cluster.discovery()).unwrap()));

    let mut cluster = ExampleCluster::new(2, &[[(0, 0), (1, 0)]]);
    cluster.rdma[1] = false;
    shown(&crate::doctor::text(&examine(&cluster.discovery(), &Expected::default()), false));
}
