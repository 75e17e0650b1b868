//! Which layers each of the ranks gets that answer with one model: next to each other, as their memory and speed allow.
//! No answer depends on it.

use std::ops::Range;

use finetune_model::Stage;
use finetune_store::human_bytes;

use super::{Sizes, measured_bandwidth};
use crate::dealing::{Blocks, Why, levelled, listed};
use crate::error::TrainError;
use crate::ranks::Ranks;

/// The parts of a rank's memory that weights may take, in the order in which they are tried. The rest is for keys and
/// values.
const PARTS: [f64; 2] = [0.8, 1.0];

/// What a rank has to offer, and how large the layers are on it.
#[derive(Clone, Debug, PartialEq)]
struct Offer {
    /// Bytes of memory; `None`: not known.
    available: Option<u64>,
    /// Bytes that it reads in a second.
    speed: f64,
    layers: Vec<u64>,
    ends: [u64; 2],
}

/// This rank's layers, and what the user should know of all. All ranks call it together.
///
/// # Errors
/// If the layers have no room, or a rank is lost.
pub(super) fn deal_together(ranks: &Ranks, sizes: &Sizes) -> Result<(Stage, Option<String>), TrainError> {
    let (rank, world) = (ranks.group().rank(), ranks.group().world());
    let offers = gathered(ranks, sizes)?;
    let dealt = deal(&offers);
    let layers = sizes.layers.len();
    // Rounding may differ between processors, so the first rank deals.
    let counts = dealt.as_ref().map_or_else(|| vec![0; world], |(counts, _)| counts.clone());
    let why = dealt.map_or(Why::Alike, |(_, why)| why);
    let mut told: Vec<i32> = counts.iter().map(|count| *count as i32).chain([why.number()]).collect();
    ranks.group().broadcast(&mut told, 0)?;
    let why = told.pop().map_or(why, Why::of_number);
    let counts: Vec<usize> = told.into_iter().map(|count| count as usize).collect();
    if counts.iter().sum::<usize>() == layers {
        return Ok((Stage::in_order(&counts, rank), note(&counts, why)));
    }
    if sizes.may_read {
        return Ok((Stage::contiguous(layers, world, rank), None));
    }
    let hosts: Vec<&str> = ranks.group().who().iter().map(|who| who.host.as_str()).collect();
    Err(TrainError::NoRoomInStages { what: no_room(&offers, &hosts) })
}

/// What all ranks offer. Speeds are measured where they may differ: on several hosts, and beside GPUs.
fn gathered(ranks: &Ranks, sizes: &Sizes) -> Result<Vec<Offer>, TrainError> {
    let Sizes { layers, ends, bandwidth, available, .. } = sizes;
    let bytes = ends.iter().chain(layers).map(|bytes| *bytes as f64);
    let memory = available.map_or(-1.0, |bytes| bytes as f64);
    let mine: Vec<f64> = [memory, bandwidth.unwrap_or(0.0)].into_iter().chain(bytes).collect();
    let all = ranks.gather(&mine)?;
    let mut offers: Vec<Offer> = all
        .chunks(mine.len())
        .map(|numbers| Offer {
            available: (numbers[0] >= 0.0).then_some(numbers[0] as u64),
            speed: numbers[1],
            ends: [numbers[2] as u64, numbers[3] as u64],
            layers: numbers[4..].iter().map(|bytes| *bytes as u64).collect(),
        })
        .collect();
    let hosts: Vec<&str> = ranks.group().who().iter().map(|who| who.host.as_str()).collect();
    let on_cpu: Vec<bool> = offers.iter().map(|offer| offer.speed == 0.0).collect();
    if on_cpu.iter().all(|on_cpu| *on_cpu) && hosts.windows(2).all(|two| two[0] == two[1]) {
        offers.iter_mut().for_each(|offer| offer.speed = 1.0);
        return Ok(offers);
    }
    let speeds = ranks.gather(&[bandwidth.unwrap_or_else(measured_bandwidth)])?;
    for (n, offer) in offers.iter_mut().enumerate() {
        // Ranks of one host that read its main memory are equally fast: they were measured at the same time, or not.
        let alike = |other: &usize| *other == n || on_cpu[n] && on_cpu[*other] && hosts[*other] == hosts[n];
        let alike: Vec<f64> = (0..speeds.len()).filter(alike).map(|other| speeds[other]).collect();
        offer.speed = alike.iter().sum::<f64>() / alike.len() as f64;
    }
    Ok(offers)
}

/// So many layers for each rank that the slowest takes as short as it can, in as much of the memory as there has to
/// be. `None`: there is no room.
fn deal(offers: &[Offer]) -> Option<(Vec<usize>, Why)> {
    let layers = offers.first()?.layers.len();
    let speeds = levelled(&offers.iter().map(|offer| offer.speed).collect::<Vec<_>>());
    let size = |rank: usize, range: Range<usize>| offers[rank].layers[range].iter().sum::<u64>() as f64;
    let blocks = Blocks { layers, speeds: &speeds, size: &size };
    let (alike, by_speed) = (Stage::contiguous(layers, offers.len(), 0).counts(), blocks.by_speed());
    PARTS.into_iter().find_map(|part| {
        let counts = blocks.with_room(&|rank, range| fits(offers, rank, range, part))?;
        let why = match Some(&counts) {
            counts if counts != by_speed.as_ref() => Why::Memory,
            counts if counts == Some(&alike) => Why::Alike,
            _ => Why::Speed,
        };
        Some((counts, why))
    })
}

