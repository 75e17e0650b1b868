//! Offers that fit together, and those that do not.

use expect_test::expect;

use super::*;

fn wire(device: &str, depth: usize, mtu: usize) -> WireOffer {
    let queue = QueueOffer { number: 17, first_packet: 1, depth };
    let gid = "::ffff:10.0.0.1".parse().expect("an address");
    WireOffer { device: device.into(), gid, lid: 0, mtu, small: queue, bulk: queue }
}

#[test]
fn offers_come_to_the_least_of_all_or_to_an_error_that_names_both() {
    let offer =
        |bulk_bytes, kind, wires| Offer::new(&WireOptions { bulk_bytes, kind, ..WireOptions::default() }, wires);
    let (uc, rc) = (QueuePairKind::Unreliable, QueuePairKind::Reliable);
    let fitting = [
        offer(64 << 10, uc, vec![vec![], vec![wire("rdma_en3", 16, 4096), wire("rdma_en4", 2, 1024)]]),
        offer(32 << 10, uc, vec![vec![wire("rdma_en5", 8, 2048), wire("rdma_en6", 16, 4096)], vec![]]),
    ];
    let terms = Offer::agree(0, &fitting).expect("they fit");
    assert_eq!(terms.sizes, SlotSizes { bulk_bytes: 32 << 10 });
    let wires: Vec<(usize, usize)> = terms.wires[1].iter().map(|wire| (wire.mtu, wire.bulk_depth)).collect();
    assert_eq!(wires, [(2048, 8), (1024, 2)]);
    assert_eq!(Offer::agree(1, &fitting).expect("they fit").sizes, terms.sizes);

    let json = serde_json::to_string(&fitting[0]).expect("JSON");
    assert_eq!(serde_json::from_str::<Offer>(&json).expect("an offer"), fitting[0]);

    let one_wire = |kind, wire| offer(64 << 10, kind, vec![vec![wire], vec![]]);
    let mine = offer(64 << 10, uc, vec![vec![], vec![wire("rdma_en3", 16, 4096)]]);
    let refused = [
        one_wire(rc, wire("rdma_en5", 8, 4096)),
        offer(64 << 10, uc, vec![vec![], vec![]]),
        offer(64 << 10, uc, vec![vec![]]),
        one_wire(uc, wire("rdma_en5", 1, 4096)),
        one_wire(uc, wire("rdma_en5", 8, 4000)),
        offer(4097, uc, vec![vec![wire("rdma_en5", 8, 4096)], vec![]]),
    ];
    let text: String = refused
        .into_iter()
        .map(|theirs| format!("{}\n", Offer::agree(0, &[mine.clone(), theirs]).expect_err("they do not fit")))
        .collect();
    expect![[r#"
        rank 0 and rank 1 cannot be connected over RDMA: this one offers uc queue pairs and the other one rc: configure the same kind everywhere (Thunderbolt has only uc)
        rank 0 and rank 1 cannot be connected over RDMA: this one has 1 wires to it (rdma_en3), it has 0 back (none): name one device at each end of every cable
        rank 0 and rank 1 cannot be connected over RDMA: the other one counts 1 ranks, this one 2
        rank 0 and rank 1 cannot be connected over RDMA: its offer for rdma_en5 makes no sense: WireOffer { device: "rdma_en5", gid: ::ffff:10.0.0.1, lid: 0, mtu: 4096, small: QueueOffer { number: 17, first_packet: 1, depth: 1 }, bulk: QueueOffer { number: 17, first_packet: 1, depth: 1 } }
        rank 0 and rank 1 cannot be connected over RDMA: its offer for rdma_en5 makes no sense: WireOffer { device: "rdma_en5", gid: ::ffff:10.0.0.1, lid: 0, mtu: 4000, small: QueueOffer { number: 17, first_packet: 1, depth: 8 }, bulk: QueueOffer { number: 17, first_packet: 1, depth: 8 } }
        rank 0 and rank 1 cannot be connected over RDMA: the other one offers slots of 4097 bytes
    "#]].assert_eq(&text);
    // In a group within a group people know ranks by other numbers.
    let error = Offer::agree(0, &[mine, offer(64 << 10, uc, vec![vec![]])]).expect_err("they do not fit");
    let text = error.with_ranks(&[4, 6]).to_string();
    assert!(text.starts_with("rank 4 and rank 6 cannot be connected over RDMA: the other one counts"), "{text}");
}
