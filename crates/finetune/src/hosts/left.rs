//! Whether the hosts that are left are enough to go on.

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

#[cfg(test)]
mod tests {
    use super::too_few;

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
