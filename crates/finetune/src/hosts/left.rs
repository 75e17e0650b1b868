//! Whether the hosts that are left are enough to go on, and in which order they are ranked.

use finetune_allreduce::DeviceMatrix;
use finetune_trainer::numbers::counted;

/// Why a restart cannot go on with `used` of the hosts that are left, and what would let it; `None` if it can.
/// `stages`: the ranks that hold a model together, if the recipe has a number.
pub(super) fn too_few(
    there: usize,
    used: usize,
    at_start: usize,
    min_ranks: Option<usize>,
    stages: Option<usize>,
) -> Option<(String, Vec<String>)> {
    let stages = stages.unwrap_or(1);
    let asked = min_ranks.unwrap_or(at_start);
    let least = asked.max(stages);
    if used >= least {
        return None;
    }
    let mut hints = Vec::new();
    if there > 0 && there < stages {
        hints.push(format!(
            "parallel.stages = \"auto\" lets {} hold all layers, if they have the memory: --resume --set parallel.stages=auto goes on",
            counted(there as u64, "rank")
        ));
    }
    if there < asked {
        hints.push("distributed.min_ranks in the recipe lets a restart go on with fewer".to_owned());
    }
    let holds = if there < stages { ", which hold a model together" } else { "" };
    Some((format!("hosts left: {there} of {at_start}; the recipe needs {least} ranks{holds}"), hints))
}

/// The places in the hostfile of the hosts that are left, in the order of the new ranks. The first one stays the first:
/// it has the run. Each next one is cabled to the one before if one of them is, so that a ring without one of its hosts
/// is a chain.
pub(super) fn by_cables(left: &[usize], cables: &DeviceMatrix) -> Vec<usize> {
    let is_cabled = |a: usize, b: usize| !cables.wires(a, b).is_empty() && !cables.wires(b, a).is_empty();
    let (mut rest, mut order) = (left.to_vec(), Vec::with_capacity(left.len()));
    while !rest.is_empty() {
        let last = order.last().copied();
        let next = last.and_then(|last| rest.iter().position(|place| is_cabled(last, *place)));
        order.push(rest.remove(next.unwrap_or(0)));
    }
    order
}

#[cfg(test)]
mod tests {
    use finetune_allreduce::{DeviceMatrix, Shape};

    use super::super::{Hosts, Machine, Report};
    use super::{by_cables, too_few};

    /// Cables between these pairs of so many hosts.
    fn cables(hosts: usize, pairs: &[(usize, usize)]) -> DeviceMatrix {
        let device = |a: usize, b: usize| match pairs.contains(&(a, b)) || pairs.contains(&(b, a)) {
            true => vec![format!("rdma_en{b}")],
            false => Vec::new(),
        };
        let row = |a: usize| (0..hosts).map(|b| device(a, b)).collect();
        DeviceMatrix::new((0..hosts).map(row).collect()).expect("a matrix")
    }

    /// (hosts that are left of a ring of five, the order of their ranks)
    #[test]
    fn hosts_that_are_left_are_ranked_as_they_are_cabled() {
        let ring = cables(5, &[(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)]);
        for (left, order) in [
            (&[0, 1, 2, 3, 4][..], &[0, 1, 2, 3, 4][..]),
            (&[0, 1, 2, 3], &[0, 1, 2, 3]),
            (&[1, 2, 3, 4], &[1, 2, 3, 4]),
            // The other way round.
            (&[0, 2, 3, 4], &[0, 4, 3, 2]),
            // The host with the run is in the middle of what is left.
            (&[0, 1, 3, 4], &[0, 1, 3, 4]),
            (&[0, 3], &[0, 3]),
            (&[], &[]),
        ] {
            assert_eq!(by_cables(left, &ring), order, "{left:?}");
        }
        let mesh = cables(4, &[(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]);
        assert_eq!(by_cables(&[0, 2, 3], &mesh), [0, 2, 3]);
    }

    /// Ranks have the devices between their own hosts, whichever are lost and however many take part.
    #[test]
    fn hosts_that_are_left_keep_their_cables() {
        let mesh = cables(4, &[(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]);
        let ring = cables(4, &[(0, 1), (1, 2), (2, 3), (3, 0)]);
        for (devices, left, used, shape, first_row) in [
            (&mesh, &[0, 1, 2, 3][..], 4, Shape::Mesh, r#"[null,"rdma_en1","rdma_en2","rdma_en3"]"#),
            (&mesh, &[0, 2, 3], 3, Shape::Mesh, r#"[null,"rdma_en2","rdma_en3"]"#),
            (&mesh, &[1, 2, 3], 2, Shape::Mesh, r#"[null,"rdma_en2"]"#),
            (&ring, &[0, 1, 2], 3, Shape::Neither, r#"[null,"rdma_en1",null]"#),
            (&ring, &[0, 3], 2, Shape::Mesh, r#"[null,"rdma_en3"]"#),
        ] {
            let machine = |place: &usize| Machine {
                place: *place,
                name: format!("host-{place}"),
                remote: None,
                addresses: Vec::new(),
                report: Report::default(),
            };
            let hosts = Hosts {
                machines: left.iter().map(machine).collect(),
                used,
                file: None,
                devices: Some(devices.clone()),
                at_start: 4,
                address: None,
                ports: None,
                copied_run: None,
            };
            let found = hosts.devices().expect("devices");
            assert_eq!((found.world(), found.shape()), (used, shape), "{left:?}");
            assert!(found.to_json().starts_with(&format!("[{first_row}")), "{left:?}: {}", found.to_json());
        }
    }

    /// (hosts left, hosts used, hosts at the start, min_ranks, stages, words of the hints)
    #[test]
    fn a_restart_says_what_would_let_it_go_on() {
        let (auto, fewer) = ("parallel.stages", "distributed.min_ranks");
        for (there, used, at_start, min_ranks, stages, want) in [
            (3, 3, 3, None, Some(3), None),
            (2, 2, 3, Some(2), None, None),
            (3, 2, 4, Some(2), Some(2), None),
            (2, 2, 3, None, None, Some(vec![fewer])),
            // Fewer than hold a model together: fewer ranks alone would not help.
            (2, 0, 3, Some(1), Some(3), Some(vec![auto])),
            (2, 0, 3, None, Some(3), Some(vec![auto, fewer])),
            // Two of the three that are left would do.
            (3, 2, 4, None, Some(2), Some(vec![fewer])),
            (1, 0, 2, Some(2), Some(2), Some(vec![auto, fewer])),
        ] {
            let got = too_few(there, used, at_start, min_ranks, stages);
            let what = format!("{there} of {at_start}, {min_ranks:?}, {stages:?}: {got:?}");
            match (got, want) {
                (None, None) => {}
                (Some((fact, hints)), Some(want)) => {
                    assert!(fact.starts_with(&format!("hosts left: {there} of {at_start}")), "{what}");
                    assert_eq!(hints.len(), want.len(), "{what}");
                    assert!(hints.iter().zip(want).all(|(hint, want)| hint.starts_with(want)), "{what}");
                }
                _ => panic!("{what}"),
            }
        }
    }
}
