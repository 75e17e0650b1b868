//! Packed weights in files: `values.rs` compares them with what the programs that wrote them decode,
//! `damaged.rs` has what must be refused, `written.rs` reads what this crate writes.
//! `scripts/make_packed_file_goldens.py` made the files.

mod damaged;
mod made;
mod values;
mod written;
