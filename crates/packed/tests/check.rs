//! What `PackedMatrix::check` refuses, and with which words.

use finetune_packed::{Codes, Decoder, Groups, NibbleOrder, Numbers, PackedMatrix, Rounding, Zeros};
use half::f16;

const ROWS: usize = 3;
const COLUMNS: usize = 96;

/// 4-bit codes in groups of 32 with f32 scales and biases: nine groups.
fn affine() -> PackedMatrix {
    PackedMatrix {
        shape: [ROWS, COLUMNS],
        codes: codes(4, ROWS * COLUMNS / 2),
        scales: Numbers::F32(vec![-0.5; 9]),
        groups: Groups::Blocks { rows: 1, columns: 32 },
        decoder: Decoder::Affine { biases: Numbers::F16(vec![f16::ONE; 9]) },
        rounding: Rounding::None,
    }
}

fn codes(bits: usize, bytes: usize) -> Codes {
    Codes::new((0..bytes).map(|n| n as u8 % 0x77).collect(), bits, COLUMNS * bits, NibbleOrder::LowFirst)
}

/// E4M3 codes, all of them numbers, with powers of two as scales.
fn e4m3() -> PackedMatrix {
    let magnitude = |code: u8| {
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
        if exponent == 0 { mantissa * 2f32.powi(-9) } else { (8.0 + mantissa) * 2f32.powi(exponent - 10) }
    };
    let value = |code: u8| match code & 0x7f {
        0x7f => f32::NAN,
        _ => magnitude(code) * if code < 0x80 { 1.0 } else { -1.0 },
    };
    let decoder = Decoder::Table { table: (0..=255).map(value).collect() };
    PackedMatrix { codes: codes(8, ROWS * COLUMNS), scales: Numbers::E8M0(vec![120; 9]), decoder, ..affine() }
}

fn with(change: impl Fn(&mut PackedMatrix)) -> PackedMatrix {
    let mut matrix = affine();
    change(&mut matrix);
    matrix
}

fn of_columns(last: u32) -> Groups {
    let group = (0..COLUMNS as u32).map(|column| if column + 1 == COLUMNS as u32 { last } else { column % 3 });
    Groups::OfColumns { group: group.collect(), count: 3 }
}

fn with_code(code: u8) -> PackedMatrix {
    let mut bytes = codes(8, ROWS * COLUMNS).bytes().to_vec();
    bytes[COLUMNS + 7] = code;
    PackedMatrix { codes: Codes::new(bytes, 8, COLUMNS * 8, NibbleOrder::LowFirst), ..e4m3() }
}

fn product(factors: usize, scales: Vec<f16>) -> Numbers {
    Numbers::Product { scales, factors: vec![-3; factors], per: 4 }
}

fn scale(n: usize, value: f32) -> Numbers {
    let mut scales = vec![0.5; 9];
    scales[n] = value;
    Numbers::F32(scales)
}

#[test]
fn whole_matrices_pass() {
    let bytes_after_rows = Codes::new(vec![0; ROWS * 50], 4, 400, NibbleOrder::LowFirst);
    let cases = [
        affine(),
        e4m3(),
        with(|m| m.groups = of_columns(0)),
        with(|m| (m.groups, m.scales) = (Groups::Flat { elements: 32 }, product(9, vec![f16::ONE; 3]))),
        with(|m| m.decoder = Decoder::Shifted { zeros: Zeros::Each(vec![7; 9]), factor: 1.0 }),
        with(|m| m.decoder = Decoder::Shifted { zeros: Zeros::All(8), factor: 1.0 }),
        with(|m| m.codes = bytes_after_rows.clone()),
        with(|m| m.scales = scale(3, 0.0)),
    ];
    for matrix in cases {
        matrix.check().unwrap_or_else(|error| panic!("{error}: {matrix:?}"));
    }
}

#[test]
fn what_does_not_add_up_is_refused_with_its_place() {
    let order = NibbleOrder::LowFirst;
    let cases = [
        (with(|m| m.shape = [0, 96]), "it has no elements"),
        (with(|m| m.shape = [4, 96]), "its codes have 144 bytes, and 4 × 96 codes of 4 bits take 192"),
        (with(|m| m.shape = [3, 97]), "3 rows of 97 codes of 4 bits, 384 bits apart"),
        (with(|m| m.shape = [usize::MAX, 96]), "18446744073709551615 rows of 96 codes of 4 bits, 384 bits apart"),
        (with(|m| m.codes = codes(4, 143)), "its codes have 143 bytes, and 3 × 96 codes of 4 bits take 144"),
        (with(|m| m.codes = codes(4, 145)), "its codes have 145 bytes, and 3 × 96 codes of 4 bits take 144"),
        (with(|m| m.codes = Codes::new(vec![0; 144], 4, 8, order)), "3 rows of 96 codes of 4 bits, 8 bits apart"),
        (with(|m| m.groups = Groups::Blocks { rows: 1, columns: 0 }), "its groups have no elements"),
        (with(|m| m.groups = Groups::Flat { elements: 0 }), "its groups have no elements"),
        (with(|m| m.groups = Groups::Blocks { rows: 1, columns: 64 }), "it has 9 scales, not 6"),
        (with(|m| m.groups = of_columns(3)), "column 95 is in group 3, and there are 3"),
        (
            with(|m| m.groups = Groups::OfColumns { group: vec![0; 9], count: 1 }),
            "9 columns have a group, and it has 96 columns",
        ),
        (with(|m| m.scales = Numbers::F32(vec![1.0; 8])), "it has 8 scales, not 9"),
        (with(|m| m.scales = scale(7, f32::NAN)), "scale 7 is NaN"),
        (with(|m| m.scales = scale(8, f32::NEG_INFINITY)), "scale 8 is -inf"),
        (with(|m| m.scales = Numbers::E8M0([&[1; 8][..], &[255]].concat())), "scale 8 is NaN"),
        (with(|m| m.scales = Numbers::E4M3([&[0xff][..], &[1; 8]].concat())), "scale 0 is NaN"),
        (with(|m| m.scales = product(9, vec![f16::ONE; 2])), "it has 2 scales of scales, not 3"),
        (with(|m| m.scales = product(9, vec![f16::ONE, f16::INFINITY, f16::ONE])), "scale 4 is -inf"),
        (
            with(|m| m.scales = Numbers::Product { scales: vec![], factors: vec![1; 9], per: 0 }),
            "each scale has no factors",
        ),
        (with(|m| m.decoder = Decoder::Affine { biases: scale(2, f32::INFINITY) }), "bias 2 is inf"),
        (with(|m| m.decoder = Decoder::Affine { biases: Numbers::F32(vec![]) }), "it has 0 biases, not 9"),
        (
            with(|m| m.decoder = Decoder::Shifted { zeros: Zeros::Each(vec![7; 10]), factor: 1.0 }),
            "it has 10 zero points, not 9",
        ),
        (with(|m| m.decoder = Decoder::Shifted { zeros: Zeros::All(7), factor: f32::NAN }), "its factor is NaN"),
        (with(|m| m.decoder = Decoder::Table { table: vec![0.0; 15] }), "it has 15 values of codes, not 16"),
        (with_code(0x7f), "element 7 of row 1 is NaN"),
        (with_code(0xff), "element 7 of row 1 is NaN"),
    ];
    for (matrix, what) in cases {
        let error = matrix.check().expect_err(what);
        assert_eq!(error.to_string(), format!("the packed matrix: {what}"));
    }
}
