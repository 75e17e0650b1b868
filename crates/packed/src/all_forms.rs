//! Matrices of every form, for tests.

use finetune_random::Stream;
use half::{bf16, f16};

use crate::numbers::e4m3;
use crate::{Codes, Decoder, Groups, NibbleOrder, Numbers, PackedMatrix, Rounding, Zeros};

/// Rows of each.
pub(crate) const ROWS: usize = 27;

/// Odd, even, narrow and wide.
const WIDTHS: [usize; 4] = [37, 64, 177, 528];

pub(crate) struct Random(pub(crate) Stream);

impl Random {
    fn bytes(&self, n: usize) -> Vec<u8> {
        self.0.uniform(n, 128.0).into_iter().map(|value| (value.floor() + 128.0) as u8).collect()
    }

    /// Numbers of every size that 16 bits have, negative ones too.
    pub(crate) fn numbers(&self, n: usize) -> Vec<f32> {
        let bytes = self.bytes(n).into_iter();
        bytes.zip(self.0.uniform(n, 1.0)).map(|(byte, value)| value * (f32::from(byte % 32) - 16.0).exp2()).collect()
    }
}

/// Groups of a matrix with so many columns.
fn groups(width: usize) -> Vec<Groups> {
    let order = |n: usize| (0..width as u32).map(|column| column.wrapping_mul(2_654_435_761) % n as u32).collect();
    vec![
        Groups::Blocks { rows: 1, columns: 32 },
        Groups::Blocks { rows: 1, columns: width },
        Groups::Blocks { rows: 4, columns: 5 },
        Groups::Blocks { rows: 128, columns: 128 },
        Groups::Flat { elements: 64 },
        Groups::Flat { elements: 7 },
        Groups::Blocks { rows: 1, columns: 1 },
        Groups::OfColumns { group: order(3), count: 3 },
    ]
}

fn scales(random: &Random, n: usize) -> Vec<Numbers> {
    let floats = random.numbers(n);
    // The largest power and NaN are left out.
    let powers = random.bytes(n).into_iter().map(|power| power % 200).collect();
    let small = random.bytes(n).into_iter().map(|code| code & 0xfe).collect();
    vec![
        Numbers::F32(floats.clone()),
        Numbers::F16(floats.iter().map(|value| f16::from_f32(*value)).collect()),
        Numbers::BF16(floats.iter().map(|value| bf16::from_f32(*value)).collect()),
        Numbers::E8M0(powers),
        Numbers::E4M3(small),
        Numbers::Product {
            scales: floats.iter().take(n.div_ceil(8)).map(|value| f16::from_f32(*value)).collect(),
            factors: random.bytes(n).into_iter().map(|factor| factor as i8).collect(),
            per: 8,
        },
    ]
}

fn decoders(random: &Random, n: usize, bits: usize) -> Vec<Decoder> {
    let mut decoders = vec![
        Decoder::Affine { biases: Numbers::F32(random.numbers(n)) },
        Decoder::Shifted { zeros: Zeros::All(1 << (bits - 1)), factor: 1.0 },
        Decoder::Shifted { zeros: Zeros::Each(random.bytes(n)), factor: 1.0 / 127.0 },
        Decoder::Table { table: random.numbers(1 << bits) },
    ];
    if bits == 8 {
        decoders.push(Decoder::Table { table: (0..=255).map(e4m3).collect() });
    }
    decoders
}

/// Calls `test` with matrices of all forms. Scales and roundings take turns.
pub(crate) fn for_all(mut test: impl FnMut(&PackedMatrix)) {
    let mut seed = 0;
    for (bits, order) in
        [2, 3, 4, 5, 6, 8].map(|bits| (bits, NibbleOrder::LowFirst)).into_iter().chain([(4, NibbleOrder::HighFirst)])
    {
        for width in WIDTHS {
            for groups in groups(width) {
                let shape = [ROWS, width];
                let count = groups.count(shape);
                let random = Random(Stream::new(seed, 0, 0, 0));
                for decoder in decoders(&random, count, bits) {
                    for rounding in [Rounding::None, Rounding::F16, Rounding::BF16] {
                        seed += 1;
                        let scales = scales(&random, count).swap_remove(seed as usize % 6);
                        // Rows follow each other, or begin with a word.
                        let row_bits = if seed % 2 == 0 { width * bits } else { (width * bits).next_multiple_of(32) };
                        let needed = Codes::new(Vec::new(), bits, row_bits, order).bytes_needed(ROWS, width);
                        let codes = Codes::new(random.bytes(needed), bits, row_bits, order);
                        let (groups, decoder) = (groups.clone(), decoder.clone());
                        test(&PackedMatrix { shape, codes, scales, groups, decoder, rounding });
                    }
                }
            }
        }
    }
}
