//! What ranks send each other of what they learn: gradients each step, or averages now and then.

use finetune_model::FloatType;
use finetune_recipe::{Distributed, DtypeChoice, Recipe, SharesChoice, WireChoice};

use super::{Machines, RankNeed, Way};
use crate::local_steps::Meetings;

/// The part of a step from which on waiting for the link is worth a hint.
const SLOW: f64 = 0.1;
/// The same in seconds, if the time of a step is not known.
const SLOW_SECONDS: f64 = 1.0;
/// Steps between two averages that a hint proposes, and the most.
const LOCAL_STEPS: u64 = 20;
const MOST_LOCAL_STEPS: u64 = 500;

/// The word for what gradients are on the way.
pub(super) fn wire(recipe: &Recipe) -> &'static str {
    if Meetings::of(recipe).is_some() { WireChoice::F32.as_str() } else { choice(recipe).as_str() }
}

fn choice(recipe: &Recipe) -> WireChoice {
    recipe.distributed.wire.unwrap_or(WireChoice::F32)
}

/// Steps from one exchange to the next.
pub(super) fn sync_every(recipe: &Recipe) -> u64 {
    Meetings::of(recipe).map_or(1, |meetings| meetings.every)
}

/// Shares of a step that each of `replicas` models has.
pub(super) fn shares(recipe: &Recipe, replicas: usize) -> usize {
    recipe.distributed.virtual_ranks.map_or(1, |shares| shares.div_ceil(replicas))
}

/// Trained values of the rank that has most. Ranks that hold a model together have those of their layers each.
pub(super) fn most_trained(ranks: &[RankNeed]) -> u64 {
    ranks.iter().map(|rank| rank.trained).max().unwrap_or(0)
}

/// Bytes that a rank sends in a step of what is learned about its so many values: on average, if ranks make steps alone.
/// It adds them up with the ranks of other models that have the same, of `replicas` models one each.
pub(super) fn sent(recipe: &Recipe, trained: u64, replicas: usize) -> u64 {
    let (models, shares) = (replicas as u128, shares(recipe, replicas) as u128);
    // Each rank adds up a part of the values: it is sent that part of all shares, and sends the sum to all others.
    let vector = |bytes: usize| {
        let whole = bytes as u128 * u128::from(trained) * (shares + 1);
        whole / models * (models - 1) + whole % models * (models - 1) / models
    };
    let all = match Meetings::of(recipe) {
        // Parameters and both moments. Nothing is rounded on the way.
        Some(meetings) => 3 * vector(FloatType::F32.bytes()) / u128::from(meetings.every),
        None if choice(recipe) == WireChoice::Bf16 => vector(FloatType::BF16.bytes()),
        None => vector(FloatType::F32.bytes()),
    };
    u64::try_from(all).unwrap_or(u64::MAX)
}

/// What lets a way wait less for a slow link, the least change first, with the time that it takes.
pub(super) fn hints(recipe: &Recipe, machines: &Machines, way: &Way) -> Vec<String> {
    let is_slow = match way.seconds {
        Some(seconds) => way.sending_seconds > SLOW * seconds,
        None => way.sending_seconds > SLOW_SECONDS,
    };
    if !is_slow {
        return Vec::new();
    }
    let (replicas, trained) = (machines.hosts / way.stages, most_trained(&way.ranks));
    let sending = |distributed: Distributed| {
        let recipe = Recipe { distributed, ..recipe.clone() };
        sent(&recipe, trained, replicas) as f64 / machines.link
    };
    let instead = |sending: f64| match way.seconds {
        Some(seconds) => {
            format!("about {} s a step instead of {}", shown(seconds - way.sending_seconds + sending), shown(seconds))
        }
        None => format!("{} s of a step for sending instead of {}", shown(sending), shown(way.sending_seconds)),
    };
    let mut hints = Vec::new();
    let Distributed { virtual_ranks, shares, wire, .. } = recipe.distributed;
    // Ranks that hold a model together make each step together.
    let every = if way.stages == 1 { sync_every(recipe) } else { 1 };
    if every == 1 && virtual_ranks.is_none() && wire != Some(WireChoice::Bf16) {
        let narrow = Distributed { wire: Some(WireChoice::Bf16), sync_every: None, ..recipe.distributed.clone() };
        hints
            .push(format!("distributed.wire = \"bf16\": {}, half of the bytes of gradients", instead(sending(narrow))));
    }
    let can_be_alone = way.stages == 1 && shares != SharesChoice::Measured && recipe.model.dtype != DtypeChoice::F16;
    let more = if every == 1 { LOCAL_STEPS } else { every.saturating_mul(2) };
    if can_be_alone && more <= MOST_LOCAL_STEPS {
        let alone = Distributed { sync_every: Some(more), ..recipe.distributed.clone() };
        hints.push(format!(
            "distributed.sync_every = {more}: {}, in another run than one that makes every step together \
             (docs/slow-networks.md)",
            instead(sending(alone))
        ));
    }
    hints
}

fn shown(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.2}") } else { format!("{seconds:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_recipe::test_recipe;

    /// (keys, models, bytes that a rank sends of 1,000 values)
    #[test]
    fn bytes_of_gradients_and_averages() {
        for (keys, replicas, bytes) in [
            ("", 1, 0),
            // All but its own part, and that part to all others.
            ("", 2, 4000),
            ("", 4, 6000),
            ("[distributed]\nwire = \"bf16\"\n", 4, 3000),
            ("[distributed]\nsync_every = 1\n", 4, 6000),
            // Three vectors every ten steps, which no wire rounds.
            ("[distributed]\nsync_every = 10\n", 2, 1200),
            ("[distributed]\nsync_every = 10\nwire = \"bf16\"\n", 2, 1200),
            ("[distributed]\nsync_every = 10\n", 1, 0),
            // Two shares of each of two ranks go one by one.
            ("[distributed]\nvirtual_ranks = 4\n", 2, 6000),
        ] {
            assert_eq!(sent(&test_recipe(keys), 1000, replicas), bytes, "{keys} {replicas}");
        }
        assert_eq!(sent(&test_recipe(""), u64::MAX, usize::MAX), u64::MAX);
    }
}
