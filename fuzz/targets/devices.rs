//! The matrix of RDMA devices: it is refused, or what it is written as reads back to the same
//! matrix.
#![no_main]

use finetune_allreduce::DeviceMatrix;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(matrix) = DeviceMatrix::parse(text) {
        let _ = (matrix.shape(), matrix.missing_for_mesh(), matrix.missing_for_ring());
        assert_eq!(DeviceMatrix::parse(&matrix.to_json()).expect("a written matrix"), matrix);
    }
});
