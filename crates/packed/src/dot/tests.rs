//! Every way to multiply a row has the bits of the first one written here.

use finetune_random::Stream;
use half::bf16;

use super::keys::Apart;
use super::{Ahead, BLOCK, HALF, LANES};
use crate::all_forms::{Random, for_all};
use crate::simd::InstructionSet;

/// The order of a sum, from its definition: element by element, of activations that are not split.
fn reference(x: &[f32], w: &[f32]) -> f32 {
    let whole = x.len() / BLOCK * BLOCK;
    let mut sets = [[0f32; LANES]; 4];
    for j in 0..whole {
        let (set, lane) = (j % BLOCK / HALF * 2 + j % 2, j % HALF / 2);
        sets[set][lane] = x[j].mul_add(w[j], sets[set][lane]);
    }
    let mut lanes: Vec<f32> = (0..LANES).map(|n| (sets[0][n] + sets[1][n]) + (sets[2][n] + sets[3][n])).collect();
    while lanes.len() > 1 {
        let (lower, upper) = lanes.split_at(lanes.len() / 2);
        lanes = lower.iter().zip(upper).map(|(lower, upper)| lower + upper).collect();
    }
    (whole..x.len()).fold(lanes[0], |sum, j| x[j].mul_add(w[j], sum))
}

fn split(x: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len()];
    InstructionSet::best().split(x, &mut out);
    out
}

#[track_caller]
fn same(found: f32, want: f32, what: &str) {
    assert!(found.to_bits() == want.to_bits() || found.is_nan() && want.is_nan(), "{what}: {found:e}, not {want:e}");
}

#[test]
fn numbers_are_summed_in_one_order() {
    for length in (0..=130).chain([576, 1536, 2050]) {
        let stream = |n| Stream::new(n, 0, 0, 0).uniform(length, 1.0);
        let (x, w) = (stream(1), stream(2));
        let narrow: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
        let wide: Vec<f32> = narrow.iter().map(|w| w.to_f32()).collect();
        let (want, want_of_narrow) = (reference(&x, &w), reference(&x, &wide));
        for set in InstructionSet::here() {
            let what = format!("{set:?}, {length} elements");
            for (rows, outputs) in [(1, 1), (5, 8), (8, 7), (4, 6)].into_iter().filter(|_| length > 0) {
                let mut each = vec![f32::NAN; rows * outputs];
                set.dot_each(&split(&x).repeat(rows), &split(&w).repeat(outputs), length, Ahead::of(&w), &mut each);
                each.iter().for_each(|found| same(*found, want, &what));
            }
            let (mut of_f32, mut of_bf16) = (vec![f32::NAN; length], vec![f32::NAN; length]);
            set.split(&wide, &mut of_f32);
            set.split_bf16(&narrow, &mut of_bf16);
            assert!(of_f32 == split(&wide) && of_bf16 == of_f32, "{what}, apart");
            same(set.dot_f32(&split(&x), &w), want, &what);
            same(set.dot_bf16(&split(&x), &narrow), want_of_narrow, &what);
        }
    }
}

/// Sixteen lanes, halves added to halves, then the rest.
fn reference_of_keys(x: &[f32], key: &[f32]) -> f32 {
    let whole = x.len() / LANES * LANES;
    let mut lanes = vec![0f32; LANES];
    for j in 0..whole {
        lanes[j % LANES] = x[j].mul_add(key[j], lanes[j % LANES]);
    }
    while lanes.len() > 1 {
        let (lower, upper) = lanes.split_at(lanes.len() / 2);
        lanes = lower.iter().zip(upper).map(|(lower, upper)| lower + upper).collect();
    }
    (whole..x.len()).fold(lanes[0], |sum, j| x[j].mul_add(key[j], sum))
}

#[test]
fn products_with_keys_are_summed_in_one_order() {
    for (width, stride, rows, count) in [
        (64, 192, 3, 100),
        (16, 16, 1, 15),
        (72, 80, 2, 33),
        (5, 7, 4, 17),
        (128, 128, 5, 64),
        (256, 512, 8, 129),
        (8, 8, 1, 1),
    ] {
        let x = Stream::new(1, 0, 0, 0).uniform(rows * width, 1.0);
        let values = Stream::new(2, 0, 0, 0).uniform((count - 1) * stride + width, 1.0);
        for set in InstructionSet::here() {
            let mut out = vec![f32::NAN; rows * count];
            set.dot_apart(&x, Apart { values: &values, stride, width }, &mut out);
            for (n, found) in out.iter().enumerate() {
                let want = reference_of_keys(&x[n / count * width..][..width], &values[n % count * stride..][..width]);
                same(*found, want, &format!("{set:?}, {width} elements, row {} and key {}", n / count, n % count));
            }
        }
    }
}

#[test]
fn codes_are_summed_in_the_same_order() {
    let mut matrices = 0;
    for_all(|matrix| {
        let [_, width] = matrix.shape;
        let x = Random(Stream::new(matrices, 0, 0, 0)).numbers(width);
        let rows = 2..6;
        let values = |row| (0..width).map(|column| matrix.value(row, column)).collect::<Vec<f32>>();
        let want: Vec<f32> = rows.clone().map(|row| reference(&x, &values(row))).collect();
        for set in InstructionSet::here() {
            let mut out = vec![f32::NAN; rows.len()];
            matrix.dot_rows(set, rows.clone(), &split(&x), &mut out);
            for ((row, found), want) in rows.clone().zip(out).zip(&want) {
                same(found, *want, &format!("{set:?}, row {row} of {matrix:?}"));
            }
            // Three rows at a time: a last one is left.
            let mut found = Vec::new();
            matrix.split_rows(set, rows.clone(), &mut vec![f32::NAN; 3 * width], &mut |first, some, _| {
                assert_eq!(first * width, found.len());
                found.extend_from_slice(some);
            });
            let apart: Vec<f32> = rows.clone().flat_map(|row| split(&values(row))).collect();
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
            assert!(bits(&found) == bits(&apart), "{set:?}, rows of {matrix:?} apart");
        }
        matrices += 1;
    });
    assert!(matrices > 2000, "{matrices}");
}

#[test]
fn rows_are_rounded_to_the_nearest_bf16_in_the_order_of_activations() {
    let (mut found, mut matrices) = (0, 0);
    for_all(|matrix| {
        let [_, width] = matrix.shape;
        let (rows, stride) = (2..6, width.next_multiple_of(HALF) + HALF);
        let mut out = vec![bf16::ONE; rows.len() * stride];
        matrices += 1;
        if !matrix.round_rows(rows.clone(), stride, &mut out) {
            return;
        }
        found += 1;
        for (row, out) in rows.zip(out.chunks(stride)) {
            let mut values: Vec<bf16> = (0..width).map(|column| bf16::from_f32(matrix.value(row, column))).collect();
            matrix.arrange(&mut values);
            values.resize(stride, bf16::ONE);
            for (got, want) in out.iter().zip(values) {
                let is_small = want.to_f32().abs() <= f32::MIN_POSITIVE && *got == bf16::ZERO;
                let is_same = *got == want || got.is_nan() && want.is_nan() || is_small;
                assert!(is_same, "{got}, not {want}, row {row} of {matrix:?}");
            }
        }
    });
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx512bf16") {
        assert!(found * 20 > matrices, "{found} of {matrices}");
    }
    #[cfg(not(target_arch = "x86_64"))]
    assert_eq!(found, 0);
}
