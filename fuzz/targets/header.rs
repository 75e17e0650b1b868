//! The header of a safetensors file: it is refused, or every tensor lies inside of the file and
//! none overlaps another.
#![no_main]

use finetune_store::Header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| {
    let Ok(header) = Header::parse(file) else { return };
    let mut end = 0;
    for tensor in &header.tensors {
        assert!(tensor.begin == end && tensor.begin <= tensor.end, "{tensor:?}");
        end = tensor.end;
    }
    assert_eq!(header.data_start + end, file.len());
});
