//! Products by head compared with their composed form, and the bits of one token with those of many, and of
//! a matrix in few bits with those of itself in f32.
//!
//! The tests run on the CPU. With `FINETUNE_TEST_DEVICE=gpu` they run on the first GPU, a software
//! renderer if there is no other.

use burn::tensor::{DType, Tensor, TensorData};
use finetune_kernels::by_head::{times, times_transposed};
use finetune_kernels::devices::is_cpu;
use finetune_kernels::weight::{PackedWeight, Weight, packed_rows};
use finetune_kernels::{HeadRows, composed};
use finetune_packed::{Scheme, Stored, quantize};
use finetune_random::Stream;

mod tested;

use tested::device;

fn normal<const D: usize>(seed: u64, dims: [usize; D]) -> Tensor<D> {
    let values = Stream::new(seed, 9, 0, 0).normal(dims.iter().product(), 1.0);
    Tensor::from_data(TensorData::new(values, dims), &device())
}

fn vec_of<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().expect("f32")
}

fn assert_close(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}");
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(got, want)| got - want));
    let size = norm(&mut want.iter().copied());
    assert!(size > 0.1 && difference < 1e-5 * size, "{name}: {difference:e} of {size}");
}

/// (heads, inputs, rows of a head): keys and values of heads that lie one behind the other, the same rows for
/// all heads, one head, and enough for several threads. Of those with whole blocks of 64 inputs and without.
const SHAPES: [(usize, usize, HeadRows); 6] = [
    (4, 16, HeadRows { first: 0, step: 22, count: 12 }),
    (4, 70, HeadRows { first: 12, step: 22, count: 10 }),
    (5, 128, HeadRows { first: 0, step: 0, count: 3 }),
    (1, 64, HeadRows { first: 2, step: 9, count: 7 }),
    (16, 512, HeadRows { first: 128, step: 192, count: 64 }),
    (16, 512, HeadRows { first: 0, step: 192, count: 128 }),
];

/// A matrix that all heads' rows fit in.
fn matrix(heads: usize, inputs: usize, rows: HeadRows) -> Tensor<2> {
    normal(1, [rows.first + (heads - 1) * rows.step + rows.count, inputs])
}

/// The ways that a matrix is held, with its values in f32.
fn ways(w: &Tensor<2>) -> Vec<(String, Weight, Tensor<2>)> {
    let dims = w.dims();
    let dense = |dtype: DType| {
        let held = w.clone().cast(dtype);
        (format!("{dtype:?}"), Weight::Dense(held.clone()), held.cast(DType::F32))
    };
    let packed = |scheme: Scheme| {
        let matrix = quantize(scheme, &vec_of(w.clone()), dims, Stored::F32).expect("a packed matrix");
        let held = PackedWeight::new(matrix, &device());
        let like = Tensor::<1>::zeros([1], (&device(), DType::F32));
        let values = packed_rows(like, held.clone(), (0..dims[0] as u32).collect());
        (format!("{scheme:?}"), Weight::Packed(held), values)
    };
    let mut all = vec![dense(DType::F32), packed(Scheme::Nf4), packed(Scheme::Int8)];
    if dims[1].is_multiple_of(64) {
        all.extend([packed(Scheme::Mlx4), packed(Scheme::Mlx8), packed(Scheme::Mxfp4)]);
    }
    if is_cpu(&device()) {
        all.extend([dense(DType::BF16), dense(DType::F16)]);
    }
    all
}

type Product = fn(Tensor<3>, Weight, HeadRows) -> Tensor<3>;

const PRODUCTS: [(bool, Product); 2] = [(false, times), (true, times_transposed)];

#[test]
fn products_by_head_are_those_of_their_rows() {
    for (heads, inputs, rows) in SHAPES {
        for (way, w, values) in ways(&matrix(heads, inputs, rows)) {
            let of_heads = composed::rows_by_head(values.clone(), rows, heads);
            for (is_transposed, product) in PRODUCTS {
                let width = if is_transposed { inputs } else { rows.count };
                for tokens in [1, 3, 8, 21] {
                    let x = normal(2, [tokens, heads, width]);
                    let name = format!("{way}, {heads} heads, {rows:?}, transposed {is_transposed}, {tokens} tokens");
                    let got = vec_of(product(x.clone(), w.clone(), rows));
                    let want = vec_of(composed::product_by_head(x.clone(), of_heads.clone(), is_transposed));
                    assert_close(&name, &got, &want);
                    if !is_cpu(&device()) {
                        continue;
                    }
                    let in_f32 = vec_of(product(x.clone(), Weight::Dense(values.clone()), rows));
                    assert!(got == in_f32, "{name}: other bits than in f32");
                    for (token, got) in got.chunks(got.len() / tokens).enumerate() {
                        let alone = vec_of(product(x.clone().narrow(0, token, 1), w.clone(), rows));
                        assert!(got == alone, "{name}: token {token} has other bits alone");
                    }
                }
            }
        }
    }
}

/// The bits do not depend on the number of threads.
#[test]
fn threads_change_no_bit() {
    if !is_cpu(&device()) {
        return;
    }
    let (heads, inputs, rows) = SHAPES[5];
    let w = matrix(heads, inputs, rows);
    for (is_transposed, product) in PRODUCTS {
        let x = normal(2, [5, heads, if is_transposed { inputs } else { rows.count }]);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| vec_of(product(x.clone(), Weight::Dense(w.clone()), rows)))
        };
        let one = on(1);
        assert!([2, 3, 8].iter().all(|&threads| on(threads) == one), "transposed {is_transposed}");
    }
}

#[test]
#[should_panic(expected = "vectors of 12 elements, not of 16")]
fn vectors_of_another_length_are_refused() {
    let rows = HeadRows { first: 0, step: 22, count: 12 };
    times(normal(2, [1, 4, 16]), Weight::Dense(matrix(4, 16, rows)), rows);
}

#[test]
#[should_panic(expected = "rows of 5 heads within 78")]
fn rows_beyond_the_matrix_are_refused() {
    let rows = HeadRows { first: 0, step: 22, count: 12 };
    times_transposed(normal(2, [1, 5, 16]), Weight::Dense(matrix(4, 16, rows)), rows);
}
