//! Nanoseconds a weight that decoding takes, one thread:
//! `cargo bench -p finetune-packed --bench decode [NAME]`.

use std::time::Instant;

use finetune_packed::dot::ROWS;
use finetune_packed::{
    Codes, Decoder, Groups, InstructionSet, NibbleOrder, Numbers, PackedMatrix, Rounding, Scheme, Stored, Zeros,
    quantize,
};
use finetune_random::Stream;
use half::{bf16, f16};

const SHAPE: [usize; 2] = [256, 4096];

/// The best of so many times.
const TIMES: usize = 40;

fn matrices() -> Vec<(&'static str, PackedMatrix)> {
    let [rows, columns] = SHAPE;
    let values = Stream::new(1, 0, 0, 0).normal(rows * columns, 0.02);
    let made = |scheme| quantize(scheme, &values, SHAPE, Stored::BF16).expect("a packed matrix");
    let codes = |bits: usize| {
        let bytes = values.iter().take(rows * columns * bits / 8).map(|value| value.to_bits() as u8);
        Codes::new(bytes.collect(), bits, columns * bits, NibbleOrder::LowFirst)
    };
    let affine = |bits| PackedMatrix { codes: codes(bits), ..made(Scheme::Mlx4) };
    let e4m3 = |code: u8| {
        let magnitude = f32::from_bits(u32::from(code & 0x7f) << 20) * 2f32.powi(120);
        if code & 0x7f == 0x7f {
            f32::NAN
        } else if code < 0x80 {
            magnitude
        } else {
            -magnitude
        }
    };
    let blocks = PackedMatrix {
        codes: codes(8),
        scales: Numbers::F32(vec![0.01; rows * columns / 128 / 128]),
        groups: Groups::Blocks { rows: 128, columns: 128 },
        decoder: Decoder::Table { table: (0..=255).map(e4m3).collect() },
        ..made(Scheme::Mlx4)
    };
    let ordered = PackedMatrix {
        codes: codes(4),
        scales: Numbers::F16(vec![f16::ONE; rows * columns / 128]),
        groups: Groups::OfColumns { group: (0..columns as u32).map(|n| n * 7 % 32).collect(), count: columns / 128 },
        decoder: Decoder::Shifted { zeros: Zeros::Each(vec![8; rows * columns / 128]), factor: 1.0 },
        ..made(Scheme::Mlx4)
    };
    let gguf = PackedMatrix {
        codes: codes(4),
        scales: Numbers::Product {
            scales: vec![f16::ONE; rows * columns / 256],
            factors: vec![3; rows * columns / 32],
            per: 8,
        },
        groups: Groups::Blocks { rows: 1, columns: 32 },
        decoder: Decoder::Affine {
            biases: Numbers::Product {
                scales: vec![f16::ONE; rows * columns / 256],
                factors: vec![-3; rows * columns / 32],
                per: 8,
            },
        },
        rounding: Rounding::None,
        shape: SHAPE,
    };
    vec![
        ("mlx 2 bits", affine(2)),
        ("mlx 3 bits", affine(3)),
        ("mlx 4 bits", made(Scheme::Mlx4)),
        ("mlx 5 bits", affine(5)),
        ("mlx 6 bits", affine(6)),
        ("mlx 8 bits", made(Scheme::Mlx8)),
        ("mxfp4", made(Scheme::Mxfp4)),
        ("nf4", made(Scheme::Nf4)),
        ("int8", made(Scheme::Int8)),
        ("fp8 blocks", blocks),
        ("gptq act-order", ordered),
        ("gguf q4_k", gguf),
    ]
}

/// Nanoseconds a weight, the best time.
fn best(mut decode: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        decode();
        start.elapsed().as_secs_f64()
    };
    (0..TIMES).map(time).fold(f64::INFINITY, f64::min) * 1e9 / (SHAPE[0] * SHAPE[1]) as f64
}

/// What the same takes of a matrix in 16 bits.
fn widen(values: &[bf16], out: &mut [f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
}

fn main() {
    let wanted = std::env::args().nth(1).filter(|argument| !argument.starts_with('-')).unwrap_or_default();
    let [rows, columns] = SHAPE;
    // 64 KiB of values at a time, as the products take them.
    let mut out = vec![0f32; 16 * 1024];
    println!("{:16} {:9} {:>8} {:>8} {:>12}   ns a weight", "", "", "rows", "product", "of 8 rows");
    let halves = vec![bf16::ONE; rows * columns];
    let widened = best(|| {
        for some in halves.chunks_exact(out.len()) {
            widen(std::hint::black_box(some), std::hint::black_box(&mut out));
        }
    });
    println!("{:16} {:9} {widened:8.3}", "bf16", "SSE2");
    let (x, floats) = (vec![1.0; columns], vec![1.0; rows * columns]);
    for set in InstructionSet::here() {
        let x = std::hint::black_box(&x);
        let of_bf16 = best(|| {
            std::hint::black_box(halves.chunks_exact(columns).map(|row| set.dot_bf16(x, row)).sum::<f32>());
        });
        let of_f32 = best(|| {
            std::hint::black_box(floats.chunks_exact(columns).map(|row| set.dot_f32(x, row)).sum::<f32>());
        });
        println!("{:16} {:9} {:8} {of_bf16:8.3}", "bf16", format!("{set:?}"), "");
        println!("{:16} {:9} {:8} {of_f32:8.3}", "f32", format!("{set:?}"), "");
    }
    for (name, matrix) in matrices().into_iter().filter(|(name, _)| name.contains(&wanted)) {
        for set in InstructionSet::here() {
            let of_rows = best(|| {
                for row in 0..rows {
                    let out = &mut out[row % 4 * columns..][..columns];
                    matrix.decode_row_with(set, row, 0..columns, std::hint::black_box(out));
                }
            });
            let mut products = vec![0f32; rows];
            let product = best(|| matrix.dot_rows(set, 0..rows, &x, std::hint::black_box(&mut products)));
            let (eight, mut some) = (vec![1.0; 8 * columns], vec![0.0; ROWS * columns]);
            let several = best(|| {
                matrix.split_rows(set, 0..rows, &mut some, &mut |_, some, ahead| {
                    let products = &mut products[..8 * some.len() / columns];
                    set.dot_each(&eight, some, columns, ahead, std::hint::black_box(products));
                });
            });
            let set = format!("{set:?}");
            println!("{name:16} {set:9} {of_rows:8.3} {product:8.3} {several:12.3}");
        }
    }
    println!("\npacked by {} threads", rayon::current_num_threads());
    let values = Stream::new(1, 0, 0, 0).normal(rows * columns, 0.02);
    for scheme in [Scheme::Nf4, Scheme::Int8, Scheme::Mlx4, Scheme::Mlx8, Scheme::Mxfp4] {
        let time = best(|| drop(std::hint::black_box(quantize(scheme, &values, SHAPE, Stored::BF16))));
        println!("{:16} {:9} {time:8.3}", format!("{scheme:?}"), "");
    }
}
