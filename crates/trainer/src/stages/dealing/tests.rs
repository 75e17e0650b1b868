use super::*;

const RING: Arrangements = Arrangements { in_memory: Arrangement::Ring, from_disk: Arrangement::Ring };
const CHAIN: Arrangements = Arrangements { in_memory: Arrangement::Contiguous, from_disk: Arrangement::Wave };

fn offer(rate: f64, room: usize) -> Offer {
    let from_disk = [false, false, true];
    Offer { rate, on_cpu: true, whole: false, reads: [f64::INFINITY; WAYS], room: [[[room; 2]; 2]; WAYS], from_disk }
}

fn counts(layers: usize, offers: &[(f64, usize)]) -> (Vec<usize>, Why) {
    let offers: Vec<Offer> = offers.iter().map(|&(rate, room)| offer(rate, room)).collect();
    let dealt = deal(layers, &offers, RING);
    (dealt.stage.counts(), dealt.why)
}

/// (layers, (rate, room) of each rank, layers of each rank, why)
#[test]
fn layers_follow_speed_and_memory() {
    #[expect(clippy::type_complexity, reason = "a table of cases")]
    let cases: [(usize, &[(f64, usize)], &[usize], Why); 12] = [
        (5, &[(1.0, 99), (1.0, 99)], &[3, 2], Why::Alike),
        // Less than a quarter is noise, in either order.
        (30, &[(1.0, 99), (1.24, 99), (1.1, 99)], &[10, 10, 10], Why::Alike),
        (30, &[(2.0, 99), (1.0, 99)], &[20, 10], Why::Speed),
        (30, &[(1.0, 99), (2.0, 99), (2.4, 99)], &[6, 12, 12], Why::Speed),
        // One whose speed is not known: all count as equal.
        (30, &[(0.0, 99), (2.0, 99)], &[15, 15], Why::Alike),
        (30, &[(f64::NAN, 99), (2.0, 99)], &[15, 15], Why::Alike),
        (30, &[(1.0, 8), (1.0, 99), (1.0, 99)], &[8, 11, 11], Why::Memory),
        (30, &[(1.0, 99), (3.0, 10)], &[20, 10], Why::Memory),
        (30, &[(1.0, 20), (3.0, 10)], &[20, 10], Why::Memory),
        // A rank that is far slower has a layer all the same.
        (4, &[(100.0, 99), (1.0, 99)], &[3, 1], Why::Speed),
        // None has room: the memory is refused where it is looked at.
        (30, &[(1.0, 8), (1.0, 8)], &[15, 15], Why::Alike),
        (30, &[(1.0, 0), (1.0, 99)], &[15, 15], Why::Alike),
    ];
    for (layers, offers, want, why) in cases {
        assert_eq!(counts(layers, offers), (want.to_vec(), why), "{layers} {offers:?}");
    }
}

/// (rate, what the disk keeps up with, layers that have room in memory) of each rank, of 30 layers those of each,
/// and why
#[test]
fn a_disk_that_does_not_keep_up_bounds_a_rank() {
    #[expect(clippy::type_complexity, reason = "a table of cases")]
    let cases: [(&[(f64, f64, usize)], &[usize], Why); 8] = [
        // In memory nothing is read.
        (&[(1.0, 9.0, 99), (1.0, 0.1, 99)], &[15, 15], Why::Alike),
        (&[(2.0, 4.0, 0), (2.0, 1.0, 0)], &[20, 10], Why::Disk),
        (&[(2.0, 9.0, 0), (1.0, 9.0, 0)], &[20, 10], Why::Speed),
        // A fast processor waits for its disk.
        (&[(1.0, 8.0, 0), (4.0, 1.0, 0)], &[15, 15], Why::Alike),
        (&[(4.0, 1.0, 0), (2.0, 9.0, 0)], &[10, 20], Why::Disk),
        // Not known: as if disks kept up.
        (&[(1.0, f64::INFINITY, 0), (2.0, f64::INFINITY, 0)], &[10, 20], Why::Speed),
        // Without a known speed of the products a disk's says nothing.
        (&[(0.0, 2.0, 0), (1.0, 1.0, 0)], &[15, 15], Why::Alike),
        // The other rank holds its layers in memory, and its disk does not matter.
        (&[(1.0, 0.5, 0), (1.0, 0.25, 99)], &[10, 20], Why::Disk),
    ];
    for (ranks, want, why) in cases {
        let offer = |&(rate, kept_up, room): &(f64, f64, usize)| Offer {
            reads: [f64::INFINITY, f64::INFINITY, kept_up],
            room: [[[room; 2]; 2], [[room; 2]; 2], [[99; 2]; 2]],
            ..offer(rate, 0)
        };
        let dealt = deal(30, &ranks.iter().map(offer).collect::<Vec<_>>(), RING);
        assert_eq!((dealt.stage.counts(), dealt.why), (want.to_vec(), why), "{ranks:?}");
    }
}

/// Equal ranks have what they had before ranks could differ.
#[test]
fn equal_ranks_go_round() {
    for ranks in 1..=8 {
        for layers in ranks..80 {
            let dealt = deal(layers, &vec![offer(1.0, layers); ranks], RING);
            assert_eq!(dealt.stage, Stage::in_turn(layers, ranks, 0), "{layers} on {ranks}");
            assert!(dealt.in_memory && dealt.why == Why::Alike);
        }
    }
}

