//! A step's rows and a rank's share of them, over many made-up sizes.

use finetune_dataset::Plan;

/// A small generator for the sizes under test (splitmix64), apart from the one that the plan uses.
struct Sizes(u64);

impl Sizes {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % bound
    }
}

#[test]
fn every_row_once_per_epoch_and_shares_make_up_the_step() {
    let mut sizes = Sizes(1);
    for case in 0..20_000 {
        let rows = 1 + sizes.below(60) as usize;
        let batch = 1 + sizes.below(20) as usize;
        let (seed, epoch, shuffle) = (sizes.below(u64::MAX), sizes.below(5), sizes.below(4) > 0);
        let world = 1 + sizes.below(9) as usize;
        let plan = Plan::new(rows, batch, seed, shuffle);
        let steps = plan.steps_per_epoch();
        assert_eq!(steps, (rows as u64).div_ceil(batch as u64));
        let mut seen = Vec::new();
        for step in epoch * steps..(epoch + 1) * steps {
            assert_eq!(plan.epoch(step), epoch);
            let step_rows = plan.rows(step);
            let last = step + 1 == (epoch + 1) * steps;
            assert!(
                step_rows.len() == batch || (last && !step_rows.is_empty() && step_rows.len() < batch),
                "case {case}"
            );
            let shares: Vec<Vec<usize>> = (0..world).map(|rank| plan.share(step, rank, world)).collect();
            assert_eq!(shares.concat(), step_rows, "case {case}");
            let lengths = || shares.iter().map(Vec::len);
            assert!(lengths().max().unwrap_or(0) - lengths().min().unwrap_or(0) <= 1, "case {case}");
            seen.extend(step_rows);
        }
        if shuffle {
            seen.sort_unstable();
        }
        assert_eq!(seen, (0..rows).collect::<Vec<_>>(), "case {case}");
    }
}

#[test]
fn the_order_is_a_function_of_seed_and_epoch() {
    let order = |seed, epoch: u64| Plan::new(100, 100, seed, true).rows(epoch);
    assert_eq!(order(1, 0), order(1, 0));
    assert_ne!(order(1, 0), order(2, 0));
    assert_ne!(order(1, 0), order(1, 1));
    assert_ne!(order(1, 0), (0..100).collect::<Vec<_>>());
    // Steps asked out of order, or of a clone, have the same rows.
    let plan = Plan::new(10, 3, 42, true);
    let forward: Vec<_> = (0..12).map(|step| plan.rows(step)).collect();
    for step in (0..12).rev() {
        assert_eq!(plan.clone().rows(step), forward[step as usize]);
        assert_eq!(plan.rows(step), forward[step as usize]);
    }
    // The batch size does not change the order of an epoch: what a run with another one sees is
    // comparable.
    assert_eq!(forward[..4].concat(), Plan::new(10, 10, 42, true).rows(0));
    // The order must never change: a resumed run must see the rows that an older version would
    // show.
    expect_test::expect!["[6, 5, 7, 9, 4, 8, 2, 3, 1, 0]"].assert_eq(&format!("{:?}", forward[..4].concat()));
}

#[test]
fn no_rows_no_steps() {
    let plan = Plan::new(0, 4, 1, true);
    assert_eq!((plan.steps_per_epoch(), plan.epoch(7)), (0, 7));
    assert!(plan.rows(0).is_empty() && plan.share(3, 1, 2).is_empty());
    assert_eq!(Plan::new(3, 0, 1, false).rows(1), [1]);
    assert!(Plan::new(3, 2, 1, false).share(0, 5, 2).is_empty());
}