/// Whether a rank has room for these layers in a part of its memory.
fn fits(offers: &[Offer], rank: usize, range: Range<usize>, part: f64) -> bool {
    let Offer { available, layers, ends, .. } = &offers[rank];
    let of_first = if range.start == 0 { ends[0] } else { 0 };
    let of_last = if range.end == layers.len() { ends[1] } else { 0 };
    let bytes = layers[range].iter().sum::<u64>() + of_first + of_last;
    available.is_none_or(|available| bytes as f64 <= available as f64 * part)
}

/// How many layers each rank has, if these are not as many.
fn note(counts: &[usize], why: Why) -> Option<String> {
    if counts.windows(2).all(|two| two[0] == two[1]) {
        return None;
    }
    let (layers, ranks) = (counts.iter().sum::<usize>(), counts.len());
    Some(format!("the {layers} layers are spread over {ranks} ranks: {} of them{}", listed(counts), why.words()))
}

/// Why the layers cannot be dealt.
fn no_room(offers: &[Offer], hosts: &[&str]) -> String {
    let needed = offers.iter().map(|offer| offer.layers.iter().chain(&offer.ends).sum::<u64>()).max().unwrap_or(0);
    let of_rank = |(rank, (offer, host)): (usize, (&Offer, &&str))| {
        Some(format!("rank {rank} ({host}) has {}", human_bytes(offer.available?)))
    };
    let all: Vec<String> = offers.iter().zip(hosts).enumerate().filter_map(of_rank).collect();
    format!("the weights take {} in layers of which each is on one rank, and {}", human_bytes(needed), all.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(available: Option<u64>, speed: f64, layers: usize) -> Offer {
        Offer { available, speed, layers: vec![10; layers], ends: [20, 20] }
    }

    /// (memory and speed of each rank, layers of 10 bytes, what is dealt)
    #[test]
    fn layers_are_dealt_by_memory_and_speed() {
        type Ranks<'a> = &'a [(Option<u64>, f64)];
        type Dealt<'a> = Option<(&'a [usize], Why)>;
        let cases: [(Ranks<'_>, usize, Dealt<'_>); 11] = [
            (&[(None, 1.0), (None, 1.0), (None, 1.0)], 7, Some((&[3, 2, 2], Why::Alike))),
            (&[(Some(1000), 1.0), (Some(1000), 1.0)], 30, Some((&[15, 15], Why::Alike))),
            // Nearly as fast is as fast.
            (&[(None, 1.0), (None, 1.2)], 10, Some((&[5, 5], Why::Alike))),
            (&[(None, 1.0), (None, 3.0)], 12, Some((&[3, 9], Why::Speed))),
            (&[(None, 1.0), (Some(75), 3.0)], 12, Some((&[8, 4], Why::Memory))),
            // Ends count: 20 of 120 bytes, of which four fifths are 96.
            (&[(Some(120), 1.0), (Some(1000), 1.0)], 20, Some((&[7, 13], Why::Memory))),
            (&[(Some(1000), 1.0), (Some(50), 1.0), (Some(1000), 1.0)], 20, Some((&[8, 4, 8], Why::Memory))),
            // Not in four fifths of the memory, but in all of it.
            (&[(Some(120), 1.0), (Some(120), 1.0)], 20, Some((&[10, 10], Why::Alike))),
            (&[(Some(130), 1.0), (Some(110), 1.0)], 20, Some((&[11, 9], Why::Memory))),
            (&[(Some(110), 1.0), (Some(120), 1.0)], 20, None),
            // Each has one layer at least.
            (&[(Some(1000), 1.0), (Some(25), 1.0)], 4, None),
        ];
        for (ranks, layers, want) in cases {
            let offers: Vec<Offer> = ranks.iter().map(|(memory, speed)| offer(*memory, *speed, layers)).collect();
            let got = deal(&offers);
            assert_eq!(got.as_ref().map(|(counts, why)| (&counts[..], *why)), want, "{ranks:?}");
        }
    }

    #[test]
    fn layers_of_different_sizes_are_counted_by_their_bytes() {
        let of = |available| Offer { available, speed: 1.0, layers: vec![100, 10, 10, 10, 10, 10], ends: [0, 0] };
        assert_eq!(deal(&[of(Some(130)), of(Some(130))]), Some((vec![1, 5], Why::Memory)));
    }

    #[test]
    fn what_is_uneven_or_has_no_room_is_said() {
        assert_eq!(note(&[4, 4], Why::Alike), None);
        assert_eq!(
            note(&[8, 4, 8], Why::Memory).as_deref(),
            Some("the 20 layers are spread over 3 ranks: 8, 4 and 8 of them, as their memory and speed allow")
        );
        let what = no_room(&[offer(Some(110), 1.0, 20), offer(Some(120), 1.0, 20)], &["one", "two"]);
        assert!(what.contains("rank 0 (one) has 110 bytes") && what.contains("rank 1 (two) has 120 bytes"), "{what}");
    }
}
