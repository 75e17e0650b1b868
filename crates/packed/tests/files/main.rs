//! Packed weights in files. `values.rs` compares them with what their own programs decode,
//! `damaged*.rs` have what must be refused, `written.rs` reads what this crate writes.
//! `scripts/make_packed_file_goldens.py` made the files.

mod damaged;
mod damaged_compressed_and_fp8;
mod damaged_gptq_and_awq;
mod damaged_mlx_and_bitsandbytes;
mod made;
mod values;
mod written;
