//! Sums, maxima and minima of f32 slices, and the narrow types of the wire.
//!
//! All of it is elementwise: the bits of a result do not depend on how a buffer is cut.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

use crate::frame::{Reduction, WireDtype};

/// a ⊕ b, `a` being the side of the lower ranks (or of those earlier around the ring).
#[inline(always)]
fn combine(reduction: Reduction, a: f32, b: f32) -> f32 {
    match reduction {
        Reduction::Sum => a + b,
        // With a NaN on either side the result is NaN: a comparison with NaN is false, so `b` NaN
        // falls through.
        Reduction::Max => {
            if a.is_nan() || a > b {
                a
            } else {
                b
            }
        }
        Reduction::Min => {
            if a.is_nan() || a < b {
                a
            } else {
                b
            }
        }
    }
}

/// Calls `$body` with the reduction as a constant, so that each loop is compiled (and vectorized)
/// for one.
macro_rules! for_each_reduction {
    ($reduction:expr, $combine:ident => $body:expr) => {
        match $reduction {
            Reduction::Sum => {
                let $combine = |a: f32, b: f32| combine(Reduction::Sum, a, b);
                $body
            }
            Reduction::Max => {
                let $combine = |a: f32, b: f32| combine(Reduction::Max, a, b);
                $body
            }
            Reduction::Min => {
                let $combine = |a: f32, b: f32| combine(Reduction::Min, a, b);
                $body
            }
        }
    };
}

/// A number that arrived: as such, or as its bytes where the transport holds them, which need not be
/// aligned.
pub(crate) trait Arrived: Copy {
    fn value(self) -> f32;
}

impl Arrived for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

impl Arrived for [u8; 4] {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_ne_bytes(self)
    }
}

/// data = incoming
pub(crate) fn store(data: &mut [f32], incoming: &[impl Arrived]) {
    for (data, incoming) in data.iter_mut().zip(incoming) {
        *data = incoming.value();
    }
}

/// data = data ⊕ incoming
pub(crate) fn add(reduction: Reduction, data: &mut [f32], incoming: &[impl Arrived]) {
    for_each_reduction!(reduction, combine => for (data, incoming) in data.iter_mut().zip(incoming) {
        *data = combine(*data, incoming.value());
    });
}

/// data = incoming ⊕ data
pub(crate) fn add_before(reduction: Reduction, data: &mut [f32], incoming: &[impl Arrived]) {
    for_each_reduction!(reduction, combine => for (data, incoming) in data.iter_mut().zip(incoming) {
        *data = combine(incoming.value(), *data);
    });
}

/// data = (prefix ⊕ incoming) ⊕ data
pub(crate) fn join(reduction: Reduction, data: &mut [f32], prefix: &[f32], incoming: &[impl Arrived]) {
    for_each_reduction!(reduction, combine => for ((data, &prefix), incoming) in data.iter_mut().zip(prefix).zip(incoming) {
        *data = combine(combine(prefix, incoming.value()), *data);
    });
}

/// Rounds to the wire's type (to nearest, ties to even).
///
/// `narrow` holds two bytes per element; `wire` is not `Exact`.
pub(crate) fn to_wire(wire: WireDtype, data: &[f32], narrow: &mut [u16]) {
    match wire {
        WireDtype::Bf16 => narrow.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(data),
        WireDtype::F16 => narrow.reinterpret_cast_mut::<f16>().convert_from_f32_slice(data),
        WireDtype::Exact => unreachable!("exact elements are sent as they are"),
    }
}

/// Widens what came over the wire: exact.
pub(crate) fn from_wire(wire: WireDtype, narrow: &[u16], data: &mut [f32]) {
    match wire {
        WireDtype::Bf16 => narrow.reinterpret_cast::<bf16>().convert_to_f32_slice(data),
        WireDtype::F16 => narrow.reinterpret_cast::<f16>().convert_to_f32_slice(data),
        WireDtype::Exact => unreachable!("exact elements are received as they are"),
    }
}

/// Rounds in place, as the peers will see it.
pub(crate) fn round_to_wire(wire: WireDtype, data: &mut [f32]) {
    if wire == WireDtype::Exact {
        return;
    }
    for value in data {
        *value = match wire {
            WireDtype::Exact => *value,
            WireDtype::Bf16 => bf16::from_f32(*value).to_f32(),
            WireDtype::F16 => f16::from_f32(*value).to_f32(),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_wins_on_either_side() {
        for reduction in [Reduction::Sum, Reduction::Max, Reduction::Min] {
            for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
                let mut data = [a];
                add(reduction, &mut data, &[b]);
                assert!(data[0].is_nan(), "{reduction}: {a} {b}");
                let mut data = [b];
                add_before(reduction, &mut data, &[a]);
                assert!(data[0].is_nan(), "{reduction}: {a} {b}");
            }
        }
    }

    #[test]
    fn operands_keep_their_order() {
        // In f32 (1e8 + 1) - 1e8 is 0 and (-1e8 + 1e8) + 1 is 1: the order shows.
        let mut data = [-1e8_f32];
        join(Reduction::Sum, &mut data, &[1e8], &[1.0_f32]);
        assert_eq!(data, [0.0]);
        let mut data = [1.0_f32];
        join(Reduction::Sum, &mut data, &[1e8], &[-1e8_f32]);
        assert_eq!(data, [1.0]);
    }

    /// Numbers are added as they lie in a transport's memory, at any address.
    #[test]
    fn bytes_give_the_bits_of_the_numbers() {
        let numbers: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 1e3).chain([f32::NAN, -0.0]).collect();
        let others: Vec<f32> = numbers.iter().map(|number| number.mul_add(0.7, -3.0)).collect();
        let mut bytes = vec![0u8];
        bytes.extend(others.iter().flat_map(|other| other.to_ne_bytes()));
        let (unaligned, rest) = bytes[1..].as_chunks::<4>();
        assert!(rest.is_empty());
        let bits = |data: &[f32]| data.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        for reduction in [Reduction::Sum, Reduction::Max, Reduction::Min] {
            let (mut a, mut b) = (numbers.clone(), numbers.clone());
            add(reduction, &mut a, &others);
            add(reduction, &mut b, unaligned);
            add_before(reduction, &mut a, &others);
            add_before(reduction, &mut b, unaligned);
            join(reduction, &mut a, &numbers, &others);
            join(reduction, &mut b, &numbers, unaligned);
            assert_eq!(bits(&a), bits(&b), "{reduction}");
            store(&mut b, unaligned);
            assert_eq!(bits(&b), bits(&others));
        }
    }

    #[test]
    fn narrow_types_round_to_nearest_even() {
        let data = [1.0, 1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8), 1e30, f32::INFINITY, -0.0];
        let mut narrow = [0u16; 6];
        let mut back = [0f32; 6];
        for wire in [WireDtype::Bf16, WireDtype::F16] {
            to_wire(wire, &data, &mut narrow);
            from_wire(wire, &narrow, &mut back);
            let mut rounded = data;
            round_to_wire(wire, &mut rounded);
            assert_eq!(back.map(f32::to_bits), rounded.map(f32::to_bits));
        }
        round_to_wire(WireDtype::Bf16, &mut back);
        let mut bf = data;
        round_to_wire(WireDtype::Bf16, &mut bf);
        assert_eq!(bf[..3], [1.0, 1.0, 1.0 + 2f32.powi(-6)]);
    }
}
