//! A checkpoint's manifest, as it is, and with the checksum that its bytes need to be believed.
#![no_main]

use std::path::Path;

use finetune_store::Manifest;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    let path = Path::new("step-000001/manifest.json");
    let _ = Manifest::parse(path, body);
    let checksum = blake3::hash(body).to_hex();
    let mut whole = body.to_vec();
    whole.extend_from_slice(format!(",\n  \"checksum\": \"{checksum}\"\n}}\n").as_bytes());
    let _ = Manifest::parse(path, &whole);
});