/// While the losses are computed all wait, so they are for a rank that is as fast as any.
#[test]
fn the_losses_are_on_a_fastest_rank() {
    let rates = [1.0, 1.5, 3.0];
    let of_two = || rates.iter().flat_map(|&a| rates.map(|b| vec![a, b]));
    let of_three = || of_two().flat_map(|two| rates.map(|c| [two.clone(), vec![c]].concat()));
    for (layers, rates) in [24, 30, 61, 80].into_iter().flat_map(|n| of_two().chain(of_three()).map(move |r| (n, r))) {
        let offers: Vec<Offer> = rates.iter().map(|&rate| offer(rate, layers)).collect();
        let last = deal(layers, &offers, RING).stage.last();
        assert!(rates.iter().all(|rate| *rate <= rates[last]), "{layers} layers on {rates:?}: the last on rank {last}");
    }
}

/// The first way in which all have room counts, with what goes with the first and the last layer.
#[test]
fn the_ends_take_room() {
    for (ranks, layers) in [(2, 9), (3, 15), (3, 24), (5, 40)] {
        let mut offers = vec![offer(1.0, 10); ranks];
        // Whoever has the last layer has room for four beside the logits.
        for offer in &mut offers {
            offer.room.iter_mut().flatten().for_each(|room| room[1] = 4);
        }
        let dealt = deal(layers, &offers, RING);
        let counts = dealt.stage.counts();
        let has_room = |rank: usize| counts[rank] <= if dealt.stage.last() == rank { 4 } else { 10 };
        assert!(dealt.in_memory && (0..ranks).all(has_room), "{ranks} {layers}: {counts:?}");
        assert_eq!(counts.iter().sum::<usize>(), layers);
    }
    // Not in memory, but from the disk of one of them.
    let mut offers = [offer(1.0, 3), offer(1.0, 3)];
    offers[1].room[2] = [[9; 2]; 2];
    let dealt = deal(9, &offers, RING);
    assert_eq!((dealt.stage.counts(), dealt.in_memory), (vec![3, 6], false));
}

#[test]
fn ranks_of_a_host_share_its_processor() {
    let mut offers = [offer(1.0, 9), offer(3.0, 9), offer(8.0, 9)];
    share_hosts(&mut offers, &["a", "a", "b"]);
    assert_eq!(offers.map(|offer| offer.rate), [2.0, 2.0, 8.0]);
    offers[0].on_cpu = false;
    share_hosts(&mut offers, &["a", "a", "a"]);
    assert_eq!(offers.map(|offer| offer.rate), [2.0, 5.0, 5.0]);
    offers[0].reads[2] = 4.0;
    share_hosts(&mut offers, &["a", "b", "a"]);
    assert_eq!(offers.map(|offer| offer.reads[2]), [4.0, f64::INFINITY, 4.0]);
}

/// Of several models, the weakest rank of each stage counts.
#[test]
fn replicas_do_the_same() {
    let offers = [offer(2.0, 9), offer(1.0, 7), offer(1.0, 5), offer(1.5, 8)];
    assert_eq!(of_each_stage(&offers, 2), [offer(1.0, 5), offer(1.0, 7)]);
    assert_eq!(of_each_stage(&offers, 4), offers);
    assert_eq!(Offer::from_numbers(&offers[0].to_numbers()), offers[0]);
}

/// Ranks whose cables form a chain have layers next to each other, as their speed and room allow, and there and back
/// where they read them from the disk.
#[test]
fn a_chain_has_no_hop_from_the_last_to_the_first() {
    #[expect(clippy::type_complexity, reason = "a table of cases")]
    let cases: [(&[(f64, usize)], &[usize], Why); 5] = [
        (&[(1.0, 99), (1.0, 99), (1.0, 99), (1.0, 99)], &[8, 7, 8, 7], Why::Alike),
        (&[(1.0, 99), (2.0, 99), (2.4, 99)], &[6, 12, 12], Why::Speed),
        (&[(1.0, 99), (1.0, 6), (1.0, 99)], &[12, 6, 12], Why::Memory),
        (&[(1.0, 99), (3.0, 10)], &[20, 10], Why::Memory),
        // None has room.
        (&[(1.0, 8), (1.0, 8)], &[15, 15], Why::Alike),
    ];
    for (ranks, want, why) in cases {
        let offers: Vec<Offer> = ranks.iter().map(|&(rate, room)| offer(rate, room)).collect();
        let dealt = deal(30, &offers, CHAIN);
        assert_eq!((dealt.stage.counts(), dealt.why), (want.to_vec(), why), "{ranks:?}");
        let has_room = offers.iter().map(|offer| offer.room[0][0][0]).sum::<usize>() >= 30;
        assert_eq!(dealt.arrangement == Arrangement::Contiguous, has_room, "{ranks:?}");
    }
    // What goes with the last layer takes room on the last rank.
    let mut offers = [offer(1.0, 10), offer(1.0, 10)];
    offers[1].room.iter_mut().flatten().for_each(|room| room[1] = 4);
    assert_eq!(*deal(12, &offers, CHAIN).stage.of_layer, *Stage::in_order(&[8, 4], 0).of_layer);
    // From the disk.
    let mut offers = [offer(1.0, 3), offer(1.0, 3), offer(1.0, 3)];
    offers.iter_mut().for_each(|offer| offer.room[2] = [[99; 2]; 2]);
    let dealt = deal(12, &offers, CHAIN);
    assert_eq!(
        (&*dealt.stage.of_layer, dealt.arrangement),
        (&[0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0][..], Arrangement::Wave)
    );
    assert!(!dealt.in_memory && dealt.why == Why::Alike);
}
