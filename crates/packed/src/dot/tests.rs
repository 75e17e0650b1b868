//! Every way to multiply a row has the bits of the first one written here.

use finetune_random::Stream;
use half::bf16;

use super::{BLOCK, HALF, LANES};
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
                set.dot_each(&split(&x).repeat(rows), &split(&w).repeat(outputs), length, &mut each);
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
        }
        matrices += 1;
    });
    assert!(matrices > 2000, "{matrices}");
}
