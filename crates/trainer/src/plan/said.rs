//! What a plan has to say besides its numbers.

use finetune_recipe::{BackendChoice, PlacementChoice, Recipe, StagesChoice};

use super::{Machines, Way};
use crate::load::Load;
use crate::numbers::counted;

/// What is assumed of machines that hold a model together, if nothing says how they are cabled. Two are a ring and a
/// chain.
pub(super) fn assumed_ring(recipe: &Recipe, machines: &Machines, ways: &[Way]) -> Option<String> {
    let has_cables = machines.cables.is_some() && recipe.distributed.backend != BackendChoice::Tcp;
    let is_said = has_cables || recipe.parallel.placement != PlacementChoice::Auto;
    (!is_said && ways.iter().any(|way| way.stages > 2)).then(|| {
        "no cables are named, so the last machine is taken to reach the first one as it does its neighbour; where \
         ordinary cables lead from each machine to the next one only, add --set parallel.placement=contiguous, or wave \
         for layers from disks (docs/big-models.md)"
            .to_owned()
    })
}

/// What the recipe says of ranks and no way can have. `not_spread`: why machines cannot hold the model together.
pub(super) fn passed_over(recipe: &Recipe, machines: &Machines, not_spread: Option<String>) -> Vec<String> {
    let hosts = machines.hosts;
    let mut said = Vec::new();
    if let StagesChoice::Count(stages @ 2..) = recipe.parallel.stages {
        let layers = &recipe.parallel.layers;
        let layers = if layers.is_empty() { String::new() } else { format!(" with parallel.layers = {layers:?}") };
        let what = format!("parallel.stages = {stages}{layers}");
        match not_spread {
            Some(why) => said.push(format!("{what} is in no way below, and `run` refuses it: {why}")),
            None if !hosts.is_multiple_of(stages) => said.push(format!(
                "{what} is in no way below, as the number of machines, {hosts}, is no multiple of {stages} (`run` \
                 refuses it); --hosts {stages} plans it"
            )),
            None => {}
        }
    }
    if let Some(shares) = recipe.distributed.virtual_ranks.filter(|shares| !shares.is_multiple_of(hosts)) {
        let there = counted(hosts as u64, "machine");
        said.push(format!(
            "distributed.virtual_ranks = {shares} cannot be shared out evenly among {there} with a model each: such \
             ways are left out"
        ));
    }
    said
}

/// What to say if other programs had the processor since `before`, while rates were measured.
pub(super) fn other_load(before: Load) -> Option<String> {
    let waited = before.others_since()?;
    Some(format!(
        "other programs had the processor for {:.0} % of the time in which its rates were measured: seconds are longer \
         than without them; `plan` again when it is free",
        100.0 * waited
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_recipe::test_recipe;

    fn machines(hosts: usize) -> Machines {
        Machines {
            hosts,
            names: Vec::new(),
            memory: None,
            memory_of_each: Vec::new(),
            disk: 1.0,
            link: 1.0,
            cables: None,
            assumed: Vec::new(),
        }
    }

    /// (keys, machines, why the model cannot be spread, words of what is said)
    #[test]
    fn what_no_way_has_is_named() {
        for (keys, hosts, not_spread, want) in [
            ("", 4, None, &[][..]),
            ("[parallel]\nstages = 2\n", 4, None, &[]),
            (
                "[parallel]\nstages = 3\n",
                4,
                None,
                &["parallel.stages = 3 is in no way below, as the number of machines, 4,"],
            ),
            ("[parallel]\nstages = 3\n", 1, None, &["the number of machines, 1, is no multiple of 3"]),
            (
                "[parallel]\nstages = 3\nlayers = [1, 2, 3]\n",
                4,
                None,
                &["parallel.stages = 3 with parallel.layers = [1, 2, 3] is in no way below"],
            ),
            (
                "[parallel]\nstages = 2\n",
                2,
                Some("no reason"),
                &["parallel.stages = 2 is in no way below, and `run` refuses it: no reason"],
            ),
            ("[parallel]\nstages = \"auto\"\n", 3, Some("no reason"), &[]),
            ("[distributed]\nvirtual_ranks = 4\n", 2, None, &[]),
            ("[distributed]\nvirtual_ranks = 3\n", 2, None, &["distributed.virtual_ranks = 3"]),
        ] {
            let said = passed_over(&test_recipe(keys), &machines(hosts), not_spread.map(str::to_owned));
            assert_eq!(said.len(), want.len(), "{keys} {hosts}: {said:?}");
            assert!(said.iter().zip(want).all(|(said, want)| said.contains(want)), "{keys} {hosts}: {said:?}");
        }
    }
}
