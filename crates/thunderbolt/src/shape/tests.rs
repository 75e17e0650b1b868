//! Meshes, rings, lines and pieces.

use super::*;

fn counts(hosts: usize, cables: &[(usize, usize)]) -> Vec<Vec<usize>> {
    let mut counts = vec![vec![0; hosts]; hosts];
    for &(i, j) in cables {
        counts[i][j] += 1;
        counts[j][i] += 1;
    }
    counts
}

fn mesh(hosts: usize) -> Vec<(usize, usize)> {
    (0..hosts).flat_map(|i| (i + 1..hosts).map(move |j| (i, j))).collect()
}

#[test]
fn forms() {
    let form = |hosts, cables: &[(usize, usize)]| Shape::new(&counts(hosts, cables)).form();
    assert_eq!(form(1, &[]), Some(Form::Alone));
    assert_eq!(form(2, &[(0, 1)]), Some(Form::Mesh));
    assert_eq!(form(2, &[(0, 1), (0, 1)]), Some(Form::Mesh));
    assert_eq!(form(2, &[]), None);
    assert_eq!(form(3, &mesh(3)), Some(Form::Mesh));
    assert_eq!(form(4, &mesh(4)), Some(Form::Mesh));
    assert_eq!(form(4, &[(0, 1), (1, 2), (2, 3), (3, 0)]), Some(Form::Ring));
    // A ring with a chord is a ring: the chord is for other things.
    assert_eq!(form(4, &[(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)]), Some(Form::Ring));
    assert_eq!(form(4, &[(0, 1), (1, 2), (2, 3)]), Some(Form::Line));
    assert_eq!(form(4, &[(0, 1), (0, 2), (0, 3)]), Some(Form::Other));
    assert_eq!(form(5, &[(0, 1), (1, 2), (2, 0), (3, 4)]), None);
}

#[test]
fn apples_five_node_ring() {
    // TN3205: 1–2, 1–3, 2–4, 4–5, 5–3, counted from 1.
    let shape = Shape::new(&counts(5, &[(0, 1), (0, 2), (1, 3), (3, 4), (4, 2)]));
    assert_eq!(shape.form(), Some(Form::Ring));
    assert_eq!(shape.ring, Ring { order: vec![0, 1, 3, 4, 2], missing: vec![], exact: true });
    assert_eq!(shape.missing_for_mesh.len(), 5);
    assert!(shape.is_ring() && !shape.is_mesh());
}

#[test]
fn missing_cables_are_named() {
    let mut cables = mesh(4);
    cables.retain(|&pair| pair != (1, 3));
    let shape = Shape::new(&counts(4, &cables));
    assert_eq!((shape.missing_for_mesh.clone(), shape.is_ring()), (vec![(1, 3)], true));

    let line = Shape::new(&counts(4, &[(2, 0), (0, 3), (3, 1)]));
    assert_eq!(line.parts, [Part { hosts: vec![1, 3, 0, 2], form: Form::Line }]);
    assert_eq!(line.ring.missing, [(2, 1)]);

    let pieces = Shape::new(&counts(6, &[(0, 1), (1, 2), (2, 0), (3, 4)]));
    let forms: Vec<_> = pieces.parts.iter().map(|part| (part.hosts.clone(), part.form)).collect();
    assert_eq!(forms, [(vec![0, 1, 2], Form::Mesh), (vec![3, 4], Form::Mesh), (vec![5], Form::Alone)]);
    assert_eq!(pieces.ring.missing.len(), 3);
}

#[test]
fn few_hosts() {
    assert_eq!(Shape::new(&counts(2, &[])).ring.missing, [(0, 1)]);
    assert_eq!(Shape::new(&counts(1, &[])).ring.missing, []);
    assert_eq!(Shape::new(&counts(3, &[(0, 1)])).ring.missing.len(), 2);
}

/// Rings whose hosts stand in the list in any order are found; the order of ranks makes neighbours
/// adjacent.
#[test]
fn shuffled_rings() {
    let mut state = 7u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for hosts in 3..=20 {
        for _ in 0..10 {
            let mut order: Vec<usize> = (0..hosts).collect();
            for last in (1..hosts).rev() {
                order.swap(last, random(last + 1));
            }
            let cables: Vec<_> = (0..hosts).map(|step| (order[step], order[(step + 1) % hosts])).collect();
            let counts = counts(hosts, &cables);
            let ring = Shape::new(&counts).ring;
            assert_eq!(ring.order[0], 0);
            let mut sorted = ring.order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..hosts).collect::<Vec<_>>());
            assert!(ring.missing.is_empty() && ring.exact, "{hosts} hosts, {order:?}: {ring:?}");
        }
    }
}

#[test]
fn large_clusters_are_quick() {
    let began = std::time::Instant::now();
    for hosts in [13, 64, 256] {
        let shape = Shape::new(&counts(hosts, &[]));
        assert_eq!(shape.ring.missing.len(), hosts);
        assert_eq!(Shape::new(&counts(hosts, &mesh(hosts))).form(), Some(Form::Mesh));
    }
    assert!(began.elapsed().as_secs() < 60);
}
