//! Two ranks, each a thread of this process, sum a vector. `Group::join` does the same between
//! processes and hosts.
//!
//! `cargo run --release -p finetune-allreduce --example all_reduce`

use finetune_allreduce::{Group, GroupError, Reduction};

/// What one rank does: its own numbers in, the sums of all ranks out.
fn rank(group: &Group) -> Result<Vec<f32>, GroupError> {
    let own = group.rank() as f32;
    let mut values: Vec<f32> = (0..8).map(|index| 10.0 * own + index as f32).collect();
    group.all_reduce(&mut values, Reduction::Sum)?;
    Ok(values)
}

fn main() -> Result<(), GroupError> {
    let groups = Group::in_process(2, None);
    let sums = std::thread::scope(|scope| {
        let ranks: Vec<_> = groups.into_iter().map(|group| scope.spawn(move || rank(&group))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank that does not panic")).collect::<Result<Vec<_>, _>>()
    })?;
    for (rank, values) in sums.iter().enumerate() {
        println!("rank {rank}: {values:?}");
    }
    assert_eq!(sums[0], sums[1], "all ranks have the same bits");
    Ok(())
}
