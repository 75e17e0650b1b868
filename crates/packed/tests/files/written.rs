//! What the quantizers write is read as the matrix that they made.

use finetune_packed::{Scheme, Stored, config_entry, file_bytes, file_tensors, quantize};
use finetune_random::Stream;
use half::bf16;

use crate::made::Files;

const WEIGHT: &str = "model.layers.0.mlp.up_proj.weight";

#[test]
fn what_is_written_is_read_as_it_was() {
    let schemes = [
        (Scheme::Nf4, [6, 176], "bitsandbytes NF4"),
        (Scheme::Int8, [6, 40], "bitsandbytes int8"),
        (Scheme::Mlx4, [6, 128], "MLX 4-bit, groups of 64"),
        (Scheme::Mlx8, [6, 128], "MLX 8-bit, groups of 64"),
        (Scheme::Mxfp4, [6, 96], "MXFP4, groups of 32"),
    ];
    for (scheme, shape, words) in schemes {
        let values = Stream::new(14, 0, 0, 0).normal(shape[0] * shape[1], 0.05);
        let values: Vec<f32> = values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect();
        let made = quantize(scheme, &values, shape, Stored::BF16).expect(words);
        let specs = file_tensors(scheme, WEIGHT, shape, Stored::BF16);
        let config = config_entry(scheme).into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let read = Files::new(specs, file_bytes(scheme, &made), config).read(WEIGHT, shape);
        let (format, read) = read.expect(words).expect(words);
        assert_eq!(format, words);
        assert_eq!(read.bytes(), made.bytes(), "{words}");
        for place in 0..values.len() {
            let (row, column) = (place / shape[1], place % shape[1]);
            let (read, made) = (read.value(row, column), made.value(row, column));
            assert_eq!(read.to_bits(), made.to_bits(), "{words} at {row}, {column}: {read} and {made}");
        }
    }
}
